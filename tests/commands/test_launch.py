"""``lighthouse train`` as a process: how it ends when training does not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import SMALL, arguments


def start(tmp_path: Path, processes: int, settings: dict) -> subprocess.Popen:
    line = arguments({"job.dump_folder": tmp_path / "run", **SMALL, **settings})
    config = tmp_path / "run.toml"
    config.write_text("")
    train = ["-m", "lighthouse_commands.main", "train", str(config), "--no-check"]
    return subprocess.Popen(
        [sys.executable, *train, "--processes", str(processes), *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_mistake_that_training_finds_ends_in_one_line(tmp_path: Path, processes: int) -> None:
    """All processes find it, and one line is printed."""
    settings = {"training.dataset": "c4_local", "training.dataset_path": tmp_path / "none"}
    process = start(tmp_path, processes, settings)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert out == f"starting {processes} training process{'es' if processes > 1 else ''}\n"
    (line,) = errors.splitlines()
    assert line.startswith("Error: training.dataset_path = '") and "is not a folder" in line


@pytest.mark.slow
def test_mistake_that_one_process_finds_ends_in_one_line(tmp_path: Path) -> None:
    """The other process loses its peer, and does not say so."""
    folder = tmp_path / "text"
    folder.mkdir()
    good = '{"text": "' + "word " * 2000 + '"}\n'
    (folder / "train-0.jsonl").write_text(good * 4)
    (folder / "train-1.jsonl").write_text('{"text": null}\n' + good * 3)
    settings = {"training.dataset": "c4_local", "training.dataset_path": folder}
    process = start(tmp_path, 2, settings)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("Error: ") and "line 1 of" in line and "train-1.jsonl" in line


@pytest.mark.slow
def test_crash_keeps_its_report(tmp_path: Path) -> None:
    process = start(tmp_path, 2, {"compile.enable": True, "compile.backend": "none of torch's"})
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" in errors and "Root Cause" in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_every_process(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, 2, {"training.steps": 100000, "training.seq_len": 1024})
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == (
        f"stopped by {number.name}; the same command goes on from the last checkpoint"
    )
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
