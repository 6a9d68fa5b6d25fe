"""Check a configuration and say what each process would hold and do. Needs no GPU.

lighthouse dry-run train_configs/paper_530m_1m_cp8.toml --processes 8 --nodes 4
"""

import argparse

from .arguments import add_configuration, add_size, trainer_arguments
from .launch import check_count, gpus_here

SUMMARY = "check a configuration and say what each process would hold"
IF_INTERRUPTED = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    add_size(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    arguments = trainer_arguments(options.config, overrides)
    processes = options.processes if options.processes is not None else gpus_here() or 1
    check_count("--processes", processes)
    check_count("--nodes", options.nodes)

    from torchtitan.models.llama3_lighthouse.dry_run import dry_run
    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

    print(dry_run(LighthouseConfigManager().parse_args(arguments), processes * options.nodes))
