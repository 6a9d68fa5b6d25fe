"""Merge one attention's output into another's in one pass, by their logsumexps.

``lighthouse.online_softmax`` has the formulas. One program owns ``BLOCK`` queries of one head. It
reads and writes each element once and computes in float32.

The compiler repeats a load of fewer elements than a program has threads, once for every arrangement
of threads that needs it. A tile's logsumexps are so few. One warp would load them after another has
stored the merged ones, so the kernel loads them from a copy. A tile of outputs is larger. It is
loaded once, before anything of it is stored.

Shapes: B batch, H query heads, N queries, D head dimension.
"""

import torch
import triton
import triton.language as tl

from .launch import define, own_block, own_block_grid, row_strides

# Elements of a program's tile, and its warps.
TILE, WARPS = 2048, 4
assert TILE >= 32 * WARPS, "outputs would be loaded more than once"


@triton.jit
def _merge_in_place(
    x, a, old_a, y, b,
    x_b, x_h, x_n, a_b, a_h, a_n, y_b, y_h, y_n,
    heads, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads, length, BLOCK)
    plane = batch * heads + head
    query = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = query < length
    shown = inside[:, None] & (column < D)[None, :]

    here = tl.load(old_a + plane * length + query, mask=inside, other=0.0)
    there = tl.load(b + plane * length + query, mask=inside, other=0.0)
    largest = tl.maximum(here, there)
    merged = largest + tl.log(1.0 + tl.exp(tl.minimum(here, there) - largest))
    tl.store(a + batch * a_b + head * a_h + query * a_n, merged, mask=inside)

    weight = tl.sigmoid(there - here)[:, None]
    rows = x + batch * x_b + head * x_h + query[:, None] * x_n + column[None, :]
    own = tl.load(rows, mask=shown, other=0.0).to(tl.float32)
    others = y + batch * y_b + head * y_h + query[:, None] * y_n + column[None, :]
    other = tl.load(others, mask=shown, other=0.0).to(tl.float32)
    total = own * (1.0 - weight) + other * weight
    tl.store(rows, total.to(x.dtype.element_ty), mask=shown)


def launch_merge_in_place(
    x: torch.Tensor, a: torch.Tensor, y: torch.Tensor, b: torch.Tensor
) -> None:
    """Launch ``_merge_in_place``.

    Args:
        x: [B, H, N, D] with D contiguous, which becomes the merged output.
        a: float32 [B, H, N], which becomes the merged logsumexp.
        y: [B, H, N, D].
        b: float32 [B, H, N].
    """
    assert x.stride(-1) == 1, "x is written where it lies"
    y, y_strides = row_strides(y)
    old_a, b = a.clone(memory_format=torch.contiguous_format), b.contiguous()
    batch, heads, length, d = x.shape
    block_d = triton.next_power_of_2(d)
    block = TILE // block_d
    _merge_in_place[own_block_grid(batch, heads, length, block)](
        x, a, old_a, y, b, *x.stride()[:3], *a.stride(), *y_strides, heads, length,
        D=d, BLOCK_D=block_d, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip


def _fake_merge_in_place(*tensors: torch.Tensor) -> None:
    pass


define(
    "merge_in_place(Tensor(a!) x, Tensor(b!) a, Tensor y, Tensor b) -> ()",
    launch_merge_in_place,
    _fake_merge_in_place,
)

merge_in_place = torch.ops.lighthouse.merge_in_place
