"""Causal attention over a window as operations of ours, within documents if there are some.

A window that holds all keys is dense attention, for which cuDNN has the faster kernels. It knows no
documents. All else is ``interval_attention``.

Shapes: B batch, Hq query heads, Hkv key-value heads, N queries and M keys of a sequence, D head
dimension. M is N or more, and the last query is at the place of the last key.
"""

import torch

from ..cudnn import cudnn_backward, cudnn_forward, takes_cudnn
from ..logsumexp import fold_lse_gradient
from ..memory_layout import sequence_first
from .interval_attention import Before, Intervals, Windows, interval_backward, interval_forward
from .launch import define


def keys_seen(
    q: torch.Tensor,
    k: torch.Tensor,
    window: int,
    documents: torch.Tensor | None = None,
) -> Intervals | Windows:
    """The keys that each query sees, in the joined rows of a batch.

    Args:
        q: [B, Hq, N, D].
        k: [B, Hkv, M, D].
        documents: the first key that each query may see, [B, N].
    """
    queries, keys = q.shape[2], k.shape[2]
    place = keys - queries + 1
    windows = Windows(len(q), queries, keys, place - window, place)
    return windows if documents is None else windows.tensors(q.device, documents)


def _of_dense(q: torch.Tensor, k: torch.Tensor, is_causal: bool) -> Windows:
    queries, keys = q.shape[2], k.shape[2]
    return Windows(len(q), queries, keys, -queries, 1 if is_causal else keys)


def dense_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``cudnn.cudnn_forward``, where that does not compute."""
    return interval_forward(q, k, v, _of_dense(q, k, is_causal), scale, k.shape[2])


def dense_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    is_causal: bool = True,
) -> tuple[torch.Tensor, ...]:
    """As ``cudnn.cudnn_backward``, where that does not compute."""
    seen = _of_dense(q, k, is_causal)
    return interval_backward(dout, q, k, v, out, lse, seen, scale, k.shape[2])


def _is_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    documents: torch.Tensor | None,
) -> bool:
    return documents is None and window >= k.shape[2] == q.shape[2] and takes_cudnn(q, k, v)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the window.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, M, D].
        documents: the first key that each query may see, [B, N]; with M = N a layout.

    Returns:
        out [B, Hq, N, D], lying in memory as [B, N, Hq, D], and lse float32 [B, Hq, N].
    """
    if _is_dense(q, k, v, window, documents):
        out, lse = cudnn_forward(q, k, v, scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    seen = keys_seen(q, k, window, documents)
    return interval_forward(q, k, v, seen, scale, window)


def launch_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of ``launch_forward``'s out, each lying in memory as rows [B, N, H, D] do."""
    if _is_dense(q, k, v, window, documents):
        grads = cudnn_backward(dout, q, k, v, out, lse, scale)
        dq, dk, dv = (grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads)
        return dq, dk, dv
    seen = keys_seen(q, k, window, documents)
    return interval_backward(dout, q, k, v, out, lse, seen, scale, window)


def fake_forward(q: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Results like ``launch_forward``'s, without values."""
    return sequence_first(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)


def fake_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Results like ``launch_backward``'s, without values."""
    m = k.shape[2]
    return sequence_first(q, q.shape[2]), sequence_first(k, m), sequence_first(v, m)


define(
    "window_by_kernel(Tensor q, Tensor k, Tensor v, int window, float scale,"
    " Tensor? documents=None) -> (Tensor, Tensor)",
    launch_forward,
    fake_forward,
)
define(
    "window_by_kernel_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " int window, float scale, Tensor? documents=None) -> (Tensor, Tensor, Tensor)",
    launch_backward,
    fake_backward,
)


def window_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``lighthouse.window.window_attention``: out [B, Hq, N, D] and lse [B, Hq, N].

    Args:
        documents: as in ``launch_forward``.
    """
    return torch.ops.lighthouse.window_by_kernel(q, k, v, window, scale, documents)


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
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from those of out [B, Hq, N, D] and of lse [B, Hq, N].

    Args:
        documents: as in ``launch_forward``.
    """
    dout, out = fold_lse_gradient(dout, dlse, out)
    rows = dout, q, k, v, out, lse
    operation = torch.ops.lighthouse.window_by_kernel_backward
    return operation(*rows, window, scale, documents)


def halo_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: Before,
    window: int,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``launch_forward``, with the ``window`` - 1 keys before each sequence.

    It is not registered as an operation, as ``halo_window`` is one.
    """
    with torch.cuda.device_of(q):
        seen = keys_seen(q, k, window, documents)
        return interval_forward(q, k, v, seen, scale, window, before)


def halo_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: Before,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v, and of the keys and values before each sequence."""
    with torch.cuda.device_of(q):
        dout, out = fold_lse_gradient(dout, dlse, out)
        seen = keys_seen(q, k, window, documents)
        return interval_backward(dout, q, k, v, out, lse, seen, scale, window, before)
