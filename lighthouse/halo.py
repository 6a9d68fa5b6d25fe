"""Attention over a window in chunks: the first positions of a chunk see keys of the chunk before.

The attention is one operation forward and one backward. The rank that holds the sequence's first
chunk computes it in two parts. A compiler that saw them would make another graph for this rank, and
might repeat an exchange in backward on the other ranks alone, which would wait for it in vain.

Shapes: B batch, Hq query heads, Hkv key-value heads, M chunks on this rank, C positions of a chunk,
D head dimension, W positions of the window.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .context_parallel import ContextParallel
from .implementation import operations_by
from .precision import accumulation_dtype

SETTINGS = "SymInt window, float scale, str impl, int first, int held"


def window_in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    impl: str,
    layout: ContextParallel,
    *others: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Attend over the window of each position, in its own chunk and in the one before.

    Args:
        q: [B M, Hq, C, D].
        k, v: [B M, Hkv, C, D].
        window, scale, impl: as in ``lighthouse.window_attention``.
        others: rows [B M, ...] that cross from chunk to chunk in the same collective.

    Returns:
        out [B M, Hq, C, D], lse [B M, Hq, C], and the rows that came for ``others``.
    """
    # The windows of the next chunk reach these. If a position sees itself alone, there are none.
    halo = tuple(x[:, :, x.shape[2] - (window - 1) :] for x in (k, v))
    crossing = (*others, *halo) if window > 1 else others
    before = layout.exchange(*crossing) if crossing else ()
    halo = before[len(others) :] or halo
    results = _HaloWindow.apply(q, k, v, *halo, window, scale, impl, layout.first, len(layout.held))
    return *results, *before[: len(others)]


class _HaloWindow(torch.autograd.Function):
    """One operation forward and one backward, which computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_before: torch.Tensor,
        v_before: torch.Tensor,
        window: int,
        scale: float,
        impl: str,
        first: int,
        held: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.constants = window, scale, impl, first, held
        out, lse = torch.ops.lighthouse.halo_window(q, k, v, k_before, v_before, *ctx.constants)
        ctx.save_for_backward(q, k, v, k_before, v_before, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  One gradient for each of the two outputs.
    def backward(
        ctx: Any, dout: torch.Tensor, dlse: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        grads = torch.ops.lighthouse.halo_window_backward(
            dout, dlse, *ctx.saved_tensors, *ctx.constants
        )
        return *grads, None, None, None, None, None


def _with_keys_before(
    rows: list[torch.Tensor], first: int, held: int
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Parts of a rank's chunks that can be computed at once, and which of the M chunks they are.

    Args:
        rows: k_before, v_before, k, v and others, [B M, ...] each.

    Yields:
        Chunks, and their keys, their values and others, the keys and values with those before.
        No keys come before the sequence's first chunk, whose halo is zeros.
    """
    parts = [slice(place, place + 1) for place in range(held)] if first >= 0 else [slice(0, held)]
    for part in parts:
        k_before, v_before, k, v, *others = (
            x.unflatten(0, (-1, held))[:, part].flatten(0, 1) for x in rows
        )
        if part.start != first:
            k, v = torch.cat([k_before, k], dim=2), torch.cat([v_before, v], dim=2)
        yield part, [k, v, *others]


def _sequence_first(x: torch.Tensor) -> torch.Tensor:
    """Memory for rows like ``x`` [B M, H, C, D] that lies as [B M, C, H, D]."""
    return x.new_empty([x.shape[place] for place in (0, 2, 1, 3)]).transpose(1, 2)


@torch.library.custom_op(
    "lighthouse::halo_window",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor k_before, Tensor v_before, "
    f"{SETTINGS}) -> (Tensor, Tensor)",
)
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_before: torch.Tensor,
    v_before: torch.Tensor,
    window: int,
    scale: float,
    impl: str,
    first: int,
    held: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    attend, _ = operations_by(impl)
    out, lse = _sequence_first(q), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    rows = [k_before, v_before, k, v, q]
    for part, (keys, values, queries) in _with_keys_before(rows, first, held):
        results = attend(queries, keys, values, window, scale)
        for into, found in zip((out, lse), results, strict=True):
            into = into.unflatten(0, (-1, held))[:, part]
            into.copy_(found.unflatten(0, (len(into), -1)))
    return out, lse


@_forward.register_fake
def _(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _sequence_first(q), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op(
    "lighthouse::halo_window_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor k_before, "
    f"Tensor v_before, Tensor out, Tensor lse, {SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_before: torch.Tensor,
    v_before: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
    impl: str,
    first: int,
    held: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _, backward = operations_by(impl)
    grads = [_sequence_first(x) for x in (q, k, v, k_before, v_before)]
    count = k_before.shape[2]
    rows = [k_before, v_before, k, v, dout, dlse, q, out, lse]
    for part, (keys, values, *others) in _with_keys_before(rows, first, held):
        dout_here, dlse_here, queries, out_here, lse_here = others
        dq, dk, dv = backward(
            dout_here,
            dlse_here,
            queries,
            keys,
            values,
            out_here,
            lse_here.contiguous(),
            window,
            scale,
        )
        before = 0 if part.start == first else count
        found = dq, dk[:, :, before:], dv[:, :, before:], dk[:, :, :before], dv[:, :, :before]
        for into, rows_here in zip(grads, found, strict=True):
            into = into.unflatten(0, (-1, held))[:, part]
            if rows_here.shape[2] == into.shape[3]:
                into.copy_(rows_here.unflatten(0, (len(into), -1)))
            else:
                into.zero_()
    dq, dk, dv, dk_before, dv_before = grads
    return dq, dk, dv, dk_before, dv_before


@_backward.register_fake
def _(
    dout: torch.Tensor, dlse: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, k_before, v_before = (_sequence_first(x) for x in others[:5])
    return q, k, v, k_before, v_before
