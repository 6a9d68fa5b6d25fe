"""Held-out loss, on the same tokens every time."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torchtitan.components.loss import IGNORE_INDEX, LossFunction
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from .console import duration
from .data.documents import DOCUMENTS, model_options, without_idle_masks
from .data.packing import build_validation_dataloader
from .errors import UserValueError
from .infra.context_parallel import held_batch
from .infra.pipeline import loss_over_microbatches
from .job_config import JobConfig
from .metrics import LighthouseMetricsProcessor, whole_loss

# A validation that takes longer says how far it is.
SECONDS_BETWEEN_LINES = 10.0


class LighthouseValidator(BaseValidator):
    """Mean loss per token of the first ``validation.steps`` batches of the held-out split.

    Every validation starts at the beginning of the text, and all ranks stop together. Upstream's
    validator goes on where it last stopped, so two validations see different text. It also
    hangs when one rank runs out of text before another.
    """

    job_config: JobConfig

    def __init__(
        self,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        parallel_dims: ParallelDims,
        loss_fn: LossFunction,
        validation_context: Callable[[], AbstractContextManager[None]],
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: LighthouseMetricsProcessor,
        pp_schedule: _PipelineSchedule | None = None,
        pp_has_first_stage: bool | None = None,
        pp_has_last_stage: bool | None = None,
    ) -> None:
        super().__init__(job_config)
        self._build_dataloader = lambda: build_validation_dataloader(
            dp_world_size, dp_rank, tokenizer, job_config
        )
        # Build a loader now for its checks: bad text must not stop a run hours after its start.
        self._build_dataloader()
        self.batch_mesh = parallel_dims.get_optional_mesh("batch")
        self.context_parallel_mesh = parallel_dims.get_optional_mesh("cp")
        self.loss_mesh = parallel_dims.get_optional_mesh("loss")
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.pipeline_mesh = parallel_dims.get_optional_mesh("pp")
        self.pipeline = pp_schedule, pp_has_first_stage, pp_has_last_stage

    def _batches(
        self,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
        """Yield inputs and labels, [B, N] each, and what else the model takes.

        It ends at the limit, or when a rank has no more.
        """
        batches = iter(self._build_dataloader())
        limit = self.job_config.validation.steps
        of_all = f" of {limit:,}" if limit > 0 else ""
        steps, begun = 0, time.monotonic()
        told = begun
        while steps != limit:
            batch = next(batches, None)
            missing = torch.tensor(float(batch is None), device=device_type)
            if dist_utils.dist_max(missing, self.batch_mesh) > 0:
                return
            assert batch is not None
            found = without_idle_masks(batch[0], self.batch_mesh)
            inputs = {name: x.to(device_type) for name, x in found.items()}
            options = model_options(inputs.get(DOCUMENTS), self.job_config.lighthouse)
            yield inputs["input"], batch[1].to(device_type), options
            steps += 1
            now = time.monotonic()
            if now - told >= SECONDS_BETWEEN_LINES:
                told = now
                logger.info(f"Validation: {steps:,}{of_all} batches in {duration(now - begun)}")

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the held-out loss under the attention of the present stage.

        Raises:
            ValueError: the held-out split is shorter than one batch on some rank.
        """
        self.metrics_processor.start_validation()
        for model in model_parts:
            model.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=device_type)
        tokens = torch.zeros((), dtype=torch.float64, device=device_type)
        for inputs, labels, options in self._batches():
            self.metrics_processor.ntokens_since_last_log += labels.numel()
            if self.context_parallel_mesh is not None:
                batch, mesh = (inputs, labels, options), self.context_parallel_mesh
                inputs, labels, options = held_batch(*batch, mesh, self.job_config.parallelism)
            loss_sum += self._loss_sum(model_parts, inputs, labels, options)
            tokens += (labels != IGNORE_INDEX).sum()
        for model in model_parts:
            model.train()

        total_tokens = dist_utils.dist_sum(tokens, self.loss_mesh)
        if total_tokens == 0:
            raise UserValueError(
                f"validation.dataset = '{self.job_config.validation.dataset}' holds less than one "
                f"batch of validation.seq_len = {self.job_config.validation.seq_len} tokens on "
                "some rank; give it more text or lower validation.seq_len"
            )
        loss_sum.fill_(dist_utils.dist_sum(loss_sum, self.pipeline_mesh))
        loss = dist_utils.dist_sum(loss_sum, self.loss_mesh) / total_tokens
        self.metrics_processor.log_validation(loss=loss, step=step)

    def _loss_sum(
        self,
        model_parts: list[nn.Module],
        inputs: torch.Tensor,
        labels: torch.Tensor,
        options: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Loss summed over this rank's tokens; zero on ranks without the last pipeline stage."""
        schedule, is_first, is_last = self.pipeline
        with self.validation_context():
            if schedule is not None:
                loss = loss_over_microbatches(
                    schedule, inputs, labels, bool(is_first), bool(is_last), options
                )
            else:
                (model,) = model_parts
                with self.maybe_enable_amp:
                    loss = self.loss_fn(model(inputs, **options), labels)
        return whole_loss(loss).double()


def build_validator(**arguments: Any) -> LighthouseValidator:
    """The validator, from the arguments that torchtitan's trainer gives it."""
    return LighthouseValidator(**arguments)
