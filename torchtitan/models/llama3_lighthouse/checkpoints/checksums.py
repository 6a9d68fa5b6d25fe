"""Checksums of the checkpoint files that have none of their own, and writing files whole."""

import hashlib
import json
import os
from pathlib import Path

CHECKSUMS_FILE = ".checksums"


class FileFault(Exception):
    """A file is not what was written; the message names it."""


def write_checksums(folder: Path, names: tuple[str, ...]) -> None:
    """Put the checksums of the named files, if they are there, into ``folder``."""
    sums = {name: _sha256(folder / name) for name in names if (folder / name).is_file()}
    replace_file(folder / CHECKSUMS_FILE, json.dumps({"sha256": sums}, indent=1) + "\n")


def check_checksum(folder: Path, name: str) -> None:
    """Compare a file with its checksum; torchtitan's own trainer writes none.

    Raises:
        FileFault: they differ, or the checksums cannot be read.
        OSError: a file cannot be read.
    """
    file = folder / CHECKSUMS_FILE
    if not file.exists():
        return
    try:
        expected = json.loads(require_file(file).read_bytes())["sha256"].get(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FileFault(f"{file} has changed since it was written") from None
    if expected is not None and _sha256(folder / name) != expected:
        raise FileFault(f"{folder / name} has changed since it was written")


def replace_file(file: Path, text: str) -> None:
    """Write a file so that it is never there in part."""
    part = file.with_name(f"{file.name}.part")
    with part.open("w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    part.replace(file)


def require_file(file: Path) -> Path:
    """``file``, unless it is a folder, or a pipe, which would be waited for.

    Raises:
        FileFault: it is one.
    """
    if file.exists() and not file.is_file():
        raise FileFault(f"{file} is no file")
    return file


def _sha256(file: Path) -> str:
    return hashlib.sha256(require_file(file).read_bytes()).hexdigest()
