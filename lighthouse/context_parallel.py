"""The sequence spread over ranks in chunks (context parallelism), exactly as on one device.

Strata are contiguous and equal. A chunk that holds its share of them therefore selects by itself
what one device would select there. Its gathered sequence is dense, and the gathered sequences of
all chunks, in order, are the gathered sequence of one device. Any causal attention over sharded
sequences, such as ring attention, runs on them.

Two things cross from chunk to chunk. Entries that end with a chunk reach up to p^l - 1 positions
of the next chunk when outputs are scattered back. Their outputs are the seam rows. A window of
``window`` positions reaches back over window - 1 keys and values of the chunk before. They are the
halo.

Shapes: B batch, H heads, W ranks, M chunks on this rank, C positions of a chunk, D head dimension,
S gathered length of a chunk, L levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, NamedTuple, overload
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from .config import LighthouseConfig
from .documents import within

# An operation takes the name of a process group, not the group. These are the groups by name.
GROUPS: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()


def check_chunks(config: LighthouseConfig, sequence_length: int, chunks: int) -> None:
    """Check that ``chunks`` equal chunks of the sequence select what one device selects.

    Raises:
        ValueError: they would not; the message says which number has to change.
    """
    if chunks == 1:
        return
    if config.scorer_attends:
        raise ValueError(
            f"scorer = {config.scorer!r} attends over the whole sequence to score it, which no "
            "rank holds under context parallelism; use one rank, or scorer = 'norm' unless the "
            "model norms queries and keys"
        )
    span = config.coarsest_span
    if sequence_length % (chunks * span):
        raise ValueError(
            f"the sequence length must be a multiple of {chunks} chunks times "
            f"pooling_factor^(levels - 1) = {span}, that is of {chunks * span}, under context "
            f"parallelism, got {sequence_length}"
        )
    if config.strata % chunks:
        raise ValueError(
            f"the {chunks} chunks of context parallelism must divide the strata, got top_k / "
            f"picks_per_stratum = {config.top_k} / {config.picks_per_stratum} = {config.strata}; "
            f"use a top_k that is a multiple of {chunks * config.picks_per_stratum}, or fewer ranks"
        )


def check_halo(window: int, sequence_length: int, chunks: int) -> None:
    """Check that a window reaches no further back than the chunk before.

    Raises:
        ValueError: a chunk has fewer than ``window`` - 1 positions.
    """
    length = sequence_length // chunks
    if chunks > 1 and window - 1 > length:
        raise ValueError(
            f"window = {window} reaches over more than one of the {chunks} chunks that context "
            f"parallelism cuts {sequence_length} positions into; use a window of at most "
            f"{length + 1}, a longer sequence, or fewer ranks"
        )


@dataclass(frozen=True)
class ContextParallel:
    """Which chunks of the sequence this rank holds, and how it reaches the other ranks.

    Attributes:
        group: process group of the W ranks that share a sequence; None if W is 1.
        rank: this rank's number in the group.
        world_size: W.
        balanced: whether rank r holds chunks r and 2 W - 1 - r of 2 W, joined, so that causal
            attention costs all ranks the same. Otherwise it holds chunk r of W.
        operations: causal attention over the parts of all ranks, without autograd, for
            ``attention_over_ranks``. forward(q, k, v, scale) returns out and the logsumexp of the
            scores. backward(dout, dlse, q, k, v, out, lse, scale) returns dq, dk and dv; dlse may
            be None. With documents both are given the layout besides.
    """

    group: dist.ProcessGroup | None
    rank: int
    world_size: int
    balanced: bool = True
    operations: tuple[Callable[..., Any], Callable[..., Any]] | None = field(
        default=None, compare=False
    )

    def __post_init__(self) -> None:
        if self.group is not None:
            GROUPS[self.group.group_name] = self.group

    @property
    def chunks(self) -> int:
        """Chunks that the whole sequence is cut into."""
        return self.world_size * (2 if self.balanced and self.world_size > 1 else 1)

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Numbers of the chunks on ``rank``, in the order in which they lie there."""
        if self.chunks == self.world_size:
            return (rank,)
        return (rank, self.chunks - 1 - rank)

    @property
    def held(self) -> tuple[int, ...]:
        """Numbers of the chunks on this rank."""
        return self.held_by(self.rank)

    @property
    def first(self) -> int:
        """The place of the sequence's first chunk among those on this rank, or -1."""
        return self.held.index(0) if 0 in self.held else -1

    def take(self, rows: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's chunks, joined, from ``rows`` that hold the whole sequence in ``dim``.

        Raises:
            ValueError: the sequence does not fall into equal chunks.
        """
        if rows.shape[dim] % self.chunks:
            raise ValueError(
                f"the sequence length must be a multiple of the {self.chunks} chunks of context "
                f"parallelism, got {rows.shape[dim]}"
            )
        chunks = rows.chunk(self.chunks, dim)
        return torch.cat([chunks[number] for number in self.held], dim)

    def per_chunk(self, config: LighthouseConfig, local_length: int) -> LighthouseConfig:
        """The configuration of one chunk, for ``local_length`` positions on each rank.

        Raises:
            ValueError: chunks would not select what one device selects.
        """
        if self.chunks == 1:
            return config
        check_chunks(config, local_length * self.world_size, self.chunks)
        return replace(config, top_k=config.top_k // self.chunks)

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, H, M C, D] as [B M, H, C, D].

        Nothing is copied if B is 1 or rows lie [B, N, H, D] in memory.
        """
        held = len(self.held)
        if held == 1:
            return rows
        return rows.unflatten(2, (held, -1)).movedim(2, 1).flatten(0, 1)

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """[B M, H, C, D] as [B, H, M C, D].

        Nothing is copied if rows lie [B, N, H, D] in memory.
        """
        held = len(self.held)
        if held == 1:
            return rows
        return rows.transpose(1, 2).unflatten(0, (-1, held)).flatten(1, 2).transpose(1, 2)

    def exchange(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give each chunk ``parts`` of the chunk before it, and the first chunk zeros.

        All parts go in one collective. Several would have no order among themselves, and compiled
        ranks might start them in different ones. The exchange is differentiable. Every rank of the
        group has to call it, and its backward.

        Args:
            parts: rows of this rank's chunks, [B M, ...] each, of any dtypes.

        Returns:
            Those of the chunks before them, of the same shapes.
        """
        # Where nothing needs a gradient, Dynamo forgets the context of a forward that is given as
        # many arguments as it has parameters. Two more keep the numbers apart.
        return _Exchange.apply(self, None, None, *parts)

    def send(self, *parts: torch.Tensor, step: int = 1) -> Callable[[], list[torch.Tensor]]:
        """Start what ``exchange`` does, without autograd.

        Args:
            step: -1 sends to the chunk before.

        Returns:
            A function that waits for the rows and returns them.
        """
        assert self.group is not None
        place = self.rank, self.world_size, self.balanced, step
        coming = torch.ops.lighthouse.send(parts, self.group.group_name, *place)
        sizes, count = [x.numel() * x.element_size() for x in parts], len(parts[0])

        def receive() -> list[torch.Tensor]:
            rest, rows = torch.ops.lighthouse.receive(coming, sizes, count, *place), []
            for x, size in zip(parts, sizes, strict=True):
                rows.append(rest[:size].view(x.dtype).view(x.shape))
                rest = rest[size + _padding(size) :]
            return rows

        return receive

    def fill_first(self, rows: torch.Tensor, value: float) -> torch.Tensor:
        """``rows`` [B M, ...] with ``value`` for the sequence's first chunk, if it is here."""
        # A rank without that chunk does the same, so that all ranks compile one graph.
        place = torch.arange(rows.shape[0], device=rows.device) % len(self.held)
        return rows.masked_fill((place == self.first).view(-1, *[1] * (rows.ndim - 1)), value)


@overload
def attention_over_ranks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layout: ContextParallel,
    return_lse: Literal[False] = False,
    documents: torch.Tensor | None = None,
) -> torch.Tensor: ...


@overload
def attention_over_ranks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layout: ContextParallel,
    return_lse: Literal[True],
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention_over_ranks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layout: ContextParallel,
    return_lse: bool = False,
    documents: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Dense causal attention over the parts of all ranks, by the operations of ``layout``.

    Every rank of the group has to call it, and its backward.

    Args:
        q: this rank's part, [B, Hq, M C, D].
        k, v: this rank's parts, [B, Hkv, M C, D].
        scale: factor of the scores.
        return_lse: also return the logsumexp of each position's scores.
        documents: int32 or int64 [B, W M C], for each position of the whole sequence the first
            position of its document, before which it sees nothing.

    Returns:
        out [B, Hq, M C, D] in q's dtype; with ``return_lse`` also lse [B, Hq, M C].
    """
    return _OverRanks.apply(q, k, v, scale, layout, return_lse, documents)


class _OverRanks(torch.autograd.Function):
    """One operation forward and one backward, which computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        layout: ContextParallel,
        return_lse: bool,
        documents: torch.Tensor | None,
    ) -> Any:
        assert layout.operations is not None
        out, lse = layout.operations[0](q, k, v, scale, *within(documents))
        ctx.save_for_backward(q, k, v, out, lse, documents)
        ctx.constants = scale, layout
        return (out, lse) if return_lse else out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  Without lse there is no gradient of it.
    def backward(
        ctx: Any, dout: torch.Tensor, dlse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        *rows, documents = ctx.saved_tensors
        scale, layout = ctx.constants
        grads = layout.operations[1](dout, dlse, *rows, scale, *within(documents))
        return *grads, None, None, None, None


class _Exchange(torch.autograd.Function):
    """Rows go to the next chunk, and their gradients back to the chunk that they came from."""

    @staticmethod
    def forward(ctx: Any, layout: ContextParallel, *arguments: Any) -> tuple[torch.Tensor, ...]:
        ctx.layout = layout
        return tuple(layout.send(*arguments[2:])())

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  One gradient for each of the outputs.
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *ctx.layout.send(*grads, step=-1)()


class _Crossing(NamedTuple):
    """Which chunks on this rank are sent and arrive, by their places here.

    Attributes:
        sent, arrived: places, in the order of the ranks that they are sent to or come from.
        sent_to, received_from: how many, by rank.
        order: ``arrived``, and then the places to which nothing comes.
    """

    sent: list[int]
    sent_to: list[int]
    arrived: list[int]
    received_from: list[int]
    order: list[int]


@cache
def _crossing(rank: int, world_size: int, balanced: bool, step: int) -> _Crossing:
    """For each chunk c here, chunk c - ``step`` arrives, if there is such a chunk."""
    layout = ContextParallel(None, rank, world_size, balanced)
    held = layout.held
    found = _Crossing([], [0] * world_size, [], [0] * world_size, [])
    for other in range(world_size):
        for chunk in layout.held_by(other):
            if chunk - step in held:
                found.sent.append(held.index(chunk - step))
                found.sent_to[other] += 1
        for place, chunk in enumerate(held):
            if chunk - step in layout.held_by(other):
                found.arrived.append(place)
                found.received_from[other] += 1
    missing = [place for place in range(len(held)) if place not in found.arrived]
    found.order.extend(found.arrived + missing)
    return found


# By the address of each tensor that ``send`` returned, its storage, because another tensor may lie
# at that address later, and the work that fills it with the rows that the work reads; None in the
# place of both after the work has ended.
_ON_THE_WAY: dict[int, tuple[StorageWeakRef, tuple[Any, torch.Tensor] | None]] = {}


# Every rank sends and receives other rows. As operations these are the same in all their graphs,
# and a compiler does on every rank alike with them.
@torch.library.custom_op(
    "lighthouse::send",
    mutates_args=(),
    schema="(Tensor[] parts, str group_name, int rank, int world_size, bool balanced, int step)"
    " -> Tensor",
)
def _send(
    parts: Sequence[torch.Tensor],
    group_name: str,
    rank: int,
    world_size: int,
    balanced: bool,
    step: int,
) -> torch.Tensor:
    """Start to exchange all parts.

    Returns:
        Bytes [M, all parts of a chunk] for ``receive``, which nobody else may read.
    """
    crossing = _crossing(rank, world_size, balanced, step)
    count = len(crossing.order)
    # A line has all parts of a chunk, as bytes because they may be of several dtypes. It takes
    # hardly longer to send than a kernel to start, so one kernel writes all lines, and one reads
    # them.
    pieces = [_bytes_of(row) for place in crossing.sent for x in parts for row in x[place::count]]
    outgoing = torch.cat(pieces) if pieces else parts[0].new_empty(0, dtype=torch.uint8)
    incoming = outgoing.new_empty(count, _length_of_line(parts, count))
    came = len(crossing.arrived)
    work = dist.all_to_all_single(
        incoming[:came],
        outgoing.view(len(crossing.sent), incoming.shape[1]),
        crossing.received_from,
        crossing.sent_to,
        GROUPS[group_name],
        async_op=True,
    )
    if came < count:
        incoming[came:].zero_()
    for address in [key for key, (storage, _) in _ON_THE_WAY.items() if storage.expired()]:
        del _ON_THE_WAY[address]
    storage = StorageWeakRef(incoming.untyped_storage())
    _ON_THE_WAY[incoming.data_ptr()] = storage, (work, outgoing)
    return incoming


@torch.library.custom_op(
    "lighthouse::receive",
    mutates_args=(),
    schema="(Tensor coming, SymInt[] sizes, SymInt rows, int rank, int world_size, bool balanced,"
    " int step) -> Tensor",
)
def _receive(
    coming: torch.Tensor,
    sizes: Sequence[int],
    rows: int,
    rank: int,
    world_size: int,
    balanced: bool,
    step: int,
) -> torch.Tensor:
    """For each chunk c, the parts of chunk c - ``step``, or zeros where there is no such chunk.

    An operation's results may not be views of one tensor, so callers make those.

    Args:
        coming: what ``send`` returned.
        sizes: bytes of each part. Given the parts, a compiler would compute them in backward again.
        rows: rows B M of each part.

    Returns:
        The bytes of each part, and after it ``_padding``.

    Raises:
        RuntimeError: ``coming`` is a copy of it.
    """
    address = coming.data_ptr()
    storage, on_the_way = _ON_THE_WAY.get(address, (None, None))
    if storage is None or storage.expired():
        raise RuntimeError(
            "lighthouse::receive got a copy of what lighthouse::send returned, which may have been "
            "made before the rows came; pass that tensor itself"
        )
    # Activation checkpointing keeps the bytes and reads them a second time.
    if on_the_way is not None:
        on_the_way[0].wait()
        _ON_THE_WAY[address] = storage, None
    order = _crossing(rank, world_size, balanced, step).order
    lines, count = dict(zip(order, coming, strict=True)), len(order)
    pieces, start = [], 0
    for size in sizes:
        each = size // rows
        for row in range(rows):
            first = start + row // count * each
            pieces.append(lines[row % count][first : first + each])
        pieces.append(coming.new_empty(_padding(size)))
        start += size // count
    return torch.cat(pieces)


def _padding(size: int) -> int:
    """Bytes after so many of a part, so that the next one may be viewed in its dtype, and fast."""
    return -size % 16


def _length_of_line(parts: Sequence[torch.Tensor], count: int) -> int:
    """Bytes that ``parts`` of one of ``count`` chunks have."""
    return sum(x.numel() * x.element_size() for x in parts) // count


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    """All bytes of ``x``, in order; nothing is copied if it is contiguous."""
    return x.reshape(-1).contiguous().view(torch.uint8)


@_send.register_fake
def _(parts: Sequence[torch.Tensor], group_name: str, *place: Any) -> torch.Tensor:
    count = len(ContextParallel(None, *place[:3]).held)
    return parts[0].new_empty((count, _length_of_line(parts, count)), dtype=torch.uint8)


@_receive.register_fake
def _(coming: torch.Tensor, sizes: Sequence[int], *place: Any) -> torch.Tensor:
    return coming.new_empty(sum(size + _padding(size) for size in sizes))


ONE_DEVICE = ContextParallel(None, 0, 1)
