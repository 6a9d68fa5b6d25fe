"""Where a test of Triton kernels runs: in the interpreter, or compiled where there is a GPU."""

import pytest
import torch

COMPILED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for the GPU")
KERNEL_DEVICES = [
    pytest.param("cpu", marks=COMPILED),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
