"""The choice between Triton's kernels and vectorised PyTorch."""

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


def choose_implementation(impl: str | None, q: torch.Tensor) -> str:
    """Choose "triton" or "torch", by ``impl`` or else by the device of ``q``.

    Raises:
        ValueError: ``impl`` is not known, or the kernels do not compute such tensors.
        ImportError: the kernels should run, and Triton is not installed.
    """
    if impl not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got impl = {impl!r}")
    if impl == "torch" or (impl is None and not q.is_cuda):
        return "torch"
    if kernels is None:
        raise ImportError(
            "Lighthouse on CUDA tensors uses Triton, which is not installed: pip install triton, "
            'or pass impl="torch" for the slower vectorised code'
        )
    kernels.check_supported(q)
    return "triton"
