"""Train every configuration of a grid, one after the other, and set the results side by side.

    lighthouse ablations train_configs/ablations/debug.toml

A grid is a TOML file:

    config = "../270m_98k.toml"       # what all runs start from, relative to the grid's file

    [fixed]                           # any section.key, for every run
    lighthouse.levels = 3

    [grid]                            # any section.key with a list of values: all combinations run
    lighthouse.top_k = [1536, 2048]
    lighthouse.pooling_factor = [2, 4]

With several [[grid]] tables, the combinations of each run. Those that do not fit together are
skipped, with the reason. A run that finished is not repeated when the command is given again; one
that was interrupted goes on from its last checkpoint, if its configuration saves any.

Runs use the GPUs that CUDA_VISIBLE_DEVICES leaves visible, so sweeps on other GPUs and in other
output folders may run at the same time.

Writes a folder for each run with its log, its checkpoints and metrics.jsonl; the table as
results.csv and results.md, after every run; and, unless --no-plots, loss_curves.png and
loss_and_throughput.png, which need matplotlib.
"""

import argparse
from pathlib import Path

from .arguments import add_sweep_arguments

SUMMARY = "train every configuration of a grid"
IF_INTERRUPTED = "the same command goes on from here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", type=Path, metavar="GRID", help="TOML file of the grid")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder to write to; default: outputs/ablations/NAME_OF_GRID",
    )
    add_sweep_arguments(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    from torchtitan.models.llama3_lighthouse.studies.ablations import run_grid
    from torchtitan.models.llama3_lighthouse.studies.sweeps import SweepOptions

    output = options.output or Path("outputs/ablations", options.grid.stem)
    sweep = SweepOptions(
        output, options.processes, options.at_once, options.list, not options.no_plots
    )
    run_grid(options.grid, sweep, overrides)
