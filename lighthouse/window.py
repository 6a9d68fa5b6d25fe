"""Causal attention over a sliding window, as a function and as the inner attention of a model.

Position t attends over positions t - W + 1 to t, with the softmax of all causal attention.

Shapes: B batch, Hq query heads, Hkv key-value heads, G = Hq / Hkv, N positions, D head dimension,
W positions of the window, R rows of a piece, C keys that these rows reach.

The operations take more keys than queries too. The last query is then at the place of the last key,
and ``documents`` is the first key that each query may see. With as many keys as queries this is the
layout.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .config import check_largest_window
from .context_parallel import ONE_DEVICE, ContextParallel, check_halo
from .document_chunks import documents_of_chunks
from .documents import check_documents, within
from .halo import layouts_in_chunks, window_in_chunks
from .implementation import (
    WINDOW_IMPLEMENTATIONS,
    check_for_documents,
    choose_window_implementation,
    operations_by,
)
from .inner_attention import InnerAttention
from .inputs import check_rows, check_transforms
from .precision import accumulation_dtype

# The vectorised code holds about this many scores at once, and takes so many rows at most.
SCORES_AT_ONCE = 2**24
MOST_ROWS = 256


def check_window(window: int) -> None:
    """Check that ``window`` is a number of positions.

    Raises:
        TypeError, ValueError: it is no integer, below 1, or longer than any sequence.
    """
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(
            f"window must be of type int, got {window!r} of type {type(window).__name__}"
        )
    if window < 1:
        raise ValueError(
            f"window must be at least 1, the position itself, got window = {window}; use a few "
            "hundred positions"
        )
    check_largest_window(window)


def window_pairs(sequence_length: int, window: int) -> int:
    """Pairs of a query and a key that attention over a window takes in one head.

    Position t takes min(t + 1, W) keys.
    """
    reach = min(window, sequence_length)
    return reach * sequence_length - reach * (reach - 1) // 2


@overload
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    *,
    scale: float | None = None,
    impl: str | None = None,
    return_lse: Literal[False] = False,
    context_parallel: ContextParallel = ONE_DEVICE,
    documents: torch.Tensor | None = None,
) -> torch.Tensor: ...


@overload
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    *,
    scale: float | None = None,
    impl: str | None = None,
    return_lse: Literal[True],
    context_parallel: ContextParallel = ONE_DEVICE,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    *,
    scale: float | None = None,
    impl: str | None = None,
    return_lse: bool = False,
    context_parallel: ContextParallel = ONE_DEVICE,
    documents: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention in which each position sees itself and the ``window`` - 1 before it.

    A window of N or more is dense causal attention, on GPUs by cuDNN where that computes and there
    are no documents. All but cuDNN repeats its bits, and torch takes no cuDNN under
    ``torch.use_deterministic_algorithms(True)``. Both results have exact first gradients.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D]; Hkv divides Hq.
        window: W, from 1 to 2**31 - 1.
        scale: factor of the scores before the softmax; by default 1 / sqrt(D).
        impl: "flash4" for FlashAttention 4, the extra flash4, in bfloat16 and float16 on Hopper
            GPUs; "triton" for a kernel, in these and float32 on CUDA with D up to 256; or "torch"
            for vectorised PyTorch, which takes every device, dtype and D and is many times slower
            on a GPU. The default is "flash4" where it is installed and computes such tensors, else
            "triton" where that does, and "torch" for all others. Under "flash4" a window of N or
            more goes to "triton". The implementations differ by rounding.
        return_lse: also return the logsumexp of each position's scores.
        context_parallel: the chunks on this rank, when N is only its part of the sequence. The
            W - 1 keys and values before each chunk come from the rank that holds them.
        documents: int32 or int64 [B, N], for each position the first position of its document,
            before which it sees nothing. Under context parallelism it is the layout of the whole
            sequence, the same on every rank. "flash4" does not know documents, and is not the
            default with them.

    Returns:
        out [B, Hq, N, D] in q's dtype; with ``return_lse`` also lse [B, Hq, N], float32, or
        float64 for float64 tensors.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit one another, the window or
            ``impl`` is none, or the window reaches over more than one chunk; or ``documents`` are
            no layout, or come with "flash4".
        ImportError: ``impl`` needs a package that is not installed, or the installed flash-attn-4
            is too old or broken.
        RuntimeError: a transform of ``torch.func`` runs, such as grad.
    """
    check_transforms()
    check_rows(q, k, v)
    check_window(window)
    chunks = context_parallel.chunks
    check_for_documents(impl, documents, WINDOW_IMPLEMENTATIONS)
    if documents is not None:
        check_documents(documents, q, ranks=context_parallel.world_size)
    impl = choose_window_implementation(impl, q, documents is not None)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if chunks == 1:
        constants = window, scale, impl, return_lse
        return _WindowAttention.apply(q, k, v, *constants, *within(documents))
    check_halo(window, q.shape[2] * context_parallel.world_size, chunks)
    q, k, v = (context_parallel.split(rows) for rows in (q, k, v))
    own = None if documents is None else documents_of_chunks(documents, context_parallel)
    constants = window, scale, impl, context_parallel, layouts_in_chunks(own, window)
    out, *lse = window_in_chunks(q, k, v, *constants, return_lse=return_lse)
    out = context_parallel.join(out)
    return (out, context_parallel.join(lse[0].unsqueeze(-1)).squeeze(-1)) if return_lse else out


def window_operations(q: torch.Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The operations that attend over tensors like ``q``, forward and backward, without autograd.

    forward(q, k, v, window, scale) returns out and lse. backward(dout, dlse, q, k, v, out, lse,
    window, scale) returns dq, dk and dv; dlse may be None.
    """
    return operations_by(choose_window_implementation(None, q))


class _WindowAttention(torch.autograd.Function):
    """One operation forward and one backward, which computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int,
        scale: float,
        impl: str,
        return_lse: bool,
        *layout: torch.Tensor,
    ) -> Any:
        forward, _ = operations_by(impl)
        out, lse = forward(q, k, v, window, scale, *layout)
        ctx.save_for_backward(q, k, v, out, lse, *layout)
        ctx.constants = window, scale, impl
        return (out, lse) if return_lse else out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  Without lse there is no gradient of it.
    def backward(
        ctx: Any, dout: torch.Tensor, dlse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        window, scale, impl = ctx.constants
        # Activation checkpointing lets them be read once.
        q, k, v, out, lse, *layout = ctx.saved_tensors
        _, backward = operations_by(impl)
        grads = backward(dout, dlse, q, k, v, out, lse, window, scale, *layout)
        return *grads, None, None, None, None, *[None] * len(layout)


# The vectorised code is an operation too: the compiler neither unrolls its loop nor repeats it.
@torch.library.custom_op(
    "lighthouse::window",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, SymInt window, float scale, Tensor? documents=None)"
    " -> (Tensor, Tensor)",
)
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = accumulation_dtype(q.dtype)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    # Autocast would round the scores.
    with torch.autocast(q.device.type, enabled=False):
        for rows, keys in _pieces(q, k, window):
            scores = _scores(q, k, rows, keys, window, scale, documents)
            sums = scores.logsumexp(dim=-1)
            probabilities = (scores - sums[..., None]).exp_()
            values = v[:, :, keys].to(dtype)
            out[:, :, rows] = _of_heads(probabilities.flatten(2, 3) @ values, q)
            lse[:, :, rows] = sums.flatten(1, 2)
    return out, lse


@_forward.register_fake
def _(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op(
    "lighthouse::window_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " SymInt window, float scale, Tensor? documents=None) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With P = exp(s - lse): dv = P^T dout, and ds = P (dout v^T - rowsum(dout out) + dlse)."""
    dtype, heads = accumulation_dtype(q.dtype), k.shape[1]
    dq = q.new_empty(q.shape)
    # Pieces share keys, so one piece after the other adds to their gradients.
    dk, dv = (k.new_zeros(k.shape, dtype=dtype) for _ in range(2))
    with torch.autocast(q.device.type, enabled=False):
        for rows, keys in _pieces(q, k, window):
            grad = dout[:, :, rows].to(dtype)
            shift = (grad * out[:, :, rows].to(dtype)).sum(dim=-1)
            if dlse is not None:
                shift = shift - dlse[:, :, rows]
            grad = _by_key_head(grad, heads)
            scores = _scores(q, k, rows, keys, window, scale, documents)
            sums = lse[:, :, rows].unflatten(1, (heads, -1))
            probabilities = (scores - sums[..., None]).exp_().flatten(2, 3)
            dv[:, :, keys] += probabilities.mT @ grad
            shift = shift.unflatten(1, (heads, -1)).flatten(2, 3)
            grad = grad @ v[:, :, keys].to(dtype).mT
            grad = probabilities * (grad - shift[..., None]) * scale
            dk[:, :, keys] += grad.mT @ _by_key_head(q[:, :, rows].to(dtype), heads)
            dq[:, :, rows] = _of_heads(grad @ k[:, :, keys].to(dtype), q)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_backward.register_fake
def _(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _pieces(q: torch.Tensor, k: torch.Tensor, window: int) -> Iterator[tuple[slice, slice]]:
    """Slices of R rows, and of the C keys that these rows see."""
    batch, heads, length, _ = q.shape
    before = k.shape[2] - length
    reach = batch * heads * min(k.shape[2], window + MOST_ROWS)
    count = max(1, min(MOST_ROWS, SCORES_AT_ONCE // reach))
    for first in range(0, length, count):
        last = min(length, first + count)
        yield slice(first, last), slice(max(0, before + first - window + 1), before + last)


def _by_key_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, Hq, R, D] as [B, Hkv, G R, D], for ``heads`` = Hkv."""
    return rows.unflatten(1, (heads, -1)).flatten(2, 3)


def _of_heads(rows: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, G R, D] as [B, Hq, R, D]."""
    return rows.unflatten(2, (q.shape[1] // rows.shape[1], -1)).flatten(1, 2)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: slice,
    keys: slice,
    window: int,
    scale: float,
    documents: torch.Tensor | None,
) -> torch.Tensor:
    """Scores of a piece, minus infinity outside of window or document: [B, Hkv, G, R, C]."""
    dtype, heads = accumulation_dtype(q.dtype), k.shape[1]
    scores = _by_key_head(q[:, :, rows].to(dtype), heads) @ k[:, :, keys].to(dtype).mT * scale
    before = k.shape[2] - q.shape[2]
    row = before + torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=q.device)
    distance = row - key
    outside = (distance < 0) | (distance >= window)
    if documents is not None:
        first = documents[:, rows, None]
        outside = (outside | (key < first)).view(len(first), 1, 1, len(row), len(key))
    return scores.unflatten(2, (-1, len(row))).masked_fill_(outside, -math.inf)


class WindowAttention(InnerAttention):
    """Attention over a window around a dense inner attention.

    Args:
        window: W, the positions that each position sees, itself included.
        sdpa, impl: as in ``InnerAttention``; "flash4", "triton" and "torch" are
            implementations.
    """

    name = "attention over a window"
    implementations = WINDOW_IMPLEMENTATIONS

    def __init__(self, window: int, sdpa: nn.Module | None = None, impl: str | None = None) -> None:
        check_window(window)
        super().__init__(sdpa, impl)
        self.window = window

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return window_attention(
            q,
            k,
            v,
            self.window,
            scale=scale,
            impl=self.impl,
            context_parallel=self.context_parallel,
            documents=documents,
        )

    def settings(self) -> str:
        return f"window={self.window}"
