"""Training runs, a few at a time, each in a folder of its own, taken up where they stopped."""

import heapq
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Container, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from ..checkpoints.resume import all_differences
from ..console import duration
from ..errors import UserError, UserValueError
from ..evaluation.figures import check_plots
from ..evaluation.progress import Progress, say
from ..job_config import JobConfig
from ..metrics import METRICS_FILE, STEP_LINE
from ..processes import LOCK_FILE, die_with_parent, open_locked
from .settings import record_of

ERROR_LINE = re.compile(r"^Error: (.+)", re.MULTILINE)
# This file in a run's folder says that the run trained to its end.
FINISHED = "finished"
# This one holds its configuration.
CONFIG = "config.json"
# Processes that the threads of a sweep wait for, so that the main thread can end them.
under_way: set[subprocess.Popen] = set()

Environment = dict[str, str]


class RunsFailed(UserError):
    """Some runs of a sweep failed; their logs say why."""


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep runs.

    Attributes:
        output: folder of the sweep.
        processes: training processes of each run.
        at_once: runs that train side by side.
        only_list: whether to say what would run, and end.
        per_gpu: runs of one process that share each GPU.
    """

    output: Path
    processes: int = 1
    at_once: int = 1
    only_list: bool = False
    plots: bool = True
    per_gpu: int = 1

    def slots(self) -> list[Environment]:
        """Check the options, and return the environments of runs that train side by side.

        Raises:
            ValueError: a number breaks a rule, or plots cannot be drawn.
        """
        check_plots(self.plots and not self.only_list)
        for flag, value in (
            ("processes", self.processes),
            ("at-once", self.at_once),
            ("per-gpu", self.per_gpu),
        ):
            if value < 1:
                raise UserValueError(f"--{flag} {value} must be at least 1")
        if self.per_gpu > 1 and self.processes > 1:
            raise UserValueError(
                f"--per-gpu {self.per_gpu} shares GPUs among runs of one process; leave out "
                f"--processes {self.processes}"
            )
        return slots_of(self.at_once, self.processes, self.per_gpu)

    def alone(self) -> "SweepOptions":
        """The same with no GPU shared, on as many GPUs; without GPUs, one run at a time."""
        at_once = math.ceil(self.at_once / self.per_gpu) if torch.cuda.is_available() else 1
        return replace(self, at_once=at_once, per_gpu=1)


@dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Attributes:
        settings: section.key to value of the settings that tell it from the others.
        arguments: the trainer's command line.
        folder: the run's job.dump_folder.
        config: the configuration that the command line makes.
        refusal: why it cannot run, or None.
        needs: the run whose checkpoint it begins from, or None.
        start: the step of that checkpoint, 0 from scratch.
    """

    settings: dict[str, Any]
    arguments: list[str]
    folder: Path
    config: JobConfig
    refusal: str | None = None
    needs: "Run | None" = None
    start: int = 0

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_finished(self) -> bool:
        return (self.folder / FINISHED).exists()


def slots_of(at_once: int, processes: int, per_gpu: int = 1) -> list[Environment]:
    """For each of the runs that train side by side, the environment that gives it its GPUs.

    Raises:
        ValueError: there are too few GPUs, or none that runs could share.
    """
    gpus = torch.cuda.device_count()
    if per_gpu > 1 and not gpus:
        raise UserValueError(
            f"--per-gpu {per_gpu} shares GPUs among runs, and torch sees none here; leave it out, "
            "and let --at-once be the runs that this machine's processors can train side by side"
        )
    if at_once == 1 or gpus == 0:
        return [{}] * at_once
    needed = math.ceil(at_once * processes / per_gpu)
    if needed > gpus:
        raise UserValueError(
            f"--at-once {at_once} with --processes {processes} needs {needed} GPUs, and "
            f"{gpus} are here; pass fewer of either"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    names = visible.split(",")
    if per_gpu > 1:
        return [{"CUDA_VISIBLE_DEVICES": names[number % needed]} for number in range(at_once)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + processes])}
            for first in range(0, at_once * processes, processes)]  # fmt: skip


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """The log entries of every step; a step that ran again after a restart has its last ones."""
    steps: dict[int, dict[str, float]] = {}
    for line in (folder / METRICS_FILE).read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            # A crash cut the line off, and the step ran again.
            continue
        steps.setdefault(entry["step"], {}).update(entry)
    return dict(sorted(steps.items()))


def trainer_command(processes: int, arguments: list[str]) -> list[str]:
    """The command that trains on this machine; the configuration has been checked before."""
    command = [sys.executable, "-m", "lighthouse_commands.main", "train", "--no-check"]
    return [*command, "--processes", str(processes), *arguments]


@contextmanager
def process_of_sweep(
    command: list[str], environment: Environment, lock: TextIO, **options: Any
) -> Generator[subprocess.Popen, None, None]:
    """A process that ends with the sweep, and keeps the sweep's lock until it has ended.

    Args:
        environment: variables besides those of this process.
        options: further ones of ``subprocess.Popen``.
    """
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        # A training run saves at this signal, and ends.
        preexec_fn=partial(die_with_parent, number=signal.SIGTERM),
        pass_fds=[lock.fileno()],
        **options,
    ) as process:
        under_way.add(process)
        try:
            yield process
        except BaseException:
            process.terminate()
            raise
        finally:
            under_way.discard(process)


def train(run: Run, processes: int, title: str, environment: Environment, lock: TextIO) -> int:
    """Train ``run`` through torchrun, show its progress, and return the exit code."""
    # Runs side by side would compete for cores if each of several processes took its share.
    threads = {} if processes == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
    with (
        (run.folder / "log.txt").open("a", buffering=1) as log,
        process_of_sweep(
            trainer_command(processes, run.arguments),
            {**threads, **environment},
            lock,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
        Progress(title, run.config.training.steps, "steps") as bar,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if match := STEP_LINE.search(line):
                step, loss, speed = match.groups()
                steps = int(step.replace(",", ""))
                bar.advance(steps - bar.n, f"loss {loss}, {speed} tokens/s")
    return process.returncode


def differing_keys(record: Path, config: str, moved: Container[str] = ()) -> list[str]:
    """The keys of a recorded configuration that have another value in ``config``, a record too.

    Args:
        moved: keys that may differ.
    """
    differences = all_differences(json.loads(record.read_text()), json.loads(config))
    return [each.key for each in differences if each.key not in moved]


def begin(run: Run, moved: Container[str] = ()) -> bool:
    """Make the run's folder, and return whether there is anything left to train.

    Args:
        moved: keys that may have another value than when the run began.

    Raises:
        ValueError: the folder holds a run of another configuration.
    """
    record, config = run.folder / CONFIG, record_of(run.config)
    if record.exists() and (found := differing_keys(record, config, moved)):
        raise UserValueError(
            f"{run.folder} holds a run with another {', '.join(found)}; "
            "pass --output FOLDER with one of its own, or remove it"
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    record.write_text(config)
    return not run.is_finished


class _Sweep:
    """Runs that wait, train or failed, and the slots that are free."""

    def __init__(
        self,
        runs: Sequence[Run],
        train_run: Callable[[Run, str, Environment], int],
        on_finished: Callable[[], object],
        slots: Sequence[Environment],
        pool: ThreadPoolExecutor,
        moved: Container[str],
    ) -> None:
        self.runs, self.train_run, self.on_finished, self.pool = runs, train_run, on_finished, pool
        # The time that others take is told by runs of which nothing was done before.
        self.fresh = {run.folder for run in runs if not run.folder.exists()}
        self.waiting = [run for run in runs if begin(run, moved)]
        self.free = list(slots)
        self.slots = len(slots)
        self.failed: list[str] = []
        # Seconds of runs, of those that begin from another one and of those that do not.
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.active: dict[Future[int], tuple[Run, Environment, float]] = {}
        say(f"{len(runs)} runs, {len(runs) - len(self.waiting)} of them finished earlier")

    def title(self, run: Run) -> str:
        return f"[{self.runs.index(run) + 1}/{len(self.runs)}] {run.name}"

    def start_ready_runs(self) -> None:
        """Start runs that have a slot and a source that finished; leave out runs that never can."""
        for run in list(self.waiting):
            if not run.needs or run.needs.is_finished:
                if self.free:
                    self.waiting.remove(run)
                    say(f"{self.title(run)}: begins")
                    slot = self.free.pop(0)
                    future = self.pool.submit(self.train_run, run, self.title(run), slot)
                    self.active[future] = run, slot, time.monotonic()
            elif run.needs.folder not in self.unfinished_folders():
                self.waiting.remove(run)
                self.failed.append(run.name)
                say(f"{self.title(run)}: left out, as it begins from {run.needs.name}", error=True)

    def unfinished_folders(self) -> set[Path]:
        """Folders of the runs that wait or train."""
        return {run.folder for run in (*self.waiting, *(each[0] for each in self.active.values()))}

    def wait_for_runs(self) -> None:
        """Wait until a run ends, and note how it did."""
        for future in wait(self.active, return_when=FIRST_COMPLETED).done:
            run, slot, start = self.active.pop(future)
            self.free.append(slot)
            self.end(run, future.result(), time.monotonic() - start)

    def end(self, run: Run, code: int, seconds: float) -> None:
        if code:
            self.failed.append(run.name)
            log = run.folder / "log.txt"
            reasons = ERROR_LINE.findall(log.read_text(errors="replace"))
            reason = f": {reasons[-1]}" if reasons else ""
            say(f"{self.title(run)}: failed with exit code {code}{reason}; see {log}", error=True)
            return
        (run.folder / FINISHED).touch()
        self.on_finished()
        if run.folder in self.fresh:
            self.seconds[bool(run.needs)].append(seconds)
        left = self.seconds_left()
        rest = f"; about {duration(left)} left" if left else ""
        say(f"{self.title(run)}: done in {duration(seconds)}{rest}")

    def seconds_left(self) -> float:
        """Seconds until the last run ends, if all take as long as their like; 0 if unknown."""
        known = [*self.seconds[True], *self.seconds[False]]
        if not known:
            return 0
        now = time.monotonic()

        def usual(run: Run) -> float:
            return statistics.fmean(self.seconds[bool(run.needs)] or known)

        # When each slot is free, and when each run ends, in seconds from now.
        ends = {run.folder: max(usual(run) - (now - start), 0)
                for run, _, start in self.active.values()}  # fmt: skip
        slots = [*ends.values()] + [0.0] * (self.slots - len(ends))
        heapq.heapify(slots)
        for run in self.waiting:
            ready = ends.get(run.needs.folder, 0.0) if run.needs else 0.0
            ends[run.folder] = max(slots[0], ready) + usual(run)
            heapq.heapreplace(slots, ends[run.folder])
        return max(slots)


def sweep(
    runs: Sequence[Run],
    train_run: Callable[[Run, str, Environment], int],
    on_finished: Callable[[], object],
    slots: Sequence[Environment],
    moved: Container[str] = (),
) -> list[str]:
    """Train what has not finished, and return the names of the runs that failed.

    Args:
        train_run: trains a run under an environment, shows its progress under a title, and
            returns the exit code.
        on_finished: called after every run that finished.
        slots: an environment for each run that trains at the same time.
        moved: keys that may have another value than when a run began.

    Raises:
        ValueError: a folder holds a run of another configuration.
    """
    with ThreadPoolExecutor(len(slots)) as pool:
        state = _Sweep(runs, train_run, on_finished, slots, pool, moved)
        try:
            state.start_ready_runs()
            while state.active:
                state.wait_for_runs()
                state.start_ready_runs()
        except BaseException:
            for process in list(under_way):
                process.terminate()
            raise
    return state.failed


def raise_if_failed(failed: list[str], runs: Sequence[Run]) -> None:
    """Raise ``RunsFailed`` if some of the runs failed."""
    if failed:
        raise RunsFailed(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def finished(runs: Sequence[Run]) -> list[Run]:
    """The runs that trained to their end."""
    return [run for run in runs if run.is_finished]


@contextmanager
def lock_folder(output: Path) -> Generator[TextIO, None, None]:
    """Keep other sweeps out of ``output``, an existing folder.

    A run that inherits the file keeps the lock until it has ended, even if the sweep is killed.

    Raises:
        ValueError: another sweep uses the folder.
    """
    try:
        lock = open_locked(output / LOCK_FILE)
    except BlockingIOError:
        raise UserValueError(
            f"{output} is in use by another sweep, or one that is just ending; wait for it, or "
            "pass --output FOLDER"
        ) from None
    with lock:
        yield lock
