"""Registration of operations, and the helpers that all launchers share."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from ..precision import KERNEL_DTYPES, LARGEST_D

# The most rows that a program's text reads one by one; it repeats them for more. Compilation would
# take minutes for hundreds.
MOST_UNROLLED = 16

# Whether Triton's interpreter runs the kernels, on any device. Triton decides it when a kernel is
# defined.
INTERPRETED: bool = knobs.runtime.interpret

# Operations are defined in this library and not by torch.library's decorators, which cost ten times
# as much on every call. At these kernels' speed, that would be most of the time.
_library = torch.library.Library("lighthouse", "FRAGMENT")


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the operation ``schema`` of the namespace lighthouse.

    Args:
        schema: name, arguments and results, as torch.library writes them.
        function: computes the operation; its first argument is a tensor.
        fake: returns results of the same shapes, dtypes and strides, without values.
    """
    name = schema[: schema.index("(")]

    def run(tensor: torch.Tensor, *arguments: Any) -> Any:
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(tensor):
            return function(tensor, *arguments)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lighthouse::{name}", fake, lib=_library)


def obstacle_to_kernels(q: torch.Tensor) -> str | None:
    """The reason why the kernels do not compute on tensors like ``q`` [B, Hq, N, D], or None."""
    if not q.is_cuda and not INTERPRETED:
        return f"need CUDA tensors, got {q.device}"
    if q.dtype not in KERNEL_DTYPES:
        return f"compute bfloat16, float16 and float32, got {q.dtype}"
    if q.shape[-1] > LARGEST_D:
        return f"take a head dimension of at most {LARGEST_D}, got {q.shape[-1]}"
    return None


def check_supported(q: torch.Tensor) -> None:
    """Check that the kernels can compute on tensors like ``q`` [B, Hq, N, D].

    Raises:
        ValueError: the device is not CUDA, the dtype not bf16, fp16 or fp32, or D over 256.
    """
    if obstacle := obstacle_to_kernels(q):
        raise ValueError(f'the Triton kernels {obstacle}; pass impl="torch"')


def row_strides(rows: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """``rows`` [B, H, N, D] with D contiguous, and the strides of the other dimensions.

    Rows are copied only if D is not contiguous.
    """
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride()[:3]


@triton.jit
def own_block(heads, length, BLOCK: tl.constexpr):
    """Batch, head and block that this program owns, as int64; ``length`` rows fall into blocks.

    Neighbouring programs take the same positions of other heads, whose rows lie side by side in
    memory.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK)
    return program // heads // blocks, program % heads, program // heads % blocks


@triton.jit
def in_level(entry, length, P: tl.constexpr, LEVELS: tl.constexpr):
    """Number within its level, span, and whether its level is the coarsest, of each entry.

    Args:
        entry: int64 indices into the pyramid, whose levels are stored one after the other.
        length: positions N.
    """
    span = tl.full(entry.shape, 1, tl.int64)
    level_length = tl.zeros((), dtype=tl.int64) + length
    coarser = tl.full(entry.shape, 1, tl.int1)
    for _ in tl.static_range(LEVELS - 1):
        coarser = coarser & (entry >= level_length)
        entry = tl.where(coarser, entry - level_length, entry)
        span = tl.where(coarser, span * P, span)
        level_length = level_length // P
    return entry, span, coarser


@triton.jit
def place_of(slots, entry, length, P: tl.constexpr, LEVEL: tl.constexpr):
    """The place of each entry of a level, -1 where it is not included or does not exist.

    Args:
        slots: slots of one head, the base level first.
        entry: int64 numbers of entries within their level.
        length: positions N.
    """
    offset = tl.zeros((), dtype=tl.int64)
    for level in tl.static_range(LEVEL):
        offset += length // P**level
    exists = (entry >= 0) & (entry < length // P**LEVEL)
    return tl.load(slots + offset + entry, mask=exists, other=-1).to(tl.int64)


@triton.jit
def document_ends(
    documents, entry, length, SPAN: tl.constexpr, DOCUMENTS: tl.constexpr
):  # fmt: skip
    """Whether a document ends with each coarsest entry, and another begins after it.

    If so, entries of all levels that end there reach only one position of their document: their own
    last one, which is the first that they reach. Of the p entries below that collecting sums, the
    first ends there too, and the others lie in the next document.

    Args:
        documents: for each position of one sequence, the first position of its document.
        SPAN: positions under a coarsest entry.
        DOCUMENTS: whether there are documents; without them nothing ends.
    """
    if DOCUMENTS:
        following = (entry + 1) * SPAN
        first = tl.load(documents + following, mask=following < length, other=0)
        ends = (following < length) & (first == following)
    else:
        ends = tl.zeros(entry.shape, dtype=tl.int1)
    return ends


def own_block_grid(batch: int, heads: int, length: int, block: int) -> tuple[int]:
    """The grid of programs that divide the rows as ``own_block`` does."""
    return (batch * heads * triton.cdiv(length, block),)


def unrolled(rows: int) -> int:
    """How many of ``rows``, a power of two, a program's text reads one by one; divides them."""
    return min(MOST_UNROLLED, rows)
