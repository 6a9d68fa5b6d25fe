"""Stages that attend over a window and to one key in every few before it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_flavor  # noqa: F401
import torch
from launch import TRAINED, Run, arguments, continued, exit_code_of
from sharp_start import losses, run_from_sharp_weights
from small_model import SIZE, build
from text_data import config

from lighthouse import StridedAttention, reference
from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.checks.configuration import check_config
from torchtitan.models.llama3_lighthouse.checks.unread import warnings_of
from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import LighthouseModelArgs
from torchtitan.models.llama3_lighthouse.stages import stages_of

STAGE = "window window=16 key_stride=4 until=3"
SETTINGS = {
    "lighthouse.dense_from_step": 10000, "training.steps": 4, "training.global_batch_size": 2,
    "lighthouse.schedule": [STAGE, "dense"], "checkpoint.interval": 1,
    # Without these two, AdamW's first steps show the rounding of each gradient.
    "optimizer.lr": 2e-4, "optimizer.eps": 1e-6,
}  # fmt: skip


def job_of(*stages: str, seq_len: int = 64) -> JobConfig:
    job = config(seq_len=seq_len, batch_size=1)
    job.training.steps, job.lighthouse.schedule = 6, [*stages, "dense"]
    return job


def test_flops_are_those_of_the_pairs_that_attend() -> None:
    args = LighthouseModelArgs(**SIZE, window=16, key_stride=4)
    layer = args.flops_per_token(0, 64, "lighthouse") / args.n_layers
    seen = torch.zeros(64, 64, dtype=torch.bool)
    for t in range(64):
        first = max(0, t // 4 - 3) * 4
        seen[t, first : t + 1] = True
        seen[t, 3:first:4] = True
    assert layer == 12 * args.attention_width * seen.sum().item() / 64


def test_a_model_attends_so_in_its_layers_and_changes_with_the_stage() -> None:
    args = LighthouseModelArgs(**SIZE, window=16, key_stride=4, dense_layers=[0])
    model = build(args=args)
    found = [m for m in model.modules() if isinstance(m, StridedAttention)]
    assert len(found) == args.n_layers - 1
    tokens = torch.randint(0, SIZE["vocab_size"], (1, 64))
    strided = model(tokens)
    model.use_method(LighthouseModelArgs(**SIZE, window=16, dense_layers=[0]))
    window = model(tokens)
    model.use_method(args)
    assert torch.equal(model(tokens), strided) and not torch.allclose(window, strided, atol=1e-4)
    q, k, v = (torch.randn(1, h, 64, 8) for h in (4, 2, 2))
    wanted = reference.strided_attention(q, k, v, 16, 4)
    torch.testing.assert_close(found[0](q, k, v, enable_gqa=True), wanted)


def test_a_stage_takes_its_own_stride_or_that_of_all() -> None:
    job = job_of("window window=16 until=1", "window window=16 key_stride=8 until=2",
                 "lighthouse window=16 until=3")  # fmt: skip
    job.lighthouse.key_stride = 4
    strides = [LighthouseModelArgs(**SIZE) for _ in range(4)]
    for args, stage in zip(strides, stages_of(job), strict=True):
        args.update_from_config(stage.config)
    assert [args.key_stride for args in strides] == [4, 8, 0, 0]
    assert [args.window for args in strides[:3]] == [16, 16, 0]


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("window window=18 key_stride=4", {}, "key_stride = 4 must divide lighthouse.window = 18; "
         "set lighthouse.window to 20"),
        ("window window=16 key_stride=4 seq_len=62 local_batch_size=1", {},
         "key_stride = 4 must divide training.seq_len = 62; set training.seq_len to 64"),
        ("window window=16 key_stride=1", {}, "lighthouse.key_stride = 1"),
        ("dense key_stride=4", {}, "key_stride is not read under attention 'dense'; leave it out"),
        ("lighthouse key_stride=4", {}, "key_stride is not read under attention 'lighthouse'"),
        ("window window=16 key_stride=4", {"training.document_mask": True},
         "does not take training.document_mask = true yet"),
        ("window window=16 key_stride=4", {"parallelism.context_parallel_degree": 2},
         "does not take parallelism.context_parallel_degree = 2 yet"),
        ("window window=16 key_stride=4",
         {"validation.enable": True, "validation.dataset": "python_stdlib",
          "validation.seq_len": 50}, "must divide validation.seq_len = 50"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(
    stage: str, changes: dict[str, Any], message: str
) -> None:
    job = job_of(f"{stage} until=3")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        setattr(getattr(job, section), name, value)
    with pytest.raises(UserValueError) as refused:
        check_config(job, flavors)
    assert message in str(refused.value)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_from_sharp_weights(tmp_path_factory.mktemp("one"), SETTINGS)


@pytest.mark.parametrize(
    ("changes", "processes"),
    [
        ({"parallelism.tensor_parallel_degree": 2}, 2),
        ({"activation_checkpoint.mode": "lighthouse"}, 1),
        pytest.param({"activation_checkpoint.mode": "selective"}, 1, marks=pytest.mark.slow),
        pytest.param({"activation_checkpoint.mode": "full"}, 1, marks=pytest.mark.slow),
        pytest.param({"parallelism.data_parallel_shard_degree": 2}, 2, marks=pytest.mark.slow),
        pytest.param({"parallelism.pipeline_parallel_degree": 2, "training.local_batch_size": 2},
                     2, marks=pytest.mark.slow),
        pytest.param({"compile.enable": True, "compile.backend": "aot_eager"}, 1,
                     marks=pytest.mark.slow),
    ],
    ids=["tensor", "kept", "selective", "full", "fsdp", "pipeline", "compiled"],
)  # fmt: skip
def test_runs_train_alike(
    one_process: Run, tmp_path: Path, changes: dict[str, Any], processes: int
) -> None:
    run = Run(tmp_path, {**one_process.settings, **changes}, processes=processes).succeed()
    assert losses(run) == pytest.approx(losses(one_process), rel=1e-6)


def test_a_resume_leaves_no_trace_and_far_keys_matter(one_process: Run, tmp_path: Path) -> None:
    assert "window of 16 and one key in every 4 further back" in one_process.log
    again = continued(one_process, tmp_path / "resumed", 1)
    assert losses(again) == {step: x for step, x in losses(one_process).items() if step > 1}
    plain = [STAGE.replace(" key_stride=4", ""), "dense"]
    (tmp_path / "plain").mkdir()
    other = Run(tmp_path / "plain", {**one_process.settings, "lighthouse.schedule": plain})
    other.succeed()
    for step in (1, 2, 3):
        assert losses(other)[step] != pytest.approx(losses(one_process)[step], rel=1e-4)


def test_a_stage_that_has_begun_keeps_its_stride(one_process: Run, tmp_path: Path) -> None:
    """A dry run says so before training refuses it."""
    before = one_process.log_file.parent / "dump/checkpoint/step-2"
    shutil.copytree(before, tmp_path / "dump/checkpoint/step-2")

    def text(stage: str) -> str:
        settings = {**TRAINED, **one_process.settings, "lighthouse.schedule": [stage, "dense"]}
        line = arguments({"job.dump_folder": tmp_path / "dump", **settings})
        return dry_run(LighthouseConfigManager().parse_args(line), 1)

    assert "\nresume        goes on from " in text(STAGE)
    changed = text(STAGE.replace("key_stride=4", "key_stride=8"))
    assert "\nresume " not in changed
    assert "warning       this run would make another model of checkpoint" in changed
    assert "lighthouse.key_stride = 8 (checkpoint: 4)" in changed


@pytest.mark.parametrize(
    ("what", "asked", "length"),
    [
        # All digits of the answer but the last follow the prompt.
        ("niah", ["--lengths", 125, "--trials", 1, "--depths", 50, "--tasks", "passkey"], 128),
        ("distance", ["--documents", 1, "--contexts", 30, "--distances", 64,
                      "--passage", 8, 16], None),
    ],
    ids=["niah", "distance"],
)  # fmt: skip
def test_evaluation_fills_sequences_up_to_the_stride(
    one_process: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    what: str, asked: list[object], length: int | None,
) -> None:  # fmt: skip
    step = one_process.log_file.parent / "dump/checkpoint/step-2"
    line = ["evaluate", what, step, "--output", tmp_path / what, "--device", "cpu", "--no-plots"]
    line += ["--attention", "lighthouse", *asked]
    assert not exit_code_of(main, monkeypatch, "lighthouse", *line)
    if length:
        results = json.loads((tmp_path / what / "results.json").read_text())
        (cell,) = results["checkpoints"][0]["cells"]
        assert cell["sequence_length"] == length


def test_a_dense_run_may_carry_the_key_for_later_use() -> None:
    job = job_of()
    job.lighthouse.schedule, job.lighthouse.stage = [], "dense"
    job.lighthouse.attention, job.lighthouse.window, job.lighthouse.key_stride = "window", 16, 4
    assert not any("key_stride" in line for line in warnings_of(job, 1))
    job.lighthouse.attention = "lighthouse"
    (warning,) = (line for line in warnings_of(job, 1) if "key_stride" in line)
    assert warning.endswith("it is read when the attention of a stage is a window")
