"""Plots of a recovery study."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.figures import colours, new_figure, save
from .recovery_results import History, Track, minus_dense

LIGHTHOUSE_STAGE = "Lighthouse stage"
# Markers of the seeds.
MARKERS = "osv^D*"


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


def plot(tracks: list[Track], histories: list[History], output: Path) -> None:
    """Draw loss_over_tokens.png, loss_over_time.png and minus_dense.png."""
    parts = parts_of(tracks, histories)
    longest = max(history.seconds[-1] for history in histories)
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60)
    held_out = [part.history.held_out for part in parts]
    title = "held-out loss, a marker for each seed; pale: training, trailing mean"
    for file, label, x_of in (
        ("loss_over_tokens.png", "tokens, millions", _millions),
        ("loss_over_time.png", f"training time, {unit}",
         lambda history: [s / seconds for s in history.seconds]),
    ):  # fmt: skip
        labels = (label, "loss, nats per token")
        _draw(output / file, parts, x_of, held_out, title, labels, _limits(histories), True)

    # A shorter control decays earlier than the dense run at equal tokens, so it is left out.
    shorter = {track.name for track in tracks if track.is_shorter}
    compared = [part for part in parts if part.name not in shorter]
    controls = {track.seed: history for track, history in zip(tracks, histories, strict=True)
                if track.is_control}  # fmt: skip
    gaps = [minus_dense(part.history, controls[part.seed]) for part in compared]
    title = "held-out loss less that of dense training with the same seed, a marker for each seed"
    labels = ("tokens, millions", "nats per token")
    limits = _gap_limits(compared, gaps)
    _draw(output / "minus_dense.png", compared, _millions, gaps, title, labels, limits, False)


def _millions(history: History) -> list[float]:
    return [n / 1e6 for n in history.tokens]


def _draw(
    path: Path,
    parts: list[Part],
    x_of: Callable[[History], list[float]],
    values: list[dict[int, float]],
    title: str,
    labels: tuple[str, str],
    limits: tuple[float, float],
    with_training: bool,
) -> None:
    """Draw a dot for each of ``values`` (step to value) of each part.

    Args:
        with_training: whether to draw the smoothed training loss too, in pale.
    """
    names = list(dict.fromkeys(part.name for part in parts if not part.is_lighthouse))
    seeds = list(dict.fromkeys(part.seed for part in parts))
    colour_of = {**dict(zip(names, colours(len(names)), strict=True)), LIGHTHOUSE_STAGE: "grey"}
    figure = new_figure(height=5.5)
    axis = figure.subplots()
    for part, of_part in zip(parts, values, strict=True):
        colour = colour_of[part.name]
        x = x_of(part.history)
        if with_training:
            smooth, drawn = part.history.smoothed(), slice(part.steps[0] - 1, part.steps[-1])
            axis.plot(x[drawn], smooth[drawn], color=colour, linewidth=0.8, alpha=0.3)
        steps = [step for step in part.steps if step in of_part]
        axis.plot([x[step - 1] for step in steps], [of_part[step] for step in steps],
                  f"{MARKERS[seeds.index(part.seed) % len(MARKERS)]}-", color=colour,
                  markerfacecolor="none" if part.is_lighthouse else colour, markersize=4,
                  linewidth=0.9, label=part.name if part.seed == seeds[0] else None)  # fmt: skip
    axis.set(xlabel=labels[0], ylabel=labels[1], ylim=limits)
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


def _limits(histories: list[History]) -> tuple[float, float]:
    """Limits of the losses that leave out the steep fall of the first steps."""
    losses = [history.smoothed() for history in histories]
    low = min(min(*each, *h.held_out.values()) for each, h in zip(losses, histories, strict=True))
    high = max(max(each[len(each) // 4 :]) for each in losses)
    high = max(high, *(h.held_out[len(h.losses)] for h in histories))
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _gap_limits(parts: list[Part], gaps: list[dict[int, float]]) -> tuple[float, float]:
    """Limits of the gaps that leave out the large ones just after a switch."""
    settled = [
        gap
        for part, of_part in zip(parts, gaps, strict=True)
        for step, gap in of_part.items()
        if not 0 < step - part.history.switch <= 0.1 * len(part.history.losses)
    ]
    margin = 0.05 * (max(settled) - min(settled)) + 0.005
    return min(settled) - margin, max(settled) + margin
