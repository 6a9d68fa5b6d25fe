"""Stages from which on YaRN scales the rotary embedding."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import SMALL, TRAINED, Run, arguments, exit_code_of, validation_losses
from sharp_start import losses, run_from_sharp_weights
from small_model import FOUR_LAYERS, N, build

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.checks.configuration import check_launch
from torchtitan.models.llama3_lighthouse.checks.unread import warnings_of
from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.evaluation.inference import load_trained_model
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.rope_scaling import NO_SCALING, parse_scaling
from torchtitan.models.llama3_lighthouse.stages import stages_of

YARN = "yarn factor=4 original_max_position_embeddings=64"
STAGES = [
    "dense until=2 seq_len=64",
    "dense until=4 yarn_factor=4",
    "lighthouse until=5 yarn_factor=4",
    "dense seq_len=64 skip_positions=256 yarn_factor=4",
]
SCHEDULED = {
    **TRAINED,
    "model.rope_scaling": "none",
    "lighthouse.schedule": STAGES,
    # Its default, which a schedule asks for.
    "lighthouse.dense_from_step": 10000,
    "training.steps": 6,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "validation.enable": True,
    "validation.seq_len": 256,
    "validation.freq": 1,
    "validation.steps": 1,
}
EXACT = ("stage", "batches", "loss", "maximum_loss", "grad_norm", "tokens_seen")


def config_of(folder: Path, *stages: str, **settings: Any) -> JobConfig:
    """A run of 12 steps on sequences of 512 tokens."""
    own = {**SMALL, "lighthouse.dense_from_step": 10000, "model.rope_scaling": "none", **settings}
    own |= {"job.dump_folder": folder, "lighthouse.schedule": list(stages)}
    return LighthouseConfigManager().parse_args(arguments(own))


def exact(run: Run) -> dict[int, tuple[object, ...]]:
    return {step: tuple(line[key] for key in EXACT) for step, line in run.steps(0).items()}


def test_yarn_stretches_the_longest_sequences_before_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, "dense until=2 seq_len=128", "dense until=4 seq_len=64",
                       "lighthouse until=6 yarn_factor=2.5", "dense yarn_factor=2.5")  # fmt: skip
    check_launch(config, flavors, 1)
    scaled = "yarn factor=2.5 original_max_position_embeddings=128"
    assert [stage.config.model.rope_scaling for stage in stages_of(config)] == [
        "none", "none", scaled, scaled]  # fmt: skip
    lines = [line for line in dry_run(config, 1).splitlines() if re.match(r"stage \d", line)]
    assert [line.count("YaRN of 2.5 x 128") for line in lines] == [0, 0, 1, 1]


@pytest.mark.parametrize(("stages", "number", "words"), [
    (["dense yarn_factor=4"], 0, "yarn_factor stretches the sequences of an earlier stage, and "
     "this is the first; leave it out, or set model.rope_scaling, such as 'yarn factor=4', for"),
    (["dense until=2 seq_len=128", "dense until=4 yarn_factor=4", "dense"], 2,
     "lacks the yarn_factor of the stage before it, and no model goes back to a rotary embedding "
     "that it has left; repeat yarn_factor"),
    (["dense until=2 seq_len=128", "dense until=4 yarn_factor=2", "dense yarn_factor=4"], 2,
     "makes it 'yarn factor=4 original_max_position_embeddings=128', and an earlier stage 'yarn "
     "factor=2 original_max_position_embeddings=128'; give all the same yarn_factor"),
    *((["dense until=2 seq_len=128", f"dense yarn_factor={value}"], 1,
       f"yarn_factor = '{value}' must be a number above 1 and at most 1,000,000; write digits")
      for value in ("1", "0.5", "-4", "nan", "inf", "four", "", "1_2", "\u0661\u0662", "1e3",
                    "1.0000000000001", "1000001")),
])  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, stages, number, words) -> None:
    with pytest.raises(UserValueError) as caught:
        check_launch(config_of(tmp_path, *stages), flavors, 1)
    assert str(caught.value).startswith(f"lighthouse.schedule, stage '{stages[number]}': {words}")


def test_skipped_positions_are_stretched_too(tmp_path: Path) -> None:
    """A stage before YaRN may have spread its sequences over more positions than they have."""
    config = config_of(tmp_path, "dense until=2 seq_len=128 skip_positions=256",
                       "dense yarn_factor=2")  # fmt: skip
    check_launch(config, flavors, 1)
    scaled = "yarn factor=2 original_max_position_embeddings=256"
    assert stages_of(config)[1].config.model.rope_scaling == scaled


@pytest.mark.parametrize("positions", [128, 256])
def test_a_model_of_more_positions_is_not_stretched_from_fewer(
    tmp_path: Path, positions: int
) -> None:
    """YaRN would scale 128 positions of a model that was trained at 256."""
    described = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "rope_theta": 10000.0, "max_position_embeddings": positions,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = config_of(tmp_path, "dense until=2 seq_len=128", "dense yarn_factor=4",
                       **{"model.hf_folder": str(tmp_path), "model.rope_scaling": ""})  # fmt: skip
    if positions == 128:
        check_launch(config, flavors, 1)
        return
    message = (
        "yarn_factor would stretch 128 positions, the longest of the stages before, and "
        f"model.hf_folder = '{tmp_path}' has 256; leave yarn_factor out and set model.rope_scaling"
    )
    with pytest.raises(UserValueError, match=re.escape(message)):
        check_launch(config, flavors, 1)
    described["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(described))
    # "none" would make another model of one that was trained under a scaling.
    with pytest.raises(UserValueError, match="has one of type 'linear'; leave yarn_factor out$"):
        check_launch(config, flavors, 1)


@pytest.mark.parametrize(("scaling", "kind"), [("", "llama3"), ("yarn factor=4", "yarn")])
def test_yarn_stacks_on_no_other_scaling(tmp_path: Path, scaling: str, kind: str) -> None:
    """A flavor has that of Llama 3.1 if nothing else is said."""
    stages = ("dense until=2 seq_len=128", "dense yarn_factor=4")
    config = config_of(tmp_path, *stages, **{"model.rope_scaling": scaling})
    owner = f"model.rope_scaling = '{scaling}' is" if scaling else "model.flavor = 'debugmodel' has"
    message = (f"stage '{stages[1]}': yarn_factor needs a model without a scaling before it, and "
               f"{owner} one of type '{kind}'; set model.rope_scaling to 'none', or leave "
               "yarn_factor out")  # fmt: skip
    with pytest.raises(UserValueError, match=re.escape(message)):
        check_launch(config, flavors, 1)


@pytest.mark.parametrize(("stage", "warning"), [
    ("dense yarn_factor=4", ""),
    ("dense yarn_factor=3", "training.seq_len = 512 is beyond factor x original_max_position_"
     "embeddings = 3 x 128 of the rotary embedding's yarn scaling, the length that it is made for; "
     "use yarn_factor=4"),
    ("dense until=4 seq_len=128 skip_positions=512 yarn_factor=2",
     "skip_positions = 512 is beyond factor x"),
])  # fmt: skip
def test_sequences_beyond_the_reach_warn(tmp_path: Path, stage: str, warning: str) -> None:
    factor = stage.rpartition("=")[2]
    last = [f"dense yarn_factor={factor}"] if "until" in stage else []
    config = config_of(tmp_path, "dense until=2 seq_len=128", stage, *last)
    found = [each for each in warnings_of(config, 1) if "yarn" in each]
    wanted = f"lighthouse.schedule, stage '{stage}': {warning}"
    assert [each[: len(wanted)] for each in found] == ([wanted] if warning else [])


def test_a_model_that_is_scaled_later_is_the_same() -> None:
    args = replace(FOUR_LAYERS, rope_scaling=dict(NO_SCALING))
    scaling = parse_scaling("yarn factor=4 original_max_position_embeddings=64", N)
    tokens = torch.randint(0, args.vocab_size, (1, N))
    model, scaled = build(args=args), build(args=replace(args, rope_scaling=scaling))
    before, memory = model(tokens), model.freqs_cis.data_ptr()
    model.use_scaling(scaling)
    assert torch.equal(model(tokens), scaled(tokens)) and not torch.equal(model(tokens), before)
    # Compiled code and recorded graphs read it there.
    assert model.freqs_cis.data_ptr() == memory
    model.use_scaling(dict(NO_SCALING))
    assert torch.equal(model(tokens), before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("whole"), SCHEDULED).succeed()


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two microbatches a step, of weights that a rounding changes little."""
    settings = {"lighthouse.dense_from_step": 10000, "training.steps": 4,
                "training.global_batch_size": 2, "model.rope_scaling": "none",
                # Without these two, AdamW's first steps show the rounding of each gradient.
                "optimizer.lr": 2e-4, "optimizer.eps": 1e-6,
                # All have as many sequences a pass, as the parts of a pipeline do.
                "lighthouse.schedule": ["dense until=2", "dense until=3 yarn_factor=4",
                                        "dense yarn_factor=4"]}  # fmt: skip
    return run_from_sharp_weights(tmp_path_factory.mktemp("sharp"), settings)


def test_a_killed_run_and_two_launches_by_hand_equal_a_whole_one(
    whole: Run, tmp_path: Path
) -> None:
    """The run is killed after its first scaled step; by hand, the second launch is scaled."""
    for name in ("killed", "first", "second"):
        (tmp_path / name).mkdir()
    Run(tmp_path / "killed", SCHEDULED).crash_after_step(3)
    killed = Run(tmp_path / "killed", SCHEDULED).succeed()
    begins = re.findall(r"begins at step (\d).*?: .*?(under YaRN of 4 x 64)?, \d", whole.log)
    assert begins == [("1", ""), *((step, "under YaRN of 4 x 64") for step in "356")]
    assert exact(killed) == exact(whole)
    held_out = validation_losses(whole)
    assert validation_losses(killed).items() <= held_out.items()

    by_hand = {key: value for key, value in SCHEDULED.items() if key != "lighthouse.schedule"}
    by_hand |= {"lr_scheduler.total_steps": 6, "lighthouse.data_streams": 1}
    first = Run(tmp_path / "first", {
        **by_hand, "training.steps": 2, "lighthouse.stage": "dense", "training.seq_len": 64,
        "training.local_batch_size": 4, "validation.enable": False,
    }).succeed()  # fmt: skip
    second = Run(tmp_path / "second", {
        **by_hand, "training.steps": 4, "lighthouse.stage": "dense",
        "lighthouse.keep_position": True, "model.rope_scaling": YARN,
        "checkpoint.initial_load_model_only": False,
        "checkpoint.initial_load_path": str(tmp_path / "first/dump/checkpoint/step-2"),
    }).succeed()  # fmt: skip
    assert exact(first) == {step: exact(whole)[step] for step in (1, 2)}
    assert exact(second) == {step: exact(whole)[step] for step in (3, 4)}
    assert validation_losses(second).items() <= held_out.items()


@pytest.mark.parametrize(
    ("changes", "processes"),
    [
        ({"parallelism.tensor_parallel_degree": 2}, 2),
        pytest.param({"parallelism.data_parallel_shard_degree": 2}, 2, marks=pytest.mark.slow),
        pytest.param({"parallelism.context_parallel_degree": 2}, 2, marks=pytest.mark.slow),
        pytest.param({"parallelism.pipeline_parallel_degree": 2, "training.local_batch_size": 2},
                     2, marks=pytest.mark.slow),
        pytest.param({"compile.enable": True, "compile.backend": "aot_eager"}, 1,
                     marks=pytest.mark.slow),
    ],
    ids=["tensor", "fsdp", "context", "pipeline", "compiled"],
)  # fmt: skip
def test_runs_train_alike(
    sharp: Run, tmp_path: Path, changes: dict[str, Any], processes: int
) -> None:
    run = Run(tmp_path, {**sharp.settings, **changes}, processes=processes).succeed()
    assert losses(run) == pytest.approx(losses(sharp), rel=1e-6)


def test_a_checkpoint_is_the_model_of_its_last_step(
    whole: Run, tmp_path: Path, monkeypatch
) -> None:
    checkpoints = whole.record_file.parent / "dump/checkpoint"
    wanted = {2: None, 3: "yarn", 6: "yarn"}
    tokens = torch.randint(0, 256, (1, 256))
    for step, kind in wanted.items():
        path, output = checkpoints / f"step-{step}", tmp_path / f"exported-{step}"
        code = exit_code_of(main, monkeypatch, "lighthouse", "export-hf", path, "--output", output,
                            "--allow-lighthouse")  # fmt: skip
        assert not code
        config = json.loads((output / "config.json").read_text())
        scaling = config["rope_scaling"]
        # Step 2 has seen no more than 64 positions, whatever comes later.
        assert config["max_position_embeddings"] == (256 if kind else 64)
        if not kind:
            assert not exit_code_of(main, monkeypatch, "lighthouse", "export-hf", path, "--output",
                                    tmp_path / "asked", "--training.seq_len", "256")  # fmt: skip
            asked = json.loads((tmp_path / "asked/config.json").read_text())
            assert asked["max_position_embeddings"] == 256
        assert (scaling or {}).get("rope_type") == kind
        if scaling:
            assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (4, 64)
        loaded, plain, scaled = (
            load_trained_model(path, overrides).model(tokens)
            for overrides in (
                None,
                ["--model.rope_scaling", "none"],
                ["--model.rope_scaling", YARN],
            )
        )
        assert not torch.equal(plain, scaled)
        assert torch.equal(loaded, scaled if kind else plain)


def file_of(folder: Path, model: str) -> list[str]:
    """Arguments with a file of the schedule, in the place of a checkpoint's record."""
    stages = ", ".join(f'"{stage}"' for stage in STAGES)
    (folder / "run.toml").write_text(
        f"[model]\n{model}\n[training]\nseq_len = 256\nsteps = 6\n"
        f"[lighthouse]\nschedule = [{stages}]\n"
    )
    method = {key: value for key, value in SCHEDULED.items() if key.startswith("lighthouse.")}
    del method["lighthouse.schedule"]
    return ["--job.config_file", str(folder / "run.toml"), *arguments(method)]


def test_a_file_in_the_place_of_the_record_keeps_the_scaling(whole: Run, tmp_path: Path) -> None:
    """Evaluation takes the stage of the checkpoint's step from the file's schedule."""
    checkpoints = whole.record_file.parent / "dump/checkpoint"
    line = file_of(tmp_path, f'flavor = "{SCHEDULED["model.flavor"]}"\nrope_scaling = "none"')
    tokens = torch.randint(0, 256, (1, 256))
    for step in (2, 3, 6):
        path = checkpoints / f"step-{step}"
        expected, found = (load_trained_model(path, more).model(tokens) for more in (None, line))
        assert torch.equal(found, expected), step
    unknown = tmp_path / "step-6"
    shutil.copytree(checkpoints / "step-6", unknown)
    (unknown / "lighthouse.json").unlink()
    with pytest.raises(UserValueError, match="does not say which stage it is of; pass --lighthou"):
        load_trained_model(unknown, line)
    again = ["--lighthouse.schedule", "dense until=2 seq_len=64, dense yarn_factor=4"]
    with pytest.raises(UserValueError, match="step-6 has its scaling already; pass --lighthouse.s"):
        load_trained_model(checkpoints / "step-6", again)


@pytest.mark.parametrize("scaling", ["none", YARN])
def test_weights_of_a_scaled_stage_are_known_as_scaled(
    whole: Run, tmp_path: Path, scaling: str
) -> None:
    """A run that begins from them without YaRN gets a warning, and one with it does not."""
    weights = whole.record_file.parent / "dump/checkpoint/step-6"
    run = Run(tmp_path, {
        **SCHEDULED, "lighthouse.schedule": ["dense"], "model.rope_scaling": scaling,
        "training.steps": 1, "checkpoint.initial_load_path": weights, "validation.enable": False,
    }).succeed()  # fmt: skip
    warned = f"model.rope_scaling = 'none' (checkpoint: '{YARN}')"
    assert (warned in run.log) == (scaling == "none")
    assert ("trained as another model" in run.log) == (scaling == "none")


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("described", [False, True], ids=["flavor", "folder"])
def test_the_same_schedule_in_another_folder_is_the_same_model(
    whole: Run, tmp_path: Path, monkeypatch, described: bool, step: int
) -> None:
    """After the last step without YaRN, and within a stage with it."""
    settings = {**SCHEDULED, "validation.enable": False}
    weights = whole.record_file.parent / "dump/checkpoint"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    if described:
        assert not exit_code_of(main, monkeypatch, "lighthouse", "export-hf", weights / "step-2",
                                "--output", tmp_path / "model")  # fmt: skip
        settings |= {"model.hf_folder": str(tmp_path / "model"), "model.rope_scaling": ""}
        Run(tmp_path / "first", settings).succeed()
        weights = tmp_path / "first/dump/checkpoint"
        line, tokens = (
            file_of(tmp_path, f'hf_folder = "{weights / "step-6"}"'),
            torch.ones(1, 256, dtype=torch.int64),
        )
        expected, found = (load_trained_model(weights / f"step-{step}", more).model(tokens)
                           for more in (None, line))  # fmt: skip
        assert torch.equal(found, expected)
    settings |= {
        "checkpoint.initial_load_model_only": False,
        "checkpoint.initial_load_path": str(weights / f"step-{step}"),
    }
    second = Run(tmp_path / "second", settings).succeed()
    assert "another model" not in second.log


def test_a_stage_under_way_keeps_its_scaling(whole: Run) -> None:
    """A run of its folder that would go on with another factor is refused."""
    folder = whole.record_file.parent
    longer = {**SCHEDULED, "training.steps": 7, "lr_scheduler.total_steps": 7}
    longer["lighthouse.schedule"] = [x.replace("factor=4", "factor=8") for x in STAGES]
    refused = Run(folder, longer)
    assert refused.wait() == 1 and (folder / "dump/checkpoint/step-6").is_dir()
    assert "another model of checkpoint" in refused.log
    assert "factor=8 original_max_position_embeddings=64' (checkpoint: " in refused.log
