"""What all launchers share."""

import torch

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
