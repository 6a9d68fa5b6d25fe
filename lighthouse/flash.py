"""torch's flash attention on a GPU, with its logsumexp and without autograd.

It is called below ``scaled_dot_product_attention``, which has no window and keeps the logsumexp.

Shapes: B batch, Hq query heads, Hkv key-value heads, N queries, M keys, D head dimension. In joined
rows, sequences of varying lengths lie one after the other: R rows of queries and C of keys.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch

from .precision import backend_takes

DTYPES = (torch.bfloat16, torch.float16)
# flash attention copies rows of D elements in vectors of so many.
STEP_OF_D, LARGEST_D = 8, 256
# Rows are cut into pieces of at least so many positions, and so many times the positions that a
# piece shares with the one before.
SHORTEST_SEGMENT, LEAST_GAIN = 512, 4
# The mode of torch in which operations must repeat their bits.
MUST_REPEAT = 2


def obstacle_to_flash(q: torch.Tensor) -> str | None:
    """The reason why flash attention does not compute on tensors like ``q``, or None."""
    d = q.shape[-1]
    if not q.is_cuda:
        return f"needs CUDA tensors, got {q.device}"
    if q.dtype not in DTYPES:
        return f"computes bfloat16 and float16, got {q.dtype}"
    if d % STEP_OF_D or d > LARGEST_D:
        return f"takes head dimensions that {STEP_OF_D} divides up to {LARGEST_D}, got {d}"
    return None


def takes_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether flash attention computes on these tensors without a window, forward and backward."""
    return backend_takes(torch.backends.cuda.can_use_flash_attention, q, k, v)


@contextmanager
def repeating_bits() -> Generator[None]:
    """Let torch's flash attention sum its gradients in one order.

    It asks torch's process-wide mode for that. The mode would also fill all new memory.
    """
    mode, fills = torch.get_deterministic_debug_mode(), cast(Any, torch.utils.deterministic)
    filled = fills.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(MUST_REPEAT)
    fills.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        fills.fill_uninitialized_memory = filled


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by flash attention.

    Args:
        q: [B, Hq, N, D].
        k, v: [B, Hkv, M, D].
        is_causal: the last query is at the place of the last key and sees no later one. Otherwise
            every query sees every key.
        window: keys that a causal query sees at most, itself included; by default all.

    Returns:
        out [B, Hq, N, D], lying in memory as [B, N, Hq, D], and lse float32 [B, Hq, N].
    """
    width = q.shape[-1]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *map(_rows, (q, k, v)), None, None, q.shape[2], k.shape[2], 0.0, is_causal, False,
        **_options(scale, is_causal, window),
    )  # fmt: skip
    return out.transpose(1, 2)[..., :width], lse


def flash_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of ``flash_forward``'s out with respect to q, k and v.

    Args:
        lse: [B, Hq, N], contiguous.
    """
    width = q.shape[-1]
    # Without dropout, the state of the random generator is not read.
    state, unused = (lse.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    grads = torch.ops.aten._flash_attention_backward(
        *map(_rows, (dout, q, k, v, out)), lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal,
        state, unused, **_options(scale, is_causal, window),
    )  # fmt: skip
    return tuple(grad.transpose(1, 2)[..., :width] for grad in grads)


class Lengths(NamedTuple):
    """Where sequences lie in joined rows. Their number is that of the tensors less one.

    Attributes:
        queries, keys: int32, first rows of each sequence's queries and keys, and the end of the
            last. Sequences may be empty.
        longest_queries, longest_keys: numbers that no sequence has more of. Flash attention starts
            programs for so many in every sequence.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int


def flash_forward_by_lengths(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Lengths,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within sequences of varying lengths.

    Args:
        q: [R, Hq, D], D being a multiple of ``STEP_OF_D``.
        k, v: [C, Hkv, D].
        causal: each sequence's last query is at the place of its last key, and a query sees no
            later key. Otherwise it sees every key of its sequence.
        window: keys that a query sees at most, itself included; by default all before it.

    Returns:
        out [R, Hq, D] and lse float32 [Hq, R].

    Raises:
        RuntimeError: this version of torch returns lse in another shape.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *map(_dense_columns, (q, k, v)), *lengths, 0.0, causal, False,
        **_options(scale, causal, window),
    )  # fmt: skip
    if lse.shape != (q.shape[1], q.shape[0]):
        raise RuntimeError(
            f"flash attention of torch {torch.__version__} returns the logsumexp of joined rows "
            f"{tuple(q.shape)} as {tuple(lse.shape)}, and not as [heads, rows]; use another "
            'version, or impl="torch"'
        )
    return out, lse


def flash_backward_by_lengths(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lengths: Lengths,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Gradients of ``flash_forward_by_lengths``'s out with respect to q, k and v.

    Those of keys that belong to no sequence, or to one without queries, are not to be read.

    Args:
        lse: [Hq, R], contiguous.
    """
    state, unused = (lse.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return torch.ops.aten._flash_attention_backward(
        *map(_dense_columns, (dout, q, k, v, out)), lse, *lengths, 0.0, causal, state, unused,
        **_options(scale, causal, window),
    )  # fmt: skip


def _dense_columns(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _rows(rows: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] as flash attention takes it: [B, N, H, D], D contiguous and long enough."""
    if missing := -rows.shape[-1] % STEP_OF_D:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return _dense_columns(rows).transpose(1, 2)


def _options(scale: float, is_causal: bool, window: int | None) -> dict[str, float | int]:
    # Without a limit to the left, flash attention runs as dense attention.
    left = -1 if window is None else window - 1
    return {"scale": scale, "window_size_left": left, "window_size_right": 0 if is_causal else -1}
