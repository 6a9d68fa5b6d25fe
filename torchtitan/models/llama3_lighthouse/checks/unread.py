"""Warnings of what a run would not do, although its configuration seems to ask for it."""

from collections.abc import Callable

from ..job_config import JobConfig, leaves
from .rules import shown

PIPELINE = "parallelism.pipeline_parallel_degree is above 1"
MODE = "activation_checkpoint.mode is"
# Keys by their beginnings -> when they are read, in words and as a test. A section with a key
# ``enable`` is off on purpose, so its other keys are not listed.
READ_WHEN: dict[str, tuple[str, Callable[[JobConfig], bool]]] = {
    "activation_checkpoint.keep_products": (
        f"{MODE} 'lighthouse'",
        lambda config: config.activation_checkpoint.mode == "lighthouse",
    ),
    "activation_checkpoint.selective_ac_option": (
        f"{MODE} 'selective'",
        lambda config: config.activation_checkpoint.mode == "selective",
    ),
    "activation_checkpoint.per_op_sac_": (
        f"{MODE} 'selective' and activation_checkpoint.selective_ac_option is 'op'",
        lambda config: (
            config.activation_checkpoint.mode == "selective"
            and config.activation_checkpoint.selective_ac_option == "op"
        ),
    ),
    "activation_checkpoint.memory_budget": (
        f"{MODE} 'memory_budget'",
        lambda config: config.activation_checkpoint.mode == "memory_budget",
    ),
    "activation_checkpoint.visualize_memory_budget_pareto": (
        f"{MODE} 'memory_budget'",
        lambda config: config.activation_checkpoint.mode == "memory_budget",
    ),
    "checkpoint.export_dtype": (
        "checkpoint.last_save_model_only is true",
        lambda config: config.checkpoint.last_save_model_only,
    ),
    "checkpoint.initial_load_model_only": (
        "checkpoint.initial_load_path is given",
        lambda config: config.checkpoint.initial_load_path is not None,
    ),
    "parallelism.pipeline_parallel_": (
        PIPELINE, lambda config: config.parallelism.pipeline_parallel_degree > 1
    ),
    "parallelism.module_fqns_per_model_part": (
        PIPELINE, lambda config: config.parallelism.pipeline_parallel_degree > 1
    ),
    "parallelism.disable_loss_parallel": (
        "parallelism.tensor_parallel_degree is above 1",
        lambda config: config.parallelism.tensor_parallel_degree > 1,
    ),
    "parallelism.enable_async_tensor_parallel": (
        "parallelism.tensor_parallel_degree is above 1",
        lambda config: config.parallelism.tensor_parallel_degree > 1,
    ),
    "quantize.": (
        "model.converters names a converter", lambda config: bool(config.model.converters)
    ),
    "debug.deterministic_warn_only": (
        "debug.deterministic is true", lambda config: config.debug.deterministic
    ),
    "lighthouse.dilation": (
        "lighthouse.scorer is 'dilated' or 'gla'", lambda config: config.lighthouse.scorer != "norm"
    ),
    "lighthouse.passkey_tasks": (
        "lighthouse.passkey_mix is above 0", lambda config: config.lighthouse.passkey_mix > 0
    ),
    "training.dataloader.persistent_workers": (
        "training.dataloader.num_workers is 1",
        lambda config: config.training.dataloader.num_workers > 0,
    ),
    "training.dataloader.prefetch_factor": (
        "training.dataloader.num_workers is 1",
        lambda config: config.training.dataloader.num_workers > 0,
    ),
}  # fmt: skip


def _unused(config: JobConfig) -> list[str]:
    """Settings that nothing reads, because another setting has another value."""
    found = []
    for leaf in leaves(config):
        for beginning, (when, is_read) in READ_WHEN.items():
            if (
                leaf.key.startswith(beginning)
                and leaf.value != leaf.default
                and not is_read(config)
            ):
                found.append(f"{leaf.key} = {shown(leaf.value)} has no effect: it is read when "
                             f"{when}")  # fmt: skip
    return found


def warnings_of(config: JobConfig) -> list[str]:
    """Warnings before a run begins, one line each."""
    return [*_unused(config), *_stages(config)]


def _stages(config: JobConfig) -> list[str]:
    section, steps = config.lighthouse, config.training.steps
    if section.stage != "auto" or section.dense_from_step < steps:
        return []
    return [
        f"lighthouse.dense_from_step = {section.dense_from_step:,} is not below training.steps = "
        f"{steps:,}: no step of this run is dense, and export refuses its checkpoints; lower "
        "dense_from_step, or set lighthouse.stage = 'lighthouse' if that is meant"
    ]
