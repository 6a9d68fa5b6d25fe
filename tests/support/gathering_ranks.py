"""Attention over the parts of all ranks that gathers them on every rank, for tests.

It takes the place of the ring. Chunks lie as a ``ContextParallel`` says.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lighthouse import ContextParallel
from lighthouse.geometry import PyramidGeometry


def gathered(rows: torch.Tensor, layout: ContextParallel) -> torch.Tensor:
    """[B, H, N, ...] of all ranks in the order of the sequence."""
    parts = [torch.empty_like(rows) for _ in range(layout.world_size)]
    dist.all_gather(parts, rows.contiguous(), group=layout.group)
    chunks = {}
    for rank, part in enumerate(parts):
        held = layout.held_by(rank)
        chunks |= dict(zip(held, part.chunk(len(held), dim=2), strict=True))
    return torch.cat([chunks[number] for number in range(layout.chunks)], dim=2)


def forward(
    layout: ContextParallel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the whole sequence, within ``documents`` [B, N] if there are some."""
    q, k, v = (gathered(x, layout) for x in (q, k, v))
    if documents is not None:
        assert documents.shape == (q.shape[0], q.shape[2])
    out, lse = torch.ops.lighthouse.window(q, k, v, q.shape[2], scale, documents)
    return layout.take(out, dim=2), layout.take(lse, dim=2)


def backward(
    layout: ContextParallel,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of that out, by the given output and logsumexp, which a merge replaces."""
    dlse = None if dlse is None else gathered(dlse, layout)
    dout, *rows = (gathered(x, layout) for x in (dout, q, k, v, out, lse))
    more = rows[0].shape[2], scale, documents
    grads = torch.ops.lighthouse.window_backward(dout, dlse, *rows, *more)
    return tuple(layout.take(grad, dim=2).contiguous() for grad in grads)


def with_operations(layout: ContextParallel) -> ContextParallel:
    operations: Any = partial(forward, layout), partial(backward, layout)
    return ContextParallel(
        layout.group, layout.rank, layout.world_size, layout.balanced, operations
    )


def slot_of_chunk(
    slot: torch.Tensor, geometry: PyramidGeometry, chunks: int, number: int
) -> torch.Tensor:
    """The part of a whole sequence's slot [B, Hkv, P] that chunk ``number`` selects by itself."""
    parts = [
        slot[..., offset : offset + length].unflatten(-1, (chunks, -1))[..., number, :]
        for offset, length in zip(geometry.offsets, geometry.lengths, strict=True)
    ]
    found = torch.cat(parts, dim=-1)
    places = geometry.gathered_length // chunks
    return torch.where(found >= 0, found - number * places, -1)
