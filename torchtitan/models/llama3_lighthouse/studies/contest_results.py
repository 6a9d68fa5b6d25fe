"""What the CSV files of a contest hold."""

import statistics
from pathlib import Path

import pandas

from ..evaluation.bootstrap import bootstrap
from ..evaluation.held_out_loss import Estimate
from .contest_data import (
    CURVES,
    GPU_SECONDS,
    MEASURES,
    RUNS,
    SEEDS,
    STEPS,
    gpu_seconds,
    read_times,
    unsteady,
    untimed_kinds,
)
from .contest_file import VALIDATION, Contest
from .contest_statistics import comparison_level
from .recovery_results import interpolate


class Results:
    """What the CSV files of a contest hold, for the runs at the best rates."""

    def __init__(self, contest: Contest, output: Path) -> None:
        self.contest = contest
        # A revision may be of digits alone.
        frames = [pandas.read_csv(output / name, dtype={"revision": str})
                  for name in (RUNS, MEASURES, CURVES)]  # fmt: skip
        self.times = times = read_times(output)
        self.unsteady = unsteady(output)
        for frame in (frames[0], frames[2]):
            frame[GPU_SECONDS] = [
                gpu_seconds(steps, times.get(arm, {}))
                for arm, steps in zip(frame.arm, frame[STEPS], strict=True)
            ]
        self.all_runs = frames[0]
        self.runs, measures, self.curves = (frame[frame.stage == SEEDS] for frame in frames)
        # Arm, seed and measure to the values by document; -1 stands for all of them.
        self.values: dict[tuple[str, int, str], dict[int, float]] = {}
        documents = measures.document.fillna(-1).astype(int)
        for arm, seed, measure, document, value in zip(
            measures.arm, measures.seed, measures.measure, documents, measures.value, strict=True
        ):
            self.values.setdefault((arm, int(seed), measure), {})[document] = float(value)
        self.measures = list(dict.fromkeys(measures.measure))

    def seeds(self, arm: str, measure: str) -> list[int]:
        """Seeds of which the arm has the measure."""
        return [seed for seed in self.contest.seeds if (arm, seed, measure) in self.values]

    def value(self, arm: str, seed: int, measure: str) -> float:
        """A measure of a run, the mean over documents."""
        return statistics.fmean(self.values[arm, seed, measure].values())

    def differences(self, arm: str, control: str, measure: str) -> list[float]:
        """Arm minus control for each seed that both have."""
        return [self.value(arm, seed, measure) - self.value(control, seed, measure)
                for seed in self._of_both(arm, control, measure)]  # fmt: skip

    def _of_both(self, arm: str, control: str, measure: str) -> list[int]:
        theirs = self.seeds(control, measure)
        return [seed for seed in self.seeds(arm, measure) if seed in theirs]

    def level(self, measure: str) -> float:
        """Confidence of an interval of one comparison."""
        return comparison_level(self.contest) if measure == self.contest.primary else 0.95

    def over_documents(self, arm: str, control: str, measure: str) -> Estimate | None:
        """The mean difference over seeds, by document; None if there are no documents."""
        gaps: dict[int, list[float]] = {}
        for seed in self._of_both(arm, control, measure):
            theirs = self.values[control, seed, measure]
            for document, value in self.values[arm, seed, measure].items():
                if document in theirs:
                    gaps.setdefault(document, []).append(value - theirs[document])
        by_document = [statistics.fmean(each) for number, each in gaps.items() if number >= 0]
        return bootstrap(by_document) if by_document else None

    def untimed(self, arm: str) -> tuple[int, list[str]]:
        """How many runs of an arm have no GPU seconds, and the kinds of steps that lack a time."""
        runs = self.runs[self.runs.arm == arm]
        unknown = runs[runs[GPU_SECONDS].isna()]
        return len(unknown), untimed_kinds(unknown[STEPS], self.times.get(arm, {}))

    def curve(self, arm: str, seed: int) -> list[tuple[float, float]]:
        """GPU seconds and held-out loss of a run's validations; empty if its times are unknown."""
        own = self.curves[(self.curves.arm == arm) & (self.curves.seed == seed)]
        if own[GPU_SECONDS].isna().any():
            return []
        return list(zip(own[GPU_SECONDS], own[VALIDATION], strict=True))

    def at_equal_time(self, arm: str, control: str) -> list[float]:
        """Difference of held-out loss where the faster of two runs of a seed ends."""
        found = []
        for seed in self.contest.seeds:
            ours, theirs = self.curve(arm, seed), self.curve(control, seed)
            if ours and theirs:
                time = min(ours[-1][0], theirs[-1][0])
                pair = interpolate(ours, time), interpolate(theirs, time)
                if pair[0] is not None and pair[1] is not None:
                    found.append(pair[0] - pair[1])
        return found
