"""Which of the two implementations of everything around the dense attention runs."""

import torch

try:
    from . import kernels
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernels = None

IMPLEMENTATIONS = ("triton", "torch")


def choose_implementation(impl: str | None, q: torch.Tensor) -> str:
    """ "triton" or "torch", as ``impl`` says or else as the device of ``q`` does.

    Raises:
        ValueError: ``impl`` is not known, or the kernels do not compute such tensors.
        ImportError: the kernels are called for and Triton is not installed.
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
