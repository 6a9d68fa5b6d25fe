"""Retrieval from long contexts: prompts that hide what is asked for in random alphanumerics.

One generator serves evaluation, where depth and length are placed exactly on tokens, and training
(``RetrievalMix``). Both are keyed: what they draw depends on a key alone, never on what was drawn
before. The two kinds of key have no stream of random numbers in common, so no training document is
an evaluation's prompt.

A prompt of n tokens is BOS, n - 1 tokens of filler with the statements in it, and the question at
the end; the answer, one to five decimal digits, comes next. Every part is encoded by itself, so
that lengths add up in any tokenizer.
"""

import functools
import hashlib
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import UserValueError

ALPHANUMERICS = string.ascii_letters + string.digits


class Tokenizer(Protocol):
    """What is asked of a tokenizer; ``bos_id`` and ``eos_id`` may be None or missing."""

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> Sequence[int]: ...


@dataclass(frozen=True)
class Task:
    """A kind of prompt.

    Attributes:
        digits: digits of every key, and so of the answer.
        keys: keys in a prompt, of which one is asked for; all differ.
        links: assignments from a variable with a key to the one asked for; 0: no variables.
    """

    name: str
    digits: int = 1
    keys: int = 1
    links: int = 0

    @property
    def chance(self) -> float:
        """Share of right answers of one who guesses digits."""
        return 0.1**self.digits


TASKS = {
    task.name: task
    for task in (
        # A key of one digit.
        Task("passkey"),
        # A key of five digits.
        Task("long_passkey", digits=5),
        # Four named keys of one digit, one of them asked for.
        Task("several_keys", keys=4),
        # Two chains of three variables, the end of one asked for.
        Task("variables", keys=2, links=3),
    )
}


def find_task(name: str) -> Task:
    """Raises: ValueError: there is no such task."""
    if name not in TASKS:
        raise UserValueError(f"task '{name}' is not known; use {', '.join(TASKS)}")
    return TASKS[name]


class PromptEncoder:
    """Token ids of what prompts are made of.

    Raises:
        ValueError: a digit or a capital letter alone is not one token.
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
        # Some tokenizers of Hugging Face add them whatever they are told.
        return _ids([token for token in ids if token not in self._special])

    def phrase(self, text: str) -> np.ndarray:
        """As ``encode``, for text that comes again."""
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
            # Tokens of random text hold one to three characters.
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
        answer: the digits asked for, int64 [task.digits] of 0 to 9.
        needle: place of the first token of the statement that holds the answer's digits.
        statements: places of the first tokens of all statements, in order.
        others: the questions that might have been asked instead, each with its answer.
    """

    tokens: np.ndarray
    answer: np.ndarray
    needle: int
    statements: tuple[int, ...]
    others: list[np.ndarray]


@dataclass(frozen=True)
class _Parts:
    """The needle, what must come after it in order, what may be anywhere in order, the question
    and its answer, and the questions of the distractors with theirs."""

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


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _draw_parts(random: np.random.Generator, encoder: PromptEncoder, task: Task) -> _Parts:
    keys = random.choice(10**task.digits, size=task.keys, replace=False)
    values = np.array([[int(d) for d in f"{key:0{task.digits}d}"] for key in keys])
    # Pairs of letters, no two alike.
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
    """All members of ``rows`` at random, each row's in their order."""
    owners = random.permutation([owner for owner, row in enumerate(rows) for _ in row])
    members = [iter(row) for row in rows]
    return [next(members[int(owner)]) for owner in owners]


@functools.lru_cache(maxsize=64)
def shortest_prompt(encoder: PromptEncoder, task: Task) -> int:
    """Tokens of the shortest prompt in which the needle can stand at every depth."""
    parts = _draw_parts(_generator("shortest"), encoder, task)
    lengths = [len(statement) for statement in parts.statements]
    # What is before the needle must be filled, even where the next distractor is too long for it.
    slack = max(map(len, parts.distractors), default=0)
    return len(encoder.bos) + sum(lengths) + len(parts.question) + slack


def _draw_prompt(
    random: np.random.Generator, encoder: PromptEncoder, task: Task, length: int, depth: float
) -> Prompt:
    """A prompt of ``length`` tokens with its needle at ``depth``; see ``evaluation_prompt``."""
    parts = _draw_parts(random, encoder, task)
    rest = length - len(encoder.bos) - len(parts.question)
    after_needle = sum(map(len, parts.followers))
    before = round(depth * (rest - len(parts.needle) - after_needle))
    after = rest - before - len(parts.needle)

    ends = np.cumsum([0, *map(len, parts.distractors)])
    possible = (ends <= before) & (ends[-1] - ends <= after - after_needle)
    fewest, most = np.flatnonzero(possible)[[0, -1]]
    leading = np.sum(random.random(len(parts.distractors)) < before / rest)
    leading = np.clip(leading, fewest, most)
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
    """``pieces`` in order at random places of ``length`` tokens of filler, and those places."""
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
    """Raises: ValueError: prompts of ``length`` tokens are too short for the task."""
    shortest = shortest_prompt(encoder, task)
    if length < shortest:
        raise UserValueError(
            f"a prompt of {length} tokens is too short for task '{task.name}', which takes "
            f"{shortest}; use a length of at least that"
        )


def evaluation_prompt(
    encoder: PromptEncoder, task: Task, length: int, depth: float, trial: int, seed: int = 0
) -> Prompt:
    """The prompt of a trial: the same for the same arguments and tokenizer, always.

    The needle starts at token round(depth * room) after BOS, where ``room`` is what else comes
    before the question: ``length`` less BOS, question, needle and what must follow the needle
    (the other assignments of its chain).

    Args:
        length: tokens of the prompt, BOS and question included.
        depth: 0 (needle first) to 1 (last).

    Raises:
        ValueError: the prompt is too short for the task, or there is no such depth.
    """
    if not 0 <= depth <= 1:
        raise UserValueError(f"depth = {depth} is none; use one from 0 to 1")
    check_length(encoder, task, length)
    random = _generator("evaluation", seed, task.name, length, float(depth), trial)
    return _draw_prompt(random, encoder, task, length, depth)


def evaluation_filler(
    encoder: PromptEncoder, count: int, task: Task, length: int, depth: float, trial: int, seed: int
) -> np.ndarray:
    """What to pad that trial's prompt with, int32 [count]; the prompt does not depend on it."""
    random = _generator("padding", seed, task.name, length, float(depth), trial)
    return encoder.filler(random, count)


class RetrievalMix:
    """Sequences of retrieval documents in place of a share of a stream's sequences of text.

    A document is BOS, a prompt of one of the tasks at any depth, its answer, the questions of the
    other keys or of the other chain, in random order, each with its answer, and EOS. For each
    sequence an octave of lengths is drawn, from which its documents take theirs as far as their
    tasks fit, so that most documents are short; the last one fills the sequence: none is cut.
    Nothing is remembered from one sequence to the next.

    Only answers are for the loss. All else is random or always the same, and the noise of
    predicting random tokens hides the few that a model can learn.

    Args:
        rate: share of the sequences.
        length: tokens of a sequence, labels included.
        streams: streams of text, among which the share is spread evenly.
        tasks: names of those that documents are of, each as often as the others.

    Raises:
        ValueError: a sequence cannot hold the longest kind of document.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        rate: float,
        length: int,
        streams: int,
        tasks: Sequence[str] = tuple(TASKS),
        seed: int = 0,
    ) -> None:
        self._encoder, self._rate, self._length = encoder, rate, length
        self._streams, self._seed = streams, seed
        self._shortest = {}
        # Of what follows a prompt, by task.
        self._endings = {}
        for task in map(find_task, tasks):
            others = _draw_parts(_generator("shortest"), encoder, task).others
            self._endings[task] = task.digits + sum(map(len, others)) + len(encoder.eos)
            self._shortest[task] = shortest_prompt(encoder, task) + self._endings[task]
        self._enough = max(self._shortest.values())
        if length < self._enough:
            raise UserValueError(
                f"lighthouse.passkey_mix = {rate} with passkey_tasks = {list(tasks)} needs "
                f"training.seq_len of at least {self._enough - 1}, got {length - 1}; raise it, "
                "leave out longer tasks, or set passkey_mix to 0"
            )

    def takes(self, stream: int, sequence: int) -> bool:
        """Whether sequence number ``sequence`` of a stream is one of retrieval.

        Of the first n sequences of a stream, n times the rate are, to within one; and of those
        that all streams have at the same number, the rate times their number, to within one.
        """
        phase = stream / self._streams
        return math.floor((sequence + 1) * self._rate + phase) > math.floor(
            sequence * self._rate + phase
        )

    def sequence(self, stream: int, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """Its tokens, int32 [length], and which of them answer a question, bool [length]."""
        random = _generator("training", self._seed, stream, sequence)
        tasks = list(self._shortest)
        # In integers, which are alike on every machine.
        octaves = (self._length // min(self._shortest.values())).bit_length()
        upper = self._length >> int(random.integers(octaves))
        documents, answers, left = [], [], self._length
        while left:
            task = tasks[random.integers(len(tasks))]
            lower = max(self._shortest[task], upper // 2)
            length = min(int(random.integers(lower, max(lower, upper) + 1)), left)
            if left - length < self._enough:
                length = left
            prompt_length = length - self._endings[task]
            prompt = _draw_prompt(random, self._encoder, task, prompt_length, random.random())
            others = [prompt.others[i] for i in random.permutation(len(prompt.others))]
            documents += [prompt.tokens, self._encoder.digits[prompt.answer], *others,
                          self._encoder.eos]  # fmt: skip
            ends = prompt_length + np.cumsum([task.digits, *map(len, others)])
            is_answer = np.zeros(length, dtype=bool)
            is_answer[np.subtract.outer(ends, np.arange(1, task.digits + 1))] = True
            answers.append(is_answer)
            left -= length
        return np.concatenate(documents), np.concatenate(answers)
