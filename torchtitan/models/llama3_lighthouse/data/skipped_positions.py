"""Short sequences whose rotary positions lie as far apart as those of a long one.

A sequence is cut into parts at random places, and at each cut the positions skip a random number
ahead. Short sequences thus train every distance of a long one, at their own cost. The method is
positional skip-wise training (Zhu et al., arXiv 2309.10400), which has two parts.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..job_config import JobConfig
from .retrieval_parts import random_of

# The name among a sequence's inputs, which is that of the model's argument.
POSITIONS = "positions"
# On average 60% of the pairs of tokens lie in different parts, so that their distance changes. With
# two parts it is a third.
PARTS = 4


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

        They depend on these two numbers alone. All cuts are equally likely, and so are all numbers
        of positions that were skipped up to a cut, save that both rise from cut to cut.
        """
        random = random_of("skipped positions", self.seed, stream, sequence)
        cuts = min(PARTS, self.seq_len) - 1
        places = np.sort(1 + random.choice(self.seq_len - 1, cuts, replace=False))
        skipped = np.sort(random.integers(self.most - self.seq_len + 1, size=cuts))
        lengths = np.diff(places, prepend=0, append=self.seq_len)
        found = np.arange(self.seq_len) + np.repeat([0, *skipped], lengths)
        return torch.from_numpy(found.astype(np.int32))


def skipped_positions_of(config: JobConfig) -> SkippedPositions | None:
    """The positions of a stage's sequences, or None if they count on from 0 to N - 1."""
    section = config.lighthouse
    if not section.skip_positions:
        return None
    return SkippedPositions(config.training.seq_len, section.skip_positions, section.shuffle_seed)
