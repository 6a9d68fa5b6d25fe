"""Files of checkpoints: every change is noticed, and nothing in them is run."""

import io
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from torchtitan.models.llama3_lighthouse.checkpoints.checksums import write_checksums
from torchtitan.models.llama3_lighthouse.checkpoints.storage import (
    DamagedCheckpointError,
    load_state,
    read_metadata,
)
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.evaluation.inference import read_configuration

FILES = [".metadata", "__0_0.distcp", ".checksums"]


def blank() -> dict[str, Any]:
    return {
        "weight": torch.zeros(8, 16),
        "half": torch.zeros(5, dtype=torch.bfloat16),
        "optimizer": {"step": torch.zeros(()), "betas": (0.0, 0.0), "name": ""},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of tensors and plain values, sealed, and what it holds."""
    folder = tmp_path_factory.mktemp("checkpoint") / "step-4"
    state = {
        "weight": torch.randn(8, 16),
        "half": torch.randn(5, dtype=torch.bfloat16),
        "optimizer": {"step": torch.tensor(4.0), "betas": (0.9, 0.95), "name": "AdamW"},
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    write_checksums(folder, (".metadata", "lighthouse.json"))
    return folder, state


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return all(equal(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_reads_what_was_saved(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, state = saved
    found = blank()
    load_state(found, folder, no_dist=True)
    assert equal(state, found)


def test_no_check_is_left_to_the_garbage_collector(
    saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = []

    def fail(self: Any, *arguments: Any) -> None:
        readers.append(self)
        next(self._checks)
        raise ValueError("unreadable")

    monkeypatch.setattr(dcp.FileSystemReader, "read_data", fail)
    with pytest.raises(Exception, match="unreadable"):
        load_state(blank(), saved[0], no_dist=True)
    assert [reader._checks.gi_frame for reader in readers] == [None]


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_noticed_or_harmless(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, file: str
) -> None:
    original, state = saved
    folder = tmp_path / "step-4"
    shutil.copytree(original, folder)
    content = (folder / file).read_bytes()
    noticed, draw = 0, random.Random(0)
    for _ in range(60):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(changed)
        found = blank()
        try:
            load_state(found, folder, no_dist=True)
        except DamagedCheckpointError as error:
            noticed += 1
            assert str(folder) in str(error) and "\n" not in str(error)
        else:
            # torch pads its archives, and padding holds nothing.
            assert equal(state, found)
    assert noticed > 10


@pytest.mark.parametrize("change", ["shorter", "empty", "zeros", "gone", "a folder", "a pipe"])
@pytest.mark.parametrize("file", FILES[:2])
def test_broken_files_are_named(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, file: str, change: str
) -> None:
    folder = tmp_path / "step-4"
    shutil.copytree(saved[0], folder)
    broken = folder / file
    content = broken.read_bytes()
    broken.unlink()
    if change == "a folder":
        broken.mkdir()
    elif change == "a pipe":
        os.mkfifo(broken)
    elif change != "gone":
        kept = {"shorter": len(content) // 2, "empty": 0, "zeros": len(content)}[change]
        broken.write_bytes(bytes(kept) if change == "zeros" else content[:kept])
    with pytest.raises(DamagedCheckpointError, match=f"{folder}/{file}"):
        load_state(blank(), folder, no_dist=True)


class Payload:
    """Writes a file when it is unpickled by whatever runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_metadata_runs_no_code(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, marker = tmp_path / "step-4", tmp_path / "ran"
    shutil.copytree(saved[0], folder)
    (folder / ".checksums").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(DamagedCheckpointError, match=r"it asks for posix\.mkdir"):
        read_metadata(folder)
    assert not marker.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert marker.exists(), "the payload works"


def test_values_run_no_code(tmp_path: Path) -> None:
    folder, marker = tmp_path / "step-4", tmp_path / "ran"
    dcp.save({"name": Payload(marker)}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(DamagedCheckpointError, match="'name' is no plain value"):
        load_state({"name": ""}, folder, no_dist=True)
    assert not marker.exists()
    dcp.load({"name": ""}, checkpoint_id=folder, no_dist=True)
    assert marker.exists(), "the payload works"


def test_metadata_cannot_name_files_elsewhere(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "step-4"
    shutil.copytree(saved[0], folder)
    (folder / ".checksums").unlink()
    metadata = read_metadata(folder)
    for item in metadata.storage_data.values():
        item.relative_path = "../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match="outside of the folder"):
        load_state(blank(), folder, no_dist=True)


def test_values_that_are_not_there_are_no_damage(saved: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UserValueError, match="does not fit this run: Missing key"):
        load_state({"missing": torch.zeros(2)}, saved[0], no_dist=True)


def test_a_records_own_code_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchtitan.models.llama3_lighthouse.checkpoints.record import CheckpointRecord
    from torchtitan.models.llama3_lighthouse.job_config import JobConfig

    (tmp_path / "from_the_internet.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = JobConfig().to_dict()
    config["model"]["flavor"] = "debugmodel"
    config["lighthouse"]["dense_layers"] = []
    config["training"]["seq_len"] = 32768
    config["job"]["custom_config_module"] = "from_the_internet"
    found, _ = read_configuration(tmp_path, CheckpointRecord(1, 1, config), [])
    assert found.job.custom_config_module == "" and not (tmp_path / "ran").exists()


def test_large_and_small_items_of_several_files(tmp_path: Path) -> None:
    """More items than are checked ahead, in parts, as several ranks write them."""
    state: dict[str, Any] = {f"small.{i}": i for i in range(300)}
    state |= {f"large.{i}": torch.full((2**21,), float(i)) for i in range(3)}
    writer = dcp.FileSystemWriter(tmp_path, single_file_per_rank=False)
    dcp.save(state, storage_writer=writer, no_dist=True)
    found = {
        name: torch.zeros_like(x) if isinstance(x, torch.Tensor) else -1
        for name, x in state.items()
    }
    load_state(found, tmp_path, no_dist=True)
    assert equal(state, found)


def test_torch_itself_checks_no_checksum(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Once this fails, our reader may leave it to torch."""
    folder = tmp_path / "step-4"
    shutil.copytree(saved[0], folder)
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    at = bytes(content).find(io.BytesIO(saved[1]["weight"].numpy().tobytes()).read(64))
    content[at + 8] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)
    found = blank()
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert not torch.equal(found["weight"], saved[1]["weight"])
