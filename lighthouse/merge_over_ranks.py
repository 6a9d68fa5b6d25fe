"""Lighthouse attention with a neighbourhood, when the sequence lies in chunks on several ranks.

``merge`` has the method, and ``context_parallel`` says what crosses from chunk to chunk: outputs of
entries that end with a chunk (seam rows), here with their logsumexps, and the last keys and values
(the halo). One collective carries all of it to the next chunk, and one carries the gradients back.

Shapes: B batch, Hq query heads, Hkv key-value heads, M chunks on this rank, C positions of a chunk,
D head dimension, S gathered length of a chunk, L levels, W positions of the window.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .context_parallel import ContextParallel, attention_over_ranks
from .document_chunks import documents_of_chunks, gathered_documents_of_chunks
from .documents import within
from .geometry import PyramidGeometry
from .halo import gradients_of_seams, layouts_in_chunks, seams_and_halo, window_in_chunks
from .implementation import choose_window_implementation, kernels
from .online_softmax import merged_output
from .reach import seam_rows
from .scatter import positions_reached, scatter_back
from .selection import Selection


def merged_attention_over_ranks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gathered: Sequence[torch.Tensor],
    selection: Selection,
    geometry: PyramidGeometry,
    scale: float | None,
    layout: ContextParallel,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``merge.merged_attention``, of the chunks on this rank.

    Args:
        q: [B M, Hq, C, D].
        k, v: [B M, Hkv, C, D].
        gathered: pooled q, k and v of the selected entries, [B M, H, S, D].
        documents: layout of the whole sequence, [B, W M C], the same on every rank.

    Returns:
        [B M, Hq, C, D].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    joined_q, joined_k, joined_v = (layout.join(rows) for rows in gathered)
    own = continues = own_documents = places = None
    if documents is not None:
        own_documents = documents_of_chunks(documents, layout)
        own, continues = own_documents.own, own_documents.continues
        places = gathered_documents_of_chunks(documents, geometry, layout)
    far, far_lse = attention_over_ranks(joined_q, joined_k, joined_v, scale, layout, True, places)
    far, far_lse = layout.split(far), layout.split(far_lse.unsqueeze(-1))
    seams = [seam_rows(rows, selection.slot, geometry) for rows in (far, far_lse)]
    window = geometry.config.window
    layouts = layouts_in_chunks(own_documents, window)
    near, near_lse, seam, seam_lse = window_in_chunks(
        q, k, v, window, scale, "torch", layout, layouts, *seams
    )
    # No entry reaches the first positions of the sequence, where the window stands alone.
    seam_lse = layout.fill_first(seam_lse, -math.inf)
    far = scatter_back(far, selection, geometry, seam, own, continues)
    far_lse = scatter_back(far_lse, selection, geometry, seam_lse, own, continues).squeeze(-1)
    if documents is not None:
        # No entry reaches the first positions of other documents either.
        far_lse = far_lse.masked_fill(
            ~positions_reached(selection, geometry, q, own, continues), -math.inf
        )
    return merged_output(near, near_lse, far, far_lse)


def merged_attention_over_ranks_by_kernels(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    coarsest: Sequence[torch.Tensor],
    selection: Selection,
    geometry: PyramidGeometry,
    scale: float | None,
    layout: ContextParallel,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``merged_attention_over_ranks``; gathers the selected entries too.

    Args:
        coarsest: means of the coarsest entries of q, k and v, [B M, H, C / p^(L - 1), D].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    impl = choose_window_implementation(None, q, documents is not None)
    of_documents: tuple[torch.Tensor | None, ...] = (None,) * 4
    if documents is not None:
        own = documents_of_chunks(documents, layout)
        own_layout, seen = layouts_in_chunks(own, geometry.config.window)
        places = gathered_documents_of_chunks(documents, geometry, layout)
        of_documents = own_layout, seen, own.continues, places
    arguments = q, k, v, *coarsest, selection.index, selection.slot, geometry, scale, impl, layout
    return _MergedOverRanks.apply(*arguments, *of_documents)


class _MergedOverRanks(torch.autograd.Function):
    """``merge._Merged`` in chunks.

    What crosses a seam goes forward to the first p^(L-1) - 1 positions of a chunk, and backward to
    the L - 1 entries at its end.
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
        impl: str,
        layout: ContextParallel,
        documents: torch.Tensor | None,
        seen: torch.Tensor | None,
        continues: torch.Tensor | None,
        places: torch.Tensor | None,
    ) -> torch.Tensor:
        # ``documents`` is the layout of the chunks, ``places`` that of the gathered sequence.
        pyramid = geometry.config.pooling_factor, geometry.config.levels
        pairs = ((q, coarsest_q), (k, coarsest_k), (v, coarsest_v))
        gathered = [layout.join(kernels.gather_means(*pair, index, *pyramid)) for pair in pairs]
        assert layout.operations is not None
        far, far_lse = layout.operations[0](*gathered, scale, *within(places))
        far, far_lse = layout.split(far), layout.split(far_lse.unsqueeze(-1))
        seams = [seam_rows(rows, slot, geometry) for rows in (far, far_lse)]
        far_lse = far_lse.squeeze(-1)
        (seam, seam_lse), halo = seams_and_halo(seams, k, v, geometry.config.window, layout)()
        seam_lse, chunks = seam_lse.squeeze(-1), (layout.first, len(layout.held))
        settings = geometry.config.window, scale, impl, *chunks
        near, near_lse = torch.ops.lighthouse.halo_window(
            q, k, v, *halo, *settings, documents, seen
        )
        crossing = seam, seam_lse, continues, *chunks
        out, lse = kernels.merge_outputs(
            far, far_lse, near, near_lse, slot, *pyramid, documents, *crossing
        )
        rows = q, k, v, *halo, *gathered
        of_documents = documents, seen, places, continues
        ctx.save_for_backward(*rows, index, slot, far, far_lse, out, lse, seam_lse, *of_documents)
        ctx.constants = geometry, scale, layout, settings
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        (q, k, v, *halo), gathered = saved[:5], saved[5:8]
        index, slot, far, far_lse, out, lse, seam_lse = saved[8:15]
        documents, seen, places, continues = saved[15:]
        geometry, scale, layout, settings = ctx.constants
        pyramid, length = (geometry.config.pooling_factor, geometry.config.levels), q.shape[2]
        dq, dk, dv, *dhalo = torch.ops.lighthouse.halo_window_backward(
            grad, None, q, k, v, *halo, out, lse, *settings, documents, seen
        )
        sums = kernels.seam_sums(
            grad, out, lse, slot, seam_lse, *pyramid, layout.first, len(layout.held), continues
        )
        arriving = gradients_of_seams(sums, dhalo, (dk, dv), layout)
        grad_far, out_far = kernels.collect_merged(
            grad, out, lse, far, far_lse, index, slot, *pyramid, documents
        )
        dout, delta = arriving()
        kernels.add_seam_sums(grad_far, out_far, far, dout, delta, slot, length, *pyramid)
        assert layout.operations is not None
        far_lse = layout.join(far_lse.unsqueeze(-1)).squeeze(-1).contiguous()
        grad_far, out_far = layout.join(grad_far), layout.join(out_far)
        rows = grad_far, None, *gathered, out_far, far_lse
        selected = layout.operations[1](*rows, scale, *within(places))
        grads = [
            kernels.spread_shares(layout.split(part), slot, length, *pyramid, onto=own)
            if needed
            else None
            for part, own, needed in zip(
                selected, (dq, dk, dv), ctx.needs_input_grad[:3], strict=True
            )
        ]
        # Arguments after the rows.
        return *grads, *[None] * 13
