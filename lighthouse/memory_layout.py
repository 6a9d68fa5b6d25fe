"""How rows lie in memory.

Shapes: B batch, H heads, N positions, D head dimension.
"""

import torch


def sequence_first(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Uninitialised [B, H, length, D] that lies in memory as [B, length, H, D].

    A model's projections have this layout: the reshape to [B, length, H * D] then copies nothing.

    Args:
        rows: [B, H, N, D].
    """
    batch, heads, _, d = rows.shape
    return rows.new_empty((batch, length, heads, d)).transpose(1, 2)


def joined(rows: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] as the rows of one long sequence, [B N, H, D]."""
    return rows.transpose(1, 2).flatten(0, 1)


def split(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """[B N, H, D] as [B, H, N, D], lying in memory as [B, N, H, D]."""
    return rows.contiguous().unflatten(0, (batch, -1)).transpose(1, 2)
