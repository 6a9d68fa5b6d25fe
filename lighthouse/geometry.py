"""The pyramid's geometry in exact integers: the one source for everything that indexes it.

Level 0 is the base sequence of N positions; level l has N / p^l entries, of which entry i covers
positions [i p^l, (i + 1) p^l) and ends at the last of them. Stored, level 0 comes first.
"""

import math
from dataclasses import dataclass

from .config import LighthouseConfig


@dataclass(frozen=True)
class PyramidGeometry:
    """Lengths and places of the pyramid over ``sequence_length`` positions.

    Raises:
        ValueError: p^(L-1), or the dilation of a scorer that uses it, does not divide
            ``sequence_length``, or the coarsest level has fewer than k entries.
    """

    config: LighthouseConfig
    sequence_length: int

    def __post_init__(self) -> None:
        config, n = self.config, self.sequence_length
        span = self.spans[-1]
        power = (
            f"pooling_factor^(levels - 1) = {config.pooling_factor}^{config.levels - 1} = {span}"
        )
        smallest = config.top_k * span
        if n < 1 or n % span:
            nearest = max(smallest, (n + span // 2) // span * span)
            raise ValueError(
                f"the sequence length must be a multiple of {power}, got {n}; "
                f"the nearest that fits is {nearest}"
            )
        if config.scorer != "norm" and n % config.dilation:
            raise ValueError(
                f"dilation = {config.dilation} of scorer = {config.scorer!r} must divide the "
                f"sequence length, got {n}; use a dilation that does, such as "
                f"{math.gcd(config.dilation, n)}"
            )
        if self.lengths[-1] < config.top_k:
            raise ValueError(
                f"the coarsest level must hold at least top_k = {config.top_k} entries, got "
                f"{self.lengths[-1]} for sequence length {n} over {power}; lower top_k or levels, "
                f"or use a sequence length of at least {smallest}"
            )

    @property
    def spans(self) -> tuple[int, ...]:
        """Positions p^l that an entry covers, per level."""
        return tuple(self.config.pooling_factor**level for level in range(self.config.levels))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries per level."""
        return tuple(self.sequence_length // span for span in self.spans)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Pyramid index of each level's first entry."""
        return tuple(sum(self.lengths[:level]) for level in range(self.config.levels))

    @property
    def pyramid_length(self) -> int:
        """Entries of all levels together."""
        return sum(self.lengths)

    @property
    def strata(self) -> int:
        """Strata T = k / m that the coarsest level divides into."""
        return self.config.top_k // self.config.picks_per_stratum

    @property
    def stratum_bounds(self) -> tuple[int, ...]:
        """First coarsest entry of each stratum, and the end of the last: T + 1 numbers."""
        n = self.lengths[-1]
        return tuple(j * n // self.strata for j in range(self.strata + 1))

    @property
    def gathered_length(self) -> int:
        """Length S = n_{L-1} + (L - 1) p k of the gathered sequence, whatever the data."""
        config = self.config
        return self.lengths[-1] + (config.levels - 1) * config.pooling_factor * config.top_k
