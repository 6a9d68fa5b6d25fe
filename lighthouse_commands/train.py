"""Train with torchrun, on this machine alone or as one of several.

    lighthouse train train_configs/debug_cpu.toml --training.steps 40

CONFIG is a TOML file. --list-keys shows every key that it may hold. The process is replaced by
torchrun, which starts one training process for each GPU.

On several machines, each of them runs the same command with its own --node-rank:

    lighthouse train CONFIG --nodes 2 --node-rank 0 --master-address host0
"""

import argparse
import os
from pathlib import Path

from .arguments import CommandError
from .launch import (
    MASTER_PORT,
    Machines,
    gpus_here,
    replace_process,
    torchrun_command,
    training_environment,
)

SUMMARY = "train on this machine, alone or as one of several"
IF_INTERRUPTED = "training has not begun"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    add_size(parser)
    parser.add_argument(
        "--node-rank", type=int, metavar="N", help="number of this machine, from 0 to nodes - 1"
    )
    parser.add_argument(
        "--master-address", metavar="HOST", help="address of the machine with --node-rank 0"
    )
    parser.add_argument(
        "--master-port",
        type=int,
        default=MASTER_PORT,
        metavar="PORT",
        help=f"a free port on that machine; default: {MASTER_PORT}",
    )
    parser.add_argument(
        "--log-rank",
        default="0",
        metavar="RANKS",
        help="ranks whose output is shown, separated by commas; default: 0",
    )
    parser.add_argument(
        "--list-keys",
        action="store_true",
        help="show every key of a configuration with its value, and end",
    )


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Add [CONFIG], which may also come as --job.config_file among the overrides."""
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG", help="TOML file of the run"
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add --processes and --nodes."""
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes on each machine; default: this one's GPUs, or 1",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines; default: 1")


def trainer_arguments(config: Path | None, overrides: list[str]) -> list[str]:
    """The trainer's command line for a configuration file and overrides.

    There is no default file: a run takes long and writes a lot, so it has to be asked for.

    Raises:
        CommandError: no configuration is named, or two are, or the file is not there.
    """
    named = [
        word
        for word in overrides
        if word.partition("=")[0] in ("--job.config_file", "--job.config-file")
    ]
    if config is None:
        if not named:
            raise CommandError("no configuration is given; pass CONFIG, its TOML file")
        return overrides
    if named:
        raise CommandError(f"{config} and --job.config_file name two configurations; give one")
    if not config.is_file():
        raise CommandError(f"{config} is no file; name a TOML file")
    return ["--job.config_file", str(config), *overrides]


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.list_keys:
        list_keys(options.config, overrides)
        return
    arguments = trainer_arguments(options.config, overrides)
    gpus = gpus_here()
    machines = Machines(
        options.processes if options.processes is not None else gpus or 1,
        options.nodes,
        options.node_rank,
        options.master_address,
        options.master_port,
    )
    environment = training_environment(
        os.environ, machines.processes, gpus, cores=os.cpu_count() or 1
    )
    replace_process(torchrun_command(machines, arguments, options.log_rank), environment)


def list_keys(config: Path | None, overrides: list[str]) -> None:
    """Print the trainer's keys and their values, by default or in a configuration."""
    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

    named = trainer_arguments(config, overrides) if config else overrides
    LighthouseConfigManager().parse_args([*named, "--help"])
