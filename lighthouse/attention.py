"""Lighthouse attention, as a function and as the inner attention of a model.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension.
"""

from collections.abc import Callable

import torch
from torch import nn

from .config import LighthouseConfig
from .context_parallel import ONE_DEVICE, ContextParallel, check_halo
from .dense_attention import document_attention
from .document_chunks import documents_of_chunks
from .documents import (
    check_documents,
    check_selected,
    gathered_documents,
)
from .gather import pool_gather
from .geometry import PyramidGeometry
from .implementation import (
    IMPLEMENTATIONS,
    check_for_documents,
    choose_implementation,
    kernels,
)
from .inner_attention import InnerAttention
from .inputs import check_transforms, checked_selection, chunked
from .merge import merged_attention, merged_attention_by_kernels
from .merge_over_ranks import (
    merged_attention_over_ranks,
    merged_attention_over_ranks_by_kernels,
)
from .reach import seam_rows
from .scatter import scatter_back
from .selection import DocumentSelection, Selection, select_by_kernels, select_entries


def lighthouse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    *,
    sdpa: Callable[..., torch.Tensor] | None = None,
    selection: Selection | None = None,
    scale: float | None = None,
    impl: str | None = None,
    context_parallel: ContextParallel = ONE_DEVICE,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over selected entries of a pooling pyramid (arXiv 2605.06554, section 3).

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D]; Hkv divides Hq.
        sdpa: dense attention for the gathered sequence; it is called with q, k, v and the keywords
            ``is_causal``, ``enable_gqa`` and ``scale``, as torch's own, which is the default. With
            a window it must be left out, because the merge needs the logsumexp too.
        selection: entries to attend over, selected from tensors of these shapes with this config;
            by default ``select(q, k, v, config)``.
        scale: factor of the scores before the softmax; by default 1 / sqrt(D).
        impl: "triton" or "torch" for everything but ``sdpa``; by default Triton's kernels on CUDA
            tensors and vectorised PyTorch on others. Under "triton", attention with a window is
            by the kernels that ``window_attention`` takes for bfloat16 and float16 on CUDA, and
            by vectorised PyTorch otherwise.
        context_parallel: the chunks on this rank, when N is only its part of the sequence;
            ``sdpa`` then has to attend over the parts of all ranks. With a window, the layout's
            operations do so.
        documents: int32 or int64 [B, N], for each position the first position of its document, a
            multiple of p^(L-1) (``docs/documents.md``). No document sees another. ``sdpa`` must be
            left out; ``selection`` must be one for these documents. Under context parallelism this
            is the layout of the whole sequence, the same on every rank, and a window is needed.

    Returns:
        [B, Hq, N, D]. Without a window, zero at the first positions, of each document if there are
        some, that no selected entry reaches.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit one another or the config; or
            ``documents`` are no layout, or come with ``sdpa``, or with context parallelism and no
            window, or on CPUs with a selection for other documents; or are left out where
            ``select`` was given them.
        RuntimeError: a transform of ``torch.func`` runs, such as grad.
    """
    check_transforms()
    _check_window(config, sdpa, context_parallel)
    given = q
    (q, k, v), geometry = chunked(q, k, v, config, context_parallel)
    chunks = context_parallel.chunks
    check_for_documents(impl, documents, IMPLEMENTATIONS)
    own = documents
    if documents is not None:
        check_documents(documents, given, config.coarsest_span, context_parallel.world_size)
        _check_far_attention(config, sdpa, chunks)
        if chunks > 1:
            own = documents_of_chunks(documents, context_parallel).own
    check_halo(config.window, geometry.sequence_length * chunks, chunks)
    if selection is not None:
        if isinstance(selection, DocumentSelection) and own is None:
            raise ValueError(
                "selection was made for documents, and documents are left out; they would then see "
                "each other. Give them to this call too, or select without them"
            )
        selection = Selection(*checked_selection(selection, k, geometry))
        if own is not None:
            check_selected(selection.index, own, geometry)
    impl = choose_implementation(impl, q)
    parallel = chunks > 1
    if impl == "triton":
        selection, coarsest = _select_with_kernels(q, k, v, selection, geometry, own)
        if config.window:
            merged = q, k, v, coarsest, selection, geometry, scale
            if not parallel:
                return merged_attention_by_kernels(*merged, documents)
            merged = *merged, context_parallel, documents
            return context_parallel.join(merged_attention_over_ranks_by_kernels(*merged))
        pairs = zip((q, k, v), coarsest, strict=True)
        gathered = [kernels.pool_gather(*pair, selection, geometry) for pair in pairs]
    else:
        if selection is None:
            selection = select_entries(q, k, v, geometry, own)
        gathered = [pool_gather(rows, selection, geometry) for rows in (q, k, v)]
        if config.window:
            merged = q, k, v, gathered, selection, geometry, scale
            if not parallel:
                return merged_attention(*merged, documents)
            merged = *merged, context_parallel, documents
            return context_parallel.join(merged_attention_over_ranks(*merged))
    if documents is not None:
        places = gathered_documents(documents, geometry)
        queries, keys, values = gathered
        out = document_attention(queries, keys, values, places, scale=scale)
        scatter = kernels.scatter_back if impl == "triton" else scatter_back
        return scatter(out, selection, geometry, documents=documents)
    gathered = [context_parallel.join(rows) for rows in gathered]
    attend: Callable[..., torch.Tensor] = sdpa or nn.functional.scaled_dot_product_attention
    # A branch makes a bool of it. The comparison is symbolic in code that was compiled for several
    # numbers of heads, and torch's attention refuses that.
    shared = True if q.shape[1] != k.shape[1] else False
    out = attend(*gathered, is_causal=True, enable_gqa=shared, scale=scale)
    if out.shape[:3] != gathered[0].shape[:3] or out.dtype != q.dtype:
        raise ValueError(
            f"sdpa must return [B, Hq, S, D] for q {tuple(gathered[0].shape)} in {q.dtype}, got "
            f"{tuple(out.shape)} in {out.dtype}"
        )
    out = context_parallel.split(out)
    if impl == "triton":
        out = kernels.scatter_back(out, selection, geometry, context_parallel)
        return context_parallel.join(out)
    seam = None
    if parallel:
        (seam,) = context_parallel.exchange(seam_rows(out, selection.slot, geometry))
    return context_parallel.join(scatter_back(out, selection, geometry, seam))


def _check_window(
    config: LighthouseConfig,
    sdpa: Callable[..., torch.Tensor] | None,
    context_parallel: ContextParallel,
) -> None:
    if config.window and sdpa is not None:
        raise ValueError(
            f"window = {config.window} is merged by logsumexps, which sdpa does not return; leave "
            "sdpa out, or set window = 0"
        )
    if config.window and context_parallel.chunks > 1 and context_parallel.operations is None:
        raise ValueError(
            f"window = {config.window} is merged by logsumexps, which under context parallelism "
            "come from attention over all ranks; give ContextParallel its operations, or set "
            "window = 0"
        )


def _check_far_attention(
    config: LighthouseConfig, sdpa: Callable[..., torch.Tensor] | None, chunks: int
) -> None:
    """Check that there is attention over the selected entries that knows documents."""
    if sdpa is not None:
        raise ValueError(
            "sdpa does not know documents; leave it out, so that document_attention runs"
        )
    if chunks > 1 and not config.window:
        raise ValueError(
            "documents are not supported yet under context parallelism without a window, got "
            f"window = 0 and {chunks} chunks; set window to a few hundred positions, or use one "
            "rank for each sequence"
        )


def _select_with_kernels(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: Selection | None,
    geometry: PyramidGeometry,
    documents: torch.Tensor | None,
) -> tuple[Selection, list[torch.Tensor]]:
    """Select entries unless ``selection`` names them, and pool q, k and v onto the coarsest level.

    The kernel that pools the coarsest level reads every row. If the scorer's scores are the norms
    of these rows, it computes them in the same read.
    """
    with_norms = selection is None and kernels.scores_by_pooling(geometry)
    coarsest_q, a = kernels.pool_coarsest(q, geometry, with_norms)
    coarsest_k, b = kernels.pool_coarsest(k, geometry, with_norms)
    coarsest_v, _ = kernels.pool_coarsest(v, geometry, with_norms=False)
    if selection is None:
        if not with_norms:
            a, b = kernels.score(q, k, v, geometry, documents)
        selection = select_by_kernels(a, b, geometry, documents)
    return selection, [coarsest_q, coarsest_k, coarsest_v]


class LighthouseAttention(InnerAttention):
    """Lighthouse attention around a dense inner attention.

    Args:
        config: settings of the method.
        sdpa, impl: as in ``InnerAttention``; "triton" and "torch" are implementations. With a
            window, ``sdpa`` runs only where this attention is not enabled.
    """

    name = "Lighthouse attention"
    implementations = IMPLEMENTATIONS

    def __init__(
        self, config: LighthouseConfig, sdpa: nn.Module | None = None, impl: str | None = None
    ) -> None:
        super().__init__(sdpa, impl)
        self.config = config

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return lighthouse_attention(
            q,
            k,
            v,
            self.config,
            sdpa=None if self.config.window or documents is not None else self.sdpa,
            scale=scale,
            impl=self.impl,
            context_parallel=self.context_parallel,
            documents=documents,
        )

    def settings(self) -> str:
        return f"{self.config}"
