"""Scores that rank the entries of every level.

Every scorer gives each position two rows, one for it as a query and one as a key, and their L2
norms are its scores. The "norm" scorer takes q and k themselves, at no cost. The others take the
outputs of an attention of q over k, and of k over q, within each residue class of positions modulo
the dilation: softmax attention for "dilated", linear attention with a fixed decay for "gla". Query
heads that share a key-value head each have their own two rows; the largest norm of each kind is the
score that the group selects by.

Shapes: B batch, Hq query heads, Hkv key-value heads, H heads, N positions, D head dimension, d
dilation.
"""

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .config import LighthouseConfig
from .geometry import PyramidGeometry

Scores = list[tuple[torch.Tensor, torch.Tensor]]

# Logarithm to base 2 of what a step of the dilated sequence leaves of "gla"'s state. The published
# gate, log(sigmoid(x)) / 16 of a projection x that gets no gradient, at x = 0.
LOG2_DECAY = -1 / 16
# Rows that "gla" multiplies at once; any number gives the same up to rounding.
GLA_CHUNK = 64
# All linear in the sequence, the fastest first; torch would also fall back to one that holds N x N
# scores.
SDPA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision sums are taken in: float32, or float64 for float64 tensors."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def score(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: PyramidGeometry) -> Scores:
    """Scores of the configured scorer (arXiv 2605.06554, section 3.2).

    A position scores the norms of its two rows, of each the largest in the group of query heads
    that share a key-value head; an entry scores the maximum over the entries it pools.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].

    Returns:
        For each level from the base up, query and key scores, each [B, Hkv, N / p^l], float32.
    """
    scores = []
    for norms in position_norms(q, k, v, geometry.config):
        levels = [norms.unflatten(1, (k.shape[1], -1)).amax(dim=2)]
        for span in geometry.spans[1:]:
            levels.append(_entry_scores(levels[0], span, geometry.config.entry_score))
        scores.append(levels)
    return list(zip(*scores, strict=True))


def _entry_scores(scores: torch.Tensor, span: int, entry_score: str) -> torch.Tensor:
    """Scores of the entries over ``span`` positions each, from those of positions [B, Hkv, N]."""
    if entry_score == "first":
        return scores[..., ::span]
    return scores.unflatten(-1, (-1, span)).amax(dim=-1)


def position_norms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of every position's two rows: by query [B, Hq, N], by key [B, Hkv or Hq, N].

    The outputs of attention are read where they lie, and only their norms brought into order.
    """
    if config.scorer == "norm":
        return _norms(q), _norms(k)
    attend = {"dilated": dilated_attention, "gla": gated_linear_attention}[config.scorer]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (rows.repeat_interleave(group, dim=1) for rows in (k, v))
    q, k, v = (dilate(rows, config.dilation) for rows in (q, k, v))
    outputs = (attend(q, k, v), attend(k, q, v))
    return tuple(undilate(_norms(rows), config.dilation) for rows in outputs)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=accumulation_dtype(rows.dtype))


def dilate(rows: torch.Tensor, dilation: int) -> torch.Tensor:
    """[B, H, N, D] as [B, d H, N / d, D]; head r H + h holds the positions of residue r of head h.

    Without a copy if rows lie [B, N, H, D].
    """
    batch, heads, length, d = rows.shape
    rows = rows.transpose(1, 2).reshape(batch, length // dilation, dilation * heads, d)
    return rows.transpose(1, 2)


def undilate(norms: torch.Tensor, dilation: int) -> torch.Tensor:
    """[B, d H, N / d], in the order of ``dilate``, as [B, H, N]."""
    return norms.unflatten(1, (dilation, -1)).permute(0, 2, 3, 1).flatten(2)


def dilated_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Stock causal attention of dilated rows, [B, H, N, D]."""
    backends = SDPA_BACKENDS
    if q.is_cuda and q.dtype == torch.float64:
        # Nothing else computes it there.
        backends = [SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def gated_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Simple gated linear attention with one decay for all heads and steps, without a softmax.

    out_t = sum over s <= t of 2^(LOG2_DECAY (t - s)) (q_t . k_s) v_s / sqrt(D)

    Args:
        q, k, v: [B, H, N, D].

    Returns:
        [B, H, N, D], in the precision of sums.
    """
    dtype = accumulation_dtype(q.dtype)
    q = q.to(dtype) / math.sqrt(q.shape[-1])
    k, v = k.to(dtype), v.to(dtype)
    steps = torch.arange(GLA_CHUNK, device=q.device)
    decay = torch.exp2(LOG2_DECAY * torch.arange(GLA_CHUNK + 1, device=q.device, dtype=dtype))
    weights = decay[(steps[:, None] - steps).clamp(min=0)].tril()
    # What all earlier chunks leave: sum of their decayed outer products of keys and values.
    state = q.new_zeros(*q.shape[:2], q.shape[3], q.shape[3])
    outputs = []
    for q_rows, k_rows, v_rows in zip(
        *(rows.split(GLA_CHUNK, dim=2) for rows in (q, k, v)), strict=True
    ):
        n = q_rows.shape[2]
        inside = (q_rows @ k_rows.mT * weights[:n, :n]) @ v_rows
        outputs.append(inside + decay[1 : n + 1, None] * (q_rows @ state))
        remaining = decay[n - 1 - steps[:n], None]
        state = decay[n] * state + (k_rows * remaining).mT @ v_rows
    return torch.cat(outputs, dim=2)
