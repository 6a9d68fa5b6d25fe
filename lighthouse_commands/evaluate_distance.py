"""Measure what far context is worth to checkpoints, on held-out documents.

    lighthouse evaluate distance outputs/a outputs/b --output outputs/distance

Takes sequences of validation.seq_len tokens, each from one document, and measures

    position   loss by tokens of context
    context    loss of the same targets with all the context, and with the last tokens of it alone;
               "beyond" is the difference
    repeated   loss of passages that stood in the text so many tokens earlier ("loss"), at their
               first occurrence ("first"), and in the same place with another passage earlier
               ("control"); the gain is "control" minus "loss"

in nats per token. Intervals are 95%, by bootstrap over documents. All checkpoints see the same
documents, targets and passages, so the differences from the first one have intervals of their own.

The text is the one that each run validated on, or else the held-out split of its dataset in
sequences of training.seq_len; keys choose another one, as in lighthouse evaluate loss. Documents of
fewer tokens than a sequence are left out.

Writes distance.csv, distance_documents.csv (each number by document), distance.json and, unless
--no-plots, distance.png, which needs matplotlib.
"""

import argparse

from .arguments import (
    add_attention,
    add_batch_tokens,
    add_checkpoints,
    add_device,
    add_dtype,
    add_first_bucket,
    add_labels,
    add_no_plots,
    add_output,
)

SUMMARY = "what far context is worth: repeated passages, shortened context"
IF_INTERRUPTED = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoints(parser)
    add_output(parser)
    add_attention(parser, "dense")
    parser.add_argument(
        "--documents",
        type=int,
        default=16,
        metavar="N",
        help="held-out documents, the first ones that are long enough; default: 16",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=1,
        metavar="N",
        help="sequences of each document at most; default: 1",
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="lengths of shortened contexts; default: those of 1024 and 8192 that are at most "
        "half of validation.seq_len",
    )
    parser.add_argument(
        "--distances",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="distances of repeated passages; default: 4096 (an eighth of validation.seq_len if "
        "that is less), doubling, and the longest that fits",
    )
    parser.add_argument(
        "--passage",
        nargs=2,
        type=int,
        metavar=("LEAST", "MOST"),
        help="lengths of repeated passages; default: 256 1024, in sequences below 16384 tokens a "
        "32nd and a 16th of them if that is less",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of targets, passages and places; default: 0",
    )
    add_first_bucket(parser)
    add_batch_tokens(parser)
    add_labels(parser)
    add_device(parser)
    add_dtype(parser)
    add_no_plots(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    from torchtitan.models.llama3_lighthouse.evaluation.distance import DistanceSettings
    from torchtitan.models.llama3_lighthouse.evaluation.distance_report import (
        DistanceOptions,
        report_distance,
    )
    from torchtitan.models.llama3_lighthouse.evaluation.figures import check_plots
    from torchtitan.models.llama3_lighthouse.evaluation.inference import checked_device

    check_plots(not options.no_plots)
    settings = DistanceSettings(
        documents=options.documents,
        sequences=options.sequences,
        contexts=tuple(options.contexts) if options.contexts else None,
        distances=tuple(options.distances) if options.distances else None,
        passage=tuple(options.passage) if options.passage else None,
        seed=options.seed,
        first_bucket=options.first_bucket,
        batch_tokens=options.batch_tokens,
    )
    report_distance(
        DistanceOptions(
            checkpoints=options.checkpoints,
            output=options.output,
            device=checked_device(options.device),
            attention=options.attention,
            labels=options.labels,
            settings=settings,
            dtype=options.dtype,
            plots=not options.no_plots,
        ),
        overrides,
    )
