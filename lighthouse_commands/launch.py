"""How training processes are started: the torchrun command line and its environment."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from .arguments import CommandError

TRAINER = "torchtitan.models.llama3_lighthouse.train"
MASTER_PORT = 29500


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


def torchrun_command(machines: Machines, trainer_arguments: list[str], log_rank: str) -> list[str]:
    """The command line that trains on this machine.

    Args:
        log_rank: ranks of this machine whose output is shown, separated by commas.

    Raises:
        CommandError: ``log_rank`` is no list of ranks.
    """
    if not re.fullmatch(r"\d+(,\d+)*", log_rank):
        raise CommandError(
            f"--log-rank {log_rank} must be ranks separated by commas, for example 0,1"
        )
    if machines.nodes > 1:
        rendezvous = ["--nnodes", str(machines.nodes), "--node-rank", str(machines.node_rank)]
        rendezvous += ["--master-addr", str(machines.master_address)]
        rendezvous += ["--master-port", str(machines.master_port)]
    else:
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(machines.processes), *rendezvous]
    command += ["--local-ranks-filter", log_rank, "--role", "rank", "--tee", "3"]
    return [*command, "-m", TRAINER, *trainer_arguments]


def training_environment(
    given: Mapping[str, str], processes: int, gpus: int, cores: int
) -> dict[str, str]:
    """Environment of the training processes; what the user set stays."""
    defaults = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if not gpus:
        # torchrun's default is one thread for each of several processes.
        defaults["OMP_NUM_THREADS"] = str(max(1, cores // processes))
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
    return min(found, sum(bool(name.strip()) for name in visible.split(",")))


def replace_process(command: list[str], environment: dict[str, str]) -> None:
    """Become ``command``, so that signals and the exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)
