"""Processes end with their parents, and one run at a time has a folder."""

import errno
import fcntl
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from torchtitan.models.llama3_lighthouse.errors import UserFileError
from torchtitan.models.llama3_lighthouse.processes import (
    LOCK_FILE,
    die_with_parent,
    lock_run,
    serve_parent,
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone can do so")
FORK = multiprocessing.get_context("fork")


def forked(work: Callable[[], object]) -> int:
    """Fork a process that does ``work`` and then waits for a signal; its process id."""
    process = os.fork()
    if process == 0:
        try:
            work()
            signal.pause()
        finally:
            # Nothing of the tests may run a second time.
            os._exit(1)
    return process


def serve(ready: Connection) -> None:
    serve_parent()
    ready.send(os.getpid())
    time.sleep(100)


def with_a_server(ready: Connection) -> None:
    FORK.Process(target=serve, args=[ready], daemon=True).start()


def with_a_worker(ready: Connection) -> None:
    def work() -> None:
        die_with_parent(parent)
        ready.send(os.getpid())

    parent = os.getpid()
    forked(work)


@on_linux
@pytest.mark.parametrize("start", [with_a_worker, with_a_server])
def test_killing_a_parent_ends_its_child(start: Callable[[Connection], None]) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    parent = forked(lambda: start(sender))
    sender.close()
    receiver.recv()
    assert not select.select([receiver], [], [], 0)[0]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    # The pipe closes when the child, the last that could write to it, is gone.
    assert select.select([receiver], [], [], 10)[0]
    with pytest.raises(EOFError):
        receiver.recv()


@on_linux
def test_process_whose_parent_is_gone_already_ends_at_once() -> None:
    process = forked(lambda: die_with_parent(parent=os.getpid()))
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


@on_linux
def test_servant_heeds_the_signals_of_its_parent_alone() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = FORK.Process(target=serve, args=[sender], daemon=True)
    process.start()
    receiver.recv()
    for number in ("TERM", "INT", "TERM"):
        subprocess.run(["kill", f"-{number}", str(process.pid)], check=True)
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    assert process.exitcode == 0


def test_second_run_on_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lock = lock_run(folder)
    assert lock is not None
    with pytest.raises(UserFileError) as refusal:
        lock_run(folder)
    message = str(refusal.value)
    assert message.startswith(f"job.dump_folder = '{folder}' is in use by another run (process ")
    assert f"process {os.getpid()} on {socket.gethostname()} since 20" in message
    assert "--job.dump_folder FOLDER" in message
    lock.close()
    again = lock_run(folder)
    assert again is not None
    again.close()
    assert (folder / LOCK_FILE).read_text().count("\n") == 1


def test_kernel_unlocks_the_folder_of_a_killed_run(tmp_path: Path) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    held = []
    process = forked(lambda: (held.append(lock_run(tmp_path)), sender.send(0)))
    receiver.recv()
    with pytest.raises(UserFileError, match=f"process {process} on "):
        lock_run(tmp_path)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    lock = lock_run(tmp_path)
    assert lock is not None
    lock.close()


def test_first_rank_locks_for_all(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert lock_run(tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserFileError, match=r"file/run' cannot be written to .*--job\.dump_folder"):
        lock_run(tmp_path / "file/run")


def test_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch, caplog) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert lock_run(tmp_path) is None
    assert "knows no locks (No locks available)" in caplog.text
