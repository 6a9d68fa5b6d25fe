"""Records of contests in the docs."""

import json
import re
from collections.abc import Sequence
from functools import cache

import pandas
from pages import DOCS, ROOT

from torchtitan.models.llama3_lighthouse.studies.contest_file import read_contest
from torchtitan.models.llama3_lighthouse.studies.contest_results import Results
from torchtitan.models.llama3_lighthouse.studies.contest_statistics import t_interval


@cache
def results_of(name: str) -> Results:
    """The results of a contest in train_configs/contests."""
    folder = DOCS / f"studies/results/contest_{name}"
    return Results(read_contest(ROOT / f"train_configs/contests/{name}.toml"), folder)


def difference(
    name: str, arm: str, control: str, measure: str, seeds: Sequence[int] = ()
) -> tuple[float, float, float]:
    """A measure of an arm less its control's: mean and interval.

    Args:
        seeds: those that count; all that both have by default.
    """
    results = results_of(name)
    gaps = results.differences(arm, control, measure)
    if seeds:
        gaps = [results.value(arm, seed, measure) - results.value(control, seed, measure)
                for seed in seeds]  # fmt: skip
    found = t_interval(gaps, results.level(measure))
    assert found.low is not None and found.high is not None
    return found.mean, found.low, found.high


def between(low: float, high: float) -> str:
    """An interval on one side of zero, without the sign."""
    assert low * high > 0
    low, high = sorted((abs(low), abs(high)))
    return f"({low:.3f} to {high:.3f})"


def with_half(values: list[float]) -> str:
    """The mean of seeds, and half of its interval."""
    found = t_interval(values, 0.95)
    assert found.high is not None
    return f"{found.mean:.3f} ± {found.high - found.mean:.3f}"


def untrained_by_seed(name: str, measure: str, scaling: str = "yarn") -> list[float]:
    """A measure of the models that a contest begins from, under YaRN or "none"."""
    record = pandas.read_csv(DOCS / f"studies/results/contest_{name}/untrained.csv")
    own = record[record.scaling.str.startswith(scaling) & (record.measure == measure)]
    return [*own.groupby("seed").value.mean()]


def costs_of_yarn(name: str) -> list[float]:
    """What YaRN costs before training, by place within the start's length and by seed."""
    return [
        scaled - plain
        for place in (256, 512, 1024, 2048, 4096)
        for scaled, plain in zip(
            untrained_by_seed(name, f"position/{place}"),
            untrained_by_seed(name, f"position/{place}", "none"),
            strict=True,
        )
    ]


def steps_by_kind(name: str, arm: str) -> dict[str, int]:
    """The steps of each kind of an arm of a contest; the last are dense, in full."""
    runs = results_of(name).runs
    (steps,) = {*runs[runs.arm == arm]["steps by kind"]}
    return json.loads(steps)


def undisturbed_seconds(name: str, arm: str) -> float:
    """Seconds of an arm's steps by the lower quartile of the timed ones."""
    folder = DOCS / f"studies/results/contest_{name}"
    times = pandas.read_csv(folder / "times.csv").set_index(["arm", "kind"])
    seconds = times["GPU seconds"] / (1 + times.spread)
    return sum(count * seconds[arm, kind] for kind, count in steps_by_kind(name, arm).items())


def check_steps(
    results: Results,
    arm: str,
    trained: str,
    tokens: str,
    seconds: str,
    dense: str,
    digits: int = 1,
) -> None:
    """The cells of a table that tell how an arm was trained, in how much time.

    Args:
        digits: of seconds, after the point.
    """
    own = results.runs[results.runs.arm == arm]
    steps = json.loads(own["steps by kind"].iloc[0])
    assert [int(x) for x in re.findall(r"(?:^|then )(\d+)", trained)] == list(steps.values())
    kind, number = list(steps.items())[-1]
    assert kind.endswith("dense") and dense == f"{results.times[arm][kind] * number:,.{digits}f}"
    assert tokens == f"{own.tokens.iloc[0] / 1e6:.1f}M"
    assert seconds == f"{own['GPU seconds'].mean():,.{digits}f}"
