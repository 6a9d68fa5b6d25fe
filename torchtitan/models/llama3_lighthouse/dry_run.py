"""A description of a run, without the machines for it: ``lighthouse dry-run``.

It checks the whole configuration, builds the real mesh on torch's fake process group, and applies
the parallelisms to the model on the meta device. From these it takes a rank's share of tokens,
memory and work.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils

from lighthouse.geometry import PyramidGeometry

from .checks import check_config, check_world_size, layout_on_rank_0
from .data.packing import global_batch_size, stream_count
from .errors import UserError, UserValueError
from .infra.context_parallel import bytes_sent_per_layer
from .infra.parallelize import parallelize_lighthouse
from .infra.pipeline import pipeline_lighthouse
from .job_config import JobConfig, Parallelism
from .memory_estimate import OPTIMIZER_BYTES, activation_bytes, local_parameters, pinned_bytes
from .model.flavors import flavors
from .model.loss import build_loss
from .model.model import LighthouseModelArgs, LighthouseTransformer, lighthouse_config
from .stages import ATTENTIONS

GIB = 2**30


def dry_run(config: JobConfig, world_size: int) -> str:
    """Check ``config`` for ``world_size`` processes and describe the run.

    Raises:
        ValueError, TypeError, OSError: the run cannot work; the message names key, value and fix.
    """
    check_config(config, flavors)
    check_world_size(config.parallelism, world_size)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    dist_utils.init_fake_mode(world_size)
    try:
        return _describe(config, world_size)
    except UserError:
        raise
    except ValueError as error:
        raise UserValueError(f"torchtitan refuses the configuration: {error}") from error
    finally:
        dist.destroy_process_group()


def _describe(config: JobConfig, world_size: int) -> str:
    """The lines of the description, one topic each."""
    dims = _mesh(config.parallelism, world_size)
    args = flavors[config.model.flavor]
    args.update_from_config(config)
    geometry = PyramidGeometry(lighthouse_config(config.lighthouse), config.training.seq_len)
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    counts = {
        attention: args.get_nparams_and_flops(model, config.training.seq_len, attention)
        for attention in ATTENTIONS
    }
    total = counts["dense"][0]
    flops = {attention: count for attention, (_, count) in counts.items()}
    # Parallelisms change the model, which has to be whole until here.
    parameters = sum(local_parameters(part) for part in _parts(model, dims, config, args))
    tokens = config.training.local_batch_size * config.training.seq_len // dims.cp // dims.tp
    lines = [
        f"{config.job.config_file}: {config.model.flavor}, {total:,} parameters, "
        f"{config.training.steps:,} steps",
        _mesh_line(dims, world_size),
        _batch_line(config, dims),
        _rank_line(config, tokens, parameters),
        _lighthouse_line(config, dims, geometry),
    ]
    if dims.cp_enabled:
        lines.append(_context_parallel_line(config, dims, args))
    lines += [
        _memory_line(config, dims, args, tokens, parameters),
        "FLOPs/token   "
        + ", ".join(f"{attention} {count:.3e}" for attention, count in flops.items()),
    ]
    if config.activation_checkpoint.offload_inputs:
        pinned = pinned_bytes(args, tokens) / GIB
        lines.append(f"offload       needs GPUs (CUDA); a rank pins {pinned:.2f} GiB on its host")
    return "\n".join(lines)


def _mesh(section: Parallelism, world_size: int) -> ParallelDims:
    dims = ParallelDims(
        dp_shard=section.data_parallel_shard_degree,
        dp_replicate=section.data_parallel_replicate_degree,
        cp=section.context_parallel_degree,
        tp=section.tensor_parallel_degree,
        pp=section.pipeline_parallel_degree,
        ep=1,
        etp=1,
        world_size=world_size,
    )
    dims.build_mesh()
    return dims


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


def _mesh_line(dims: ParallelDims, world_size: int) -> str:
    return (
        f"mesh          {world_size} processes = {dims.dp_replicate} replicas x {dims.dp_shard} "
        f"FSDP x {dims.cp} context x {dims.tp} tensor x {dims.pp} pipeline parallel"
    )


def _batch_line(config: JobConfig, dims: ParallelDims) -> str:
    training = config.training
    data_parallel = dims.dp_replicate * dims.dp_shard
    streams = stream_count(config, data_parallel)
    batch = global_batch_size(config, data_parallel)
    passes = batch // (training.local_batch_size * data_parallel)
    return (
        f"batch         {batch} sequences of {training.seq_len:,} tokens, "
        f"{batch * training.seq_len:,} tokens a step in {passes} passes; text dealt to {streams} "
        "streams"
    )


def _rank_line(config: JobConfig, tokens: int, parameters: int) -> str:
    chunks = len(layout_on_rank_0(config.parallelism).held)
    return f"each rank     {tokens:,} tokens a pass in {chunks} chunks, {parameters:,} parameters"


def _lighthouse_line(config: JobConfig, dims: ParallelDims, geometry: PyramidGeometry) -> str:
    strata, gathered = geometry.strata, geometry.gathered_length
    chunks = layout_on_rank_0(config.parallelism).chunks
    every = config.lighthouse.dense_every
    return (
        f"Lighthouse    S = {gathered:,} of {geometry.sequence_length:,} positions, "
        f"{gathered // dims.cp:,} on each rank; {strata} strata, {strata // chunks} in each chunk"
        + (f"; every {every}th step dense" if every else "")
    )


def _context_parallel_line(config: JobConfig, dims: ParallelDims, args: LighthouseModelArgs) -> str:
    sent = bytes_sent_per_layer(
        args,
        config.training.seq_len,
        layout_on_rank_0(config.parallelism),
        TORCH_DTYPE_MAP[config.training.mixed_precision_param],
    )
    # Tensor parallelism gives a rank a share of the heads.
    ring, seam = (sent[name] // dims.tp for name in ("ring", "seam"))
    return (
        f"ring          each rank sends {ring:,} bytes of keys, values and gradients, and {seam:,} "
        "bytes of seam rows, per Lighthouse layer and sequence"
    )


def _memory_line(
    config: JobConfig, dims: ParallelDims, args: LighthouseModelArgs, tokens: int, parameters: int
) -> str:
    memory = {name: parameters * size / GIB for name, size in OPTIMIZER_BYTES.items()}
    for attention in ATTENTIONS:
        # A rank holds 1 / pp of the layers, and keeps them for the tokens of all microbatches.
        kept = activation_bytes(
            args,
            config.training.seq_len,
            tokens // dims.pp,
            config.activation_checkpoint,
            attention,
        )
        memory[f"activations ({attention}, estimated)"] = kept / GIB
    return "memory, GiB   " + ", ".join(f"{name} {size:.2f}" for name, size in memory.items())
