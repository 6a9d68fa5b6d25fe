"""Held-out loss by context: agreement with the trainer, buckets, intervals, refusals."""

import csv
import json
import statistics
from pathlib import Path

import pytest
import torch
from launch import exit_code_of
from torch.nn.functional import cross_entropy

from lighthouse_commands.main import main
from torchtitan.models.llama3_lighthouse.data.tokenizer import save_hugging_face_tokenizer
from torchtitan.models.llama3_lighthouse.evaluation import held_out_loss
from torchtitan.models.llama3_lighthouse.evaluation.held_out_loss import (
    bucket_means,
    context_buckets,
    estimate,
    losses_by_position,
    text_identity,
)
from torchtitan.models.llama3_lighthouse.evaluation.inference import load_trained_model
from torchtitan.models.llama3_lighthouse.job_config import JobConfig


@pytest.fixture
def call(tmp_path: Path, monkeypatch):
    """Run the command; return its rows, or the message that it ends with."""

    def command(*line: object) -> list[dict] | str | int:
        argv = ["lighthouse", "evaluate", "loss", *line, "--output", tmp_path / "out"]
        if code := exit_code_of(main, monkeypatch, *argv, "--device", "cpu"):
            return code
        with (tmp_path / "out/losses.csv").open() as file:
            return list(csv.DictReader(file))

    return command


def test_mean_over_all_positions_is_the_trainers_validation_loss(run, call, tmp_path) -> None:
    steps = [run / "checkpoint/step-2", run / "checkpoint/step-3"]
    rows = call(*steps, "--attention", "dense", "lighthouse", "--first-bucket", 64)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    logged = {line["step"]: line.get("validation_metrics/loss") for line in lines}
    assert [row["attention"] for row in rows[::5]] == ["dense", "lighthouse"] * 2
    curves = {(row["checkpoint"], row["attention"]): rows[i : i + 5]
              for i, row in enumerate(rows) if i % 5 == 0}  # fmt: skip
    trained_under = {("dump, step 2", "lighthouse"): 2, ("dump, step 3", "dense"): 3}
    for (name, attention), step in trained_under.items():
        *buckets, whole = curves[name, attention]
        assert float(whole["loss"]) == pytest.approx(logged[step], abs=1e-5)
        counts = [int(row["context to"]) - int(row["context from"]) + 1 for row in buckets]
        assert counts == [64, 64, 128, 256]
        weighted = sum(n * float(row["loss"]) for n, row in zip(counts, buckets, strict=True))
        assert weighted / 512 == pytest.approx(logged[step], abs=1e-5)
        assert all(row["sequences"] == "6" for row in buckets)
        assert all(float(r["low"]) < float(r["loss"]) < float(r["high"]) for r in buckets)
    one, other = (curves[f"dump, step {step}", "dense"][4] for step in (2, 3))
    assert one["minus first"] == ""
    difference = float(other["loss"]) - float(one["loss"])
    assert float(other["minus first"]) == pytest.approx(difference, abs=1e-9)
    # Sequences differ more from one another than one more step changes each of them.
    width = float(other["minus first, high"]) - float(other["minus first, low"])
    assert 0 < width < float(one["high"]) - float(one["low"])
    record = json.loads((tmp_path / "out/losses.json").read_text())
    assert [c["dense steps"] for c in record["checkpoints"]] == [0, 0, 1, 1]
    assert record["text"]["validation.seq_len"] == 512 and len(record["losses"]) == 20
    assert {"GPU", "torch", "triton", "python", "revision", "date"} <= record.keys()
    assert (tmp_path / "out/losses.png").stat().st_size > 10_000


def test_chunked_losses_are_those_of_the_whole_logits(run, monkeypatch) -> None:
    model = load_trained_model(run).model
    monkeypatch.setattr(held_out_loss, "POSITIONS_AT_ONCE", 100)
    torch.manual_seed(0)
    tokens = torch.randint(259, (2, 257))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[0, 5] = -100
    losses = losses_by_position(model, inputs, labels)
    expected = cross_entropy(model(inputs).transpose(1, 2), labels, reduction="none")
    assert losses[0, 5].isnan() and losses.isnan().sum() == 1
    torch.testing.assert_close(losses.nan_to_num(0.0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("seq_len", "first"), [(512, 64), (700, 256), (96, 7), (50, 256), (5, 1)])
def test_buckets_hold_every_position_once(seq_len: int, first: int) -> None:
    buckets = context_buckets(seq_len, first)
    assert [c for a, b in buckets for c in range(a, b + 1)] == list(range(1, seq_len + 1))
    lengths = [b - a + 1 for a, b in buckets]
    assert lengths[0] == min(first, seq_len)
    assert lengths[1:-1] == [first * 2**i for i in range(len(lengths) - 2)]
    torch.manual_seed(seq_len)
    losses = torch.rand(3, seq_len)
    means, counts = bucket_means(losses, buckets)
    assert counts.tolist() == [lengths] * 3
    for row, values in zip(means, losses.tolist(), strict=True):
        expected = [statistics.fmean(values[a - 1 : b]) for a, b in buckets]
        assert row.tolist() == pytest.approx(expected, abs=1e-12)


def test_interval_is_the_normal_one_over_sequences() -> None:
    values = [2.0, 2.5, 1.75, 2.125, float("nan")]
    found = estimate(torch.tensor(values))
    half = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(values[:4]) / 2
    expected = [2.09375, 2.09375 - half, 2.09375 + half]
    assert [found.mean, found.low, found.high] == pytest.approx(expected, abs=1e-6)
    assert estimate(torch.tensor([3.0])) == held_out_loss.Estimate(3.0, None, None)


def test_positions_count_the_same_in_sequences_of_unequal_counts() -> None:
    """The mean is that of all positions, and its error that of a ratio of two sums."""
    torch.manual_seed(1)
    losses, context = torch.rand(5, 40), torch.randint(1, 33, (5, 40))
    losses[:, ::7] = float("nan")
    losses[2, context[2] <= 8] = float("nan")
    means, counts = bucket_means(losses, [(1, 8), (9, 32), (33, 40)], context)
    for number, inside in enumerate((context <= 8, context > 8)):
        rows = [
            [value for value, here in zip(*row, strict=True) if here and value == value]
            for row in zip(losses.tolist(), inside.tolist(), strict=True)
        ]
        assert counts[:, number].tolist() == [len(row) for row in rows]
        filled = [row for row in rows if row]
        assert len(filled) == 5 - (number == 0)
        mean = statistics.fmean(value for row in filled for value in row)
        squares = sum((sum(row) - mean * len(row)) ** 2 for row in filled)
        error = (squares * len(filled) / (len(filled) - 1)) ** 0.5 / sum(map(len, filled))
        found = estimate(means[:, number], counts[:, number])
        assert found.mean == pytest.approx(mean, abs=1e-12)
        half = statistics.NormalDist().inv_cdf(0.975) * error
        assert [found.low, found.high] == pytest.approx([mean - half, mean + half], abs=1e-6)
    assert means[:, 2].isnan().all() and not counts[:, 2].any()


def test_mistakes_end_in_one_line(run, call, tmp_path) -> None:
    step_2, step_3 = run / "checkpoint/step-2", run / "checkpoint/step-3"
    assert "holds no complete checkpoint" in call(tmp_path)
    assert "are the same" in call(run, step_3)
    assert "--labels must be 2 different names" in call(step_2, step_3, "--labels", "a", "a")
    assert "--first-bucket 0 must be at least 1" in call(step_3, "--first-bucket", 0)
    assert "the run had no validation" in call(step_3, "--validation.no-enable")
    assert "exceeds training.seq_len" in call(step_3, "--validation.seq_len", 1024)
    assert "is not a folder" in call(
        step_3, "--validation.dataset", "c4_local", "--validation.dataset_path", tmp_path / "none"
    )
    other = tmp_path / "step-9"
    other.mkdir()
    for file in step_3.iterdir():
        if file.name not in ("lighthouse.json", ".checksums"):
            (other / file.name).symlink_to(file)
    record = json.loads((step_3 / "lighthouse.json").read_text())
    record["config"]["validation"]["steps"] = 4
    (other / "lighthouse.json").write_text(json.dumps(record))
    message = call(step_2, other)
    assert "differ in validation.steps times validation.local_batch_size: 6 and 8" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_the_same_tokenizer_may_lie_in_any_folder(tmp_path: Path) -> None:
    """Another one makes other tokens of the same text."""
    config = JobConfig()
    config.validation.enable, config.lighthouse.tokenizer = True, "hf"
    found = []
    for name, pad in (("one", "<|pad|>"), ("same", "<|pad|>"), ("other", "<|padding|>")):
        save_hugging_face_tokenizer(tmp_path / name)
        file = tmp_path / name / "tokenizer.json"
        file.write_text(file.read_text().replace("<|pad|>", pad))
        config.model.hf_assets_path = str(tmp_path / name)
        found.append(text_identity(config))
    one, same, other = found
    assert one == same
    assert {key for key in one if one[key] != other[key]} == {"model.hf_assets_path"}
