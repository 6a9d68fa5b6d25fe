"""The note in a checkpoint's folder about the run that wrote it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserValueError

RECORD_FILE = "lighthouse.json"


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
    """The record in a step-N folder, or None; torchtitan's own trainer writes none."""
    file = Path(path, RECORD_FILE)
    if not file.is_file():
        return None
    try:
        return CheckpointRecord(**json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise UserValueError(
            f"{file} is not JSON: {error}; restore it, or remove it and pass the run's "
            "configuration with --job.config_file FILE"
        ) from None


def write_record(path: str | Path, record: CheckpointRecord) -> None:
    """Put ``record`` into a step-N folder, and make the folder if need be."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / RECORD_FILE).write_text(json.dumps(asdict(record), indent=1) + "\n")
