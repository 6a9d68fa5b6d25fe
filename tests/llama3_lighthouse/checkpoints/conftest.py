"""A checkpoint manager around a few weights, in one process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer

from torchtitan.models.llama3_lighthouse.checkpoints.manager import LighthouseCheckpointManager
from torchtitan.models.llama3_lighthouse.job_config import JobConfig


class Position:
    """Stands in for a data loader: a position in two streams."""

    stream_count = 2

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"stream_0": self.at, "stream_1": self.at, "identity": "text"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["stream_0"]


class Progress:
    """Stands in for a trainer: the count of its steps."""

    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": 8 * self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Weights(nn.Module):
    """A model of three weights; one is large enough to be most of its file."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.large, self.small, self.norm = (
            nn.Parameter(torch.randn(size, generator=generator)) for size in ((64, 512), (4, 4), 8)
        )


class SmallRun:
    """Trains a few weights by one rule, and saves and loads it through our manager.

    Attributes:
        manager: the checkpoint manager.
        model: its weights, after ``progress.step`` steps.
    """

    def __init__(self, folder: Path, **checkpoint: Any) -> None:
        config = JobConfig()
        config.job.dump_folder = str(folder)
        config.checkpoint.enable = True
        for key, value in checkpoint.items():
            setattr(config.checkpoint, key, value)
        folder.mkdir(exist_ok=True)
        self.model = Weights()
        self.optimizers = OptimizersContainer([self.model], torch.optim.AdamW, {"lr": 1e-3})
        schedulers = build_lr_schedulers(self.optimizers, config.lr_scheduler, 100)
        self.position, self.progress = Position(), Progress()
        self.manager = LighthouseCheckpointManager(
            self.position,  # pyrefly: ignore[bad-argument-type]
            [self.model],
            self.optimizers,
            schedulers,
            {"train_state": self.progress},
            config.checkpoint,
            None,
            str(folder),
        )
        self.manager.config = config.to_dict()
        self.schedulers = schedulers

    def train(self, steps: int) -> None:
        """Take steps, and save when the interval says so."""
        for _ in range(steps):
            self.progress.step += 1
            generator = torch.Generator().manual_seed(self.progress.step)
            for parameter in self.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.optimizers.step()
            self.schedulers.step()
            self.position.at += 1
            self.manager.save(self.progress.step)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of weights and optimizer state."""
        return {name: x.detach().clone() for name, x in self.manager._tensors()}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path, one_rank: None) -> Iterator[Callable[..., SmallRun]]:
    """Starts runs in one dump folder, which saves every second step; each goes on from the last."""
    runs = []

    def start(load: int | None = -1, **checkpoint: Any) -> SmallRun:
        new = SmallRun(tmp_path / "dump", **{"interval": 2, **checkpoint})
        runs.append(new)
        if load is not None:
            new.manager.load(load)
        return new

    yield start
    for each in runs:
        each.manager.close()
