"""Measures of a contest's run, in a process of its own on the run's GPU.

python -m torchtitan.models.llama3_lighthouse.studies.contest_measures CONTEST RUN_FOLDER [PART]

With PART = "tuning", measures what chooses the rate and little more.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.retrieval import PromptEncoder, Task, find_task, shortest_prompt
from ..data.tokenizer import build_tokenizer
from ..errors import UserError
from ..evaluation.distance import measure_documents, plan_of, values_of
from ..evaluation.inference import TrainedModel, checked_device, load_trained_model, logits_at
from ..evaluation.retrieval_accuracy import measure_cell
from ..evaluation.retrieval_report import DEFAULT_PARTS
from ..job_config import JobConfig
from ..metrics import HELD_OUT_LOSS
from .contest_file import (
    RETRIEVAL,
    VALIDATION,
    Contest,
    fix,
    read_contest,
    read_record,
    write_record,
)
from .sweeps import read_metrics

MEASURES_FILE = "measures.json"
TUNING = "tuning"
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


def _retrieval_lengths(
    contest: Contest, encoder: PromptEncoder, longest: int
) -> Iterator[tuple[Task, int, str]]:
    """Each task with the tokens of its prompts and the name of the number, where the task fits."""
    for name in contest.retrieval:
        task = find_task(name)
        for part in sorted(DEFAULT_PARTS, reverse=True):
            # The answer follows the prompt, and both must lie within the trained positions.
            length = longest // part - (task.digits if part == 1 else 0)
            if length >= shortest_prompt(encoder, task):
                yield task, length, f"{RETRIEVAL}{name}/{longest // part}"


def retrieval(trained: TrainedModel, contest: Contest) -> Iterator[Number]:
    """Accuracy of each task by length, the mean over depths."""
    trained.model.use_attention("dense")
    encoder = PromptEncoder(trained.tokenizer)
    device = next(trained.model.parameters()).device
    longest = trained.config.training.seq_len
    for task, length, name in _retrieval_lengths(contest, encoder, longest):
        cells = [
            measure_cell(
                lambda tokens, places: logits_at(trained.model, tokens, places),
                encoder, task, length, depth, max(1, contest.prompts // len(DEPTHS)),
                device=device,
            )
            for depth in DEPTHS
        ]  # fmt: skip
        yield Number(name, None, statistics.fmean(cell.accuracy for cell in cells))


def known_measures(contest: Contest, config: JobConfig) -> list[str]:
    """Names of all numbers that a run of ``config`` will have.

    Raises:
        ValueError: the contest's settings of the measures do not fit the run.
    """
    plan = plan_of(contest.distance, config.validation.seq_len)
    document = torch.zeros(1, plan.length + 1, dtype=torch.int64)

    def no_loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(inputs.shape)

    names = [each.key for each in values_of(no_loss, [document], plan)]
    encoder = PromptEncoder(build_tokenizer(config))
    longest = config.training.seq_len
    of_retrieval = [name for _, _, name in _retrieval_lengths(contest, encoder, longest)]
    return list(dict.fromkeys([VALIDATION, *names, *of_retrieval]))


def for_tuning(contest: Contest) -> Contest:
    """The contest with no measure but the one that chooses the rate, and those beside it."""
    kind = contest.tuned_by.partition("/")[0]
    distance = replace(
        contest.distance,
        # Without distances the repeated passages are left out, and so on.
        contexts=contest.distance.contexts if kind in ("context", "beyond") else (),
        distances=contest.distance.distances if kind == "repeated" else (),
    )
    tasks = contest.retrieval if f"{kind}/" == RETRIEVAL else []
    return replace(contest, distance=distance, retrieval=tasks)


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
    numbers += distance(trained, contest)
    numbers += retrieval(trained, contest)
    write_numbers(folder, numbers)


def write_numbers(folder: Path, numbers: list[Number]) -> None:
    """Write a run's numbers, all or none."""
    rows = [[each.measure, each.document, each.value] for each in numbers]
    write_record(folder / MEASURES_FILE, rows)


def read_numbers(folder: Path) -> list[Number]:
    """The numbers of a run that has been measured."""
    return [Number(*row) for row in read_record(folder / MEASURES_FILE)]


def main(path: Path, folder: Path, part: str = "") -> None:
    contest = read_contest(path)
    # The file may have changed while the run trained.
    fix(contest, folder.parent)
    measure_run(for_tuning(contest) if part == TUNING else contest, folder)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    except UserError as error:
        sys.exit(f"Error: {error}")
