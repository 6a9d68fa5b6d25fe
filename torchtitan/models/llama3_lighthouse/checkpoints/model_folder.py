"""What a run's model is: that of its flavor, or of the folder that ``model.hf_folder`` names.

Every checkpoint of a run with ``model.hf_folder`` keeps the files of ``DESCRIPTION_FILES`` beside
its record. So a checkpoint is such a folder too, and stands in where the folder has gone.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserValueError
from ..job_config import JobConfig, Model
from ..model.architecture import (
    CONFIG_FILE,
    DESCRIPTION_FILES,
    architecture,
    described_arguments,
    read_description,
)
from ..model.flavors import flavors
from ..model.model import LighthouseModelArgs
from .checksums import FileFault, check_checksum, replace_file
from .folders import complete_checkpoints, folder_of
from .record import CheckpointRecord


def named_model(config: JobConfig) -> str:
    """The key that says what the model is, with its value, for messages."""
    folder = config.model.hf_folder
    return f"model.hf_folder = '{folder}'" if folder else f"model.flavor = '{config.model.flavor}'"


def model_folder(config: JobConfig) -> Path | None:
    """The folder that describes a run's model; None if its flavor does.

    Where ``model.hf_folder`` has gone, it is the newest checkpoint of the run, or else the one that
    the run begins from.

    Raises:
        ValueError: neither the folder nor a checkpoint describes a model.
    """
    if not config.model.hf_folder:
        return None
    named, section = Path(config.model.hf_folder), config.checkpoint
    places = [named]
    if section.enable:
        own = complete_checkpoints(folder_of(config))
        places += reversed(own.values())
        places += [Path(section.initial_load_path)] if section.initial_load_path else []
    for place in places:
        if (place / CONFIG_FILE).is_file():
            return place
    raise UserValueError(
        f"model.hf_folder = '{named}' holds no {CONFIG_FILE}, and no checkpoint of this run has a "
        "copy of it; pass --model.hf_folder FOLDER with a folder in Hugging Face's format, such as "
        "the checkpoint/step-0 that lighthouse import-hf writes"
    )


def model_arguments_of(config: JobConfig) -> LighthouseModelArgs:
    """Arguments of a run's model, without its method and length; each call makes new ones.

    Raises:
        ValueError: there is no such flavor or folder, or the folder's model cannot be trained here.
    """
    return arguments_at(config.model, model_folder(config))


def arguments_at(section: Model, folder: Path | None) -> LighthouseModelArgs:
    """Arguments of the model that a folder describes, or of the flavor if it is None.

    Raises:
        ValueError: as ``model_arguments_of``.
    """
    if folder is not None:
        return described_arguments(section, checked_description(folder), str(folder / CONFIG_FILE))
    if section.flavor not in flavors:
        raise UserValueError(
            f"model.flavor = '{section.flavor}' is not known; use one of {', '.join(flavors)}"
        )
    return described_arguments(section, None)


def checked_description(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder, compared with its checksum if the folder is a checkpoint.

    Raises:
        ValueError: it is missing, has changed, or is no JSON object.
    """
    try:
        check_checksum(folder, CONFIG_FILE)
    except (FileFault, OSError) as error:
        raise UserValueError(f"{error}; restore it, or pass another --model.hf_folder") from None
    return read_description(folder)


def files_to_keep(config: JobConfig) -> dict[str, str]:
    """The text of each file that checkpoints of a run keep of the folder, by its name.

    Raises:
        ValueError: as ``model_folder``.
    """
    folder = model_folder(config)
    files = [folder / name for name in DESCRIPTION_FILES] if folder else []
    return {file.name: file.read_text() for file in files if file.is_file()}


def write_files(path: Path, files: Mapping[str, str]) -> None:
    """Put files from ``files_to_keep`` into a step-N folder, which has to be there."""
    for name, text in files.items():
        replace_file(path / name, text)


def check_same_model(
    path: Path, record: CheckpointRecord, present: dict[str, Any], model: Mapping[str, Any]
) -> None:
    """Check that a run would go on as the model that its checkpoint is, if folders describe them.

    Args:
        path: the step-N folder that ``record`` is of.
        present: the run's configuration by section.
        model: the ``architecture`` of the run's model.

    Raises:
        ValueError: they differ; the message names each entry of the architecture that does.
    """
    if apart := differing_entries(path, record, present, model):
        listed = ", ".join(f"{key} = {new!r} (checkpoint: {old!r})" for key, old, new in apart)
        raise UserValueError(
            f"this run would make another model of checkpoint {path}: {listed}; restore the "
            "checkpoint's values by --model.hf_folder, --model.rope_theta and "
            "--model.rope_scaling, or go on with the new ones in another place: "
            f"--checkpoint.folder NEW --checkpoint.initial_load_path {path}"
        )


def differing_entries(
    path: Path, record: CheckpointRecord, present: dict[str, Any], model: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Entries of the architecture that differ: name, checkpoint's value, run's value.

    Between flavors none is listed, as their names tell them apart. None is either where the
    checkpoint has lost its ``config.json``.

    Args:
        path, record, present, model: as in ``check_same_model``.
    """
    recorded = record.config.get("model", {})
    before = path if recorded.get("hf_folder") else None
    by_folder = before is not None or present["model"]["hf_folder"]
    if not by_folder or (before and not (before / CONFIG_FILE).is_file()):
        return []
    old = architecture(arguments_at(_section(recorded), before))
    return [(key, old[key], model[key]) for key in old if old[key] != model[key]]


def _section(values: dict[str, Any]) -> Model:
    """The section [model] out of a configuration, which may be of another version."""
    known = {each.name for each in dataclasses.fields(Model)}
    return Model(**{key: value for key, value in values.items() if key in known})
