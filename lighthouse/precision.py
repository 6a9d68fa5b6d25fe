"""Precision of sums, and what the kernels and the backends of dense attention compute."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend

# These backends need memory linear in the sequence. The fastest comes first. torch's own list also
# holds MATH, which stores N x N scores.
SDPA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]


# What Triton's kernels compute.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_D = 256


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision sums are taken in: float32, or float64 for float64 tensors."""
    return torch.promote_types(dtype, torch.float32)


def backend_takes(
    can_use: Callable[[Any], bool], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> bool:
    """Whether a backend computes causal attention on these tensors, forward and backward.

    Args:
        can_use: the backend's question in ``torch.backends.cuda``.
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].
    """
    grouped = q.shape[1] != k.shape[1]
    # Some head dimensions have a forward and no backward. torch looks whether one is needed, and
    # inside an operation it finds no gradients. Both passes have to get the same answer.
    with torch.enable_grad():
        q = q.detach().requires_grad_()
        return can_use(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, grouped))
