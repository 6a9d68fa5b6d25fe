"""Scatter the outputs of selected entries back to the base sequence.

Shapes: B batch, H query heads, N positions, D head dimension, S gathered length.
"""

import torch

from .context_parallel import seam_gradient
from .gather import take_included, take_rows
from .geometry import PyramidGeometry
from .scoring import accumulation_dtype
from .selection import Selection


class _ScatterBack(torch.autograd.Function):
    """Each position gathers what reaches it, each place's gradient what it reached."""

    @staticmethod
    def forward(ctx, rows, seam, index, slot, geometry):
        ctx.save_for_backward(index)
        ctx.geometry = geometry
        dtype = accumulation_dtype(rows.dtype)
        n = geometry.sequence_length
        total = None
        for level, (offset, length, span) in enumerate(
            zip(geometry.offsets, geometry.lengths, geometry.spans, strict=True)
        ):
            reach = take_included(rows, slot[..., offset : offset + length]).to(dtype)
            # Entry i reaches span positions from its end on: a shift by span - 1, cut off at N.
            reach = reach.repeat_interleave(span, dim=2)
            if seam is None or level == 0:
                reach = torch.nn.functional.pad(reach, (0, 0, span - 1, 0))
            else:
                before = seam[:, :, level - 1 : level].to(dtype).expand(-1, -1, span - 1, -1)
                reach = torch.cat([before, reach], dim=2)
            reach = reach[:, :, :n]
            total = reach if total is None else total + reach
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        geometry = ctx.geometry
        dtype = accumulation_dtype(grad.dtype)
        pyramid = []
        for length, span in zip(geometry.lengths, geometry.spans, strict=True):
            reached = torch.nn.functional.pad(grad[:, :, span - 1 :], (0, 0, 0, span - 1))
            reached = reached.unflatten(2, (length, span)).sum(dim=3, dtype=dtype)
            pyramid.append(reached.to(grad.dtype))
        seam = None
        if ctx.needs_input_grad[1]:
            seam = seam_gradient(grad, geometry.config.pooling_factor, geometry.config.levels)
        return take_rows(torch.cat(pyramid, dim=2), index), seam, None, None, None


def scatter_back(
    rows: torch.Tensor,
    selection: Selection,
    geometry: PyramidGeometry,
    seam: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum at every position over the levels whose entry reaches it (arXiv 2605.06554, section 3.3).

    Entry (l, i) reaches the p^l positions that start at its end. Position t thus receives, for
    each level l with t >= p^l - 1, the output of entry (l, (t - p^l + 1) // p^l) if it is
    included, and zero if none is. Sums are taken in float32 (float64 for float64) and rounded
    once.

    Args:
        rows: attention outputs, [B, H, S, D].
        seam: outputs of the entries of levels 1 to L - 1 that end just before the first position,
            [B, H, L - 1, D]; none by default.

    Returns:
        [B, H, N, D].
    """
    return _ScatterBack.apply(rows, seam, selection.index, selection.slot, geometry)
