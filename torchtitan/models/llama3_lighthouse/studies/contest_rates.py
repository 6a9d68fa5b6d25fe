"""Learning rates of the arms of a contest: which are tried, and which is the best."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean

from ..evaluation.progress import say
from .contest_file import Contest, read_record
from .contest_measures import read_numbers
from .sweeps import Run

# Rates that were added beside the file's, by arm.
WIDENED = "widened.json"
MOST_WIDENED = 4
# Arm, rate and seed of a run.
Place = tuple[str, float, int]


def rates_of(contest: Contest, output: Path) -> dict[str, list[float]]:
    """Each arm's learning rates, those of the file and those that were added, in order."""
    path = output / WIDENED
    added = read_record(path) if path.exists() else {}
    return {name: sorted({*arm.rates, *added.get(name, [])}) for name, arm in contest.arms.items()}


def only_rates(rates: Mapping[str, list[float]], arms: Iterable[str]) -> dict[str, float]:
    """The rates of arms that have no choice."""
    return {name: rates[name][0] for name in arms if len(rates[name]) == 1}


def widen(contest: Contest, rates: dict[str, list[float]], best: dict[str, float]) -> list[str]:
    """Add a rate beyond each grid whose best is at its edge, and return the arms that got one."""
    found = []
    for name, of_arm in rates.items():
        is_first = name in best and best[name] == of_arm[0]
        is_last = name in best and best[name] == of_arm[-1]
        few = len(of_arm) < len(contest.arms[name].rates) + MOST_WIDENED
        if len(of_arm) > 1 and (is_first or is_last) and few:
            step = of_arm[1] / of_arm[0] if is_first else of_arm[-1] / of_arm[-2]
            of_arm.append(of_arm[0] / step if is_first else of_arm[-1] * step)
            of_arm[-1] = float(f"{of_arm[-1]:.4g}")
            of_arm.sort()
            found.append(name)
    return found


def best_rates(contest: Contest, tried: dict[Place, Run]) -> dict[str, float]:
    """The best rate of each arm whose runs have all finished, by the measure that tunes.

    The measure is the mean over seeds that choose, and a rate under which one of them diverged is
    not taken. An arm without a rate is left out.
    """
    best = {}
    for name in contest.arms:
        own: dict[float, list[Run]] = {}
        for (arm, rate, _), run in tried.items():
            if arm == name:
                own.setdefault(rate, []).append(run)
        if own and all(run.is_finished for runs in own.values() for run in runs):
            values = {rate: fmean(tuning_value(contest, run) for run in runs)
                      for rate, runs in own.items()}  # fmt: skip
            if fit := {rate: value for rate, value in values.items() if math.isfinite(value)}:
                best[name] = max(fit, key=lambda rate: contest.tuning_sign * fit[rate])
    return best


def tuning_value(contest: Contest, run: Run) -> float:
    """The mean over documents of the measure that chooses the rate; NaN if the run diverged."""
    return fmean(
        each.value for each in read_numbers(run.folder) if each.measure == contest.tuned_by
    )


def tried_places(
    contest: Contest, rates: Mapping[str, list[float]], arms: Iterable[str]
) -> list[Place]:
    """Arm, rate and seed of the runs that choose the rates of arms with several."""
    return [
        (name, rate, seed)
        for seed in contest.rate_seeds
        for name in arms
        if len(rates[name]) > 1
        for rate in rates[name]
    ]


def say_rates(rates: dict[str, list[float]], best: dict[str, float], widened: bool) -> None:
    """Say each arm's best rate, and whether it lies at the edge of its grid."""
    for name, of_arm in rates.items():
        if name not in best:
            say(f"{name}: left out, as runs that choose its rate failed or diverged", error=True)
            continue
        edge = len(of_arm) > 1 and best[name] in (of_arm[0], of_arm[-1])
        advice = "" if widened else "; --widen tries further ones"
        say(f"{name}: best rate {best[name]:g}" + (f", at the edge of its grid{advice}" * edge))
