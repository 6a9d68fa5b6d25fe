"""Throughput and MFU that stay true across stages, log intervals and checkpoint saves."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import (
    BaseLogger,
    LoggerContainer,
    MetricsProcessor,
    _get_metrics_rank,
)
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_module

# The file lies in job.dump_folder. Restarts append to it, so a step that ran twice is there twice.
METRICS_FILE = "metrics.jsonl"
# Names of metrics in that file.
LOSS, HELD_OUT_LOSS = "loss_metrics/global_avg_loss", "validation_metrics/loss"
THROUGHPUT, MEMORY = "throughput(tps)", "memory/max_reserved(GiB)"
SECONDS, TOKENS = "time_metrics/end_to_end(s)", "n_tokens_seen"
# The metric is 1.0 for a step under Lighthouse attention, 0.0 for a dense one.
UNDER_LIGHTHOUSE = "lighthouse/stage"


def whole_loss(loss: torch.Tensor) -> torch.Tensor:
    """``loss`` without its graph, whole even where loss parallelism spreads it over ranks."""
    loss = loss.detach()
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


class JSONLinesLogger(BaseLogger):
    """Appends each log entry to a file at once, one JSON object a line; a crash loses none."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
        self.file = path.open("a", buffering=1)
        if cut_off:
            self.file.write("\n")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        self.file.close()


class LighthouseMetricsProcessor(MetricsProcessor):
    """Upstream's processor with FLOPs per token and seconds averaged over the steps really taken.

    A log interval may hold the switch between stages, and the first one is a single step whatever
    the log frequency. The trainer therefore reports every step.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        super().__init__(job_config, parallel_dims)
        if torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config):
            loggers = LoggerContainer()
            loggers.add_logger(self.logger)
            loggers.add_logger(JSONLinesLogger(Path(job_config.job.dump_folder, METRICS_FILE)))
            self.logger = loggers
        self._flops_per_token_of_steps: list[float] = []

    def start_clock(self) -> None:
        """Start to measure throughput; building and loading came before and do not count."""
        self.time_last_log = time.perf_counter()

    def exclude_from_throughput(self, seconds: float) -> None:
        """Leave ``seconds`` out of the present interval, such as those of saving a checkpoint."""
        self.time_last_log += seconds

    def start_validation(self) -> None:
        """Set the present log interval aside until ``log_validation``."""
        device_module.synchronize()
        now = time.perf_counter()
        self._set_aside = now - self.time_last_log, self.ntokens_since_last_log
        self.time_last_log, self.ntokens_since_last_log = now, 0

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        super().log_validation(loss, step, extra_metrics)
        seconds, self.ntokens_since_last_log = self._set_aside
        self.time_last_log = time.perf_counter() - seconds

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
        # pyrefly: ignore[bad-assignment]  Upstream declares an int but only divides by it.
        self.num_flops_per_token = sum(steps) / len(steps)
        seconds = time.perf_counter() - self.time_last_log
        metrics = {SECONDS: seconds / len(steps), **(extra_metrics or {})}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, metrics)
        self._flops_per_token_of_steps = []


def build_metrics_processor(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: object = None
) -> LighthouseMetricsProcessor:
    """The metrics processor, from the arguments that torchtitan's trainer gives it."""
    return LighthouseMetricsProcessor(job_config, parallel_dims)
