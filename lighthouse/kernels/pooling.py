"""Pool rows onto the coarsest level and take their norms, in one read.

For coarsest entry c of span w = p^(L-1), and entry e of level 1:

    pooled[c] = mean of rows[c w + r],       0 <= r < w
    norms[e]  = max of |rows[e p + r]|_2,    0 <= r < SCORED

One program owns ``BLOCK`` coarsest entries of one head and writes their pooled rows and norms.
Neighbouring programs take the same positions of other heads, whose rows lie side by side in memory.

Shapes: B batch, H heads, N positions, D head dimension, n1 entries of level 1, nc coarsest entries.
"""

import torch
import triton
import triton.language as tl

from ..config import LighthouseConfig
from ..geometry import PyramidGeometry, level_lengths, level_spans
from .launch import define, own_block, own_block_grid, row_strides, unrolled

# Elements of a program's tile, and its warps: the fastest of a sweep on an H100 (bf16, D = 128).
TILE, WARPS = 2048, 8


@triton.jit
def _pool(
    rows, pooled, norms,
    stride_b, stride_h, stride_n,
    heads, coarsest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    P: tl.constexpr, SPAN: tl.constexpr, SCORED: tl.constexpr,
    UNROLLED: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads, coarsest, BLOCK)

    entry = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = (entry < coarsest)[:, None] & (column < D)[None, :]
    base = rows + batch * stride_b + head * stride_h
    total = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    plane = batch * heads + head
    for finer in tl.range(SPAN // P):
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for step in tl.range(P // UNROLLED):
            for number in tl.static_range(UNROLLED):
                child = step * UNROLLED + number
                row = entry * SPAN + finer * P + child
                address = base + row[:, None] * stride_n + column[None, :]
                x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
                total += x
                if number < SCORED:
                    squares = tl.where(child < SCORED, tl.sum(x * x, axis=1), 0.0)
                    largest = tl.maximum(largest, squares, propagate_nan=tl.PropagateNan.ALL)
        if SCORED > 0:
            target = norms + plane * coarsest * (SPAN // P) + entry * (SPAN // P) + finer
            tl.store(target, tl.sqrt_rn(largest), mask=entry < coarsest)
    target = pooled + (plane * coarsest + entry[:, None]) * D + column[None, :]
    tl.store(target, (total * (1.0 / SPAN)).to(pooled.dtype.element_ty), mask=inside)


def launch_pool(
    rows: torch.Tensor, p: int, levels: int, scored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``_pool``.

    Args:
        rows: [B, H, N, D], with any strides over B, H and N.
        p, levels: pooling factor and levels of the pyramid.
        scored: number of rows, among the p under each entry of level 1, whose largest norm is
            returned; 0 for no norms.

    Returns:
        Pooled rows [B, H, nc, D] in the dtype of ``rows``, and norms float32 [B, H, n1], empty if
        ``scored`` is 0.
    """
    span = level_spans(p, levels)[-1]
    rows, strides = row_strides(rows)
    batch, heads, length, d = rows.shape
    lengths = level_lengths(length, p, levels)
    coarsest = lengths[-1]
    pooled = rows.new_empty((batch, heads, coarsest, d))
    norm_shape = (batch, heads, lengths[1]) if scored else (0,)
    norms = rows.new_empty(norm_shape, dtype=torch.float32)
    block_d = triton.next_power_of_2(d)
    block = TILE // block_d
    _pool[own_block_grid(batch, heads, coarsest, block)](
        rows, pooled, norms, *strides, heads, coarsest,
        D=d, BLOCK_D=block_d, BLOCK=block, P=p, SPAN=span, SCORED=scored,
        UNROLLED=unrolled(p), num_warps=WARPS,
    )  # fmt: skip
    return pooled, norms


def _fake_pool(
    rows: torch.Tensor, p: int, levels: int, scored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, d = rows.shape
    lengths = level_lengths(length, p, levels)
    norms = (batch, heads, lengths[1]) if scored else (0,)
    return (
        rows.new_empty((batch, heads, lengths[-1], d)),
        rows.new_empty(norms, dtype=torch.float32),
    )


define(
    "pool(Tensor rows, int p, int levels, int scored) -> (Tensor, Tensor)",
    launch_pool,
    _fake_pool,
)


def scored_rows(config: LighthouseConfig) -> int:
    """Number of positions that score an entry of level 1, out of the p that it covers."""
    return config.pooling_factor if config.entry_score == "max" else 1


def pool_coarsest(
    rows: torch.Tensor, geometry: PyramidGeometry, with_norms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the coarsest entries and, on request, norms of level 1, in one read of ``rows``.

    Args:
        rows: [B, H, N, D].

    Returns:
        [B, H, nc, D] and float32 [B, H, n1]; the latter is empty without ``with_norms``.
    """
    config = geometry.config
    scored = scored_rows(config) if with_norms else 0
    return torch.ops.lighthouse.pool(rows.detach(), config.pooling_factor, config.levels, scored)
