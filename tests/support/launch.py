"""Start training processes for tests, and read what they recorded."""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

# A trainer takes longer to import than most tests train. One process imports it, and every rank is
# forked from that; not with a GPU, whose driver is of no use in a fork once it was asked anything.
CAN_FORK = not torch.cuda.is_available()
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torchtitan.models.llama3_lighthouse.train", "torchtitan.train"])
SCRIPT = Path(__file__).with_name("training_process.py")

# Both stages at the smallest size at which all parts of the method do something: S is half of N.
SMALL = {
    "model.flavor": "debugmodel",
    "lighthouse.dense_from_step": 6,
    "lighthouse.levels": 3,
    "lighthouse.pooling_factor": 2,
    "lighthouse.top_k": 32,
    "lighthouse.picks_per_stratum": 16,
    "lighthouse.dense_layers": (0, 5),
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

# Three steps, of which the first two are Lighthouse's; each validated, the last two saved.
VALIDATED = {
    "lighthouse.dense_from_step": 2,
    "training.steps": 3,
    "checkpoint.interval": 2,
    "validation.enable": True,
    "validation.seq_len": 512,
    "validation.local_batch_size": 2,
    "validation.freq": 1,
    "validation.steps": 3,
}


def arguments(settings: dict) -> list[str]:
    """Settings as command-line arguments of the trainer."""
    line = []
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        if isinstance(value, bool):
            line.append(f"--{section}.{name}" if value else f"--{section}.no-{name}")
        elif isinstance(value, tuple):
            line += [f"--{key}", *map(str, value)]
        else:
            line += [f"--{key}", str(value)]
    return line


def exit_code_of(main: Callable[[], None], monkeypatch, *line: object) -> int | str | None:
    """Run a script's ``main`` on the command line ``line``; the code or message it ends with."""
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    try:
        main()
    except SystemExit as exit:
        return exit.code
    return None


def _train(line: list[str], log_file: Path, environment: dict[str, str]) -> None:
    """In a fork: what ``python training_process.py`` does."""
    with log_file.open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    # A fork server's children would ask it for workers of their own; no other process does.
    multiprocessing.set_start_method(None, force=True)
    sys.argv = [str(SCRIPT), *line]
    runpy.run_path(str(SCRIPT), run_name="__main__")


class Forks:
    """What torchrun starts, without it: a process for each rank, which end together."""

    def __init__(self, line: list[str], processes: int, log_file: Path, environment: dict) -> None:
        environment = {
            **environment, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port()),
        }  # fmt: skip
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
    """One launch of a training process; ``settings`` override those of ``SMALL``."""

    def __init__(
        self, folder: Path, settings: dict | None = None, processes=1, torchrun=False, **environment
    ):
        self.record_file = folder / "record"
        self.processes = processes
        self.lines_before = len(self.lines(0))
        line = arguments({"job.dump_folder": folder / "dump", **SMALL, **(settings or {})})
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
        """Exit code, once it has ended."""
        return self.process.wait(timeout)

    def succeed(self) -> "Run":
        assert self.wait() == 0, self.log[-6000:]
        return self

    def crash_after_step(self, step: int) -> None:
        """Kill every worker without warning as soon as ``step`` has been recorded."""
        self._wait_for_step(step)
        for pid in {line["pid"] for line in self.all_lines()[-self.processes :]}:
            os.kill(pid, signal.SIGKILL)
        assert self.wait() != 0

    def stop_after_step(self, step: int) -> None:
        """Ask the launcher to stop, as a cluster's scheduler does, once ``step`` is recorded."""
        self._wait_for_step(step)
        self.process.terminate()
        assert self.wait() != 0

    def _wait_for_step(self, step: int, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not any(line["step"] >= step for line in self.lines(0)[self.lines_before :]):
            if self.process.poll() is not None or time.monotonic() > deadline:
                # One that lives on would keep the tests from ending.
                self.process.kill()
                raise AssertionError(self.log[-6000:])
            time.sleep(0.02)

    def all_lines(self) -> list[dict]:
        """The lines of all ranks, each rank's last one at the end."""
        ranks = [self.lines(rank) for rank in range(self.processes)]
        return sum(ranks, []) + [lines[-1] for lines in ranks]

    def lines(self, rank: int) -> list[dict]:
        path = Path(f"{self.record_file}-{rank}")
        if not path.exists():
            return []
        # A line that is still being written has no newline yet.
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self, rank: int = 0) -> dict[int, dict]:
        """What each step recorded; of a step that ran twice, the last time."""
        return {line["step"]: line for line in self.lines(rank)}
