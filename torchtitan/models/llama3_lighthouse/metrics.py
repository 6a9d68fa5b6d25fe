"""Throughput and MFU that stay true across stages, log intervals and checkpoint saves."""

import time
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims


def whole_loss(loss: torch.Tensor) -> torch.Tensor:
    """``loss`` without its graph, summed over the ranks that loss parallelism spreads it over."""
    loss = loss.detach()
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


class LighthouseMetricsProcessor(MetricsProcessor):
    """Upstream's processor, told step by step what ran since the last log line.

    A log interval may hold the switch between stages, and the first one is a single step whatever
    the log frequency, so FLOPs per token and seconds per step are averaged over the steps that
    were really taken.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        super().__init__(job_config, parallel_dims)
        self._flops_per_token_of_steps: list[float] = []

    def start_clock(self) -> None:
        """Leave out of the throughput what came before training: building and loading."""
        self.time_last_log = time.perf_counter()

    def exclude_from_throughput(self, seconds: float) -> None:
        """Leave ``seconds`` out of the interval under way; saving a checkpoint is not training."""
        self.time_last_log += seconds

    def record_step(self, flops_per_token: float) -> None:
        """Count one step that ran at ``flops_per_token``."""
        self._flops_per_token_of_steps.append(flops_per_token)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        steps = self._flops_per_token_of_steps
        self.num_flops_per_token = sum(steps) / len(steps)
        seconds = time.perf_counter() - self.time_last_log
        metrics = {"time_metrics/end_to_end(s)": seconds / len(steps), **(extra_metrics or {})}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, metrics)
        self._flops_per_token_of_steps = []


def build_metrics_processor(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args=None
) -> LighthouseMetricsProcessor:
    return LighthouseMetricsProcessor(job_config, parallel_dims)
