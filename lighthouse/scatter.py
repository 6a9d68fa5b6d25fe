"""Scatter the outputs of selected entries back to the base sequence.

Shapes: B batch, H query heads, N positions, D head dimension, S gathered length.
"""

import torch

from .gather import take_included, take_rows
from .geometry import PyramidGeometry
from .reach import Reach, reaching, seam_gradient
from .scoring import accumulation_dtype
from .selection import Selection


class _ScatterBack(torch.autograd.Function):
    """Each position gathers what reaches it, each place's gradient what it reached."""

    @staticmethod
    def forward(ctx, rows, seam, index, slot, geometry):
        ctx.save_for_backward(index, slot)
        ctx.geometry, ctx.with_seam = geometry, seam is not None
        dtype = accumulation_dtype(rows.dtype)
        total = None
        for level, (place, takes_seam) in enumerate(_reaching(slot, geometry, ctx.with_seam)):
            reach = take_included(rows, place).to(dtype)
            if takes_seam is not None:
                takes_seam = _for_heads(takes_seam, rows.shape[1])
                reach = torch.where(takes_seam, seam[:, :, level - 1 : level].to(dtype), reach)
            total = reach if total is None else total + reach
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx, grad):
        index, slot = ctx.saved_tensors
        geometry = ctx.geometry
        config = geometry.config
        dtype = accumulation_dtype(grad.dtype)
        pyramid = []
        for (place, _), length, span in zip(
            _reaching(slot, geometry, ctx.with_seam), geometry.lengths, geometry.spans, strict=True
        ):
            took = grad.masked_fill(~_for_heads(place >= 0, grad.shape[1]), 0)
            reached = torch.nn.functional.pad(took[:, :, span - 1 :], (0, 0, 0, span - 1))
            reached = reached.unflatten(2, (length, span)).sum(dim=3, dtype=dtype)
            pyramid.append(reached.to(grad.dtype))
        seam = None
        if ctx.needs_input_grad[1]:
            seam = seam_gradient(
                grad, slot, config.pooling_factor, config.levels, config.combine == "finest"
            )
        return take_rows(torch.cat(pyramid, dim=2), index), seam, None, None, None


def _reaching(slot: torch.Tensor, geometry: PyramidGeometry, with_seam: bool) -> list[Reach]:
    config, n = geometry.config, geometry.sequence_length
    return reaching(
        slot,
        torch.arange(n, device=slot.device),
        config.pooling_factor,
        config.levels,
        n,
        config.combine == "finest",
        with_seam,
    )


def _for_heads(mask: torch.Tensor, heads: int) -> torch.Tensor:
    """A mask [N] or [B, Hkv, N] as [1 or B, 1 or H, N, 1]."""
    if mask.ndim == 1:
        return mask.view(1, 1, -1, 1)
    return mask.repeat_interleave(heads // mask.shape[1], dim=1).unsqueeze(-1)


def scatter_back(
    rows: torch.Tensor,
    selection: Selection,
    geometry: PyramidGeometry,
    seam: torch.Tensor | None = None,
) -> torch.Tensor:
    """Give every position the outputs that reach it (arXiv 2605.06554, section 3.3).

    Entry (l, i) reaches the p^l positions that start at its end. Position t thus receives, for
    each level l with t >= p^l - 1, the output of entry (l, (t - p^l + 1) // p^l) if it is
    included, and zero if none is. With ``combine = "sum"`` it gets the sum of them, taken in
    float32 (float64 for float64) and rounded once, with "finest" the one of the lowest level.

    Args:
        rows: attention outputs, [B, H, S, D].
        seam: outputs of the entries of levels 1 to L - 1 that end just before the first position,
            [B, H, L - 1, D]; none by default.

    Returns:
        [B, H, N, D].
    """
    return _ScatterBack.apply(rows, seam, selection.index, selection.slot, geometry)
