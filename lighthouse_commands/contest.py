"""Train the arms of a contest, and say by a rule fixed before the runs which one is better.

    lighthouse contest train_configs/contests/debug.toml --output outputs/contest_debug

The file names the arms, each a schedule or other settings, with the learning rates that each one
tries; the seeds, which draw the weights and the order of the text; the primary measure with its
direction, margin and rule; and which arms are compared. Its hash goes into the results, and a file
that has changed since they were begun is refused. docs/guides/contests.md lists all keys.

Each arm tries its rates and then trains all seeds at the best. If that is the smallest or the
largest tried, the command says so; --widen tries rates beyond it. After each run the measures of
distance and retrieval are taken from its last checkpoint.

The same command goes on where it was interrupted, and repeats nothing that finished. With --take
it does not train what an earlier contest has, either.

Writes a folder for each run; runs.csv, measures.csv, curves.csv and times.csv, after every run; and
at the end comparisons.csv, results.md with the verdicts and, unless --no-plots, primary.png,
loss_over_time.png, loss_by_position.png, loss_over_distance.png and retrieval_over_length.png.
--report-only writes these again from the first four. --only-times writes times.csv alone: how long
a step of each arm takes on this machine.
"""

import argparse
from pathlib import Path

from .arguments import add_output, add_sweep_arguments

SUMMARY = "compare ways of training by a rule fixed before the runs"
IF_INTERRUPTED = "the same command goes on from here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file of the contest")
    add_output(parser)
    add_sweep_arguments(parser)
    parser.add_argument(
        "--per-gpu",
        type=int,
        default=1,
        metavar="RUNS",
        help="runs that share a GPU, out of those at once; a short run of each arm alone then "
        "tells its times; default: 1",
    )
    parser.add_argument(
        "--widen", action="store_true", help="try rates beyond a grid whose best is at its edge"
    )
    parser.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM", help="train these now; default: all"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[],
        metavar="SEED",
        help="train these at the best rates now; default: all",
    )
    parser.add_argument(
        "--take",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="outputs of earlier contests, whose finished runs stand for equal ones of this",
    )
    parser.add_argument(
        "--only-times", action="store_true", help="learn how long a step of each arm takes here"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write the report again from the CSV files"
    )


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    from torchtitan.models.llama3_lighthouse.errors import UserValueError
    from torchtitan.models.llama3_lighthouse.studies.contest import (
        report_again,
        run_contest,
        time_arms,
    )
    from torchtitan.models.llama3_lighthouse.studies.sweeps import SweepOptions

    if options.list and options.only_times:
        raise UserValueError("--list trains nothing and --only-times does; pass one of them")
    if options.take and (options.list or options.report_only):
        flag = "--list" if options.list else "--report-only"
        raise UserValueError(f"{flag} takes no runs; leave out --take")
    if options.report_only and overrides:
        raise UserValueError(f"--report-only trains nothing; leave out {' '.join(overrides)}")
    if options.report_only:
        report_again(options.config, options.output, not options.no_plots)
        return
    sweep = SweepOptions(
        options.output,
        options.processes,
        options.at_once,
        options.list,
        not options.no_plots,
        options.per_gpu,
    )
    if options.only_times:
        time_arms(options.config, sweep, overrides, options.take)
        return
    run_contest(
        options.config, sweep, overrides, options.widen, options.arms, options.seeds, options.take
    )
