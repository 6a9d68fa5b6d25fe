"""Checks of a configuration that need nothing built: one message names key, value and fix."""

import importlib.util
import math
import tempfile
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from packaging.version import Version

from lighthouse import ContextParallel
from lighthouse.context_parallel import check_chunks
from lighthouse.geometry import PyramidGeometry

from ..data.packing import stream_count
from ..data.retrieval import TASKS, PromptEncoder
from ..data.retrieval_mix import RetrievalMix
from ..data.tokenizer import ByteTokenizer
from ..errors import UserFileError, UserTypeError, UserValueError
from ..infra.pipeline import check_pipeline
from ..job_config import BYTE_TOKENIZER_FOLDER, JobConfig, Lighthouse, Parallelism
from ..model.model import LighthouseModelArgs, lighthouse_config

STAGES: tuple[str, ...] = get_args(get_type_hints(Lighthouse)["stage"])


def check_config(config: JobConfig, flavors: dict[str, LighthouseModelArgs]) -> None:
    """Check everything that needs neither a device nor the data.

    Raises:
        ValueError, TypeError: a value breaks a rule; the message names key, value and fix.
        OSError: job.dump_folder cannot be written to.
    """
    check_model(config, flavors)
    _check_parallelism(config, flavors[config.model.flavor].n_layers)
    _check_compile(config)
    _check_optimizer(config)
    _check_loss(config)
    _check_offload(config)
    _check_metrics(config)
    _check_dump_folder(config)


def check_launch(
    config: JobConfig, flavors: dict[str, LighthouseModelArgs], world_size: int
) -> None:
    """Check everything that can be known of a run before its ``world_size`` processes start.

    Raises:
        ValueError, TypeError, OSError: as ``check_config``, or the processes do not make up the
            mesh or cannot share a global batch.
    """
    check_config(config, flavors)
    check_world_size(config.parallelism, world_size)
    section = config.parallelism
    data_parallel = world_size // (
        section.context_parallel_degree
        * section.tensor_parallel_degree
        * section.pipeline_parallel_degree
    )
    batch, local = config.training.global_batch_size, config.training.local_batch_size
    if batch >= 0 and (batch == 0 or batch % (local * data_parallel)):
        raise UserValueError(
            f"training.global_batch_size = {batch} must be a multiple of training.local_batch_size "
            f"= {local} times the data-parallel degree of {data_parallel}, or -1 for just that"
        )
    stream_count(config, data_parallel)


def check_model(config: JobConfig, flavors: dict[str, LighthouseModelArgs]) -> None:
    """Check the settings of the model and its input, which evaluation needs too.

    Raises:
        ValueError, TypeError: as ``check_config``.
    """
    if config.model.flavor not in flavors:
        raise UserValueError(
            f"model.flavor = '{config.model.flavor}' is not known; use one of {', '.join(flavors)}"
        )
    _check_stages(config)
    _check_dense_layers(config, flavors[config.model.flavor].n_layers)
    _check_degree(config.parallelism)
    _check_batches(config)
    _check_lengths(config)
    _check_tokenizer(config)
    _check_retrieval_mix(config)


def _check_stages(config: JobConfig) -> None:
    """Check the stages and how often selections are logged."""
    section = config.lighthouse
    if section.stage not in STAGES:
        raise UserValueError(
            f"lighthouse.stage = {section.stage!r} is not known; use one of {', '.join(STAGES)}"
        )
    if section.dense_from_step < 0:
        raise UserValueError(
            f"lighthouse.dense_from_step = {section.dense_from_step} must not be negative; "
            "0 trains dense throughout"
        )
    if section.dense_every < 0 or section.dense_every == 1:
        raise UserValueError(
            f"lighthouse.dense_every = {section.dense_every} must be 2 or more, or 0 for no dense "
            "step in the Lighthouse stage; lighthouse.stage = 'dense' trains dense throughout"
        )
    if section.log_selection_every < 0:
        raise UserValueError(
            f"lighthouse.log_selection_every = {section.log_selection_every} must not be negative; "
            "0 logs no selections"
        )
    degree = config.parallelism.pipeline_parallel_degree
    if section.log_selection_every and degree > 1:
        raise UserValueError(
            f"lighthouse.log_selection_every = {section.log_selection_every} needs whole forward "
            f"passes, which parallelism.pipeline_parallel_degree = {degree} cuts into parts; set "
            "it to 0"
        )


def _check_dense_layers(config: JobConfig, n_layers: int) -> None:
    dense_layers = config.lighthouse.dense_layers
    outside = [layer for layer in dense_layers if not 0 <= layer < n_layers]
    if outside:
        raise UserValueError(
            f"lighthouse.dense_layers = {dense_layers}: {outside} are not layers of model.flavor "
            f"'{config.model.flavor}', which has layers 0 to {n_layers - 1}; name only those"
        )
    if len(set(dense_layers)) != len(dense_layers):
        raise UserValueError(
            f"lighthouse.dense_layers = {dense_layers} names a layer twice; name each once"
        )


def _check_degree(section: Parallelism) -> None:
    if section.context_parallel_degree < 1:
        raise UserValueError(
            f"parallelism.context_parallel_degree = {section.context_parallel_degree} must be at "
            "least 1; 1 means no context parallelism"
        )


def _check_batches(config: JobConfig) -> None:
    sizes = {"training": config.training.local_batch_size}
    if config.validation.enable:
        sizes["validation"] = config.validation.local_batch_size
    for section, size in sizes.items():
        if size < 1:
            raise UserValueError(
                f"{section}.local_batch_size = {size} must be at least 1; pass "
                f"--{section}.local_batch_size 1 or more"
            )


def _check_lengths(config: JobConfig) -> None:
    """Check the method's own rules, and put the section of the key before its messages."""
    try:
        method = lighthouse_config(config.lighthouse)
    except (ValueError, TypeError) as error:
        kind = UserTypeError if isinstance(error, TypeError) else UserValueError
        raise kind(f"[lighthouse] {error}") from None
    seq_lens = {"training": config.training.seq_len}
    if config.validation.enable:
        seq_lens["validation"] = config.validation.seq_len
    for name, seq_len in seq_lens.items():
        try:
            PyramidGeometry(method, seq_len)
        except ValueError as error:
            raise UserValueError(
                f"{name}.seq_len = {seq_len} does not fit [lighthouse]: {error}"
            ) from None
        try:
            check_chunks(method, seq_len, layout_on_rank_0(config.parallelism).chunks)
        except ValueError as error:
            degree = config.parallelism.context_parallel_degree
            raise UserValueError(
                f"parallelism.context_parallel_degree = {degree} does not fit {name}.seq_len = "
                f"{seq_len} and [lighthouse]: {error}"
            ) from None
    if config.validation.enable and config.validation.seq_len > config.training.seq_len:
        raise UserValueError(
            f"validation.seq_len = {config.validation.seq_len} exceeds training.seq_len = "
            f"{config.training.seq_len}, the longest sequence that the model is built for; lower it"
        )


def layout_on_rank_0(section: Parallelism) -> ContextParallel:
    """The chunks that context parallelism cuts a sequence into, without a process group."""
    return ContextParallel(None, 0, section.context_parallel_degree, section.balanced)


def _check_tokenizer(config: JobConfig) -> None:
    if config.lighthouse.tokenizer == "hf" and config.model.hf_assets_path == BYTE_TOKENIZER_FOLDER:
        raise UserValueError(
            "lighthouse.tokenizer = 'hf' reads the tokenizer from model.hf_assets_path, which is "
            "not set; pass --model.hf_assets_path FOLDER, the folder of its tokenizer.json"
        )


def _check_retrieval_mix(config: JobConfig) -> None:
    section = config.lighthouse
    rate, tasks = section.passkey_mix, section.passkey_tasks
    # TOML's true would count as 1, that is all of the tokens.
    if isinstance(rate, bool) or not 0 <= rate <= 1:
        raise UserValueError(
            f"lighthouse.passkey_mix = {rate} is the share of training tokens that are retrieval "
            "documents; use one from 0 to 1"
        )
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserValueError(
            f"lighthouse.passkey_tasks = {tasks} must name one or more of {', '.join(TASKS)}, each "
            "once"
        )
    if rate and section.tokenizer == "byte":
        # Other tokenizers have not been read yet, and lengths of prompts depend on them.
        RetrievalMix(PromptEncoder(ByteTokenizer()), rate, config.training.seq_len + 1, 1, tasks)


def _check_parallelism(config: JobConfig, n_layers: int) -> None:
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


def _check_validation_in_pipeline(config: JobConfig) -> None:
    # Pipeline stages exchange tensors of one shape, which the first step settles.
    for key in ("seq_len", "local_batch_size"):
        expected, given = getattr(config.training, key), getattr(config.validation, key)
        if config.validation.enable and given != expected:
            raise UserValueError(
                f"validation.{key} = {given} must equal training.{key} = {expected} under pipeline "
                f"parallelism; set it so, or pass --validation.no-enable"
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


def _check_optimizer(config: JobConfig) -> None:
    if config.optimizer.early_step_in_backward:
        raise UserValueError(
            "optimizer.early_step_in_backward = true steps before gradients are clipped to "
            f"training.max_norm = {config.training.max_norm} and found to be finite, and frees "
            "them before their norm is taken; set it to false"
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
        ValueError: layer inputs are to be offloaded from a device other than CUDA, or context
            parallelism on GPUs is to run in float32.
    """
    training = config.training
    several = config.parallelism.context_parallel_degree > 1
    if several and device_type == "cuda" and training.mixed_precision_param == "float32":
        raise UserValueError(
            "training.mixed_precision_param = 'float32' does not go with context parallelism on "
            "GPUs, where ring attention runs cuDNN's and flash attention, which take no float32; "
            "pass --training.mixed_precision_param bfloat16"
        )
    if config.activation_checkpoint.offload_inputs and device_type != "cuda":
        raise UserValueError(
            "activation_checkpoint.offload_inputs = true needs a GPU (CUDA) to offload from, and "
            f"this run is on '{device_type}'; pass --activation_checkpoint.no-offload_inputs"
        )


def _check_metrics(config: JobConfig) -> None:
    """Check that what the metrics are to be sent to is installed."""
    extra = {"wandb": "trainer,wandb", "tensorboard": "trainer"}
    for package, name in extra.items():
        key = f"metrics.enable_{package}"
        if getattr(config.metrics, f"enable_{package}") and not importlib.util.find_spec(package):
            raise UserValueError(
                f"{key} = true needs the package {package}, which is missing; run pip install "
                f"'lighthouse-attention[{name}]', or pip install -e '.[{name}]' in a clone, or "
                f"pass --metrics.no-enable_{package}"
            )


def _check_dump_folder(config: JobConfig) -> None:
    """Check that the folder can be written to, or made; making it is left to the run."""
    folder = Path(config.job.dump_folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise UserFileError(
            f"job.dump_folder = '{folder}' cannot be written to ({there}: {error.strerror}); pass "
            "--job.dump_folder FOLDER with one that can"
        ) from None


def schedule_warnings(config: JobConfig) -> list[str]:
    """Warnings on the stages before a run begins, one line each."""
    section, steps = config.lighthouse, config.training.steps
    if section.stage != "auto" or section.dense_from_step < steps:
        return []
    return [
        f"lighthouse.dense_from_step = {section.dense_from_step:,} is not below training.steps = "
        f"{steps:,}: no step of this run is dense, and export refuses its checkpoints; lower "
        "dense_from_step, or set lighthouse.stage = 'lighthouse' if that is meant"
    ]


def check_output(folder: Path) -> None:
    """Check that a command can write to its ``--output``, and make the folder if need be.

    Raises:
        OSError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserFileError(
            f"--output {folder} cannot be written to ({error.strerror}); pass --output FOLDER with "
            "one that can"
        ) from None
