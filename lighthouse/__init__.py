"""Lighthouse attention (arXiv 2605.06554) in PyTorch."""

from .attention import LighthouseAttention, lighthouse_attention
from .config import LighthouseConfig
from .context_parallel import ContextParallel
from .dense_attention import document_attention
from .documents import check_layout, first_positions
from .selection import Selection, select
from .strided import StridedAttention, strided_attention
from .window import WindowAttention, window_attention

__all__ = [
    "ContextParallel",
    "LighthouseAttention",
    "LighthouseConfig",
    "Selection",
    "StridedAttention",
    "WindowAttention",
    "check_layout",
    "document_attention",
    "first_positions",
    "lighthouse_attention",
    "select",
    "strided_attention",
    "window_attention",
]
