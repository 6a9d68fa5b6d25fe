"""The runs that follow from a contest's file, and the steps that take equal time."""

import json
from pathlib import Path

import numpy as np
import pytest
from contest_cases import at_equal_time
from pages import ROOT

from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.stages import stages_of
from torchtitan.models.llama3_lighthouse.studies.contest_checks import check_runs
from torchtitan.models.llama3_lighthouse.studies.contest_file import read_contest
from torchtitan.models.llama3_lighthouse.studies.contest_plan import Planner, last_checkpoint
from torchtitan.models.llama3_lighthouse.studies.contest_rates import rates_of
from torchtitan.models.llama3_lighthouse.studies.contest_results import Results

FILES = sorted((ROOT / "train_configs/contests").glob("*.toml"))


def test_a_timing_run_has_a_few_steps_of_every_stage(path, tmp_path) -> None:
    text = path.read_text().replace(
        'schedule = ["window until=6", "dense"]',
        'schedule = ["dense until=4 seq_len=128", "window until=6 window=16", "dense"]',
    )
    path.write_text(text)
    contest = read_contest(path)
    planner = Planner(contest, tmp_path / "out", ["--training.max_norm", "0.5"])
    run = planner.timing_run(contest.arms["window"])
    assert [(stage.attention, stage.seq_len, stage.last) for stage in stages_of(run.config)] == [
        ("dense", 128, 40), ("lighthouse", 512, 80), ("dense", 512, 120)]  # fmt: skip
    assert run.config.training.steps == 120 and not run.config.validation.enable
    whole = planner.run(contest.arms["window"], 2e-3, 1)
    assert whole.config.training.steps == 8 and whole.config.checkpoint.enable


def test_equal_seconds_decide_the_steps_of_each_arm(call, faked, path, tmp_path) -> None:
    at_equal_time(path, 40)
    faked.fast = 0.25
    out, code = call()
    assert not code and "lighthouse against dense: better" in out
    # 75% of the steps take 0.25 s and the rest 0.5 s: 0.3125 s in the mean.
    # Steps are multiples of 4.
    steps = json.loads((tmp_path / "out/steps.json").read_text())
    assert steps == {"dense": 80, "window": 128, "lighthouse": 128}
    results = Results(read_contest(path), tmp_path / "out")
    assert results.runs.groupby("arm").step.unique().map(list).to_dict() == {
        name: [number] for name, number in steps.items()
    }
    assert np.allclose(results.runs["GPU seconds"], 40)
    assert results.runs["steps by kind"].str.contains('"1 lighthouse": 96').sum() == 4
    # The steps stay, although another machine would take other times.
    faked.fast = 0.1
    trained = len(faked.trained)
    call()
    assert len(faked.trained) == trained
    assert "window: 128 steps; rate 0.002, seeds 1, 2;" in call("--list")[0]


@pytest.mark.parametrize(("seconds", "until", "message"), [
    (1, "75%", "gpu_seconds = 1 leaves arms.dense 0 steps of 0.500 s, a multiple of valid"),
    (-1, "75%", "gpu_seconds = -1 must be above 0"),
    (40, "6", "arms.window says until=6, and gpu_seconds decides how many steps there are"),
])  # fmt: skip
def test_seconds_that_decide_nothing_are_refused(
    call, faked, path, seconds, until, message
) -> None:
    at_equal_time(path, seconds)
    path.write_text(path.read_text().replace("until=75%", f"until={until}"))
    _, line = call()
    assert message in line and "\n" not in line
    assert all(name.endswith(",times") for name in faked.trained)


def test_overrides_of_what_the_contest_sets_are_refused(call) -> None:
    for flag in ("--optimizer.lr", "--debug.seed", "--lighthouse.schedule"):
        _, line = call(flag, "1")
        assert f"{flag} is set by" in line


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_contests_of_the_repository_can_be_planned(file: Path, tmp_path: Path) -> None:
    contest = read_contest(file)
    text = ["--training.dataset_path", str(ROOT), "--validation.dataset_path", str(ROOT)]
    extra = text if "--training.dataset_path FOLDER" in file.read_text() else []
    planner = Planner(contest, tmp_path / "out", extra)
    # They are for a GPU, which need not be here.
    check_runs(planner, rates_of(contest, tmp_path), timed=True, device="cuda")
    arm = next(iter(contest.arms.values()))
    run = planner.run(arm, arm.rates[0], contest.seeds[-1])
    assert run.config.lighthouse.shuffle_seed == run.config.debug.seed == contest.seeds[-1]
    for each in (run, planner.timing_run(arm)):
        # The trainer parses the command line.
        parsed, planned = LighthouseConfigManager().parse_args(each.arguments), each.config
        if each.needs:
            planned.checkpoint.initial_load_path = str(last_checkpoint(each.needs))
        assert parsed.to_dict() == planned.to_dict()
