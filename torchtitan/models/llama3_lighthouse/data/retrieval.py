"""Retrieval from long contexts: prompts that hide a statement in random alphanumerics.

The same functions draw prompts for evaluation, which sets length and depth to the token, and for
training (``retrieval_mix``). Random numbers depend on a key alone, never on earlier draws. Keys of
training and of evaluation differ, so no training document is an evaluation prompt.

A prompt begins with BOS. Random filler with statements in it follows, and the question comes last.
The needle is the statement that holds the answer. The answer, one to five decimal digits, continues
the prompt. Every part is encoded by itself, so that lengths add up in any tokenizer. In the prompts
of ``retrieval_lists``, the items of a list take the place of the filler.
"""

import functools
from dataclasses import dataclass

import numpy as np

from ..errors import UserValueError
from .retrieval_lists import LIST_FORMS
from .retrieval_parts import Prompt, PromptEncoder, Task, random_of

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
        # An object in JSON, whose pairs fill the prompt; the question names one of the keys.
        Task("lookup", form="object"),
        # A list of words that fills the prompt; one of them is common, in half of the list.
        Task("common_word", form="words"),
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
    if task.form != "statements":
        return LIST_FORMS[task.form].shortest(encoder, task)
    parts = draw_parts(random_of("shortest"), encoder, task)
    lengths = [len(statement) for statement in parts.statements]
    # Space before the needle that is too short for the next distractor holds filler instead.
    slack = max(map(len, parts.distractors), default=0)
    return len(encoder.bos) + sum(lengths) + len(parts.question) + slack


def other_questions(encoder: PromptEncoder, task: Task) -> int:
    """Tokens of the other questions of a prompt, with their answers; the same for all prompts."""
    random, shortest = random_of("shortest"), shortest_prompt(encoder, task)
    return sum(map(len, draw_prompt(random, encoder, task, shortest, 0.0).others))


def draw_prompt(
    random: np.random.Generator, encoder: PromptEncoder, task: Task, length: int, depth: float
) -> Prompt:
    """A prompt of ``length`` tokens with its needle at ``depth``, as in ``evaluation_prompt``."""
    if task.form != "statements":
        return LIST_FORMS[task.form].draw(random, encoder, task, length, depth)
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
