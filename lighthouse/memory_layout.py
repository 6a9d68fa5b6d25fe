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
