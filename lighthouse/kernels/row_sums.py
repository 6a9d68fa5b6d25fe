"""Sums of rows that lie in memory in different ways, in one pass.

torch adds rows that are not one piece of memory element by element, at less than half of a GPU's
bandwidth. Here one program owns ``BLOCK`` positions of one head, reads and writes each row once and
adds in float32.

Shapes: B batch, H heads, N positions, M positions that are added to, D head dimension.
"""

import torch
import triton
import triton.language as tl

from .launch import define, own_block, own_block_grid, row_strides

# Elements of a program's tile, and its warps, as in the file for merging.
TILE, WARPS = 2048, 2


@triton.jit
def _add_rows(
    into, x, y, into_b, into_h, into_n, x_b, x_h, x_n, y_b, y_h, y_n,
    heads, length, first, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    batch, head, block = own_block(heads, length, BLOCK)
    position = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    shown = (position < length)[:, None] & (column < D)[None, :]
    rows = x + batch * x_b + head * x_h + position[:, None] * x_n + column[None, :]
    total = tl.load(rows, mask=shown, other=0.0)
    place = position - first
    also = ((place >= 0) & (place < count))[:, None] & shown
    rows = y + batch * y_b + head * y_h + place[:, None] * y_n + column[None, :]
    more = tl.load(rows, mask=also, other=0.0)
    if WIDEN:
        total, more = total.to(tl.float32), more.to(tl.float32)
    rows = into + batch * into_b + head * into_h + position[:, None] * into_n + column[None, :]
    tl.store(rows, (total + more).to(into.dtype.element_ty), mask=shown)


def launch_add_rows(into: torch.Tensor, x: torch.Tensor, y: torch.Tensor, first: int) -> None:
    """Launch ``_add_rows``.

    Args:
        into: [B, H, N, D] with D contiguous, which becomes x, with y added from position ``first``
            on.
        x: [B, H, N, D].
        y: [B, H, M, D], M being N - ``first`` or less.
    """
    assert into.stride(-1) == 1, "the sum is written where it lies"
    (x, x_strides), (y, y_strides) = row_strides(x), row_strides(y)
    batch, heads, length, d = into.shape
    block_d = triton.next_power_of_2(d)
    block = TILE // block_d
    _add_rows[own_block_grid(batch, heads, length, block)](
        into, x, y, *into.stride()[:3], *x_strides, *y_strides, heads, length, first, y.shape[2],
        D=d, BLOCK_D=block_d, BLOCK=block, WIDEN=max(x.dtype.itemsize, y.dtype.itemsize) <= 4,
        num_warps=WARPS,
    )  # fmt: skip


def _fake_add_rows(*arguments: object) -> None:
    pass


define(
    "add_rows(Tensor(a!) into, Tensor x, Tensor y, int first) -> ()",
    launch_add_rows,
    _fake_add_rows,
)

add_rows = torch.ops.lighthouse.add_rows
