"""Tables, verdicts and plots of a contest, all drawn from its CSV files."""

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from ..evaluation.bootstrap import bootstrap
from ..evaluation.figures import colours, length_axis, new_figure, save
from ..evaluation.held_out_loss import Estimate
from ..evaluation.tables import Row, markdown, write_csv
from .contest_data import CURVES, GPU_SECONDS, MEASURES, RUNS, SEEDS, STEPS, gpu_seconds, read_times
from .contest_file import RETRIEVAL, VALIDATION, Contest
from .contest_statistics import comparison_level, in_words, judge, t_interval
from .recovery_results import interpolate

RESULTS, COMPARISONS = "results.md", "comparisons.csv"
EQUAL_TIME = f"{VALIDATION}, equal time"
NOTES = """
Differences are arm minus control, paired by seed. `t` is the interval by Student's t over seeds,
and `bootstrap` the one over held-out documents of the mean difference over seeds. Intervals hold
for all comparisons together in the primary measure, and at 95% for each in the others.

GPU seconds are those of the steps alone, each at the median of its stage in runs that shared no
GPU; compilation, validation and checkpoints are left out. Equal time: held-out loss where the
faster of two runs ends, on a straight line between two validations of the other, which has not
decayed its learning rate there. Arms with steps of their own compare decayed runs.
"""


class Results:
    """What the CSV files of a contest hold, for the runs at the best rates."""

    def __init__(self, contest: Contest, output: Path) -> None:
        self.contest = contest
        frames = [pandas.read_csv(output / name) for name in (RUNS, MEASURES, CURVES)]
        times = read_times(output)
        for frame in (frames[0], frames[2]):
            frame[GPU_SECONDS] = [
                gpu_seconds(steps, times.get(arm, {}))
                for arm, steps in zip(frame.arm, frame[STEPS], strict=True)
            ]
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
        both = set(self.seeds(control, measure))
        return [self.value(arm, seed, measure) - self.value(control, seed, measure)
                for seed in self.seeds(arm, measure) if seed in both]  # fmt: skip

    def level(self, measure: str) -> float:
        """Confidence of an interval of one comparison."""
        return comparison_level(self.contest) if measure == self.contest.primary else 0.95

    def over_documents(self, arm: str, control: str, measure: str) -> Estimate | None:
        """The mean difference over seeds, by document; None if there are no documents."""
        gaps: dict[int, list[float]] = {}
        both = set(self.seeds(control, measure))
        for seed in self.seeds(arm, measure):
            if seed in both:
                theirs = self.values[control, seed, measure]
                for document, value in self.values[arm, seed, measure].items():
                    if document in theirs:
                        gaps.setdefault(document, []).append(value - theirs[document])
        by_document = [statistics.fmean(each) for number, each in gaps.items() if number >= 0]
        return bootstrap(by_document, level=self.level(measure)) if by_document else None

    def curve(self, arm: str, seed: int) -> list[tuple[float, float]]:
        """GPU seconds and held-out loss of a run's validations; empty if its times are unknown."""
        own = self.curves[(self.curves.arm == arm) & (self.curves.seed == seed)]
        own = own[own[GPU_SECONDS].notna()]
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


def report(contest: Contest, output: Path, plots: bool) -> str:
    """Write results.md and comparisons.csv, draw the plots, and return the verdicts in words."""
    results = Results(contest, output)
    # The primary measure and those a reader asks for first; comparisons.csv has all of them.
    arms = [_arm_row(results, arm) for arm in contest.arms if results.seeds(arm, VALIDATION)]
    rows, words = [], []
    for arm, control in contest.compare:
        gaps = results.differences(arm, control, contest.primary)
        if not gaps:
            words.append(f"{arm} against {control}: no verdict, as no seed has finished in both.")
        else:
            words.append(in_words(contest, arm, control, judge(contest, gaps)))
        for measure in results.measures:
            if gaps := results.differences(arm, control, measure):
                estimate = t_interval(gaps, results.level(measure))
                documents = results.over_documents(arm, control, measure)
                rows.append(_difference_row(arm, control, measure, len(gaps), estimate, documents))
        if equal := results.at_equal_time(arm, control):
            estimate = t_interval(equal, 0.95)
            rows.append(_difference_row(arm, control, EQUAL_TIME, len(equal), estimate, None))
    if rows:
        write_csv(rows, output / COMPARISONS)
    verdict = "\n".join(f"- {each}" for each in words)
    first = {contest.primary, VALIDATION, EQUAL_TIME, "loss"}
    short = [row for row in rows if row["measure"] in first or _is_longest(results, row)]
    columns = list(dict.fromkeys(key for row in arms for key in row))
    text = f"# {contest.path.name}\n\nSHA-256 of the file and its base: {contest.digest}\n\n"
    text += f"{verdict}\n\n{markdown(arms, columns)}{NOTES}\n"
    text += markdown(short, list(rows[0])) if rows else ""
    (output / RESULTS).write_text(text)
    if plots and arms:
        _plot(results, output)
    return verdict


def _is_longest(results: Results, row: Row) -> bool:
    """Whether a row is of retrieval at the longest length."""
    name, _, length = row["measure"].rpartition("/")
    lengths = [int(each.rpartition("/")[2]) for each in results.measures
               if each.rpartition("/")[0] == name and name.startswith(RETRIEVAL)]  # fmt: skip
    return bool(lengths) and int(length) == max(lengths)


def _arm_row(results: Results, arm: str) -> Row:
    runs = results.runs[results.runs.arm == arm]
    row: dict[str, Any] = {"arm": arm, "rate": f"{runs.rate.iloc[0]:g}", "seeds": len(runs)}
    row["tokens"] = round(runs.tokens.mean())
    if runs[GPU_SECONDS].notna().all():
        row[GPU_SECONDS] = float(runs[GPU_SECONDS].mean())
    for measure in dict.fromkeys((results.contest.primary, VALIDATION)):
        if seeds := results.seeds(arm, measure):
            row[measure] = statistics.fmean(results.value(arm, seed, measure) for seed in seeds)
    return row


def _difference_row(
    arm: str, control: str, measure: str, seeds: int, found: Estimate, documents: Estimate | None
) -> Row:
    return {
        "arm": arm, "control": control, "measure": measure, "seeds": seeds,
        "difference": found.mean, "t, low": found.low, "t, high": found.high,
        "bootstrap, low": documents.low if documents else None,
        "bootstrap, high": documents.high if documents else None,
    }  # fmt: skip


def _plot(results: Results, output: Path) -> None:
    """Draw loss_over_time.png, loss_by_position.png and retrieval_over_length.png."""
    lines: dict[str, list[tuple[str, list[float], list[Estimate]]]] = {}
    for arm in results.contest.arms:
        curves = [results.curve(arm, seed) for seed in results.contest.seeds]
        curves = [curve for curve in curves if curve]
        if curves:
            count = min(map(len, curves))
            x = [statistics.fmean(curve[n][0] for curve in curves) for n in range(count)]
            y = [t_interval([curve[n][1] for curve in curves], 0.95) for n in range(count)]
            lines.setdefault("loss_over_time.png", []).append((arm, x, y))
        for file, kinds in (
            ("loss_by_position.png", ["position"]),
            ("retrieval_over_length.png", [f"{RETRIEVAL}{t}" for t in results.contest.retrieval]),
        ):
            for kind in kinds:
                found = [m for m in results.measures
                         if m.rpartition("/")[0] == kind and results.seeds(arm, m)]  # fmt: skip
                y = [t_interval([results.value(arm, seed, m) for seed in results.seeds(arm, m)],
                                0.95) for m in found]  # fmt: skip
                x = [float(m.rpartition("/")[2]) for m in found]
                name = f"{arm}, {kind.rpartition('/')[2]}" if len(kinds) > 1 else arm
                if found:
                    lines.setdefault(file, []).append((name, x, y))
    for file, of_file in lines.items():
        labels = {
            "loss_over_time.png": (GPU_SECONDS, "held-out loss, nats per token"),
            "loss_by_position.png": ("tokens of context", "held-out loss, nats per token"),
            "retrieval_over_length.png": ("tokens of the prompt", "share of answers right"),
        }[file]
        _draw(output / file, of_file, labels)


def _draw(
    path: Path, lines: list[tuple[str, list[float], list[Estimate]]], labels: tuple[str, str]
) -> None:
    figure = new_figure()
    axis = figure.subplots()
    for (name, x, estimates), colour in zip(lines, colours(len(lines)), strict=True):
        axis.plot(x, [each.mean for each in estimates], "o-", color=colour, markersize=3,
                  linewidth=1, label=name)  # fmt: skip
        low = np.array([math.nan if e.low is None else e.low for e in estimates])
        high = np.array([math.nan if e.high is None else e.high for e in estimates])
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if path.name != "loss_over_time.png":
        length_axis(axis, [place for _, x, _ in lines for place in x])
    if path.name == "retrieval_over_length.png":
        # An interval by Student's t knows no bounds.
        axis.set_ylim(-0.02, 1.02)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)
