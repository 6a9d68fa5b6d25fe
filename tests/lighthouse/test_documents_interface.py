"""Documents under a compiler, in modules and on GPUs, and messages."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import output_and_gradients, random_inputs, relative_error
from document_cases import attentions, random_layout

from lighthouse import (
    ContextParallel,
    LighthouseAttention,
    LighthouseConfig,
    WindowAttention,
    check_layout,
    document_attention,
    first_positions,
    lighthouse_attention,
    select,
    window_attention,
)


def test_compiles_to_one_graph() -> None:
    config = LighthouseConfig(2, 2, 4, "dilated", 2, dilation=2, window=3)
    case = dict(n=16, batch=2, heads=2, kv_heads=1, tied=False, seed=1)
    inputs = random_inputs(case, torch.float32)
    grad = torch.randn(inputs[0].shape)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    for name, attention in attentions(config).items():
        graphs.clear()
        torch._dynamo.reset()
        compiled = torch.compile(attention, backend=backend, fullgraph=True)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            documents = random_layout(2, 16, 2, generator)
            plain = output_and_gradients(attention, inputs, grad, config, documents=documents)
            found = output_and_gradients(compiled, inputs, grad, config, documents=documents)
            assert all(map(torch.equal, plain, found)), name
        assert len(graphs) == 1, name


@pytest.mark.parametrize("operation", ["document_attention", "document_attention_backward"])
def test_operations_are_registered(operation: str) -> None:
    case = dict(n=12, batch=2, heads=4, kv_heads=2, tied=False, seed=1)
    q, k, v = random_inputs(case, torch.float32)
    documents = random_layout(2, 12, 1, torch.Generator().manual_seed(0))
    out, lse = torch.ops.lighthouse.document_attention(q, k, v, documents, 0.5)
    arguments = (q, k, v) if operation == "document_attention" else (out, q, k, v, out, lse)
    torch.library.opcheck(
        getattr(torch.ops.lighthouse, operation), (*arguments, documents, 0.5),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_modules_take_documents() -> None:
    config = LighthouseConfig(2, 2, 4, picks_per_stratum=2)
    case = dict(n=16, batch=1, heads=4, kv_heads=2, tied=False, seed=2)
    inputs = random_inputs(case)
    documents = random_layout(1, 16, 2, torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"documents": documents}
    dense = document_attention(*inputs, **options)
    for module, expected in (
        (LighthouseAttention(config), lighthouse_attention(*inputs, config, **options)),
        (
            LighthouseAttention(replace(config, window=3)),
            lighthouse_attention(*inputs, replace(config, window=3), **options),
        ),
        (WindowAttention(3), window_attention(*inputs, 3, **options)),
    ):
        assert torch.equal(module(*inputs, enable_gqa=True, **options), expected)
        module.enabled = False
        assert torch.equal(module(*inputs, enable_gqa=True, **options), dense)
        with pytest.raises(ValueError, match="enable_gqa"):
            module(*inputs, **options)
        module.context_parallel = ContextParallel(None, 0, 2)
        with pytest.raises(ValueError, match="give ContextParallel its operations"):
            module(*inputs, enable_gqa=True, documents=torch.zeros(1, 32, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [0, 100])
def test_on_a_gpu_no_document_sees_another_and_nothing_waits(
    dtype: torch.dtype, window: int
) -> None:
    config = LighthouseConfig(3, 4, 64, picks_per_stratum=16, window=window)
    n, span = 4096, config.coarsest_span
    generator = torch.Generator().manual_seed(window)
    documents = random_layout(2, n, span, generator).cuda()
    shape = dict(n=n, batch=2, heads=4, kv_heads=2, tied=False)
    inputs = [x.cuda() for x in random_inputs({**shape, "seed": 1}, dtype, d=64)]
    others = [x.cuda() for x in random_inputs({**shape, "seed": 2}, dtype, d=64)]
    grad = torch.randn(2, 4, n, 64, generator=generator).to(dtype).cuda()
    # The last document of the first row gets other tokens.
    kept = torch.ones(2, n, dtype=torch.bool, device="cuda")
    kept[0, documents[0, -1] :] = False
    place = kept[:, None, :, None]
    changed = [torch.where(place, x, y) for x, y in zip(inputs, others, strict=True)]
    for name, attention in attentions(config).items():
        results = []
        for rows in (inputs, changed):
            torch.use_deterministic_algorithms(True)
            try:
                found = output_and_gradients(attention, rows, grad, config, documents=documents)
            finally:
                torch.use_deterministic_algorithms(False)
            results.append(found)
            torch.cuda.set_sync_debug_mode("error")
            try:
                output_and_gradients(attention, rows, grad, config, documents=documents)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for before, after in zip(*results, strict=True):
            assert torch.equal(before.transpose(1, 2)[kept], after.transpose(1, 2)[kept]), name
    on_cpu = [x.cpu().double() for x in inputs]
    exact = document_attention(*on_cpu, documents.cpu())
    rounded = document_attention(*inputs, documents)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert relative_error(rounded.cpu(), exact) < bound


@pytest.mark.parametrize("module", ["attention", "selection", "window"])
def test_tensors_choose_the_implementation(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With documents as without: the kernels on GPUs, unless ``impl`` says otherwise."""
    chooser = "choose_window_implementation" if module == "window" else "choose_implementation"
    file, asked = sys.modules[f"lighthouse.{module}"], []
    choose = getattr(file, chooser)
    monkeypatch.setattr(file, chooser, lambda *x: asked.append(x) or choose(*x))
    inputs = [torch.randn(1, 2, 64, 8) for _ in range(3)]
    config = LighthouseConfig(3, 2, 8, picks_per_stratum=4)
    attend = {
        "attention": lambda **x: lighthouse_attention(*inputs, config, **x),
        "selection": lambda **x: select(*inputs, config, **x),
        "window": lambda **x: window_attention(*inputs, 5, **x),
    }[module]
    documents = random_layout(1, 64, 4, torch.Generator().manual_seed(0))
    for options in ({}, {"documents": documents}, {"documents": documents, "impl": "torch"}):
        attend(**options)
    assert [impl for impl, *_ in asked] == [None, None, "torch"]
    assert all(q is inputs[0] for _, q, *_ in asked)


def test_messages() -> None:
    config = LighthouseConfig(2, 4, 4, picks_per_stratum=2)
    case = dict(n=16, batch=1, heads=2, kv_heads=1, tied=False, seed=2)
    inputs = random_inputs(case)

    def refused(error: type[Exception], message: str, documents: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            lighthouse_attention(*inputs, config, documents=documents, **options)

    good = first_positions(torch.arange(4).repeat_interleave(4)[None])
    refused(TypeError, "int32 or int64, got torch.float32", good.float())
    refused(TypeError, "got list", good.tolist())
    refused(ValueError, r"of shape \(1, 16\)", good[:, :8])
    refused(ValueError, "multiples of .* = 4, got one at 6 in row 0",
            first_positions((torch.arange(16) >= 6)[None]))  # fmt: skip
    refused(ValueError, "got 8 at position 3 of row 0", torch.full((1, 16), 8).index_fill_(
        1, torch.arange(3), 0))  # fmt: skip
    refused(ValueError, "sdpa", good, sdpa=torch.nn.functional.scaled_dot_product_attention)
    with pytest.raises(ValueError, match="not supported yet by impl = 'flash4'; pass impl=.triton"):
        window_attention(*inputs, 3, documents=good, impl="flash4")
    ranks = ContextParallel(None, 0, 2, balanced=False)
    whole = torch.zeros(1, 32, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"whole sequence.* \(1, 32\) for 2 ranks.* \(1, 16\)"):
        window_attention(*inputs, 3, documents=good, context_parallel=ranks)
    with pytest.raises(ValueError, match="must hold, for each position"):
        window_attention(*inputs, 3, documents=whole + 1, context_parallel=ranks)
    refused(ValueError, "not supported yet .* without a window, got window = 0 and 2 chunks",
            whole, context_parallel=ranks)  # fmt: skip
    with pytest.raises(ValueError, match="got 1 at position 0"):
        check_layout(torch.ones(1, 4, dtype=torch.int32))
    check_layout(good, 4)
    with pytest.raises(TypeError, match="int32 or int64, got torch.float64"):
        check_layout(good.double())
    for function, name in ((check_layout, "documents"), (first_positions, "numbers")):
        with pytest.raises(ValueError, match=rf"{name} must be a tensor \[B, N\].*got \(16,\)"):
            function(good[0])
    with pytest.raises(ValueError, match="numbers must be a tensor.*got list"):
        first_positions([[0, 1]])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_selection_for_documents_that_are_left_out_is_refused(impl: str) -> None:
    config = LighthouseConfig(3, 2, 8, picks_per_stratum=4, window=3)
    case = dict(n=64, batch=2, heads=4, kv_heads=2, tied=False, seed=3)
    inputs = random_inputs(case, torch.float32)
    documents = random_layout(2, 64, 4, torch.Generator().manual_seed(5))

    def attend(
        *rows: torch.Tensor, given: torch.Tensor | None, used: torch.Tensor | None
    ) -> torch.Tensor:
        selection = select(*rows, config, documents=given, impl=impl)
        return lighthouse_attention(*rows, config, selection=selection, documents=used, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(
        compiled(*inputs, given=documents, used=documents),
        lighthouse_attention(*inputs, config, documents=documents, impl=impl),
    )
    assert torch.equal(
        compiled(*inputs, given=None, used=None), lighthouse_attention(*inputs, config, impl=impl)
    )
    with pytest.raises(ValueError, match="selection was made for documents, and documents are"):
        attend(*inputs, given=documents, used=None)
    with pytest.raises(Exception, match="selection was made for documents"):
        compiled(*inputs, given=documents, used=None)


def test_a_selection_for_other_documents_is_refused() -> None:
    """With it, documents would see each other."""
    config = LighthouseConfig(3, 2, 8, picks_per_stratum=4, window=3)
    case = dict(n=64, batch=2, heads=4, kv_heads=2, tied=False, seed=3)
    inputs = random_inputs(case)
    generator = torch.Generator().manual_seed(5)
    documents, other = (random_layout(2, 64, 4, generator) for _ in range(2))
    chosen = select(*inputs, config, documents=documents)
    expected = lighthouse_attention(*inputs, config, documents=documents)
    found = lighthouse_attention(*inputs, config, documents=documents, selection=chosen)
    assert torch.equal(found, expected)
    for wrong in (None, other):
        chosen = select(*inputs, config, documents=wrong)
        with pytest.raises(ValueError, match="selection is one for other documents"):
            lighthouse_attention(*inputs, config, documents=documents, selection=chosen)
