"""Runs whose stages change length, attention and settings of the method."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from launch import Run, validation_losses

from torchtitan.models.llama3_lighthouse.studies.ablation_results import read_metrics

STAGES = ["dense until=2 seq_len=64", "lighthouse until=4 top_k=32 window=40", "dense"]
SCHEDULED = {
    "lighthouse.schedule": STAGES,
    # Its default, which a schedule asks for.
    "lighthouse.dense_from_step": 10000,
    "lighthouse.combine": "finest",
    "training.steps": 6,
    "lr_scheduler.total_steps": 6,
    "validation.enable": True,
    "validation.seq_len": 256,
    "validation.freq": 3,
    "validation.steps": 1,
}
EXACT = ("stage", "batches", "loss", "maximum_loss", "grad_norm", "tokens_seen")


def exact(run: Run, rank: int = 0) -> dict[int, tuple[object, ...]]:
    return {step: tuple(line[key] for key in EXACT) for step, line in run.steps(rank).items()}


def run_in(folder: Path, settings: dict[str, Any], **options: Any) -> Run:
    folder.mkdir(exist_ok=True)
    settings = {**SCHEDULED, **settings}
    if "lighthouse.stage" in settings:
        del settings["lighthouse.schedule"]
    return Run(folder, settings, **options)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_schedule_equals_a_killed_one_and_launches_by_hand(tmp_path: Path, processes: int) -> None:
    """The run is killed while the step after a switch is under way, and goes on from the switch."""
    options = {"processes": processes}
    expected = run_in(tmp_path / "whole", {}, **options).succeed()
    assert [line["stage"] for line in expected.steps().values()] == (
        ["dense"] * 2 + ["lighthouse"] * 2 + ["dense"] * 2
    )
    assert "attention runs on 64 of 64 positions" in expected.log
    assert "of 256 positions, each position attends over a window of 40 too" in (expected.log)
    lengths = [entry["lighthouse/sequence_length"]
               for entry in read_metrics(tmp_path / "whole/dump").values()]  # fmt: skip
    assert lengths == [64] * 2 + [256] * 4
    (tokens,) = {line["tokens_seen"] / step for step, line in expected.steps().items()}
    assert tokens == 256 * processes

    often = {"checkpoint.interval": 2}
    run_in(tmp_path / "killed", often, **options).crash_after_step(3)
    assert not (tmp_path / "killed/dump/checkpoint/step-4").exists()
    killed = run_in(tmp_path / "killed", often, **options).succeed()
    assert "checkpoint/step-2\n" in killed.log

    by_hand = {"lighthouse.data_streams": processes}
    method = {"lighthouse.top_k": 32, "lighthouse.window": 40}
    for steps, settings in {
        2: {"lighthouse.stage": "dense", "training.seq_len": 64, "training.local_batch_size": 4,
            "validation.enable": False},
        4: {"lighthouse.stage": "lighthouse", **method, "lighthouse.keep_position": True},
        6: {"lighthouse.stage": "dense", **method},
    }.items():  # fmt: skip
        settings = {**by_hand, **settings, "training.steps": steps}
        hand = run_in(tmp_path / "hand", settings, **options).succeed()
    for rank in range(processes):
        assert exact(killed, rank) == exact(expected, rank)
        assert exact(hand, rank) == exact(expected, rank)
    held_out = validation_losses(expected)
    assert list(held_out) == ["1", "3", "6"]
    for other in (killed, hand):
        assert validation_losses(other).items() <= held_out.items()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_leave_no_trace(tmp_path: Path, processes: int) -> None:
    """Each step is saved, and both switches are among those after which the run is killed."""
    options = {"processes": processes}
    longer = {"training.steps": 24, "lr_scheduler.total_steps": 24}
    expected = run_in(tmp_path / "whole", longer, **options).succeed()
    # A run may get some steps further before it dies.
    others = random.Random(processes).sample([1, 3, *range(5, 22)], 18)
    stops = sorted([2, 4, *others])
    each_step = {**longer, "checkpoint.interval": 1, "checkpoint.keep_latest_k": 2}
    for step in stops:
        run_in(tmp_path / "killed", each_step, **options).crash_after_step(step)
    killed = run_in(tmp_path / "killed", each_step, **options).succeed()
    for rank in range(processes):
        assert exact(killed, rank) == exact(expected, rank)


@pytest.mark.slow
def test_another_mesh_in_the_middle_reads_the_same_text(tmp_path: Path) -> None:
    """Two data-parallel ranks up to step 3, within the second stage, then one process."""
    # A pass has one sequence, so that batches of both meshes can be compared.
    single = f"{STAGES[0]} local_batch_size=1"
    batch = {"training.global_batch_size": 2, "lighthouse.schedule": [single, *STAGES[1:]]}
    expected = run_in(tmp_path / "one", batch).succeed()
    run_in(tmp_path / "two", {**batch, "training.steps": 3, "lighthouse.schedule": [
        single, "lighthouse top_k=32 window=40 last",
    ]}, processes=2).succeed()  # fmt: skip
    other = run_in(tmp_path / "two", batch).succeed()
    read = [sorted(line["batches"]) for line in expected.steps().values()]
    found = [
        sorted(
            other.steps(0)[step]["batches"] + (other.steps(1)[step]["batches"] if step < 4 else [])
        )
        for step in other.steps(0)
    ]
    assert found == read


def test_a_changed_schedule_is_refused_where_it_moves_the_text(tmp_path: Path) -> None:
    run_in(tmp_path, {"checkpoint.interval": 2, "validation.enable": False}).crash_after_step(3)
    other = run_in(tmp_path, {"validation.enable": False, "lighthouse.schedule": [
        "dense until=2 seq_len=128", *STAGES[1:],
    ]})  # fmt: skip
    assert other.wait() == 1
    assert "training.seq_len = 64, this run has 128" in other.log
    third = run_in(tmp_path, {"validation.enable": False, "lighthouse.schedule": [
        "dense until=1 seq_len=64", *STAGES[1:],
    ]})  # fmt: skip
    assert third.wait() == 1
    assert (
        "after step 2, is in sequences of 64 tokens, and lighthouse.schedule has 256" in third.log
    )


@pytest.mark.slow
def test_each_stage_compiles_in_its_first_step_alone(tmp_path: Path) -> None:
    """Two kinds of layers in each of the first two stages; the third only switches one of them."""
    settings = {"compile.enable": True, "validation.enable": False, "checkpoint.enable": False}
    # Forks import torch before they are told what to log.
    log = run_in(tmp_path, settings, torchrun=True, TORCH_LOGS="recompiles").succeed().log
    compiled: dict[int, int] = {}
    step = 1
    for line in log.splitlines():
        step += bool(re.search(r"step +\d+ of 6", line))
        if "Recompiling function forward" in line:
            compiled[step] = compiled.get(step, 0) + 1
    # The first compilation of all is no recompilation.
    assert compiled == {1: 1, 3: 2, 5: 1}
