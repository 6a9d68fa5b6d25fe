"""Does a short dense stage after Lighthouse give a model as good as dense training?

    lighthouse recovery train_configs/recovery_books_32k.toml --output outputs/recovery \\
        --splits 0.625 0.6875 0.75 --seeds 0 1 --dense-steps 2100 \\
        --training.dataset_path FOLDER --validation.dataset_path FOLDER

For each seed of the model it trains dense from scratch and, for each split, Lighthouse for that
share of training.steps and dense for the rest, all on the same text in the same order. The
Lighthouse stage is trained once for each seed, up to the latest split; from its checkpoint at each
split a dense stage branches off, which equals a run that switched there. --dense-steps adds dense
controls of fewer steps whose learning rate decays to its end by then, for a comparison at equal
time. The configuration must validate:

    --validation.enable --validation.seq_len 16384 --validation.freq 60 --validation.steps 16

The same command goes on where it was interrupted, and repeats nothing that finished.

Writes a folder for each run with its log, its checkpoints and metrics.jsonl; results.csv (each
run), summary.csv (over seeds) and results.md (both), after every run; and, unless --no-plots,
loss_over_tokens.png, loss_over_time.png and minus_dense.png, which need matplotlib.
"""

import argparse
from pathlib import Path

from .arguments import add_output, add_sweep_arguments

SUMMARY = "compare dense training with Lighthouse followed by a dense stage"
IF_INTERRUPTED = "the same command goes on from here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="TOML file that all runs start from"
    )
    add_output(parser)
    parser.add_argument(
        "--splits",
        type=float,
        nargs="+",
        default=[0.625, 0.6875, 0.75],
        metavar="SHARE",
        help="shares of training.steps that Lighthouse trains; default: the "
        "paper's, 0.625 0.6875 0.75",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1],
        metavar="N",
        help="seeds of the model; default: 0 1",
    )
    parser.add_argument(
        "--dense-steps",
        type=int,
        nargs="+",
        default=[],
        metavar="STEPS",
        help="steps of further dense controls, whose learning rate decays by "
        "then; may be added to a finished study; default: none",
    )
    add_sweep_arguments(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    from torchtitan.models.llama3_lighthouse.studies.recovery import Study, run_study
    from torchtitan.models.llama3_lighthouse.studies.sweeps import SweepOptions

    study = Study(
        options.config, options.output, options.splits, options.seeds, options.dense_steps
    )
    sweep = SweepOptions(
        options.output, options.processes, options.at_once, options.list, not options.no_plots
    )
    run_study(study, sweep, overrides)
