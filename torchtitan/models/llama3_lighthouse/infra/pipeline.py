"""Pipeline parallelism: upstream's, with gradients of the mean loss."""

import copy

import torch
from torch import nn
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torchtitan.components.loss import LossFunction
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import pipeline_parallel as upstream
from torchtitan.protocols.train_spec import ParallelizeFunction

from ..errors import UserValueError
from ..job_config import JobConfig, Parallelism
from ..model.model import LighthouseModelArgs
from ..stages import stages_of

# Schedules differ in how they split layers over ranks and a batch over time; these were tested.
SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B")


class ShareOfMean:
    """Divides a summed loss by ``tokens`` before gradients are taken.

    Upstream's schedules take gradients of the sum itself, and divide only the loss that is logged.

    Attributes:
        tokens: tokens of the global batch, to be set for each batch. With 1, the loss stays a sum.
    """

    def __init__(self, loss_sum: LossFunction) -> None:
        self.loss_sum = loss_sum
        self.tokens = 1.0

    def __call__(self, prediction: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss_sum(prediction, labels) / self.tokens


def pipeline_lighthouse(
    model: nn.Module,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
    device: torch.device,
    model_args: LighthouseModelArgs,
    parallelize_fn: ParallelizeFunction,
    loss_fn: LossFunction,
) -> tuple[_PipelineSchedule, list[nn.Module], bool, bool]:
    """Split ``model`` into upstream's pipeline stages.

    Returns:
        The schedule, with our ``ShareOfMean`` as its attribute ``share_of_mean``; the model parts
        on this rank; and whether it has the first pipeline stage, and the last one.
    """
    share_of_mean = ShareOfMean(loss_fn)
    # Upstream cuts this batch into microbatches. Stages of training all have the same one, and more
    # sequences than the run as a whole if theirs are shorter.
    job_config = copy.deepcopy(job_config)
    job_config.training.local_batch_size = stages_of(job_config)[0].config.training.local_batch_size
    schedule, model_parts, has_first, has_last = upstream.pipeline_llm(
        model, parallel_dims, job_config, device, model_args, parallelize_fn, share_of_mean
    )
    # pyrefly: ignore[missing-attribute]  The attribute is ours; torch's class does not declare it.
    schedule.share_of_mean = share_of_mean
    return schedule, model_parts, has_first, has_last


def loss_over_microbatches(
    schedule: _PipelineSchedule,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    is_first: bool,
    is_last: bool,
    options: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Sum of the losses of a forward pass over all microbatches, without gradients.

    Args:
        inputs, labels: [B, N] each.
        is_first, is_last: whether this rank has the first pipeline stage, and the last one.
        options: further arguments of the model's forward.

    Returns:
        A float32 scalar, which is zero on ranks without the last pipeline stage.
    """
    losses: list[torch.Tensor] = []
    # pyrefly: ignore[missing-attribute]  ``pipeline_lighthouse`` adds it to the schedule.
    schedule.share_of_mean.tokens = 1.0
    schedule.eval(
        *((inputs,) if is_first else ()),
        target=labels if is_last else None,
        losses=losses if is_last else None,
        **options,
    )
    return torch.stack(losses).sum() if is_last else inputs.new_zeros((), dtype=torch.float32)


def check_pipeline(config: Parallelism, local_batch_size: int, n_layers: int) -> None:
    """Check that upstream can split layers and batches as ``config`` says.

    Raises:
        UserValueError: upstream cannot, or the schedule is not one of ``SCHEDULES``.
    """
    degree, schedule = config.pipeline_parallel_degree, config.pipeline_parallel_schedule
    if schedule not in SCHEDULES or config.pipeline_parallel_schedule_csv:
        given = config.pipeline_parallel_schedule_csv or schedule
        raise UserValueError(
            f"parallelism.pipeline_parallel_schedule = '{given}' is not supported for "
            f"llama3_lighthouse; use one of {', '.join(SCHEDULES)}"
        )
    size = config.pipeline_parallel_microbatch_size
    if local_batch_size % (degree * size):
        raise UserValueError(
            f"training.local_batch_size = {local_batch_size} must be a multiple of "
            f"parallelism.pipeline_parallel_degree x pipeline_parallel_microbatch_size = {degree} "
            f"x {size}, so that every pipeline stage has a microbatch to work on"
        )
    parts = config.module_fqns_per_model_part
    layers = [f"layers.{number}" for number in range(n_layers)]
    # Upstream drops what no part names, and trains what is left.
    if parts and sum(parts, []) != ["tok_embeddings", *layers, "norm", "output"]:
        raise UserValueError(
            f"parallelism.module_fqns_per_model_part = {parts} must name tok_embeddings, "
            f"layers.0 to {layers[-1]}, norm and output, each once and in this order"
        )
    if parts or config.pipeline_parallel_layers_per_stage:
        return
    pipeline_stages = degree * (2 if schedule == "Interleaved1F1B" else 1)
    try:
        upstream.generate_llm_fqn_per_model_part(
            pipeline_stages,
            n_layers,
            config.pipeline_parallel_first_stage_less_layers,
            config.pipeline_parallel_last_stage_less_layers,
        )
    except ValueError as error:
        raise UserValueError(
            f"parallelism.pipeline_parallel_degree = {degree} makes {pipeline_stages} pipeline "
            f"stages under '{schedule}', and {n_layers} layers do not fill them: {error} Lower the "
            "degree."
        ) from None
