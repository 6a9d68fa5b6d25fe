"""Short sequences whose rotary positions lie as far apart as those of a long one.

A sequence is cut in two at a random place, and the second part's positions skip a random number of
positions ahead. Short sequences thus train every distance of a long one, at their own cost. The
method is positional skip-wise training (Zhu et al., arXiv 2309.10400), with two parts.
"""

from dataclasses import dataclass

import torch

from ..job_config import JobConfig
from .retrieval_parts import random_of

# The name among a sequence's inputs, which is that of the model's argument.
POSITIONS = "positions"


@dataclass(frozen=True)
class SkippedPositions:
    """Positions of training sequences.

    Attributes:
        seq_len: N, tokens of a sequence.
        most: positions that its tokens are spread over at most, above N.
        seed: draws other positions.
    """

    seq_len: int
    most: int
    seed: int = 0

    def of(self, stream: int, sequence: int) -> torch.Tensor:
        """Rising positions, int32 [N], of a stream's sequence; both are counted from 0.

        They depend on these two numbers alone. All places of the cut are equally likely, and so
        are all numbers of skipped positions, 0 included.
        """
        random = random_of("skipped positions", self.seed, stream, sequence)
        cut = int(random.integers(1, self.seq_len))
        positions = torch.arange(self.seq_len, dtype=torch.int32)
        positions[cut:] += int(random.integers(self.most - self.seq_len + 1))
        return positions


def skipped_positions_of(config: JobConfig) -> SkippedPositions | None:
    """The positions of a stage's sequences, or None if they count on from 0 to N - 1."""
    section = config.lighthouse
    if not section.skip_positions:
        return None
    return SkippedPositions(config.training.seq_len, section.skip_positions, section.shuffle_seed)
