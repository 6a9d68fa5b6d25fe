"""Checkpoints that a run goes on from, that it refuses, and that it leaves on the disk."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from torchtitan.models.llama3_lighthouse.checkpoints.folders import UNFINISHED_FILE
from torchtitan.models.llama3_lighthouse.checkpoints.record import read_record
from torchtitan.models.llama3_lighthouse.checkpoints.storage import DamagedCheckpointError
from torchtitan.models.llama3_lighthouse.errors import (
    NonFiniteError,
    UserFileError,
    UserValueError,
)

Start = Callable[..., "SmallRun"]  # noqa: F821


def names(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "dump/checkpoint"))


def flip_a_bit(file: Path, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_goes_on_from_the_newest_bit_by_bit(run: Start, tmp_path: Path, mode: str) -> None:
    first = run(async_mode=mode)
    first.train(4)
    first.manager.wait()
    assert names(tmp_path) == ["step-2", "step-4"]
    for step in (2, 4):
        inside = os.listdir(tmp_path / f"dump/checkpoint/step-{step}")
        assert {".metadata", ".checksums", "lighthouse.json", "__0_0.distcp"} == set(inside)
    second = run()
    assert second.progress.step == second.position.at == 4
    assert same(first.state(), second.state())


def test_plain_folders_without_metadata_are_never_overwritten(run: Start, tmp_path: Path) -> None:
    """``cp step-2/* elsewhere`` leaves .metadata out."""
    run().train(4)
    checkpoints = tmp_path / "dump/checkpoint"
    for step in (2, 4):
        (checkpoints / f"step-{step}/.metadata").unlink()
    before = {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()}
    with pytest.raises(UserFileError, match=r"step-2 is damaged: it has no file \.metadata"):
        run()
    assert before == {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()}


def test_a_save_that_was_cut_off_is_cleared_away(run: Start, tmp_path: Path) -> None:
    first = run()
    first.train(4)
    cut_off = tmp_path / "dump/checkpoint/step-6"
    shutil.copytree(tmp_path / "dump/checkpoint/step-4", cut_off)
    (cut_off / ".metadata").unlink()
    (cut_off / UNFINISHED_FILE).touch()
    second = run()
    assert second.progress.step == 4 and names(tmp_path) == ["step-2", "step-4"]


def test_a_first_save_that_was_cut_off_does_not_block_a_continuation(
    run: Start, tmp_path: Path
) -> None:
    run().train(2)
    source = tmp_path / "step-2"
    shutil.move(tmp_path / "dump/checkpoint/step-2", source)
    (tmp_path / "dump/checkpoint/step-4").mkdir()
    (tmp_path / "dump/checkpoint/step-4" / UNFINISHED_FILE).touch()
    second = run(initial_load_path=str(source), initial_load_model_only=False)
    assert second.progress.step == 2


@pytest.mark.parametrize("name", ["step-4.bad", "backup-step-9", "step-04", "step-9.damaged"])
def test_only_plain_names_are_checkpoints(run: Start, tmp_path: Path, name: str) -> None:
    run().train(4)
    folder = tmp_path / "dump/checkpoint"
    (folder / "step-4").rename(folder / name)
    second = run()
    assert second.progress.step == 2
    second.train(2)
    assert {name, "step-4"} <= set(names(tmp_path))


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("__0_0.distcp", flip_a_bit),
        ("__0_0.distcp", lambda file: file.write_bytes(file.read_bytes()[:-5000])),
        ("__0_0.distcp", lambda file: file.write_bytes(b"")),
        ("__0_0.distcp", Path.unlink),
        (".metadata", flip_a_bit),
        (".metadata", lambda file: file.write_bytes(b"\0" * 4096)),
        (".metadata", lambda file: file.write_bytes(b"")),
        ("lighthouse.json", flip_a_bit),
        ("lighthouse.json", lambda file: file.write_text("[]")),
        (".checksums", lambda file: file.write_text("{}")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_found_named_and_passed_by(
    run: Start, tmp_path: Path, file: str, harm: Callable[[Path], object]
) -> None:
    first = run()
    first.train(2)
    at_two = first.state()
    first.train(2)
    folder = tmp_path / "dump/checkpoint"
    harm(folder / "step-4" / file)
    with pytest.raises(UserFileError) as caught:
        run()
    message = str(caught.value)
    assert f"{folder}/step-4" in message and file in message
    assert f"The one before it is {folder}/step-2" in message
    assert "--checkpoint.set_damaged_aside" in message

    second = run(set_damaged_aside=True)
    assert second.progress.step == 2 and same(second.state(), at_two)
    assert names(tmp_path) == ["step-2", "step-4.damaged"]


def test_zeros_in_a_moment_are_found_and_older_damage_too(run: Start, tmp_path: Path) -> None:
    run().train(4)
    for step in (2, 4):
        file = tmp_path / f"dump/checkpoint/step-{step}/__0_0.distcp"
        content = bytearray(file.read_bytes())
        half = len(content) // 3
        content[half : half + 4096] = bytes(4096)
        file.write_bytes(content)
    with pytest.raises(UserFileError, match="step-4 is damaged: .* before it is .*step-2"):
        run()
    assert names(tmp_path) == ["step-2", "step-4"]
    with pytest.raises(UserFileError, match="step-2 is damaged: .*holds no older checkpoint"):
        run(set_damaged_aside=True)
    assert names(tmp_path) == ["step-2", "step-4.damaged"]


def test_a_file_system_that_fails_is_no_damage(
    run: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run().train(4)

    def stale(*arguments: object) -> bytes:
        raise OSError(116, "Stale file handle", "step-4/__0_0.distcp")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", stale)
        with pytest.raises(UserFileError, match=r"step-4 cannot be read: .*Stale file handle"):
            run(set_damaged_aside=True)
    assert names(tmp_path) == ["step-2", "step-4"]
    assert run().progress.step == 4


def test_weights_alone_are_not_called_damaged(run: Start, tmp_path: Path) -> None:
    first = run(last_save_model_only=True)
    first.train(3)
    first.manager.save(4, last_step=True)
    with pytest.raises(UserValueError, match="step-4 holds weights without 'optimizer'"):
        run(set_damaged_aside=True, exclude_from_loading=["dataloader"])
    assert names(tmp_path) == ["step-2", "step-4"]


def test_a_renamed_folder_is_refused(run: Start, tmp_path: Path) -> None:
    run().train(4)
    folder = tmp_path / "dump/checkpoint"
    (folder / "step-4").rename(folder / "step-8")
    with pytest.raises(UserValueError, match="step-8 holds step 4; give the folder the name"):
        run()


def test_counting_from_one_again_in_the_same_folder_is_refused(run: Start, tmp_path: Path) -> None:
    run().train(2)
    with pytest.raises(UserValueError, match="would train from step 1 on in"):
        run(exclude_from_loading=["train_state"])


def test_data_of_another_step_is_found(run: Start, tmp_path: Path) -> None:
    """Every tensor of it fits its own checksum."""
    run().train(4)
    folder = tmp_path / "dump/checkpoint"
    shutil.copy(folder / "step-2/__0_0.distcp", folder / "step-4/__0_0.distcp")
    with pytest.raises(UserFileError, match=r"step-4/__0_0\.distcp has changed.*is .*step-2"):
        run()


def test_weights_that_are_not_finite_are_not_saved(run: Start, tmp_path: Path) -> None:
    first = run()
    first.train(3)
    first.model.small.data[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 4: 'small'.*step-2"):
        first.train(1)
    assert names(tmp_path) == ["step-2"]


def test_moments_that_are_not_finite_are_not_saved(run: Start, tmp_path: Path) -> None:
    first = run()
    first.train(3)
    (optimizer,) = first.optimizers
    weight = first.model.large
    optimizer.state[weight]["exp_avg_sq"][0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"'exp_avg_sq of large'"):
        first.train(1)
    assert names(tmp_path) == ["step-2"]


def test_saved_values_that_are_not_finite_are_not_trained_on(
    run: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions saved them."""
    first = run()
    first.train(3)
    first.model.norm.data[0] = float("inf")
    with monkeypatch.context() as patch:
        patch.setattr(type(first.manager), "_check_finite", lambda self, step: None)
        first.train(1)
    with pytest.raises(UserFileError, match=r"'norm' holds values that are not finite"):
        run()
    assert run(set_damaged_aside=True).progress.step == 2


def test_purging_takes_a_folder_out_at_once(
    run: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def stopped_in_the_middle(path: str, **options: object) -> None:
        if Path(path).exists():
            Path(path, "lighthouse.json").unlink()
            begun.set()

    monkeypatch.setattr(shutil, "rmtree", stopped_in_the_middle)
    run(keep_latest_k=2).train(6)
    assert begun.wait(10)
    assert names(tmp_path) == ["step-2.purged", "step-4", "step-6"]
    monkeypatch.undo()
    run(keep_latest_k=2)
    assert names(tmp_path) == ["step-4", "step-6"]


def no_room(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk_is_named_and_an_earlier_save_stays(
    run: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    first = run(async_mode=mode)
    first.train(2)
    first.manager.wait()
    monkeypatch.setattr(FileSystemWriter, "write_data", no_room)
    with pytest.raises(UserFileError) as caught:
        first.train(4)
    message = str(caught.value)
    assert f"{tmp_path}/dump/checkpoint/step-4 could not be written: No space left" in message
    assert "It needs 0 MiB, and" in message and message.endswith("step-2")
    assert names(tmp_path) == ["step-2"]


def test_an_asynchronous_save_outlives_an_error(
    run: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    finish = FileSystemWriter.finish

    def waiting(*arguments: object, **named: object) -> None:
        go_on.wait(10)
        finish(*arguments, **named)

    monkeypatch.setattr(FileSystemWriter, "finish", waiting)
    first = run(async_mode="async")
    first.train(2)
    assert not (tmp_path / "dump/checkpoint/step-2/.metadata").exists()
    threading.Timer(0.2, go_on.set).start()
    assert first.manager.last_good() == tmp_path / "dump/checkpoint/step-2"
    assert run().progress.step == 2


def test_a_stop_saves_once_and_in_full(run: Start, tmp_path: Path) -> None:
    first = run(async_mode="async", last_save_model_only=True)
    first.train(3)
    first.manager.save_now(3)
    first.manager.save_now(3)
    assert names(tmp_path) == ["step-2", "step-3"]
    second = run()
    assert second.progress.step == 3 and same(first.state(), second.state())
    first.train(1)
    assert "step-4" in names(tmp_path)


def test_a_dump_folder_that_is_removed_is_told_and_made_again(
    run: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run()
    first.train(2)
    shutil.rmtree(tmp_path / "dump")
    first.train(2)
    assert "job.dump_folder" in caplog.text and "removed while the run was going" in caplog.text
    assert run().progress.step == 4


@pytest.mark.parametrize("there", [False, True])
def test_a_step_to_load_must_be_there(run: Start, tmp_path: Path, there: bool) -> None:
    if there:
        run().train(2)
    has = "it has steps 2" if there else "it has none"
    with pytest.raises(UserValueError, match=f"checkpoint.load_step = 4 is not .*{has}"):
        run(load=4)


def test_a_complete_checkpoint_is_never_overwritten(run: Start, tmp_path: Path) -> None:
    first = run()
    first.train(1)
    other = tmp_path / "dump/checkpoint/step-2"
    other.mkdir(parents=True)
    (other / "somebody's.distcp").touch()
    with pytest.raises(UserFileError, match="is not overwritten"):
        first.train(1)
    assert os.listdir(other) == ["somebody's.distcp"]


def test_checkpoints_without_checksums_still_load(run: Start, tmp_path: Path) -> None:
    first = run()
    first.train(2)
    (tmp_path / "dump/checkpoint/step-2/.checksums").unlink()
    assert same(run().state(), first.state())


def test_a_missing_record_is_no_obstacle(run: Start, tmp_path: Path) -> None:
    run().train(2)
    record = tmp_path / "dump/checkpoint/step-2/lighthouse.json"
    assert json.loads(record.read_text())["step"] == 2
    record.unlink()
    assert read_record(record.parent) is None
    second = run()
    assert second.progress.step == 2 and second.manager.last_lighthouse_step is None


def test_torch_reads_our_checkpoints(run: Start, tmp_path: Path) -> None:
    first = run()
    first.train(2)
    state = {"large": torch.empty_like(first.model.large)}
    dcp.load(state, checkpoint_id=tmp_path / "dump/checkpoint/step-2", no_dist=True)
    assert torch.equal(state["large"], first.model.large)


def test_ranks_can_send_the_error(tmp_path: Path) -> None:
    import pickle

    error = DamagedCheckpointError(tmp_path, "gone")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.path == tmp_path
