"""The part "killed" of the context parallelism benchmark: the end of a run that loses a rank."""

import json
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from context_parallel_jobs import (
    COMPARED,
    Job,
    Settings,
    Sizes,
    Steps,
    largest_difference,
    losses,
    meshes_of,
)

from torchtitan.models.llama3_lighthouse.metrics import METRICS_FILE

TRACES = "comm_traces"
# A collective may take so long, in seconds. After the first failure torchrun gives the other
# processes 30 s to end, and NCCL's recorder writes its files in that time.
TIMEOUT, SECONDS_OF_TORCHRUN = 10, 30
# Without an end after so many seconds, the benchmark ends the processes itself.
PATIENCE = 180.0
STEPS, INTERVAL, DISTURBED_AFTER = 16, 4, 6
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


def process_of_rank(job: Job, rank: int) -> psutil.Process:
    """The training process of ``rank``, a child of the launcher."""
    for child in psutil.Process(job.process.pid).children():
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"rank {rank} has no process")


def wait_for_step(job: Job, step: int) -> None:
    """Wait until ``step`` is over.

    Raises:
        SystemExit: the run ended before.
    """
    while max(job.logged(), default=0) < step:
        if job.process.poll() is not None:
            job.fail()
        time.sleep(0.01)


def seconds_to_the_end(job: Job, processes: list[psutil.Process]) -> float | None:
    """Seconds until the launcher and ``processes`` end; None if they do not, and are killed."""
    start = time.monotonic()
    deadline = start + PATIENCE
    while time.monotonic() < deadline:
        # The launcher is this process's child, and would stay a zombie unless it is polled.
        if job.process.poll() is not None and not any(map(runs, processes)):
            return time.monotonic() - start
        time.sleep(0.05)
    for process in filter(runs, processes):
        process.kill()
    job.process.kill()
    job.process.wait()
    return None


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def recorded(folder: Path) -> dict[str, int | None]:
    """Collectives in each file of the flight recorder, which torch pickles; None in one cut off."""
    found: dict[str, int | None] = {}
    for file in sorted((folder / TRACES).glob("*")):
        try:
            found[file.name] = len(pickle.loads(file.read_bytes())["entries"])
        except (EOFError, pickle.UnpicklingError, KeyError):
            found[file.name] = None
    return found


def disturbed(
    folder: Path,
    gpus: list[int],
    config: str,
    settings: Settings,
    number: signal.Signals,
    expected: Steps,
) -> dict[str, Any]:
    """A run whose last rank gets a signal, and which is then started again.

    Args:
        expected: the steps of a run that nothing disturbed.
    """
    job = Job(folder, gpus, settings, config)
    wait_for_step(job, DISTURBED_AFTER)
    # Rank 0 holds the store through which the others agree to write what they recorded.
    victim = process_of_rank(job, len(gpus) - 1)
    processes = psutil.Process(job.process.pid).children(recursive=True)
    victim.send_signal(number)
    seconds = seconds_to_the_end(job, processes)
    before = [entry["step"] for entry in entries(folder)]
    found = {
        "seconds until all processes had ended": seconds,
        "exit code of the launcher": job.process.returncode,
        "collectives in the recorder's files": recorded(folder),
    }
    again = Job(folder, gpus, settings, config).steps()
    return {
        **found,
        "last step before": before[-1],
        "first step after": entries(folder)[len(before)]["step"],
        "losses": losses(again),
        **{
            f"largest relative difference of {key}": largest_difference(again, expected, key)
            for key in COMPARED
        },
    }


def entries(folder: Path) -> list[dict[str, Any]]:
    """Everything that a run logged, in the order in which it happened."""
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def killed(
    folder: Path, gpus: list[int], config: str, sizes: Sizes
) -> Iterator[dict[str, dict[str, Any]]]:
    """The part "killed": one rank is killed, and in another run it stops without an end.

    torchrun sees the first, and ends the other ranks. Only the timeout of their collectives shows
    them the second.
    """
    mesh = meshes_of(len(gpus))[0]
    settings = {
        **sizes.of_small_runs(len(gpus)),
        **mesh.settings(),
        "training.steps": STEPS,
        "training.global_batch_size": mesh.fsdp,
        "checkpoint.interval": INTERVAL,
        "comm.train_timeout_seconds": TIMEOUT,
        # The same bits again, on GPUs too.
        "debug.deterministic": True,
        "compile.enable": False,
    }
    expected = Job(folder / "whole", gpus, settings, config).steps()
    found: dict[str, Any] = {
        "GPUs": len(gpus),
        "mesh": str(mesh),
        "timeout of a collective, s": TIMEOUT,
        "time that torchrun gives the other processes, s": SECONDS_OF_TORCHRUN,
        "losses, undisturbed": losses(expected),
    }
    for number in SIGNALS:
        found |= {
            number.name: disturbed(folder / number.name, gpus, config, settings, number, expected)
        }
        yield found
