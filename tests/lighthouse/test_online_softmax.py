"""Merging by logsumexps, in PyTorch and by the kernel, on a GPU or in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch

from lighthouse.online_softmax import merge_in_place, merged_output

kernels = pytest.importorskip("lighthouse.kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = 10240


def two_outputs(
    batch: int, heads: int, length: int, d: int, dtype: torch.dtype, device: str = DEVICE
) -> list[torch.Tensor]:
    """x, a, y and b, the outputs as attention leaves them: rows [B, N, H, D]."""
    rows = torch.randn(2, batch, length, heads, d).transpose(2, 3).to(device, dtype)
    a, b = (10 * torch.randn(2, batch, heads, length)).to(device)
    return [rows[0], a, rows[1], b]


def expected(x: torch.Tensor, a: torch.Tensor, y: torch.Tensor, b: torch.Tensor) -> tuple:
    sums = torch.stack((a, b)).double()
    out = (sums.softmax(0).unsqueeze(-1) * torch.stack((x, y)).double()).sum(0)
    return out.to(x.dtype), sums.logsumexp(0).to(a.dtype)


@pytest.mark.parametrize("merge", [merge_in_place, kernels.merge_in_place])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [8, 96, 128, 256])
def test_merges_as_float64_does(merge: Callable, dtype: torch.dtype, d: int) -> None:
    """The late half of the queries, as the ring merges it, and in place."""
    length = 45
    x, a, y, b = two_outputs(2, 3, length, d, dtype)
    # Beyond what exp takes in float32.
    a[..., -1], b[..., -1], a[..., -2] = 150, -150, -300
    # Sums over more than two ranks are in float32, and what is added to them need not be.
    x, early = x.float(), slice(0, length // 2)
    out, lse = expected(x, a, y, b)
    untouched = [rows[:, :, early].clone() for rows in (x, a)]
    late = slice(length // 2, length)
    merge(x[:, :, late], a[:, :, late], y[:, :, late].contiguous(), b[:, :, late].contiguous())
    torch.testing.assert_close(x[:, :, late], out[:, :, late], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(a[..., late], lse[..., late], rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, (x[:, :, early], a[:, :, early]), untouched))


@pytest.mark.parametrize("merge", [merge_in_place, kernels.merge_in_place])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(merge: Callable, dtype: torch.dtype) -> None:
    """As between two ranks, where the sum stays in the inputs' precision."""
    x, a, y, b = two_outputs(1, 2, 70, 64, dtype)
    out, lse = expected(x, a, y, b)
    merge(x, a, y, b)
    # Triton's interpreter truncates where a GPU rounds.
    steps = 1 if merge is merge_in_place or DEVICE == "cuda" else 2
    torch.testing.assert_close(x, out, rtol=steps * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(a, lse, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_one_softmax() -> None:
    leaves = [rows.double().requires_grad_() for rows in two_outputs(1, 2, 5, 4, torch.float32)]
    assert torch.autograd.gradcheck(merged_output, leaves)
    x, a, y, b = (rows.detach() for rows in leaves)
    torch.testing.assert_close(merged_output(x, a, y, b), expected(x, a, y, b)[0])
    # Where nothing was found, the other stands alone.
    assert torch.equal(merged_output(x, a, y, torch.full_like(b, -torch.inf)), x)


def test_registered_as_it_computes() -> None:
    tensors = two_outputs(1, 2, 20, 16, torch.float32)
    torch.library.opcheck(torch.ops.lighthouse.merge_in_place.default, tuple(tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [8, 64, 128, 256])
def test_repeats_bit_for_bit(dtype: torch.dtype, d: int) -> None:
    """A program that read what another thread had stored would differ at some of the places."""
    x, a, y, b = two_outputs(1, 8, 2 * PLACES, d, torch.bfloat16, "cuda")
    x, late = x.to(dtype), slice(PLACES, 2 * PLACES)
    y, b = y[:, :, late].contiguous(), b[:, :, late].contiguous()
    results = []
    for _ in range(20):
        out, lse = x.clone(), a.clone()
        kernels.merge_in_place(out[:, :, late], lse[:, :, late], y, b)
        results.append((out, lse))
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))
    out, lse = expected(x[:, :, late], a[:, :, late], y, b)
    tolerance = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(results[0][0][:, :, late], out, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(results[0][1][:, :, late], lse, rtol=1e-6, atol=1e-5)
