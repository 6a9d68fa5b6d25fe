"""What all launchers share."""

import torch
import triton
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_D = 256


def row_strides(rows: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """``rows`` [B, H, N, D] with D contiguous, copied only if it is not, and its other strides."""
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride()[:3]


def sequence_first(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Uninitialised [B, H, length, D] that lies in memory as [B, length, H, D].

    The layout of a model's projections, so that the reshape to [B, length, H * D] is free.
    """
    batch, heads, _, d = rows.shape
    return rows.new_empty((batch, length, heads, d)).transpose(1, 2)


@triton.jit
def own_block(heads, length, BLOCK: tl.constexpr):
    """Batch, head and block of ``BLOCK`` rows, of ``length``, that this program owns, as int64.

    Neighbouring programs share positions across heads, whose rows lie side by side in memory.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK)
    return program // heads // blocks, program % heads, program // heads % blocks


@triton.jit
def covered(slots, position, inside, length, P: tl.constexpr, FINER: tl.constexpr, span):
    """Which positions an included entry reaches of the ``FINER`` finest levels, below ``span``.

    Args:
        slots: of one head, the base level first.
        position: none below ``span`` - 1, so that none is reached from an earlier chunk.
        inside: positions to ask for; others are reached by nothing.
        span: positions that an entry covers of the level that counts as coarser.
    """
    found = inside & (position < 0)
    offset = tl.zeros((), dtype=tl.int64)
    for level in tl.static_range(FINER):
        finer = P**level
        asked = inside & (finer < span)
        entry = (position - (finer - 1)) // finer
        found = found | (tl.load(slots + offset + entry, mask=asked, other=-1) >= 0)
        offset += length // finer
    return found


def own_block_grid(batch: int, heads: int, length: int, block: int) -> tuple[int]:
    """The grid whose programs ``own_block`` tells apart."""
    return (batch * heads * triton.cdiv(length, block),)
