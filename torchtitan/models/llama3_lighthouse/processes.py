"""Processes of a run end with their parents, and only one run at a time uses a folder."""

import ctypes
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from torchtitan.tools.logging import logger

from .errors import UserFileError
from .job_config import JobConfig

# This file in job.dump_folder is locked while a run writes there. Runs leave it behind, unlocked.
LOCK_FILE = "lock"
PR_SET_PDEATHSIG = 1
# A process looks this often whether the one that it serves is there.
SECONDS_BETWEEN_LOOKS = 1.0


def die_with_parent(parent: int | None = None, number: signal.Signals = signal.SIGKILL) -> None:
    """Make this process end with its parent, however that ends. Linux alone can do so.

    The kernel watches the parent's thread that started this process. torchrun starts its processes
    from its main thread.

    Args:
        parent: process id that the parent has to have. If it has another, the parent was gone
            before this call, and the process ends at once.
        number: signal that ends the process.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def serve_parent(_worker: int = 0) -> None:
    """Make this process, which works for its parent, end with it and at its request alone.

    A terminal, torchrun and Slurm signal all processes of a run at once. The trainer needs those
    that read text or write checkpoints for the step that it still takes and saves. Linux alone can
    tell who sent a signal; elsewhere SIGTERM ends the process as always.

    The process has to be one of ``multiprocessing``. ``die_with_parent`` does not fit these: their
    parents may start them from threads that end before they do.

    Args:
        _worker: number of a data loader's worker, not used; torch passes it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    """Wait until the parent has ended or sends SIGTERM, and end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
        if received is not None and received.si_pid == parent.pid:
            break
    # torch's own handler in workers of a data loader ends them with this code too.
    os._exit(0)


def open_locked(path: Path) -> TextIO:
    """Open a file and lock it, until it is closed here and in every process that inherited it.

    filelock cannot be used: it unlocks when it is released, for every process that inherited the
    file, and not only when the last of them closes it.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened, or its file system knows no locks.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def lock_folders(config: JobConfig) -> list[TextIO]:
    """Keep other runs out of ``job.dump_folder``, and of a checkpoint folder that lies elsewhere.

    Returns:
        The files to close at the end; none on ranks other than the first.

    Raises:
        OSError: as ``lock_run``.
    """
    section = config.checkpoint
    dump_folder = Path(config.job.dump_folder)
    locks = [lock_run(dump_folder)]
    checkpoints = Path(os.path.normpath(dump_folder / section.folder))
    elsewhere = not checkpoints.is_relative_to(os.path.normpath(dump_folder))
    if section.enable and not section.load_only and elsewhere:
        # The folder itself must not be made yet: its being there says that there are checkpoints.
        beside = f"{checkpoints.name}.{LOCK_FILE}"
        locks.append(lock_run(checkpoints.parent, beside, "checkpoint.folder"))
    return [lock for lock in locks if lock is not None]


def lock_run(
    folder: str | Path, name: str = LOCK_FILE, key: str = "job.dump_folder"
) -> TextIO | None:
    """Keep other runs out of ``folder`` until the file that this returns is closed.

    The first rank of a run does this for all of them; the others get None. The kernel unlocks the
    folder however the process ends.

    Args:
        name: the file in ``folder`` to lock.
        key: the key of the configuration that names the folder.

    Raises:
        OSError: another run writes there, or nothing can be written there.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    path = Path(folder, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open_locked(path)
    except BlockingIOError:
        holder = path.read_text().strip() or "process unknown"
        raise UserFileError(
            f"{key} = '{folder}' is in use by another run ({holder}); wait until it ends, or pass "
            f"--{key} FOLDER for a folder of its own"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            logger.warning(
                f"The file system of {folder} knows no locks ({error.strerror}): make sure that no "
                "other run writes to this folder"
            )
            return None
        raise UserFileError(
            f"{key} = '{folder}' cannot be written to ({error.strerror}); pass --{key} FOLDER for "
            "another"
        ) from error
    lock.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"process {os.getpid()} on {socket.gethostname()} since {since}", file=lock, flush=True)
    return lock
