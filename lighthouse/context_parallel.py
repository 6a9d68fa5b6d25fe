"""The sequence spread over ranks in chunks (context parallelism), exactly as on one device.

Strata are contiguous and equal. A chunk that holds its share of them therefore selects by itself
what one device would select there. Its gathered sequence is dense, and the gathered sequences of
all chunks, in order, are the gathered sequence of one device. Any causal attention over sharded
sequences, such as ring attention, runs on them.

One thing crosses from chunk to chunk. Entries that end with a chunk reach up to p^l - 1 positions
of the next chunk when outputs are scattered back. Their outputs are the seam rows.

Shapes: B batch, H heads, W ranks, M chunks on this rank, C positions of a chunk, D head dimension,
S gathered length of a chunk, L levels.
"""

from dataclasses import dataclass, replace

import torch
from torch.distributed import _functional_collectives as collectives

from .config import LighthouseConfig


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
            "rank holds under context parallelism; use scorer = 'norm' or one rank"
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


@dataclass(frozen=True)
class ContextParallel:
    """Which chunks of the sequence this rank holds, and how it reaches the other ranks.

    Attributes:
        group: process group of the W ranks that share a sequence; None if W is 1.
        rank: this rank's number in the group.
        world_size: W.
        balanced: whether rank r holds chunks r and 2 W - 1 - r of 2 W, joined, so that causal
            attention costs all ranks the same. Otherwise it holds chunk r of W.
    """

    group: torch.distributed.ProcessGroup | None
    rank: int
    world_size: int
    balanced: bool = True

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

    def exchange(self, rows: torch.Tensor) -> torch.Tensor:
        """Give each chunk the seam rows of the chunk before it, and the first chunk zeros.

        The exchange is differentiable. Every rank of the group has to call it, and its backward.

        Args:
            rows: seam rows of this rank's chunks, [B M, H, L - 1, D].

        Returns:
            Seam rows of the chunks before them, of the same shape.
        """
        assert self.group is not None
        rows = rows.unflatten(0, (-1, len(self.held))).transpose(0, 1)
        sent: list[int] = []
        sent_to = [0] * self.world_size
        source: dict[int, int] = {}
        received_from = [0] * self.world_size
        for other in range(self.world_size):
            for chunk in self.held_by(other):
                if chunk - 1 in self.held:
                    sent.append(self.held.index(chunk - 1))
                    sent_to[other] += 1
            for chunk in self.held:
                if chunk - 1 in self.held_by(other):
                    source[chunk] = len(source)
                    received_from[other] += 1
        outgoing = torch.cat([rows[:0], *(rows[place : place + 1] for place in sent)])
        incoming = collectives.all_to_all_single_autograd(
            outgoing.contiguous(), received_from, sent_to, self.group
        )
        # No chunk comes before the first one. It takes the row of zeros at the end.
        incoming = torch.cat([incoming, torch.zeros_like(rows[:1])])
        seams = [incoming[source.get(chunk, len(source))] for chunk in self.held]
        return torch.stack(seams, dim=1).flatten(0, 1)


ONE_DEVICE = ContextParallel(None, 0, 1)
