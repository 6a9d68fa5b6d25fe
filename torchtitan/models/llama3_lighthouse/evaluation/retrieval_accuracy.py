"""How often a model retrieves what a prompt of ``retrieval`` asks for.

The answer's digits are scored in one forward pass, with those before them given: of the logits
where a digit is due, the largest of the ten digits' own counts. All digits right that way are all
digits right when the model writes them itself, one by one, out of the ten.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lighthouse import LighthouseConfig
from lighthouse.geometry import PyramidGeometry

from ..data.retrieval import PromptEncoder, Task, evaluation_filler, evaluation_prompt
from .held_out_loss import NORMAL_95

# Tokens [B, N] and places in them to logits [B, places, vocabulary] there.
Predict = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """Accuracy of one model on one task at one length and depth.

    Attributes:
        length: tokens of a prompt, the answer left out.
        text_bytes: bytes of a prompt's text in UTF-8, a mean over trials.
        sequence_length: tokens that attention ran over, padding included.
        accuracy: share of trials with every digit right.
        low, high: its interval at 95%, by Wilson.
        digit_accuracy: share of digits that are right.
        chance: accuracy of one who guesses digits.
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
    """Bounds at 95% of a probability, of which ``right`` of ``trials`` were seen (Wilson 1927)."""
    share, square = right / trials, NORMAL_95**2 / trials
    middle = share + square / 2
    spread = NORMAL_95 * math.sqrt((share * (1 - share) + square / 4) / trials)
    low, high = (middle - spread) / (1 + square), (middle + spread) / (1 + square)
    # Exact where rounding would miss the ends.
    return 0.0 if right == 0 else low, 1.0 if right == trials else high


def fitting_length(config: LighthouseConfig, shortest: int) -> int:
    """The smallest sequence length of ``shortest`` or more that Lighthouse can select from."""
    span = config.pooling_factor ** (config.levels - 1)
    step = span if config.scorer == "norm" else math.lcm(span, config.dilation)
    length = math.ceil(max(shortest, config.top_k * span) / step) * step
    return PyramidGeometry(config, length).sequence_length


def sequence_length(
    task: Task, length: int, attention: str, config: LighthouseConfig | None
) -> int:
    """Tokens that the model is given for a prompt of ``length`` tokens, padding included.

    All digits of the answer but the last come after the prompt.
    """
    needed = length + task.digits - 1
    return fitting_length(config, needed) if attention == "lighthouse" else needed


@torch.inference_mode()
def measure_cell(
    predict: Predict,
    encoder: PromptEncoder,
    task: Task,
    length: int,
    depth: float,
    trials: int = 50,
    attention: str = "dense",
    config: LighthouseConfig | None = None,
    seed: int = 0,
    batch_tokens: int = 65536,
    device: str | torch.device = "cpu",
    decode: Callable[[list[int]], str] | None = None,
) -> Cell:
    """Ask ``trials`` prompts, the same for every model.

    Under Lighthouse, whose sequence lengths are multiples of p^(L-1) and at least k p^(L-1), random
    alphanumerics come after the prompt up to the next length that fits, as text comes after text in
    training; they take part in selection, and no value flows back from them.

    Args:
        predict: the model, in ``attention``.
        depth: of the needle, 0 to 1.
        config: of Lighthouse; needed in attention "lighthouse" alone.
        batch_tokens: tokens in a batch; one sequence at least.
        decode: gives the text of ids, for ``text_bytes``; None: each token but BOS is a byte.

    Raises:
        ValueError: the prompt is too short for the task, or the depth is none.
    """
    needed = length + task.digits - 1
    total = sequence_length(task, length, attention, config)
    digit_ids = torch.from_numpy(encoder.digits).long().to(device)
    batch_size = max(1, batch_tokens // total)
    right = np.empty((trials, task.digits), dtype=bool)
    text_bytes = 0
    for first in range(0, trials, batch_size):
        numbers = range(first, min(first + batch_size, trials))
        prompts = [evaluation_prompt(encoder, task, length, depth, n, seed) for n in numbers]
        answers = np.stack([prompt.answer for prompt in prompts])
        padding = [
            evaluation_filler(encoder, total - needed, task, length, depth, n, seed)
            for n in numbers
        ]
        rows = np.concatenate(
            [
                np.stack([prompt.tokens for prompt in prompts]),
                encoder.digits[answers[:, :-1]],
                np.stack(padding),
            ],
            axis=1,
        )
        for prompt in prompts:
            text = prompt.tokens[len(encoder.bos) :].tolist()
            text_bytes += len(decode(text).encode()) if decode else len(text)
        tokens = torch.from_numpy(rows.astype(np.int64)).to(device)
        logits = predict(tokens, slice(length - 1, needed))
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
