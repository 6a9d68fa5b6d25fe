"""torch's ring attention as one operation, which a compiler takes as it is.

Compiled in pieces, it would give every rank another graph. Compilers drop what a rank does not use
and share what it does twice, transfers included, so that from four ranks on some wait for what
others never send; and they keep keys, values and everything received from forward to backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._ops.utils import (
    expand_to_full_mesh_op_strategy,
    register_op_strategy,
)
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

SEQUENCE_DIM = 2
NAMESPACE = "lighthouse_ring"

aten = torch.ops.aten
CPU_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class _Mesh:
    """What torch's functions ask of a mesh."""

    group: ProcessGroup

    def get_group(self) -> ProcessGroup:
        return self.group


def _cpu_forward(mesh, query, key, value, dropout_p=0.0, is_causal=False, **options):
    return ring._templated_ring_attention(
        mesh.get_group(), SEQUENCE_DIM, CPU_FORWARD, query, key, value,
        is_causal=is_causal, dropout_p=dropout_p, **options,
    )  # fmt: skip


def _cpu_backward(
    mesh, grad, query, key, value, out, logsumexp, dropout_p, is_causal, **options
):  # fmt: skip
    def backward(*, out, logsumexp, grad_out, query, key, value, is_causal, **options):
        return CPU_BACKWARD(
            grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, **options
        )

    return ring._templated_ring_attention_backward(
        mesh.get_group(), SEQUENCE_DIM, backward, grad, "grad_out", query, key, value,
        out, logsumexp, is_causal, **options,
    )  # fmt: skip


# Attention on one device to the same around the ring.
FORWARD = {
    aten._scaled_dot_product_cudnn_attention.default: ring._scaled_dot_product_ring_cudnn_attention,
    aten._scaled_dot_product_flash_attention.default: ring._scaled_dot_product_ring_flash_attention,
    aten._scaled_dot_product_efficient_attention.default: (
        ring._scaled_dot_product_ring_efficient_attention
    ),
    CPU_FORWARD: _cpu_forward,
}
BACKWARD = {
    aten._scaled_dot_product_cudnn_attention_backward.default: (
        ring._scaled_dot_product_ring_cudnn_attention_backward
    ),
    aten._scaled_dot_product_flash_attention_backward.default: (
        ring._scaled_dot_product_ring_flash_attention_backward
    ),
    aten._scaled_dot_product_efficient_attention_backward.default: (
        ring._scaled_dot_product_ring_efficient_attention_backward
    ),
    CPU_BACKWARD: _cpu_backward,
}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_ring_operations: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}


def _laid_out(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``rows`` in the memory layout of ``empty_like(like)``, which compiled code can count on."""
    assert rows.shape == like.shape, "heads of queries, keys and values must be equally wide"
    strides = torch.empty_like(like, device="meta").stride()
    return rows if rows.stride() == strides else torch.empty_like(like).copy_(rows)


def _define(operation: torch._ops.OpOverload, function: Callable, is_forward: bool) -> None:
    """Define the ring's version of ``operation``: the same arguments after the group's name."""
    name, _, rest = str(operation._schema).removeprefix("aten::").partition("(")
    _library.define(f"{name}(str group_name, {rest}")
    names = [argument.name for argument in operation._schema.arguments]
    places = [names.index(argument) for argument in ("query", "key", "value")]

    def with_layout(results: Sequence, arguments: tuple) -> tuple:
        query, key, value = (arguments[place] for place in places)
        if is_forward:
            out, logsumexp, *others = results
            return _laid_out(out, query), logsumexp.contiguous(), *others
        grads = zip(results[:3], (query, key, value), strict=True)
        return *(_laid_out(grad, rows) for grad, rows in grads), *results[3:]

    def run(group_name: str, *arguments, **options) -> tuple:
        mesh = _Mesh(_resolve_process_group(group_name))
        results = with_layout(function(mesh, *arguments, **options), arguments)
        if is_forward:
            return results
        grad_query, grad_key, grad_value, *others = results
        if grad_value.untyped_storage().data_ptr() == grad_key.untyped_storage().data_ptr():
            # The last hop brings both in one buffer, and outputs of an operation have to be apart.
            grad_value = grad_value.clone()
        return grad_query, grad_key, grad_value, *others

    def fake(group_name: str, *arguments, **options) -> tuple:
        return with_layout(operation(*arguments, **options), arguments)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _ring_operations[operation] = getattr(getattr(torch.ops, NAMESPACE), name).default


for _operation, _function in FORWARD.items():
    _define(_operation, _function, is_forward=True)
for _operation, _function in BACKWARD.items():
    _define(_operation, _function, is_forward=False)


def _handler(operation: torch._ops.OpOverload, args: tuple, kwargs: dict) -> object:
    """What DTensor does for attention over a sharded sequence."""
    dispatcher = DTensor._op_dispatcher
    info = dispatcher.unwrap_to_op_info(operation, args, kwargs)
    dispatcher.sharding_propagator.propagate(info)
    assert not info.output_sharding.needs_redistribute, "attention's inputs are sharded unlike"
    group_name = info.compute_mesh.get_group().group_name
    results = _ring_operations[operation](group_name, *info.local_args, **info.local_kwargs)
    return dispatcher.wrap(results, info.output_sharding.output_spec)


def install_ring_attention() -> None:
    """Have torch's context parallelism run these operations, and take the CPU's attention too.

    Before torch enables its dispatcher.
    """
    ring.custom_ops.update(dict.fromkeys(_ring_operations, _handler))
    for operation, outputs, tensors in ((CPU_FORWARD, 2, 3), (CPU_BACKWARD, 3, 6)):

        def strategy(op_schema, count=outputs + tensors, outputs=outputs):
            placements = [[Shard(SEQUENCE_DIM)] * count, [Replicate()] * count]
            return expand_to_full_mesh_op_strategy(
                op_schema.get_mesh_from_args(validate=False),
                op_schema,
                placements,
                input_index=outputs,
            )

        register_op_strategy(operation)(strategy)
