"""The table of bounds: one row for every key of a configuration, upstream's keys included.

A row says which values of the key's type a run can use. Rules that join several keys are in
``configuration``, and the rules of the method itself in ``lighthouse/config.py``.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch

from lighthouse.config import MOST_POSITIONS

from ..errors import UserTypeError, UserValueError
from ..infra.pipeline import SCHEDULES
from ..job_config import JobConfig, leaves, missed_type
from .rules import (
    MOST,
    MOST_SECONDS,
    Default,
    Modules,
    Names,
    OneOf,
    Rule,
    Text,
    Where,
    count,
    number,
    shown,
)

# The type alone decides: flags, choices, and settings whose rules the method itself keeps.
BY_TYPE = Rule()
FILE = Text(empty=False, path=True)
OPTIONAL_FILE = Text(path=True)
TEXT = Text()
NO_EXPERTS = Default("is for models with experts, and this one has none")
NO_FAULT_TOLERANCE = Default(
    "asks for fault tolerance by torchft, which this trainer does not use",
    "leave [fault_tolerance] out: a run goes on from its last checkpoint when it is started again",
)
NO_ESTIMATION = Default(
    "is not read by this trainer", "leave it out, and run lighthouse dry-run CONFIG instead"
)
DEGREE = count(1, 2**20, note="1 turns it off")
# The trainer keeps a number for each step, to tell the time left.
MOST_STEPS = 10**7
LINEAR_LAYERS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")

# Upstream copies these keys to others, whose messages would name what no one wrote.
COPIED = ("model.tokenizer_path", "experimental.custom_args_module")


def _dataloader(section: str) -> dict[str, Rule]:
    return {
        f"{section}.dataloader.num_workers": count(
            0, 1, note="documents are packed in one sequence, by 1 worker at most"
        ),
        f"{section}.dataloader.persistent_workers": BY_TYPE,
        f"{section}.dataloader.pin_memory": BY_TYPE,
        f"{section}.dataloader.prefetch_factor": count(1, 1000),
    }


BOUNDS: dict[str, Rule] = {
    "job.config_file": FILE,
    "job.dump_folder": FILE,
    "job.description": TEXT,
    "job.print_config": BY_TYPE,
    "job.save_config_file": FILE,
    "job.custom_config_module": TEXT,
    "profiling.enable_profiling": BY_TYPE,
    "profiling.save_traces_folder": FILE,
    "profiling.profile_freq": count(),
    "profiling.profiler_active": count(),
    "profiling.profiler_warmup": count(0),
    "profiling.enable_memory_snapshot": BY_TYPE,
    "profiling.save_memory_snapshot_folder": FILE,
    "metrics.log_freq": count(),
    "metrics.enable_tensorboard": BY_TYPE,
    "metrics.disable_color_printing": BY_TYPE,
    "metrics.save_tb_folder": FILE,
    "metrics.save_for_all_ranks": BY_TYPE,
    "metrics.enable_wandb": BY_TYPE,
    "model.name": OneOf(("llama3_lighthouse",)),
    "model.flavor": TEXT,
    "model.hf_assets_path": FILE,
    "model.hf_folder": OPTIONAL_FILE,
    "model.rope_theta": number(1, 1e12, above=True),
    # ``model/rope_scaling.py`` reads it, and checks it.
    "model.rope_scaling": TEXT,
    "model.tokenizer_path": FILE,
    "model.converters": Names(("quantize.linear.float8", "quantize.linear.mx")),
    "model.print_after_conversion": BY_TYPE,
    "optimizer.name": OneOf(("Adam", "AdamW")),
    "optimizer.lr": number(0, 1),
    "optimizer.beta1": number(0, 1, below=True),
    "optimizer.beta2": number(0, 1, below=True),
    "optimizer.eps": number(0, 1, above=True),
    "optimizer.weight_decay": number(0, 10),
    "optimizer.implementation": BY_TYPE,
    "optimizer.early_step_in_backward": BY_TYPE,
    "lr_scheduler.warmup_steps": count(0),
    "lr_scheduler.total_steps": count(1),
    "lr_scheduler.decay_ratio": number(0, 1),
    "lr_scheduler.decay_type": BY_TYPE,
    "lr_scheduler.min_lr_factor": number(0, 1),
    "training.dataset": TEXT,
    "training.dataset_path": OPTIONAL_FILE,
    "training.local_batch_size": count(1, MOST_POSITIONS),
    "training.global_batch_size": count(
        1, MOST_POSITIONS, note="-1 is one sequence for each of a local batch", besides=(-1,)
    ),
    "training.document_mask": BY_TYPE,
    "training.seq_len": count(1, MOST_POSITIONS, note="positions are numbered with 32 bits"),
    # Beyond this nothing is clipped, and the number is a slip.
    "training.max_norm": number(0, 1e12, above=True),
    "training.steps": count(1, MOST_STEPS),
    "training.enable_cpu_offload": BY_TYPE,
    "training.dtype": BY_TYPE,
    "training.mixed_precision_param": BY_TYPE,
    "training.mixed_precision_reduce": BY_TYPE,
    "training.gc_freq": count(),
    "training.gc_debug": BY_TYPE,
    **_dataloader("training"),
    "parallelism.data_parallel_replicate_degree": DEGREE,
    "parallelism.data_parallel_shard_degree": count(
        1, 2**20, note="-1 takes as many as there are processes for", besides=(-1,)
    ),
    "parallelism.fsdp_reshard_after_forward": BY_TYPE,
    "parallelism.tensor_parallel_degree": DEGREE,
    "parallelism.disable_loss_parallel": BY_TYPE,
    "parallelism.enable_async_tensor_parallel": BY_TYPE,
    "parallelism.pipeline_parallel_degree": DEGREE,
    "parallelism.module_fqns_per_model_part": Modules(),
    "parallelism.pipeline_parallel_first_stage_less_layers": count(0),
    "parallelism.pipeline_parallel_last_stage_less_layers": count(0),
    "parallelism.pipeline_parallel_layers_per_stage": count(),
    "parallelism.pipeline_parallel_schedule": OneOf(SCHEDULES),
    "parallelism.pipeline_parallel_schedule_csv": OPTIONAL_FILE,
    "parallelism.pipeline_parallel_microbatch_size": count(1, MOST_POSITIONS),
    "parallelism.pipeline_parallel_expert_parallel_overlap": NO_EXPERTS,
    "parallelism.context_parallel_degree": DEGREE,
    "parallelism.context_parallel_load_balancer": BY_TYPE,
    "parallelism.context_parallel_rotate_method": Default(
        "is not supported: keys and values pass round the ring, one shard at a time",
        "leave it out, or set it to 'alltoall'",
    ),
    "parallelism.expert_parallel_degree": NO_EXPERTS,
    "parallelism.expert_tensor_parallel_degree": NO_EXPERTS,
    "parallelism.expert_parallel_comm_backend": NO_EXPERTS,
    "checkpoint.enable": BY_TYPE,
    "checkpoint.enable_ft_dataloader_checkpoints": NO_FAULT_TOLERANCE,
    "checkpoint.folder": FILE,
    "checkpoint.interval": count(),
    "checkpoint.initial_load_path": FILE,
    "checkpoint.initial_load_model_only": BY_TYPE,
    "checkpoint.initial_load_in_hf": BY_TYPE,
    "checkpoint.initial_load_in_hf_quantized": Default(
        "is not supported for this model", "leave it out, and load weights that are not quantized"
    ),
    "checkpoint.set_damaged_aside": BY_TYPE,
    "checkpoint.last_save_model_only": BY_TYPE,
    "checkpoint.last_save_in_hf": Default(
        "fails in the last save, where the switch to Hugging Face's format loses the optimizer",
        "leave it out, and run lighthouse export-hf on the checkpoint afterwards",
    ),
    "checkpoint.export_dtype": BY_TYPE,
    "checkpoint.async_mode": BY_TYPE,
    "checkpoint.keep_latest_k": count(
        2, note="0 keeps all; the last may still be in the making, so 1 is too few", besides=(0,)
    ),
    "checkpoint.load_step": count(0, note="-1 loads the last", besides=(-1,)),
    "checkpoint.exclude_from_loading": Names(
        ("model", "optimizer", "lr_scheduler", "dataloader", "train_state")
    ),
    "checkpoint.enable_first_step_checkpoint": BY_TYPE,
    "checkpoint.create_seed_checkpoint": BY_TYPE,
    "checkpoint.load_only": BY_TYPE,
    "activation_checkpoint.mode": BY_TYPE,
    "activation_checkpoint.selective_ac_option": Where(
        lambda option: re.fullmatch("op|[1-9][0-9]{0,8}", option) is not None,
        "must be 'op', or the number of layers of which one is checkpointed",
    ),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": Names(
        ("moe.router.gate", "output", *LINEAR_LAYERS)
    ),
    "activation_checkpoint.early_stop": BY_TYPE,
    "activation_checkpoint.memory_budget": number(0, 1),
    "activation_checkpoint.visualize_memory_budget_pareto": BY_TYPE,
    "activation_checkpoint.preserve_rng_state": BY_TYPE,
    "activation_checkpoint.determinism_check": OneOf(("default", "none")),
    "activation_checkpoint.debug": BY_TYPE,
    "activation_checkpoint.keep_products": Names(),
    "activation_checkpoint.offload_inputs": BY_TYPE,
    "compile.enable": BY_TYPE,
    "compile.components": Names(("model", "loss")),
    "compile.backend": Where(
        lambda name: name in torch.compiler.list_backends(exclude_tags=()),
        "is not known; torch.compiler.list_backends() lists those that are",
    ),
    "quantize.linear.float8.enable_fsdp_float8_all_gather": BY_TYPE,
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": BY_TYPE,
    "quantize.linear.float8.recipe_name": BY_TYPE,
    "quantize.linear.float8.filter_fqns": Names(),
    "quantize.linear.float8.emulate": BY_TYPE,
    "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice": BY_TYPE,
    "quantize.linear.mx.recipe_name": TEXT,
    "quantize.linear.mx.filter_fqns": Names(),
    "quantize.grouped_mm.float8.fqns": NO_EXPERTS,
    "quantize.grouped_mm.mx.recipe_name": NO_EXPERTS,
    "quantize.grouped_mm.mx.fqns": NO_EXPERTS,
    "comm.init_timeout_seconds": count(1, MOST_SECONDS),
    "comm.train_timeout_seconds": count(1, MOST_SECONDS),
    "comm.trace_buf_size": count(0, 2**31 - 1),
    "comm.save_traces_folder": FILE,
    "comm.save_traces_file_prefix": OPTIONAL_FILE,
    "comm.mode": Default(
        "simulates communication, which trains nothing",
        "leave it out, and run lighthouse dry-run CONFIG to see what a larger run would do",
    ),
    "memory_estimation.enable": NO_ESTIMATION,
    "memory_estimation.disable_fake_mode": NO_ESTIMATION,
    "fault_tolerance.enable": NO_FAULT_TOLERANCE,
    "fault_tolerance.process_group": NO_FAULT_TOLERANCE,
    "fault_tolerance.process_group_timeout_ms": NO_FAULT_TOLERANCE,
    "fault_tolerance.replica_id": NO_FAULT_TOLERANCE,
    "fault_tolerance.group_size": NO_FAULT_TOLERANCE,
    "fault_tolerance.min_replica_size": NO_FAULT_TOLERANCE,
    "fault_tolerance.semi_sync_method": NO_FAULT_TOLERANCE,
    "experimental.custom_import": TEXT,
    "experimental.custom_args_module": Default(
        "is read too late to add keys", "pass --job.custom_config_module MODULE instead"
    ),
    "validation.enable": BY_TYPE,
    "validation.dataset": TEXT,
    "validation.dataset_path": OPTIONAL_FILE,
    "validation.local_batch_size": count(1, MOST_POSITIONS),
    "validation.seq_len": count(1, MOST_POSITIONS, note="positions are numbered with 32 bits"),
    "validation.freq": count(),
    "validation.steps": count(1, note="-1 reads the whole text", besides=(-1,)),
    **_dataloader("validation"),
    "debug.seed": count(-MOST - 1, note="torch's seeds have 64 bits"),
    "debug.deterministic": BY_TYPE,
    "debug.deterministic_warn_only": BY_TYPE,
    "debug.moe_force_load_balance": NO_EXPERTS,
    "lighthouse.stage": BY_TYPE,
    "lighthouse.attention": BY_TYPE,
    "lighthouse.window": count(0, MOST_POSITIONS, note="0 means no window"),
    "lighthouse.key_stride": count(
        2, MOST_POSITIONS, note="0 means no keys beside the window", besides=(0,)
    ),
    "lighthouse.dense_from_step": count(0, note="0 trains dense throughout"),
    "lighthouse.dense_every": count(
        2,
        note="0 mixes no dense steps in, and lighthouse.stage = 'dense' trains dense throughout",
        besides=(0,),
    ),
    # ``stages`` reads the stages, and checks them.
    "lighthouse.schedule": BY_TYPE,
    "lighthouse.skip_positions": count(0, MOST_POSITIONS, note="0 skips none"),
    "lighthouse.keep_position": BY_TYPE,
    "lighthouse.levels": BY_TYPE,
    "lighthouse.pooling_factor": BY_TYPE,
    "lighthouse.top_k": BY_TYPE,
    "lighthouse.scorer": BY_TYPE,
    "lighthouse.picks_per_stratum": BY_TYPE,
    "lighthouse.dilation": BY_TYPE,
    "lighthouse.entry_score": BY_TYPE,
    "lighthouse.combine": BY_TYPE,
    "lighthouse.dense_layers": Names(),
    "lighthouse.document_positions": BY_TYPE,
    "lighthouse.loss": BY_TYPE,
    "lighthouse.cuda_graphs": BY_TYPE,
    "lighthouse.data_streams": count(0, MOST_POSITIONS),
    "lighthouse.shuffle_seed": count(0, note="0 reads the files in the order of their names"),
    "lighthouse.log_selection_every": count(0, note="0 logs no selections"),
    "lighthouse.repeat_mix": number(0, 1),
    "lighthouse.repeat_share": number(0, 0.5, above=True),
    "lighthouse.passkey_mix": number(0, 1),
    "lighthouse.passkey_tasks": Names(needed=True),
    "lighthouse.tokenizer": BY_TYPE,
}


def check_bounds(config: JobConfig, beginnings: tuple[str, ...] = ("",)) -> None:
    """Check values of a configuration, each against its type and its row.

    Keys that a job.custom_config_module adds have no row; their types are checked.

    Args:
        beginnings: how the keys to check begin; by default all are checked.

    Raises:
        ValueError, TypeError: a value breaks a rule; the message names key, value and fix.
    """
    found = [leaf for leaf in leaves(config) if leaf.key.startswith(beginnings)]
    for leaf in sorted(found, key=lambda leaf: leaf.key not in COPIED):
        rule = BOUNDS.get(leaf.key, BY_TYPE)
        given = f"{leaf.key} = {shown(leaf.value)}"
        if missed := missed_type(leaf.value, leaf.kind):
            raise UserTypeError(f"{given} must be {missed}; {rule.fix(leaf.key)}")
        if leaf.value is None:
            continue
        fault = _too_large(leaf.value) or rule.fault(leaf.value, leaf.default)
        if fault:
            raise UserValueError(f"{given} {fault}; {rule.fix(leaf.key)}")


def _too_large(value: Any) -> str | None:
    items: Iterable[Any] = value if isinstance(value, list) else [value]
    if any(isinstance(item, int) and not -MOST - 1 <= item <= MOST for item in items):
        return "must be an integer of 64 bits"
    return None
