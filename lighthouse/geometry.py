"""The pyramid's geometry in exact integers: the one source for everything that indexes it.

Level 0 is the base sequence of N positions. Level l has N / p^l entries; its entry i covers
positions [i p^l, (i + 1) p^l) and ends at the last of them. Level 0 is stored first.

The functions take bare integers, as the kernels' operations do.
"""

import math
from dataclasses import dataclass

from .config import LighthouseConfig


def level_spans(p: int, levels: int) -> tuple[int, ...]:
    """Positions p^l that an entry covers, for each level."""
    return tuple(p**level for level in range(levels))


def level_lengths(sequence_length: int, p: int, levels: int) -> tuple[int, ...]:
    """Entries of each level over ``sequence_length`` positions."""
    return tuple(sequence_length // span for span in level_spans(p, levels))


def length_of_gathered(coarsest: int, p: int, levels: int, top_k: int) -> int:
    """Length S of the gathered sequence: all coarsest entries, and the children of all picks."""
    return coarsest + (levels - 1) * p * top_k


def length_step(config: LighthouseConfig) -> int:
    """Sequence lengths must be multiples of this number."""
    span = config.coarsest_span
    return math.lcm(span, config.dilation) if config.scorer_attends else span


def fitting_length(config: LighthouseConfig, shortest: int) -> int:
    """The smallest sequence length that fits ``config`` and is at least ``shortest``."""
    step = length_step(config)
    return math.ceil(max(shortest, config.top_k * config.coarsest_span) / step) * step


@dataclass(frozen=True)
class PyramidGeometry:
    """Lengths and places of the pyramid over ``sequence_length`` positions.

    Raises:
        ValueError: p^(L-1), or the dilation of a scorer that uses it, does not divide
            ``sequence_length``; or the coarsest level has fewer than k entries.
    """

    config: LighthouseConfig
    sequence_length: int

    def __post_init__(self) -> None:
        config, n = self.config, self.sequence_length
        span = config.coarsest_span
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
        if config.scorer_attends and n % config.dilation:
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
        """Positions p^l that an entry covers, for each level."""
        return level_spans(self.config.pooling_factor, self.config.levels)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each level."""
        return level_lengths(self.sequence_length, self.config.pooling_factor, self.config.levels)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Pyramid index of each level's first entry."""
        lengths = self.lengths
        return tuple(sum(lengths[:level]) for level in range(self.config.levels))

    @property
    def pyramid_length(self) -> int:
        """Entries of all levels together."""
        return sum(self.lengths)

    @property
    def strata(self) -> int:
        """Number T = k / m of strata that the coarsest level is divided into."""
        return self.config.strata

    @property
    def stratum_bounds(self) -> tuple[int, ...]:
        """First coarsest entry of each stratum, and the end of the last: T + 1 numbers."""
        n = self.lengths[-1]
        return tuple(j * n // self.strata for j in range(self.strata + 1))

    @property
    def gathered_length(self) -> int:
        """Length S = n_{L-1} + (L - 1) p k of the gathered sequence, whatever the data."""
        config = self.config
        return length_of_gathered(
            self.lengths[-1], config.pooling_factor, config.levels, config.top_k
        )
