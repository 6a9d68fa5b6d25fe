"""Causal attention within documents, over a window or over all, by torch's flash attention.

Documents become sequences of varying lengths in the joined rows of a batch. Without a window, long
and short ones may get a call each (``document_dense``). Under a window, the joined rows are also
cut into pieces, where these can be several times longer than the window. There are two reasons:

- Flash attention starts as many programs for every sequence as the longest one needs. No sequence
  is longer than a piece.
- So that bits repeat, one of its programs sums the gradient of all queries that a sequence has in
  one head. Long documents would leave most of a GPU idle.

A piece takes its own keys and the W - 1 before it, which are copied. If the piece's first document
does not see all of the latter, those that it does not see become a sequence without queries. The
first positions of chunks under context parallelism are such pieces too, with keys that came from
the chunk before.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, W positions of
the window, M documents at most, R = B N joined rows, C pieces.
"""

from typing import NamedTuple

import torch

from ..flash import (
    LEAST_GAIN,
    SHORTEST_SEGMENT,
    Lengths,
    flash_backward_by_lengths,
    flash_forward_by_lengths,
    repeating_bits,
)
from ..memory_layout import joined, split
from .document_dense import dense_backward, dense_forward

# Each piece makes two sequences more. With ``documents.MOST_DOCUMENTS`` they are as many as a GPU
# takes.
MOST_PIECES = 2**13


class Pieces(NamedTuple):
    """Joined rows, cut into C pieces of ``length`` rows; the last one may be shorter.

    Attributes:
        before: keys that lie before a piece's own, W - 1.
        seen: how many of these the piece's first document sees, [C].
    """

    length: int
    before: int
    seen: torch.Tensor

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        """Keys or values of all pieces, [C (before + length), H, D] of [R, H, D]."""
        first = torch.arange(len(self.seen), device=rows.device) * self.length - self.before
        place = first[:, None] + torch.arange(self.before + self.length, device=rows.device)
        # Outside of the rows no piece sees anything.
        return rows[place.clamp(0, len(rows) - 1).flatten()]

    def gradient(self, grad: torch.Tensor, rows: int) -> torch.Tensor:
        """Gradient of what ``keys`` took, [R, H, D]; each row was taken twice at most."""
        grad = grad.unflatten(0, (len(self.seen), -1))
        total = grad[:, self.before :].contiguous()
        if self.before:
            number = torch.arange(self.before, device=grad.device)
            seen = number >= self.before - self.seen[1:, None]
            shared = torch.where(seen[..., None, None], grad[1:, : self.before], 0)
            total[:-1, -self.before :] += shared
        return total.flatten(0, 1)[:rows]


def pieces_of(bounds: torch.Tensor, rows: int, window: int) -> tuple[Lengths, Pieces] | None:
    """The pieces under a window, and the sequences in them; None if one piece has all rows.

    Args:
        bounds: int32 [M + 1], first rows of documents and the end of the last.
        rows: R.
    """
    before = window - 1
    count = (rows - before) // max(SHORTEST_SEGMENT, LEAST_GAIN * before)
    count = min(count, MOST_PIECES)
    if count < 2:
        return None
    length = -(-rows // count)
    count = -(-rows // length)
    first = torch.arange(count, dtype=torch.int32, device=bounds.device) * length
    document = bounds[torch.searchsorted(bounds, first, right=True) - 1]
    seen = (first - document).clamp(max=before)
    return lengths_in_pieces(bounds, length, before, seen), Pieces(length, before, seen)


def lengths_in_pieces(
    bounds: torch.Tensor, length: int, before: int, seen: torch.Tensor
) -> Lengths:
    """The sequences in pieces of ``length`` rows, each of which has ``before`` keys more.

    Args:
        bounds: int32 [M + 1], first rows of documents and the end of the last. A piece's first
            document may begin with the piece here and yet see keys before it.
        seen: how many of the keys before its own the first document of each piece sees, [C].
    """
    number = torch.arange(len(seen), dtype=torch.int32, device=bounds.device)
    first, key = number * length, number * (before + length)
    # In each piece: the keys that it does not see, those that it sees with its first document, and
    # its further documents. A document that begins with the piece gets an empty sequence more.
    own = (bounds // length).clamp(max=len(seen) - 1)
    of_bounds = bounds + (own + 1) * before - torch.where(bounds == own * length, seen[own], 0)
    queries = torch.cat([first, first, bounds]).sort().values
    keys = torch.cat([key, key + before - seen, of_bounds]).sort().values
    return Lengths(queries.int(), keys.int(), length, before + length)


def forward_within_documents(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    bounds: torch.Tensor,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the window within documents.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D]; with ``seen``, keys and values before the first position come first.
        bounds: int32 [M + 1], the ``cumulative_lengths`` of the layout of the queries.
        seen: how many of the keys before them the first document of each row sees, [B].

    Returns:
        out [B, Hq, N, D], lying in memory as [B, N, Hq, D], and lse float32 [B, Hq, N].
    """
    (batch, _, length, _), before = q.shape, k.shape[2] - q.shape[2]
    q, k, v = map(joined, (q, k, v))
    if seen is not None:
        lengths = lengths_in_pieces(bounds, length, before, seen)
        out, lse = flash_forward_by_lengths(q, k, v, lengths, scale, window)
    elif window >= length:
        out, lse = dense_forward(q, k, v, length, scale, bounds)
    else:
        lengths = Lengths(bounds, bounds, length, length)
        if found := pieces_of(bounds, len(q), window):
            lengths, pieces = found
            k, v = pieces.keys(k), pieces.keys(v)
        out, lse = flash_forward_by_lengths(q, k, v, lengths, scale, window)
    return split(out, batch), lse.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()


def backward_within_documents(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    bounds: torch.Tensor,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of that out, each lying in memory as rows [B, N, H, D] do."""
    (batch, _, length, _), before = q.shape, k.shape[2] - q.shape[2]
    dout, q, k, v, out = map(joined, (dout, q, k, v, out))
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    if seen is not None:
        lengths = lengths_in_pieces(bounds, length, before, seen)
        with repeating_bits():
            grads = flash_backward_by_lengths(dout, q, k, v, out, lse, lengths, scale, window)
        dq, dk, dv = (split(grad, batch) for grad in grads)
        # Flash attention writes no gradient of keys that no query sees.
        place = torch.arange(before + length, device=seen.device)
        unseen = (place < before - seen[:, None])[:, None, :, None]
        return dq, dk.masked_fill_(unseen, 0), dv.masked_fill_(unseen, 0)
    if window >= length:
        grads = dense_backward(dout, q, k, v, out, lse, length, scale, bounds)
    else:
        lengths, pieces, rows = Lengths(bounds, bounds, length, length), None, len(q)
        if found := pieces_of(bounds, rows, window):
            lengths, pieces = found
            k, v = pieces.keys(k), pieces.keys(v)
        with repeating_bits():
            grads = flash_backward_by_lengths(dout, q, k, v, out, lse, lengths, scale, window)
        if pieces is not None:
            grads = grads[0], pieces.gradient(grads[1], rows), pieces.gradient(grads[2], rows)
    dq, dk, dv = (split(grad, batch) for grad in grads)
    return dq, dk, dv
