"""Dense attention by cuDNN, the fastest kernel on Hopper, with its logsumexp and without autograd.

Shapes: B batch, Hq query heads, Hkv key-value heads, N queries, M keys, D head dimension.
"""

import torch

from .precision import backend_takes


def takes_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether cuDNN computes on these tensors, forward and backward.

    torch lets it compute neither where a user has switched it off nor in deterministic mode.
    """
    return backend_takes(torch.backends.cuda.can_use_cudnn_attention, q, k, v)


def cudnn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by cuDNN.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, M, D]. M is N where ``is_causal``.

    Returns:
        out [B, Hq, N, D] and lse float32 [B, Hq, N].
    """
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )
    return out, lse.squeeze(-1)


def cudnn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    is_causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``cudnn_forward``'s out with respect to q, k and v.

    Args:
        lse: [B, Hq, N], contiguous.
    """
    dout, out = (_strided_like(q, rows) for rows in (dout, out))
    # Without dropout, the state of the random generator is not read.
    state = lse.new_empty((), dtype=torch.int64)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1), state, state, None, None, None, q.shape[2],
        k.shape[2], 0.0, is_causal, scale=scale,
    )  # fmt: skip


def _strided_like(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows``, or a copy, with strides that those of q determine.

    torch builds a cuDNN plan for the strides of all tensors, but looks it up by the shapes and
    strides of q, k and v alone. A plan for other strides of dout or out gives wrong gradients.
    """
    if rows.stride() == q.stride():
        return rows
    # Rows of an expanded q share their memory, so no copy can lie as they do.
    like = q.contiguous() if 0 in q.stride() else q
    return q.new_empty_strided(q.shape, like.stride()).copy_(rows)
