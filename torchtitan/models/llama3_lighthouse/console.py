"""Output of a run: a few short lines on the console, and everything in ``train.log``.

torchtitan logs through Python's root logger, and so does this package.
"""

import logging
import os
import re
import sys
import warnings
from pathlib import Path

from torchtitan.tools.logging import init_logger, logger

# The file lies in job.dump_folder. Restarts append to it.
LOG_FILE = "train.log"
PACKAGE = Path(__file__).parent
# Parts of warnings on which no user can act.
HARMLESS = (
    # torchtitan overrides what torchrun has set, as it should.
    "ENV[TORCH_NCCL_ASYNC_ERROR_HANDLING]",
    # torchtitan finds the GPU's peak by its name as well.
    "Error running lspci",
    # The compiler does not cache graphs with a policy of checkpointing. It compiles them anew.
    "Failed to pickle cache key",
    # The blocks that are checkpointed do nothing in place.
    "Detected that context_fn is passed to torch.utils.checkpoint",
)


class ForPeople(logging.Filter):
    """Lets pass what this package says, and warnings; torchtitan's progress is in the file."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or Path(record.pathname).is_relative_to(PACKAGE)


def is_of_use(record: logging.LogRecord) -> bool:
    """Whether a user can act on a record."""
    message = record.getMessage()
    return not any(part in message for part in HARMLESS)


class ShortFormatter(logging.Formatter):
    """The time of day and the message; warnings and errors are marked."""

    def format(self, record: logging.LogRecord) -> str:
        mark = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        text = f"{self.formatTime(record, '%H:%M:%S')}  {mark}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class PlainFormatter(logging.Formatter):
    """As logging's own, without the colours of a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return re.sub(r"\x1b\[[\d;]*m", "", super().format(record))


def set_up_console() -> None:
    """Print for people from here on, and silence warnings that no user can act on."""
    init_logger()
    for handler in logger.handlers:
        handler.addFilter(ForPeople())
        handler.addFilter(is_of_use)
        handler.setFormatter(ShortFormatter())
    # torch's compiler has loggers that print by themselves.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch")]:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(is_of_use)
    # It prints by itself what it also hands to the root logger.
    logging.getLogger("huggingface_hub").handlers.clear()
    # On a CPU, training.mixed_precision_param = "float32" asks for no autocast, and gets none.
    warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype is not supported")
    # Weights are made alike on every rank by the seed, and nothing random follows.
    warnings.filterwarnings("ignore", "DTensor .* may not have complete support on cpu")


def log_to_file(folder: str | Path) -> None:
    """Append everything that the first rank logs to ``LOG_FILE`` in ``folder``."""
    if os.environ.get("RANK", "0") != "0":
        return
    path = Path(folder, LOG_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(module)s: %(message)s"))
    logger.addHandler(handler)


def coloured(wanted: bool) -> bool:
    """Whether to print in colours: they are wanted, and the output is a terminal."""
    return wanted and sys.stdout.isatty()


def duration(seconds: float) -> str:
    """Seconds as 0:12, 3:05:00 or 2 days 3:05:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours or days else f"{minutes}:{seconds:02}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock
