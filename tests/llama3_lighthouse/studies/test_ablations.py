"""Sweeps over a grid: refusals, resumes, tables and plots."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import exit_code_of

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.studies import ablations
from torchtitan.models.llama3_lighthouse.studies.ablation_results import read_metrics

ROOT = Path(__file__).parents[3]
DEBUG = ROOT / "train_configs/debug_cpu.toml"
GRID = f"""
config = "{DEBUG}"
[fixed]
training.seq_len = 2048
training.steps = 10
lighthouse.dense_from_step = 6
[[grid]]
lighthouse.top_k = [64, 128, 256]
[[grid]]
lighthouse.dense_from_step = [0]
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch, capsys):
    """Run the command on a grid; return what it printed and its exit code or message."""
    path = tmp_path / "grid.toml"

    def run(grid: str, *line: str) -> tuple[str, int | str | None]:
        path.write_text(grid)
        argv = ["lighthouse", "ablations", path, "--output", tmp_path / "out", *line]
        code = exit_code_of(main, monkeypatch, *argv)
        return capsys.readouterr().out, code

    return run


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("config = ", "grid.toml is not TOML"),
        ("[grid]\nlighthouse.top_k = [64]", "must hold config = "),
        ('config = "none.toml"\n[grid]\nlighthouse.top_k = [64]', "'none.toml' is no file"),
        (f'config = "{DEBUG}"\n[grid]', "[grid] is missing or empty"),
        (f'config = "{DEBUG}"', "[grid] is missing or empty"),
        (f'config = "{DEBUG}"\ngrid = 3', "grid must be tables"),
        (f'config = "{DEBUG}"\ngrid = [3]', "grid must be tables"),
        (f'config = "{DEBUG}"\ngrid = []', "[grid] is missing or empty"),
        (f'config = "{DEBUG}"\nfixed = 3\n[grid]\nlighthouse.top_k = [64]', "must be tables"),
        (f'config = "{DEBUG}"\n[grid]\nlighthous.top_k = [64]', "did you mean 'lighthouse'?"),
        (f'config = "{DEBUG}"\n[grid]\nlighthouse.top_k = 64', "must be a list of values, got 64"),
        (f'config = "{DEBUG}"\n[grid]\nlighthouse.top_k = []', "must be a list of values"),
        (f'config = "{DEBUG}"\n[grid]\nlighthouse.topk = [64]', "did you mean 'top_k'?"),
        (f'config = "{DEBUG}"\n[grid]\ntop_k = [64]', "'top_k' names no section"),
        (f'config = "{DEBUG}"\n[fixed]\nlighthouse.level = 2\n[grid]\nlighthouse.top_k = [64]',
         "did you mean 'levels'?"),
        (f'config = "{DEBUG}"\n[grid]\nlighthouse.top_k = ["many"]', "lighthouse.top_k = 'many'"),
        (f'config = "{DEBUG}"\n[grid]\nlighthouse.top_k = [64, 64]', "are the same configuration"),
        (f'config = "{DEBUG}"\n[fixed]\nlighthouse.top_k = 64\n[grid]\nlighthouse.top_k = [64]',
         "is in [fixed] and in every [grid]"),
    ],
)  # fmt: skip
def test_a_bad_grid_ends_in_one_line(call, grid: str, message: str) -> None:
    _, line = call(grid)
    assert message in line and "\n" not in line


def test_a_missing_grid_and_an_overridden_one_end_in_one_line(call, tmp_path, monkeypatch) -> None:
    _, line = call(GRID, "--lighthouse.top_k", "64")
    assert "--lighthouse.top_k would override" in line
    _, line = call(GRID, "--lighthouse.top-k", "64")
    assert "--lighthouse.top_k would override" in line
    with pytest.raises(SystemExit, match="no such grid: .*none.toml; pass a TOML file"):
        main(["ablations", str(tmp_path / "none.toml")])


def entries(config, first: int, speed: float) -> str:
    """Log lines of a run from step ``first`` on, in the form of the trainer's metrics.jsonl."""
    lines = []
    for step in range(first, config.training.steps + 1):
        lighthouse = step <= config.lighthouse.dense_from_step
        lines.append({
            "step": step, "loss_metrics/global_avg_loss": 10.0 - step,
            "throughput(tps)": speed * (2 if lighthouse else 1),
            "memory/max_reserved(GiB)": 1.0 + step, "lighthouse/stage": float(lighthouse),
        })  # fmt: skip
        if lighthouse and step % 3 == 0:
            lines.append({"step": step, "selection/level_1/overlap": step / 10})
    lines.append({"step": step, "validation_metrics/loss": 1.25})
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_logs_that_cannot_tell_dense_steps_are_refused(call) -> None:
    grid = GRID.replace("[fixed]", "[fixed]\nlighthouse.dense_every = 5\nmetrics.log_freq = 5")
    out, _ = call(grid, "--list")
    assert "metrics.log_freq = 5 logs too few or too many of the dense steps" in out


def test_an_interrupted_sweep_goes_on_and_repeats_nothing(call, tmp_path, monkeypatch) -> None:
    trained = []

    def train(run, processes, title, environment, lock):
        trained.append(run.name)
        metrics = run.folder / "metrics.jsonl"
        if run.name == "top_k=128" and not metrics.exists():
            # Crashes in the middle of a line, having seen a step that it will take again.
            metrics.write_text(entries(run.config, 1, 5.0).replace("10.0", "99.0")[:900])
            raise KeyboardInterrupt
        if run.name == "dense_from_step=0" and trained.count(run.name) == 1:
            (run.folder / "log.txt").write_text("[rank0]: - ERROR - ValueError: no text\n")
            return 1
        with metrics.open("a") as file:
            file.write("\n" + entries(run.config, 1, 100.0))
        return 0

    monkeypatch.setattr(ablations, "train", train)
    out, code = call(GRID)
    assert code == 130
    assert "skipping top_k=256: training.seq_len = 2048 does not fit" in out
    assert trained == ["top_k=64", "top_k=128"]
    assert "| top_k=64 |" in (tmp_path / "out/results.md").read_text()

    out, code = call(GRID)
    assert "3 runs, 1 of them finished earlier" in out
    assert trained[2:] == ["top_k=128", "dense_from_step=0"]
    assert code == "Error: 1 of 3 runs failed: dense_from_step=0"
    out, code = call(GRID)
    assert code is None and trained[4:] == ["dense_from_step=0"]

    with (tmp_path / "out/results.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["top_k=64", "top_k=128", "dense_from_step=0"]
    row = rows["top_k=128"]
    assert {key: float(row[key]) for key in row if row[key] and key != "run"} == {
        "lighthouse.top_k": 128, "lighthouse.dense_from_step": 6, "final loss": 0.0,
        "held-out loss": 1.25, "loss, Lighthouse stage": 4.0,
        # Six steps at 200 tokens a second and four at 100.
        "tokens/s": round(10 / (6 / 200 + 4 / 100)), "tokens/s, Lighthouse": 200,
        "tokens/s, dense": 100, "peak memory, GiB": 11.0,
        "S": 2048 // 16 + 2 * 4 * 128, "N/S": 2048 / 1152, "overlap, level 1": 0.6,
    }  # fmt: skip
    dense = rows["dense_from_step=0"]
    assert dense["tokens/s"] == dense["tokens/s, dense"] == "100"
    assert not any(dense[key] for key in ("lighthouse.top_k", "S", "N/S", "overlap, level 1"))
    text = (tmp_path / "out/results.md").read_text()
    assert "| run | top_k | dense_from_step | final loss |" in text
    assert text.count("| dense_from_step=0 |") == 1
    for name in ("loss_curves.png", "loss_and_throughput.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000

    # A version that did not know the key wrote such a record.
    record = tmp_path / "out/top_k=64/config.json"
    settings = json.loads(record.read_text())
    del settings["lighthouse"]["dense_every"]
    record.write_text(json.dumps(settings))
    call(GRID)
    assert len(trained) == 5
    _, line = call(GRID.replace("steps = 10", "steps = 11"))
    assert "holds a run with another training.steps; pass --output FOLDER" in line
    with (tmp_path / "out/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by another sweep" in call(GRID)[1]
    assert len(trained) == 5


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_debug_grid_from_end_to_end(tmp_path: Path, stop: int) -> None:
    """Two runs of the debug grid, the second stopped half way; nothing it started lives on."""
    grid = tmp_path / "grid.toml"
    text = (ROOT / "train_configs/ablations/debug.toml").read_text()
    text = text.replace("../debug_cpu.toml", str(DEBUG)).replace("[64, 128, 256]", "[64]")
    grid.write_text(text.replace('["norm", "dilated", "gla"]', '["dilated", "gla"]'))
    command = [sys.executable, "-m", "lighthouse_commands.main", "ablations", grid]
    command += ["--output", tmp_path / "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # In a shell's background job, children ignore what Ctrl-C sends.
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    first = subprocess.Popen(command, env=environment, preexec_fn=restore)
    interrupted = tmp_path / "out/scorer=gla,top_k=64"
    deadline = time.monotonic() + 500
    while not (interrupted / "checkpoint/step-4/.metadata").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(stop)
    assert first.wait(60) == (130 if stop == signal.SIGINT else -stop)
    # The run holds the lock until it has ended.
    with (tmp_path / "out/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert max(read_metrics(interrupted)) < 12

    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "2 runs, 1 of them finished earlier" in done.stdout
    log = (interrupted / "log.txt").read_text()
    assert log.count("starting 1 training process") == 2
    assert log.count("Goes on from") == 1
    with (tmp_path / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["lighthouse.scorer"] for row in rows] == ["dilated", "gla"]
    for row in rows:
        assert float(row["N/S"]) == 2048 / (128 + 2 * 4 * 64)
        assert 0 < float(row["overlap, level 1"]) <= 1
    assert (tmp_path / "out/loss_and_throughput.png").exists()
