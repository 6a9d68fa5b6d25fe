"""What stands among the sequences of training text, and within them."""

import numpy as np
from torchtitan.components.tokenizer import BaseTokenizer

from ..job_config import JobConfig
from .documents import layout_of
from .repeat_mix import RepeatMix
from .retrieval import PromptEncoder
from .retrieval_mix import RetrievalMix, RetrievalSequence


class Mixes:
    """Retrieval documents among the sequences, and passages that return in those of text."""

    def __init__(self, retrieval: RetrievalMix | None, repeats: RepeatMix | None) -> None:
        self._retrieval, self._repeats = retrieval, repeats

    def documents(self, stream: int, sequence: int) -> RetrievalSequence | None:
        """Retrieval documents in place of a sequence, or None."""
        if self._retrieval and self._retrieval.takes(stream, sequence):
            return self._retrieval.draw(stream, sequence)
        return None

    def text(self, tokens: np.ndarray, stream: int, sequence: int) -> np.ndarray:
        """The tokens [length] of a sequence of text as they are trained on."""
        if self._repeats:
            # Only sequences of text count, so that the two mixes do not fall on each other.
            taken = self._retrieval.taken(stream, sequence) if self._retrieval else 0
            if self._repeats.takes(stream, sequence - taken):
                return self._repeats.apply(tokens, stream, sequence - taken)
        return tokens


def mixes_of(job_config: JobConfig, tokenizer: BaseTokenizer, streams: int) -> Mixes | None:
    """What is mixed into training's sequences, or None if nothing is.

    Raises:
        ValueError: the sequences are too short for it.
    """
    section, length = job_config.lighthouse, job_config.training.seq_len + 1
    seed, retrieval, repeats = section.shuffle_seed, None, None
    if section.passkey_mix:
        encoder, tasks = PromptEncoder(tokenizer), section.passkey_tasks
        layout = layout_of(job_config, job_config.training.seq_len)
        retrieval = RetrievalMix(encoder, section.passkey_mix, length, streams, tasks, seed, layout)
    if section.repeat_mix:
        repeats = RepeatMix(section.repeat_mix, length, seed, section.repeat_share)
    return Mixes(retrieval, repeats) if retrieval or repeats else None
