"""Changes to files below a folder, seen before they happen by Python's audit hooks.

Whatever a hook raises, the operation raises. So one place serves to count operations, to kill the
process between any two of them, and to let one of them fail.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Audit event -> positions of its path and of the descriptor that the path is relative to.
CHANGES = {
    "open": (0, None),
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.rename": (0, 2),
    "os.truncate": (0, None),
}
REMOVALS = ("os.remove", "os.rmdir")


def on_change(
    folder: Path, action: Callable[[int, str], None], events: tuple[str, ...] = tuple(CHANGES)
) -> None:
    """Call ``action(number, path)`` before each change below ``folder``, counted from 1.

    An audit hook stays until its process ends, so this belongs into forks.
    """
    root, count = str(folder), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in events:
            return
        path = _path(event, arguments)
        if path == root or path.startswith(f"{root}/"):
            count += 1
            action(count, path)

    sys.addaudithook(hook)


def _path(event: str, arguments: tuple[Any, ...]) -> str:
    position, descriptor = CHANGES[event]
    path = arguments[position]
    if event == "open":
        mode, flags = arguments[1:3]
        writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else 0
        if not writes and not (isinstance(mode, str) and set(mode) & set("wax+")):
            return ""
    if not isinstance(path, str | bytes | os.PathLike):
        return ""
    path = os.fsdecode(path)
    if not path.startswith("/"):
        base = arguments[descriptor] if descriptor is not None else -1
        try:
            path = os.path.join(os.readlink(f"/proc/self/fd/{base}") if base >= 0 else os.getcwd(),
                                path)  # fmt: skip
        except OSError:
            return ""
    return path


def count_in(counter: Any) -> Callable[[int, str], None]:
    """Keeps the number of changes in a value that processes share."""

    def action(number: int, path: str) -> None:
        counter.value = number

    return action


def kill_at(change: int, everyone: bool) -> Callable[[int, str], None]:
    """SIGKILLs this process, or all processes of its launch, before the given change."""

    def action(number: int, path: str) -> None:
        if number == change:
            os.kill(0 if everyone else os.getpid(), signal.SIGKILL)

    return action


def fail_at(change: int, errno: int, for_good: bool) -> Callable[[int, str], None]:
    """Raises an OSError at the given change, and at all later ones if it is ``for_good``."""

    def action(number: int, path: str) -> None:
        if number == change or (for_good and number > change):
            raise OSError(errno, os.strerror(errno), path)

    return action


def slow_by(seconds: float) -> Callable[[int, str], None]:
    """Delays each change."""
    return lambda number, path: time.sleep(seconds)
