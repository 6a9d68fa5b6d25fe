"""The window in the first stage, alone and beside the selection."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import SMALL, VALIDATED, Run, arguments, continued, exit_code_of
from small_model import FOUR_LAYERS, N, build

from lighthouse import WindowAttention
from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.checks.configuration import check_config
from torchtitan.models.llama3_lighthouse.checks.unread import warnings_of
from torchtitan.models.llama3_lighthouse.data.retrieval import find_task
from torchtitan.models.llama3_lighthouse.dry_run import dry_run
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.evaluation.retrieval_accuracy import (
    sequence_length,
)
from torchtitan.models.llama3_lighthouse.job_config import JobConfig, LighthouseConfigManager
from torchtitan.models.llama3_lighthouse.memory_estimate import activation_bytes
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.studies.ablation_results import (
    read_metrics,
    summarise,
)

WINDOW = {"lighthouse.attention": "window", "lighthouse.window": 40}
ARGS = replace(FOUR_LAYERS, window=24)
# The numbers that have to be the same where two runs compute the same.
EXACT = ("stage", "batches", "loss", "grad_norm", "tokens_seen")


def parsed(folder: Path, **settings: Any) -> JobConfig:
    line = arguments({"job.dump_folder": folder / "dump", **SMALL, **WINDOW, **settings})
    return LighthouseConfigManager().parse_args(line)


def exact(run: Run) -> dict[int, tuple[object, ...]]:
    return {step: tuple(line[key] for key in EXACT) for step, line in run.steps().items()}


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory) -> Run:
    """Two steps under the window and two dense ones, of which all are saved."""
    settings = {
        **VALIDATED, **WINDOW, "training.steps": 4, "checkpoint.interval": 1,
        "validation.freq": 2, "validation.steps": 1,
        # The pyramid of these settings is too long for the sequence.
        "lighthouse.top_k": 1024, "lighthouse.picks_per_stratum": 128,
        "lighthouse.passkey_mix": 0.3, "lighthouse.passkey_tasks": ("passkey",),
        "training.seq_len": 412, "validation.seq_len": 412,
    }  # fmt: skip
    run = Run(tmp_path_factory.mktemp("window"), settings).succeed()
    run.settings = settings
    return run


def test_both_stages_train_and_say_what_they_run(two_stages: Run) -> None:
    lines = list(read_metrics(two_stages.log_file.parent / "dump").values())
    assert [line["lighthouse/stage"] for line in lines] == [1, 1, 0, 0]
    assert [line["lighthouse/gathered_length"] for line in lines] == [412] * 4
    assert "window        each position attends over the last 40 of 412 positions" in two_stages.log
    assert (
        "Stage 'window' begins at step 1: each position attends over a window of 40 of 412 "
        "positions, by vectorised PyTorch, " in two_stages.log
    )
    assert "Stage 'dense' begins at step 3 after window: attention runs on 412" in two_stages.log
    assert "entry_score" not in two_stages.log
    assert "lighthouse.top_k = 1024 has no effect: it is read when lighthouse.attention is " in (
        two_stages.log
    )


def test_resume_leaves_no_trace(two_stages: Run, tmp_path: Path) -> None:
    resumed = continued(two_stages, tmp_path, 1)
    expected = exact(two_stages)
    assert exact(resumed) == {step: expected[step] for step in (2, 3, 4)}


def test_dense_stage_is_that_of_lighthouse(two_stages: Run, tmp_path: Path) -> None:
    """From the same checkpoint, whichever attention the first stage has."""
    lighthouse = {"lighthouse.attention": "lighthouse", "lighthouse.window": 0}
    method = {"lighthouse.top_k": 16, "lighthouse.picks_per_stratum": 16}
    dense = continued(two_stages, tmp_path, 2, **lighthouse, **method)
    expected = exact(two_stages)
    assert exact(dense) == {step: expected[step] for step in (3, 4)}
    assert "lighthouse.attention = 'lighthouse' (checkpoint: 'window')" in dense.log


def test_dense_attention_is_the_same_model_and_the_window_another() -> None:
    ours, lighthouse = build(args=ARGS), build()
    wrapped = [isinstance(b.attention.inner_attention, WindowAttention)
               for b in ours.layers.values()]  # fmt: skip
    assert wrapped == [False, True, True, False]
    assert list(ours.state_dict()) == list(lighthouse.state_dict())
    tokens = torch.randint(0, 320, (1, N), generator=torch.Generator().manual_seed(1))
    under_window = ours(tokens)
    for model in (ours, lighthouse):
        model.use_attention("dense")
        model(tokens).logsumexp(-1).sum().backward()
    assert torch.equal(ours(tokens), lighthouse(tokens))
    for mine, theirs in zip(ours.parameters(), lighthouse.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert not torch.allclose(under_window, ours(tokens))
    ours.use_attention("lighthouse")
    assert torch.equal(under_window, ours(tokens))


def test_a_window_beside_the_selection_trains_and_resumes(tmp_path: Path) -> None:
    settings = {
        "training.steps": 3, "lighthouse.dense_from_step": 2, "checkpoint.interval": 1,
        "lighthouse.window": 40, "lighthouse.entry_score": "first", "lighthouse.combine": "finest",
        "lighthouse.top_k": 8, "lighthouse.log_selection_every": 2,
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", settings).succeed()
    run.settings = settings
    assert "S = 96 of 256 positions; 1 strata; a window of 40 positions beside it" in run.log
    assert (
        "runs on 96 of 256 positions, each position attends over a window of 40 too, by vec"
        in run.log
    )
    resumed = continued(run, tmp_path / "resumed", 1)
    expected = exact(run)
    assert exact(resumed) == {step: expected[step] for step in (2, 3)}
    assert "selection/level_" in (tmp_path / "run/dump/metrics.jsonl").read_text()


def test_flops_and_memory_count_a_window_beside_the_selection() -> None:
    method = replace(FOUR_LAYERS.lighthouse, combine="finest", window=24)
    beside, without = replace(FOUR_LAYERS, lighthouse=method), FOUR_LAYERS
    both = beside.flops_per_token(0, N, "lighthouse")
    selection = without.flops_per_token(0, N, "lighthouse")
    dense = 12 * ARGS.dim * 2 * (N + 1) / 2
    assert both - selection == pytest.approx(ARGS.flops_per_token(0, N, "lighthouse") - dense)
    section = JobConfig().activation_checkpoint
    section.mode = "lighthouse"
    section.keep_products = []
    kept = [activation_bytes(args, N, N, section, "lighthouse") for args in (beside, without)]
    # Two layers keep the window's output and logsumexps.
    assert kept[0] - kept[1] == 2 * N * (2 * ARGS.dim + 4 * ARGS.n_heads)


def test_flops_and_memory_count_the_window() -> None:
    pairs = sum(min(t + 1, 24) for t in range(N))
    dense = N * (N + 1) / 2
    per_pair = 12 * ARGS.dim
    expected = per_pair * 2 * (pairs + dense) / N
    assert ARGS.flops_per_token(0, N, "lighthouse") == pytest.approx(expected)
    assert ARGS.flops_per_token(0, N, "dense") == FOUR_LAYERS.flops_per_token(0, N, "dense")
    whole = replace(ARGS, window=10**6)
    assert whole.flops_per_token(0, N, "lighthouse") == ARGS.flops_per_token(0, N, "dense")
    # The pyramid does not fit such a length, and a window needs none.
    section = JobConfig().activation_checkpoint
    section.mode = "lighthouse"
    kept = [activation_bytes(ARGS, 411, 411, section, stage) for stage in ("lighthouse", "dense")]
    assert kept[0] == kept[1]


def test_tables_of_sweeps_show_no_selection(two_stages: Run) -> None:
    folder = two_stages.log_file.parent
    config = parsed(folder, **two_stages.settings)
    run = SimpleNamespace(name="window", config=config, folder=folder / "dump", settings={})
    row = summarise(run, ["lighthouse.attention", "lighthouse.window"])
    assert row["lighthouse.attention"] == "window" and row["lighthouse.window"] == 40
    assert row["S"] is row["N/S"] is None and row["tokens/s, Lighthouse"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lighthouse.window": 0},
            "lighthouse.attention = 'window' needs lighthouse.window = 0 to be at least 1; pass "
            "--lighthouse.window N",
        ),
        ({"lighthouse.window": -1}, r"lighthouse.window = -1 must be at least 0 .*0 means no"),
        (
            {"lighthouse.attention": "lighthouse", "lighthouse.combine": "sum"},
            "window = 40 needs combine = 'finest', .*, got combine = 'sum'",
        ),
        (
            {"lighthouse.log_selection_every": 5},
            "lighthouse.log_selection_every = 5 does not go with .* selects nothing; set it to 0",
        ),
        (
            {"training.seq_len": 411},
            "training.seq_len = 411 must be a multiple of .* = 2 x 1 x 1 = 2, .*seq_len 412",
        ),
        (
            {"parallelism.context_parallel_degree": 2, "lighthouse.window": 130},
            "lighthouse.window = 130 does not fit training.seq_len = 512 and parallelism."
            "context_parallel_degree = 2: .* 4 chunks .*; use a window of at most 129, a longer",
        ),
        (
            {
                "parallelism.context_parallel_degree": 2,
                "lighthouse.window": 129,
                "validation.enable": True,
                "validation.seq_len": 256,
            },
            "window = 129 does not fit validation.seq_len = 256 and .* at most 65, a longer",
        ),
    ],
)
def test_refusals(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserValueError, match=message):
        check_config(parsed(tmp_path, **settings), flavors)


@pytest.mark.parametrize(
    "settings",
    [
        {"lighthouse.stage": "dense"},
        {"lighthouse.dense_from_step": 0},
        {"lighthouse.dense_layers": [0, 1, 2, 3, 4, 5]},
        {
            "lighthouse.stage": "dense",
            "lighthouse.attention": "lighthouse",
            "lighthouse.combine": "finest",
            "lighthouse.picks_per_stratum": 8,
        },
    ],
)
def test_context_parallelism_takes_a_long_window_that_never_runs(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {
        "parallelism.context_parallel_degree": 2, "lighthouse.window": 130, **settings
    }  # fmt: skip
    check_config(parsed(tmp_path, **settings), flavors)


def test_settings_of_the_method_have_no_effect(tmp_path: Path) -> None:
    """A sequence length that no pyramid fits is taken, and the warning names what is not read."""
    config = parsed(tmp_path, **{"training.seq_len": 410, "lighthouse.scorer": "gla"})
    check_config(config, flavors)
    found = [
        line for line in warnings_of(config, 1) if "lighthouse.attention is 'lighthouse'" in line
    ]
    assert len(found) == 4
    plain = parsed(tmp_path, **{"lighthouse.attention": "lighthouse", "lighthouse.window": 0})
    assert not any("lighthouse.attention" in line for line in warnings_of(plain, 1))


def test_windows_that_cost_more_than_they_seem_to_are_warned_of(tmp_path: Path) -> None:
    slow, dense = "its kernel then has no tensor cores", "this is dense attention, at its cost"
    for settings, expected in (
        ({"training.mixed_precision_param": "bfloat16"}, ()),
        ({}, (slow,)),
        ({"lighthouse.window": 512}, (dense, slow)),
        ({"lighthouse.window": 512, "lighthouse.stage": "dense"}, ()),
        ({"lighthouse.dense_from_step": 0}, ()),
        ({"lighthouse.window": 512, "lighthouse.dense_layers": [0, 1, 2, 3, 4, 5]}, ()),
        ({"lighthouse.attention": "lighthouse", "lighthouse.window": 0}, ()),
    ):
        text = "\n".join(warnings_of(parsed(tmp_path, **settings), 1))
        assert [words in text for words in (dense, slow)] == [
            words in expected for words in (dense, slow)
        ]


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_a_window_in_float32_is_warned_of_where_nothing_lowers_it(tmp_path: Path, kind) -> None:
    """FSDP does, and torchtitan has no autocast beside these parallelisms."""
    settings = {f"parallelism.{kind}_parallel_degree": 2}
    settings["training.mixed_precision_param"] = "bfloat16"
    config = parsed(tmp_path, **settings)
    (found,) = [line for line in warnings_of(config, 2) if "window" in line]
    assert found.startswith("training.dtype = 'float32' with a window, which nothing lowers under ")
    assert not any("window" in line for line in warnings_of(config, 4))
    config = parsed(tmp_path, **settings, **{"training.dtype": "bfloat16"})
    assert not any("window" in line for line in warnings_of(config, 2))


def test_dry_run_describes_the_window(tmp_path: Path) -> None:
    text = dry_run(parsed(tmp_path, **{"training.seq_len": 410}), 1)
    keys = sum(min(t + 1, 40) for t in range(410)) / 410
    assert f"over the last 40 of 410 positions, {keys:.1f} keys on average" in text
    assert "FLOPs/token   window " in text and " GiB window, " in text
    assert "S = " not in text


def test_dry_run_counts_what_a_layer_sends(tmp_path: Path) -> None:
    settings = {"parallelism.context_parallel_degree": 2}
    args = flavors["debugmodel"]
    # Two chunks a rank hand on a key and a value in float32, forward and backward.
    key_value = 2 * args.dim // args.n_heads * (args.n_kv_heads or args.n_heads)
    halo = f"{2 * 2 * 39 * key_value * 4:,} bytes of the halo, per"
    text = dry_run(parsed(tmp_path, **settings), 2)
    assert f"ring          each rank sends {halo} window layer and sequence" in text
    beside = {"lighthouse.attention": "lighthouse", "lighthouse.combine": "finest",
              "lighthouse.picks_per_stratum": 8}  # fmt: skip
    text = dry_run(parsed(tmp_path, **settings, **beside), 2)
    assert re.search(rf"gradients, [\d,]+ bytes of seam rows, and {halo} Lighthouse layer", text)
    with pytest.raises(UserValueError, match="lighthouse.window = 130 does not fit"):
        dry_run(parsed(tmp_path, **settings, **{"lighthouse.window": 130}), 2)


def test_evaluation_under_the_window(two_stages: Run, tmp_path: Path, monkeypatch) -> None:
    """Losses are the trainer's, prompts are not padded, and causality is refused."""
    dump = two_stages.log_file.parent / "dump"

    def evaluate(what: str, *line: object) -> Any:
        common = ["--output", tmp_path / what, "--device", "cpu", "--no-plots"]
        return exit_code_of(main, monkeypatch, "lighthouse", "evaluate", what, *line, *common)

    step = dump / "checkpoint/step-2"
    assert not evaluate("loss", step, "--attention", "lighthouse")
    logged = [json.loads(line) for line in (dump / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line.get("validation_metrics/loss") for line in logged}
    with (tmp_path / "loss/losses.csv").open() as file:
        *_, whole = csv.DictReader(file)
    assert float(whole["loss"]) == pytest.approx(held_out[2], abs=1e-5)

    asked = ["--lengths", 128, "--trials", 1, "--depths", 50, "--tasks", "passkey"]
    assert not evaluate("niah", step, "--attention", "lighthouse", *asked)
    (cell,) = json.loads((tmp_path / "niah/results.json").read_text())["checkpoints"][0]["cells"]
    assert cell["sequence_length"] == sequence_length(find_task("passkey"), 128, int)

    message = evaluate("causality", step)
    assert "lighthouse.attention = 'window', which selects nothing" in str(message)
