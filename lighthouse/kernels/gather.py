"""Gather rows of selected entries, and its adjoint, which spreads gathered rows over positions.

With w = p^l, the gathered row of entry (l, i) at its place is

    mean of rows[i w + r], 0 <= r < w                     pooling (forward of pool-gather)
    sum of rows[(i + 1) w - 1 + r], 0 <= r < w            collecting (backward of scatter-back)

and position t receives the sum over the levels l whose entry is included, or, with FINEST, of the
lowest of them, of

    gathered[slot(l, t // w)] / w                         backward of pool-gather
    gathered[slot(l, (t - w + 1) // w)], t >= w - 1       forward of scatter-back
    seam[l - 1], t < w - 1                                the same, if there is a chunk before

With FINEST, collecting leaves out the rows of positions that a finer level reaches.

The coarsest level, which touches every row, comes ready from ``pooling``. A gathering program owns
``BLOCK`` places of one head, a spreading one ``BLOCK`` positions; each writes its rows once, after
summing in float32.

Shapes: B batch, H heads, Hkv key-value heads, N positions, D head dimension, S gathered length,
nc coarsest entries.
"""

import torch
import triton
import triton.language as tl

from .launch import covered, own_block, own_block_grid, row_strides, sequence_first

# Elements of a program's tile, and its warps: the fastest of a sweep on an H100 (bf16, D = 128).
GATHER_TILE, GATHER_WARPS = 1024, 4
SPREAD_TILE, SPREAD_WARPS = 2048, 2


@triton.jit
def _gather(
    rows, coarsest_rows, index, slot, gathered,
    in_b, in_h, in_n, out_b, out_h, out_s,
    heads, group, length, coarsest, gathered_length, pyramid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr, COLLECT: tl.constexpr, FINEST: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads, gathered_length, BLOCK)
    plane = batch * heads + head
    index_plane = batch * (heads // group) + head // group

    place = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = place < gathered_length
    entry = tl.load(index + index_plane * gathered_length + place, mask=inside, other=0)
    entry = entry.to(tl.int64)
    # The level of an entry, its number there and its span, from where the levels are stored.
    span = tl.full((BLOCK,), 1, tl.int64)
    level_length = tl.zeros((), dtype=tl.int64) + length
    coarser = tl.full((BLOCK,), 1, tl.int1)
    for _ in tl.static_range(LEVELS - 1):
        coarser = coarser & (entry >= level_length)
        entry = tl.where(coarser, entry - level_length, entry)
        span = tl.where(coarser, span * P, span)
        level_length = level_length // P
    is_coarsest = coarser

    in_columns = (column < D)[None, :]
    source = coarsest_rows + (plane * coarsest + entry[:, None]) * D + column[None, :]
    total = tl.load(source, mask=(inside & is_coarsest)[:, None] & in_columns, other=0.0)
    total = total.to(tl.float32)
    base = rows + batch * in_b + head * in_h
    first = (entry + 1) * span - 1 if COLLECT else entry * span
    LARGEST: tl.constexpr = P ** (LEVELS - 2)
    for r in tl.range(LARGEST):
        row = first + r
        wanted = inside & (is_coarsest == 0) & (r < span) & (row < length)
        if FINEST:
            slots = slot + index_plane * pyramid
            wanted = wanted & (covered(slots, row, wanted, length, P, LEVELS - 2, span) == 0)
        source = base + row[:, None] * in_n + column[None, :]
        x = tl.load(source, mask=wanted[:, None] & in_columns, other=0.0).to(tl.float32)
        total += x if COLLECT else x / span.to(tl.float32)[:, None]
    target = gathered + batch * out_b + head * out_h + place[:, None] * out_s + column[None, :]
    tl.store(target, total.to(gathered.dtype.element_ty), mask=inside[:, None] & in_columns)


@triton.jit
def _spread(
    gathered, slot, seam, rows,
    in_b, in_h, in_s, out_b, out_h, out_n,
    heads, group, length, pyramid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr, SCATTER: tl.constexpr, SEAM: tl.constexpr,
    FINEST: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads, length, BLOCK)
    slots = slot + (batch * (heads // group) + head // group) * pyramid
    source = gathered + batch * in_b + head * in_h

    position = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = position < length
    in_columns = (column < D)[None, :]
    total = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    offset = tl.zeros((), dtype=tl.int64)
    # Positions that take no more.
    done = inside == 0
    for level in tl.static_range(LEVELS):
        span = P**level
        shifted = position - (span - 1) if SCATTER else position
        reached = (done == 0) & (shifted >= 0)
        place = tl.load(slots + offset + shifted // span, mask=reached, other=-1).to(tl.int64)
        x = tl.load(
            source + place[:, None] * in_s + column[None, :],
            mask=(place >= 0)[:, None] & in_columns,
            other=0.0,
        ).to(tl.float32)
        total += x if SCATTER else x * (1.0 / span)
        if SEAM and level > 0:
            row = (batch * heads + head) * (LEVELS - 1) + level - 1
            x = tl.load(seam + row * D + column, mask=column < D, other=0.0).to(tl.float32)
            before = (done == 0) & (position < span - 1)
            total += tl.where(before[:, None], x[None, :], 0.0)
            if FINEST:
                done = done | before
        if FINEST:
            done = done | (place >= 0)
        offset += length // span
    target = rows + batch * out_b + head * out_h + position[:, None] * out_n + column[None, :]
    tl.store(target, total.to(rows.dtype.element_ty), mask=inside[:, None] & in_columns)


def gather(
    rows: torch.Tensor,
    coarsest_rows: torch.Tensor,
    index: torch.Tensor,
    slot: torch.Tensor | None,
    p: int,
    levels: int,
    collect: bool,
) -> torch.Tensor:
    """Launch ``_gather``.

    Args:
        rows: [B, H, N, D].
        coarsest_rows: what the coarsest entries gather, [B, H, nc, D] contiguous.
        index: [B, Hkv, S].
        slot: [B, Hkv, pyramid length], to collect only of positions that no finer level reaches;
            None to collect of all.
        p, levels: pooling factor and levels of the pyramid.
        collect: gather sums from each entry's end on instead of means over it.

    Returns:
        [B, H, S, D], lying in memory as [B, S, H, D].
    """
    rows, strides = row_strides(rows)
    batch, heads, length, d = rows.shape
    s = index.shape[2]
    gathered = sequence_first(rows, s)
    block_d = triton.next_power_of_2(d)
    block = GATHER_TILE // block_d
    _gather[own_block_grid(batch, heads, s, block)](
        rows, coarsest_rows, index, index if slot is None else slot, gathered, *strides,
        *gathered.stride()[:3], heads, heads // index.shape[1], length, coarsest_rows.shape[2], s,
        0 if slot is None else slot.shape[2],
        D=d, BLOCK_D=block_d, BLOCK=block, P=p, LEVELS=levels, COLLECT=collect,
        FINEST=slot is not None, num_warps=GATHER_WARPS,
    )  # fmt: skip
    return gathered


def spread(
    gathered: torch.Tensor,
    slot: torch.Tensor,
    seam: torch.Tensor | None,
    length: int,
    p: int,
    levels: int,
    scatter: bool,
    finest: bool,
) -> torch.Tensor:
    """Launch ``_spread``.

    Args:
        gathered: [B, H, S, D].
        slot: [B, Hkv, pyramid length].
        seam: outputs of the entries of levels 1 to L - 1 that end just before the first position,
            [B, H, L - 1, D] contiguous; only to scatter.
        length: positions N to spread over.
        p, levels: pooling factor and levels of the pyramid.
        scatter: add outputs from each entry's end on, instead of shares over it.
        finest: take the lowest level that reaches a position, instead of the sum; only to scatter.

    Returns:
        [B, H, N, D], lying in memory as [B, N, H, D].
    """
    gathered, strides = row_strides(gathered)
    batch, heads, _, d = gathered.shape
    rows = sequence_first(gathered, length)
    block_d = triton.next_power_of_2(d)
    block = SPREAD_TILE // block_d
    _spread[own_block_grid(batch, heads, length, block)](
        gathered, slot, slot if seam is None else seam, rows, *strides, *rows.stride()[:3],
        heads, heads // slot.shape[1], length, slot.shape[2],
        D=d, BLOCK_D=block_d, BLOCK=block, P=p, LEVELS=levels, SCATTER=scatter,
        SEAM=seam is not None, FINEST=finest, num_warps=SPREAD_WARPS,
    )  # fmt: skip
    return rows
