#!/usr/bin/env python3
"""Ask trained models for what long prompts hide: a needle in a haystack.

    python scripts/evaluate_niah.py outputs/debug --output outputs/niah

Hides keys in random alphanumerics at given depths of prompts of given lengths, asks for them, and
counts right answers, with intervals at 95%. Tasks:

    passkey        a key of one digit
    long_passkey   a key of five digits
    several_keys   four named keys of one digit, one of them asked for
    variables      two chains of three variables, the end of one asked for

A checkpoint is a step-N folder, a folder of them, or a run's job.dump_folder (its last one). All
see the same prompts, those of one tokenizer to the token. Depth is the needle's: 0% is right after
BOS, 100% right before the question, if nothing else has to come between.

With --attention dense lighthouse the prompts also run under Lighthouse attention, on sequences
padded with random alphanumerics to the next length that Lighthouse takes, and plots show both.

Further arguments at the end, --section.key value, go to the configuration of every checkpoint; one
that was not written by Lighthouse's trainer needs --job.config_file FILE.

Writes to OUTPUT, after every length: results.csv, a row for each cell; results.json, the same with
settings, date, git revision and checkpoints; and at the end TASK.png, a heat map for each
checkpoint, which needs the extra "benchmark" (pip install -e '.[benchmark]').
"""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import environment

from lighthouse import LighthouseConfig
from lighthouse_commands.arguments import (
    check_device,
    check_plots,
    command_parser,
    parse_with_overrides,
    run_command,
)
from torchtitan.models.llama3_lighthouse.data.retrieval import (
    TASKS,
    PromptEncoder,
    Task,
    check_length,
    find_task,
)
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer, build_tokenizer
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.evaluation.inference import (
    find_checkpoint,
    load_trained_model,
    logits_at,
    recorded_config,
    run_of,
)
from torchtitan.models.llama3_lighthouse.evaluation.retrieval_accuracy import (
    Cell,
    measure_cell,
    sequence_length,
)
from torchtitan.models.llama3_lighthouse.model.model import lighthouse_config

ATTENTIONS = ("dense", "lighthouse")
# By default, prompts have these parts of the shortest training.seq_len of the checkpoints.
DEFAULT_PARTS = (8, 4, 2, 1)


@dataclass
class Evaluated:
    """A checkpoint and what came out."""

    label: str
    path: Path
    step: int | None
    dense_steps: int | None
    trained_length: int
    cells: list[Cell] = field(default_factory=list)


def parse_arguments(line: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK",
                        help=f"of {', '.join(TASKS)}; default: all")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS",
                        help="of prompts, the answer left out; default: an eighth, a quarter, a "
                        "half and the whole of the shortest training.seq_len")  # fmt: skip
    parser.add_argument("--depths", nargs="+", type=float, default=list(range(0, 101, 10)),
                        metavar="PERCENT", help="default: 0 10 20 ... 100")  # fmt: skip
    parser.add_argument("--trials", type=int, default=50, help="for each cell; default: 50")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["dense"],
                        help="attention to run under; default: dense")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; default: 0")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of weights; default: bfloat16 on cuda, float32 on cpu")  # fmt: skip
    parser.add_argument("--batch-tokens", type=int, default=65536,
                        help="in a batch, one sequence at least; default: 65536")  # fmt: skip
    parser.add_argument("--revision", help="to record; default: as git says")
    parser.add_argument("--no-plots", action="store_true", help="write tables alone")
    arguments, overrides = parse_with_overrides(parser, line)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    default_type = "bfloat16" if arguments.device.startswith("cuda") else "float32"
    arguments.dtype = arguments.dtype or default_type
    return arguments, overrides


def check(
    arguments: argparse.Namespace, overrides: list[str]
) -> list[tuple[Evaluated, LighthouseConfig]]:
    """The checkpoints and their methods, once all that can be known to be wrong is ruled out.

    Sets ``arguments.lengths`` if they were not given.

    Raises:
        ValueError, TypeError, OSError: something is wrong; the message says what and the fix.
    """
    check_plots(arguments.no_plots)
    check_device(arguments.device)
    for name in ("trials", "batch_tokens"):
        if (value := getattr(arguments, name)) < 1:
            raise UserValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if outside := [depth for depth in arguments.depths if not 0 <= depth <= 100]:
        raise UserValueError(f"--depths {outside[0]:g} is no depth; give percent from 0 to 100")
    tasks = [find_task(name) for name in arguments.tasks]

    found = {}
    for given in arguments.checkpoints:
        path = find_checkpoint(given).resolve()
        found[path] = recorded_config(path, overrides)
    shortest = min(config.training.seq_len for config in found.values())
    arguments.lengths = arguments.lengths or [shortest // part for part in DEFAULT_PARTS]
    for config in found.values():
        encoder = PromptEncoder(build_tokenizer(config))
        for task in tasks:
            for length in arguments.lengths:
                try:
                    check_length(encoder, task, length)
                except ValueError as error:
                    raise UserValueError(f"{error} (--lengths, --tasks)") from None
    arguments.output.mkdir(parents=True, exist_ok=True)
    labels = unique_labels(list(found))
    return [
        (
            Evaluated(label, path, None, None, config.training.seq_len),
            lighthouse_config(config.lighthouse),
        )
        for label, (path, config) in zip(labels, found.items(), strict=True)
    ]


def unique_labels(paths: list[Path]) -> list[str]:
    """Run and step of each checkpoint, as a file's name; a number tells equal ones apart."""
    labels = []
    for path in paths:
        label = f"{run_of(path).name}-{path.name}"
        labels.append(f"{label}-{len(labels)}" if label in labels else label)
    return labels


class Progress:
    """Says how much is done and left, by the tokens that have been run."""

    def __init__(self, total_tokens: int) -> None:
        self._total, self._done, self._start = total_tokens, 0, time.monotonic()

    def report(self, checkpoint: Evaluated, cells: list[Cell]) -> None:
        """Print a line for the cells, one for each depth, of a task at a length."""
        self._done += sum(cell.trials * cell.sequence_length for cell in cells)
        passed = time.monotonic() - self._start
        left = passed * (self._total / self._done - 1)
        accuracies = [cell.accuracy for cell in cells]
        print(
            f"{checkpoint.label}  {cells[0].attention}  {cells[0].task}  "
            f"{cells[0].length:,} tokens: "
            f"{statistics.fmean(accuracies):.0%} right ({min(accuracies):.0%} to "
            f"{max(accuracies):.0%} by depth); {self._done / self._total:.0%} done, about "
            f"{left / 60:.0f} min left",
            flush=True,
        )


Plan = list[tuple[str, Task, int]]


def evaluate(
    arguments: argparse.Namespace,
    overrides: list[str],
    checkpoints: list[Evaluated],
    methods: list[LighthouseConfig],
) -> None:
    """Measure every cell of every checkpoint, and write the tables as they grow."""
    plan = [
        (attention, find_task(name), length)
        for attention in arguments.attention
        for name in arguments.tasks
        for length in arguments.lengths
    ]
    tokens = sum(sequence_length(t, n, attention, m) for m in methods for attention, t, n in plan)
    progress = Progress(tokens * arguments.trials * len(arguments.depths))
    record = {
        "settings": settings_of(arguments, overrides),
        "device": arguments.device,
        **environment(arguments.revision),
    }
    for checkpoint, method in zip(checkpoints, methods, strict=True):
        for cells in evaluate_checkpoint(arguments, overrides, checkpoint, method, plan):
            checkpoint.cells += cells
            progress.report(checkpoint, cells)
            write_tables(arguments.output, record, checkpoints)


def evaluate_checkpoint(
    arguments: argparse.Namespace,
    overrides: list[str],
    checkpoint: Evaluated,
    method: LighthouseConfig,
    plan: Plan,
) -> Iterator[list[Cell]]:
    """Yield the cells, one for each depth, of each entry of the plan."""
    longest = max(sequence_length(task, n, attention, method) for attention, task, n in plan)
    if longest > checkpoint.trained_length:
        print(f"{checkpoint.label}: sequences of up to {longest:,} tokens are longer than those it "
              f"was trained on, {checkpoint.trained_length:,}")  # fmt: skip
    trained = load_trained_model(
        checkpoint.path,
        overrides,
        arguments.device,
        getattr(torch, arguments.dtype),
        max(longest, checkpoint.trained_length),
    )
    if trained.record:
        checkpoint.step = trained.record.step
        checkpoint.dense_steps = trained.record.dense_steps
    encoder = PromptEncoder(trained.tokenizer)
    is_bytes = isinstance(trained.tokenizer, ByteTokenizer)
    for attention, task, length in plan:
        trained.model.use_attention(attention)
        yield [
            measure_cell(
                lambda tokens, places: logits_at(trained.model, tokens, places),
                encoder,
                task,
                length,
                depth / 100,
                arguments.trials,
                attention,
                method,
                arguments.seed,
                arguments.batch_tokens,
                arguments.device,
                None if is_bytes else trained.tokenizer.decode,
            )
            for depth in arguments.depths
        ]


def settings_of(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    names = ("tasks", "lengths", "depths", "trials", "attention", "seed", "dtype", "batch_tokens")
    return {**{name: getattr(arguments, name) for name in names}, "overrides": overrides}


def write_tables(output: Path, record: dict[str, Any], checkpoints: list[Evaluated]) -> None:
    """results.json, and its cells as results.csv."""
    tables = [{**asdict(each), "path": str(each.path)} for each in checkpoints]
    text = json.dumps({**record, "checkpoints": tables}, indent=1)
    (output / "results.json").write_text(text + "\n")
    columns = ["label", "path", "step", "dense_steps", "trained_length"]
    rows = [
        {**{column: table[column] for column in columns}, **cell}
        for table in tables
        for cell in table["cells"]
    ]
    with (output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(output: Path, checkpoints: list[Evaluated], task: str) -> None:
    """Heat maps, depth over length: a row for each checkpoint, a column for each attention."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [cell for cell in checkpoints[0].cells if cell.task == task]
    attentions = list(dict.fromkeys(cell.attention for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    width = 2.5 + len(attentions) * max(3.0, 0.9 * len(lengths))
    height = 0.5 + len(checkpoints) * (1.3 + 0.35 * len(depths))
    figure, axes = plt.subplots(len(checkpoints), len(attentions), figsize=(width, height),
                                layout="constrained", squeeze=False)  # fmt: skip
    for checkpoint, row in zip(checkpoints, axes, strict=True):
        for axis, attention in zip(row, attentions, strict=True):
            values = {(c.depth, c.length): c.accuracy for c in checkpoint.cells
                      if (c.task, c.attention) == (task, attention)}  # fmt: skip
            grid = [[values[depth, length] for length in lengths] for depth in depths]
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8,
                              color="black" if value > 0.6 else "white")  # fmt: skip
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
            axis.set(xlabel="prompt length (tokens)", ylabel="depth of the needle (%)")
            axis.set_title(f"{checkpoint.label}\n{attention} attention", fontsize=8)
    figure.suptitle(task, fontsize=10)
    figure.colorbar(image, ax=axes, label=f"exact match of {cells[0].trials} trials; "
                    f"chance {cells[0].chance:g}")  # fmt: skip
    figure.savefig(output / f"{task}.png", dpi=120)
    plt.close(figure)


def ask(line: list[str] | None = None) -> None:
    """What the command does.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    arguments, overrides = parse_arguments(line)
    checkpoints, methods = zip(*check(arguments, overrides), strict=True)
    evaluate(arguments, overrides, checkpoints, methods)
    if not arguments.no_plots:
        for task in arguments.tasks:
            plot(arguments.output, checkpoints, task)
    print(f"written to {arguments.output}")


def main(line: list[str] | None = None) -> None:
    run_command(lambda: ask(line), "finished lengths are in OUTPUT; the command begins anew")


if __name__ == "__main__":
    main()
