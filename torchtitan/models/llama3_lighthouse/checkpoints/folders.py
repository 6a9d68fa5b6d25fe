"""One rule for what is a checkpoint folder, how far its save got, and which one a run loads.

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

from ..errors import UserValueError
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


def checkpoint_to_load(
    folder: str | Path, step: int, load_only: bool, initial_load_path: str | None
) -> Path | None:
    """What a run goes on from: a checkpoint of its own, or ``initial_load_path``; None if neither.

    Args:
        folder: of the run's own checkpoints.
        step, load_only, initial_load_path: the keys ``checkpoint.load_step`` and so on.

    Raises:
        ValueError: there is no such checkpoint, or training on from it would overwrite others.
    """
    complete = complete_checkpoints(folder)
    if step != -1 and step not in complete:
        has = f"it has steps {', '.join(map(str, complete))}" if complete else "it has none"
        raise UserValueError(
            f"checkpoint.load_step = {step} is not a complete checkpoint of {folder}; "
            f"{has}; pass one of them, or -1 for the newest"
        )
    if not Path(folder).exists():
        return Path(initial_load_path) if initial_load_path else None
    if not complete:
        if initial_load_path:
            raise UserValueError(
                f"checkpoint.folder {folder} exists but holds no complete checkpoint, and "
                "checkpoint.initial_load_path is only read when there is no such folder; "
                f"remove {folder} to start from {initial_load_path}"
            )
        return None
    newest = max(complete)
    if step == -1:
        step = newest
    if step < newest and not load_only:
        raise UserValueError(
            f"checkpoint.load_step = {step} but {folder} goes up to step {newest}, "
            "which training on would overwrite; continue in another place with "
            f"--checkpoint.folder NEW --checkpoint.initial_load_path {complete[step]} "
            "--checkpoint.no-initial_load_model_only"
        )
    return complete[step]


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
