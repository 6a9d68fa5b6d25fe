"""Ratios of estimated times are near those that were measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lighthouse import LighthouseConfig
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import (
    LighthouseModelArgs,
    LighthouseTransformer,
)
from torchtitan.models.llama3_lighthouse.time_estimate import step_seconds

RECORDS = Path(__file__).parents[2] / "docs/benchmarks"
CONFIGS = {"270M": "270m_98k.toml", "530M": "paper_530m_98k.toml"}
# Steps of fewer tokens wait for the host in these records.
FEWEST_TOKENS = 32768


class Step(NamedTuple):
    """A step that took ``seconds``."""

    flavor: str
    attention: str
    seq_len: int
    seconds: float
    top_k: int = 128
    window: int = 256
    levels: int = 3
    dense_layers: tuple[int, ...] = ()
    sequences: int = 1

    @property
    def args(self) -> LighthouseModelArgs:
        method = LighthouseConfig(self.levels, 4, self.top_k, combine="finest", window=self.window)
        return replace(
            flavors[self.flavor], lighthouse=method, window=0, dense_layers=list(self.dense_layers)
        )

    @property
    def over_measured(self) -> float:
        tokens = self.seq_len * self.sequences
        return step_seconds(self.args, self.seq_len, tokens, self.attention) / self.seconds


def recorded(file: str, flavor: str, mode: str, line: str = "", **settings: Any) -> list[Step]:
    """The steps of a record in docs/benchmarks that had ``line`` of arguments."""
    runs = json.loads((RECORDS / file).read_text())
    found = [
        (record, Step(flavor, record["stage"], record["N"], record["s a step"], record["k"],
                      **settings))
        for run in (runs if isinstance(runs, list) else [runs])
        if (run["config"], run["trainer arguments"]) == (CONFIGS[flavor], line.split())
        for record in run["records"]
        if record["mode"] == mode and record["N"] >= FEWEST_TOKENS
    ]  # fmt: skip
    for record, step in found:
        with torch.device("meta"):
            model = LighthouseTransformer(step.args)
        _, flops = step.args.get_nparams_and_flops(model, step.seq_len, step.attention)
        # The settings are those of the record.
        assert flops == pytest.approx(record["FLOPs a token"], rel=1e-3)
    assert found
    return [step for _, step in found]


def with_graphs() -> list[Step]:
    """The steps of training_graphs.json, in which no step waits for the host."""
    found = []
    for run in json.loads((RECORDS / "training_graphs.json").read_text()):
        settings = dict(zip(*[iter(run["trainer arguments"])] * 2, strict=True))
        flavor = settings.get("--model.flavor", "270M")
        sequences = int(settings.get("--training.local_batch_size", 1))
        found += [
            Step(flavor, record["stage"], record["N"], record["s a step"], record["k"],
                 sequences=sequences)
            for record in run["records"]
        ]  # fmt: skip
    return found


FOUR = (0, 1, 28, 29)


@pytest.mark.parametrize(
    ("records", "ratio"),
    [
        # On H200s with FlashAttention 4, without checkpointing and without waiting for the host.
        (lambda: [
            *with_graphs(),
            # Printed figures in docs/benchmarks/training_graphs.log, under a and b.
            Step("270M", "lighthouse", 32768, 32768 / 209028, top_k=512),
            Step("270M", "dense", 32768, 32768 / 61452),
            Step("270M", "lighthouse", 32768, 3 * 32768 / 218730, top_k=512, sequences=3),
            Step("270M", "dense", 32768, 3 * 32768 / 63250, sequences=3),
            Step("17M", "dense", 32768, 32768 / 506779),
            *recorded("training_variants.json", "270M", "none"),
        ], 1.12),
        (lambda: [
            *recorded("training_98k.json", "270M", "lighthouse:w1,w3"),
            *recorded("training_variants.json", "270M", "lighthouse:w1,w3"),
            *recorded("training_variants.json", "270M", "lighthouse:w1,w3",
                      "--lighthouse.dense_layers 10 19", dense_layers=(10, 19)),
        ], 1.15),
        (lambda: recorded("training_98k.json", "270M", "lighthouse:wq,wk,wv,wo,w1,w3"), 1.15),
        # On one H100, without a window.
        (lambda: recorded("training.json", "270M", "lighthouse:wo,w1,w3", window=0,
                          dense_layers=FOUR), 1.15),
        (lambda: [
            *recorded("training_98k.json", "530M", "lighthouse:wo", window=0, dense_layers=FOUR),
            *recorded("training_530m.json", "530M", "lighthouse", window=0, levels=4,
                      dense_layers=FOUR),
        ], 1.15),
    ],
    ids=["H200", "H200, recomputing", "H200, recomputing less", "H100", "H100, 530M"],
)  # fmt: skip
def test_ratios_of_times_are_near_those_measured(
    records: Callable[[], list[Step]], ratio: float
) -> None:
    errors = [step.over_measured for step in records()]
    assert len(errors) > 2 and max(errors) / min(errors) < ratio


def test_each_attention_takes_its_part() -> None:
    window = Step("270M", "lighthouse", 32768, 1.0, top_k=512)
    dense = window._replace(attention="dense")
    mixed = window._replace(dense_layers=tuple(range(15)))
    # A step of half dense layers lies in the middle.
    assert mixed.over_measured == pytest.approx((window.over_measured + dense.over_measured) / 2)
    # A window that stands alone spares what the selection costs, and one of all tokens is dense.
    args = window.args
    alone = [step_seconds(replace(args, window=w), 32768, 32768, "lighthouse")
             for w in (256, 32768)]  # fmt: skip
    without = window._replace(window=0).over_measured
    assert alone[0] < window.over_measured and without < window.over_measured
    assert alone[1] == pytest.approx(dense.over_measured)
