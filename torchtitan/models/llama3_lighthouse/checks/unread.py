"""Warnings of what a run would not do, although its configuration seems to ask for it."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lighthouse import LighthouseConfig
from lighthouse.config import ATTENDS

from ..checkpoints.model_folder import model_arguments_of, model_folder
from ..job_config import JobConfig, leaves
from ..model.model import selecting_config
from ..model.rope_scaling import LENGTH
from ..stages import YARN, distinct_stages, named, stages_of
from .parallelism import precision_key, running_window
from .rules import shown

# Stands for a key, whose values are the attentions of the run's stages.
A_STAGE, ITS_ATTENTION = "a stage", "the attention of a stage"


@dataclass(frozen=True)
class Requirement:
    """A requirement on the value of a key, or on the stages, in words and as a test."""

    key: str
    words: str
    test: Callable[[Any], bool]


def _is(key: str, *values: Any) -> Requirement:
    return Requirement(key, f"is {' or '.join(map(shown, values))}", lambda value: value in values)


def _above(key: str, least: float) -> Requirement:
    return Requirement(key, f"is above {least}", lambda value: value > least)


def _given(key: str) -> Requirement:
    return Requirement(key, "is given", bool)


def _no_window_stands_alone(schedule: list[str]) -> bool:
    """Whether a schedule has a stage 'lighthouse', or dense ones alone."""
    names = {stage.split()[0] for stage in schedule}
    return "lighthouse" in names or "window" not in names


ATTENDING = tuple(scorer for scorer, attends in ATTENDS.items() if attends)
MODE = "activation_checkpoint.mode"
IN_PIPELINES = (_above("parallelism.pipeline_parallel_degree", 1),)
UNDER_TENSOR_PARALLELISM = (_above("parallelism.tensor_parallel_degree", 1),)
SPARSE = (Requirement(A_STAGE, "is not dense", lambda stages: "lighthouse" in stages),)
OVER_A_WINDOW = (Requirement(ITS_ATTENTION, "is a window", lambda names: "window" in names),)
# Dense runs carry the settings of the method, so that one key on the command line turns it on.
SELECTING = (
    _is("lighthouse.attention", "lighthouse"),
    Requirement("lighthouse.schedule", "has a stage 'lighthouse'", _no_window_stands_alone),
)
WITHOUT_FOLDER = (Requirement("model.hf_folder", "is not given", lambda folder: not folder),)
WITH_WORKERS = (_above("training.dataloader.num_workers", 0),)
# How keys begin -> requirements that must all hold for them to be read. A section with a key
# ``enable`` is off on purpose, so its other keys are not listed.
READ_WHEN: dict[str, tuple[Requirement, ...]] = {
    **{
        f"lighthouse.{setting.name}": SELECTING
        for setting in fields(LighthouseConfig)
        if setting.name != "window"
    },
    "activation_checkpoint.keep_products": (_is(MODE, "lighthouse"),),
    "activation_checkpoint.selective_ac_option": (_is(MODE, "selective"),),
    "activation_checkpoint.per_op_sac_": (
        _is(MODE, "selective"), _is("activation_checkpoint.selective_ac_option", "op"),
    ),
    "activation_checkpoint.memory_budget": (_is(MODE, "memory_budget"),),
    "activation_checkpoint.visualize_memory_budget_pareto": (_is(MODE, "memory_budget"),),
    "checkpoint.export_dtype": (_is("checkpoint.last_save_model_only", True),),
    "checkpoint.initial_load_model_only": (_given("checkpoint.initial_load_path"),),
    "model.flavor": WITHOUT_FOLDER,
    "parallelism.pipeline_parallel_": IN_PIPELINES,
    "parallelism.module_fqns_per_model_part": IN_PIPELINES,
    "parallelism.disable_loss_parallel": UNDER_TENSOR_PARALLELISM,
    "parallelism.enable_async_tensor_parallel": UNDER_TENSOR_PARALLELISM,
    "quantize.": (_given("model.converters"),),
    "debug.deterministic_warn_only": (_is("debug.deterministic", True),),
    "lighthouse.key_stride": OVER_A_WINDOW,
    "lighthouse.dense_every": SPARSE,
    "lighthouse.log_selection_every": SPARSE,
    "lighthouse.document_positions": (_is("training.document_mask", True),),
    "lighthouse.dilation": (*SELECTING, _is("lighthouse.scorer", *ATTENDING)),
    "lighthouse.repeat_share": (_above("lighthouse.repeat_mix", 0),),
    "lighthouse.passkey_tasks": (_above("lighthouse.passkey_mix", 0),),
    "training.dataloader.persistent_workers": WITH_WORKERS,
    "training.dataloader.prefetch_factor": WITH_WORKERS,
}  # fmt: skip


def warnings_of(config: JobConfig, world_size: int) -> list[str]:
    """Warnings before a run of ``world_size`` processes begins, one line each."""
    found = [*_unused(config), *_folder(config), *_yarn(config), *_stages(config)]
    found += _held_out_text(config)
    for stage in distinct_stages(config):
        found += [f"{named(stage)}{line}" for line in _window(stage.config, world_size)]
    return found


def _folder(config: JobConfig) -> list[str]:
    """Whether another folder than ``model.hf_folder`` describes the model."""
    folder = model_folder(config)
    if folder is None or folder == Path(config.model.hf_folder):
        return []
    return [
        f"model.hf_folder = '{config.model.hf_folder}' is gone; the model is as the copy of its "
        f"config.json in {folder} says"
    ]


def _held_out_text(config: JobConfig) -> list[str]:
    """Whether validation reads another text than training, as it does by default for own text."""
    training, validation = config.training, config.validation
    if not validation.enable or validation.dataset == training.dataset:
        return []
    fix = f"--validation.dataset {training.dataset}"
    if training.dataset_path:
        fix += f" --validation.dataset_path {training.dataset_path}"
    return [
        f"validation.dataset = '{validation.dataset}' is another text than training.dataset = "
        f"'{training.dataset}'; pass {fix} for the held-out split of the text that trains"
    ]


def _yarn(config: JobConfig) -> list[str]:
    """Whether sequences, or their positions, go beyond what YaRN's scaling is made for."""
    for stage in distinct_stages(config):
        scaling = model_arguments_of(stage.config).rope_scaling
        skips, length = stage.config.lighthouse.skip_positions, stage.seq_len
        reach = max(skips, length)
        if scaling["rope_type"] != "yarn" or reach <= scaling["factor"] * scaling[LENGTH]:
            continue
        key = "skip_positions" if skips > length else "training.seq_len"
        enough = -(-reach // scaling[LENGTH])
        own = stage.has_own_scaling
        fix = f"{YARN}={enough}" if own else f"--model.rope_scaling 'yarn factor={enough}'"
        return [
            f"{named(stage)}{key} = {reach:,} is beyond factor x {LENGTH} = "
            f"{scaling['factor']:g} x {scaling[LENGTH]:,} of the rotary embedding's yarn scaling, "
            f"the length that it is made for; use {fix}"
        ]
    return []


def _stages(config: JobConfig) -> list[str]:
    section, steps = config.lighthouse, config.training.steps
    short_form = not section.schedule and section.stage == "auto"
    if not short_form or section.dense_from_step < steps:
        return []
    return [
        f"lighthouse.dense_from_step = {section.dense_from_step:,} is not below training.steps = "
        f"{steps:,}: no step of this run is dense, and export refuses its checkpoints; lower "
        "dense_from_step, or set lighthouse.stage = 'lighthouse' if that is meant"
    ]


def _window(config: JobConfig, world_size: int) -> list[str]:
    window = running_window(config, model_arguments_of(config).n_layers)
    if not window:
        return []
    found = []
    if window >= config.training.seq_len:
        found.append(
            f"lighthouse.window = {window:,} holds all of training.seq_len = "
            f"{config.training.seq_len:,} positions: this is dense attention, at its cost; use a "
            "few hundred positions"
        )
    method = selecting_config(config.lighthouse)
    if config.training.document_mask and method and window < (span := method.coarsest_span):
        found.append(
            f"lighthouse.window = {window} with training.document_mask is less than "
            f"pooling_factor^(levels - 1) = {span}: the first positions of a document see those "
            f"before them in the window alone; use a window of {span} or more"
        )
    key, beside = precision_key(config, world_size), ""
    if key == "dtype":
        beside = ", which nothing lowers under tensor or pipeline parallelism without FSDP"
    if getattr(config.training, key) == "float32":
        found.append(
            f"training.{key} = 'float32' with a window{beside}: on GPUs its kernel "
            "then has no tensor cores, and is several times slower than in 'bfloat16'"
        )
    return found


def _unused(config: JobConfig) -> list[str]:
    """Settings that nothing reads, because another setting has another value."""
    found, all_leaves = [], list(leaves(config))
    values = {leaf.key: leaf.value for leaf in all_leaves}
    stages = stages_of(config)
    values[A_STAGE] = {stage.attention for stage in stages}
    # Without a schedule, a run that is dense throughout carries what one key would turn on.
    values[ITS_ATTENTION] = {
        stage.config.lighthouse.attention
        for stage in stages
        if stage.attention == "lighthouse" or not stage.text
    }
    for leaf in (leaf for leaf in all_leaves if leaf.value != leaf.default):
        for beginning, requirements in READ_WHEN.items():
            missed = [each for each in requirements if not each.test(values[each.key])]
            if leaf.key.startswith(beginning) and missed:
                found.append(
                    f"{leaf.key} = {shown(leaf.value)} has no effect: it is read when "
                    + " and ".join(f"{each.key} {each.words}" for each in missed)
                )
    return found
