"""Whole training runs: stages, resume, non-finite values, agreement with upstream."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from launch import TRAINED, VALIDATED, Run, validation_losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchtitan.models.llama3_lighthouse.checkpoints.record import read_record
from torchtitan.models.llama3_lighthouse.studies.ablation_results import read_metrics
from torchtitan.models.llama3_lighthouse.verdict import skips_non_finite_steps

# The numbers that have to be the same after a resume, on every rank.
EXACT = ("stage", "batches", "loss", "maximum_loss", "grad_norm", "tokens_seen")


def exact(run: Run, rank: int = 0) -> dict[int, tuple[object, ...]]:
    return {step: tuple(line[key] for key in EXACT) for step, line in run.steps(rank).items()}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_crash_and_stop_leave_no_trace(tmp_path: Path, processes: int) -> None:
    """12 steps straight equal 5 + kill -9 + resume + stop + resume, across the switch at step 6."""
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    straight.mkdir()
    interrupted.mkdir()
    expected = Run(straight, processes=processes).succeed()

    Run(interrupted, processes=processes).crash_after_step(6)
    assert (interrupted / "dump/checkpoint/step-5/.metadata").is_file()
    # A scheduler tells torchrun to stop. One process gets the signal itself.
    stopped = Run(interrupted, processes=processes, torchrun=processes > 1)
    stopped.stop_after_step(7)
    saved = max(stopped.steps())
    assert (interrupted / f"dump/checkpoint/step-{saved}/.metadata").is_file()
    resumed = Run(interrupted, processes=processes).succeed()
    assert f"checkpoint/step-{saved}\n" in resumed.log

    for rank in range(processes):
        assert sorted(exact(expected, rank)) == list(range(1, 13))
        assert exact(resumed, rank) == exact(expected, rank)
    stages = [line["stage"] for line in expected.steps().values()]
    assert stages == ["lighthouse"] * 6 + ["dense"] * 6
    losses = [float.fromhex(line["loss"]) for line in expected.steps().values()]
    assert losses[-1] < losses[0]


def test_verdicts_read_late_change_no_bit(tmp_path: Path) -> None:
    """They are read before whatever looks at a step: a log line, a checkpoint, a validation,
    selection statistics, and the end of a stage and of the run."""
    settings = {
        **VALIDATED,
        **{"lighthouse.dense_from_step": 5, "lighthouse.log_selection_every": 4},
        **{"training.steps": 12, "metrics.log_freq": 7, "checkpoint.interval": 9},
        **{"validation.freq": 11, "validation.steps": 1},
    }
    runs = []
    for name, environment in {"at once": {}, "late": {"LATE": "1"}}.items():
        (tmp_path / name).mkdir()
        runs.append(Run(tmp_path / name, settings, **environment).succeed())
    at_once, late = runs
    unread = [step for step, line in late.steps().items() if line["unread"]]
    assert unread == [2, 3, 6, 8, 10]
    assert not any(line["unread"] for line in at_once.steps().values())
    assert exact(late) == exact(at_once)
    assert validation_losses(late) == validation_losses(at_once)
    for step in (9, 12):
        name = f"dump/checkpoint/step-{step}/__0_0.distcp"
        first, second = ((tmp_path / run / name).read_bytes() for run in ("at once", "late"))
        assert first == second


@pytest.mark.parametrize(
    "mode",
    ["disabled", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("late", "async"))],
)
def test_stop_of_one_rank_saves_on_all(tmp_path: Path, mode: str) -> None:
    """Only the second of two processes gets the signal; a second run is refused meanwhile."""
    settings = {"training.steps": 1000, "checkpoint.interval": 3}
    environment = {}
    if mode == "late":
        settings |= {"checkpoint.interval": 1000, "metrics.log_freq": 1000}
        environment["LATE"] = "1"
    else:
        settings["checkpoint.async_mode"] = mode
    run = Run(tmp_path, settings, processes=2, **environment)
    run.wait_for_step(4)
    if mode == "disabled":
        second = Run(tmp_path, settings)
        assert second.wait() == 1
        assert "is in use by another run (process " in second.log
    os.kill(run.lines(1)[-1]["pid"], signal.SIGTERM)
    assert run.wait(60) == 75, run.log[-3000:]
    last = max(run.steps())
    # Both processes write to one log here.
    assert run.log.count(f"SIGTERM: step {last} is the last one now") == 2
    assert f"stopped by SIGTERM: saved step {last} in {tmp_path}/dump/checkpoint/step-" in run.log
    assert list(run.steps(1)) == list(run.steps(0)) == list(range(1, last + 1))
    resumed = Run(tmp_path, {**settings, "training.steps": last + 1}, processes=2).succeed()
    assert f"checkpoint/step-{last}\n" in resumed.log
    assert list(resumed.steps()) == list(range(1, last + 2))


def test_stop_without_checkpoints_says_that_nothing_was_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, {"training.steps": 1000, "checkpoint.enable": False})
    run.wait_for_step(2)
    os.kill(run.lines(0)[-1]["pid"], signal.SIGINT)
    assert run.wait(60) == 128 + signal.SIGINT
    assert "stopped by SIGINT after step " in run.log and "nothing was saved" in run.log
    assert not (tmp_path / "dump/checkpoint").exists()


def test_stage_key_and_auto_give_the_same_run(tmp_path: Path) -> None:
    """Flipping ``stage`` by hand on one checkpoint folder equals ``auto``; the change is logged.

    One of the two runs records selections, which must not change a bit of it.
    """
    auto, manual = tmp_path / "auto", tmp_path / "manual"
    auto.mkdir()
    manual.mkdir()
    recording = {"lighthouse.log_selection_every": 2, "metrics.enable_tensorboard": True}
    settings = {**recording, "lighthouse.dense_from_step": 5, "training.steps": 8}
    expected = Run(auto, settings).succeed()
    assert "Stage 'lighthouse' begins at step 1: attention runs on 128 of 256" in expected.log
    assert "Stage 'dense' begins at step 6 after lighthouse" in expected.log
    Run(manual, {"lighthouse.stage": "lighthouse", "training.steps": 5}).succeed()
    dense = Run(manual, {"lighthouse.stage": "dense", "training.steps": 8}).succeed()
    assert exact(dense) == exact(expected)

    board = EventAccumulator(str(next((auto / "dump/tb").iterdir()))).Reload()
    for name in ("covered", "spread", "spread_lowest", "overlap"):
        tag = f"selection/level_1/{name}"
        scalars = {event.step: event.value for event in board.Scalars(tag)}
        steps = read_metrics(auto / "dump").items()
        assert scalars == {s: pytest.approx(line[tag]) for s, line in steps if tag in line}
        assert list(scalars) == [2, 4]
    assert "selection" not in (manual / "dump/metrics.jsonl").read_text()
    # The second launch by hand appended to the metrics of the first.
    assert list(read_metrics(manual / "dump")) == list(range(1, 9))


def test_dense_every_trains_single_steps_dense(tmp_path: Path) -> None:
    """Such a step equals one of the dense stage; after it Lighthouse is back, also to validate."""
    rehearsed, switched = tmp_path / "rehearsed", tmp_path / "switched"
    rehearsed.mkdir()
    switched.mkdir()
    settings = VALIDATED | {"checkpoint.interval": 3, "validation.freq": 3}
    every_third = Run(
        rehearsed, {**settings, "lighthouse.stage": "lighthouse", "lighthouse.dense_every": 3}
    ).succeed()
    assert "Steps that 3 divides train under dense attention" in every_third.log
    dense = Run(switched, settings).succeed()
    lines = [list(read_metrics(run / "dump").values()) for run in (rehearsed, switched)]
    for key in ("loss_metrics/global_avg_loss", "grad_norm", "lighthouse/stage",
                "lighthouse/gathered_length"):  # fmt: skip
        ours, theirs = ([line[key] for line in each] for each in lines)
        assert ours == theirs and len(ours) == 3, key
    assert [line["lighthouse/stage"] for line in lines[0]] == [1, 1, 0]
    # The weights are the same, but each run validates under the attention of its stage.
    assert validation_losses(every_third)["3"] != validation_losses(dense)["3"]
    for folder, last in ((rehearsed, 3), (switched, 2)):
        record = read_record(folder / "dump/checkpoint/step-3")
        assert record.step - record.dense_steps == last


def test_dense_stage_is_upstream_to_the_last_bit(tmp_path: Path) -> None:
    """With the same seed and text, losses and gradient norms equal those of torchtitan's trainer
    and model."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    settings = {"training.steps": 4, "debug.seed": 7}
    dense = Run(ours, {**settings, "lighthouse.stage": "dense"}).succeed()
    upstream = Run(theirs, settings, TRAINER="upstream").succeed()
    for step in range(1, 5):
        for key in ("batches", "loss", "grad_norm"):
            assert dense.steps()[step][key] == upstream.steps()[step][key], (step, key)


@pytest.mark.slow
def test_upstream_continues_our_checkpoint(tmp_path: Path) -> None:
    """torchtitan's trainer resumes from our folder as our own dense stage does."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        Run(folder, {"training.steps": 5, "lighthouse.stage": "lighthouse"}).succeed()
    dense = Run(ours, {"training.steps": 7, "lighthouse.stage": "dense"}).succeed()
    upstream = Run(theirs, {"training.steps": 7}, TRAINER="upstream").succeed()
    # It began at step 6.
    assert len(upstream.lines(0)) == upstream.lines_before + 2
    for step in (6, 7):
        for key in ("batches", "loss", "grad_norm"):
            assert dense.steps()[step][key] == upstream.steps()[step][key], (step, key)


@pytest.mark.parametrize(
    ("processes", "optimizer"),
    [
        (1, "fused"),
        pytest.param(2, "fused", marks=pytest.mark.slow),
        pytest.param(2, "foreach", marks=pytest.mark.slow),
    ],
)
def test_non_finite_loss_stops_all_ranks_without_the_optimizer_step(
    tmp_path: Path, processes: int, optimizer: str
) -> None:
    settings = {"optimizer.implementation": optimizer}
    spoiled = Run(tmp_path, settings, processes=processes, NAN_AT=f"8,{processes - 1}")
    assert spoiled.wait() != 0
    assert "step 8 (dense stage): not finite" in spoiled.log
    assert "The optimizer step was not taken" in spoiled.log
    assert "weights and optimizer state are as before" in spoiled.log
    assert spoiled.steps()[7] and 8 not in spoiled.steps()
    checkpoints = os.listdir(tmp_path / "dump/checkpoint")
    assert checkpoints == ["step-5"]
    resumed = Run(tmp_path, settings, processes=processes).succeed()
    assert "checkpoint/step-5\n" in resumed.log


@pytest.mark.parametrize(
    ("step", "processes"), [(8, 1), (10, 1), pytest.param(8, 2, marks=pytest.mark.slow)]
)
def test_non_finite_loss_that_is_noticed_late_is_in_nothing(
    tmp_path: Path, step: int, processes: int
) -> None:
    """The error names the step that was not finite; at step 10 a checkpoint is due."""
    settings = {"metrics.log_freq": 100}
    nan_at = {"NAN_AT": f"{step},{processes - 1}"}
    spoiled = Run(tmp_path, settings, processes=processes, LATE="1", **nan_at)
    assert spoiled.wait() != 0
    assert f"step {step} (dense stage): not finite" in spoiled.log
    if processes == 1:
        assert re.search(r"this rank: loss share nan, gradient norm [0-9.]+\)", spoiled.log)
    assert "The optimizer step was not taken, nor any after it" in spoiled.log
    assert "weights and optimizer state are as before" in spoiled.log
    # The step after step 8 is under way when its loss is noticed; what is due at 10 is not begun.
    assert max(spoiled.steps()) == (8 if step == 8 else 9)
    assert os.listdir(tmp_path / "dump/checkpoint") == ["step-5"]
    assert list(read_metrics(tmp_path / "dump")) == [1]


def test_optimizers_that_wait_for_the_check() -> None:
    weight = torch.zeros(1, requires_grad=True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    fused = torch.optim.AdamW([weight], fused=True)
    assert skips_non_finite_steps(fused, cpu)
    # Here weights are on the host and the loss is on a GPU.
    assert not skips_non_finite_steps(fused, gpu)
    assert not skips_non_finite_steps(torch.optim.AdamW([weight], foreach=True), cpu)


@pytest.mark.slow
def test_compiled_training_agrees_with_eager(tmp_path: Path) -> None:
    """One run with every block compiled as one graph, through the switch and validation."""
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    eager.mkdir()
    compiled.mkdir()
    settings = {
        "training.steps": 4,
        "lighthouse.dense_from_step": 2,
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
        "validation.enable": True,
        "validation.seq_len": 256,
        "validation.local_batch_size": 1,
        "validation.freq": 2,
        "validation.steps": 2,
    }
    reference = Run(eager, settings).succeed()
    other = Run(compiled, {**settings, "compile.enable": True}).succeed()
    for step in range(1, 5):
        expected = float.fromhex(reference.steps()[step]["loss"])
        assert float.fromhex(other.steps()[step]["loss"]) == pytest.approx(expected, abs=2e-3)
    assert other.log.count("held-out loss") == 3
    assert "recompile_limit" not in other.log


@pytest.mark.slow
def test_everything_fast_errs_as_everything_plain_does(tmp_path: Path) -> None:
    """Chunked loss, compiled blocks and activation checkpointing err no more than their absence.

    The error is that of 20 steps in bfloat16 against float32, through both stages.
    """
    settings = {
        # The largest of few errors is noise, so there are many tokens.
        "training.seq_len": 512,
        "lighthouse.top_k": 32,
        "lighthouse.picks_per_stratum": 16,
        "training.steps": 20,
        "lighthouse.dense_from_step": 12,
        "lighthouse.loss": "whole",
        # AdamW's first steps divide gradients by their own size, even those that are only rounding.
        # Without these two settings the losses would show how such noise grows.
        "optimizer.lr": 2e-4,
        "optimizer.eps": 1e-6,
    }
    plain = settings | {"training.mixed_precision_param": "bfloat16"}
    fast = plain | {
        "lighthouse.loss": "chunked",
        "compile.enable": True,
        "activation_checkpoint.mode": "lighthouse",
        "activation_checkpoint.keep_products": ("wo", "w1"),
        "training.dataloader.num_workers": 1,
    }
    losses = {}
    for name, each in {"exact": settings, "plain": plain, "fast": fast}.items():
        folder = tmp_path / name
        folder.mkdir()
        # Stock attention has no float32 kernel on a GPU, so the exact run takes the CPU.
        environment = {"CUDA_VISIBLE_DEVICES": ""} if name == "exact" else {}
        steps = Run(folder, each, **environment).succeed().steps()
        losses[name] = [float.fromhex(steps[step]["loss"]) for step in range(1, 21)]
    errors = {
        name: [abs(a / b - 1) for a, b in zip(losses[name], losses["exact"], strict=True)]
        for name in ("plain", "fast")
    }
    assert 0 < max(errors["fast"]) < 1.5 * max(errors["plain"])


def test_small_is_small() -> None:
    """In the tests' configuration Lighthouse does real work: S is well below N."""
    from lighthouse import LighthouseConfig
    from lighthouse.geometry import PyramidGeometry

    method = LighthouseConfig(
        levels=TRAINED["lighthouse.levels"],
        pooling_factor=TRAINED["lighthouse.pooling_factor"],
        top_k=TRAINED["lighthouse.top_k"],
        picks_per_stratum=TRAINED["lighthouse.picks_per_stratum"],
    )
    assert PyramidGeometry(method, TRAINED["training.seq_len"]).gathered_length == 128
