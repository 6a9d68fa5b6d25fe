"""Measure how much of a checkpoint's loss comes from text that the model should not know yet.

    lighthouse evaluate causality outputs/debug --output outputs/causality

Takes the loss at random positions of held-out text three times: with the true text after them, with
other text in its place from the predicted token on, and with other text from the end of the next
coarsest entry on. Under dense attention all three are the same. Under Lighthouse attention,
selection may look at later tokens. The differences are what those tokens are worth to the model, in
nats: "other text" counts all of them, "other text later" those outside the position's own entries.

The text is the one that the run validated on, or else the held-out split of its dataset in
sequences of training.seq_len.

A checkpoint that never trained under Lighthouse attention is refused, unless --attention is given.

Writes causality.json and, unless --no-plots, causality.png, which needs matplotlib; prints a table.
"""

import argparse

from .arguments import (
    ATTENTIONS,
    CommandError,
    WithoutRepetitions,
    add_checkpoints,
    add_device,
    add_no_plots,
    add_output,
)
from .launch import check_count

SUMMARY = "what a model knows of later tokens"
IF_INTERRUPTED = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoints(parser)
    add_output(parser)
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=ATTENTIONS,
        action=WithoutRepetitions,
        help="attention to measure under; default: lighthouse. Under dense attention the "
        "differences are zero",
    )
    parser.add_argument(
        "--batches",
        type=int,
        metavar="N",
        help="batches of held-out text; default: 8 on a GPU, 2 on a CPU",
    )
    parser.add_argument(
        "--positions",
        type=int,
        metavar="N",
        help="positions in each sequence of a batch; default: 32 on a GPU, 6 on a CPU",
    )
    add_device(parser)
    add_no_plots(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    for flag in ("batches", "positions"):
        if (value := getattr(options, flag)) is not None:
            check_count(f"--{flag}", value)
    if options.batches == options.positions == 1:
        raise CommandError(
            "--batches 1 and --positions 1 give one loss, and an interval needs two; raise one of "
            "them"
        )
    from torchtitan.models.llama3_lighthouse.evaluation.causality import (
        CausalityOptions,
        report_causality,
    )
    from torchtitan.models.llama3_lighthouse.evaluation.figures import check_plots
    from torchtitan.models.llama3_lighthouse.evaluation.inference import checked_device

    check_plots(not options.no_plots)
    report_causality(
        CausalityOptions(
            checkpoints=options.checkpoints,
            output=options.output,
            device=checked_device(options.device),
            attention=options.attention,
            batches=options.batches,
            positions=options.positions,
            plots=not options.no_plots,
        ),
        overrides,
    )
