"""Attention over a window in chunks: the first positions of a chunk see keys of the chunk before.

The attention is one operation forward and one backward. On the rank that holds the sequence's first
chunk, no keys come before that one. A compiler that saw this would make another graph for this
rank. It might then repeat an exchange in backward on the other ranks alone, which would wait for it
in vain.

Shapes: B batch, Hq query heads, Hkv key-value heads, M chunks on this rank, C positions of a chunk,
D head dimension, W positions of the window.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .context_parallel import ContextParallel
from .document_chunks import ChunkDocuments
from .documents import within
from .implementation import kernels, operations_by
from .memory_layout import sequence_first
from .precision import accumulation_dtype

SETTINGS = (
    "SymInt window, float scale, str impl, int first, int held, Tensor? own=None, Tensor? seen=None"
)
# The operations take these two of documents; ``layouts_in_chunks`` makes them.
Layouts = tuple[torch.Tensor | None, torch.Tensor | None]
NO_DOCUMENTS: Layouts = None, None
# The place of the sequence's first chunk among those on this rank or -1, and how many these are.
Place = tuple[int, int]


def layouts_in_chunks(documents: ChunkDocuments | None, window: int) -> Layouts:
    """What the operations take of documents.

    Returns:
        The layout of the chunks [B M, C], and how many of the W - 1 keys before a chunk its first
        document sees, [B M]; twice None without documents.
    """
    if documents is None:
        return NO_DOCUMENTS
    return documents.own, documents.before.clamp(max=window - 1)


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
    return_lse: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Attend over the window of each position, in its own chunk and in the one before.

    Args:
        q: [B M, Hq, C, D].
        k, v: [B M, Hkv, C, D].
        window, scale, impl: as in ``lighthouse.window_attention``.
        layouts: from ``layouts_in_chunks``.
        others: rows [B M, ...] that cross from chunk to chunk in the same collective.
        return_lse: whether lse is wanted. Its gradient costs a few passes over dout and out, even
            if it is zero.

    Returns:
        out [B M, Hq, C, D], lse [B M, Hq, C] if it is wanted, and the rows that came for
        ``others``.
    """
    constants = window, scale, impl, layout, return_lse
    return _HaloWindow.apply(q, k, v, *constants, *layouts, *others)


def seams_and_halo(
    seams: Sequence[torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    layout: ContextParallel,
) -> Callable[[], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]:
    """Start to send what each chunk needs of the one before it, without autograd.

    One collective carries all of it.

    Args:
        seams: rows [B M, ...].
        k, v: [B M, Hkv, C, D].

    Returns:
        A function that waits for the seams, and keys and values [B M, Hkv, W - 1, D], of the chunk
        before, and returns them.
    """
    # The windows of the next chunk reach these. If a position sees itself alone, there are none.
    halo = tuple(x[:, :, x.shape[2] - (window - 1) :] for x in (k, v))
    crossing = (*seams, *_sequence_first(halo)) if window > 1 else tuple(seams)
    arriving = layout.send(*crossing) if crossing else None

    def wait() -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        before = () if arriving is None else arriving()
        return before[: len(seams)], _sequence_first(before[len(seams) :]) or halo

    return wait


def _sequence_first(halo: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Rows [B M, H, R, D] as [B M, R, H, D], or back: a sequence's are then in one piece."""
    return tuple(x.transpose(1, 2) for x in halo)


def gradients_of_seams(
    dseams: Sequence[torch.Tensor],
    dhalo: Sequence[torch.Tensor],
    onto: Sequence[torch.Tensor],
    layout: ContextParallel,
) -> Callable[[], Sequence[torch.Tensor]]:
    """Start to send the gradients of ``seams_and_halo`` back to where its results came from.

    Args:
        dseams, dhalo: gradients of its results.
        onto: gradients of k and v.

    Returns:
        A function that waits, adds the gradients of the halo to ``onto``, and returns those of the
        seams.
    """
    crossing = (*dseams, *_sequence_first(dhalo)) if dhalo[0].shape[2] else tuple(dseams)
    arriving = layout.send(*crossing, step=-1) if crossing else None

    def wait() -> Sequence[torch.Tensor]:
        came = () if arriving is None else arriving()
        halo = _sequence_first(came[len(dseams) :])
        # Not strict=bool(halo): torch 2.11 cannot trace bool of a list.
        if halo:
            for rows, part in zip(onto, halo, strict=True):
                torch.ops.lighthouse.add_to_last_rows(rows, part)
        return came[: len(dseams)]

    return wait


class _HaloWindow(torch.autograd.Function):
    """One exchange and one operation each way. Backward computes the probabilities again.

    If autograd saw the halo, it would add its gradient to a whole tensor of zeros.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        # As ``ContextParallel.exchange`` says, there may not be as many arguments as parameters.
        q, k, v, window, scale, impl, layout, return_lse, own, seen, *others = arguments
        came, halo = seams_and_halo(others, k, v, window, layout)()
        settings = window, scale, impl, layout.first, len(layout.held)
        out, lse = torch.ops.lighthouse.halo_window(q, k, v, *halo, *settings, own, seen)
        ctx.save_for_backward(q, k, v, *halo, out, lse, own, seen)
        ctx.constants = settings, layout, return_lse
        return (out, lse, *came) if return_lse else (out, *came)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  One gradient for each of the outputs.
    def backward(
        ctx: Any, dout: torch.Tensor, *others: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        settings, layout, return_lse = ctx.constants
        dlse, dothers = (others[0], others[1:]) if return_lse else (None, others)
        *rows, own, seen = ctx.saved_tensors
        dq, dk, dv, *dhalo = torch.ops.lighthouse.halo_window_backward(
            dout, dlse, *rows, *settings, own, seen
        )
        sent_back = gradients_of_seams(dothers, dhalo, (dk, dv), layout)()
        # Arguments between the rows.
        return dq, dk, dv, *[None] * 7, *sent_back


def _shown(seen: torch.Tensor | None, q: torch.Tensor, reach: int, place: Place) -> torch.Tensor:
    """How many of the ``reach`` keys before a chunk its first document sees, int32 [B M].

    Nothing sees the zeros before the sequence's first chunk.
    """
    if seen is not None:
        return seen.int()
    shown = torch.full((len(q),), reach, dtype=torch.int32, device=q.device)
    first, held = place
    if first >= 0:
        shown[first::held] = 0
    return shown


def _first_keys(own: torch.Tensor | None, shown: torch.Tensor, reach: int) -> torch.Tensor:
    """The first key that each of the first ``reach`` positions of all chunks may see, [B M, reach].

    Before a chunk's own keys lie ``reach`` others, those of the chunk before it.
    """
    first = shown.new_zeros(len(shown), reach) if own is None else own[:, :reach]
    return reach + first - torch.where(first == 0, shown[:, None], 0)


def _beginnings(
    impl: str, k_before: torch.Tensor, v_before: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """How the first positions of chunks attend, and the keys and values that they see."""
    reach = k_before.shape[2]
    k, v = (torch.cat([x, y[:, :, :reach]], dim=2) for x, y in ((k_before, k), (v_before, v)))
    # FlashAttention 4 cannot leave out the zeros before the first chunk.
    return "triton" if impl == "flash4" else impl, k, v


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """``x`` as ``sequence_first`` lays it out, copied if need be."""
    return x if x.transpose(1, 2).is_contiguous() else sequence_first(x, x.shape[2]).copy_(x)


@torch.library.custom_op(
    "lighthouse::add_to_last_rows",
    mutates_args=("rows",),
    schema="(Tensor(a!) rows, Tensor part) -> ()",
)
def add_to_last_rows(rows: torch.Tensor, part: torch.Tensor) -> None:
    """Add ``part`` [B M, H, R, D] to the last R positions of ``rows`` [B M, H, C, D].

    A compiler would make of the same sum in PyTorch a kernel that reads and writes all C positions.
    """
    rows[:, :, rows.shape[2] - part.shape[2] :].add_(part)


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
    """Attend, by the kernel in one pass.

    Other attentions attend within all chunks, and then again at their first positions, with the
    keys before.
    """
    reach = k_before.shape[2]
    shown = _shown(seen, q, reach, (first, held))
    if impl == "triton":
        before = kernels.Before(k_before, v_before, shown)
        return kernels.halo_forward(q, k, v, before, window, scale, own)
    attend, _ = operations_by(impl)
    out, lse = attend(q, k, v, window, scale, *within(own))
    out = _laid_out(out)
    if not reach:
        return out, lse
    impl, keys, values = _beginnings(impl, k_before, v_before, k, v)
    attend, _ = operations_by(impl)
    first_keys = _first_keys(own, shown, reach)
    found = attend(q[:, :, :reach], keys, values, window, scale, first_keys)
    out[:, :, :reach], lse[:, :, :reach] = found
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
    """Gradients, by the kernel in one pass.

    Other attentions give those from queries that see no keys before their chunk, and then those
    from the others. Only a chunk's first keys and values are then joined with those before it, and
    not all of them.
    """
    reach, length = k_before.shape[2], q.shape[2]
    shown = _shown(seen, q, reach, (first, held))
    if impl == "triton":
        before = kernels.Before(k_before, v_before, shown)
        return kernels.halo_backward(dout, dlse, q, k, v, before, out, lse, window, scale, own)
    _, backward = operations_by(impl)

    def rows(keys: torch.Tensor, values: torch.Tensor, here: slice) -> list[torch.Tensor | None]:
        dout_here, q_here, out_here, lse_here = (x[:, :, here] for x in (dout, q, out, lse))
        dlse_here = None if dlse is None else dlse[:, :, here]
        return [dout_here, dlse_here, q_here, keys, values, out_here, lse_here.contiguous()]

    if reach < length:
        rest = slice(reach, None)
        of_rest = within(None if own is None else own[:, rest])
        dq = sequence_first(q, length)
        dq[:, :, rest], dk, dv = backward(*rows(k, v, rest), window, scale, *of_rest)
        dk, dv = _laid_out(dk), _laid_out(dv)
    else:
        dq = sequence_first(q, length)
        dk, dv = (sequence_first(x, x.shape[2]).zero_() for x in (k, v))
    dk_before, dv_before = (sequence_first(x, reach) for x in (k_before, v_before))
    if not reach:
        return dq, dk, dv, dk_before, dv_before
    impl, keys, values = _beginnings(impl, k_before, v_before, k, v)
    _, backward = operations_by(impl)
    first_keys = _first_keys(own, shown, reach)
    found = backward(*rows(keys, values, slice(reach)), window, scale, first_keys)
    dq[:, :, :reach] = found[0]
    for grad, before, part in ((dk, dk_before, found[1]), (dv, dv_before, found[2])):
        before.copy_(part[:, :, :reach])
        grad[:, :, :reach] += part[:, :, reach:]
    return dq, dk, dv, dk_before, dv_before


@_backward.register_fake
def _(
    dout: torch.Tensor, dlse: torch.Tensor | None, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, k_before, v_before = (sequence_first(x, x.shape[2]) for x in others[:5])
    return q, k, v, k_before, v_before
