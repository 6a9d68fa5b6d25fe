"""Dense causal attention within documents, as a function.

On CPUs, torch's flash attention runs for one document after the other. On GPUs, a window of the
whole sequence runs, by a kernel or by vectorised PyTorch where that does not compute.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, M documents.
"""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .context_parallel import ContextParallel, attention_over_ranks
from .cpu_flash import cpu_backward, cpu_forward
from .documents import check_documents
from .inputs import check_rows, check_transforms
from .precision import KERNEL_DTYPES, LARGEST_D, accumulation_dtype

# The operations of the kernel lie beside it.
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def document_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention in which each position sees its own document alone.

    With one document in each row, the results on CPUs are those of torch's
    ``scaled_dot_product_attention`` to the last bit. First gradients are exact, and on GPUs
    repeat their bits.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D]; Hkv divides Hq.
        documents: int32 or int64 [B, N], for each position the first position of its document.
        scale: factor of the scores before the softmax; by default 1 / sqrt(D).

    Returns:
        [B, Hq, N, D].

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit one another, or on CPUs the
            numbers of ``documents`` are no such layout.
        ImportError: on a GPU, Triton is not installed.
        RuntimeError: a transform of ``torch.func`` runs, such as grad.
    """
    check_transforms()
    check_rows(q, k, v)
    check_documents(documents, q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _DocumentAttention.apply(q, k, v, documents, scale)


def document_attention_over_ranks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor,
    layout: ContextParallel,
    scale: float | None = None,
) -> torch.Tensor:
    """As ``document_attention``, of the chunks on this rank, by the operations of ``layout``.

    Args:
        q: [B, Hq, N, D], N being this rank's part of the sequence.
        k, v: [B, Hkv, N, D].
        documents: layout of the whole sequence, the same on every rank.

    Raises:
        TypeError, ValueError: as there; or ``layout`` has no operations.
    """
    check_transforms()
    check_rows(q, k, v)
    check_documents(documents, q, ranks=layout.world_size)
    if layout.operations is None:
        raise ValueError(
            "dense attention within documents is by operations over all ranks under context "
            "parallelism; give ContextParallel its operations, or use one rank for each sequence"
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return attention_over_ranks(q, k, v, scale, layout, False, documents)


def _by_kernel(q: torch.Tensor) -> bool:
    """Whether the kernel for attention within documents computes on tensors like ``q``."""
    if not q.is_cuda or q.dtype not in KERNEL_DTYPES or q.shape[-1] > LARGEST_D:
        return False
    if not TRITON_IS_INSTALLED:
        raise ImportError(
            "documents on CUDA tensors need Triton, which is not installed: pip install triton"
        )
    return True


def forward_within(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp of ``document_attention``, without autograd."""
    if _by_kernel(q):
        return torch.ops.lighthouse.window_by_kernel(q, k, v, q.shape[2], scale, documents)
    if q.device.type == "cpu":
        return torch.ops.lighthouse.document_attention(q, k, v, documents, scale)
    return torch.ops.lighthouse.window(q, k, v, q.shape[2], scale, documents)


def backward_within(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    documents: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``forward_within``'s out with respect to q, k and v."""
    operations, rows = torch.ops.lighthouse, (q, k, v, out, lse)
    if _by_kernel(q):
        return operations.window_by_kernel_backward(dout, *rows, q.shape[2], scale, documents)
    if q.device.type == "cpu":
        return operations.document_attention_backward(dout, *rows, documents, scale)
    return operations.window_backward(dout, None, *rows, q.shape[2], scale, documents)


class _DocumentAttention(torch.autograd.Function):
    """One operation forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        documents: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        out, lse = forward_within(q, k, v, documents, scale)
        ctx.save_for_backward(q, k, v, out, lse, documents)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, documents = ctx.saved_tensors
        return *backward_within(dout, q, k, v, out, lse, documents, ctx.scale), None, None


# The operations are for CPUs, where they may read the layout.
@torch.library.custom_op(
    "lighthouse::document_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor documents, float scale) -> (Tensor, Tensor)",
)
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    for rows, positions in _documents(documents):
        here = (x[rows, :, positions] for x in (q, k, v))
        found = cpu_forward(*here, scale=scale)
        out[rows, :, positions], lse[rows, :, positions] = found
    return out, lse


@_forward.register_fake
def _(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op(
    "lighthouse::document_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor documents,"
    " float scale) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    documents: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for rows, positions in _documents(documents):
        here = (x[rows, :, positions] for x in (dout, q, k, v, out, lse))
        found = cpu_backward(*here, scale=scale)
        for into, grad in zip((dq, dk, dv), found, strict=True):
            into[rows, :, positions] = grad
    return dq, dk, dv


@_backward.register_fake
def _(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _documents(documents: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """The row of the batch and the positions of each document of a layout [B, N]."""
    length = documents.shape[1]
    for row, firsts in enumerate(documents):
        bounds = [*firsts.unique().tolist(), length]
        for first, end in zip(bounds[:-1], bounds[1:], strict=True):
            yield slice(row, row + 1), slice(first, end)
