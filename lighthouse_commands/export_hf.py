#!/usr/bin/env python3
"""Write a checkpoint as a folder that Hugging Face's libraries load as an ordinary Llama.

    python scripts/export_hf.py outputs/debug outputs/exported

CHECKPOINT is a step-N folder, a folder of those, of which the last is taken, or a run's
job.dump_folder. OUTPUT gets config.json, generation_config.json, the weights as safetensors and the
tokenizer, and must be empty or not there.

A checkpoint whose last steps were not dense is refused: a Llama has dense attention. Arguments that
are not known here go to the trainer's configuration, --section.key value; a checkpoint that
Lighthouse's trainer did not write needs --job.config_file FILE.
"""

import argparse
import sys

from lighthouse_commands.arguments import command_parser, parse_with_overrides, run_command


def parse(line: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of this script, and what is left for the trainer's configuration."""
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as stored"
    )
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
        help="longest file of weights, in 10^9 bytes; default: 5",
    )
    return parse_with_overrides(parser, line)


def export() -> None:
    """What the command does.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    options, overrides = parse(sys.argv[1:])
    from torchtitan.models.llama3_lighthouse.export import export_checkpoint

    from torchtitan.models.llama3_lighthouse.hugging_face import DTYPES

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


def main() -> None:
    run_command(export, "nothing was written")


if __name__ == "__main__":
    main()
