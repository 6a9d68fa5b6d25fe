"""Scores that rank the entries of every level.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension.
"""

import torch

from .config import LighthouseConfig
from .geometry import PyramidGeometry

Scores = list[tuple[torch.Tensor, torch.Tensor]]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision sums are taken in: float32, or float64 for float64 tensors."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def norm_scores(q: torch.Tensor, k: torch.Tensor, geometry: PyramidGeometry) -> Scores:
    """Scores of the "norm" scorer (arXiv 2605.06554, section 3.2).

    A position scores the L2 norm of its query, the largest in the group of query heads that share
    a key-value head, and of its key; an entry scores the maximum over the entries it pools.

    Args:
        q: [B, Hq, N, D].
        k: [B, Hkv, N, D].

    Returns:
        For each level from the base up, query and key scores, each [B, Hkv, N / p^l], float32.
    """
    dtype = accumulation_dtype(q.dtype)
    a = torch.linalg.vector_norm(q, dim=-1, dtype=dtype)
    a = a.unflatten(1, (k.shape[1], -1)).amax(dim=2)
    b = torch.linalg.vector_norm(k, dim=-1, dtype=dtype)
    scores = [(a, b)]
    for length in geometry.lengths[1:]:
        a, b = (x.unflatten(-1, (length, -1)).amax(dim=-1) for x in (a, b))
        scores.append((a, b))
    return scores


def score(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: PyramidGeometry) -> Scores:
    """Scores of the configured scorer; arguments and result as ``norm_scores``, v as k.

    Raises:
        NotImplementedError: the scorer is "dilated" or "gla".
    """
    check_scorer(geometry.config)
    return norm_scores(q, k, geometry)


def check_scorer(config: LighthouseConfig) -> None:
    """Raise NotImplementedError unless the scorer is "norm"."""
    if config.scorer != "norm":
        raise NotImplementedError(
            f"scorer = {config.scorer!r} is not implemented yet; use scorer = 'norm'"
        )
