"""Text is known again by its contents, which are hashed once."""

import json
import logging
import multiprocessing
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from text_data import config, loader, write_jsonl

from torchtitan.models.llama3_lighthouse.data import fingerprint
from torchtitan.models.llama3_lighthouse.data.fingerprint import contents_fingerprint
from torchtitan.models.llama3_lighthouse.errors import UserFileError, UserValueError

Change = Any


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of the same size and a held-out file."""
    files = {f"part-{i}.jsonl": [f"{i}{j} " * 40 for j in range(8)] for i in range(3)}
    return write_jsonl(tmp_path / "text", {**files, "validation.jsonl": ["held out " * 9]})


def edit(folder: Path) -> None:
    file = folder / "part-1.jsonl"
    times = os.stat(file)
    file.write_text(file.read_text().replace("13", "31"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(folder: Path) -> None:
    (folder / "part-0.jsonl").rename(folder / "kept")
    (folder / "part-1.jsonl").rename(folder / "part-0.jsonl")
    (folder / "kept").rename(folder / "part-1.jsonl")


def reverse(folder: Path) -> None:
    file = folder / "part-2.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))


def reorder(folder: Path) -> None:
    (folder / "part-0.jsonl").rename(folder / "part-3.jsonl")


def hold_out(folder: Path) -> None:
    (folder / "part-2.jsonl").rename(folder / "part-validation.jsonl")


def add(folder: Path) -> None:
    write_jsonl(folder, {"part-3.jsonl": ["more"]})


def remove(folder: Path) -> None:
    (folder / "part-2.jsonl").unlink()


@pytest.mark.parametrize("change", [edit, swap, reverse, reorder, hold_out, add, remove])
def test_other_text_is_refused_at_a_resume(folder: Path, change: Change) -> None:
    first = loader(config(path=folder))
    list(islice(first, 3))
    state = first.state_dict()
    change(folder)
    with pytest.raises(UserValueError, match=r"another text of training\.dataset: .*; restore"):
        loader(config(path=folder)).load_state_dict(state)


def rename(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    (folder.parent / "elsewhere").rename(folder)
    (folder / "part-2.jsonl").rename(folder / "q.jsonl")


def touch(folder: Path) -> None:
    (folder / "part-0.jsonl").touch()


def clutter(folder: Path) -> None:
    (folder / "LICENSE").write_text("free")
    write_jsonl(folder, {"validation.jsonl": ["other text is held out"]})


@pytest.mark.parametrize("change", [rename, touch, clutter])
def test_the_same_text_goes_on(folder: Path, change: Change) -> None:
    """Names and times do not matter as long as the order of the contents is the same."""
    first = loader(config(path=folder))
    list(islice(first, 3))
    state = first.state_dict()
    change(folder)
    loader(config(path=folder)).load_state_dict(state)


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The files that are hashed, which is not put off until they are old."""
    monkeypatch.setattr(fingerprint, "SECONDS_TO_SETTLE", -60)
    hash_file, paths = fingerprint._hash_file, []
    monkeypatch.setattr(
        fingerprint, "_hash_file", lambda path, *rest: paths.append(path) or hash_file(path, *rest)
    )
    return paths


def files(folder: Path) -> list[str]:
    return [str(folder / f"part-{i}.jsonl") for i in range(3)]


def text_hash(folder: Path) -> str:
    return contents_fingerprint(str(folder), "json", files(folder))


def test_files_are_read_again_only_if_they_changed(folder: Path, hashed: list[str]) -> None:
    before = text_hash(folder)
    assert sorted(hashed) == files(folder)
    assert text_hash(folder) == before and len(hashed) == 3
    edit(folder)
    after = text_hash(folder)
    assert after != before and hashed[3:] == files(folder)[1:2]
    reverse(folder)
    assert text_hash(folder) != after
    assert hashed[4:] == files(folder)[2:]


def test_another_file_leaves_the_hashes_of_the_others(folder: Path, hashed: list[str]) -> None:
    job = config(path=folder)
    before = loader(job).fingerprint
    add(folder)
    assert loader(job).fingerprint != before
    assert len(hashed) == 4 and hashed[3] == str(folder / "part-3.jsonl")


def test_a_file_that_changed_just_now_is_read_again(folder: Path, hashed, monkeypatch) -> None:
    """Its next change might bear the same time."""
    monkeypatch.setattr(fingerprint, "SECONDS_TO_SETTLE", 60)
    for count in (3, 6):
        text_hash(folder)
        assert len(hashed) == count


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "5", '{"%s": 3}', '{"%s": [[]]}', pytest.param("[" * 100_000, id="deep")],
)
def test_a_damaged_cache_is_ignored(folder: Path, own_cache: Path, hashed, damage: str) -> None:
    before = text_hash(folder)
    (cache,) = own_cache.glob("*.json")
    assert set(json.loads(cache.read_text())) == set(files(folder))
    cache.write_text(damage.replace("%s", files(folder)[0]))
    assert text_hash(folder) == before and len(hashed) == 6
    assert text_hash(folder) == before and len(hashed) == 6
    assert {file.suffix for file in own_cache.iterdir()} == {".json", ".lock"}


def test_a_cache_that_cannot_be_written_costs_reading(
    folder: Path, tmp_path: Path, hashed, monkeypatch, caplog
) -> None:
    (tmp_path / "file").write_text("")
    before = text_hash(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert text_hash(folder) == before and len(hashed) == 6
    assert "set XDG_CACHE_HOME to a folder that can be written" in caplog.text


def ask(folder: Path, answers: Any) -> None:
    """Ask in a process of its own, and report the files that this process read."""
    read = []

    def slowly(path: str, progress: Any) -> Any:
        read.append(path)
        time.sleep(0.1)
        return hash_file(path, progress)

    hash_file, fingerprint._hash_file = fingerprint._hash_file, slowly
    answers.put((text_hash(folder), len(read)))


def test_processes_that_ask_at_once_share_the_work(folder: Path, hashed) -> None:
    forked = multiprocessing.get_context("fork")
    answers = forked.Queue()
    processes = [forked.Process(target=ask, args=(folder, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({answer for answer, _ in found}) == 1
    assert sorted(count for _, count in found) == [0, 0, 0, 3]


def test_a_file_that_changes_or_vanishes_meanwhile_is_named(folder: Path, monkeypatch) -> None:
    state, calls = fingerprint._state, []

    def changing(path: str) -> list[int]:
        calls.append(path)
        return [*state(path)[:-1], len(calls)]

    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "_state", changing)
        with pytest.raises(UserFileError, match=r"part-\d\.jsonl changes while it is read"):
            text_hash(folder)
    remove(folder)
    with pytest.raises(UserFileError, match=r"part-2\.jsonl cannot be read: No such file"):
        text_hash(folder)


def test_long_reading_shows_how_far_it_is(folder: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(fingerprint, "SECONDS_BETWEEN_MESSAGES", 0.01)
    monkeypatch.setattr(fingerprint, "MOST_THREADS", 1)
    hash_file = fingerprint._hash_file
    monkeypatch.setattr(
        fingerprint, "_hash_file", lambda *given: time.sleep(0.1) or hash_file(*given)
    )
    with caplog.at_level(logging.INFO):
        text_hash(folder)
    assert "Reading the training text once, to know it again at a resume: 0.0 of 0.0 GB (33%)" in (
        caplog.text
    )


def test_text_is_hashed_at_the_start_of_a_run_that_saves(folder: Path, hashed) -> None:
    job = config(path=folder)
    loader(job)
    assert not hashed
    job.checkpoint.enable = True
    loader(job)
    assert sorted(hashed) == files(folder)
