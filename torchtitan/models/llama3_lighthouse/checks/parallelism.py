"""Checks of degrees of parallelism: with one another, with the device, with the processes."""

import math

import psutil
import torch
from packaging.version import Version
from torchtitan.distributed import ParallelDims

from lighthouse import ContextParallel
from lighthouse.context_parallel import check_halo

from ..checkpoints.model_folder import model_arguments_of, named_model
from ..errors import UserValueError
from ..infra.pipeline import check_pipeline
from ..job_config import JobConfig, Parallelism, sections_of_text
from ..model.model import LighthouseModelArgs
from ..stages import distinct_stages, naming, stages_of


def check_parallelism(config: JobConfig, args: LighthouseModelArgs) -> None:
    """Check that the degrees go with one another, with the model and with what the run is to do.

    Raises:
        ValueError: two settings do not go together.
    """
    _check_degrees(config, args.n_layers)
    _check_tied(config, args)
    _check_length(config)
    _check_halo(config, args.n_layers)
    _check_compile(config)
    _check_loss(config)
    _check_offload(config)


def _check_degrees(config: JobConfig, n_layers: int) -> None:
    section = config.parallelism
    replicas = section.data_parallel_replicate_degree
    if replicas > 1 and section.data_parallel_shard_degree == section.context_parallel_degree == 1:
        # A rank's loss is its share of the global mean, so gradients must be summed; DDP averages.
        raise UserValueError(
            f"parallelism.data_parallel_replicate_degree = {replicas} without sharding means DDP, "
            "which scales gradients wrongly in torchtitan 0.2.2; set "
            f"data_parallel_shard_degree = {replicas} and data_parallel_replicate_degree = 1"
        )
    if section.pipeline_parallel_degree > 1:
        check_pipeline(section, config.training.local_batch_size, n_layers)
        _check_validation_in_pipeline(config)


def check_heads(config: JobConfig, args: LighthouseModelArgs) -> None:
    """Check that tensor parallelism gives every rank whole heads.

    Raises:
        ValueError: its degree does not divide them.
    """
    degree = config.parallelism.tensor_parallel_degree
    for name, heads in (("heads", args.n_heads), ("heads of keys and values", args.kv_heads)):
        if heads % degree:
            raise UserValueError(
                f"parallelism.tensor_parallel_degree = {degree} must divide the {heads} {name} of "
                f"{named_model(config)}; lower it"
            )


def _check_tied(config: JobConfig, args: LighthouseModelArgs) -> None:
    """Check that one rank holds both uses of a tied embedding."""
    degree = config.parallelism.pipeline_parallel_degree
    if args.tied and degree > 1:
        raise UserValueError(
            f"parallelism.pipeline_parallel_degree = {degree} puts the embedding and the output "
            f"projection on different ranks, and in {named_model(config)} they are one parameter "
            "(tie_word_embeddings = true); set the degree to 1"
        )
    if args.tied and config.model.converters:
        raise UserValueError(
            f"model.converters = {config.model.converters} is not supported for "
            f"{named_model(config)}, whose embedding is its output projection too "
            "(tie_word_embeddings = true); leave model.converters out"
        )


def check_lengths_in_pipeline(config: JobConfig) -> None:
    """Check that a pipeline's stages of training are of one length.

    Raises:
        ValueError: ``lighthouse.schedule`` changes the length or the local batch.
    """
    degree = config.parallelism.pipeline_parallel_degree
    first, *others = stages_of(config)
    for stage in others if degree > 1 else ():
        shapes = [
            f"{each.config.training.local_batch_size} x {each.seq_len:,} tokens"
            for each in (stage, first)
        ]
        if shapes[0] != shapes[1]:
            with naming(stage):
                raise UserValueError(
                    f"a pass of {shapes[0]} follows stages of {shapes[1]}, and the parts of a "
                    f"pipeline (parallelism.pipeline_parallel_degree = {degree}) exchange tensors "
                    "of one shape; set the degree to 1, or give every stage the same seq_len and "
                    "local_batch_size"
                )


def _check_validation_in_pipeline(config: JobConfig) -> None:
    # Pipeline stages exchange tensors of one shape, which the first step settles.
    for key in ("seq_len", "local_batch_size"):
        expected, given = getattr(config.training, key), getattr(config.validation, key)
        if config.validation.enable and given != expected:
            raise UserValueError(
                f"validation.{key} = {given} must equal training.{key} = {expected} under pipeline "
                f"parallelism; set it so, or pass --validation.no-enable"
            )


def running_window(config: JobConfig, n_layers: int) -> int:
    """Positions of the widest window that a run attends over; 0 if no layer does in any stage."""
    if len(set(config.lighthouse.dense_layers)) == n_layers:
        return 0
    sparse = (stage for stage in stages_of(config) if stage.attention == "lighthouse")
    return max((stage.config.lighthouse.window for stage in sparse), default=0)


def _check_halo(config: JobConfig, n_layers: int) -> None:
    """Check that windows reach no further back than the chunk before their own."""
    window, degree = running_window(config, n_layers), config.parallelism.context_parallel_degree
    for name, section in sections_of_text(config).items():
        seq_len = section.seq_len
        try:
            check_halo(window, seq_len, layout_on_rank_0(config.parallelism).chunks)
        except ValueError as error:
            raise UserValueError(
                f"lighthouse.window = {window} does not fit {name}.seq_len = {seq_len} and "
                f"parallelism.context_parallel_degree = {degree}: {error}"
            ) from None


def _check_length(config: JobConfig) -> None:
    """Check what upstream asserts; a pyramid implies it on one rank, a window does not."""
    length, section = config.training.seq_len, config.parallelism
    step = 2 * section.tensor_parallel_degree * section.context_parallel_degree
    if length % step:
        raise UserValueError(
            f"training.seq_len = {length} must be a multiple of 2 x "
            "parallelism.tensor_parallel_degree x parallelism.context_parallel_degree = 2 x "
            f"{section.tensor_parallel_degree} x {section.context_parallel_degree} = {step}, as "
            f"torchtitan asks; pass --training.seq_len {-(-length // step) * step}"
        )


def _check_compile(config: JobConfig) -> None:
    tensor_parallel = config.parallelism.tensor_parallel_degree > 1
    if tensor_parallel and config.compile.enable and "model" in config.compile.components:
        # torchtitan's own Llama fails in backward under the same settings.
        if Version(torch.__version__) >= Version("2.13"):
            raise UserValueError(
                f"compile.enable = true with parallelism.tensor_parallel_degree = "
                f"{config.parallelism.tensor_parallel_degree} fails in backward with torchtitan "
                f"0.2.2 on torch {torch.__version__}; pass --compile.no-enable, install torch "
                "2.11, or use context parallelism instead"
            )


def _check_loss(config: JobConfig) -> None:
    degree = config.parallelism.tensor_parallel_degree
    if config.lighthouse.loss == "chunked" and degree > 1:
        raise UserValueError(
            f"lighthouse.loss = 'chunked' with parallelism.tensor_parallel_degree = {degree}: "
            "tensor parallelism shards the vocabulary and computes the loss where the shards are; "
            "set lighthouse.loss to 'auto' or 'whole'"
        )


def _check_offload(config: JobConfig) -> None:
    section = config.activation_checkpoint
    if not section.offload_inputs:
        return
    if section.mode not in ("lighthouse", "full"):
        raise UserValueError(
            "activation_checkpoint.offload_inputs = true is for modes that keep layer inputs and "
            f"repeat layers from them, unlike activation_checkpoint.mode = '{section.mode}'; set "
            "mode to 'lighthouse' or 'full', or offload_inputs to false"
        )
    for kind, reason in (
        ("tensor", "which already splits layer inputs over its ranks"),
        ("pipeline", "which runs other microbatches between forward and backward of one"),
    ):
        degree = getattr(config.parallelism, f"{kind}_parallel_degree")
        if degree > 1:
            raise UserValueError(
                "activation_checkpoint.offload_inputs = true is not supported with "
                f"parallelism.{kind}_parallel_degree = {degree}, {reason}; set offload_inputs to "
                "false or the degree to 1"
            )


def parallel_dims_of(section: Parallelism, world_size: int) -> ParallelDims:
    """The degrees of ``world_size`` processes, which ``check_world_size`` let pass, and no mesh."""
    return ParallelDims(
        dp_shard=section.data_parallel_shard_degree,
        dp_replicate=section.data_parallel_replicate_degree,
        cp=section.context_parallel_degree,
        tp=section.tensor_parallel_degree,
        pp=section.pipeline_parallel_degree,
        ep=1,
        etp=1,
        world_size=world_size,
    )


def precision_key(config: JobConfig, world_size: int) -> str:
    """The key under "training" that has the precision in which attention runs.

    Under tensor or pipeline parallelism without FSDP, torchtitan leaves autocast out.
    """
    dims = parallel_dims_of(config.parallelism, world_size)
    lowered = dims.fsdp_enabled or not (dims.tp_enabled or dims.pp_enabled)
    return "mixed_precision_param" if lowered else "dtype"


def layout_on_rank_0(section: Parallelism) -> ContextParallel:
    """The chunks that context parallelism cuts a sequence into, without a process group."""
    return ContextParallel(None, 0, section.context_parallel_degree, section.balanced)


def check_world_size(section: Parallelism, world_size: int) -> None:
    """Check that ``world_size`` processes make up the mesh.

    Raises:
        ValueError: they do not.
    """
    degrees = {
        "data_parallel_replicate_degree": section.data_parallel_replicate_degree,
        "context_parallel_degree": section.context_parallel_degree,
        "tensor_parallel_degree": section.tensor_parallel_degree,
        "pipeline_parallel_degree": section.pipeline_parallel_degree,
    }
    shards = section.data_parallel_shard_degree
    # -1 takes as many shards as there are processes for.
    if shards > 0:
        degrees["data_parallel_shard_degree"] = shards
    product = math.prod(degrees.values())
    if world_size == product or (shards < 0 and world_size % product == 0):
        return
    listed = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
    needed = f"{product}" if shards > 0 else f"a multiple of {product}"
    raise UserValueError(
        f"[parallelism] needs {needed} processes ({listed or 'all degrees are 1'}), and this run "
        f"has {world_size}; set --processes or NGPU, times the machines, to as many, or change a "
        "degree"
    )


def check_device(config: JobConfig, device_type: str) -> None:
    """Check the settings that depend on the device, such as "cuda" or "cpu".

    Raises:
        ValueError: a setting needs a GPU and the device is none, one sequence does not fit a CPU's
            memory, or context parallelism on GPUs is to run in float32.
    """
    training = config.training
    several = config.parallelism.context_parallel_degree > 1
    if several and device_type == "cuda" and training.mixed_precision_param == "float32":
        raise UserValueError(
            "training.mixed_precision_param = 'float32' does not go with context parallelism on "
            "GPUs, where ring attention has not been tried in float32; pass "
            "--training.mixed_precision_param bfloat16"
        )
    if device_type == "cuda":
        return
    for stage in distinct_stages(config):
        with naming(stage):
            _check_memory(stage.config)
    needs_gpu = {
        "activation_checkpoint.offload_inputs": "needs a GPU (CUDA) to offload from",
        "profiling.enable_profiling": "profiles GPUs, and upstream fails without one",
        "profiling.enable_memory_snapshot": "records the memory of GPUs",
        "training.gc_debug": "looks for what holds the memory of GPUs",
        "training.enable_cpu_offload": "moves weights out of a GPU's memory",
    }
    for key, reason in needs_gpu.items():
        section, _, name = key.partition(".")
        if getattr(getattr(config, section), name):
            raise UserValueError(
                f"{key} = true {reason}, and this run is on '{device_type}'; pass "
                f"--{section}.no-{name}"
            )
    if config.checkpoint.enable and config.checkpoint.async_mode == "async_with_pinned_mem":
        raise UserValueError(
            "checkpoint.async_mode = 'async_with_pinned_mem' copies from a GPU, and this run is on "
            f"'{device_type}'; pass --checkpoint.async_mode async"
        )
    if config.model.converters and not config.quantize.linear.float8.emulate:
        raise UserValueError(
            f"model.converters = {config.model.converters} needs a GPU, and this run is on "
            f"'{device_type}'; leave model.converters out"
        )


def _check_memory(config: JobConfig) -> None:
    """Check that the machine could hold the input of one layer, the least that a pass needs."""
    section, width = config.training, model_arguments_of(config).dim
    # A float32 takes 4 bytes.
    needed = 4 * width * section.seq_len * section.local_batch_size
    there = psutil.virtual_memory().total
    if needed > there:
        raise UserValueError(
            f"training.seq_len = {section.seq_len} and training.local_batch_size = "
            f"{section.local_batch_size} take {needed / 2**30:,.0f} GiB for the input of one layer,"
            f" and this machine has {there / 2**30:,.0f} GiB; lower one of them"
        )
