"""GPU seconds of contest runs with document masks, whose steps of one document are faster."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from document_cases import random_layout

from torchtitan.models.llama3_lighthouse.data.documents import (
    DOCUMENTS,
    PADDING,
    without_idle_masks,
)
from torchtitan.models.llama3_lighthouse.document_statistics import DocumentStatistics
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.stages import stage_at, stages_of
from torchtitan.models.llama3_lighthouse.studies.contest_checks import check_runs
from torchtitan.models.llama3_lighthouse.studies.contest_data import (
    PLACES,
    SEEDS,
    Logs,
    mark_trained,
    read_times,
    write_data,
    write_times,
)
from torchtitan.models.llama3_lighthouse.studies.contest_file import LEAST_TIMED, read_contest
from torchtitan.models.llama3_lighthouse.studies.contest_measures import Number, write_numbers
from torchtitan.models.llama3_lighthouse.studies.contest_plan import Planner
from torchtitan.models.llama3_lighthouse.studies.contest_rates import rates_of
from torchtitan.models.llama3_lighthouse.studies.contest_report import EQUAL_TIME, report
from torchtitan.models.llama3_lighthouse.studies.contest_results import Results
from torchtitan.models.llama3_lighthouse.studies.sweeps import Run

MASKED = "window"
ONE, SEVERAL = "one document", "several documents"
# Median seconds of steps; those without documents are of the arm without masks.
SECONDS = {"dense": 0.5, f"dense, {ONE}": 0.6, f"dense, {SEVERAL}": 0.9,
           f"lighthouse, {ONE}": 0.2, f"lighthouse, {SEVERAL}": 0.3}  # fmt: skip


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(46)


@pytest.fixture
def path(path: Path) -> Path:
    """The debug contest, whose arm with a window has document masks here."""
    mask = f"[arms.{MASKED}]\ntraining.document_mask = true"
    text = path.read_text().replace(f"[arms.{MASKED}]", mask)
    path.write_text(text.replace("steps = 8", "steps = 80", 1).replace("until=6", "until=60"))
    return path


def log_run(
    run: Run, documents: Callable[[int], float], random: np.random.Generator, alone: bool = False
) -> float:
    """Write what a run logs, and return the seconds of its steps by ``SECONDS``.

    Args:
        documents: mean documents in the sequences of a step, of a run with masks.
    """
    run.folder.mkdir(parents=True)
    stages, lines, total = stages_of(run.config), [], 0.0
    for step in range(1, run.config.training.steps + 1):
        kind = stage_at(step, stages).attention
        line = {
            "step": step,
            "n_tokens_seen": 512 * step,
            "loss_metrics/global_avg_loss": 1.0,
            "lighthouse/stage": kind != "dense",
        }
        if run.config.training.document_mask:
            line["lighthouse/documents"] = documents(step)
            kind += f", {SEVERAL if documents(step) > 1 else ONE}"
        total += SECONDS[kind]
        # As many steps are slower as are faster, and the first ones compile.
        jitter = (-1) ** step * random.uniform(0, 0.004)
        line["time_metrics/end_to_end(s)"] = SECONDS[kind] + jitter + 9 * (step < 3)
        lines.append(line)
        if step == 1 or step % 4 == 0:
            lines.append({"step": step, "validation_metrics/loss": 2 - step / 100})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (run.folder / "finished").touch()
    mark_trained(run, alone)
    write_numbers(run.folder, [Number("loss", n, 1 + random.uniform()) for n in range(3)])
    return total


def trained(
    path: Path, share_timed: float, shares: list[float], random: np.random.Generator
) -> dict[tuple[str, int], float]:
    """Write the tables of a contest, and return the true seconds of its runs by arm and seed.

    Args:
        share_timed: part of the timed steps that have several documents.
        shares: the same of the runs' steps, for each seed.
    """
    contest, output = read_contest(path), path.parent / "out"
    planner, seconds, placed, timed = Planner(contest, output, []), {}, [], []

    def drawn(share: float, steps: int) -> Callable[[int], float]:
        several = np.zeros(steps, dtype=bool)
        several[: round(share * steps)] = True
        random.shuffle(several)
        # A mean over four sequences, of which one may have two documents.
        means = np.where(several, 1 + random.integers(1, 20, steps) / 4, 1.0)
        return lambda step: float(means[step - 1])

    for name in ("dense", MASKED):
        run = planner.timing_run(contest.arms[name])
        steps = contest.timed_steps
        draws = [drawn(share_timed, steps) for _ in stages_of(run.config)]
        log_run(run, lambda s, d=draws, n=steps: d[(s - 1) // n]((s - 1) % n + 1), random, True)
        timed.append((name, run))
        for seed, share in zip(contest.seeds, shares, strict=True):
            run = planner.run(contest.arms[name], 2e-3, seed)
            seconds[name, seed] = log_run(run, drawn(share, 80), random)
            placed.append((dict(zip(PLACES, (SEEDS, name, 2e-3, seed), strict=True)), run))
    logs = Logs()
    write_times([*timed, *((place["arm"], run) for place, run in placed)], logs, 1, output)
    write_data(placed, logs, output)
    return seconds


def test_each_run_takes_the_time_of_its_own_documents(path, random) -> None:
    """The timed steps have other shares of documents than the runs, which differ too."""
    seconds = trained(path, 0.5, random.uniform(0.1, 0.9, 2).tolist(), random)
    times = read_times(path.parent / "out")
    assert times["dense"].keys() == {"1 dense"}
    table = pandas.read_csv(path.parent / "out/times.csv")
    assert table[table.spread.isna()].arm.unique().tolist() == [MASKED]
    kinds = {f"{n} {kind}": SECONDS[kind] for n, kind in
             ((1, f"lighthouse, {ONE}"), (1, f"lighthouse, {SEVERAL}"),
              (2, f"dense, {ONE}"), (2, f"dense, {SEVERAL}"))}  # fmt: skip
    assert times[MASKED] == pytest.approx(kinds, abs=0.02)
    results = Results(read_contest(path), path.parent / "out")
    for row in results.runs.to_dict("records"):
        expected = seconds[row["arm"], row["seed"]]
        assert row["GPU seconds"] == pytest.approx(expected, rel=0.05)
        assert sum(json.loads(row["steps by kind"]).values()) == 80
    report(results.contest, path.parent / "out", plots=False)
    text = (path.parent / "out/results.md").read_text()
    assert "unknown" not in text and f"| {MASKED} | dense | {EQUAL_TIME} | 2 |" in text


@pytest.mark.parametrize("number", [0, LEAST_TIMED - 1])
def test_a_kind_that_was_hardly_timed_leaves_runs_without_seconds(path, random, number) -> None:
    """Steps that compiled would move such a median. Only a run without the kind has seconds."""
    seconds = trained(path, number / 40, [0.5, 0.0], random)
    out = path.parent / "out"
    assert not any(SEVERAL in kind for kind in read_times(out)[MASKED])
    results = Results(read_contest(path), out)
    found = results.runs.query("arm == @MASKED").set_index("seed")["GPU seconds"]
    assert found.isna().to_dict() == {1: True, 2: False}
    assert found[2] == pytest.approx(seconds[MASKED, 2], rel=0.05)
    report(results.contest, out, plots=False)
    text = (out / "results.md").read_text()
    assert (
        f"GPU seconds are unknown for 1 of 2 runs of {MASKED}, as too few steps of kind "
        f"`1 lighthouse, {SEVERAL}` and `2 dense, {SEVERAL}` were timed; equal time leaves them out"
    ) in text
    assert text.count("GPU seconds are unknown") == 1 and "nan" not in text.lower()
    rows = pandas.read_csv(out / "comparisons.csv").query("measure == @EQUAL_TIME")
    assert rows.seeds.tolist() == [1]


def test_steps_of_one_document_are_those_without_masks(random) -> None:
    """A step's mean is above 1 if and only if a microbatch of it keeps its masks."""
    generator = torch.Generator().manual_seed(int(random.integers(2**32)))
    seen = set()
    for _ in range(60):
        rows = [random_layout(1, 64, 16, generator) for _ in range(6)]
        rows = [row * (random.uniform() < 0.15) for row in rows]
        batches = [
            ({DOCUMENTS: torch.cat(pair), PADDING: torch.zeros(2)}, torch.zeros(2, 64))
            for pair in zip(rows[::2], rows[1::2], strict=True)
        ]
        counts = DocumentStatistics()
        counts.count(batches)
        mean = counts.metrics(lambda mesh, number: number.item())["lighthouse/documents"]
        masked = any(DOCUMENTS in without_idle_masks(inputs, None) for inputs, _ in batches)
        assert (mean > 1) == masked
        seen.add(masked)
    assert seen == {True, False}


@pytest.mark.parametrize("where", ["arm", "settings", "override"])
def test_masks_are_refused_where_seconds_decide_the_steps(path, where) -> None:
    text = path.read_text().replace("training.steps = 80\n", "")
    mask = "training.document_mask = true\n"
    extra = ["--training.document_mask"] if where == "override" else []
    if where != "arm":
        text = text.replace(mask, "")
    if where == "settings":
        text = text.replace("[settings]\n", f"[settings]\n{mask}")
    path.write_text("gpu_seconds = 40\n" + text.replace("until=60", "until=75%"))
    contest = read_contest(path)
    planner = Planner(contest, path.parent / "out", extra)
    arm = MASKED if where == "arm" else "dense"
    message = f"contest.toml, arms.{arm}: training.document_mask = true beside gpu_seconds = 40: "
    with pytest.raises(UserValueError, match=re.escape(message)):
        check_runs(planner, rates_of(contest, path.parent / "out"))
    steps = "[settings]\ntraining.steps = 80"
    path.write_text(path.read_text().replace("gpu_seconds = 40\n", "").replace("[settings]", steps))
    contest = read_contest(path)
    check_runs(Planner(contest, path.parent / "out", extra), rates_of(contest, path.parent))
