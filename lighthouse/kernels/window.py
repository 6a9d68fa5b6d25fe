"""Causal attention over a window by torch's flash attention, as operations of ours.

flash attention takes a window and returns the logsumexp. Its backward knows no gradient of the
logsumexp, which ``fold_lse_gradient`` puts into its other arguments.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension.
"""

from contextlib import nullcontext
from functools import partial

import torch

from ..cudnn import cudnn_backward, cudnn_forward, takes_cudnn
from ..flash import LEAST_GAIN, SHORTEST_SEGMENT, flash_backward, flash_forward, repeating_bits
from ..logsumexp import fold_lse_gradient
from ..memory_layout import sequence_first
from .document_window import backward_within_documents, forward_within_documents
from .launch import define, row_strides

# Backward runs about so many rounds of programs.
ROUNDS = 2


def flash_rows(rows: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] as flash attention takes it, [B, N, H, D] with D contiguous."""
    return row_strides(rows)[0].transpose(1, 2)


def _limit(keys: int, window: int) -> int | None:
    # Without a limit, a window that holds all keys runs as dense attention.
    return window if window < keys else None


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    bounds: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the window.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, M, D], M being N or more. The last of the queries is at the place of the
            last of the keys.
        bounds: int32, the ``cumulative_lengths`` of a layout of documents of the queries.
        seen: with ``bounds``, how many of the M - N keys before the first query the first document
            of each row sees, [B]; left out, M is N.

    Returns:
        out [B, Hq, N, D], lying in memory as [B, N, Hq, D], and lse float32 [B, Hq, N].
    """
    if bounds is not None:
        return forward_within_documents(q, k, v, window, scale, bounds, seen)
    queries, keys = q.shape[2], k.shape[2]
    if window >= keys == queries and takes_cudnn(q, k, v):
        out, lse = cudnn_forward(q, k, v, scale)
    else:
        out, lse = flash_forward(q, k, v, scale, window=_limit(keys, window))
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def launch_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    bounds: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``launch_forward``'s out, each lying in memory as rows [B, N, H, D] do.

    One program of flash attention sums the gradient of one head's queries in order. Where batch and
    heads are fewer than the GPU's processors, flash attention splits this sum, and keeps a float32
    copy of the gradient for every part: seventeen of them for eight heads on an H100. The sequence
    is then cut into segments instead, which flash attention takes as a batch.
    """
    if bounds is not None:
        rows = dout, q, k, v, out, lse
        return backward_within_documents(*rows, window, scale, bounds, seen)
    (batch, heads, n, _), keys = q.shape, k.shape[2]
    if window >= keys == n and takes_cudnn(q, k, v):
        grads = cudnn_backward(dout, q, k, v, out, lse, scale)
        dq, dk, dv = (grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads)
        return dq, dk, dv
    rows = [flash_rows(each) for each in (dout, q, k, v, out)]
    segments = segments_of(keys, window, batch * heads, _processors(q.device))
    gradients = _gradients if segments == 1 else partial(_gradients_in_segments, segments)
    # A window that holds all keys is dense attention, which repeats its bits in torch's mode alone.
    with repeating_bits() if window < keys else nullcontext():
        grads = gradients(rows, lse, window, scale)
    dq, dk, dv = (grad.contiguous().transpose(1, 2) for grad in grads)
    return dq, dk, dv


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def segments_of(length: int, window: int, planes: int, processors: int) -> int:
    """Segments that ``length`` positions are cut into for backward.

    Args:
        planes: batch times heads, each of which a program works on by itself.
    """
    if planes >= processors:
        return 1
    wanted = -(-ROUNDS * processors // planes)
    before = window - 1
    return max(1, min(wanted, (length - before) // max(SHORTEST_SEGMENT, LEAST_GAIN * before)))


def _gradients(
    rows: list[torch.Tensor], lse: torch.Tensor, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each [B, N, H, D], by one call of flash attention.

    The last of the queries is at the place of the last of the keys, of which there may be more.

    Args:
        rows: dout, q, k, v and out, each [B, N, H, D].
        lse: [B, Hq, N].
    """
    dout, q, k, v, out = (x.transpose(1, 2) for x in rows)
    grads = flash_backward(dout, q, k, v, out, lse, scale, window=_limit(k.shape[2], window))
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv


def _gradients_in_segments(
    segments: int, rows: list[torch.Tensor], lse: torch.Tensor, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``_gradients``, with equal segments of the sequence as a batch.

    A segment attends over its own keys and the W - 1 before it. The positions before the first
    segment are at least as many, keys before the first query included; a call of their own takes
    them.
    """
    dout, q, k, v, out = rows
    (batch, n), keys = q.shape[:2], k.shape[1]
    before, ahead = window - 1, keys - n
    length = (n - max(0, before - ahead)) // segments
    first = n - segments * length
    # The first segment's own keys begin here, and there are at least ``before`` keys before them.
    first_key = ahead + first

    def own(x: torch.Tensor) -> torch.Tensor:
        return x[:, first:].unflatten(1, (segments, length)).flatten(0, 1)

    def reached(x: torch.Tensor) -> torch.Tensor:
        overlapping = x[:, first_key - before :].unfold(1, length + before, length)
        return overlapping.movedim(-1, 2).flatten(0, 1)

    own_lse = own(lse.transpose(1, 2)).transpose(1, 2).contiguous()
    parts = _gradients(
        [own(dout), own(q), reached(k), reached(v), own(out)], own_lse, window, scale
    )
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    starts = (first, first_key, first_key)
    if first:
        beginning = [x[:, :start] for x, start in zip(rows, (first, *starts, first), strict=True)]
        begun = _gradients(beginning, lse[..., :first].contiguous(), window, scale)
        for grad, part in zip(grads, begun, strict=True):
            grad[:, : part.shape[1]] = part
    else:
        # Keys before the first query have gradients from the first segment alone.
        for grad in grads[1:]:
            grad[:, :first_key] = 0
    for grad, part, start, shared in zip(grads, parts, starts, (0, before, before), strict=True):
        part = part.unflatten(0, (batch, segments))
        grad[:, start:].unflatten(1, (segments, length)).copy_(part[:, :, shared:])
        if shared:
            reach = grad[:, start - shared : grad.shape[1] - shared]
            reach = reach.unflatten(1, (segments, length))
            reach[:, :, :shared] += part[:, :, :shared]
    dq, dk, dv = grads
    return dq, dk, dv


def fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results like ``launch_forward``'s, without values."""
    out = sequence_first(q, q.shape[2])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def fake_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Results like ``launch_backward``'s, without values."""
    m = k.shape[2]
    return sequence_first(q, q.shape[2]), sequence_first(k, m), sequence_first(v, m)


define(
    "flash_window(Tensor q, Tensor k, Tensor v, int window, float scale, Tensor? bounds=None,"
    " Tensor? seen=None) -> (Tensor, Tensor)",
    launch_forward,
    fake_forward,
)
define(
    "flash_window_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " int window, float scale, Tensor? bounds=None, Tensor? seen=None) -> (Tensor, Tensor, Tensor)",
    launch_backward,
    fake_backward,
)


def window_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    bounds: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``lighthouse.window.window_attention``: out [B, Hq, N, D] and lse [B, Hq, N].

    Args:
        bounds, seen: as in ``launch_forward``.
    """
    return torch.ops.lighthouse.flash_window(q, k, v, window, scale, bounds, seen)


def window_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    bounds: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from those of out [B, Hq, N, D] and of lse [B, Hq, N]."""
    if dlse is not None:
        dout, out = fold_lse_gradient(dout, dlse, out)
    rows = dout, q, k, v, out, lse
    return torch.ops.lighthouse.flash_window_backward(*rows, window, scale, bounds, seen)
