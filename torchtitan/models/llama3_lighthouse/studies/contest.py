"""Which way of training is best? A contest of arms by a rule that is fixed before the runs.

Each arm first tries its learning rates, then trains every seed at the best one.
"""

import math
import shutil
import sys
from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from ..checkpoints.folders import complete_checkpoints
from ..checks.output import check_output
from ..errors import UserFileError, UserValueError
from ..evaluation.figures import check_plots
from ..evaluation.progress import say, say_what_was_written
from .contest_checks import check_runs, check_text
from .contest_data import (
    CURVES,
    MEASURES,
    PLACES,
    RATES,
    RUNS,
    SEEDS,
    TIMES,
    Logs,
    is_trained,
    mark_revision,
    mark_start,
    mark_trained,
    read_times,
    spreads_in_words,
    start_id,
    starts_used,
    unsteady,
    write_data,
    write_times,
)
from .contest_file import Contest, fix, read_contest, write_record
from .contest_list import plan_lines
from .contest_measures import MEASURES_FILE, TUNING, Number, write_numbers
from .contest_plan import Planner, last_checkpoint
from .contest_rates import (
    WIDENED,
    Place,
    best_rates,
    only_rates,
    rates_of,
    say_rates,
    tried_places,
    widen,
)
from .contest_report import COMPARISONS, RESULTS, report
from .contest_taken import Earlier, Purpose, earlier_contests, take
from .recovery import remove_cut_off
from .recovery_plan import CHECKPOINTS
from .sweeps import (
    ERROR_LINE,
    Environment,
    Run,
    SweepOptions,
    lock_folder,
    process_of_sweep,
    raise_if_failed,
    sweep,
    train,
)

# Folders of text may lie elsewhere when a contest goes on, as its record holds what they contain.
PATHS_OF_TEXT = ("training.dataset_path", "validation.dataset_path")
# How often a run that tells times runs at most, where another process disturbs it.
TIMINGS = 3


class _Contestants:
    """Trains and measures the runs of a contest, and writes what they gave."""

    def __init__(
        self, planner: Planner, options: SweepOptions, earlier: Sequence[Earlier], lock: TextIO
    ) -> None:
        self.contest, self.planner, self.earlier = planner.contest, planner, earlier
        self.options, self.lock, self.logs = options, lock, Logs()
        # Stage, arm, rate and seed to run.
        self.placed: dict[tuple[str, str, float, int], Run] = {}
        # Runs that tell the times of an arm.
        self.timed: dict[str, Run] = {}
        self.failed: list[str] = []

    def train_all(self, stage: str, asked: Iterable[Place]) -> dict[Place, Run]:
        """Train and measure what has not finished."""
        planned = self._planned(asked)
        for (_, _, seed), run in planned.items():
            purpose = Purpose.JUDGE if seed in self.contest.seeds else Purpose.CHOOSE
            take(run, self.earlier, PATHS_OF_TEXT, purpose, seed)
            clear_unmeasured(run)
        # A run that goes on, or only has to be measured, needs no weights to begin from.
        runs = {
            key: replace(run, needs=None) if has_begun(run) else run for key, run in planned.items()
        }
        self.placed.update({(stage, *key): run for key, run in runs.items()})
        sources = {run.needs.folder: run.needs for run in runs.values() if run.needs}
        for source in sources.values():
            take(source, self.earlier, PATHS_OF_TEXT, Purpose.BEGIN)
            renew(source)
            # Before threads ask for it.
            if source.is_finished:
                start_id(source)
        self._sweep([*sources.values(), *runs.values()], self.options, stage, sources)
        return runs

    def place(self, stage: str, asked: Iterable[Place]) -> dict[Place, Run]:
        """As ``train_all``, but only take in what has finished."""
        runs = self._planned(asked)
        self.placed.update({(stage, *key): run for key, run in runs.items() if run.is_finished})
        return runs

    def forget_other_rates(self, arms: Container[str], best: Mapping[str, float]) -> None:
        """Leave out runs that would judge an arm at another rate than its best."""
        self.placed = {
            (stage, arm, rate, seed): run
            for (stage, arm, rate, seed), run in self.placed.items()
            if stage != SEEDS or arm not in arms or rate == best.get(arm)
        }

    def _planned(self, asked: Iterable[Place]) -> dict[Place, Run]:
        return {key: self.planner.run(self.contest.arms[key[0]], *key[1:]) for key in asked}

    def time(self, arms: Iterable[str]) -> None:
        """Learn the times of arms from short runs that share no GPU."""
        self.timed = {name: self.planner.timing_run(self.contest.arms[name]) for name in arms}
        # Times depend neither on the rate nor on the seed.
        moved = {*PATHS_OF_TEXT, "optimizer.lr", *self.contest.seed_keys}
        for run in self.timed.values():
            take(run, self.earlier, moved, Purpose.TIME)
        for number in range(1, TIMINGS + 1):
            self._sweep(list(self.timed.values()), self.options.alone(), stage="", moved=moved)
            self.tabulate()
            if not self._say_unsteady(again=number < TIMINGS):
                break

    def _say_unsteady(self, again: bool) -> bool:
        """Whether a run told times on a GPU that something else seems to have used.

        Args:
            again: clear such runs, so that they run again.
        """
        # The cores of a CPU are never a run's own.
        found = unsteady(self.options.output) if _device() == "cuda" else {}
        found = {arm: found[arm] for arm in self.timed.keys() & found.keys()}
        for arm, kinds in sorted(found.items()):
            run = self.timed[arm]
            say(
                f"{run.name}: the median of steps of {spreads_in_words(kinds)} above their lower "
                "quartile; another process may have used the GPU, "
                + ("so it runs again" if again else "and the arm may get too few steps")
            )
            if again:
                shutil.rmtree(run.folder)
                self.logs.forget(run)
        return bool(found)

    def _sweep(
        self,
        runs: list[Run],
        options: SweepOptions,
        stage: str,
        sources: Container[Path] = (),
        moved: Container[str] = PATHS_OF_TEXT,
    ) -> None:
        """Train runs, and measure those of a stage; the runs that tell times belong to none.

        Args:
            sources: folders of runs that others begin from, which are not measured.
            moved: keys that may have another value than when a run began.
        """
        # Without GPUs, runs side by side share the cores.
        alone = options.at_once == 1 or (options.per_gpu == 1 and torch.cuda.is_available())

        def train_run(run: Run, title: str, environment: Environment) -> int:
            if not is_trained(run):
                goes_on = has_begun(run)
                if run.needs:
                    mark_start(run, run.needs)
                mark_revision(run, goes_on)
                if code := train(run, options.processes, title, environment, self.lock):
                    if stage == RATES and run.folder not in sources and has_diverged(run):
                        say(f"{title}: diverged, so that this rate is not the best")
                        write_numbers(run.folder, [Number(self.contest.tuned_by, None, math.nan)])
                        return 0
                    return code
                mark_trained(run, alone)
                if run.folder in sources:
                    say_which_start(run, title)
            if not stage or run.folder in sources or (run.folder / MEASURES_FILE).exists():
                return 0
            say(f"{title}: measuring")
            return measure(self.contest, run, environment, self.lock)

        self.failed += sweep(runs, train_run, self.tabulate, options.slots(), moved)

    def tabulate(self) -> None:
        done = {key: run for key, run in self.placed.items() if run.is_finished}
        timed = [(name, run) for name, run in self.timed.items() if run.is_finished]
        output = self.options.output
        write_times([*timed, *((key[1], run) for key, run in done.items())],
                    self.logs, self.options.processes, output)  # fmt: skip
        if done:
            write_data([(dict(zip(PLACES, key, strict=True)), run) for key, run in done.items()],
                       self.logs, output)  # fmt: skip


def has_begun(run: Run) -> bool:
    """Whether a run has weights of its own to go on with, or none to train.

    What an interruption left that no resume can use is removed.
    """
    if run.is_finished or is_trained(run):
        return True
    if run.folder.is_dir():
        remove_cut_off(run)
    return bool(complete_checkpoints(run.folder / CHECKPOINTS))


def clear_unmeasured(run: Run) -> None:
    """Clear a run that was trained but not measured if its weights are gone."""
    measured = run.is_finished or (run.folder / MEASURES_FILE).exists()
    if is_trained(run) and not measured and not last_checkpoint(run).is_dir():
        say(f"{run.name} trains again, as its weights are gone and it was not measured")
        shutil.rmtree(run.folder)


def renew(source: Run) -> None:
    """Clear a run that others begin from if its weights are gone, so that it trains again."""
    if last_checkpoint(source).is_dir():
        return
    was_trained = source.is_finished or is_trained(source)
    if was_trained or starts_used(source):
        say(
            f"{source.name} trains again, as its weights are gone; the new ones may be another "
            "model than the one that finished runs began from"
        )
    if was_trained:
        shutil.rmtree(source.folder)


def say_which_start(source: Run, title: str) -> None:
    """Name a training of a run that others begin from, and compare it with earlier ones."""
    name, used = start_id(source), starts_used(source)
    if used == {name}:
        say(f"{title}: the same model as before, as each loss and gradient norm is the same")
    elif used:
        say(f"{title}: another model than before; the column `start` of {RUNS} tells them apart")


def has_diverged(run: Run) -> bool:
    """Whether the last error of a run that failed was a loss or gradient that is not finite."""
    errors = ERROR_LINE.findall((run.folder / "log.txt").read_text(errors="replace"))
    return bool(errors) and "not finite" in errors[-1]


def measure(contest: Contest, run: Run, environment: Environment, lock: TextIO) -> int:
    """Measure a trained run on the GPU it had, and return the exit code."""
    module = "torchtitan.models.llama3_lighthouse.studies.contest_measures"
    command = [sys.executable, "-m", module, str(contest.path), str(run.folder)]
    # A run that chooses a rate and does not judge it needs little more than that.
    if run.settings[contest.seed_keys[0]] not in contest.seeds:
        command.append(TUNING)
    with (
        (run.folder / "log.txt").open("a", buffering=1) as log,
        process_of_sweep(command, environment, lock, stdout=log, stderr=log) as process,
    ):
        process.wait()
    return process.returncode


@contextmanager
def _begun(
    planner: Planner, options: SweepOptions, folders: Sequence[Path]
) -> Generator[_Contestants, None, None]:
    """Record what rules the results, or compare it, and keep other sweeps out meanwhile.

    Args:
        folders: outputs of earlier contests.
    """
    record = check_text(planner)
    earlier = earlier_contests(folders, planner.contest, record)
    fix(planner.contest, options.output, record)
    with lock_folder(options.output) as lock:
        yield _Contestants(planner, options, earlier, lock)


def run_contest(
    path: Path,
    options: SweepOptions,
    extra: list[str],
    widened: bool = False,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    earlier: Sequence[Path] = (),
) -> None:
    """Train and measure what is left of a contest, and report after every run.

    Args:
        extra: overrides for every run.
        widened: whether to add rates to grids whose best lies at the edge.
        arms: those to train now; all by default.
        seeds: those to train at the best rates now; all by default.
        earlier: outputs of earlier contests, whose finished runs stand for equal ones of this.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
        RunsFailed: some runs failed; the others have finished.
    """
    contest, output = read_contest(path), options.output
    options.slots()
    check_output(output)
    planner = Planner(contest, output, extra, options.processes)
    if unknown := set(arms) - contest.arms.keys():
        raise UserValueError(
            f"--arms {min(unknown)} is no arm of {path}; use {', '.join(contest.arms)}"
        )
    if others := set(seeds) - {*contest.seeds}:
        raise UserValueError(
            f"--seeds {min(others)} is no seed of {path}; use {', '.join(map(str, contest.seeds))}"
        )
    arms = arms or list(contest.arms)
    rates = rates_of(contest, output)
    # A list may come before the machines.
    device = None if options.only_list else _device()
    check_runs(planner, rates, options.per_gpu > 1, device)
    if options.only_list:
        print("\n".join(plan_lines(planner, rates, arms)))
        return
    with _begun(planner, options, earlier) as contestants:
        if contest.gpu_seconds and (untimed := [n for n in arms if n not in planner.steps]):
            contestants.time(untimed)
            raise_if_failed(contestants.failed, list(contestants.timed.values()))
            planner.set_steps(read_times(output), untimed)
        # Finished runs stay in the records while others train.
        _place_finished(contestants, rates)
        best = _choose_rates(contestants, rates, arms, widened)
        contestants.forget_other_rates(arms, best)
        places = [(name, best[name], seed) for name in best for seed in contest.seeds]
        contestants.place(SEEDS, places)
        contestants.train_all(SEEDS, [each for each in places if not seeds or each[2] in seeds])
        if options.per_gpu > 1 and not contest.gpu_seconds:
            contestants.time(arms)
        contestants.tabulate()
    placed, failed = contestants.placed, contestants.failed
    if any(run.is_finished for (stage, *_), run in placed.items() if stage == SEEDS):
        print(report(contest, output, options.plots))
        say_what_was_written(output, RESULTS, RUNS, MEASURES, CURVES, TIMES, COMPARISONS)
    raise_if_failed(failed, list(placed.values()))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def time_arms(
    path: Path, options: SweepOptions, extra: list[str], earlier: Sequence[Path] = ()
) -> None:
    """Learn only the times of the arms on this machine, and write ``TIMES``.

    Raises:
        As ``run_contest``.
    """
    contest, output = read_contest(path), options.output
    options.slots()
    check_output(output)
    planner = Planner(contest, output, extra, options.processes)
    check_runs(planner, rates_of(contest, output), timed=True, device=_device())
    with _begun(planner, options, earlier) as contestants:
        contestants.time(contest.arms)
    say_what_was_written(output, TIMES)
    raise_if_failed(contestants.failed, list(contestants.timed.values()))


def _place_finished(contestants: _Contestants, rates: dict[str, list[float]]) -> None:
    """Take in what finished before, of arms whose rate is known.

    An arm of which added rates have not finished has the best of its file.
    """
    contest = contestants.contest
    tried = contestants.place(RATES, tried_places(contest, rates, contest.arms))
    of_file = {key: run for key, run in tried.items() if key[1] in contest.arms[key[0]].rates}
    best = only_rates(rates, contest.arms)
    best |= best_rates(contest, of_file) | best_rates(contest, tried)
    contestants.place(SEEDS, [(name, best[name], seed) for name in best for seed in contest.seeds])


def _choose_rates(
    contestants: _Contestants, rates: dict[str, list[float]], arms: Sequence[str], widened: bool
) -> dict[str, float]:
    """Each arm's best rate, without the arms of which a run failed."""
    contest = contestants.contest
    best = only = only_rates(rates, arms)
    while len(only) < len(arms):
        tried = contestants.train_all(RATES, tried_places(contest, rates, arms))
        best = only | best_rates(contest, tried)
        say_rates({name: rates[name] for name in arms}, best, widened)
        if not widened or not widen(contest, rates, best):
            break
        write_record(contestants.options.output / WIDENED, rates)
    return best


def report_again(path: Path, output: Path, plots: bool) -> None:
    """Draw a contest's tables and plots again from its CSV files.

    Raises:
        ValueError, OSError: there are none, they are another contest's, or plots cannot be drawn.
    """
    check_plots(plots)
    contest = read_contest(path)
    missing = [name for name in (RUNS, MEASURES, CURVES) if not (output / name).is_file()]
    if missing:
        raise UserFileError(f"{output} holds no {missing[0]}; run the contest there first")
    fix(contest, output)
    print(report(contest, output, plots))
