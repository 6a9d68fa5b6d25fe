"""Finished runs of earlier contests, in the place of equal ones that a contest would train."""

import json
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.folders import complete_checkpoints
from ..checkpoints.resume import all_differences
from ..environment import environment
from ..errors import UserFileError, UserValueError
from ..evaluation.progress import say
from .contest_data import TAKEN_FROM
from .contest_file import COPY, RECORD, Contest, read_record, read_values
from .recovery_plan import CHECKPOINTS
from .settings import record_of
from .sweeps import FINISHED, Run

# Keys of a contest's file that decide what is measured of a run, and what it begins from.
MEASURES = ("retrieval", "prompts", "distance", "tuned_by")
BEGINNING = ("start", "settings")


@dataclass(frozen=True)
class Earlier:
    """An earlier contest whose runs may stand for those of another.

    Attributes:
        folder: its output.
        name: its file's name.
        seeds: seeds whose runs have all measures. The others have that which chooses rates.
    """

    folder: Path
    name: str
    seeds: list[int]


def earlier_contests(
    folders: Sequence[Path], contest: Contest, record: Mapping[str, Any]
) -> list[Earlier]:
    """Check that runs of earlier contests have the text, the start and the measures of this one.

    Args:
        folders: outputs of the earlier contests.
        record: what the record of this contest says of its runs and text.

    Raises:
        ValueError, OSError: a folder holds no contest, or one that differs in these.
    """
    found, own, gpu = [], read_values(contest.path), environment()["GPU"]
    for folder in folders:
        if not (folder / RECORD).is_file() or not (folder / COPY).is_file():
            raise UserFileError(
                f"--take {folder} holds no {RECORD} and {COPY}; pass the --output of a contest"
            )
        known, values = read_record(folder / RECORD), read_values(folder / COPY)
        other = [name for name, value in record.items() if known.get(name, value) != value]
        # Times of another one would pass for those of this.
        other += ["GPU"] if known["environment"]["GPU"] != gpu else []
        keys = MEASURES + (BEGINNING if contest.start else ())
        other += [key for key in keys if values[key] != own[key]]
        if contest.start and Path(values["config"]).name != Path(own["config"]).name:
            other.append("config")
        if other:
            raise UserValueError(
                f"--take {folder}: its contest has another {', '.join(other)} than {contest.path}, "
                "so its runs cannot stand for these; leave the folder out"
            )
        found.append(Earlier(folder, known["file"], values["seeds"]))
    return found


def take(
    run: Run,
    earlier: Sequence[Earlier],
    moved: Container[str],
    seed: int | None = None,
    is_start: bool = False,
) -> None:
    """Copy a finished run of an earlier contest, if it is equal and this one has not begun.

    Args:
        moved: keys that may differ.
        seed: the run's, if all measures are taken of it.
        is_start: whether others begin from its last checkpoint, which is left out otherwise.
    """
    if run.folder.exists():
        return
    for contest in earlier:
        theirs = contest.folder / run.name
        record = theirs / "config.json"
        measured = seed is None or seed in contest.seeds
        if not (theirs / FINISHED).exists() or not record.exists() or not measured:
            continue
        if is_start and not complete_checkpoints(theirs / CHECKPOINTS):
            continue
        differences = all_differences(
            json.loads(record.read_text()), json.loads(record_of(run.config))
        )
        if other := [each.key for each in differences if each.key not in moved]:
            say(f"{run.name} is not taken from {contest.folder}: another {', '.join(other)}")
            continue
        left_out = () if is_start else (CHECKPOINTS,)
        # All or nothing, as what is cut off would pass for a finished run.
        partial = run.folder.with_name(f"{run.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(theirs, partial, ignore=shutil.ignore_patterns(*left_out))
        source = partial / TAKEN_FROM
        if not source.exists():
            source.write_text(contest.name)
        partial.replace(run.folder)
        say(f"{run.name} is taken from {contest.folder}")
        return
