"""How often a model retrieves what a prompt of ``data.retrieval`` asks for.

All digits of the answer are scored in one forward pass, each with the true digits before it given.
Only the logits of the ten digits count, and the largest one is the model's guess. An answer is
entirely right in that pass exactly when the model would also write it digit by digit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..data.retrieval import (
    Prompt,
    PromptEncoder,
    Task,
    evaluation_filler,
    evaluation_prompt,
)
from .held_out_loss import NORMAL_95

# Takes tokens [B, N] and places in them; gives the logits [B, places, vocabulary] there.
Predict = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """Accuracy of one model on one task at one length and depth.

    Attributes:
        length: tokens of a prompt, without the answer.
        text_bytes: bytes of a prompt's text in UTF-8, the mean over trials.
        sequence_length: tokens that attention ran over, padding included.
        depth: depth of the needle, from 0 to 1.
        accuracy: share of trials with every digit right.
        low, high: 95% interval of the accuracy, by Wilson.
        digit_accuracy: share of digits that are right.
        chance: accuracy of random digits.
    """

    task: str
    attention: str
    length: int
    text_bytes: float
    sequence_length: int
    depth: float
    trials: int
    accuracy: float
    low: float
    high: float
    digit_accuracy: float
    chance: float


def wilson_interval(right: int, trials: int) -> tuple[float, float]:
    """95% interval of a probability after ``right`` of ``trials`` (Wilson 1927)."""
    share, square = right / trials, NORMAL_95**2 / trials
    middle = share + square / 2
    spread = NORMAL_95 * math.sqrt((share * (1 - share) + square / 4) / trials)
    low, high = (middle - spread) / (1 + square), (middle + spread) / (1 + square)
    # At the ends of 0 to 1, rounding would miss the exact bound.
    return 0.0 if right == 0 else low, 1.0 if right == trials else high


def sequence_length(task: Task, length: int, fit: Callable[[int], int]) -> int:
    """Tokens that the model reads for a prompt of ``length`` tokens, padding included.

    All digits of the answer but the last follow the prompt.

    Args:
        fit: the least length from a given one on that the attention takes.
    """
    return fit(length + task.digits - 1)


def _rows(
    encoder: PromptEncoder, prompts: list[Prompt], answers: np.ndarray, padding: list[np.ndarray]
) -> np.ndarray:
    """Sequences, int64 [B, N]: each prompt, all digits of its answer but the last, and padding."""
    parts = [np.stack([prompt.tokens for prompt in prompts]), encoder.digits[answers[:, :-1]]]
    return np.concatenate([*parts, np.stack(padding)], axis=1).astype(np.int64)


@torch.inference_mode()
def measure_cell(
    predict: Predict,
    encoder: PromptEncoder,
    task: Task,
    length: int,
    depth: float,
    trials: int = 50,
    attention: str = "dense",
    fit: Callable[[int], int] = lambda length: length,
    seed: int = 0,
    batch_tokens: int = 65536,
    device: str | torch.device = "cpu",
    decode: Callable[[list[int]], str] | None = None,
) -> Cell:
    """Ask ``trials`` prompts, the same for every model.

    Lighthouse takes only lengths that are multiples of p^(L-1) and at least k p^(L-1). Under it,
    random alphanumerics follow the prompt up to the next length that fits, as text follows text in
    training. They take part in selection, and no value flows back from them.

    Args:
        predict: the model, under ``attention``.
        depth: depth of the needle, from 0 to 1.
        fit: as in ``sequence_length``; by default every length fits.
        batch_tokens: tokens in a batch; one sequence at least.
        decode: gives the text of ids, for ``text_bytes``. None: each token but BOS is a byte.

    Raises:
        ValueError: the prompt is too short for the task, or the depth lies outside 0 to 1.
    """
    total = sequence_length(task, length, fit)
    digit_ids = torch.from_numpy(encoder.digits).long().to(device)
    batch_size = max(1, batch_tokens // total)
    right = np.empty((trials, task.digits), dtype=bool)
    text_bytes = 0
    for first in range(0, trials, batch_size):
        numbers = range(first, min(first + batch_size, trials))
        prompts = [evaluation_prompt(encoder, task, length, depth, n, seed) for n in numbers]
        answers = np.stack([prompt.answer for prompt in prompts])
        for prompt in prompts:
            text = prompt.tokens[len(encoder.bos) :].tolist()
            text_bytes += len(decode(text).encode()) if decode else len(text)
        count = total - (length + task.digits - 1)
        padding = [evaluation_filler(encoder, count, task, length, depth, n, seed) for n in numbers]
        rows = _rows(encoder, prompts, answers, padding)
        tokens = torch.from_numpy(rows).to(device)
        logits = predict(tokens, slice(length - 1, length + task.digits - 1))
        guesses = logits.index_select(-1, digit_ids).argmax(-1).cpu().numpy()
        right[numbers.start : numbers.stop] = guesses == answers
    correct = int(right.all(1).sum())
    low, high = wilson_interval(correct, trials)
    return Cell(
        task=task.name,
        attention=attention,
        length=length,
        text_bytes=text_bytes / trials,
        sequence_length=total,
        depth=depth,
        trials=trials,
        accuracy=correct / trials,
        low=low,
        high=high,
        digit_accuracy=float(right.mean()),
        chance=task.chance,
    )
