"""Sums of rows that lie in memory in different ways.

Shapes: B batch, H heads, N positions, M positions that are added to, D head dimension.
"""

import torch

from .implementation import choose_implementation, kernels


def add_rows(into: torch.Tensor, x: torch.Tensor, y: torch.Tensor, first: int = 0) -> None:
    """Write x + y, rounded once, without autograd; on a GPU in one pass of a kernel.

    Args:
        into: [B, H, N, D] with D contiguous, which becomes x, with y added from position ``first``
            on.
        x: [B, H, N, D].
        y: [B, H, M, D], M being N - ``first`` or less.
    """
    if choose_implementation(None, into) == "triton":
        # pyrefly: ignore[missing-attribute]  Choosing it has made sure that there are kernels.
        kernels.add_rows(into, x, y, first)
        return
    here = slice(first, first + y.shape[2])
    for beside in (slice(0, here.start), slice(here.stop, None)):
        into[:, :, beside] = x[:, :, beside]
    torch.add(x[:, :, here], y, out=into[:, :, here])
