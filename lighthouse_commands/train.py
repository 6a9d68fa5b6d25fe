"""Train with torchrun, on this machine alone or as one of several.

    lighthouse train train_configs/debug_cpu.toml --training.steps 40

CONFIG is a TOML file. --list-keys shows every key that it may hold, --dry-run what a run would do.
The configuration is checked before torchrun starts one training process for each GPU.

On several machines, each of them runs the same command with its own --node-rank:

    lighthouse train CONFIG --nodes 2 --node-rank 0 --master-address host0
"""

import argparse
import os
from pathlib import Path

from . import dry_run
from .arguments import add_configuration, add_size, trainer_arguments
from .launch import (
    GRACE,
    MASTER_PORT,
    Machines,
    check_count,
    gpus_here,
    run_torchrun,
    torchrun_arguments,
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
        "--grace",
        type=int,
        default=GRACE,
        metavar="SECONDS",
        help="time that SIGTERM or SIGINT leaves processes to finish their step and save, before "
        f"they are killed; default: {GRACE}",
    )
    parser.add_argument(
        "--list-keys",
        action="store_true",
        help="show every key of a configuration with its value, and end",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="start at once, and leave it to the training processes to check the configuration",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what each process would hold and do, and end: as lighthouse dry-run",
    )


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.list_keys:
        list_keys(options.config, overrides)
        return
    if options.dry_run:
        dry_run.run(options, overrides)
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
    check_count("--grace", options.grace)
    line = torchrun_arguments(machines, arguments, options.log_rank)
    count = machines.processes * machines.nodes
    # Importing the trainer takes seconds, here and in each process: the lines tell what goes on.
    if not options.no_check:
        print("checking the configuration", flush=True)
        check(arguments, count, "cuda" if gpus else "cpu")
    print(f"starting {count} training process{'' if count == 1 else 'es'}", flush=True)
    run_torchrun(
        line,
        training_environment(os.environ, machines.processes, gpus, cores=os.cpu_count() or 1),
        options.grace,
    )


def check(arguments: list[str], world_size: int, device_type: str) -> None:
    """Check a run before its processes start: each of them would find the mistake again.

    Raises:
        ValueError, TypeError, OSError: the run cannot work; the message names key, value and fix.
    """
    from torchtitan.models.llama3_lighthouse.checks.configuration import check_launch
    from torchtitan.models.llama3_lighthouse.checks.parallelism import check_device
    from torchtitan.models.llama3_lighthouse.checks.text import check_folders
    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager
    from torchtitan.models.llama3_lighthouse.model.flavors import flavors

    config = LighthouseConfigManager().parse_args(arguments)
    check_launch(config, flavors, world_size)
    check_device(config, device_type)
    check_folders(config)


def list_keys(config: Path | None, overrides: list[str]) -> None:
    """Print the trainer's keys and their values, by default or in a configuration."""
    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

    named = trainer_arguments(config, overrides) if config else overrides
    LighthouseConfigManager().parse_args([*named, "--help"])
