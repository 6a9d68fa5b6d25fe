"""Lighthouse attention (arXiv 2605.06554) in PyTorch."""

from .attention import LighthouseAttention, lighthouse_attention
from .config import LighthouseConfig
from .selection import Selection, select

__all__ = [
    "LighthouseAttention",
    "LighthouseConfig",
    "Selection",
    "lighthouse_attention",
    "select",
]
