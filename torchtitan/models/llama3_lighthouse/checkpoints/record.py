"""The note in a checkpoint's folder about the run that wrote it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserValueError
from .checksums import FileFault, check_checksum, replace_file, require_file

RECORD_FILE = "lighthouse.json"
# Settings of [lighthouse] that the oldest records do not name, and whose default was another then.
OLDER_DEFAULTS = {"entry_score": "max", "combine": "sum"}


@dataclass(frozen=True)
class CheckpointRecord:
    """A note in a checkpoint's folder about the run that wrote it, for people and for scripts."""

    step: int
    last_lighthouse_step: int | None
    """0: the run had no Lighthouse step. None: unknown, because another trainer, which leaves no
    such note, trained an earlier part of the run."""
    config: dict[str, Any]
    """The whole configuration, by section."""

    @property
    def dense_steps(self) -> int | None:
        """Dense steps since the last Lighthouse step, or since the run began."""
        return None if self.last_lighthouse_step is None else self.step - self.last_lighthouse_step


def read_record(path: str | Path) -> CheckpointRecord | None:
    """The record in a step-N folder, or None; torchtitan's own trainer writes none.

    Raises:
        ValueError: it cannot be read.
    """
    file = Path(path, RECORD_FILE)
    if not file.exists():
        return None
    try:
        check_checksum(file.parent, RECORD_FILE)
        record = CheckpointRecord(**json.loads(require_file(file).read_bytes()))
        _check(record)
    except (OSError, FileFault, ValueError, TypeError, RecursionError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise UserValueError(
            f"{file} cannot be read as a checkpoint's record ({problem}); restore it, or remove it "
            "and pass the run's configuration with --job.config_file FILE"
        ) from None
    if section := record.config.get("lighthouse"):
        record.config["lighthouse"] = OLDER_DEFAULTS | section
    return record


def _check(record: CheckpointRecord) -> None:
    steps = [record.step, record.last_lighthouse_step or 0]
    if not all(type(step) is int and step >= 0 for step in steps):
        raise ValueError("its steps are no counts")
    if not isinstance(record.config, dict) or not all(
        isinstance(section, dict) for section in record.config.values()
    ):
        raise ValueError("its config has no sections")


def write_record(path: str | Path, record: CheckpointRecord) -> None:
    """Put ``record`` into a step-N folder, and make the folder if need be."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    replace_file(path / RECORD_FILE, json.dumps(asdict(record), indent=1) + "\n")
