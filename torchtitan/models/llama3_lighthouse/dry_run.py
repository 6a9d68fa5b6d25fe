"""What a run would be, without the machines for it: ``./run_train.sh --dry-run``.

Every check of the configuration, the real mesh on torch's fake process group, the model on the
meta device with its parallelisms applied, and from these a rank's share of tokens, memory and work.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils

from .checks import check_config, chunks_of_a_sequence
from .data.packing import global_batch_size, stream_count
from .errors import UserError, UserValueError
from .infra.activation_checkpoint import BEFORE_GATHERING, PRODUCTS
from .infra.offload import INPUTS_ON_DEVICE
from .infra.parallelize import parallelize_lighthouse
from .infra.pipeline import pipeline_lighthouse
from .job_config import ActivationCheckpoint, JobConfig, LighthouseConfigManager
from .model.flavors import flavors
from .model.linear_cross_entropy import tokens_per_chunk
from .model.loss import build_loss
from .model.model import LighthouseModelArgs, LighthouseTransformer

GIB = 2**30
# Parameters, gradients and the two moments of AdamW, all float32 as in torchtitan's FSDP.
OPTIMIZER_BYTES = {"parameters": 4, "gradients": 4, "optimizer": 8}
AFTER_ATTENTION = set(PRODUCTS) - set(BEFORE_GATHERING)
# Of mixed precision's bfloat16, in which activations are kept.
ACTIVATION_BYTES = 2


def local_parameters(model: nn.Module) -> int:
    """Parameters of ``model`` that rank 0 holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def head_bytes(args: LighthouseModelArgs, tokens: int) -> int:
    """Estimate of what the loss of ``tokens`` tokens holds.

    Whole, logits once in bfloat16 and twice in float32, ``vocab_size`` of them a token. In chunks,
    the logits of one of them, the gradient of the hidden states, and the weight in bfloat16 with
    its gradient in float32.
    """
    if not args.chunked_loss:
        return tokens * args.vocab_size * (ACTIVATION_BYTES + 8)
    chunk = min(tokens, tokens_per_chunk(args.vocab_size, ACTIVATION_BYTES))
    weight = args.vocab_size * args.dim * (ACTIVATION_BYTES + 4)
    return (chunk * args.vocab_size + tokens * args.dim) * ACTIVATION_BYTES + weight


def layer_elements(
    args: LighthouseModelArgs, section: ActivationCheckpoint, share: float
) -> tuple[float, float]:
    """What a dense and a Lighthouse layer keep for backward, in elements a token.

    With "lighthouse" checkpointing what ``infra/activation_checkpoint.py`` says, with "full" their
    input, with "selective" also half of the matrix products, as torchtitan's "op" policy does, and
    the attention output, with "none" about all that they compute.

    Args:
        share: S / N.
    """
    hidden = int(8 * args.dim / 3 * (args.ffn_dim_multiplier or 1))
    hidden = -(-hidden // args.multiple_of) * args.multiple_of
    kv_heads = args.n_kv_heads or args.n_heads
    kv = args.dim * kv_heads // args.n_heads
    widths = {"wq": args.dim, "wk": kv, "wv": kv, "wo": args.dim, "w1": hidden, "w3": hidden}
    products = sum(widths.values())
    if section.mode != "lighthouse":
        kept = {
            "full": args.dim,
            "selective": 2 * args.dim + products / 2,
            "none": 7 * args.dim + products + 2 * hidden,
        }.get(section.mode, float("nan"))
        return kept, kept
    after = sum(widths[name] for name in section.keep_products if name in AFTER_ATTENTION)
    before = sum(widths[name] for name in section.keep_products) - after
    words = 4 / ACTIVATION_BYTES
    attention = args.dim + words * args.n_heads
    levels, p = args.lighthouse.levels, args.lighthouse.pooling_factor
    selection = words * kv_heads * (share + sum(p**-level for level in range(levels)))
    gathered = share * (args.dim + 2 * kv + attention) + selection
    return args.dim + after + before + attention, args.dim + after + gathered


def activation_bytes(
    args: LighthouseModelArgs,
    seq_len: int,
    tokens: int,
    section: ActivationCheckpoint,
    attention: str,
) -> float:
    """Estimate of what a rank with ``tokens`` tokens of a ``seq_len`` keeps under ``attention``.

    Of the head: ``head_bytes``.
    """
    share = args.gathered_length(seq_len) / seq_len
    dense, lighthouse = layer_elements(args, section, share)
    lighthouse_layers = args.n_layers - len(args.dense_layers) if attention == "lighthouse" else 0
    layers = (args.n_layers - lighthouse_layers) * dense + lighthouse_layers * lighthouse
    if section.offload_inputs:
        layers -= max(0, args.n_layers - INPUTS_ON_DEVICE) * args.dim
    return tokens * layers * ACTIVATION_BYTES + head_bytes(args, tokens)


def dry_run(config: JobConfig, world_size: int) -> str:
    """Check ``config`` for ``world_size`` processes and describe the run.

    Raises:
        ValueError, TypeError, OSError: it cannot work; the message names key, value and fix.
    """
    check_config(config, flavors)
    section = config.parallelism
    fixed = (
        section.data_parallel_replicate_degree
        * section.context_parallel_degree
        * section.tensor_parallel_degree
        * section.pipeline_parallel_degree
    )
    if world_size % fixed or (
        section.data_parallel_shard_degree > 0
        and world_size != fixed * section.data_parallel_shard_degree
    ):
        raise UserValueError(
            f"NGPU x NNODES = {world_size} processes do not make up [parallelism]: "
            "data_parallel_replicate_degree x context_parallel_degree x tensor_parallel_degree x "
            f"pipeline_parallel_degree = {fixed}, data_parallel_shard_degree = "
            f"{section.data_parallel_shard_degree}"
        )
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    dist_utils.init_fake_mode(world_size)
    try:
        return _describe(config, world_size)
    finally:
        dist.destroy_process_group()


def _describe(config: JobConfig, world_size: int) -> str:
    section, training = config.parallelism, config.training
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
    args = flavors[config.model.flavor]
    args.update_from_config(config)
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    total, _ = args.get_nparams_and_flops(model, training.seq_len)
    flops = {
        attention: args.get_nparams_and_flops(model, training.seq_len, attention)[1]
        for attention in ("lighthouse", "dense")
    }
    if dims.pp_enabled:
        _, parts, *_ = pipeline_lighthouse(
            model, dims, config, torch.device("meta"), args, parallelize_lighthouse,
            build_loss(config),
        )  # fmt: skip
    else:
        parts = [parallelize_lighthouse(model, dims, config)]
    mine = sum(local_parameters(part) for part in parts)

    data_parallel = dims.dp_replicate * dims.dp_shard
    streams = stream_count(config, data_parallel)
    batch = global_batch_size(config, data_parallel)
    passes = batch // (training.local_batch_size * data_parallel)
    tokens = training.local_batch_size * training.seq_len // dims.cp // dims.tp
    chunks = chunks_of_a_sequence(config)
    gathered = args.gathered_length(training.seq_len)
    every = config.lighthouse.dense_every
    strata = args.lighthouse.top_k // args.lighthouse.picks_per_stratum
    memory = {name: mine * size / GIB for name, size in OPTIMIZER_BYTES.items()}
    for attention in flops:
        # A rank holds a share of the layers, for as many as all microbatches.
        kept = activation_bytes(
            args, training.seq_len, tokens // dims.pp, config.activation_checkpoint, attention
        )
        memory[f"activations ({attention}, estimated)"] = kept / GIB
    lines = [
        f"{config.job.config_file}: {config.model.flavor}, {total:,} parameters, "
        f"{training.steps:,} steps",
        f"mesh          {world_size} processes = {dims.dp_replicate} replicas x {dims.dp_shard} "
        f"FSDP x {dims.cp} context x {dims.tp} tensor x {dims.pp} pipeline parallel",
        f"batch         {batch} sequences of {training.seq_len:,} tokens, "
        f"{batch * training.seq_len:,} tokens a step in {passes} passes; text dealt to {streams} "
        "streams",
        f"each rank     {tokens:,} tokens a pass in {chunks // dims.cp} chunks, "
        f"{mine:,} parameters",
        f"Lighthouse    S = {gathered:,} of {training.seq_len:,} positions, "
        f"{gathered // dims.cp:,} on each rank; {strata} strata, {strata // chunks} in each chunk"
        + (f"; every {every}th step dense" if every else ""),
        "memory, GiB   " + ", ".join(f"{name} {size:.2f}" for name, size in memory.items()),
        "FLOPs/token   "
        + ", ".join(f"{attention} {count:.3e}" for attention, count in flops.items()),
    ]
    if config.activation_checkpoint.offload_inputs:
        buffer = args.dim * tokens * ACTIVATION_BYTES
        # torch pins powers of two.
        pinned = args.n_layers * 2 ** (buffer - 1).bit_length() / GIB
        lines.append(f"offload       needs GPUs (CUDA); a rank pins {pinned:.2f} GiB on its host")
    return "\n".join(lines)


def main() -> None:
    processes = int(os.environ.get("NGPU", "1")) * int(os.environ.get("NNODES", "1"))
    try:
        print(dry_run(LighthouseConfigManager().parse_args(sys.argv[1:]), processes))
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
