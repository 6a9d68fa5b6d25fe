"""Spread gathered rows over positions.

Position t receives the sum, over the levels l whose entry is included, of the following rows, with
w = p^l:

    gathered[slot(l, t // w)] / w                         shares (backward of pool-gather)
    gathered[slot(l, (t - w + 1) // w)], t >= w - 1       outputs (forward of scatter-back)
    seam[l - 1], t < w - 1                                outputs of the chunk before, if any

With FINEST it receives the row of the lowest of these levels alone. With ONTO it also receives its
own row of ``onto``.

One program owns ``BLOCK`` positions of one head, and writes each of their rows once, after summing
in float32.

Shapes: B batch, H heads, Hkv key-value heads, N positions, D head dimension, S gathered length,
L levels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..geometry import PyramidGeometry
from ..reach import seam_gradient
from .launch import define, own_block, own_block_grid, row_strides, sequence_first

# Elements of a program's tile, and its warps: the fastest of a sweep on an H100 (bf16, D = 128).
TILE, WARPS = 2048, 2


@triton.jit
def _spread(
    gathered, slot, seam, onto, rows,
    in_b, in_h, in_s, onto_b, onto_h, onto_n, out_b, out_h, out_n,
    heads, group, length, pyramid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr, SCATTER: tl.constexpr, SEAM: tl.constexpr,
    FINEST: tl.constexpr, ONTO: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads, length, BLOCK)
    slots = slot + (batch * (heads // group) + head // group) * pyramid
    source = gathered + batch * in_b + head * in_h

    position = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = position < length
    in_columns = (column < D)[None, :]
    shown = inside[:, None] & in_columns
    if ONTO:
        own = onto + batch * onto_b + head * onto_h
        own += position[:, None] * onto_n + column[None, :]
        total = tl.load(own, mask=shown, other=0.0).to(tl.float32)
    else:
        total = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    offset = tl.zeros((), dtype=tl.int64)
    # Positions that take no further row.
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
    tl.store(target, total.to(rows.dtype.element_ty), mask=shown)


def launch_spread(
    gathered: torch.Tensor,
    slot: torch.Tensor,
    seam: torch.Tensor | None,
    length: int,
    p: int,
    levels: int,
    scatter: bool,
    finest: bool,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch ``_spread``.

    Args:
        gathered: [B, H, S, D].
        slot: [B, Hkv, pyramid length].
        seam: outputs of the entries of levels 1 to L - 1 that end just before the first position,
            [B, H, L - 1, D] contiguous; only with ``scatter``.
        length: positions N to spread over.
        p, levels: pooling factor and levels of the pyramid.
        scatter: spread outputs from each entry's end on, instead of shares over it.
        finest: take the lowest level that reaches a position, instead of the sum; only with
            ``scatter``.
        onto: rows to add, [B, H, N, D].

    Returns:
        [B, H, N, D], lying in memory as [B, N, H, D].
    """
    gathered, strides = row_strides(gathered)
    onto, onto_strides = (None, (0, 0, 0)) if onto is None else row_strides(onto)
    batch, heads, _, d = gathered.shape
    rows = sequence_first(gathered, length)
    block_d = triton.next_power_of_2(d)
    block = TILE // block_d
    _spread[own_block_grid(batch, heads, length, block)](
        gathered, slot, slot if seam is None else seam, rows if onto is None else onto, rows,
        *strides, *onto_strides, *rows.stride()[:3],
        heads, heads // slot.shape[1], length, slot.shape[2],
        D=d, BLOCK_D=block_d, BLOCK=block, P=p, LEVELS=levels, SCATTER=scatter,
        SEAM=seam is not None, FINEST=finest, ONTO=onto is not None, num_warps=WARPS,
    )  # fmt: skip
    return rows


def _fake_spread(
    gathered: torch.Tensor,
    slot: torch.Tensor,
    seam: torch.Tensor | None,
    length: int,
    p: int,
    levels: int,
    scatter: bool,
    finest: bool,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    return sequence_first(gathered, length)


define(
    "spread(Tensor gathered, Tensor slot, Tensor? seam, SymInt length, int p, int levels,"
    " bool scatter, bool finest, Tensor? onto=None) -> Tensor",
    launch_spread,
    _fake_spread,
)


class _ScatterBack(torch.autograd.Function):
    """Spread outputs; backward gathers sums, by the operations of ``pooling`` and ``gather``."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        seam: torch.Tensor | None,
        index: torch.Tensor,
        slot: torch.Tensor,
        geometry: PyramidGeometry,
    ) -> torch.Tensor:
        config = geometry.config
        ctx.save_for_backward(index, slot)
        ctx.geometry = geometry
        return torch.ops.lighthouse.spread(
            rows,
            slot,
            seam,
            geometry.sequence_length,
            config.pooling_factor,
            config.levels,
            True,
            config.combine == "finest",
        )

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        index, slot = ctx.saved_tensors
        geometry = ctx.geometry
        config = geometry.config
        pyramid = config.pooling_factor, config.levels
        uncovered = slot if config.combine == "finest" else None
        coarsest, _ = torch.ops.lighthouse.pool(
            grad, uncovered, *pyramid, geometry.spans[-1] - 1, 1.0, 0
        )
        seam = seam_gradient(grad, slot, geometry) if ctx.needs_input_grad[1] else None
        rows = torch.ops.lighthouse.gather(grad, coarsest, index, uncovered, *pyramid, True)
        return rows, seam, None, None, None


def scatter_back(
    rows: torch.Tensor,
    selection: tuple[torch.Tensor, torch.Tensor],
    geometry: PyramidGeometry,
    seam: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scatter as ``lighthouse.scatter.scatter_back`` does.

    Args:
        rows: [B, H, S, D].
        selection: index and slot.
        seam: [B, H, L - 1, D].

    Returns:
        [B, H, N, D], lying in memory as [B, N, H, D].
    """
    if seam is not None:
        seam = seam.contiguous()
    return _ScatterBack.apply(rows, seam, *selection, geometry)
