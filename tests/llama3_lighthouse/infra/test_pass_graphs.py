"""CUDA graphs of passes: the same bits as without, whatever changes from pass to pass.

On a CPU a stand-in takes the place of CUDA's graphs. It knows addresses alone, as they do: a replay
reads and writes the tensors of its capture, and sets no attribute.
"""

import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from document_cases import random_layout
from launch import DEBUG, TRAINED, Run, arguments, validation_losses
from small_model import FOUR_LAYERS, N, build
from text_data import write_jsonl
from torch import nn

from torchtitan.models.llama3_lighthouse.data.documents import (
    DOCUMENTS,
    model_options,
    without_idle_masks,
)
from torchtitan.models.llama3_lighthouse.data.staged import build_staged_dataloader
from torchtitan.models.llama3_lighthouse.data.tokenizer import build_tokenizer
from torchtitan.models.llama3_lighthouse.infra.pass_graphs import (
    EAGER_PASSES,
    PassGraphs,
    launch_line,
    why_no_graphs,
)
from torchtitan.models.llama3_lighthouse.job_config import (
    JobConfig,
    Lighthouse,
    LighthouseConfigManager,
)
from torchtitan.models.llama3_lighthouse.stages import stages_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = ("lighthouse", "dense")


class StandInGraph:
    def __init__(self, work: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> None:
        self.work, self.parameters = work, parameters
        self.before = [parameter.grad for parameter in parameters]
        kept = [None if x is None else x.clone() for x in self.before]
        self.loss = work()
        self.after = [parameter.grad for parameter in parameters]
        # A capture runs nothing.
        for gradient, value in zip(self.before, kept, strict=True):
            if gradient is not None:
                gradient.copy_(value)

    def replay(self) -> None:
        there = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, self.before, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            with torch.enable_grad():
                loss = self.work()
            self.loss.copy_(loss)
            for parameter, gradient in zip(self.parameters, self.after, strict=True):
                if parameter.grad is not gradient:
                    gradient.copy_(parameter.grad)
        for parameter, gradient in zip(self.parameters, there, strict=True):
            parameter.grad = gradient

    def reset(self) -> None:
        self.work = None


class StandIn(PassGraphs):
    free = 2**40

    def _with_peak(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
        return work(), 50

    def _free(self) -> int:
        return self.free

    def _captured(self, work: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor, int]:
        graph = StandInGraph(work, self._parameters)
        return graph, graph.loss, 30

    def _on_stream(self) -> Any:
        return nullcontext()

    def _new_stream(self) -> None:
        return None

    def _new_pool(self) -> None:
        return None

    def _wait(self) -> None:
        return None

    def _empty_cache(self) -> None:
        return None


class Trained:
    """A small model that is trained with graphs, or without where ``graphs`` is None."""

    def __init__(self, device: str, with_graphs: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11))
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.device, self.kind, self.passes_run = device, "", 0
        self.graphs = None
        if with_graphs:
            cls = StandIn if device == "cpu" else PassGraphs
            parameters = list(self.model.parameters())
            self.graphs = cls(self.one_pass, parameters, torch.device(device))

    def one_pass(
        self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        self.passes_run += 1
        inputs = {name: x.to(self.device) for name, x in inputs.items()}
        labels = labels.to(self.device)
        hidden = self.model[1](self.model[0](inputs["input"]))
        # As a graph holds the kernels of its capture, a pass with documents has others.
        if DOCUMENTS in inputs:
            hidden = hidden * (1 + inputs[DOCUMENTS][..., None])
        logits = self.model[2](hidden.tanh() if self.kind == "dense" else hidden)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100
        )
        loss = losses / tokens
        loss.backward()
        return loss.detach()

    def step(
        self, kind: str, rows: torch.Tensor, masked: tuple[bool, ...] = ()
    ) -> list[torch.Tensor]:
        """Losses of one step on ``rows`` [microbatches, B, N + 1]; some labels do not count.

        Microbatches have documents where ``masked`` says so.
        """
        self.kind = kind
        self.optimizer.zero_grad()
        labels = rows[..., 1:].masked_fill(rows[..., 1:] < int(rows[0, 0, 0]) // 2, -100)
        tokens = float((labels != -100).sum())
        losses = []
        for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
            inputs = {"input": row[..., :-1]}
            if masked and masked[number]:
                inputs[DOCUMENTS] = row[..., :-1] % 3
            if self.graphs is not None:
                losses.append(self.graphs.run(kind, inputs, label, tokens))
                continue
            divisor = torch.full((), tokens, device=self.device)
            losses.append(self.one_pass(inputs, label, divisor))
        self.optimizer.step()
        return losses


def rows_of(step: int, microbatches: int, length: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 11, (microbatches, 2, length + 1), generator=generator)


def assert_same(one: Trained, other: Trained, steps: list[tuple[Any, ...]]) -> None:
    for step in steps:
        expected, found = one.step(*step), other.step(*step)
        # The losses of a step are kept until its end, while later passes replay.
        assert torch.stack(expected).tolist() == torch.stack(found).tolist()
        for x, y in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_graphs_change_no_bit(device: str, microbatches: int) -> None:
    """Tokens that count differ from step to step; two attentions take turns."""
    plain, graphed = Trained(device, False), Trained(device, True)
    steps = [(KINDS[step % 3 == 0], rows_of(step, microbatches)) for step in range(15)]
    assert_same(plain, graphed, steps)
    assert graphed.graphs.held > 0
    # The stand-in runs the work in each replay.
    if device == "cuda":
        # Each kind launched its kernels EAGER_PASSES times and once more in its capture.
        eager = EAGER_PASSES + 1
        # Further passes wait for the first graph, then are captured at once.
        further = EAGER_PASSES * (microbatches - 1) + (microbatches > 1)
        assert graphed.passes_run == 2 * (eager + further)


@pytest.mark.parametrize("device", DEVICES)
def test_passes_with_and_without_documents_mix_in_a_step(device: str) -> None:
    """A further pass adds to the gradients of whichever kind the step began with."""
    plain, graphed = Trained(device, False), Trained(device, True)
    generator = torch.Generator().manual_seed(3)
    draws = torch.rand(40, 3, generator=generator) < 0.5
    steps = [("dense", rows_of(n, 3), tuple(draws[n].tolist())) for n in range(40)]
    assert_same(plain, graphed, steps)
    kinds = "dense", "masked dense"
    pairs = {(kind, first) for kind in kinds for first in (None, *kinds)}
    assert set(graphed.graphs._graphs) == pairs
    # By now each pass replays, whatever came before it.
    before = dict(graphed.graphs._eager_passes)
    for n, masked in enumerate(itertools.product([False, True], repeat=3)):
        assert_same(plain, graphed, [("dense", rows_of(100 + n, 3), masked)])
    assert graphed.graphs._eager_passes == before
    graphed.graphs.forget()
    assert not graphed.graphs._graphs and graphed.graphs.held == 0
    assert_same(plain, graphed, steps[:12])


def test_a_kind_without_a_graph_begins_steps_of_passes_without_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its gradients lie anywhere, so no graph may add to them."""
    plain, graphed = Trained("cpu", False), Trained("cpu", True)
    for n in range(EAGER_PASSES + 1):
        assert_same(plain, graphed, [("dense", rows_of(n, 3), (False, True, False))])
    graphed.graphs.free = 0
    for n in range(2 * EAGER_PASSES):
        assert_same(plain, graphed, [("dense", rows_of(10 + n, 3), (True, False, True))])
        assert_same(plain, graphed, [("dense", rows_of(30 + n, 3), (False, True, False))])
    kinds = "dense", "masked dense"
    assert set(graphed.graphs._graphs) == {("dense", None), *((kind, "dense") for kind in kinds)}
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "first pass of a step under masked dense attention" in line


@pytest.mark.parametrize("stage", ["lighthouse", "dense"])
def test_documents_are_copied_like_tokens(stage: str) -> None:
    """Each pass has other documents; a graph that kept those of its capture would see others."""
    method = replace(FOUR_LAYERS.lighthouse, combine="finest", window=24)
    generator = torch.Generator().manual_seed(1)
    losses: list[list[float]] = []
    batches = []
    for _ in range(EAGER_PASSES + 2):
        layout = random_layout(1, N, 8 * method.coarsest_span, generator)
        tokens = torch.randint(0, 320, (1, N + 1), generator=generator)
        batches.append(({"input": tokens[:, :-1], DOCUMENTS: layout}, tokens[:, 1:]))
    for with_graphs in (False, True):
        model = build(args=replace(FOUR_LAYERS, lighthouse=method))
        model.use_attention(stage)

        def one_pass(
            inputs: dict[str, torch.Tensor], labels: torch.Tensor, tokens: torch.Tensor, model=model
        ) -> torch.Tensor:
            options = model_options(inputs[DOCUMENTS], Lighthouse(document_positions="restart"))
            logits = model(inputs["input"], **options).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / tokens
            loss.backward()
            return loss.detach()

        graphs = StandIn(one_pass, list(model.parameters()), torch.device("cpu"))
        found = []
        for inputs, labels in batches:
            model.zero_grad()
            if with_graphs:
                loss = graphs.run(stage, inputs, labels, 100.0)
            else:
                loss = one_pass(inputs, labels, torch.tensor(100.0))
            gradients = sum(p.grad.double().sum().item() for p in model.parameters())
            found += [loss.item(), gradients]
        losses.append(found)
        assert bool(graphs._graphs) == with_graphs
    assert losses[0] == losses[1]


@pytest.mark.parametrize("device", DEVICES)
def test_forget_takes_other_shapes(device: str) -> None:
    plain, graphed = Trained(device, False), Trained(device, True)
    for length in (8, 12):
        assert_same(plain, graphed, [("dense", rows_of(step, 2, length)) for step in range(6)])
        graphed.graphs.forget()
        assert graphed.graphs.held == 0
        assert all(parameter.grad is None for parameter in graphed.model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("when", ["first", "further"])
def test_capture_without_memory_goes_on_and_says_so(
    device: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, graphed = Trained(device, False), Trained(device, True)
    capture, captures = graphed.graphs._captured, []

    def captured(work: Callable[[], torch.Tensor]) -> Any:
        captures.append(work)
        if when == "further" and len(captures) == 1:
            return capture(work)
        if device == "cpu":
            raise torch.OutOfMemoryError

        def too_large() -> torch.Tensor:
            loss = work()
            torch.empty(2**50, device="cuda")
            return loss

        return capture(too_large)

    with patch.object(graphed.graphs, "_captured", captured):
        assert_same(plain, graphed, [("dense", rows_of(step, 3)) for step in range(8)])
    assert len(captures) == (1 if when == "first" else 2)
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"{when} pass" in line and "its capture ran out of memory" in line
    # The next stage may be shorter.
    graphed.graphs.forget()
    assert_same(plain, graphed, [("dense", rows_of(step, 1)) for step in range(6)])
    assert graphed.graphs.held > 0


# Bytes of two sets of gradients: a graph's own, and those of a pass without a graph.
SETS = 2 * 4 * sum(parameter.numel() for parameter in Trained("cpu", False).model.parameters())


@pytest.mark.parametrize(("free", "captured"), [(100, 2), (99, 0)])
def test_graph_leaves_room_for_a_pass_beside_it(
    free: int, captured: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation and passes without a graph cannot use the memory that graphs keep."""
    caplog.set_level("INFO")
    plain, graphed = Trained("cpu", False), Trained("cpu", True)
    graphed.graphs.free = free
    assert_same(plain, graphed, [("dense", rows_of(step, 2)) for step in range(8)])
    assert len(graphed.graphs._graphs) == captured
    lines = [line for line in caplog.messages if "first pass of a step under dense" in line]
    assert len(lines) == (not captured)
    # One kind may have a graph where another has none. Two kinds may have two sets of gradients.
    if not captured:
        graphed.graphs.free = SETS + 99
        assert_same(plain, graphed, [("window", rows_of(step, 2)) for step in range(5)])
        assert not graphed.graphs._graphs
        graphed.graphs.free = SETS + 100
        assert_same(plain, graphed, [("lighthouse", rows_of(step, 2)) for step in range(5)])
        assert ("lighthouse", "lighthouse") in graphed.graphs._graphs
    # The graphs of further passes share memory with those of first passes.
    graphed.graphs.forget()
    graphed.graphs.free = 100
    assert_same(plain, graphed, [("dense", rows_of(step, 2)) for step in range(4)])
    graphed.graphs.free = SETS + 70
    assert_same(plain, graphed, [("lighthouse", rows_of(step, 1)) for step in range(5)])
    assert ("lighthouse", None) in graphed.graphs._graphs


def test_other_shapes_are_refused() -> None:
    graphed = Trained("cpu", True)
    for step in range(EAGER_PASSES + 1):
        graphed.step("dense", rows_of(step, 1))
    with pytest.raises(ValueError, match=r"\(2, 8\).*, got .*\(1, 8\)"):
        graphed.step("dense", rows_of(9, 1)[:, :1])


def test_capture_that_fails_names_the_key() -> None:
    graphed = Trained("cpu", True)
    with patch.object(graphed.graphs, "_captured", side_effect=RuntimeError("not permitted")):
        with pytest.raises(RuntimeError, match=r"pass --lighthouse\.no-cuda_graphs"):
            for step in range(EAGER_PASSES + 1):
                graphed.step("dense", rows_of(step, 1))


def config_with(**changes: Any) -> JobConfig:
    config = JobConfig()
    config.compile.enable = True
    for key, value in changes.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize(
    ("changes", "world_size", "reason"),
    [
        ({}, 1, None),
        ({"lighthouse__cuda_graphs": False}, 1, "cuda_graphs = false"),
        ({}, 2, "2 processes"),
        ({"activation_checkpoint__offload_inputs": True}, 1, "offload_inputs"),
        ({"training__enable_cpu_offload": True}, 1, "enable_cpu_offload"),
        ({"compile__enable": False}, 1, "not compiled"),
        ({"compile__components": ["loss"]}, 1, "not compiled"),
        ({"compile__backend": "aot_eager"}, 1, "compile.backend = 'aot_eager'"),
        ({"model__converters": ["quantize.linear.float8"]}, 1, "converters"),
    ],
)
def test_log_says_why_there_are_no_graphs(
    changes: dict[str, Any], world_size: int, reason: str | None
) -> None:
    config = config_with(**changes)
    found, line = why_no_graphs(config, world_size), launch_line(config, world_size)
    if reason is None:
        assert found is None and "each pass as one CUDA graph" in line
    else:
        assert reason in found and line.endswith(found)


def exact(run: Run) -> dict[int, tuple[Any, ...]]:
    keys = ("stage", "batches", "loss", "grad_norm", "tokens_seen")
    return {step: tuple(line[key] for key in keys) for step, line in run.steps().items()}


def whole_run(folder: Path, masks: bool) -> dict[str, Any]:
    """Settings of 50 steps under three stages and two lengths, and the text for them in ``folder``.

    About half of all sequences hold an end of a document, so that passes with documents and passes
    without are both captured in every stage. The standard library has longer documents: of 14 dense
    steps, three began with a pass with documents, which are too few. Without masks, positions skip
    in the first stage.
    """
    generator = np.random.default_rng(5)

    def documents(count: int) -> list[str]:
        lengths = generator.integers(200, 2800, count)
        return ["".join(generator.choice([*"abcdefgh \n"], length)) for length in lengths]

    path = write_jsonl(folder, {"a.jsonl": documents(200), "validation.jsonl": documents(20)})
    return {
        **DEBUG,
        # Its default, which a schedule asks for.
        "lighthouse.dense_from_step": 10000,
        "lighthouse.schedule": [
            "lighthouse until=20 seq_len=512" + ("" if masks else " skip_positions=1024"),
            "lighthouse until=36", "dense",
        ],
        **{"lighthouse.combine": "finest", "lighthouse.window": 64, "lighthouse.passkey_mix": 0.2},
        **{"training.seq_len": 1024, "training.global_batch_size": 3, "training.steps": 50},
        **{"training.dataset": "c4_local", "training.dataset_path": path},
        **{"validation.dataset": "c4_local", "validation.dataset_path": path},
        **{"training.mixed_precision_param": "bfloat16", "debug.deterministic": True},
        **{"compile.enable": True, "checkpoint.interval": 13},
        **{"validation.enable": True, "validation.freq": 10, "validation.steps": 1},
        **{"validation.seq_len": 1024, "activation_checkpoint.mode": "lighthouse"},
        **{"training.document_mask": masks},
    }  # fmt: skip


@pytest.mark.parametrize("masks", [False, True])
def test_each_stage_of_the_whole_run_captures_all_kinds_of_passes(
    tmp_path: Path, masks: bool
) -> None:
    """The run below needs a GPU. Its text decides what it captures, which a CPU can tell."""
    line = arguments({**TRAINED, **whole_run(tmp_path / "text", masks)})
    config = LighthouseConfigManager().parse_args(line)
    loader = build_staged_dataloader(1, 0, build_tokenizer(config), config)
    batches, weight = iter(loader), nn.Parameter(torch.zeros(()))

    def one_pass(inputs: object, labels: object, tokens: torch.Tensor) -> torch.Tensor:
        (weight * tokens).backward()
        return torch.zeros(())

    graphs = StandIn(one_pass, [weight], torch.device("cpu"))
    for stage in stages_of(config):
        graphs.forget()
        loader.use(stage.config)
        for _ in range(stage.first, stage.last + 1):
            weight.grad = None
            for _ in range(config.training.global_batch_size):
                inputs, labels = next(batches)
                graphs.run(stage.attention, without_idle_masks(inputs, None), labels, 1.0)
        kinds = [stage.attention, *[f"masked {stage.attention}"] * masks]
        assert set(graphs._graphs) == {(kind, first) for kind in kinds for first in (None, *kinds)}


@pytest.mark.gpu
@pytest.mark.parametrize("masks", [False, True])
def test_training_with_graphs_equals_training_without(tmp_path: Path, masks: bool) -> None:
    """Labels that do not count, accumulation, validation, checkpoints, and a restart by which the
    graphs are captured anew."""
    settings = whole_run(tmp_path / "text", masks)

    def run(name: str, **more: Any) -> Run:
        (tmp_path / name).mkdir(exist_ok=True)
        return Run(tmp_path / name, {**settings, **more})

    # They compile side by side.
    killed = run("killed")
    with_graphs, without = run("with"), run("without", **{"lighthouse.cuda_graphs": False})
    killed.crash_after_step(30)
    killed = run("killed").succeed()
    assert "launches      each pass as one CUDA graph" in with_graphs.succeed().log
    # Microbatches with documents and those without have graphs of their own.
    lines = re.findall(r"Steps under ([a-z ]+) attention replay a CUDA graph", with_graphs.log)
    kinds = ["lighthouse", "lighthouse", "dense"]
    assert sorted(lines) == sorted(kinds + [f"masked {kind}" for kind in kinds] * masks)
    assert "replay a CUDA graph" not in without.succeed().log
    assert sorted(exact(without)) == list(range(1, 51))
    assert exact(with_graphs) == exact(without) == exact(killed)
    assert validation_losses(with_graphs) == validation_losses(without)


@pytest.mark.gpu
def test_dense_steps_and_records_between_graphs(tmp_path: Path) -> None:
    """24 steps of one length: dense ones in between, selection statistics, and checkpoints that are
    written while the next step replays."""
    settings = {
        **DEBUG,
        **{"lighthouse.stage": "lighthouse", "lighthouse.dense_every": 4},
        **{"lighthouse.log_selection_every": 5, "training.steps": 24, "compile.enable": True},
        **{"training.mixed_precision_param": "bfloat16", "debug.deterministic": True},
        **{"checkpoint.interval": 7, "checkpoint.async_mode": "async"},
    }
    runs = {}
    for name, graphs in {"with": True, "without": False}.items():
        (tmp_path / name).mkdir()
        runs[name] = Run(tmp_path / name, {**settings, "lighthouse.cuda_graphs": graphs})
    for run in runs.values():
        run.succeed()
    # Dense steps are the fourth, the eighth and so on, so the fourth dense step is the sixteenth.
    assert runs["with"].log.count("replay a CUDA graph from here on") == 2
    assert exact(runs["with"]) == exact(runs["without"])
