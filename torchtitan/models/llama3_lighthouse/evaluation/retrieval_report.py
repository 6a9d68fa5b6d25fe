"""Retrieval of several checkpoints by length and depth, as tables and heat maps."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checks.output import check_output
from ..data.retrieval import PromptEncoder, Task, check_length, find_task
from ..data.tokenizer import ByteTokenizer, build_tokenizer
from ..environment import environment
from ..errors import UserValueError
from ..job_config import Lighthouse
from ..model.model import fitting
from .figures import length_name, new_figure, save
from .inference import (
    find_checkpoint,
    labels_of,
    load_trained_model,
    logits_at,
    recorded_config,
)
from .progress import Progress, say, say_what_was_written
from .retrieval_accuracy import Cell, measure_cell, sequence_length
from .tables import write_csv

# The default lengths of prompts are the checkpoints' shortest training.seq_len divided by these.
DEFAULT_PARTS = (8, 4, 2, 1)
# Cells brighter than this have black text.
BRIGHT = 0.6


@dataclass(frozen=True)
class RetrievalOptions:
    """Options of a measurement.

    Attributes:
        checkpoints: as in ``inference.find_checkpoint``.
        dtype: name of the weights' dtype in torch.
        attention: "dense", "lighthouse" or both.
        tasks: names of ``data.retrieval.TASKS``.
        lengths: tokens of prompts, without the answer; None: those that DEFAULT_PARTS gives.
        depths: depths of the needle, in percent.
        trials: prompts of each cell.
        batch_tokens: tokens in a batch, one sequence at least.
        revision: git revision to record; None: as git says.
    """

    checkpoints: list[Path]
    output: Path
    device: str
    dtype: str
    attention: list[str]
    tasks: list[str]
    lengths: list[int] | None
    depths: list[float]
    trials: int = 50
    seed: int = 0
    batch_tokens: int = 65536
    revision: str | None = None
    plots: bool = True


@dataclass
class Evaluated:
    """A checkpoint and its results; step and dense_steps are None without a record."""

    label: str
    path: Path
    step: int | None
    dense_steps: int | None
    trained_length: int
    cells: list[Cell] = field(default_factory=list)


# Attention, task and length of the cells that are measured together, one for each depth.
Plan = list[tuple[str, Task, int]]


def report_retrieval(options: RetrievalOptions, overrides: list[str]) -> None:
    """Measure checkpoints; write results.csv and results.json as they grow, and the heat maps.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    options, checkpoints, sections = prepare(options, overrides)
    _measure(options, overrides, checkpoints, sections)
    if options.plots:
        for task in options.tasks:
            plot(options.output, checkpoints, task)
    figures = [f"{task}.png" for task in options.tasks]
    say_what_was_written(options.output, "results.csv", "results.json", *figures)


def prepare(
    options: RetrievalOptions, overrides: list[str]
) -> tuple[RetrievalOptions, list[Evaluated], list[Lighthouse]]:
    """Check what can be checked before a model is loaded.

    Returns:
        The options with their lengths filled in, the checkpoints, and the [lighthouse] of each.

    Raises:
        ValueError, TypeError, OSError: something is wrong; the message names the value and the fix.
    """
    for name in ("trials", "batch_tokens"):
        if (value := getattr(options, name)) < 1:
            raise UserValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if outside := [depth for depth in options.depths if not 0 <= depth <= 100]:
        raise UserValueError(
            f"--depths must lie between 0 and 100 percent, got {outside[0]:g}; leave it out or "
            "give another one"
        )
    tasks = [find_task(name) for name in options.tasks]

    found = {}
    for given in options.checkpoints:
        path = find_checkpoint(given).resolve()
        found[path] = recorded_config(path, overrides)
    shortest = min(config.training.seq_len for config in found.values())
    lengths = options.lengths or [shortest // part for part in DEFAULT_PARTS]
    for config in found.values():
        encoder = PromptEncoder(build_tokenizer(config))
        for task in tasks:
            for length in lengths:
                try:
                    check_length(encoder, task, length)
                except UserValueError as error:
                    raise UserValueError(f"{error} (--lengths, --tasks)") from None
    check_output(options.output)
    evaluated = [
        Evaluated(label, path, None, None, config.training.seq_len)
        for label, (path, config) in zip(labels_of(list(found)), found.items(), strict=True)
    ]
    sections = [config.lighthouse for config in found.values()]
    return replace(options, lengths=lengths), evaluated, sections


def _measure(
    options: RetrievalOptions,
    overrides: list[str],
    checkpoints: list[Evaluated],
    sections: list[Lighthouse],
) -> None:
    """Measure every cell of every checkpoint, and write the tables as they grow."""
    plan = [
        (attention, find_task(name), length)
        for attention in options.attention
        for name in options.tasks
        for length in options.lengths or []
    ]
    tokens = sum(
        sequence_length(task, length, fitting(section, attention))
        for section in sections
        for attention, task, length in plan
    )
    names = ("tasks", "lengths", "depths", "trials", "attention", "seed", "dtype", "batch_tokens")
    settings = {**{name: getattr(options, name) for name in names}, "overrides": overrides}
    record = {
        "settings": settings,
        "device": options.device,
        **environment(options.revision),
    }
    total = tokens * options.trials * len(options.depths)
    with Progress("retrieval", total, "tokens", scaled=True) as bar:
        for checkpoint, section in zip(checkpoints, sections, strict=True):
            for cells in _cells_of(options, overrides, checkpoint, section, plan, bar):
                checkpoint.cells += cells
                accuracies = [cell.accuracy for cell in cells]
                say(
                    f"{checkpoint.label}  {cells[0].attention}  {cells[0].task}  "
                    f"{cells[0].length:,} tokens: {statistics.fmean(accuracies):.0%} right "
                    f"({min(accuracies):.0%} to {max(accuracies):.0%} by depth)"
                )
                write_tables(options.output, record, checkpoints)


def _cells_of(
    options: RetrievalOptions,
    overrides: list[str],
    checkpoint: Evaluated,
    section: Lighthouse,
    plan: Plan,
    bar: Progress,
) -> Iterator[list[Cell]]:
    """Yield the cells, one for each depth, of each entry of the plan; ``bar`` counts batches."""
    longest = max(sequence_length(task, n, fitting(section, each)) for each, task, n in plan)
    prompt = max(n for _, _, n in plan)
    # A longer sequence may also be the answer or the padding after a prompt that fits.
    if prompt > checkpoint.trained_length:
        say(f"{checkpoint.label}: prompts of up to {prompt:,} tokens are longer than the sequences "
            f"it was trained on, {checkpoint.trained_length:,}")  # fmt: skip
    trained = load_trained_model(
        checkpoint.path,
        overrides,
        options.device,
        getattr(torch, options.dtype),
        max(longest, checkpoint.trained_length),
    )
    if trained.record:
        checkpoint.step = trained.record.step
        checkpoint.dense_steps = trained.record.dense_steps
    encoder = PromptEncoder(trained.tokenizer)
    is_bytes = isinstance(trained.tokenizer, ByteTokenizer)

    def counted(tokens: torch.Tensor, places: slice) -> torch.Tensor:
        logits = logits_at(trained.model, tokens, places)
        bar.advance(tokens.numel(), checkpoint.label)
        return logits

    for attention, task, length in plan:
        trained.model.use_attention(attention)
        yield [
            measure_cell(
                counted,
                encoder,
                task,
                length,
                depth / 100,
                options.trials,
                attention,
                fitting(section, attention),
                options.seed,
                options.batch_tokens,
                options.device,
                None if is_bytes else trained.tokenizer.decode,
            )
            for depth in options.depths
        ]


def write_tables(output: Path, record: dict[str, Any], checkpoints: list[Evaluated]) -> None:
    """Write results.json, and its cells as results.csv."""
    tables = [{**asdict(each), "path": str(each.path)} for each in checkpoints]
    text = json.dumps({**record, "checkpoints": tables}, indent=1)
    (output / "results.json").write_text(text + "\n")
    columns = ["label", "path", "step", "dense_steps", "trained_length"]
    rows = [
        {**{column: table[column] for column in columns}, **cell}
        for table in tables
        for cell in table["cells"]
    ]
    write_csv(rows, output / "results.csv")


def plot(output: Path, checkpoints: list[Evaluated], task: str) -> None:
    """Heat maps, depth over length: a row for each checkpoint, a column for each attention."""
    cells = [cell for cell in checkpoints[0].cells if cell.task == task]
    attentions = list(dict.fromkeys(cell.attention for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    figure = new_figure(
        width=2.5 + len(attentions) * max(3.0, 0.9 * len(lengths)),
        height=0.5 + len(checkpoints) * (1.3 + 0.35 * len(depths)),
    )
    axes = figure.subplots(len(checkpoints), len(attentions), squeeze=False)
    for checkpoint, row in zip(checkpoints, axes, strict=True):
        for axis, attention in zip(row, attentions, strict=True):
            values = {(c.depth, c.length): c.accuracy for c in checkpoint.cells
                      if (c.task, c.attention) == (task, attention)}  # fmt: skip
            grid = [[values[depth, length] for length in lengths] for depth in depths]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8,
                              color="black" if value > BRIGHT else "white")  # fmt: skip
            axis.set_xticks(range(len(lengths)), [length_name(n) for n in lengths])
            axis.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
            axis.set(xlabel="prompt length (tokens)", ylabel="depth of the needle (%)")
            axis.set_title(f"{checkpoint.label}\n{attention} attention", fontsize=8)
    figure.suptitle(task, fontsize=10)
    figure.colorbar(image, ax=axes, label=f"exact match of {cells[0].trials} trials; "
                    f"chance {cells[0].chance:g}")  # fmt: skip
    save(figure, output / f"{task}.png")
