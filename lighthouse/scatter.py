"""Scatter the outputs of selected entries back to the base sequence.

Shapes: B batch, H query heads, Hkv key-value heads, N positions, D head dimension, S gathered
length, L levels.
"""

from typing import Any

import torch

from .gather import take_included, take_rows
from .geometry import PyramidGeometry
from .precision import accumulation_dtype
from .reach import Reach, reaching, seam_gradient
from .selection import Selection


class _ScatterBack(torch.autograd.Function):
    """Sums of the outputs that reach each position.

    The gradient of an output is the sum of the gradients at the positions that it reached.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        seam: torch.Tensor | None,
        index: torch.Tensor,
        slot: torch.Tensor,
        geometry: PyramidGeometry,
        documents: torch.Tensor | None,
        continues: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(index, slot, documents, continues)
        ctx.geometry, ctx.with_seam = geometry, seam is not None
        dtype = accumulation_dtype(rows.dtype)
        total = None
        reached = _reaching_all(slot, geometry, ctx.with_seam, documents, continues)
        for level, (place, takes_seam) in enumerate(reached):
            reach = take_included(rows, place).to(dtype)
            if takes_seam is not None:
                assert seam is not None
                takes_seam = _for_heads(takes_seam, rows.shape[1])
                reach = torch.where(takes_seam, seam[:, :, level - 1 : level].to(dtype), reach)
            total = reach if total is None else total + reach
        assert total is not None
        # Compiled by torch 2.11, a forward that returns another name of a tensor, as .to would
        # here, has gradients of zero: https://github.com/pytorch/pytorch/issues/180642.
        return total if total.dtype == rows.dtype else total.to(rows.dtype)

    @staticmethod
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None, None, None]:
        index, slot, documents, continues = ctx.saved_tensors
        geometry = ctx.geometry
        dtype = accumulation_dtype(grad.dtype)
        pyramid = []
        found = _reaching_all(slot, geometry, ctx.with_seam, documents, continues)
        for (place, _), length, span in zip(found, geometry.lengths, geometry.spans, strict=True):
            took = grad.masked_fill(~_for_heads(place >= 0, grad.shape[1]), 0)
            reached = torch.nn.functional.pad(took[:, :, span - 1 :], (0, 0, 0, span - 1))
            reached = reached.unflatten(2, (length, span)).sum(dim=3, dtype=dtype)
            pyramid.append(reached.to(grad.dtype))
        seam = None
        if ctx.needs_input_grad[1]:
            seam = seam_gradient(grad, slot, geometry, documents, continues)
        return take_rows(torch.cat(pyramid, dim=2), index), seam, None, None, None, None, None


def _reaching_all(
    slot: torch.Tensor,
    geometry: PyramidGeometry,
    with_seam: bool,
    documents: torch.Tensor | None,
    continues: torch.Tensor | None = None,
) -> list[Reach]:
    """``reaching`` of all positions."""
    positions = torch.arange(geometry.sequence_length, device=slot.device)
    return reaching(slot, positions, geometry, with_seam, documents, continues)


def positions_reached(
    selection: Selection,
    geometry: PyramidGeometry,
    q: torch.Tensor,
    documents: torch.Tensor | None,
    continues: torch.Tensor | None = None,
) -> torch.Tensor:
    """Whether each position takes any output, bool [B, Hq, N].

    Args:
        q: [B, Hq, N, D].
        documents: as in ``scatter_back``.
        continues: as there, and then there is a seam.
    """
    found = _reaching_all(selection.slot, geometry, continues is not None, documents, continues)
    taken = torch.stack([each.taken for each in found]).any(dim=0)
    return taken.repeat_interleave(q.shape[1] // taken.shape[1], dim=1)


def _for_heads(mask: torch.Tensor, heads: int) -> torch.Tensor:
    """A mask [N], [B, 1, N] or [B, Hkv, N] as [1 or B, 1 or H, N, 1]."""
    if mask.ndim == 1:
        return mask.view(1, 1, -1, 1)
    return mask.repeat_interleave(heads // mask.shape[1], dim=1).unsqueeze(-1)


def scatter_back(
    rows: torch.Tensor,
    selection: Selection,
    geometry: PyramidGeometry,
    seam: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    continues: torch.Tensor | None = None,
) -> torch.Tensor:
    """Give every position the outputs that reach it (arXiv 2605.06554, section 3.3).

    Entry (l, i) reaches the p^l positions that start at its end. Position t thus receives, for
    each level l with t >= p^l - 1, the output of entry (l, (t - p^l + 1) // p^l) if it is
    included. ``combine = "sum"`` adds these outputs up in float32 (float64 for float64) and rounds
    once; "finest" takes the output of the lowest level. A position that no output reaches is zero.

    Args:
        rows: attention outputs, [B, H, S, D].
        seam: outputs of the entries of levels 1 to L - 1 that end just before the first position,
            [B, H, L - 1, D]; without them the sequence starts here.
        documents: [B, N], for each position the first position of its document, which outputs do
            not leave.
        continues: whether the first document began before the first position, bool [B]. It alone
            takes of ``seam``. Given if there are documents and a seam.

    Returns:
        [B, H, N, D].
    """
    maps = selection.index, selection.slot
    return _ScatterBack.apply(rows, seam, *maps, geometry, documents, continues)
