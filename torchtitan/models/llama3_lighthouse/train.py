"""Training in stages: ``torchrun -m torchtitan.models.llama3_lighthouse.train``."""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import NoReturn, cast
from unittest.mock import patch

import torch
import torchtitan.train as upstream
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module, device_type

# This import registers the model with torchtitan.
from . import train_spec  # noqa: F401
from .checkpoints.manager import LighthouseCheckpointManager
from .checkpoints.model_folder import files_to_keep, model_arguments_of
from .checks.configuration import check_launch
from .checks.parallelism import check_device
from .checks.text import check_vocabulary
from .checks.unread import warnings_of
from .console import log_to_file, set_up_console
from .data.documents import DOCUMENTS, model_options, without_idle_masks
from .data.skipped_positions import POSITIONS
from .data.staged import StagedDataloader
from .description import describe, ending, output_line, what_runs
from .document_statistics import Batch, DocumentStatistics
from .errors import UserValueError
from .infra.context_parallel import held_batch
from .infra.pass_graphs import PassGraphs, launch_line, why_no_graphs
from .job_config import JobConfig, LighthouseConfigManager
from .memory_estimate import local_parameters
from .metrics import UNDER_LIGHTHOUSE, LighthouseMetricsProcessor, whole_loss
from .model.architecture import architecture
from .model.flavors import flavors
from .model.model import LighthouseModelArgs, LighthouseTransformer
from .processes import lock_folders
from .run_stages import RunStages, is_too_much_for_a_cpu
from .selection_statistics import Selected, selection_statistics, selections
from .stages import name_of
from .stopping import StopRequest, ends_as_the_launcher_expects, stopped
from .verdict import Verdicts, skips_non_finite_steps


class LighthouseTrainer(upstream.Trainer):
    """Upstream's trainer with stages, a non-finite check and metrics that are true on any mesh.

    Raises:
        ValueError, TypeError, OSError: from the constructor, for a configuration that cannot
            work, before it touches a device or process group.
    """

    job_config: JobConfig
    checkpointer: LighthouseCheckpointManager
    metrics_processor: LighthouseMetricsProcessor
    model_args: LighthouseModelArgs
    tokenizer: BaseTokenizer
    dataloader: StagedDataloader

    def __init__(self, job_config: JobConfig) -> None:
        check_launch(job_config, flavors, int(os.environ.get("WORLD_SIZE", 1)))
        check_device(job_config, device_type)
        self._locks = lock_folders(job_config)
        log_to_file(job_config.job.dump_folder)
        if device_type == "cpu" and is_too_much_for_a_cpu(job_config):
            # Loading the text and building the model can take minutes.
            logger.warning(
                "torch sees no GPU, and a CPU needs minutes or hours for a step of this run; train "
                "it on GPUs, or begin with train_configs/debug_cpu.toml"
            )
        # Norms under autocast have float32 weights; compiled code fuses them nevertheless.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        with (
            # Upstream takes the model's arguments from here, and would change the flavor's own.
            patch.dict(flavors, {job_config.model.flavor: model_arguments_of(job_config)}),
            patch.object(upstream, "CheckpointManager", LighthouseCheckpointManager),
            # Upstream warns that other ranks do not know the loss; here they do.
            patch.object(upstream, "ensure_pp_loss_visible", lambda *arguments: None),
        ):
            super().__init__(job_config)
        self.checkpointer.on_saved = self.metrics_processor.exclude_from_throughput
        self.checkpointer.config = job_config.to_dict()
        self.checkpointer.model = architecture(self.model_args)
        self.checkpointer.model_files = files_to_keep(job_config)

        check_vocabulary(job_config, self.tokenizer)
        self.stages = RunStages(job_config, self.model_args)
        self.metrics_processor.time_left = self.stages.time_left()
        # Empty before the first step.
        self.stage = ""
        self._now = self.stages.all[0]
        self.steps_taken = 0
        self.stop_request = StopRequest()
        self.verdicts = Verdicts(self.checkpointer)
        self.documents = DocumentStatistics()
        self.graphs: PassGraphs | None = None
        if device_type == "cuda" and not why_no_graphs(job_config, self.parallel_dims.world_size):
            self.graphs = PassGraphs(self._pass, self._parameters(), self.device)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for model in self.model_parts for p in model.parameters()]

    def train(self) -> None:
        """Train up to the last step, and say what the run is and how it ended.

        Raises:
            StoppedBySignal: on every rank, after a signal to any of them and a checkpoint.
        """
        config, start = self.job_config, time.monotonic()
        parameters = sum(map(local_parameters, self.model_parts))
        for line in describe(config, self.parallel_dims, self.model_args, parameters):
            logger.info(line)
        logger.info(output_line(config))
        if device_type == "cuda":
            logger.info(launch_line(config, self.parallel_dims.world_size))
        for warning in warnings_of(config, self.parallel_dims.world_size):
            logger.warning(warning)
        if config.compile.enable:
            logger.info("The first step of each stage compiles the model, which can take minutes")
        self.metrics_processor.start_clock()
        super().train()
        self.verdicts.heed(self.step)
        if self.verdicts.stopped_by and self.step < config.training.steps:
            self._save_and_stop()
        seconds = time.monotonic() - start
        for line in ending(config, self.step, self.steps_taken, self.stage, seconds):
            logger.info(line)

    def should_continue_training(self) -> bool:
        """Whether steps are left, and no signal has asked any rank to stop."""
        return super().should_continue_training() and not self.verdicts.stopped_by

    def _save_and_stop(self) -> NoReturn:
        folder = self.checkpointer.save_now(self.step)
        self.stop_request.ignore()
        raise stopped(self.verdicts.stopped_by, self.step, folder)

    def set_stage(self, step: int) -> bool:
        """Give model and text the shape of ``step``'s stage, and log when the stage changes.

        Returns:
            Whether it changes.
        """
        now = self.stages.at(step)
        if self.stage and now is self._now:
            return False
        if self.graphs is not None:
            self.graphs.forget()
        came_from = f" after {self._now.stage.name}" if self.stage else ""
        if not self.stage and step > 1:
            self.dataloader.check_length(step - 1, self.stages.at(step - 1).stage.seq_len)
        self._now, self.stage, config = now, now.stage.attention, now.stage.config
        self.dataloader.use(config)
        for model in self.model_parts:
            cast(LighthouseTransformer, model).use_scaling(now.args.rope_scaling)
        # A dense stage would compile anew for a method that it does not read.
        for model in self.model_parts if self.stage == "lighthouse" else ():
            cast(LighthouseTransformer, model).use_method(now.args)
        self._use_attention(self.stage)
        length, world_size = now.gathered[self.stage], self.parallel_dims.world_size
        runs = what_runs(config, now.args, self.stage, length, self.device, world_size)
        logger.info(
            f"Stage '{now.stage.name}' begins at step {step}{came_from}: {runs}, "
            f"{now.flops[self.stage]:.3e} FLOPs per token"
        )
        section = config.lighthouse
        if self.stage == "lighthouse" and section.dense_every:
            logger.info(f"Steps that {section.dense_every} divides train under dense attention")
        if self.stage == "lighthouse" and now.args.selects and section.entry_score == "max":
            logger.warning(
                "lighthouse.entry_score = 'max' lets the model read later tokens off the "
                "selection: losses of this stage are too low; 'first' gives true ones"
            )
        return True

    def _use_attention(self, attention: str) -> None:
        for model in self.model_parts:
            cast(LighthouseTransformer, model).use_attention(attention)

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """Take one optimizer step.

        Raises:
            NonFiniteError: on every rank, if the loss of any rank or the gradient norm is not
                finite, in this step or in the one before; the optimizer takes no step.
        """
        start = time.monotonic()
        stage_begins = self.set_stage(self.step)
        if self.stage == "lighthouse":
            self.checkpointer.last_lighthouse_step = self.step
        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        self.documents.count(microbatches)
        mesh = self.parallel_dims.get_optional_mesh("batch")
        microbatches = [(without_idle_masks(x, mesh), labels) for x, labels in microbatches]
        if self._records_selections(self.step):
            self._train_between_selections(microbatches)
        else:
            self._train_on(microbatches)
        if stage_begins:
            device_module.synchronize()
            compiled = ", compilation included" if self.job_config.compile.enable else ""
            logger.info(
                f"The first step of stage '{self._now.stage.name}' took "
                f"{time.monotonic() - start:.1f} s{compiled}"
            )

    def _train_between_selections(self, microbatches: list[Batch]) -> None:
        before = self._selections(*microbatches[0])
        self._train_on(microbatches)
        after = self._selections(*microbatches[0])
        tensor_parallel = self.parallel_dims.get_optional_mesh("tp")
        statistics = selection_statistics(
            before, after, tensor_parallel.get_group() if tensor_parallel is not None else None
        )
        self.metrics_processor.logger.log(statistics, self.step)

    def _records_selections(self, step: int) -> bool:
        every = self.job_config.lighthouse.log_selection_every
        return (
            bool(every)
            and step % every == 0
            and self.stages.at(step).stage.attention == "lighthouse"
        )

    def _is_looked_at(self, step: int) -> bool:
        """Whether anybody sees what ``step`` left before the next one is queued."""
        config = self.job_config
        return (
            bool(self.verdicts.stopped_by)
            or self.metrics_processor.should_log(step)
            or self.checkpointer.is_due(step, step == config.training.steps)
            or (config.validation.enable and self.validator.should_validate(step))
            or self._records_selections(step)
            or step == config.training.steps
            or self.stages.at(step + 1) is not self._now
        )

    def _selections(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> list[Selected]:
        """Selections of the present weights in one microbatch, left out of the throughput."""
        # Wait first, so that queued training counts as training time.
        device_module.synchronize()
        start = time.perf_counter()
        rows, _, extra_inputs, options = self.post_dataloading_process(
            *self._on_device(inputs, labels)
        )
        (model,) = self.model_parts
        with self.train_context(), self.maybe_enable_amp:
            found = selections(model, lambda: model(rows, **extra_inputs, **options))
        device_module.synchronize()
        self.metrics_processor.exclude_from_throughput(time.perf_counter() - start)
        return found

    def _train_on(self, microbatches: list[Batch]) -> None:
        """Forward, backward, checks, optimizer step and log line."""
        self.optimizers.zero_grad()
        learning_rate = self.lr_schedulers.schedulers[0].get_last_lr()[0]

        local_tokens = torch.stack([(y != IGNORE_INDEX).sum() for _, y in microbatches]).sum()
        global_tokens = self.metrics_processor.sum_over("batch", local_tokens)
        attention = self.stages.attention_at(self.step)
        if attention != self.stage:
            self._use_attention(attention)
        losses = [self._forward_backward(attention, x, global_tokens) for x in microbatches]
        # Validation and whatever else runs between steps uses the attention of the stage.
        if attention != self.stage:
            self._use_attention(self.stage)
        # Each loss is a share; the sum over the ranks of "loss" and "pp" is the global mean.
        loss_share = torch.stack(losses).sum()

        grad_norm = dist_utils.clip_grad_norm_(
            self._parameters(),
            self.job_config.training.max_norm,
            foreach=True,
            pp_mesh=self.parallel_dims.get_optional_mesh("pp"),
        )
        # The device has this step to work on while the host waits for the verdict on the last one.
        verdict = self.verdicts.ask(
            self.step, self._now.stage.name, loss_share, grad_norm, self.stop_request.number
        )
        # Where optimizers skip steps themselves, the host queues the step without waiting.
        if all(skips_non_finite_steps(x, verdict.not_finite.device) for x in self.optimizers):
            for optimizer in self.optimizers:
                optimizer.found_inf = verdict.not_finite
        else:
            self.verdicts.heed(self.step)
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        if not verdict.travels or self._is_looked_at(self.step):
            self.verdicts.heed(self.step)
        self.lr_schedulers.step()

        self.steps_taken += 1
        if self.steps_taken == 1:
            # The first step compiles, which can take minutes. Until here, signals end it at once.
            self.stop_request.listen()
        flops = self._now.flops[attention] - self.documents.flops_saved(self._now.args, attention)
        self.metrics_processor.record_step(flops, self.stages.kind_of(self.step))
        if self.metrics_processor.should_log(self.step):
            self.metrics_processor.log_step(
                self.step,
                loss_share,
                (local_tokens, global_tokens),
                self.ntokens_seen,
                grad_norm,
                {
                    "lr": learning_rate,
                    UNDER_LIGHTHOUSE: float(attention == "lighthouse"),
                    "lighthouse/gathered_length": self._now.gathered[attention],
                    "lighthouse/sequence_length": self._now.stage.seq_len,
                    **self.documents.metrics(self.metrics_processor.sum_over),
                },
            )
        if self.verdicts.stopped_by and self.step < self.job_config.training.steps:
            # A validation that is due now may take longer than whoever stopped the run waits.
            self.checkpointer.save_now(self.step)

    def _forward_backward(
        self, attention: str, microbatch: Batch, global_tokens: float
    ) -> torch.Tensor:
        if self.graphs is not None:
            name = name_of(self._now.stage.config, attention)
            loss = self.graphs.run(name, *microbatch, global_tokens)
            self.metrics_processor.device_memory_monitor.in_graphs = self.graphs.held
            return loss
        if self.parallel_dims.pp_enabled:
            # pyrefly: ignore[missing-attribute]  infra/pipeline.py adds it to the schedule.
            self.pp_schedule.share_of_mean.tokens = global_tokens
            global_tokens = 1.0
        tokens = torch.full((), float(global_tokens), device=self.device)
        return self._pass(*microbatch, tokens)

    def _pass(
        self, inputs: dict[str, torch.Tensor], labels: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Forward and backward; returns this rank's loss divided by ``tokens``, a scalar."""
        inputs, labels = self._on_device(inputs, labels)
        loss = self.forward_backward_step(
            input_dict=inputs, labels=labels, global_valid_tokens=tokens
        )
        if self.parallel_dims.pp_enabled and not self.pp_has_last_stage:
            return torch.zeros((), device=self.device)
        return whole_loss(loss)

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """As upstream, but with documents and positions, and this rank's part by ``held_batch``."""
        extra_inputs = dict(input_dict)
        inputs, documents = extra_inputs.pop("input"), extra_inputs.pop(DOCUMENTS, None)
        options = model_options(documents, self.job_config.lighthouse)
        if POSITIONS in extra_inputs:
            options[POSITIONS] = extra_inputs.pop(POSITIONS)
        if self.parallel_dims.cp_enabled:
            mesh = self.parallel_dims.get_mesh("cp")
            batch = inputs, labels, options
            inputs, labels, options = held_batch(*batch, mesh, self.job_config.parallelism)
        return inputs, labels, extra_inputs, options

    def _on_device(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Batch:
        # Batches in pinned memory (training.dataloader.pin_memory) do not hold up the host.
        inputs = {name: x.to(self.device, non_blocking=True) for name, x in inputs.items()}
        return inputs, labels.to(self.device, non_blocking=True)

    def close(self) -> None:
        try:
            super().close()
        # An error that ends the run must not be hidden by one of its loggers.
        except OSError as error:
            logger.warning(f"The logs of the run cannot be closed: {error.strerror}")
        for lock in self._locks:
            lock.close()


def run(config: JobConfig) -> None:
    """Train as ``config`` says, or write a seed checkpoint if it asks for one."""
    trainer = LighthouseTrainer(config)
    try:
        if config.checkpoint.create_seed_checkpoint:
            if int(os.environ["WORLD_SIZE"]) != 1 or not config.checkpoint.enable:
                raise UserValueError(
                    "checkpoint.create_seed_checkpoint needs checkpoint.enable = true and a single "
                    "process; pass --checkpoint.enable and start one process"
                )
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
    finally:
        trainer.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@record
def main() -> None:
    """Parse the command line and train; a user's mistake ends in one message and exit code 1."""
    set_up_console()
    with ends_as_the_launcher_expects():
        run(LighthouseConfigManager().parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
