"""The dry run's estimate of memory is near the peaks that were measured."""

import functools
import json
import math
import re
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from pages import DOCS, ROOT, words
from small_model import FOUR_LAYERS, N
from torch import nn
from watched_memory import Watch

from torchtitan.models.llama3_lighthouse.dry_run import estimated_bytes
from torchtitan.models.llama3_lighthouse.job_config import (
    ActivationCheckpoint,
    LighthouseConfigManager,
)
from torchtitan.models.llama3_lighthouse.memory_estimate import (
    NORM_BACKWARD,
    activation_bytes,
    attention_elements,
    feed_forward_elements,
    kept_bytes,
)
from torchtitan.models.llama3_lighthouse.model.linear_cross_entropy import linear_cross_entropy

RECORDS = DOCS / "benchmarks"
# Where a pass is shorter, the gradients that a step of one pass does not hold yet weigh more.
SHORTEST = 98304
# Settings of 270M in the records that were made before it had a window.
BEFORE_WINDOW = (
    "--lighthouse.window 0 --lighthouse.entry_score max --lighthouse.combine sum "
    "--lighthouse.dense_layers 0 1 28 29"
)


class Peak(NamedTuple):
    """A measured peak of reserved memory, in GiB, and the settings of its run."""

    config: str
    attention: str
    mode: str
    seq_len: int
    top_k: int
    line: str
    reserved: float
    gpus: int = 1

    @property
    def estimate(self) -> float:
        return estimate(self)

    @property
    def over_estimate(self) -> float:
        return self.reserved / self.estimate


@functools.cache
def estimate(peak: Peak) -> float:
    """What the dry run says of a peak's settings, in GiB."""
    mode, _, products = peak.mode.partition(":")
    line = (
        f"--job.config_file {ROOT}/train_configs/{peak.config} --model.hf_assets_path {ROOT} "
        f"--training.seq_len {peak.seq_len} --lighthouse.top_k {peak.top_k} "
        f"--training.global_batch_size 1 --activation_checkpoint.mode {mode} "
        f"--activation_checkpoint.keep_products {products.replace(',', ' ')} {peak.line} "
        f"--parallelism.context_parallel_degree {peak.gpus}"
    )
    config = LighthouseConfigManager().parse_args(line.split())
    return estimated_bytes(config, peak.gpus)[peak.attention] / 2**30


def recorded(file: str, line: str = "") -> list[Peak]:
    """Peaks of a record in docs/benchmarks in mode "lighthouse".

    Args:
        line: settings of its runs beside those that the record names.
    """
    runs = json.loads((RECORDS / file).read_text())
    return [
        Peak(run["config"], record["stage"], record["mode"], record["N"], record["k"],
             " ".join([line if "270m" in run["config"] else "", *run.get("trainer arguments", []),
                       "--lighthouse.levels 4" if record["N"] == 524288 else ""]),
             record["reserved GiB"])
        for run in (runs if isinstance(runs, list) else [runs])
        for record in run["records"]
        if record["mode"].startswith("lighthouse") and record["N"] >= SHORTEST
    ]  # fmt: skip


def of_several_gpus() -> list[Peak]:
    """Peaks with the present ring in the record of context parallelism."""
    record = json.loads((RECORDS / "context_parallel.json").read_text())
    return [
        Peak("270m_98k.toml", row["stage"].lower(), "lighthouse:wo", row["N"], row["N"] // 64,
             BEFORE_WINDOW, row["GiB"], row["GPUs"])
        for row in (*record["training"], *record["short"])
    ]  # fmt: skip


def on_two_h200(revision: str, part: str, stage: str) -> Peak:
    """A peak of 270M over 196,608 tokens; ``part`` is "training" on both GPUs, or "alone"."""
    record = json.loads((RECORDS / f"history/context_parallel_{revision}.json").read_text())
    (row,) = (row for row in record[part] if row["stage"] == stage)
    attention, _, window = stage.lower().partition(", window ")
    line = f"--lighthouse.window {window or 0}"
    settings = attention, "lighthouse:wo", row["N"], row["N"] // 64, line
    return Peak("270m_98k.toml", *settings, row["GiB"], row["GPUs"])


# The record before has the one row that the last one lacks. It has no window, and so the same code.
WINDOW, WITHOUT, LAST = "Lighthouse, window 256", "Lighthouse", "4e40864"
PEAKS = {
    "`270M`, 196,608 tokens, window of 256": on_two_h200(LAST, "alone", WINDOW),
    "the same on two GPUs": on_two_h200(LAST, "training", WINDOW),
    "`270M`, 196,608 tokens, no window": on_two_h200("ecd02e5", "alone", WITHOUT),
    "no window, two GPUs": on_two_h200(LAST, "training", WITHOUT),
    "`270M`, 196,608 tokens, dense": on_two_h200(LAST, "alone", "dense"),
}
OTHERS = [
    *recorded("training_98k.json"),
    *recorded("history/training_98k_by_flash.json"),
    *recorded("history/training_98k_without_window.json", BEFORE_WINDOW),
    *recorded("training.json", BEFORE_WINDOW),
    *recorded("training_530m.json"),
    *recorded("training_offload.json", BEFORE_WINDOW),
    *recorded("training_variants.json"),
    *of_several_gpus(),
]


@pytest.mark.parametrize("peak", [*PEAKS.values(), *OTHERS], ids=str)
def test_measured_is_near_the_estimate(peak: Peak) -> None:
    text = (ROOT / "README.md").read_text()
    ((less, more),) = re.findall(
        r"measured\s+on\s+GPUs\s+are\s+between\s+(\d+)%\s+below\s+them\s+and\s+(\d+)%\s+above",
        text,
    )
    assert -int(less) <= 100 * (peak.over_estimate - 1) <= int(more)


def test_bounds_are_no_wider_than_what_was_measured() -> None:
    text = (DOCS / "claims.md").read_text()
    ((less, more, count),) = re.findall(
        r"is from (\d+)% less to (\d+)% more than the estimates: (\d+) peaks", text
    )
    ratios = [peak.over_estimate for peak in (*PEAKS.values(), *OTHERS)]
    assert math.ceil(100 * (1 - min(ratios))) == int(less) and len(ratios) == int(count)
    assert math.ceil(100 * (max(ratios) - 1)) == int(more)


@pytest.mark.parametrize("name", PEAKS)
def test_the_guide_has_the_estimate_beside_the_peak(name: str) -> None:
    row = f"| {name} | {PEAKS[name].estimate:.1f} | {PEAKS[name].reserved:.1f} |\n"
    assert row in (DOCS / "guides/memory.md").read_text(), row


def test_the_guide_has_the_memory_of_keys_at_a_stride() -> None:
    """The record has peaks of three stages at two steps, so it is none of those above."""
    log = (RECORDS / "keys_at_a_stride.log").read_text()
    page = words(DOCS / "guides/training.md")
    estimates = re.findall(r"; ([\d.]+) GiB a rank, estimated", log)
    assert len(estimates) == 3 and estimates[0] == estimates[1]
    assert "estimated at {} GiB and dense steps at {}.".format(*estimates[1:]) in page
    first, later = (float(*re.findall(rf"step {step} of 20 .* ([\d.]+) GiB", log))
                    for step in (10, 20))  # fmt: skip
    assert f"the peak was {first:.1f} GiB. Later it was {later:.1f}," in page
    strided, dense = map(float, estimates[1:])
    off = min(1 - later / strided, later / dense - 1)
    assert f"off by {100 * off:.0f}% or more" in page


class PeakOfWatch(Watch):
    """Also remembers the most bytes that were alive after an operation."""

    peak = 0

    def __torch_dispatch__(self, *arguments: Any, **options: Any) -> Any:
        result = super().__torch_dispatch__(*arguments, **options)
        self.peak = max(self.peak, self.living_bytes())
        return result


def test_final_norm_holds_what_the_estimate_counts() -> None:
    """Measured over the last layer's output, the norm and the loss, forward and backward."""
    tokens, dim = 1024, 256
    norm, weight = nn.RMSNorm(dim), torch.randn(32, dim, requires_grad=True)
    last = torch.randn(1, tokens, dim).bfloat16().requires_grad_()
    with PeakOfWatch() as watch:
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(norm(last * 1), weight, torch.zeros(1, tokens).long())
        loss.backward()
    assert watch.peak == pytest.approx(NORM_BACKWARD * tokens * dim * 2, rel=0.05)


def test_working_sets_are_those_of_the_compiled_graphs() -> None:
    """Elements per token, counted by hand."""
    args, bare = FOUR_LAYERS, ActivationCheckpoint(mode="lighthouse", keep_products=[])
    kept = replace(bare, keep_products=["wo", "w1", "w3"])
    dim, hidden, q, kv = args.dim, args.ffn_width, args.attention_width, 32
    assert feed_forward_elements(args, bare) == 3 * dim + 6 * hidden
    assert feed_forward_elements(args, bare) - feed_forward_elements(args, kept) == dim + 2 * hidden
    # The normed input, wo's product, three sums, one gradient of out, rows and their gradients, and
    # one gradient in float32.
    dense = 5 * dim + q + 2 * (q + 2 * kv) + 2 * q
    found = [attention_elements(args, bare, None, "dense", ranks) for ranks in (1, 2, 4)]
    assert found[0] == dense
    assert found[1] == dense + 4 * kv and found[2] == found[1] + q + 4 * kv
    window = [attention_elements(args, bare, None, "window", ranks) for ranks in (1, 2)]
    assert window == [dense, dense]


def test_estimate_is_at_least_what_is_kept_and_grows_with_ranks() -> None:
    """In every mode of activation checkpointing."""
    section = ActivationCheckpoint(mode="lighthouse", keep_products=[])
    for mode in ("lighthouse", "full", "selective", "none"):
        section.mode = mode
        for attention in ("lighthouse", "dense"):
            kept = kept_bytes(FOUR_LAYERS, N, N, section, attention)
            alone, shared = (
                activation_bytes(FOUR_LAYERS, N, N, section, attention, ranks) for ranks in (1, 4)
            )
            assert kept == sorted(kept) and max(kept) < alone <= shared
