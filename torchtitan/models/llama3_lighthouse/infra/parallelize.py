"""Parallelisms of the Lighthouse model: upstream's, in upstream's order, plus what ours needs."""

from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra import parallelize as upstream
from torchtitan.tools.utils import device_type

from lighthouse.implementation import kernels

from ..job_config import JobConfig
from ..model.loss import FactoredOutput
from ..model.model import leave_out_math_backend
from .activation_checkpoint import apply_lighthouse_checkpoint
from .context_parallel import apply_context_parallel
from .cpu import use_sum_reductions
from .offload import LayerInputOffload

# Dense layers, Lighthouse layers and Lighthouse layers switched to dense are three graphs of one
# block, each in training and in validation; dynamo's limit of 8 leaves no room beside them.
RECOMPILE_LIMIT = 32


def parallelize_lighthouse(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply TP, CP, activation checkpointing, compile and FSDP or DDP to ``model``, in order."""
    leave_out_math_backend(model)
    # Selective checkpointing keeps attention outputs on the CPU as it does on GPUs, and selections.
    upstream._op_sac_save_list |= {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.lighthouse.select.default,
    }
    if kernels is not None:
        upstream._op_sac_save_list |= {
            torch.ops.lighthouse.score.default,
            torch.ops.lighthouse.select_from_norms.default,
        }
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT

    def apply_to_attention(modules, mesh, attention_type):
        apply_context_parallel(modules, mesh, job_config.parallelism)

    def checkpoint_activations(model, section, **options):
        if section.mode == "lighthouse":
            apply_lighthouse_checkpoint(model, section)
        else:
            apply_ac(model, section, **options)

    with (
        # Upstream would take Lighthouse's attention itself for the dense one.
        patch.object(upstream, "apply_cp_to_attention_module", apply_to_attention),
        patch.object(upstream, "apply_ac", checkpoint_activations),
    ):
        model = upstream.parallelize_llama(model, parallel_dims, job_config)
    if isinstance(model.output, FactoredOutput) and isinstance(model.output, FSDPModule):
        # The loss reads the weight after forward has ended, whatever fsdp_reshard_after_forward.
        model.output.set_reshard_after_forward(False, recurse=False)
    if device_type == "cpu":
        use_sum_reductions(model)
    if job_config.activation_checkpoint.offload_inputs:
        LayerInputOffload(model.layers.values())
    return model
