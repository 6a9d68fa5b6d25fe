"""The choice between kernels and vectorised PyTorch."""

from typing import Any

import torch

# The package of kernels, or None without Triton.
kernels: Any
try:
    from . import kernels
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernels = None

IMPLEMENTATIONS = ("triton", "torch")
WINDOW_IMPLEMENTATIONS = ("flash", "torch")


def check_implementation(impl: str | None, known: tuple[str, ...]) -> None:
    """Check that ``impl`` is one of ``known``, or None, which leaves the choice to the tensors.

    Raises:
        ValueError: it is another.
    """
    if impl not in (None, *known):
        raise ValueError(f"impl must be one of {', '.join(known)}, got impl = {impl!r}")


def choose_implementation(impl: str | None, q: torch.Tensor) -> str:
    """Choose "triton" or "torch", by ``impl`` or else by the device of ``q``.

    Raises:
        ValueError: ``impl`` is not known, or the kernels do not compute such tensors.
        ImportError: the kernels should run, and Triton is not installed.
    """
    found = _kernels_unless_torch(impl, q, IMPLEMENTATIONS)
    if found is None:
        return "torch"
    found.check_supported(q)
    return "triton"


def choose_window_implementation(impl: str | None, q: torch.Tensor) -> str:
    """Choose "flash" or "torch", by ``impl`` or else by what flash attention computes.

    Raises:
        ValueError: ``impl`` is not known, or is "flash" and flash attention does not compute such
            tensors.
        ImportError: the kernels should run, and Triton is not installed.
    """
    found = _kernels_unless_torch(impl, q, WINDOW_IMPLEMENTATIONS)
    obstacle = found.obstacle_to_flash(q) if found is not None else None
    if found is None or (impl is None and obstacle):
        return "torch"
    if obstacle:
        raise ValueError(f'the window of flash attention {obstacle}; pass impl="torch"')
    return "flash"


def _kernels_unless_torch(impl: str | None, q: torch.Tensor, known: tuple[str, ...]) -> Any:
    """The package of kernels, or None if vectorised PyTorch is to run."""
    check_implementation(impl, known)
    if impl == "torch" or (impl is None and not q.is_cuda):
        return None
    if kernels is None:
        raise ImportError(
            "Lighthouse on CUDA tensors uses Triton, which is not installed: pip install triton, "
            'or pass impl="torch" for the slower vectorised code'
        )
    return kernels
