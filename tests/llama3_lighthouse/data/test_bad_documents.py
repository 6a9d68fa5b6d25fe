"""Bad documents are named by file and line, and empty ones are skipped and counted."""

import bz2
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from text_data import config, digest, loader, write_jsonl

from torchtitan.models.llama3_lighthouse.data import packing
from torchtitan.models.llama3_lighthouse.data.origins import find_document
from torchtitan.models.llama3_lighthouse.data.packing import build_validation_dataloader
from torchtitan.models.llama3_lighthouse.data.streams import TextStream, _Documents
from torchtitan.models.llama3_lighthouse.data.text_sources import c4_local
from torchtitan.models.llama3_lighthouse.data.tokenizer import BOS_ID, EOS_ID

KINDS = ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "parquet", "arrow", "arrow_stream", "txt"]


def write(folder: Path, name: str, kind: str, texts: list[Any]) -> None:
    """Write a file; JSON lines have a blank line before each document but the first file's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{kind.replace('arrow_stream', 'arrow')}"
    if kind == "txt":
        path.write_text(texts[0])
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": texts, "id": texts}).to_parquet(path, batch_size=2)
    elif kind.startswith("arrow"):
        table = datasets.Dataset.from_dict({"text": texts}).with_format("arrow")[:]
        with path.open("wb") as file:
            make = datasets.arrow_writer.pa.ipc
            new = make.new_stream if kind == "arrow_stream" else make.new_file
            with new(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    else:
        opener: dict[str, Callable[..., Any]] = {
            ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open
        }  # fmt: skip
        blank = "" if name.endswith("0") else "\n"
        with opener.get(path.suffix, open)(path, "wt") as file:
            file.writelines(blank + json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_of_every_stream_is_found(tmp_path: Path, kind: str) -> None:
    """Files are dealt whole to 1, 2 or 4 streams, and document by document to 3."""
    for file in range(4):
        texts = [f"{file}:{row}" for row in range(1 if kind == "txt" else 2 + 3 * (file % 2))]
        write(tmp_path, f"train-{file}", kind, texts)
    source = c4_local("train", str(tmp_path), "training")
    assert source.files and source.open().num_shards == 4
    for streams in (1, 2, 3, 4):
        count = 0
        for stream in range(streams):
            for number, document in enumerate(_Documents(source.open(), stream, streams)):
                place, found = find_document(source.files, stream, streams, number)
                assert found["text"] == document["text"]
                file, row = map(int, document["text"].split(":"))
                line = 2 * row + 2 if file and kind.startswith("json") else row + 1
                word = "line" if kind.startswith("json") else "row"
                before = "" if kind == "txt" else f"{word} {line} of "
                assert place.startswith(f"{before}{tmp_path}/train-{file}.")
                count += 1
            assert find_document(source.files, stream, streams, count + 20) is None
        assert count == (4 if kind == "txt" else 14)


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_a_bad_document_is_named_after_a_resume(tmp_path: Path, monkeypatch, streams: int) -> None:
    """It stops training where it is reached, with the line that a user sees in the file."""
    monkeypatch.setattr(packing, "CHECKED_CHARACTERS", 1)
    for file in range(2):
        write(tmp_path, f"train-{file}", "jsonl", [f"{file} " * 50] * 12)
    path = tmp_path / "train-1.jsonl"
    lines = path.read_text().splitlines()
    lines[19] = '{"text": null}'
    path.write_text("\n".join(lines) + "\n")
    job = config(path=tmp_path, batch_size=1)
    job.training.global_batch_size = streams
    first = loader(job)
    list(islice(first, 3 * streams))
    resumed = loader(job)
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(ValueError) as caught:
        list(islice(resumed, 200))
    assert str(caught.value) == (
        f"training.dataset: line 20 of {path} has a 'text' that is null; remove or mend it"
    )


def test_a_missing_text_is_told_from_a_null_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "id": 1}\n{"id": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*train\.jsonl has no 'text', only 'id'; "):
        loader(config(path=tmp_path, batch_size=1))


def test_an_array_of_documents_counts_items(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('[{"text": "a"},\n {"text": null}]')
    with pytest.raises(ValueError, match=r"item 2 of .*train\.json has a 'text' that is null"):
        loader(config(path=tmp_path, batch_size=1))


def test_text_that_is_no_folder_is_named_by_number(monkeypatch) -> None:
    data = datasets.Dataset.from_dict({"text": ["good", None]})
    monkeypatch.setattr(
        "torchtitan.models.llama3_lighthouse.data.text_sources.load_dataset",
        lambda *_, **__: data.to_iterable_dataset(),
    )
    batches = iter(loader(config("c4", batch_size=1, seq_len=16)))
    with pytest.raises(
        ValueError, match=r"training\.dataset: document 1 of stream 0 \(both counted from 0\) has a"
    ):
        next(batches)


def damage(path: Path, how: str) -> str:
    """Damage a file with good documents before the damage; returns how it is named."""
    if how == "broken line":
        path.write_text(path.read_text() + "\n{not json\n")
        return f"line 26 of {path} is not JSON (Expecting property name"
    if how == "not UTF-8":
        path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
        return f"line 25 of {path} is not UTF-8 (byte 11)"
    if how == "no object":
        path.write_text(path.read_text() + "5\n")
        return f"line 25 of {path} is not a JSON object"
    zipped = gzip.compress(path.read_bytes() * 100)
    path.unlink()
    path.with_suffix(".jsonl.gz").write_bytes(zipped[: len(zipped) // 2])
    return f"{path}.gz cannot be read: Compressed file ended"


@pytest.mark.parametrize("at_the_start", [True, False])
@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("how", ["broken line", "not UTF-8", "no object", "truncated"])
def test_a_damaged_file_is_named(
    tmp_path: Path, monkeypatch, how: str, streams: int, at_the_start: bool
) -> None:
    if not at_the_start:
        monkeypatch.setattr(packing, "CHECKED_CHARACTERS", 1)
    for file in range(2):
        # Three streams read a row of either file at the same time.
        write(tmp_path, f"train-{file}", "jsonl", [f"{file} " * 50] * (13 - file))
    named = damage(tmp_path / "train-1.jsonl", how)
    job = config(path=tmp_path, batch_size=1)
    job.training.global_batch_size = streams
    with pytest.raises(ValueError) as caught:
        list(islice(loader(job), 5000))
    message = str(caught.value)
    assert message.startswith(f"training.dataset: {named}"), message
    assert message.endswith("; mend or remove it") and "\n" not in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"text": "a"}\n{"text"\n', "line 2 of .* is not JSON"),
        ("", "has no document for stream 0"),
    ],
)
def test_a_damaged_first_file_is_named(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "train-0.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"training\.dataset.*{named}"):
        loader(config(path=tmp_path))


def test_lines_end_alike_in_every_file(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"a\r\nb\rc\n")
    assert tokens_of(config(path=tmp_path, seq_len=6, batch_size=1), 1)[1:] == [*b"a\nb\nc"]


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*character 1 is half of a surrogate pair"):
        loader(config(path=tmp_path))


def test_other_columns_do_no_harm(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"id": 1, "text": "b"}', '{"id": "x", "text": "c", "more": [{}]}']
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert tokens_of(config(path=tmp_path, seq_len=9, batch_size=1), 1)[1::3] == [*b"abc"]


def tokens_of(job, count: int, **options) -> list[int]:
    batches = islice(loader(job, **options), count)
    return torch.cat([inputs["input"].flatten() for inputs, _ in batches]).tolist()


def test_empty_documents_are_skipped_and_counted(tmp_path: Path, caplog) -> None:
    """The first and the last document are empty, and two in a row."""
    texts = ["", "one " * 20, "", "", "two " * 20, ""]
    job = config(path=write_jsonl(tmp_path, {"train.jsonl": texts}), seq_len=16, batch_size=1)
    with caplog.at_level(logging.INFO):
        tokens = tokens_of(job, 40)
    expected = [BOS_ID, *b"one " * 20, EOS_ID, BOS_ID, *b"two " * 20, EOS_ID]
    assert tokens == (expected * 5)[: len(tokens)]
    warnings = [each.message for each in caplog.records if "is empty" in each.message]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"training.dataset: line 1 of {tmp_path}/train.jsonl is empty; ")
    assert "has been read whole: 6 documents, 4 of them empty and skipped; beginning" in caplog.text


def test_a_worker_says_no_more_than_the_message(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(packing, "CHECKED_CHARACTERS", 10)
    path = write_jsonl(tmp_path, {"train.jsonl": ["a" * 100] * 5 + [None]})
    batches = iter(loader(config(path=path, seq_len=16, workers=1)))
    with pytest.raises(ValueError) as caught:
        list(batches)
    problem = f"line 6 of {path}/train.jsonl has a 'text' that is null"
    assert str(caught.value) == f"training.dataset: {problem}; remove or mend it"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_skips_the_same_documents(tmp_path: Path, caplog, workers: int) -> None:
    texts = ["" if i % 3 == 0 else f"{i:02d}" * (1 + i * i % 23) for i in range(24)]
    job = config(path=write_jsonl(tmp_path, {"train.jsonl": texts}), seq_len=16, workers=workers)
    straight = [digest(batch) for batch in islice(loader(job), 40)]
    for stop in (1, 9) if workers else range(1, 20, 4):
        resumed, state = [], None
        for count in (stop, 1, 39 - stop):
            part = loader(job)
            if state:
                part.load_state_dict(state)
            with caplog.at_level(logging.INFO):
                resumed += [digest(batch) for batch in islice(part, count)]
            state = part.state_dict()
        assert resumed == straight
    if not workers:
        told = {each.message for each in caplog.records if "beginning" in each.message}
        assert len(told) > 2 and all("12 documents, 4 of them" in message for message in told)


def test_a_position_without_the_count_of_empty_documents_loads(tmp_path: Path) -> None:
    texts = [f"{i:02d}" * 9 for i in range(20)]
    job = config(path=write_jsonl(tmp_path, {"train.jsonl": texts}), seq_len=16, batch_size=1)
    straight = [digest(batch) for batch in islice(loader(job), 20)]
    first = loader(job)
    list(islice(first, 7))
    state = first.dataset.state_dict()
    del state["stream_0"]["empty"]
    second = loader(job)
    second.dataset.load_state_dict(state)
    assert [digest(batch) for batch in islice(second, 13)] == straight[7:]


@pytest.mark.parametrize("checked", [True, False])
def test_a_stream_of_empty_documents_is_refused(tmp_path: Path, monkeypatch, checked) -> None:
    """At the start, and, if the text is not read ahead, at the end of the first epoch."""
    if not checked:
        monkeypatch.setattr(TextStream, "check_first_documents", lambda *_: None)
    folder = write_jsonl(tmp_path, {"train.jsonl": ["a" * 99, ""] * 3, "validation.jsonl": [""]})
    job = config(path=folder, seq_len=16, batch_size=1)
    job.training.global_batch_size = 2
    with pytest.raises(ValueError, match=r"all documents of stream 1 .* are empty, 3 of them; "):
        list(islice(loader(job), 20))
    with pytest.raises(ValueError, match=r"validation\.dataset: all documents of stream 0"):
        list(loader(job, build=build_validation_dataloader))
