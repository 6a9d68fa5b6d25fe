"""Sums of rows in PyTorch and by the kernel, on a GPU or in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch

from lighthouse.row_sums import add_rows

kernels = pytest.importorskip("lighthouse.kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("add", [add_rows, kernels.add_rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("first", "count"), [(0, 45), (22, 23), (45, 0), (10, 20)])
def test_adds_where_it_is_told(add: Callable, dtype: torch.dtype, first: int, count: int) -> None:
    """As the ring has them: half of the heads of rows, some of which lie heads first."""
    if add is add_rows and DEVICE == "cuda" and dtype == torch.float64:
        pytest.skip("on a GPU the kernels run, which take no float64")
    whole = torch.full((2, 45, 6, 24), 7.0, dtype=dtype, device=DEVICE)
    into = whole.transpose(1, 2)[:, 3:]
    x = torch.randn(2, 45, 3, 24, device=DEVICE).to(dtype).transpose(1, 2)
    y = torch.randn(2, 3, count, 24, device=DEVICE)
    want = x.double().clone()
    want[:, :, first : first + count] += y.double()
    add(into, x, y, first)
    # Exact sums of float16 and float32 are rounded to float32 first.
    torch.testing.assert_close(into, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert (whole[:, :, :3] == 7).all()


def test_registered_as_it_computes() -> None:
    into, x, y = torch.randn(3, 1, 2, 20, 16, device=DEVICE)
    torch.library.opcheck(torch.ops.lighthouse.add_rows.default, (into, x, y[:, :, 5:], 5))
