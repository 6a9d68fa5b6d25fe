"""How training processes are started: the torchrun command line and its environment."""

import itertools
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from typing import TYPE_CHECKING, NoReturn

from .arguments import CommandError
from .protocol import LAUNCHER, STOPPED, USERS_MISTAKE

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .grace import Grace

TRAINER = "torchtitan.models.llama3_lighthouse.train"
MASTER_PORT = 29500
# Seconds after a signal. Slurm and Kubernetes have to wait as long.
GRACE = 300
# Exit codes of a process that a signal ended before its first step was over.
ENDED_BY_SIGNAL = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT)


def check_count(flag: str, value: int) -> None:
    """Raise ``CommandError`` unless ``value``, which ``flag`` gives, is at least 1."""
    if value < 1:
        raise CommandError(f"{flag} {value} must be at least 1")


@dataclass(frozen=True)
class Machines:
    """The machines that train together, as seen from one of them.

    Attributes:
        processes: training processes on this machine.
        nodes: machines; each runs the same command.
        node_rank: number of this machine, from 0 to nodes - 1.
        master_address: address of the machine with number 0.
        master_port: a free port on that machine.

    Raises:
        CommandError: a number is out of range, or several machines cannot find one another.
    """

    processes: int
    nodes: int = 1
    node_rank: int | None = None
    master_address: str | None = None
    master_port: int = MASTER_PORT

    def __post_init__(self) -> None:
        check_count("--processes", self.processes)
        check_count("--nodes", self.nodes)
        if self.nodes == 1:
            return
        if not self.master_address:
            raise CommandError(
                f"--nodes {self.nodes} needs --master-address, the address of the machine with "
                "--node-rank 0"
            )
        if self.node_rank is None or not 0 <= self.node_rank < self.nodes:
            given = "" if self.node_rank is None else f", got {self.node_rank}"
            raise CommandError(
                f"--nodes {self.nodes} needs --node-rank, from 0 to {self.nodes - 1}{given}"
            )


def torchrun_arguments(
    machines: Machines, trainer_arguments: list[str], log_rank: str
) -> list[str]:
    """The arguments of torchrun that train on this machine.

    One rank that is shown writes to the terminal itself. Several are shown line by line, each line
    with its rank. The output of the others goes to files.

    Args:
        log_rank: ranks of this machine whose output is shown, separated by commas.

    Raises:
        CommandError: ``log_rank`` is no list of ranks of this machine.
    """
    if not re.fullmatch(r"\d+(,\d+)*", log_rank):
        raise CommandError(
            f"--log-rank {log_rank} must be ranks separated by commas, for example 0,1"
        )
    shown = set(map(int, log_rank.split(",")))
    if max(shown) >= machines.processes:
        raise CommandError(
            f"--log-rank {log_rank} names a rank that this machine does not have; it has "
            f"{machines.processes}, counted from 0"
        )
    if machines.nodes > 1:
        rendezvous = ["--nnodes", str(machines.nodes), "--node-rank", str(machines.node_rank)]
        rendezvous += ["--master-addr", str(machines.master_address)]
        rendezvous += ["--master-port", str(machines.master_port)]
    else:
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    line = ["--nproc-per-node", str(machines.processes), *rendezvous]
    hidden = [rank for rank in range(machines.processes) if rank not in shown]
    if len(shown) > 1:
        line += ["--local-ranks-filter", log_rank, "--role", "rank", "--tee", "3"]
    elif hidden:
        # 3 stands for standard output and standard error.
        line += ["--redirects", ",".join(f"{rank}:3" for rank in hidden)]
    # Signals that stop training are the launcher's own; torchrun handles the others.
    line += ["--signals-to-handle", "SIGHUP,SIGQUIT"]
    return [*line, "-m", TRAINER, *trainer_arguments]


def training_environment(
    given: Mapping[str, str], processes: int, gpus: int, cores: int
) -> dict[str, str]:
    """Environment of the training processes; what the user set stays."""
    defaults = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if not gpus:
        defaults["OMP_NUM_THREADS"] = str(max(1, cores // processes))
    elif processes > 1:
        # torchrun would set this too, and print five lines about it.
        defaults["OMP_NUM_THREADS"] = "1"
    # An empty variable counts as one that is not set.
    kept = {name: value for name, value in given.items() if value or name not in defaults}
    return {**defaults, **kept}


def gpus_here() -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible; 0 without NVIDIA's driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], text=True, capture_output=True).stdout
    except OSError:
        return 0
    found = sum(line.startswith("GPU") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    # CUDA stops at the first name that is none.
    names = itertools.takewhile(lambda name: name.strip() not in ("", "-1"), visible.split(","))
    return min(found, len(list(names)))


def run_torchrun(line: list[str], environment: dict[str, str], grace: int) -> None:
    """Train with torchrun in this process, which starts the training processes.

    Args:
        grace: seconds that processes have to save after a signal, before they are killed.

    Raises:
        CommandError: training ended with a user's mistake, whose message this is.
        SystemExit: it crashed, or a signal stopped it.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from .grace import Grace

    os.environ.clear()
    os.environ.update({**environment, LAUNCHER: str(os.getpid())})
    logger = logging.getLogger("torch.distributed.elastic")
    held_back = MemoryHandler(
        capacity=1000, flushLevel=logging.CRITICAL + 1, target=logging.StreamHandler()
    )
    logger.propagate = False
    logger.addHandler(held_back)
    watch = Grace(grace)
    watch.listen()
    try:
        run(parse_args(line))
    except ChildFailedError as error:
        end_of(error, watch, held_back)
    except DistNetworkError as error:
        held_back.buffer.clear()
        raise CommandError(
            "--master-address and --master-port must name a machine that can be reached and a free "
            f"port on it: {str(error).splitlines()[0]}; pass others"
        ) from None
    except SignalException as error:
        held_back.buffer.clear()
        end_by_signal(error.sigval)


def end_of(error: "ChildFailedError", watch: "Grace", held_back: MemoryHandler) -> NoReturn:
    """End as the training processes did.

    Raises:
        CommandError: one of them found a user's mistake, whose message this is.
        SystemExit: a signal stopped them, or one of them crashed.
    """
    # Other processes may have failed since, because the first one was gone.
    first = error.get_first_failure()[1]
    reports = {
        key: failure
        for failure in error.failures.values()
        for key in (USERS_MISTAKE, STOPPED)
        if failure.error_file_data.get(key)
    }
    if failure := reports.get(USERS_MISTAKE):
        held_back.buffer.clear()
        raise CommandError(failure.message)
    if failure := reports.get(STOPPED):
        held_back.buffer.clear()
        print(failure.message, file=sys.stderr)
        sys.exit(failure.exitcode)
    if watch.number and (watch.overdue or first.exitcode in ENDED_BY_SIGNAL):
        held_back.buffer.clear()
        end_by_signal(watch.number, watch.overdue)
    held_back.flush()
    sys.exit(str(error))


def end_by_signal(number: signal.Signals, overdue: str = "") -> NoReturn:
    """End with the exit code of a signal that stopped training before it could save.

    Args:
        overdue: why it did not save.
    """
    reason = f" {overdue}" if overdue else ""
    print(f"stopped by {number.name}{reason}; the same command goes on from the last checkpoint, "
          "if one was saved", file=sys.stderr)  # fmt: skip
    sys.exit(128 + number)
