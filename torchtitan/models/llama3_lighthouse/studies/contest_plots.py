"""Plots of a contest, drawn from its CSV files."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.figures import colours, length_axis, new_figure, save
from ..evaluation.held_out_loss import Estimate
from .contest_data import GPU_SECONDS
from .contest_file import RETRIEVAL, VALIDATION
from .contest_results import Results
from .contest_statistics import t_interval

LOSS = "held-out loss, nats per token"
DISTANCE = "tokens back to where the passage stood"
RETURNED = "loss of returning passages, nats per token"
# Name, places on the x axis, and estimates there.
Line = tuple[str, list[float], list[Estimate]]


def primary(results: Results, path: Path) -> None:
    """Draw the primary measure of each arm: a ring for each seed, the mean, and its interval."""
    measure = results.contest.primary
    arms = [arm for arm in results.contest.arms if results.seeds(arm, measure)]
    figure = new_figure(9, 1 + 0.4 * len(arms))
    axis = figure.subplots()
    by_arm(axis, results, {arm: (arm, c) for arm, c in zip(arms, colours(len(arms)), strict=True)})
    shown = LOSS if measure in ("loss", VALIDATION) else measure
    axis.set(xlabel=f"{shown}; {results.contest.direction} is better")
    save(figure, path)


def by_arm(axis: Any, results: Results, arms: dict[str, tuple[str, Any]]) -> None:
    """Draw the primary measure into axes of matplotlib, a row for each arm.

    Args:
        arms: the name that is shown of each arm, and its colour, from top to bottom.
    """
    measure = results.contest.primary
    for place, (arm, (_, colour)) in enumerate(arms.items()):
        values = [results.value(arm, seed, measure) for seed in results.seeds(arm, measure)]
        found = t_interval(values, 0.95)
        axis.plot(values, [place] * len(values), "o", color=colour, markerfacecolor="none")
        axis.plot(found.mean, place, "|", color=colour, markersize=16)
        if found.low is not None and found.high is not None:
            axis.plot([found.low, found.high], [place, place], "-", color=colour, linewidth=1)
    axis.set_yticks(range(len(arms)), [name for name, _ in arms.values()])
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.grid(alpha=0.3)


def over_time(results: Results, path: Path) -> None:
    """Draw the held-out loss over GPU seconds, of the arms whose times are known."""
    lines: list[Line] = []
    for arm in results.contest.arms:
        curves = [results.curve(arm, seed) for seed in results.contest.seeds]
        if curves := [curve for curve in curves if curve]:
            count = min(map(len, curves))
            x = [statistics.fmean(curve[n][0] for curve in curves) for n in range(count)]
            y = [t_interval([curve[n][1] for curve in curves], 0.95) for n in range(count)]
            lines.append((arm, x, y))
    _draw(path, lines, (GPU_SECONDS, LOSS), by_length=False)


def by_position(results: Results, path: Path) -> None:
    """Draw the held-out loss by tokens of context."""
    lines = _over_lengths(results, ["position/*"])
    _draw(path, lines, ("tokens of context", LOSS), by_length=True)


def by_distance(results: Results, path: Path) -> None:
    """Draw the loss of passages that return, by the distance to where they stood before."""
    lines = distance_lines(results)
    _draw(path, lines, (DISTANCE, RETURNED), by_length=True)


def distance_lines(results: Results) -> list[Line]:
    """The loss of passages that return over the distance, a line for each arm."""
    return _over_lengths(results, ["repeated/*/loss"])


def retrieval(results: Results, path: Path) -> None:
    """Draw the accuracy of each task over the length of the prompt."""
    lines = _over_lengths(results, [f"{RETRIEVAL}{task}/*" for task in results.contest.retrieval])
    _draw(path, lines, ("tokens of the prompt", "share of answers right"), True, (-0.02, 1.02))


def _over_lengths(results: Results, kinds: Sequence[str]) -> list[Line]:
    """A line for each arm and each kind of measure; a kind has "*" in the place of a length."""
    lines: list[Line] = []
    for arm in results.contest.arms:
        for kind in kinds:
            found = {m: length for m in results.measures
                     if (length := _length(m, kind)) and results.seeds(arm, m)}  # fmt: skip
            y = [t_interval([results.value(arm, seed, m) for seed in results.seeds(arm, m)], 0.95)
                 for m in found]  # fmt: skip
            name = f"{arm}, {kind.split('/')[1]}" if len(kinds) > 1 else arm
            if found:
                lines.append((name, list(found.values()), y))
    return lines


def _length(measure: str, kind: str) -> float | None:
    before, after = kind.split("*")
    length = measure.removeprefix(before).removesuffix(after)
    return float(length) if length.isdigit() and measure == before + length + after else None


def _draw(
    path: Path,
    lines: list[Line],
    labels: tuple[str, str],
    by_length: bool,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw lines with bands for their intervals; nothing if there is no line."""
    if not lines:
        return
    figure = new_figure()
    axis = figure.subplots()
    for (name, x, estimates), colour in zip(lines, colours(len(lines)), strict=True):
        axis.plot(x, [each.mean for each in estimates], "o-", color=colour, markersize=3,
                  linewidth=1, label=name)  # fmt: skip
        low = np.array([math.nan if e.low is None else e.low for e in estimates])
        high = np.array([math.nan if e.high is None else e.high for e in estimates])
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if by_length:
        length_axis(axis, [place for _, x, _ in lines for place in x])
    if limits:
        # An interval by Student's t knows no bounds.
        axis.set_ylim(*limits)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


PLOTS: dict[str, Callable[[Results, Path], None]] = {
    "primary.png": primary,
    "loss_over_time.png": over_time,
    "loss_by_position.png": by_position,
    "loss_over_distance.png": by_distance,
    "retrieval_over_length.png": retrieval,
}
