"""Damage to checkpoints: training, evaluation and export must refuse it or be none the wiser."""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from .cases import Bad, Case, Result, check_finished, clear
from .readings import READINGS
from .references import DAMAGED, OLDER, Reference, logged
from .runs import End, Launch, command

COUNT = 100
SET_ASIDE = "--checkpoint.set_damaged_aside"
# All but one of the damages are to a file of the folder.
Damage = Callable[[Path, random.Random, Path], str]


def flip(file: Path, draw: random.Random, older: Path) -> str:
    content = bytearray(file.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit} of {file.name} flipped"


def zeros(file: Path, draw: random.Random, older: Path) -> str:
    size = file.stat().st_size
    start = draw.randrange(max(1, size // 4096)) * 4096
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(bytes(min(4096, size - start)))
    return f"zeros in {file.name} from byte {start}"


def truncate(file: Path, draw: random.Random, older: Path) -> str:
    size = draw.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"{file.name} cut to {size} bytes"


def empty(file: Path, draw: random.Random, older: Path) -> str:
    os.truncate(file, 0)
    return f"{file.name} emptied"


def missing(file: Path, draw: random.Random, older: Path) -> str:
    file.unlink()
    return f"{file.name} removed"


def swap(file: Path, draw: random.Random, older: Path) -> str:
    other, kept = older / file.name, file.with_name("kept")
    file.rename(kept)
    other.rename(file)
    kept.rename(other)
    return f"{file.name} of two steps swapped"


def unreadable(file: Path, draw: random.Random, older: Path) -> str:
    """Permissions do not stop root; a folder in the file's place stops everyone."""
    file.unlink()
    file.mkdir()
    return f"{file.name} is a folder"


def renamed(file: Path, draw: random.Random, older: Path) -> str:
    folder = file.parent
    name = draw.choice((f"{folder.name}.bad", f"backup-{folder.name}", f"{folder.name}-old"))
    folder.rename(folder.with_name(name))
    return f"{folder.name} renamed to {name}"


def copied(file: Path, draw: random.Random, older: Path) -> str:
    """Both folders lose the files that ``cp step-N/*`` leaves out."""
    both = draw.random() < 0.5
    for folder in (file.parent, older) if both else (file.parent,):
        for hidden in folder.glob(".*"):
            hidden.unlink()
    return f"copied without hidden files: {'both steps' if both else file.parent.name}"


def emptied(file: Path, draw: random.Random, older: Path) -> str:
    for each in file.parent.iterdir():
        each.unlink()
    return f"{file.parent.name} emptied"


def stray(file: Path, draw: random.Random, older: Path) -> str:
    """Things beside the checkpoints whose names are close to a checkpoint's."""
    folder = file.parent.parent
    name = draw.choice(("step-14", "step-014", "step-14.bad", "backup-step-14", "step-", "step-x"))
    if draw.random() < 0.5:
        (folder / name).write_text("a file")
    else:
        (folder / name).mkdir()
    return f"a stray {name}"


ON_FILES: tuple[Damage, ...] = (flip, flip, flip, zeros, truncate, empty, missing, swap, unreadable)
ON_FOLDERS: tuple[Damage, ...] = (renamed, copied, emptied, stray)


def corrupt(case: Case) -> Result:
    """Damage the newest of two checkpoints; then train on, evaluate and export."""
    draw = case.random
    processes = draw.choice((1, 1, 2))
    reference = case.world.references[f"forked {processes}"]
    newest, older = take_two(case, reference)
    files = sorted(newest.iterdir())
    # Most bytes are weights and moments.
    large = [file for file in files if file.suffix == ".distcp"]
    file = draw.choice(large if draw.random() < 0.5 else files)
    damage = draw.choice(ON_FILES if draw.random() < 0.85 else ON_FOLDERS)
    tried = damage(file, draw, older)
    try:
        found = [
            *(_read(newest, case, reference, reading) for reading in READINGS),
            _train_on(case, reference, tried),
        ]
    except Bad as bad:
        return Result(bad.outcome, tried, bad.found)
    outcome = "refused" if "refused" in found else "harmless"
    return Result(outcome, tried, f"readings and training: {', '.join(found)}")


def take_two(case: Case, reference: Reference) -> tuple[Path, Path]:
    """Copies of two checkpoints of a run that was stopped after the newer one."""
    folder = case.dump / "checkpoint"
    for step in (OLDER, DAMAGED):
        shutil.copytree(reference.checkpoint(step), folder / f"step-{step}")
    lines = (reference.folder / "dump" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (case.dump / "metrics.jsonl").write_text("".join(lines[:DAMAGED]))
    return folder / f"step-{DAMAGED}", folder / f"step-{OLDER}"


def _read(
    newest: Path,
    case: Case,
    reference: Reference,
    reading: Callable[[Path, Path], tuple[End, str]],
) -> str:
    """Refused or harmless, or it raises Bad."""
    whole = not newest.exists()
    end, digest = reading(case.dump if whole else newest, case.folder)
    clear(end, reading.__name__)
    if end.code:
        named(end, case, reading.__name__)
        return "refused"
    allowed = {reference.digests[DAMAGED][reading.__name__]}
    if whole:
        allowed.add(reference.digests[OLDER][reading.__name__])
    if digest not in allowed:
        raise Bad("silent", f"{reading.__name__} took other weights than were saved")
    return "harmless"


def named(end: End, case: Case, doing: str) -> None:
    """Check that a refusal names a folder or a file."""
    if str(case.dump) not in end.message:
        raise Bad("traceback", f"{doing} names no folder or file: {end.message or end.log[-500:]}")


def _train_on(case: Case, reference: Reference, tried: str) -> str:
    """Refused or harmless, or it raises Bad."""
    held = contents(case.dump)
    line = command(case.dump, case.world.text)
    end = clear(Launch(line, case.folder, reference.processes).wait(), "restart")
    refused = end.code != 0
    if refused:
        named(end, case, "restart")
        _check_kept(held, case.dump)
        if SET_ASIDE not in end.message:
            return "refused"
        end = clear(Launch([*line, SET_ASIDE], case.folder, reference.processes).wait(), SET_ASIDE)
        # Both of two swapped files are damage.
        if end.code and "no older checkpoint" in end.message and "swapped" in tried:
            return "refused"
        if end.code:
            raise Bad("lost", f"{SET_ASIDE} does not go on: {end.message or end.log[-900:]}")
    new = logged(case.dump)[DAMAGED:]
    if new and new[0][0] <= DAMAGED:
        _check_kept(held, case.dump)
    check_finished(case, reference, DAMAGED, 0)
    return "refused" if refused else "harmless"


def contents(dump: Path) -> dict[str, str]:
    """Files of the checkpoints by a digest of what they hold; empty ones hold nothing."""
    files = [file for file in (dump / "checkpoint").rglob("*") if file.is_file()]
    return {
        hashlib.sha256(file.read_bytes()).hexdigest(): str(file.relative_to(dump))
        for file in files
        if file.stat().st_size and f"step-{DAMAGED}" in str(file)
    }


def _check_kept(held: dict[str, str], dump: Path) -> None:
    """Check that what lay in the newest folder still lies somewhere."""
    files = [file for file in dump.rglob("*") if file.is_file()]
    now = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    if gone := sorted(held[digest] for digest in held.keys() - now):
        raise Bad("lost", f"overwritten or removed: {', '.join(gone)}")
