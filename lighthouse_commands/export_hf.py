"""Write a checkpoint as a folder that Hugging Face's libraries load as an ordinary Llama.

    lighthouse export-hf outputs/debug --output outputs/exported

The output folder must be empty or not there. It gets config.json, generation_config.json, the
weights as safetensors, and the tokenizer.

A checkpoint whose last steps were not dense is refused, because a Llama has dense attention. A
checkpoint that Lighthouse's trainer did not write needs --job.config_file FILE.
"""

import argparse
from pathlib import Path

from .arguments import add_output

SUMMARY = "write a checkpoint in Hugging Face's format"
IF_INTERRUPTED = "nothing was written"
DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a step-N folder, a folder of them or a run's job.dump_folder, of "
        "which the last complete checkpoint is taken",
    )
    add_output(parser)
    add_stored_dtype(parser)
    parser.add_argument(
        "--allow-lighthouse",
        action="store_true",
        help="export even if the last step was not dense, or is not known to have been",
    )
    parser.add_argument(
        "--max-shard-gb",
        metavar="GB",
        type=float,
        default=5.0,
        help="largest file of weights, in 10^9 bytes; default: 5",
    )


def add_stored_dtype(parser: argparse.ArgumentParser) -> None:
    """Add --dtype; None leaves weights as they are stored."""
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as stored")


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    from torchtitan.models.llama3_lighthouse.hugging_face.export import export_checkpoint
    from torchtitan.models.llama3_lighthouse.hugging_face.format import DTYPES

    export_checkpoint(
        options.checkpoint,
        options.output,
        overrides,
        DTYPES[options.dtype] if options.dtype else None,
        options.allow_lighthouse,
        options.max_shard_gb * 1e9,
        report=lambda text: print(text, flush=True),
    )
    print(f"Wrote {options.output}")
