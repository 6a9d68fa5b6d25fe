"""Held-out loss with document masks: the trainer's own, side by side, and what is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import VALIDATED, Run, exit_code_of
from text_data import write_jsonl
from torchtitan.components.loss import IGNORE_INDEX

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.evaluation.held_out_loss import (
    held_out_batches,
    losses_by_position,
)
from torchtitan.models.llama3_lighthouse.evaluation.inference import load_trained_model
from torchtitan.models.llama3_lighthouse.job_config import JobConfig
from torchtitan.models.llama3_lighthouse.studies.ablation_results import read_metrics

SPAN = 8
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Documents of a letter each, from a few tokens to more than a sequence of 128."""
    lengths = [{2: 150, 3: 300}.get(i % 6, 3 + 37 * i % 90) for i in range(60)]
    texts = [chr(97 + 7 * i % 26) * n for i, n in enumerate(lengths)]
    folder = tmp_path_factory.mktemp("documents")
    return write_jsonl(folder, {"train.jsonl": texts, "validation.jsonl": texts[::-1]})


@pytest.fixture(scope="module")
def masked(text: Path, tmp_path_factory) -> Path:
    """A step under Lighthouse, one under a window and a dense one, each validated and saved.

    The first stage has the longest entries, and later ones do not name its settings.
    """
    settings = {
        **VALIDATED, "training.document_mask": True, "training.seq_len": 128,
        "training.dataset": "c4_local", "training.dataset_path": text, "checkpoint.interval": 1,
        "lighthouse.window": 24, "lighthouse.combine": "finest", "lighthouse.top_k": 16,
        "lighthouse.picks_per_stratum": 4, "lighthouse.document_positions": "restart",
        "lighthouse.dense_from_step": JobConfig().lighthouse.dense_from_step,
        "lighthouse.schedule": [
            "lighthouse until=1 levels=4 top_k=8", "window until=2 window=16", "dense",
        ],
        "validation.dataset": "c4_local", "validation.dataset_path": text,
        "validation.seq_len": 128, "validation.steps": 3,
        # A few steps of this rate let documents in sight matter.
        "optimizer.lr": 5e-3, "lr_scheduler.warmup_steps": 0,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("masked")
    Run(folder, settings).succeed()
    return folder / "dump"


@pytest.fixture
def call(tmp_path: Path, monkeypatch) -> Call:
    """Run the command; return its rows, or the message that it ends with."""

    def command(*line: object) -> Any:
        argv = ["lighthouse", "evaluate", "loss", *line, "--output", tmp_path / "out"]
        if code := exit_code_of(main, monkeypatch, *argv, "--device", "cpu", "--no-plots"):
            return code
        with (tmp_path / "out/losses.csv").open() as file:
            return list(csv.DictReader(file))

    return command


def step_of(run: Path, step: int) -> Path:
    return run / f"checkpoint/step-{step}"


def logged(run: Path, step: int) -> float:
    return read_metrics(run)[step]["validation_metrics/loss"]


def copy_with(step: Path, folder: Path, section: str, **settings: Any) -> Path:
    """The same weights, recorded as those of a run with other settings."""
    folder.mkdir(parents=True)
    for file in step.iterdir():
        if file.name not in ("lighthouse.json", ".checksums"):
            (folder / file.name).symlink_to(file)
    record = json.loads((step / "lighthouse.json").read_text())
    record["config"][section] |= settings
    (folder / "lighthouse.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("step", "attention"), [(1, "lighthouse"), (2, "lighthouse"), (3, "dense")],
    ids=["lighthouse", "window", "dense"],
)  # fmt: skip
def test_loss_is_the_validation_loss_of_a_run_with_masks(
    masked: Path, call: Call, step: int, attention: str
) -> None:
    line = step_of(masked, step), "--attention", attention, "--first-bucket", 8
    *buckets, whole = call(*line)
    assert float(whole["loss"]) == pytest.approx(logged(masked, step), rel=1e-6)
    total = sum(int(row["tokens"]) * float(row["loss"]) for row in buckets)
    assert total / int(whole["tokens"]) == pytest.approx(logged(masked, step), rel=1e-6)
    assert all((row["document mask"], row["context in"]) == ("True", "document") for row in buckets)
    assert all(float(row["low"]) < float(row["loss"]) < float(row["high"]) for row in buckets)
    *_, without = call(*line, "--training.no-document_mask")
    assert abs(float(without["loss"]) - logged(masked, step)) > 0.01
    assert (without["document mask"], without["context in"]) == ("False", "sequence")


def test_context_is_the_part_of_the_own_document(masked: Path, call: Call, tmp_path: Path) -> None:
    rows = call(step_of(masked, 3), "--first-bucket", 8)
    record = json.loads((tmp_path / "out/losses.json").read_text())
    assert record["text"]["documents begin at multiples of"] == SPAN
    trained = load_trained_model(step_of(masked, 3))
    context, losses = [], []
    for inputs, labels, documents in held_out_batches(trained.config, trained.tokenizer, SPAN):
        options = {} if documents is None else {"attention_masks": documents}
        found = losses_by_position(trained.model, inputs, labels, options)
        layout = torch.zeros_like(labels) if documents is None else documents
        for row, positions in enumerate(layout.tolist()):
            for position, first in enumerate(positions):
                if labels[row, position] != IGNORE_INDEX:
                    context.append(position - first + 1)
                    losses.append(found[row, position].item())
    ranges = [(1, 8), (9, 16), (17, 32), (33, 64), (65, 128), (1, 128)]
    assert [(int(r["context from"]), int(r["context to"])) for r in rows] == ranges
    for row, (start, end) in zip(rows, ranges, strict=True):
        here = [x for x, n in zip(losses, context, strict=True) if start <= n <= end]
        assert int(row["tokens"]) == len(here) < 6 * 128
        assert float(row["loss"]) == pytest.approx(sum(here) / len(here), rel=1e-6)


def test_buckets_that_hold_nothing_are_left_out(masked: Path, call: Call, tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short", {"validation.jsonl": ["short"] * 99})
    rows = call(step_of(masked, 3), "--first-bucket", 8, "--validation.dataset_path", short)
    assert [(row["context from"], row["context to"]) for row in rows] == [("1", "8"), ("1", "128")]
    assert rows[0]["loss"] == rows[1]["loss"]


def test_checkpoints_with_masks_and_without_read_the_same(
    masked: Path, call: Call, tmp_path: Path, capsys
) -> None:
    step = step_of(masked, 3)
    without = copy_with(step, tmp_path / "seeing/step-3", "training", document_mask=False)
    both = step, without, "--labels", "apart", "seeing", "--first-bucket", 32
    rows = call(*both)
    said = "begin at multiples of 8 positions, and context is counted within them; they do not see"
    assert said in (out := capsys.readouterr().out)
    assert "without masks, these see all of them and the padding too: seeing\n" in out
    first, second = rows[:4], rows[4:]
    for one, other in zip(first, second, strict=True):
        for column in ("context in", "context from", "context to", "sequences", "tokens"):
            assert one[column] == other[column]
        assert (one["document mask"], other["document mask"]) == ("True", "False")
        difference = float(other["loss"]) - float(one["loss"])
        assert float(other["minus first"]) == pytest.approx(difference, abs=1e-9)
    assert float(first[-1]["loss"]) == pytest.approx(logged(masked, 3), rel=1e-6)
    # The one without masks sees the padding as text, and predicts the same tokens.
    trained = load_trained_model(without)
    found = [
        losses_by_position(trained.model, inputs, labels)
        for inputs, labels, _ in held_out_batches(trained.config, trained.tokenizer, SPAN)
    ]
    assert float(second[-1]["loss"]) == pytest.approx(torch.cat(found).nanmean().item(), rel=1e-6)
    assert abs(float(second[-1]["minus first"])) > 0.01

    for mask in ("False", "True"):
        override = "--training.document_mask" if mask == "True" else "--training.no-document_mask"
        rows = call(*both, override, "--validation.steps", 1)
        assert {row["document mask"] for row in rows} == {mask}
        assert {float(row["minus first"]) for row in rows[len(rows) // 2 :]} == {0.0}


def test_documents_lie_where_the_longest_entries_of_all_need_them(
    masked: Path, call: Call, tmp_path: Path
) -> None:
    """Alone, a run reads what it was validated on; a longer span serves all that are compared."""
    step = step_of(masked, 3)
    dense = copy_with(step, tmp_path / "dense/step-3", "lighthouse", schedule=[], stage="dense",
                      attention="lighthouse", levels=2)  # fmt: skip

    def span(*line: object) -> int | None:
        assert isinstance(call(*line, "--validation.steps", 1), list)
        record = json.loads((tmp_path / "out/losses.json").read_text())
        return record["text"]["documents begin at multiples of"]

    assert [span(step), span(dense), span(dense, step)] == [SPAN, 1, SPAN]
    # Lighthouse attention needs the span of its entries, if the run never used it too.
    assert span(dense, "--attention", "dense", "lighthouse") == 2
    assert span(dense, "--training.no-document_mask") is None


def test_lighthouse_attention_without_a_window_takes_no_masks(run: Path, call: Call) -> None:
    step = step_of(run, 2)
    message = call(step, "--attention", "lighthouse", "--training.document_mask")
    assert f"{step}: training.document_mask = true needs a window beside" in message
    assert "with lighthouse.window = 0" in message
    rows = call(step, "--training.document_mask")
    assert {row["document mask"] for row in rows} == {"True"}


@pytest.mark.parametrize("masks", [False, True])
def test_only_evaluations_without_masks_say_so(masked: Path, caplog, masks: bool) -> None:
    with caplog.at_level("WARNING"):
        load_trained_model(step_of(masked, 3), masks=masks)
    assert ("nothing is masked" in caplog.text) is not masks
