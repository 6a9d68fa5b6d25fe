"""The console command from a configuration to measurements, in processes of its own."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import SMALL, arguments

DEBUG = Path(__file__).parents[2] / "train_configs/debug_cpu.toml"


def lighthouse(*line: object) -> str:
    """Run the command, and return what it printed."""
    command = [sys.executable, "-m", "lighthouse_commands.main", *map(str, line)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_training_and_measuring(tmp_path: Path) -> None:
    settings = {
        **SMALL, "training.steps": 3, "lighthouse.dense_from_step": 2, "checkpoint.interval": 2,
        "validation.enable": True, "validation.seq_len": 512, "validation.local_batch_size": 1,
        "validation.freq": 1, "validation.steps": 2, "job.dump_folder": tmp_path / "run",
    }  # fmt: skip
    overrides = arguments(settings)
    planned = lighthouse("dry-run", DEBUG, "--processes", 2, *overrides)
    assert "2 processes = 2 FSDP" in planned
    log = lighthouse("train", DEBUG, "--processes", 1, *overrides)
    assert "Stage 'dense' begins at step 3 after lighthouse" in log

    checkpoints = [tmp_path / f"run/checkpoint/step-{step}" for step in (2, 3)]
    out = lighthouse("evaluate", "loss", *checkpoints, "--output", tmp_path / "losses",
                     "--device", "cpu", "--first-bucket", 128)  # fmt: skip
    # Standard output is no terminal here, so progress comes in lines.
    assert "run, step 3, dense: 2 of 2 batches, 100% done" in out and "\r" not in out
    with (tmp_path / "losses/losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    logged = {line["step"]: line.get("validation_metrics/loss") for line in lines}
    assert float(rows[-1]["loss"]) == pytest.approx(logged[3], abs=1e-5)

    out = lighthouse("evaluate", "causality", tmp_path / "run", "--output", tmp_path / "causality",
                     "--attention", "dense", "lighthouse", "--device", "cpu", "--batches", 1,
                     "--positions", 2)  # fmt: skip
    record = json.loads((tmp_path / "causality/causality.json").read_text())
    dense, under_lighthouse = record["results"]
    assert (dense["attention"], under_lighthouse["attention"]) == ("dense", "lighthouse")
    # Dense attention sees nothing of later text.
    assert dense["other text"]["difference"] == pytest.approx(0, abs=1e-6)
    assert {"GPU", "torch", "triton", "python", "revision", "date"} <= record.keys()
    assert out.count("| dense |") == 1 and out.count("| lighthouse |") == 1
    assert (tmp_path / "causality/causality.png").stat().st_size > 5_000
