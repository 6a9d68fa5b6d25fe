"""Learning rates of contests: which are tried, which is the best, and wider grids."""

import json

import pandas
import pytest

from torchtitan.models.llama3_lighthouse.studies import contest as contests
from torchtitan.models.llama3_lighthouse.studies.contest_measures import (
    Number,
    read_numbers,
    write_numbers,
)


def test_a_best_rate_at_the_edge_is_said_and_widened_on_request(call, faked, tmp_path) -> None:
    faked.best = 8e-3
    out, _ = call()
    assert "dense: best rate 0.002, at the edge of its grid; --widen tries further ones" in out
    assert not (tmp_path / "out/widened.json").exists()
    call("--widen")
    widened = json.loads((tmp_path / "out/widened.json").read_text())["dense"]
    assert widened == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert "dense,lr=0.008,seed=2" in faked.trained


@pytest.mark.parametrize(
    ("measure", "best"),
    [("repeated/480", 0.002), ("repeated/480/loss", 0.001), ("retrieval/passkey/512", 0.002)],
)
def test_the_best_rate_is_on_the_better_side_of_what_tunes(
    call, faked, path, monkeypatch, measure: str, best: float
) -> None:
    """A gain and an accuracy choose the highest value, and a loss the lowest."""
    path.write_text(f'tuned_by = "{measure}"\n' + path.read_text())

    def measured(contest, run, environment, lock) -> int:
        rate = run.settings["optimizer.lr"]
        write_numbers(run.folder, [Number(name, None, rate) for name in ("loss", measure)])
        return 0

    monkeypatch.setattr(contests, "measure", measured)
    assert f"dense: best rate {best}" in call()[0]


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
