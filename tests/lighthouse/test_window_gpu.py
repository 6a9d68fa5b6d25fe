"""Attention over a window on a GPU, by the kernel and by FlashAttention 4."""

import math

import pytest
import torch
from attention_cases import output_and_gradients, relative_error

from lighthouse import (
    LighthouseConfig,
    WindowAttention,
    kernels,
    lighthouse_attention,
    merge,
    select,
    window,
    window_attention,
)
from lighthouse.cudnn import takes_cudnn

pytestmark = pytest.mark.gpu

# No tile of the kernels ends with this sequence or this window.
N, WINDOW = 4100, 200


@pytest.fixture(params=["triton", "flash4"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that this machine has. A broken installation is an error."""
    if request.param == "flash4":
        head = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
        obstacle = kernels.obstacle_to_flash4(head)
        if obstacle or not kernels.flash4_is_installed():
            pytest.skip(f"FlashAttention 4 {obstacle or 'is not installed'}")
    return request.param


def inputs_of(dtype: torch.dtype, d: int, heads: int = 4, kv_heads: int = 2, n: int = N):
    """q, k, v, and gradients of out and lse, on a GPU."""
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(2, n, h, d).to("cuda", dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    return [q, k, v], grad, torch.randn(2, heads, n, device="cuda")


def results(function, inputs, grad, grad_lse, *arguments, **options):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = function(*inputs, *arguments, return_lse=True, **options)
    torch.autograd.backward((out, lse), (grad, grad_lse.to(lse.dtype)))
    return [out.detach(), lse.detach(), *(x.grad for x in inputs)]


def plain(q, k, v, size, return_lse):
    """The same in q's own precision, with all scores in memory."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill((distance < 0) | (distance >= size), -math.inf)
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [32, 64, 128, 256])
@pytest.mark.parametrize("size", [1, WINDOW, N])
def test_errors_are_those_of_rounding(impl: str, dtype: torch.dtype, d: int, size: int) -> None:
    given = inputs_of(dtype, d)
    inputs, *grads = given
    exact = results(
        window_attention, [x.double() for x in inputs], *(x.double() for x in grads), size
    )
    found = results(window_attention, *given, size, impl=impl)
    rounded = results(plain, *given, size)
    # Under a window of one position, gradients of q and k are those of lse alone. What is added to
    # out to carry them is rounded with it, and summed over D.
    alone = torch.finfo(dtype).eps * math.sqrt(d) if size == 1 else 1e-6
    for name, value, other, want in zip(
        ("out", "lse", "dq", "dk", "dv"), found, rounded, exact, strict=True
    ):
        assert relative_error(value, want) <= 2 * relative_error(other, want) + alone, name


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("before", [1, WINDOW - 1])
def test_the_last_query_is_at_the_last_key(impl: str, d: int, before: int) -> None:
    """As in chunks of a sequence, where keys of the chunk before come first."""
    (q, k, v), *grads = inputs_of(torch.bfloat16, d)
    for grad in grads:
        grad[:, :, :before] = 0
    exact = results(
        window_attention, [x.double() for x in (q, k, v)], *(x.double() for x in grads), WINDOW
    )
    rounded = results(plain, (q, k, v), *grads, WINDOW)

    def by_operation(*x, return_lse):
        return window._WindowAttention.apply(*x, WINDOW, 1 / math.sqrt(d), impl, return_lse)

    found = results(by_operation, [q[:, :, before:], k, v], *(x[:, :, before:] for x in grads))
    for name, value, other, want in zip(
        ("out", "lse", "dq", "dk", "dv"), found, rounded, exact, strict=True
    ):
        other, want = (x[:, :, -value.shape[2] :] for x in (other, want))
        assert relative_error(value, want) <= 2 * relative_error(other, want) + 1e-6, name


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_bits_repeat(impl: str, kv_heads: int) -> None:
    """Without torch's deterministic mode, and with other memory in use."""
    given = inputs_of(torch.bfloat16, 128, 4, kv_heads, n=20000)
    first = results(window_attention, *given, 1000, impl=impl)
    for size in (2**20, 2**24, 2**27):
        held = torch.full((size,), math.nan, device="cuda")
        again = results(window_attention, *given, 1000, impl=impl)
        del held
        for value, want in zip(again, first, strict=True):
            assert torch.equal(value, want)
    assert torch.get_deterministic_debug_mode() == 0


def test_dense_attention_repeats_its_bits_in_deterministic_mode() -> None:
    """As a window that holds all keys, and within a merge."""
    given = inputs_of(torch.bfloat16, 128, 4, 4, n=16384)
    config = LighthouseConfig(
        3, 4, 256, picks_per_stratum=64, entry_score="first", combine="finest", window=WINDOW
    )

    def merged() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in given[0]]
        out = lighthouse_attention(*leaves, config)
        return [out.detach(), *torch.autograd.grad(out, leaves, given[1])]

    torch.use_deterministic_algorithms(True)
    try:
        for compute in (lambda: results(window_attention, *given, 16384), merged):
            first, again = compute(), compute()
            for value, want in zip(again, first, strict=True):
                assert torch.equal(value, want)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_may_lie_in_memory_in_any_way() -> None:
    """torch looks a cuDNN plan up by q, k and v, but it holds for the gradient's strides alone.

    Through the gradient of the logsumexp, the output of attention may lie in other ways too.
    """
    inputs, grad, grad_lse = inputs_of(torch.bfloat16, 64, 4, 4)
    assert takes_cudnn(*inputs)
    expected = results(window_attention, inputs, grad, grad_lse, N)
    heads_first = grad.contiguous()
    assert heads_first.stride() != grad.stride()
    for gradient in (heads_first, grad, heads_first):
        found = results(window_attention, inputs, gradient, grad_lse, N)
        for value, want in zip(found, expected, strict=True):
            assert relative_error(value, want) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_the_kernel_does_not_take_goes_to_pytorch(dtype: torch.dtype) -> None:
    """float64, and a D above 256."""
    d = 320 if dtype == torch.bfloat16 else 64
    given = inputs_of(dtype, d, n=300)
    found = results(window_attention, *given, 50)
    for value, want in zip(found, results(window_attention, *given, 50, impl="torch"), strict=True):
        assert torch.equal(value, want)
    with pytest.raises(ValueError, match='the Triton kernels .*; pass impl="torch"'):
        window_attention(*given[0], 50, impl="triton")


@pytest.mark.parametrize("d", [20, 64, 256])
def test_float32_is_not_rounded_to_less(d: int) -> None:
    """As tensor cores would."""
    given = inputs_of(torch.float32, d, n=1000)
    inputs, *grads = given
    exact = results(
        window_attention, [x.double() for x in inputs], *(x.double() for x in grads), 200
    )
    for value, want in zip(results(window_attention, *given, 200), exact, strict=True):
        assert relative_error(value, want) < 1e-5


def test_compiles_whole(impl: str) -> None:
    inputs, grad, _ = inputs_of(torch.bfloat16, 128)
    module = WindowAttention(WINDOW, impl=impl)
    found = []
    for function in (module, torch.compile(module, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, enable_gqa=True)
        out.backward(grad)
        found.append([out.detach(), *(x.grad for x in leaves)])
    for value, want in zip(*found, strict=True):
        assert torch.equal(value, want)
    given = inputs_of(torch.bfloat16, 64)
    compiled = torch.compile(window_attention, fullgraph=True)
    expected = results(window_attention, *given, WINDOW, impl=impl)
    found = results(compiled, *given, WINDOW, impl=impl)
    for value, want in zip(found, expected, strict=True):
        assert relative_error(value, want) < 1e-2


def test_operations_are_registered_as_torch_asks(impl: str) -> None:
    inputs, grad, grad_lse = inputs_of(torch.bfloat16, 64, n=300)
    out, lse = window_attention(*inputs, 50, impl=impl, return_lse=True)
    name = {"triton": "window_by_kernel", "flash4": "flash4_window"}[impl]
    forward = getattr(torch.ops.lighthouse, name).default
    backward = getattr(torch.ops.lighthouse, f"{name}_backward").default
    torch.library.opcheck(forward, (*inputs, 50, 0.1))
    # FlashAttention 4 takes the gradient of the logsumexp, or none.
    for more in ((grad_lse,), (None,)) if impl == "flash4" else ((),):
        torch.library.opcheck(backward, (grad, *inputs, out, lse, *more, 50, 0.1))
    # Rows that lie elsewhere in memory give results that lie where they should.
    inputs = [x.contiguous() for x in inputs]
    torch.library.opcheck(forward, (*inputs, 50, 0.1))


def test_memory_of_backward_does_not_depend_on_the_number_of_processors(impl: str) -> None:
    """Flash attention would hold a sum of q's size for every few processors."""
    inputs, grad, _ = inputs_of(torch.bfloat16, 128, 4, 4, n=32768)
    leaves = [x.requires_grad_() for x in inputs]
    out = window_attention(*leaves, 256, impl=impl)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out.backward(grad)
    size = out.numel() * 4
    assert torch.cuda.max_memory_allocated() - before < 6 * size


def test_no_host_synchronisation(impl: str) -> None:
    given = inputs_of(torch.bfloat16, 64)
    results(window_attention, *given, WINDOW, impl=impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(window_attention, *given, WINDOW, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_merges_with_the_selection(
    monkeypatch: pytest.MonkeyPatch, impl: str, kv_heads: int
) -> None:
    """Backward goes through the merged output and logsumexp; its bits repeat."""
    monkeypatch.setattr(merge, "window_operations", lambda q: window.operations_by(impl))
    config = LighthouseConfig(
        3, 4, 128, picks_per_stratum=32, entry_score="first", combine="finest", window=WINDOW
    )
    inputs, grad, _ = inputs_of(torch.bfloat16, 128, 4, kv_heads, n=4096)
    options = {"config": config, "selection": select(*inputs, config)}

    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype) for x in inputs]
        return output_and_gradients(
            lighthouse_attention, leaves, grad.to(dtype), impl=impl, **options
        )

    exact, plain = run("torch", torch.float64), run("torch", torch.bfloat16)
    found, again = (run("triton", torch.bfloat16) for _ in range(2))
    for value, other, want, second in zip(found, plain, exact, again, strict=True):
        least = torch.finfo(torch.bfloat16).eps
        assert relative_error(value, want) <= max(1.05 * relative_error(other, want), least)
        assert torch.equal(value, second)
