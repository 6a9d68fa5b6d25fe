"""The ring's attention if documents do not see each other: which keys a hop's queries see.

A rank's own rows, joined, are a sequence with a layout of documents of its own. Of the rows that
arrive at a later hop, only those before the queries here are ever attended to. One document at most
goes on from before such keys' end to the queries. So the first few queries see the last few keys,
and nothing else is seen.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions of the sequence, S positions on a
rank, R queries and C keys of a hop, D head dimension.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lighthouse.context_parallel import ContextParallel
from lighthouse.cpu_flash import cpu_backward, cpu_forward
from lighthouse.implementation import kernels
from lighthouse.precision import accumulation_dtype

from .ring_attention import Ring


class Seen(NamedTuple):
    """What is seen at a hop after the first: the first queries see the last keys.

    Attributes:
        queries: how many queries see keys, int64 [B].
        hidden: how many of the keys, the first ones, they do not see, int64 [B]. All of them where
            no query sees any.
    """

    queries: torch.Tensor
    hidden: torch.Tensor


class RingDocuments:
    """Documents as the ring of one rank sees them.

    Args:
        documents: [B, N], for each position of the whole sequence the first position of its
            document.
    """

    def __init__(self, documents: torch.Tensor, ring: Ring) -> None:
        self.ring = ring
        self.places = torch.arange(documents.shape[1], device=documents.device)
        self.own = self._on(ring.rank, self.places)
        self.documents = self._on(ring.rank, documents).long()

    def _on(self, rank: int, rows: torch.Tensor) -> torch.Tensor:
        """The part of ``rows`` [..., N] that a rank holds, [..., S]."""
        layout = ContextParallel(None, rank, self.ring.size, self.ring.balanced)
        return layout.take(rows, dim=-1)

    def at_home(self) -> torch.Tensor:
        """The layout of this rank's own rows, joined, int64 [B, S].

        All positions between two of a document are of that document. So its rows here are
        neighbours.
        """
        return torch.searchsorted(self.own, self.documents)

    def within(self, hop: int, queries_here: slice, keys_here: slice) -> dict[str, Any]:
        """What attention is given besides at a hop."""
        return {"seen": self.seen(hop, queries_here, keys_here)} if hop else {}

    def seen(self, hop: int, queries_here: slice, keys_here: slice) -> Seen:
        """What is seen at a hop after the first.

        Args:
            queries_here, keys_here: from ``Ring.attending``.
        """
        keys = self._on((self.ring.rank - hop) % self.ring.size, self.places)[keys_here]
        begins = self.documents[:, queries_here]
        queries = (begins <= keys[-1]).sum(dim=1)
        # Where a query sees keys, the first one does.
        hidden = torch.searchsorted(keys, begins[:, 0].contiguous())
        return Seen(queries, torch.where(queries > 0, hidden, len(keys)))


def forward_to_seen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: Seen
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend at a hop after the first.

    Args:
        q: [B, Hq, R, D].
        k, v: [B, Hkv, C, D].

    Returns:
        out [B, Hq, R, D] and lse [B, Hq, R], zero and minus infinity for queries that see no key.
    """
    if q.is_cuda:
        intervals = intervals_of(seen, q.shape[2], k.shape[2])
        return kernels.interval_forward(q, k, v, intervals, scale, k.shape[2])
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:3], -math.inf, dtype=accumulation_dtype(q.dtype))
    for row, queries, keys in _parts(seen):
        found = cpu_forward(q[row, :, queries], k[row, :, keys], v[row, :, keys], scale, False)
        out[row, :, queries], lse[row, :, queries] = found
    return out, lse


def backward_to_seen(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    seen: Seen,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v through what ``forward_to_seen`` attends to.

    Args:
        out, lse: those over all keys of the ring.
    """
    if q.is_cuda:
        intervals = intervals_of(seen, q.shape[2], k.shape[2])
        rows = dout, q, k, v, out, lse
        return kernels.interval_backward(*rows, intervals, scale, k.shape[2])
    grads = tuple(torch.zeros_like(x) for x in (q, k, v))
    for row, queries, keys in _parts(seen):
        places = (queries, queries, keys, keys, queries, queries)
        rows = (x[row, :, here] for x, here in zip((dout, q, k, v, out, lse), places, strict=True))
        dout_here, q_here, k_here, v_here, out_here, lse_here = rows
        found = cpu_backward(
            dout_here, q_here, k_here, v_here, out_here, lse_here.contiguous(), scale, False
        )
        for grad, here, part in zip(grads, (queries, keys, keys), found, strict=True):
            grad[row, :, here] = part
    dq, dk, dv = grads
    return dq, dk, dv


def _parts(seen: Seen) -> Iterator[tuple[slice, slice, slice]]:
    """Row of the batch, queries and keys of what is seen. The host reads the numbers."""
    for row, (queries, hidden) in enumerate(zip(*(x.tolist() for x in seen), strict=True)):
        if queries:
            yield slice(row, row + 1), slice(0, queries), slice(hidden, None)


def intervals_of(seen: Seen, queries: int, keys: int) -> Any:
    """The keys that each query sees, in joined rows. Later queries see none."""
    row = torch.arange(len(seen.queries), device=seen.queries.device)[:, None]
    sees = torch.arange(queries, device=row.device) < seen.queries[:, None]
    first = row * keys + torch.where(sees, seen.hidden[:, None], keys)
    end = ((row + 1) * keys).expand(first.shape)
    return kernels.Intervals(first.flatten().int(), end.flatten().int())
