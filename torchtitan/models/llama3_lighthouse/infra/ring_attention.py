"""Ring attention: keys and values go round the ranks, and each rank's queries attend to them.

``ring_operations`` makes two operations of it, forward and backward.

torch's own ring is not used because of its cost. It keeps outputs and gradients in float32, copies
them at every hop, and sends the gradients of a rank's own keys and values all the way round. Here
those gradients stay at home. On two ranks, sums over hops have two terms; they are kept in the
inputs' precision and rounded once.

Shapes: B batch, H heads, W ranks, S positions on a rank, D head dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroup, _coalescing_manager

from lighthouse.online_softmax import merge_in_place
from lighthouse.row_sums import add_rows

SEQUENCE_DIM = 2

# Attention over the keys and values of one rank; ``is_causal`` is a keyword argument.
Attend = Callable[..., tuple[torch.Tensor, ...]]
# It gives attention more arguments, by a hop's number, queries and keys.
Within = Callable[[int, slice, slice], dict[str, Any]]
# Waits for tensors to arrive and returns them.
Arrival = Callable[[], list[torch.Tensor]]


def nothing_more(hop: int, queries: slice, keys: slice) -> dict[str, Any]:
    """Without documents, attention needs to know no more."""
    return {}


def sum_dtype(dtype: torch.dtype, world_size: int) -> torch.dtype:
    """Precision in which outputs and gradients of ``dtype`` are summed over hops.

    A sum of two terms is rounded once even without more precision; longer sums are in float32.
    """
    return dtype if world_size <= 2 else torch.promote_types(dtype, torch.float32)


class Ring:
    """The ring as one rank sees it: what it holds at each hop, and which parts attend.

    At hop h a rank holds the keys and values of the rank h places before it; at hop 0 they are its
    own. The layout decides how much of the later hops causal attention leaves:

    - Balanced, each rank holds an early and a late chunk of the sequence. The early chunk of an
      earlier rank comes before all queries here, and its late chunk after all of them. Both chunks
      of a later rank come between the early queries here and the late ones.
    - Contiguous, all queries here come after an earlier rank's chunk and before a later rank's.

    Args:
        group: the process group of the W ranks.
        balanced: whether the layout is the balanced one.
    """

    def __init__(self, group: ProcessGroup, balanced: bool) -> None:
        self.group, self.balanced = group, balanced
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def pass_on(self, tensors: Sequence[torch.Tensor]) -> Arrival:
        """Start to send ``tensors`` to the next rank and to receive the previous rank's.

        They travel as [B, S, H, D], because that is how a model's lie in memory already.

        Args:
            tensors: [B, H, S, D] each, of the same shapes and dtypes on all ranks.

        Returns:
            A function that waits for the previous rank's tensors and returns them.
        """
        rows = [tensor.transpose(1, 2).contiguous() for tensor in tensors]
        received = [torch.empty_like(x) for x in rows]
        sends, receives = [0] * self.size, [0] * self.size
        sends[(self.rank + 1) % self.size] = receives[self.rank - 1] = len(rows[0])

        def start() -> list[dist.Work]:
            # pyrefly: ignore[bad-return]  Only a rank outside the group gets None instead of work.
            return [
                dist.all_to_all_single(into, x, receives, sends, group=self.group, async_op=True)
                for into, x in zip(received, rows, strict=True)
            ]

        if rows[0].is_cuda:
            # All tensors go in one kernel. Attention's kernels occupy all multiprocessors, and a
            # transfer that has not started before them waits until they end. Point-to-point sends
            # would not do: torch reuses their memory only once the host has seen them end.
            with _coalescing_manager(self.group, rows[0].device, async_ops=True) as together:
                start()
            works = [together]
        else:
            works = start()

        def wait() -> list[torch.Tensor]:
            for work in works:
                work.wait()
            # Copies made above are read until here. Whether torch would keep them depends on how
            # they are sent.
            rows.clear()
            return [x.transpose(1, 2) for x in received]

        return wait

    def attending(self, hop: int, length: int) -> tuple[slice, slice] | None:
        """Slices of queries and keys that attend at this hop, or None.

        Args:
            length: S, the positions of the queries here and of the keys that are held.
        """
        everything = slice(0, length)
        if hop == 0:
            return everything, everything
        if hop <= self.rank:
            return everything, slice(0, length // 2) if self.balanced else everything
        return (slice(length // 2, length), everything) if self.balanced else None

    def hops(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield each hop's number, keys and values, while the next hop's are on their way.

        Args:
            key, value: this rank's own, [B, H, S, D] each.
        """
        arriving = self.pass_on((key, value))
        yield 0, key, value
        for hop in range(1, self.size):
            keys, values = arriving()
            if hop < self.size - 1:
                arriving = self.pass_on((keys, values))
            yield hop, keys, values


def ring_forward(
    attend: Attend,
    ring: Ring,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    within: Within = nothing_more,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of this rank's queries over the keys and values of all ranks.

    Args:
        attend: returns output [B, H, S, D] and logsumexp [B, H, S] for one rank's keys and values.
        query, key, value: this rank's, [B, H, S, D] each.
        within: what ``attend`` is given besides at a hop.

    Returns:
        Output [B, H, S, D] and logsumexp [B, H, S].
    """
    for hop, keys, values in ring.hops(key, value):
        if (attending := ring.attending(hop, query.shape[SEQUENCE_DIM])) is None:
            continue
        queries_here, keys_here = attending
        found, logsumexp = attend(
            query[:, :, queries_here],
            keys[:, :, keys_here],
            values[:, :, keys_here],
            is_causal=hop == 0,
            **within(hop, queries_here, keys_here),
        )
        if hop == 0:
            out = found.to(sum_dtype(found.dtype, ring.size))
            total = logsumexp
            continue
        out_here, total_here = out[:, :, queries_here], total[:, :, queries_here]
        merge_in_place(out_here, total_here, found, logsumexp)
    return out.to(query.dtype), total


def ring_backward(
    attend: Attend,
    ring: Ring,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    within: Within = nothing_more,
) -> tuple[torch.Tensor, ...]:
    """Gradients of ``ring_forward`` with respect to this rank's query, key and value.

    Keys and values go round as in forward. The gradients of each rank's keys and values follow
    them, one hop behind: every rank that they visit adds its own part, which it computes while they
    are on their way, and the last hop brings them home. A rank computes its part for its own keys
    and values (hop 0) at home. It computes half of the heads at first, while keys and values are on
    their way, and the other half while the last gradients are.

    Args:
        attend: the backward of the ``attend`` that forward was called with.
        grad: gradient of ``out``, [B, H, S, D].
        out, logsumexp: what forward returned.
        within: what ``attend`` is given besides at a hop.
    """
    dtype = sum_dtype(key.dtype, ring.size)
    length, key_heads = key.shape[SEQUENCE_DIM], key.shape[1]

    def gradients(
        keys: torch.Tensor,
        values: torch.Tensor,
        heads: slice,
        queries_here: slice,
        keys_here: slice,
        hop: int,
    ) -> Sequence[torch.Tensor]:
        """Gradients of query, key and value for the part that attends at a hop.

        Args:
            keys, values: what this rank holds at the hop, [B, H, S, D] each.
            heads: heads of keys and values to compute, with the query heads of their groups.
            queries_here, keys_here: from ``Ring.attending``.
        """
        group = query.shape[1] // key_heads
        query_part = slice(None), slice(heads.start * group, heads.stop * group), queries_here
        key_part = slice(None), heads, keys_here
        return attend(
            grad[query_part],
            query[query_part],
            keys[key_part],
            values[key_part],
            out[query_part],
            # Kernels assume that the logsumexp is contiguous.
            logsumexp[query_part].contiguous(),
            is_causal=hop == 0,
            **within(hop, queries_here, keys_here),
        )

    def at_home(heads: slice) -> Sequence[torch.Tensor]:
        """Gradients from this rank's queries attending to its own keys and values."""
        everything = slice(0, length)
        return gradients(key, value, heads, everything, everything, 0)

    middle = (key_heads + 1) // 2
    query_total = arriving = None
    # The sum for queries begins here. Later hops attend from the same position on, or a later one.
    begin = length
    for hop, keys, values in ring.hops(key, value):
        if hop == 0:
            home_parts = [at_home(slice(0, middle))]
            continue
        pair, keys_here = [None, None], slice(0, 0)
        if (attending := ring.attending(hop, length)) is not None:
            queries_here, keys_here = attending
            all_heads = slice(0, key_heads)
            found, *pair = gradients(keys, values, all_heads, queries_here, keys_here, hop)
            if query_total is None:
                query_total, begin = found.to(dtype), queries_here.start
            else:
                query_total[:, :, queries_here.start - begin :].add_(found)
            del found
        # Sums for the keys and values that are held; at hop 1 no rank has begun them.
        held_totals = arriving() if arriving else [None, None]
        held_totals = [
            _add(*both, keys_here, key, dtype) for both in zip(held_totals, pair, strict=True)
        ]
        del pair
        arriving = ring.pass_on(held_totals)
    # Free the last keys and values received, which take gigabytes in a dense layer.
    del keys, values
    if middle < key_heads:
        home_parts.append(at_home(slice(middle, key_heads)))
    if query_total is None:
        query_total = query[:, :, begin:]
    assert arriving is not None, "a ring has two ranks or more"
    away, begins = [query_total, *arriving()], [begin, 0, 0]
    home = [list(parts) for parts in zip(*home_parts, strict=True)]
    # ``home`` and ``away`` hold the only references from here on, so that each sum frees its terms.
    del query_total, held_totals, home_parts, arriving
    return tuple(
        _sum(home.pop(0), away.pop(0), like, first)
        for like, first in zip((query, key, value), begins, strict=True)
    )


def _add(
    total: torch.Tensor | None,
    rows: torch.Tensor | None,
    positions: slice,
    like: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Add ``rows``, if there are any, at ``positions`` of ``total``.

    A ``total`` of None stands for zeros with the shape of ``like`` in ``dtype``.
    """
    if total is not None:
        if rows is not None:
            total[:, :, positions].add_(rows)
        return total
    if rows is None:
        return torch.zeros_like(like, dtype=dtype)
    if rows.shape == like.shape:
        return rows.to(dtype)
    total = torch.empty_like(like, dtype=dtype)
    total[:, :, positions] = rows
    for beside in (slice(0, positions.start), slice(positions.stop, None)):
        total[:, :, beside] = 0
    return total


def _sum(
    parts: list[torch.Tensor], other: torch.Tensor, like: torch.Tensor, first: int
) -> torch.Tensor:
    """Join ``parts`` along the heads and add ``other`` from position ``first`` on, rounding once.

    Returns:
        The sum in shape, dtype and memory layout of ``like``.
    """
    total = torch.empty_like(like)
    sizes = [part.shape[1] for part in parts]
    for into, part, rows in zip(total.split(sizes, 1), parts, other.split(sizes, 1), strict=True):
        add_rows(into, part, rows, first)
    return total
