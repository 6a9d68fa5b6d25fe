"""``lighthouse train`` as a process: how it ends when training does not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from launch import DEBUG, TRAINED, Run, arguments

from torchtitan.models.llama3_lighthouse.metrics import LOSS, METRICS_FILE
from torchtitan.models.llama3_lighthouse.processes import lock_run
from torchtitan.models.llama3_lighthouse.studies.sweeps import read_metrics


def start(tmp_path: Path, processes: int, settings: dict, *options: str) -> subprocess.Popen:
    line = arguments({"job.dump_folder": tmp_path / "run", **TRAINED, **DEBUG, **settings})
    config = tmp_path / "run.toml"
    config.write_text("")
    train = ["-m", "lighthouse_commands.main", "train", str(config), "--no-check"]
    return subprocess.Popen(
        [sys.executable, *train, "--processes", str(processes), *options, *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As many as in other tests' runs, so that losses are the same bits.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_mistake_that_training_finds_ends_in_one_line(tmp_path: Path, processes: int) -> None:
    """All processes find it, and one line is printed. One said before that no GPU is there."""
    settings = {
        "training.dataset": "c4_local", "training.dataset_path": tmp_path / "none",
        "training.seq_len": 2**18,
    }  # fmt: skip
    process = start(tmp_path, processes, settings)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    started, *warned = out.splitlines()
    assert started == f"starting {processes} training process{'es' if processes > 1 else ''}"
    if not torch.cuda.is_available():
        (warning,) = warned
        assert "torch sees no GPU, and a CPU needs minutes or hours for a step" in warning
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
    # torch knows this backend, which is not installed.
    process = start(tmp_path, 2, {"compile.enable": True, "compile.backend": "tvm"})
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" in errors and "Root Cause" in errors


def wait_for_steps(process: subprocess.Popen, folder: Path, steps: int) -> None:
    """Wait until a run has logged ``steps`` more steps than before."""
    deadline = time.monotonic() + 200
    while not ((folder / METRICS_FILE).exists() and max(read_metrics(folder), default=0) >= steps):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def losses(folder: Path) -> dict[int, float]:
    """The exact loss of every step."""
    return {step: line[LOSS] for step, line in read_metrics(folder).items()}


LONG = {**DEBUG, "training.steps": 12, "checkpoint.interval": 100}


@pytest.mark.parametrize(
    ("processes", "number"),
    [
        (1, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_preempted_run_loses_no_step(
    tmp_path: Path, processes: int, number: signal.Signals
) -> None:
    """It ends with a code for schedulers, and goes on bit for bit as if it had not stopped."""
    process = start(tmp_path, processes, LONG)
    wait_for_steps(process, tmp_path / "run", random.randrange(2, 5))
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= processes
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    step = max(read_metrics(tmp_path / "run"))
    assert process.returncode == 75, errors
    folder = tmp_path / f"run/checkpoint/step-{step}"
    assert (folder / ".metadata").is_file()
    # With several processes on a CPU, torchtitan warns once before.
    asked, ended = errors.splitlines()[-2:]
    assert asked.startswith(f"{number.name}: processes save after the step under way, for ")
    assert ended == f"stopped by SIGTERM: saved step {step} in {folder}; the same command goes on"
    assert not psutil.wait_procs(workers, timeout=10)[1]

    Run(tmp_path, {**LONG, "job.dump_folder": tmp_path / "run"}, processes).succeed()
    (tmp_path / "straight").mkdir()
    Run(tmp_path / "straight", LONG, processes).succeed()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight/dump")
    assert list(losses(tmp_path / "run")) == list(range(1, 13))


@pytest.mark.slow
def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, 1, {"training.steps": 100000})
    wait_for_steps(process, tmp_path / "run", 2)
    (worker,) = psutil.Process(process.pid).children()
    # A process that stands still cannot save.
    worker.suspend()
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == (
        "stopped by SIGTERM twice, without saving; the same command goes on from the last "
        "checkpoint, if one was saved"
    )


@pytest.mark.slow
def test_time_to_save_ends(tmp_path: Path) -> None:
    process = start(tmp_path, 1, {"training.steps": 100000}, "--grace", "2")
    wait_for_steps(process, tmp_path / "run", 2)
    (worker,) = psutil.Process(process.pid).children()
    worker.suspend()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM and not saved within --grace 2 s; " in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_the_first_step_stops_every_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, 2, {"training.steps": 100000})
    deadline = time.monotonic() + 200
    while len(workers := psutil.Process(process.pid).children(recursive=True)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == (
        f"stopped by {number.name}; the same command goes on from the last checkpoint, if one was "
        "saved"
    )
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"checkpoint.async_mode": "async", "checkpoint.interval": 2},
    {"training.dataloader.num_workers": 1},
])  # fmt: skip
def test_workers_die_with_their_launcher(tmp_path: Path, settings: dict) -> None:
    process = start(tmp_path, 2, {"training.steps": 100000, **settings})
    wait_for_steps(process, tmp_path / "run", 4)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=10)
    assert not psutil.wait_procs(workers, timeout=10)[1]
    lock = lock_run(tmp_path / "run")
    assert lock is not None
    lock.close()


@pytest.mark.slow
def test_reader_of_text_outlives_a_signal_to_all_processes(tmp_path: Path) -> None:
    """Slurm signals every process of a step; the launcher passes the signal on besides."""
    process = start(tmp_path, 2, {"training.steps": 100000, "training.dataloader.num_workers": 1})
    wait_for_steps(process, tmp_path / "run", 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 4
    for each in (*workers, process):
        each.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.slow
def test_crash_after_a_signal_ends_all_processes(tmp_path: Path) -> None:
    process = start(tmp_path, 2, {"training.steps": 100000})
    wait_for_steps(process, tmp_path / "run", 2)
    workers = psutil.Process(process.pid).children()
    workers[0].suspend()
    process.send_signal(signal.SIGTERM)
    workers[1].kill()
    process.communicate(timeout=100)
    assert process.returncode == 1
    assert not psutil.wait_procs(workers, timeout=10)[1]
