"""One rule says which files of a folder train and which are held out, and the log says it."""

import gzip
import logging
import os
import socket
from itertools import islice
from pathlib import Path

import datasets
import pytest
from fsspec import compression
from text_data import config, loader, write_jsonl

from torchtitan.models.llama3_lighthouse.data import packing
from torchtitan.models.llama3_lighthouse.data.packing import build_validation_dataloader
from torchtitan.models.llama3_lighthouse.data.text_folder import TextFolder, read_folder
from torchtitan.models.llama3_lighthouse.data.text_sources import c4_local
from torchtitan.models.llama3_lighthouse.errors import UserFileError, UserValueError


def read(folder: Path, split: str = "train") -> list[str]:
    """The texts that a split reads, in order."""
    return [row["text"] for row in c4_local(split, str(folder), "training").open()]


def write_names(folder: Path, names: str) -> Path:
    """Write text files, each of which holds its own path below the folder."""
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        ("a.txt Validation-b.txt", "a.txt", "Validation-b.txt"),
        ("train-0.txt books.txt", "books.txt train-0.txt", ""),
        (
            "dev.txt valid.txt val.txt test.txt eval.txt the-test.txt train.txt validation.txt",
            "dev.txt eval.txt test.txt the-test.txt train.txt val.txt valid.txt",
            "validation.txt",
        ),
        ("the-test.txt", "the-test.txt", ""),
        (
            "0.txt 1.txt 2.txt 3.txt 4.txt train-000.txt validation.txt",
            "0.txt 1.txt 2.txt 3.txt 4.txt train-000.txt",
            "validation.txt",
        ),
        ("a.txt a-validation2.txt b.validation.txt", "a.txt", "a-validation2.txt b.validation.txt"),
        # A folder's name holds its files out, as it always did.
        ("train/b.txt validation/a.txt d.txt", "d.txt train/b.txt", "validation/a.txt"),
        # Paths are compared as strings.
        ("a/b.txt a-b/c.txt a.txt B.txt", "B.txt a-b/c.txt a.txt a/b.txt", ""),
        # The library would take these names for patterns, and that suffix for none.
        ("[ab].txt a.txt *.txt b?.TXT", "*.txt [ab].txt a.txt b?.TXT", ""),
    ],
)  # fmt: skip
def test_only_validation_in_a_name_holds_a_file_out(
    tmp_path: Path, names: str, train: str, held_out: str
) -> None:
    # The folder's own name and those above it do not count.
    folder = write_names(tmp_path / "validation", names)
    assert read(folder) == train.split()
    if held_out:
        assert read(folder, "validation") == held_out.split()
    else:
        with pytest.raises(UserValueError, match="has no validation split: none of its files"):
            read(folder, "validation")


def test_a_folder_that_is_held_out_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserValueError, match="no train split: all of its files have 'validation'"):
        read(write_names(tmp_path, "validation-0.txt validation-1.txt"))


def clutter(folder: Path) -> Path:
    """A folder in which ``train.txt`` and ``validation.txt`` alone are text of its own."""
    write_names(folder, "train.txt validation.txt LICENSE SHA256SUMS notes.csv tool.py old.txt.bak")
    write_names(folder, "new.txt.part .hidden.txt .git/a.txt __MACOSX/b.txt dataset_info.json")
    write_names(folder.parent / "outside", "stolen.txt")
    (folder / "out.txt").symlink_to(folder.parent / "outside/stolen.txt")
    (folder / "up").symlink_to("..")
    (folder / "nowhere.txt").symlink_to("gone.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "self").symlink_to(".")
    # Text that trains must not be held out under another name.
    (folder / "validation-link.txt").symlink_to("train.txt")
    os.mkfifo(folder / "pipe.txt")
    return folder


def test_what_is_no_text_of_the_folder_is_not_read_and_named(tmp_path: Path) -> None:
    folder = clutter(tmp_path / "text")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.txt"))
        found = read_folder(str(folder), "training")
    assert read(folder) == ["train.txt"] and read(folder, "validation") == ["validation.txt"]
    assert {reason[1]: sorted(names) for reason, names in found.left_out.items()} == {
        "files are no text": sorted(
            ["LICENSE", "SHA256SUMS", "notes.csv", "tool.py", "old.txt.bak", "new.txt.part"]
        ),
        "names are hidden": [".git/", ".hidden.txt", "__MACOSX/"],
        "files describe a data set": ["dataset_info.json"],
        "links lead out of the folder": ["out.txt", "up/"],
        "links lead nowhere": ["loop.txt", "nowhere.txt"],
        "links lead to folders in it": ["self/"],
        "links lead to files that are read": ["validation-link.txt"],
        "are no regular files": ["pipe.txt", "socket.txt"],
    }


def test_the_log_says_once_what_is_read(tmp_path: Path, caplog) -> None:
    folder = write_names(tmp_path, "a.txt b.txt validation.txt LICENSE\nSHA256SUMS notes.csv")
    (folder / "LI\nCENSE").write_text("free")
    with caplog.at_level(logging.INFO):
        for build in (packing.build_dataloader, build_validation_dataloader) * 2:
            loader(config(path=folder, seq_len=2), build=build)
    assert [record.message for record in caplog.records if str(folder) in record.message] == [
        f"Training reads 2 text files, 2 documents, 10 bytes of {folder}; "
        "held out: 1 text file, 1 document, 14 bytes",
        f"Not read in {folder}: 4 files are no text (LI\\nCENSE, LICENSE, SHA256SUMS, notes.csv)",
        f"Validation reads 1 text file, 1 document, 14 bytes of {folder}",
    ]


def test_parquet_tells_documents_and_json_bytes(tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    file = tmp_path / "parquet/a.parquet"
    datasets.Dataset.from_dict({"text": ["a"] * 1200}).to_parquet(file)
    (line,) = read_folder(str(file.parent), "training").describe("train")
    assert "reads 1 parquet file, 1,200 documents, " in line and line.endswith("; held out: none")
    write_jsonl(tmp_path / "json", {"a.jsonl": ["x" * 2_300_000], "b.jsonl": ["y"]})
    assert TextFolder.describe(read_folder(str(tmp_path / "json"), "training"), "train") == [
        f"Training reads 2 json files, 2.3 MB of {tmp_path}/json; held out: none"
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a.txt b.jsonl", r"2 kinds \(json, text: b.jsonl, a.txt\); give it files of one kind"),
        ("LICENSE a.csv", r"no readable file \(2 files are no text \(LICENSE, a.csv\)\); give"),
    ],
)
def test_folders_that_no_rule_fits_are_refused(tmp_path: Path, names: str, message: str) -> None:
    with pytest.raises(UserValueError, match=message):
        read(write_names(tmp_path, names))


def test_names_that_look_like_addresses_are_names(tmp_path: Path) -> None:
    folder = write_names(tmp_path / "zip:/a::b", "a.txt http::b.txt")
    assert sorted(read(folder)) == ["a.txt", "http::b.txt"]


@pytest.mark.parametrize(
    "name", ["nul\0byte", "a" * 5000, "a.txt"], ids=["NUL", "too long", "a file"]
)
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_names(tmp_path, "a.txt")
    with pytest.raises(
        UserValueError, match="is not a folder; pass --training.dataset_path"
    ) as told:
        read(tmp_path / name)
    assert "\0" not in str(told.value)
    with pytest.raises(UserValueError, match="dataset_path = None is not a folder"):
        read_folder(None, "training")


def test_what_may_not_be_read_is_refused(tmp_path: Path, monkeypatch) -> None:
    """Permissions do not bind an administrator, as whom tests may run."""
    write_names(tmp_path, "a.txt secret/b.txt")
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: not path.endswith("b.txt"))
        with pytest.raises(UserFileError, match=r"holds .*/secret/b\.txt, which this user may not"):
            read(tmp_path)

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserFileError, match="cannot be read: Permission denied: .*/secret; "):
        read(tmp_path)


def test_zstandard_is_read_or_its_package_asked_for(tmp_path: Path, monkeypatch) -> None:
    """The message comes at the start, whichever file is compressed like that."""
    (tmp_path / "b.txt.zst").write_bytes(b"")
    write_names(tmp_path, "a.txt")
    monkeypatch.delitem(compression.compr, "zstd", raising=False)
    with pytest.raises(UserValueError, match=r"b\.txt\.zst needs the package zstandard; pip inst"):
        read(tmp_path)


def test_zstandard_text_trains(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    contents = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(contents))
    assert read(tmp_path) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, r"line 2 of .*b\.jsonl is nested too dee"),
        ("b.jsonl", b"[" * 100_000, r"b\.jsonl cannot be read: maximum recursion depth"),
        ("b.txt", b"caf\xe9", r"b\.txt cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        (
            "b.txt.gz",
            gzip.compress(bytes(99), mtime=0)[:20],
            r"b\.txt\.gz cannot be read: Compressed file",
        ),
        ("b.parquet", b"", r"b\.parquet cannot be read: Parquet file size is 0 bytes"),
    ],
    ids=["deep line", "deep array", "not UTF-8", "truncated", "empty"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserValueError, match=message) as told:
        loader(config(path=tmp_path, batch_size=1))
    assert "\n" not in str(told.value)


def test_a_file_that_vanishes_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(packing, "CHECKED_CHARACTERS", 1)
    write_names(tmp_path, "a.txt b.txt")
    (tmp_path / "a.txt").write_text("x" * 100)
    batches = iter(loader(config(path=tmp_path, batch_size=1, seq_len=64)))
    next(batches)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserValueError, match=r"b\.txt cannot be read: .*No such file"):
        list(islice(batches, 3))


def test_a_line_longer_than_the_readers_chunk_trains(tmp_path: Path) -> None:
    write_jsonl(tmp_path, {"a.jsonl": ["x" * 12_000_000, "y"]})
    assert [len(text) for text in read(tmp_path)] == [12_000_000, 1]


def test_seed_draws_the_order_of_files(tmp_path: Path) -> None:
    names = " ".join(f"{folder}/{number}.txt" for folder in "ab" for number in range(10))
    held_out = "validation/x.txt validation/y.txt validation/z.txt"
    write_names(tmp_path / "here", f"{names} {held_out}")
    write_names(tmp_path / "there", f"{names} {held_out}")

    def texts(folder: str, seed: int, split: str = "train") -> list[str]:
        source = c4_local(split, str(tmp_path / folder), "training", seed)
        return [row["text"] for row in source.open()]

    orders = [texts("here", seed) for seed in range(4)]
    assert orders[0] == names.split()
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    # The folder may move, and a file that comes later leaves the order of the others as it is.
    assert texts("there", 3) == orders[3]
    write_names(tmp_path / "there", "a/more.txt")
    assert [name for name in texts("there", 3) if name != "a/more.txt"] == orders[3]
    (line,) = read_folder(str(tmp_path / "here"), "training").describe("train", 3)
    assert line.endswith("; its files are shuffled by seed 3")


def test_run_goes_on_in_its_own_order_alone(tmp_path: Path) -> None:
    write_names(tmp_path, " ".join(f"{number:03}.txt" for number in range(60)) + " validation.txt")
    jobs = [config(path=tmp_path, seq_len=8, batch_size=1) for _ in range(2)]
    for job, seed in zip(jobs, (1, 2), strict=True):
        job.lighthouse.shuffle_seed = seed
    begun = loader(jobs[0])
    straight = [batch[0]["input"].tolist() for batch in islice(begun, 8)]
    again = loader(jobs[0])
    first = [batch[0]["input"].tolist() for batch in islice(again, 3)]
    state, resumed = again.state_dict(), loader(jobs[0])
    resumed.load_state_dict(state)
    assert first + [batch[0]["input"].tolist() for batch in islice(resumed, 5)] == straight
    with pytest.raises(ValueError, match=r"text of training\.dataset"):
        loader(jobs[1]).load_state_dict(state)
    # Both are compared on the same held-out text.
    held_out = [
        next(iter(loader(job, build=build_validation_dataloader)))[0]["input"].tolist()
        for job in jobs
    ]
    assert held_out[0] == held_out[1]


def test_streamed_text_is_not_shuffled() -> None:
    job = config("c4")
    job.lighthouse.shuffle_seed = 1
    with pytest.raises(UserValueError, match="shuffle_seed = 1 does not go with .*'c4_local'"):
        loader(job)
