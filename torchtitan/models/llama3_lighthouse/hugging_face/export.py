"""Write a checkpoint as a folder in Hugging Face's format, which loads without our code."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..checkpoints.model_folder import model_folder
from ..checkpoints.record import CheckpointRecord, read_record
from ..checkpoints.resume import positions_reached
from ..checkpoints.storage import (
    DamagedCheckpointError,
    check_shapes,
    in_one_process,
    load_state,
)
from ..checkpoints.tensors import first_not_finite
from ..command_line import keys_given
from ..data.tokenizer import build_tokenizer
from ..errors import UserValueError
from ..evaluation.inference import find_checkpoint, read_configuration
from ..model.model import LighthouseModelArgs
from .format import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    adapter,
    model_state,
    new_folder,
    require_safetensors,
    time_left,
    write_configuration,
    write_tokenizer,
)


def export_checkpoint(
    path: str | Path,
    output: str | Path,
    overrides: list[str] | None = None,
    dtype: torch.dtype | None = None,
    allow_lighthouse: bool = False,
    max_shard_size: float = 5e9,
    report: Callable[[str], None] = print,
) -> None:
    """Write a checkpoint as ``config.json``, safetensors and the files of its tokenizer.

    Only one file's tensors are in memory at a time.

    Args:
        path, overrides: as in ``inference.load_trained_model``.
        output: a folder that is empty or not there.
        dtype: dtype of the weights; None leaves them as they are stored.
        allow_lighthouse: whether to accept a checkpoint that was not trained dense at the end.
        max_shard_size: largest file of weights, in bytes.
        report: called with lines that say how far the export is.

    Raises:
        ValueError, TypeError, OSError: safetensors is missing; the checkpoint cannot be read, is
            refused, or is of another model than the configuration says; or ``output`` is in use.
    """
    require_safetensors()
    if not 1 <= max_shard_size < math.inf:
        raise UserValueError(
            f"--max-shard-gb {max_shard_size / 1e9:g} must be a finite size of at least 1e-9; use 5"
        )
    path = find_checkpoint(path)
    record = read_record(path)
    if not allow_lighthouse:
        check_dense(path, record)
    with new_folder(output) as folder:
        config, args = read_configuration(path, record, overrides or [])
        if record and "training.seq_len" not in keys_given(overrides or []):
            # The run may have longer sequences later on.
            args.max_seq_len = positions_reached(record.config, record.step)
        tokenizer = build_tokenizer(config)
        stored = _stored_dtype(path, model_state(args))
        described = model_folder(config)
        write_configuration(folder, args, tokenizer, dtype or stored, described)
        write_tokenizer(folder, tokenizer, config.model.hf_assets_path)
        _write_weights(path, folder, args, stored, dtype or stored, max_shard_size, report)


def check_dense(path: Path, record: CheckpointRecord | None) -> None:
    """Check that the last steps before a checkpoint were dense, as a Llama's attention is.

    Raises:
        ValueError: the last step was Lighthouse's, or the checkpoint does not say.
    """
    if record is None or record.last_lighthouse_step is None:
        raise UserValueError(
            f"{path} does not say whether its last steps were dense, as a trainer other than "
            "Lighthouse's wrote it or an earlier part of its run; pass --allow-lighthouse if you "
            "know that they were"
        )
    if record.step and not record.dense_steps:
        scheduled = record.config.get("lighthouse", {}).get("schedule")
        stage = "a dense stage in lighthouse.schedule" if scheduled else "--lighthouse.stage dense"
        raise UserValueError(
            f"step {record.step} of {path} was not dense, and a Llama has dense "
            "attention, which most layers have not been trained with: train on with "
            f"{stage} first, or pass --allow-lighthouse to export it as it is"
        )


def _stored_dtype(path: Path, state: dict[str, torch.Tensor]) -> torch.dtype:
    stored = check_shapes(path, state)
    tensors = [stored[name] for name in state]
    dtypes = {x.properties.dtype for x in tensors if isinstance(x, TensorStorageMetadata)}
    if len(dtypes) > 1:
        # float32 can hold every value of the others.
        return torch.float32
    return dtypes.pop()


def _write_weights(
    path: Path,
    folder: Path,
    args: LighthouseModelArgs,
    stored: torch.dtype,
    dtype: torch.dtype,
    max_shard_size: float,
    report: Callable[[str], None],
) -> None:
    """Read, convert and write the tensors of one file after another."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    ours = {name: tensor.to(dtype) for name, tensor in model_state(args).items()}
    theirs = adapter(args).to_hf(ours)
    start = time.monotonic()
    plan = split_torch_state_dict_into_shards(theirs, max_shard_size=int(max_shard_size))
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), 1):
        wanted = adapter(args).from_hf({name: theirs[name] for name in names})
        state = {name: torch.empty(x.shape, dtype=stored) for name, x in wanted.items()}
        with in_one_process():
            load_state(state, path, no_dist=True)
        if name := first_not_finite(state.items()):
            raise DamagedCheckpointError(path, f"'{name}' holds values that are not finite")
        shard = {
            name: tensor.to(dtype).contiguous()
            for name, tensor in adapter(args).to_hf(state).items()
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        shutil.copymode(folder / CONFIG_FILE, folder / file)
        size = sum(tensor.nbytes for tensor in shard.values())
        count = len(plan.filename_to_tensors)
        report(
            f"{file} ({number} of {count}): {len(shard)} tensors, {size / 1e9:.2f} GB"
            f"{time_left(start, number, count)}"
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    else:
        assert list(plan.filename_to_tensors) == [WEIGHTS_FILE]
