"""Retrieval documents that are mixed into the training text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UserValueError
from ..job_config import Lighthouse
from .documents import DocumentLayout
from .retrieval import (
    PromptEncoder,
    Task,
    draw_prompt,
    find_task,
    other_questions,
    random_of,
    shortest_prompt,
)
from .retrieval_parts import evenly_taken


class RetrievalSequence(NamedTuple):
    """A sequence of retrieval documents.

    Attributes:
        tokens: int32 [length].
        in_loss: which of them answer a question, bool [length].
        documents: int32 [length], for each token the first one of its document.
        padding: tokens that no document holds.
    """

    tokens: np.ndarray
    in_loss: np.ndarray
    documents: np.ndarray
    padding: int


class RetrievalMix:
    """Sequences of retrieval documents that stand among the sequences of text.

    A document is a prompt of a random task and depth, its answer, all other questions that the
    prompt can answer, in random order and each with its answer, and EOS. Each sequence draws an
    octave of lengths, and its documents draw their lengths from that octave as far as their tasks
    fit into it. Most documents are thus short. The last document fills the sequence, so none
    is cut. A sequence depends on its number alone, not on the ones before.

    Only answers count in the loss. All other tokens are random or always the same, and the noise
    of predicting random tokens would hide the few that a model can learn.

    Args:
        rate: share of the sequences.
        length: tokens of a sequence, labels included.
        streams: streams of text; each has the same share.
        tasks: names of the tasks, which are drawn equally often.
        seed: draws other documents.
        layout: how documents lie in a sequence if they do not see each other. Padding then stands
            between them, which repeats a document's last token.

    Raises:
        ValueError: a sequence cannot hold the longest kind of document.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        rate: float,
        length: int,
        streams: int,
        tasks: Sequence[str] = tuple(Lighthouse().passkey_tasks),
        seed: int = 0,
        layout: DocumentLayout | None = None,
    ) -> None:
        self._encoder, self._rate, self._length = encoder, rate, length
        self._streams, self._seed = streams, seed
        self._span = layout.span if layout else 1
        # Task -> tokens of its shortest document.
        self._shortest: dict[Task, int] = {}
        # Task -> tokens that follow its prompt.
        self._endings: dict[Task, int] = {}
        for task in map(find_task, tasks):
            others = other_questions(encoder, task)
            self._endings[task] = task.digits + others + len(encoder.eos)
            self._shortest[task] = shortest_prompt(encoder, task) + self._endings[task]
        self._enough = max(self._shortest.values())
        if length < self._enough:
            raise UserValueError(
                f"lighthouse.passkey_mix = {rate} with passkey_tasks = {list(tasks)} needs "
                f"training.seq_len of at least {self._enough - 1}, got {length - 1}; raise it, "
                "leave out longer tasks, or set passkey_mix to 0"
            )

    def takes(self, stream: int, sequence: int) -> bool:
        """Whether sequence number ``sequence`` of a stream holds retrieval documents.

        The share is exact to within one sequence, both among the first n sequences of a stream
        and among the sequences of all streams that have the same number.
        """
        return self.taken(stream, sequence + 1) > self.taken(stream, sequence)

    def taken(self, stream: int, sequence: int) -> int:
        """How many of the sequences of a stream before number ``sequence`` this takes."""
        return evenly_taken(self._rate, sequence, stream / self._streams)

    def sequence(self, stream: int, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of ``draw`` and which of them answer a question, [length] each."""
        tokens, in_loss, *_ = self.draw(stream, sequence)
        return tokens, in_loss

    def draw(self, stream: int, sequence: int) -> RetrievalSequence:
        """Draw sequence number ``sequence`` of a stream."""
        random = random_of("training", self._seed, stream, sequence)
        tasks = list(self._shortest)
        # Integers give the same lengths on every machine.
        octaves = (self._length // min(self._shortest.values())).bit_length()
        upper = self._length >> int(random.integers(octaves))
        documents, answers, left = [], [], self._length
        firsts, padding = [], 0
        while left:
            task = tasks[random.integers(len(tasks))]
            lower = max(self._shortest[task], upper // 2)
            length = min(int(random.integers(lower, max(lower, upper) + 1)), left)
            filling = -length % self._span
            if left - length - filling < self._enough:
                length, filling = left, 0
            prompt_length = length - self._endings[task]
            prompt = draw_prompt(random, self._encoder, task, prompt_length, random.random())
            others = [prompt.others[i] for i in random.permutation(len(prompt.others))]
            documents += [prompt.tokens, self._encoder.digits[prompt.answer], *others,
                          self._encoder.eos]  # fmt: skip
            last = np.concatenate(documents[-2:])[-1:]
            documents.append(last.repeat(filling))
            ends = prompt_length + np.cumsum([task.digits, *map(len, others)])
            is_answer = np.zeros(length + filling, dtype=bool)
            is_answer[np.subtract.outer(ends, np.arange(1, task.digits + 1))] = True
            answers.append(is_answer)
            firsts.append(np.full(len(is_answer), self._length - left, dtype=np.int32))
            left, padding = left - len(is_answer), padding + filling
        tokens, in_loss, layout = map(np.concatenate, (documents, answers, firsts))
        return RetrievalSequence(tokens, in_loss, layout, padding)
