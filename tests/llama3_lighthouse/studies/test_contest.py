"""Whole contests: in which order they train, where they go on, and starts."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
from contest_cases import at_equal_time, with_start
from launch import exit_code_of

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.stages import stages_of
from torchtitan.models.llama3_lighthouse.studies import contest as contests
from torchtitan.models.llama3_lighthouse.studies import contest_data, sweeps
from torchtitan.models.llama3_lighthouse.studies.contest_file import read_contest
from torchtitan.models.llama3_lighthouse.studies.contest_plan import Planner
from torchtitan.models.llama3_lighthouse.studies.contest_plots import PLOTS
from torchtitan.models.llama3_lighthouse.studies.contest_report import report
from torchtitan.models.llama3_lighthouse.studies.contest_results import Results


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


@pytest.mark.parametrize(
    ("before", "then"),
    [
        (("--seeds", "2"), ("--seeds", "1")),
        (("--arms", "dense"), ("--arms", "lighthouse")),
        (("--arms", "dense"), ()),
    ],
)
def test_records_keep_finished_runs_while_others_train(call, faked, tmp_path, before, then) -> None:
    def kept() -> set[tuple[str, int]]:
        table = pandas.read_csv(tmp_path / "out/runs.csv").query("stage == 'seeds'")
        return {*zip(table.arm, table.seed, strict=True)}

    call(*before)
    finished = kept()
    faked.kill_at = len(faked.measured) + 2
    call(*then)
    assert finished and finished < kept()


def test_widening_keeps_finished_runs_until_the_best_rate_moves(call, faked, tmp_path) -> None:
    def rates() -> dict[str, set[float]]:
        table = pandas.read_csv(tmp_path / "out/runs.csv").query("stage == 'seeds'")
        return table.groupby("arm").rate.agg(set).to_dict()

    call()
    assert rates()["dense"] == {2e-3}
    # The first run beyond the grid is the best one. The command is killed while it measures that.
    faked.best, faked.shift, faked.kill_at = 4e-3, -0.1, len(faked.measured) + 1
    call("--widen")
    assert rates()["dense"] == {2e-3}
    # Other arms train on meanwhile.
    faked.kill_at = None
    out, _ = call("--arms", "window")
    assert rates()["dense"] == {2e-3} and "window against dense: no difference" in out
    faked.kill_at = len(faked.measured) + 3
    call("--widen")
    call("--widen")
    assert rates() == {"dense": {4e-3}, "window": {2e-3}, "lighthouse": {2e-3}}


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
    assert "start" not in {*pandas.read_csv(tmp_path / "out/runs.csv").arm}
    assert (
        "from the weights of 12 steps at rate 0.0005" in (tmp_path / "out/results.md").read_text()
    )
    contest = read_contest(path)
    planner = Planner(contest, tmp_path / "out", ["--training.max_norm", "0.5"])
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


def test_revisions_of_all_runs_are_named(call, faked, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    interrupted = out / "dense,lr=0.002,seed=2"
    faked.failing = (interrupted.name,)
    # These digits alone would be read as a number.
    monkeypatch.setattr(contest_data, "git_revision", lambda: "0654530")
    call("--arms", "dense")
    (interrupted / "checkpoint/step-4").mkdir(parents=True)
    (interrupted / "checkpoint/step-4/.metadata").touch()
    (interrupted / "metrics.jsonl").write_text('{"step": 4, "validation_metrics/loss": 1.0}\n')
    faked.failing = ()
    monkeypatch.setattr(contest_data, "git_revision", lambda: "8e445e1")
    assert not call()[1]
    runs = pandas.read_csv(out / "runs.csv", dtype=str).query("stage == 'seeds'")
    assert sorted(runs.revision) == ["0654530", "0654530 8e445e1", *["8e445e1"] * 4]
    known = "Runs trained at revision 0654530, 8e445e1; the column `revision` of runs.csv tells"
    assert f"{known} them apart.\n" in (out / "results.md").read_text()
    # Those that finished under an older version have no such file.
    (interrupted / "revisions").unlink()
    call()
    assert f"{known} them apart; it was not recorded for 1 of 8.\n" in (
        out / "results.md").read_text()  # fmt: skip
    for file in out.glob("*/revisions"):
        file.unlink()
    assert not call()[1] and "revision" not in (out / "results.md").read_text()


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


@pytest.mark.slow
def test_three_arms_train_and_are_judged(path, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    exit_code_of(main, monkeypatch, "lighthouse", "contest", path, "--output", out)
    assert "lighthouse against dense" in (out / "results.md").read_text()
    for name in PLOTS:
        assert (out / name).stat().st_size > 1000
    assert "against dense" in report(read_contest(path), out, plots=False)


def test_the_time_left_is_told_by_runs_that_trained_whole(
    call, faked, tmp_path, monkeypatch
) -> None:
    faked.kill_at = 2
    call()
    faked.kill_at = None
    # Each look at the clock finds it a minute later.
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: float(next(clock)))
    out, _ = call()
    first, second = re.findall(r"done in .*", out)[:2]
    assert "left" not in first and "left" in second


def test_the_time_left_falls_by_a_run_with_each_run(call, path, faked, monkeypatch) -> None:
    with_start(path)
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: float(next(clock)))
    out, code = call()
    assert not code
    told = re.findall(r"done in 1:00(?:; about (\d+):00 left)?", out)
    # Seven runs of three arms and two starts, in two parts.
    assert [int(minutes or 0) for minutes in told] == [2, 1, 0, 5, 4, 3, 2, 1, 0]


def test_the_time_left_counts_slots_and_what_runs_under_way_have_done(monkeypatch) -> None:
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: 1000.0)

    def run_of(name: str, needs: Any = None) -> SimpleNamespace:
        return SimpleNamespace(folder=Path(name), needs=needs)

    start = run_of("start")
    a, b, c, d, e = (run_of(name, start) for name in "abcde")
    finished = run_of("earlier")
    late, later = run_of("late", finished), run_of("later", finished)
    state = SimpleNamespace(
        seconds={False: [300.0], True: [80.0, 120.0]},
        active={1: (late, {}, 970.0), 2: (start, {}, 900.0)},
        waiting=[later, a],
        slots=3,
    )
    # Slots are free after 70, 200 and 0 seconds. One run fits before the last ends, and the other
    # begins from it.
    assert sweeps._Sweep.seconds_left(state) == 300
    state.waiting = [later, a, b, c, d, e]
    assert sweeps._Sweep.seconds_left(state) == 400
    # Of two starts that wait, each needs a slot, and so do the runs that wait for them.
    first, second = run_of("first"), run_of("second")
    state.active, state.slots = {}, 2
    state.waiting = [first, second, run_of("a", first), run_of("b", second), run_of("c", second)]
    assert sweeps._Sweep.seconds_left(state) == 500
    # One that takes longer than usual ends now, not before.
    state.slots, state.active, state.waiting = 1, {1: (late, {}, 500.0)}, [later]
    assert sweeps._Sweep.seconds_left(state) == 100
    # Of runs that begin from nothing alone it is known how long they take.
    state.seconds[True] = []
    state.active = {}
    assert sweeps._Sweep.seconds_left(state) == 300
    state.seconds = {False: [], True: []}
    assert sweeps._Sweep.seconds_left(state) == 0
