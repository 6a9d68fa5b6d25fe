"""Tables of a recovery study, from what its runs logged."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserValueError
from ..evaluation.tables import Row, columns_of, markdown, write_csv
from ..metrics import HELD_OUT_LOSS, LOSS, SECONDS, TOKENS, UNDER_LIGHTHOUSE
from .sweeps import Run, read_metrics

# The final loss is the mean over this share of all steps.
FINAL_SHARE = 0.05
# The smoothed training loss is a trailing mean over this share of all steps.
SMOOTHED_SHARE = 0.02
# Steps on each side of the switch that a loss is averaged over, at most.
SWITCH_STEPS = 5
# Steps longer than this many medians of their kind compiled, warmed up or were disturbed.
SLOW_STEP = 2.0
NEVER = "never"
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
        runs: the runs that trained it, one after the other. Each begins from a checkpoint of the
            one before. Tracks may share their first runs.
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
    """The log of a track; step s is at index s - 1.

    Attributes:
        losses: training loss of each step.
        tokens: tokens seen up to and including each step.
        logged_seconds: seconds of each step, as logged.
        seconds: seconds of training up to and including each step. A slow step counts as the
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
        """Mean training loss over steps ``first`` to ``last``, both included."""
        return statistics.fmean(self.losses[first - 1 : last])

    @property
    def window(self) -> int:
        """Most steps that a smoothed training loss is a mean over."""
        return max(1, round(SMOOTHED_SHARE * len(self.losses)))

    def smoothed(self) -> list[float]:
        """Trailing mean at each step over at most ``window`` steps of its own stage."""
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
        # The run before may have gone on past the checkpoint that this one begins from.
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
    is_lighthouse = [bool(entry[UNDER_LIGHTHOUSE]) for entry in steps]
    return History(
        losses=[entry[LOSS] for entry in steps],
        tokens=[round(entry[TOKENS]) for entry in steps],
        logged_seconds=logged,
        seconds=running_total(logged, is_lighthouse),
        is_lighthouse=is_lighthouse,
        switch=track.runs[-1].config.lighthouse.dense_from_step,
        held_out={
            s: entry[HELD_OUT_LOSS] for s, entry in enumerate(steps, 1) if HELD_OUT_LOSS in entry
        },  # fmt: skip
    )


def running_total(logged: Sequence[float], kinds: Sequence[int]) -> list[float]:
    """Seconds up to and including each step; a slow step counts as the median of its kind."""
    medians = {kind: statistics.median(s for s, of in zip(logged, kinds, strict=True)
                                       if of == kind) for kind in set(kinds)}  # fmt: skip
    total, totals = 0.0, []
    for seconds, kind in zip(logged, kinds, strict=True):
        total += medians[kind] if seconds > SLOW_STEP * medians[kind] else seconds
        totals.append(total)
    return totals


def summarise(track: Track, history: History, control: History, shorter: list[History]) -> Row:
    """A row of the table.

    Args:
        control: the history of dense training from scratch with the same seed.
        shorter: the histories of dense controls of fewer steps with the same seed.
    """
    last = len(history.losses)
    final = max(1, round(FINAL_SHARE * last))
    row: Row = {
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


def _against_dense(history: History, control: History, shorter: list[History]) -> Row:
    """Losses less those of dense training: at equal tokens, at equal time, and decayed."""
    last = len(history.losses)
    own = history.held_out[last]
    equal_tokens = control.held_out[last]
    points = [(control.seconds[step - 1], loss) for step, loss in control.held_out.items()]
    equal_time = interpolate(points, history.seconds[-1])

    def train_gap(step: int) -> float:
        first = max(history.switch + 1, step - history.window + 1)
        return history.mean_loss(first, step) - control.mean_loss(first, step)

    dense_steps = range(history.switch + 1, last + 1)
    held_out_gaps = minus_dense(history, control)
    validated = [step for step in held_out_gaps if step > history.switch]
    row: Row = {
        "dense, equal tokens": equal_tokens,
        "minus dense, equal tokens": own - equal_tokens,
        "dense, equal time": equal_time,
        "minus dense, equal time": None if equal_time is None else own - equal_time,
    }
    # Compare with the decayed control that had just as much time or slightly more.
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
                             ("held-out", validated, held_out_gaps.__getitem__)):  # fmt: skip
        step = below_from(steps, gap)
        row[f"{name} below dense from step"] = step or NEVER
        row[f"{name} below dense from token"] = history.tokens[step - 1] if step else NEVER
    return row


def minus_dense(history: History, control: History) -> dict[int, float]:
    """Step to held-out loss less the control's, at steps that both validated."""
    return {step: loss - control.held_out[step] for step, loss in history.held_out.items()
            if step in control.held_out}  # fmt: skip


def _at_switch(history: History) -> Row:
    """How far the training loss rises at the switch, and for how many steps."""
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
    """The first of ``steps`` from which on ``gap`` stays negative; None if the last one is not."""
    first = None
    for step in reversed(steps):
        if gap(step) >= 0:
            break
        first = step
    return first


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at ``x`` on straight lines between points in order of x; None outside them."""
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    xs, ys = zip(*points, strict=True)
    return float(np.interp(x, xs, ys))


def over_seeds(rows: list[Row]) -> list[Row]:
    """For each kind of run, the mean of every column and its standard deviation over seeds.

    Where a seed's value is "never", the cell says how many seeds have a number.
    """
    summary = []
    for name in dict.fromkeys(row["run"] for row in rows):
        group = [row for row in rows if row["run"] == name]
        result: Row = {"run": name, "seeds": len(group)}
        for column in _longest_first(group):
            if column in ("run", "seed"):
                continue
            values = [row.get(column) for row in group]
            reached = [value for value in values if isinstance(value, int | float)]
            if len(reached) == len(values):
                result[column] = statistics.fmean(reached)
                spread = statistics.stdev(reached) if len(reached) > 1 else None
                result[f"{column}, spread"] = spread
            elif NEVER in values:
                result[column] = f"{len(reached)} of {len(values)} seeds" if reached else NEVER
        summary.append(result)
    return summary


def write_tables(rows: list[Row], output: Path) -> None:
    """Write results.csv, a row for each run; summary.csv, over seeds; results.md, both."""
    summary = over_seeds(rows)
    write_csv(rows, output / "results.csv", _longest_first(rows))
    write_csv(summary, output / "summary.csv", _longest_first(summary))
    shown = [{key: _with_spread(row, key) for key in row if not key.endswith(", spread")}
             for row in summary]  # fmt: skip
    text = markdown(shown, _longest_first(shown))
    text += f"{NOTES}\n{markdown(rows, _longest_first(rows))}"
    (output / "results.md").write_text(text)


def _longest_first(rows: list[Row]) -> list[str]:
    """Columns in the order of the longest row, because dense runs leave out the middle."""
    return columns_of(sorted(rows, key=len, reverse=True))


def _with_spread(row: Row, key: str) -> Any:
    """A cell of the summary: the mean ± the standard deviation, if there is one."""
    spread, value = row.get(f"{key}, spread"), row[key]
    if isinstance(value, float) and value.is_integer() and not spread:
        return round(value)
    if not spread:
        return value
    digits = 4 if abs(value) < 10 else 1 if abs(value) < 10_000 else 0
    return f"{value:,.{digits}f} ± {spread:,.{digits}f}"
