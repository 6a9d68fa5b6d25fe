"""What tests of studies share."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from contest_cases import DEBUG, write_logs
from launch import exit_code_of
from pages import ROOT

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.data.text_sources import SOURCES
from torchtitan.models.llama3_lighthouse.studies import contest as contests
from torchtitan.models.llama3_lighthouse.studies.contest_measures import Number, write_numbers
from torchtitan.models.llama3_lighthouse.studies.contest_plan import last_checkpoint

read_once = functools.cache(SOURCES["python_stdlib"])


@pytest.fixture(autouse=True)
def library_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command reads the standard library, which does not change."""
    monkeypatch.setitem(SOURCES, "python_stdlib", read_once)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of the debug contest that may be edited."""
    text = DEBUG.read_text().replace("../debug", f"{ROOT}/train_configs/debug")
    (tmp_path / "contest.toml").write_text(text)
    return tmp_path / "contest.toml"


@pytest.fixture
def call(path: Path, tmp_path: Path, monkeypatch, capsys):
    """Run the command without plots; return what it printed and its exit code or message."""

    def run(*line: str) -> tuple[str, int | str | None]:
        argv = ["lighthouse", "contest", path, "--output", tmp_path / "out", "--no-plots", *line]
        code = exit_code_of(main, monkeypatch, *argv)
        captured = capsys.readouterr()
        return captured.out + captured.err, code

    return run


@pytest.fixture
def faked(monkeypatch):
    """Runs and measures in place of training; lists those that were asked for."""
    calls = SimpleNamespace(
        trained=[], measured=[], kill_at=None, best=2e-3, failing=(), fast=0.5, reason="planted",
        shift=0.0,
    )  # fmt: skip

    def train(run, processes, title, environment, lock) -> int:
        calls.trained.append(run.name)
        if run.name in calls.failing:
            (run.folder / "log.txt").write_text(f"Error: {calls.reason}\n")
            return 1
        write_logs(run, calls.best, fast=calls.fast, shift=calls.shift)
        last_checkpoint(run).mkdir(parents=True)
        return 0

    def measure(contest, run, environment, lock) -> int:
        calls.measured.append(run.name)
        if len(calls.measured) == calls.kill_at:
            raise KeyboardInterrupt
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        loss = json.loads(lines[-1])["validation_metrics/loss"]
        documents = [Number("loss", n, loss + 0.1 * n) for n in range(4)]
        retrieval = Number("retrieval/passkey/512", None, 0.5)
        write_numbers(run.folder, [Number("validation", None, loss), *documents, retrieval])
        return 0

    monkeypatch.setattr(contests, "train", train)
    monkeypatch.setattr(contests, "measure", measure)
    return calls
