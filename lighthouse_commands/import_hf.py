"""Make a checkpoint of step 0 out of a model in Hugging Face's format, to train on from.

    lighthouse import-hf outputs/exported --output outputs/imported

FOLDER holds config.json and the weights as safetensors, of a Llama or of another family that
docs/guides/export.md names. What cannot be trained is refused by the name of its entry in
config.json. The output folder must be empty or not there, and gets checkpoint/step-0. A run starts
from it with --job.dump_folder FOLDER and --model.hf_folder, or in a folder of its own with
--checkpoint.initial_load_path FOLDER/checkpoint/step-0.

The checkpoint records a configuration: that of --job.config_file FILE, or else a dense model of
the folder's architecture, length and tokenizer.
"""

import argparse
from pathlib import Path

from .arguments import add_output
from .export_hf import add_stored_dtype

SUMMARY = "make a checkpoint out of a model in Hugging Face's format"
IF_INTERRUPTED = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a model in Hugging Face's format"
    )
    add_output(parser)
    add_stored_dtype(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    from torchtitan.models.llama3_lighthouse.hugging_face.format import DTYPES
    from torchtitan.models.llama3_lighthouse.hugging_face.import_model import import_model

    path = import_model(
        options.folder,
        options.output,
        overrides,
        DTYPES[options.dtype] if options.dtype else None,
        report=lambda text: print(text, flush=True),
    )
    print(f"Wrote {path}")
