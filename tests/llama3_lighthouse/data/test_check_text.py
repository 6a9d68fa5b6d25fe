"""A whole split is checked: its counts, and the places of its bad documents."""

from pathlib import Path

import pytest
from text_data import write_jsonl

from lighthouse_commands import check_text as command
from lighthouse_commands.arguments import CommandError, CommandParser
from torchtitan.models.llama3_lighthouse.data.check_text import MOST_NAMED, TextCheck, TextReport


def check(folder: Path, split: str = "train") -> TextReport:
    """Check a folder; all progress comes to the size."""
    whole = TextCheck("c4_local", split, str(folder), "training")
    told: list[float] = []
    report = whole.run(told.append)
    assert report.bad or sum(told) == pytest.approx(whole.size)
    return report


def test_sound_text_is_counted(tmp_path: Path) -> None:
    files = {"train-0.jsonl.gz": ["ab"] * 1200, "train-1.jsonl.gz": ["", "äö€"]}
    report = check(write_jsonl(tmp_path, {**files, "validation.jsonl.gz": ["held out"]}))
    assert report == TextReport(documents=1202, empty=1, characters=2403)
    assert check(tmp_path, "validation") == TextReport(documents=1, characters=8)


def test_every_bad_document_is_counted_and_the_first_are_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path, {"train-0.jsonl": ["good", None, "good"]})
    (tmp_path / "train-1.jsonl").write_text('{"id": 1}\n\n{not json\n{"text": "good"}\n')
    (tmp_path / "train-2.jsonl.gz").write_bytes(b"no gzip")
    write_jsonl(tmp_path, {"train-3.jsonl": [5] * 20})
    report = check(tmp_path)
    assert (report.documents, report.empty, report.characters, report.bad) == (26, 0, 12, 24)
    places = [message.replace(f"{tmp_path}/", "") for message in report.named]
    assert places[:5] == [
        "line 2 of train-0.jsonl has a 'text' that is null",
        "line 1 of train-1.jsonl has no 'text', only 'id'",
        "line 3 of train-1.jsonl is not JSON (Expecting property name enclosed in double quotes, "
        "column 2)",
        "train-2.jsonl.gz cannot be read: Not a gzipped file (b'no')",
        "line 1 of train-3.jsonl has a 'text' of type int, not a string",
    ]
    assert len(places) == MOST_NAMED


def test_text_that_is_all_empty_is_bad(tmp_path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": ""}\n')
    report = check(tmp_path)
    assert report.bad == 1
    assert report.named[0].endswith("holds no document with text")


def run(folder: Path, *more: str) -> None:
    """Run the command on a folder."""
    parser = CommandParser()
    command.add_arguments(parser)
    command.run(
        parser.parse_args(["train_configs/debug_cpu.toml"]),
        ["--training.dataset=c4_local", f"--training.dataset_path={folder}", *more],
    )


def test_the_command_prints_a_table_and_refuses_bad_text(tmp_path: Path, capsys) -> None:
    write_jsonl(tmp_path, {"train.jsonl": ["good", "", "fine"], "validation.jsonl": ["held", None]})
    (tmp_path / "LICENSE").write_text("free")
    run(tmp_path, "--validation.no-enable")
    told = capsys.readouterr().out
    assert told.startswith(f"Training reads 1 json file, 74 bytes of {tmp_path}; held out: 1 json")
    assert f"\nNot read in {tmp_path}: 1 file is no text (LICENSE)\n" in told
    assert "reading train: " in told and "100% done" in told
    assert [line.split() for line in told.splitlines()[-2:]] == [
        ["split", "documents", "empty", "bad", "characters"],
        ["train", "3", "1", "0", "8"],
    ]
    held_out = ["--validation.dataset=c4_local", f"--validation.dataset_path={tmp_path}"]
    with pytest.raises(CommandError, match="1 document or file is bad; remove or mend it"):
        run(tmp_path, "--validation.enable", *held_out)
    told = capsys.readouterr().out.splitlines()
    assert told[-2].split() == ["validation", "2", "0", "1", "4"]
    assert told[-1].startswith(f"validation: line 2 of {tmp_path}/validation.jsonl has a 'text'")


def test_text_on_the_network_is_refused() -> None:
    with pytest.raises(ValueError, match="'c4' is streamed from the network"):
        TextCheck("c4", "train", None, "training")
