"""Contests: the file, the rule, resumes, the widening of grids and the report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from launch import exit_code_of
from scipy import stats

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.errors import UserError
from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.stages import stage_at, stages_of
from torchtitan.models.llama3_lighthouse.studies import contest as contests
from torchtitan.models.llama3_lighthouse.studies.contest_data import (
    mark_trained,
    seconds_of_steps,
    steps_by_kind,
)
from torchtitan.models.llama3_lighthouse.studies.contest_file import Contest, fix, read_contest
from torchtitan.models.llama3_lighthouse.studies.contest_measures import (
    Number,
    for_tuning,
    read_numbers,
    write_numbers,
)
from torchtitan.models.llama3_lighthouse.studies.contest_plan import last_checkpoint
from torchtitan.models.llama3_lighthouse.studies.contest_plots import PLOTS
from torchtitan.models.llama3_lighthouse.studies.contest_report import report
from torchtitan.models.llama3_lighthouse.studies.contest_results import Results
from torchtitan.models.llama3_lighthouse.studies.contest_statistics import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    comparison_level,
    in_words,
    judge,
    t_interval,
)
from torchtitan.models.llama3_lighthouse.studies.sweeps import slots_of

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "train_configs/contests").glob("*.toml"))
DEBUG = ROOT / "train_configs/contests/debug.toml"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of the debug contest that may be edited."""
    text = DEBUG.read_text().replace("../debug", f"{ROOT}/train_configs/debug")
    (tmp_path / "contest.toml").write_text(text)
    return tmp_path / "contest.toml"


@pytest.fixture
def call(path: Path, tmp_path: Path, monkeypatch, capsys):
    """Run the command without plots; return what it printed and its exit code or message."""

    def run(*line: str) -> tuple[str, int | str | None]:
        argv = ["lighthouse", "contest", path, "--output", tmp_path / "out", "--no-plots", *line]
        code = exit_code_of(main, monkeypatch, *argv)
        captured = capsys.readouterr()
        return captured.out + captured.err, code

    return run


def write_logs(
    run, rates_best: float = 2e-3, gain: float = 0.05, fast: float = 0.5, shift: float = 0.0
) -> None:
    """Log lines and measures of a run whose arm "lighthouse" is better by ``gain``.

    Steps take 0.5 s, and ``fast`` where they are not dense. Losses are higher by ``shift``.
    """
    rate, seed = run.settings["optimizer.lr"], run.settings["debug.seed"]
    loss = 1.5 + abs(np.log(rate / rates_best)) + 0.001 * seed
    loss += shift - gain * run.name.startswith("lighthouse")
    lines, stages, last = [], stages_of(run.config), run.config.training.steps
    for step in range(1, last + 1):
        selects = stage_at(step, stages).attention == "lighthouse"
        lines.append(
            {
                "step": step,
                "n_tokens_seen": 512 * step,
                "lighthouse/stage": float(selects),
                "time_metrics/end_to_end(s)": fast if selects else 0.5,
                "loss_metrics/global_avg_loss": loss,
            }
        )
        if step == 1 or step % 4 == 0:
            lines.append({"step": step, "validation_metrics/loss": loss + last - step})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


@pytest.fixture
def faked(monkeypatch):
    """Runs and measures in place of training; lists those that were asked for."""
    calls = SimpleNamespace(
        trained=[], measured=[], kill_at=None, best=2e-3, failing=(), fast=0.5, reason="planted",
        shift=0.0,
    )  # fmt: skip

    def train(run, processes, title, environment, lock) -> int:
        calls.trained.append(run.name)
        if run.name in calls.failing:
            (run.folder / "log.txt").write_text(f"Error: {calls.reason}\n")
            return 1
        write_logs(run, calls.best, fast=calls.fast, shift=calls.shift)
        last_checkpoint(run).mkdir(parents=True)
        return 0

    def measure(contest, run, environment, lock) -> int:
        calls.measured.append(run.name)
        if len(calls.measured) == calls.kill_at:
            raise KeyboardInterrupt
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        loss = json.loads(lines[-1])["validation_metrics/loss"]
        documents = [Number("loss", n, loss + 0.1 * n) for n in range(4)]
        retrieval = Number("retrieval/passkey/512", None, 0.5)
        write_numbers(run.folder, [Number("validation", None, loss), *documents, retrieval])
        return 0

    monkeypatch.setattr(contests, "train", train)
    monkeypatch.setattr(contests, "measure", measure)
    return calls


def contest_with(**values) -> Contest:
    """The debug contest with other values."""
    found = read_contest(DEBUG)
    return Contest(**{**vars(found), **values})


def test_intervals_are_students_t() -> None:
    # By hand: mean 3, standard deviation 1.5811, t of 4 degrees of freedom 2.7764.
    found = t_interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.95)
    assert found.low == pytest.approx(3 - 2.776445 * 1.581139 / 5**0.5, abs=1e-5)
    values = np.random.default_rng(0).normal(size=7)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    ours = t_interval(values.tolist(), 0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert t_interval([1.0], 0.95).low is None


def test_an_arm_against_itself_is_no_difference() -> None:
    contest = contest_with(margin=0.0)
    random = np.random.default_rng(1)
    draws = 600
    words = [judge(contest, (random.normal(size=6) - random.normal(size=6)).tolist()).word
             for _ in range(draws)]  # fmt: skip
    alarms = draws - words.count(NO_DIFFERENCE)
    level = 1 - comparison_level(contest)
    # No more than chance allows at the stated level, 0.025 for one of two comparisons.
    assert level == pytest.approx(0.025)
    assert 0 < alarms <= stats.binom.ppf(0.999, draws, level)


@pytest.mark.parametrize(("direction", "word"), [("higher", BETTER), ("lower", WORSE)])
def test_a_planted_difference_is_found_on_its_side(direction: str, word: str) -> None:
    contest = contest_with(direction=direction, margin=0.01)
    gaps = (0.05 + 0.005 * np.random.default_rng(2).normal(size=6)).tolist()
    assert judge(contest, gaps).word == word
    assert judge(contest, [-gap for gap in gaps]).word == (WORSE if word == BETTER else BETTER)
    assert word in in_words(contest, "a", "b", judge(contest, gaps))


def test_the_margin_decides_by_the_rule() -> None:
    gaps = [-0.011, -0.012, -0.012, -0.013, -0.0125, -0.008]
    assert judge(contest_with(rule="mean", margin=0.01), gaps).word == BETTER
    assert judge(contest_with(rule="interval", margin=0.01), gaps).word == NO_DIFFERENCE
    within = judge(contest_with(margin=0.02), gaps)
    assert within.word == NO_DIFFERENCE and within.equal
    for gaps in ([-0.5], [-0.5, -0.5]):
        alone = judge(contest_with(), gaps)
        assert "no verdict" in in_words(contest_with(), "a", "b", alone)
    assert judge(contest_with(), [0.0, 0.0]).equal


def test_a_contest_goes_on_where_it_was_killed_and_repeats_nothing(call, faked, tmp_path) -> None:
    faked.kill_at = 3
    call()
    faked.kill_at = None
    out, code = call()
    assert code is None or code == 0
    # The run that was killed while it was measured is not trained again. Seed 1 has two runs of
    # dense and one of each other arm, and seed 2 one of each.
    assert len(faked.trained) == len(set(faked.trained)) == 7
    assert len(faked.measured) == 8
    assert "lighthouse against dense: better" in out
    assert "window against dense: no difference" in out
    before = (tmp_path / "out/results.md").read_text()
    call()
    assert len(faked.trained) == 7
    (tmp_path / "out/results.md").unlink()
    call("--report-only")
    assert (tmp_path / "out/results.md").read_text() == before
    assert "0.05" in before and read_contest(tmp_path / "contest.toml").digest in before


def test_the_list_says_what_has_finished(call, faked, path, tmp_path) -> None:
    with_start(path)
    path.write_text("rate_seed = 7\n" + path.read_text())

    def listed() -> list[str]:
        out, code = call("--list")
        assert not code
        return [line.partition("seeds 1, 2; ")[2] or line.rpartition("; ")[2]
                for line in out.splitlines()]  # fmt: skip

    assert listed() == ["nothing has finished"] * 4
    assert not (tmp_path / "out/contest.json").exists()
    faked.failing = ("dense,lr=0.002,seed=7", "window,lr=0.002,seed=2")
    call("--arms", "dense", "window")
    assert listed() == [
        "finished: seeds 7, 1, 2",
        "finished: 1 of 2 runs that choose the rate",
        "finished: seed 1",
        "nothing has finished",
    ]
    faked.failing = ()
    call()
    chosen = "finished: 2 of 2 runs that choose the rate, which is 0.002; seeds 1, 2"
    assert listed() == ["finished: seeds 7, 1, 2", chosen, *["finished: seeds 1, 2"] * 2]


def test_a_changed_file_is_refused_beside_old_results(call, faked, path) -> None:
    call()
    path.write_text(path.read_text().replace("margin = 0.01", "margin = 0.001"))
    for line in ((), ("--list",), ("--report-only",)):
        _, message = call(*line)
        assert "has changed since the results" in message and "\n" not in message


def test_other_overrides_are_refused_beside_old_results(call, faked, tmp_path) -> None:
    call("--training.max_norm", "0.5")
    record = json.loads((tmp_path / "out/contest.json").read_text())
    assert record["overrides"] == ["--training.max_norm", "0.5"]
    trained = len(faked.trained)
    for line in ((), ("--list",), ("--training.max_norm", "0.7")):
        _, message = call(*line)
        assert "were begun with overrides ['--training.max_norm', '0.5']" in message
    changed = record | {"text": record["text"] | {"training": "another"}}
    (tmp_path / "out/contest.json").write_text(json.dumps(changed))
    _, message = call("--training.max_norm", "0.5")
    assert "were begun with text {'training': 'another'" in message
    assert record["environment"]["torch"] == torch.__version__
    _, message = call("--report-only", "--training.max_norm", "0.5")
    assert "leave out --training.max_norm 0.5" in message
    assert "pass one of them" in call("--list", "--only-times")[1]
    assert len(faked.trained) == trained


def test_damaged_records_are_named(call, faked, tmp_path) -> None:
    call("--widen")
    for name in ("contest.json", "dense,lr=0.001,seed=1/measures.json"):
        path = tmp_path / "out" / name
        before = path.read_text()
        path.write_text(before[:5])
        _, message = call()
        assert f"{name} cannot be read" in message and "restore or remove it" in message
        path.write_text(before)
    (tmp_path / "out/contest.json").unlink()
    for line in ((), ("--report-only",)):
        assert "but no contest.json that says whose it is" in call(*line)[1]


def test_a_changed_base_is_refused_too(path, tmp_path) -> None:
    base = tmp_path / "base.toml"
    base.write_text((ROOT / "train_configs/debug_schedule_cpu.toml").read_text())
    text = path.read_text().replace(f"{ROOT}/train_configs/debug_schedule_cpu.toml", "base.toml")
    path.write_text(text)
    fix(read_contest(path), tmp_path / "out")
    base.write_text(base.read_text() + "\n# another\n")
    with pytest.raises(UserError, match="or its base has changed"):
        fix(read_contest(path), tmp_path / "out")


def test_a_best_rate_at_the_edge_is_said_and_widened_on_request(call, faked, tmp_path) -> None:
    faked.best = 8e-3
    out, _ = call()
    assert "dense: best rate 0.002, at the edge of its grid; --widen tries further ones" in out
    assert not (tmp_path / "out/widened.json").exists()
    call("--widen")
    widened = json.loads((tmp_path / "out/widened.json").read_text())["dense"]
    assert widened == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert "dense,lr=0.008,seed=2" in faked.trained


def test_a_failed_rate_leaves_out_its_arm_alone(call, faked, path, tmp_path) -> None:
    path.write_text(path.read_text().replace("rates = [2e-3]", "rates = [1e-3, 2e-3]"))
    faked.failing = ("dense,lr=0.001,seed=1",)
    out, message = call()
    assert "dense: left out, as runs that choose its rate failed" in out
    assert "dense,lr=0.001,seed=1" in str(message)
    assert {"window,lr=0.002,seed=2", "lighthouse,lr=0.002,seed=2"} <= set(faked.trained)
    assert "dense,lr=0.002,seed=2" not in faked.trained
    assert (
        "window against dense: no verdict, as 0 of 2 seeds have"
        in (tmp_path / "out/results.md").read_text()
    )
    faked.failing = ()
    out, code = call()
    assert not code and "window against dense: no difference" in out


def test_a_rate_that_diverges_is_not_the_best_and_stays_so(call, faked, tmp_path) -> None:
    faked.best, faked.reason = 8e-3, "step 5 (dense stage): not finite on at least one rank"
    faked.failing = ("dense,lr=0.004,seed=1",)
    for _ in range(2):
        out, code = call("--widen")
        assert not code and "dense: best rate 0.002" in out
        assert "lighthouse against dense: better" in out
    assert faked.trained.count("dense,lr=0.004,seed=1") == 1
    measures = pandas.read_csv(tmp_path / "out/measures.csv")
    assert measures[measures.rate == 0.004].value.isna().all()
    # One that diverges while it is judged leaves no verdict.
    (tmp_path / "out/dense,lr=0.002,seed=2/finished").unlink()
    (tmp_path / "out/dense,lr=0.002,seed=2/trained").unlink()
    faked.failing = ("dense,lr=0.002,seed=2",)
    out, message = call("--widen")
    assert "1 of" in str(message) and "failed: dense,lr=0.002,seed=2" in str(message)
    assert "window against dense: no verdict, as 1 of 2 seeds have finished in both" in out


def test_arms_can_train_one_after_the_other(call, faked, path) -> None:
    at_equal_time(path, 40)
    out, code = call("--arms", "dense", "window")
    assert not code and not any(name.startswith("lighthouse") for name in faked.trained)
    assert "window against dense: no difference" in out
    assert "lighthouse against dense: no verdict, as 0 of 2 seeds have finished in both" in out
    trained = len(faked.trained)
    out, code = call("--arms", "lighthouse")
    assert not code and all(name.startswith("lighthouse") for name in faked.trained[trained:])
    assert "lighthouse against dense: better" in out
    trained = len(faked.trained)
    out, _ = call()
    assert "lighthouse against dense: better" in out and len(faked.trained) == trained
    assert "--arms other is no arm" in call("--arms", "other")[1]


def test_seeds_can_train_one_after_the_other(call, faked, path, tmp_path) -> None:
    with_start(path)
    path.write_text("rate_seed = 7\n" + path.read_text())
    out, code = call("--seeds", "2")
    assert not code and "no verdict, as 1 of 2 seeds have finished in both" in out
    assert {name.rpartition("=")[2] for name in faked.trained} == {"7", "2"}
    out, code = call("--seeds", "1")
    assert not code and "lighthouse against dense: better" in out
    assert len(faked.trained) == len(set(faked.trained)) == 2 + 2 * 3 + 3
    assert len(pandas.read_csv(tmp_path / "out/runs.csv")) == 2 + 2 * 3
    assert "--seeds 7 is no seed of" in call("--seeds", "7")[1]


def test_several_seeds_choose_a_rate_by_their_mean(call, faked, path, monkeypatch) -> None:
    path.write_text("rate_seed = [7, 8, 9]\n" + path.read_text())
    # One lucky run speaks for 1e-3.
    lucky = {("dense,lr=0.001,seed=8"): -0.5}
    measure = contests.measure

    def measured(contest, run, environment, lock) -> int:
        code = measure(contest, run, environment, lock)
        numbers = read_numbers(run.folder)
        write_numbers(run.folder, [Number(n.measure, n.document, n.value + lucky.get(run.name, 0))
                                   for n in numbers])  # fmt: skip
        return code

    monkeypatch.setattr(contests, "measure", measured)
    out, _ = call()
    assert "dense: best rate 0.002" in out
    assert {
        f"dense,lr={rate},seed={seed}" for rate in ("0.001", "0.002") for seed in (7, 8, 9)
    } <= {*faked.trained}
    assert "dense: rates 0.001, 0.002 (seeds 7, 8, 9), then seeds 1, 2" in call("--list")[0]


def test_runs_of_another_installation_count(call, faked, tmp_path) -> None:
    call()
    trained = len(faked.trained)
    for record in (tmp_path / "out").glob("*/config.json"):
        config = json.loads(record.read_text())
        config["model"]["hf_assets_path"] = "/elsewhere/assets/byte_tokenizer"
        record.write_text(json.dumps(config))
    assert not call()[1] and len(faked.trained) == trained


def test_times_come_from_runs_that_shared_no_gpu(call, faked, monkeypatch, path, tmp_path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    train = contests.train
    slow = []

    def train_in_turn(run, processes, title, environment, lock) -> int:
        code = train(run, processes, title, environment, lock)
        if "CUDA_VISIBLE_DEVICES" in environment:
            # Runs that share a GPU are slow.
            slow.append(run.name)
            path = run.folder / "metrics.jsonl"
            path.write_text(path.read_text().replace("0.5", "9.0"))
        return code

    monkeypatch.setattr(contests, "train", train_in_turn)
    call("--at-once", "2", "--per-gpu", "2")
    assert len(slow) == 7
    assert set(faked.trained) - set(slow) == {"dense,times", "window,times", "lighthouse,times"}
    times = pandas.read_csv(tmp_path / "out/times.csv")
    assert len(times) == 5 and np.allclose(times["GPU seconds"], 0.5)
    runs = Results(read_contest(path), tmp_path / "out").runs
    assert len(runs) == 6 and np.allclose(runs["GPU seconds"], 8 * 0.5)
    # Another machine's times take the place of these.
    for each in ("dense", "window", "lighthouse"):
        shutil.rmtree(tmp_path / f"out/{each},times")
    monkeypatch.setattr(contests, "train", train)
    before = (tmp_path / "out/runs.csv").read_text()
    (tmp_path / "out/times.csv").unlink()
    call("--only-times")
    assert len(pandas.read_csv(tmp_path / "out/times.csv")) == 5
    assert (tmp_path / "out/runs.csv").read_text() == before


def test_a_timing_run_has_a_few_steps_of_every_stage(path, tmp_path) -> None:
    text = path.read_text().replace(
        'schedule = ["window until=6", "dense"]',
        'schedule = ["dense until=4 seq_len=128", "window until=6 window=16", "dense"]',
    )
    path.write_text(text)
    contest = read_contest(path)
    planner = contests.Planner(contest, tmp_path / "out", ["--training.max_norm", "0.5"])
    run = planner.timing_run(contest.arms["window"])
    assert [(stage.attention, stage.seq_len, stage.last) for stage in stages_of(run.config)] == [
        ("dense", 128, 40), ("lighthouse", 512, 80), ("dense", 512, 120)]  # fmt: skip
    assert run.config.training.steps == 120 and not run.config.validation.enable
    whole = planner.run(contest.arms["window"], 2e-3, 1)
    assert whole.config.training.steps == 8 and whole.config.checkpoint.enable


def at_equal_time(path: Path, seconds: float) -> None:
    """Let the contest at ``path`` give all arms as many GPU seconds."""
    text = path.read_text().replace("training.steps = 8\n", "")
    path.write_text(f"gpu_seconds = {seconds}\n" + text.replace("until=6", "until=75%"))


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


def with_start(path: Path, more: str = "") -> None:
    path.write_text(
        path.read_text().replace(
            "[distance]",
            "[start]\nrate = 5e-4\ntraining.steps = 12\n"
            f'lighthouse.schedule = ["dense seq_len=128"]\n{more}\n[distance]',
        )
    )


def test_arms_begin_from_one_run_of_each_seed(call, faked, path, tmp_path) -> None:
    # No measure is taken of it, so its validation may be its own.
    with_start(path, "training.seq_len = 256\nvalidation.seq_len = 256")
    out, code = call("--training.max_norm", "0.5")
    assert not code, out
    assert faked.trained[:2] == ["start,seed=1", "dense,lr=0.001,seed=1"]
    assert [name for name in faked.trained if name.startswith("start")] == [
        "start,seed=1", "start,seed=2"]  # fmt: skip
    assert faked.trained.index("start,seed=2") < faked.trained.index("dense,lr=0.002,seed=2")
    # The runs that arms begin from are not measured, and stand in no table.
    assert not any("start" in name for name in faked.measured)
    assert "start," not in (tmp_path / "out/runs.csv").read_text()
    assert (
        "from the weights of 12 steps at rate 0.0005" in (tmp_path / "out/results.md").read_text()
    )
    contest = read_contest(path)
    planner = contests.Planner(contest, tmp_path / "out", ["--training.max_norm", "0.5"])
    arm, start = planner.run(contest.arms["window"], 2e-3, 2), planner.start_run(2)
    read = LighthouseConfigManager().parse_args
    section = read(arm.arguments).checkpoint
    assert section.initial_load_path == str(start.folder / "checkpoint/step-12")
    assert section.initial_load_model_only
    config = read(start.arguments)
    assert (config.optimizer.lr, config.training.steps, config.debug.seed) == (5e-4, 12, 1002)
    assert config.lighthouse.shuffle_seed == 1002 and config.training.max_norm == 0.5
    assert stages_of(config)[0].seq_len == 128 and config.checkpoint.interval == 12
    assert config.validation.seq_len == 256 and read(arm.arguments).validation.seq_len == 512
    # Times do not depend on weights.
    timed = read(planner.timing_run(contest.arms["window"]).arguments)
    assert timed.checkpoint.initial_load_path is None


def test_text_of_a_start_is_recorded_too(call, faked, path, tmp_path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a.txt").write_text("A book. " * 99)
    with_start(path, f'training.dataset = "c4_local"\ntraining.dataset_path = "{tmp_path}/short"')
    assert not call()[1]
    text = json.loads((tmp_path / "out/contest.json").read_text())["text"]
    assert len({*text.values()}) == 3 and text.keys() == {"training", "validation", "start"}
    (tmp_path / "short/a.txt").write_text("Another book. " * 99)
    assert "were begun with text" in call()[1]


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_a_start_whose_weights_are_gone_trains_again(call, faked, path, tmp_path, shift) -> None:
    """Only one with other losses is another model, which the report tells apart."""
    with_start(path)
    faked.failing = ("window,lr=0.002,seed=2",)
    call()
    faked.trained.clear()
    faked.failing = ()
    shutil.rmtree(tmp_path / "out/start,seed=2/checkpoint")
    faked.shift = shift
    out, code = call()
    assert not code and "start,seed=2 trains again, as its weights are gone; the new ones" in out
    assert ("another model than before" if shift else "the same model as before") in out
    assert faked.trained == ["start,seed=2", "window,lr=0.002,seed=2"]
    runs = pandas.read_csv(tmp_path / "out/runs.csv").query("stage == 'seeds'")
    assert runs.groupby("seed").start.nunique().to_dict() == {1: 1, 2: 1 + bool(shift)}
    assert runs.start.nunique() == 2 + bool(shift)
    apart = "Runs of seed 2 began from several trainings of their start"
    assert (apart in (tmp_path / "out/results.md").read_text()) == bool(shift)


def test_a_run_that_goes_on_keeps_its_start(call, faked, path, tmp_path) -> None:
    """It needs none, so nothing trains again although the start's weights are gone."""
    with_start(path)
    faked.failing = ("window,lr=0.002,seed=2",)
    call()
    run = tmp_path / "out" / faked.failing[0]
    began = (run / "start_id").read_text()
    (run / "checkpoint/step-4").mkdir(parents=True)
    (run / "checkpoint/step-4/.metadata").touch()
    (run / "metrics.jsonl").write_text('{"step": 4, "validation_metrics/loss": 1.0}\n')
    shutil.rmtree(tmp_path / "out/start,seed=2/checkpoint")
    faked.trained.clear()
    faked.failing = ()
    out, code = call()
    assert not code and "trains again" not in out
    assert faked.trained == [run.name] and (run / "start_id").read_text() == began


@pytest.fixture
def carried(call, faked, path, tmp_path):
    """The small files of a contest that a first session left unfinished, and text at another place.

    One of the two arms that trained then failed in seed 2. Returns a call of the second session.
    """
    for name in ("a", "b", "c"):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / f"text/{name}.txt").write_text(f"Book {name}. " * 200)
    at_equal_time(path, 40)
    with_start(path)
    path.write_text(path.read_text().replace(
        "[settings]", '[settings]\ntraining.dataset = "c4_local"'))  # fmt: skip
    faked.failing = ("window,lr=0.002,seed=2",)
    call("--arms", "dense", "window", "--training.dataset_path", str(tmp_path / "text"))
    assert "dense,lr=0.002,seed=2" in faked.trained
    faked.failing = ()
    faked.trained.clear()
    shutil.copytree(
        tmp_path / "out", tmp_path / "new/out", ignore=shutil.ignore_patterns("checkpoint")
    )
    shutil.move(tmp_path / "text", tmp_path / "new/text")
    shutil.rmtree(tmp_path / "out")
    place = ("--output", str(tmp_path / "new/out"))
    text = ("--training.dataset_path", str(tmp_path / "new/text"))
    return lambda *line: call(*place, *line, *text)


@pytest.mark.parametrize("tables", [True, False])
def test_a_contest_goes_on_at_another_machine(carried, faked, tmp_path, tables: bool) -> None:
    """Only the start of the seed that misses a run trains again, and each start once."""
    if not tables:
        # They follow from the folders of the runs.
        for file in ("steps.json", "times.csv", "runs.csv", "measures.csv", "curves.csv"):
            (tmp_path / "new/out" / file).unlink()
    out, code = carried("--arms", "dense", "window")
    assert not code and faked.trained == ["start,seed=2", "window,lr=0.002,seed=2"]
    assert "window against dense: no difference" in out
    faked.trained.clear()
    out, code = carried()
    assert not code and "lighthouse against dense: better" in out
    rest = ["lighthouse,times", "start,seed=1", "lighthouse,lr=0.002,seed=1",
            "lighthouse,lr=0.002,seed=2"]  # fmt: skip
    assert sorted(faked.trained) == sorted(rest)
    assert "several trainings" not in (tmp_path / "new/out/results.md").read_text()


@pytest.mark.parametrize(("change", "word"), [("contents", "text"), ("names", "order")])
def test_a_contest_goes_on_with_no_other_text(carried, faked, tmp_path, change, word) -> None:
    """Names of files decide their shuffled order."""
    file = tmp_path / "new/text/c.txt"
    if change == "contents":
        file.write_text("Another book. " * 200)
    else:
        file.rename(file.with_name("d.txt"))
    _, message = carried()
    assert f"were begun with {word} " in str(message) and not faked.trained
    (tmp_path / "new/out/contest.json").unlink()
    for table in (tmp_path / "new/out").glob("*.csv"):
        table.unlink()
    _, message = carried()
    assert "config.json, but no contest.json that says whose it is" in str(message)
    assert not faked.trained


def test_a_run_that_was_not_measured_and_lost_its_weights_trains_again(
    carried, faked, tmp_path
) -> None:
    run = tmp_path / "new/out/dense,lr=0.001,seed=1"
    (run / "finished").unlink()
    # Measured, so nothing is left to do.
    carried("--arms", "dense")
    assert not faked.trained and (run / "finished").exists()
    for name in ("finished", "measures.json"):
        (run / name).unlink()
    out, _ = carried("--arms", "dense")
    assert "dense,lr=0.001,seed=1 trains again, as its weights are gone and" in out
    assert faked.trained == ["start,seed=1", "dense,lr=0.001,seed=1"]


def test_runs_of_one_start_are_not_told_apart(call, faked, path, tmp_path) -> None:
    with_start(path)
    assert not call()[1]
    assert "several trainings" not in (tmp_path / "out/results.md").read_text()


def test_an_arm_that_only_has_to_be_measured_needs_no_start(call, faked, path, tmp_path) -> None:
    with_start(path)
    faked.kill_at = 5
    call()
    trained = len(faked.trained)
    shutil.rmtree(tmp_path / "out/start,seed=2", ignore_errors=True)
    faked.kill_at = None
    out, code = call()
    assert not code and faked.measured[4] in faked.measured[5:]
    assert faked.measured[4] not in faked.trained[trained:]


def test_a_start_that_diverges_leaves_out_its_seed(call, faked, path, tmp_path) -> None:
    with_start(path)
    faked.failing, faked.reason = ("start,seed=1",), "loss is not finite"
    out, code = call()
    assert code and "start,seed=1: failed" in out
    assert not (tmp_path / "out/start,seed=1/finished").exists()
    assert "dense,lr=0.001,seed=1: left out, as it begins from start,seed=1" in out


def test_without_its_start_an_arm_is_left_out(call, faked, path) -> None:
    with_start(path)
    faked.failing = ("start,seed=2",)
    out, _ = call()
    assert "dense,lr=0.002,seed=2: left out, as it begins from start,seed=2" in out
    assert not any("seed=2" in name for name in faked.measured)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rate = 5e-4", "rate = 0.0", "start.rate = 0.0 must be a learning rate"),
        (
            "rate = 5e-4",
            "rate = 5e-4\ntraining.stepz = 3",
            "contest.toml: unknown key 'training.stepz'",
        ),
        ("training.steps = 12", "", "[start] names no training.steps"),
        (
            'rate = 5e-4\ntraining.steps = 12\nlighthouse.schedule = ["dense seq_len=128"]\n',
            "",
            "start.rate = None must be a learning rate",
        ),
        ("seq_len=128", "seq_len=1024", "contest.toml, start: lighthouse.schedule"),
        ("rate = 5e-4", "rate = 5e-4\noptimizer.lr = 1e-3", "start sets optimizer.lr, which runs"),
        ("rate = 5e-4", 'rate = 5e-4\nmodel.flavor = "17M"', "model.flavor, which all runs share"),
        (
            "training.max_norm = 1",
            'checkpoint.initial_load_path = "x"',
            "settings sets checkpoint.initial_load_path, which runs vary",
        ),
    ],
)
def test_a_bad_start_ends_in_one_line(call, path, old: str, new: str, message: str) -> None:
    path.write_text(path.read_text().replace("[settings]", "[settings]\ntraining.max_norm = 1"))
    with_start(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    _, line = call()
    assert message in line and "\n" not in line


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


def test_steps_beside_seconds_are_refused(call, path) -> None:
    path.write_text("gpu_seconds = 40\n" + path.read_text().replace("until=6", "until=75%"))
    assert "settings sets training.steps, which runs vary" in call()[1]


def test_seconds_of_a_step_are_the_median_of_its_stage(tmp_path) -> None:
    planner = contests.Planner(read_contest(DEBUG), tmp_path, [])
    run = planner.run(planner.contest.arms["window"], 2e-3, 1)
    run.folder.mkdir()
    # Six steps under the window, then two dense ones of three times the length.
    seconds = [40.0, 1.0, 1.0, 1.0, 9.0, 1.0, 30.0, 3.0]
    flags = [1.0] * 6 + [0.0] * 2
    entries = {
        step: {"time_metrics/end_to_end(s)": each, "lighthouse/stage": flag}
        for step, (each, flag) in enumerate(zip(seconds, flags, strict=True), 1)
    }
    mark_trained(run, alone=False)
    assert seconds_of_steps([(run, entries)]) == {}
    mark_trained(run, alone=True)
    assert seconds_of_steps([(run, entries)]) == {"1 lighthouse": 1.0, "2 dense": 16.5}
    assert steps_by_kind(run.config) == {"1 lighthouse": 6, "2 dense": 2}


STREAMS = (
    "the 4 sequences of a step cannot be shared by the text's 3 streams (lighthouse.data_streams "
    "= 3); set lighthouse.data_streams to 4, which the batches of all stages divide"
)


@pytest.mark.parametrize(("settings", "line", "message"), [
    # All of it fits the long stage, which comes last.
    (["lighthouse.data_streams = 3", "training.global_batch_size = 1",
      'lighthouse.schedule = ["dense until=50% seq_len=128", "dense"]'], (),
     f"lighthouse.schedule, stage 'dense until=24 seq_len=128': {STREAMS}"),
    (["rates = [1e-3, 1.0]", "optimizer.weight_decay = 1.0"], (),
     "optimizer.weight_decay = 1.0 with optimizer.lr = 1.0 takes away"),
    (['training.dataset = "c4_local"', 'training.dataset_path = "/none"'], (),
     "training.dataset_path = '/none' is not a folder"),
    (["training.global_batch_size = 3"], ("--processes", "2"),
     "training.global_batch_size = 3 must be a multiple of training.local_batch_size"),
    (["activation_checkpoint.offload_inputs = true", 'activation_checkpoint.mode = "full"'], (),
     "activation_checkpoint.offload_inputs = true needs a GPU"),
    (["lighthouse.dense_layers = [99]"], (), "lighthouse.dense_layers = [99]: "),
])  # fmt: skip
def test_a_bad_arm_is_refused_before_any_process(
    call, faked, path, tmp_path, monkeypatch, settings, line, message
) -> None:
    """Other arms train before it, so that its own process would find the mistake late."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    at_equal_time(path, 40)
    arm = ["rates = [2e-3]", 'lighthouse.schedule = ["window until=75%", "dense"]']
    keys = [each.partition(" ")[0] for each in settings]
    changed = [*settings, *(each for each in arm if each.partition(" ")[0] not in keys)]
    before = "\n".join(["[arms.window]", *arm])
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, "\n".join(["[arms.window]", *changed])))
    _, found = call(*line)
    assert f"contest.toml, arms.window: {message}" in str(found) and "\n" not in str(found)
    assert not faked.trained and not list((tmp_path / "out").iterdir())


def test_seeds_and_the_start_are_checked_before_any_process(call, faked, path) -> None:
    path.write_text(path.read_text().replace("seeds = [1, 2]", f"seeds = [1, {2**70}]"))
    _, found = call()
    assert f"contest.toml, seed {2**70}: " in str(found) and "debug.seed" in str(found)
    path.write_text(path.read_text().replace(f"{2**70}", "2"))
    with_start(path, "lighthouse.data_streams = 3")
    assert "contest.toml, start: lighthouse.schedule, stage 'dense seq_len=128': the 4" in call(
        "--list")[1]  # fmt: skip
    assert not faked.trained


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds = [1, 1] must be different"),
        ("seeds = [1, 2]", "seeds = [0, 1]", "must be different numbers from 1 on"),
        ('direction = "lower"', 'direction = "down"', "direction = 'down'; use lower or higher"),
        ('direction = "lower"', "", "names no direction"),
        ("margin = 0.01", "margin = -1", "margin = -1 must be at least 0"),
        ('["window", "dense"]', '["windw", "dense"]', "compare names 'windw'; the arms are dense"),
        ('["window", "dense"]', '["dense", "dense"]', "sets 'dense' against itself"),
        ("rates = [2e-3]", "rates = []", "must be different learning rates"),
        ("training.steps = 8", "training.step = 8", "did you mean 'steps'?"),
        ("training.steps = 8", "debug.seed = 3", "settings sets debug.seed, which runs vary"),
        ("prompts = 5", "prompt = 5", "'prompt' is not known"),
        ("documents = 4", "document = 4", "distance.document is not known"),
        ("documents = 4", 'documents = "all"', "distance.documents = 'all': the value"),
        ('["passkey"]', '["pass"]', "task 'pass' is not known"),
        ("margin = 0.01", 'margin = "1"', "margin = '1' must be a number"),
        ("margin = 0.01", "margin = 0.01\nseed_keys = [1]", "seed_keys = [1] must name keys"),
        ("margin = 0.01", 'margin = 0.01\nseed_keys = ["optimizer.lr"]', "must name keys that"),
        ("margin = 0.01", "margin = 0.01\nrate_seed = [1, 1]", "rate_seed = [1, 1] must be diff"),
        ("seeds = [1, 2]", "seeds = [[1], 2]", "seeds = [[1], 2] must be different numbers"),
        ("rates = [2e-3]", "rates = [1e-3, 1.0000001e-3]", "must be different learning rates"),
        ("rates = [2e-3]", "rates = [nan]", "must be different learning rates"),
        ('["passkey"]', '["passkey", "passkey"]', "names a task twice"),
        ('["window", "dense"]', '["dense", "lighthouse"]', "must hold pairs of arms, each once"),
        ("training.steps = 8", 'job.dump_folder = "x"', "settings sets job.dump_folder, which"),
        ("training.steps = 8", "metrics.log_freq = 10", "settings sets metrics.log_freq, which"),
        ("rates = [2e-3]", "rates = [2e-3]\nvalidation.steps = 1", "steps, which all runs share"),
        ("documents = 4", "documents = 0", "contest.toml: distance.documents = 0 must be at least"),
        ("documents = 4", "contexts = 5", "distance.contexts = 5: "),
        ("[settings]", '[settings]\nvalidation.dataset_path = "/none"', "/none"),
        ("margin = 0.01", "margin = nan", "margin = nan must be at least 0"),
        ("seeds = [1, 2]", "seeds = 1", "seeds = 1 must be a list in [ ]"),
        ("margin = 0.01", "margin = 0.01\nseed_keys = []", "seed_keys = [] makes all seeds one"),
        ("margin = 0.01", "margin = 0.01\nlevel = 1", "level = 1 must be from 0.5 to below 1"),
        (
            "until=6",
            "until=150%",
            "arms.window: lighthouse.schedule, stage 'window until=12': ",
        ),
        ("until=6", "until=x%", "arms.window: lighthouse.schedule, stage 'window until=x%': until"),
    ],
)
def test_a_bad_contest_ends_in_one_line(call, path, old: str, new: str, message: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    _, line = call()
    assert message in line and "\n" not in line


def test_overrides_of_what_the_contest_sets_are_refused(call) -> None:
    for flag in ("--optimizer.lr", "--debug.seed", "--lighthouse.schedule"):
        _, line = call(flag, "1")
        assert f"{flag} is set by" in line


@pytest.mark.parametrize("key", ["primary", "tuned_by"])
def test_a_measure_that_no_run_will_have_is_refused_before_any_runs(
    call, faked, path, key: str
) -> None:
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(key)]
    path.write_text("\n".join([f'{key} = "repeated/100"', *kept]))
    _, line = call()
    assert f"{key} = 'repeated/100' is not measured; use validation, loss, position/256" in line
    assert "repeated/480" in line and "retrieval/passkey/512" in line and not faked.trained


def test_runs_that_choose_a_rate_measure_no_more_than_it(path) -> None:
    contest = read_contest(path)
    names = ("validation", "beyond/256", "repeated/480", "retrieval/passkey/512")
    parts = {name: for_tuning(replace(contest, tuned_by=name)) for name in names}
    asked = {name: (each.distance.contexts, each.distance.distances, each.retrieval)
             for name, each in parts.items()}  # fmt: skip
    assert asked == {
        "validation": ((), (), []),
        "beyond/256": (None, (), []),
        "repeated/480": ((), None, []),
        "retrieval/passkey/512": ((), (), ["passkey"]),
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_contests_of_the_repository_can_be_planned(file: Path, tmp_path: Path) -> None:
    contest = read_contest(file)
    text = ["--training.dataset_path", str(ROOT), "--validation.dataset_path", str(ROOT)]
    extra = text if "--training.dataset_path FOLDER" in file.read_text() else []
    planner = contests.Planner(contest, tmp_path / "out", extra)
    # They are for a GPU, which need not be here.
    contests.check_runs(planner, contests.rates_of(contest, tmp_path), timed=True, device="cuda")
    arm = next(iter(contest.arms.values()))
    run = planner.run(arm, arm.rates[0], contest.seeds[-1])
    assert run.config.lighthouse.shuffle_seed == run.config.debug.seed == contest.seeds[-1]
    for each in (run, planner.timing_run(arm)):
        # The trainer parses the command line.
        parsed, planned = LighthouseConfigManager().parse_args(each.arguments), each.config
        if each.needs:
            planned.checkpoint.initial_load_path = str(last_checkpoint(each.needs))
        assert parsed.to_dict() == planned.to_dict()


def test_runs_can_share_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_of(4, 1, 2)] == ["0", "1", "0", "1"]
    with pytest.raises(UserError, match="needs 3 GPUs"):
        slots_of(5, 1, 2)


@pytest.mark.slow
def test_three_arms_train_and_are_judged(path, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    exit_code_of(main, monkeypatch, "lighthouse", "contest", path, "--output", out)
    assert "lighthouse against dense" in (out / "results.md").read_text()
    for name in PLOTS:
        assert (out / name).stat().st_size > 1000
    assert "against dense" in report(read_contest(path), out, plots=False)
