"""Scores of level 1, and a kernel for the norms of gated linear attention.

The kernel never writes the attention's output. For the dilated sequences of the scorer "gla" (see
``lighthouse.scoring``), with w = 2^LOG2_DECAY, it computes

    norms[t] = | sum over s <= t of w^(t - s) (x_t . y_s) v_s |_2 / sqrt(D)

A row ``WINDOW`` steps back weighs less than rounding does, so there is no state to carry. One
program owns ``BLOCK`` rows of one residue class of one head. It multiplies them with the rows of
the window before them, tile by tile, accumulating in float32 in a fixed order.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, n1 entries of
level 1.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import triton
import triton.language as tl

from .. import scoring
from ..config import LighthouseConfig, Scorer
from ..geometry import PyramidGeometry, level_lengths
from .launch import INTERPRETED, define, own_block, own_block_grid, row_strides
from .pooling import pool_coarsest, scored_rows

# Rows of a program, its warps, and loads in flight. Tiles in float32 go through shared memory
# whole; they are smaller, so that D = 256 fits any GPU since Ampere.
BLOCK, WARPS, STAGES = 64, 4, 3
FLOAT32_BLOCK, FLOAT32_STAGES = 16, 1
# At the window's end, a weight lies this many bits below the dtype's own rounding.
SPARE_BITS = 8
LOG2_DECAY = tl.constexpr(scoring.LOG2_DECAY)


@triton.jit
def _gla_norms(
    x, y, v, norms,
    x_b, x_h, x_n, y_b, y_h, y_n, v_b, v_h, v_n,
    heads, x_group, y_group, v_group, length, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    DILATION: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads * DILATION, length, BLOCK)
    residue = head // heads
    head = head % heads
    x += batch * x_b + head // x_group * x_h + residue * x_n
    y += batch * y_b + head // y_group * y_h + residue * y_n
    v += batch * v_b + head // v_group * v_h + residue * v_n

    lane = tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    in_columns = (column < D)[None, :]
    row = block * BLOCK + lane
    inside = row < length
    x_rows = tl.load(
        x + row[:, None] * (x_n * DILATION) + column[None, :],
        mask=inside[:, None] & in_columns,
        other=0.0,
    )
    total = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for start in tl.range(tl.maximum(block * BLOCK - WINDOW, 0), (block + 1) * BLOCK, BLOCK):
        other = start + lane
        mask = (other < length)[:, None] & in_columns
        position = other[:, None] * DILATION
        y_rows = tl.load(y + position * y_n + column[None, :], mask=mask, other=0.0)
        v_rows = tl.load(v + position * v_n + column[None, :], mask=mask, other=0.0)
        distance = row[:, None] - other[None, :]
        weight = tl.exp2(distance.to(tl.float32) * LOG2_DECAY)
        products = tl.dot(x_rows, tl.trans(y_rows), input_precision="ieee")
        products = tl.where(distance >= 0, products * weight, 0.0)
        total = tl.dot(products.to(v_rows.dtype), v_rows, total, input_precision="ieee")
    norm = tl.sqrt_rn(tl.sum(total * total, axis=1)) * scale
    target = norms + (batch * heads + head) * length * DILATION + row * DILATION + residue
    tl.store(target, norm, mask=inside)


def gla_norms(
    x: torch.Tensor, y: torch.Tensor, v: torch.Tensor, heads: int, dilation: int
) -> torch.Tensor:
    """Launch ``_gla_norms`` for ``heads`` heads.

    Args:
        x, y, v: [B, H, N, D], each with a number of heads H that divides ``heads``.

    Returns:
        float32 [B, heads, N].
    """
    batch, _, n, d = x.shape
    norms = x.new_empty((batch, heads, n), dtype=torch.float32)
    bits = -math.log2(torch.finfo(x.dtype).eps) + SPARE_BITS
    full = x.dtype == torch.float32
    block, stages = (FLOAT32_BLOCK, FLOAT32_STAGES) if full else (BLOCK, STAGES)
    window = triton.cdiv(math.ceil(bits / -scoring.LOG2_DECAY), block) * block
    if INTERPRETED and x.dtype == torch.bfloat16:
        # Triton's interpreter miscomputes bfloat16 products.
        x, y, v = (rows.float() for rows in (x, y, v))
    (x, x_strides), (y, y_strides), (v, v_strides) = map(row_strides, (x, y, v))
    _gla_norms[own_block_grid(batch, heads * dilation, n // dilation, block)](
        x, y, v, norms, *x_strides, *y_strides, *v_strides,
        heads, *(heads // rows.shape[1] for rows in (x, y, v)), n // dilation, d**-0.5,
        D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), BLOCK=block,
        DILATION=dilation, WINDOW=window, num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
    return norms


def _gla_position_norms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, dilation = q.shape[1], config.dilation
    return gla_norms(q, k, v, heads, dilation), gla_norms(k, q, v, heads, dilation)


# Scorers with a kernel of their own; the others run ``lighthouse.scoring.position_scores``. Each
# function takes and returns what that function does.
KERNELS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "gla": _gla_position_norms,
}
# Scorers whose scores are the norms of q and k, which the pooling kernel takes as it reads them.
SCORED_BY_POOLING = ("norm",)


def launch_score(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scorer: str,
    dilation: int,
    p: int,
    scored: int,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level-1 scores of a scorer that pooling does not compute.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].
        p: pooling factor.
        scored: number of positions, among the p under each entry, whose largest score is returned.
        documents: [B, N], for each position the first position of its document. A scorer that
            attends then runs in vectorised PyTorch, which knows documents.

    Returns:
        float32 [B, Hq, n1] by query and [B, Hkv, n1] by key.
    """
    config = LighthouseConfig(scorer=cast(Scorer, scorer), dilation=dilation)
    if documents is None:
        by_position = KERNELS.get(scorer, scoring.position_scores)(q, k, v, config)
    else:
        by_position = scoring.position_scores(q, k, v, config, documents)
    a, b = (x.unflatten(-1, (-1, p))[..., :scored].amax(dim=-1) for x in by_position)
    return a, b.unflatten(1, (k.shape[1], -1)).amax(dim=2)


def _fake_score(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scorer: str,
    dilation: int,
    p: int,
    scored: int,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    level_one = level_lengths(q.shape[2], p, levels=2)[1]
    a, b = ((*rows.shape[:2], level_one) for rows in (q, k))
    return q.new_empty(a, dtype=torch.float32), q.new_empty(b, dtype=torch.float32)


define(
    "score(Tensor q, Tensor k, Tensor v, str scorer, int dilation, int p, int scored,"
    " Tensor? documents=None) -> (Tensor, Tensor)",
    launch_score,
    _fake_score,
)


def scores_by_pooling(geometry: PyramidGeometry) -> bool:
    """Whether ``pool_coarsest`` of q and of k computes the configured scorer's scores."""
    return geometry.config.scorer in SCORED_BY_POOLING


def score(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: PyramidGeometry,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level-1 scores of the configured scorer.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].
        documents: [B, N], for each position the first position of its document.

    Returns:
        float32 [B, Hq, n1] by query and [B, Hkv, n1] by key.
    """
    config = geometry.config
    if scores_by_pooling(geometry):
        a, b = (pool_coarsest(rows, geometry, with_norms=True)[1] for rows in (q, k))
        return a, b
    rows = (x.detach() for x in (q, k, v))
    settings = config.scorer, config.dilation, config.pooling_factor, scored_rows(config)
    return torch.ops.lighthouse.score(*rows, *settings, documents)
