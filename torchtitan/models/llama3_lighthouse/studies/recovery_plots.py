"""Plots of a recovery study."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.figures import DENSE, LIGHTHOUSE, colours, mark_switches, new_figure, save
from .recovery_results import History, Track, minus_dense

LIGHTHOUSE_STAGE = "Lighthouse stage"
# Markers of the seeds.
MARKERS = "osv^D*"
TOKENS, LOSS = "tokens, millions", "loss, nats per token"
MINUS_DENSE = "Held-out loss less that of dense training with the same seed"


@dataclass(frozen=True)
class Part:
    """Steps of a history that a plot draws as one line.

    Attributes:
        name: the name in the legend.
        steps: the steps that it draws.
    """

    name: str
    seed: int
    history: History
    steps: range

    @property
    def is_lighthouse(self) -> bool:
        return self.name == LIGHTHOUSE_STAGE


def parts_of(tracks: list[Track], histories: list[History]) -> list[Part]:
    """The steps of each model that no other shares, and for each seed the stage they share."""
    parts = []
    for seed in dict.fromkeys(track.seed for track in tracks):
        own = [(t, h) for t, h in zip(tracks, histories, strict=True) if t.seed == seed]
        trunk = max((history for _, history in own), key=lambda history: history.switch)
        if trunk.switch:
            parts.append(Part(LIGHTHOUSE_STAGE, seed, trunk, range(1, trunk.switch + 1)))
        for track, history in own:
            steps = range(track.runs[-1].start + 1, len(history.losses) + 1)
            parts.append(Part(track.name, seed, history, steps))
    return parts


@dataclass(frozen=True)
class Line:
    """The drawing of one model: a dot at each validation, and its training loss in pale.

    Attributes:
        x, values: places and values of the dots.
        training: places and values of the smoothed training loss; None draws none.
    """

    name: str
    seed: int
    x: list[float]
    values: list[float]
    training: tuple[list[float], list[float]] | None = None

    @property
    def is_lighthouse(self) -> bool:
        return self.name == LIGHTHOUSE_STAGE


def plot(tracks: list[Track], histories: list[History], output: Path) -> None:
    """Draw loss_over_tokens.png, loss_over_time.png and minus_dense.png."""
    parts = parts_of(tracks, histories)
    longest = max(history.seconds[-1] for history in histories)
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60)
    held_out = [part.history.held_out for part in parts]
    switched = [history for history in histories if history.switch]
    for file, label, x_of in (
        ("loss_over_tokens.png", TOKENS, _millions),
        ("loss_over_time.png", f"training time, {unit}",
         lambda history: [s / seconds for s in history.seconds]),
    ):  # fmt: skip
        lines = _lines(parts, held_out, x_of, with_training=True)
        switches = [x_of(history)[history.switch - 1] for history in switched]
        title = "Held-out loss; pale: training loss, trailing mean"
        draw(output / file, lines, title, (label, LOSS), switches)

    # A shorter control decays earlier than the dense run at equal tokens, so it is left out.
    shorter = {track.name for track in tracks if track.is_shorter}
    compared = [part for part in parts if part.name not in shorter]
    controls = {track.seed: history for track, history in zip(tracks, histories, strict=True)
                if track.is_control}  # fmt: skip
    gaps = [minus_dense(part.history, controls[part.seed]) for part in compared]
    lines = _lines(compared, gaps, _millions, with_training=False)
    switches = [_millions(history)[history.switch - 1] for history in switched]
    draw(output / "minus_dense.png", lines, MINUS_DENSE, (TOKENS, "nats per token"), switches)


def _millions(history: History) -> list[float]:
    return [n / 1e6 for n in history.tokens]


def _lines(
    parts: list[Part],
    values: list[dict[int, float]],
    x_of: Callable[[History], list[float]],
    with_training: bool,
) -> list[Line]:
    """A line for each part, with a dot for each of its ``values`` (step to value)."""
    lines = []
    for part, of_part in zip(parts, values, strict=True):
        x = x_of(part.history)
        steps = [step for step in part.steps if step in of_part]
        training = None
        if with_training:
            drawn = slice(part.steps[0] - 1, part.steps[-1])
            training = x[drawn], part.history.smoothed()[drawn]
        dots = [x[step - 1] for step in steps], [of_part[step] for step in steps]
        lines.append(Line(part.name, part.seed, *dots, training))
    return lines


def draw(
    path: Path,
    lines: list[Line],
    title: str,
    labels: tuple[str, str],
    switches: Iterable[float],
) -> None:
    """Draw the lines, and mark the places of ``switches``, where dense stages begin."""
    names = list(dict.fromkeys(line.name for line in lines))
    seeds = list(dict.fromkeys(line.seed for line in lines))
    colour_of = _colours_of(names)
    figure = new_figure(height=5.5)
    axis = figure.subplots()
    for line in lines:
        colour, marker = colour_of[line.name], MARKERS[seeds.index(line.seed) % len(MARKERS)]
        if line.training is not None:
            axis.plot(*line.training, color=colour, linewidth=0.8, alpha=0.3)
        axis.plot(line.x, line.values, f"{marker}-", color=colour,
                  markerfacecolor="none" if line.is_lighthouse else colour, markersize=4,
                  linewidth=0.9, label=line.name if line.seed == seeds[0] else None)  # fmt: skip
    for number, seed in enumerate(seeds):
        axis.plot([], [], MARKERS[number % len(MARKERS)], color="black", markersize=4,
                  label=f"seed {seed}")  # fmt: skip
    mark_switches(axis, switches)
    axis.set(xlabel=labels[0], ylabel=labels[1], ylim=_limits(lines))
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


def _colours_of(names: list[str]) -> dict[str, Any]:
    """A colour for each name, the same in all plots of a study."""
    # The palette begins with the two colours that are taken.
    free = colours(10)[2:]
    splits = sorted(name for name in names if name.startswith("split"))
    found = {"dense": DENSE, LIGHTHOUSE_STAGE: LIGHTHOUSE}
    found |= {name: free[n % len(free)] for n, name in enumerate(splits)}
    # The others are dense runs of fewer steps.
    shades = ("deepskyblue", "navy", "slategrey")
    others = [name for name in names if name not in found]
    return found | {name: shades[n % len(shades)] for n, name in enumerate(others)}


def _limits(lines: list[Line]) -> tuple[float, float]:
    """Limits that leave out the steep fall of the first sixth, and nothing after it."""
    begin = max(max(line.x) for line in lines if line.x) / 6
    shown = [
        value
        for line in lines
        for x, values in ((line.x, line.values), line.training or ([], []))
        for place, value in zip(x, values, strict=True)
        if place >= begin
    ]
    margin = 0.05 * (max(shown) - min(shown)) + 1e-6
    return min(shown) - margin, max(shown) + margin
