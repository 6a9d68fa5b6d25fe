"""How training ends before its last step, and what the launcher is told about it."""

import json
import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torchtitan.tools.logging import logger

from lighthouse_commands.protocol import (
    LAUNCHER,
    SECONDS_OF_ONE_SIGNAL,
    SIGNALS,
    STOPPED,
    USERS_MISTAKE,
)

from .errors import UserError
from .processes import die_with_parent

# This code tells a scheduler to run the same command again: nothing is lost.
EXIT_SAVED = os.EX_TEMPFAIL
# The launcher looks after its processes ten times a second.
SECONDS_FOR_THE_LAUNCHER = 3.0


class StoppedBySignal(Exception):
    """Training ended between two steps, because a signal asked any of its processes to.

    Attributes:
        code: exit code of the process.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopRequest:
    """Remembers a SIGTERM or SIGINT for the step that is under way; a second one ends the process.

    Attributes:
        number: the first signal; 0 before any.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def listen(self) -> None:
        """From now on, remember the first signal; only a second one ends the process."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def ignore(self) -> None:
        """Let signals no longer disturb this process, which has saved and is about to end."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Logging is not safe here: the signal may have interrupted it.
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SECONDS_OF_ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def stopped(number: int, step: int, checkpoint: Path | None) -> StoppedBySignal:
    """The end of a run that a signal stopped after ``step``.

    Args:
        checkpoint: folder of the step's checkpoint; None if checkpoints are not enabled.
    """
    name = signal.Signals(number).name
    if checkpoint is None:
        message = (
            f"stopped by {name} after step {step}; nothing was saved, because "
            "checkpoint.enable is false or checkpoint.load_only is true"
        )
        return StoppedBySignal(message, 128 + number)
    message = f"stopped by {name}: saved step {step} in {checkpoint}; the same command goes on"
    return StoppedBySignal(message, EXIT_SAVED)


def report(message: str, mark: str) -> None:
    """Tell the launcher, or else the console, why this process ends.

    torchrun prints the report last; without it, it explains how to get tracebacks.

    Args:
        mark: key by which the launcher tells what kind of end it is.
    """
    if LAUNCHER not in os.environ:
        logger.error(message)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": message, "timestamp": int(time.time()), mark: True}
        Path(error_file).write_text(json.dumps(content))


@contextmanager
def ends_as_the_launcher_expects() -> Generator[None]:
    """Run a training process, which ends with its launcher and tells it of mistakes and stops.

    Raises:
        SystemExit: with code 1 after a user's mistake, and as ``StoppedBySignal`` says.
        Exception: a crash.
    """
    launcher = os.environ.get(LAUNCHER)
    die_with_parent(int(launcher) if launcher else None)
    try:
        yield
    except UserError as error:
        report(str(error), USERS_MISTAKE)
        sys.exit(1)
    except StoppedBySignal as error:
        report(str(error), STOPPED)
        sys.exit(error.code)
    except KeyboardInterrupt:
        # The launcher says how training ended.
        sys.exit(130)
    except Exception:
        # If another process failed first, this error only follows from it. The launcher ends this
        # process in the meantime, and the other one's message stands alone.
        if launcher and int(os.environ["WORLD_SIZE"]) > 1:
            time.sleep(SECONDS_FOR_THE_LAUNCHER)
        raise
