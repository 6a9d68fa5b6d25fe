"""Attention over a window in chunks: the first positions of a chunk see keys of the chunk before.

Shapes: B batch, Hq query heads, Hkv key-value heads, M chunks on this rank, C positions of a chunk,
D head dimension, W positions of the window.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .context_parallel import ContextParallel

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def halo_of(k: torch.Tensor, v: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last keys and values of chunks, which the windows of the chunks after them reach.

    Args:
        k, v: [B M, Hkv, C, D].

    Returns:
        Both, [B M, Hkv, W - 1, D].
    """
    first = k.shape[2] - (window - 1)
    return k[:, :, first:], v[:, :, first:]


def attend_with_halo(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    halo: Sequence[torch.Tensor],
    layout: ContextParallel,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the window of each position, in its own chunk and in the one before.

    Args:
        attend: returns output and logsumexp for q, k and v, of which the last query is at the place
            of the last key.
        q: [B M, Hq, C, D].
        k, v: [B M, Hkv, C, D].
        halo: keys and values before them, [B M, Hkv, W - 1, D].

    Returns:
        out [B M, Hq, C, D] and lse [B M, Hq, C].
    """

    def with_keys_before(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, k_before, v_before = rows
        return attend(q, torch.cat([k_before, k], dim=2), torch.cat([v_before, v], dim=2))

    if 0 not in layout.held:
        return with_keys_before(q, k, v, *halo)
    results = []
    for place, chunk in enumerate(layout.held):
        own = [x.unflatten(0, (-1, len(layout.held)))[:, place] for x in (q, k, v, *halo)]
        if chunk == 0:
            # No keys come before the first chunk. Even so its halo, which is zeros, stays among
            # the arguments: the other ranks wait for its part in the backward of the exchange.
            own[3:] = [x[:, :, :0] for x in own[3:]]
        results.append(with_keys_before(*own))
    outs, lses = zip(*results, strict=True)
    # Outputs lie in memory as [B, M, C, H, D], so that chunks are joined without a copy.
    out = torch.stack([x.transpose(1, 2) for x in outs], dim=1).flatten(0, 1).transpose(1, 2)
    return out, torch.stack(lses, dim=1).flatten(0, 1)


def neighbourhood(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    layout: ContextParallel,
    *others: torch.Tensor,
) -> tuple[Any, ...]:
    """Exchange the halo, and ``others`` with it, and attend over the window.

    Args:
        q, k, v: chunks, as in ``attend_with_halo``.
        others: rows [B M, ...] that cross from chunk to chunk in the same collective.

    Returns:
        out [B M, Hq, C, D], lse [B M, Hq, C], and the rows that came for ``others``.
    """
    halo = halo_of(k, v, window)
    # A position that sees itself alone needs nothing of the chunk before, and the halo is empty.
    crossing = (*others, *halo) if window > 1 else others
    before = layout.exchange(*crossing) if crossing else ()
    halo = before[len(others) :] or halo
    return *attend_with_halo(attend, q, k, v, halo, layout), *before[: len(others)]
