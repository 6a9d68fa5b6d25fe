"""Gradients of outputs merged across a seam: what crosses from a chunk to the one before it.

``merge`` has the formulas and the merging. Positions that take a seam row give the sums dout_e and
delta_e of its entry, which lies in the chunk before. There they are added to the entry's own, whose
delta_e is found again as rowsum(dout_e out_e'). Where an entry that ends with a chunk is not
included, what comes for it belongs to the next coarser one, as its seam row was that one's.

One program owns a head of a chunk. It goes through the few positions that take seam rows, or
through the L - 1 entries that end with the chunk, and writes each row once.

Shapes: B batch, M chunks on this rank, H query heads, Hkv key-value heads, C positions of a chunk,
D head dimension, S gathered length of a chunk, P pyramid length, L levels.
"""

import torch
import triton
import triton.language as tl

from ..precision import accumulation_dtype
from .launch import define, place_of, row_strides
from .merge import crosses_seam, longest_correction, weighted, write_gradient

# Elements of a program's tile, and its warps.
TILE, WARPS = 4096, 4


@triton.jit
def _seam_sums(
    grad, out, lse, slot, seam_lse, continues, dout, delta,
    grad_b, grad_h, grad_n, out_b, out_h, out_n, heads, group, length, pyramid, first, held,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    batch, head = plane // heads, plane % heads
    grad += batch * grad_b + head * grad_h
    out += batch * out_b + head * out_h
    lse += plane * length
    slots = slot + (batch * (heads // group) + head // group) * pyramid
    crosses = crosses_seam(continues, batch, first, held)
    column = tl.arange(0, BLOCK_D)
    for level in tl.static_range(1, LEVELS):
        row = plane * (LEVELS - 1) + level - 1
        own_lse = tl.load(seam_lse + row)
        total = tl.zeros((BLOCK_D,), dtype=tl.float32)
        products = tl.zeros((BLOCK_D,), dtype=tl.float32)
        # Positions before these take rows of finer levels.
        for begin in tl.range(P ** (level - 1) - 1, P**level - 1, BLOCK):
            position = begin + tl.arange(0, BLOCK).to(tl.int64)
            wanted = crosses & (position < P**level - 1)
            for finer in tl.static_range(level):
                entry = (position - P**finer + 1) // P**finer
                wanted = wanted & (place_of(slots, entry, length, P, finer) < 0)
            x, xy = weighted(grad, out, lse, position, wanted, own_lse, grad_n, out_n, D, BLOCK_D)
            total += tl.sum(x, axis=0)
            products += tl.sum(xy, axis=0)
        tl.store(dout + row * D + column, total.to(dout.dtype.element_ty), mask=column < D)
        tl.store(delta + row, tl.sum(products, axis=0))


def launch_seam_sums(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    slot: torch.Tensor,
    seam_lse: torch.Tensor,
    p: int,
    levels: int,
    first: int,
    held: int,
    continues: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``_seam_sums``.

    Args:
        grad, out: gradient of the merged output, and the output itself, [B M, H, C, D].
        lse: that of the merged output, float32 [B M, H, C].
        slot: [B M, Hkv, P].
        seam_lse, first, held, continues: as in ``merge.launch_merge``.
        p, levels: pooling factor and levels of the pyramid.

    Returns:
        dout_e [B M, H, L - 1, D] in the dtype of grad, and delta_e float32 [B M, H, L - 1, 1].
    """
    grad, grad_strides = row_strides(grad)
    out, out_strides = row_strides(out)
    batch, heads, length, d = grad.shape
    dout = grad.new_empty(batch, heads, levels - 1, d)
    delta = grad.new_empty(batch, heads, levels - 1, 1, dtype=accumulation_dtype(grad.dtype))
    block_d = triton.next_power_of_2(d)
    _seam_sums[(batch * heads,)](
        grad, out, lse.contiguous(), slot, seam_lse.contiguous(), continues, dout, delta,
        *grad_strides, *out_strides, heads, heads // slot.shape[1], length, slot.shape[2],
        first, held, D=d, BLOCK_D=block_d, BLOCK=TILE // block_d, P=p, LEVELS=levels,
        num_warps=WARPS,
    )  # fmt: skip
    return dout, delta


@triton.jit
def _add_seam_sums(
    grad_far, out_far, far, dout, delta, slot,
    far_b, far_h, far_s, to_b, to_h, to_s, heads, group, length, pyramid, longest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    batch, head = plane // heads, plane % heads
    far += batch * far_b + head * far_h
    grad_far += batch * to_b + head * to_h
    out_far += batch * to_b + head * to_h
    slots = slot + (batch * (heads // group) + head // group) * pyramid
    column = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((1, BLOCK_D), dtype=tl.float32)
    products = tl.zeros((1,), dtype=tl.float32)
    for level in tl.static_range(1, LEVELS):
        row = plane * (LEVELS - 1) + level - 1
        total += tl.load(dout + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        products += tl.load(delta + row)
        last = tl.zeros((1,), dtype=tl.int64) + length // P**level - 1
        place = place_of(slots, last, length, P, level)
        included = (place >= 0)[:, None]
        rows, shown = place[:, None] * to_s + column, included & (column < D)
        own = tl.load(grad_far + rows, mask=shown, other=0.0).to(tl.float32)
        own_out = tl.load(out_far + rows, mask=shown, other=0.0).to(tl.float32)
        write_gradient(
            far, grad_far, out_far, place, total + own, products + tl.sum(own * own_out, axis=1),
            far_s, to_s, longest, D, BLOCK_D,
        )  # fmt: skip
        total = tl.where(included, 0.0, total)
        products = tl.where(place >= 0, 0.0, products)


def launch_add_seam_sums(
    grad_far: torch.Tensor,
    out_far: torch.Tensor,
    far: torch.Tensor,
    dout: torch.Tensor,
    delta: torch.Tensor,
    slot: torch.Tensor,
    length: int,
    p: int,
    levels: int,
) -> None:
    """Launch ``_add_seam_sums``.

    Args:
        grad_far, out_far: what ``merge.launch_collect`` gives for ``far``, [B M, H, S, D]. The rows
            of the entries that end with a chunk become those with the sums.
        dout, delta: from ``launch_seam_sums`` of the next chunk.
        slot: [B M, Hkv, P].
        length: positions of a chunk.
        p, levels: pooling factor and levels of the pyramid.
    """
    far, far_strides = row_strides(far)
    assert grad_far.stride() == out_far.stride() and grad_far.stride(-1) == 1, "written in place"
    batch, heads, _, d = far.shape
    # One warp, because another might have written the row that this one has yet to read.
    _add_seam_sums[(batch * heads,)](
        grad_far, out_far, far, dout.contiguous(), delta.contiguous(), slot, *far_strides,
        *grad_far.stride()[:3], heads, heads // slot.shape[1], length, slot.shape[2],
        longest_correction(far.dtype), D=d, BLOCK_D=triton.next_power_of_2(d), P=p, LEVELS=levels,
        num_warps=1,
    )  # fmt: skip


def _fake_seam_sums(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    slot: torch.Tensor,
    seam_lse: torch.Tensor,
    *others: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape, sums = seam_lse.shape, accumulation_dtype(grad.dtype)
    return grad.new_empty(*shape, grad.shape[3]), grad.new_empty(*shape, 1, dtype=sums)


def _fake_add_seam_sums(*arguments: object) -> None:
    pass


define(
    "seam_sums(Tensor grad, Tensor out, Tensor lse, Tensor slot, Tensor seam_lse, int p,"
    " int levels, int first, int held, Tensor? continues=None) -> (Tensor, Tensor)",
    launch_seam_sums,
    _fake_seam_sums,
)
define(
    "add_seam_sums(Tensor(a!) grad_far, Tensor(b!) out_far, Tensor far, Tensor dout, Tensor delta,"
    " Tensor slot, SymInt length, int p, int levels) -> ()",
    launch_add_seam_sums,
    _fake_add_seam_sums,
)

seam_sums = torch.ops.lighthouse.seam_sums
add_seam_sums = torch.ops.lighthouse.add_seam_sums
