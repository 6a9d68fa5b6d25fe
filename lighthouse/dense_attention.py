"""Dense causal attention within documents, as a function.

On CPUs, torch's flash attention runs for one document after the other. On GPUs, it runs for all of
them at once (torch's attention over sequences of varying lengths), and the vectorised window does
where flash attention does not compute.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, M documents.
"""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from .cpu_flash import cpu_backward, cpu_forward
from .documents import check_documents, check_most_documents, cumulative_lengths
from .flash import obstacle_to_flash
from .inputs import check_rows, check_transforms
from .precision import accumulation_dtype

# Some versions of torch want to be told of shared key-value heads; others have no such argument.
SHARES_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


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
            programs for so many of length N, most of which end at once. By default B N, which is
            slow for long sequences. More documents than that, or than 2**15, end in an error of
            the device.

    Returns:
        [B, Hq, N, D].

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit one another, or on CPUs the
            numbers of ``documents`` are no such layout.
        RuntimeError: a transform of ``torch.func`` runs, such as grad.
    """
    check_transforms()
    check_rows(q, k, v)
    check_documents(documents, q)
    check_most_documents(most_documents)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not obstacle_to_flash(q):
        return _by_lengths(q, k, v, documents, scale, most_documents)
    return _DocumentAttention.apply(q, k, v, documents, scale)


def _by_lengths(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor,
    scale: float,
    most_documents: int | None,
) -> torch.Tensor:
    batch, _, length, _ = q.shape
    bounds = cumulative_lengths(documents, most_documents)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(
        q, k, v, bounds, bounds, length, length, scale=scale, window_size=(-1, 0), **SHARES_HEADS
    )
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


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
        if q.device.type == "cpu":
            out, lse = torch.ops.lighthouse.document_attention(q, k, v, documents, scale)
        else:
            # A window of the whole sequence.
            out, lse = torch.ops.lighthouse.window(q, k, v, q.shape[2], scale, documents)
        ctx.save_for_backward(q, k, v, documents, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, documents, out, lse = ctx.saved_tensors
        rows, scale = (q, k, v, out, lse), ctx.scale
        if q.device.type == "cpu":
            grads = torch.ops.lighthouse.document_attention_backward(dout, *rows, documents, scale)
        else:
            backward = torch.ops.lighthouse.window_backward
            grads = backward(dout, None, *rows, q.shape[2], scale, documents)
        return *grads, None, None


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
