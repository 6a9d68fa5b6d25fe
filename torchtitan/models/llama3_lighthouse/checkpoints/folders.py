"""One rule for what is a checkpoint folder, and how far its save got.

A save makes ``step-N`` with the file ``.unfinished``, fills it, puts ``.metadata`` in place and
then removes ``.unfinished``. A purge first renames the folder. So a folder without ``.metadata``
either says that its save was cut off, or has lost the file since, as in a copy by ``step-N/*``.
Saves that earlier versions cut off have no mark and count as the second.
"""

import re
import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..job_config import JobConfig
from ..model.architecture import DESCRIPTION_FILES
from .record import RECORD_FILE

METADATA_FILE = ".metadata"
# Files that have no checksum of their own.
SEALED_FILES = (METADATA_FILE, RECORD_FILE, *DESCRIPTION_FILES)
UNFINISHED_FILE = ".unfinished"
# A folder in Hugging Face's format has one of these.
WEIGHTS_FILES = ("model.safetensors.index.json", "model.safetensors")
PURGED = ".purged"


class Condition(Enum):
    """How whole a checkpoint folder looks from outside."""

    COMPLETE = "complete"
    CUT_OFF = "cut off"
    WITHOUT_METADATA = "without metadata"


@dataclass(frozen=True)
class CheckpointFolder:
    """A ``step-N`` folder."""

    step: int
    path: Path
    condition: Condition


def folder_of(config: JobConfig) -> Path:
    """The folder of a run's own checkpoints."""
    return Path(config.job.dump_folder, config.checkpoint.folder)


def checkpoints_in(folder: str | Path) -> dict[int, CheckpointFolder]:
    """Every checkpoint in ``folder`` by its step, in order.

    Only folders with the plain name ``step-N`` count, so that one can be put aside by renaming it.
    """
    found = {}
    for path in Path(folder).glob("step-*"):
        if (match := re.fullmatch(r"step-(0|[1-9]\d*)", path.name)) and path.is_dir():
            step = int(match.group(1))
            found[step] = CheckpointFolder(step, path, condition(path))
    return dict(sorted(found.items()))


def complete_checkpoints(folder: str | Path) -> dict[int, Path]:
    """The complete checkpoints in ``folder`` by their steps, in order."""
    return {
        step: found.path
        for step, found in checkpoints_in(folder).items()
        if found.condition is Condition.COMPLETE
    }


def condition(path: Path) -> Condition:
    """The condition of one checkpoint folder."""
    if any((path / name).is_file() for name in (METADATA_FILE, *WEIGHTS_FILES)):
        return Condition.COMPLETE
    # A folder that holds at most a record and what describes the model has nothing to lose.
    others = {file.name for file in path.iterdir()} - {RECORD_FILE, *DESCRIPTION_FILES}
    if UNFINISHED_FILE in others or not others:
        return Condition.CUT_OFF
    return Condition.WITHOUT_METADATA


def begin(path: Path) -> None:
    """Make the folder of a save, marked as unfinished."""
    path.mkdir(parents=True, exist_ok=True)
    (path / UNFINISHED_FILE).touch()


def is_unfinished(path: Path) -> bool:
    """Whether a save has marked a folder and not finished it."""
    return (path / UNFINISHED_FILE).exists()


def finish(path: Path) -> None:
    """Take the mark off a folder whose save is complete."""
    (path / UNFINISHED_FILE).unlink(missing_ok=True)


def remove_cut_off(folder: str | Path) -> list[Path]:
    """Remove what saves that were cut off have left in ``folder``; returns the paths removed."""
    removed = []
    for found in checkpoints_in(folder).values():
        if found.condition is Condition.CUT_OFF:
            shutil.rmtree(found.path)
            removed.append(found.path)
    return removed


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint folder so that no run takes it for one; returns the new path."""
    new, number = path.with_name(f"{path.name}.damaged"), 2
    while new.exists():
        new, number = path.with_name(f"{path.name}.damaged-{number}"), number + 1
    return path.rename(new)


def take_out(path: Path) -> Path:
    """Rename a folder that is to be deleted, so that it never looks complete in between."""
    new = path.with_name(path.name + PURGED)
    # An earlier deletion may have stopped in the middle.
    shutil.rmtree(new, ignore_errors=True)
    return path.rename(new)


def taken_out(folder: str | Path) -> list[Path]:
    """Folders in ``folder`` whose deletion has begun."""
    return [path for path in Path(folder).glob(f"step-*{PURGED}") if path.is_dir()]
