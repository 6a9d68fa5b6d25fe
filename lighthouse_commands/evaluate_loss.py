#!/usr/bin/env python3
"""Held-out loss of checkpoints by the length of the context, side by side.

    python scripts/evaluate_loss.py outputs/a outputs/b/checkpoint/step-900 --output losses

A checkpoint is a step-N folder, a folder of them or a run's job.dump_folder, of which the last one
is taken. The text is what its run validated on; further arguments, --section.key value, override
the recorded configuration of every checkpoint and come last:

    --validation.enable --validation.dataset c4_local --validation.dataset_path FOLDER
    --validation.seq_len 16384 --validation.local_batch_size 1 --validation.steps 32

Losses are in nats per token. Positions fall into buckets by their tokens of context: 1 to 256, 257
to 512, and so on, doubling up to the whole sequence. Intervals are 95%, normal, over sequences,
which are taken as independent. All checkpoints see the same sequences, so the difference from the
first one has an interval of its own, over the differences within sequences.

Under "lighthouse" with lighthouse.entry_score = "max", selection tells of later tokens, and those
losses are not to be compared with losses under "dense" (docs/selection.md).

Writes to OUTPUT: losses.csv, losses.json and, unless --no-plots, losses.png, which needs the extra
"benchmark" (pip install -e '.[benchmark]').
"""

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch

from lighthouse_commands.arguments import (
    check_device,
    check_plots,
    command_parser,
    parse_with_overrides,
    run_command,
)
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.evaluation.held_out_loss import (
    bucket_means,
    check_text,
    context_buckets,
    estimate,
    evaluate,
    text_identity,
)
from torchtitan.models.llama3_lighthouse.evaluation.inference import (
    find_checkpoint,
    load_trained_model,
    recorded_config,
    run_of,
)
from torchtitan.models.llama3_lighthouse.hugging_face.format import DTYPES

SECONDS_BETWEEN_LINES = 10.0
INTERVAL = "95%, normal, over sequences"


def labels_of(paths: list[Path]) -> list[str]:
    """Short names that tell checkpoints apart: run and step, or the whole path."""
    short = []
    for path in paths:
        short.append(f"{run_of(path).name}, {path.name.replace('-', ' ')}")
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def check_same_text(paths: list[Path], overrides: list[str]) -> dict[str, Any]:
    """Check that all checkpoints are evaluated on the same tokens; return what those depend on.

    Raises:
        ValueError, TypeError, OSError: they are not, or a configuration is wrong.
    """
    configs = [recorded_config(path, overrides) for path in paths]
    first, *others = [text_identity(config) for config in configs]
    for path, identity in zip(paths[1:], others, strict=True):
        for key, value in identity.items():
            if value != first[key]:
                raise UserValueError(
                    f"{paths[0]} and {path} differ in {key}: {first[key]} and {value}; pass it as "
                    "--section.key VALUE for both"
                )
    check_text(configs[0])
    return first


def evaluate_checkpoint(
    path: Path, label: str, overrides: list[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A curve for each attention: its label, the checkpoint, and losses [sequences, N]."""
    trained = load_trained_model(path, overrides, arguments.device, DTYPES[arguments.dtype])
    record = trained.record
    curves = []
    for attention in arguments.attention:
        shown = 0.0

        def show(batch: int, batches: int | None, loss: float, attention=attention) -> None:
            nonlocal shown
            if time.monotonic() - shown > SECONDS_BETWEEN_LINES or batch == batches:
                of = f" of {batches}" if batches else ""
                print(f"{label}, {attention}: batch {batch}{of}, loss {loss:.4f}", flush=True)
                shown = time.monotonic()

        curves.append({
            "checkpoint": label, "attention": attention, "path": str(path),
            "step": record.step if record else None,
            "dense steps": record.dense_steps if record else None,
            "losses": evaluate(trained, attention, show),
        })  # fmt: skip
    return curves


def rows_of(curves: list[dict[str, Any]], buckets: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """A row for each curve and bucket, and one for all positions."""
    buckets = [*buckets, (1, buckets[-1][1])]
    references: dict[str, torch.Tensor] = {}
    rows = []
    for curve in curves:
        values = bucket_means(curve["losses"], buckets)
        reference = references.setdefault(curve["attention"], values)
        for number, (start, end) in enumerate(buckets):
            loss = estimate(values[:, number])
            row = {
                "checkpoint": curve["checkpoint"], "attention": curve["attention"],
                "context from": start, "context to": end,
                "loss": loss.mean, "low": loss.low, "high": loss.high,
                "sequences": int(values[:, number].isfinite().sum()),
            }  # fmt: skip
            if reference is not values:
                change = estimate(values[:, number] - reference[:, number])
                row |= {"minus first": change.mean, "minus first, low": change.low,
                        "minus first, high": change.high}  # fmt: skip
            rows.append(row)
    return rows


def write(
    rows: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    text: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """losses.csv and losses.json."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (arguments.output / "losses.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    record = {
        "unit": "nats per token", "interval": INTERVAL, "device": device,
        "dtype": arguments.dtype, "torch": torch.__version__, "text": text,
        "checkpoints": [{k: v for k, v in curve.items() if k != "losses"} for curve in curves],
        "losses": rows,
    }  # fmt: skip
    (arguments.output / "losses.json").write_text(json.dumps(record, indent=1) + "\n")


def plot(rows: list[dict[str, Any]], curves: list[dict[str, Any]], path: Path) -> None:
    """Loss over tokens of context, a line for each curve, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    names = list(dict.fromkeys(curve["checkpoint"] for curve in curves))
    colours = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    per_curve = len(rows) // len(curves)
    for number, curve in enumerate(curves):
        # The last one is of all positions.
        points = rows[number * per_curve : (number + 1) * per_curve - 1]
        colour = colours[names.index(curve["checkpoint"]) % len(colours)]
        dense = curve["attention"] == "dense"
        label = curve["checkpoint"] + ("" if dense else " (Lighthouse)")
        ends, losses = ([row[key] for row in points] for key in ("context to", "loss"))
        axis.plot(ends, losses, "o-" if dense else "s--", color=colour, label=label, markersize=4)
        if all(row["low"] is not None for row in points):
            low, high = ([row[key] for row in points] for key in ("low", "high"))
            axis.fill_between(ends, low, high, color=colour, alpha=0.15, linewidth=0)
    ends = [row["context to"] for row in rows[: per_curve - 1]]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ends, [f"{end:,}" for end in ends], minor=False)
    axis.set(xlabel="context, tokens (upper end of each bucket)",
             ylabel="held-out loss, nats per token, 95% interval")  # fmt: skip
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--attention", nargs="+", choices=["dense", "lighthouse"],
                        default=["dense"], help="to evaluate under; default: dense")  # fmt: skip
    parser.add_argument("--first-bucket", type=int, default=256, help="tokens; default: 256")
    parser.add_argument("--labels", nargs="+", help="name of each checkpoint, in their order")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--no-plots", action="store_true")
    arguments, overrides = parse_with_overrides(parser)
    check_plots(arguments.no_plots)
    check_device(arguments.device)
    labels, count = arguments.labels, len(arguments.checkpoints)
    if labels and (len(labels) != count or len(set(labels)) != count):
        raise UserValueError(f"--labels must be {count} different names, got {', '.join(labels)}")
    return arguments, overrides


def evaluate_checkpoints() -> None:
    """What the command does.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    arguments, overrides = parse_arguments()
    arguments.attention = list(dict.fromkeys(arguments.attention))
    paths = [find_checkpoint(path) for path in arguments.checkpoints]
    if len(set(paths)) < len(paths):
        raise UserValueError("two of the checkpoints are the same; name each once")
    text = check_same_text(paths, overrides)
    buckets = context_buckets(text["validation.seq_len"], arguments.first_bucket)
    arguments.output.mkdir(parents=True, exist_ok=True)
    curves = []
    for path, label in zip(paths, arguments.labels or labels_of(paths), strict=True):
        curves += evaluate_checkpoint(path, label, overrides, arguments)
    rows = rows_of(curves, buckets)
    write(rows, curves, text, arguments)
    for row in rows[len(buckets) :: len(buckets) + 1]:
        interval = f" ({row['low']:.4f} to {row['high']:.4f})" if row["low"] is not None else ""
        change = f", {row['minus first']:+.4f} from the first" if "minus first" in row else ""
        print(f"{row['checkpoint']}, {row['attention']}: {row['loss']:.4f}{interval}{change}")
    if not arguments.no_plots:
        plot(rows, curves, arguments.output / "losses.png")


def main() -> None:
    run_command(evaluate_checkpoints, "nothing was written")


if __name__ == "__main__":
    main()
