"""torch's flash attention for CPUs, with its logsumexp and without autograd.

Shapes: B batch, Hq query heads, Hkv key-value heads, N queries, M keys, D head dimension.
"""

import torch


def cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as ``lighthouse.cudnn.cudnn_forward`` does; lse has the precision of sums."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, scale=scale
    )


def cpu_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    is_causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``cpu_forward``'s out with respect to q, k and v."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, is_causal, scale=scale
    )
