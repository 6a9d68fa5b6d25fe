"""Select entries stratum by stratum, then place them.

Picking. A candidate's key is (bits of its score, reversed position) in one integer. Keys are
distinct, and a larger key is a larger score or, among equal scores, a lower position. The m/2-th
largest key is found bit by bit, as the largest threshold that at least m/2 keys reach. One program
owns one stratum of one head at one level. It reads a stratum of more than ``LARGEST_BLOCK``
candidates again for every bit.

Placing. The picks of every level are in ascending order. The place of an included entry is a sum of
ranks in them (see ``lighthouse.selection.place``), found by bisection. One program owns the
included entries of one stratum of one head, which fill consecutive places.

Shapes: B batch, Hq query heads, Hkv key-value heads, T strata, m picks per stratum, n1 entries of
level 1, S gathered length.
"""

import torch
import triton
import triton.language as tl

from ..geometry import PyramidGeometry, length_of_gathered, level_lengths
from .launch import define

# Candidates that one program keeps on chip; a stratum of the paper's size has 512.
LARGEST_BLOCK = 8192
SCORE_BITS = tl.constexpr(31)


@triton.jit
def _score(
    scores, plane, entry, valid, level_one,
    ROWS: tl.constexpr, SCORED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Largest level-1 score over a group of heads and over entries of level 1 below ``entry``.

    Only the first ``SCORED`` of the ``ROWS`` entries below it count.
    """
    best = tl.zeros(entry.shape, dtype=tl.float32)
    for head in tl.static_range(GROUP):
        base = scores + (plane * GROUP + head) * level_one
        for row in tl.range(SCORED):
            x = tl.load(base + entry * ROWS + row, mask=valid, other=0.0)
            best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    return best


@triton.jit
def _candidates(
    chunk, parents, program, first, count,
    M: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, COARSEST: tl.constexpr,
):  # fmt: skip
    """Positions of a chunk in the stratum's ascending list, their entries, and which exist."""
    position = chunk * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    valid = position < count
    if COARSEST:
        entry = first + position
    else:
        parent = tl.load(parents + program * M + position // P, mask=valid, other=0)
        entry = parent.to(tl.int64) * P + position % P
    return position, entry, valid


@triton.jit
def _keys(
    position, entry, valid, threshold_a,
    a, b, plane, level_one,
    ROWS: tl.constexpr, SCORED: tl.constexpr, GROUP: tl.constexpr, POSITION_BITS: tl.constexpr,
    BY_KEY: tl.constexpr,
):  # fmt: skip
    """Keys of candidates, -1 for those that do not take part.

    Keys hold scores by query (a). With ``BY_KEY`` they hold scores by key (b), and candidates that
    are picked by query do not take part.
    """
    reverse = (1 << POSITION_BITS) - 1 - position
    score = _score(a, plane, entry, valid, level_one, ROWS, SCORED, GROUP)
    bits = score.to(tl.int32, bitcast=True).to(tl.int64) & 0x7FFFFFFF
    key = tl.where(valid, (bits << POSITION_BITS) | reverse, -1)
    if BY_KEY:
        valid = valid & (key < threshold_a)
        score = _score(b, plane, entry, valid, level_one, ROWS, SCORED, 1)
        bits = score.to(tl.int32, bitcast=True).to(tl.int64) & 0x7FFFFFFF
        key = tl.where(valid, (bits << POSITION_BITS) | reverse, -1)
    return key


@triton.jit
def _threshold(
    threshold_a, parents, program, first, count, a, b, plane, level_one,
    M: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SCORED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, POSITION_BITS: tl.constexpr,
    COARSEST: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """The m/2-th largest key of the stratum."""
    threshold = tl.zeros((), dtype=tl.int64)
    position, entry, valid = _candidates(0, parents, program, first, count, M, P, BLOCK, COARSEST)
    key = _keys(position, entry, valid, threshold_a, a, b, plane, level_one,
                ROWS, SCORED, GROUP, POSITION_BITS, BY_KEY)  # fmt: skip
    for step in tl.range(SCORE_BITS + POSITION_BITS):
        bit = SCORE_BITS + POSITION_BITS - 1 - step
        trial = threshold | (tl.full((), 1, tl.int64) << bit.to(tl.int64))
        reached = tl.sum((key >= trial).to(tl.int32))
        for chunk in tl.range(1, CHUNKS):
            position, entry, valid = _candidates(
                chunk, parents, program, first, count, M, P, BLOCK, COARSEST
            )
            more = _keys(position, entry, valid, threshold_a, a, b, plane, level_one,
                         ROWS, SCORED, GROUP, POSITION_BITS, BY_KEY)  # fmt: skip
            reached += tl.sum((more >= trial).to(tl.int32))
        threshold = tl.where(reached >= M // 2, trial, threshold)
    return threshold


@triton.jit
def _pick(
    a, b, parents, picks,
    strata, coarsest, level_one,
    M: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SCORED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, POSITION_BITS: tl.constexpr, COARSEST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    plane = program // strata
    stratum = program % strata
    first = stratum * coarsest // strata
    if COARSEST:
        count = (stratum + 1) * coarsest // strata - first
    else:
        count = tl.full((), M * P, tl.int64)
    none = tl.zeros((), dtype=tl.int64)
    threshold_a = _threshold(
        none, parents, program, first, count, a, b, plane, level_one,
        M, P, ROWS, SCORED, GROUP, BLOCK, CHUNKS, POSITION_BITS, COARSEST, BY_KEY=False,
    )  # fmt: skip
    threshold_b = _threshold(
        threshold_a, parents, program, first, count, a, b, plane, level_one,
        M, P, ROWS, SCORED, GROUP, BLOCK, CHUNKS, POSITION_BITS, COARSEST, BY_KEY=True,
    )  # fmt: skip
    before = tl.zeros((), dtype=tl.int32)
    for chunk in tl.range(CHUNKS):
        position, entry, valid = _candidates(
            chunk, parents, program, first, count, M, P, BLOCK, COARSEST
        )
        by_a = _keys(position, entry, valid, none, a, b, plane, level_one,
                     ROWS, SCORED, GROUP, POSITION_BITS, False)  # fmt: skip
        by_b = _keys(position, entry, valid, threshold_a, a, b, plane, level_one,
                     ROWS, SCORED, GROUP, POSITION_BITS, True)  # fmt: skip
        chosen = ((by_a >= threshold_a) | (by_b >= threshold_b)).to(tl.int32)
        rank = before + tl.cumsum(chosen, 0) - 1
        tl.store(picks + program * M + rank, entry.to(tl.int32), mask=chosen != 0)
        before += tl.sum(chosen)


@triton.jit
def _rank(picks, bound, M: tl.constexpr, BISECTIONS: tl.constexpr):
    """How many of M ascending picks are below ``bound``."""
    rank = tl.zeros(bound.shape, dtype=tl.int64)
    for step in tl.static_range(BISECTIONS):
        trial = rank + (1 << (BISECTIONS - 1 - step))
        pick = tl.load(picks + trial - 1, mask=trial <= M, other=0x7FFFFFFF)
        rank = tl.where(pick < bound, trial, rank)
    return rank


@triton.jit
def _place(
    picks, index, slot,
    programs, strata, coarsest, gathered, pyramid,
    M: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    BISECTIONS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    plane = program // strata
    stratum = program % strata
    first = stratum * coarsest // strata
    lane = tl.arange(0, BLOCK).to(tl.int64)
    span = tl.full((), 1, tl.int64)
    offset = tl.zeros((), dtype=tl.int64)
    length = coarsest
    for _ in tl.static_range(LEVELS - 1):
        length = length * P
    for level in tl.static_range(LEVELS):
        if level == LEVELS - 1:
            count = (stratum + 1) * coarsest // strata - first
        else:
            count = tl.full((), M * P, tl.int64)
        parents = picks + (level * programs + program) * M
        for chunk in tl.range(tl.cdiv(count, BLOCK)):
            position = chunk * BLOCK + lane
            valid = position < count
            if level == LEVELS - 1:
                entry = first + position
            else:
                parent = tl.load(parents + position // P, mask=valid, other=0)
                entry = parent.to(tl.int64) * P + position % P
            end = (entry + 1) * span
            place = tl.zeros((BLOCK,), dtype=tl.int64)
            other_span = tl.full((), 1, tl.int64)
            for other in tl.static_range(LEVELS):
                if other == LEVELS - 1:
                    place += (end - 1) // other_span
                else:
                    row = picks + (other * programs + program) * M
                    if other < level:
                        # Finer entries that end with this one come before it.
                        before = end // other_span
                    else:
                        # Coarser entries that end with this one come after it.
                        before = (end - 1) // other_span
                    ranked = stratum * M + _rank(row, before // P, M, BISECTIONS)
                    place += P * ranked + before % P
                other_span = other_span * P
            place = tl.where(valid, place, 0)
            tl.store(index + plane * gathered + place, (offset + entry).to(tl.int32), mask=valid)
            tl.store(slot + plane * pyramid + offset + entry, place.to(tl.int32), mask=valid)
        span = span * P
        offset += length
        length = length // P


def launch_selection(
    a: torch.Tensor, b: torch.Tensor, levels: int, p: int, m: int, strata: int, by_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``_pick`` for every pooled level, then ``_place``.

    Args:
        a: float32 [B, Hq, n1], not negative.
        b: float32 [B, Hkv, n1], not negative.
        levels, p, m, strata: levels, pooling factor, picks per stratum and number of strata.
        by_first: score coarser entries by the first entry of level 1 below them, instead of by the
            largest.

    Returns:
        index int32 [B, Hkv, S] and slot int32 [B, Hkv, pyramid length].
    """
    batch, heads, level_one = b.shape
    coarsest, pyramid, gathered = _lengths(level_one, levels, p, m, strata)
    programs = batch * heads * strata
    # picks[l] holds the picks of level l + 1.
    picks = b.new_empty((levels - 1, programs, m), dtype=torch.int32)
    for level in range(levels - 1, 0, -1):
        at_top = level == levels - 1
        candidates = -(-coarsest // strata) if at_top else m * p
        block = min(LARGEST_BLOCK, max(16, triton.next_power_of_2(candidates)))
        chunks = triton.cdiv(candidates, block)
        parents = picks if at_top else picks[level]
        rows = p ** (level - 1)
        _pick[(programs,)](
            a, b, parents, picks[level - 1], strata, coarsest, level_one,
            M=m, P=p, ROWS=rows, SCORED=1 if by_first else rows, GROUP=a.shape[1] // heads,
            BLOCK=block, CHUNKS=chunks, POSITION_BITS=(block * chunks - 1).bit_length(),
            COARSEST=at_top, num_warps=8 if block <= 1024 else 16,
        )  # fmt: skip
    index = b.new_empty((batch, heads, gathered), dtype=torch.int32)
    slot = b.new_full((batch, heads, pyramid), -1, dtype=torch.int32)
    _place[(programs,)](
        picks, index, slot, programs, strata, coarsest, gathered, pyramid,
        M=m, P=p, LEVELS=levels, BLOCK=256, BISECTIONS=m.bit_length(), num_warps=8,
    )  # fmt: skip
    return index, slot


def _lengths(level_one: int, levels: int, p: int, m: int, strata: int) -> tuple[int, int, int]:
    """Coarsest entries, entries of the whole pyramid and gathered length, from n1."""
    lengths = level_lengths(level_one * p, p, levels)
    return lengths[-1], sum(lengths), length_of_gathered(lengths[-1], p, levels, m * strata)


def _fake_select(
    a: torch.Tensor, b: torch.Tensor, levels: int, p: int, m: int, strata: int, by_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _, pyramid, gathered = _lengths(b.shape[2], levels, p, m, strata)
    return (
        b.new_empty((*b.shape[:2], gathered), dtype=torch.int32),
        b.new_empty((*b.shape[:2], pyramid), dtype=torch.int32),
    )


define(
    "select_from_norms(Tensor a, Tensor b, int levels, int p, int m, int strata, bool by_first)"
    " -> (Tensor, Tensor)",
    launch_selection,
    _fake_select,
)


def select_from_norms(
    a: torch.Tensor, b: torch.Tensor, geometry: PyramidGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and slot by level-1 scores.

    Args:
        a: by query, float32 [B, Hq, n1].
        b: by key, float32 [B, Hkv, n1].

    Returns:
        int32 [B, Hkv, S] and [B, Hkv, pyramid length].
    """
    config = geometry.config
    return torch.ops.lighthouse.select_from_norms(
        a,
        b,
        config.levels,
        config.pooling_factor,
        config.picks_per_stratum,
        geometry.strata,
        config.entry_score == "first",
    )
