"""Dense causal attention within documents, as a function.

On CPUs, torch's flash attention runs for one document after the other. On GPUs, a window of the
whole sequence runs, by flash attention over sequences of varying lengths or by vectorised PyTorch
where that does not compute.

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
from .documents import check_documents, check_most_documents, cumulative_lengths
from .flash import obstacle_to_flash
from .inputs import check_rows, check_transforms
from .precision import accumulation_dtype

# flash attention's operations with documents lie beside the kernels.
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def document_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor,
    *,
    scale: float | None = None,
    most_documents: int | None = None,
) -> torch.Tensor:
    """Causal attention in which each position sees its own document alone.

    With one document in each row, the results on CPUs are those of torch's
    ``scaled_dot_product_attention`` to the last bit. First gradients are exact. On GPUs the
    gradient of q repeats its bits under ``torch.use_deterministic_algorithms(True)``.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D]; Hkv divides Hq.
        documents: int32 or int64 [B, N], for each position the first position of its document.
        scale: factor of the scores before the softmax; by default 1 / sqrt(D).
        most_documents: documents that the batch has at most. On GPUs, flash attention starts
            programs for so many, most of which end at once. By default B N, which is slow for long
            sequences. More documents than that, or than 2**15, end in an error of the device.

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
    check_most_documents(most_documents)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _DocumentAttention.apply(q, k, v, layout_within(documents, q, most_documents), scale)


def document_attention_over_ranks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor,
    layout: ContextParallel,
    scale: float | None = None,
    most_documents: int | None = None,
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
    check_most_documents(most_documents)
    if layout.operations is None:
        raise ValueError(
            "dense attention within documents is by operations over all ranks under context "
            "parallelism; give ContextParallel its operations, or use one rank for each sequence"
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return attention_over_ranks(q, k, v, scale, layout, False, documents, most_documents)


def _by_flash(q: torch.Tensor) -> bool:
    """Whether flash attention over sequences of varying lengths attends on tensors like ``q``."""
    if obstacle_to_flash(q):
        return False
    if not TRITON_IS_INSTALLED:
        raise ImportError(
            "documents on CUDA tensors need Triton, which is not installed: pip install triton"
        )
    return True


def layout_within(
    documents: torch.Tensor, q: torch.Tensor, most_documents: int | None
) -> torch.Tensor:
    """What ``forward_within`` takes of a layout [B, N]: cumulative lengths for flash attention."""
    return cumulative_lengths(documents, most_documents) if _by_flash(q) else documents


def forward_within(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp of ``document_attention``, without autograd.

    Args:
        layout: from ``layout_within``.
    """
    if _by_flash(q):
        return torch.ops.lighthouse.flash_window(q, k, v, q.shape[2], scale, layout)
    if q.device.type == "cpu":
        return torch.ops.lighthouse.document_attention(q, k, v, layout, scale)
    return torch.ops.lighthouse.window(q, k, v, q.shape[2], scale, layout)


def backward_within(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``forward_within``'s out with respect to q, k and v."""
    operations, rows = torch.ops.lighthouse, (q, k, v, out, lse)
    if _by_flash(q):
        return operations.flash_window_backward(dout, *rows, q.shape[2], scale, layout)
    if q.device.type == "cpu":
        return operations.document_attention_backward(dout, *rows, layout, scale)
    return operations.window_backward(dout, None, *rows, q.shape[2], scale, layout)


class _DocumentAttention(torch.autograd.Function):
    """One operation forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        out, lse = forward_within(q, k, v, layout, scale)
        ctx.save_for_backward(q, k, v, out, lse, layout)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, layout = ctx.saved_tensors
        return *backward_within(dout, q, k, v, out, lse, layout, ctx.scale), None, None


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
