"""Attention over a window and one key in every few before it: against the oracle, and messages."""

import re
from typing import Any

import pytest
import torch
from attention_cases import rows
from hypothesis import given, settings
from hypothesis import strategies as st

from lighthouse import (
    ContextParallel,
    StridedAttention,
    reference,
    strided_attention,
    window_attention,
)
from lighthouse.strided import strided_pairs


def results(function: Any, inputs: list[torch.Tensor], grad: torch.Tensor, *arguments: Any,
            **options: Any) -> list[torch.Tensor]:  # fmt: skip
    """out and the gradients of q, k and v."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs, *arguments, **options)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    stride = draw(st.sampled_from([2, 3, 4, 8]))
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 2, 3), (2, 2, 1)]))
    return dict(
        n=stride * draw(st.integers(1, 8)),
        stride=stride,
        window=stride * draw(st.integers(1, 5)),
        batch=batch,
        kv_heads=kv_heads,
        heads=kv_heads * group,
        d=draw(st.integers(1, 5)),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_equals_the_oracle_in_float64(case: dict[str, Any]) -> None:
    names = ("n", "heads", "kv_heads", "batch", "d", "seed")
    *inputs, grad = rows(**{name: case[name] for name in names})
    arguments = inputs, grad, case["window"], case["stride"]
    found = results(strided_attention, *arguments, scale=case["scale"])
    expected = results(reference.strided_attention, *arguments, scale=case["scale"])
    for value, want in zip(found, expected, strict=True):
        assert value.dtype == torch.float64 and value.shape == want.shape
        torch.testing.assert_close(value, want, rtol=0, atol=1e-10)


def test_gradients_by_finite_differences() -> None:
    inputs = [x.contiguous().requires_grad_() for x in rows(12, d=2)[:3]]
    assert torch.autograd.gradcheck(lambda *x: strided_attention(*x, 4, 2), inputs)


def test_a_window_of_the_whole_sequence_is_dense() -> None:
    q, k, v, _ = rows(24)
    torch.testing.assert_close(strided_attention(q, k, v, 24, 4), window_attention(q, k, v, 24))


def test_keys_that_are_alike_in_their_block_give_dense_attention() -> None:
    """A key stands for its block, as often as the block is long."""
    q, k, v, _ = rows(32)
    k, v = (x[:, :, ::4].repeat_interleave(4, dim=2) for x in (k, v))
    torch.testing.assert_close(strided_attention(q, k, v, 8, 4), window_attention(q, k, v, 32))


def test_no_position_sees_a_later_one() -> None:
    q, k, v, _ = rows(32)
    before = strided_attention(q, k, v, 8, 4)
    for at in (5, 16, 27):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, at:] += 1
        after = strided_attention(*changed, 8, 4)
        assert torch.equal(after[:, :, :at], before[:, :, :at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_those_of_rounding(dtype: torch.dtype) -> None:
    *inputs, grad = rows(64, heads=4, kv_heads=2, d=16)
    expected = results(reference.strided_attention, [x.to(dtype).double() for x in inputs],
                       grad.to(dtype).double(), 16, 4)  # fmt: skip
    found = results(strided_attention, [x.to(dtype) for x in inputs], grad.to(dtype), 16, 4)
    for value, want in zip(found, expected, strict=True):
        error = (value.double() - want).norm() / want.norm()
        assert value.dtype == dtype and error < 4 * torch.finfo(dtype).eps


def test_kernels_compute_the_same() -> None:
    """In Triton's interpreter, or on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *inputs, grad = (x.to(device, torch.float32) for x in rows(96, heads=4, kv_heads=2, d=16))
    found = results(strided_attention, inputs, grad, 32, 8, impl="triton")
    expected = results(strided_attention, inputs, grad, 32, 8, impl="torch")
    for value, want in zip(found, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("stride", [4, 8])
def test_on_a_gpu_errors_are_those_of_rounding_and_bits_repeat(d: int, stride: int) -> None:
    """Far attention is cuDNN's where it computes, whose bits need not repeat."""
    *inputs, grad = (x.to("cuda", torch.bfloat16) for x in rows(2048, 8, 4, batch=2, d=d))
    double = [x.double() for x in inputs], grad.double()
    expected = results(strided_attention, *double, 256, stride, impl="torch")
    for impl in (None, "triton"):
        found = results(strided_attention, inputs, grad, 256, stride, impl=impl)
        for value, want in zip(found, expected, strict=True):
            error = (value.double() - want).norm() / want.norm()
            assert value.dtype == torch.bfloat16 and error < 0.01
    torch.use_deterministic_algorithms(True)
    try:
        twice = [results(strided_attention, inputs, grad, 256, stride) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*twice, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("n", "window", "stride"), [(8, 4, 2), (24, 8, 8), (24, 40, 4), (30, 9, 3)]
)
def test_pairs_are_those_that_attend(n: int, window: int, stride: int) -> None:
    pairs = 0
    for t in range(n):
        first = max(0, t // stride - window // stride + 1) * stride
        pairs += t - first + 1 + first // stride
    assert strided_pairs(n, window, stride) == pairs


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (8, 1, "stride must be at least 2, got stride = 1; use 4 or 8"),
        (10, 4, "stride = 4 must divide window = 10; use a window of 12"),
        (9, 3, "stride = 3 must divide the sequence's length, got 32 positions"),
        (0, 4, "window must be at least 1"),
    ],
)
def test_bad_numbers_are_named(window: int, stride: int, message: str) -> None:
    q, k, v, _ = rows(32)
    with pytest.raises(ValueError, match=re.escape(message)):
        strided_attention(q, k, v, window, stride)


@pytest.mark.parametrize("stride", [4.0, True])
def test_a_stride_is_an_integer(stride: Any) -> None:
    q, k, v, _ = rows(32)
    with pytest.raises(TypeError, match="stride must be of type int, got"):
        strided_attention(q, k, v, 8, stride)


def test_what_other_attentions_refuse_is_refused() -> None:
    q, k, v, _ = rows(32)
    with pytest.raises(ValueError, match="the same B, N and D"):
        strided_attention(q, k[:, :, :16], v[:, :, :16], 8, 4)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: strided_attention(x, k, v, 8, 4).sum())(q)
    with pytest.raises(ValueError, match="impl must be one of"):
        strided_attention(q, k, v, 8, 4, impl="cudnn")
    module = StridedAttention(8, 4)
    module.context_parallel = ContextParallel(None, 0, 2)
    with pytest.raises(ValueError, match="does not take context parallelism"):
        module(q, k, v, enable_gqa=True)


def test_module_attends_so_while_it_is_enabled() -> None:
    q, k, v, _ = rows(32)
    module = StridedAttention(8, 4)
    assert torch.equal(module(q, k, v, enable_gqa=True), strided_attention(q, k, v, 8, 4))
    module.enabled = False
    dense = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(
        module(q, k, v, enable_gqa=True), dense(q, k, v, is_causal=True, enable_gqa=True)
    )
    assert "window=8, stride=4, enabled=False" in repr(module) and not list(module.parameters())
    module.enabled = True
    scaled = strided_attention(q, k, v, 8, 4, scale=0.3)
    assert torch.equal(module(q, k, v, enable_gqa=True, scale=0.3), scaled)
    with pytest.raises(ValueError, match="does not know documents"):
        module(q, k, v, enable_gqa=True, documents=torch.zeros(1, 32, dtype=torch.int32))
