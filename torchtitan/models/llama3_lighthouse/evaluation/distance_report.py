"""What far context is worth to several checkpoints, as tables and a plot."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checks.output import check_output
from .bootstrap import bootstrap
from .distance import (
    DEFAULT_CONTEXTS,
    DistanceSettings,
    Plan,
    Summary,
    Value,
    fitting,
    measure_documents,
    plan_of,
    summarise,
    tokens_read,
)
from .distance_text import held_out_sequences
from .figures import length_axis, new_figure, run_styles, save
from .held_out_loss import with_held_out_text
from .inference import TrainedModel, load_trained_model, recorded_config
from .progress import Progress, say, say_what_was_written
from .side_by_side import (
    Evaluated,
    ReportOptions,
    draw_curve,
    minus_first,
    named_checkpoints,
    same_text,
    write_record,
)
from .tables import Row, write_csv

INTERVAL = "95%, bootstrap over documents"
# Measure and quantity of each panel of the plot, and its axes.
PANELS = (
    ("position", "context, tokens (upper end of each bucket)", "held-out loss"),
    ("beyond", "last tokens of context that are kept", "loss that the shorter context adds"),
    ("repeated", "distance of the repeated passage, tokens", "gain from its first occurrence"),
)


@dataclass(frozen=True)
class DistanceOptions(ReportOptions):
    """Options of an evaluation."""

    settings: DistanceSettings = field(default_factory=DistanceSettings)


@dataclass(frozen=True)
class Measured(Evaluated):
    """A checkpoint under one attention, with its numbers."""

    values: list[Value]


def report_distance(options: DistanceOptions, overrides: list[str]) -> None:
    """Measure checkpoints; write tables, record and plot, and print the main numbers.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    paths, labels = named_checkpoints(options.checkpoints, options.labels)
    texts = [with_held_out_text(path, overrides) for path in paths]
    configs = [recorded_config(path, text) for path, text in zip(paths, texts, strict=True)]
    text = same_text(paths, configs)
    plan = plan_of(options.settings, text["validation.seq_len"])
    check_output(options.output)
    if options.settings.contexts is None and (
        left_out := [each for each in DEFAULT_CONTEXTS if each not in plan.contexts]
    ):
        say(f"more than half of validation.seq_len = {plan.length}, so left out: contexts of "
            f"{', '.join(f'{each:,}' for each in left_out)} tokens (--contexts)")  # fmt: skip
    measured: list[Measured] = []
    for path, label, own in zip(paths, labels, texts, strict=True):
        measured += _measured(path, label, options, plan, own)
    rows = rows_of(measured)
    write_csv(rows, options.output / "distance.csv")
    write_csv(_document_rows(measured), options.output / "distance_documents.csv")
    _write_record(rows, measured, plan, text, options)
    for row in rows:
        if row["measure"] in ("loss", "beyond", "repeated") and not row["quantity"]:
            print(_line(row))
    if options.plots:
        plot(rows, options.output / "distance.png")
    names = ("distance.csv", "distance_documents.csv", "distance.json", "distance.png")
    say_what_was_written(options.output, *names)


def _measured(
    path: Path, label: str, options: DistanceOptions, plan: Plan, overrides: list[str]
) -> list[Measured]:
    """A checkpoint under each attention; the model is in memory only during this call."""
    trained = load_trained_model(path, overrides, options.device, getattr(torch, options.dtype))
    settings = options.settings
    documents = held_out_sequences(
        trained.config, trained.tokenizer, settings.documents, settings.sequences
    )
    if len(documents) < settings.documents:
        say(f"{label}: {len(documents)} held-out documents have more than {plan.length:,} tokens, "
            f"and {settings.documents} were asked for (--documents)")  # fmt: skip
    return [
        _under(trained, label, attention, settings, plan, documents)
        for attention in options.attention
    ]


def _under(
    trained: TrainedModel,
    label: str,
    attention: str,
    settings: DistanceSettings,
    plan: Plan,
    documents: list[torch.Tensor],
) -> Measured:
    config = trained.config
    total = tokens_read(documents, plan, fitting(config.lighthouse, attention))
    with Progress(f"{label}, {attention}", total, "tokens", scaled=True) as bar:
        values = measure_documents(
            trained.model, trained.tokenizer, config, attention, settings,
            lambda tokens: bar.advance(tokens, ""), documents,
        )  # fmt: skip
    return Measured.of(trained, label, attention, values)


def rows_of(measured: list[Measured]) -> list[Row]:
    """A row for each number of each checkpoint; all but the first have paired differences."""
    references: dict[str, dict[str, Summary]] = {}
    rows = []
    for each in measured:
        summaries = summarise(each.values)
        reference = references.setdefault(each.attention, summaries)
        for key, summary in summaries.items():
            first, estimate = summary.first, summary.estimate
            row: Row = {
                "checkpoint": each.checkpoint, "attention": each.attention,
                "measure": first.measure, "tokens": first.tokens, "quantity": first.quantity,
                "value": estimate.mean, "low": estimate.low, "high": estimate.high,
                "documents": len(summary.by_document), "targets": summary.targets,
            }  # fmt: skip
            if reference is not summaries:
                other = reference[key].by_document
                change = bootstrap(
                    [value - other[document] for document, value in summary.by_document.items()]
                )
                row |= minus_first(change)
            rows.append(row)
    return rows


def _document_rows(measured: list[Measured]) -> list[Row]:
    return [
        {"checkpoint": each.checkpoint, "attention": each.attention, **asdict(value)}
        for each in measured
        for value in each.values
    ]


def _write_record(
    rows: list[Row],
    measured: list[Measured],
    plan: Plan,
    text: dict[str, Any],
    options: DistanceOptions,
) -> None:
    """Write distance.json."""
    filled_in = {"contexts": plan.contexts, "distances": plan.distances, "passage": plan.passage}
    settings = {**asdict(options.settings), **filled_in}
    write_record(
        options.output / "distance.json", measured, options.device, options.dtype,
        {"interval": INTERVAL, "text": text, "settings": settings}, {"numbers": rows},
    )  # fmt: skip


def _line(row: Row) -> str:
    """A main number as a sentence."""
    tokens = row["tokens"]
    meaning = {
        "loss": "loss",
        "beyond": f"context beyond {tokens:,} tokens is worth" if tokens else "",
        "repeated": f"a passage {tokens:,} tokens earlier is worth" if tokens else "",
    }[row["measure"]]
    interval = f" ({row['low']:.4f} to {row['high']:.4f})" if row["low"] is not None else ""
    change = f", {row['minus first']:+.4f} from the first" if "minus first" in row else ""
    name = f"{row['checkpoint']}, {row['attention']}"
    return f"{name}: {meaning} {row['value']:.4f}{interval}{change}"


def plot(rows: list[Row], path: Path) -> None:
    """A panel for each measure, a line for each checkpoint and attention, with intervals."""
    panels = [panel for panel in PANELS if any(row["measure"] == panel[0] for row in rows)]
    figure = new_figure(width=5.0 * len(panels), height=4.5)
    style_of = run_styles(list(dict.fromkeys(row["checkpoint"] for row in rows)))
    curves = list(dict.fromkeys((row["checkpoint"], row["attention"]) for row in rows))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (measure, x_label, y_label) in zip(axes, panels, strict=True):
        lengths: list[int] = []
        for checkpoint, attention in curves:
            points = [
                row for row in rows
                if (row["checkpoint"], row["attention"]) == (checkpoint, attention)
                and row["measure"] == measure and not row["quantity"]
            ]  # fmt: skip
            lengths = [row["tokens"] for row in points]
            label = checkpoint if axis is axes[0] else None
            draw_curve(axis, points, ("tokens", "value"), style_of[checkpoint], label, 0.12)
        length_axis(axis, lengths)
        axis.set(xlabel=x_label, ylabel=f"{y_label},\nnats per token, 95% interval")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", fontsize=8, ncols=2)
    save(figure, path)
