"""Merge attention over further keys into attention over others, in place and in one pass.

With logsumexps s of the outputs x and s' of x', all queries' over keys of their own:

    x <- x + (x' - x) / (1 + exp(s - s'))      s <- log(exp(s) + exp(s'))

One program owns ``BLOCK`` queries of one head, and reads and writes each element once; computed in
float32.

Shapes: B batch, H heads, S queries, D head dimension.
"""

import torch
import triton
import triton.language as tl

# Elements of a program's tile, and its warps.
TILE, WARPS = 2048, 4


@triton.jit
def _merge(
    out, logsumexp, further, further_logsumexp,
    out_b, out_h, out_s, sum_b, sum_h, sum_s,
    further_b, further_h, further_s, further_sum_b, further_sum_h, further_sum_s,
    heads, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share queries across heads, whose rows lie side by side in memory.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK)
    batch, head = program // heads // blocks, program % heads
    query = program // heads % blocks * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = query < length

    sums = logsumexp + batch * sum_b + head * sum_h + query * sum_s
    further_sums = (
        further_logsumexp + batch * further_sum_b + head * further_sum_h + query * further_sum_s
    )
    here = tl.load(sums, mask=inside, other=0.0)
    there = tl.load(further_sums, mask=inside, other=0.0)
    weight = tl.sigmoid(there - here)
    total = tl.maximum(here, there) + tl.log(1.0 + tl.exp(-tl.abs(here - there)))
    tl.store(sums, total, mask=inside)

    column = tl.arange(0, BLOCK_D)
    wanted = inside[:, None] & (column < D)[None, :]
    rows = out + batch * out_b + head * out_h + query[:, None] * out_s + column[None, :]
    further += batch * further_b + head * further_h
    x = tl.load(rows, mask=wanted, other=0.0).to(tl.float32)
    y = tl.load(further + query[:, None] * further_s + column[None, :], mask=wanted, other=0.0)
    x += (y.to(tl.float32) - x) * weight[:, None]
    tl.store(rows, x.to(out.dtype.element_ty), mask=wanted)


def merge_(
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    further: torch.Tensor,
    further_logsumexp: torch.Tensor,
) -> None:
    """Merge ``further`` outputs into ``out`` and their logsumexps into ``logsumexp``.

    Args:
        out, further: [B, H, S, D] with D contiguous, of at most 32 bits.
        logsumexp, further_logsumexp: float32 [B, H, S].
    """
    assert out.stride(-1) == further.stride(-1) == 1
    batch, heads, length, d = out.shape
    block_d = triton.next_power_of_2(d)
    block = max(1, TILE // block_d)
    _merge[(batch * heads * triton.cdiv(length, block),)](
        out, logsumexp, further, further_logsumexp, *out.stride()[:3], *logsumexp.stride(),
        *further.stride()[:3], *further_logsumexp.stride(), heads, length,
        D=d, BLOCK_D=block_d, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
