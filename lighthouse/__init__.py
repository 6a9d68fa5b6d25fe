"""Lighthouse attention (arXiv 2605.06554) in PyTorch."""

from .attention import LighthouseAttention, lighthouse_attention
from .config import LighthouseConfig
from .context_parallel import ContextParallel
from .selection import Selection, select
from .window import WindowAttention, window_attention

__all__ = [
    "ContextParallel",
    "LighthouseAttention",
    "LighthouseConfig",
    "Selection",
    "WindowAttention",
    "lighthouse_attention",
    "select",
    "window_attention",
]
