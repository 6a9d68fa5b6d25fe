"""Recovery studies: refusals, tables, plots, resumes, and a whole study."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import exit_code_of
from matplotlib.figure import Figure

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.job_config import JobConfig
from torchtitan.models.llama3_lighthouse.studies import recovery, recovery_plan, sweeps
from torchtitan.models.llama3_lighthouse.studies.ablation_results import read_metrics
from torchtitan.models.llama3_lighthouse.studies.recovery_results import below_from, interpolate
from torchtitan.models.llama3_lighthouse.studies.settings import command_line, with_settings
from torchtitan.models.llama3_lighthouse.studies.sweeps import Run, SweepOptions

ROOT = Path(__file__).parents[3]
DEBUG = ROOT / "train_configs/debug_cpu.toml"
SMALL = {
    "training.seq_len": 512, "lighthouse.pooling_factor": 2, "lighthouse.top_k": 32,
    "lighthouse.picks_per_stratum": 16, "validation.seq_len": 512,
    "validation.local_batch_size": 1, "validation.steps": 2,
}  # fmt: skip


def line_of(settings: dict) -> list[str]:
    return ["--validation.enable", "--metrics.no-enable_tensorboard", *command_line(settings)]


@pytest.fixture
def call(tmp_path: Path, monkeypatch, capsys):
    """Run the command on the debug configuration; return what it printed and its exit code."""

    def command(*line: object, config: Path = DEBUG) -> tuple[str, int | str | None]:
        argv = ["lighthouse", "recovery", config, "--output", tmp_path / "out", *line]
        code = exit_code_of(main, monkeypatch, *argv)
        return capsys.readouterr().out, code

    return command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--splits", 0.5, 1.0], "--splits 1 must lie between 0 and 1"),
        (["--splits", 0], "--splits 0 must lie between 0 and 1"),
        (["--splits", 0.99], "leaves no dense step"),
        (["--splits", 0.01], "leaves no Lighthouse step"),
        (["--splits", 0.5, 0.51], "ends the Lighthouse stage at step 8 of 16, as another one"),
        (["--seeds", 1, 1], "--seeds 1 1 must be different numbers"),
        (["--seeds", -1], "--seeds -1 must be different numbers from 0 on"),
        (["--validation.no-enable"], "validation.enable = false; pass --validation.enable"),
        (["--validation.freq", 5], "pass --validation.freq 4"),
        (["--lighthouse.stage", "dense"], "--lighthouse.stage is set by the study"),
        (["--debug.seed", 3], "--debug.seed is set by the study"),
        (["--checkpoint.no-enable"], "--checkpoint.enable is set by the study"),
        (["--checkpoint.exclude_from_loading", "dataloader"], "carries whole checkpoints over"),
        (["--lighthouse.schedule", "lighthouse until=4,dense"],
         "name the stages of its runs; pass --lighthouse.schedule none, or compare schedules"),
        (["--checkpoint.load_step", 3], "checkpoint.load_step = 3: the study trains from scratch"),
        (["--dense-steps", 16], "below training.steps = 16, so that its end is validated; pass "
         "--dense-steps 12"),
        (["--dense-steps", 0], "--dense-steps 0 must be a multiple of validation.freq = 4 above"),
        (["--dense-steps", 15], "; pass --dense-steps 12"),
        (["--dense-steps", 8, "--lr_scheduler.warmup_steps", 9], "; pass --dense-steps 12"),
        (["--dense-steps", 8, "--lr_scheduler.warmup_steps", 12], "; leave it out"),
        (["--dense-steps", 8, 8], "--dense-steps 8 8 names one twice; give each once"),
        (["--dense-steps", 8, "--lr_scheduler.decay_ratio", 0.0], "= 0 leaves no step to"),
        (["--dense-steps", 8, "--lr_scheduler.decay_ratio", 0.05], "= 0.05 leaves no step to"),
        (["--dense-steps", 8, "--lr_scheduler.total_steps", 20], "total_steps = 20, but with"),
        (["--lighthouse.top_k", 999], "must be a positive multiple of picks_per_stratum"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(call, tmp_path, line: list, message: str) -> None:
    settings = {**SMALL, "training.steps": 16, "validation.freq": 4,
                "lr_scheduler.warmup_steps": 2, "lr_scheduler.decay_ratio": 0.25}  # fmt: skip
    _, error = call(*line_of(settings), *line)
    assert message in error and "\n" not in error
    assert not list(tmp_path.glob("out/*"))


def test_a_missing_configuration_is_refused(call, tmp_path) -> None:
    _, error = call(config=tmp_path / "none.toml")
    assert "no such configuration" in error and "\n" not in error


SLOPE = {0: 0.06, 1: 0.03}


def made_up(step: int, switch: int, seed: int) -> tuple[float, float, float]:
    """Training loss, held-out loss and seconds of a step of a study of 100 steps.

    The loss of dense training falls by 0.02 a step. A dense stage after Lighthouse begins 1 above
    it and falls by a further SLOPE a step. Dense steps take 2 s and Lighthouse steps 1 s.
    """
    dense = 5 + 0.1 * seed - 0.02 * step
    if step <= switch:
        return dense - 1, dense - 0.9, 1.0
    gap = 1 - SLOPE[seed] * (step - switch) if switch else 0.0
    return dense + gap, dense + gap + 0.5, 2.0


def write_made_up(run: Run, exist_ok: bool = False) -> None:
    """A finished run's metrics.jsonl: it crashed once, and its first step was slow.

    Losses of a shorter control are 0.3 lower than those of ``made_up``.
    """
    first = run.start + 1
    is_shorter = run.name.startswith("dense,steps=")
    last, switch = run.config.training.steps, run.config.lighthouse.dense_from_step
    lines = []
    for step in range(first, last + 1):
        loss, held_out, seconds = made_up(step, switch, run.config.debug.seed)
        loss, held_out = (loss - 0.3, held_out - 0.3) if is_shorter else (loss, held_out)
        entry = {"step": step, "loss_metrics/global_avg_loss": loss, "n_tokens_seen": 512.0 * step,
                 "time_metrics/end_to_end(s)": 30.0 if step == first else seconds,
                 "lighthouse/stage": float(step <= switch)}  # fmt: skip
        lines.append(json.dumps(entry))
        if step == 1 or step % 10 == 0:
            lines.append(json.dumps({"step": step, "validation_metrics/loss": held_out}))
    crashed = [line.replace('"step"', '"grad_norm": 1, "step"') for line in lines[2:5]]
    crashed = [line.replace('global_avg_loss": ', 'global_avg_loss": 9') for line in crashed]
    text = "\n".join([*lines[:2], *crashed, lines[5][:20], *lines[2:]]) + "\n"
    run.folder.mkdir(parents=True, exist_ok=exist_ok)
    (run.folder / "metrics.jsonl").write_text(text)
    (run.folder / "finished").touch()


@pytest.fixture
def figures(monkeypatch) -> dict[str, Figure]:
    """Figures that were saved, by the name of their file."""
    found, save = {}, Figure.savefig

    def record(figure: Figure, path: Path, **options) -> None:
        found[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return found


@pytest.fixture
def made_up_study(call, tmp_path, monkeypatch) -> tuple[dict, str]:
    """Rows of the table, by run and seed, and the summary's; no run is left to train."""
    tracks = []
    plan = recovery.plan

    def plan_and_write(study, extra):
        tracks.extend(plan(study, extra))
        for run in {run.folder: run for track in tracks for run in track.runs}.values():
            write_made_up(run)
        return tracks

    monkeypatch.setattr(recovery, "plan", plan_and_write)
    settings = {**SMALL, "training.steps": 100, "validation.freq": 10, "checkpoint.interval": 20,
                "lr_scheduler.decay_ratio": 0.2}  # fmt: skip
    out, code = call("--splits", 0.75, 0.5, "--dense-steps", 70, *line_of(settings))
    assert code is None
    # The rate is the long run's for 56 steps, and the last checkpoint of these is after 40.
    assert "8 models in 12 runs: 560 steps, 740 if each model were trained alone" in out
    tables = []
    for name in ("results.csv", "summary.csv"):
        with (tmp_path / "out" / name).open() as file:
            tables.append({(row["run"], row.get("seed", "")): row for row in csv.DictReader(file)})
    return (*tables, (tmp_path / "out/results.md").read_text())


def expected_row(switch: int, seed: int) -> dict[str, float | str]:
    """Worked out by hand from ``made_up``, with windows of 5 steps, 2 for smoothed losses."""
    shift, slope, tail = 0.1 * seed, SLOPE[seed], 100 - switch
    # By seed, the dense step from which on the gap, a mean over two steps, is below 0.
    crossed = {0: 18, 1: 34}[seed]
    validated = {(50, 0): 70, (75, 0): 100, (50, 1): 90, (75, 1): None}[switch, seed]
    seconds = switch + 2 * tail
    # 1 s or 2 s were logged as 30 s at the start of each run.
    logged = seconds + 29 * (1 if switch == 50 else 2) + 28
    equal_time = 5 + shift - 0.02 * (seconds / 2) + 0.5
    own = 3.5 + shift + 1 - slope * tail
    before = 4 + shift - 0.02 * (switch - 2)
    row = {
        "Lighthouse steps": switch, "steps": 100, "tokens": 51200,
        "final train loss": 3.04 + shift + 1 - slope * (98 - switch),
        "held-out loss": own,
        "dense, equal tokens": 3.5 + shift, "minus dense, equal tokens": 1 - slope * tail,
        "dense, equal time": equal_time, "minus dense, equal time": own - equal_time,
        "train below dense from step": switch + crossed if crossed <= tail else "never",
        "held-out below dense from step": validated or "never",
        "Lighthouse loss before the switch*": before,
        "spike at the switch*": 5 + shift - 0.02 * (switch + 1) + 1 - slope - before,
        # With switch 50: 5 - 0.08 (n - 2) <= 3.04 in seed 0, 5 - 0.05 (n - 2) <= 3.04 in seed 1.
        "steps to recover*": {(50, 0): 27, (50, 1): 42}.get((switch, seed), "never"),
        "seconds": seconds, "seconds as logged": logged, "speed-up": 200 / seconds,
    }  # fmt: skip
    # The shorter control takes 140 s: split 0.75 took 125, split 0.5 more.
    decayed = 5 + shift - 0.02 * 70 + 0.5 - 0.3
    control = {"dense, decayed": decayed, "dense, decayed, steps": 70,
               "dense, decayed, seconds": 140, "minus dense, decayed": own - decayed}  # fmt: skip
    row |= control if switch == 75 else dict.fromkeys(control)
    for name in ("train", "held-out"):
        step = row[f"{name} below dense from step"]
        row[f"{name} below dense from token"] = step if step == "never" else 512 * step
    return row


def test_every_figure_of_a_made_up_study(figures, made_up_study, tmp_path) -> None:
    results, summary, text = made_up_study
    assert len(results) == 8
    for seed in (0, 1):
        shorter = results["dense, 70 steps", str(seed)]
        found = [float(shorter[key]) for key in ("steps", "held-out loss", "seconds", "speed-up")]
        assert found == pytest.approx([70, 3.8 + 0.1 * seed, 140, 200 / 140])
        dense = {k: float(v) for k, v in results["dense", str(seed)].items() if v and k != "run"}
        assert dense == pytest.approx({
            "seed": seed, "Lighthouse steps": 0, "steps": 100, "tokens": 51200,
            "final train loss": 3.04 + 0.1 * seed, "held-out loss": 3.5 + 0.1 * seed,
            "seconds": 200, "seconds as logged": 228, "speed-up": 1,
        }, abs=1e-9)  # fmt: skip
        for split, switch in (("0.5", 50), ("0.75", 75)):
            row = dict(results[f"split {split}", str(seed)])
            assert row.pop("run") == f"split {split}" and row.pop("seed") == str(seed)
            expected = expected_row(switch, seed)
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                if value is None:
                    assert row[key] == ""
                    continue
                found = row[key] if value == "never" else float(row[key])
                assert found == (value if value == "never" else pytest.approx(value, abs=1e-9)), key

    row = summary["split 0.75", ""]
    assert float(row["seeds"]) == 2
    # -0.5 and 0.25: their mean, and 0.75 over the square root of 2.
    assert float(row["minus dense, equal tokens"]) == pytest.approx(-0.125)
    assert float(row["minus dense, equal tokens, spread"]) == pytest.approx(0.75 / 2**0.5)
    assert row["train below dense from step"] == "1 of 2 seeds"
    assert row["steps to recover*"] == "never"
    assert float(summary["split 0.5", ""]["held-out below dense from step"]) == 80
    assert "-0.1250 ± 0.5303" in text and "not\ncomparable with dense ones" in text
    check_plots(figures)
    assert all((tmp_path / "out" / name).stat().st_size > 0 for name in figures)


def check_plots(figures: dict[str, Figure]) -> None:
    """Lines with dots of a made-up study: each stage once, at its steps, in its units."""

    def lines(name: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
        (axis,) = figures[name].axes
        dotted = [
            line for line in axis.lines if line.get_marker() != "None" and len(line.get_xdata())
        ]
        low, high = axis.get_ylim()
        # The spike after a switch is in view, and so is where the dense stages begin.
        assert all(low < y < high for line in dotted for x, y in zip(*line.get_data(), strict=True)
                   if x > axis.get_xlim()[1] / 3)  # fmt: skip
        assert sum(line.get_linestyle() == ":" for line in axis.lines) == 2
        assert [text.get_text() for text in axis.texts] == ["dense from here "]
        return {
            (names[line.get_color()], line.get_marker()): list(zip(*line.get_data(), strict=True))
            for line in dotted
        }

    (legend,) = figures["loss_over_time.png"].legends
    entries = zip(legend.legend_handles, legend.get_texts(), strict=True)
    names = {handle.get_color(): text.get_text() for handle, text in entries}
    assert [text.get_text() for text in legend.get_texts()][-2:] == ["seed 0", "seed 1"]
    over_time, over_tokens = lines("loss_over_time.png"), lines("loss_over_tokens.png")
    minus_dense = lines("minus_dense.png")
    # The switch of each model, and what it was validated at by itself.
    drawn = {
        "Lighthouse stage": (75, [1, *range(10, 75, 10)]),
        "dense": (0, [1, *range(10, 101, 10)]),
        "split 0.5": (50, range(60, 101, 10)),
        "split 0.75": (75, range(80, 101, 10)),
        "dense, 70 steps": (0, range(50, 71, 10)),
    }
    for seed, marker in enumerate("os"):
        for name, (switch, steps) in drawn.items():
            lower = 0.3 if name == "dense, 70 steps" else 0
            losses = [made_up(step, switch, seed)[1] - lower for step in steps]
            minutes = [(step + max(0, step - switch)) / 60 for step in steps]
            millions = [step * 512 / 1e6 for step in steps]
            gaps = [loss - made_up(step, 0, seed)[1]
                    for step, loss in zip(steps, losses, strict=True)]  # fmt: skip
            for found, x, y in ((over_time, minutes, losses), (over_tokens, millions, losses),
                                (minus_dense, millions, gaps)):  # fmt: skip
                if not (lower and found is minus_dense):
                    assert found.pop((name, marker)) == [
                        pytest.approx(point, abs=1e-9) for point in zip(x, y, strict=True)
                    ], name
    assert not over_time and not over_tokens and not minus_dense


@pytest.mark.parametrize(
    ("changed", "start"),
    [
        ({}, 40),
        ({"checkpoint.interval": 56}, 56),
        ({"checkpoint.interval": 57}, 0),
        ({"lr_scheduler.warmup_steps": 60}, 60),
        # The checkpoints at 60, at 80 and at the end push it out.
        ({"checkpoint.keep_latest_k": 3}, 0),
        ({"checkpoint.keep_latest_k": 4}, 40),
        ({"checkpoint.keep_latest_k": 0}, 40),
        ({"lr_scheduler.decay_ratio": None}, 0),
    ],
)
def test_a_shorter_control_branches_off_a_checkpoint_that_is_kept(changed, start) -> None:
    settings = {"training.steps": 100, "checkpoint.interval": 20, "lr_scheduler.warmup_steps": 4,
                "lr_scheduler.decay_ratio": 0.2, **changed}  # fmt: skip
    config = with_settings(JobConfig(), settings)
    assert recovery_plan.branching_step(config, 70) == start


def test_a_shorter_control_whose_checkpoint_is_gone_begins_anew(call, tmp_path) -> None:
    """Once begun anew, it stays so; a control that had branched off goes on from its branch."""
    line = ["--splits", 0.5, "--seeds", 0, "--dense-steps", 12, "--list"]
    line += line_of({**SMALL, "training.steps": 16, "validation.freq": 4,
                     "lr_scheduler.warmup_steps": 2, "lr_scheduler.decay_ratio": 0.25,
                     "checkpoint.interval": 4})  # fmt: skip

    def steps() -> str:
        return call(*line)[0].splitlines()[-1]

    branched, anew = "dense,steps=12,seed=0: 4 steps", "dense,steps=12,seed=0: 12 steps"
    assert steps() == branched
    dense, shorter = (tmp_path / f"out/{name},seed=0" for name in ("dense", "dense,steps=12"))
    dense.mkdir(parents=True)
    (dense / "finished").touch()
    assert steps() == anew
    shorter.mkdir()
    record = {"checkpoint": {"initial_load_path": "step-8"}}
    (shorter / "config.json").write_text(json.dumps(record))
    assert steps() == branched
    (dense / "checkpoint/step-8").mkdir(parents=True)
    (dense / "checkpoint/step-8/.metadata").touch()
    record["checkpoint"]["initial_load_path"] = None
    (shorter / "config.json").write_text(json.dumps(record))
    assert steps() == anew
    (shorter / "config.json").unlink()
    assert steps() == branched


def test_a_study_with_a_gap_is_refused(call, tmp_path) -> None:
    settings = {**SMALL, "training.steps": 16, "validation.freq": 4}
    arguments = ["--splits", 0.5, "--seeds", 0, *line_of(settings)]
    (tmp_path / "out/dense,seed=0").mkdir(parents=True)
    for name in ("dense", "lighthouse_to=8", "split=0.5"):
        folder = tmp_path / f"out/{name},seed=0"
        folder.mkdir(exist_ok=True)
        (folder / "finished").touch()
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss_metrics/global_avg_loss": 5.0}\n')
    _, error = call(*arguments)
    assert (
        "dense,seed=0: the metrics.jsonl files of dense, seed 0, lack the loss of step 2" in error
    )


def test_a_branch_whose_source_failed_is_left_out(call, tmp_path, monkeypatch) -> None:
    trained = []

    def train(run, processes, title, environment, lock):
        trained.append(run.name)
        if run.name == "lighthouse_to=8,seed=0":
            (run.folder / "log.txt").write_text("[rank0]: - ERROR - ValueError: no text\n")
            return 1
        write = run.folder / "metrics.jsonl"
        lines = [{"step": step, "loss_metrics/global_avg_loss": 5.0, "n_tokens_seen": step,
                  "time_metrics/end_to_end(s)": 1.0, "lighthouse/stage": 0.0,
                  "validation_metrics/loss": 5.0} for step in range(1, 17)]  # fmt: skip
        write.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    monkeypatch.setattr(recovery, "train", train)
    settings = {**SMALL, "training.steps": 16, "validation.freq": 4}
    out, code = call("--splits", 0.5, 0.75, "--seeds", 0, *line_of(settings))
    assert trained == ["dense,seed=0", "lighthouse_to=8,seed=0"]
    assert code.startswith("Error: 4 of 5 runs failed: lighthouse_to=8,seed=0, split=0.5,seed=0")
    assert "| dense |" in out


def test_runs_side_by_side_wait_for_what_they_begin_from(call, tmp_path, monkeypatch) -> None:
    """Two slots: no run begins before its source ended, and both slots are used at once."""
    environments = [{"SLOT": "0"}, {"SLOT": "1"}]
    monkeypatch.setattr(sweeps, "slots_of", lambda *arguments: environments)
    begun, slots, most = [], set(), 0

    def train(run, processes, title, environment, lock):
        nonlocal most
        assert run.needs is None or run.needs.is_finished
        begun.append(run.name)
        assert environment["SLOT"] not in slots
        slots.add(environment["SLOT"])
        most = max(most, len(slots))
        time.sleep(0.1)
        write_made_up(run, exist_ok=True)
        slots.discard(environment["SLOT"])
        return 0

    monkeypatch.setattr(recovery, "train", train)
    settings = {**SMALL, "training.steps": 40, "validation.freq": 10}
    out, code = call("--splits", 0.5, 0.75, "--seeds", 0, 1, "--at-once", 2, *line_of(settings))
    assert code is None and most == 2
    assert sorted(begun) == sorted(
        f"{name},seed={seed}"
        for name in ("dense", "lighthouse_to=20", "split=0.5", "lighthouse_to=30", "split=0.75")
        for seed in (0, 1)
    )
    assert (tmp_path / "out/results.csv").exists()


@pytest.mark.parametrize("visible", [None, "4,5,6,7"])
def test_runs_side_by_side_get_gpus_of_their_own(monkeypatch, visible) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    names = [slot["CUDA_VISIBLE_DEVICES"] for slot in sweeps.slots_of(2, 2)]
    assert names == (["4,5", "6,7"] if visible else ["0,1", "2,3"])
    # One at a time takes the first of all, as torchrun does.
    assert sweeps.slots_of(1, 2) == [{}]
    with pytest.raises(ValueError, match="--at-once 3 with --processes 2 needs 6 GPUs, and 4 are"):
        sweeps.slots_of(3, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert sweeps.slots_of(3, 2) == [{}, {}, {}]
    with pytest.raises(ValueError, match="--per-gpu 2 shares GPUs .* torch sees none here"):
        sweeps.slots_of(4, 1, 2)


def test_runs_can_share_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = [slot["CUDA_VISIBLE_DEVICES"] for slot in sweeps.slots_of(4, 1, 2)]
    assert names == ["0", "1", "0", "1"]
    with pytest.raises(ValueError, match="needs 3 GPUs"):
        sweeps.slots_of(5, 1, 2)


@pytest.mark.parametrize(("gpus", "at_once"), [(True, 2), (False, 1)])
def test_runs_that_tell_times_share_nothing(monkeypatch, tmp_path, gpus, at_once) -> None:
    """Neither a GPU nor, without GPUs, the cores."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    alone = SweepOptions(tmp_path, at_once=4, per_gpu=2).alone()
    assert (alone.at_once, alone.per_gpu) == (at_once, 1)


def fake_checkpoint(run: Run, step: int, whole: bool = True) -> Path:
    path = run.folder / f"checkpoint/step-{step}"
    path.mkdir(parents=True)
    (path / (".metadata" if whole else "__0_0.distcp")).touch()
    return path


def test_what_an_interruption_cut_off_is_removed(tmp_path) -> None:
    study = recovery_plan.Study(DEBUG, tmp_path, splits=[0.5], seeds=[0], dense_steps=[])
    extra = line_of({**SMALL, "training.steps": 16, "validation.freq": 4})
    dense, split = recovery_plan.plan(study, extra)
    (run,), (source, branch) = dense.runs, split.runs

    # Step 4 was validated, step 8 was to be and was not, step 10 need not be.
    four, eight = fake_checkpoint(run, 4), fake_checkpoint(run, 8)
    (run.folder / "metrics.jsonl").write_text('{"step": 4, "validation_metrics/loss": 2.0}\n')
    recovery.remove_cut_off(run)
    assert four.exists() and not eight.exists()
    recovery.remove_cut_off(run)
    ten = fake_checkpoint(run, 10)
    recovery.remove_cut_off(run)
    assert four.exists() and ten.exists()

    # A run from scratch ignores a folder with nothing whole in it; a branch must not see one.
    cut = [fake_checkpoint(each, 10, whole=False) for each in (source, branch)]
    for each in (source, branch):
        recovery.remove_cut_off(each)
    assert cut[0].exists() and not (branch.folder / "checkpoint").exists()
    only = fake_checkpoint(branch, 12)
    recovery.remove_cut_off(branch)
    assert not only.exists() and not (branch.folder / "checkpoint").exists()


def test_crossings_and_interpolation() -> None:
    gaps = dict(enumerate([1, -1, 0, -1, -2], 1))
    assert below_from(range(1, 6), gaps.get) == 4
    assert below_from([1, 2, 3], gaps.get) is None
    assert below_from([2, 5], gaps.get) == 2
    assert below_from([], gaps.get) is None
    points = [(1.0, 5.0), (3.0, 4.0), (4.0, 1.0)]
    found = [interpolate(points, x) for x in (0.9, 1.0, 2.0, 3.0, 3.5, 4.0, 4.1)]
    assert found == [None, 5.0, 4.5, 4.0, 2.5, 1.0, None]
    assert interpolate([], 1.0) is None


@pytest.mark.slow
def test_whole_study(tmp_path: Path) -> None:
    """A study killed in a branch goes on; branched models equal those trained in a single run."""
    settings = {**SMALL, "training.steps": 8, "validation.freq": 2, "checkpoint.interval": 1,
                "lr_scheduler.warmup_steps": 2, "lr_scheduler.decay_ratio": 0.5}  # fmt: skip
    command = [sys.executable, "-m", "lighthouse_commands.main", "recovery", DEBUG]
    command += ["--output", tmp_path / "out", "--splits", "0.5", "0.75", "--seeds", "0", "1"]
    command += ["--dense-steps", "6", *line_of(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment)
    branch = tmp_path / "out/split=0.75,seed=0"
    deadline = time.monotonic() + 500
    while not (branch / "checkpoint/step-7/.metadata").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    # The run holds the lock until it has ended.
    with (tmp_path / "out/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "8 models in 12 runs: 46 steps, 60 if each model were trained alone" in done.stdout
    assert "12 runs, 4 of them finished earlier" in done.stdout
    log = (branch / "log.txt").read_text()
    assert log.count("starting 1 training process") == log.count("Goes on from") == 2
    with (tmp_path / "out/results.csv").open() as file:
        rows = {(row["run"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 8
    for (name, _), row in rows.items():
        assert float(row["seconds"]) > 0
        assert row["tokens"] == ("3072" if name == "dense, 6 steps" else "4096")
    assert (tmp_path / "out/loss_over_time.png").exists()

    branched = {
        "split 0.75": (["lighthouse_to=4", "lighthouse_to=6", "split=0.75"], 6, 8),
        "dense, 6 steps": (["dense", "dense,steps=6"], 0, 6),
    }
    for name, (runs, switch, last) in branched.items():
        plain = tmp_path / name.replace(" ", "_")
        line = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
        line += ["--rdzv-endpoint", "localhost:0", "-m"]
        line += ["torchtitan.models.llama3_lighthouse.train", "--job.config_file", str(DEBUG)]
        line += [*line_of({**settings, "training.steps": last, "debug.seed": 0}),
                 "--lighthouse.dense_from_step", str(switch)]  # fmt: skip
        line += ["--job.dump_folder", str(plain)]
        subprocess.run(line, env=environment, check=True, capture_output=True)
        whole, joined = read_metrics(plain), {}
        for run in runs:
            joined |= read_metrics(tmp_path / f"out/{run},seed=0")
        assert whole.keys() == set(range(1, last + 1))
        for key in ("loss_metrics/global_avg_loss", "grad_norm", "validation_metrics/loss",
                    "n_tokens_seen", "lighthouse/stage", "lr"):  # fmt: skip
            found = {step: joined[step].get(key) for step in whole}
            assert found == {step: entry.get(key) for step, entry in whole.items()}, key
        final = float(rows[name, "0"]["held-out loss"])
        assert final == whole[last]["validation_metrics/loss"]
