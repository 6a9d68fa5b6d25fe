"""Ring attention as two operations, forward and backward, that a compiler does not look into.

A compiler that looked into them would make a different graph for every rank. It would drop what a
rank does not use and merge what a rank computes twice, transfers included. From four ranks on,
some would then wait for transfers that others never start. It would also keep keys, values and
everything received from forward to backward.

The operations decide when they run which of torch's attentions computes at each hop: cuDNN's where
torch takes it, otherwise a kernel of ``lighthouse``, and on a CPU torch's flash attention for CPUs.
With documents it is the kernel.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions of the sequence, S positions on a
rank, D head dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lighthouse.context_parallel import GROUPS, ContextParallel
from lighthouse.cpu_flash import cpu_backward, cpu_forward
from lighthouse.cudnn import cudnn_backward, cudnn_forward, takes_cudnn
from lighthouse.dense_attention import backward_within, forward_within
from lighthouse.implementation import kernels
from lighthouse.logsumexp import fold_lse_gradient
from lighthouse.precision import accumulation_dtype

from .ring_attention import Attend, Ring, nothing_more, ring_backward, ring_forward
from .ring_documents import RingDocuments, Seen, backward_to_seen, forward_to_seen

NAMESPACE = "lighthouse_ring"


def operations_of(layout: ContextParallel) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward over the ranks of ``layout``, for it to hold."""
    assert layout.group is not None
    ring = layout.group.group_name, layout.balanced
    return partial(_forward, ring), partial(_backward, ring)


def _forward(
    ring: tuple[str, bool],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.lighthouse_ring.attention(q, k, v, scale, *ring, documents)


def _backward(
    ring: tuple[str, bool],
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dout, out = fold_lse_gradient(dout, dlse, out)
    rows = dout, q, k, v, out, lse
    return torch.ops.lighthouse_ring.attention_backward(*rows, scale, *ring, documents)


def _attention_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Attend, Attend]:
    """Forward and backward of the attention that computes on these tensors.

    Raises:
        NotImplementedError: none does.
    """
    if not q.is_cuda:
        return cpu_forward, cpu_backward
    if takes_cudnn(q, k, v):
        return cudnn_forward, cudnn_backward
    _check_kernels(q, f"does not take q {tuple(q.shape)} in {q.dtype}")
    return kernels.dense_forward, kernels.dense_backward


def _check_kernels(q: torch.Tensor, why: str) -> None:
    """Check that the kernels compute on CUDA tensors like ``q``.

    Args:
        why: why cuDNN's attention does not run.

    Raises:
        NotImplementedError: they do not.
    """
    if kernels is None:
        raise NotImplementedError(
            f"ring attention on GPUs uses Triton where cuDNN's attention {why}, and it is not "
            "installed: pip install triton"
        )
    if obstacle := kernels.obstacle_to_kernels(q):
        raise NotImplementedError(
            f"ring attention runs cuDNN's attention, which {why}, and kernels, which {obstacle}"
        )


def _forward_within(
    home: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    is_causal: bool,
    seen: Seen | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``Attend`` of forward within documents.

    Args:
        home: the layout of this rank's own rows.
        seen: None at the first hop, which attends to these rows.
    """
    if seen is None:
        return forward_within(q, k, v, home, scale)
    return forward_to_seen(q, k, v, scale, seen)


def _backward_within(
    home: torch.Tensor,
    *rows: torch.Tensor,
    scale: float,
    is_causal: bool,
    seen: Seen | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``Attend`` of backward within documents; ``rows`` are dout, q, k, v, out and lse."""
    dout, q, k, v, out, lse = rows
    if seen is None:
        return backward_within(dout, q, k, v, out, lse, home, scale)
    return backward_to_seen(dout, q, k, v, out, lse, scale, seen)


def _run_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    group_name: str,
    balanced: bool,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    ring, within = Ring(GROUPS[group_name], balanced), nothing_more
    if documents is None:
        attend = partial(_attention_of(q, k, v)[0], scale=scale)
    else:
        if q.is_cuda:
            _check_kernels(q, "knows no documents")
        found = RingDocuments(documents, ring)
        attend, within = partial(_forward_within, found.at_home(), scale=scale), found.within
    if ring.size == 1:
        out, lse = attend(q, k, v, is_causal=True)
    else:
        out, lse = ring_forward(attend, ring, q, k, v, within)
    return _laid_out(out, q), lse.contiguous()


def _run_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    group_name: str,
    balanced: bool,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    ring, within = Ring(GROUPS[group_name], balanced), nothing_more
    if documents is None:
        attend = partial(_attention_of(q, k, v)[1], scale=scale)
    else:
        if q.is_cuda:
            _check_kernels(q, "knows no documents")
        found = RingDocuments(documents, ring)
        attend, within = partial(_backward_within, found.at_home(), scale=scale), found.within
    if ring.size == 1:
        grads = attend(dout, q, k, v, out, lse, is_causal=True)
    else:
        grads = ring_backward(attend, ring, dout, q, k, v, out, lse, within)
    return tuple(_laid_out(*pair) for pair in zip(grads, (q, k, v), strict=True))


def _laid_out(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``rows`` in the memory layout of ``empty_like(like)``, on which compiled code can count."""
    assert rows.shape == like.shape, "heads of queries, keys and values must be equally wide"
    strides = torch.empty_like(like, device="meta").stride()
    return rows if rows.stride() == strides else torch.empty_like(like).copy_(rows)


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _fake_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


RING = "str group_name, bool balanced, Tensor? documents=None"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema, _run, _fake in (
    (
        "attention",
        f"(Tensor q, Tensor k, Tensor v, float scale, {RING}) -> (Tensor, Tensor)",
        _run_forward,
        _fake_forward,
    ),
    (
        "attention_backward",
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
        f" {RING}) -> (Tensor, Tensor, Tensor)",
        _run_backward,
        _fake_backward,
    ),
):
    _library.define(f"{_name}{_schema}")
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
    # The compiler's cache on disk leaves out defaults, and so finds a graph that was compiled for
    # other arguments of this operation. It must be compiled again.
    torch.compiler.config.cache_key_tag += f" {_name}{_schema}"

ATTENTION = torch.ops.lighthouse_ring.attention.default
