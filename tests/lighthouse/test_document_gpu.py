"""Documents by kernels on a GPU, at the lengths of training."""

import math
from typing import Any

import pytest
import torch
from attention_cases import output_and_gradients, relative_error
from document_cases import length_layout

from lighthouse import (
    ContextParallel,
    LighthouseAttention,
    LighthouseConfig,
    WindowAttention,
    lighthouse_attention,
    select,
    window_attention,
)
from lighthouse.document_chunks import documents_of_chunks
from lighthouse.halo import layouts_in_chunks

pytestmark = pytest.mark.gpu

N, MOST = 98304, 256
CONFIG = LighthouseConfig(
    3, 4, 1536, picks_per_stratum=128, entry_score="first", combine="finest", window=512
)
SUM = LighthouseConfig(3, 4, 1536, picks_per_stratum=128, entry_score="max", combine="sum")
# Median lengths of documents, as of books and of web pages.
MEDIANS = {"books": 300_000, "web pages": 1000}


def case(
    median: int, n: int = N, batch: int = 1, kv_heads: int = 2, d: int = 128
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """q, k and v in bf16, a gradient, and documents, on a GPU."""
    torch.manual_seed(median)
    q, k, v, grad = (
        torch.randn(batch, n, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in (4, kv_heads, kv_heads, 4)
    )
    documents = length_layout(batch, n, CONFIG.coarsest_span, median, MOST, seed=1)
    return [q, k, v], grad, documents.cuda()


def by_kernels(config: LighthouseConfig, **more: Any) -> dict[str, Any]:
    return {"config": config, "impl": "triton", **more}


@pytest.mark.parametrize("scorer", ["norm", "random"])
@pytest.mark.parametrize("text", MEDIANS)
def test_selects_as_vectorised_pytorch(text: str, scorer: Any) -> None:
    """Norms round in another order, so that a pick of another entry is a near-tie."""
    inputs, _, documents = case(MEDIANS[text], batch=2)
    config = LighthouseConfig(
        3, 4, 1536, scorer, picks_per_stratum=128, entry_score="first", combine="finest"
    )
    ours, theirs = (
        select(*inputs, config, documents=documents, impl=impl) for impl in ("triton", "torch")
    )
    if scorer == "random":
        assert all(map(torch.equal, ours, theirs))
    else:
        assert (ours.index == theirs.index).double().mean() > 0.999


@pytest.mark.parametrize("config", [CONFIG, SUM], ids=["window", "sum"])
@pytest.mark.parametrize("text", MEDIANS)
def test_errors_are_those_of_rounding(text: str, config: LighthouseConfig) -> None:
    """Against float32, of the kernels and of vectorised PyTorch, by one selection."""
    inputs, grad, documents = case(MEDIANS[text], d=64)
    options: dict[str, Any] = {"documents": documents}
    options["selection"] = select(*inputs, config, documents=documents, impl="triton")

    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        rows = [x.to(dtype) for x in inputs]
        return output_and_gradients(
            lighthouse_attention, rows, grad.to(dtype), config, impl=impl, **options
        )

    exact, rounded = run("torch", torch.float32), run("torch", torch.bfloat16)
    # NaN of memory that was used before shows if anything is read and not written.
    held = torch.full((2**29,), math.nan, device="cuda")
    del held
    found = run("triton", torch.bfloat16)
    for value, other, want in zip(found, rounded, exact, strict=True):
        least = torch.finfo(torch.bfloat16).eps
        assert relative_error(value, want) <= max(1.5 * relative_error(other, want), least)


@pytest.mark.parametrize("size", [1, 200, 512, N])
@pytest.mark.parametrize("text", MEDIANS)
def test_windows_agree_with_float64(text: str, size: int) -> None:
    """Also the logsumexp and its gradient."""
    n = N if size == 512 else 12288
    inputs, grad, documents = case(MEDIANS[text] * n // N, n=n, batch=2, d=64)
    grad_lse = torch.randn(grad.shape[:3], device="cuda")

    def run(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        options: dict[str, Any] = {"documents": documents}
        out, lse = window_attention(*leaves, size, impl=impl, return_lse=True, **options)
        grads = torch.autograd.grad((out, lse), leaves, (grad.to(dtype), grad_lse.to(lse.dtype)))
        return [out.detach(), lse.detach(), *grads]

    exact, rounded = run(torch.float64, "torch"), run(torch.bfloat16, "torch")
    found = run(torch.bfloat16, "triton")
    alone = torch.finfo(torch.bfloat16).eps * math.sqrt(64)
    for name, value, other, want in zip(
        ("out", "lse", "dq", "dk", "dv"), found, rounded, exact, strict=True
    ):
        assert value.isfinite().all(), name
        if want.norm():
            assert relative_error(value, want) <= 2 * relative_error(other, want) + alone, name


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("text", MEDIANS)
def test_bits_repeat_and_no_document_sees_another(text: str, kv_heads: int) -> None:
    """With poisoned memory between, and with other tokens in the last document."""
    inputs, grad, documents = case(MEDIANS[text] // 4, n=N // 4, batch=2, kv_heads=kv_heads)
    config = LighthouseConfig(
        3, 4, 384, picks_per_stratum=128, entry_score="first", combine="finest", window=512
    )
    kept = torch.ones(documents.shape, dtype=torch.bool, device="cuda")
    kept[0, int(documents[0, -1]) :] = False
    changed = [torch.where(kept[:, None, :, None], x, -3 * x) for x in inputs]
    options = by_kernels(config, documents=documents)
    torch.use_deterministic_algorithms(True)
    try:
        first = output_and_gradients(lighthouse_attention, inputs, grad, **options)
        for size in (2**24, 2**28):
            held = torch.full((size,), math.nan, device="cuda")
            del held
            again = output_and_gradients(lighthouse_attention, inputs, grad, **options)
            assert all(map(torch.equal, first, again))
        other = output_and_gradients(lighthouse_attention, changed, grad, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for value, want in zip(other, first, strict=True):
        assert torch.equal(value.transpose(1, 2)[kept], want.transpose(1, 2)[kept])


@pytest.mark.parametrize("config", [CONFIG, SUM], ids=["window", "sum"])
def test_no_host_synchronisation(config: LighthouseConfig) -> None:
    inputs, grad, documents = case(MEDIANS["web pages"])
    options = by_kernels(config, documents=documents)
    output_and_gradients(lighthouse_attention, inputs, grad, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output_and_gradients(lighthouse_attention, inputs, grad, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_takes_other_layouts() -> None:
    inputs, grad, documents = case(MEDIANS["books"])
    other = case(MEDIANS["web pages"])[2]
    leaves = [x.clone().requires_grad_() for x in inputs]
    layout = documents.clone()
    options = by_kernels(CONFIG, documents=layout)

    def step() -> list[torch.Tensor]:
        out = lighthouse_attention(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    torch.use_deterministic_algorithms(True)
    try:
        stream = torch.cuda.Stream()
        # The rows and the layout are still being written.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for each in (other, documents):
            layout.copy_(each)
            graph.replay()
            expected = output_and_gradients(
                lighthouse_attention, inputs, grad, **by_kernels(CONFIG, documents=each)
            )
            assert all(map(torch.equal, found, expected))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("module", ["lighthouse", "window"])
def test_compiles_whole_for_all_layouts(module: str) -> None:
    inputs, grad, documents = case(MEDIANS["web pages"], n=N // 4)
    config = LighthouseConfig(
        3, 4, 384, picks_per_stratum=128, entry_score="first", combine="finest", window=512
    )
    attention: Any = (
        LighthouseAttention(config, impl="triton")
        if module == "lighthouse"
        else WindowAttention(512, impl="triton")
    )
    compiled = torch.compile(attention, fullgraph=True)
    for step, layout in enumerate((documents, torch.zeros_like(documents))):
        found = []
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for function in (attention, compiled):
                leaves = [x.clone().requires_grad_() for x in inputs]
                out = function(*leaves, enable_gqa=True, documents=layout)
                found.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
        for value, want in zip(*found, strict=True):
            assert relative_error(value, want) < 1e-2


@pytest.mark.parametrize("size", [2, 512, N // 8 + 1])
@pytest.mark.parametrize("text", MEDIANS)
def test_the_halo_of_chunks_is_seen_within_documents(text: str, size: int) -> None:
    """By the kernel as by vectorised PyTorch; bits repeat, and nothing waits."""
    _, _, documents = case(MEDIANS[text])
    own = documents_of_chunks(documents, ContextParallel(None, 1, 4))
    shapes = [(N // 8, h) for h in (4, 2, 2, 4)] + [(size - 1, 2)] * 2
    q, k, v, grad, *before = (
        torch.randn(2, *shape, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for shape in shapes
    )

    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        more = size, 0.125, impl, -1, 2, *layouts_in_chunks(own, size)
        rows = [x.to(dtype) for x in (q, k, v, *before)]
        found = torch.ops.lighthouse.halo_window(*rows, *more)
        rows = [grad.to(dtype), None, *rows, *found]
        return [*found, *torch.ops.lighthouse.halo_window_backward(*rows, *more)]

    exact, rounded = run("torch", torch.float32), run("torch", torch.bfloat16)
    first = run("triton", torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run("triton", torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, again))
    for value, other, want in zip(first, rounded, exact, strict=True):
        least = torch.finfo(torch.bfloat16).eps
        assert relative_error(value, want) <= max(1.5 * relative_error(other, want), least)
