"""Attention over a window: against the oracle, its gradients, its reach, and messages."""

import inspect
import math
from typing import Any

import pytest
import torch
from attention_cases import Dense, relative_error, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from lighthouse import LighthouseAttention, WindowAttention, reference, window, window_attention
from lighthouse.logsumexp import fold_lse_gradient
from lighthouse.window import window_pairs


def results(function, inputs: list[torch.Tensor], grad, grad_lse, *arguments: Any, **options: Any):
    """out, lse and the gradients of q, k and v."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*inputs, *arguments, **options)
    torch.autograd.backward((out, lse), (grad, grad_lse))
    return [out.detach(), lse.detach(), *(x.grad for x in inputs)]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(1, 40))
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 2, 3), (2, 2, 1)]))
    return dict(
        n=n,
        window=draw(st.sampled_from([1, 2, 3, 7, 16, n, n + 5])),
        batch=batch,
        kv_heads=kv_heads,
        heads=kv_heads * group,
        d=draw(st.integers(1, 5)),
        scale=draw(st.sampled_from([None, 0.3])),
        # Rows and scores that are held at once, so that short sequences fall into pieces.
        most_rows=draw(st.sampled_from([1, 5, 256])),
        scores=draw(st.sampled_from([1, 64, 2**24])),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_equals_the_oracle_in_float64(case: dict[str, Any]) -> None:
    names = ("n", "heads", "kv_heads", "batch", "d", "seed")
    *inputs, grad = rows(**{name: case[name] for name in names})
    grad_lse = torch.randn(grad.shape[:3], dtype=torch.float64)
    arguments = inputs, grad, grad_lse, case["window"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(window, "MOST_ROWS", case["most_rows"])
        patched.setattr(window, "SCORES_AT_ONCE", case["scores"])
        found = results(window_attention, *arguments, scale=case["scale"], return_lse=True)
    expected = results(reference.window_attention, *arguments, scale=case["scale"])
    for value, want in zip(found, expected, strict=True):
        assert value.dtype == torch.float64 and value.shape == want.shape
        torch.testing.assert_close(value, want, rtol=0, atol=1e-10)


def test_gradients_by_finite_differences() -> None:
    inputs = [x.contiguous().requires_grad_() for x in rows(6, d=2)[:3]]
    assert torch.autograd.gradcheck(lambda *x: window_attention(*x, 4, return_lse=True), inputs)
    assert torch.autograd.gradcheck(lambda *x: window_attention(*x, 4), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_those_of_rounding(dtype: torch.dtype) -> None:
    """No larger than twice those of dense attention in the same precision under the same mask."""
    *inputs, grad = (x.to(dtype) for x in rows(300, 4, 2, d=16))
    distance = torch.arange(300)[:, None] - torch.arange(300)
    mask = (distance >= 0) & (distance < 50)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: int) -> Any:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = (q @ k.mT / 4).masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)

    grad_lse = torch.zeros(grad.shape[:3], dtype=torch.float32)
    exact = results(
        reference.window_attention, [x.double() for x in inputs], grad.double(), grad_lse.double(),
        50,
    )  # fmt: skip
    found = results(window_attention, inputs, grad, grad_lse, 50, return_lse=True)
    rounded = results(plain, inputs, grad, grad_lse.to(dtype), 50)
    assert found[1].dtype == torch.float32
    for value, other, want in zip(found, rounded, exact, strict=True):
        assert relative_error(value, want) <= 2 * relative_error(other, want)


def test_window_of_the_whole_sequence_is_dense_attention() -> None:
    q, k, v, _ = rows(33, 4, 2)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    for size in (33, 1000):
        torch.testing.assert_close(window_attention(q, k, v, size), dense)
    own = v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(window_attention(q, k, v, 1), own)


@pytest.mark.parametrize("position", [3, 20, 47])
def test_a_key_reaches_its_window_and_nothing_else(position: int) -> None:
    """Forward to position + W - 1, to the last bit; its gradients come from there alone."""
    size, n = 9, 48
    q, k, v, grad = rows(n)
    out, lse = window_attention(q, k, v, size, return_lse=True)
    seen = (torch.arange(n) >= position) & (torch.arange(n) < position + size)
    for name, value in (("k", math.nan), ("k", 1e30), ("v", 1e30)):
        changed = {"k": k.clone(), "v": v.clone()}
        changed[name][:, :, position] = value
        other, other_lse = window_attention(q, changed["k"], changed["v"], size, return_lse=True)
        differs = ((other != out).any(-1)).any(1)[0]
        assert torch.equal(differs, seen), name
        lse_differs = (other_lse != lse).any(1)[0]
        assert torch.equal(lse_differs, seen if name == "k" else torch.zeros(n, dtype=bool))
    leaves = [x.clone().requires_grad_() for x in (k, v)]
    part = window_attention(q, *leaves, size) * grad
    for each in torch.autograd.grad(part[:, :, ~seen].sum(), leaves):
        assert not each[:, :, position].any()


def test_nan_beyond_the_window_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product touches a key or value that no row of its piece sees, in either direction."""
    monkeypatch.setattr(window, "MOST_ROWS", 16)
    *inputs, grad = rows(128)
    clean = results(window_attention, inputs, grad, grad[..., 0], 10, return_lse=True)
    for first, last in ((0, 39), (96, 128)):
        poisoned = [x.clone() for x in inputs]
        for x in poisoned[1:]:
            x[:, :, first:last] = math.nan
        found = results(window_attention, poisoned, grad, grad[..., 0], 10, return_lse=True)
        # The pieces from 48 to 95 see keys from 39 to 95.
        for value, want in zip(found[:3], clean[:3], strict=True):
            assert torch.equal(value[:, :, 48:96], want[:, :, 48:96])


def test_autocast_does_not_round_the_scores() -> None:
    inputs = [x.bfloat16() for x in rows(64, d=16)[:3]]
    expected = window_attention(*inputs, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(window_attention(*inputs, 16), expected)


def test_compiles_whole_and_registers_as_torch_asks() -> None:
    *inputs, grad = rows(40, 4, 2)
    arguments = inputs, grad, grad[..., 0], 7
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    expected = results(window_attention, *arguments, return_lse=True)
    for value, want in zip(results(compiled, *arguments, return_lse=True), expected, strict=True):
        assert torch.equal(value, want)
    operations = torch.ops.lighthouse
    torch.library.opcheck(operations.window.default, (*inputs, 7, 0.5))
    out, lse = expected[:2]
    for grad_lse in (None, grad[..., 0]):
        torch.library.opcheck(
            operations.window_backward.default, (grad, grad_lse, *inputs, out, lse, 7, 0.5)
        )


def test_pairs_are_what_positions_see() -> None:
    for n, size in ((1, 1), (10, 3), (10, 10), (7, 100)):
        assert window_pairs(n, size) == sum(min(t + 1, size) for t in range(n))


def test_module_switches_between_window_and_dense() -> None:
    module = WindowAttention(5, Dense())
    q, k, v, _ = rows(20)
    assert module.enabled and not list(module.state_dict())
    assert torch.equal(module(q, k, v, enable_gqa=True), window_attention(q, k, v, 5))
    scaled = module(q, k, v, enable_gqa=True, scale=0.1)
    assert torch.equal(scaled, window_attention(q, k, v, 5, scale=0.1))
    assert not hasattr(module.sdpa, "keywords")
    module.enabled = False
    options = {"is_causal": True, "enable_gqa": True, "scale": 0.1}
    assert torch.equal(module(q, k, v, **options), Dense()(q, k, v, **options))
    assert module.sdpa.keywords == options
    assert "window=5, enabled=False" in repr(module)


def test_module_refuses_what_it_cannot_do() -> None:
    module, inputs = WindowAttention(5), rows(20)[:3]
    with pytest.raises(ValueError, match="attention over a window is causal; pass is_causal"):
        module(*inputs, enable_gqa=True, is_causal=False)
    with pytest.raises(ValueError, match="pass enable_gqa = True"):
        module(*inputs)
    assert issubclass(WindowAttention, LighthouseAttention.__base__)


@pytest.mark.parametrize(
    ("size", "options", "error", "message"),
    [
        (0, {}, ValueError, "window must be at least 1, .* got window = 0"),
        (True, {}, TypeError, "window must be of type int, got True of type bool"),
        (2.0, {}, TypeError, "window must be of type int, got 2.0 of type float"),
        (
            4,
            {"impl": "flash"},
            ValueError,
            "must be one of flash4, triton, torch, got impl = 'flash'",
        ),
        (4, {"impl": "triton"}, ValueError, 'and float32, got torch.float64; pass impl="torch"'),
        (
            2**63,
            {},
            ValueError,
            "window must be at most 2,147,483,647, got window = 9223372036854775808; .* dense",
        ),
    ],
)
def test_messages(size: Any, options: dict[str, str], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        window_attention(*rows(8)[:3], size, **options)
    if not options:
        with pytest.raises(error, match=message):
            WindowAttention(size)


def test_messages_about_tensors() -> None:
    q, k, v, _ = rows(8)
    with pytest.raises(ValueError, match="must be .B, heads, N, D., got q"):
        window_attention(q[0], k, v, 2)
    with pytest.raises(ValueError, match="must divide the query heads"):
        window_attention(q[:, :1], *(x.repeat_interleave(2, dim=1) for x in (k, v)), 2)
    with pytest.raises(TypeError, match="must share one dtype"):
        window_attention(q, k.float(), v, 2)


def cudnn_forward(q, k, v, bias, with_lse, dropout, is_causal, debug, *, scale):
    assert bias is None and with_lse and is_causal and not dropout
    out, lse = torch.ops.lighthouse.window(q, k, v, q.shape[2], scale)
    return out, lse.unsqueeze(-1), None


def cudnn_backward(dout, q, k, v, out, lse, seed, offset, bias, _q, _k, max_q, max_k, dropout,
                   is_causal, *, scale):  # fmt: skip
    assert is_causal and not dropout and max_q == max_k == q.shape[2]
    assert dout.stride() == out.stride() == q.stride()
    arguments = dout, None, q, k, v, out, lse.squeeze(-1), max_q, scale
    return torch.ops.lighthouse.window_backward(*arguments)


def test_dense_attention_takes_cudnn_where_it_computes(monkeypatch) -> None:
    """cuDNN's logsumexp has a dimension more."""
    *inputs, grad = (x.float() for x in rows(40, 4, 2))
    grad_lse = torch.randn(grad.shape[:3])
    expected = results(window_attention, inputs, grad, grad_lse, 40, scale=0.5, return_lse=True)
    for name, stand_in in (("", cudnn_forward), ("_backward", cudnn_backward)):
        name = f"_scaled_dot_product_cudnn_attention{name}"
        there = getattr(torch.ops.aten, name).default._schema.arguments
        assert len(there) == len(inspect.signature(stand_in).parameters)
        monkeypatch.setattr(torch.ops.aten, name, stand_in)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda parameters: True)

    def by_cudnn(*x: torch.Tensor) -> Any:
        return window._WindowAttention.apply(*x, 40, 0.5, "triton", True)

    for each in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2)):
        for value, want in zip(results(by_cudnn, inputs, each, grad_lse), expected, strict=True):
            assert relative_error(value, want) < 1e-6


@pytest.mark.parametrize("size", [1, 5, 40, 70])
def test_the_kernel_agrees_with_the_vectorised_code(size: int) -> None:
    """Gradients through the logsumexp too, although the kernel's backward knows of none."""
    *inputs, grad = (x.float() for x in rows(70, 4, 2, 2, 8))
    grad_lse = torch.randn(grad.shape[:3])
    # Rows without a gradient of out, or with next to none.
    grad[:, :, 3] = 0
    grad[:, :, 4] *= 1e-30
    grad_lse[:, :, 4] = 0
    options = {"scale": 0.5, "return_lse": True}
    expected = results(window_attention, inputs, grad, grad_lse, size, **options)
    found = results(window_attention, inputs, grad, grad_lse, size, impl="triton", **options)
    for value, want in zip(found, expected, strict=True):
        assert relative_error(value, want) < 1e-5
    assert found[0].transpose(1, 2).is_contiguous()


def test_the_operations_by_kernel_are_well_formed() -> None:
    *inputs, grad = (x.float() for x in rows(20, 4, 2, 2, 8))
    ops = torch.ops.lighthouse
    out, lse = ops.window_by_kernel(*inputs, 5, 0.5)
    torch.library.opcheck(ops.window_by_kernel.default, (*inputs, 5, 0.5))
    torch.library.opcheck(ops.window_by_kernel_backward.default, (grad, *inputs, out, lse, 5, 0.5))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("size", [1, 2, 9, 60])
@pytest.mark.parametrize("before", [1, 8, 20])
def test_the_last_query_is_at_the_last_key(impl: str, size: int, before: int) -> None:
    """Queries without those of the first positions have the outputs and gradients of the rest."""
    dtype, bound = {"torch": (torch.float64, 1e-12), "triton": (torch.float32, 1e-5)}[impl]
    q, k, v, grad = (x.to(dtype) for x in rows(60, 4, 2, 2))
    grad_lse = torch.randn(grad.shape[:3], dtype=dtype)
    for x in (grad, grad_lse):
        x[:, :, :before] = 0
    whole = results(window_attention, [q, k, v], grad, grad_lse, size, scale=0.5, return_lse=True)

    def by_operation(*x: torch.Tensor) -> Any:
        return window._WindowAttention.apply(*x, size, 0.5, impl, True)

    given = [q[:, :, before:], k, v], grad[:, :, before:], grad_lse[:, :, before:]
    found = results(by_operation, *given)
    for value, want in zip(found, whole, strict=True):
        want = want[:, :, -value.shape[2] :]
        assert (value - want).norm() < bound * (1 + want.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-3, 0.0])
def test_folded_rows_hold_the_gradient_of_the_logsumexp(dtype: torch.dtype, size: float) -> None:
    """rowsum(dout' out') is rowsum(dout out) - dlse up to the rounding of out'."""
    torch.manual_seed(0)
    dout, out = (torch.randn(1, 2, 50, 64) for _ in range(2))
    dout, out, dlse = (dout * size).to(dtype), out.to(dtype), torch.randn(1, 2, 50)
    dlse[:, :, :5] = 0
    rows, other = fold_lse_gradient(dout, dlse, out)
    assert rows.dtype == other.dtype == dtype and other.isfinite().all()
    found = (rows.double() * other.double()).sum(-1)
    want = (dout.double() * out.double()).sum(-1) - dlse
    rounding = (rows.double() * other.double()).norm(dim=-1) * torch.finfo(dtype).eps
    changed = (rows.double() - dout.double()).norm(dim=-1)
    assert ((found - want).abs() <= 4 * rounding + 8 * changed + 1e-6).all()
    assert (changed <= 2e-3 * 8 * dlse.abs()).all()
    if size == 1:
        assert torch.equal(rows, dout)
