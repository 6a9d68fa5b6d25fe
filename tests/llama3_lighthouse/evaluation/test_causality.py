"""Knowledge of later tokens, measured on planted models that have it or lack it."""

from types import SimpleNamespace

import pytest
import torch

from lighthouse import LighthouseConfig
from torchtitan.models.llama3_lighthouse.data.tokenizer import ByteTokenizer
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


def planted(reads_on: bool):
    """A model that reads the next token where it stands, or else always predicts token 0."""

    def model(tokens: torch.Tensor) -> torch.Tensor:
        answer = tokens.roll(-1, dims=1) if reads_on else torch.zeros_like(tokens)
        return 20.0 * torch.nn.functional.one_hot(answer, VOCABULARY)

    model.model_args = SimpleNamespace(lighthouse=LighthouseConfig(pooling_factor=4, levels=3))
    return model


@pytest.mark.parametrize("reads_on", [False, True])
def test_planted_models(reads_on: bool) -> None:
    line = ["--validation.seq_len", str(LENGTH), "--validation.local_batch_size", "2"]
    config = LighthouseConfigManager().parse_args(line)
    trained = SimpleNamespace(model=planted(reads_on), tokenizer=ByteTokenizer(), config=config)
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
    with pytest.raises(ValueError, match="pass fewer --batches"):
        losses(trained, batches=10**6, positions_each=0, device="cpu")
