"""What the runs of a contest logged and measured, as CSV files."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..evaluation.tables import Row, write_csv
from ..metrics import HELD_OUT_LOSS, SECONDS, TOKENS, UNDER_LIGHTHOUSE
from ..stages import stage_at, stages_of
from .contest_file import VALIDATION
from .contest_measures import read_numbers
from .sweeps import Run, read_metrics

RUNS, MEASURES, CURVES = "runs.csv", "measures.csv", "curves.csv"
GPU_SECONDS = "GPU seconds"
RATES, SEEDS = "rates", "seeds"
PLACES = ("stage", "arm", "rate", "seed")
# This file in a run's folder says that it was trained, and may still have to be measured. It holds
# ALONE if the run shared no GPU, so that its times are a measure.
TRAINED = "trained"
ALONE = "alone"

# Steps of one kind take equal time: the number of their stage, and whether they select.
Kind = tuple[int, bool]
Entries = dict[int, dict[str, float]]


def mark_trained(run: Run, alone: bool) -> None:
    (run.folder / TRAINED).write_text(ALONE if alone else "")


def is_trained(run: Run) -> bool:
    return (run.folder / TRAINED).exists()


def trained_alone(run: Run) -> bool:
    return is_trained(run) and (run.folder / TRAINED).read_text() == ALONE


def _kinds(run: Run, entries: Entries) -> dict[int, Kind]:
    stages = stages_of(run.config)
    return {
        step: (stages.index(stage_at(step, stages)), bool(entry.get(UNDER_LIGHTHOUSE)))
        for step, entry in entries.items()
    }


def seconds_of_steps(runs: Sequence[tuple[Run, Entries]]) -> dict[Kind, float]:
    """The median seconds of a step of each kind, over the runs of an arm that shared no GPU.

    Steps that compiled, captured a graph or saved a checkpoint do not move a median.
    """
    found: dict[Kind, list[float]] = {}
    for run, entries in runs:
        if trained_alone(run):
            for step, kind in _kinds(run, entries).items():
                if SECONDS in entries[step]:
                    found.setdefault(kind, []).append(entries[step][SECONDS])
    return {kind: statistics.median(seconds) for kind, seconds in found.items()}


def write_data(
    placed: Sequence[tuple[Row, Run]], timed: Mapping[str, Run], processes: int, output: Path
) -> None:
    """Write what finished runs logged and measured as CSV.

    Args:
        placed: for each run its stage, arm, rate and seed.
        timed: arm to a run that tells times alone.
    """
    entries = {run.folder: read_metrics(run.folder) for _, run in placed}
    by_arm = {name: [(run, read_metrics(run.folder))] for name, run in timed.items()}
    for place, run in placed:
        by_arm.setdefault(place["arm"], []).append((run, entries[run.folder]))
    times = {arm: seconds_of_steps(runs) for arm, runs in by_arm.items()}
    runs, measures, curves = [], [], []
    for place, run in placed:
        rows = list(_rows(run, entries[run.folder], times[place["arm"]], processes))
        curves += [place | row for row in rows if VALIDATION in row]
        last = {key: value for key, value in rows[-1].items() if key != VALIDATION}
        runs.append(place | last)
        measures += [
            place | {"measure": each.measure, "document": each.document, "value": each.value}
            for each in read_numbers(run.folder)
        ]
    for table, name in ((runs, RUNS), (measures, MEASURES), (curves, CURVES)):
        write_csv(table, output / name)


def _rows(run: Run, entries: Entries, times: dict[Kind, float], processes: int) -> Iterator[Row]:
    """For each logged step its number, tokens, GPU seconds so far, and held-out loss if any."""
    seconds = 0.0
    for step, kind in _kinds(run, entries).items():
        if TOKENS in (entry := entries[step]):
            # Every run of the arm may have shared its GPU so far.
            seconds += processes * times.get(kind, math.nan)
            row: Row = {"step": step, "tokens": round(entry[TOKENS]), GPU_SECONDS: seconds}
            yield row | ({VALIDATION: entry[HELD_OUT_LOSS]} if HELD_OUT_LOSS in entry else {})
