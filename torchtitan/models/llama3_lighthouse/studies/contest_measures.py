"""Measures of a contest's run, in a process of its own on the run's GPU.

python -m torchtitan.models.llama3_lighthouse.studies.contest_measures CONTEST RUN_FOLDER
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.retrieval import PromptEncoder, find_task, shortest_prompt
from ..errors import UserError
from ..evaluation.distance import measure_documents
from ..evaluation.inference import TrainedModel, checked_device, load_trained_model, logits_at
from ..evaluation.retrieval_accuracy import measure_cell
from ..evaluation.retrieval_report import DEFAULT_PARTS
from ..metrics import HELD_OUT_LOSS
from .contest_file import VALIDATION, Contest, read_contest
from .sweeps import read_metrics

MEASURES_FILE = "measures.json"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Number:
    """One number of a run; ``document`` is None where it is over all of them."""

    measure: str
    document: int | None
    value: float


def distance(trained: TrainedModel, contest: Contest) -> Iterator[Number]:
    """Loss and the measures of distance, by held-out document."""
    found = measure_documents(
        trained.model, trained.tokenizer, trained.config, settings=contest.distance
    )
    for each in found:
        yield Number(each.key, each.document, each.value)


def retrieval(trained: TrainedModel, contest: Contest) -> Iterator[Number]:
    """Accuracy of each task by length, the mean over depths, where the task fits."""
    trained.model.use_attention("dense")
    encoder = PromptEncoder(trained.tokenizer)
    device = next(trained.model.parameters()).device
    longest = trained.config.training.seq_len
    for name in contest.retrieval:
        task = find_task(name)
        for part in sorted(DEFAULT_PARTS, reverse=True):
            # The answer follows the prompt, and both must lie within the trained positions.
            length = longest // part - (task.digits if part == 1 else 0)
            if length < shortest_prompt(encoder, task):
                continue
            cells = [
                measure_cell(
                    lambda tokens, places: logits_at(trained.model, tokens, places),
                    encoder, task, length, depth, max(1, contest.prompts // len(DEPTHS)),
                    device=device,
                )
                for depth in DEPTHS
            ]  # fmt: skip
            accuracy = statistics.fmean(cell.accuracy for cell in cells)
            yield Number(f"retrieval/{name}/{longest // part}", None, accuracy)


# Each takes the trained model and the contest, and yields its numbers.
MEASURES: list[Callable[[TrainedModel, Contest], Iterator[Number]]] = [distance, retrieval]


def last_validation(folder: Path) -> float:
    """The last held-out loss that a run logged.

    Raises:
        KeyError: it logged none.
    """
    held_out = [e[HELD_OUT_LOSS] for e in read_metrics(folder).values() if HELD_OUT_LOSS in e]
    if not held_out:
        raise KeyError(f"{folder} logged no held-out loss")
    return held_out[-1]


def measure_run(contest: Contest, folder: Path) -> None:
    """Measure the last checkpoint of a run, and write ``MEASURES_FILE`` into its folder."""
    device = checked_device(None)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    trained = load_trained_model(folder, device=device, dtype=dtype)
    numbers = [Number(VALIDATION, None, last_validation(folder))]
    for measure in MEASURES:
        numbers += measure(trained, contest)
    write_numbers(folder, numbers)


def write_numbers(folder: Path, numbers: list[Number]) -> None:
    """Write a run's numbers, all or none."""
    rows = [[each.measure, each.document, each.value] for each in numbers]
    partial = folder / f"{MEASURES_FILE}.partial"
    partial.write_text(json.dumps(rows))
    partial.replace(folder / MEASURES_FILE)


def read_numbers(folder: Path) -> list[Number]:
    """The numbers of a run that has been measured."""
    return [Number(*row) for row in json.loads((folder / MEASURES_FILE).read_text())]


if __name__ == "__main__":
    try:
        measure_run(read_contest(Path(sys.argv[1])), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"Error: {error}")
