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


def agreed(action: Callable[[], Any]) -> Any:
    """Do something on every rank; returns what rank 0 got, or raises the first rank's error."""
    error: UserError | None = None
    result = None
    try:
        result = action()
    except UserError as caught:
        error = caught
    except OSError as caught:
        error = unusable(caught)
    found = gathered((error, result))
    if errors := [each for each, _ in found if each]:
        raise errors[0]
    return found[0][1]


def on_rank_0(action: Callable[[], None]) -> None:
    """Let rank 0 do something, and raise its error, if a user can mend it, on every rank."""
    agreed(action if dist.get_rank() == 0 else lambda: None)


def unusable(error: OSError) -> UserFileError:
    """The error for a file or folder that the system does not let us use."""
    file = error.filename or "a file of the run"
    return UserFileError(
        f"{file} cannot be used ({error.strerror}); mend its permissions or move it away, and "
        "start again"
    )
