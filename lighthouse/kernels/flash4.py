"""Causal attention over a window by FlashAttention 4, as operations of ours.

FlashAttention 4 is an extra, the package flash-attn-4. Its functions with gradients keep their own
``out`` and ``lse``, and a merge needs backward with others, so the functions beneath them are
called. Backward takes the gradient of the logsumexp, and sums in one order where it is asked to.

FlashAttention 4 compiles a kernel when it first meets a dtype, a head dimension or a number of
query heads for each key head. This takes seconds.
"""

import importlib
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch.torch_version import TorchVersion

from .launch import define, row_strides
from .window import fake_backward, fake_forward, window_backward, window_forward

PACKAGE = "flash-attn-4"
# The first version that was measured. pyproject.toml has it too.
LEAST_VERSION = "4.0.0b36"
REQUIREMENT = f"{PACKAGE}[cu13]>={LEAST_VERSION}"
INSTALL = f"pip install '{REQUIREMENT}'"
WITHOUT = f"remove it with pip uninstall {PACKAGE}, and a kernel of ours computes windows"
DTYPES = (torch.bfloat16, torch.float16)
# The compute capability of Hopper. FlashAttention 4 has other kernels for other GPUs.
HOPPER = 9
# The head dimensions whose gradients were compared with float32. Those of 40 are wrong (4.0.0b36).
HEAD_DIMENSIONS = (32, 64, 96, 128, 192, 256)


@cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """FlashAttention 4's forward and backward, or None where it is not installed."""
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    if TorchVersion(version) < LEAST_VERSION:
        raise ImportError(
            f"{PACKAGE} {version} is older than {LEAST_VERSION}, which Lighthouse needs: "
            f"{INSTALL}, or {WITHOUT}"
        )
    try:
        interface = importlib.import_module("flash_attn.cute.interface")
        return interface._flash_attn_fwd, interface._flash_attn_bwd
    # It loads compilers and libraries of CUDA, which fail in ways of their own.
    except Exception as error:
        raise ImportError(
            f"{PACKAGE} {version} is installed and cannot be used "
            f"({type(error).__name__}: {error}); install it anew: {INSTALL} --force-reinstall, or "
            f"{WITHOUT}"
        ) from error


# The compiler takes the answers of these two as they are when it traces.
@torch.compiler.assume_constant_result
def flash4_is_installed() -> bool:
    """Whether FlashAttention 4 is there.

    Raises:
        ImportError: it is there, but too old or broken.
    """
    return _functions() is not None


@torch.compiler.assume_constant_result
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def obstacle_to_flash4(q: torch.Tensor) -> str | None:
    """The reason why FlashAttention 4 is not taken for tensors like ``q``, or None."""
    if not q.is_cuda:
        return f"needs CUDA tensors, got {q.device}"
    if q.dtype not in DTYPES:
        return f"computes bfloat16 and float16, got {q.dtype}"
    if (generation := _generation(q.device)) != HOPPER:
        return f"is for Hopper GPUs, of compute capability {HOPPER}.x, got {generation}.x"
    if q.shape[-1] not in HEAD_DIMENSIONS:
        return f"is right for head dimensions of {HEAD_DIMENSIONS}, got {q.shape[-1]}"
    return None


def check_flash4(q: torch.Tensor) -> None:
    """Check that FlashAttention 4 can compute on tensors like ``q``.

    Raises:
        ValueError: there is an obstacle to it.
        ImportError: it is not installed, too old or broken.
    """
    if obstacle := obstacle_to_flash4(q):
        raise ValueError(
            f'the window of FlashAttention 4 {obstacle}; pass impl="triton" or impl="torch"'
        )
    if not flash4_is_installed():
        raise ImportError(
            f"the window of FlashAttention 4 needs the package {PACKAGE}, which is not installed: "
            f'{INSTALL}, or pass impl="triton"'
        )


def _options(window: int, scale: float) -> dict[str, Any]:
    return {
        "softmax_scale": scale,
        "causal": True,
        "window_size_left": window - 1,
        "window_size_right": 0,
    }


def _rows(rows: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] as flash attention takes it, [B, N, H, D] with D contiguous."""
    return row_strides(rows)[0].transpose(1, 2)


def launch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``window.launch_forward``."""
    forward, _ = _installed()
    rows = (_rows(each) for each in (q, k, v))
    out, lse, *_ = forward(*rows, return_lse=True, **_options(window, scale))
    return out.transpose(1, 2), lse


def launch_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``window.launch_backward``, with gradients of out and of lse [B, Hq, N]."""
    _, backward = _installed()
    rows = (_rows(each) for each in (q, k, v, out, dout))
    # An expanded gradient would not be aligned.
    dlse = None if dlse is None else dlse.float().contiguous()
    grads = backward(
        *rows, lse.contiguous(), dlse=dlse, deterministic=True, **_options(window, scale)
    )
    dq, dk, dv = (grad.contiguous().transpose(1, 2) for grad in grads)
    return dq, dk, dv


def _installed() -> tuple[Callable[..., Any], Callable[..., Any]]:
    functions = _functions()
    assert functions is not None, "the choice of an implementation makes sure that it is there"
    return functions


define(
    "flash4_window(Tensor q, Tensor k, Tensor v, int window, float scale) -> (Tensor, Tensor)",
    launch_forward,
    fake_forward,
)
define(
    "flash4_window_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? dlse, int window, float scale) -> (Tensor, Tensor, Tensor)",
    launch_backward,
    fake_backward,
)


def flash4_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``window_forward``, which computes windows that hold all positions here too.

    They are dense attention, for which torch has the faster kernels.
    """
    if window >= k.shape[2]:
        return window_forward(q, k, v, window, scale)
    return torch.ops.lighthouse.flash4_window(q, k, v, window, scale)


def flash4_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``window_backward``, and as ``flash4_forward`` chooses."""
    if window >= k.shape[2]:
        return window_backward(dout, dlse, q, k, v, out, lse, window, scale)
    return torch.ops.lighthouse.flash4_window_backward(dout, q, k, v, out, lse, dlse, window, scale)
