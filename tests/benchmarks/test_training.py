"""The training benchmark: its cases, its search for the longest length, and one run on a CPU."""

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training
import training_case
import training_results

# It puts a stand-in for CPUs in the place of the device that torchtitan looks for.
import torchtitan.models.llama3_lighthouse  # noqa: F401

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmarks" / "training.py"
CONFIG = str(ROOT / "train_configs" / "270m_98k.toml")


def test_arguments_without_a_section_are_refused(capsys) -> None:
    """An argument for the trainer names a section of its configuration."""
    with pytest.raises(SystemExit):
        training.parse([CONFIG, "--stages", "dense"])
    assert "--stages" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["lighthouse+onload", "all", "none:wo"])
def test_unknown_modes_are_refused(mode: str, capsys) -> None:
    with pytest.raises(SystemExit):
        training.parse([CONFIG, "--modes", mode])
    assert mode in capsys.readouterr().err


def test_cases_become_configurations(tmp_path: Path) -> None:
    """The trainer parses what the case says; other arguments reach it too."""
    from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager

    options = training.parse(
        [CONFIG, "--attention", "dense", "upstream", "--modes", "lighthouse:wo,w1", "full"]
        + ["--lengths", "32768,512", "--steps", "4", "--warm-up", "2", "--compile.no-enable"]
    )
    cases = training.cases_of(options)
    assert [(case["stage"], case["mode"]) for case in cases] == [
        ("dense", "lighthouse:wo,w1"), ("dense", "full"), ("upstream", "full"),
    ]  # fmt: skip
    line = training.case_arguments(options, cases[0], str(tmp_path))
    config = LighthouseConfigManager().parse_args(line)
    assert config.lighthouse.stage == "dense" and config.lighthouse.top_k == 512
    assert config.training.seq_len == 32768 and config.training.steps == 6
    assert config.activation_checkpoint.mode == "lighthouse"
    assert config.activation_checkpoint.keep_products == ["wo", "w1"]
    assert not config.compile.enable and not config.checkpoint.enable


class Upstream:
    """Stands in for a trainer: two microbatches a step, whose losses are known in advance."""

    def __init__(self, steps: int) -> None:
        self.step = 0
        self.job_config = SimpleNamespace(training=SimpleNamespace(steps=steps))
        self.metrics_processor = SimpleNamespace(should_log=lambda step: True)
        self.loss = torch.zeros(())

    def forward_backward_step(self, **arguments: int) -> torch.Tensor:
        # The trainer computes every loss in the same place, as a CUDA graph does.
        return self.loss.fill_(self.step + arguments["part"] / 4)

    def train_step(self, data_iterator: object) -> None:
        assert not self.metrics_processor.should_log(self.step)
        for part in (0, 1):
            self.forward_backward_step(part=part)

    def train(self) -> None:
        while self.step < self.job_config.training.steps:
            self.step += 1
            self.train_step(None)


class Ours(Upstream):
    """Replays its passes from the second step on, as our trainer does."""

    def _forward_backward(self, part: int) -> torch.Tensor:
        if self.step == 1:
            return self.forward_backward_step(part=part)
        return self.loss.fill_(self.step + part / 4)

    def train_step(self, data_iterator: object) -> None:
        for part in (0, 1):
            self._forward_backward(part)


class Event:
    """Stands in for a CUDA event; its time is known once the GPU has come to its end."""

    seconds, ready = iter(()), False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = next(self.seconds)

    def elapsed_time(self, end: "Event") -> float:
        assert self.ready
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize("base", [Upstream, Ours])
@pytest.mark.parametrize("gpu", [True, False])
def test_no_step_waits_for_its_own_end(base: type, gpu: bool, monkeypatch) -> None:
    """Ends of steps are marks on the GPU, and all is read after the last one."""
    from torchtitan.tools import utils

    waits = []

    def synchronize() -> None:
        waits.append(trainer.step)
        Event.ready = True

    ends = [10.0, 10.5, 11.5, 13.5]
    monkeypatch.setattr(Event, "seconds", iter(ends))
    monkeypatch.setattr(Event, "ready", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(training_case.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(utils.device_module, "synchronize", synchronize)
    clock = iter(ends)
    measured = training_case.Measured()
    trainer = training_case.timed_trainer(base, measured, profile=0)(4)
    trainer.train()
    assert not waits
    result = measured.read(warm_up=2)
    assert waits == [4]
    assert result["seconds"] == pytest.approx([1.0, 2.0])
    assert result["losses"] == [2.25, 4.25, 6.25, 8.25]


def test_profile_is_of_one_step_alone(monkeypatch) -> None:
    """It is not timed; the steps before it have come to their end, and so has it."""
    from torchtitan.tools import utils

    waits = []
    monkeypatch.setattr(utils.device_module, "synchronize", lambda: waits.append(trainer.step))
    measured = training_case.Measured()
    trainer = training_case.timed_trainer(Upstream, measured, profile=1)(3)
    trainer.train()
    assert waits == [3, 3] and measured.profile is not None
    assert len(measured.ends) == 2 and len(measured.losses) == 3


def test_the_first_of_several_profiled_steps_does_not_count(monkeypatch) -> None:
    from torchtitan.tools import utils

    waits, named = [], []
    monkeypatch.setattr(utils.device_module, "synchronize", lambda: waits.append(trainer.step))

    def name(of: str) -> AbstractContextManager:
        named.append((of, trainer.step))
        return nullcontext()

    monkeypatch.setattr(torch.profiler, "record_function", name)
    monkeypatch.setattr(training_case, "kernels_of", lambda recorded, steps: {"steps": steps})
    measured = training_case.Measured()
    trainer = training_case.timed_trainer(Upstream, measured, profile=3)(6)
    trainer.train()
    assert waits == [4, 6] and measured.profile == {"steps": 2}
    assert named == [(training_case.COUNTED, step) for step in (5, 6)]
    assert len(measured.ends) == 3 and len(measured.losses) == 6


@pytest.mark.parametrize("limit", [100_000, 98_304, 700_000, 16_384])
def test_longest_is_found(limit: int, monkeypatch) -> None:
    """The search ends within an eighth; all lengths have a whole number of strata."""

    def measure(options, case):
        assert case["N"] / case["k"] == 64 and case["k"] % 128 == 0
        if case["N"] > limit:
            return case | {"failure": training.OUT_OF_MEMORY}
        return case | {"seconds": [1.0], "tokens a step": case["N"], "FLOPs a token": 1,
                       "peak FLOP/s": 1, "reserved GiB": 1.0}  # fmt: skip

    monkeypatch.setattr(training, "measure", measure)
    options = training.parse([CONFIG, "--find-longest"])
    (case, _) = training.cases_of(options)[:2]
    records = training.find_longest(options, case)
    longest = max((r["N"] for r in records if "failure" not in r), default=0)
    too_long = min(r["N"] for r in records if "failure" in r)
    assert longest <= limit < too_long
    assert too_long - longest <= max(8192, longest // 8)


def test_table_compares_best_modes() -> None:
    records = [
        {"stage": stage, "mode": mode, "N": n, "k": n // 64, "S": n, "tokens/s": speed,
         "s a step": 1.0, "spread": 0.1, "MFU": 0.4, "reserved GiB": 2.0}
        for stage, mode, n, speed in [
            ("lighthouse", "full", 8192, 10.0), ("dense", "full", 8192, 20.0),
            ("lighthouse", "full", 16384, 40.0), ("dense", "full", 16384, 10.0),
            ("dense", "none", 16384, 16.0),
        ]
    ]  # fmt: skip
    records.append({"stage": "lighthouse", "mode": "none", "N": 16384, "k": 256,
                    "failure": "out of memory"})  # fmt: skip
    run = {"config": "x.toml", "trainer arguments": [], "device": "GPU", "torch": "2",
           "triton": "3", "revision": "r", "date": "d", "steps": 1, "warm-up": 1,
           "records": records}  # fmt: skip
    text = training_results.table(run)
    assert "| lighthouse | full | 16,384, 256 | 16,384 | 40 |" in text
    assert "| 2.50x |" in text and "| out of memory |" in text
    assert "Lighthouse is faster from 16,384 tokens on, dense attention at 8,192." in text


def test_refuses_to_run_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), CONFIG, "--output", str(tmp_path / "out")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == (
        "training.py needs a CUDA device and found none; --on-cpu tries it out without one\n"
    )


@pytest.mark.slow
def test_measures_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(ROOT / "train_configs/debug_cpu.toml")]
    command += [
        "--on-cpu",
        "--attention",
        "lighthouse",
        "upstream",
        "--modes",
        "selective",
        "--steps",
        "2",
    ]
    command += ["--warm-up", "1", "--lengths", "512,64", "--lighthouse.picks_per_stratum", "16"]
    command += ["--lighthouse.pooling_factor", "2", "--output", str(tmp_path), "--revision", "r1"]
    subprocess.run(command, check=True, cwd=tmp_path)
    run = json.loads((tmp_path / "training.json").read_text())
    lighthouse, upstream = run["records"]
    assert lighthouse["S"] == 384 and upstream["S"] == 512
    assert all(record["tokens/s"] > 0 and record["reserved GiB"] > 0 for record in run["records"])
    # The same text and the same initial model: they differ in nothing but attention.
    assert lighthouse["losses"][0] == pytest.approx(upstream["losses"][0], abs=0.1)
    assert lighthouse["losses"] != upstream["losses"]
    assert "revision r1" in (tmp_path / "training.md").read_text()
    assert (tmp_path / "training.png").stat().st_size > 0
