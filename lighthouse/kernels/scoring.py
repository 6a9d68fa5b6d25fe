"""Norms of gated linear attention, without its output ever being written.

For the dilated sequences of scorer "gla" (see ``lighthouse.scoring``), with w = 2^LOG2_DECAY:

    norms[t] = | sum over s <= t of w^(t - s) (x_t . y_s) v_s |_2 / sqrt(D)

A row ``WINDOW`` steps back weighs less than rounding does, so there is no state to carry: one
program owns ``BLOCK`` rows of one residue class of one head and multiplies them with the rows of
the window before them, tile by tile, accumulating in float32 in a fixed order.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, n1 entries of
level 1.
"""

import math

import torch
import triton
import triton.language as tl
from triton import knobs

from .. import scoring
from ..config import LighthouseConfig
from .launch import own_block, own_block_grid, row_strides

# Rows of a program, its warps, and loads in flight. In float32, whose tiles go through shared
# memory whole, less, so that D = 256 fits any GPU since Ampere.
BLOCK, WARPS, STAGES = 64, 4, 3
FLOAT32_BLOCK, FLOAT32_STAGES = 16, 1
# Bits that a weight at the window's end lies below the dtype's own rounding.
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
    """Launch ``_gla_norms`` for ``heads`` heads, shared evenly by those of x, y and v [B, H, N, D].

    Returns:
        float32 [B, heads, N].
    """
    batch, _, n, d = x.shape
    norms = x.new_empty((batch, heads, n), dtype=torch.float32)
    bits = -math.log2(torch.finfo(x.dtype).eps) + SPARE_BITS
    full = x.dtype == torch.float32
    block, stages = (FLOAT32_BLOCK, FLOAT32_STAGES) if full else (BLOCK, STAGES)
    window = triton.cdiv(math.ceil(bits / -scoring.LOG2_DECAY), block) * block
    if knobs.runtime.interpret and x.dtype == torch.bfloat16:
        # Whose products Triton's interpreter gets wrong.
        x, y, v = (rows.float() for rows in (x, y, v))
    (x, x_strides), (y, y_strides), (v, v_strides) = map(row_strides, (x, y, v))
    _gla_norms[own_block_grid(batch, heads * dilation, n // dilation, block)](
        x, y, v, norms, *x_strides, *y_strides, *v_strides,
        heads, *(heads // rows.shape[1] for rows in (x, y, v)), n // dilation, d**-0.5,
        D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), BLOCK=block,
        DILATION=dilation, WINDOW=window, num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
    return norms


def score(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scorer: str,
    dilation: int,
    p: int,
    scored: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level-1 scores of a scorer that attends, "dilated" or "gla".

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].
        p: pooling factor.
        scored: positions, of the p under each entry, that its score is the largest of.

    Returns:
        float32 [B, Hq, n1] by query and [B, Hkv, n1] by key.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    if scorer == "gla":
        norms = [gla_norms(x, y, v, heads, dilation) for x, y in ((q, k), (k, q))]
    else:
        # Stock attention takes the time; one plain read of its outputs is little beside it.
        config = LighthouseConfig(scorer=scorer, dilation=dilation)
        norms = scoring.position_norms(q, k, v, config)
    a, b = (x.unflatten(-1, (-1, p))[..., :scored].amax(dim=-1) for x in norms)
    return a, b.unflatten(1, (kv_heads, -1)).amax(dim=2)
