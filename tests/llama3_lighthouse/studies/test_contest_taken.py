"""Runs that a contest takes from earlier ones."""

import json
import shutil
from pathlib import Path

import pandas
import pytest
from contest_cases import at_equal_time, with_start

from torchtitan.models.llama3_lighthouse.studies import contest_taken

WINDOW_NARROWER = ('["window until=6", "dense"]', '["window until=6 window=16", "dense"]')


@pytest.fixture
def both(call, faked, path, tmp_path):
    """Run the contest, then with ``changed`` text another one that takes its runs."""

    def run(*line: str, changed: tuple[str, str] = ("margin = 0.01", "margin = 0.02")):
        if not (tmp_path / "out").exists():
            call()
        text = path.read_text()
        assert changed[0] in text
        path.write_text(text.replace(*changed))
        return call("--output", str(tmp_path / "two"), "--take", str(tmp_path / "out"), *line)

    return run


def test_equal_runs_are_not_trained_again(both, faked, tmp_path) -> None:
    out, code = both()
    # Seed 1 has two runs of dense and one of each other arm, and seed 2 one of each.
    assert not code and len(faked.trained) == len(faked.measured) == 7
    first, second = (pandas.read_csv(tmp_path / f"{name}/runs.csv") for name in ("out", "two"))
    assert {*second.pop("taken from")} == {"contest.toml"}
    assert first.equals(second)
    assert "lighthouse against dense: better" in out and out.count(" is taken from ") == 7
    assert (
        "Runs taken from earlier contests: 8 from contest.toml"
        in (tmp_path / "two/results.md").read_text()
    )
    assert not [*(tmp_path / "two").glob("*/checkpoint")]
    assert [*(tmp_path / "out").glob("*/checkpoint")]


def test_other_runs_train_here_and_say_what_differs(both, faked, tmp_path) -> None:
    out, code = both(changed=WINDOW_NARROWER)
    assert not code and [name.split(",")[0] for name in faked.trained[7:]] == ["window"] * 2
    assert "window,lr=0.002,seed=1 is not taken from" in out
    assert "another lighthouse.schedule" in out
    runs = pandas.read_csv(tmp_path / "two/runs.csv").set_index("arm")["taken from"]
    assert runs["window"].isna().all() and runs[["dense", "lighthouse"]].notna().all()


def test_what_has_begun_here_stays(both, faked, call, tmp_path) -> None:
    call()
    faked.failing = ("window,lr=0.002,seed=2",)
    call("--output", str(tmp_path / "two"), "--arms", "window")
    begun = tmp_path / "two/window,lr=0.002,seed=2"
    assert begun.is_dir()
    both(changed=("margin = 0.01", "margin = 0.01"))
    assert not (begun / "finished").exists()
    assert (tmp_path / "two/dense,lr=0.001,seed=1/taken_from").exists()


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (("prompts = 5", "prompts = 6"), "prompts"),
        (("documents = 4", "documents = 3"), "distance"),
        (("prompts = 5", 'prompts = 5\ntuned_by = "loss"'), "tuned_by"),
    ],
)
def test_other_measures_are_refused_before_anything_is_written(
    both, tmp_path, changed, word
) -> None:
    _, code = both(changed=changed)
    assert f"its contest has another {word} than " in str(code)
    assert "leave the folder out" in str(code)
    assert not [*(tmp_path / "two").glob("*")]


def test_other_gpus_text_and_overrides_are_refused(both, call, tmp_path, monkeypatch) -> None:
    assert "another overrides than" in str(both("--training.max_norm", "0.5")[1])
    record = tmp_path / "out/contest.json"
    known = json.loads(record.read_text())
    known["text"]["training"] = "content:0"
    record.write_text(json.dumps(known))
    monkeypatch.setattr(contest_taken, "environment", lambda: {"GPU": "another"})
    line = ("--output", str(tmp_path / "two"), "--take", str(tmp_path / "out"))
    assert "another text, GPU than" in str(call(*line)[1])
    (tmp_path / "empty").mkdir()
    assert "holds no contest.json and contest.toml" in str(
        call(*line[:3], str(tmp_path / "empty"))[1]
    )
    assert "--list takes no runs" in str(call("--list", *line)[1])
    assert not [*(tmp_path / "two").glob("*")]


def test_a_run_without_all_measures_judges_nothing(both, faked, path) -> None:
    """Seed 3 chose rates there, by one measure, and judges here."""
    path.write_text("rate_seed = 3\n" + path.read_text())
    out, code = both(changed=("seeds = [1, 2]", "seeds = [1, 3]"))
    assert not code
    assert "dense,lr=0.002,seed=1 is taken" in out
    assert "seed=3 is taken" not in out
    assert {"window,lr=0.002,seed=3", "lighthouse,lr=0.002,seed=3"} <= {*faked.trained}


def test_times_and_starts_are_taken_too(both, faked, path, tmp_path) -> None:
    at_equal_time(path, 4)
    with_start(path)
    # Another first rate of an arm leaves the times of its steps as they are.
    out, code = both(changed=("rates = [1e-3, 2e-3]", "rates = [2e-3]"))
    assert not code, out
    trained = len(faked.trained)
    assert trained == len(set(faked.trained))
    assert (tmp_path / "two/times.csv").read_text() == (tmp_path / "out/times.csv").read_text()
    # Another arm begins from the same weights, as long as they are there.
    for start in (tmp_path / "out").glob("start,seed=*/checkpoint/step-12"):
        (start / ".metadata").touch()
    shutil.rmtree(tmp_path / "two")
    out, code = both(changed=('"window until=75%"', '"window until=75% window=16"'))
    assert not code, out
    assert {name.split(",")[0] for name in faked.trained[trained:]} == {"window"}
    assert "start,seed=1 is taken from" in out
    runs = pandas.read_csv(tmp_path / "two/runs.csv")
    assert runs.groupby("seed").start.nunique().max() == 1


def test_starts_are_taken_from_a_contest_with_other_measures(both, faked, path, tmp_path) -> None:
    at_equal_time(path, 4)
    with_start(path)
    path.write_text("rate_seed = 3\n" + path.read_text())
    both()
    # The first contest has lost the weights of its other starts.
    for start in (tmp_path / "out").glob("start,seed=1/checkpoint/step-12"):
        (start / ".metadata").touch()
    shutil.rmtree(tmp_path / "two")
    trained = len(faked.trained)
    out, code = both(changed=("prompts = 5", "prompts = 6"))
    assert not code, out
    assert f"only starts and times are taken from {tmp_path / 'out'}: another prompts than" in out
    assert "start,seed=1 is taken from" in out and "dense,times is taken from" in out
    # Seed 3 chooses rates.
    trained_before, again = {*faked.trained[:trained]}, {*faked.trained[trained:]}
    assert {"start,seed=1", "start,seed=2", "start,seed=3", "dense,times"} < trained_before
    kept = {name for name in trained_before if name.endswith("times")} | {"start,seed=1"}
    assert again == trained_before - kept


def test_another_number_of_processes_is_refused(both) -> None:
    assert "another processes than" in str(both("--processes", "2")[1])


def test_runs_of_another_start_are_not_taken(both, faked, path) -> None:
    """Their own settings are equal."""
    with_start(path)
    out, code = both(changed=("rate = 5e-4", "rate = 1e-4"))
    assert not code
    assert "window,lr=0.002,seed=1 is not taken from" in out and "another optimizer.lr" in out
    assert " is taken from " not in out


@pytest.mark.parametrize("file", ["config.json", "trained", "metrics.jsonl", "measures.json"])
def test_runs_that_lack_a_file_are_not_taken(both, call, faked, tmp_path, file) -> None:
    call()
    (tmp_path / "out/window,lr=0.002,seed=1" / file).unlink()
    out, code = both()
    assert not code and "window,lr=0.002,seed=1 is taken" not in out
    assert faked.trained.count("window,lr=0.002,seed=1") == 2


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_records_are_named(both, call, tmp_path, text) -> None:
    call()
    (tmp_path / "out/window,lr=0.002,seed=1/config.json").write_text(text)
    out, code = both()
    assert not code and "another window,lr=0.002,seed=1/config.json" in out
    (tmp_path / "out/contest.json").write_text(text)
    code = str(call("--output", str(tmp_path / "three"), "--take", str(tmp_path / "out"))[1])
    assert ("cannot be read" if text == "{" else "has no record, so nobody knows") in code
    assert not [*(tmp_path / "three").glob("*")]


def test_runs_that_only_waited_here_are_taken(call, faked, tmp_path) -> None:
    call()
    faked.kill_at = len(faked.measured) + 1
    two = ("--output", str(tmp_path / "two"))
    call(*two)
    assert (tmp_path / "two/dense,lr=0.002,seed=1").is_dir()
    faked.kill_at, trained = None, len(faked.trained)
    out, code = call(*two, "--take", str(tmp_path / "out"))
    assert not code and "dense,lr=0.002,seed=1 is taken from" in out
    assert len(faked.trained) == trained


def test_what_cannot_be_copied_is_named(both, call, tmp_path) -> None:
    call()
    (tmp_path / "out/window,lr=0.002,seed=1/dangling").symlink_to(tmp_path / "nothing")
    code = str(both()[1])
    assert "window,lr=0.002,seed=1 cannot be copied ([Errno 2] No such file" in code
    assert "leave the folder out" in code


def test_a_copy_that_is_cut_off_leaves_no_run(both, faked, tmp_path, monkeypatch) -> None:
    def cut_off(source: Path, target: Path, **options: object) -> None:
        target.mkdir()
        (target / "finished").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", cut_off)
        both()
    assert not [*(tmp_path / "two").glob("*[0-9]/finished")]
    both(changed=("margin", "margin"))
    assert len(faked.trained) == 7
    assert not [*(tmp_path / "two").glob("*.partial")]
