"""Which entries attention runs on, and in which order.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, S gathered
length, P pyramid length, T strata, m picks per stratum, C candidates of a stratum.
"""

from dataclasses import astuple
from typing import NamedTuple

import torch

from .config import LighthouseConfig
from .context_parallel import ONE_DEVICE, ContextParallel
from .geometry import PyramidGeometry
from .implementation import choose_implementation, kernels
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
        context_parallel: makes N this rank's part of the sequence.

    Returns:
        The selection; under context parallelism one for each chunk on this rank, with indices
        into its own pyramid, [B M, Hkv, S].

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit together or the geometry.
    """
    (q, k, v), geometry = chunked(q, k, v, config, context_parallel)
    if choose_implementation(impl, q) == "triton":
        return Selection(*kernels.select_from_norms(*kernels.score(q, k, v, geometry), geometry))
    # Selection has no gradient; detached, it has no place in the autograd graph either.
    return Selection(*_select(q.detach(), k.detach(), v.detach(), *astuple(geometry.config)))


@torch.library.custom_op("lighthouse::select", mutates_args=())
def _select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    levels: int,
    pooling_factor: int,
    top_k: int,
    scorer: str,
    picks_per_stratum: int,
    dilation: int,
    entry_score: str,
    combine: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``select`` as one operation that a compiler neither fuses nor repeats.

    Fused into other code, scores may round differently in forward and in a recomputation for
    backward; backward would then go through another selection than forward did.
    """
    config = LighthouseConfig(
        levels, pooling_factor, top_k, scorer, picks_per_stratum, dilation, entry_score, combine
    )
    geometry = PyramidGeometry(config, q.shape[2])
    index, slot = place(included_entries(score(q, k, v, geometry), geometry), geometry)
    return index, slot


@_select.register_fake
def _(q, k, v, *configuration):
    geometry = PyramidGeometry(LighthouseConfig(*configuration), q.shape[2])
    shape = k.shape[:2]
    return (
        q.new_empty((*shape, geometry.gathered_length), dtype=torch.int32),
        q.new_empty((*shape, geometry.pyramid_length), dtype=torch.int32),
    )


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    context_parallel: ContextParallel,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], PyramidGeometry]:
    """q, k and v as the chunks on this rank, and the geometry of one, once they fit together."""
    if not isinstance(config, LighthouseConfig):
        raise TypeError(f"config must be a LighthouseConfig, got {type(config).__name__}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must be [B, heads, N, D], got {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q must be [B, Hq, N, D] and k and v [B, Hkv, N, D] with the same B, N and D, "
            f"got {shapes}"
        )
    if not k.numel():
        raise ValueError(f"k and v must not be empty, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the key-value heads must divide the query heads, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q, k and v must be floating point, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}"
        )
    config = context_parallel.per_chunk(config, q.shape[2])
    q, k, v = (context_parallel.split(rows) for rows in (q, k, v))
    return (q, k, v), PyramidGeometry(config, q.shape[2])


def checked_selection(
    selection: Selection, k: torch.Tensor, geometry: PyramidGeometry
) -> Selection:
    """A selection made elsewhere, once it is known to be of these tensors.

    Raises:
        TypeError, ValueError: its maps are of another shape, dtype or device.
    """
    maps = []
    for name, given, length in zip(
        ("index", "slot"),
        selection,
        (geometry.gathered_length, geometry.pyramid_length),
        strict=True,
    ):
        shape = (*k.shape[:2], length)
        if given.dtype != torch.int32:
            raise TypeError(f"selection.{name} must be int32, got {given.dtype}")
        if tuple(given.shape) != shape or given.device != k.device:
            raise ValueError(
                f"selection.{name} must be of shape {shape} on {k.device}, got "
                f"{tuple(given.shape)} on {given.device}; it belongs to other tensors or to "
                "another config"
            )
        maps.append(given.contiguous())
    return Selection(*maps)


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
        valid: which candidates are not padding, [T, C]; None if all.

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
    # Places are distinct; all that is not included goes to one spare place, cut off below.
    target = torch.where(slot < 0, s, slot).long()
    index = torch.zeros((*slot.shape[:2], s + 1), dtype=torch.int32, device=device)
    index.scatter_(-1, target, entries.expand_as(slot))
    return Selection(index[..., :s].contiguous(), slot)
