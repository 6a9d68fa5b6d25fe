"""Attention over a window in chunks: the first positions of a chunk see keys of the chunk before.

The attention is one operation forward and one backward. The rank that holds the sequence's first
chunk computes the first positions of its chunks one chunk at a time, because no keys come before
that one. A compiler that saw this would make another graph for this rank. It might then repeat an
exchange in backward on the other ranks alone, which would wait for it in vain.

Shapes: B batch, Hq query heads, Hkv key-value heads, M chunks on this rank, C positions of a chunk,
D head dimension, W positions of the window.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .context_parallel import ContextParallel
from .document_chunks import ChunkDocuments
from .flash import repeating_bits
from .implementation import layout_for, operations_by
from .memory_layout import sequence_first
from .precision import accumulation_dtype

SETTINGS = (
    "SymInt window, float scale, str impl, int first, int held, Tensor? own=None, Tensor? seen=None"
)
# The operations take these two of documents; ``layouts_in_chunks`` makes them.
Layouts = tuple[torch.Tensor | None, torch.Tensor | None]
NO_DOCUMENTS: Layouts = None, None


def layouts_in_chunks(
    impl: str, documents: ChunkDocuments | None, window: int, most_documents: int | None
) -> Layouts:
    """What the operations take of documents.

    Args:
        most_documents: documents that the batch has at most, as in ``window_attention``.

    Returns:
        What ``layout_for`` gives for the chunks, and how many of the W - 1 keys before a chunk its
        first document sees, [B M]; twice None without documents.
    """
    if documents is None:
        return NO_DOCUMENTS
    if most_documents is not None:
        # Each chunk may begin with a document that began before it.
        most_documents += len(documents.before)
    (own,) = layout_for(impl, documents.own, most_documents)
    return own, documents.before.clamp(max=window - 1)


def window_in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    impl: str,
    layout: ContextParallel,
    layouts: Layouts = NO_DOCUMENTS,
    *others: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Attend over the window of each position, in its own chunk and in the one before.

    Args:
        q: [B M, Hq, C, D].
        k, v: [B M, Hkv, C, D].
        window, scale, impl: as in ``lighthouse.window_attention``.
        layouts: from ``layouts_in_chunks``.
        others: rows [B M, ...] that cross from chunk to chunk in the same collective.

    Returns:
        out [B M, Hq, C, D], lse [B M, Hq, C], and the rows that came for ``others``.
    """
    return _HaloWindow.apply(q, k, v, window, scale, impl, layout, *layouts, *others)


def seams_and_halo(
    seams: Sequence[torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    layout: ContextParallel,
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Send what each chunk needs of the one before it, in one collective, without autograd.

    Args:
        seams: rows [B M, ...].
        k, v: [B M, Hkv, C, D].

    Returns:
        The seams, and keys and values [B M, Hkv, W - 1, D], of the chunk before.
    """
    # The windows of the next chunk reach these. If a position sees itself alone, there are none.
    halo = tuple(x[:, :, x.shape[2] - (window - 1) :] for x in (k, v))
    crossing = (*seams, *halo) if window > 1 else tuple(seams)
    before = layout.send(*crossing) if crossing else ()
    return before[: len(seams)], before[len(seams) :] or halo


def gradients_of_seams(
    dseams: Sequence[torch.Tensor],
    dhalo: Sequence[torch.Tensor],
    onto: Sequence[torch.Tensor],
    layout: ContextParallel,
) -> Sequence[torch.Tensor]:
    """Send the gradients of ``seams_and_halo`` back to the chunks that its results came from.

    Args:
        dseams, dhalo: gradients of its results.
        onto: gradients of k and v, which are given those of the halo besides.

    Returns:
        The gradients of the seams.
    """
    crossing = (*dseams, *dhalo) if dhalo[0].shape[2] else tuple(dseams)
    came = layout.send(*crossing, step=-1) if crossing else ()
    halo = came[len(dseams) :]
    # Not strict=bool(halo): torch 2.11 cannot trace bool of a list.
    if halo:
        for rows, part in zip(onto, halo, strict=True):
            torch.ops.lighthouse.add_to_last_rows(rows, part)
    return came[: len(dseams)]


class _HaloWindow(torch.autograd.Function):
    """One exchange and one operation each way. Backward computes the probabilities again.

    If autograd saw the halo, it would add its gradient to a whole tensor of zeros.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        # As ``ContextParallel.exchange`` says, there may not be as many arguments as parameters.
        q, k, v, window, scale, impl, layout, own, seen, *others = arguments
        came, halo = seams_and_halo(others, k, v, window, layout)
        settings = window, scale, impl, layout.first, len(layout.held)
        out, lse = torch.ops.lighthouse.halo_window(q, k, v, *halo, *settings, own, seen)
        ctx.save_for_backward(q, k, v, *halo, out, lse, own, seen)
        ctx.constants = settings, layout
        return out, lse, *came

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  One gradient for each of the outputs.
    def backward(
        ctx: Any, dout: torch.Tensor, dlse: torch.Tensor, *dothers: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        settings, layout = ctx.constants
        *rows, own, seen = ctx.saved_tensors
        dq, dk, dv, *dhalo = torch.ops.lighthouse.halo_window_backward(
            dout, dlse, *rows, *settings, own, seen
        )
        sent_back = gradients_of_seams(dothers, dhalo, (dk, dv), layout)
        # Arguments between the rows.
        return dq, dk, dv, *[None] * 6, *sent_back


def _beginnings(
    rows: list[torch.Tensor], count: int, first: int, held: int
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Chunks that can be computed at once, and the first ``count`` positions of these.

    Args:
        rows: k_before, v_before, k, v and others, [B M, ...] each.

    Yields:
        A slice of the chunks on this rank, and the keys, values and others of their first
        positions. Keys and values are joined with those before the chunk. None come before the
        sequence's first chunk, whose halo is zeros.
    """
    parts = [slice(place, place + 1) for place in range(held)] if first >= 0 else [slice(0, held)]
    for part in parts:
        k_before, v_before, k, v, *others = (
            x.unflatten(0, (-1, held))[:, part, :, :count].flatten(0, 1) for x in rows
        )
        if part.start != first:
            k, v = torch.cat([k_before, k], dim=2), torch.cat([v_before, v], dim=2)
        yield part, [k, v, *others]


def _of_beginnings(
    impl: str, own: torch.Tensor | None, seen: torch.Tensor | None, reach: int, length: int
) -> tuple[torch.Tensor, ...]:
    """What the operations take of documents for the first ``reach`` positions of all chunks."""
    if own is None or seen is None:
        return ()
    if impl == "flash":
        # Documents that begin later become empty.
        return own // length * reach + (own % length).clamp(max=reach), seen
    first = own[:, :reach]
    # The first key that a query may see, if ``reach`` keys come before the chunk.
    return (reach + first - torch.where(first == 0, seen[:, None], 0),)


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """``x`` as ``sequence_first`` lays it out, copied if need be."""
    return x if x.transpose(1, 2).is_contiguous() else sequence_first(x, x.shape[2]).copy_(x)


def _put(rows: torch.Tensor, into: torch.Tensor, part: slice, held: int, add: bool = False) -> None:
    """Write ``rows`` of some chunks to the first positions of ``into`` [B M, ...], or add them."""
    into = into.unflatten(0, (-1, held))[:, part, :, : rows.shape[2]]
    rows = rows.unflatten(0, (len(into), -1))
    into.add_(rows) if add else into.copy_(rows)


@torch.library.custom_op(
    "lighthouse::add_to_last_rows",
    mutates_args=("rows",),
    schema="(Tensor(a!) rows, Tensor part) -> ()",
)
def add_to_last_rows(rows: torch.Tensor, part: torch.Tensor) -> None:
    """Add ``part`` [B M, H, R, D] to the last R positions of ``rows`` [B M, H, C, D].

    A compiler would make of the same sum in PyTorch a kernel that reads and writes all C positions.
    """
    rows[:, :, rows.shape[2] - part.shape[2] :] += part


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
    own: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within all chunks, then again at their first positions, with the keys before.

    With documents, nothing of the first chunk's halo is seen, so it needs no call of its own.
    """
    attend, _ = operations_by(impl)
    out, lse = attend(q, k, v, window, scale, *(() if own is None else (own,)))
    out, reach = _laid_out(out), k_before.shape[2]
    if not reach:
        return out, lse
    rows, first = [k_before, v_before, k, v, q], first if own is None else -1
    of_documents = _of_beginnings(impl, own, seen, reach, q.shape[2])
    for part, (keys, values, queries) in _beginnings(rows, reach, first, held):
        # No keys come before the sequence's first chunk.
        if part.start == first:
            continue
        found = attend(queries, keys, values, window, scale, *of_documents)
        for into, result in zip((out, lse), found, strict=True):
            _put(result, into, part, held)
    return out, lse


@_forward.register_fake
def _(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    return sequence_first(q, q.shape[2]), lse


@torch.library.custom_op(
    "lighthouse::halo_window_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor k_before, "
    f"Tensor v_before, Tensor out, Tensor lse, {SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
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
    own: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients from queries that see no keys before their chunk, and then from the others.

    Only a chunk's first keys and values are then joined with those before it, and not all of them.
    With documents, the operations take as many queries as keys. The first call then takes all
    queries, and gradients of zero at those that the second one takes.
    """
    _, backward = operations_by(impl)
    reach, length = k_before.shape[2], q.shape[2]
    rows = [dout, q, out, lse, *([] if dlse is None else [dlse])]

    def gradients(
        keys: torch.Tensor, values: torch.Tensor, rows: list[torch.Tensor], *layouts: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        dout, q, out, lse, *dlse = rows
        tensors = dout, dlse[0] if dlse else None, q, keys, values, out, lse.contiguous()
        # The window may hold all keys of a part, though not of the sequence. Such a part would be
        # dense attention, which repeats its bits in torch's mode alone.
        with nullcontext() if impl == "torch" else repeating_bits():
            return backward(*tensors, window, scale, *layouts)

    dq = sequence_first(q, q.shape[2])
    if reach < length and own is not None:
        # Gradients come first and last.
        within = [rows[0].clone(), *rows[1:4], *(x.clone() for x in rows[4:])]
        for grad in (within[0], *within[4:]):
            grad[:, :, :reach] = 0
        dq, dk, dv = map(_laid_out, gradients(k, v, within, own))
    elif reach < length:
        dq[:, :, reach:], dk, dv = gradients(k, v, [x[:, :, reach:] for x in rows])
        dk, dv = _laid_out(dk), _laid_out(dv)
    else:
        dk, dv = (sequence_first(x, x.shape[2]).zero_() for x in (k, v))
    dk_before, dv_before = (sequence_first(x, x.shape[2]).zero_() for x in (k_before, v_before))
    if not reach:
        return dq, dk, dv, dk_before, dv_before
    first = first if own is None else -1
    of_documents = _of_beginnings(impl, own, seen, reach, length)
    for part, (keys, values, *here) in _beginnings(
        [k_before, v_before, k, v, *rows], reach, first, held
    ):
        dq_here, *found = gradients(keys, values, here, *of_documents)
        _put(dq_here, dq, part, held)
        wholes = (dk, dk_before), (dv, dv_before)
        for (into, into_before), grad in zip(wholes, found, strict=True):
            _put(grad[:, :, -reach:], into, part, held, add=True)
            if part.start != first:
                _put(grad[:, :, :-reach], into_before, part, held)
    return dq, dk, dv, dk_before, dv_before


@_backward.register_fake
def _(
    dout: torch.Tensor, dlse: torch.Tensor | None, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, k_before, v_before = (sequence_first(x, x.shape[2]) for x in others[:5])
    return q, k, v, k_before, v_before
