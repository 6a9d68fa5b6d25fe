"""Held-out loss of checkpoints by the length of the context, side by side.

    lighthouse evaluate loss outputs/a outputs/b/checkpoint/step-900 --output outputs/losses

The text is the one that each run validated on. These keys choose another one:

    --validation.enable --validation.dataset c4_local --validation.dataset_path FOLDER
    --validation.seq_len 16384 --validation.local_batch_size 1 --validation.steps 32

Losses are in nats per token. Positions fall into buckets by their tokens of context: 1 to 256, 257
to 512, and so on, doubling up to the whole sequence. Intervals are 95%, normal, over sequences,
which are taken as independent. All checkpoints see the same sequences, so the difference from the
first one has an interval of its own, over the differences within sequences.

A run with training.document_mask = true is evaluated with its masks, on documents laid out as in
its validation. A position's context is then the part of its own document up to and including it,
and the column "context in" says so. If some checkpoints have masks, all read that layout, and those
without masks see its padding. These keys decide for all: --training.document_mask,
--training.no-document_mask.

Under --attention lighthouse with lighthouse.entry_score = "max", selection tells of later tokens.
Those losses must not be compared with losses under dense attention.

Writes losses.csv, losses.json and, unless --no-plots, losses.png, which needs matplotlib.
"""

import argparse

from .arguments import (
    add_attention,
    add_checkpoints,
    add_device,
    add_dtype,
    add_first_bucket,
    add_labels,
    add_no_plots,
    add_output,
)

SUMMARY = "held-out loss by the length of the context"
IF_INTERRUPTED = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoints(parser)
    add_output(parser)
    add_attention(parser, "dense")
    add_first_bucket(parser)
    add_labels(parser)
    add_device(parser)
    add_dtype(parser)
    add_no_plots(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    from torchtitan.models.llama3_lighthouse.evaluation.figures import check_plots
    from torchtitan.models.llama3_lighthouse.evaluation.inference import checked_device
    from torchtitan.models.llama3_lighthouse.evaluation.loss_report import (
        LossOptions,
        report_losses,
    )

    check_plots(not options.no_plots)
    report_losses(
        LossOptions(
            checkpoints=options.checkpoints,
            output=options.output,
            device=checked_device(options.device),
            attention=options.attention,
            labels=options.labels,
            first_bucket=options.first_bucket,
            dtype=options.dtype,
            plots=not options.no_plots,
        ),
        overrides,
    )
