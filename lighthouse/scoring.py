"""Scores that rank the entries of every level.

A scorer gives each position two scores, one for it as a query and one for it as a key. Among the
query heads that share a key-value head, the largest score of each kind counts.

The scorer "norm" takes the L2 norms of q and k themselves. "dilated" and "gla" take the norms of
the outputs of an attention of q over k, and of k over q, among the positions that are equal modulo
the dilation: softmax attention for "dilated", linear attention with a fixed decay for "gla".
"random" takes hashes of q and k. It is the control that shows what choosing by content is worth.

Shapes: B batch, Hq query heads, Hkv key-value heads, H heads, N positions, D head dimension, d
dilation.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .config import LighthouseConfig
from .dense_attention import document_attention
from .geometry import PyramidGeometry
from .precision import SDPA_BACKENDS, accumulation_dtype

Scores = list[tuple[torch.Tensor, torch.Tensor]]
Attention = Callable[..., torch.Tensor]

# The decay per step of the dilated sequence, as a logarithm to base 2. The published gate is
# log(sigmoid(x)) / 16 of a projection x that gets no gradient; here x is 0.
LOG2_DECAY = -1 / 16
# "gla" multiplies this many rows at once. The number changes nothing but rounding.
GLA_CHUNK = 64

# "random" hashes queries and keys from different seeds. A number of 32 bits times the multiplier
# fits the 64 bits of torch's integers, so that nothing overflows.
QUERY_SEED, KEY_SEED = 0x3C6EF372, 0x9E3779B9
HASH_MULTIPLIER = 0x45D9F3B
GOLDEN_RATIO = 0x9E3779B1
BITS_32, BITS_24 = 2**32 - 1, 2**24 - 1
NEGATIVE_ZERO = -(2**31)
# "random" turns this many columns into integers at once, because they take 8 bytes each.
HASHED_COLUMNS = 32


@torch.no_grad()
def score(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: PyramidGeometry,
    documents: torch.Tensor | None = None,
) -> Scores:
    """Scores of the configured scorer (arXiv 2605.06554, section 3.2).

    A position's two scores are each the largest in the group of query heads that share a key-value
    head. An entry scores the largest over the positions it covers, or, with
    ``entry_score = "first"``, what the first of them scores.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].
        documents: [B, N], for each position the first position of its document, a multiple of
            p^(L-1). A document's scores depend on its own positions.

    Returns:
        For each level from the base up, query and key scores, each [B, Hkv, N / p^l], float32.
    """
    scores = []
    for by_position in position_scores(q, k, v, geometry.config, documents):
        levels = [by_position.unflatten(1, (k.shape[1], -1)).amax(dim=2)]
        for span in geometry.spans[1:]:
            levels.append(_entry_scores(levels[0], span, geometry.config.entry_score))
        scores.append(levels)
    return list(zip(*scores, strict=True))


def _entry_scores(scores: torch.Tensor, span: int, entry_score: str) -> torch.Tensor:
    """Scores of the entries over ``span`` positions each, from those of positions [B, Hkv, N]."""
    if entry_score == "first":
        return scores[..., ::span]
    return scores.unflatten(-1, (-1, span)).amax(dim=-1)


def position_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two scores of every position: by query [B, Hq, N], by key [B, Hkv or Hq, N]."""
    scores = SCORER_FUNCTIONS[config.scorer].scores
    # Scorers that do not attend see one position at a time.
    if documents is None or not config.scorer_attends:
        return scores(q, k, v, config)
    return scores(q, k, v, config, documents)


def flops_per_position(config: LighthouseConfig, sequence_length: int, heads: int, d: int) -> float:
    """Floating-point operations of the scorer per position, in one layer.

    Args:
        heads: query heads Hq.
        d: head dimension D.
    """
    return SCORER_FUNCTIONS[config.scorer].flops(config, sequence_length, heads, d)


def _norms_of_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    return _norms(q), _norms(k)


def _norms_of_outputs(
    attend: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of what ``attend`` returns for q over k, and for k over q, each [B, Hq, N].

    The outputs stay in dilated order; only their norms are put back in the sequence's order.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (rows.repeat_interleave(group, dim=1) for rows in (k, v))
    q, k, v = (dilate(rows, config.dilation) for rows in (q, k, v))
    if documents is not None:
        # Residues may differ in where documents begin. They become sequences of the batch.
        layout = dilated_documents(documents, config.dilation)
        shape = q.shape
        q, k, v = (x.unflatten(1, (config.dilation, -1)).flatten(0, 1) for x in (q, k, v))
        by_query, by_key = (attend(*x, v, layout).reshape(shape) for x in ((q, k), (k, q)))
    else:
        by_query, by_key = attend(q, k, v), attend(k, q, v)
    return undilate(_norms(by_query), config.dilation), undilate(_norms(by_key), config.dilation)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=accumulation_dtype(rows.dtype))


def _hashes_of_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    return _hashes(q, QUERY_SEED), _hashes(k, KEY_SEED)


def _hashes(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Hashes in [0, 1) of the bits that each row has in float32, [B, H, N] of [B, H, N, D].

    Nothing else enters: no position, head or state of a generator. A recomputation, and any cut of
    the sequence into chunks, therefore gives the same hashes. Zeros of both signs are the same.
    """
    # All is exact in integers, so that the order of the sum does not matter. The weights keep the
    # sums of different rows apart. Plain sums of bfloat16, with 16 bits each, would often be equal.
    column = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    weights = (column * GOLDEN_RATIO & BITS_32) >> 12 | 1
    total = torch.zeros(rows.shape[:-1], dtype=torch.int64, device=rows.device)
    for values, weight in zip(
        rows.split(HASHED_COLUMNS, dim=-1), weights.split(HASHED_COLUMNS), strict=True
    ):
        bits = values.float().view(torch.int32)
        total += (bits.masked_fill(bits == NEGATIVE_ZERO, 0) * weight).sum(dim=-1)
    mixed = ((total ^ total >> 32) & BITS_32) ^ seed
    for _ in range(2):
        mixed = (mixed ^ mixed >> 16) * HASH_MULTIPLIER & BITS_32
    mixed = (mixed ^ mixed >> 16) & BITS_24
    return mixed.to(accumulation_dtype(rows.dtype)) * 2**-24


def dilate(rows: torch.Tensor, dilation: int) -> torch.Tensor:
    """[B, H, N, D] as [B, d H, N / d, D]; head r H + h holds the positions of residue r of head h.

    Nothing is copied if rows lie [B, N, H, D] in memory.
    """
    batch, heads, length, d = rows.shape
    rows = rows.transpose(1, 2).reshape(batch, length // dilation, dilation * heads, d)
    return rows.transpose(1, 2)


def undilate(norms: torch.Tensor, dilation: int) -> torch.Tensor:
    """[B, d H, N / d], in the order of ``dilate``, as [B, H, N]."""
    return norms.unflatten(1, (dilation, -1)).permute(0, 2, 3, 1).flatten(2)


def dilated_documents(documents: torch.Tensor, dilation: int) -> torch.Tensor:
    """A layout of documents [B, N] as [B d, N / d], one for each residue of the dilation d."""
    residue = torch.arange(dilation, device=documents.device)[:, None]
    first = documents.unflatten(1, (-1, dilation)).transpose(1, 2)
    # The number of positions of this residue that lie before the document.
    return ((first - residue + dilation - 1) // dilation).flatten(0, 1)


def dilated_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Stock causal attention of dilated rows, [B, H, N, D], within documents [B, N]."""
    if documents is not None:
        return document_attention(q, k, v, documents)
    backends = SDPA_BACKENDS
    if q.is_cuda and q.dtype == torch.float64:
        # No other backend computes float64 on a GPU.
        backends = [SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def gated_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Simple gated linear attention with one decay for all heads and steps, without a softmax.

    out_t = sum over s <= t of 2^(LOG2_DECAY (t - s)) (q_t . k_s) v_s / sqrt(D)

    Args:
        q, k, v: [B, H, N, D].
        documents: [B, N], for each position the first position of its document, from which the
            sum runs; without them it runs from the beginning.

    Returns:
        [B, H, N, D], in the precision of sums.
    """
    dtype = accumulation_dtype(q.dtype)
    q = q.to(dtype) / math.sqrt(q.shape[-1])
    k, v = k.to(dtype), v.to(dtype)
    steps = torch.arange(GLA_CHUNK, device=q.device)
    decay = torch.exp2(LOG2_DECAY * torch.arange(GLA_CHUNK + 1, device=q.device, dtype=dtype))
    weights = decay[(steps[:, None] - steps).clamp(min=0)].tril()
    # The state sums the decayed outer products of all earlier chunks' keys and values.
    state = q.new_zeros(*q.shape[:2], q.shape[3], q.shape[3])
    outputs = []
    for number, (q_rows, k_rows, v_rows) in enumerate(
        zip(*(rows.split(GLA_CHUNK, dim=2) for rows in (q, k, v)), strict=True)
    ):
        n = q_rows.shape[2]
        within, passed, remaining = (
            weights[:n, :n],
            decay[1 : n + 1, None],
            decay[n - 1 - steps[:n]],
        )
        kept, remaining = decay[n], remaining[:, None]
        if documents is not None:
            begin = number * GLA_CHUNK
            first = documents[:, None, begin : begin + n]
            # The state holds the last document before this chunk, and then the last one of it.
            goes_on, to_end = first < begin, first == first[..., -1:]
            within = within * (first[..., None] == first[..., None, :])
            passed, remaining = passed * goes_on[..., None], remaining * to_end[..., None]
            kept = kept * goes_on[..., -1, None, None]
        inside = (q_rows @ k_rows.mT * within) @ v_rows
        outputs.append(inside + passed * (q_rows @ state))
        state = kept * state + (k_rows * remaining).mT @ v_rows
    return torch.cat(outputs, dim=2)


def _no_flops(config: LighthouseConfig, sequence_length: int, heads: int, d: int) -> float:
    return 0.0


def _dilated_flops(config: LighthouseConfig, sequence_length: int, heads: int, d: int) -> float:
    """Two passes over (N / d + 1) / 2 earlier positions, 4 D for each pair and head."""
    return 2 * 4 * heads * d * ((sequence_length / config.dilation + 1) / 2)


def _gla_flops(config: LighthouseConfig, sequence_length: int, heads: int, d: int) -> float:
    """Two passes; each adds to a state of D x D and multiplies with it, 4 D^2 for each head."""
    return 2 * 4 * heads * d * float(d)


class ScorerFunctions(NamedTuple):
    """One scorer's part of this file.

    Attributes:
        scores: takes q [B, Hq, N, D], k and v [B, Hkv, N, D] and the configuration; returns the
            two scores of each position, [B, Hq, N] and [B, Hkv or Hq, N]. One that attends also
            takes a layout of documents [B, N].
        flops: takes the configuration, N, Hq and D; returns the operations per position.
    """

    scores: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    flops: Callable[[LighthouseConfig, int, int, int], float]


SCORER_FUNCTIONS: dict[str, ScorerFunctions] = {
    "norm": ScorerFunctions(_norms_of_inputs, _no_flops),
    "dilated": ScorerFunctions(partial(_norms_of_outputs, dilated_attention), _dilated_flops),
    "gla": ScorerFunctions(partial(_norms_of_outputs, gated_linear_attention), _gla_flops),
    "random": ScorerFunctions(_hashes_of_inputs, _no_flops),
}
