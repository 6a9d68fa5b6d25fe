"""A position is plain data: old ones load, damaged ones are refused, and none runs code."""

import hashlib
import json
import logging
import pickle
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_data import config, digest, loader, write_jsonl

from torchtitan.models.llama3_lighthouse.data.packing import PackedTextDataloader, build_dataloader
from torchtitan.models.llama3_lighthouse.data.positions import decode, encode
from torchtitan.models.llama3_lighthouse.data.tokenizer import build_tokenizer
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.job_config import BYTE_TOKENIZER_FOLDER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards whose order is the same by Hugging Face's rule for names as by ours."""
    files = {
        f"train-{i}.jsonl": [f"{i}{j} " * (1 + 9 * j % 37) for j in range(20)] for i in range(3)
    }
    return write_jsonl(tmp_path / "text", {**files, "validation.jsonl": ["held out " * 9]})


def older_state(part: PackedTextDataloader, folder: Path, protocol: int) -> dict[str, bytes]:
    """The loader's position as versions before JSON saved it."""
    files = sorted(file for file in folder.rglob("*") if file.suffix == ".jsonl")
    listing = "\n".join(f"{file.relative_to(folder)} {file.stat().st_size}" for file in files)
    identity = {
        "training.dataset": "c4_local",
        "training.seq_len": "64",
        "lighthouse.tokenizer": "byte",
        "lighthouse.data_streams": "2",
        "text of training.dataset": hashlib.sha256(listing.encode()).hexdigest(),
    }
    states = {**part.dataset.state_dict(), "identity": identity}
    return {key: pickle.dumps(state, protocol) for key, state in states.items()}


@pytest.mark.parametrize("protocol", [4, 5])
def test_an_older_position_goes_on_exactly(folder: Path, caplog, protocol: int) -> None:
    """Newer versions of Python pickle arrays by another protocol."""
    job = config(path=folder)
    straight = [digest(batch) for batch in islice(loader(job), 30)]
    first = loader(job)
    list(islice(first, 9))
    second = loader(job)
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(older_state(first, folder, protocol))
    assert [digest(batch) for batch in islice(second, 21)] == straight[9:]
    (warning,) = [record.message for record in caplog.records if "older versions" in record.message]
    assert "their contents could not be compared" in warning


def test_an_older_position_in_other_files_or_another_order_is_refused(folder: Path) -> None:
    """Older versions read these two files after the others, or not at all."""
    for name in ("a-train.jsonl", "books.jsonl"):
        write_jsonl(folder, {name: ["more"]})
        part = loader(config(path=folder))
        with pytest.raises(UserValueError, match=r"training\.dataset: an older version read other"):
            part.load_state_dict(older_state(part, folder, 4))
        (folder / name).unlink()


def test_an_older_position_with_files_of_another_size_is_refused(folder: Path) -> None:
    part = loader(config(path=folder))
    state = older_state(part, folder, 4)
    write_jsonl(folder, {"train-1.jsonl": ["other"]})
    with pytest.raises(UserValueError, match=r"another text of training\.dataset"):
        loader(config(path=folder)).load_state_dict(state)


def test_a_position_is_json(folder: Path) -> None:
    part = loader(config(path=folder))
    list(islice(part, 3))
    for name, saved in part.state_dict().items():
        state = json.loads(saved)
        assert state and json.dumps(state) == saved, name
    buffer = np.array([0, 257, 2**31 - 1], dtype=np.int32)
    again = decode(encode({"buffer": buffer}), "stream_0")["buffer"]
    assert again.dtype == np.int32 and np.array_equal(again, buffer)


class Malicious:
    """Writes a file when it is unpickled by plain ``pickle``."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", ["identity", "stream_0"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_position_runs_nothing(folder: Path, tmp_path: Path, name, protocol) -> None:
    part = loader(config(path=folder))
    file = tmp_path / "written"
    state = part.state_dict()
    state[name] = pickle.dumps({"buffer": Malicious(file)}, protocol)
    pickle.loads(state[name])["buffer"].close()
    file.unlink()
    with pytest.raises(UserValueError, match=rf"'dataloader\.{name}' holds no .*names _?io\.open"):
        part.load_state_dict(state)
    assert not file.exists()


def test_an_array_of_an_older_position_holds_tokens_alone() -> None:
    for array in (np.array([None]), np.zeros(3), np.zeros(2, dtype=">i4")):
        with pytest.raises(UserValueError, match="dataloader.stream_0"):
            decode(pickle.dumps({"buffer": array}), "stream_0")


def changed(**parts: Any) -> Any:
    return lambda state: encode({**state, **parts})


def changed_data(change: Any) -> Any:
    return lambda state: encode({**state, "data": change(state["data"])})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda state: encode(state)[:-5], "JSONDecodeError"),
        (lambda state: "[" * 100_000, "RecursionError"),
        (lambda state: pickle.dumps(state)[:-9], "truncated"),
        (lambda state: b"", "Ran out of input"),
        (lambda state: b"\x80\x04nonsense", "dataloader.stream_0"),
        (lambda state: "[]", "it holds a list, not a position"),
        (lambda state: 5, "TypeError"),
        (lambda state: json.dumps({"buffer": "###"}), "Only base64 data is allowed"),
        (lambda state: json.dumps({"buffer": "AAA="}), "multiple of element size"),
        (lambda state: encode({"data": state["data"]}), "'buffer' holds no tokens"),
        (changed(buffer=np.array([-1])), "'buffer' holds no tokens"),
        (changed(sequences=-1), "'sequences' is no number from 0 on"),
        (changed(documents="7"), "'documents' is no number from 0 on"),
        (changed(epoch=True), "'epoch' is no number from 0 on"),
        (changed(data=None), "'data' is not made of examples_iterable, epoch"),
        (changed_data(lambda data: {**data, "epoch": 1.5}), "'data.epoch' is no number from 0 on"),
        (changed_data(lambda data: {"epoch": 0}), "'data' is not made of examples_iterable"),
        (
            changed_data(
                lambda data: json.loads(
                    json.dumps(data).replace('"shard_example_idx"', '"other"')
                )
            ),
            "'data.examples_iterable' is not made of shard_idx, shard_example_idx",
        ),
        (
            changed_data(lambda data: json.loads(json.dumps(data).replace("Examples", "Other"))),
            "'data.examples_iterable.type' is not 'ExamplesIterable'",
        ),
    ],
)  # fmt: skip
def test_a_damaged_position_is_refused(folder: Path, damage: Any, problem: str) -> None:
    part = loader(config(path=folder))
    list(islice(part, 3))
    state = part.state_dict()
    state["stream_0"] = damage(part.dataset.state_dict()["stream_0"])
    with pytest.raises(UserValueError, match=r"'dataloader\.stream_0' holds no position") as told:
        loader(config(path=folder)).load_state_dict(state)
    assert problem in str(told.value) and "exclude_from_loading dataloader" in str(told.value)


def test_a_missing_stream_is_named(folder: Path) -> None:
    part = loader(config(path=folder))
    state = part.state_dict()
    del state["stream_1"]
    with pytest.raises(UserValueError, match=r"dataloader\.stream_1' holds no position"):
        part.load_state_dict(state)


def test_another_tokenizer_of_the_same_size_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its ids would mean other text."""

    def position(assets: Path) -> PackedTextDataloader:
        job = config(path=folder)
        job.lighthouse.tokenizer = "hf"
        job.model.hf_assets_path = str(assets)
        return build_dataloader(1, 0, build_tokenizer(job), job)

    own = Path(BYTE_TOKENIZER_FOLDER)
    other = tmp_path / "tokenizer"
    shutil.copytree(own, other)
    described = json.loads((own / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(described))
    state = position(own).state_dict()
    position(own).load_state_dict(state)
    with pytest.raises(UserValueError, match="for the tokenizer in model.hf_assets_path = "):
        position(other).load_state_dict(state)
