"""Pool the base rows and gather the selected entries.

Shapes: B batch, H heads (Hq or Hkv), Hkv key-value heads, N positions, D head dimension, S gathered
length, K rows to take, M rows to take them from.
"""

from typing import Any

import torch

from .geometry import PyramidGeometry
from .precision import accumulation_dtype
from .selection import Selection


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of ``rows`` [B, H, M, D] at ``index`` [B, Hkv, K]; H / Hkv heads share one index.

    Returns:
        [B, H, K, D].
    """
    group = rows.shape[1] // index.shape[1]
    index = index.repeat_interleave(group, dim=1)
    batch = torch.arange(rows.shape[0], device=rows.device).view(-1, 1, 1)
    head = torch.arange(rows.shape[1], device=rows.device).view(1, -1, 1)
    return rows[batch, head, index]


class _PoolGather(torch.autograd.Function):
    """Means of base rows at the selected entries.

    Backward gathers too, so that it needs no atomic additions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        index: torch.Tensor,
        slot: torch.Tensor,
        geometry: PyramidGeometry,
    ) -> torch.Tensor:
        ctx.save_for_backward(slot)
        ctx.geometry = geometry
        dtype = accumulation_dtype(rows.dtype)
        pyramid = [rows]
        for length in geometry.lengths[1:]:
            pooled = rows.unflatten(2, (length, -1)).mean(dim=3, dtype=dtype)
            pyramid.append(pooled.to(rows.dtype))
        return take_rows(torch.cat(pyramid, dim=2), index)

    @staticmethod
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slot,) = ctx.saved_tensors
        geometry = ctx.geometry
        dtype = accumulation_dtype(grad.dtype)
        total = None
        for offset, length, span in zip(
            geometry.offsets, geometry.lengths, geometry.spans, strict=True
        ):
            share = take_included(grad, slot[..., offset : offset + length]).to(dtype) / span
            share = share.repeat_interleave(span, dim=2)
            total = share if total is None else total + share
        assert total is not None
        return total.to(grad.dtype), None, None, None


def take_included(rows: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Rows of ``rows`` [B, H, S, D] at ``slot`` [B, Hkv, K], zero where it is -1.

    Returns:
        [B, H, K, D].
    """
    taken = take_rows(rows, slot.clamp(min=0))
    group = rows.shape[1] // slot.shape[1]
    absent = (slot < 0).repeat_interleave(group, dim=1).unsqueeze(-1)
    return taken.masked_fill(absent, 0)


def pool_gather(
    rows: torch.Tensor, selection: Selection, geometry: PyramidGeometry
) -> torch.Tensor:
    """Mean of the base rows of every selected entry (arXiv 2605.06554, section 3.1).

    Sums are taken in float32 (float64 for float64) and rounded once.

    Args:
        rows: queries, keys or values, [B, H, N, D].

    Returns:
        [B, H, S, D].
    """
    return _PoolGather.apply(rows, selection.index, selection.slot, geometry)
