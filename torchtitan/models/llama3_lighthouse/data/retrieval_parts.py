"""Parts of retrieval prompts that all tasks share: token ids, random numbers, and the results."""

import hashlib
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ..errors import UserValueError

ALPHANUMERICS = string.ascii_letters + string.digits


class Tokenizer(Protocol):
    """The part of a tokenizer that prompts need; ``bos_id`` and ``eos_id`` may be missing."""

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> Sequence[int]: ...


@dataclass(frozen=True)
class Task:
    """A kind of prompt.

    Attributes:
        digits: digits of every key, and so of the answer.
        keys: keys in a prompt. All differ, and the question asks for one.
        links: variables in the chain from a key to the variable in question; 0: no variables.
        form: "statements" stand in filler. An "object" of pairs or a list of "words" fills the
            prompt; keys and links mean nothing there.
    """

    name: str
    digits: int = 1
    keys: int = 1
    links: int = 0
    form: Literal["statements", "object", "words"] = "statements"

    @property
    def chance(self) -> float:
        """Share of answers that random digits get right."""
        return 0.1**self.digits


class PromptEncoder:
    """Token ids of the parts of prompts.

    Raises:
        ValueError: a digit or a capital letter alone is more than one token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        bos, eos = getattr(tokenizer, "bos_id", None), getattr(tokenizer, "eos_id", None)
        self._special = {bos, eos}
        self.bos = as_ids([] if bos is None else [bos])
        self.eos = as_ids([] if eos is None else [eos])
        self.digits = self._one_token_each(string.digits)
        self.letters = self._one_token_each(string.ascii_uppercase)
        singles = [self.encode(character) for character in ALPHANUMERICS]
        self._is_bytes = all(
            list(ids) == [ord(character)]
            for ids, character in zip(singles, ALPHANUMERICS, strict=True)
        ) and np.array_equal(self.encode(ALPHANUMERICS), np.concatenate(singles))
        self._phrases: dict[str, np.ndarray] = {}

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text`` as int32 [tokens], without BOS and EOS."""
        ids = self._tokenizer.encode(text, add_bos=False, add_eos=False)
        # Some tokenizers of Hugging Face add BOS and EOS even when told not to.
        return as_ids([token for token in ids if token not in self._special])

    def phrase(self, text: str) -> np.ndarray:
        """As ``encode``; remembers the ids, for text that every prompt repeats."""
        if text not in self._phrases:
            self._phrases[text] = self.encode(text)
        return self._phrases[text]

    def filler(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Random alphanumerics, int32 [count]."""
        if self._is_bytes:
            letters = np.frombuffer(ALPHANUMERICS.encode(), dtype=np.uint8)
            return letters[random.integers(len(letters), size=count)].astype(np.int32)
        parts, missing = [], count
        while missing > 0:
            # A token of random text is one to three characters long.
            picked = random.integers(len(ALPHANUMERICS), size=2 * missing + 8)
            parts.append(self.encode("".join(ALPHANUMERICS[i] for i in picked))[:missing])
            missing -= len(parts[-1])
        return np.concatenate([as_ids([]), *parts])

    def _one_token_each(self, characters: str) -> np.ndarray:
        encoded = {character: self.encode(character) for character in characters}
        for character, ids in encoded.items():
            if len(ids) != 1:
                raise UserValueError(
                    f"retrieval prompts need a tokenizer in which '{character}' alone is one "
                    f"token, this one makes {len(ids)} of it; use lighthouse.tokenizer = 'byte'"
                )
        return np.concatenate(list(encoded.values()))


@dataclass(frozen=True)
class Prompt:
    """A prompt and its answer.

    Attributes:
        tokens: int32 [n].
        answer: digits of the answer, 0 to 9 each, int64 [task.digits].
        needle: position of the needle's first token.
        statements: positions of the first tokens of all statements, in order.
        others: the other questions that the prompt can answer, each with its answer.
    """

    tokens: np.ndarray
    answer: np.ndarray
    needle: int
    statements: tuple[int, ...]
    others: list[np.ndarray]


def as_ids(tokens: Sequence[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def evenly_taken(rate: float, count: int, phase: float) -> int:
    """How many of the first ``count`` sequences are taken, to within one of ``rate`` of them.

    Args:
        phase: from 0 to below 1; another one for each stream, so that streams take turns.
    """
    return math.floor(count * rate + phase)


def random_of(*key: object) -> np.random.Generator:
    """Random numbers that depend on ``key`` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
