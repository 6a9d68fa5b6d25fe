"""Parts that all reports share: tables, progress and the environment's record."""

import csv
import subprocess
import sys
import time

import pytest

from torchtitan.models.llama3_lighthouse import environment as environment_module
from torchtitan.models.llama3_lighthouse.environment import environment, git_revision
from torchtitan.models.llama3_lighthouse.evaluation import progress
from torchtitan.models.llama3_lighthouse.evaluation.inference import checked_device
from torchtitan.models.llama3_lighthouse.evaluation.tables import markdown, write_csv


def test_csv_keeps_every_digit_and_whole_numbers_whole(tmp_path) -> None:
    rows = [
        {"run": "a, b", "steps": 3, "loss": 0.1 + 0.2, "done": True},
        {"run": "c", "steps": None, "loss": 1e-17, "tokens": 2**60 + 1},
    ]
    write_csv(rows, tmp_path / "all.csv")
    with (tmp_path / "all.csv").open() as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["run", "steps", "loss", "done", "tokens"]
    assert [row["steps"] for row in found] == ["3", ""]
    assert [float(row["loss"]) for row in found] == [0.1 + 0.2, 1e-17]
    assert found[0]["done"] == "True" and found[1]["done"] == ""
    assert [row["tokens"] for row in found] == ["", str(2**60 + 1)]
    assert found[0]["run"] == "a, b"
    write_csv(rows, tmp_path / "some.csv", ["loss", "run"])
    assert (tmp_path / "some.csv").read_text().splitlines()[0] == "loss,run"


def test_markdown_is_rounded_for_reading() -> None:
    rows = [
        {"lighthouse.top_k": 1536, "loss": 1.23456},
        {"loss": 123.456, "lighthouse.top_k": None},
    ]
    assert markdown(rows, ["lighthouse.top_k", "loss"]) == (
        "| top_k | loss |\n| --- | --- |\n| 1,536 | 1.2346 |\n|  | 123.5 |\n"
    )


def test_progress_in_a_log_file_is_lines(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    with progress.Progress("run", 4, "steps") as bar:
        for step in range(1, 5):
            bar.advance(1, f"loss {step}")
            if step == 2:
                progress.say("between")
                time.sleep(0.06)
    lines = capsys.readouterr().out
    assert "\r" not in lines
    first, shown, last = lines.splitlines()
    assert first == "between"
    assert shown.startswith("run: 3 of 4 steps, 75% done, ") and shown.endswith("left, loss 3")
    assert last.startswith("run: 4 of 4 steps, 100% done, ")
    with progress.Progress("run", None, "batches") as bar:
        bar.advance(1, "loss 1")
    assert capsys.readouterr().out == "run: 1 batches, 00:00 passed, loss 1\n"
    with progress.Progress("failed", 4, "steps"):
        pass
    assert capsys.readouterr().out == ""


def test_environment_names_what_a_record_needs() -> None:
    record = environment("abc")
    versions = ["torch", "triton", "flash-attn-4", "cudnn", "python"]
    assert list(record) == ["GPU", *versions, "revision", "date"]
    assert record["revision"] == "abc"
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))


def test_revision_is_that_of_the_checkout_that_tracks_the_file(tmp_path, monkeypatch) -> None:
    """A copy installed inside another project's checkout must not record that one's revision."""

    def git(*line: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *line]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()

    file = tmp_path / "environment.py"
    file.touch()
    monkeypatch.setattr(environment_module, "__file__", str(file))
    assert git_revision() is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert git_revision() is None
    git("add", "environment.py")
    git("commit", "-q", "-m", "second")
    assert git_revision() == git("rev-parse", "--short", "HEAD")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() is None


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(
        ValueError, match=f"--device {device} is not known; use cpu, cuda or cuda:N"
    ):
        checked_device(device)


def test_a_gpu_is_taken_if_there_is_one(monkeypatch) -> None:
    import torch

    for available, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert checked_device(None) == device
    assert checked_device("cpu") == "cpu"
