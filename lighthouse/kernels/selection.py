"""Select entries stratum by stratum, then place them.

Picking. A candidate's key is (bits of its score, reversed position) in one integer. Keys are
distinct, and a larger key is a larger score or, among equal scores, a lower position. The m/2-th
largest key is found two bits at a time, as the largest threshold that at least m/2 keys reach. A
stratum of more than ``LARGEST_BLOCK`` candidates is read again for every two bits.

Placing. The picks of every level are in ascending order. The place of an included entry is a sum of
ranks in them (see ``lighthouse.selection.place``), found by bisection.

One program owns one stratum of one head: its entries of every level, its picks, and the consecutive
places of its included entries. It picks level after level from the coarsest down, then places.

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
# Entries that a program clears or places at a time.
ENTRIES = tl.constexpr(512)


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
    chunk, parents, first, count,
    P: tl.constexpr, BLOCK: tl.constexpr, COARSEST: tl.constexpr,
):  # fmt: skip
    """Positions of a chunk in the stratum's ascending list, their entries, and which exist."""
    position = chunk * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    valid = position < count
    if COARSEST:
        entry = first + position
    else:
        parent = tl.load(parents + position // P, mask=valid, other=0)
        entry = parent.to(tl.int64) * P + position % P
    return position, entry, valid


@triton.jit
def _keys_by(
    scores, plane, position, entry, valid, level_one,
    ROWS: tl.constexpr, SCORED: tl.constexpr, GROUP: tl.constexpr, POSITION_BITS: tl.constexpr,
):  # fmt: skip
    """Keys of candidates, -1 for those that do not take part."""
    score = _score(scores, plane, entry, valid, level_one, ROWS, SCORED, GROUP)
    bits = score.to(tl.int32, bitcast=True).to(tl.int64) & 0x7FFFFFFF
    reverse = (1 << POSITION_BITS) - 1 - position
    return tl.where(valid, (bits << POSITION_BITS) | reverse, -1)


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
    key = _keys_by(a, plane, position, entry, valid, level_one, ROWS, SCORED, GROUP, POSITION_BITS)
    if BY_KEY:
        left = valid & (key < threshold_a)
        key = _keys_by(b, plane, position, entry, left, level_one, ROWS, SCORED, 1, POSITION_BITS)
    return key


@triton.jit
def _reached(key, threshold, unit):
    """How many keys reach the threshold plus one, two and three units, in one sum."""
    # Three counts fill one integer.
    BITS: tl.constexpr = 21
    found = tl.zeros(key.shape, dtype=tl.int64)
    for number in tl.static_range(3):
        reaches = key >= threshold + (number + 1) * unit
        found += reaches.to(tl.int64) << (number * BITS)
    found = tl.sum(found)
    ONES: tl.constexpr = 2**BITS - 1
    return found & ONES, (found >> BITS) & ONES, found >> (2 * BITS)


@triton.jit
def _threshold(
    threshold_a, parents, first, count, a, b, plane, level_one,
    M: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SCORED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, POSITION_BITS: tl.constexpr,
    COARSEST: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """The m/2-th largest key of the stratum."""
    threshold = tl.zeros((), dtype=tl.int64)
    position, entry, valid = _candidates(0, parents, first, count, P, BLOCK, COARSEST)
    key = _keys(position, entry, valid, threshold_a, a, b, plane, level_one,
                ROWS, SCORED, GROUP, POSITION_BITS, BY_KEY)  # fmt: skip
    STEPS: tl.constexpr = (SCORE_BITS + POSITION_BITS + 1) // 2
    unit = tl.full((), 4**STEPS, tl.int64)
    for _ in tl.range(STEPS):
        unit = unit >> 2
        one, two, three = _reached(key, threshold, unit)
        for chunk in tl.range(1, CHUNKS):
            position, entry, valid = _candidates(chunk, parents, first, count, P, BLOCK, COARSEST)
            more = _keys(position, entry, valid, threshold_a, a, b, plane, level_one,
                         ROWS, SCORED, GROUP, POSITION_BITS, BY_KEY)  # fmt: skip
            one_more, two_more, three_more = _reached(more, threshold, unit)
            one, two, three = one + one_more, two + two_more, three + three_more
        enough = (one >= M // 2).to(tl.int64) + (two >= M // 2) + (three >= M // 2)
        threshold += enough * unit
    return threshold


@triton.jit
def _pick(
    a, b, parents, picks, first, count, plane, level_one,
    M: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SCORED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, POSITION_BITS: tl.constexpr, COARSEST: tl.constexpr,
):  # fmt: skip
    """Write the picks of one level: by query (a), then by key (b) of what is left."""
    none = tl.zeros((), dtype=tl.int64)
    threshold_a = _threshold(
        none, parents, first, count, a, b, plane, level_one,
        M, P, ROWS, SCORED, GROUP, BLOCK, CHUNKS, POSITION_BITS, COARSEST, BY_KEY=False,
    )  # fmt: skip
    threshold_b = _threshold(
        threshold_a, parents, first, count, a, b, plane, level_one,
        M, P, ROWS, SCORED, GROUP, BLOCK, CHUNKS, POSITION_BITS, COARSEST, BY_KEY=True,
    )  # fmt: skip
    before = tl.zeros((), dtype=tl.int32)
    for chunk in tl.range(CHUNKS):
        position, entry, valid = _candidates(chunk, parents, first, count, P, BLOCK, COARSEST)
        by_a = _keys(position, entry, valid, none, a, b, plane, level_one,
                     ROWS, SCORED, GROUP, POSITION_BITS, False)  # fmt: skip
        by_b = _keys(position, entry, valid, threshold_a, a, b, plane, level_one,
                     ROWS, SCORED, GROUP, POSITION_BITS, True)  # fmt: skip
        chosen = ((by_a >= threshold_a) | (by_b >= threshold_b)).to(tl.int32)
        rank = before + tl.cumsum(chosen, 0) - 1
        tl.store(picks + rank, entry.to(tl.int32), mask=chosen != 0)
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
    picks, index, slot, stratum, first, top_count, coarsest,
    step, M: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr, BISECTIONS: tl.constexpr,
):  # fmt: skip
    """Write index and slot of the stratum's included entries.

    Args:
        picks: the stratum's picks of level 1; those of each further level lie ``step`` behind.
        index, slot: those of one head.
        first, top_count: the first of the stratum's coarsest entries, and how many it has.
    """
    offset = tl.zeros((), dtype=tl.int64)
    for level in tl.static_range(LEVELS):
        if level == LEVELS - 1:
            count = top_count
        else:
            count = tl.full((), M * P, tl.int64)
        for chunk in tl.range(tl.cdiv(count, ENTRIES)):
            position, entry, valid = _candidates(
                chunk, picks + level * step, first, count, P, ENTRIES, level == LEVELS - 1
            )
            end = (entry + 1) * P**level
            place = tl.zeros((ENTRIES,), dtype=tl.int64)
            for other in tl.static_range(LEVELS):
                if other == LEVELS - 1:
                    place += (end - 1) // P**other
                else:
                    if other < level:
                        # Finer entries that end with this one come before it.
                        before = end // P**other
                    else:
                        # Coarser entries that end with this one come after it.
                        before = (end - 1) // P**other
                    rank = _rank(picks + other * step, before // P, M, BISECTIONS)
                    place += P * (stratum * M + rank) + before % P
            place = tl.where(valid, place, 0)
            tl.store(index + place, (offset + entry).to(tl.int32), mask=valid)
            tl.store(slot + offset + entry, place.to(tl.int32), mask=valid)
        offset += tl.cast(coarsest, tl.int64) * P ** (LEVELS - 1 - level)


@triton.jit
def _clear(slot, first, count, coarsest, P: tl.constexpr, LEVELS: tl.constexpr):
    """Write -1 as the slot of all entries of the stratum."""
    offset = tl.zeros((), dtype=tl.int64)
    for level in tl.static_range(LEVELS):
        below = P ** (LEVELS - 1 - level)
        for chunk in tl.range(tl.cdiv(count * below, ENTRIES)):
            entry = chunk * ENTRIES + tl.arange(0, ENTRIES).to(tl.int64)
            tl.store(slot + offset + first * below + entry, -1, mask=entry < count * below)
        offset += tl.cast(coarsest, tl.int64) * below


@triton.jit
def _own_stratum(strata, coarsest):
    """The program's head and stratum, the stratum's first coarsest entry, and how many it has."""
    program = tl.program_id(0).to(tl.int64)
    stratum = program % strata
    first = stratum * coarsest // strata
    return program // strata, stratum, first, (stratum + 1) * coarsest // strata - first


@triton.jit
def _select(
    a, b, picks, index, slot,
    strata, coarsest, level_one, gathered, pyramid, programs,
    M: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr, BY_FIRST: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, POSITION_BITS: tl.constexpr,
    BISECTIONS: tl.constexpr,
):  # fmt: skip
    plane, stratum, first, top_count = _own_stratum(strata, coarsest)
    own_slot = slot + plane * pyramid
    _clear(own_slot, first, top_count, coarsest, P, LEVELS)
    own_picks = picks + (plane * strata + stratum) * M
    step = tl.cast(programs, tl.int64) * M
    for level in tl.static_range(LEVELS - 1, 0, -1):
        if level == LEVELS - 1:
            count = top_count
        else:
            count = tl.full((), M * P, tl.int64)
        _pick(
            a, b, own_picks + level * step, own_picks + (level - 1) * step, first, count,
            plane, level_one, M, P, P ** (level - 1), 1 if BY_FIRST else P ** (level - 1), GROUP,
            BLOCK, CHUNKS, POSITION_BITS, level == LEVELS - 1,
        )  # fmt: skip
        # The next step reads what other threads of this program wrote.
        tl.debug_barrier()
    _place(own_picks, index + plane * gathered, own_slot, stratum, first, top_count, coarsest,
           step, M, P, LEVELS, BISECTIONS)  # fmt: skip


def launch_selection(
    a: torch.Tensor, b: torch.Tensor, levels: int, p: int, m: int, strata: int, by_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``_select``.

    Args:
        a: float32 [B, Hq, n1], not negative.
        b: float32 [B, Hkv, n1], not negative.
        levels, p, m, strata: levels, pooling factor, picks per stratum and number of strata.
        by_first: score coarser entries by the first entry of level 1 below them, instead of by the
            largest.

    Returns:
        index int32 [B, Hkv, S] and slot int32 [B, Hkv, pyramid length].
    """
    heads, level_one = b.shape[1:]
    coarsest, pyramid, gathered = _lengths(level_one, levels, p, m, strata)
    picks, index, slot = _room(b, levels, p, m, strata)
    programs = picks.shape[1]
    candidates = max(-(-coarsest // strata), m * p)
    block = min(LARGEST_BLOCK, max(16, triton.next_power_of_2(candidates)))
    chunks = triton.cdiv(candidates, block)
    _select[(programs,)](
        a, b, picks, index, slot, strata, coarsest, level_one, gathered, pyramid, programs,
        M=m, P=p, LEVELS=levels, BY_FIRST=by_first, GROUP=a.shape[1] // heads,
        BLOCK=block, CHUNKS=chunks, POSITION_BITS=(block * chunks - 1).bit_length(),
        BISECTIONS=m.bit_length(), num_warps=8 if block <= 1024 else 16,
    )  # fmt: skip
    return index, slot


def _lengths(level_one: int, levels: int, p: int, m: int, strata: int) -> tuple[int, int, int]:
    """Coarsest entries, entries of the whole pyramid and gathered length, from n1."""
    lengths = level_lengths(level_one * p, p, levels)
    return lengths[-1], sum(lengths), length_of_gathered(lengths[-1], p, levels, m * strata)


def _room(
    b: torch.Tensor, levels: int, p: int, m: int, strata: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the picks of each level and program, and for index and slot.

    Returns:
        int32 [L - 1, B Hkv T, m], where picks[l] are those of level l + 1; [B, Hkv, S]; and
        [B, Hkv, pyramid length].
    """
    batch, heads, level_one = b.shape
    _, pyramid, gathered = _lengths(level_one, levels, p, m, strata)
    return (
        b.new_empty((levels - 1, batch * heads * strata, m), dtype=torch.int32),
        b.new_empty((batch, heads, gathered), dtype=torch.int32),
        b.new_empty((batch, heads, pyramid), dtype=torch.int32),
    )


def _fake_select(
    a: torch.Tensor, b: torch.Tensor, levels: int, p: int, m: int, strata: int, by_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _room(b, levels, p, m, strata)[1:]


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
