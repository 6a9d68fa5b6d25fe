"""Causal attention over a window and over one key in every c before it, in one softmax.

The sequence is cut into blocks of c positions. A position sees the keys of its own block and of the
W / c - 1 blocks before it, as far as they lie before it, and the last key of every earlier block.
That key stands for its block: it counts c times. So every query reaches back to the start, and far
attention takes 1 / c of the work of dense attention. No query is left out and nothing is pooled.

The pattern is the strided one of Sparse Transformers (arXiv 1904.10509); the count is ours.

Far attention is plain causal attention. The positions at the same place in their blocks are the
queries of one sequence of N / c, and its keys are those of the blocks. So a head of queries becomes
c heads, which share the keys.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, W positions of
the window, c stride, s = W / c blocks of the window, n = N / c blocks.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .implementation import (
    WINDOW_IMPLEMENTATIONS,
    choose_window_implementation,
    operations_by,
)
from .inner_attention import InnerAttention
from .inputs import check_rows, check_transforms
from .online_softmax import merged_output
from .window import check_window, window_pairs


def check_stride(window: int, stride: int, sequence_length: int | None = None) -> None:
    """Check that blocks of ``stride`` positions fit the window, and the sequence if it is given.

    Raises:
        TypeError, ValueError: the stride is no integer or below 2, or does not divide the window or
            the length.
    """
    if not isinstance(stride, int) or isinstance(stride, bool):
        raise TypeError(
            f"stride must be of type int, got {stride!r} of type {type(stride).__name__}"
        )
    if stride < 2:
        raise ValueError(f"stride must be at least 2, got stride = {stride}; use 4 or 8")
    if window % stride:
        raise ValueError(
            f"stride = {stride} must divide window = {window}; use a window of "
            f"{(window // stride + 1) * stride}"
        )
    if sequence_length is not None and sequence_length % stride:
        raise ValueError(
            f"stride = {stride} must divide the sequence's length, got {sequence_length} positions"
        )


def strided_pairs(sequence_length: int, window: int, stride: int) -> int:
    """Pairs of a query and a key that this attention takes in one head."""
    blocks = sequence_length // stride
    # Pairs of blocks: all, and those that the window holds, a block with itself included.
    pairs, near = window_pairs(blocks, blocks), window_pairs(blocks, window // stride)
    within_blocks = blocks * stride * (stride + 1) // 2
    return within_blocks + (near - blocks) * stride**2 + (pairs - near) * stride


def strided_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    stride: int,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Causal attention over the last W - c + 1 to W positions, and one key in every c before them.

    Position t sees all keys from (t // c - W / c + 1) c on, and before those the keys of positions
    c - 1, 2 c - 1 and so on, each of which counts c times.
    Results have exact first gradients.

    Args:
        q: [B, Hq, N, D], with N a multiple of c.
        k, v: [B, Hkv, N, D]; Hkv divides Hq.
        window: W, a multiple of c.
        stride: c, at least 2.
        scale: factor of the scores before the softmax; by default 1 / sqrt(D).
        impl: as in ``window_attention``. "flash4" attends over the far keys alone.

    Returns:
        [B, Hq, N, D] in q's dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit one another, or the window or
            the stride does not fit them.
        ImportError: ``impl`` needs a package that is not installed.
        RuntimeError: a transform of ``torch.func`` runs, such as grad.
    """
    check_transforms()
    check_rows(q, k, v)
    check_window(window)
    check_stride(window, stride, q.shape[2])
    near = choose_window_implementation(None if impl == "flash4" else impl, q, with_documents=True)
    far = choose_window_implementation(impl, q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Strided.apply(q, k, v, window, stride, scale, near, far)


class _Strided(torch.autograd.Function):
    """Two attentions, merged.

    Both backwards get the merged output and logsumexp, so that each weight is that of the joint
    softmax. Taking log c off the logsumexp equals adding it to the far scores.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int,
        stride: int,
        scale: float,
        near: str,
        far: str,
    ) -> torch.Tensor:
        first = _first_keys(q, window, stride)
        out, lse = operations_by(near)[0](q, k, v, window, scale, first)
        if q.shape[2] > window:
            queries = _fold(q, window, stride)
            keys, values = (_far_keys(rows, window, stride) for rows in (k, v))
            far_out, far_lse = operations_by(far)[0](queries, keys, values, keys.shape[2], scale)
            far_lse = _unfold(far_lse.unsqueeze(-1), stride).squeeze(-1) + math.log(stride)
            # Not in place, because activation checkpointing may keep the operations' results.
            last, last_lse = out[:, :, window:], lse[:, :, window:]
            merged = merged_output(last, last_lse, _unfold(far_out, stride), far_lse)
            out = torch.cat((out[:, :, :window], merged), dim=2)
            lse = torch.cat((lse[:, :, :window], torch.logaddexp(last_lse, far_lse)), dim=2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.constants = window, stride, scale, near, far
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  This function has one output, so it gets one gradient.
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        window, stride, scale, near, far = ctx.constants
        q, k, v, out, lse = ctx.saved_tensors
        first = _first_keys(q, window, stride)
        dq, dk, dv = operations_by(near)[1](grad, None, q, k, v, out, lse, window, scale, first)
        if q.shape[2] > window:
            folded = [_fold(rows, window, stride) for rows in (grad, q, out)]
            far_lse = _fold((lse - math.log(stride)).unsqueeze(-1), window, stride).squeeze(-1)
            keys, values = (_far_keys(rows, window, stride) for rows in (k, v))
            attention = folded[1], keys, values, folded[2], far_lse
            far_dq, far_dk, far_dv = operations_by(far)[1](
                folded[0], None, *attention, keys.shape[2], scale
            )
            dq[:, :, window:] += _unfold(far_dq, stride)
            _far_places(dk, window, stride).add_(far_dk)
            _far_places(dv, window, stride).add_(far_dv)
        return dq, dk, dv, None, None, None, None, None


def _first_keys(q: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """The first key that each query sees all keys from: int32 [B, N]."""
    block = torch.arange(q.shape[2], dtype=torch.int32, device=q.device) // stride
    first = (block - (window // stride - 1)).clamp_(min=0) * stride
    return first.expand(len(q), -1)


def _fold(rows: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """Rows [B, H, N, D] of queries that see far keys, as those of [B, H c, n - s, D]."""
    blocks = rows[:, :, window:].unflatten(2, (-1, stride))
    return blocks.transpose(2, 3).flatten(1, 2).contiguous()


def _unfold(rows: torch.Tensor, stride: int) -> torch.Tensor:
    """The reverse of ``_fold``: [B, H, N - W, D]."""
    return rows.unflatten(1, (-1, stride)).transpose(2, 3).flatten(2, 3)


def _far_places(rows: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """A view of the rows [B, Hkv, N, D] whose keys are far from some query: [B, Hkv, n - s, D]."""
    return rows[:, :, stride - 1 : rows.shape[2] - window : stride]


def _far_keys(rows: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    return _far_places(rows, window, stride).contiguous()


class StridedAttention(InnerAttention):
    """Attention over a window and one key in every c before it, around a dense inner attention.

    Args:
        window: W, a multiple of ``stride``.
        stride: c, at least 2.
        sdpa, impl: as in ``InnerAttention``; "flash4", "triton" and "torch" are implementations.
    """

    name = "strided attention"
    implementations = WINDOW_IMPLEMENTATIONS

    def __init__(
        self, window: int, stride: int, sdpa: nn.Module | None = None, impl: str | None = None
    ) -> None:
        check_window(window)
        check_stride(window, stride)
        super().__init__(sdpa, impl)
        self.window, self.stride = window, stride

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if documents is not None:
            raise ValueError(f"{self.name} does not know documents yet; leave them out")
        if self.context_parallel.chunks > 1:
            raise ValueError(f"{self.name} does not take context parallelism yet; use one rank")
        return strided_attention(q, k, v, self.window, self.stride, scale=scale, impl=self.impl)

    def settings(self) -> str:
        return f"window={self.window}, stride={self.stride}"
