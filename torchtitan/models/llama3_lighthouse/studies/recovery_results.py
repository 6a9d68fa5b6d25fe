"""Table and plots of a recovery study, from what its runs logged; see recovery_study.py."""

import csv
import statistics
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserValueError
from .ablation_results import HELD_OUT_LOSS, LOSS, STAGE, markdown
from .sweeps import Run, read_metrics

SECONDS, TOKENS = "time_metrics/end_to_end(s)", "n_tokens_seen"
# The final loss is the mean over this share of all steps.
FINAL_SHARE = 0.05
# Share of all steps that the smoothed training loss is a trailing mean of.
SMOOTHED_SHARE = 0.02
# Steps on each side of the switch that a loss is averaged over, at most.
SWITCH_STEPS = 5
# A step that took more than this many medians of its kind compiled, warmed up or was disturbed.
SLOW_STEP = 2.0
NEVER = "never"
LIGHTHOUSE_STAGE = "Lighthouse stage"
# Of seeds in a plot.
MARKERS = "osv^D*"
NOTES = """
Losses are in nats per token, on equal text at equal steps; ± is the standard deviation over seeds.
Columns with * set dense losses against the last losses of the Lighthouse stage, which are not
comparable with dense ones where selection reads later tokens.
"""


@dataclass(frozen=True)
class Track:
    """One model of the study, from its first step to its last.

    Attributes:
        split: share of the steps that are Lighthouse's; None: dense from scratch.
        runs: what trained it, one after the other, each from where the next one starts; runs of
            other tracks may begin alike.
        is_shorter: whether it is a dense control of fewer steps than the study's.
    """

    split: float | None
    seed: int
    runs: list[Run]
    is_shorter: bool = False

    @property
    def name(self) -> str:
        if self.split is not None:
            return f"split {self.split:g}"
        return f"dense, {self.steps:,} steps" if self.is_shorter else "dense"

    @property
    def steps(self) -> int:
        return self.runs[-1].config.training.steps

    @property
    def is_control(self) -> bool:
        """Whether it is dense training over all steps."""
        return self.split is None and not self.is_shorter

    @property
    def is_finished(self) -> bool:
        return all(run.is_finished for run in self.runs)


@dataclass(frozen=True)
class History:
    """What a track logged; step s is at index s - 1.

    Attributes:
        losses: training loss of each step.
        tokens: tokens seen up to and including each step.
        logged_seconds: seconds of each step, as logged.
        seconds: seconds of training up to and including each step, slow steps counted as the
            median of those under the same attention.
        is_lighthouse: whether each step trained under Lighthouse attention.
        switch: the last step of the Lighthouse stage, 0 if there is none.
        held_out: step to held-out loss, under the attention of that step's stage.
    """

    losses: list[float]
    tokens: list[int]
    logged_seconds: list[float]
    seconds: list[float]
    is_lighthouse: list[bool]
    switch: int
    held_out: dict[int, float]

    def mean_loss(self, first: int, last: int) -> float:
        """Over steps ``first`` to ``last``, both included."""
        return statistics.fmean(self.losses[first - 1 : last])

    @property
    def window(self) -> int:
        """Steps that a smoothed training loss is a mean of, at most."""
        return max(1, round(SMOOTHED_SHARE * len(self.losses)))

    def smoothed(self) -> list[float]:
        """Trailing mean of each step over ``window`` steps, at most, of its own stage."""
        starts = [1 if step <= self.switch else self.switch + 1
                  for step in range(1, len(self.losses) + 1)]  # fmt: skip
        return [self.mean_loss(max(start, step - self.window + 1), step)
                for step, start in enumerate(starts, 1)]  # fmt: skip


def read_history(track: Track) -> History:
    """Join what the runs of a track logged.

    Raises:
        ValueError: a step or the last held-out loss is missing.
    """
    entries: dict[int, dict[str, float]] = {}
    for run in track.runs:
        # The run before may have gone on past the step that this one begins from.
        shared = {step: entry for step, entry in entries.items() if step <= run.start}
        own = read_metrics(run.folder).items()
        entries = shared | {s: entry for s, entry in own if s <= run.config.training.steps}
    last = track.steps
    steps = [entries.get(step, {}) for step in range(1, last + 1)]
    gaps = [step for step, entry in enumerate(steps, 1) if LOSS not in entry]
    if gaps or HELD_OUT_LOSS not in steps[-1]:
        missing = f"loss of step {gaps[0]}" if gaps else f"held-out loss of step {last}"
        raise UserValueError(
            f"{track.runs[-1].folder}: the metrics.jsonl files of {track.name}, seed {track.seed}, "
            f"lack the {missing}; remove the folder to train the run again"
        )
    logged = [entry[SECONDS] for entry in steps]
    is_lighthouse = [bool(entry[STAGE]) for entry in steps]
    return History(
        losses=[entry[LOSS] for entry in steps],
        tokens=[round(entry[TOKENS]) for entry in steps],
        logged_seconds=logged,
        seconds=_running_total(logged, is_lighthouse),
        is_lighthouse=is_lighthouse,
        switch=track.runs[-1].config.lighthouse.dense_from_step,
        held_out={
            s: entry[HELD_OUT_LOSS] for s, entry in enumerate(steps, 1) if HELD_OUT_LOSS in entry
        },  # fmt: skip
    )


def _running_total(logged: list[float], kinds: list[bool]) -> list[float]:
    medians = {kind: statistics.median(s for s, of in zip(logged, kinds, strict=True)
                                       if of == kind) for kind in set(kinds)}  # fmt: skip
    total, totals = 0.0, []
    for seconds, kind in zip(logged, kinds, strict=True):
        total += medians[kind] if seconds > SLOW_STEP * medians[kind] else seconds
        totals.append(total)
    return totals


def summarise(
    track: Track, history: History, control: History, shorter: list[History]
) -> dict[str, Any]:
    """A row of the table.

    Args:
        control: that of dense training from scratch with the same seed.
        shorter: those of dense controls of fewer steps with the same seed.
    """
    last = len(history.losses)
    final = max(1, round(FINAL_SHARE * last))
    row: dict[str, Any] = {
        "run": track.name,
        "seed": track.seed,
        "Lighthouse steps": history.switch,
        "steps": last,
        "tokens": history.tokens[-1],
        "final train loss": history.mean_loss(last - final + 1, last),
        "held-out loss": history.held_out[last],
    }
    if track.split is not None:
        row |= _against_dense(history, control, shorter) | _at_switch(history)
    row["seconds"] = history.seconds[-1]
    row["seconds as logged"] = sum(history.logged_seconds)
    row["speed-up"] = control.seconds[-1] / history.seconds[-1]
    return row


def _against_dense(history: History, control: History, shorter: list[History]) -> dict[str, Any]:
    last = len(history.losses)
    own = history.held_out[last]
    equal_tokens = control.held_out[last]
    points = [(control.seconds[step - 1], loss) for step, loss in control.held_out.items()]
    equal_time = interpolate(points, history.seconds[-1])

    def train_gap(step: int) -> float:
        first = max(history.switch + 1, step - history.window + 1)
        return history.mean_loss(first, step) - control.mean_loss(first, step)

    dense_steps = range(history.switch + 1, last + 1)
    held_out_gaps = _minus_dense(history, control)
    validated = [step for step in held_out_gaps if step > history.switch]
    row = {
        "dense, equal tokens": equal_tokens,
        "minus dense, equal tokens": own - equal_tokens,
        "dense, equal time": equal_time,
        "minus dense, equal time": None if equal_time is None else own - equal_time,
    }
    # The control that decayed and had at least as much time, by as little as possible.
    slower = [h for h in shorter if h.seconds[-1] >= history.seconds[-1]]
    if slower:
        decayed = min(slower, key=lambda h: h.seconds[-1])
        ended = decayed.held_out[len(decayed.losses)]
        row |= {
            "dense, decayed": ended,
            "dense, decayed, steps": len(decayed.losses),
            "dense, decayed, seconds": decayed.seconds[-1],
            "minus dense, decayed": own - ended,
        }
    for name, steps, gap in (("train", dense_steps, train_gap),
                             ("held-out", validated, held_out_gaps.get)):  # fmt: skip
        step = below_from(steps, gap)
        row[f"{name} below dense from step"] = step or NEVER
        row[f"{name} below dense from token"] = history.tokens[step - 1] if step else NEVER
    return row


def _minus_dense(history: History, control: History) -> dict[int, float]:
    """Held-out loss less the control's, at steps that both validated."""
    return {step: loss - control.held_out[step] for step, loss in history.held_out.items()
            if step in control.held_out}  # fmt: skip


def _at_switch(history: History) -> dict[str, Any]:
    switch, last = history.switch, len(history.losses)
    pairs = zip(history.losses[:switch], history.is_lighthouse[:switch], strict=True)
    before = statistics.fmean([loss for loss, is_lighthouse in pairs if is_lighthouse]
                              [-SWITCH_STEPS:])  # fmt: skip
    recovered = (
        step - switch
        for step in range(switch + 1, last + 1)
        if history.mean_loss(max(switch + 1, step - SWITCH_STEPS + 1), step) <= before
    )
    return {
        "Lighthouse loss before the switch*": before,
        "spike at the switch*": history.losses[switch] - before,
        "steps to recover*": next(recovered, NEVER),
    }


def below_from(steps: range | list[int], gap: Callable[[int], float]) -> int | None:
    """The step from which on ``gap`` is negative at all of ``steps``, None if not at the last."""
    first = None
    for step in reversed(steps):
        if gap(step) >= 0:
            break
        first = step
    return first


def interpolate(points: list[tuple[float, float]], x: float) -> float | None:
    """The value at ``x`` on straight lines between points in order of x; None outside them."""
    xs = [point[0] for point in points]
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    right = bisect_left(xs, x)
    if xs[right] == x:
        return points[right][1]
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind of run, the mean of every column and its standard deviation over seeds.

    A column where some seeds never got there says how many did.
    """
    summary = []
    for name in dict.fromkeys(row["run"] for row in rows):
        group = [row for row in rows if row["run"] == name]
        result: dict[str, Any] = {"run": name, "seeds": len(group)}
        for column in _columns(group):
            if column in ("run", "seed"):
                continue
            values = [row.get(column) for row in group]
            reached = [value for value in values if isinstance(value, int | float)]
            if len(reached) == len(values):
                result[column] = statistics.fmean(values)
                spread = statistics.stdev(values) if len(values) > 1 else None
                result[f"{column}, spread"] = spread
            elif NEVER in values:
                result[column] = f"{len(reached)} of {len(values)} seeds" if reached else NEVER
        summary.append(result)
    return summary


def write_tables(rows: list[dict[str, Any]], output: Path) -> None:
    """results.csv, a row for each run; summary.csv, over seeds; results.md, both."""
    summary = over_seeds(rows)
    for name, table in (("results.csv", rows), ("summary.csv", summary)):
        columns = _columns(table)
        with (output / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(table)
    shown = [{key: _with_spread(row, key) for key in row if not key.endswith(", spread")}
             for row in summary]  # fmt: skip
    text = f"{markdown(shown, _columns(shown))}{NOTES}\n{markdown(rows, _columns(rows))}"
    (output / "results.md").write_text(text)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    # Those of the longest row first, as dense runs leave out the middle.
    ordered = sorted(rows, key=len, reverse=True)
    return list(dict.fromkeys(key for row in ordered for key in row))


def _with_spread(row: dict[str, Any], key: str) -> Any:
    spread, value = row.get(f"{key}, spread"), row[key]
    if isinstance(value, float) and value.is_integer() and not spread:
        return round(value)
    if not spread:
        return value
    digits = 4 if abs(value) < 10 else 1 if abs(value) < 10_000 else 0
    return f"{value:,.{digits}f} ± {spread:,.{digits}f}"


@dataclass(frozen=True)
class Part:
    """Steps of a history that a plot draws as one line.

    Attributes:
        name: in the legend.
        steps: the first to the last of them.
    """

    name: str
    seed: int
    history: History
    steps: range

    @property
    def is_lighthouse(self) -> bool:
        return self.name == LIGHTHOUSE_STAGE


def parts_of(tracks: list[Track], histories: list[History]) -> list[Part]:
    """What each model was trained by itself, and once for each seed the stage they share."""
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
    """loss_over_tokens.png, loss_over_time.png and minus_dense.png."""
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

    # A shorter control decays earlier than what it would be compared with at equal tokens.
    shorter = {track.name for track in tracks if track.is_shorter}
    compared = [part for part in parts if part.name not in shorter]
    controls = {track.seed: history for track, history in zip(tracks, histories, strict=True)
                if track.is_control}  # fmt: skip
    gaps = [_minus_dense(part.history, controls[part.seed]) for part in compared]
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
    """A dot for each of ``values``, step to value, of a part; pale its smoothed training loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(part.name for part in parts if not part.is_lighthouse))
    seeds = list(dict.fromkeys(part.seed for part in parts))
    palette = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    figure, axis = plt.subplots(figsize=(10, 5.5), layout="constrained")
    for part, of_part in zip(parts, values, strict=True):
        colour = "grey" if part.is_lighthouse else palette[names.index(part.name) % len(palette)]
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
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _limits(histories: list[History]) -> tuple[float, float]:
    """The fall of the first steps would flatten all that tells runs apart."""
    losses = [history.smoothed() for history in histories]
    low = min(min(*each, *h.held_out.values()) for each, h in zip(losses, histories, strict=True))
    high = max(max(each[len(each) // 4 :]) for each in losses)
    high = max(high, *(h.held_out[len(h.losses)] for h in histories))
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _gap_limits(parts: list[Part], gaps: list[dict[int, float]]) -> tuple[float, float]:
    """Just after a switch gaps would flatten all others."""
    settled = [
        gap
        for part, of_part in zip(parts, gaps, strict=True)
        for step, gap in of_part.items()
        if not 0 < step - part.history.switch <= 0.1 * len(part.history.losses)
    ]
    margin = 0.05 * (max(settled) - min(settled)) + 0.005
    return min(settled) - margin, max(settled) + margin
