"""Context parallelism: torch's ring attention inside Lighthouse attention, on GPUs and on CPUs."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._ops.utils import (
    expand_to_full_mesh_op_strategy,
    register_op_strategy,
)
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module
from torchtitan.tools.utils import device_type

from lighthouse import ContextParallel, LighthouseAttention

from ..job_config import Parallelism
from ..model import LighthouseModelArgs

SEQUENCE_DIM = 2


def apply_context_parallel(
    attention_modules: list[nn.Module], mesh: DeviceMesh, config: Parallelism
) -> None:
    """Run the dense attention of every module, Lighthouse's inner one too, over ``mesh``."""
    if device_type == "cpu":
        add_ring_attention_on_cpu()
    # Upstream reads the key and leaves torch's default, an all-gather, in place.
    set_rotate_method(config.context_parallel_rotate_method)
    layout = ContextParallel(
        mesh.get_group(),
        mesh.get_local_rank(),
        mesh.size(),
        balanced=config.context_parallel_load_balancer is not None,
    )
    dense = []
    for module in attention_modules:
        if isinstance(module, LighthouseAttention):
            module.context_parallel = layout
            module = module.sdpa
        dense.append(module)
    apply_cp_to_attention_module(dense, mesh, "sdpa")


_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _ring_forward(mesh, query, key, value, dropout_p=0.0, is_causal=False, **options):
    return ring._templated_ring_attention(
        mesh.get_group(), SEQUENCE_DIM, _FORWARD, query, key, value,
        is_causal=is_causal, dropout_p=dropout_p, **options,
    )  # fmt: skip


def _ring_backward(
    mesh, grad, query, key, value, out, logsumexp, dropout_p, is_causal, **options
):  # fmt: skip
    def backward(*, out, logsumexp, grad_out, query, key, value, is_causal, **options):
        return _BACKWARD(
            grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, **options
        )

    return ring._templated_ring_attention_backward(
        mesh.get_group(), SEQUENCE_DIM, backward, grad, "grad_out", query, key, value,
        out, logsumexp, is_causal, **options,
    )  # fmt: skip


def add_ring_attention_on_cpu() -> None:
    """Let torch's ring attention take the flash attention of CPUs, which it has no entry for."""
    for operation, function, outputs, tensors in (
        (_FORWARD, _ring_forward, 2, 3),
        (_BACKWARD, _ring_backward, 3, 6),
    ):

        def strategy(op_schema, count=outputs + tensors, outputs=outputs):
            placements = [[Shard(SEQUENCE_DIM)] * count, [Replicate()] * count]
            return expand_to_full_mesh_op_strategy(
                op_schema.get_mesh_from_args(validate=False),
                op_schema,
                placements,
                input_index=outputs,
            )

        def handler(op_call, args, kwargs, function=function):
            dispatcher = DTensor._op_dispatcher
            info = dispatcher.unwrap_to_op_info(op_call, args, kwargs)
            dispatcher.sharding_propagator.propagate(info)
            results = function(info.compute_mesh, *info.local_args, **info.local_kwargs)
            return dispatcher.wrap(results, info.output_sharding.output_spec)

        register_op_strategy(operation)(strategy)
        # torch installs these handlers together with its own.
        ring.custom_ops[operation] = handler


def bytes_sent_per_layer(
    args: LighthouseModelArgs, seq_len: int, layout: ContextParallel, element_size: int
) -> dict[str, int]:
    """Bytes that a rank sends in one Lighthouse layer for one sequence, by the ring ("alltoall").

    Keys and values of S / W places go round forward and again backward, W - 1 hops each; their
    gradients, in float32, go W hops. Of the seam, L - 1 rows of every query head follow each chunk,
    forward and backward, even to a chunk on the same rank.

    Args:
        element_size: bytes of an element of q, k and v.

    Returns:
        "ring" and "seam"; the seam of a rank whose every chunk has a next one.
    """
    ranks = layout.world_size
    head_dim = args.dim // args.n_heads
    key_value = 2 * (args.n_kv_heads or args.n_heads) * head_dim
    key_value *= args.gathered_length(seq_len) // ranks
    chunks = len(layout.held)
    seam = 2 * chunks * args.n_heads * (args.lighthouse.levels - 1) * head_dim * element_size
    return {
        "ring": 2 * (ranks - 1) * key_value * element_size + ranks * key_value * 4,
        "seam": seam,
    }
