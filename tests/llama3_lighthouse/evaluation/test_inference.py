"""Models loaded from checkpoints, and the records of checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from torchtitan.models.llama3_lighthouse.checkpoints.record import (
    RECORD_FILE,
    CheckpointRecord,
    read_record,
)
from torchtitan.models.llama3_lighthouse.data.packing import build_validation_dataloader
from torchtitan.models.llama3_lighthouse.evaluation.inference import (
    find_checkpoint,
    load_trained_model,
    read_configuration,
)
from torchtitan.models.llama3_lighthouse.job_config import JobConfig


def test_checkpoints_record_what_wrote_them(run: Path) -> None:
    lighthouse, dense = (read_record(run / f"checkpoint/step-{step}") for step in (2, 3))
    assert (lighthouse.step, lighthouse.dense_steps) == (2, 0)
    assert (dense.step, dense.dense_steps) == (3, 1)
    assert dense.config["training"]["seq_len"] == 512
    assert dense.config["model"]["flavor"] == "debugmodel"


@pytest.mark.parametrize(("step", "attention"), [(2, "lighthouse"), (3, "dense")])
def test_loaded_model_has_the_validated_loss(run: Path, step: int, attention: str) -> None:
    trained = load_trained_model(run / f"checkpoint/step-{step}")
    trained.model.use_attention(attention)
    loader = iter(build_validation_dataloader(1, 0, trained.tokenizer, trained.config))
    losses = []
    for _ in range(3):
        inputs, labels = next(loader)
        logits = trained.model(inputs["input"])
        losses.append(cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    logged = {line["step"]: line.get("validation_metrics/loss") for line in lines}
    assert sum(losses) / 3 == pytest.approx(logged[step], abs=1e-5)


def test_a_schedules_model_has_the_method_of_the_last_steps_that_used_it() -> None:
    config = JobConfig()
    config.model.flavor, config.training.steps = "debugmodel", 8
    config.lighthouse.dense_layers = [0, 5]
    config.lighthouse.schedule = [
        "lighthouse until=2 top_k=128", "lighthouse until=4 seq_len=32768 top_k=256 scorer=gla",
        "window until=6 window=64", "dense",
    ]  # fmt: skip
    config.training.seq_len = 65536
    for last, expected in ((2, (128, "norm", 0)), (4, (256, "gla", 0)), (6, (1536, "norm", 64))):
        record = CheckpointRecord(8, last, config.to_dict())
        found, args = read_configuration(Path("step-8"), record, [])
        assert (args.lighthouse.top_k, args.lighthouse.scorer, args.window) == expected
        assert found.training.seq_len == args.max_seq_len == 65536
        # Shorter sequences than a stage of training had, and another method, can be evaluated.
        line = ["--training.seq_len", "16384", "--lighthouse.top_k", "512"]
        found, args = read_configuration(Path("step-8"), record, line)
        assert (args.max_seq_len, args.lighthouse.top_k, args.window) == (16384, 512, expected[2])


def test_finding_checkpoints(run: Path, tmp_path: Path) -> None:
    for path in (run, run / "checkpoint", run / "checkpoint/step-3"):
        assert find_checkpoint(path) == run / "checkpoint/step-3"
    with pytest.raises(ValueError, match="holds no complete checkpoint; pass a step-N folder"):
        find_checkpoint(tmp_path)


def test_checkpoint_without_record_needs_a_configuration(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-3"
    copy.mkdir()
    for file in (run / "checkpoint/step-3").iterdir():
        if file.name != RECORD_FILE:
            (copy / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="pass that of its run with --job.config_file"):
        load_trained_model(copy)
    settings = ["--model.flavor", "15M", "--lighthouse.dense_layers", "0", "7"]
    settings += ["--lighthouse.top_k", "128", "--training.seq_len", "2048"]
    with pytest.raises(ValueError, match="of another model.*set model.flavor"):
        load_trained_model(copy, settings)
    settings[1] = "debugmodel"
    settings[4] = "5"
    trained = load_trained_model(copy, settings, dtype=torch.bfloat16, max_seq_len=64)
    assert trained.record is None
    assert trained.model(torch.zeros(1, 64, dtype=torch.long)).dtype == torch.bfloat16
