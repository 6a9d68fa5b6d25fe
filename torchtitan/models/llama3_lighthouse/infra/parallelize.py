"""Parallelisms of the Lighthouse model: upstream's, in upstream's order, and a few of ours."""

from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import parallelize_module
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra import parallelize as upstream
from torchtitan.tools.utils import device_type

from ..job_config import ActivationCheckpoint, JobConfig
from ..model.loss import FactoredOutput
from ..model.model import LighthouseTransformer, leave_out_math_backend
from .activation_checkpoint import (
    DOCUMENTS,
    EXCHANGE,
    RING,
    SELECTION,
    WINDOW,
    apply_lighthouse_checkpoint,
)
from .context_parallel import apply_context_parallel
from .cpu import use_sum_reductions
from .offload import LayerInputOffload

# One block compiles to six graphs: dense, Lighthouse, and Lighthouse switched to dense attention,
# each in training and in validation, and to as many for each further stage of a schedule. With
# ``training.document_mask`` these are twice as many, because sequences of one document run without
# masks. Dynamo's limit of 8 leaves too little room.
RECOMPILE_LIMIT = 64


def parallelize_lighthouse(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply TP, CP, activation checkpointing, compile and FSDP or DDP to ``model``, in order."""
    leave_out_math_backend(model)
    # Selective checkpointing then keeps selections, and attention outputs on a CPU as on a GPU.
    upstream._op_sac_save_list |= (
        SELECTION
        | WINDOW
        | DOCUMENTS
        | RING
        | EXCHANGE
        | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}
    )
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # A run has few lengths. Graphs of one length are faster than those for any.
    torch._dynamo.config.automatic_dynamic_shapes = False

    def apply_to_attention(modules: list[nn.Module], mesh: DeviceMesh, attention_type: str) -> None:
        apply_context_parallel(model, mesh, job_config.parallelism)

    def checkpoint_activations(
        model: nn.Module, section: ActivationCheckpoint, **options: Any
    ) -> None:
        if section.mode == "lighthouse":
            apply_lighthouse_checkpoint(model, section)
        else:
            apply_ac(model, section, **options)

    def divide(model: LighthouseTransformer, *arguments: Any, **options: Any) -> None:
        apply_tp(model, *arguments, **options)
        # Tensor parallelism has made a sharded parameter of each use, both over the vocabulary. If
        # init_weights alone tied them, a dry run would count both, and FSDP would send both.
        if model.model_args.tied:
            model.tie()
        if plan := model.model_args.attention_class.tensor_parallel_plan():
            for block in model.layers.values():
                attention = block.get_submodule("attention")
                parallelize_module(
                    attention, arguments[0] if arguments else options["tp_mesh"], plan
                )

    def shard(modules: nn.Module | list[nn.Module], **options: Any) -> None:
        # The root holds what several modules use, because FSDP gathers a parameter for one of them.
        if not (tied and (isinstance(modules, list) or modules is model.tok_embeddings)):
            fully_shard(modules, **options)

    tied = cast(LighthouseTransformer, model).model_args.tied
    apply_tp, fully_shard = upstream.apply_tp, upstream.fully_shard
    with (
        patch.object(upstream, "apply_tp", divide),
        patch.object(upstream, "fully_shard", shard),
        # Upstream would run its own ring, around LighthouseAttention itself.
        patch.object(upstream, "apply_cp_to_attention_module", apply_to_attention),
        patch.object(upstream, "apply_ac", checkpoint_activations),
    ):
        model = upstream.parallelize_llama(model, parallel_dims, job_config)
    if isinstance(model.output, FactoredOutput) and isinstance(model.output, FSDPModule):
        # The loss reads the weight after forward, so fsdp_reshard_after_forward must not free it.
        model.output.set_reshard_after_forward(False, recurse=False)
    if device_type == "cpu":
        use_sum_reductions(model)
    if job_config.activation_checkpoint.offload_inputs:
        LayerInputOffload(model.get_submodule("layers").children())
    return model
