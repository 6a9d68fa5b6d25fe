"""Passages that return within training text, near and far."""

import numpy as np

from ..errors import UserValueError
from .retrieval_parts import evenly_taken, random_of

SHORTEST_SEQUENCE = 256
# Tokens of a passage. Short sequences have shorter ones: from 1/32 to 1/8 of the sequence.
SHORTEST_PASSAGE, LONGEST_PASSAGE = 64, 512
# Streams begin at places that lie apart for any number of them: multiples of the golden ratio.
PHASE = (5**0.5 - 1) / 2


class RepeatMix:
    """Sequences of text in which passages return, word for word.

    In a sequence that is taken, passages are copied over later text, a share of its tokens in
    all. All doublings of the distance from a passage to its return are equally likely, from the
    passage's own length to the most that fits. The text that a return covers is not read; what
    follows the sequence is as it was.

    A sequence depends on the numbers of its stream and of itself alone.

    Args:
        rate: share of the sequences of text.
        length: tokens of a sequence, labels included.
        seed: draws other passages.
        share: share of the tokens of a sequence that return, at most a half.

    Raises:
        ValueError: the sequence or the share is too small.
    """

    def __init__(self, rate: float, length: int, seed: int = 0, share: float = 0.125) -> None:
        if length - 1 < SHORTEST_SEQUENCE:
            raise UserValueError(
                f"lighthouse.repeat_mix = {rate} needs training.seq_len of at least "
                f"{SHORTEST_SEQUENCE}, got {length - 1}; raise it, or set repeat_mix to 0"
            )
        self._rate, self._length, self._seed = rate, length, seed
        self._longest = min(LONGEST_PASSAGE, length // 8)
        self._shortest = min(SHORTEST_PASSAGE, length // 32)
        self._returned = int(length * share)
        if self._returned < self._shortest:
            raise UserValueError(
                f"lighthouse.repeat_share = {share:g} is {self._returned} of {length} tokens, and "
                f"a passage that returns has at least {self._shortest}; raise it"
            )

    def takes(self, stream: int, number: int) -> bool:
        """Whether passages return in text sequence ``number`` of a stream, both from 0 on.

        The share is exact to within one sequence among the first n sequences of a stream.
        """
        before, after = (
            evenly_taken(self._rate, count, stream * PHASE % 1) for count in (number, number + 1)
        )
        return after > before

    def returns(self, stream: int, number: int) -> list[tuple[int, int, int]]:
        """Where passages return in a sequence: (from, to, tokens), in order of their return."""
        random = random_of("repeats", self._seed, stream, number)
        tokens: list[int] = []
        left = self._returned
        while left:
            # The rest must not be too short for a passage, so that the share is exact.
            most = min(self._longest, left - self._shortest)
            passage = int(random.integers(self._shortest, most + 1)) if most > self._shortest else 0
            tokens.append(passage or left)
            left -= tokens[-1]
        # Every return has room for its passage before it.
        first = max(tokens)
        free = self._length - sum(tokens) - first
        before = np.sort(random.integers(free + 1, size=len(tokens))).tolist()
        found, end = [], first
        for gap, skipped, count in zip(before, [0, *before], tokens, strict=False):
            start = end + gap - skipped
            distance = self._distance(random, count, start)
            found.append((start - distance, start, count))
            end = start + count
        return found

    @staticmethod
    def _distance(random: np.random.Generator, shortest: int, longest: int) -> int:
        """A distance whose doublings are equally likely, by integers alone."""
        doublings = (longest // shortest).bit_length()
        low = shortest << int(random.integers(doublings))
        return int(random.integers(low, min(2 * low, longest + 1)))

    def apply(self, tokens: np.ndarray, stream: int, number: int) -> np.ndarray:
        """A copy of a sequence [length] in which passages return."""
        tokens = tokens.copy()
        for source, target, count in self.returns(stream, number):
            # A later return begins behind this one, so it changes neither of the two places.
            tokens[target : target + count] = tokens[source : source + count]
        return tokens
