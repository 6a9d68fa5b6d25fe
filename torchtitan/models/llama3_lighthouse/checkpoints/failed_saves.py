"""Errors of checkpoints that could not be written."""

import shutil
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import UserFileError
from .folders import Condition, condition

NOT_IN_FULL = "a file could not be written in full"


def not_written(path: Path, error: BaseException, needed: int, kept: Path | None) -> UserFileError:
    """Remove what a failed save has written, and return its error.

    Args:
        path: folder of the save.
        needed: bytes that it takes.
        kept: the newest complete checkpoint.
    """
    disk = next(each for each in path.parents if each.exists())
    free = shutil.disk_usage(disk).free
    partial = path.is_dir() and condition(path) is not Condition.COMPLETE
    if dist.get_rank() == 0 and partial:
        shutil.rmtree(path, ignore_errors=True)
    reason = cause(error)
    if reason.startswith(NOT_IN_FULL) and free < needed:
        reason = "no space left on the disk"
    return UserFileError(
        f"checkpoint {path} could not be written: {reason}. It needs {_mebibytes(needed)}, "
        f"and {disk} had {_mebibytes(free)} left; make room or mend the folder, and the same "
        f"command goes on from {kept or 'the beginning: nothing was saved before'}"
    )


def cause(error: BaseException) -> str:
    """The reason of a failed save in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    # torch's writer answers an error of the disk with one of its own.
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror + (f" ({link.filename})" if link.filename else "")
        link = link.__cause__ or link.__context__
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if "inline_container" in text:
        return f"{NOT_IN_FULL} ({text})"
    return text


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
