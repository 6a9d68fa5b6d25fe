"""The choice between kernels and vectorised PyTorch."""

from collections.abc import Callable
from typing import Any

import torch

from .documents import cumulative_lengths

# The package of kernels, or None without Triton.
kernels: Any
try:
    from . import kernels
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernels = None

IMPLEMENTATIONS = ("triton", "torch")
WINDOW_IMPLEMENTATIONS = ("flash4", "flash", "torch")


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
            f'documents are not supported yet by impl = {impl!r}; pass impl="flash", or leave '
            "documents out"
        )


def layout_for(
    impl: str, documents: torch.Tensor | None, most_documents: int | None
) -> tuple[torch.Tensor, ...]:
    """What the ``operations_by`` an implementation take besides, in the last place.

    Args:
        documents: a layout [B, N].

    Returns:
        Nothing without documents. The layout for "torch", and cumulative lengths for "flash".
    """
    if documents is None:
        return ()
    return (cumulative_lengths(documents, most_documents) if impl == "flash" else documents,)


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
    """Choose "flash4", "flash" or "torch", by ``impl`` or else the first that computes ``q``.

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
    if obstacle := found.obstacle_to_flash(q):
        if impl is None:
            return "torch"
        raise ValueError(f'the window of flash attention {obstacle}; pass impl="torch"')
    if impl is not None or with_documents:
        return "flash"
    if not found.obstacle_to_flash4(q) and found.flash4_is_installed():
        return "flash4"
    return "flash"


def operations_by(impl: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of attention over a window by an implementation, without autograd.

    With documents, they take what ``layout_for`` returns besides. If there are more keys than
    queries then, "torch" takes the first key that each query may see, [B, N], in the place of a
    layout. "flash" takes, after the lengths, how many of the keys before the queries the first
    document of each row sees, [B].
    """
    if impl == "flash4":
        # pyrefly: ignore[missing-attribute]  Choosing it has made sure that there are kernels.
        return kernels.flash4_forward, kernels.flash4_backward
    if impl == "flash":
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
