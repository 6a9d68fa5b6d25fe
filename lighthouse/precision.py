"""Precision of sums, and the backends of dense attention."""

import torch
from torch.nn.attention import SDPBackend

# These backends need memory linear in the sequence. The fastest comes first. torch's own list also
# holds MATH, which stores N x N scores.
SDPA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision sums are taken in: float32, or float64 for float64 tensors."""
    return torch.promote_types(dtype, torch.float32)
