"""Seconds of steps from the logs of a contest's runs."""

import json
from pathlib import Path

import numpy
import pandas
import pytest
from contest_cases import DEBUG

from torchtitan.models.llama3_lighthouse.studies.contest_data import (
    UNSTEADY,
    Logs,
    mark_trained,
    spread_of,
    steps_by_kind,
    timed_steps,
    unsteady,
    write_data,
    write_times,
)
from torchtitan.models.llama3_lighthouse.studies.contest_file import read_contest
from torchtitan.models.llama3_lighthouse.studies.contest_plan import Planner


def test_seconds_of_a_step_are_the_median_of_its_stage(tmp_path) -> None:
    planner = Planner(read_contest(DEBUG), tmp_path, [])
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
    assert timed_steps([(run, entries)]) == {}
    mark_trained(run, alone=True)
    found = timed_steps([(run, entries)])
    assert found == {"1 lighthouse": seconds[:6], "2 dense": seconds[6:]}
    lines = [each | {"step": step} for step, each in entries.items()]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    write_times([("window", run)], Logs(), 2, tmp_path)
    table = pandas.read_csv(tmp_path / "times.csv").set_index("kind")
    assert table["GPU seconds"].to_dict() == {"1 lighthouse": 2.0, "2 dense": 33.0}
    # Half of the way from 3 to 30 lies above a quarter of it.
    assert table.spread.to_dict() == {"1 lighthouse": 0, "2 dense": round(16.5 / 9.75 - 1, 4)}


def test_arms_that_were_not_timed_keep_their_times(tmp_path) -> None:
    planner = Planner(read_contest(DEBUG), tmp_path, [])
    run = planner.run(planner.contest.arms["window"], 2e-3, 1)
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "time_metrics/end_to_end(s)": 3.0, "lighthouse/stage": 1.0}) + "\n"
    )
    mark_trained(run, alone=True)
    earlier = {"arm": ["dense", "window"], "kind": ["1 dense", "1 lighthouse"],
               "GPU seconds": [0.5, 0.25], "spread": [0.2, 0.1]}  # fmt: skip
    pandas.DataFrame(earlier).to_csv(tmp_path / "times.csv", index=False)
    write_times([("window", run)], Logs(), 1, tmp_path)
    table = pandas.read_csv(tmp_path / "times.csv").set_index("arm")
    assert table["GPU seconds"].to_dict() == {"dense": 0.5, "window": 3.0}
    assert table.spread.to_dict() == {"dense": 0.2, "window": 0}
    assert unsteady(tmp_path) == {"dense": {"1 dense": 0.2}}
    # Records of older versions have no spread.
    pandas.DataFrame(earlier).drop(columns="spread").to_csv(tmp_path / "times.csv", index=False)
    assert unsteady(tmp_path) == {}
    assert steps_by_kind(run.config) == {"1 lighthouse": 6, "2 dense": 2}


@pytest.mark.parametrize("disturbed", [0, 4, 10])
def test_a_spread_tells_steps_beside_another_process(disturbed: int) -> None:
    """Four steps compile and capture a graph; some of the others take twice their time."""
    random = numpy.random.default_rng()
    seconds = random.normal(0.02, 0.0001, 20)
    seconds[:4] = 1
    seconds[4 : 4 + disturbed] *= 2
    spread = spread_of([*random.permutation(seconds)])
    assert (spread > UNSTEADY) == (disturbed == 10)
    assert spread < 0.03 or spread > 0.9


def test_curves_have_the_training_loss_since_the_last_validation(tmp_path: Path) -> None:
    planner = Planner(read_contest(DEBUG), tmp_path, [])
    run = planner.run(planner.contest.arms["window"], 2e-3, 1)
    run.folder.mkdir()
    losses, held_out = [8.0, 4.0, 3.0, 2.0, 1.0], {1: 9.0, 3: 5.0}
    entries = [
        {"step": step, "loss_metrics/global_avg_loss": loss, "n_tokens_seen": 512.0 * step}
        | ({"validation_metrics/loss": held_out[step]} if step in held_out else {})
        for step, loss in enumerate(losses, 1)
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries))
    (run.folder / "measures.json").write_text("[]")
    write_data([({"arm": "window"}, run)], Logs(), tmp_path)
    curves = pandas.read_csv(tmp_path / "curves.csv")
    assert curves[["step", "validation", "training loss"]].values.tolist() == [
        [1, 9.0, 8.0],
        [3, 5.0, 3.5],
    ]
    runs = pandas.read_csv(tmp_path / "runs.csv")
    assert runs.columns.tolist() == ["arm", "step", "tokens", "steps by kind"]
    assert runs.step.tolist() == [5]
