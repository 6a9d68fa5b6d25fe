"""Which way of training is best? A contest of arms by a rule that is fixed before the runs.

Each arm first tries its learning rates with one seed, then trains every seed at the best one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..checks.configuration import check_config
from ..checks.output import check_output
from ..errors import UserFileError, UserValueError
from ..evaluation.progress import say, say_what_was_written
from ..evaluation.tables import Row
from ..job_config import LighthouseConfigManager
from ..model.flavors import flavors
from .contest_file import Arm, Contest, fix, read_contest
from .contest_measures import MEASURES_FILE, read_numbers
from .contest_report import CURVES, MEASURES, RATES, RESULTS, RUNS, SEEDS, report, write_data
from .recovery import remove_cut_off
from .recovery_plan import SETTINGS, check_base
from .settings import command_line, keys_given, with_settings
from .sweeps import (
    Environment,
    Run,
    SweepOptions,
    lock_folder,
    raise_if_failed,
    sweep,
    train,
)

# This file in a run's folder says that it was trained, and may still have to be measured.
TRAINED = "trained"
# Rates that were added beside the file's, by arm.
WIDENED = "widened.json"
MOST_WIDENED = 4


class Planner:
    """Makes the runs of a contest."""

    def __init__(self, contest: Contest, output: Path, extra: list[str]) -> None:
        self.contest, self.output, self.extra = contest, output, extra
        varied = {"optimizer.lr", "job.dump_folder", "job.config_file", *contest.seed_keys}
        varied |= contest.settings.keys() | SETTINGS.keys()
        varied |= {key for arm in contest.arms.values() for key in arm.settings}
        if clash := keys_given(extra) & varied:
            raise UserValueError(f"--{min(clash)} is set by {contest.path}; leave it out")
        for arm in contest.arms.values():
            # Every arm is checked before the first run.
            check_base(self._config(arm, arm.rates[0], contest.seeds[0]))

    def _settings(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        seeds = dict.fromkeys(self.contest.seed_keys, seed)
        return self.contest.settings | arm.settings | {"optimizer.lr": rate} | seeds

    def _line(self, arm: Arm, rate: float, seed: int) -> list[str]:
        settings = SETTINGS | self._settings(arm, rate, seed)
        base = ["--job.config_file", str(self.contest.config)]
        return [*base, *command_line(settings), *self.extra]

    def _config(self, arm: Arm, rate: float, seed: int):
        line = [*self._line(arm, rate, seed), f"--job.dump_folder={self.output.resolve()}"]
        config = LighthouseConfigManager().parse_args(line)
        check_config(config, flavors)
        return config

    def run(self, arm: Arm, rate: float, seed: int) -> Run:
        """The run of an arm at a learning rate under a seed."""
        folder = self.output.resolve() / f"{arm.name},lr={rate:g},seed={seed}"
        line = [*self._line(arm, rate, seed), f"--job.dump_folder={folder}"]
        config = with_settings(self._config(arm, rate, seed), {})
        return Run(self._settings(arm, rate, seed), line, folder, config)


def rates_of(contest: Contest, output: Path) -> dict[str, list[float]]:
    """Each arm's learning rates, those of the file and those that were added, in order."""
    path = output / WIDENED
    added = json.loads(path.read_text()) if path.exists() else {}
    return {name: sorted({*arm.rates, *added.get(name, [])}) for name, arm in contest.arms.items()}


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


def best_rates(contest: Contest, tried: dict[tuple[str, float], Run]) -> dict[str, float]:
    """The best rate of each arm whose runs have all finished, by the measure that tunes."""
    best = {}
    for name in contest.arms:
        own = {rate: run for (arm, rate), run in tried.items() if arm == name}
        if own and all(run.is_finished for run in own.values()):
            values = {rate: tuning_value(contest, run) for rate, run in own.items()}
            best[name] = max(values, key=lambda rate: contest.tuning_sign * values[rate])
    return best


def tuning_value(contest: Contest, run: Run) -> float:
    """The mean over documents of the measure that chooses the rate.

    Raises:
        ValueError: the run has no such measure.
    """
    return value_of_measure(contest, run, "tuned_by", contest.tuned_by)


def value_of_measure(contest: Contest, run: Run, key: str, name: str) -> float:
    numbers = read_numbers(run.folder)
    values = [each.value for each in numbers if each.measure == name]
    if not values:
        known = ", ".join(dict.fromkeys(each.measure for each in numbers))
        raise UserValueError(f"{contest.path}: {key} = '{name}' is not measured; use {known}")
    return sum(values) / len(values)


def measure(contest: Contest, run: Run, environment: Environment) -> int:
    """Measure a trained run on the GPU it had, and return the exit code."""
    module = "torchtitan.models.llama3_lighthouse.studies.contest_measures"
    command = [sys.executable, "-m", module, str(contest.path), str(run.folder)]
    with (run.folder / "log.txt").open("a", buffering=1) as log:
        done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **environment})
    return done.returncode


def run_contest(path: Path, options: SweepOptions, extra: list[str], widened: bool = False) -> None:
    """Train and measure what is left of a contest, and report after every run.

    Args:
        extra: overrides for every run.
        widened: whether to add rates to grids whose best lies at the edge.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
        RunsFailed: some runs failed; the others have finished.
    """
    contest, slots, output = read_contest(path), options.slots(), options.output
    check_output(output)
    planner = Planner(contest, output, extra)
    rates = rates_of(contest, output)
    if options.only_list:
        for name, of_arm in rates.items():
            shown = ", ".join(f"{rate:g}" for rate in of_arm)
            seeds = ", ".join(map(str, contest.seeds))
            print(f"{name}: rates {shown} (seed {contest.rate_seed}), then seeds {seeds}")
        return
    fix(contest, output)
    with lock_folder(output) as lock:

        def train_run(run: Run, title: str, environment: Environment) -> int:
            if not (run.folder / TRAINED).exists():
                remove_cut_off(run)
                if code := train(run, options.processes, title, environment, lock):
                    return code
                (run.folder / TRAINED).touch()
            say(f"{title}: measuring")
            return (
                0 if (run.folder / MEASURES_FILE).exists() else measure(contest, run, environment)
            )

        placed: dict[tuple[str, str, float, int], Run] = {}
        failed: list[str] = []

        def train_all(stage: str, asked: list[tuple[str, float, int]]) -> dict[Any, Run]:
            runs = {key: planner.run(contest.arms[key[0]], *key[1:]) for key in asked}
            placed.update({(stage, *key): run for key, run in runs.items()})
            failed.extend(sweep(list(runs.values()), train_run, tabulate, slots))
            return runs

        def tabulate() -> None:
            rows = [(_place(key), run) for key, run in placed.items() if run.is_finished]
            if rows:
                write_data(rows, options.processes, output)

        best = {name: of_arm[0] for name, of_arm in rates.items()}
        while any(len(of_arm) > 1 for of_arm in rates.values()):
            seed = contest.rate_seed
            asked = [(n, rate, seed) for n in rates if len(rates[n]) > 1 for rate in rates[n]]
            runs = train_all(RATES, asked)
            tried = {(name, rate): run for (name, rate, _), run in runs.items()}
            raise_if_failed(failed, list(runs.values()))
            best |= best_rates(contest, tried)
            say_rates(rates, best, widened)
            if not widened or not widen(contest, rates, best):
                break
            (output / WIDENED).write_text(json.dumps(rates))
        train_all(SEEDS, [(name, best[name], seed) for name in rates for seed in contest.seeds])
        tabulate()
    if any(run.is_finished for (stage, *_), run in placed.items() if stage == SEEDS):
        check_primary(contest, placed)
        print(report(contest, output, options.plots))
        say_what_was_written(output, RESULTS, RUNS, MEASURES, CURVES, "comparisons.csv")
    raise_if_failed(failed, list(placed.values()))


def check_primary(contest: Contest, placed: dict[tuple[str, str, float, int], Run]) -> None:
    """Raise ``UserValueError`` if the runs lack the primary measure."""
    run = next(run for run in placed.values() if run.is_finished)
    value_of_measure(contest, run, "primary", contest.primary)


def say_rates(rates: dict[str, list[float]], best: dict[str, float], widened: bool) -> None:
    """Say each arm's best rate, and whether it lies at the edge of its grid."""
    for name, of_arm in rates.items():
        edge = len(of_arm) > 1 and best[name] in (of_arm[0], of_arm[-1])
        advice = "" if widened else "; --widen tries further ones"
        say(f"{name}: best rate {best[name]:g}" + (f", at the edge of its grid{advice}" * edge))


def _place(key: tuple[str, str, float, int]) -> Row:
    return dict(zip(("stage", "arm", "rate", "seed"), key, strict=True))


def report_again(path: Path, output: Path, plots: bool) -> None:
    """Draw a contest's tables and plots again from its CSV files.

    Raises:
        ValueError, OSError: there are none, or they are another contest's.
    """
    contest = read_contest(path)
    missing = [name for name in (RUNS, MEASURES, CURVES) if not (output / name).is_file()]
    if missing:
        raise UserFileError(f"{output} holds no {missing[0]}; run the contest there first")
    fix(contest, output)
    print(report(contest, output, plots))
