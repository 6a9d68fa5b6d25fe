"""Times of a contest beside another process on the GPU."""

import json

import pytest
from contest_cases import at_equal_time

from torchtitan.models.llama3_lighthouse.studies import contest as contests


def disturb(faked, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let another process slow the first stage of the first runs that tell an arm's times.

    Args:
        number: how many of them.
    """
    train = contests.train

    def train_beside(run, *rest) -> int:
        code, before = train(run, *rest), faked.trained[:-1].count(run.name)
        if run.name == "window,times" and before < number:
            path = run.folder / "metrics.jsonl"
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            slow = [e for e in entries if e.get("lighthouse/stage")]
            for entry in slow[len(slow) // 3 :]:
                entry["time_metrics/end_to_end(s)"] *= 2
            path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return code

    monkeypatch.setattr(contests, "train", train_beside)
    monkeypatch.setattr(contests, "_device", lambda: "cuda")
    monkeypatch.setattr(contests, "check_runs", lambda *_, **__: None)


@pytest.mark.parametrize(("number", "runs"), [(0, 1), (1, 2), (2, 3), (5, 3)])
def test_a_disturbed_timing_runs_again(call, faked, path, monkeypatch, number, runs) -> None:
    at_equal_time(path, 40)
    disturb(faked, monkeypatch, number)
    output, code = call()
    assert not code, output
    assert faked.trained.count("window,times") == runs and faked.trained.count("dense,times") == 1
    said = "window,times: the median of steps of kind `1 lighthouse` is 100% above their lower"
    assert output.count(said) == min(number, 3)
    assert output.count("so it runs again") == min(number, 2)
    assert output.count("the arm may get too few steps") == (number == 5)
    steps = json.loads((path.parent / "out/steps.json").read_text())
    assert (steps["window"] < steps["lighthouse"]) == (number == 5)


def test_steps_on_a_cpu_may_vary(call, faked, path, monkeypatch) -> None:
    at_equal_time(path, 40)
    disturb(faked, monkeypatch, 5)
    monkeypatch.setattr(contests, "_device", lambda: "cpu")
    output, code = call()
    assert not code and "another process" not in output, output
    assert faked.trained.count("window,times") == 1


def test_a_disturbed_timing_of_a_killed_contest_runs_again(call, faked, path, monkeypatch) -> None:
    """Its times were written, and no steps follow from them yet."""
    at_equal_time(path, 40)
    disturb(faked, monkeypatch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(contests, "unsteady", lambda output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call()
    assert not (path.parent / "out/steps.json").exists()
    output, code = call()
    assert not code, output
    assert faked.trained.count("window,times") == 2
