"""Ring attention with its logsumexp, on local tensors, for a window beside the selection.

The two are operations that a compiler does not look into, as those of ``ring_attention`` are, which
they call. Which attention they take, cuDNN's or flash attention, they decide when they run.

Shapes: B batch, Hq query heads, Hkv key-value heads, S positions on a rank, D head dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.distributed_c10d import ProcessGroup

from lighthouse.logsumexp import fold_lse_gradient
from lighthouse.precision import accumulation_dtype

from .ring_attention import CPU_BACKWARD, CPU_FORWARD, NAMESPACE, ring_operation

aten = torch.ops.aten


def operations_of(
    group: ProcessGroup, balanced: bool, gathers: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward over ``group``, as ``lighthouse.ContextParallel`` takes them."""
    ring = group.group_name, balanced, gathers
    return partial(_forward, ring), partial(_backward, ring)


def _forward(
    ring: tuple[str, bool, bool],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.lighthouse_ring.attention(q, k, v, scale, *ring)


def _backward(
    ring: tuple[str, bool, bool],
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if dlse is not None:
        dout, out = fold_lse_gradient(dout, dlse, out)
    return torch.ops.lighthouse_ring.attention_backward(dout, q, k, v, out, lse, scale, *ring)


def _computing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """The attention that computes: "cpu", "cudnn" or "flash".

    Raises:
        NotImplementedError: none takes these tensors.
    """
    if not q.is_cuda:
        return "cpu"
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    if torch.backends.cuda.can_use_cudnn_attention(parameters):
        return "cudnn"
    if torch.backends.cuda.can_use_flash_attention(parameters):
        return "flash"
    raise NotImplementedError(
        "ring attention runs cuDNN's and flash attention, in bfloat16 or float16, and neither "
        f"takes q {tuple(q.shape)} in {q.dtype}"
    )


def _run_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *ring: str | bool
) -> tuple[torch.Tensor, torch.Tensor]:
    computing = _computing(q, k, v)
    if computing == "cpu":
        out, lse = ring_operation(CPU_FORWARD)(*ring, q, k, v, 0.0, True, scale=scale)
        return out, lse
    if computing == "cudnn":
        run = ring_operation(aten._scaled_dot_product_cudnn_attention.default)
        out, lse, *_ = run(*ring, q, k, v, None, True, 0.0, True, False, scale=scale)
        return out, lse.squeeze(-1)
    run = ring_operation(aten._scaled_dot_product_flash_attention.default)
    out, lse, *_ = run(*ring, q, k, v, 0.0, True, False, scale=scale)
    return out, lse


def _run_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    *ring: str | bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    computing = _computing(q, k, v)
    if computing == "cpu":
        run = ring_operation(CPU_BACKWARD)
        return run(*ring, dout, q, k, v, out, lse, 0.0, True, scale=scale)
    length = q.shape[2]
    if computing == "cudnn":
        run = ring_operation(aten._scaled_dot_product_cudnn_attention_backward.default)
        # Without dropout, the state of the random generator is not read.
        state = lse.new_empty((), dtype=torch.int64)
        return run(
            *ring, dout, q, k, v, out, lse.unsqueeze(-1), state, state, None, None, None, length,
            length, 0.0, True, scale=scale,
        )  # fmt: skip
    run = ring_operation(aten._scaled_dot_product_flash_attention_backward.default)
    state, unused = (lse.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return run(
        *ring, dout, q, k, v, out, lse, None, None, length, length, 0.0, True, state, unused,
        scale=scale,
    )  # fmt: skip


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *ring: str | bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _fake_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


RING = "str group_name, bool balanced, bool gathers"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema, _run, _fake in (
    (
        "attention",
        f"(Tensor q, Tensor k, Tensor v, float scale, {RING}) -> (Tensor, Tensor)",
        _run_forward,
        _fake_forward,
    ),
    (
        "attention_backward",
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
        f" {RING}) -> (Tensor, Tensor, Tensor)",
        _run_backward,
        _fake_backward,
    ),
):
    _library.define(f"{_name}{_schema}")
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

ATTENTION = torch.ops.lighthouse_ring.attention.default
