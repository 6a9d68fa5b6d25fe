"""Agreement between the ranks of a run, so that all of them end with the same message."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..errors import UserError, UserFileError


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(action: Callable[[], None]) -> None:
    """Let rank 0 do something, and raise its error, if a user can mend it, on every rank."""
    error: UserError | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as caught:
            error = caught
        except OSError as caught:
            error = unusable(caught)
    if error := gathered(error)[0]:
        raise error


def unusable(error: OSError) -> UserFileError:
    """The error for a file or folder that the system does not let us use."""
    return UserFileError(f"{error.filename}: {error.strerror}; make it usable, and start again")
