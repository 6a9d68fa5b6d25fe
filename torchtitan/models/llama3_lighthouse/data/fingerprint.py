"""The fingerprint of files by their contents, hashed once and kept in the user's cache.

The cache is a JSON file for each folder of text, in ``$XDG_CACHE_HOME/lighthouse`` or
``~/.cache/lighthouse``. A hash in it counts as long as size, inode and times of its file are the
same. ``touch`` and ``cp -p`` can set back the time of the last write, but not that of the last
change (ctime).
"""

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path

from torchtitan.tools.logging import logger

from ..errors import UserFileError

# Fingerprints by contents begin so. Those of older versions have no such word.
BY_CONTENT = "content:"
BYTES_AT_ONCE = 4 * 2**20
MOST_THREADS = 8
SECONDS_BETWEEN_MESSAGES = 10.0
# A file that changed this shortly before it was read might change again within the same tick of
# its file system's clock, so its hash is not kept.
SECONDS_TO_SETTLE = 2.0

# Size in bytes, times of the last write and of the last change in nanoseconds, and inode.
State = list[int]


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal; names of files may hold bytes that are no text."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def contents_fingerprint(folder: str, kind: str, paths: Sequence[str]) -> str:
    """A hash of the contents of files in their order, which no name and no time is part of.

    Processes of one machine that ask at the same time share the work: the first one reads, and the
    others wait for its cache.

    Args:
        folder: the folder of the files, which has a cache of its own.
        kind: the reader of the files.

    Raises:
        OSError: a file cannot be read, or changes meanwhile.
    """
    cache = cache_folder() / f"{digest(os.path.realpath(folder))[:32]}.json"
    known = _fitting(_read(cache), paths)
    if len(known) < len(paths):
        with _alone(cache):
            # Another process may have read the files while this one waited.
            known = _fitting(_read(cache), paths)
            if len(known) < len(paths):
                return _joined(kind, paths, _hash_rest(paths, known, cache))
    return _joined(kind, paths, {path: entry[-1] for path, entry in known.items()})


def _joined(kind: str, paths: Sequence[str], hashes: dict[str, str]) -> str:
    return BY_CONTENT + digest(json.dumps([kind, *(hashes[path] for path in paths)]))


def cache_folder() -> Path:
    """The folder for what can be computed again."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The standard for this variable tells to ignore paths that are not absolute.
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "lighthouse")


def _hash_rest(paths: Sequence[str], known: dict[str, list], cache: Path) -> dict[str, str]:
    """Hash the files that have no entry in ``known``, and keep all hashes; path -> hash."""
    start = time.time()
    states, hashes = _hash_files([path for path in paths if path not in known])
    settled = (start - SECONDS_TO_SETTLE) * 1e9
    entries = {
        path: [*states[path], hashed]
        for path, hashed in hashes.items()
        if states[path][2] < settled
    } | known
    try:
        if entries:
            _write(cache, entries)
    except OSError as error:
        logger.warning(
            f"The text's hashes cannot be kept in {cache} ({error.strerror}), so that every start "
            "reads the whole text; set XDG_CACHE_HOME to a folder that can be written"
        )
    return {path: entry[-1] for path, entry in known.items()} | hashes


def _hash_files(paths: list[str]) -> tuple[dict[str, State], dict[str, str]]:
    """States and hashes by path; the log shows how far the reading is."""
    progress = _Progress(paths)
    states, hashes = {}, {}
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        left = {pool.submit(_hash_file, path, progress) for path in paths}
        try:
            while left:
                done, left = wait(left, SECONDS_BETWEEN_MESSAGES, FIRST_EXCEPTION)
                for each in done:
                    path, state, hashed = each.result()
                    states[path], hashes[path] = state, hashed
                if left:
                    progress.tell()
        except BaseException:
            progress.stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    return states, hashes


class _Progress:
    """Bytes read so far, counted by several threads."""

    def __init__(self, paths: list[str]) -> None:
        self.stopped = False
        self._whole = sum(_state(path)[0] for path in paths)
        self._read = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._read += count

    def tell(self) -> None:
        share = self._read / max(self._whole, 1)
        logger.info(
            f"Reading the training text once, to know it again at a resume: "
            f"{self._read / 1e9:,.1f} of {self._whole / 1e9:,.1f} GB ({share:.0%})"
        )


def _hash_file(path: str, progress: _Progress) -> tuple[str, State, str]:
    """Path, state and hash of a file.

    Raises:
        OSError: it cannot be read, or changes meanwhile.
    """
    hashed, before = hashlib.sha256(), _state(path)
    try:
        with open(path, "rb", buffering=0) as file:
            while not progress.stopped and (chunk := file.read(BYTES_AT_ONCE)):
                hashed.update(chunk)
                progress.add(len(chunk))
    except OSError as error:
        raise _unreadable(path, error) from None
    if _state(path) != before:
        raise UserFileError(f"{path} changes while it is read; wait until it is complete")
    return path, before, hashed.hexdigest()


def _state(path: str) -> State:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _unreadable(path: str, error: OSError) -> UserFileError:
    return UserFileError(f"{path} cannot be read: {error.strerror}; restore it, or move it away")


def _fitting(entries: dict[str, list], paths: Sequence[str]) -> dict[str, list]:
    """The entries of files that are as they were when they were hashed."""
    return {path: entries[path] for path in paths if entries.get(path, [])[:-1] == _state(path)}


def _read(cache: Path) -> dict[str, list]:
    """Path -> state and hash; nothing if the cache is not there or is damaged."""
    try:
        entries = json.loads(cache.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        path: entry
        for path, entry in entries.items()
        if isinstance(entry, list) and entry and isinstance(entry[-1], str)
    }


def _write(cache: Path, entries: dict[str, list]) -> None:
    """Write the cache in one go: other processes see the old one or the new one."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
        try:
            json.dump(entries, file)
            file.close()
            os.replace(file.name, cache)
        except BaseException:
            os.unlink(file.name)
            raise


@contextmanager
def _alone(cache: Path) -> Generator[None]:
    """Keep other processes of this user out, where the cache's file system can do that."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        lock = open(cache.with_suffix(".lock"), "w")
    # Each process then reads for itself.
    except OSError:
        yield
        return
    with lock:
        try:
            flock(lock, LOCK_EX)
        except OSError as error:
            logger.warning(f"{lock.name} cannot be locked ({error.strerror})")
        yield
