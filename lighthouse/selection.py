"""Which entries attention runs on, and in which order.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, S gathered
length, P pyramid length, T strata, m picks per stratum, C candidates of a stratum, M chunks on this
rank.
"""

from typing import Any, NamedTuple

import torch

from .config import TYPES, LighthouseConfig
from .context_parallel import ONE_DEVICE, ContextParallel
from .document_chunks import documents_of_chunks
from .documents import Shares, check_documents, shares
from .geometry import PyramidGeometry
from .implementation import (
    IMPLEMENTATIONS,
    check_for_documents,
    choose_implementation,
    kernels,
)
from .inputs import chunked
from .scoring import Scores, score


class Selection(NamedTuple):
    """The gathered sequence, as two maps that invert each other.

    Attributes:
        index: int32 [B, Hkv, S], pyramid index of the entry at each place.
        slot: int32 [B, Hkv, P], place of each pyramid entry, or -1 where it is not included.
    """

    index: torch.Tensor
    slot: torch.Tensor


class DocumentSelection(Selection):
    """A selection made for documents. Calls that leave them out refuse it."""


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    *,
    impl: str | None = None,
    context_parallel: ContextParallel = ONE_DEVICE,
    documents: torch.Tensor | None = None,
) -> Selection:
    """Select entries for one attention call (arXiv 2605.06554, section 3.2).

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D]; v serves the "dilated" and "gla" scorers.
        impl: "triton" or "torch"; by default Triton's kernels on CUDA tensors.
        context_parallel: the chunks on this rank, when N is only its part of the sequence.
        documents: int32 or int64 [B, N], for each position the first position of its document, a
            multiple of p^(L-1). Documents share the picks of a stratum by their lengths, and what
            one of them picks depends on no other's tokens. Under context parallelism this is the
            layout of the whole sequence, the same on every rank.

    Returns:
        The selection. Under context parallelism there is one for each chunk on this rank, with
        indices into the chunk's own pyramid: index [B M, Hkv, S] and slot [B M, Hkv, P]. One that
        was made for documents is refused where they are left out.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit one another or the config; or
            ``documents`` are no layout.
    """
    given = q
    (q, k, v), geometry = chunked(q, k, v, config, context_parallel)
    check_for_documents(impl, documents, IMPLEMENTATIONS)
    if documents is not None:
        check_documents(documents, given, config.coarsest_span, context_parallel.world_size)
        if context_parallel.chunks > 1:
            documents = documents_of_chunks(documents, context_parallel).own
    if choose_implementation(impl, q) == "triton":
        a, b = kernels.score(q, k, v, geometry, documents)
        selection = select_by_kernels(a, b, geometry, documents)
    else:
        selection = select_entries(q, k, v, geometry, documents)
    return selection if documents is None else DocumentSelection(*selection)


def select_by_kernels(
    a: torch.Tensor,
    b: torch.Tensor,
    geometry: PyramidGeometry,
    documents: torch.Tensor | None = None,
) -> Selection:
    """Select by Triton's kernels.

    Args:
        a, b: level-1 scores by query [B, Hq, n1] and by key [B, Hkv, n1], float32.
        documents: [B, N], for each position the first position of its document.
    """
    if documents is None:
        return Selection(*kernels.select_from_norms(a, b, geometry))
    return Selection(*kernels.select_by_documents(a, b, documents, geometry))


def select_entries(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: PyramidGeometry,
    documents: torch.Tensor | None = None,
) -> Selection:
    """Select in vectorised PyTorch, from inputs that were checked and cut into chunks.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].
        geometry: the geometry of the N positions.
        documents: [B, N], for each position the first position of its document.
    """
    # Selection has no gradient. Detached inputs keep it out of the autograd graph as well.
    rows = q.detach(), k.detach(), v.detach()
    # Not by dataclasses.astuple, which copies deeply on Python 3.11: torch 2.11 cannot trace that.
    settings = [getattr(geometry.config, name) for name in TYPES]
    return Selection(*_select(*rows, documents, *settings))


# An operation cannot take a LighthouseConfig. It takes the settings one by one, in the order of
# the fields of LighthouseConfig.
_SCHEMA_TYPES = {int: "SymInt", str: "str"}
_SETTINGS = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in TYPES.items())


@torch.library.custom_op(
    "lighthouse::select",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? documents, {_SETTINGS}) -> (Tensor, Tensor)",
)
def _select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor | None,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selection as one operation that a compiler neither fuses nor repeats.

    Fused into other code, scores may round differently in forward and in a recomputation for
    backward; backward would then go through another selection than forward did.
    """
    geometry = PyramidGeometry(LighthouseConfig(*settings), q.shape[2])
    scores = score(q, k, v, geometry, documents)
    index, slot = place(included_entries(scores, geometry, documents), geometry)
    return index, slot


@_select.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor | None,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    geometry = PyramidGeometry(LighthouseConfig(*settings), q.shape[2])
    shape = k.shape[:2]
    return (
        q.new_empty((*shape, geometry.gathered_length), dtype=torch.int32),
        q.new_empty((*shape, geometry.pyramid_length), dtype=torch.int32),
    )


def included_entries(
    scores: Scores, geometry: PyramidGeometry, documents: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Walk down from the coarsest level: pick in each stratum, include the children of the picks.

    Args:
        documents: [B, N], for each position the first position of its document. Each picks its
            share of a stratum among its own entries.

    Returns:
        For each level from the base up, a bool mask [B, Hkv, N / p^l].
    """
    config = geometry.config
    top = config.levels - 1
    included = [torch.ones_like(scores[top][0], dtype=torch.bool)]
    candidates, valid = _coarsest_candidates(geometry, scores[top][0])
    share = None if documents is None else shares(documents, geometry)
    for level in range(top, 0, -1):
        if share is None:
            picks = _pick(*scores[level], candidates, valid, config.picks_per_stratum)
        else:
            parts = _parts(share, candidates, level, geometry)
            picks = _pick_by_parts(
                *scores[level], candidates, valid, parts, config.picks_per_stratum
            )
        children = torch.arange(config.pooling_factor, device=picks.device)
        candidates = (picks.unsqueeze(-1) * config.pooling_factor + children).flatten(-2)
        valid = None
        mask = torch.zeros_like(scores[level - 1][0], dtype=torch.bool)
        # Every index is written at most once, so the order of writes does not matter.
        included.insert(0, mask.scatter(-1, candidates.flatten(-2), True))
    return included


def _coarsest_candidates(
    geometry: PyramidGeometry, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of each stratum, [B, Hkv, T, C], and which of them are not padding, [T, C].

    Strata differ in length by at most one entry; the shorter ones repeat their last.
    """
    n, strata = geometry.lengths[-1], geometry.strata
    # Computed on the device: a copy of geometry.stratum_bounds would synchronise with the host.
    bounds = torch.arange(strata + 1, device=like.device) * n // strata
    start, end = bounds[:-1, None], bounds[1:, None]
    entries = start + torch.arange(-(-n // strata), device=like.device)
    valid = entries < end
    entries = torch.minimum(entries, end - 1)
    return entries.expand(*like.shape[:2], -1, -1), valid


def _pick(
    a: torch.Tensor,
    b: torch.Tensor,
    candidates: torch.Tensor,
    valid: torch.Tensor | None,
    picks_per_stratum: int,
) -> torch.Tensor:
    """The m/2 candidates with the largest a, then of the rest the m/2 with the largest b.

    Args:
        a, b: scores of one level, [B, Hkv, n].
        candidates: ascending entries of that level, [B, Hkv, T, C].
        valid: which candidates are not padding, [T, C]; None if there is no padding.

    Returns:
        [B, Hkv, T, m], ascending.
    """
    half = picks_per_stratum // 2
    chosen = []
    taken = torch.zeros_like(candidates, dtype=torch.bool)
    if valid is not None:
        taken = taken | ~valid
    for scores in (a, b):
        ranked = scores.gather(-1, candidates.flatten(-2)).view_as(candidates)
        ranked = ranked.masked_fill(taken, float("-inf"))
        # A stable sort keeps equal scores in ascending order of entry; top-k promises no order.
        order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :half]
        chosen.append(candidates.gather(-1, order))
        taken = taken.scatter(-1, order, True)
    return torch.cat(chosen, dim=-1).sort(dim=-1).values


class _Parts(NamedTuple):
    """The documents of a stratum, for each of its candidates, each [B, Hkv, T, C].

    Attributes:
        first: the place of the document's first candidate among those of the stratum.
        by_query, by_key: what the document picks by each.
    """

    first: torch.Tensor
    by_query: torch.Tensor
    by_key: torch.Tensor


def _parts(
    share: Shares, candidates: torch.Tensor, level: int, geometry: PyramidGeometry
) -> _Parts:
    config = geometry.config
    top = config.levels - 1
    # The candidates of a finer level are the p children of each pick of the level above.
    first = share.first if level == top else config.pooling_factor * share.before
    coarsest = candidates // config.pooling_factor ** (top - level)

    def of_candidates(values: torch.Tensor) -> torch.Tensor:
        values = values.unsqueeze(1).expand(-1, candidates.shape[1], -1)
        return values.gather(-1, coarsest.flatten(-2)).view_as(candidates)

    by_query = share.by_query
    by_key = share.after - share.before - by_query
    return _Parts(*map(of_candidates, (first, by_query, by_key)))


def _pick_by_parts(
    a: torch.Tensor,
    b: torch.Tensor,
    candidates: torch.Tensor,
    valid: torch.Tensor | None,
    parts: _Parts,
    picks_per_stratum: int,
) -> torch.Tensor:
    """As ``_pick``, with as many picks in each document as its share is.

    A document's picks are those with the largest scores among its own candidates. The scores of
    others change nothing: they order other candidates.
    """
    picked = torch.zeros_like(candidates, dtype=torch.bool)
    padding = torch.zeros_like(picked) if valid is None else (~valid).expand_as(picked)
    for scores, count in ((a, parts.by_query), (b, parts.by_key)):
        ranked = scores.gather(-1, candidates.flatten(-2)).view_as(candidates)
        ranked = ranked.masked_fill(picked | padding, float("-inf"))
        # Stable sorts, first by score and then by document, keep equal scores in ascending order.
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, parts.first.gather(-1, order).sort(dim=-1, stable=True).indices)
        places = torch.arange(candidates.shape[-1], device=candidates.device)
        rank = places - parts.first.gather(-1, order)
        picked = picked | torch.zeros_like(picked).scatter(
            -1, order, rank < count.gather(-1, order)
        )
    # There are m picks in each stratum; the candidates ascend, and so do these.
    found = picked.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    return candidates.gather(-1, found[..., :picks_per_stratum])


def place(included: list[torch.Tensor], geometry: PyramidGeometry) -> Selection:
    """Order the included entries by (end, level): a post-order walk of the pyramid.

    Everything before an entry then ends no later than it does, so plain causal attention on the
    gathered sequence is causal in the base sequence. The place of an entry is the number of
    included entries before it, which is one prefix count per level.

    Args:
        included: for each level from the base up, a bool mask [B, Hkv, N / p^l].
    """
    device = included[0].device
    # counts[l][..., i]: included entries of level l before entry i.
    counts = [
        torch.nn.functional.pad(mask.cumsum(-1, dtype=torch.int32), (1, 0)) for mask in included
    ]
    slots = []
    for level, (span, length) in enumerate(zip(geometry.spans, geometry.lengths, strict=True)):
        entry = torch.arange(length, device=device)
        position = torch.zeros_like(included[level], dtype=torch.int32)
        for other, (other_span, count) in enumerate(zip(geometry.spans, counts, strict=True)):
            if other < level:
                # Finer entries that end with this one come before it.
                before = (entry + 1) * (span // other_span)
            elif other == level:
                before = entry
            else:
                # Coarser entries that end with this one come after it.
                before = ((entry + 1) * span - 1) // other_span
            position += count[..., before]
        slots.append(position.masked_fill(~included[level], -1))
    slot = torch.cat(slots, dim=-1)

    s = geometry.gathered_length
    entries = torch.arange(geometry.pyramid_length, dtype=torch.int32, device=device)
    # Places are distinct. Entries that are not included go to one spare place, cut off below.
    target = torch.where(slot < 0, s, slot).long()
    index = torch.zeros((*slot.shape[:2], s + 1), dtype=torch.int32, device=device)
    index.scatter_(-1, target, entries.expand_as(slot))
    return Selection(index[..., :s].contiguous(), slot)
