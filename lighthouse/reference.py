"""The oracle: Lighthouse attention entry by entry, as the definition reads, with plain autograd.

The attention over a window is here too, position by position.

It is slow, and meant for comparison in float64. It shares only the configuration and the geometry
with the code that it judges.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, S gathered
length, P pyramid length.
"""

import itertools
import math
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .config import LighthouseConfig
from .geometry import PyramidGeometry

# An entry is its level and its number within the level.
Entry = tuple[int, int]
Rows = tuple[torch.Tensor, torch.Tensor]


def lighthouse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    *,
    selection: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments and result as ``lighthouse.lighthouse_attention``, computed in q's precision.

    A document is computed alone, from the entries that are its own.
    """
    geometry = PyramidGeometry(config, q.shape[2])
    index = (selection or select(q, k, v, config, documents=documents))[0]
    group = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {"scale": scale, "documents": documents}
    near = window_attention(q, k, v, config.window, **options) if config.window else None
    batches = []
    for batch in range(q.shape[0]):
        heads = []
        for head in range(q.shape[1]):
            kv_head = head // group
            entries = [_entry(geometry, i) for i in index[batch, kv_head].tolist()]
            parts = []
            for positions in _documents(geometry.sequence_length, documents, batch):
                own = [e for e in entries if positions.start <= _end(geometry, e) < positions.stop]
                queries, keys, values = (
                    torch.stack([_mean(geometry, rows, entry) for entry in own])
                    for rows in (q[batch, head], k[batch, kv_head], v[batch, kv_head])
                )
                if near is None:
                    out = _causal_attention(queries, keys, values, scale)
                    parts.append(_scatter_back(geometry, own, out, positions))
                else:
                    window = near[0][batch, head, positions], near[1][batch, head, positions]
                    rows = queries, keys, values
                    parts.append(_merged(geometry, own, *rows, window, scale, positions))
            heads.append(torch.cat(parts))
        batches.append(torch.stack(heads))
    return torch.stack(batches)


def _documents(sequence_length: int, documents: torch.Tensor | None, batch: int) -> list[slice]:
    """The positions of each document of a row of the batch, from a layout [B, N].

    Without one, the whole sequence is one document.
    """
    firsts = [0] if documents is None else sorted(set(documents[batch].tolist()))
    return list(map(slice, firsts, [*firsts[1:], sequence_length]))


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Arguments and result as ``lighthouse.document_attention``."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for batch, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        parts = _documents(q.shape[2], documents, batch)
        queries, keys, values = q[batch, head], k[batch, head // group], v[batch, head // group]
        alone = [_causal_attention(queries[x], keys[x], values[x], scale) for x in parts]
        rows.append(torch.cat(alone))
    return torch.stack(rows).unflatten(0, q.shape[:2])


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    *,
    scale: float | None = None,
    documents: torch.Tensor | None = None,
) -> Rows:
    """Arguments as ``lighthouse.window_attention``; out [B, Hq, N, D] and lse [B, Hq, N]."""
    if documents is not None:
        batches = []
        for batch in range(q.shape[0]):
            here = [(slice(batch, batch + 1), slice(None), part)
                    for part in _documents(q.shape[2], documents, batch)]  # fmt: skip
            alone = [window_attention(q[x], k[x], v[x], window, scale=scale) for x in here]
            batches.append([torch.cat(x, dim=2) for x in zip(*alone, strict=True)])
        together, together_lse = (torch.cat(x) for x in zip(*batches, strict=True))
        return together, together_lse
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    out, lse = [], []
    for head in range(q.shape[1]):
        keys, values = k[:, head // group], v[:, head // group]
        for position in range(q.shape[2]):
            seen = slice(max(0, position - window + 1), position + 1)
            scores = scale * (keys[:, seen] @ q[:, head, position, :, None]).squeeze(-1)
            lse.append(scores.logsumexp(dim=-1))
            out.append((scores.softmax(dim=-1)[:, None] @ values[:, seen]).squeeze(1))
    return (
        torch.stack(out, dim=1).unflatten(1, q.shape[1:3]),
        torch.stack(lse, dim=1).unflatten(1, q.shape[1:3]),
    )


def strided_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    stride: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Arguments and result as ``lighthouse.strided_attention``."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    out = []
    for head in range(q.shape[1]):
        keys, values = k[:, head // group], v[:, head // group]
        for position in range(q.shape[2]):
            # Each key as often as it counts.
            seen: list[int] = []
            for block in range(position // stride + 1):
                own = range(block * stride, min((block + 1) * stride, position + 1))
                near = block > position // stride - window // stride
                seen += own if near else [own[-1]] * stride
            scores = scale * (keys[:, seen] @ q[:, head, position, :, None]).squeeze(-1)
            out.append((scores.softmax(dim=-1)[:, None] @ values[:, seen]).squeeze(1))
    return torch.stack(out, dim=1).unflatten(1, q.shape[1:3])


@torch.no_grad()
def select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    *,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as ``lighthouse.select``: index [B, Hkv, S], slot [B, Hkv, P]."""
    geometry = PyramidGeometry(config, q.shape[2])
    group = q.shape[1] // k.shape[1]
    shape = (q.shape[0], k.shape[1])
    index = torch.empty(*shape, geometry.gathered_length, dtype=torch.int32)
    slot = torch.full((*shape, geometry.pyramid_length), -1, dtype=torch.int32)
    for batch in range(shape[0]):
        for head in range(shape[1]):
            queries = q[batch, head * group : (head + 1) * group]
            parts = _documents(geometry.sequence_length, documents, batch)
            a, b = [], []
            for part in parts:
                own = k[batch, head, part], v[batch, head, part]
                scored = [_scored_rows(rows[part], *own, config) for rows in queries]
                for found, rows in zip((a, b), zip(*scored, strict=True), strict=True):
                    found += [max(row) for row in zip(*map(_norms, rows), strict=True)]
            included = _included(geometry, a, b, parts)
            entries = sorted(included, key=lambda e: (_end(geometry, e), e[0]))
            for place, entry in enumerate(entries):
                pyramid_index = geometry.offsets[entry[0]] + entry[1]
                index[batch, head, place] = pyramid_index
                slot[batch, head, pyramid_index] = place
    return index.to(q.device), slot.to(q.device)


def _scored_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> Rows:
    """Rows whose norms score the queries and the keys of one head, each [N, D].

    They are computed in float32, or in float64 for float64 inputs, as scores are defined.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (rows.to(dtype) for rows in (q, k, v))
    return SCORED_ROWS[config.scorer](q, k, v, config)


def _rows_themselves(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> Rows:
    return q, k


def _attended_rows(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
) -> Rows:
    """Outputs of ``attend`` for q over k and for k over q, one residue class after the other."""
    by_query, by_key = torch.empty_like(q), torch.empty_like(q)
    for residue in range(min(config.dilation, len(q))):
        here = slice(residue, None, config.dilation)
        by_query[here] = attend(q[here], k[here], v[here])
        by_key[here] = attend(k[here], q[here], v[here])
    return by_query, by_key


def _hashed_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> Rows:
    """Hashes of the rows of q and k, each [N, 1]. The norm of one column is the hash itself."""
    by_query, by_key = (
        torch.tensor([[_hash(row, seed)] for row in rows.float().tolist()], dtype=rows.dtype)
        for rows, seed in ((q, 0x3C6EF372), (k, 0x9E3779B9))
    )
    return by_query, by_key


def _hash(row: list[float], seed: int) -> float:
    """A number in [0, 1) from the bits that the D values of a row have in float32."""
    total = 0
    for column, value in enumerate(row, start=1):
        # Zero has one pattern of bits, whatever its sign.
        (bits,) = struct.unpack("<i", struct.pack("<f", value or 0.0))
        weight = column * 0x9E3779B1 % 2**32 // 2**12
        total += bits * (weight if weight % 2 else weight + 1)
    # The upper and the lower half of 64 bits, in two's complement, then two rounds of mixing.
    mixed = ((total // 2**32 ^ total) % 2**32) ^ seed
    for _ in range(2):
        mixed = (mixed // 2**16 ^ mixed) * 0x45D9F3B % 2**32
    return (mixed // 2**16 ^ mixed) % 2**24 / 2**24


def _norms(rows: torch.Tensor) -> list[float]:
    return torch.linalg.vector_norm(rows, dim=-1).tolist()


def _included(
    geometry: PyramidGeometry, a: list[float], b: list[float], documents: list[slice]
) -> set[Entry]:
    """The included entries, of documents that share the picks of each stratum.

    Pick i of m belongs to the document at coarsest entry ceil((i + 1) C / m) - 1 of the stratum's
    C. A pick of an even number is by query.
    """
    p, m = geometry.config.pooling_factor, geometry.config.picks_per_stratum
    coarsest = geometry.config.levels - 1
    bounds = geometry.stratum_bounds
    included = {(coarsest, i) for i in range(geometry.lengths[coarsest])}
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        owners = [first + -(-(i + 1) * (last - first) // m) - 1 for i in range(m)]
        for document in documents:
            own = range(document.start // geometry.spans[-1], document.stop // geometry.spans[-1])
            candidates = [i for i in range(first, last) if i in own]
            dealt = [number for number, owner in enumerate(owners) if owner in own]
            by_query = sum(number % 2 == 0 for number in dealt)
            for level in range(coarsest, 0, -1):
                span = geometry.spans[level]
                picks: list[int] = []
                for scores, count in ((a, by_query), (b, len(dealt) - by_query)):
                    rest = [i for i in candidates if i not in picks]
                    # Python's sort is stable: of equal scores the lower entry stays first.
                    counted = span if geometry.config.entry_score == "max" else 1
                    rest.sort(
                        key=lambda i: max(scores[i * span : i * span + counted]), reverse=True
                    )  # noqa: B023
                    picks += rest[:count]
                candidates = sorted(i * p + child for i in picks for child in range(p))
                included |= {(level - 1, i) for i in candidates}
    return included


def _entry(geometry: PyramidGeometry, pyramid_index: int) -> Entry:
    level = max(l for l, offset in enumerate(geometry.offsets) if offset <= pyramid_index)  # noqa: E741
    return level, pyramid_index - geometry.offsets[level]


def _end(geometry: PyramidGeometry, entry: Entry) -> int:
    """The last position that the entry covers."""
    level, number = entry
    return (number + 1) * geometry.spans[level] - 1


def _mean(geometry: PyramidGeometry, rows: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Mean [D] of the base rows [N, D] that the entry covers."""
    end = _end(geometry, entry)
    return rows[end - geometry.spans[entry[0]] + 1 : end + 1].mean(dim=0)


def _gated_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Simple gated linear attention of one head, [N, D], one step after the other."""
    # The published gate is the sigmoid of a projection that never gets a gradient. Here the
    # projection is zero.
    decay = math.exp(math.log(1 / (1 + math.exp(0))) / 16)
    state = q.new_zeros(q.shape[-1], q.shape[-1])
    rows = []
    for query, key, value in zip(q, k, v, strict=True):
        state = decay * state + torch.outer(key, value)
        rows.append(query @ state / math.sqrt(q.shape[-1]))
    return torch.stack(rows)


def _causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Softmax attention of one head, [S, D]."""
    scores = q @ k.T * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v


# For each scorer, the two rows [N, D] whose norms score one head.
SCORED_ROWS: dict[str, Callable[..., Rows]] = {
    "norm": _rows_themselves,
    "dilated": partial(_attended_rows, _causal_attention),
    "gla": partial(_attended_rows, _gated_linear_attention),
    "random": _hashed_rows,
}


def _merged(
    geometry: PyramidGeometry,
    entries: list[Entry],
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: Rows,
    scale: float | None,
    positions: slice,
) -> torch.Tensor:
    """One head of one document, [N, D]: the finest entry that reaches a position and its window.

    Both are taken as sums of values that are not yet divided: the result is the sum of both over
    the sum of both divisors.

    Args:
        queries, keys, values: pooled rows of the entries, [S, D].
        window: output [N, D] and logsumexp [N] of the window.
        positions: the document's N positions.
    """
    scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    scores = (scale * (queries @ keys.T)).exp().tril()
    sums, divisors = scores @ values, scores.sum(dim=-1)
    rows = []
    reached = _reaching(geometry, entries, positions)
    for near, near_lse, reaching in zip(*window, reached, strict=True):
        numerator, divisor = near_lse.exp() * near, near_lse.exp()
        if reaching:
            _, place = min(reaching)
            numerator, divisor = numerator + sums[place], divisor + divisors[place]
        rows.append(numerator / divisor)
    return torch.stack(rows)


def _reaching(
    geometry: PyramidGeometry, entries: list[Entry], positions: slice
) -> list[list[tuple[int, int]]]:
    """For every position of a document, level and place of its entries whose outputs reach it.

    An entry reaches as many positions as it covers, from its end on.
    """
    first = positions.start
    reaching: list[list[tuple[int, int]]] = [[] for _ in range(first, positions.stop)]
    for place, entry in enumerate(entries):
        end = _end(geometry, entry)
        for position in range(end, min(end + geometry.spans[entry[0]], positions.stop)):
            reaching[position - first].append((entry[0], place))
    return reaching


def _scatter_back(
    geometry: PyramidGeometry, entries: list[Entry], out: torch.Tensor, positions: slice
) -> torch.Tensor:
    """Every entry's output [S, D] over the span of positions from its end on, [N, D].

    The entries and the N ``positions`` are those of one document.

    Where several levels meet, ``combine`` says whether their outputs are added up or the lowest
    level's is taken alone.
    """
    reaching = _reaching(geometry, entries, positions)
    if geometry.config.combine == "finest":
        reaching = [sorted(found)[:1] for found in reaching]
    zero = torch.zeros_like(out[0])
    return torch.stack([sum((out[place] for _, place in found), zero) for found in reaching])
