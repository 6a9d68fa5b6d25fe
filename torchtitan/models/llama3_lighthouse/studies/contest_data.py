"""What the runs of a contest logged and measured, as CSV files."""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy
import pandas

from ..environment import git_revision
from ..evaluation.tables import Row, write_csv
from ..job_config import JobConfig
from ..metrics import (
    DOCUMENTS_PER_SEQUENCE,
    GRAD_NORM,
    HELD_OUT_LOSS,
    LOSS,
    METRICS_FILE,
    SECONDS,
    TOKENS,
    UNDER_LIGHTHOUSE,
)
from ..stages import stage_at, stages_of
from .contest_file import LEAST_TIMED, VALIDATION
from .contest_measures import read_numbers
from .sweeps import Run, read_metrics

RUNS, MEASURES, CURVES = "runs.csv", "measures.csv", "curves.csv"
TIMES = "times.csv"
GPU_SECONDS, STEPS, TRAINING = "GPU seconds", "steps by kind", "training loss"
# On an H200 undisturbed steps had a spread below 2%, and those beside another process 5% and 120%.
SPREAD, UNSTEADY = "spread", 0.03
RATES, SEEDS = "rates", "seeds"
PLACES = ("stage", "arm", "rate", "seed")
# This file in a run's folder says that it was trained, and may still have to be measured. It holds
# ALONE if the run shared no GPU, so that its times are a measure.
TRAINED = "trained"
ALONE = "alone"
# This file in the folder of a run that others begin from, and of those, tells its trainings apart.
START = "start_id"
# This file in a run's folder holds the git revisions that it was trained at, several if it was
# interrupted. Runs of older versions have none, and an installed package does not know its own.
REVISIONS, UNKNOWN = "revisions", "unknown"
# This file in a run's folder names the earlier contest that the run was taken from.
TAKEN_FROM = "taken_from"

Entries = dict[int, dict[str, float]]
# Seconds of a step by arm and kind. Steps of one kind take equal time: those of one stage that
# select, and those of it that do not. Document masks split both further.
Times = dict[str, dict[str, float]]


def mark_trained(run: Run, alone: bool) -> None:
    (run.folder / TRAINED).write_text(ALONE if alone else "")


def is_trained(run: Run) -> bool:
    return (run.folder / TRAINED).exists()


def trained_alone(run: Run) -> bool:
    return is_trained(run) and (run.folder / TRAINED).read_text() == ALONE


def start_id(source: Run) -> str:
    """The name of one training of a run that others begin from: a hash of its logged losses.

    A run that trains again is another model on GPUs, where thousands of steps do not repeat, unless
    every loss and gradient norm is the same.
    """
    path = source.folder / START
    if not path.exists():
        steps = read_metrics(source.folder).items()
        logged = [[step, entry.get(LOSS), entry.get(GRAD_NORM)] for step, entry in steps]
        path.write_text(hashlib.sha256(json.dumps(logged).encode()).hexdigest()[:12])
    return path.read_text()


def starts_used(source: Run) -> set[str]:
    """The trainings of ``source`` that other runs began from and ended."""
    _, _, seed = source.name.partition(",")
    files = source.folder.parent.glob(f"*,{seed}/{START}")
    ended = (path for path in files if (path.parent / TRAINED).exists())
    return {path.read_text() for path in ended if path.parent != source.folder}


def mark_start(run: Run, source: Run) -> None:
    """Note which training of ``source`` a run begins from."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / START).write_text(start_id(source))


def mark_revision(run: Run, goes_on: bool) -> None:
    """Note at which git revision a run begins, or goes on from its own weights."""
    before = revisions_of(run) or [UNKNOWN] if goes_on else []
    names = dict.fromkeys([*before, git_revision() or UNKNOWN])
    (run.folder / REVISIONS).write_text(" ".join(names))


def revisions_of(run: Run) -> list[str]:
    path = run.folder / REVISIONS
    return path.read_text().split() if path.exists() else []


class Logs:
    """What finished runs logged. Each log is read once, as tables are written after every run."""

    def __init__(self) -> None:
        self._known: dict[Path, Entries] = {}

    def of(self, run: Run) -> Entries:
        """The entries of a run by step; none if it diverged before it logged any."""
        if run.folder not in self._known:
            is_there = (run.folder / METRICS_FILE).exists()
            self._known[run.folder] = read_metrics(run.folder) if is_there else {}
        return self._known[run.folder]

    def forget(self, run: Run) -> None:
        """Read the log of a run anew the next time, as it runs again."""
        self._known.pop(run.folder, None)


def _kind(stage: int, selects: bool, documents: float | None = None) -> str:
    """The name of a kind of step.

    A step whose sequences are one document each may run without masks, and then takes less time.

    Args:
        stage: its number, from 1 on.
        documents: mean documents in the sequences of the step; None without document masks.
    """
    name = f"{stage} {'lighthouse' if selects else 'dense'}"
    if documents is None:
        return name
    return f"{name}, {'several documents' if documents > 1 else 'one document'}"


def _kinds(run: Run, entries: Entries) -> dict[int, str]:
    stages = stages_of(run.config)
    return {
        step: _kind(
            stages.index(stage_at(step, stages)) + 1,
            bool(entry.get(UNDER_LIGHTHOUSE)),
            entry.get(DOCUMENTS_PER_SEQUENCE),
        )
        for step, entry in entries.items()
    }


def steps_by_kind(config: JobConfig) -> dict[str, int]:
    """How many steps of each kind a run without document masks has."""
    found: dict[str, int] = {}
    for number, stage in enumerate(stages_of(config), 1):
        for attention, count in stage.steps.items():
            if count:
                found[_kind(number, attention != "dense")] = count
    return found


def timed_steps(runs: Sequence[tuple[Run, Entries]]) -> dict[str, list[float]]:
    """The seconds of each step by kind, over the runs of an arm that shared no GPU.

    Under document masks the text decides how many steps of a kind were timed. A kind with less than
    ``LEAST_TIMED`` is left out, because steps that compiled could move its median.
    """
    found: dict[str, list[float]] = {}
    for run, entries in runs:
        if trained_alone(run):
            for step, kind in _kinds(run, entries).items():
                if SECONDS in entries[step]:
                    found.setdefault(kind, []).append(entries[step][SECONDS])
    masked = any(run.config.training.document_mask for run, _ in runs)
    least = LEAST_TIMED if masked else 1
    return {kind: seconds for kind, seconds in found.items() if len(seconds) >= least}


def spread_of(seconds: Sequence[float]) -> float:
    """How far the median of steps of one kind lies above their lower quartile, as a share of it.

    Such steps take equal time, so on an undisturbed GPU this is some percent at most. Steps that
    compiled, captured a graph or saved a checkpoint are few, and move neither of the two.
    """
    lower, median = numpy.quantile(seconds, [0.25, 0.5])
    return float(median / lower - 1)


def write_times(runs: Iterable[tuple[str, Run]], logs: Logs, processes: int, output: Path) -> None:
    """Write the GPU seconds of a step, for the arms of which a run shared no GPU.

    They are the median of the steps of a kind. Their spread is left out under document masks, where
    it is that of the text. Arms that have no such run keep the times that they have, which may come
    from another machine.

    Args:
        runs: arms with finished runs of theirs.
    """
    by_arm: dict[str, list[tuple[Run, Entries]]] = {}
    for arm, run in runs:
        by_arm.setdefault(arm, []).append((run, logs.of(run)))
    rows: dict[str, list[Row]] = {}
    for row in _rows_of_times(output):
        rows.setdefault(row["arm"], []).append(row)
    for arm, of_arm in by_arm.items():
        masked = any(run.config.training.document_mask for run, _ in of_arm)
        if found := timed_steps(of_arm):
            rows[arm] = [
                {"arm": arm, "kind": kind, GPU_SECONDS: processes * statistics.median(seconds)}
                | ({} if masked else {SPREAD: round(spread_of(seconds), 4)})
                for kind, seconds in found.items()
            ]
    if rows:
        write_csv([row for of_arm in rows.values() for row in of_arm], output / TIMES)


def unsteady(output: Path) -> dict[str, dict[str, float]]:
    """The spread of steps by arm and kind, where it is larger than ``UNSTEADY``."""
    found: dict[str, dict[str, float]] = {}
    for row in _rows_of_times(output):
        # Records of older versions have no spread.
        if row.get(SPREAD, 0) > UNSTEADY:
            found.setdefault(row["arm"], {})[row["kind"]] = row[SPREAD]
    return found


def spreads_in_words(kinds: Mapping[str, float]) -> str:
    """Spreads by kind, such as "kind `1 dense` is 7%"."""
    return " and ".join(f"kind `{kind}` is {spread:.0%}" for kind, spread in kinds.items())


def read_times(output: Path) -> Times:
    """What ``write_times`` wrote; empty if it has not."""
    times: Times = {}
    for row in _rows_of_times(output):
        times.setdefault(row["arm"], {})[row["kind"]] = float(row[GPU_SECONDS])
    return times


def _rows_of_times(output: Path) -> list[Row]:
    if not (output / TIMES).exists():
        return []
    records = pandas.read_csv(output / TIMES).to_dict("records")
    return [{str(key): value for key, value in each.items()} for each in records]


def gpu_seconds(steps: str, times: Mapping[str, float]) -> float:
    """GPU seconds of steps by kind, as in the CSV files; NaN if a kind has no time."""
    counts = json.loads(steps).items()
    return sum(count * times.get(kind, math.nan) for kind, count in counts)


def untimed_kinds(steps: Iterable[str], times: Mapping[str, float]) -> list[str]:
    """The kinds of runs' steps, as in the CSV files, that have no time."""
    kinds = {kind for each in steps for kind in json.loads(each)}
    return sorted(kinds - times.keys())


def write_data(placed: Sequence[tuple[Row, Run]], logs: Logs, output: Path) -> None:
    """Write what finished runs logged and measured as CSV.

    Args:
        placed: for each run its stage, arm, rate and seed.
    """
    runs, measures, curves = [], [], []
    for place, run in placed:
        rows = list(_rows(run, logs.of(run)))
        curves += [place | row for row in rows if VALIDATION in row]
        # A run that diverged may have logged no step.
        last = rows[-1] if rows else {"step": 0, "tokens": 0, STEPS: "{}"}
        row = place | {key: last[key] for key in ("step", "tokens", STEPS)}
        began = run.folder / START
        row |= {"start": began.read_text()} if began.exists() else {}
        revisions, source = revisions_of(run), run.folder / TAKEN_FROM
        row |= {"revision": " ".join(revisions)} if revisions else {}
        runs.append(row | ({"taken from": source.read_text()} if source.exists() else {}))
        measures += [
            # Six digits are more than any of them is worth.
            place | {"measure": each.measure, "document": each.document,
                     "value": float(f"{each.value:.6g}")}
            for each in read_numbers(run.folder)
        ]  # fmt: skip
    for table, name in ((runs, RUNS), (measures, MEASURES), (curves, CURVES)):
        write_csv(table, output / name)


def _rows(run: Run, entries: Entries) -> Iterator[Row]:
    """For each logged step its number, tokens and steps by kind so far.

    A step of a validation also has the held-out loss, and the mean training loss of the steps that
    were logged since the last one.
    """
    counts: dict[str, int] = {}
    losses: list[float] = []
    for step, kind in _kinds(run, entries).items():
        if TOKENS in (entry := entries[step]):
            counts[kind] = counts.get(kind, 0) + 1
            row: Row = {"step": step, "tokens": round(entry[TOKENS]), STEPS: json.dumps(counts)}
            losses.append(entry[LOSS])
            if HELD_OUT_LOSS in entry:
                row |= {VALIDATION: entry[HELD_OUT_LOSS], TRAINING: statistics.fmean(losses)}
                losses.clear()
            yield row
