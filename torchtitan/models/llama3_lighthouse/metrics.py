"""Throughput and MFU that stay true across stages, log intervals and checkpoint saves."""

import json
import math
import re
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import (
    BaseLogger,
    DeviceMemoryMonitor,
    DeviceMemStats,
    LoggerContainer,
    MetricsProcessor,
    _get_metrics_rank,
)
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import Color, NoColor, device_module, device_type

from .console import coloured, duration
from .errors import UserFileError

# The file lies in job.dump_folder. Restarts append to it, so a step that ran twice is there twice.
METRICS_FILE = "metrics.jsonl"
# Names of metrics in that file.
LOSS, HELD_OUT_LOSS = "loss_metrics/global_avg_loss", "validation_metrics/loss"
THROUGHPUT, MEMORY = "throughput(tps)", "memory/max_reserved(GiB)"
SECONDS, TOKENS = "time_metrics/end_to_end(s)", "n_tokens_seen"
GRAD_NORM, MFU = "grad_norm", "mfu(%)"
# A line of training on the console, without colours; validation has "held-out" before its loss.
STEP_LINE = re.compile(r"step +([\d,]+) of [\d,]+ +loss +(\S+).* ([\d,]+) tokens/s")
# The metric is 1.0 for a step under Lighthouse attention, 0.0 for a dense one.
UNDER_LIGHTHOUSE = "lighthouse/stage"
# Mean documents in the sequences of a step, all ranks together; only under document masks.
DOCUMENTS_PER_SEQUENCE = "lighthouse/documents"


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
        try:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise UserFileError(
                f"{self.file.name} cannot be written: {error.strerror}; make room or mend the "
                "folder, and the same command goes on from the last checkpoint"
            ) from None

    def close(self) -> None:
        self.file.close()


class KeptMetrics(BaseLogger):
    """Passes metrics on, keeps the last ones for the console, and leaves out those not known."""

    def __init__(self, logger: BaseLogger, unknown: Container[str]) -> None:
        self.logger, self.unknown = logger, unknown
        self.last: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.last = {name: value for name, value in metrics.items() if name not in self.unknown}
        self.logger.log(self.last, step)

    def close(self) -> None:
        self.logger.close()


class MemoryMonitor(DeviceMemoryMonitor):
    """Upstream's monitor, which also counts as active what CUDA graphs hold for their passes.

    Attributes:
        in_graphs: those bytes. The allocator counts them once, when a graph is captured.
    """

    in_graphs = 0

    def get_peak_stats(self) -> DeviceMemStats:
        stats = super().get_peak_stats()
        return stats._replace(
            max_active_gib=stats.max_active_gib + self._to_gib(self.in_graphs),
            max_active_pct=stats.max_active_pct + self._to_pct(self.in_graphs),
        )


class TimeLeft:
    """Estimates the time until the last step from the steps measured so far.

    Args:
        attentions: the attention of each step, from step 1 on.
        flops: FLOPs per token under each attention. They stand for its time until it was measured.
    """

    def __init__(self, attentions: Sequence[str], flops: dict[str, float]) -> None:
        self.flops = flops
        self.seconds: dict[str, float] = {}
        self._begun: set[str] = set()
        self._left = {attention: [0] * (len(attentions) + 1) for attention in flops}
        for attention, left in self._left.items():
            for step in reversed(range(len(attentions))):
                left[step] = left[step + 1] + (attentions[step] == attention)

    def measured(self, attentions: Sequence[str], seconds: float) -> None:
        """Note that steps under ``attentions``, one after another, took ``seconds``."""
        used = set(attentions)
        # The first interval under an attention may hold its compilation.
        if used <= self._begun:
            # The steps of a mixed interval share its time by their FLOPs.
            unit = seconds / sum(self.flops[attention] for attention in attentions)
            self.seconds |= {attention: unit * self.flops[attention] for attention in used}
        self._begun |= used

    def after(self, step: int) -> float | None:
        """Seconds from the end of ``step`` to the run's; None before any step was measured."""
        if not self.seconds:
            return None
        known = next(iter(self.seconds))
        return sum(
            left[step]
            * self.seconds.get(
                attention, self.seconds[known] * self.flops[attention] / self.flops[known]
            )
            for attention, left in self._left.items()
        )


class LighthouseMetricsProcessor(MetricsProcessor):
    """Upstream's processor with FLOPs per token and seconds averaged over the steps really taken.

    A log interval may hold the switch between stages, and the first one is a single step whatever
    the log frequency. The trainer therefore reports every step.

    Attributes:
        time_left: set by the trainer, which knows the stages.
    """

    time_left: TimeLeft | None = None
    device_memory_monitor: MemoryMonitor

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        super().__init__(job_config, parallel_dims)
        self.device_memory_monitor = MemoryMonitor(device_type)
        if torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config):
            loggers = LoggerContainer()
            loggers.add_logger(self.logger)
            loggers.add_logger(JSONLinesLogger(Path(job_config.job.dump_folder, METRICS_FILE)))
            self.logger = loggers
        self.knows_mfu = math.isfinite(self.gpu_peak_flops)
        self.logger = self._kept = KeptMetrics(self.logger, () if self.knows_mfu else (MFU,))
        self.steps = job_config.training.steps
        self.each = " each" if parallel_dims.world_size > 1 else ""
        self.color = (
            Color() if coloured(not job_config.metrics.disable_color_printing) else NoColor()
        )
        self._flops_per_token_of_steps: list[float] = []
        self._attentions: list[str] = []

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
        speed = self._kept.last["validation_metrics/throughput(tps)"]
        logger.info(
            f"{self._step(step)}  held-out {self._loss(loss)}  {speed:9,.0f} tokens/s{self.each}"
        )
        seconds, self.ntokens_since_last_log = self._set_aside
        self.time_last_log = time.perf_counter() - seconds

    def record_step(self, flops_per_token: float, attention: str) -> None:
        """Count one step that ran under ``attention`` at ``flops_per_token``."""
        self._flops_per_token_of_steps.append(flops_per_token)
        self._attentions.append(attention)

    def sum_over(self, mesh: str, value: torch.Tensor) -> float:
        """Sum over the ranks of a mesh.

        Args:
            mesh: "batch" (ranks that read different text), "cp" (ranks that share a sequence),
                "loss" (both), or "pp" (pipeline stages, of which the last has the loss).
        """
        ranks = self.parallel_dims.get_optional_mesh(mesh)
        # A single rank leaves its counts on the host, which then need not wait for the device.
        return dist_utils.dist_sum(value if ranks is None else value.to(device_type), ranks)

    def log_step(
        self,
        step: int,
        loss_share: torch.Tensor,
        tokens: tuple[torch.Tensor, float],
        tokens_seen: int,
        grad_norm: torch.Tensor,
        extra_metrics: dict[str, Any],
    ) -> None:
        """Log a step by what each rank knows of it.

        Args:
            loss_share: the rank's loss, divided by the tokens of all ranks.
            tokens: the step's tokens that count in the loss, on this rank and on all ranks.
            tokens_seen: tokens that this rank has read since the run began.
        """
        local_tokens, global_tokens = tokens
        loss_share = loss_share.new_tensor(self.sum_over("pp", loss_share))
        # The ranks that share this rank's sequences hold the rest of their loss.
        mean_of_text = self.sum_over("cp", loss_share) * global_tokens / local_tokens
        seen = torch.tensor(tokens_seen, dtype=torch.int64, device=device_type)
        self.log(
            step,
            self.sum_over("loss", loss_share),
            dist_utils.dist_max(
                mean_of_text.to(device_type), self.parallel_dims.get_optional_mesh("batch")
            ),
            grad_norm.item(),
            {TOKENS: self.sum_over("batch", seen), **extra_metrics},
        )

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        flops = self._flops_per_token_of_steps
        # pyrefly: ignore[bad-assignment]  Upstream declares an int but only divides by it.
        self.num_flops_per_token = sum(flops) / len(flops)
        seconds = time.perf_counter() - self.time_last_log
        metrics = {SECONDS: seconds / len(flops), **(extra_metrics or {})}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, metrics)
        if self.time_left is not None:
            self.time_left.measured(self._attentions, seconds)
        self._print(step, global_avg_loss, grad_norm)
        self._flops_per_token_of_steps, self._attentions = [], []

    def _print(self, step: int, loss: float, grad_norm: float) -> None:
        """The console's line of a step; speed and memory are each device's."""
        metrics = self._kept.last
        parts = [
            self._step(step),
            self._loss(loss),
            f"grad norm {grad_norm:8.4f}",
            f"{metrics[THROUGHPUT]:9,.0f} tokens/s{self.each}",
        ]
        if self.knows_mfu:
            parts.append(f"MFU {metrics[MFU]:4.1f}%")
        parts.append(f"{metrics[MEMORY]:6.2f} GiB")
        left = self.time_left.after(step) if self.time_left is not None else None
        if left:
            parts.append(f"{duration(left)} left")
        logger.info("  ".join(parts))

    def _step(self, step: int) -> str:
        total = f"{self.steps:,}"
        return f"{self.color.red}step {step:>{len(total)},} of {total}{self.color.reset}"

    def _loss(self, loss: float) -> str:
        return f"{self.color.green}loss {loss:8.5f}{self.color.reset}"


def build_metrics_processor(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: object = None
) -> LighthouseMetricsProcessor:
    """The metrics processor, from the arguments that torchtitan's trainer gives it."""
    return LighthouseMetricsProcessor(job_config, parallel_dims)
