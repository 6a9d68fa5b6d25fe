"""Positions within documents of many sequences: small, exact, and readable from older versions."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from text_data import config, loader, write_jsonl

from torchtitan.models.llama3_lighthouse.data.positions import decode, encode
from torchtitan.models.llama3_lighthouse.data.staged import build_staged_dataloader
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer
from torchtitan.models.llama3_lighthouse.job_config import JobConfig
from torchtitan.models.llama3_lighthouse.stages import stage_at, stages_of

SEQ_LEN, STEPS = 64, 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents of 1 to 1,500 bytes, empty ones among them."""
    random = np.random.default_rng(0)
    sizes = [1500, 0, 3, 700, 0, 0, 1200, 64, 1, 900, 0]
    texts = ["".join(map(chr, random.integers(97, 123, size=size))) for size in sizes]
    return write_jsonl(tmp_path / "text", {"train.jsonl": texts, "validation.jsonl": ["held out"]})


def job_of(folder: Path, workers: int) -> JobConfig:
    job = config(path=folder, seq_len=SEQ_LEN, batch_size=1, workers=workers)
    job.training.global_batch_size = 1
    return job


def read(reader: Any, count: int) -> list[torch.Tensor]:
    return [batch["input"] for batch, _ in islice(reader, count)]


def positions_of(state: dict[str, Any]) -> dict[str, Any]:
    return decode(state["stream_0"], "stream_0")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_position_within_a_long_document_is_small_and_exact(folder: Path, workers: int) -> None:
    job = job_of(folder, workers)
    whole = read(loader(job), STEPS)
    first = loader(job)
    reader = iter(first)
    for step in range(1, STEPS):
        next(reader)
        state = first.state_dict()
        assert len(positions_of(state)["buffer"]) <= SEQ_LEN
        if workers and step % 7:
            continue
        again = loader(job)
        again.load_state_dict(state)
        # A run may stop again before it has read anything.
        twice = loader(job)
        twice.load_state_dict(again.state_dict())
        assert torch.equal(read(twice, 1)[0], whole[step])


def test_a_loader_goes_on_where_it_stopped(folder: Path) -> None:
    job = job_of(folder, 0)
    whole, part = read(loader(job), 12), loader(job)
    part.load_state_dict(part.state_dict())
    found = [batch for _ in range(4) for batch in read(part, 3)]
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_positions_of_older_versions_are_read(folder: Path) -> None:
    """They held all that was left of the last document, and did not know what was cut of it."""
    job = job_of(folder, 0)
    whole, first = read(loader(job), STEPS), loader(job)
    reader = iter(first)
    for step in range(1, 12):
        next(reader)
        state = first.state_dict()
        stream = first.dataset.streams[0]
        older = {key: value for key, value in stream._position().items()}
        older["sequences"] = stream.sequences
        state["stream_0"] = encode(older)
        again = loader(job)
        again.load_state_dict(state)
        rest = read(again, STEPS - step)
        assert all(torch.equal(x, y) for x, y in zip(rest, whole[step:], strict=True))
        # Later positions from there are of the new kind.
        assert len(positions_of(again.state_dict())["buffer"]) <= SEQ_LEN


# Tokens of a book, and of the sequences that it is cut into.
BOOK, PART = 400_000, 65_536


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A book a file, each longer than what JSON's reader in ``datasets`` parses at a time."""
    random = np.random.default_rng(1)
    texts = {
        f"train-{number}.jsonl": ["".join(map(chr, random.integers(97, 123, size=BOOK)))]
        for number in range(6)
    }
    return write_jsonl(tmp_path / "books", {**texts, "validation.jsonl": ["held out"]})


def job_of_books(folder: Path, streams: int) -> JobConfig:
    job = config(path=folder, seq_len=PART, batch_size=1, workers=0)
    job.training.global_batch_size = 1
    job.lighthouse.data_streams = streams
    return job


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


# Two streams get files, and four get single documents.
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_a_resume_among_books_is_exact(books: Path, streams: int) -> None:
    job = job_of_books(books, streams)
    steps = 6 * BOOK // PART + 8
    whole, first = read(loader(job), steps), loader(job)
    reader = iter(first)
    for step in range(1, steps - 4):
        next(reader)
        if step % 3 == 0:
            again = loader(job)
            again.load_state_dict(first.state_dict())
            assert equal(read(again, 4), whole[step : step + 4])


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_a_place_of_the_library_s_readers_is_found_by_counting(books: Path, streams: int) -> None:
    """Older versions read files so, and saved places from which that reader goes on wrongly."""
    job = job_of_books(books, streams)
    steps = 6 * BOOK // PART + 8
    whole, first = read(loader(job), steps), loader(job)
    reader = iter(first)
    files = [str(books / f"train-{number}.jsonl") for number in range(6)]
    data = load_dataset("json", data_files={"train": files}, split="train", streaming=True)
    for step in range(1, steps - 4):
        next(reader)
        if step % 5:
            continue
        state = first.state_dict()
        for name in (f"stream_{number}" for number in range(streams)):
            position = decode(state[name], name)
            older = split_dataset_by_node(data, int(name[7:]), streams)
            for _ in islice(older, position["documents"]):
                pass
            state[name] = encode({**position, "data": older.state_dict()})
        again, twice = loader(job), loader(job)
        again.load_state_dict(state)
        twice.load_state_dict(again.state_dict())
        assert equal(read(twice, 4), whole[step : step + 4])


@pytest.mark.parametrize("kind", ["text", "array"])
def test_a_place_in_files_of_one_block_is_found_too(tmp_path: Path, kind: str) -> None:
    """The library's readers save another form of place for these."""
    texts = [f"{number} " * 50 * (number + 1) for number in range(6)]
    for number, text in enumerate(texts):
        content = text if kind == "text" else json.dumps([{"text": text}, {"text": text[::-1]}])
        (tmp_path / f"train-{number}.{'txt' if kind == 'text' else 'json'}").write_text(content)
    job = job_of(tmp_path, 0)
    files = {"train": sorted(map(str, tmp_path.iterdir()))}
    options = {"sample_by": "document"} if kind == "text" else {}
    reader = "text" if kind == "text" else "json"
    data = load_dataset(reader, data_files=files, split="train", streaming=True, **options)
    whole, first = read(loader(job), STEPS), loader(job)
    batches = iter(first)
    for step in range(1, 20):
        next(batches)
        state = first.state_dict()
        position, older = positions_of(state), split_dataset_by_node(data, 0, 1)
        for _ in islice(older, position["documents"]):
            pass
        state["stream_0"] = encode({**position, "data": older.state_dict()})
        again = loader(job)
        again.load_state_dict(state)
        assert equal(read(again, 4), whole[step : step + 4])


def test_shorter_sequences_go_on_within_a_long_document(folder: Path) -> None:
    job = job_of(folder, 0)
    job.training.steps = 12
    job.lighthouse.data_streams = 1
    plain = torch.cat([batch.flatten() for batch in read(loader(job), 12)])
    job.lighthouse.schedule = ["dense until=5", "dense seq_len=16 last"]
    for stop in (None, 4, 5, 8):
        found, state = [], None
        for end in filter(None, (stop, 12)):
            each = build_staged_dataloader(1, 0, ByteTokenizer(), job)
            if state is not None:
                each.load_state_dict(state)
            reader = iter(each)
            for step in range(len(found) + 1, end + 1):
                each.use(stage_at(step, stages_of(job)).config)
                found.append(next(reader)[0]["input"].flatten())
            state = each.state_dict()
        assert torch.equal(torch.cat(found), plain)


def test_a_place_beyond_the_document_is_refused(folder: Path) -> None:
    job = job_of(folder, 0)
    first = loader(job)
    read(first, 3)
    state = first.state_dict()
    position = positions_of(state)
    assert position["cut"] == 3 * SEQ_LEN
    for cut, message in ((10**6, "'cut' = 1000000 is too much"), (-1, "'cut' is no number from 0")):
        state["stream_0"] = encode(position | {"cut": cut})
        again = loader(job)
        with pytest.raises(ValueError, match=f"'dataloader.stream_0' holds no .*: {message}"):
            again.load_state_dict(state)
            read(again, 1)
