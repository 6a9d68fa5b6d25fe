"""Attention in which each query sees an interval of the keys, in joined rows.

Queries lie in the order of what they see: neither the first key that a query sees nor the first one
after its interval lies before that of an earlier query. So the keys that a block of queries sees
lie between the first key of its first query and the last key of its last one. Programs go through
these alone. They compare positions only in tiles at both ends, because all pairs of the others
attend. Causal attention, windows and documents are such intervals, and so is what a hop of a ring
sees within documents. Work follows the intervals.

The queries that see a key are an interval too, and lie in the order of keys. The gradient of the
queries and that of keys and values have a kernel each. Both compute the weights anew from the
logsumexp. No two programs write to one place, so bits repeat. Products are in the dtype of the
rows, and sums in float32.

A sequence may be a chunk of a longer one, and see the last keys of the chunk before. These lie in
tensors of their own, joined too. Queries go through them after their own keys, and the last
programs of the keys have them.

Shapes: B batch, Hq query heads, Hkv key-value heads, N queries and M keys of a sequence, D head
dimension; joined, sequences lie one after the other: R = B N queries and C = B M keys. Before the
keys of each sequence there may be P more.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..memory_layout import joined, split
from .launch import INTERPRETED

LOG2_E = tl.constexpr(math.log2(math.e))
# A tile's places are counted from its first in 32 bits.
MOST_STRIDE = 2**24


class Tiles(NamedTuple):
    """How a kernel is launched.

    Attributes:
        own: rows of a program.
        other: rows of the other side that it takes at once.
        warps, stages: warps of a program, and loads in flight.
    """

    own: int
    other: int
    warps: int
    stages: int


class Launches(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    queries: Tiles
    keys: Tiles


# By the largest head dimension. GPUs whose programs may use 200 KB of shared memory and more are
# Hopper's. Intervals of up to 1,024 keys fall into few tiles, and those at both ends are most of
# the work. Those of 64 and 128 for Hopper were the fastest of six to eight on an H200, and the
# others have not been timed.
LARGE = {
    64: Launches(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3)),
    128: Launches(Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
    256: Launches(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)),
}
SHORT = LARGE | {128: Launches(*[Tiles(64, 32, 4, 3)] * 3)}
SMALL = {
    64: Launches(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    128: Launches(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2)),
    256: Launches(Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
}
FLOAT32 = {
    128: Launches(*[Tiles(32, 16, 4, 1)] * 3),
    256: Launches(*[Tiles(16, 16, 4, 1)] * 3),
}
LARGE_SHARED_MEMORY, MOST_SHORT = 200_000, 1024
# Rows of a program that writes intervals.
WRITTEN = 1024


def launches(q: torch.Tensor, longest: int) -> Launches:
    """How the kernels are launched for queries like ``q`` [B, Hq, N, D].

    Args:
        longest: keys that no query sees more of.
    """
    table = SMALL
    if q.dtype == torch.float32:
        table = FLOAT32
    elif q.is_cuda:
        properties = torch.cuda.get_device_properties(q.device)
        # pyrefly: ignore[missing-attribute]  The stubs of torch leave it out.
        if properties.shared_memory_per_block_optin > LARGE_SHARED_MEMORY:
            table = SHORT if longest <= MOST_SHORT else LARGE
    return next(tiles for largest, tiles in table.items() if q.shape[3] <= largest)


@triton.jit
def _tile(
    rows, start, row_stride, lane, column, end,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows from ``start`` on; zero from ``end`` on, which a ``WHOLE`` tile lies before."""
    # In the interpreter, a loop's number is none of Triton's.
    first = (tl.zeros((), tl.int64) + start) * row_stride
    places = rows + first + lane[:, None] * row_stride + column[None, :]
    if not WHOLE:
        mask = (start + lane < end)[:, None] & (column < D)[None, :]
        tile = tl.load(places, mask=mask, other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(places, mask=(column < D)[None, :], other=0.0)
    else:
        tile = tl.load(places)
    return tile


@triton.jit
def _own_rows(firsts, ends, start, count, OWN: tl.constexpr, OTHER: tl.constexpr):
    """A program's rows from ``start`` on, which of them there are, and what each of them meets.

    Also where three ranges of tiles begin and end that they meet. All pairs of the second attend.
    """
    row = start + tl.arange(0, OWN)
    inside = row < count
    first = tl.load(firsts + row, mask=inside, other=0)
    end = tl.load(ends + row, mask=inside, other=0)
    last = tl.minimum(start + OWN, count) - 1
    low = tl.load(firsts + start) // OTHER * OTHER
    high = tl.load(ends + last)
    whole = tl.cdiv(tl.load(firsts + last), OTHER) * OTHER
    whole_end = tl.load(ends + start) // OTHER * OTHER
    lows = (low, whole, tl.maximum(whole, whole_end))
    return row, inside, first, end, lows, (tl.minimum(whole, high), whole_end, high)


@triton.jit
def _store(rows, tile, row, inside, head, heads, column, D: tl.constexpr):
    """Store a tile to rows [R, H, D], rounded to their dtype."""
    places = rows + (row.to(tl.int64) * heads + head)[:, None] * D + column[None, :]
    shown = inside[:, None] & (column < D)[None, :]
    tl.store(places, tile.to(rows.dtype.element_ty), mask=shown)


@triton.jit
def _own_queries(heads, queries, OWN: tl.constexpr):
    """The head and the first of a program's queries. The last ones, which may see most, begin."""
    program = tl.program_id(0)
    block = tl.cdiv(queries, OWN) - 1 - program // heads
    return (program % heads).to(tl.int64), block * OWN


@triton.jit
def _keys_before(row, firsts, shown, reach, length, queries):
    """The keys before its sequence that a query sees: the first one, and the first after these.

    Joined, neither lies before that of an earlier query.
    """
    row = tl.minimum(row, queries - 1)
    sequence = row // length
    end = (sequence + 1) * reach
    seen = tl.maximum(tl.minimum(tl.load(shown + sequence), reach - row % length), 0)
    return tl.where(tl.load(firsts + row) == sequence * length, end - seen, end), end


@triton.jit
def _queries_after(row, ends, shown, reach, length, end):
    """The queries that see a key before their sequence: the first one, and the first after them.

    Rows from ``end`` on, the first of the next sequence, are taken as its last one.
    """
    row = tl.minimum(row, end - 1)
    sequence, place = row // reach, row % reach
    first = sequence * length
    end = tl.minimum(first + place + 1, tl.load(ends + first))
    return first, tl.where(place >= reach - tl.load(shown + sequence), end, first)


@triton.jit
def _attend_to(
    k, v, k_n, v_n, keys, first, end, low, high, q_tile, scale, largest, weight, total,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OTHER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Attend to a range of tiles. All pairs of ``WHOLE`` ones attend."""
    other_lane, column = tl.arange(0, OTHER), tl.arange(0, BLOCK_D)
    for other in tl.range(low, high, OTHER):
        k_tile = _tile(k, other, k_n, other_lane, column, keys, D, BLOCK_D, WHOLE)
        # Powers are of two, and the scale has the factor for that.
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        if not WHOLE:
            key = (other + other_lane)[None, :]
            seen = (key >= first[:, None]) & (key < end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        # A query that has seen nothing yet has no largest score.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        kept = tl.exp2(largest - base)
        weights = tl.exp2(scores - base[:, None])
        weight = weight * kept + tl.sum(weights, axis=1)
        largest = larger
        v_tile = _tile(v, other, v_n, other_lane, column, keys, D, BLOCK_D, WHOLE)
        total = total * kept[:, None]
        total = tl.dot(weights.to(v_tile.dtype), v_tile, total, input_precision="ieee")
    return largest, weight, total


@triton.jit
def _attend(
    q, k, v, firsts, ends, out, lse,
    q_n, q_h, k_n, k_h, v_n, v_h, heads, group, queries, keys, scale,
    k_before, v_before, before_k_n, before_k_h, before_v_n, before_v_h, shown, reach, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    head, start = _own_queries(heads, queries, OWN)
    lane, column = tl.arange(0, OWN), tl.arange(0, BLOCK_D)
    query, inside, first, end, lows, highs = _own_rows(firsts, ends, start, queries, OWN, OTHER)
    if k_before is not None:
        more = (firsts, shown, reach, length, queries)
        first_before, end_before = _keys_before(query, *more)
        low, high = _keys_before(start, *more)[0], _keys_before(start + OWN - 1, *more)[1]
    q_tile = _tile(q + head * q_h, start, q_n, lane, column, queries, D, BLOCK_D, False)
    largest = tl.full((OWN,), float("-inf"), tl.float32)
    weight = tl.zeros((OWN,), tl.float32)
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    k += head // group * k_h
    v += head // group * v_h
    for part in tl.static_range(3):
        largest, weight, total = _attend_to(
            k, v, k_n, v_n, keys, first, end, lows[part], highs[part], q_tile, scale,
            largest, weight, total, D, BLOCK_D, OTHER, part == 1,
        )  # fmt: skip
    if k_before is not None:
        # Few programs have such tiles, and all others would begin to load some.
        if low < high:
            k_before += head // group * before_k_h
            v_before += head // group * before_v_h
            largest, weight, total = _attend_to(
                k_before, v_before, before_k_n, before_v_n, queries // length * reach,
                first_before, end_before, low, high, q_tile, scale, largest, weight, total,
                D, BLOCK_D, OTHER, False,
            )  # fmt: skip
    # A query that sees nothing has an output of zero, and a logsumexp of minus infinity.
    weight = tl.where(weight > 0.0, weight, 1.0)
    _store(out, total / weight[:, None], query, inside, head, heads, column, D)
    tl.store(lse + head * queries + query, (largest + tl.log2(weight)) / LOG2_E, mask=inside)


@triton.jit
def _gradient_through(
    k, v, k_n, v_n, keys, first, end, low, high, q_tile, grad, base, product, scale, total,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OTHER: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The gradient of queries through a range of tiles. All pairs of ``WHOLE`` ones attend."""
    other_lane, column = tl.arange(0, OTHER), tl.arange(0, BLOCK_D)
    for other in tl.range(low, high, OTHER):
        k_tile = _tile(k, other, k_n, other_lane, column, keys, D, BLOCK_D, WHOLE)
        v_tile = _tile(v, other, v_n, other_lane, column, keys, D, BLOCK_D, WHOLE)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        weights = tl.exp2(scores * (scale * LOG2_E) - base[:, None])
        if not WHOLE:
            key = (other + other_lane)[None, :]
            seen = (key >= first[:, None]) & (key < end[:, None])
            weights = tl.where(seen, weights, 0.0)
        of_weights = tl.dot(grad, tl.trans(v_tile), input_precision="ieee")
        of_scores = weights * (of_weights - product[:, None])
        total = tl.dot(of_scores.to(k_tile.dtype), k_tile, total, input_precision="ieee")
    return total


@triton.jit
def _query_gradients(
    dout, q, k, v, out, lse, firsts, ends, dq, delta,
    dout_n, dout_h, q_n, q_h, k_n, k_h, v_n, v_h, out_n, out_h,
    heads, group, queries, keys, scale,
    k_before, v_before, before_k_n, before_k_h, before_v_n, before_v_h, shown, reach, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    head, start = _own_queries(heads, queries, OWN)
    lane, column = tl.arange(0, OWN), tl.arange(0, BLOCK_D)
    query, inside, first, end, lows, highs = _own_rows(firsts, ends, start, queries, OWN, OTHER)
    base = tl.load(lse + head * queries + query, mask=inside, other=0.0) * LOG2_E
    if k_before is not None:
        more = (firsts, shown, reach, length, queries)
        first_before, end_before = _keys_before(query, *more)
        low, high = _keys_before(start, *more)[0], _keys_before(start + OWN - 1, *more)[1]
    q_tile = _tile(q + head * q_h, start, q_n, lane, column, queries, D, BLOCK_D, False)
    grad = _tile(dout + head * dout_h, start, dout_n, lane, column, queries, D, BLOCK_D, False)
    result = _tile(out + head * out_h, start, out_n, lane, column, queries, D, BLOCK_D, False)
    product = tl.sum(grad.to(tl.float32) * result.to(tl.float32), axis=1)
    tl.store(delta + head * queries + query, product, mask=inside)
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    k += head // group * k_h
    v += head // group * v_h
    for part in tl.static_range(3):
        total = _gradient_through(
            k, v, k_n, v_n, keys, first, end, lows[part], highs[part],
            q_tile, grad, base, product, scale, total, D, BLOCK_D, OTHER, part == 1,
        )  # fmt: skip
    if k_before is not None:
        # Few programs have such tiles, and all others would begin to load some.
        if low < high:
            k_before += head // group * before_k_h
            v_before += head // group * before_v_h
            total = _gradient_through(
                k_before, v_before, before_k_n, before_v_n, queries // length * reach,
                first_before, end_before, low, high, q_tile, grad, base, product, scale, total,
                D, BLOCK_D, OTHER, False,
            )  # fmt: skip
    _store(dq, total * scale, query, inside, head, heads, column, D)


@triton.jit
def _key_gradients(
    dout, q, k, v, lse, delta, firsts, ends, dk, dv,
    dout_n, dout_h, q_n, q_h, k_n, k_h, v_n, v_h, heads, group, queries, keys, scale,
    k_before, v_before, before_k_n, before_k_h, before_v_n, before_v_h, shown, reach, length,
    dk_before, dv_before,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The first keys begin, which most queries may see. Heads are those of keys here."""
    program = tl.program_id(0)
    kv_head, start = (program % heads).to(tl.int64), program // heads * OWN
    lane, other_lane, column = tl.arange(0, OWN), tl.arange(0, OTHER), tl.arange(0, BLOCK_D)
    own = start < keys
    if k_before is not None:
        # A single key is a constant of the program's text, which no branch may change.
        keys += tl.zeros((), tl.int32)
    if k_before is None or own:
        key, inside, first, end, lows, highs = _own_rows(firsts, ends, start, keys, OWN, OTHER)
    else:
        # Programs of two sequences would go through all queries between those that see their keys.
        program = program // heads - tl.cdiv(keys, OWN)
        sequence = program // tl.cdiv(reach, OWN)
        start = sequence * reach + program % tl.cdiv(reach, OWN) * OWN
        keys = (sequence + 1) * reach
        key = start + lane
        inside = key < keys
        more = (ends, shown, reach, length, keys)
        first, end = _queries_after(key, *more)
        # All lie in the first range, and begin at multiples too, which makes loads the wider ones.
        low = _queries_after(start, *more)[0] // OTHER * OTHER
        high = _queries_after(start + OWN - 1, *more)[1]
        lows, highs = (low, low, low), (high, low, low)
    if k_before is not None:
        k, v = tl.where(own, k, k_before), tl.where(own, v, v_before)
        dk, dv = tl.where(own, dk, dk_before), tl.where(own, dv, dv_before)
        k_n, k_h = tl.where(own, k_n, before_k_n), tl.where(own, k_h, before_k_h)
        v_n, v_h = tl.where(own, v_n, before_v_n), tl.where(own, v_h, before_v_h)
    k_tile = _tile(k + kv_head * k_h, start, k_n, lane, column, keys, D, BLOCK_D, False)
    v_tile = _tile(v + kv_head * v_h, start, v_n, lane, column, keys, D, BLOCK_D, False)
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    total_v = tl.zeros((OWN, BLOCK_D), tl.float32)
    for member in tl.range(group):
        head = kv_head * group + member
        own_q, own_dout = q + head * q_h, dout + head * dout_h
        for part in tl.static_range(3):
            for other in tl.range(lows[part], highs[part], OTHER):
                query = other + other_lane
                inside_q = query < queries
                q_tile = _tile(
                    own_q, other, q_n, other_lane, column, queries, D, BLOCK_D, part == 1
                )
                grad = _tile(
                    own_dout, other, dout_n, other_lane, column, queries, D, BLOCK_D, part == 1
                )
                base = tl.load(lse + head * queries + query, mask=inside_q, other=0.0) * LOG2_E
                product = tl.load(delta + head * queries + query, mask=inside_q, other=0.0)
                scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                weights = tl.exp2(scores * (scale * LOG2_E) - base[None, :])
                if part != 1:
                    seen = (query[None, :] >= first[:, None]) & (query[None, :] < end[:, None])
                    weights = tl.where(seen, weights, 0.0)
                total_v = tl.dot(weights.to(grad.dtype), grad, total_v, input_precision="ieee")
                of_weights = tl.dot(v_tile, tl.trans(grad), input_precision="ieee")
                of_scores = weights * (of_weights - product[None, :])
                total = tl.dot(of_scores.to(q_tile.dtype), q_tile, total, input_precision="ieee")
    _store(dk, total * scale, key, inside, kv_head, heads, column, D)
    _store(dv, total_v, key, inside, kv_head, heads, column, D)


@triton.jit
def _write_windows(
    firsts, ends, documents, low, high, own, other, rows, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    place = row % own
    first = tl.minimum(tl.maximum(place + low, 0), other)
    if documents is not None:
        first = tl.maximum(first, tl.load(documents + row, mask=inside, other=0).to(tl.int32))
    end = tl.minimum(tl.maximum(place + high, 0), other)
    begin = row // own * other
    tl.store(firsts + row, begin + first, mask=inside)
    tl.store(ends + row, begin + end, mask=inside)


class Intervals(NamedTuple):
    """For each row, the first row of the other side that it meets, and the first one after these.

    Both ascend: int32 [R] for queries, [C] for keys. A row meets none if ``end`` is not greater.
    """

    first: torch.Tensor
    end: torch.Tensor

    def of_keys(self, keys: int) -> "Intervals":
        """The queries that see each of so many keys, of the keys that each query sees."""
        key = torch.arange(keys, dtype=torch.int32, device=self.first.device)
        # Queries before these end at the key or before it, and queries from the others on begin
        # after it.
        first = torch.searchsorted(self.end, key, right=True, out_int32=True)
        return Intervals(first, torch.searchsorted(self.first, key, right=True, out_int32=True))

    def tensors(self, device: torch.device) -> "Intervals":
        """These, which are written already."""
        return self


class Windows(NamedTuple):
    """Intervals that follow from the place of a row in its sequence.

    The row at place i meets those from i + ``low`` on, up to i + ``high``, of the other side's
    sequence.

    Attributes:
        batch: sequences of each side.
        own, other: rows of a sequence, and of the other side's.
    """

    batch: int
    own: int
    other: int
    low: int
    high: int

    def of_keys(self, keys: int) -> "Windows":
        """As ``Intervals.of_keys``."""
        return Windows(self.batch, self.other, self.own, 1 - self.high, 1 - self.low)

    def tensors(self, device: torch.device, documents: torch.Tensor | None = None) -> Intervals:
        """The same, written by one kernel.

        Args:
            documents: the first row of the other side's sequence that each row may meet, [B, N].
        """
        rows = self.batch * self.own
        first, end = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
        documents = None if documents is None else documents.contiguous()
        _write_windows[(triton.cdiv(rows, WRITTEN),)](
            first, end, documents, self.low, self.high, self.own, self.other, rows,
            BLOCK=WRITTEN, num_warps=4,
        )  # fmt: skip
        return Intervals(first, end)


class Before(NamedTuple):
    """Keys and values before each sequence, which has as many keys of its own as queries.

    A query whose interval begins with its sequence's first key sees the last of those before: query
    t the last P - t, but at most as many as are shown. All other queries see none of them.

    Attributes:
        k, v: [B, Hkv, P, D], with P of at most N.
        shown: how many the queries of each sequence may see, int32 [B].
    """

    k: torch.Tensor
    v: torch.Tensor
    shown: torch.Tensor


def interval_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Intervals | Windows,
    scale: float,
    longest: int,
    before: Before | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the keys that each query sees.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, M, D].
        seen: keys that each query sees, both in joined rows.
        scale: factor of the scores, positive.
        longest: keys that no query sees more of. It matters for speed alone.
        before: keys before each sequence, which queries see besides.

    Returns:
        out [B, Hq, N, D], lying in memory as [B, N, Hq, D], and lse float32 [B, Hq, N]; zero and
        minus infinity for queries that see no key.
    """
    batch, length, dtype, tiles = len(q), q.shape[2], q.dtype, launches(q, longest).forward
    (q, k, v, *rows), strides = _joined(q, k, v, *_rows_before(before))
    (queries, heads, d), (keys, kv_heads, _) = q.shape, k.shape
    out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty(heads, queries, dtype=torch.float32)
    first, end = seen.tensors(q.device)
    _attend[_grid(queries, heads, tiles)](
        q, k, v, first, end, out, lse, *strides[:6], heads, heads // kv_heads, queries, keys,
        scale * LOG2_E.value, *_arguments(before, rows, strides[6:], length),
        **_constants(d, tiles),
    )  # fmt: skip
    return split(out, batch), lse.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()


def interval_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seen: Intervals | Windows,
    scale: float,
    longest: int,
    before: Before | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v, each lying in memory as rows [B, N, H, D] do.

    Args:
        out, lse: of ``interval_forward``, or over more keys than these.

    Returns:
        These three, and then the gradients of the keys and values before each sequence if there are
        some.
    """
    batch, length, dtype, tiles = len(q), q.shape[2], q.dtype, launches(q, longest)
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    delta = torch.empty_like(lse)
    (dout, q, k, v, out, *rows), strides = _joined(dout, q, k, v, out, *_rows_before(before))
    arguments = _arguments(before, rows, strides[10:], length)
    (queries, heads, d), (keys, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads
    dq, dk, dv, *drows = (x.new_empty(x.shape, dtype=dtype) for x in (q, k, v, *rows))
    _query_gradients[_grid(queries, heads, tiles.queries)](
        dout, q, k, v, out, lse, *seen.tensors(q.device), dq, delta, *strides[:10],
        heads, group, queries, keys, scale, *arguments, **_constants(d, tiles.queries),
    )  # fmt: skip
    seen_by = seen.of_keys(keys).tensors(q.device)
    blocks = triton.cdiv(keys, tiles.keys.own)
    if before is not None:
        blocks += batch * triton.cdiv(before.k.shape[2], tiles.keys.own)
    _key_gradients[(blocks * kv_heads,)](
        dout, q, k, v, lse, delta, *seen_by, dk, dv, *strides[:8],
        kv_heads, group, queries, keys, scale, *arguments, *(drows or [None, None]),
        **_constants(d, tiles.keys),
    )  # fmt: skip
    return tuple(split(x, batch) for x in (dq, dk, dv, *drows))


def _rows_before(before: Before | None) -> tuple[torch.Tensor, ...]:
    return () if before is None else (before.k, before.v)


def _arguments(
    before: Before | None, rows: list[torch.Tensor], strides: list[int], length: int
) -> list[torch.Tensor | int | None]:
    """The kernels' arguments about keys before sequences of ``length``, joined as ``rows``."""
    if before is None:
        return [None] * 9
    return [*rows, *strides, before.shown, before.k.shape[2], length]


def _joined(*all_rows: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Rows [B, H, N, D] as the kernels read them, [B N, H, D], and the strides of both first."""
    taken = [
        x if x.stride(2) == 1 and x.stride(0) < MOST_STRIDE else x.contiguous()
        for x in map(joined, all_rows)
    ]
    if INTERPRETED and taken[0].dtype == torch.bfloat16:
        # Triton's interpreter miscomputes bfloat16 products.
        taken = [x.float() for x in taken]
    return taken, [stride for x in taken for stride in x.stride()[:2]]


def _grid(rows: int, heads: int, tiles: Tiles) -> tuple[int]:
    return (triton.cdiv(rows, tiles.own) * heads,)


def _constants(d: int, tiles: Tiles) -> dict[str, int]:
    block_d = max(16, triton.next_power_of_2(d))
    return {
        "D": d, "BLOCK_D": block_d, "OWN": tiles.own, "OTHER": tiles.other,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
