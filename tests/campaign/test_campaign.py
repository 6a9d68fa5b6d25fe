"""A small part of the campaign, and the parts of it that must not be wrong themselves."""

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.cases import Result
from tests.campaign.events import kill_at, on_change
from tests.campaign.report import Entry, table

ROOT = Path(__file__).parents[2]


def test_the_table_counts_outcomes_by_class() -> None:
    outcomes = {"kills": ["ok", "ok", "lost"], "texts": ["refused", "silent"]}
    entries = [
        Entry(kind, number, 0, 1.0, Result(outcome, "a fault"))
        for kind, ended in outcomes.items()
        for number, outcome in enumerate(ended)
    ]
    lines = table(entries).splitlines()
    columns = [name.strip() for name in lines[0].split("|")[1:-1]]
    kills, texts, total = (
        dict(zip(columns, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
        for line in lines[2:]
    )
    assert (kills["cases"], kills["ok"], kills["lost"], kills["silent"]) == ("3", "2", "1", "0")
    assert (texts["refused"], texts["silent"], total["cases"]) == ("1", "1", "5")
    assert [entry.bad for entry in entries] == [False, False, True, False, True]
    assert "--seed 0 --only kills --case 2" in str(entries[2])


def _write_three(folder: Path) -> None:
    on_change(folder, kill_at(3, everyone=False))
    (folder / "one").write_text("1")
    (folder.parent / "elsewhere").write_text("not counted")
    (folder / "one").read_text()
    (folder / "one").rename(folder / "two")
    (folder / "two").unlink()


def test_a_kill_comes_between_the_chosen_changes(tmp_path: Path) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=_write_three, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [file.name for file in folder.iterdir()] == ["two"]


@pytest.mark.slow
def test_a_share_of_the_campaign_ends_well(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tests.campaign", "--share", "0.02", "--jobs", "2"]
    line += ["--output", str(tmp_path / "table"), "--scratch", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert (tmp_path / "table" / "campaign.json").is_file()
