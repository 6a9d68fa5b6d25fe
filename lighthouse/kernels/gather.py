"""Gather means of the rows of selected entries.

With w = p^l, the gathered row of entry (l, i) at its place is

    mean of rows[i w + r], 0 <= r < w

Rows of the coarsest level depend on every base row, so ``pooling`` computes them beforehand.
One program owns ``BLOCK`` places of one head, and writes each of their rows once, after summing in
float32.

Shapes: B batch, H heads, Hkv key-value heads, N positions, D head dimension, S gathered length,
nc coarsest entries.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..geometry import PyramidGeometry
from ..memory_layout import sequence_first
from .launch import (
    define,
    in_level,
    own_block,
    own_block_grid,
    row_strides,
    unrolled,
)

# Elements of a program's tile, and its warps: the fastest of a sweep on an H200 (bf16, D = 128).
TILE, WARPS = 1024, 2


@triton.jit
def _gather(
    rows, coarsest_rows, index, gathered,
    in_b, in_h, in_n, out_b, out_h, out_s,
    heads, group, length, coarsest, gathered_length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads, gathered_length, BLOCK)
    plane = batch * heads + head
    index_plane = batch * (heads // group) + head // group

    place = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = place < gathered_length
    entry = tl.load(index + index_plane * gathered_length + place, mask=inside, other=0)
    entry, span, is_coarsest = in_level(entry.to(tl.int64), length, P, LEVELS)

    in_columns = (column < D)[None, :]
    source = coarsest_rows + (plane * coarsest + entry[:, None]) * D + column[None, :]
    total = tl.load(source, mask=(inside & is_coarsest)[:, None] & in_columns, other=0.0)
    total = total.to(tl.float32)
    base = rows + batch * in_b + head * in_h
    for step in tl.range(P ** (LEVELS - 2) // UNROLLED):
        for number in tl.static_range(UNROLLED):
            r = step * UNROLLED + number
            wanted = inside & (is_coarsest == 0) & (r < span)
            source = base + (entry * span + r)[:, None] * in_n + column[None, :]
            x = tl.load(source, mask=wanted[:, None] & in_columns, other=0.0).to(tl.float32)
            total += x / span.to(tl.float32)[:, None]
    target = gathered + batch * out_b + head * out_h + place[:, None] * out_s + column[None, :]
    tl.store(target, total.to(gathered.dtype.element_ty), mask=inside[:, None] & in_columns)


def launch_gather(
    rows: torch.Tensor,
    coarsest_rows: torch.Tensor,
    index: torch.Tensor,
    p: int,
    levels: int,
) -> torch.Tensor:
    """Launch ``_gather``.

    Args:
        rows: [B, H, N, D].
        coarsest_rows: rows of the coarsest entries, [B, H, nc, D] contiguous.
        index: [B, Hkv, S].
        p, levels: pooling factor and levels of the pyramid.

    Returns:
        [B, H, S, D], lying in memory as [B, S, H, D].
    """
    rows, strides = row_strides(rows)
    batch, heads, length, d = rows.shape
    s = index.shape[2]
    gathered = sequence_first(rows, s)
    block_d = triton.next_power_of_2(d)
    block = TILE // block_d
    _gather[own_block_grid(batch, heads, s, block)](
        rows, coarsest_rows, index, gathered, *strides, *gathered.stride()[:3],
        heads, heads // index.shape[1], length, coarsest_rows.shape[2], s,
        D=d, BLOCK_D=block_d, BLOCK=block, P=p, LEVELS=levels,
        UNROLLED=unrolled(p ** (levels - 2)), num_warps=WARPS,
    )  # fmt: skip
    return gathered


def _fake_gather(
    rows: torch.Tensor,
    coarsest_rows: torch.Tensor,
    index: torch.Tensor,
    p: int,
    levels: int,
) -> torch.Tensor:
    return sequence_first(rows, index.shape[2])


define(
    "gather(Tensor rows, Tensor coarsest_rows, Tensor index, int p, int levels) -> Tensor",
    launch_gather,
    _fake_gather,
)


def gather_means(
    rows: torch.Tensor, coarsest_rows: torch.Tensor, index: torch.Tensor, p: int, levels: int
) -> torch.Tensor:
    """``pool_gather`` without its gradient."""
    return torch.ops.lighthouse.gather(rows, coarsest_rows, index, p, levels)


def spread_shares(
    grad: torch.Tensor,
    slot: torch.Tensor,
    length: int,
    p: int,
    levels: int,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of ``gather_means``, by the operation of ``scatter``.

    The coarsest rows are means of the base rows, and their gradient is added to those.

    Args:
        grad: gradient of the gathered means, [B, H, S, D].
        length: positions N.
        onto: another gradient of the base rows, [B, H, N, D], to add before rounding.

    Returns:
        [B, H, N, D].
    """
    return torch.ops.lighthouse.spread(grad, slot, length, p, levels, False, False, onto)


class _PoolGather(torch.autograd.Function):
    """Gathered means; backward spreads shares."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        coarsest_rows: torch.Tensor,
        index: torch.Tensor,
        slot: torch.Tensor,
        p: int,
        levels: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(slot)
        ctx.constants = rows.shape[2], p, levels
        return gather_means(rows, coarsest_rows, index, p, levels)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        return spread_shares(grad, slot, *ctx.constants), None, None, None, None, None


def pool_gather(
    rows: torch.Tensor,
    coarsest_rows: torch.Tensor,
    selection: tuple[torch.Tensor, torch.Tensor],
    geometry: PyramidGeometry,
) -> torch.Tensor:
    """Gather as ``lighthouse.gather.pool_gather`` does, given the means of the coarsest level.

    Args:
        rows: [B, H, N, D].
        coarsest_rows: [B, H, nc, D].
        selection: index and slot.

    Returns:
        [B, H, S, D]. It lies in memory as [B, S, H, D], so that joined chunks need no copy.
    """
    config = geometry.config
    return _PoolGather.apply(rows, coarsest_rows, *selection, config.pooling_factor, config.levels)
