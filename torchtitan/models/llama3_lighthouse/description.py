"""The lines that ``lighthouse dry-run`` and the start of a log share, and those of its end."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims

from lighthouse.geometry import PyramidGeometry
from lighthouse.implementation import choose_window_implementation

from .checks.parallelism import layout_on_rank_0, precision_key
from .console import LOG_FILE, duration
from .data.documents import layout_lines
from .data.packing import global_batch_size, stream_count
from .data.tokenizer import build_tokenizer
from .errors import UserError
from .infra.context_parallel import bytes_sent_per_layer
from .job_config import JobConfig
from .memory_estimate import OPTIMIZER_BYTES, activation_bytes, pinned_bytes
from .metrics import METRICS_FILE
from .model.model import LighthouseModelArgs, LighthouseTransformer, selecting_config
from .model.rope_scaling import LENGTH
from .run_stages import RunStage, RunStages
from .stages import ATTENTIONS, name_of, stages_of
from .time_estimate import step_seconds

GIB = 2**30
# How lines name an attention, which for stage "lighthouse" is ``lighthouse.attention``.
NAMES = {"lighthouse": "Lighthouse", "window": "window", "dense": "dense"}
WINDOW_KERNELS = {
    "flash4": "FlashAttention 4",
    "triton": "kernels",
    "torch": "vectorised PyTorch",
}


def describe(
    config: JobConfig, dims: ParallelDims, args: LighthouseModelArgs, parameters: int
) -> list[str]:
    """The lines, one topic each.

    Args:
        args: those of the model, made for this run.
        parameters: parameters that a rank holds.
    """
    seq_len = config.training.seq_len
    with torch.device("meta"):
        model = LighthouseTransformer(args)
    total, _ = args.get_nparams_and_flops(model, seq_len)
    tokens = config.training.local_batch_size * seq_len // dims.cp // dims.tp
    chunks = len(layout_on_rank_0(config.parallelism).held)
    lines = [
        f"model         {config.model.hf_folder or config.model.flavor}, {total:,} parameters; "
        f"{_tokenizer(config, args, total)}",
        _steps_line(config, dims),
        _mesh_line(dims),
        _batch_line(config, dims),
        f"each rank     {_count(tokens, 'token')} a pass in {_count(chunks, 'chunk')}, "
        f"{parameters:,} parameters",
        *layout_lines(config),
    ]
    if config.lighthouse.schedule:
        stages = RunStages(config, args).all
        return [
            *lines,
            *_schedule_lines(stages, dims, parameters),
            *_ring_lines(stages, dims),
            *_offload_line(config, args, tokens),
        ]
    lines.append(_lighthouse_line(config, dims, args))
    if dims.cp_enabled:
        lines.append(f"ring          {_sent_over_the_ring(config, dims, args)}")
    lines += [
        _memory_line(config, dims, args, tokens, parameters),
        "FLOPs/token   "
        + ", ".join(
            f"{_name(config, each)} {args.get_nparams_and_flops(model, seq_len, each)[1]:.3e}"
            for each in ATTENTIONS
        ),
    ]
    return [*lines, *_offload_line(config, args, tokens)]


def _offload_line(config: JobConfig, args: LighthouseModelArgs, tokens: int) -> list[str]:
    if not config.activation_checkpoint.offload_inputs:
        return []
    pinned = pinned_bytes(args, tokens) / GIB
    return [f"offload       needs GPUs (CUDA); a rank pins {pinned:.2f} GiB on its host"]


def _schedule_lines(stages: Sequence[RunStage], dims: ParallelDims, parameters: int) -> list[str]:
    """A line for each stage: what a step is, its memory, and its shares of the run."""
    found, work, time = [], [], []
    for each in stages:
        stage, training = each.stage, each.stage.config.training
        batch = global_batch_size(stage.config, dims.dp_replicate * dims.dp_shard)
        tokens = training.local_batch_size * stage.seq_len // dims.cp // dims.tp
        steps = stage.steps
        estimate = memory_estimate(stage.config, dims, each.args, tokens, parameters, tuple(steps))
        state = estimate.pop("state")
        flops = sum(count * each.flops[attention] for attention, count in steps.items())
        work.append(batch * stage.seq_len * flops)
        time.append(
            sum(
                count * step_seconds(each.args, stage.seq_len, batch * stage.seq_len, attention)
                for attention, count in steps.items()
            )
        )
        runs = ""
        if stage.config.lighthouse.skip_positions:
            runs = f" spread over {stage.config.lighthouse.skip_positions:,} positions"
        runs += _under_yarn(each.args)
        if stage.attention == "lighthouse" and each.args.selects:
            runs += f", S = {each.gathered['lighthouse']:,}"
        if stage.attention == "lighthouse" and stage.config.lighthouse.window:
            runs += f", window of {stage.config.lighthouse.window:,}{_far_keys(stage.config)}"
        found.append(
            f"{_name(stage.config, stage.attention)} in steps {stage.first:,} to {stage.last:,}: "
            f"{_count(batch, 'sequence')} of {stage.seq_len:,} tokens{runs}; "
            f"{_gib(state + max(estimate.values()))} GiB a rank, estimated; "
            f"{each.flops[stage.attention]:.3e} FLOPs/token"
        )
    all_work, all_time = sum(work), sum(time)
    return [
        f"stage {number:<7} {line}, {flops / all_work:.0%} of the run's FLOPs and about "
        f"{seconds / all_time:.0%} of its time on GPUs"
        for number, (line, flops, seconds) in enumerate(zip(found, work, time, strict=True), 1)
    ]


def _name(config: JobConfig, attention: str) -> str:
    return NAMES[name_of(config, attention)]


def _count(number: int, noun: str) -> str:
    ending = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2f}"


def _tokenizer(config: JobConfig, args: LighthouseModelArgs, total: int) -> str:
    """The tokenizer, and the rows of embedding and output that none of its ids uses."""
    kind = config.lighthouse.tokenizer
    name = "byte tokenizer" if kind == "byte" else f"tokenizer of {config.model.hf_assets_path}"
    try:
        ids = build_tokenizer(config).get_vocab_size()
    except UserError:
        # A dry run may come before the tokenizer's files are there.
        return f"{name}, which is not there to count its ids"
    unused = args.vocab_size - ids
    if unused <= 0:
        return f"{name}, {ids:,} ids"
    share = (1 if args.tied else 2) * unused * args.dim / total
    part = f"{share:.1%}" if share >= 0.001 else "under 0.1%"
    return (
        f"{name}, {ids:,} ids: {unused:,} of {args.vocab_size:,} vocabulary rows, {part} of the "
        "parameters, never see a token"
    )


def _steps_line(config: JobConfig, dims: ParallelDims) -> str:
    section, steps = config.lighthouse, config.training.steps
    last = {"auto": min(section.dense_from_step, steps), "lighthouse": steps, "dense": 0}
    switch, first = last[section.stage], f"in the {_name(config, 'lighthouse')} stage"
    if switch == 0:
        stages = "all dense"
    elif switch == steps:
        stages = f"all {first}"
    else:
        stages = f"1 to {switch:,} {first}, then dense"
    if section.schedule:
        stages = f"in {_count(len(section.schedule), 'stage')}"
    every = section.dense_every
    sparse = any(stage.attention == "lighthouse" for stage in stages_of(config))
    every_line = f", one step in {every} of them dense" if every and sparse else ""
    return (
        f"steps         {steps:,}: {stages}{every_line}; "
        f"{_tokens_of_run(config, dims):,} tokens in all"
    )


def _tokens_of_run(config: JobConfig, dims: ParallelDims) -> int:
    ranks = dims.dp_replicate * dims.dp_shard
    return sum(
        (stage.last - stage.first + 1) * global_batch_size(stage.config, ranks) * stage.seq_len
        for stage in stages_of(config)
    )


def _mesh_line(dims: ParallelDims) -> str:
    degrees = {
        "replicas": dims.dp_replicate,
        "FSDP": dims.dp_shard,
        "context parallel": dims.cp,
        "tensor parallel": dims.tp,
        "pipeline parallel": dims.pp,
    }
    product = " x ".join(f"{degree} {name}" for name, degree in degrees.items() if degree > 1)
    return f"mesh          {_count(dims.world_size, 'process')}{' = ' if product else ''}{product}"


def _batch_line(config: JobConfig, dims: ParallelDims) -> str:
    training = config.training
    data_parallel = dims.dp_replicate * dims.dp_shard
    batch = global_batch_size(config, data_parallel)
    passes = _count(batch // (training.local_batch_size * data_parallel), "pass")
    streams = stream_count(config, data_parallel)
    return (
        f"batch         {_count(batch, 'sequence')} of {training.seq_len:,} tokens, "
        f"{batch * training.seq_len:,} tokens a step in {passes}; text dealt to "
        f"{_count(streams, 'stream')}"
    )


def _lighthouse_line(config: JobConfig, dims: ParallelDims, args: LighthouseModelArgs) -> str:
    """The attention of the first stage."""
    seq_len = config.training.seq_len
    method = selecting_config(config.lighthouse)
    if method is None:
        window, stride = args.window, args.key_stride
        keys = args.pairs_near(seq_len) / seq_len
        near = f"{window - stride + 1:,} to {window:,}" if stride else f"{window:,}"
        return (
            f"window        each position attends over the last {near} of {seq_len:,} "
            f"positions{_far_keys(config)}, {keys:,.1f} keys on average"
        )
    geometry = PyramidGeometry(method, seq_len)
    strata, gathered = geometry.strata, geometry.gathered_length
    chunks = layout_on_rank_0(config.parallelism).chunks
    shares = f", {gathered // dims.cp:,} on each rank" if dims.cp > 1 else ""
    in_chunks = f", {strata // chunks} in each chunk" if chunks > 1 else ""
    beside = f"; a window of {method.window:,} positions beside it" if method.window else ""
    return (
        f"Lighthouse    S = {gathered:,} of {geometry.sequence_length:,} positions{shares}; "
        f"{strata} strata{in_chunks}{beside}"
    )


def _far_keys(config: JobConfig) -> str:
    """Words about the keys beside a window that stands alone, if there are any."""
    section = config.lighthouse
    if section.attention != "window" or not section.key_stride:
        return ""
    return f" and one key in every {section.key_stride} further back"


def _ring_lines(stages: Sequence[RunStage], dims: ParallelDims) -> list[str]:
    """A line for each size of the ring's messages, which names stages where there are several."""
    numbers: dict[str, list[str]] = {}
    if not dims.cp_enabled:
        return []
    for each in stages:
        sparse_layers = each.args.n_layers - len(each.args.dense_layers)
        if each.stage.attention == "lighthouse" and sparse_layers:
            sent = _sent_over_the_ring(each.stage.config, dims, each.args)
            numbers.setdefault(sent, []).append(f"stage {each.number + 1}")
    if len(numbers) == 1:
        return [f"ring          {sent}" for sent in numbers]
    return [f"ring          in {' and '.join(those)}, {sent}" for sent, those in numbers.items()]


def _sent_over_the_ring(config: JobConfig, dims: ParallelDims, args: LighthouseModelArgs) -> str:
    sent = bytes_sent_per_layer(
        args,
        config.training.seq_len,
        layout_on_rank_0(config.parallelism),
        TORCH_DTYPE_MAP[config.training.mixed_precision_param],
    )
    # Tensor parallelism gives a rank a share of the heads.
    ring, seam, halo = (sent[name] // dims.tp for name in ("ring", "seam", "halo"))
    parts = [
        f"{ring:,} bytes of keys, values and gradients" if args.selects else "",
        f"{seam:,} bytes of seam rows" if args.selects else "",
        f"{halo:,} bytes of the halo" if args.window or args.lighthouse.window else "",
    ]
    *others, last = filter(None, parts)
    listed = f"{', '.join(others)}, and {last}" if others else last
    layer = _name(config, "lighthouse")
    return f"each rank sends {listed}, per {layer} layer and sequence"


def memory_estimate(
    config: JobConfig,
    dims: ParallelDims,
    args: LighthouseModelArgs,
    tokens: int,
    parameters: int,
    attentions: Sequence[str] = ATTENTIONS,
) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer, and of activations under each attention.

    Args:
        tokens: tokens of a pass on a rank.
        parameters: parameters that a rank holds.
    """
    found = {"state": float(parameters * sum(OPTIMIZER_BYTES.values()))}
    for attention in attentions:
        # A rank holds 1 / pp of the layers, and keeps them for the tokens of all microbatches.
        found[attention] = activation_bytes(
            args,
            config.training.seq_len,
            tokens // dims.pp,
            config.activation_checkpoint,
            attention,
            dims.cp,
        )
    return found


def _memory_line(
    config: JobConfig, dims: ParallelDims, args: LighthouseModelArgs, tokens: int, parameters: int
) -> str:
    found = memory_estimate(config, dims, args, tokens, parameters)
    state = found.pop("state")
    totals = ", ".join(
        f"{_gib(state + kept)} GiB {_name(config, attention)}" for attention, kept in found.items()
    )
    kept = " or ".join(map(_gib, found.values()))
    return (
        f"memory        each rank, estimated: {totals}; {_gib(state)} for weights, gradients "
        f"and optimizer, {kept} for activations; torch itself and the allocator's reserve come on "
        "top"
    )


def _under_yarn(args: LighthouseModelArgs) -> str:
    scaling = args.rope_scaling
    if scaling["rope_type"] != "yarn":
        return ""
    return f" under YaRN of {scaling['factor']:g} x {scaling[LENGTH]:,}"


def output_line(config: JobConfig) -> str:
    """Where a run writes."""
    places = [METRICS_FILE, LOG_FILE]
    if config.checkpoint.enable:
        places.append(f"{config.checkpoint.folder}/step-N")
    if config.metrics.enable_tensorboard:
        places.append(f"{config.metrics.save_tb_folder}/ for TensorBoard")
    return f"output        {config.job.dump_folder}: {', '.join(places)}"


def what_runs(
    config: JobConfig,
    args: LighthouseModelArgs,
    stage: str,
    length: int,
    device: torch.device,
    world_size: int,
) -> str:
    """The ``length`` that attention runs on in ``stage``, its window, and what computes that."""
    seq_len, window = config.training.seq_len, config.lighthouse.window
    skips = config.lighthouse.skip_positions
    positions = f"{seq_len:,} positions" + (f" spread over {skips:,}" if skips else "")
    positions += _under_yarn(args)
    runs = f"attention runs on {length:,} of {positions}"
    if stage != "lighthouse" or not window:
        return runs
    near, far = f"each position attends over a window of {window:,}", _far_keys(config)
    runs = f"{runs}, {near} too" if args.selects else f"{near} of {positions}{far}"
    # A window of all positions is dense attention, and far keys have kernels of their own.
    if window >= seq_len or far:
        return runs
    dtype = TORCH_DTYPE_MAP[getattr(config.training, precision_key(config, world_size))]
    head = torch.empty(1, 1, 1, args.head_dim, dtype=dtype, device=device)
    by = WINDOW_KERNELS[choose_window_implementation(None, head)]
    if not config.training.document_mask:
        return f"{runs}, by {by}"
    masked = WINDOW_KERNELS[choose_window_implementation(None, head, with_documents=True)]
    beside = f", and by {by} where each sequence is one document" if by != masked else ""
    return f"{runs}, by {masked}{beside}"


def _command() -> str:
    """The console command as a shell in this folder can call it."""
    own = Path(sys.executable).with_name("lighthouse")
    if shutil.which("lighthouse") or not own.exists():
        return "lighthouse"
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


def ending(config: JobConfig, step: int, steps_taken: int, stage: str, seconds: float) -> list[str]:
    """How a run ended, and what to do next.

    Args:
        step: the last step.
        steps_taken: steps of this launch, which took ``seconds``.
        stage: stage of the last step.
    """
    steps, folder = config.training.steps, config.job.dump_folder
    if not steps_taken:
        return [
            f"Already at step {step:,} of {steps:,}: nothing to train; pass --training.steps with "
            "a larger number to go on, or --job.dump_folder FOLDER to begin another run"
        ]
    lines = [
        f"Finished step {step:,} of {steps:,}: {_count(steps_taken, 'step')} in {duration(seconds)}"
    ]
    # Upstream's last save is that of the last step. A run that ran out of text ends before it.
    if not config.checkpoint.enable or config.checkpoint.load_only or step < steps:
        return lines
    lines[0] += f"; checkpoint {Path(folder, config.checkpoint.folder)}/step-{step}"
    if stage == "dense":
        lines.append(f"Next: {_command()} export-hf {folder} --output FOLDER")
    else:
        how = "--lighthouse.stage dense"
        if config.lighthouse.schedule:
            how = "a dense stage at the end of lighthouse.schedule"
        lines.append(
            f"Next: the dense stage, by the same command with {how} and a larger --training.steps"
        )
    return lines
