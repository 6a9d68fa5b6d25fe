"""Triton twins of scoring, selection, gather and scatter, as operations that torch can compile.

Every operation is opaque to the compiler, has a fake implementation, and is deterministic: each
output element is written by one program. The two that carry gradients are each other's pattern:

    gather (pool)    forward: gather means         backward: spread shares
    scatter          forward: spread outputs       backward: gather sums ("collect")

Shapes: B batch, Hq query heads, Hkv key-value heads, H either, N positions, D head dimension, S
gathered length, P pyramid length, n1 entries of level 1, nc coarsest entries.
"""

from dataclasses import astuple

import torch
from triton import knobs

from ..config import LighthouseConfig
from ..geometry import PyramidGeometry
from . import gather as _gather
from . import pooling as _pooling
from . import selection as _selection
from .launch import DTYPES, LARGEST_D, sequence_first

Configuration = tuple[int, int, int, str, int, int]


def check_supported(q: torch.Tensor) -> None:
    """Raise for what the kernels do not compute.

    Raises:
        ValueError: the device is not CUDA, the dtype not bf16, fp16 or fp32, or D over 256.
    """
    if not q.is_cuda and not knobs.runtime.interpret:
        raise ValueError(f'the Triton kernels need CUDA tensors, got {q.device}; pass impl="torch"')
    if q.dtype not in DTYPES:
        raise ValueError(
            f"the Triton kernels compute bfloat16, float16 and float32, got {q.dtype}; "
            'pass impl="torch"'
        )
    if q.shape[-1] > LARGEST_D:
        raise ValueError(
            f"the Triton kernels take a head dimension of at most {LARGEST_D}, got {q.shape[-1]}; "
            'pass impl="torch"'
        )


def _geometry(configuration: Configuration, length: int) -> PyramidGeometry:
    return PyramidGeometry(LighthouseConfig(*configuration), length)


@torch.library.custom_op("lighthouse::pool", mutates_args=())
def _pool(
    rows: torch.Tensor, p: int, span: int, shift: int, scale: float, with_norms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(rows):
        return _pooling.pool(rows, p, span, shift, scale, with_norms)


@_pool.register_fake
def _(rows, p, span, shift, scale, with_norms):
    batch, heads, length, d = rows.shape
    norms = (batch, heads, length // p) if with_norms else (0,)
    return (
        rows.new_empty((batch, heads, length // span, d)),
        rows.new_empty(norms, dtype=torch.float32),
    )


@torch.library.custom_op("lighthouse::select_from_norms", mutates_args=())
def _select_from_norms(
    a: torch.Tensor,
    b: torch.Tensor,
    levels: int,
    pooling_factor: int,
    top_k: int,
    scorer: str,
    picks_per_stratum: int,
    dilation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    configuration = (levels, pooling_factor, top_k, scorer, picks_per_stratum, dilation)
    with torch.cuda.device_of(a):
        return _selection.select_from_norms(
            a, b, _geometry(configuration, a.shape[2] * pooling_factor)
        )


@_select_from_norms.register_fake
def _(a, b, *configuration):
    geometry = _geometry(configuration, a.shape[2] * configuration[1])
    shape = b.shape[:2]
    return (
        b.new_empty((*shape, geometry.gathered_length), dtype=torch.int32),
        b.new_empty((*shape, geometry.pyramid_length), dtype=torch.int32),
    )


@torch.library.custom_op("lighthouse::gather", mutates_args=())
def _gather_rows(
    rows: torch.Tensor,
    coarsest_rows: torch.Tensor,
    index: torch.Tensor,
    slot: torch.Tensor,
    levels: int,
    pooling_factor: int,
    top_k: int,
    scorer: str,
    picks_per_stratum: int,
    dilation: int,
    collect: bool,
) -> torch.Tensor:
    configuration = (levels, pooling_factor, top_k, scorer, picks_per_stratum, dilation)
    with torch.cuda.device_of(rows):
        geometry = _geometry(configuration, rows.shape[2])
        return _gather.gather(rows, coarsest_rows, index, geometry, collect)


@_gather_rows.register_fake
def _(rows, coarsest_rows, index, slot, *configuration_and_collect):
    batch, heads, _, d = rows.shape
    return rows.new_empty((batch, heads, index.shape[2], d))


@torch.library.custom_op("lighthouse::spread", mutates_args=())
def _spread_rows(
    gathered: torch.Tensor,
    index: torch.Tensor,
    slot: torch.Tensor,
    length: int,
    levels: int,
    pooling_factor: int,
    top_k: int,
    scorer: str,
    picks_per_stratum: int,
    dilation: int,
    scatter: bool,
) -> torch.Tensor:
    configuration = (levels, pooling_factor, top_k, scorer, picks_per_stratum, dilation)
    with torch.cuda.device_of(gathered):
        return _gather.spread(gathered, slot, _geometry(configuration, length), scatter)


@_spread_rows.register_fake
def _(gathered, index, slot, length, *configuration_and_scatter):
    return sequence_first(gathered, length)


def _save_for_spread(ctx, inputs, output) -> None:
    rows, _, index, slot, *ctx.configuration, ctx.collect = inputs
    ctx.length = rows.shape[2]
    ctx.save_for_backward(index, slot)


def _gather_backward(ctx, grad):
    # The coarsest rows are made of the others: all of their gradient arrives with those.
    grad = _spread_rows(grad, *ctx.saved_tensors, ctx.length, *ctx.configuration, ctx.collect)
    return grad, *(None,) * 10


def _save_for_gather(ctx, inputs, output) -> None:
    _, index, slot, _, *ctx.configuration, ctx.scatter = inputs
    ctx.save_for_backward(index, slot)


def _spread_backward(ctx, grad):
    index, slot = ctx.saved_tensors
    levels, p = ctx.configuration[:2]
    span = p ** (levels - 1)
    shift, scale = (span - 1, 1.0) if ctx.scatter else (0, 1.0 / span)
    coarsest, _ = _pool(grad, p, span, shift, scale, False)
    grad = _gather_rows(grad, coarsest, index, slot, *ctx.configuration, ctx.scatter)
    return grad, *(None,) * 10


_gather_rows.register_autograd(_gather_backward, setup_context=_save_for_spread)
_spread_rows.register_autograd(_spread_backward, setup_context=_save_for_gather)


def pool_coarsest(
    rows: torch.Tensor, geometry: PyramidGeometry, with_norms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the coarsest entries and, if asked, norms of level 1, in one read of ``rows``.

    Args:
        rows: [B, H, N, D].

    Returns:
        [B, H, nc, D] and float32 [B, H, n1]; the latter empty if not asked for.
    """
    span = geometry.spans[-1]
    return _pool(rows.detach(), geometry.config.pooling_factor, span, 0, 1.0 / span, with_norms)


def select_from_norms(
    a: torch.Tensor, b: torch.Tensor, config: LighthouseConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and slot by level-1 norms of queries, float32 [B, Hq, n1], and keys, [B, Hkv, n1]."""
    return _select_from_norms(a, b, *astuple(config))


def pool_gather(
    rows: torch.Tensor,
    coarsest_rows: torch.Tensor,
    selection: tuple[torch.Tensor, torch.Tensor],
    geometry: PyramidGeometry,
) -> torch.Tensor:
    """As ``lighthouse.gather.pool_gather``, the coarsest level's means at hand."""
    return _gather_rows(rows, coarsest_rows, *selection, *astuple(geometry.config), False)


def scatter_back(
    rows: torch.Tensor, selection: tuple[torch.Tensor, torch.Tensor], geometry: PyramidGeometry
) -> torch.Tensor:
    """As ``lighthouse.scatter.scatter_back``; the result lies in memory as [B, N, H, D]."""
    length = geometry.sequence_length
    return _spread_rows(rows, *selection, length, *astuple(geometry.config), True)
