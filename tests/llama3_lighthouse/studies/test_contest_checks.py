"""Mistakes in runs and text of a contest are found before its first process starts."""

import json

import pytest
from contest_cases import at_equal_time, with_start
from pages import ROOT
from text_data import FOLDERS_OF_TEXT

from torchtitan.models.llama3_lighthouse.studies.contest_checks import check_runs
from torchtitan.models.llama3_lighthouse.studies.contest_file import read_contest
from torchtitan.models.llama3_lighthouse.studies.contest_plan import Planner
from torchtitan.models.llama3_lighthouse.studies.contest_rates import rates_of

FILES = sorted((ROOT / "train_configs/contests").glob("*.toml"))


def test_text_of_a_start_is_recorded_too(call, faked, path, tmp_path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a.txt").write_text("A book. " * 99)
    with_start(path, f'training.dataset = "c4_local"\ntraining.dataset_path = "{tmp_path}/short"')
    assert not call()[1]
    text = json.loads((tmp_path / "out/contest.json").read_text())["text"]
    assert len({*text.values()}) == 3 and text.keys() == {"training", "validation", "start"}
    (tmp_path / "short/a.txt").write_text("Another book. " * 99)
    assert "were begun with text" in call()[1]


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


@pytest.mark.parametrize(("gpu_seconds", "first", "advice"), [
    (0, "until=9", "write until=8 or less, or set training.steps to 9"),
    (0, "until=4 seq_len=1024", "lower it, or set training.seq_len to 1024"),
    # Here a number of steps is refused, and so is training.steps.
    (40, "until=100%", "give it an earlier until"),
    (40, "until=0.1%", "until = 0 must be at least 1; raise it"),
    (40, "until=80%", "let until rise from stage to stage"),
])  # fmt: skip
def test_advice_on_a_stage_is_what_a_contest_takes(call, faked, path, gpu_seconds, first, advice):
    if gpu_seconds:
        at_equal_time(path, gpu_seconds)
    until = "until=75%" if gpu_seconds else "until=6"
    stages = [f'"window {first}"', f'"lighthouse {until}"', '"dense"']
    text = path.read_text().replace(f'"window {until}", "dense"', ", ".join(stages))
    path.write_text(text)
    found = str(call()[1])
    assert "contest.toml, arms.window: lighthouse.schedule, stage '" in found
    assert found.endswith(advice) and "--" not in found and "until=STEP" not in found
    assert not faked.trained


def test_seeds_and_the_start_are_checked_before_any_process(call, faked, path) -> None:
    path.write_text(path.read_text().replace("seeds = [1, 2]", f"seeds = [1, {2**70}]"))
    _, found = call()
    assert f"contest.toml, seed {2**70}: " in str(found) and "debug.seed" in str(found)
    path.write_text(path.read_text().replace(f"{2**70}", "2"))
    with_start(path, "lighthouse.data_streams = 3")
    assert "contest.toml, start: lighthouse.schedule, stage 'dense seq_len=128': the 4" in call(
        "--list")[1]  # fmt: skip
    assert not faked.trained


def test_positions_that_only_some_arms_skip_belong_into_their_stages(call, faked, path) -> None:
    text, first = path.read_text(), '"window until=6'
    assert first in text
    path.write_text(text.replace("[settings]", "[settings]\nlighthouse.skip_positions = 512")
                    .replace(first, f"{first} seq_len=128"))  # fmt: skip
    _, found = call()
    assert "contest.toml, arms.dense: lighthouse.skip_positions = 512 is for stages" in found
    assert found.endswith("stages that are to skip may say skip_positions=512 themselves")
    path.write_text(text.replace(first, f"{first} seq_len=128 skip_positions=512"))
    assert not call()[1] and faked.trained


def test_too_few_dense_steps_in_between_to_time_are_refused(call, faked, path) -> None:
    at_equal_time(path, 40)
    every = "\nlighthouse.dense_every = 8"
    path.write_text(path.read_text().replace("[arms.lighthouse]", f"[arms.lighthouse]{every}"))
    message = "timed_steps = 40, and the first ones compile; write timed_steps = 80 or more"
    found = call()[1]
    assert f"{path}, arms.lighthouse: lighthouse.dense_every = 8" in found and message in found
    assert not faked.trained
    path.write_text("timed_steps = 80\n" + path.read_text())
    assert "lighthouse against dense: better" in call()[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_contest_of_the_repository_plans_runs_that_would_start(path, tmp_path) -> None:
    contest = read_contest(path)
    with_folder = path.stem not in ("debug", "documents_17m")
    planner = Planner(contest, tmp_path, FOLDERS_OF_TEXT if with_folder else [])
    check_runs(planner, rates_of(contest, tmp_path))


def test_an_arm_that_loses_the_scaling_of_the_start_is_named(call, path) -> None:
    """YaRN comes with a stage of the start, so no key of the contest shows it."""
    stages = '"dense until=4 seq_len=128", "dense yarn_factor=4"'
    with_start(path)
    scaled = "yarn factor=4 original_max_position_embeddings=128"
    text = path.read_text().replace('["dense seq_len=128"]', f"[{stages}]")
    text = text.replace("[settings]", '[settings]\nmodel.rope_scaling = "none"')
    text = text.replace("[arms.dense]", f'[arms.dense]\nmodel.rope_scaling = "{scaled}"')
    path.write_text(text)
    output, code = call("--list")
    assert not code, output
    said = (
        f"begins from weights under '{scaled}', with which [start] ends, and has "
        "model.rope_scaling = 'none'; set arms.window model.rope_scaling to the former"
    )
    assert f"arms.window {said}" in output and "arms.dense begins" not in output
