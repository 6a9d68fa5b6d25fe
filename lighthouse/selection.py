"""Which entries attention runs on, and in which order.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, S gathered
length, P pyramid length, T strata, m picks per stratum, C candidates of a stratum, M chunks on this
rank.
"""

from dataclasses import astuple
from typing import Any, NamedTuple

import torch

from .config import TYPES, LighthouseConfig
from .context_parallel import ONE_DEVICE, ContextParallel
from .geometry import PyramidGeometry
from .implementation import choose_implementation, kernels
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


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    *,
    impl: str | None = None,
    context_parallel: ContextParallel = ONE_DEVICE,
) -> Selection:
    """Select entries for one attention call (arXiv 2605.06554, section 3.2).

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D]; v serves the "dilated" and "gla" scorers.
        impl: "triton" or "torch"; by default Triton's kernels on CUDA tensors.
        context_parallel: the chunks on this rank, when N is only its part of the sequence.

    Returns:
        The selection. Under context parallelism there is one for each chunk on this rank, with
        indices into the chunk's own pyramid: index [B M, Hkv, S] and slot [B M, Hkv, P].

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit one another or the config.
    """
    (q, k, v), geometry = chunked(q, k, v, config, context_parallel)
    if choose_implementation(impl, q) == "triton":
        return Selection(*kernels.select_from_norms(*kernels.score(q, k, v, geometry), geometry))
    return select_entries(q, k, v, geometry)


def select_entries(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: PyramidGeometry
) -> Selection:
    """Select in vectorised PyTorch, from inputs that were checked and cut into chunks.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].
        geometry: the geometry of the N positions.
    """
    # Selection has no gradient. Detached inputs keep it out of the autograd graph as well.
    return Selection(*_select(q.detach(), k.detach(), v.detach(), *astuple(geometry.config)))


# An operation cannot take a LighthouseConfig. It takes the settings one by one, in the order of
# the fields of LighthouseConfig.
_SCHEMA_TYPES = {int: "SymInt", str: "str"}
_SETTINGS = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in TYPES.items())


@torch.library.custom_op(
    "lighthouse::select",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)",
)
def _select(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selection as one operation that a compiler neither fuses nor repeats.

    Fused into other code, scores may round differently in forward and in a recomputation for
    backward; backward would then go through another selection than forward did.
    """
    geometry = PyramidGeometry(LighthouseConfig(*settings), q.shape[2])
    index, slot = place(included_entries(score(q, k, v, geometry), geometry), geometry)
    return index, slot


@_select.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    geometry = PyramidGeometry(LighthouseConfig(*settings), q.shape[2])
    shape = k.shape[:2]
    return (
        q.new_empty((*shape, geometry.gathered_length), dtype=torch.int32),
        q.new_empty((*shape, geometry.pyramid_length), dtype=torch.int32),
    )


def included_entries(scores: Scores, geometry: PyramidGeometry) -> list[torch.Tensor]:
    """Walk down from the coarsest level: pick in each stratum, include the children of the picks.

    Returns:
        For each level from the base up, a bool mask [B, Hkv, N / p^l].
    """
    config = geometry.config
    top = config.levels - 1
    included = [torch.ones_like(scores[top][0], dtype=torch.bool)]
    candidates, valid = _coarsest_candidates(geometry, scores[top][0])
    for level in range(top, 0, -1):
        picks = _pick(*scores[level], candidates, valid, config.picks_per_stratum)
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
