"""Checkpoints side by side: the parts that reports of their losses share."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from ..environment import environment
from ..errors import UserValueError
from ..job_config import JobConfig
from .held_out_loss import Estimate, check_text, text_identity
from .inference import TrainedModel, find_checkpoint, labels_of
from .tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report.

    Attributes:
        checkpoints: as in ``inference.find_checkpoint``.
        attention: "dense", "lighthouse" or both.
        labels: a name for each checkpoint; None: run and step.
        dtype: name of the weights' dtype in torch.
    """

    checkpoints: list[Path]
    output: Path
    device: str
    attention: list[str]
    labels: list[str] | None = None
    dtype: str = "float32"
    plots: bool = True


@dataclass(frozen=True)
class Evaluated:
    """A checkpoint under one attention.

    Attributes:
        step, dense_steps: taken from the checkpoint's record; None if it has none.
    """

    checkpoint: str
    attention: str
    path: Path
    step: int | None
    dense_steps: int | None

    @classmethod
    def of(cls, trained: TrainedModel, label: str, attention: str, *found: Any) -> Self:
        """``trained`` under the name ``label``, with what was ``found`` of it."""
        record = trained.record
        step, dense_steps = (record.step, record.dense_steps) if record else (None, None)
        return cls(label, attention, trained.path, step, dense_steps, *found)


def named_checkpoints(
    checkpoints: list[Path], labels: list[str] | None
) -> tuple[list[Path], list[str]]:
    """The step-N folders, and a name for each: as given, or run and step.

    Raises:
        ValueError: there is no such checkpoint, one comes twice, or the names do not fit.
    """
    count = len(checkpoints)
    if labels and (len(labels) != count or len(set(labels)) != count):
        raise UserValueError(
            f"--labels must be {count} different names, one for each checkpoint, got "
            f"{', '.join(labels)}"
        )
    paths = [find_checkpoint(path) for path in checkpoints]
    if len(set(paths)) < len(paths):
        raise UserValueError("two of the checkpoints are the same; name each once")
    return paths, labels or labels_of(paths)


def same_text(paths: list[Path], configs: list[JobConfig]) -> dict[str, Any]:
    """Check that checkpoints are evaluated on the same tokens; return their ``text_identity``.

    Args:
        configs: one for each of ``paths``.

    Raises:
        ValueError: the tokens differ, or there is no text.
    """
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


def minus_first(change: Estimate) -> Row:
    """The cells of a row that say how it differs from the first checkpoint's."""
    return {
        "minus first": change.mean,
        "minus first, low": change.low,
        "minus first, high": change.high,
    }


def write_record(
    path: Path,
    evaluated: Sequence[Evaluated],
    device: str,
    dtype: str,
    before: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """Write the record of an evaluation as JSON.

    Args:
        device, dtype: names in torch.
        before: further entries, before those of the checkpoints.
        results: entries after them.
    """
    record = {
        "unit": "nats per token",
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "CPU",
        "dtype": dtype,
        **environment(),
        **before,
        "checkpoints": [
            {
                "checkpoint": each.checkpoint,
                "attention": each.attention,
                "path": str(each.path),
                "step": each.step,
                "dense steps": each.dense_steps,
            }
            for each in evaluated
        ],
        **results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def draw_curve(
    axis: "Axes",
    points: Sequence[Row],
    columns: tuple[str, str],
    style: tuple[Any, str],
    label: str | None,
    band: float,
) -> None:
    """Draw one checkpoint's rows as a line, dashed under Lighthouse attention.

    Args:
        columns: those of the two coordinates.
        style: colour and marker.
        label: None keeps the line out of the legend.
        band: opacity of the intervals' band, which is drawn where all rows have intervals; 0 for
            none.
    """
    (colour, marker), dense = style, points[0]["attention"] == "dense"
    x, y, low, high = ([row[key] for row in points] for key in (*columns, "low", "high"))
    if label is not None and not dense:
        label += " (Lighthouse)"
    axis.plot(
        x, y, f"{marker}{'-' if dense else '--'}", color=colour, label=label, markersize=4
    )  # fmt: skip
    if band and None not in low:
        axis.fill_between(x, low, high, color=colour, alpha=band, linewidth=0)
