"""Checks of one call's tensors, and the cut of its sequences into chunks.

Shapes: B batch, Hq query heads, Hkv key-value heads, N positions, D head dimension, M chunks on
this rank, C positions of a chunk, S gathered length, P pyramid length.
"""

import torch

from .config import LighthouseConfig
from .context_parallel import ContextParallel
from .geometry import PyramidGeometry


def check_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Check that q [B, Hq, N, D] and k and v [B, Hkv, N, D] fit together.

    Raises:
        TypeError, ValueError: their shapes, dtypes or devices do not.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must be [B, heads, N, D], got {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q must be [B, Hq, N, D] and k and v [B, Hkv, N, D] with the same B, N and D, "
            f"got {shapes}"
        )
    if not k.numel():
        raise ValueError(f"k and v must not be empty, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the key-value heads must divide the query heads, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q, k and v must be floating point, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}"
        )


def check_transforms() -> None:
    """Check that no transform of ``torch.func`` runs, such as grad or vmap.

    Raises:
        RuntimeError: one does.
    """
    # torch itself refuses our functions there, in words for whoever wrote them. With a
    # ``setup_context`` it would take them, but would not hold to ``once_differentiable``.
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "Lighthouse attention and attention over a window do not run under the transforms of "
            "torch.func, such as grad and vmap; take gradients by torch.autograd.grad or "
            "backward(), and give several inputs as a batch"
        )


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    context_parallel: ContextParallel,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], PyramidGeometry]:
    """Check that q, k and v fit together, and cut them into the chunks on this rank.

    Args:
        q: [B, Hq, N, D], N being this rank's part of the sequence.
        k, v: [B, Hkv, N, D].

    Returns:
        q, k and v as [B M, heads, C, D], and the geometry of one chunk.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit one another or the config.
    """
    if not isinstance(config, LighthouseConfig):
        raise TypeError(f"config must be a LighthouseConfig, got {type(config).__name__}")
    check_rows(q, k, v)
    config = context_parallel.per_chunk(config, q.shape[2])
    q, k, v = (context_parallel.split(rows) for rows in (q, k, v))
    return (q, k, v), PyramidGeometry(config, q.shape[2])


def checked_selection(
    selection: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, geometry: PyramidGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check that a selection made elsewhere belongs to these tensors.

    Args:
        selection: index int32 [B, Hkv, S] and slot int32 [B, Hkv, P].
        k: [B, Hkv, N, D].

    Returns:
        Both maps, contiguous.

    Raises:
        TypeError, ValueError: its maps are of another shape, dtype or device.
    """
    index, slot = selection
    maps = (
        ("index", index, geometry.gathered_length),
        ("slot", slot, geometry.pyramid_length),
    )
    for name, given, length in maps:
        shape = (*k.shape[:2], length)
        if given.dtype != torch.int32:
            raise TypeError(f"selection.{name} must be int32, got {given.dtype}")
        if tuple(given.shape) != shape or given.device != k.device:
            raise ValueError(
                f"selection.{name} must be of shape {shape} on {k.device}, got "
                f"{tuple(given.shape)} on {given.device}; it belongs to other tensors or to "
                "another config"
            )
    return index.contiguous(), slot.contiguous()
