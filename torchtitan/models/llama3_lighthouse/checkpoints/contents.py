"""Whether a checkpoint holds what a run needs of it, and what follows if it is damaged."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torchtitan.components.checkpoint import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    TRAIN_STATE,
)
from torchtitan.tools.logging import logger

from ..data.packing import check_dataloader_state
from ..errors import UserFileError, UserValueError
from .folders import METADATA_FILE, complete_checkpoints, set_aside
from .record import CheckpointRecord, read_record
from .storage import DamagedCheckpointError, check_shapes

SET_ASIDE = "checkpoint.set_damaged_aside"


def check_contents(
    path: Path, states: Mapping[str, Any], excluded: Collection[str], model_only: bool
) -> None:
    """Check that a checkpoint fits the model and, unless ``model_only``, the rest of the run.

    Args:
        path: a step-N folder.
        states: what a run saves, by name.
        excluded: names that are not loaded.

    Raises:
        ValueError: something is missing, or of another shape.
    """
    if not (path / METADATA_FILE).is_file():
        raise UserValueError(
            f"{path} is not a complete checkpoint (it has no .metadata file); "
            "pass the path of a step-N folder"
        )
    stored = check_shapes(path, states[MODEL].state_dict())
    if model_only:
        return
    for name in (OPTIMIZER, LR_SCHEDULER, TRAIN_STATE):
        held = any(key.startswith(f"{name}.") for key in stored)
        if name not in excluded and not held:
            raise UserValueError(
                f"{path} holds weights without '{name}', as checkpoint.last_save_model_only "
                "leaves them; train on from the weights in another place with "
                f"--checkpoint.folder NEW --checkpoint.initial_load_path {path}"
            )
    if DATALOADER not in excluded:
        check_dataloader_state(path, stored, states[DATALOADER].stream_count)


def undamaged_record(path: Path) -> CheckpointRecord | None:
    """The record of a checkpoint, or None as from ``read_record``.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    try:
        return read_record(path)
    except UserValueError as error:
        raise DamagedCheckpointError(path, str(error).partition(";")[0]) from None


def give_up_or_set_aside(
    error: DamagedCheckpointError, folder: Path, is_newest: bool, asked: bool
) -> None:
    """Rename a damaged checkpoint if the user asked for that and an older one can follow.

    Args:
        folder: of the run's own checkpoints.
        is_newest: whether the run takes the newest one, and not one that was named.
        asked: whether to set damaged ones aside.

    Raises:
        UserError: training cannot go on; the message names the checkpoint before it.
    """
    if error.path.parent != folder or not is_newest:
        raise UserFileError(
            f"{error}; restore it, or name another by --checkpoint.load_step or "
            "--checkpoint.initial_load_path"
        )
    number = int(error.path.name.removeprefix("step-"))
    older = [path for n, path in complete_checkpoints(folder).items() if n < number]
    if not older:
        raise UserFileError(
            f"{error}. {folder} holds no older checkpoint; restore the file, or begin "
            "anew with --checkpoint.folder NAME"
        )
    if not asked:
        raise UserFileError(
            f"{error}. The one before it is {older[-1]}; restore the file, or pass "
            f"--{SET_ASIDE} to go on from the newest that is whole, which renames this one to "
            f"{error.path.name}.damaged"
        )
    logger.warning(f"{error}. It is set aside as {set_aside(error.path).name}")
