from functools import partial

import torch
from measuring import relative_error
from windows import gradients

from lighthouse import window_attention


def test_kernels_get_the_same_gradient_whatever_the_layout_of_their_output() -> None:
    rows = [torch.randn(1, 48, 2, 8).transpose(1, 2) for _ in range(3)]
    attend = partial(window_attention, window=5, impl="torch")

    def other(*rows: torch.Tensor) -> torch.Tensor:
        return attend(*rows).transpose(1, 2).contiguous().transpose(1, 2)

    assert attend(*rows).stride() != other(*rows).stride()
    for ours, theirs in zip(gradients(attend, rows), gradients(other, rows), strict=True):
        assert relative_error(ours, theirs) < 1e-6
