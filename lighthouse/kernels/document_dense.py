"""Dense causal attention within documents by torch's flash attention, in joined rows.

Documents are sequences of varying lengths. Flash attention starts as many programs for every
sequence as the longest one needs, and there is room for hundreds of documents in a batch that may
hold one. So rows are put in another order. Documents longer than a limit come first and get a call
of their own, as there can be only few of them. The others get a call in which no sequence is longer
than the limit.

Shapes: Hq query heads, Hkv key-value heads, D head dimension, M documents at most, N positions of a
sequence, R joined rows.
"""

import math
from typing import NamedTuple

import torch

from ..flash import Lengths, flash_backward_by_lengths, flash_forward_by_lengths

# Flash attention takes so many rows in a program.
ROWS_OF_PROGRAM = 128
# Two calls with copies of all rows pay if one would start so many times as many programs.
LEAST_SAVED = 4


class LongFirst(NamedTuple):
    """Joined rows in two orders: the first one, and that in which long documents come first.

    Attributes:
        place: for each row, its place in the first order, [R].
        row: for each place of the first order, the row that lies there, [R].
        is_long: whether a row belongs to a long document, bool [R].
        long, short: the sequences of the two calls. Each leaves out the rows of the other.
    """

    place: torch.Tensor
    row: torch.Tensor
    is_long: torch.Tensor
    long: Lengths
    short: Lengths

    def order(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [R, ...] of the first order in the other."""
        return rows[self.place]

    def chosen(self, of_long: torch.Tensor, of_short: torch.Tensor) -> torch.Tensor:
        """Results of the two calls, each [R, ...], as one in the first order."""
        is_long = self.is_long.view(-1, *[1] * (of_long.ndim - 1))
        return torch.where(is_long, of_long, of_short)[self.row]


def long_first(bounds: torch.Tensor, rows: int, length: int) -> LongFirst | None:
    """The order of rows for two calls; None if one call starts few enough programs.

    Args:
        bounds: int32 [M + 1], first rows of documents and the end of the last.
        rows: R.
        length: N, rows that no document has more of.
    """
    documents = len(bounds) - 1
    limit = longest_short(documents, rows, length)
    most_long = rows // (limit + 1)
    saved = documents * _programs(length)
    if saved < LEAST_SAVED * (most_long * _programs(length) + documents * _programs(limit)):
        return None
    sizes = bounds.diff()
    is_long = sizes > limit
    order = is_long.int().argsort(descending=True, stable=True)
    ordered = torch.nn.functional.pad(sizes[order].cumsum(0), (1, 0))
    row = torch.arange(rows, device=bounds.device)
    document = torch.searchsorted(ordered, row, right=True) - 1
    place = bounds[order][document] + row - ordered[document]
    of_long = torch.where(is_long, sizes, 0).sum()
    # Short documents are empty sequences of the call for long ones, and the other way round.
    first, second = ordered[: most_long + 1].clamp(max=of_long), ordered.clamp(min=of_long)
    return LongFirst(
        place,
        torch.empty_like(place).scatter_(0, place, row),
        row < of_long,
        Lengths(first.int(), first.int(), length, length),
        Lengths(second.int(), second.int(), limit, limit),
    )


def longest_short(documents: int, rows: int, length: int) -> int:
    """Rows that a short document has at most, so that the two calls start about as many programs.

    R / X documents are longer than X, and need R N / X^2 times the programs that one of X needs.
    The others need M times as many.
    """
    limit = math.isqrt(rows * length // documents)
    return max(1, _programs(limit)) * ROWS_OF_PROGRAM


def _programs(rows: int) -> int:
    return -(-rows // ROWS_OF_PROGRAM)


def dense_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: int,
    scale: float,
    bounds: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over all of a document up to each position.

    Args:
        q: [R, Hq, D].
        k, v: [R, Hkv, D].
        length: N, rows that no document has more of.
        bounds: int32 [M + 1], first rows of documents and the end of the last.

    Returns:
        out [R, Hq, D] and lse float32 [Hq, R].
    """
    order = long_first(bounds, len(q), length)
    if order is None:
        return flash_forward_by_lengths(q, k, v, _all_of(bounds, length), scale)
    q, k, v = (order.order(x) for x in (q, k, v))
    out, lse = flash_forward_by_lengths(q, k, v, order.long, scale)
    short_out, short_lse = flash_forward_by_lengths(q, k, v, order.short, scale)
    # Putting the results in order takes memory too.
    del q, k, v
    return order.chosen(out, short_out), order.chosen(lse.t(), short_lse.t()).t()


def dense_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    length: int,
    scale: float,
    bounds: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of that out with respect to q, k and v; lse is contiguous.

    Their bits repeat in torch's deterministic mode alone, as those of dense attention do.
    """
    order = long_first(bounds, len(q), length)
    if order is None:
        lengths = _all_of(bounds, length)
        return flash_backward_by_lengths(dout, q, k, v, out, lse, lengths, scale)
    dout, q, k, v, out = (order.order(x) for x in (dout, q, k, v, out))
    lse = lse[:, order.place].contiguous()
    grads = flash_backward_by_lengths(dout, q, k, v, out, lse, order.long, scale)
    of_short = flash_backward_by_lengths(dout, q, k, v, out, lse, order.short, scale)
    del dout, q, k, v, out
    return tuple(order.chosen(*pair) for pair in zip(grads, of_short, strict=True))


def _all_of(bounds: torch.Tensor, length: int) -> Lengths:
    return Lengths(bounds, bounds, length, length)
