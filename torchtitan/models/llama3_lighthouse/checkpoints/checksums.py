"""Checksums of checkpoint files, and writing files whole.

Files of tensors hold a CRC32 of each. The end of such a file tells it from the same file of another
step, because the smallest tensors come last and change with every step.
"""

import hashlib
import json
import os
from pathlib import Path

CHECKSUMS_FILE = ".checksums"
DATA_SUFFIX = ".distcp"
BYTES_OF_THE_END = 64 * 2**10


class FileFault(Exception):
    """A file is not what was written; the message names it."""


def write_checksums(folder: Path, names: tuple[str, ...]) -> None:
    """Put checksums into ``folder``: of the named files, if they are there, and of data files."""
    files = [folder / name for name in names if (folder / name).is_file()]
    sums = {file.name: _sha256(file) for file in [*files, *folder.glob(f"*{DATA_SUFFIX}")]}
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
    """Return ``file`` if it is a regular file or missing. Reading a pipe would wait for ever.

    Raises:
        FileFault: it is something else.
    """
    if file.exists() and not file.is_file():
        raise FileFault(f"{file} is no file")
    return file


def _sha256(file: Path) -> str:
    """SHA-256 of a file; of its end alone if it is a data file."""
    with require_file(file).open("rb") as opened:
        if file.suffix == DATA_SUFFIX:
            size = os.fstat(opened.fileno()).st_size
            opened.seek(max(0, size - BYTES_OF_THE_END))
        return hashlib.file_digest(opened, "sha256").hexdigest()
