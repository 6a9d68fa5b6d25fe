"""Training runs, a few at a time, each in a folder of its own, taken up where they stopped."""

import argparse
import copy
import ctypes
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from lighthouse_commands.arguments import check_plots, parse_with_overrides

from ..errors import UserValueError
from ..job_config import JobConfig
from ..metrics import METRICS_FILE

STEP_LINE = re.compile(r"(?<!validate )step: *(\d+) +loss: *(\S+).*?tps: *(\S+)")
ERROR_LINE = re.compile(r" - ERROR - (.+)")
SECONDS_BETWEEN_LINES = 10.0
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
# In a run's folder, once it has trained to its end.
FINISHED = "finished"
# What the threads of a sweep wait for, so that the main one can end it.
under_way: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Attributes:
        settings: section.key to value of what tells it from the others.
        arguments: the trainer's command line.
        folder: its job.dump_folder.
        config: what the command line says.
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


def parse_sweep(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Add what every sweep takes, and parse; what is left goes to the runs.

    Raises:
        ValueError: a value breaks a rule, or plots cannot be drawn.
    """
    parser.add_argument("--processes", type=int, default=1, help="of each run, on this machine")
    parser.add_argument("--at-once", type=int, default=1, metavar="RUNS",
                        help="that train side by side, each on as many GPUs of its own as it has "
                        "processes; default: 1")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--no-plots", action="store_true")
    arguments, extra = parse_with_overrides(parser)
    check_plots(arguments.no_plots or arguments.list)
    for flag in ("processes", "at_once"):
        if getattr(arguments, flag) < 1:
            name = flag.replace("_", "-")
            raise UserValueError(f"--{name} {getattr(arguments, flag)} must be at least 1")
    arguments.slots = slots_of(arguments.at_once, arguments.processes)
    return arguments, extra


def slots_of(at_once: int, processes: int) -> list[dict[str, str]]:
    """For each of the runs that train side by side, the environment that gives it its GPUs.

    Raises:
        ValueError: there are too few.
    """
    gpus = torch.cuda.device_count()
    if at_once == 1 or gpus == 0:
        return [{}] * at_once
    if at_once * processes > gpus:
        raise UserValueError(
            f"--at-once {at_once} with --processes {processes} needs {at_once * processes} GPUs, "
            f"and {gpus} are here; pass fewer of either"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    names = visible.split(",")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + processes])}
            for first in range(0, at_once * processes, processes)]  # fmt: skip


def value_of(config: JobConfig, key: str) -> Any:
    """The value of section.key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def with_settings(config: JobConfig, settings: dict[str, Any]) -> JobConfig:
    """A copy of a configuration with other values of section.key."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        setattr(value_of(config, section), name, value)
    return config


def keys_given(arguments: list[str]) -> set[str]:
    """section.key of every flag of a trainer's command line."""
    flags = (word[2:].partition("=")[0] for word in arguments if word[:2] == "--")
    return {flag.replace(".no-", ".") for flag in flags}


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """What every step logged; of a step that ran again after a restart, the last time."""
    steps: dict[int, dict[str, float]] = {}
    for line in (folder / METRICS_FILE).read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            # Cut off by a crash, after which the step ran again.
            continue
        steps.setdefault(entry["step"], {}).update(entry)
    return dict(sorted(steps.items()))


def command_line(settings: dict[str, Any]) -> list[str]:
    """``settings`` as the trainer's flags."""
    line = []
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if isinstance(value, bool):
            line.append(f"--{section}.{name}" if value else f"--{section}.no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            line += [f"--{key}", *map(str, values)]
    return line


def record_of(config: JobConfig) -> str:
    """All of a configuration that a run depends on."""
    return json.dumps({k: v for k, v in config.to_dict().items() if k != "job"}, indent=1)


def trainer_command(processes: int, arguments: list[str]) -> list[str]:
    """Launches the trainer on this machine, the output of the first rank alone, without colours."""
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(processes)]
    command += ["--local-ranks-filter", "0", "--role", "rank", "--tee", "3"]
    command += ["-m", "torchtitan.models.llama3_lighthouse.train", *arguments]
    return [*command, "--metrics.disable_color_printing"]


def end_with_parent() -> None:
    """In a child, before it runs: have it end with its parent, however that one ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def train(run: Run, processes: int, title: str, environment: dict[str, str], lock: TextIO) -> int:
    """Train it through torchrun, show how far it is, and return the exit code."""
    command = trainer_command(processes, run.arguments)
    shown = 0.0
    with (
        (run.folder / "log.txt").open("a", buffering=1) as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
                **os.environ,
                **environment,
            },
            preexec_fn=end_with_parent,
            # Until it has ended it keeps the lock.
            pass_fds=[lock.fileno()],
        ) as process,
    ):
        under_way.add(process)
        try:
            for line in process.stdout:
                log.write(line)
                match = STEP_LINE.search(line)
                if match and time.monotonic() - shown > SECONDS_BETWEEN_LINES:
                    step, loss, speed = match.groups()
                    print(f"{title}: step {step} of {run.config.training.steps}, loss {loss}, "
                          f"{speed} tokens/s", flush=True)  # fmt: skip
                    shown = time.monotonic()
        except BaseException:
            process.terminate()
            raise
        finally:
            under_way.discard(process)
    return process.returncode


def begin(run: Run) -> bool:
    """Make its folder; whether there is anything left to do in it.

    Raises:
        ValueError: the folder holds a run of another configuration.
    """
    record, config = run.folder / "config.json", record_of(run.config)
    if record.exists():
        before, now = json.loads(record.read_text()), json.loads(config)
        # A key that the record lacks is newer than the run, which had its default.
        defaults = json.loads(record_of(JobConfig()))
        differing = [
            f"{section}.{key}"
            for section, values in now.items()
            for key, value in values.items()
            if before.get(section, {}).get(key, defaults[section][key]) != value
        ]
        if differing:
            raise UserValueError(
                f"{run.folder} holds a run with another {', '.join(differing)}; pass --output "
                "FOLDER with one of its own, or remove it"
            )
    run.folder.mkdir(parents=True, exist_ok=True)
    record.write_text(config)
    return not run.is_finished


def sweep(
    runs: list[Run],
    train_run: Callable[[Run, str, dict[str, str]], int],
    on_finished: Callable[[], None],
    slots: list[dict[str, str]],
) -> list[str]:
    """Train what has not finished, and return the names of the runs that failed.

    Args:
        train_run: trains a run under an environment, shows its progress under a title, and
            returns the exit code.
        on_finished: called after every run that finished.
        slots: the environments of those that train at once.
    """
    waiting = [run for run in runs if begin(run)]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished earlier", flush=True)
    failed, free = [], list(slots)
    active: dict[Future, tuple[Run, dict[str, str], float]] = {}

    def title(run: Run) -> str:
        return f"[{runs.index(run) + 1}/{len(runs)}] {run.name}"

    def under_training() -> list[Run]:
        return [run for run, _, _ in active.values()]

    def start_what_can() -> None:
        for run in list(waiting):
            if not run.needs or run.needs.is_finished:
                if free:
                    waiting.remove(run)
                    print(f"{title(run)}: begins", flush=True)
                    slot = free.pop(0)
                    future = pool.submit(train_run, run, title(run), slot)
                    active[future] = run, slot, time.monotonic()
            elif run.needs.folder not in {each.folder for each in (*waiting, *under_training())}:
                waiting.remove(run)
                failed.append(run.name)
                print(f"{title(run)}: left out, as it begins from {run.needs.name}",
                      file=sys.stderr)  # fmt: skip

    def end(run: Run, code: int, seconds: float) -> None:
        if code:
            failed.append(run.name)
            log = run.folder / "log.txt"
            reasons = ERROR_LINE.findall(log.read_text(errors="replace"))
            reason = f": {reasons[-1]}" if reasons else ""
            print(f"{title(run)}: failed with exit code {code}{reason}; see {log}",
                  file=sys.stderr, flush=True)  # fmt: skip
            return
        (run.folder / FINISHED).touch()
        on_finished()
        print(f"{title(run)}: done in {seconds:.0f} s", flush=True)

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            start_what_can()
            while active:
                for future in wait(active, return_when=FIRST_COMPLETED).done:
                    run, slot, start = active.pop(future)
                    free.append(slot)
                    end(run, future.result(), time.monotonic() - start)
                start_what_can()
        except BaseException:
            for process in list(under_way):
                process.terminate()
            raise
    return failed


def finished(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.is_finished]


@contextmanager
def lock_folder(output: Path) -> Iterator[TextIO]:
    """Keep other sweeps out of ``output``, an existing folder.

    Raises:
        ValueError: another one is in it.
    """
    with (output / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserValueError(
                f"{output} is in use by another sweep, or one that is just ending; wait for it, or "
                "pass --output FOLDER"
            ) from None
        yield lock
