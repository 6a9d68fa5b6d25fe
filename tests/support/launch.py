"""Starts training processes for tests, and reads what they recorded."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import speed_up_interpreter
from torch.distributed.elastic.utils.distributed import get_free_port

# Importing the trainer takes longer than most tests train. One server imports it, and every rank is
# a fork of that server. With a GPU that fails: once used, its driver does not work in forks.
CAN_FORK = not torch.cuda.is_available()
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preloaded_trainer"])
SCRIPT = Path(__file__).with_name("training_process.py")

# The smallest model that commands know in processes of their own.
DEBUG = {"model.flavor": "debugmodel", "lighthouse.dense_layers": [0, 5]}
# Both stages, at the smallest size at which all parts of the method do something. S is half of N.
SMALL = {
    **DEBUG,
    "lighthouse.dense_from_step": 6,
    "lighthouse.levels": 3,
    "lighthouse.pooling_factor": 2,
    "lighthouse.top_k": 32,
    "lighthouse.picks_per_stratum": 16,
    "training.seq_len": 512,
    "training.local_batch_size": 1,
    "training.steps": 12,
    "training.mixed_precision_param": "float32",
    "lr_scheduler.warmup_steps": 4,
    "lr_scheduler.decay_ratio": 0.0,
    "metrics.log_freq": 1,
    "checkpoint.enable": True,
    "checkpoint.interval": 5,
    "activation_checkpoint.mode": "none",
}

# The flavor of ``small_flavor``, which trains and saves several times as fast as the product's.
FAST = {"model.flavor": "small", "lighthouse.dense_layers": [0, 3]}
# Half as long, for runs: most of their time goes into steps. S is half of N here too.
TRAINED = {
    **SMALL,
    **FAST,
    "training.seq_len": 256,
    "lighthouse.top_k": 16,
    "lighthouse.picks_per_stratum": 8,
}

# Three steps, the first two in the Lighthouse stage. All are validated, and the last two are saved.
VALIDATED = {
    "lighthouse.dense_from_step": 2,
    "training.steps": 3,
    "checkpoint.interval": 2,
    "validation.enable": True,
    "validation.seq_len": 256,
    "validation.local_batch_size": 2,
    "validation.freq": 1,
    "validation.steps": 3,
}


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line arguments of the trainer."""
    # The import is here, because every fork of a trainer imports this module and would import it.
    import small_flavor  # noqa: F401

    from torchtitan.models.llama3_lighthouse.studies.settings import command_line

    return command_line(settings)


def start_server() -> None:
    """Start the process that forks the others, unless it runs. It looks in this folder too."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def run_ranks(worker: Callable[..., None], *arguments: object, processes: int) -> None:
    """Run ``worker(rank, *arguments)`` in a process for each rank, and wait for all of them."""
    method = "forkserver" if CAN_FORK else "spawn"
    if CAN_FORK:
        start_server()
    arguments = (worker, *arguments)
    torch.multiprocessing.start_processes(_rank, arguments, processes, start_method=method)


def _rank(rank: int, worker: Callable[..., None], *arguments: object) -> None:
    speed_up_interpreter()
    worker(rank, *arguments)


def exit_code_of(
    main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *line: object
) -> int | str | None:
    """Run a command's ``main`` on the command line ``line``; return its exit code or message."""
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    try:
        main()
    except SystemExit as exit:
        return exit.code
    return None


def _train(line: list[str], log_file: Path, environment: dict[str, str]) -> None:
    """Do in a fork what ``python training_process.py`` does."""
    with log_file.open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    # A child of the fork server starts further processes from that server; other processes do not.
    multiprocessing.set_start_method(None, force=True)
    sys.argv = [str(SCRIPT), *line]
    runpy.run_path(str(SCRIPT), run_name="__main__")


class Forks:
    """One process for each rank, without torchrun. When one fails, all end."""

    def __init__(
        self, line: list[str], processes: int, log_file: Path, environment: dict[str, str]
    ) -> None:
        environment = {
            **environment, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port()),
        }  # fmt: skip
        start_server()
        self.ranks = []
        for rank in map(str, range(processes)):
            arguments = (line, log_file, {**environment, "RANK": rank, "LOCAL_RANK": rank})
            self.ranks.append(FORKS.Process(target=_train, args=arguments))
            self.ranks[-1].start()

    def poll(self) -> int | None:
        """Exit code of a rank that failed, or 0 if none did; None while one runs."""
        codes = [rank.exitcode for rank in self.ranks]
        if any(codes):
            self.terminate()
        return None if None in codes else next(filter(None, codes), 0)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = deadline - time.monotonic()
            running = [rank.sentinel for rank in self.ranks if rank.exitcode is None]
            if running and not wait(running, left):
                self.kill()
                raise TimeoutError(f"still training after {timeout} s")
        return code

    def terminate(self) -> None:
        for rank in self.ranks:
            rank.terminate()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()


class Run:
    """One launch of training processes.

    Args:
        folder: takes the log, the record and the trainer's own files.
        settings: override those of ``TRAINED``.
        processes: number of ranks.
        torchrun: start them by torchrun rather than as forks.
        environment: further environment variables.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any] | None = None,
        processes: int = 1,
        torchrun: bool = False,
        **environment: str,
    ) -> None:
        self.record_file = folder / "record"
        self.processes = processes
        self.lines_before = len(self.lines(0))
        line = arguments({"job.dump_folder": folder / "dump", **TRAINED, **(settings or {})})
        self.log_file = folder / f"log-{time.monotonic_ns()}"
        self.log_file.touch()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RECORD_FILE": str(self.record_file),
            **environment,
        }
        if CAN_FORK and not torchrun:
            self.process = Forks(line, processes, self.log_file, environment)
            return
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(processes)]
        self.process = subprocess.Popen(
            [*command, str(SCRIPT), *line],
            env=environment,
            stdout=self.log_file.open("w"),
            stderr=subprocess.STDOUT,
        )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait(self, timeout: float = 300) -> int:
        """Wait for all processes to end; return the exit code."""
        return self.process.wait(timeout)

    def succeed(self) -> "Run":
        assert self.wait() == 0, self.log[-6000:]
        return self

    def crash_after_step(self, step: int) -> None:
        """Kill every worker without warning as soon as ``step`` has been recorded."""
        self.wait_for_step(step)
        for pid in {line["pid"] for line in self.all_lines()[-self.processes :]}:
            os.kill(pid, signal.SIGKILL)
        assert self.wait() != 0

    def stop_after_step(self, step: int) -> None:
        """Ask the launcher to stop, as a cluster's scheduler does, once ``step`` is recorded."""
        self.wait_for_step(step)
        self.process.terminate()
        assert self.wait() != 0

    def wait_for_step(self, step: int, timeout: float = 300) -> None:
        """Wait until this launch has recorded ``step``, or a later one, on the first rank."""
        deadline = time.monotonic() + timeout
        while not any(line["step"] >= step for line in self.lines(0)[self.lines_before :]):
            if self.process.poll() is not None or time.monotonic() > deadline:
                # A process that lives on would keep the tests from ending.
                self.process.kill()
                raise AssertionError(self.log[-6000:])
            time.sleep(0.02)

    def all_lines(self) -> list[dict[str, Any]]:
        """The records of all ranks, and then each rank's last one again."""
        ranks = [self.lines(rank) for rank in range(self.processes)]
        return sum(ranks, []) + [lines[-1] for lines in ranks]

    def lines(self, rank: int) -> list[dict[str, Any]]:
        """The records of one rank, in the order in which they were written."""
        path = Path(f"{self.record_file}-{rank}")
        if not path.exists():
            return []
        # A line that is still being written has no newline yet.
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self, rank: int = 0) -> dict[int, dict[str, Any]]:
        """The record of each step; for a step that ran twice, that of the last time."""
        return {line["step"]: line for line in self.lines(rank)}


def validation_losses(run: Run) -> dict[str, float]:
    """The validation losses in a run's log, by step."""
    found = re.findall(r"step +(\d+) of \d+ +held-out loss +([\d.]+)", run.log)
    return {step: float(loss) for step, loss in found}


def continued(run: Run, folder: Path, step: int, **settings: Any) -> Run:
    """Go on from one of the run's checkpoints, in ``folder``."""
    (folder / "dump/checkpoint").mkdir(parents=True)
    name = f"dump/checkpoint/step-{step}"
    shutil.copytree(run.log_file.parent / name, folder / name)
    return Run(folder, run.settings | settings).succeed()
