"""Retrieval prompts that one list fills: the pairs of an object in JSON, or words to be counted.

A list has as many items as fit. Filler before it makes the prompt as long as it has to be.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .retrieval_parts import Prompt, PromptEncoder, Task

# Letters of a key or a word: enough for different ones in millions of tokens.
NAME_LETTERS = 4
# Pairs that are asked for in a document of training, and the fewest of an object.
ASKED_PAIRS = 4
# Times that a word other than the common one comes.
UNCOMMON = 3
# The common word comes at least so often, and is a quarter of its half of the list.
LEAST_COMMON = 2 * UNCOMMON
# Words of the shortest list: its half holds the common word, and as many others.
FEWEST_WORDS = 4 * LEAST_COMMON


@dataclass(frozen=True)
class ListForm:
    """How prompts of a form are drawn.

    Attributes:
        shortest: tokens of the shortest prompt.
        draw: a prompt; arguments as in ``retrieval.draw_prompt``.
    """

    shortest: Callable[[PromptEncoder, Task], int]
    draw: Callable[[np.random.Generator, PromptEncoder, Task, int, float], Prompt]


@dataclass(frozen=True)
class _Object:
    """Token ids around the keys and values of an object, int32 [tokens] each."""

    opening: np.ndarray
    separator: np.ndarray
    colon: np.ndarray
    closing: np.ndarray
    ask: np.ndarray
    ask_end: np.ndarray

    @classmethod
    def of(cls, encoder: PromptEncoder) -> "_Object":
        texts = ('{"', ', "', '": ', "}", ' The value of "', '" is ')
        return cls(*map(encoder.phrase, texts))

    def length(self, pairs: int, digits: int) -> int:
        each = NAME_LETTERS + len(self.colon) + digits
        rest = len(self.opening) + len(self.closing) - len(self.separator)
        return pairs * (each + len(self.separator)) + rest

    @property
    def question(self) -> int:
        return len(self.ask) + NAME_LETTERS + len(self.ask_end)


def _names(random: np.random.Generator, encoder: PromptEncoder, count: int) -> np.ndarray:
    """Different names, int32 [count, NAME_LETTERS]."""
    base = len(encoder.letters)
    drawn = random.choice(base**NAME_LETTERS, size=count, replace=False)
    powers = base ** np.arange(NAME_LETTERS)
    return encoder.letters[drawn[:, None] // powers % base]


def _shortest_object(encoder: PromptEncoder, task: Task) -> int:
    form = _Object.of(encoder)
    return len(encoder.bos) + form.length(ASKED_PAIRS, task.digits) + form.question


def _draw_object(
    random: np.random.Generator, encoder: PromptEncoder, task: Task, length: int, depth: float
) -> Prompt:
    """Pairs of a key and a value; the one at ``depth`` is asked for, counted in pairs."""
    form = _Object.of(encoder)
    room = length - len(encoder.bos) - form.question
    each = form.length(2, task.digits) - form.length(1, task.digits)
    pairs = 1 + (room - form.length(1, task.digits)) // each
    names = _names(random, encoder, pairs)
    values = random.integers(10, size=(pairs, task.digits))
    asked = round(depth * (pairs - 1))
    rest = np.delete(np.arange(pairs), asked)
    others = random.choice(rest, size=ASKED_PAIRS - 1, replace=False)
    filler = encoder.filler(random, room - form.length(pairs, task.digits))

    colons = np.broadcast_to(form.colon, (pairs, len(form.colon)))
    separators = np.broadcast_to(form.separator, (pairs, len(form.separator)))
    rows = np.concatenate([separators, names, colons, encoder.digits[values]], axis=1)
    body = rows.reshape(-1)[len(form.separator) :]
    start = len(encoder.bos) + len(filler)
    # A pair begins with its quotation mark's token, which the opening or the separator holds.
    places = [start, *(start + len(form.opening) - len(form.separator)
                       + each * np.arange(1, pairs)).tolist()]  # fmt: skip
    questions = [np.concatenate([form.ask, names[i], form.ask_end]) for i in (asked, *others)]
    tokens = np.concatenate([encoder.bos, filler, form.opening, body, form.closing, questions[0]])
    answered = [
        np.concatenate([question, encoder.digits[values[i]]])
        for question, i in zip(questions[1:], others, strict=True)
    ]
    return Prompt(tokens, values[asked], places[asked], tuple(places), answered)


def _word_lengths(encoder: PromptEncoder, task: Task) -> tuple[np.ndarray, np.ndarray, int]:
    """What stands before each word, the question, and the tokens of a word with that before it."""
    before = encoder.phrase(" ")
    question = encoder.phrase(" The most common word ends in ")
    return before, question, len(before) + NAME_LETTERS + task.digits


def _shortest_words(encoder: PromptEncoder, task: Task) -> int:
    _, question, each = _word_lengths(encoder, task)
    return len(encoder.bos) + FEWEST_WORDS * each + len(question)


def _draw_words(
    random: np.random.Generator, encoder: PromptEncoder, task: Task, length: int, depth: float
) -> Prompt:
    """Words that end in digits; the common one comes in the half of the list at ``depth``.

    All other words come ``UNCOMMON`` times at most, anywhere. At depth 0 the half is the first one,
    so that nothing after it tells the answer.
    """
    before, question, each = _word_lengths(encoder, task)
    room = length - len(encoder.bos) - len(question)
    count = room // each
    half = count // 2
    common = max(LEAST_COMMON, half // 4)
    first = round(depth * (count - half))
    taken = np.sort(first + random.choice(half, size=common, replace=False))
    different = 1 + -(-(count - common) // UNCOMMON)
    names = _names(random, encoder, different)
    values = random.integers(10, size=(different, task.digits))
    words = np.zeros(count, dtype=np.int64)
    uncommon = np.repeat(np.arange(1, different), UNCOMMON)[: count - common]
    words[np.delete(np.arange(count), taken)] = random.permutation(uncommon)
    filler = encoder.filler(random, room - count * each)

    spaces = np.broadcast_to(before, (count, len(before)))
    rows = np.concatenate([spaces, names[words], encoder.digits[values[words]]], axis=1)
    tokens = np.concatenate([encoder.bos, filler, rows.reshape(-1), question])
    places = (len(encoder.bos) + len(filler) + each * taken).tolist()
    return Prompt(tokens, values[0], places[0], tuple(places), [])


# ``Task.form`` -> how its prompts are drawn.
LIST_FORMS = {
    "object": ListForm(_shortest_object, _draw_object),
    "words": ListForm(_shortest_words, _draw_words),
}
