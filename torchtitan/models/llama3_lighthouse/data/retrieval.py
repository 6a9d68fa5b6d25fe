"""Retrieval from long contexts: prompts that hide a statement in random alphanumerics.

The same functions draw prompts for evaluation, which sets length and depth to the token, and for
training (``retrieval_mix``). Random numbers depend on a key alone, never on earlier draws. Keys of
training and of evaluation differ, so no training document is an evaluation prompt.

A prompt begins with BOS. Random filler with statements in it follows, and the question comes last.
The needle is the statement that holds the answer. The answer, one to five decimal digits, continues
the prompt. Every part is encoded by itself, so that lengths add up in any tokenizer.
"""

import functools
import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """

    name: str
    digits: int = 1
    keys: int = 1
    links: int = 0

    @property
    def chance(self) -> float:
        """Share of answers that random digits get right."""
        return 0.1**self.digits


# Names are those of ``job_config.RetrievalTask``.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        # One key of one digit.
        Task("passkey"),
        # One key of five digits.
        Task("long_passkey", digits=5),
        # Four named keys of one digit; the question names one.
        Task("several_keys", keys=4),
        # Two chains of three variables; the question names the last of one chain.
        Task("variables", keys=2, links=3),
    )
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise UserValueError(f"task '{name}' is not known; use {', '.join(TASKS)}")
    return TASKS[name]


class PromptEncoder:
    """Token ids of the parts of prompts.

    Raises:
        ValueError: a digit or a capital letter alone is more than one token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        bos, eos = getattr(tokenizer, "bos_id", None), getattr(tokenizer, "eos_id", None)
        self._special = {bos, eos}
        self.bos = _ids([] if bos is None else [bos])
        self.eos = _ids([] if eos is None else [eos])
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
        return _ids([token for token in ids if token not in self._special])

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
        return np.concatenate([_ids([]), *parts])

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


@dataclass(frozen=True)
class _Parts:
    """Token ids of a prompt's parts, before they are placed in the filler.

    Attributes:
        followers: statements that must come after the needle, in this order.
        distractors: statements that may stand anywhere, in this order.
        others: questions about the distractors, each with its answer.
    """

    needle: np.ndarray
    followers: list[np.ndarray]
    distractors: list[np.ndarray]
    question: np.ndarray
    answer: np.ndarray
    others: list[np.ndarray]

    @property
    def statements(self) -> list[np.ndarray]:
        return [self.needle, *self.followers, *self.distractors]


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def random_of(*key: object) -> np.random.Generator:
    """Random numbers that depend on ``key`` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def draw_parts(random: np.random.Generator, encoder: PromptEncoder, task: Task) -> _Parts:
    """Draw keys, names and order of the statements of one prompt."""
    keys = random.choice(10**task.digits, size=task.keys, replace=False)
    values = np.array([[int(d) for d in f"{key:0{task.digits}d}"] for key in keys])
    # Every name is another pair of letters.
    names = random.choice(26**2, size=task.keys * max(task.links, 1), replace=False)
    names = encoder.letters[np.stack(np.divmod(names, 26), axis=1)]
    names = names.reshape(task.keys, -1, 2)
    phrase = encoder.phrase

    def sentence(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([*parts, phrase("; " if task.links else ". ")])

    def answered(questions: list[np.ndarray]) -> list[np.ndarray]:
        pairs = zip(questions, encoder.digits[values[1:]], strict=True)
        return [np.concatenate(pair) for pair in pairs]

    if task.links:
        chains = []
        for chain, value in zip(names, values, strict=True):
            sources = [encoder.digits[value], *chain[:-1]]
            chains.append([
                sentence(phrase(" "), name, phrase(" = "), source)
                for name, source in zip(chain, sources, strict=True)
            ])  # fmt: skip
        questions = [np.concatenate([phrase(" "), chain[-1], phrase(" = ")]) for chain in names]
        distractors = _merged(random, chains[1:])
        return _Parts(chains[0][0], chains[0][1:], distractors, questions[0], values[0],
                      answered(questions[1:]))  # fmt: skip
    questions = [phrase(" The pass key is ")] * task.keys
    if task.keys > 1:
        questions = [
            np.concatenate([phrase(" The pass key of "), name, phrase(" is ")]) for (name,) in names
        ]
    sentences = [
        sentence(question, encoder.digits[value])
        for question, value in zip(questions, values, strict=True)
    ]
    return _Parts(sentences[0], [], sentences[1:], questions[0], values[0], answered(questions[1:]))


def _merged(random: np.random.Generator, rows: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The members of all ``rows`` shuffled together; each row keeps its own order."""
    owners = random.permutation([owner for owner, row in enumerate(rows) for _ in row])
    members = [iter(row) for row in rows]
    return [next(members[int(owner)]) for owner in owners]


@functools.lru_cache(maxsize=64)
def shortest_prompt(encoder: PromptEncoder, task: Task) -> int:
    """Tokens of the shortest prompt that can hold the needle at every depth."""
    parts = draw_parts(random_of("shortest"), encoder, task)
    lengths = [len(statement) for statement in parts.statements]
    # Space before the needle that is too short for the next distractor holds filler instead.
    slack = max(map(len, parts.distractors), default=0)
    return len(encoder.bos) + sum(lengths) + len(parts.question) + slack


def draw_prompt(
    random: np.random.Generator, encoder: PromptEncoder, task: Task, length: int, depth: float
) -> Prompt:
    """A prompt of ``length`` tokens with its needle at ``depth``, as in ``evaluation_prompt``."""
    parts = draw_parts(random, encoder, task)
    rest = length - len(encoder.bos) - len(parts.question)
    after_needle = sum(map(len, parts.followers))
    before = round(depth * (rest - len(parts.needle) - after_needle))
    after = rest - before - len(parts.needle)

    ends = np.cumsum([0, *map(len, parts.distractors)])
    possible = (ends <= before) & (ends[-1] - ends <= after - after_needle)
    fewest, most = np.flatnonzero(possible)[[0, -1]]
    drawn = np.sum(random.random(len(parts.distractors)) < before / rest)
    leading = int(np.clip(drawn, fewest, most))
    behind = _merged(random, [parts.followers, parts.distractors[leading:]])

    head, places = _spread(random, encoder, parts.distractors[:leading], before)
    tail, later = _spread(random, encoder, behind, after)
    needle = len(encoder.bos) + before
    places = [len(encoder.bos) + place for place in places]
    places += [needle, *(needle + len(parts.needle) + place for place in later)]
    tokens = np.concatenate([encoder.bos, head, parts.needle, tail, parts.question])
    return Prompt(tokens, parts.answer, needle, tuple(places), parts.others)


def _spread(
    random: np.random.Generator, encoder: PromptEncoder, pieces: list[np.ndarray], length: int
) -> tuple[np.ndarray, list[int]]:
    """Put ``pieces`` in order at random positions among filler, ``length`` tokens in all.

    Returns:
        The tokens, int32 [length], and the position of each piece.
    """
    filler = encoder.filler(random, length - sum(map(len, pieces)))
    cuts = np.sort(random.integers(len(filler) + 1, size=len(pieces)))
    parts, places, end, previous = [], [], 0, 0
    for piece, cut in zip(pieces, cuts, strict=True):
        parts += [filler[previous:cut], piece]
        places.append(int(end + cut - previous))
        end = places[-1] + len(piece)
        previous = cut
    return np.concatenate([*parts, filler[previous:]]), places


def check_length(encoder: PromptEncoder, task: Task, length: int) -> None:
    """Check that prompts of ``length`` tokens can hold the task.

    Raises:
        ValueError: they are too short.
    """
    shortest = shortest_prompt(encoder, task)
    if length < shortest:
        raise UserValueError(
            f"a prompt of {length} tokens is too short for task '{task.name}', which takes "
            f"{shortest}; use a length of at least that"
        )


def evaluation_prompt(
    encoder: PromptEncoder, task: Task, length: int, depth: float, trial: int, seed: int = 0
) -> Prompt:
    """The prompt of one trial, always the same for the same arguments and tokenizer.

    The needle starts round(depth * room) tokens after BOS. The room is ``length`` less BOS, the
    question, the needle and the statements that must follow the needle (the rest of its chain).

    Args:
        length: tokens of the prompt, BOS and question included.
        depth: from 0, which puts the needle first, to 1, which puts it last.

    Raises:
        ValueError: the prompt is too short for the task, or the depth lies outside 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise UserValueError(f"depth must lie between 0 and 1, got {depth}")
    check_length(encoder, task, length)
    random = random_of("evaluation", seed, task.name, length, float(depth), trial)
    return draw_prompt(random, encoder, task, length, depth)


def evaluation_filler(
    encoder: PromptEncoder, count: int, task: Task, length: int, depth: float, trial: int, seed: int
) -> np.ndarray:
    """Filler that pads the prompt of one trial, int32 [count]; the prompt does not depend on it."""
    random = random_of("padding", seed, task.name, length, float(depth), trial)
    return encoder.filler(random, count)
