"""Ask trained models for what long prompts hide: a needle in a haystack.

    lighthouse evaluate niah outputs/debug --output outputs/niah

Each prompt hides statements in random alphanumerics or in a list. The needle is the one that holds
the answer; it stands at a given depth of a prompt of a given length. The share of right answers
comes with its interval at 95%. Tasks:

    passkey        a key of one digit
    long_passkey   a key of five digits
    several_keys   four named keys of one digit, one of them asked for
    variables      two chains of three variables, the end of one asked for
    lookup         an object in JSON that fills the prompt, the value of one key asked for
    common_word    a list of words that fills the prompt; one is common in the half at that depth

All checkpoints with the same tokenizer see the same prompts, to the token. At depth 0% the needle
follows BOS directly; at 100% the question follows the needle, unless the task puts more between.
A list follows random alphanumerics that make up the length.

With --attention dense lighthouse the prompts also run under Lighthouse attention, on sequences
padded with random alphanumerics to the next length that Lighthouse takes. Plots show both. A
checkpoint that Lighthouse's trainer did not write needs --job.config_file FILE.

Writes results.csv, a row for each cell, and results.json, the same with settings, date, git
revision and checkpoints; both after every length. Unless --no-plots, it ends with TASK.png, a heat
map for each checkpoint, which needs matplotlib.
"""

import argparse

from .arguments import (
    add_attention,
    add_batch_tokens,
    add_checkpoints,
    add_device,
    add_no_plots,
    add_output,
)

SUMMARY = "accuracy of retrieval by length and depth: a needle in a haystack"
IF_INTERRUPTED = "finished lengths are written; the command begins anew"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoints(parser)
    add_output(parser)
    add_attention(parser, "dense")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to ask; default: all")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="lengths of prompts, without the answer; default: an eighth, a quarter, a "
        "half and the whole of the shortest training.seq_len",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=list(range(0, 101, 10)),
        metavar="PERCENT",
        help="depths of the needle; default: 0 10 20 ... 100",
    )
    parser.add_argument(
        "--trials", type=int, default=50, metavar="PROMPTS", help="prompts per cell; default: 50"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the prompts; default: 0"
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type of the weights; default: bfloat16 on cuda, float32 on cpu",
    )
    add_batch_tokens(parser)
    parser.add_argument("--revision", help="git revision to record; default: as git says")
    add_no_plots(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    from torchtitan.models.llama3_lighthouse.data.retrieval import TASKS
    from torchtitan.models.llama3_lighthouse.evaluation.figures import check_plots
    from torchtitan.models.llama3_lighthouse.evaluation.inference import checked_device
    from torchtitan.models.llama3_lighthouse.evaluation.retrieval_report import (
        RetrievalOptions,
        report_retrieval,
    )

    check_plots(not options.no_plots)
    device = checked_device(options.device)
    report_retrieval(
        RetrievalOptions(
            checkpoints=options.checkpoints,
            output=options.output,
            device=device,
            dtype=options.dtype or ("bfloat16" if device.startswith("cuda") else "float32"),
            attention=options.attention,
            tasks=options.tasks or list(TASKS),
            lengths=options.lengths,
            depths=options.depths,
            trials=options.trials,
            seed=options.seed,
            batch_tokens=options.batch_tokens,
            revision=options.revision,
            plots=not options.no_plots,
        ),
        overrides,
    )
