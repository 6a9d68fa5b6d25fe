#!/usr/bin/env python3
"""Make a checkpoint of step 0 out of a Llama in Hugging Face's format, to train on from.

    python scripts/import_hf.py outputs/exported outputs/imported

FOLDER holds config.json and the weights as safetensors. The model must be one of our flavors,
which is found by its sizes. OUTPUT must be empty or not there; it gets checkpoint/step-0, and a run
starts from it with --job.dump_folder OUTPUT, or in another folder with
--checkpoint.initial_load_path OUTPUT/checkpoint/step-0.

Arguments that are not known here go to the configuration that the checkpoint records, for instance
--job.config_file FILE. Without any it is a dense model of the folder's length and tokenizer.
"""

import argparse
import sys

from lighthouse_commands.arguments import command_parser, parse_with_overrides, run_command


def parse(line: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of this script, and what is left for the recorded configuration."""
    parser = command_parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as stored"
    )
    return parse_with_overrides(parser, line)


def make_checkpoint() -> None:
    """What the command does.

    Raises:
        ValueError, TypeError, OSError: the user's mistakes; the message names the fix.
    """
    options, overrides = parse(sys.argv[1:])
    from torchtitan.models.llama3_lighthouse.import_model import import_model

    from torchtitan.models.llama3_lighthouse.hugging_face import DTYPES

    path = import_model(
        options.folder,
        options.output,
        overrides,
        DTYPES[options.dtype] if options.dtype else None,
        report=lambda text: print(text, flush=True),
    )
    print(f"Wrote {path}")


def main() -> None:
    run_command(make_checkpoint, "nothing was written")


if __name__ == "__main__":
    main()
