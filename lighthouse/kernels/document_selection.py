"""Select entries stratum by stratum, with each document's share of the picks.

A program does what one in the file for selection does, but picks in another way. A candidate's
rank is the number of candidates of its document that have a larger key. A document that picks n by
query takes those whose rank is below n. It then ranks the others by key, and picks among them in
the same way. Keys and ranks are exact integers, so the order of counting changes nothing.

A document's candidates are neighbours, and no others are compared. A stratum of C candidates of one
document takes C^2 comparisons. Keys lie in memory between the steps.

Shapes: B batch, Hq query heads, Hkv key-value heads, T strata, C candidates, n coarsest entries, n1
entries of level 1, S gathered length.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..documents import shares
from ..geometry import PyramidGeometry
from .launch import define
from .selection import (
    _candidates,
    _clear,
    _fake_select,
    _keys_by,
    _lengths,
    _own_stratum,
    _place,
    _room,
)

# Candidates that a program ranks at once, and those that it compares them with at once.
RANKED, COMPARED = 128, 32
WARPS = 8
# Greater than any number of candidates.
NONE = tl.constexpr(2**30)


@triton.jit
def _part(
    parts, entry, valid, coarsest, batches,
    P: tl.constexpr, ABOVE: tl.constexpr, COARSEST: tl.constexpr,
):  # fmt: skip
    """For each candidate, its document's first candidate, the first one after the document, and how
    many the document picks by query and by key.

    Args:
        parts: those of one sequence, see ``launch_selection_by_documents``.
        ABOVE: entries of this level under one of the coarsest.
    """
    own = parts + entry // ABOVE
    step = tl.cast(batches, tl.int64) * coarsest
    before = tl.load(own + 2 * step, mask=valid, other=0)
    after = tl.load(own + 3 * step, mask=valid, other=0)
    if COARSEST:
        first = tl.load(own, mask=valid, other=0)
        last = tl.load(own + step, mask=valid, other=0)
    else:
        # The candidates of a finer level are the p children of each pick of the level above.
        first = before * P
        last = after * P
    # Picks with an even number are by query.
    by_query = (after + 1) // 2 - (before + 1) // 2
    return first, last, by_query, after - before - by_query


@triton.jit
def _is_picked(
    keys, key, takes_part, first, last, picks, RANKED: tl.constexpr, COMPARED: tl.constexpr
):
    """Whether fewer candidates than ``picks``, of those from first to last - 1, have a larger key.

    Args:
        keys: those of all candidates of the stratum, -1 for those that do not take part.
    """
    # A document without picks ranks nothing.
    ranks = takes_part & (picks > 0)
    first = tl.where(ranks, first, NONE)
    last = tl.where(ranks, last, 0)
    larger = tl.zeros((RANKED, COMPARED), dtype=tl.int32)
    for tile in tl.range(tl.min(first) // COMPARED, tl.cdiv(tl.max(last), COMPARED)):
        other = tile * COMPARED + tl.arange(0, COMPARED)
        compared = (other[None, :] >= first[:, None]) & (other[None, :] < last[:, None])
        theirs = tl.load(keys + other, mask=other < tl.max(last), other=-1)
        larger += (compared & (theirs[None, :] > key[:, None])).to(tl.int32)
    return ranks & (tl.sum(larger, axis=1) < picks)


@triton.jit
def _pick(
    a, b, parts, parents, picks, by_a, by_b, first, count, plane, level_one, coarsest, batches,
    P: tl.constexpr, ROWS: tl.constexpr, SCORED: tl.constexpr, GROUP: tl.constexpr,
    ABOVE: tl.constexpr, RANKED: tl.constexpr, COMPARED: tl.constexpr,
    POSITION_BITS: tl.constexpr, COARSEST: tl.constexpr,
):  # fmt: skip
    """Write the picks of one level: by query (a), then by key (b) of what is left.

    Args:
        by_a, by_b: room for the keys of the stratum's candidates.
    """
    chunks = tl.cdiv(count, RANKED)
    for chunk in tl.range(chunks):
        position, entry, valid = _candidates(chunk, parents, first, count, P, RANKED, COARSEST)
        key = _keys_by(a, plane, position, entry, valid, level_one,
                       ROWS, SCORED, GROUP, POSITION_BITS)  # fmt: skip
        tl.store(by_a + position, key, mask=valid)
    # Each step reads what other threads of this program wrote.
    tl.debug_barrier()
    for chunk in tl.range(chunks):
        position, entry, valid = _candidates(chunk, parents, first, count, P, RANKED, COARSEST)
        begin, end, by_query, _ = _part(parts, entry, valid, coarsest, batches, P, ABOVE, COARSEST)
        key = tl.load(by_a + position, mask=valid, other=-1)
        picked = _is_picked(by_a, key, valid, begin, end, by_query, RANKED, COMPARED)
        key = _keys_by(b, plane, position, entry, valid & (picked == 0), level_one,
                       ROWS, SCORED, 1, POSITION_BITS)  # fmt: skip
        tl.store(by_b + position, key, mask=valid)
    tl.debug_barrier()
    before = tl.zeros((), dtype=tl.int32)
    for chunk in tl.range(chunks):
        position, entry, valid = _candidates(chunk, parents, first, count, P, RANKED, COARSEST)
        begin, end, _, by_key = _part(parts, entry, valid, coarsest, batches, P, ABOVE, COARSEST)
        key = tl.load(by_b + position, mask=valid, other=-1)
        left = valid & (key >= 0)
        picked = _is_picked(by_b, key, left, begin, end, by_key, RANKED, COMPARED)
        chosen = (picked | (valid & (key < 0))).to(tl.int32)
        rank = before + tl.cumsum(chosen, 0) - 1
        tl.store(picks + rank, entry.to(tl.int32), mask=chosen != 0)
        before += tl.sum(chosen)


@triton.jit
def _select_by_documents(
    a, b, parts, picks, keys, index, slot,
    strata, coarsest, level_one, gathered, pyramid, programs, batches, heads, candidates,
    M: tl.constexpr, P: tl.constexpr, LEVELS: tl.constexpr, BY_FIRST: tl.constexpr,
    GROUP: tl.constexpr, RANKED: tl.constexpr, COMPARED: tl.constexpr,
    POSITION_BITS: tl.constexpr, BISECTIONS: tl.constexpr,
):  # fmt: skip
    plane, stratum, first, top_count = _own_stratum(strata, coarsest)
    program = plane * strata + stratum
    own_slot = slot + plane * pyramid
    _clear(own_slot, first, top_count, coarsest, P, LEVELS)
    own_picks = picks + program * M
    own_parts = parts + plane // heads * coarsest
    by_a = keys + program * 2 * candidates
    step = tl.cast(programs, tl.int64) * M
    for level in tl.static_range(LEVELS - 1, 0, -1):
        if level == LEVELS - 1:
            count = top_count
        else:
            count = tl.full((), M * P, tl.int64)
        _pick(
            a, b, own_parts, own_picks + level * step, own_picks + (level - 1) * step,
            by_a, by_a + candidates, first, count, plane, level_one, coarsest, batches,
            P, P ** (level - 1), 1 if BY_FIRST else P ** (level - 1), GROUP,
            P ** (LEVELS - 1 - level), RANKED, COMPARED, POSITION_BITS, level == LEVELS - 1,
        )  # fmt: skip
        tl.debug_barrier()
    _place(own_picks, index + plane * gathered, own_slot, stratum, first, top_count, coarsest,
           step, M, P, LEVELS, BISECTIONS)  # fmt: skip


def launch_selection_by_documents(
    a: torch.Tensor,
    b: torch.Tensor,
    parts: torch.Tensor,
    levels: int,
    p: int,
    m: int,
    strata: int,
    by_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch ``_select_by_documents``; arguments and results are those of ``launch_selection``.

    Args:
        parts: int32 [4, B, n] contiguous: ``first``, ``last``, ``before`` and ``after`` of the
            layout's ``Shares``.
    """
    batch, heads, level_one = b.shape
    coarsest, pyramid, gathered = _lengths(level_one, levels, p, m, strata)
    picks, index, slot = _room(b, levels, p, m, strata)
    programs = picks.shape[1]
    candidates = max(-(-coarsest // strata), m * p)
    keys = b.new_empty((programs, 2, candidates), dtype=torch.int64)
    _select_by_documents[(programs,)](
        a, b, parts, picks, keys, index, slot,
        strata, coarsest, level_one, gathered, pyramid, programs, batch, heads, candidates,
        M=m, P=p, LEVELS=levels, BY_FIRST=by_first, GROUP=a.shape[1] // heads,
        RANKED=RANKED, COMPARED=COMPARED, POSITION_BITS=(candidates - 1).bit_length(),
        BISECTIONS=m.bit_length(), num_warps=WARPS,
    )  # fmt: skip
    return index, slot


def _fake_select_by_documents(
    a: torch.Tensor, b: torch.Tensor, parts: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_select(a, b, *settings)


define(
    "select_by_documents(Tensor a, Tensor b, Tensor parts, int levels, int p, int m, int strata,"
    " bool by_first) -> (Tensor, Tensor)",
    launch_selection_by_documents,
    _fake_select_by_documents,
)


def select_by_documents(
    a: torch.Tensor, b: torch.Tensor, documents: torch.Tensor, geometry: PyramidGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and slot by level-1 scores, with each document's share of the picks.

    Args:
        a: by query, float32 [B, Hq, n1].
        b: by key, float32 [B, Hkv, n1].
        documents: [B, N].

    Returns:
        int32 [B, Hkv, S] and [B, Hkv, pyramid length].
    """
    config, share = geometry.config, shares(documents, geometry)
    parts = torch.stack([share.first, share.last, share.before, share.after]).int()
    return torch.ops.lighthouse.select_by_documents(
        a,
        b,
        parts,
        config.levels,
        config.pooling_factor,
        config.picks_per_stratum,
        geometry.strata,
        config.entry_score == "first",
    )
