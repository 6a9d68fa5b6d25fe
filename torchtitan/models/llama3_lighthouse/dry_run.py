"""A description of a run, without the machines for it: ``lighthouse dry-run``.

It checks the whole configuration, builds the real mesh on torch's fake process group, and applies
the parallelisms to the model on the meta device. From these it takes a rank's share of tokens,
memory and work.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils

from .checkpoints.contents import undamaged_record
from .checkpoints.folders import checkpoint_to_load, folder_of
from .checkpoints.model_folder import model_arguments_of
from .checkpoints.resume import check_settings
from .checks.configuration import check_launch
from .checks.parallelism import parallel_dims_of
from .checks.text import check_folders
from .checks.unread import warnings_of
from .description import describe, memory_estimate
from .errors import UserError, UserValueError
from .infra.parallelize import parallelize_lighthouse
from .infra.pipeline import pipeline_lighthouse
from .job_config import JobConfig, sections_of_text
from .memory_estimate import local_parameters
from .model.flavors import flavors
from .model.loss import build_loss
from .model.model import LighthouseModelArgs, LighthouseTransformer


def dry_run(config: JobConfig, world_size: int) -> str:
    """Check ``config`` for ``world_size`` processes and describe the run.

    Raises:
        ValueError, TypeError, OSError: the run cannot work; the message names key, value and fix.
    """
    with _fake_ranks(config, world_size) as dims:
        args, parameters = _shared_model(config, dims)
        lines = [f"{config.job.config_file}", *describe(config, dims, args, parameters)]
    warnings = warnings_of(config, world_size)
    # A dry run may come before the text is there, or before other checkpoints have gone.
    try:
        lines += _resume_line(config)
    except UserError as error:
        warnings.append(str(error))
    lines.append(_text_line(config))
    try:
        check_folders(config)
    except UserError as error:
        warnings.append(str(error))
    return "\n".join([*lines, *(f"warning       {line}" for line in warnings)])


def estimated_bytes(config: JobConfig, world_size: int) -> dict[str, float]:
    """The memory of a rank that ``dry_run`` states, in bytes: "lighthouse" and "dense".

    Raises:
        ValueError, TypeError, OSError: as ``dry_run``.
    """
    with _fake_ranks(config, world_size) as dims:
        args, parameters = _shared_model(config, dims)
        tokens = config.training.local_batch_size * config.training.seq_len // dims.cp // dims.tp
        found = memory_estimate(config, dims, args, tokens, parameters)
    state = found.pop("state")
    return {attention: state + kept for attention, kept in found.items()}


@contextmanager
def _fake_ranks(config: JobConfig, world_size: int) -> Generator[ParallelDims]:
    """The checked configuration's mesh on a fake process group, in which this process is rank 0."""
    check_launch(config, flavors, world_size)
    # Later work in this process must not take itself for a rank.
    with patch.dict(os.environ, RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size)):
        dist_utils.init_fake_mode(world_size)
        try:
            dims = parallel_dims_of(config.parallelism, world_size)
            dims.build_mesh()
            yield dims
        except UserError:
            raise
        except ValueError as error:
            raise UserValueError(f"torchtitan refuses the configuration: {error}") from error
        finally:
            dist.destroy_process_group()


def _shared_model(config: JobConfig, dims: ParallelDims) -> tuple[LighthouseModelArgs, int]:
    """Arguments of the model, and the parameters that rank 0 holds of it."""
    args = model_arguments_of(config)
    args.update_from_config(config)
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    return args, sum(local_parameters(part) for part in _parts(model, dims, config, args))


def _resume_line(config: JobConfig) -> list[str]:
    """What the run goes on from: other lines tell of all steps as configured now.

    Raises:
        ValueError: there is no such checkpoint, or training would refuse to go on from it.
    """
    section, folder = config.checkpoint, folder_of(config)
    if not section.enable or section.create_seed_checkpoint:
        return []
    path = checkpoint_to_load(
        folder, section.load_step, section.load_only, section.initial_load_path
    )
    if path is None or path == folder / "step-0":
        return []
    if path.parent != folder:
        part = "the weights of " if section.initial_load_model_only else ""
        return [f"resume        starts from {part}{path}"]
    if record := undamaged_record(path):
        check_settings(path, record, config.to_dict(), elsewhere=False, weights_only=False)
    step = int(path.name.removeprefix("step-"))
    return [
        f"resume        goes on from {path}: steps 1 to {step:,} stay as they were trained, also "
        "where stages named here are others"
    ]


def _text_line(config: JobConfig) -> str:
    """The sources of text."""
    found = []
    for section in sections_of_text(config).values():
        path, source = section.dataset_path, section.dataset
        if path:
            source += f" from {path}"
        found.append(source)
    return "text          " + "; held out: ".join(found)


def _parts(
    model: LighthouseTransformer, dims: ParallelDims, config: JobConfig, args: LighthouseModelArgs
) -> list[nn.Module]:
    """The parts of the model on rank 0: several only under interleaved pipeline parallelism."""
    if not dims.pp_enabled:
        return [parallelize_lighthouse(model, dims, config)]
    _, parts, *_ = pipeline_lighthouse(
        model, dims, config, torch.device("meta"), args, parallelize_lighthouse, build_loss(config)
    )
    return parts
