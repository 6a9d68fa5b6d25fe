"""Knowledge of later tokens, measured on planted models that have it or lack it."""

from types import SimpleNamespace

import pytest
import torch
from small_model import METHOD, N, build
from torch.nn.functional import cross_entropy

from lighthouse import LighthouseConfig
from torchtitan.models.llama3_lighthouse.checkpoints.record import CheckpointRecord, write_record
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer
from torchtitan.models.llama3_lighthouse.errors import UserValueError
from torchtitan.models.llama3_lighthouse.evaluation import causality
from torchtitan.models.llama3_lighthouse.evaluation.causality import (
    FUTURES,
    futures,
    losses,
    summarise,
)
from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

SPAN, LENGTH, VOCABULARY = 16, 512, 320


def test_what_is_replaced() -> None:
    tokens = torch.arange(3 * LENGTH).view(3, LENGTH)
    positions = torch.tensor([100, 207, 300])
    found = futures(tokens, positions, SPAN)
    assert torch.equal(found["true text"], tokens)
    for row, position in enumerate(positions.tolist()):
        own_end = position // SPAN * SPAN + SPAN
        for name, kept in (("other text", position + 1), ("other text later", own_end + SPAN)):
            same = found[name][row] == tokens[row]
            assert same[:kept].all() and not same[kept:].any()


class Planted(torch.nn.Module):
    """A model that reads the next token where it stands, or else always predicts token 0."""

    def __init__(self, reads_on: bool) -> None:
        super().__init__()
        self.reads_on, self.output, self.forwards = reads_on, torch.nn.Identity(), 0
        self.model_args = SimpleNamespace(lighthouse=LighthouseConfig(pooling_factor=4, levels=3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        answer = tokens.roll(-1, dims=1) if self.reads_on else torch.zeros_like(tokens)
        return 20.0 * torch.nn.functional.one_hot(answer, VOCABULARY)


@pytest.mark.parametrize("reads_on", [False, True])
def test_planted_models(reads_on: bool) -> None:
    line = ["--validation.seq_len", str(LENGTH), "--validation.local_batch_size", "2"]
    config = LighthouseConfigManager().parse_args(line)
    trained = SimpleNamespace(model=Planted(reads_on), tokenizer=ByteTokenizer(), config=config)
    summary = summarise(losses(trained, batches=4, positions_each=8, device="cpu"))
    assert list(summary) == list(FUTURES)
    assert summary["true text"]["difference"] == 0
    if not reads_on:
        assert all(each["difference"] == 0 for each in summary.values())
    else:
        # The token that it reads lies in the position's own entries. Other text rarely has it.
        assert summary["true text"]["loss"] < 1e-4
        assert summary["other text"]["difference"] > 15
        assert summary["other text later"]["difference"] == 0
    # Each batch takes one pass of the true text, and two more at each position.
    assert trained.model.forwards == 4 * (1 + 2 * 8)
    with pytest.raises(ValueError, match="pass fewer --batches"):
        losses(trained, batches=10**6, positions_each=0, device="cpu")


def test_losses_are_those_of_whole_forward_passes(monkeypatch) -> None:
    """A real model under Lighthouse: one pass for each future of each position, all logits."""
    model = build()
    model.use_attention("lighthouse")
    tokens = torch.randint(256, (2, N))
    batch = [({"input": tokens}, tokens.roll(-1, dims=1))]
    monkeypatch.setattr(
        causality, "build_validation_dataloader", lambda *arguments, **options: batch
    )
    trained = SimpleNamespace(model=model.eval(), tokenizer=None, config=None)
    found = losses(trained, batches=1, positions_each=3, device="cpu")

    generator = torch.Generator().manual_seed(0)
    span, rows = METHOD.coarsest_span, torch.arange(2)
    expected: dict[str, list[torch.Tensor]] = {name: [] for name in FUTURES}
    for _ in range(3):
        positions = torch.randint(N // 8, N - 2 * span, (2,), generator=generator)
        for name, text in futures(tokens, positions, span).items():
            with torch.no_grad():
                logits = model(text)[rows, positions].double()
            labels = batch[0][1][rows, positions]
            expected[name].append(cross_entropy(logits, labels, reduction="none"))
    for name in FUTURES:
        torch.testing.assert_close(found[name], torch.cat(expected[name]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("last", "attention", "refused"), [
    (0, None, True), (0, ["lighthouse"], False), (20, None, False), (None, None, False),
])  # fmt: skip
def test_checkpoint_that_never_selected_is_refused(tmp_path, last, attention, refused) -> None:
    write_record(tmp_path, CheckpointRecord(20, last, {}))
    if refused:
        with pytest.raises(UserValueError, match="never trained under Lighthouse.*--attention"):
            causality._check_stage(tmp_path, attention)
    else:
        causality._check_stage(tmp_path, attention)


def test_dense_steps_are_mentioned(tmp_path, capsys) -> None:
    write_record(tmp_path, CheckpointRecord(45, 30, {}))
    causality._check_stage(tmp_path, None)
    assert "its last 15 steps were dense" in capsys.readouterr().out
