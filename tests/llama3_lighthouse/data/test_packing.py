"""Packing, dealing to ranks, and resuming any number of times, for every kind of text."""

import itertools
from pathlib import Path

import datasets
import pytest
import torch
from text_data import config, digest, global_batches, loader, write_jsonl

from torchtitan.models.llama3_lighthouse import validate
from torchtitan.models.llama3_lighthouse.data import text_sources
from torchtitan.models.llama3_lighthouse.data.packing import build_validation_dataloader
from torchtitan.models.llama3_lighthouse.data.tokenizer import BOS_ID, EOS_ID
from torchtitan.models.llama3_lighthouse.job_config import JobConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three training files and one for validation: 30 documents of very different lengths."""
    texts = [f"{i:02d}" * (1 + i * i % 97) for i in range(30)]
    files = {f"train-{i}.jsonl.xz": texts[10 * i : 10 * (i + 1)] for i in range(3)}
    return write_jsonl(tmp_path / "text", {**files, "validation.jsonl.xz": ["held out " * 100]})


def test_packing_predicts_every_token_once(folder: Path) -> None:
    stream = []
    batches = iter(loader(config(path=folder, batch_size=1)))
    for inputs, labels in itertools.islice(batches, 50):
        assert inputs["input"].shape == labels.shape == (1, 64) and labels.dtype == torch.int64
        assert torch.equal(inputs["input"][0, 1:], labels[0, :-1])
        stream += inputs["input"][0].tolist()
    texts = [f"{i:02d}" * (1 + i * i % 97) for i in range(30)]
    expected = []
    for text in texts:
        expected += [BOS_ID, *text.encode(), EOS_ID]
    # The text begins again after its end.
    assert stream == (expected * 2)[: len(stream)]


def test_each_document_goes_to_one_rank(folder: Path) -> None:
    seen = []
    for rank in range(4):
        batches = itertools.islice(
            loader(config(path=folder, seq_len=8, batch_size=1), rank, 4), 400
        )
        tokens = torch.cat([inputs["input"].flatten() for inputs, _ in batches]).tolist()
        # Each document repeats its own number of two digits.
        starts = [i for i, token in enumerate(tokens[:-2]) if token == BOS_ID]
        seen.append({bytes(tokens[i + 1 : i + 3]) for i in starts})
    assert len(set.union(*seen)) == sum(map(len, seen)) == 30


def stdlib_or(folder: Path, dataset: str) -> Path | None:
    return folder if dataset == "c4_local" else None


@pytest.mark.parametrize(
    ("dataset", "rank", "ranks", "workers"),
    [
        ("c4_local", 0, 1, 0),
        ("c4_local", 0, 1, 1),
        ("c4_local", 1, 2, 0),
        ("c4_local", 1, 2, 1),
        # One case is enough for this large source, which takes long to open.
        ("python_stdlib", 1, 2, 1),
    ],
)
def test_resuming_twice_changes_nothing(
    folder: Path, dataset: str, rank: int, ranks: int, workers: int
) -> None:
    """60 batches are more than the folder holds, so they go through the end of its text too."""
    seq_len = 64 if dataset == "c4_local" else 4096
    job = config(dataset, stdlib_or(folder, dataset), seq_len, workers=workers)
    straight = [digest(b) for b in itertools.islice(loader(job, rank, ranks), 60)]
    resumed, state = [], None
    for stop in (7, 31, 22):
        part = loader(job, rank, ranks)
        if state:
            part.load_state_dict(state)
        resumed += [digest(b) for b in itertools.islice(part, stop)]
        state = part.state_dict()
    assert resumed == straight
    if dataset == "python_stdlib":
        assert len(set(straight)) == 60


def test_resume_continues_at_every_batch(folder: Path) -> None:
    job = config(path=folder, seq_len=16, batch_size=1)
    straight = [digest(b) for b in itertools.islice(loader(job), 40)]
    for stop in range(1, 39, 3):
        first = loader(job)
        assert [digest(b) for b in itertools.islice(first, stop)] == straight[:stop]
        second = loader(job)
        second.load_state_dict(first.state_dict())
        assert [digest(b) for b in itertools.islice(second, 40 - stop)] == straight[stop:]


def test_resuming_twice_within_one_document(folder: Path) -> None:
    """No document is read between the resumes: the buffer holds enough sequences."""
    job = config(path=folder, seq_len=16, batch_size=1)
    job.training.global_batch_size = 4
    for stop in range(1, 20, 3):
        straight = [digest(b) for b in itertools.islice(loader(job, 1, 4), stop + 10)]
        resumed, state = [], None
        for count in (stop, 1, 9):
            part = loader(job, 1, 4)
            if state:
                part.load_state_dict(state)
            resumed += [digest(b) for b in itertools.islice(part, count)]
            state = part.state_dict()
        assert resumed == straight


def test_state_of_other_ranks_or_text_is_refused(folder: Path) -> None:
    job = config(path=folder)
    one = loader(job)
    next(iter(one))
    state = one.state_dict()
    with pytest.raises(ValueError, match=r"data_streams = 2, this run has 4; .*exclude_from"):
        loader(job, 0, 2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"training\.seq_len = 64, this run has 32"):
        loader(config(path=folder, seq_len=32)).load_state_dict(state)
    with pytest.raises(ValueError, match="exclude_from_loading dataloader"):
        loader(job).load_state_dict({})
    with pytest.raises(
        ValueError, match=r"training\.dataset = c4_local, this run has python_stdlib"
    ):
        loader(config("python_stdlib")).load_state_dict(state)
    write_jsonl(folder, {"train-3.jsonl": ["more"]})
    with pytest.raises(ValueError, match=r"text of training\.dataset"):
        loader(job).load_state_dict(state)


def test_validation_reads_the_held_out_split_to_its_end(folder: Path) -> None:
    job = config(path=folder, seq_len=16, batch_size=1)
    batches = list(loader(job, build=build_validation_dataloader))
    tokens = torch.cat([inputs["input"][0] for inputs, _ in batches]).tolist()
    expected = [BOS_ID, *(b"held out " * 100), EOS_ID]
    assert tokens == expected[: len(tokens)]
    assert len(tokens) == (len(expected) - 1) // 16 * 16


def test_c4_layout_parquet_and_text_files(tmp_path: Path) -> None:
    c4 = write_jsonl(
        tmp_path / "c4",
        {
            "en/c4-train.00000-of-00002.json.gz": ["first"],
            "en/c4-train.00001-of-00002.json.gz": ["second"],
            "en/c4-validation.00000-of-00001.json.gz": ["third"],
        },
    )
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    datasets.Dataset.from_dict({"text": ["first", "second"]}).to_parquet(parquet / "a.parquet")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "1.txt").write_text("first\n\nline")
    (plain / "2.txt").write_text("second")

    def texts(path, split="train"):
        return [d["text"] for d in text_sources.c4_local(split, str(path), "training").open()]

    assert texts(c4) == ["first", "second"] and texts(c4, "validation") == ["third"]
    assert texts(parquet) == ["first", "second"]
    assert texts(plain) == ["first\n\nline", "second"]


def test_c4_streams_from_the_hub(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        text_sources, "load_dataset", lambda *a, **k: calls.append((a, k)) or "stream"
    )
    for split in ("train", "validation"):
        assert text_sources.find_source("c4", split, None, "training").open() == "stream"
        assert calls.pop() == (("allenai/c4",), dict(name="en", split=split, streaming=True))


def test_c4_out_of_reach_says_what_to_do(monkeypatch) -> None:
    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(text_sources, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match="no route to the hub; check the network, or use .*c4_local"
    ):
        loader(config("c4"))


def test_python_stdlib_is_large_held_out_and_stable() -> None:
    train, held_out = (
        [d["text"] for d in text_sources.python_stdlib(split, None, "training").open()]
        for split in ("train", "validation")
    )
    assert sum(map(len, train)) > 3_000_000 and 0 < len(held_out) < len(train) / 10
    assert not set(train) & {text for text in held_out if len(text) > 1000}
    again = text_sources.python_stdlib("train", None, "training")
    assert [d["text"] for d in again.open()] == train
    assert any("class TestCase" in text for text in train + held_out)
    # A seed draws another order of the same files, and holds out the same ones.
    seeded = [
        [d["text"] for d in text_sources.python_stdlib(split, None, "training", 1).open()]
        for split in ("train", "validation")
    ]
    assert seeded[0] != train
    assert [sorted(texts) for texts in seeded] == [sorted(train), sorted(held_out)]


def test_most_of_the_debug_runs_text_is_one_file() -> None:
    left, longest = 45 * 8192, 0
    for document in text_sources.python_stdlib("train", None, "training").open():
        taken = min(left, len(document["text"].encode()))
        left, longest = left - taken, max(longest, taken)
    assert left == 0 and longest > 45 * 8192 / 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.jsonl": ["good", None]}, "that is null"),
        ({"train.jsonl": [1, 2]}, "type int, not a string"),
        ({"train.jsonl": [["a"], ["b"]]}, "type list, not a string"),
        ({"readme.md": ["good"]}, "no readable file"),
        ({"a.jsonl": ["good"], "b.txt": ["good"]}, "2 kinds"),
        ({"validation.jsonl": ["good"]}, "no train split"),
    ],
)
def test_bad_text_is_refused_when_the_loader_is_built(tmp_path, files, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        loader(config(path=write_jsonl(tmp_path / "text", files), batch_size=1))
    assert "training.dataset" in str(caught.value)


def test_broken_file_and_missing_column(tmp_path: Path) -> None:
    folder = write_jsonl(tmp_path / "broken", {"train.jsonl": ["good"]})
    with (folder / "train.jsonl").open("a") as file:
        file.write("{not json\n")
    with pytest.raises(ValueError, match=r"training\.dataset: line 2 of .* is not JSON"):
        loader(config(path=folder))
    (folder / "train.jsonl").rename(folder / "train-1.jsonl")
    write_jsonl(folder, {"train-0.jsonl": ["good"]})
    with pytest.raises(ValueError, match=r"training\.dataset: line 2 of .*-1\.jsonl is not JSON"):
        loader(config(path=folder))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/train.jsonl").write_text('{"content": "good"}\n')
    with pytest.raises(ValueError, match="has no 'text', only 'content'"):
        loader(config(path=tmp_path / "other"))


def test_document_beyond_the_check_stops_when_it_is_reached(folder, monkeypatch) -> None:
    monkeypatch.setattr("torchtitan.models.llama3_lighthouse.data.packing.CHECKED_CHARACTERS", 1)
    write_jsonl(folder, {"train-0.jsonl.xz": ["x" * 200, "y" * 200, None]})
    with pytest.raises(ValueError, match=r"line 3 of .*train-0\.jsonl\.xz has a 'text' that is"):
        list(itertools.islice(loader(config(path=folder, batch_size=1)), 100))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (
            config("c5"),
            "'c5' is not known; use one of c4, c4_local, python_stdlib, python_packages",
        ),
        (config(path=None), "pass --training.dataset_path FOLDER"),
        (config(path="/nowhere"), "'/nowhere' is not a folder"),
        (config("python_stdlib", workers=2), "num_workers = 2"),
    ],
)
def test_bad_settings(job: JobConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(job)


def test_more_ranks_than_documents(tmp_path: Path) -> None:
    job = config(path=write_jsonl(tmp_path / "text", {"train.jsonl": ["one", "two"]}), batch_size=1)
    message = "no document for stream 2 .* give it 3 documents .* lighthouse.data_streams"
    with pytest.raises(ValueError, match=message):
        loader(job, 2, 3)


@pytest.mark.parametrize(("streams", "batch"), [(3, 4), (6, 4), (2, 4), (-4, 4)])
def test_streams_that_cannot_be_shared_are_refused(folder: Path, streams, batch) -> None:
    job = config(path=folder, batch_size=1)
    job.training.global_batch_size = batch
    job.lighthouse.data_streams = streams
    with pytest.raises(ValueError, match=f"data_streams = {streams} must be a multiple of .* 4"):
        loader(job, 0, 4)


def test_global_batches_do_not_depend_on_the_ranks(folder: Path) -> None:
    """The number of ranks changes twice, and with it how many parts a batch is in."""
    job = config(path=folder, seq_len=16, batch_size=1)
    job.training.global_batch_size = 4
    straight, _ = global_batches(job, 1, 30, None)
    changed, state = global_batches(job, 2, 11, None)
    for ranks, count in ((4, 8), (1, 11)):
        batches, state = global_batches(job, ranks, count, state)
        changed += batches
    assert changed == straight


def test_loaders_warn_of_nothing_that_their_user_cannot_mend(folder: Path, recwarn) -> None:
    next(iter(loader(config(path=folder))))
    assert not [warning for warning in recwarn if "set_vital" in str(warning.message)]


def test_long_validation_says_how_far_it_is(folder: Path, monkeypatch, caplog) -> None:
    settings = config(path=folder, batch_size=1)
    settings.validation.steps = 3
    validator = validate.LighthouseValidator.__new__(validate.LighthouseValidator)
    validator.job_config, validator.batch_mesh = settings, None
    validator._build_dataloader = lambda: loader(config(path=folder, batch_size=1))
    monkeypatch.setattr(validate, "device_type", "cpu")
    clock = iter([0.0, 6.0, 12.0, 18.0])
    monkeypatch.setattr(validate.time, "monotonic", lambda: next(clock))
    with caplog.at_level("INFO"):
        assert len(list(validator._batches())) == 3
    assert [line for line in caplog.messages if line.startswith("Validation")] == [
        "Validation: 2 of 3 batches in 0:12"
    ]
