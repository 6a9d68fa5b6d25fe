"""Spread gathered rows over positions, and collect them again.

Position t receives the sum, over the levels l whose entry is included, of the following rows, with
w = p^l:

    gathered[slot(l, t // w)] / w                         shares (backward of pool-gather)
    gathered[slot(l, (t - w + 1) // w)], t >= w - 1       outputs (forward of scatter-back)
    seam[l - 1], t < w - 1                                outputs of the chunk before, if any

With FINEST it receives the row of the lowest of these levels alone. With ONTO it also receives its
own row of ``onto``. One program owns ``BLOCK`` positions of one head. Only the first p^(L-1) - 1
positions take seam rows. They are spread once more when these have come, because summing in two
steps would round twice.

Collecting is the backward of spreading outputs. Entry (l, i) receives, with w = p^l,

    sum of rows[(i + 1) w - 1 + r], 0 <= r < w

With FINEST it leaves out the rows of positions that a finer entry reaches. The positions that an
entry reaches are those that the p entries (l - 1, (i + 1) p - 1 + c), 0 <= c < p, reach. So one
program owns the positions that ``BLOCK`` coarsest entries of one head reach, reads them once, and
sums level after level. Entry -1 stands for one that ended before this sequence: finer entries reach
its positions. Positions past the end are skipped.

With DOCUMENTS, outputs stay in the document of their entry. A document begins with a coarsest
entry. Where the one after a coarsest entry begins a document, entries that end with the latter
reach their own last position alone, which is the first that they reach.

Either writes each row once, after summing in float32.

Shapes: B batch, H heads, Hkv key-value heads, N positions, D head dimension, S gathered length,
L levels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..context_parallel import ONE_DEVICE, ContextParallel
from ..geometry import PyramidGeometry
from ..memory_layout import sequence_first
from ..reach import ends_with_chunk, seam_gradient, seam_rows, seam_rows_gradient
from .launch import (
    define,
    document_ends,
    own_block,
    own_block_grid,
    place_of,
    row_strides,
    unrolled,
)

# Elements of a program's tile, and its warps: the fastest of a sweep on an H100 (bf16, D = 128).
TILE, WARPS = 2048, 2
# As in the file for pooling, which reads the same rows.
COLLECT_TILE, COLLECT_WARPS = 2048, 8


@triton.jit
def _spread(
    gathered, slot, seam, onto, documents, rows,
    in_b, in_h, in_s, onto_b, onto_h, onto_n, out_b, out_h, out_n,
    heads, group, length, count, pyramid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr, SCATTER: tl.constexpr, SEAM: tl.constexpr,
    FINEST: tl.constexpr, ONTO: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    # Only the first ``count`` of ``length`` positions are written.
    batch, head, block = own_block(heads, count, BLOCK)
    slots = slot + (batch * (heads // group) + head // group) * pyramid
    source = gathered + batch * in_b + head * in_h

    position = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = position < count
    in_columns = (column < D)[None, :]
    shown = inside[:, None] & in_columns
    if ONTO:
        own = onto + batch * onto_b + head * onto_h
        own += position[:, None] * onto_n + column[None, :]
        total = tl.load(own, mask=shown, other=0.0).to(tl.float32)
    else:
        total = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    offset = tl.zeros((), dtype=tl.int64)
    # Where each position's document begins.
    begin = tl.zeros((BLOCK,), dtype=tl.int64)
    if DOCUMENTS:
        begin = tl.load(documents + batch * length + position, mask=inside, other=0).to(tl.int64)
    # Positions that take no further row.
    done = inside == 0
    for level in tl.static_range(LEVELS):
        span = P**level
        shifted = position - (span - 1) if SCATTER else position
        reached = (done == 0) & (shifted >= begin)
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
    tl.store(target, total.to(rows.dtype.element_ty), mask=shown)


def launch_spread(
    gathered: torch.Tensor,
    slot: torch.Tensor,
    length: int,
    p: int,
    levels: int,
    scatter: bool,
    finest: bool,
    onto: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch ``_spread``.

    Args:
        gathered: [B, H, S, D].
        slot: [B, Hkv, pyramid length].
        length: positions N to spread over.
        p, levels: pooling factor and levels of the pyramid.
        scatter: spread outputs from each entry's end on, instead of shares over it.
        finest: take the lowest level that reaches a position, instead of the sum; only with
            ``scatter``.
        onto: rows to add, [B, H, N, D].
        documents: [B, N], for each position the first position of its document, which outputs do
            not leave; only with ``scatter``.

    Returns:
        [B, H, N, D], lying in memory as [B, N, H, D].
    """
    rows = sequence_first(gathered, length)
    pyramid = p, levels, scatter, finest
    _spread_into(rows, gathered, slot, length, *pyramid, onto=onto, documents=documents)
    return rows


def launch_spread_with_seam(
    rows: torch.Tensor,
    gathered: torch.Tensor,
    slot: torch.Tensor,
    seam: torch.Tensor,
    p: int,
    levels: int,
    finest: bool,
) -> None:
    """Spread outputs over the positions that take seam rows, once more, now with these.

    Args:
        rows: from ``launch_spread`` of ``gathered`` with ``scatter``, [B, H, N, D]. The first
            p^(L-1) - 1 positions are written.
        seam: outputs of the entries of levels 1 to L - 1 that end just before the first position,
            [B, H, L - 1, D].
    """
    count = p ** (levels - 1) - 1
    _spread_into(rows, gathered, slot, count, p, levels, True, finest, seam=seam.contiguous())


def _spread_into(
    rows: torch.Tensor,
    gathered: torch.Tensor,
    slot: torch.Tensor,
    count: int,
    p: int,
    levels: int,
    scatter: bool,
    finest: bool,
    onto: torch.Tensor | None = None,
    seam: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> None:
    """Write the first ``count`` positions of ``rows``."""
    gathered, strides = row_strides(gathered)
    onto, onto_strides = (None, (0, 0, 0)) if onto is None else row_strides(onto)
    batch, heads, length, d = rows.shape
    block_d = triton.next_power_of_2(d)
    block = TILE // block_d
    _spread[own_block_grid(batch, heads, count, block)](
        gathered, slot, slot if seam is None else seam, rows if onto is None else onto,
        slot if documents is None else documents.contiguous(), rows,
        *strides, *onto_strides, *rows.stride()[:3],
        heads, heads // slot.shape[1], length, count, slot.shape[2],
        D=d, BLOCK_D=block_d, BLOCK=block, P=p, LEVELS=levels, SCATTER=scatter,
        SEAM=seam is not None, FINEST=finest, ONTO=onto is not None,
        DOCUMENTS=documents is not None, num_warps=WARPS,
    )  # fmt: skip


def _fake_spread(
    gathered: torch.Tensor, slot: torch.Tensor, length: int, *others: Any
) -> torch.Tensor:
    return sequence_first(gathered, length)


def _fake_spread_with_seam(*arguments: Any) -> None:
    pass


define(
    "spread(Tensor gathered, Tensor slot, SymInt length, int p, int levels,"
    " bool scatter, bool finest, Tensor? onto=None, Tensor? documents=None) -> Tensor",
    launch_spread,
    _fake_spread,
)
define(
    "spread_with_seam(Tensor(a!) rows, Tensor gathered, Tensor slot, Tensor seam, int p,"
    " int levels, bool finest) -> ()",
    launch_spread_with_seam,
    _fake_spread_with_seam,
)


@triton.jit
def _collect_level(
    rows, slots, gathered, entry, cut, length, in_n, out_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVEL: tl.constexpr, FINEST: tl.constexpr,
    UNROLLED: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Sums of the rows that entries of a level reach; writes them where the entries are included.

    With FINEST, rows that an included entry has received are zero to the levels above.

    Args:
        cut: see ``document_ends``.
    """
    column = tl.arange(0, BLOCK_D)
    in_columns = (column < D)[None, :]
    below = (entry + 1) * P - 1
    total = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    if LEVEL > 1:
        for child in tl.range(P):
            x = _collect_level(
                rows, slots, gathered, below + child, cut & (child == 0), length, in_n, out_s,
                D, BLOCK_D, BLOCK, P, LEVEL - 1, FINEST, UNROLLED, DOCUMENTS,
            )  # fmt: skip
            if DOCUMENTS:
                x = tl.where((cut & (child > 0))[:, None], 0.0, x)
            total += x
    else:
        for step in tl.range(P // UNROLLED):
            first = below + step * UNROLLED
            for number in tl.static_range(UNROLLED):
                row = first + number
                exists = ((row >= 0) & (row < length))[:, None] & in_columns
                source = rows + row[:, None] * in_n + column[None, :]
                x = tl.load(source, mask=exists, other=0.0).to(tl.float32)
                if FINEST:
                    x = tl.where((place_of(slots, row, length, P, 0) < 0)[:, None], x, 0.0)
                if DOCUMENTS:
                    x = tl.where((cut & (row > below))[:, None], 0.0, x)
                total += x
            # Stores among the loads above would hold them up. Few rows are included, and those are
            # still at hand.
            for number in tl.static_range(UNROLLED):
                row = first + number
                place = place_of(slots, row, length, P, 0)
                included = (place >= 0)[:, None] & in_columns
                source = rows + row[:, None] * in_n + column[None, :]
                target = gathered + place[:, None] * out_s + column[None, :]
                tl.store(target, tl.load(source, mask=included), mask=included)
    place = place_of(slots, entry, length, P, LEVEL)
    included = (place >= 0)[:, None] & in_columns
    target = gathered + place[:, None] * out_s + column[None, :]
    tl.store(target, total.to(gathered.dtype.element_ty), mask=included)
    if FINEST:
        total = tl.where((place < 0)[:, None], total, 0.0)
    return total


@triton.jit
def _collect(
    rows, slot, documents, gathered,
    in_b, in_h, in_n, out_b, out_h, out_s,
    heads, group, length, coarsest, pyramid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr, FINEST: tl.constexpr,
    UNROLLED: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads, coarsest + 1, BLOCK)
    slots = slot + (batch * (heads // group) + head // group) * pyramid
    entry = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64) - 1
    cut = document_ends(documents + batch * length, entry, length, P ** (LEVELS - 1), DOCUMENTS)
    _collect_level(
        rows + batch * in_b + head * in_h, slots, gathered + batch * out_b + head * out_h,
        entry, cut, length, in_n, out_s,
        D, BLOCK_D, BLOCK, P, LEVELS - 1, FINEST, UNROLLED, DOCUMENTS,
    )  # fmt: skip


def launch_collect(
    rows: torch.Tensor,
    slot: torch.Tensor,
    gathered_length: int,
    p: int,
    levels: int,
    finest: bool,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch ``_collect``.

    Args:
        rows: [B, H, N, D].
        slot: [B, Hkv, pyramid length].
        gathered_length: S, the number of included entries.
        p, levels: pooling factor and levels of the pyramid.
        finest: leave out the rows of positions that a finer entry reaches.
        documents: as in ``launch_spread``.

    Returns:
        [B, H, S, D], lying in memory as [B, S, H, D].
    """
    rows, strides = row_strides(rows)
    batch, heads, length, d = rows.shape
    coarsest = length // p ** (levels - 1)
    gathered = sequence_first(rows, gathered_length)
    block_d = triton.next_power_of_2(d)
    block = COLLECT_TILE // block_d
    _collect[own_block_grid(batch, heads, coarsest + 1, block)](
        rows, slot, slot if documents is None else documents.contiguous(), gathered,
        *strides, *gathered.stride()[:3],
        heads, heads // slot.shape[1], length, coarsest, slot.shape[2],
        D=d, BLOCK_D=block_d, BLOCK=block, P=p, LEVELS=levels, FINEST=finest,
        UNROLLED=unrolled(p), DOCUMENTS=documents is not None, num_warps=COLLECT_WARPS,
    )  # fmt: skip
    return gathered


def _fake_collect(
    rows: torch.Tensor,
    slot: torch.Tensor,
    gathered_length: int,
    p: int,
    levels: int,
    finest: bool,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    return sequence_first(rows, gathered_length)


define(
    "collect(Tensor rows, Tensor slot, SymInt gathered_length, int p, int levels, bool finest,"
    " Tensor? documents=None) -> Tensor",
    launch_collect,
    _fake_collect,
)


class _ScatterBack(torch.autograd.Function):
    """Spread outputs; backward collects their gradients.

    What crosses from chunk to chunk travels meanwhile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        slot: torch.Tensor,
        geometry: PyramidGeometry,
        layout: ContextParallel,
        documents: torch.Tensor | None,
    ) -> torch.Tensor:
        config = geometry.config
        ctx.save_for_backward(slot, documents)
        ctx.constants = geometry, layout
        pyramid, finest = (config.pooling_factor, config.levels), config.combine == "finest"
        arriving = layout.send(seam_rows(rows, slot, geometry)) if layout.chunks > 1 else None
        out = torch.ops.lighthouse.spread(
            rows, slot, geometry.sequence_length, *pyramid, True, finest, documents=documents
        )
        if arriving is not None:
            (seam,) = arriving()
            torch.ops.lighthouse.spread_with_seam(out, rows, slot, seam, *pyramid, finest)
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slot, documents = ctx.saved_tensors
        geometry, layout = ctx.constants
        config, arriving = geometry.config, None
        if layout.chunks > 1:
            arriving = layout.send(seam_gradient(grad, slot, geometry), step=-1)
        rows = torch.ops.lighthouse.collect(
            grad,
            slot,
            geometry.gathered_length,
            config.pooling_factor,
            config.levels,
            config.combine == "finest",
            documents,
        )
        if arriving is not None:
            (came,) = arriving()
            included = ends_with_chunk(slot, geometry, came.shape[1])
            seam = seam_rows_gradient(came, included, config.combine == "finest")
            torch.ops.lighthouse.add_to_last_rows(rows, seam)
        return rows, None, None, None, None


def scatter_back(
    rows: torch.Tensor,
    selection: tuple[torch.Tensor, torch.Tensor],
    geometry: PyramidGeometry,
    layout: ContextParallel = ONE_DEVICE,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scatter as ``lighthouse.scatter.scatter_back`` does, over the seams between chunks too.

    Args:
        rows: [B, H, S, D], B being that of all chunks on this rank.
        selection: index and slot.
        layout: the chunks on this rank. Every rank has to call this, and its backward.
        documents: [B, N], on one device.

    Returns:
        [B, H, N, D], lying in memory as [B, N, H, D].
    """
    return _ScatterBack.apply(rows, selection[1], geometry, layout, documents)
