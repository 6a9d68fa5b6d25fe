"""Triton twins of scoring, selection, gather and scatter, as operations that torch can compile.

Every operation is opaque to the compiler, has a fake implementation, and is deterministic: each
output element is written by one program. The functions around them carry gradients, once; the two
that do are each other's pattern:

    pool_gather     forward: gather means         backward: spread shares
    scatter_back    forward: spread outputs       backward: gather sums ("collect")

Shapes: B batch, Hq query heads, Hkv key-value heads, H either, N positions, D head dimension, S
gathered length, n1 entries of level 1, nc coarsest entries.
"""

import torch
from torch.autograd.function import once_differentiable
from triton import knobs

from ..config import LighthouseConfig
from ..geometry import PyramidGeometry
from ..reach import seam_gradient
from . import gather as _gather
from . import pooling as _pooling
from . import scoring as _scoring
from . import selection as _selection
from .launch import DTYPES, LARGEST_D, sequence_first

# Whether Triton's interpreter runs the kernels, on any device: settled when they are defined.
INTERPRETED = knobs.runtime.interpret

# Bare definitions: the decorators of torch.library cost ten times as much on every call, which
# at these kernels' speed is most of the time.
_library = torch.library.Library("lighthouse", "FRAGMENT")


def _define(schema: str, function, fake) -> None:
    """Register the operation of ``schema``, which ``function`` computes."""
    name = schema[: schema.index("(")]

    def run(tensor, *arguments):
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(tensor):
            return function(tensor, *arguments)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lighthouse::{name}", fake, lib=_library)


def _fake_pool(rows, slot, p, levels, shift, scale, scored):
    batch, heads, length, d = rows.shape
    norms = (batch, heads, length // p) if scored else (0,)
    return (
        rows.new_empty((batch, heads, length // p ** (levels - 1), d)),
        rows.new_empty(norms, dtype=torch.float32),
    )


def _fake_score(q, k, v, scorer, dilation, p, scored):
    a, b = ((*rows.shape[:2], rows.shape[2] // p) for rows in (q, k))
    return q.new_empty(a, dtype=torch.float32), q.new_empty(b, dtype=torch.float32)


def _fake_select(a, b, levels, p, m, strata, by_first):
    lengths = [b.shape[2] * p // p**level for level in range(levels)]
    gathered = lengths[-1] + (levels - 1) * p * m * strata
    return (
        b.new_empty((*b.shape[:2], gathered), dtype=torch.int32),
        b.new_empty((*b.shape[:2], sum(lengths)), dtype=torch.int32),
    )


def _fake_gather(rows, coarsest_rows, index, slot, p, levels, collect):
    return sequence_first(rows, index.shape[2])


def _fake_spread(gathered, slot, seam, length, p, levels, scatter, finest):
    return sequence_first(gathered, length)


_define(
    "pool(Tensor rows, Tensor? slot, int p, int levels, SymInt shift, float scale, int scored)"
    " -> (Tensor, Tensor)",
    _pooling.pool,
    _fake_pool,
)
_define(
    "score(Tensor q, Tensor k, Tensor v, str scorer, int dilation, int p, int scored)"
    " -> (Tensor, Tensor)",
    _scoring.score,
    _fake_score,
)
_define(
    "select_from_norms(Tensor a, Tensor b, int levels, int p, int m, int strata, bool by_first)"
    " -> (Tensor, Tensor)",
    _selection.select_from_norms,
    _fake_select,
)
_define(
    "gather(Tensor rows, Tensor coarsest_rows, Tensor index, Tensor? slot, int p, int levels,"
    " bool collect)"
    " -> Tensor",
    _gather.gather,
    _fake_gather,
)
_define(
    "spread(Tensor gathered, Tensor slot, Tensor? seam, SymInt length, int p, int levels,"
    " bool scatter, bool finest) -> Tensor",
    _gather.spread,
    _fake_spread,
)
_ops = torch.ops.lighthouse


def check_supported(q: torch.Tensor) -> None:
    """Raise for what the kernels do not compute.

    Raises:
        ValueError: the device is not CUDA, the dtype not bf16, fp16 or fp32, or D over 256.
    """
    if not q.is_cuda and not INTERPRETED:
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


class _PoolGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, coarsest_rows, index, slot, p, levels):
        ctx.save_for_backward(slot)
        ctx.constants = rows.shape[2], p, levels
        return _ops.gather(rows, coarsest_rows, index, None, p, levels, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # The coarsest rows are made of the others: all of their gradient arrives with those.
        (slot,) = ctx.saved_tensors
        grad_rows = _ops.spread(grad, slot, None, *ctx.constants, False, False)
        return grad_rows, None, None, None, None, None


class _ScatterBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, seam, index, slot, length, p, levels, finest):
        ctx.save_for_backward(index, slot)
        ctx.constants = p, levels, finest
        return _ops.spread(rows, slot, seam, length, p, levels, True, finest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        index, slot = ctx.saved_tensors
        p, levels, finest = ctx.constants
        uncovered = slot if finest else None
        coarsest, _ = _ops.pool(grad, uncovered, p, levels, p ** (levels - 1) - 1, 1.0, 0)
        seam = seam_gradient(grad, slot, p, levels, finest) if ctx.needs_input_grad[1] else None
        rows = _ops.gather(grad, coarsest, index, uncovered, p, levels, True)
        return rows, seam, None, None, None, None, None, None


def pool_coarsest(
    rows: torch.Tensor, geometry: PyramidGeometry, with_norms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the coarsest entries and, if asked, norms of level 1, in one read of ``rows``.

    Args:
        rows: [B, H, N, D].

    Returns:
        [B, H, nc, D] and float32 [B, H, n1]; the latter empty if not asked for.
    """
    config, scale = geometry.config, 1.0 / geometry.spans[-1]
    scored = _scored_rows(config) if with_norms else 0
    return _ops.pool(rows.detach(), None, config.pooling_factor, config.levels, 0, scale, scored)


def _scored_rows(config: LighthouseConfig) -> int:
    """Positions, of those under an entry of level 1, that it is scored by."""
    return config.pooling_factor if config.entry_score == "max" else 1


def score(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: PyramidGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level-1 scores of the configured scorer.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, N, D].

    Returns:
        float32 [B, Hq, n1] by query and [B, Hkv, n1] by key.
    """
    config = geometry.config
    if config.scorer == "norm":
        return tuple(pool_coarsest(rows, geometry, with_norms=True)[1] for rows in (q, k))
    rows = (x.detach() for x in (q, k, v))
    return _ops.score(
        *rows, config.scorer, config.dilation, config.pooling_factor, _scored_rows(config)
    )


def select_from_norms(
    a: torch.Tensor, b: torch.Tensor, geometry: PyramidGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and slot by level-1 scores, float32 [B, Hq, n1] by query and [B, Hkv, n1] by key."""
    config = geometry.config
    return _ops.select_from_norms(
        a,
        b,
        config.levels,
        config.pooling_factor,
        config.picks_per_stratum,
        geometry.strata,
        config.entry_score == "first",
    )


def pool_gather(
    rows: torch.Tensor,
    coarsest_rows: torch.Tensor,
    selection: tuple[torch.Tensor, torch.Tensor],
    geometry: PyramidGeometry,
) -> torch.Tensor:
    """As ``lighthouse.gather.pool_gather``, the coarsest level's means at hand.

    The result lies in memory as [B, S, H, D], so that joined chunks need no copy.
    """
    config = geometry.config
    return _PoolGather.apply(rows, coarsest_rows, *selection, config.pooling_factor, config.levels)


def scatter_back(
    rows: torch.Tensor,
    selection: tuple[torch.Tensor, torch.Tensor],
    geometry: PyramidGeometry,
    seam: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``lighthouse.scatter.scatter_back``; the result lies in memory as [B, N, H, D]."""
    config = geometry.config
    if seam is not None:
        seam = seam.contiguous()
    return _ScatterBack.apply(
        rows,
        seam,
        *selection,
        geometry.sequence_length,
        config.pooling_factor,
        config.levels,
        config.combine == "finest",
    )
