"""Differences between a run and the checkpoint that it goes on from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

from lighthouse import LighthouseConfig

from ..errors import UserValueError
from ..job_config import JobConfig, Lighthouse, Training, flatten
from ..stages import Stage, named, stage_at, stages_of
from .record import CheckpointRecord

# Settings that decide what weights of one shape compute.
ARCHITECTURE = {"model.flavor", "model.rope_theta", "model.rope_scaling"}
MODEL = {"model.name", "model.converters", "lighthouse.tokenizer"} | ARCHITECTURE
# Settings that decide it in steps of the Lighthouse stage alone.
METHOD = {f"lighthouse.{field.name}" for field in fields(LighthouseConfig)}
METHOD |= {"lighthouse.dense_layers", "lighthouse.attention"}
# A window alone reads these.
OF_THE_WINDOW = {
    f"lighthouse.{name}" for name in ("window", "key_stride", "dense_layers", "attention")
}
# Settings of these sections change training, except for those that do not touch what is computed.
TRAINING = ("training.", "optimizer.", "lr_scheduler.", "lighthouse.", "quantize.")
WITHOUT_EFFECT = ("training.dataloader.", "training.gc_", "lighthouse.log_selection_every")
# Where a run writes and what it reports on the way do not change it.
NOT_COMPARED = ("job.", "metrics.", "profiling.", "comm.", "checkpoint.", "model.hf_")


@dataclass(frozen=True)
class Difference:
    """A setting with another value than the checkpoint's record has."""

    key: str
    recorded: Any
    present: Any

    def __str__(self) -> str:
        return f"{self.key} = {self.present!r} (checkpoint: {self.recorded!r})"


def all_differences(recorded: dict[str, Any], present: dict[str, Any]) -> list[Difference]:
    """The settings of ``present`` that differ, in its order.

    Args:
        recorded, present: configurations by section. A key that the record does not know is newer
            than its run, which had the default.
    """
    # The record went through JSON, which makes lists of tuples.
    now, defaults = (
        flatten(json.loads(json.dumps(each))) for each in (present, JobConfig().to_dict())
    )
    before = defaults | flatten(recorded)
    # Older versions recorded stages with the spaces that the command line had.
    key = "lighthouse.schedule"
    before[key] = Lighthouse(schedule=before[key]).schedule
    return [
        Difference(key, before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def differences(recorded: dict[str, Any], present: dict[str, Any]) -> list[Difference]:
    """Those of ``all_differences`` that a checkpoint's run and its continuation may not ignore."""
    found = all_differences(recorded, present)
    return [each for each in found if not each.key.startswith(NOT_COMPARED)]


def scaled_at(config: dict[str, Any], step: int) -> dict[str, Any]:
    """A configuration by section, with the rotary scaling that its stage has at step ``step``."""
    stage = stage_at(max(step, 1), _stages(config))
    if not stage.has_own_scaling:
        return config
    model = {**config.get("model", {}), "rope_scaling": stage.config.model.rope_scaling}
    return {**config, "model": model}


def positions_reached(config: dict[str, Any], step: int) -> int:
    """The most positions of a sequence up to step ``step``, of a configuration by section."""
    stages = [stage for stage in _stages(config) if stage.first <= max(step, 1)]
    return max(stage.positions for stage in stages)


def check_settings(
    path: Path,
    record: CheckpointRecord,
    present: dict[str, Any],
    elsewhere: bool,
    weights_only: bool,
    apart: Sequence[tuple[str, Any, Any]] = (),
) -> None:
    """Log what differs from the record of the checkpoint at ``path``; refuse another model.

    Args:
        present: the run's configuration by section.
        elsewhere: whether the run goes on in a folder of its own. It may then be of another model.
        weights_only: whether nothing but the weights is loaded, so that a new training begins.
        apart: entries of the architecture that differ, from ``differing_entries``.

    Raises:
        ValueError: a setting makes it another model, and the run would go on in the same folder.
    """
    next_step = 1 if weights_only else record.step + 1
    now = stage_at(next_step, _stages(present))
    read = set()
    if now.attention == "lighthouse":
        window = now.config.lighthouse.attention == "window"
        read = OF_THE_WINDOW if window else METHOD
    scheduled = bool(
        record.config["lighthouse"].get("schedule") or present["lighthouse"]["schedule"]
    )
    model, training, rest = [], [], []
    if scheduled:
        # A key's own value says little here, because stages may have others.
        model += _of_the_stage(record, next_step, now, read)
        model += _of_the_scaling(record, next_step, now, present)
    model_keys = MODEL if scheduled or record.last_lighthouse_step == 0 else MODEL | read
    # Where a folder describes one of the models, their entries tell, and not the keys.
    if record.config.get("model", {}).get("hf_folder") or present["model"]["hf_folder"]:
        model_keys = model_keys - ARCHITECTURE
        model += [Difference(*entry) for entry in apart]
    for found in differences(record.config, present):
        if found.key in ARCHITECTURE and found.key not in model_keys:
            continue
        if found.key in model_keys:
            model.append(found)
        elif found.key in METHOD | OF_THE_WINDOW:
            (training if found.key in read else rest).append(found)
        elif found.key.startswith(TRAINING) and not found.key.startswith(WITHOUT_EFFECT):
            training.append(found)
        else:
            rest.append(found)

    if model and not elsewhere:
        raise UserValueError(
            f"this run would make another model of checkpoint {path}: {_listed(model)}; restore "
            "the checkpoint's values, or go on with the new ones in another place: "
            f"--checkpoint.folder NEW --checkpoint.initial_load_path {path} "
            "--checkpoint.no-initial_load_model_only"
        )
    if model:
        logger.warning(f"{path} was trained as another model than this run's: {_listed(model)}")
    if training and not weights_only:
        logger.warning(f"Training goes on from {path} with other settings: {_listed(training)}")
    if rest and not weights_only:
        logger.info(f"Other settings differ: {_listed(rest)}")


def _stages(config: dict[str, Any]) -> Sequence[Stage]:
    """The stages of a configuration by section, which may be of another version."""
    lighthouse, training = (
        {key: value for key, value in config.get(name, {}).items() if hasattr(section, key)}
        for name, section in (("lighthouse", Lighthouse()), ("training", Training()))
    )
    return stages_of(JobConfig(lighthouse=Lighthouse(**lighthouse), training=Training(**training)))


def _of_the_stage(
    record: CheckpointRecord, next_step: int, now: Stage, read: set[str]
) -> list[Difference]:
    """Settings in which the stage that the checkpoint has begun would go on as another one.

    Args:
        now: the stage of step ``next_step`` in the present run.
        read: the keys of the method that it reads.
    """
    if not record.step:
        # A seed checkpoint was not trained in any stage.
        return []
    stages = _stages(record.config)
    before = stage_at(next_step, stages)
    if before.attention != "lighthouse" or stage_at(record.step, stages) is not before:
        return []
    settings = (
        {"lighthouse": {key: value for key, value in vars(stage.config.lighthouse).items()
                        if f"lighthouse.{key}" in read}}
        for stage in (before, now)
    )  # fmt: skip
    return [
        Difference(f"{named(now)}{each.key}", each.recorded, each.present)
        for each in all_differences(*settings)
    ]


def _of_the_scaling(
    record: CheckpointRecord, next_step: int, now: Stage, present: dict[str, Any]
) -> list[Difference]:
    """The rotary scaling, if the checkpoint has one of a stage's own that the run would change.

    It holds from that stage on. A stage without one keeps its embedding to its end.

    Args:
        now: the stage of step ``next_step`` in the present run.
    """
    if not record.step:
        return []
    stages = _stages(record.config)
    past = stage_at(record.step, stages)
    under_way = (
        stage_at(next_step, stages) is past and record.step < record.config["training"]["steps"]
    )
    if not past.has_own_scaling and not (under_way and now.has_own_scaling):
        return []
    before, after = (
        scaled_at(config, step).get("model", {}).get("rope_scaling", "")
        for config, step in ((record.config, record.step), (present, next_step))
    )
    if before == after:
        return []
    return [Difference(f"{named(now)}model.rope_scaling", before, after)]


def _listed(found: list[Difference]) -> str:
    return ", ".join(map(str, found))
