"""Lighthouse attention with a neighbourhood: selected entries and a causal window, merged.

Position t has two attentions: that of the finest entry that reaches it, over the entries before it,
and its own over the last W positions. Their outputs are weighted by the sums that their softmaxes
divide by, so that the result is one softmax over both sets of keys. A key that is in both counts
twice.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, S gathered
length, W positions of the window.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .documents import gathered_documents, within
from .geometry import PyramidGeometry
from .implementation import choose_window_implementation, kernels, operations_by
from .online_softmax import merged_output
from .scatter import positions_reached, scatter_back
from .selection import Selection
from .window import window_attention, window_operations


def merged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gathered: Sequence[torch.Tensor],
    selection: Selection,
    geometry: PyramidGeometry,
    scale: float | None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend over the selected entries and over the window, and merge the two.

    Gradients are exact, those of the weights among them.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].
        gathered: pooled q, k and v of the selected entries, [B, H, S, D].
        scale: factor of the scores; by default 1 / sqrt(D).
        documents: [B, N], for each position the first position of its document, within which both
            attend.

    Returns:
        [B, Hq, N, D].
    """
    attend = partial(window_attention, scale=scale, impl="torch", return_lse=True)
    places_of_documents = None if documents is None else gathered_documents(documents, geometry)
    far, far_lse = attend(*gathered, window=geometry.gathered_length, documents=places_of_documents)
    near, near_lse = attend(q, k, v, window=geometry.config.window, documents=documents)
    scatter = partial(scatter_back, selection=selection, geometry=geometry, documents=documents)
    far, far_lse = scatter(far), scatter(far_lse.unsqueeze(-1)).squeeze(-1)
    far_lse = far_lse.masked_fill(~positions_reached(selection, geometry, q, documents), -math.inf)
    return merged_output(near, near_lse, far, far_lse)


def merged_attention_by_kernels(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    coarsest: Sequence[torch.Tensor],
    selection: Selection,
    geometry: PyramidGeometry,
    scale: float | None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``merged_attention``; gathers the selected entries too.

    Args:
        coarsest: means of the coarsest entries of q, k and v, [B, H, N / p^(L - 1), D].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    places = None if documents is None else gathered_documents(documents, geometry)
    arguments = q, k, v, *coarsest, selection.index, selection.slot, geometry, scale
    return _Merged.apply(*arguments, documents, places)


def window_by_documents(q: torch.Tensor) -> str:
    """The implementation of windows that computes tensors like ``q`` within documents."""
    return choose_window_implementation(None, q, with_documents=True)


class _Merged(torch.autograd.Function):
    """Gathering, two attentions and the kernel that merges them.

    ``kernels.merge`` has the formulas. Backward adds the gradients through the selected entries to
    those through the window as it spreads them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        coarsest_q: torch.Tensor,
        coarsest_k: torch.Tensor,
        coarsest_v: torch.Tensor,
        index: torch.Tensor,
        slot: torch.Tensor,
        geometry: PyramidGeometry,
        scale: float,
        documents: torch.Tensor | None,
        places: torch.Tensor | None,
    ) -> torch.Tensor:
        # ``places`` is the layout of the gathered sequence.
        attend, _ = _operations(q, documents)
        pyramid = geometry.config.pooling_factor, geometry.config.levels
        pairs = ((q, coarsest_q), (k, coarsest_k), (v, coarsest_v))
        gathered = [kernels.gather_means(*pair, index, *pyramid) for pair in pairs]
        near, near_lse = attend(q, k, v, geometry.config.window, scale, *within(documents))
        far, far_lse = attend(*gathered, geometry.gathered_length, scale, *within(places))
        out, lse = kernels.merge_outputs(far, far_lse, near, near_lse, slot, *pyramid, documents)
        rows = q, k, v, *gathered
        ctx.save_for_backward(*rows, index, slot, far, far_lse, out, lse, documents, places)
        ctx.constants = geometry.config.window, scale, pyramid
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        rows, (index, slot, far, far_lse, out, lse, documents, places) = saved[:6], saved[6:]
        window, scale, pyramid = ctx.constants
        _, backward = _operations(rows[0], documents)
        near = backward(grad, None, *rows[:3], out, lse, window, scale, *within(documents))
        grad_far, out_far = kernels.collect_merged(
            grad, out, lse, far, far_lse, index, slot, *pyramid, documents
        )
        gathered_length = rows[3].shape[2]
        selected = backward(
            grad_far, None, *rows[3:], out_far, far_lse, gathered_length, scale, *within(places)
        )
        needs, length = ctx.needs_input_grad[:3], rows[0].shape[2]
        grads = [
            kernels.spread_shares(part, slot, length, *pyramid, onto=own) if needed else None
            for part, own, needed in zip(selected, near, needs, strict=True)
        ]
        # Nine arguments come after the rows.
        return *grads, *[None] * 9


def _operations(
    q: torch.Tensor, documents: torch.Tensor | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if documents is None:
        return window_operations(q)
    return operations_by(window_by_documents(q))
