"""Lighthouse attention (arXiv 2605.06554) in PyTorch."""

from .attention import LighthouseAttention, lighthouse_attention
from .config import LighthouseConfig
from .context_parallel import ContextParallel
from .selection import Selection, select

__all__ = [
    "ContextParallel",
    "LighthouseAttention",
    "LighthouseConfig",
    "Selection",
    "lighthouse_attention",
    "select",
]
