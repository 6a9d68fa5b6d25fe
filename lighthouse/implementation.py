"""The choice between kernels and vectorised PyTorch."""

from collections.abc import Callable
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
WINDOW_IMPLEMENTATIONS = ("flash4", "triton", "torch")


def check_implementation(impl: str | None, known: tuple[str, ...]) -> None:
    """Check that ``impl`` is one of ``known``, or None, which leaves the choice to the tensors.

    Raises:
        ValueError: it is another.
    """
    if impl not in (None, *known):
        raise ValueError(f"impl must be one of {', '.join(known)}, got impl = {impl!r}")


def check_for_documents(
    impl: str | None, documents: torch.Tensor | None, known: tuple[str, ...]
) -> None:
    """Check that ``impl`` is known, and takes documents where there are some.

    Args:
        known: the names that ``impl`` may have.

    Raises:
        ValueError: ``impl`` is not known, or does not know documents and there are some.
    """
    check_implementation(impl, known)
    if documents is not None and impl == "flash4":
        raise ValueError(
            f'documents are not supported yet by impl = {impl!r}; pass impl="triton", or leave '
            "documents out"
        )


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


def choose_window_implementation(
    impl: str | None, q: torch.Tensor, with_documents: bool = False
) -> str:
    """Choose "flash4", "triton" or "torch", by ``impl`` or else the first that computes ``q``.

    Args:
        with_documents: whether there are documents, which "flash4" does not know.

    Raises:
        ValueError: ``impl`` is not known, or does not compute such tensors.
        ImportError: the kernels should run, and Triton is not installed; or FlashAttention 4
            should, and is not installed, too old or broken.
    """
    found = _kernels_unless_torch(impl, q, WINDOW_IMPLEMENTATIONS)
    if found is None:
        return "torch"
    if impl == "flash4":
        found.check_flash4(q)
        return "flash4"
    if impl is None and found.obstacle_to_kernels(q):
        return "torch"
    found.check_supported(q)
    wants_flash4 = impl is None and not with_documents and not found.obstacle_to_flash4(q)
    return "flash4" if wants_flash4 and found.flash4_is_installed() else "triton"


def operations_by(impl: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of attention over a window by an implementation, without autograd.

    With documents, they take the first key that each query may see besides, [B, N]. With as many
    keys as queries this is the layout.
    """
    if impl == "flash4":
        # pyrefly: ignore[missing-attribute]  Choosing it has made sure that there are kernels.
        return kernels.flash4_forward, kernels.flash4_backward
    if impl == "triton":
        # pyrefly: ignore[missing-attribute]  As above.
        return kernels.window_forward, kernels.window_backward
    return torch.ops.lighthouse.window, torch.ops.lighthouse.window_backward


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
