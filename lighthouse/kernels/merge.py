"""Merge the outputs of two attentions by their logsumexps: selected entries, and a window.

Position t takes the output and the logsumexp of the finest entry that reaches it, e, and those of
its window, w. With m = log(exp(lse_e) + exp(lse_w)) it receives

    out = exp(lse_e - m) out_e + exp(lse_w - m) out_w                                  merging

as if one softmax had run over the keys of both. Where no entry reaches, the window stands alone.

The gradients need neither weights nor logsumexps of their own. The probabilities of each attention,
times its weight, are those of one softmax with logsumexp m and output out. So the window's backward
takes dout, out and m as they are. Entry e has one query for all positions that it reaches, and its
backward takes the sums

    dout_e = sum of u dout                   u = exp(lse_e - m) at the positions that e reaches
    delta_e = sum of u rowsum(dout out)                                                collecting

Attention's backward reads its output for rowsum(dout_e out_e) alone, where delta_e belongs. It gets

    out_e' = out_e + dout_e (delta_e - rowsum(dout_e out_e)) / |dout_e|^2

Merging, one program owns ``BLOCK`` positions of one head. Collecting, it owns ``BLOCK`` coarsest
entries and sums level after level, as in the file for scattering, or it owns ``BLOCK`` places and
takes the entries of the base level among them. Each row is written once, after summing in float32.

Shapes: B batch, H query heads, Hkv key-value heads, N positions, D head dimension, S gathered
length, P pyramid length.
"""

import torch
import triton
import triton.language as tl

from ..memory_layout import sequence_first
from .launch import (
    define,
    document_ends,
    own_block,
    own_block_grid,
    place_of,
    row_strides,
)

# Elements of a program's tile, and its warps; on an H200 the fastest of those tried.
MERGE_TILE, MERGE_WARPS = 2048, 2
COLLECT_TILE, COLLECT_WARPS = 1024, 4
# The longest correction of a row out_e. Rows dout_e that all but cancel would ask for more, and
# float16 has no room for it.
LONGEST = {torch.float16: 2.0**12}
LONGEST_OF_OTHERS = 2.0**40


def longest_correction(dtype: torch.dtype) -> float:
    return LONGEST.get(dtype, LONGEST_OF_OTHERS)


@triton.jit
def crosses_seam(continues, batch, first, held):
    """Whether a chunk's first positions take seam rows: those of the sequence's first one do not.

    Args:
        continues: whether the first document of each chunk began in an earlier one, if there are
            documents.
        first, held: place of the sequence's first chunk among those on this rank or -1, and how
            many these are.
    """
    if continues is None:
        crosses = batch % held != first
    else:
        crosses = tl.load(continues + batch) != 0
    return crosses


@triton.jit
def _merge(
    far, far_lse, near, near_lse, slot, documents, seam, seam_lse, continues, out, lse,
    far_b, far_h, far_s, lse_b, lse_h, near_b, near_h, near_n, out_b, out_h, out_n,
    heads, group, length, pyramid, first, held,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads, length, BLOCK)
    plane = batch * heads + head
    slots = slot + (batch * (heads // group) + head // group) * pyramid

    position = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = position < length
    shown = inside[:, None] & (column < D)[None, :]
    place = tl.full((BLOCK,), -1, tl.int64)
    # The level whose seam row each position takes, or 0.
    level_of_seam = tl.zeros((BLOCK,), dtype=tl.int64)
    offset = tl.zeros((), dtype=tl.int64)
    # Where each position's document begins.
    begin = tl.zeros((BLOCK,), dtype=tl.int64)
    if DOCUMENTS:
        begin = tl.load(documents + batch * length + position, mask=inside, other=0).to(tl.int64)
    for level in tl.static_range(LEVELS):
        span = P**level
        shifted = position - (span - 1)
        if seam is not None:
            beyond = (place < 0) & (level_of_seam == 0) & (shifted < 0)
            level_of_seam = tl.where(beyond, level, level_of_seam)
        asked = inside & (place < 0) & (shifted >= begin)
        place = tl.maximum(
            place, tl.load(slots + offset + shifted // span, mask=asked, other=-1).to(tl.int64)
        )
        offset += length // span
    reached = place >= 0
    places = far_lse + batch * lse_b + head * lse_h + place
    a = tl.load(places, mask=reached, other=-float("inf"))
    rows = far + batch * far_b + head * far_h + place[:, None] * far_s + column[None, :]
    x = tl.load(rows, mask=reached[:, None] & shown, other=0.0).to(tl.float32)
    if seam is not None:
        crossing = (level_of_seam > 0) & inside & crosses_seam(continues, batch, first, held)
        row = plane * (LEVELS - 1) + level_of_seam - 1
        a = tl.maximum(a, tl.load(seam_lse + row, mask=crossing, other=-float("inf")))
        rows = seam + row[:, None] * D + column[None, :]
        x += tl.load(rows, mask=crossing[:, None] & shown, other=0.0).to(tl.float32)
    b = tl.load(near_lse + plane * length + position, mask=inside, other=0.0)
    largest = tl.maximum(a, b)
    merged = largest + tl.log(tl.exp(a - largest) + tl.exp(b - largest))
    rows = near + batch * near_b + head * near_h + position[:, None] * near_n + column[None, :]
    y = tl.load(rows, mask=shown, other=0.0).to(tl.float32)
    total = tl.exp(a - merged)[:, None] * x + tl.exp(b - merged)[:, None] * y
    rows = out + batch * out_b + head * out_h + position[:, None] * out_n + column[None, :]
    tl.store(rows, total.to(out.dtype.element_ty), mask=shown)
    tl.store(lse + plane * length + position, merged, mask=inside)


def _lse_strides(lse: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """``lse`` [B, H, S] with S contiguous, and the strides of the other dimensions."""
    if lse.stride(-1) != 1:
        lse = lse.contiguous()
    return lse, lse.stride()[:2]


def launch_merge(
    far: torch.Tensor,
    far_lse: torch.Tensor,
    near: torch.Tensor,
    near_lse: torch.Tensor,
    slot: torch.Tensor,
    p: int,
    levels: int,
    documents: torch.Tensor | None = None,
    seam: torch.Tensor | None = None,
    seam_lse: torch.Tensor | None = None,
    continues: torch.Tensor | None = None,
    first: int = -1,
    held: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``_merge``.

    Args:
        far: outputs of the selected entries, [B, H, S, D].
        far_lse: their logsumexps, float32 [B, H, S].
        near: outputs of the window, [B, H, N, D].
        near_lse: their logsumexps, float32 [B, H, N].
        slot: [B, Hkv, P].
        p, levels: pooling factor and levels of the pyramid.
        documents: [B, N], for each position the first position of its document, which outputs of
            entries do not leave.
        seam: with chunks of a sequence, outputs of the entries that end with the chunk before, for
            levels 1 to L - 1, [B, H, L - 1, D].
        seam_lse: their logsumexps, float32 [B, H, L - 1].
        continues, first, held: as in ``crosses_seam``.

    Returns:
        out [B, H, N, D], lying in memory as [B, N, H, D], and m, float32 [B, H, N].
    """
    far, far_strides = row_strides(far)
    near, near_strides = row_strides(near)
    far_lse, lse_strides = _lse_strides(far_lse)
    near_lse = near_lse.contiguous()
    if seam is not None and seam_lse is not None:
        seam, seam_lse = seam.contiguous(), seam_lse.contiguous()
    batch, heads, length, d = near.shape
    out = sequence_first(near, length)
    lse = near_lse.new_empty(near_lse.shape)
    block_d = triton.next_power_of_2(d)
    block = MERGE_TILE // block_d
    _merge[own_block_grid(batch, heads, length, block)](
        far, far_lse, near, near_lse, slot, slot if documents is None else documents.contiguous(),
        seam, seam_lse, continues, out, lse, *far_strides, *lse_strides, *near_strides,
        *out.stride()[:3], heads, heads // slot.shape[1], length, slot.shape[2], first, held,
        D=d, BLOCK_D=block_d, BLOCK=block, P=p, LEVELS=levels,
        DOCUMENTS=documents is not None, num_warps=MERGE_WARPS,
    )  # fmt: skip
    return out, lse


@triton.jit
def write_gradient(
    far, grad_far, out_far, place, total, delta, far_s, to_s, longest,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dout_e and out_e' of entries at ``place``, from their sums; -1 is no place."""
    column = tl.arange(0, BLOCK_D)
    included = (place >= 0)[:, None] & (column < D)[None, :]
    source = far + place[:, None] * far_s + column[None, :]
    own = tl.load(source, mask=included, other=0.0).to(tl.float32)
    # Attention's backward will read the rounded row.
    rounded = total.to(grad_far.dtype.element_ty)
    total = rounded.to(tl.float32)
    size = tl.max(tl.abs(total), axis=1)
    # Squares of small gradients would vanish in float32.
    unit = total / tl.where(size > 0, size, 1.0)[:, None]
    squares = tl.where(size > 0, tl.sum(unit * unit, axis=1), 1.0)
    missing = (delta - tl.sum(total * own, axis=1)) / tl.where(size > 0, size, 1.0)
    limit = longest / tl.sqrt(squares)
    quotient = tl.minimum(tl.maximum(missing / squares, -limit), limit)
    own += unit * tl.where(size > 0, quotient, 0.0)[:, None]
    target = place[:, None] * to_s + column[None, :]
    tl.store(grad_far + target, rounded, mask=included)
    tl.store(out_far + target, own.to(out_far.dtype.element_ty), mask=included)


@triton.jit
def weighted(
    grad, out, lse, row, wanted, own_lse, grad_n, out_n, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows u dout, and u dout out, at wanted positions, whose entries have ``own_lse``."""
    column = tl.arange(0, BLOCK_D)
    taken = wanted[:, None] & (column < D)[None, :]
    merged = tl.load(lse + row, mask=wanted, other=0.0)
    weight = tl.where(wanted, tl.exp(own_lse - merged), 0.0)
    x = tl.load(grad + row[:, None] * grad_n + column[None, :], mask=taken, other=0.0)
    y = tl.load(out + row[:, None] * out_n + column[None, :], mask=taken, other=0.0)
    x = weight[:, None] * x.to(tl.float32)
    return x, x * y.to(tl.float32)


@triton.jit
def _collect_level(
    grad, out, lse, far, far_lse, slots, grad_far, out_far, entry, cut, own_lse, length,
    grad_n, out_n, far_s, to_s, longest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVEL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Sums over the positions that entries of a level reach and no included finer one does.

    Writes those of included entries, whose positions are zero to the levels above.

    Args:
        cut: see ``document_ends``.
        own_lse: logsumexps of the finest entries included above, which reach the same positions.
    """
    place = place_of(slots, entry, length, P, LEVEL)
    included = place >= 0
    own_lse = tl.where(included, tl.load(far_lse + place, mask=included, other=0.0), own_lse)
    below = (entry + 1) * P - 1
    total = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    products = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    if LEVEL > 1:
        for child in tl.range(P):
            x, xy = _collect_level(
                grad, out, lse, far, far_lse, slots, grad_far, out_far, below + child,
                cut & (child == 0), own_lse, length, grad_n, out_n, far_s, to_s, longest,
                D, BLOCK_D, BLOCK, P, LEVEL - 1, DOCUMENTS,
            )  # fmt: skip
            if DOCUMENTS:
                beyond = (cut & (child > 0))[:, None]
                x, xy = tl.where(beyond, 0.0, x), tl.where(beyond, 0.0, xy)
            total += x
            products += xy
    else:
        for number in tl.range(P):
            row = below + number
            wanted = (row >= 0) & (row < length) & (place_of(slots, row, length, P, 0) < 0)
            if DOCUMENTS:
                wanted = wanted & ((cut & (number > 0)) == 0)
            x, xy = weighted(grad, out, lse, row, wanted, own_lse, grad_n, out_n, D, BLOCK_D)
            total += x
            products += xy
    write_gradient(
        far, grad_far, out_far, place, total, tl.sum(products, axis=1), far_s, to_s, longest,
        D, BLOCK_D,
    )  # fmt: skip
    left = (included == 0)[:, None]
    return tl.where(left, total, 0.0), tl.where(left, products, 0.0)


@triton.jit
def _collect(
    grad, out, lse, far, far_lse, index, slot, documents, grad_far, out_far,
    grad_b, grad_h, grad_n, out_b, out_h, out_n, far_b, far_h, far_s, lse_b, lse_h,
    to_b, to_h, to_s, heads, group, length, gathered_length, coarsest, pyramid, longest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    pooled_blocks = tl.cdiv(coarsest + 1, BLOCK)
    blocks = pooled_blocks + tl.cdiv(gathered_length, BLOCK)
    batch, head, block = own_block(heads, blocks * BLOCK, BLOCK)
    plane = batch * heads + head
    index_plane = batch * (heads // group) + head // group
    grad += batch * grad_b + head * grad_h
    out += batch * out_b + head * out_h
    lse += plane * length
    far += batch * far_b + head * far_h
    far_lse += batch * lse_b + head * lse_h
    grad_far += batch * to_b + head * to_h
    out_far += batch * to_b + head * to_h
    number = tl.arange(0, BLOCK).to(tl.int64)
    if block < pooled_blocks:
        entry = block * BLOCK + number - 1
        cut = document_ends(documents + batch * length, entry, length, P ** (LEVELS - 1), DOCUMENTS)
        _collect_level(
            grad, out, lse, far, far_lse, slot + index_plane * pyramid, grad_far, out_far,
            entry, cut, tl.full((BLOCK,), -float("inf"), tl.float32), length,
            grad_n, out_n, far_s, to_s, longest,
            D, BLOCK_D, BLOCK, P, LEVELS - 1, DOCUMENTS,
        )  # fmt: skip
    else:
        place = (block - pooled_blocks) * BLOCK + number
        inside = place < gathered_length
        row = tl.load(index + index_plane * gathered_length + place, mask=inside, other=0)
        row = row.to(tl.int64)
        # Entries of the base level reach their own position alone.
        base = inside & (row < length)
        own_lse = tl.load(far_lse + place, mask=base, other=0.0)
        x, xy = weighted(grad, out, lse, row, base, own_lse, grad_n, out_n, D, BLOCK_D)
        write_gradient(
            far, grad_far, out_far, tl.where(base, place, -1), x, tl.sum(xy, axis=1), far_s, to_s,
            longest, D, BLOCK_D,
        )  # fmt: skip


def launch_collect(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    far: torch.Tensor,
    far_lse: torch.Tensor,
    index: torch.Tensor,
    slot: torch.Tensor,
    p: int,
    levels: int,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``_collect``.

    Args:
        grad, out: gradient of the merged output, and the output itself, [B, H, N, D].
        lse: m, float32 [B, H, N].
        far: outputs of the selected entries, [B, H, S, D].
        far_lse: their logsumexps, float32 [B, H, S].
        index: [B, Hkv, S].
        slot: [B, Hkv, P].
        p, levels: pooling factor and levels of the pyramid.
        documents: as in ``launch_merge``.

    Returns:
        dout_e and out_e', each [B, H, S, D], lying in memory as [B, S, H, D]. A row dout_e that is
        zero leaves out_e as it is, and no correction is longer than ``LONGEST``.
    """
    grad, grad_strides = row_strides(grad)
    out, out_strides = row_strides(out)
    far, far_strides = row_strides(far)
    far_lse, lse_strides = _lse_strides(far_lse)
    batch, heads, length, d = grad.shape
    s = far.shape[2]
    grad_far, out_far = sequence_first(far, s), sequence_first(far, s)
    block_d = triton.next_power_of_2(d)
    block = COLLECT_TILE // block_d
    coarsest = length // p ** (levels - 1)
    blocks = triton.cdiv(coarsest + 1, block) + triton.cdiv(s, block)
    _collect[own_block_grid(batch, heads, blocks * block, block)](
        grad, out, lse.contiguous(), far, far_lse, index, slot,
        slot if documents is None else documents.contiguous(), grad_far, out_far,
        *grad_strides, *out_strides, *far_strides, *lse_strides, *grad_far.stride()[:3],
        heads, heads // index.shape[1], length, s, coarsest, slot.shape[2],
        longest_correction(far.dtype),
        D=d, BLOCK_D=block_d, BLOCK=block, P=p, LEVELS=levels,
        DOCUMENTS=documents is not None, num_warps=COLLECT_WARPS,
    )  # fmt: skip
    return grad_far, out_far


def _fake_merge(
    far: torch.Tensor,
    far_lse: torch.Tensor,
    near: torch.Tensor,
    near_lse: torch.Tensor,
    *others: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    return sequence_first(near, near.shape[2]), near_lse.new_empty(near_lse.shape)


def _fake_collect(
    grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, far: torch.Tensor, *others: object
) -> tuple[torch.Tensor, torch.Tensor]:
    s = far.shape[2]
    return sequence_first(far, s), sequence_first(far, s)


define(
    "merge_outputs(Tensor far, Tensor far_lse, Tensor near, Tensor near_lse, Tensor slot, int p,"
    " int levels, Tensor? documents=None, Tensor? seam=None, Tensor? seam_lse=None,"
    " Tensor? continues=None, int first=-1, int held=1) -> (Tensor, Tensor)",
    launch_merge,
    _fake_merge,
)
define(
    "collect_merged(Tensor grad, Tensor out, Tensor lse, Tensor far, Tensor far_lse, Tensor index,"
    " Tensor slot, int p, int levels, Tensor? documents=None) -> (Tensor, Tensor)",
    launch_collect,
    _fake_collect,
)

merge_outputs = torch.ops.lighthouse.merge_outputs
collect_merged = torch.ops.lighthouse.collect_merged
