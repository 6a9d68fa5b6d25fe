"""Finished runs of earlier contests, in the place of equal ones that a contest would train."""

import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..checkpoints.folders import complete_checkpoints
from ..environment import environment
from ..errors import UserFileError, UserValueError
from ..evaluation.progress import say
from ..metrics import METRICS_FILE
from .contest_data import REVISIONS, START, TAKEN_FROM, TRAINED
from .contest_file import COPY, RECORD, Contest, read_record, read_values
from .contest_measures import MEASURES_FILE
from .recovery_plan import CHECKPOINTS
from .settings import record_of
from .sweeps import CONFIG, FINISHED, Run, differing_keys

# Keys of a contest's file that decide what is measured of a run.
MEASURES = ("retrieval", "prompts", "distance", "tuned_by")


class Purpose(Enum):
    """What a run is for."""

    JUDGE = "judges an arm"
    CHOOSE = "helps to choose a rate"
    TIME = "tells times"
    BEGIN = "is what others begin from"


# Files that a finished run must have. One that helps to choose a rate may have diverged.
NEEDED = {
    Purpose.JUDGE: (TRAINED, METRICS_FILE, MEASURES_FILE),
    Purpose.CHOOSE: (MEASURES_FILE,),
    Purpose.TIME: (TRAINED, METRICS_FILE),
    Purpose.BEGIN: (TRAINED, METRICS_FILE),
}


@dataclass(frozen=True)
class Earlier:
    """An earlier contest whose runs may stand for those of another.

    Attributes:
        folder: its output.
        name: its file's name.
        seeds: seeds whose runs have all measures. The others have that which chooses rates.
        only_unmeasured: whether its measures differ, so that only starts and times can be taken.
    """

    folder: Path
    name: str
    seeds: list[int]
    only_unmeasured: bool


def earlier_contests(
    folders: Sequence[Path], contest: Contest, record: Mapping[str, Any]
) -> list[Earlier]:
    """Check that runs of earlier contests have the text, the GPU and the measures of this one.

    Other measures are refused, unless this contest has a start, which nobody measures.

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
        needed = {"file", "environment", *record}
        if not isinstance(known, dict) or not needed <= known.keys():
            missing = min(needed - known.keys()) if isinstance(known, dict) else "record"
            raise UserFileError(
                f"--take {folder}: its {RECORD} has no {missing}, so nobody knows whether its runs "
                "can stand for others; leave the folder out"
            )
        other = [name for name, value in record.items() if known[name] != value]
        # Times of another one would pass for those of this.
        other += ["GPU"] if known["environment"]["GPU"] != gpu else []
        measures = [key for key in MEASURES if values[key] != own[key]]
        if not contest.start:
            other += measures
        if other:
            raise UserValueError(
                f"--take {folder}: its contest has another {', '.join(other)} than {contest.path}, "
                "so its runs cannot stand for these; leave the folder out"
            )
        if measures:
            say(
                f"only starts and times are taken from {folder}: another {', '.join(measures)} "
                f"than {contest.path}"
            )
        found.append(Earlier(folder, known["file"], values["seeds"], bool(measures)))
    return found


def take(
    run: Run, earlier: Sequence[Earlier], moved: Container[str], purpose: Purpose, seed: int = 0
) -> None:
    """Copy an equal run that an earlier contest finished, unless this one has begun it.

    Args:
        moved: keys that may differ.
        seed: the run's, if it judges.

    Raises:
        OSError: a run cannot be copied.
    """
    # A sweep makes the folders of all runs that wait.
    if run.folder.exists() and {*run.folder.iterdir()} - _of_a_run_that_waits(run):
        return
    is_measured = purpose in (Purpose.JUDGE, Purpose.CHOOSE)
    for contest in earlier:
        if is_measured and contest.only_unmeasured:
            continue
        theirs = contest.folder / run.name
        files = [FINISHED, CONFIG, *NEEDED[purpose]]
        if not all((theirs / name).is_file() for name in files):
            continue
        if purpose is Purpose.JUDGE and seed not in contest.seeds:
            continue
        if purpose is Purpose.BEGIN and not complete_checkpoints(theirs / CHECKPOINTS):
            continue
        other = _differences(theirs, run, moved)
        if run.needs:
            other += _differences(contest.folder / run.needs.name, run.needs, moved)
        if other:
            say(f"{run.name} is not taken from {contest.folder}: another {', '.join(other)}")
            continue
        _copy(contest, theirs, run, checkpoints=purpose is Purpose.BEGIN)
        say(f"{run.name} is taken from {contest.folder}")
        return


def _of_a_run_that_waits(run: Run) -> set[Path]:
    return {run.folder / name for name in (CONFIG, START, REVISIONS)}


def _differences(folder: Path, run: Run, moved: Container[str]) -> list[str]:
    """Keys in which the record of a run differs from ``run``, or the record if it is damaged."""
    try:
        return differing_keys(folder / CONFIG, record_of(run.config), moved)
    except (OSError, ValueError, AttributeError):
        return [f"{folder.name}/{CONFIG}"]


def _copy(contest: Earlier, theirs: Path, run: Run, checkpoints: bool) -> None:
    """Copy a run, all or nothing, as what is cut off would pass for a finished run."""
    partial = run.folder.with_name(f"{run.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    left_out = shutil.ignore_patterns(*(() if checkpoints else (CHECKPOINTS,)))
    try:
        shutil.copytree(theirs, partial, ignore=left_out)
    except OSError as error:
        # The first of the files that cannot be copied is named.
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise UserFileError(
            f"--take {contest.folder}: {run.name} cannot be copied ({reason}); mend it, or leave "
            "the folder out"
        ) from None
    if not (partial / TAKEN_FROM).exists():
        (partial / TAKEN_FROM).write_text(contest.name)
    shutil.rmtree(run.folder, ignore_errors=True)
    partial.replace(run.folder)
