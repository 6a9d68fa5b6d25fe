"""Checks of a configuration that need nothing built: one message names key, value and fix."""

import math
from pathlib import Path

from lighthouse import LighthouseConfig
from lighthouse.config import MOST_POSITIONS
from lighthouse.context_parallel import check_chunks
from lighthouse.geometry import PyramidGeometry

from ..checkpoints.folders import checkpoints_in, folder_of
from ..checkpoints.model_folder import (
    checked_description,
    model_arguments_of,
    model_folder,
    named_model,
)
from ..data.mixes import mixes_of
from ..data.packing import can_share, global_batch_size, stream_count
from ..data.text_sources import check_source
from ..data.tokenizer import ByteTokenizer
from ..errors import UserFileError, UserTypeError, UserValueError
from ..job_config import BYTE_TOKENIZER_FOLDER, JobConfig, sections_of_text
from ..model.architecture import known_entries
from ..model.model import LighthouseModelArgs, lighthouse_config, selecting_config
from ..model.rope_scaling import LENGTH, NO_SCALING, parse_scaling
from ..stages import YARN, Stage, distinct_stages, named, naming, stages_of
from .bounds import check_bounds
from .documents import check_documents
from .output import check_output_of_run, is_installed
from .parallelism import (
    check_heads,
    check_lengths_in_pipeline,
    check_parallelism,
    check_world_size,
    layout_on_rank_0,
)
from .rules import shown

# Keys that decide what a model is and what goes into it; evaluation reads no others.
OF_THE_MODEL = (
    "model.flavor",
    "model.hf_",
    "model.rope_",
    "lighthouse.",
    "training.seq_len",
    "training.local_batch_size",
    "validation.",
    "parallelism.context_parallel_",
)
# Keys that a stage of a schedule sets, or that follow from them.
OF_A_STAGE = ("lighthouse.", "training.")


def check_config(config: JobConfig, flavors: dict[str, LighthouseModelArgs]) -> None:
    """Check everything that needs neither a device nor the data.

    Raises:
        ValueError, TypeError: a value breaks a rule; the message names key, value and fix.
        OSError: job.dump_folder or a folder for output cannot be written to.
    """
    check_bounds(config)
    check_model(config, flavors)
    args = model_arguments_of(config)
    for stage in distinct_stages(config):
        with naming(stage):
            check_parallelism(stage.config, args)
            check_documents(stage)
    check_lengths_in_pipeline(config)
    _check_skipped_positions(config)
    _check_optimizer(config)
    _check_schedule(config)
    _check_sources_of_text(config)
    _check_checkpoints(config)
    _check_activation_checkpoint(config)
    _check_profiling(config)
    _check_modules(config)
    check_output_of_run(config)


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
    check_heads(config, model_arguments_of(config))
    section = config.parallelism
    data_parallel = world_size // (
        section.context_parallel_degree
        * section.tensor_parallel_degree
        * section.pipeline_parallel_degree
    )
    # With this batch, those of all stages are whole passes too.
    batch, local = config.training.global_batch_size, config.training.local_batch_size
    if batch > 0 and batch % (local * data_parallel):
        raise UserValueError(
            f"training.global_batch_size = {batch} must be a multiple of "
            f"training.local_batch_size = {local} times the data-parallel degree of "
            f"{data_parallel}, or -1 for just that"
        )
    streams = stream_count(config, data_parallel)
    stages = distinct_stages(config)
    batches = [global_batch_size(stage.config, data_parallel) for stage in stages]
    for stage in stages:
        with naming(stage):
            _check_batch(stage.config, data_parallel, streams, math.lcm(*batches))


def _check_batch(config: JobConfig, data_parallel: int, streams: int, fitting: int) -> None:
    """Check that the text's streams share a stage's batch, and that it can be read.

    Args:
        fitting: a number of streams that the batches of all stages share.
    """
    whole = global_batch_size(config, data_parallel)
    if not can_share(whole, streams):
        raise UserValueError(
            f"the {whole} sequences of a step cannot be shared by the text's {streams} streams "
            f"(lighthouse.data_streams = {config.lighthouse.data_streams}); set "
            f"lighthouse.data_streams to {fitting}, which the batches of all stages divide"
        )
    training = config.training
    tokens = whole // data_parallel * training.seq_len
    if tokens > MOST_POSITIONS:
        raise UserValueError(
            f"training.global_batch_size = {training.global_batch_size} and "
            f"training.local_batch_size = {training.local_batch_size} give each rank {tokens:,} "
            "tokens a step, which it reads before it begins the step; lower them to "
            f"{MOST_POSITIONS:,} tokens or fewer"
        )


def check_model(config: JobConfig, flavors: dict[str, LighthouseModelArgs]) -> None:
    """Check the settings of the model and its input, which evaluation needs too.

    Raises:
        ValueError, TypeError: as ``check_config``.
    """
    check_bounds(config, OF_THE_MODEL)
    if not config.model.hf_folder and config.model.flavor not in flavors:
        raise UserValueError(
            f"model.flavor = '{config.model.flavor}' is not known; use one of {', '.join(flavors)}"
        )
    args = model_arguments_of(config)
    _check_dense_layers(config, args.n_layers)
    _method(config)
    for stage in distinct_stages(config):
        with naming(stage):
            _check_stage(stage)
            if stage.attention == "lighthouse":
                args.check_scorer(stage.config.lighthouse)
        if stage.has_own_scaling:
            _check_before_scaling(config, args, stage)
    _check_length_of_validation(config)
    _check_tokenizer(config)


def _check_stage(stage: Stage) -> None:
    """Check the settings of the model and its input that a schedule may change."""
    if stage.text:
        check_bounds(stage.config, OF_A_STAGE)
    _check_attention(stage.config)
    _check_selections(stage.config)
    # In a schedule, dense stages may have lengths that no selection takes.
    if stage.attention == "lighthouse" or not stage.text:
        _check_geometry(stage.config)
    _check_mixes(stage.config)


def _check_attention(config: JobConfig) -> None:
    """Check that a window which stands alone is there."""
    section = config.lighthouse
    if section.attention == "window" and not section.window:
        raise UserValueError(
            "lighthouse.attention = 'window' needs lighthouse.window = 0 to be at least 1; pass "
            "--lighthouse.window N with the positions that each position attends over"
        )
    if section.attention == "window" and section.key_stride:
        _check_key_stride(config)


def _check_key_stride(config: JobConfig) -> None:
    """Check that keys beside the window are at places of their own, on one rank."""
    section, stride = config.lighthouse, config.lighthouse.key_stride
    key = f"lighthouse.key_stride = {stride}"
    numbers = {"lighthouse.window": section.window}
    for name, text in sections_of_text(config).items():
        numbers[f"{name}.seq_len"] = text.seq_len
    for name, number in numbers.items():
        if number % stride:
            raise UserValueError(
                f"{key} must divide {name} = {number}; set {name} to "
                f"{(number // stride + 1) * stride}, or key_stride to 4 or 8"
            )
    degree = config.parallelism.context_parallel_degree
    if degree > 1:
        raise UserValueError(
            f"{key} does not take parallelism.context_parallel_degree = {degree} yet; set "
            "key_stride to 0, or pass --parallelism.context_parallel_degree 1"
        )
    if config.training.document_mask:
        raise UserValueError(
            f"{key} does not take training.document_mask = true yet; set key_stride to 0, or pass "
            "--training.no-document_mask"
        )


def _check_selections(config: JobConfig) -> None:
    """Check that selections can be logged."""
    section = config.lighthouse
    if section.log_selection_every and section.attention == "window":
        raise UserValueError(
            f"lighthouse.log_selection_every = {section.log_selection_every} does not go with "
            "lighthouse.attention = 'window', which selects nothing; set it to 0"
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
            f"lighthouse.dense_layers = {dense_layers}: {outside} are not layers of "
            f"{named_model(config)}, which has layers 0 to {n_layers - 1}; name only those"
        )


def _check_skipped_positions(config: JobConfig) -> None:
    """Check that a stage has positions to skip, and that its documents leave them as they are."""
    asked = config.lighthouse.skip_positions
    skipping = [x for x in stages_of(config) if x.text and x.config.lighthouse.skip_positions]
    if asked and not skipping:
        raise UserValueError(
            f"lighthouse.skip_positions = {asked} is for stages whose sequences are shorter, and "
            "lighthouse.schedule has none that takes it; write such a stage, or leave this key "
            f"out; stages that are to skip may say skip_positions={asked} themselves"
        )
    if skipping and config.training.document_mask:
        most = skipping[0].config.lighthouse.skip_positions
        raise UserValueError(
            f"{named(skipping[0])}skip_positions = {most} does not go with training.document_mask, "
            "under which no token sees beyond its document; leave one of them out"
        )


def _check_before_scaling(config: JobConfig, args: LighthouseModelArgs, stage: Stage) -> None:
    """Check that ``YARN`` of a stage stretches what the model was trained for.

    Raises:
        ValueError: the model is scaled already, or was trained at more positions than the stages
            before.
    """
    given, folder = config.model.rope_scaling, model_folder(config)
    if args.rope_scaling != NO_SCALING:
        kind = args.rope_scaling["rope_type"]
        owner = f"model.rope_scaling = '{given}' is" if given else f"{named_model(config)} has"
        fix = f"leave {YARN} out"
        if not folder:
            # A model from nothing was not trained under it.
            fix = f"set model.rope_scaling to 'none', or {fix}"
        raise UserValueError(
            f"{named(stage)}{YARN} needs a model without a scaling before it, and {owner} one of "
            f"type '{kind}'; {fix}"
        )
    if not folder:
        return
    trained = known_entries(checked_description(folder), str(folder))["max_position_embeddings"]
    scaling = parse_scaling(stage.config.model.rope_scaling, trained)
    if trained > scaling[LENGTH]:
        raise UserValueError(
            f"{named(stage)}{YARN} would stretch {scaling[LENGTH]:,} positions, the longest of the "
            f"stages before, and {named_model(config)} has {trained:,}; leave {YARN} out and set "
            f"model.rope_scaling, such as 'yarn factor={scaling['factor']:g}', for the whole run"
        )


def _check_length_of_validation(config: JobConfig) -> None:
    if config.validation.enable and config.validation.seq_len > config.training.seq_len:
        raise UserValueError(
            f"validation.seq_len = {config.validation.seq_len} exceeds training.seq_len = "
            f"{config.training.seq_len}, the longest sequence that the model is built for; lower it"
        )


def _method(config: JobConfig) -> LighthouseConfig:
    """The method's settings, with the section of the key before the messages of its rules."""
    try:
        return lighthouse_config(config.lighthouse)
    except (ValueError, TypeError) as error:
        kind = UserTypeError if isinstance(error, TypeError) else UserValueError
        raise kind(f"[lighthouse] {error}") from None


def _check_geometry(config: JobConfig) -> None:
    """Check that the sequences can be cut into strata, and these into a rank's chunks."""
    method = _method(config)
    # A window takes every length.
    sections = sections_of_text(config) if selecting_config(config.lighthouse) else {}
    for name, section in sections.items():
        seq_len = section.seq_len
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


def _check_tokenizer(config: JobConfig) -> None:
    if config.lighthouse.tokenizer == "hf" and config.model.hf_assets_path == BYTE_TOKENIZER_FOLDER:
        raise UserValueError(
            "lighthouse.tokenizer = 'hf' reads the tokenizer from model.hf_assets_path, which is "
            "not set; pass --model.hf_assets_path FOLDER, the folder of its tokenizer.json"
        )


def _check_mixes(config: JobConfig) -> None:
    # Other tokenizers have not been read yet, and lengths of prompts depend on them.
    if config.lighthouse.tokenizer == "byte":
        mixes_of(config, ByteTokenizer(), 1)


def _check_optimizer(config: JobConfig) -> None:
    section = config.optimizer
    if section.early_step_in_backward:
        raise UserValueError(
            "optimizer.early_step_in_backward = true steps before gradients are clipped to "
            f"training.max_norm = {config.training.max_norm} and found to be finite, and frees "
            "them before their norm is taken; set it to false"
        )
    if section.lr * section.weight_decay >= 1:
        raise UserValueError(
            f"optimizer.weight_decay = {section.weight_decay} with optimizer.lr = {section.lr} "
            "takes away each weight's whole value at a step, or more; lower one of them"
        )


def _check_schedule(config: JobConfig) -> None:
    total, steps = config.lr_scheduler.total_steps, config.training.steps
    if total is not None and total < steps:
        raise UserValueError(
            f"lr_scheduler.total_steps = {total} is below training.steps = {steps}: the learning "
            "rate has come to its end before the last steps; pass --lr_scheduler.total_steps "
            f"{steps} or more, or --training.steps {total} or fewer"
        )


def _check_sources_of_text(config: JobConfig) -> None:
    for key, section in sections_of_text(config).items():
        check_source(section.dataset, section.dataset_path, key)


def _check_checkpoints(config: JobConfig) -> None:
    section = config.checkpoint
    asked = {
        "load_step": section.load_step != -1,
        "initial_load_path": section.initial_load_path is not None,
        "load_only": section.load_only,
        "create_seed_checkpoint": section.create_seed_checkpoint,
    }
    for key, given in asked.items():
        if given and not section.enable:
            raise UserValueError(
                f"checkpoint.{key} = {shown(getattr(section, key))} needs checkpoint.enable = true,"
                " without which no checkpoint is read or written; pass --checkpoint.enable"
            )
    own = folder_of(config)
    if section.load_step != -1 and not checkpoints_in(own):
        raise UserFileError(
            f"checkpoint.load_step = {section.load_step} but {own} holds no checkpoint; leave "
            "checkpoint.load_step out to begin anew, or pass the --job.dump_folder of the run to "
            "go on with"
        )
    # A run that goes on from its own checkpoints no longer reads where it began.
    if not own.exists():
        _check_beginning(config)


def _check_beginning(config: JobConfig) -> None:
    """Check the folder that a new run takes its first weights from."""
    section, key = config.checkpoint, "checkpoint.initial_load_path"
    source = section.initial_load_path
    if section.initial_load_in_hf and not section.initial_load_model_only:
        raise UserValueError(
            "checkpoint.initial_load_in_hf = true loads weights alone, but "
            "checkpoint.initial_load_model_only = false asks for more; pass "
            "--checkpoint.initial_load_model_only"
        )
    if section.initial_load_in_hf and source is None:
        key, source = "model.hf_assets_path", config.model.hf_assets_path
    if source is not None and not Path(source).is_dir():
        raise UserFileError(
            f"{key} = '{source}' is not a folder; pass --{key} FOLDER with the one to begin from"
        )
    if section.initial_load_in_hf and not list(Path(source or "").glob("*.safetensors")):
        raise UserFileError(
            f"checkpoint.initial_load_in_hf = true reads {key} = '{source}', which holds no "
            f".safetensors file; pass --{key} FOLDER with a model's, or make a checkpoint of it "
            "with lighthouse import-hf"
        )


def _check_activation_checkpoint(config: JobConfig) -> None:
    section = config.activation_checkpoint
    chooses = section.mode == "lighthouse" or (
        section.mode == "selective" and section.selective_ac_option == "op"
    )
    if section.debug and chooses:
        raise UserValueError(
            "activation_checkpoint.debug = true does not go with modes that choose operations to "
            f"keep, such as activation_checkpoint.mode = '{section.mode}' here; pass "
            "--activation_checkpoint.no-debug or --activation_checkpoint.mode full"
        )
    compiled = config.compile.enable and "model" in config.compile.components
    if section.mode == "memory_budget" and not compiled:
        raise UserValueError(
            "activation_checkpoint.mode = 'memory_budget' is a mode of the compiler; pass "
            "--compile.enable with compile.components = ['model', 'loss'], or use another mode"
        )


def _check_profiling(config: JobConfig) -> None:
    section = config.profiling
    shortest = section.profiler_warmup + section.profiler_active
    if section.enable_profiling and section.profile_freq < shortest:
        raise UserValueError(
            f"profiling.profile_freq = {section.profile_freq} must be at least "
            "profiling.profiler_warmup + profiling.profiler_active = "
            f"{section.profiler_warmup} + {section.profiler_active}; pass "
            f"--profiling.profile_freq {shortest} or more"
        )


def _check_modules(config: JobConfig) -> None:
    """Check that modules and packages that the configuration names are there."""
    name = config.experimental.custom_import
    if name and not is_installed(name):
        raise UserValueError(
            f"experimental.custom_import = '{name}' is no module that Python finds; pass "
            "--experimental.custom_import MODULE with one on PYTHONPATH"
        )
    if config.model.converters and not is_installed("torchao"):
        raise UserValueError(
            f"model.converters = {config.model.converters} needs the package torchao, which is "
            "missing; run pip install torchao, or leave model.converters out"
        )
