"""A few configurations of each ending, which the campaign has to tell apart."""

import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from launch import CAN_FORK, FORKS

from torchtitan.models.llama3_lighthouse.job_config import JobConfig, leaves

IN_A_FORK = "in_a_fork"
# Command lines and how each ends, with what its message has to hold.
SAMPLE = [
    (["--training.steps", "2", "--checkpoint.enable"], "trained", ""),
    (
        ["--lighthouse.schedule", "dense until=1 seq_len=64,lighthouse until=2,dense"],
        "trained",
        "",
    ),
    (["--lighthouse.schedule", "dense,dense"], "refused", "lighthouse.schedule, stage 'dense': "),
    (["--optimizer.lr", "nan"], "refused", "optimizer.lr = nan must be finite"),
    (["--lighthouse.levels", "10000000"], "refused", "levels = 10000000"),
    (["--parallelism.tensor_parallel_degree", "2"], "refused", "tensor_parallel_degree 2"),
    (["--training.dataset_path", "books"], "refused", "training.dataset_path = 'books'"),
    (["--job.dump_folder", "with\0nul"], "refused", "must not hold the character NUL"),
    (["--toml", "[training]\nsteps = true"], "refused", "training.steps = True in the TOML"),
    (["--toml", "[training\n"], "refused", "is not TOML"),
    (["--experimental.custom_import", "broken"], "traceback", "RuntimeError: broken on purpose"),
]


def _run(folder: Path) -> None:
    """Run the sample in a process that has imported the trainer, and write how each run ended."""
    sys.path[:0] = [str(Path(__file__).parent), str(folder)]
    import configurations

    found = [
        configurations.run_one(line, folder / str(number), 60)
        for number, (line, _, _) in enumerate(SAMPLE)
    ]
    # Nothing trains as fast as this.
    found.append(configurations.run_one([], folder / "hang", 0.1))
    (folder / "outcomes.json").write_text(json.dumps([asdict(outcome) for outcome in found]))


@pytest.mark.skipif(not CAN_FORK, reason="a process that used a GPU cannot fork")
def test_runs_end_as_they_should(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text('raise RuntimeError("broken on purpose")')
    # A fork cannot import a test by the name that pytest gives it.
    arguments = (__file__, {"FOLDER": str(tmp_path)}, IN_A_FORK)
    process = FORKS.Process(target=runpy.run_path, args=arguments)
    process.start()
    process.join(200)
    *found, hang = json.loads((tmp_path / "outcomes.json").read_text())
    assert hang["kind"] == "hang"
    for (line, kind, message), outcome in zip(SAMPLE, found, strict=True):
        assert outcome["kind"] == kind, (line, outcome)
        assert message in outcome["message"], (line, outcome)


@pytest.fixture(scope="module")
def campaign():
    sys.path.insert(0, str(Path(__file__).parent))
    import configurations

    yield configurations
    sys.path.remove(str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("arguments", "rows", "fault"),
    [
        ([], [{"loss": 5.0, "lr": 0.1}, {"loss": 4.0, "lr": 0.0}], None),
        ([], [{"loss": float("nan"), "lr": 0.1}], "step 1 has loss nan"),
        ([], [{"loss": 5.0, "lr": -0.1}], "step 1 has learning rate -0.1"),
        ([], [{"loss": 3.0, "lr": 0.1}, {"loss": 6.5, "lr": 0.1}], "the loss rose from 3.0 to 6.5"),
        (["--optimizer.lr", "inf"], [], "trained with 'inf'"),
    ],
)
def test_silent_failures_are_found(campaign, tmp_path: Path, arguments, rows, fault) -> None:
    (tmp_path / "dump").mkdir()
    lines = [
        json.dumps({"step": step, campaign.LOSS: row["loss"], "lr": row["lr"]})
        for step, row in enumerate(rows, 1)
    ]
    (tmp_path / "dump" / campaign.METRICS_FILE).write_text("\n".join(lines))
    assert campaign.fault_of(arguments, tmp_path) == fault


def test_every_key_is_drawn_and_a_seed_draws_the_same_again(campaign) -> None:
    lines = campaign.draw(7, 3000)
    assert lines == campaign.draw(7, 3000) and lines[:100] != campaign.draw(8, 100)
    words = {word[2:].replace(".no-", ".") for line in lines for word in line}
    assert {leaf.key for leaf in leaves(JobConfig())} - words == set(campaign.NOT_DRAWN)


if __name__ == IN_A_FORK:
    _run(Path(globals()["FOLDER"]))
