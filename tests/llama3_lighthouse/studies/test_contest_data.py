"""Seconds of steps from the logs of a contest's runs."""

import json
from pathlib import Path

import pandas
from contest_cases import DEBUG

from torchtitan.models.llama3_lighthouse.studies.contest_data import (
    Logs,
    mark_trained,
    seconds_of_steps,
    steps_by_kind,
    write_data,
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
    assert seconds_of_steps([(run, entries)]) == {}
    mark_trained(run, alone=True)
    assert seconds_of_steps([(run, entries)]) == {"1 lighthouse": 1.0, "2 dense": 16.5}
    assert steps_by_kind(run.config) == {"1 lighthouse": 6, "2 dense": 2}


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
