"""Held-out losses of several checkpoints as a table and a plot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checks.output import check_output
from .figures import length_axis, new_figure, run_styles, save
from .held_out_loss import (
    bucket_means,
    context_buckets,
    estimate,
    evaluate,
    span_of,
)
from .inference import (
    TrainedModel,
    load_trained_model,
    recorded_config,
)
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

# Curves of a plot up to which intervals are drawn.
MOST_BANDS = 4
INTERVAL = "95%, normal, over sequences"
# Context is counted within these, without masks and with them.
CONTEXTS = ("sequence", "document")


@dataclass(frozen=True)
class LossOptions(ReportOptions):
    """Options of an evaluation.

    Attributes:
        first_bucket: tokens of context in the first bucket.
    """

    first_bucket: int = 256


@dataclass(frozen=True)
class Curve(Evaluated):
    """Losses of one checkpoint under one attention.

    Attributes:
        masked: whether the model kept documents apart.
        losses: nats, float32 [sequences, N]; NaN where there is no label.
        context: tokens of context, integers of the same shape and the same for all curves.
    """

    masked: bool
    losses: torch.Tensor
    context: torch.Tensor


def report_losses(options: LossOptions, overrides: list[str]) -> None:
    """Evaluate checkpoints; write losses.csv, losses.json and losses.png, and print the means.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    paths, labels = named_checkpoints(options.checkpoints, options.labels)
    configs = [recorded_config(path, overrides) for path in paths]
    text = same_text(paths, configs)
    spans = [
        span_of(path, config, options.attention)
        for path, config in zip(paths, configs, strict=True)
    ]
    # Spans are powers of two, so documents that lie at multiples of the largest suit all.
    span = max(spans)
    buckets = context_buckets(text["validation.seq_len"], options.first_bucket)
    check_output(options.output)
    _say_layout(labels, spans)
    curves: list[Curve] = []
    for path, label in zip(paths, labels, strict=True):
        curves += _curves(path, label, options, overrides, span)
    rows = rows_of(curves, buckets, CONTEXTS[span > 0])
    _write(rows, curves, {**text, "documents begin at multiples of": span or None}, options)
    # The last row of each curve covers all positions.
    for row in rows[len(rows) // len(curves) - 1 :: len(rows) // len(curves)]:
        interval = f" ({row['low']:.4f} to {row['high']:.4f})" if row["low"] is not None else ""
        change = f", {row['minus first']:+.4f} from the first" if "minus first" in row else ""
        print(f"{row['checkpoint']}, {row['attention']}: {row['loss']:.4f}{interval}{change}")
    if options.plots:
        plot(rows, options.output / "losses.png")
    say_what_was_written(options.output, "losses.csv", "losses.json", "losses.png")


def _say_layout(labels: list[str], spans: list[int]) -> None:
    """Say how documents lie, and which of the checkpoints see all of them."""
    if not any(spans):
        return
    line = (
        f"documents begin at multiples of {max(spans)} positions, and context is counted within "
        "them; they do not see each other"
    )
    if without := [label for label, span in zip(labels, spans, strict=True) if not span]:
        line += f"; without masks, these see all of them and the padding too: {'; '.join(without)}"
    say(line)


def _curves(
    path: Path, label: str, options: LossOptions, overrides: list[str], span: int
) -> list[Curve]:
    """A curve for each attention; the model is in memory only during this call."""
    dtype = getattr(torch, options.dtype)
    trained = load_trained_model(path, overrides, options.device, dtype, masks=True)
    return [_curve(trained, label, attention, span) for attention in options.attention]


def _curve(trained: TrainedModel, label: str, attention: str, span: int) -> Curve:
    steps = trained.config.validation.steps
    with Progress(f"{label}, {attention}", None if steps < 0 else steps, "batches") as bar:
        losses, context = evaluate(
            trained, attention, span, lambda batches, loss: bar.advance(1, f"loss {loss:.4f}")
        )
    masked = trained.config.training.document_mask
    return Curve.of(trained, label, attention, masked, losses, context)


def rows_of(curves: list[Curve], buckets: list[tuple[int, int]], context_in: str) -> list[Row]:
    """For each curve a row for each bucket that holds positions, and then one for all positions.

    Args:
        context_in: one of ``CONTEXTS``.
    """
    _, counts = bucket_means(curves[0].losses, buckets, curves[0].context)
    everything = (1, buckets[-1][1])
    held = counts.sum(dim=0).tolist()
    buckets = [bucket for bucket, count in zip(buckets, held, strict=True) if count]
    buckets.append(everything)
    references: dict[str, torch.Tensor] = {}
    rows = []
    for curve in curves:
        values, counts = bucket_means(curve.losses, buckets, curve.context)
        reference = references.setdefault(curve.attention, values)
        for number, (start, end) in enumerate(buckets):
            weights = counts[:, number]
            loss = estimate(values[:, number], weights)
            row = {
                "checkpoint": curve.checkpoint, "attention": curve.attention,
                "document mask": curve.masked, "context in": context_in,
                "context from": start, "context to": end,
                "loss": loss.mean, "low": loss.low, "high": loss.high,
                "sequences": int(values[:, number].isfinite().sum()), "tokens": int(weights.sum()),
            }  # fmt: skip
            if reference is not values:
                change = estimate(values[:, number] - reference[:, number], weights)
                row |= minus_first(change)
            rows.append(row)
    return rows


def _write(
    rows: list[Row], curves: list[Curve], text: dict[str, Any], options: LossOptions
) -> None:
    """Write losses.csv and losses.json."""
    write_csv(rows, options.output / "losses.csv")
    write_record(
        options.output / "losses.json", curves, options.device, options.dtype,
        {"interval": INTERVAL, "text": text}, {"losses": rows},
    )  # fmt: skip


def plot(rows: list[Row], path: Path) -> None:
    """Loss over tokens of context, a line for each checkpoint and attention, with intervals."""
    figure = new_figure()
    axis = figure.subplots()
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        curves.setdefault((row["checkpoint"], row["attention"]), []).append(row)
    names = list(dict.fromkeys(checkpoint for checkpoint, _ in curves))
    style_of = run_styles(names)
    # Bands of more curves would make one grey.
    with_bands = len(curves) <= MOST_BANDS
    ends: list[int] = []
    for (checkpoint, _), whole in curves.items():
        # The last row of each curve covers all positions.
        points = whole[:-1]
        ends = [row["context to"] for row in points]
        band = 0.15 if with_bands else 0
        draw_curve(axis, points, ("context to", "loss"), style_of[checkpoint], checkpoint, band)
    length_axis(axis, ends)
    # Records from before document masks do not say so.
    within = rows[0].get("context in", CONTEXTS[0])
    axis.set(xlabel=f"context in the {within}, tokens (upper end of each bucket)",
             ylabel=f"held-out loss, nats per token{', 95% interval' if with_bands else ''}",
             )  # fmt: skip
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", fontsize=8, ncols=2)
    save(figure, path)
