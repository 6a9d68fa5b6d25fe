"""Kernels with documents, on a GPU or in Triton's interpreter, against vectorised PyTorch."""

from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import (
    SCORES,
    output_and_gradients,
    random_inputs,
    relative_error,
    vectorised_selection,
)
from document_cases import positions_of, random_layout

from lighthouse import (
    LighthouseConfig,
    dense_attention,
    document_attention,
    lighthouse_attention,
    merge,
    reference,
    select,
    window_attention,
)
from lighthouse.geometry import PyramidGeometry
from lighthouse.scatter import scatter_back

kernels = pytest.importorskip("lighthouse.kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# L, p, picks of a stratum, strata, coarsest entries, batch, key-value heads, query heads of each.
SHAPES = {
    "uneven strata": (3, 2, 4, 2, 11, 2, 2, 2),
    "many heads of one key": (2, 4, 2, 3, 10, 1, 2, 3),
    "four levels": (4, 2, 6, 1, 9, 2, 1, 1),
    "all entries are picked": (2, 2, 8, 1, 8, 2, 1, 1),
    "more candidates than a tile": (2, 4, 48, 1, 150, 2, 1, 1),
    "500 documents": (2, 2, 16, 4, 500, 1, 1, 1),
}


def layout_of(name: str, batch: int, n: int, span: int, seed: int) -> torch.Tensor:
    if name == "500 documents":
        return (torch.arange(n, dtype=torch.int32) // span * span).expand(batch, -1)
    return random_layout(batch, n, span, torch.Generator().manual_seed(seed))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let outputs start as NaN or as an index that does not exist: none of these may be left."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(float("nan") if out.dtype.is_floating_point else 2**30)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize(
    "name, entry_score", [*zip(SHAPES, 3 * ["max", "first"], strict=True)], ids=str
)
def test_selection_is_exact(name: str, entry_score: str, poison: None) -> None:
    """The same scores and documents select the same entries in the same places."""
    levels, p, m, strata, coarsest, batch, kv_heads, group = SHAPES[name]
    config = LighthouseConfig(levels, p, m * strata, picks_per_stratum=m, entry_score=entry_score)
    geometry = PyramidGeometry(config, coarsest * config.coarsest_span)
    torch.manual_seed(len(name))
    makers, planes = list(SCORES.values()), batch * kv_heads
    # The interpreter takes a while for many strata.
    makers = makers[:3] if name == "500 documents" else makers
    for start in range(0, len(makers), planes):
        seed = int(torch.randint(2**31, ()))
        n, span = geometry.sequence_length, config.coarsest_span
        documents = layout_of(name, batch, n, span, seed).to(DEVICE)
        a, b = (
            torch.cat([make(rows, geometry.lengths[1]) for make in makers[start : start + planes]])
            .view(batch, kv_heads * rows, -1)
            .to(DEVICE)
            for rows in (group, 1)
        )
        index, slot = kernels.select_by_documents(a, b, documents, geometry)
        expected = vectorised_selection(a, b, geometry, documents)
        assert torch.equal(index, expected.index)
        assert torch.equal(slot, expected.slot)


def test_one_document_selects_as_none_does() -> None:
    config = LighthouseConfig(3, 2, 8, picks_per_stratum=4)
    geometry = PyramidGeometry(config, 60)
    a, b = torch.rand(2, 4, 30, device=DEVICE), torch.rand(2, 2, 30, device=DEVICE)
    one = torch.zeros(2, 60, dtype=torch.int64, device=DEVICE)
    found = kernels.select_by_documents(a, b, one, geometry)
    assert all(map(torch.equal, found, kernels.select_from_norms(a, b, geometry)))


# L, p, picks of a stratum, strata, coarsest entries, batch, key-value heads, query heads of each,
# and settings.
WHOLE = {
    "sum": (3, 2, 2, 2, 7, 2, 1, 2, {}),
    "finest": (3, 4, 2, 1, 5, 1, 2, 1, {"combine": "finest"}),
    "window": (3, 2, 4, 1, 6, 2, 1, 2, {"combine": "finest", "window": 9}),
    "first": (4, 2, 2, 1, 6, 1, 2, 2, {"combine": "finest", "window": 3, "entry_score": "first"}),
    "dilated": (3, 2, 4, 1, 9, 1, 1, 2, {"scorer": "dilated", "dilation": 2}),
    "gla": (2, 2, 4, 2, 9, 1, 1, 2, {"scorer": "gla", "dilation": 3}),
    "random": (3, 2, 4, 1, 9, 1, 1, 2, {"scorer": "random"}),
}


def whole(name: str, seed: int) -> tuple[LighthouseConfig, list[torch.Tensor], torch.Tensor]:
    """A configuration, inputs with a gradient, and documents, several in each row."""
    levels, p, m, strata, coarsest, batch, kv_heads, group, settings = WHOLE[name]
    config = LighthouseConfig(
        levels, p, m * strata, picks_per_stratum=m, **{"combine": "sum", **settings}
    )
    n = coarsest * config.coarsest_span
    case = dict(n=n, batch=batch, heads=kv_heads * group, kv_heads=kv_heads, tied=False, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    documents = random_layout(batch, n, config.coarsest_span, generator)
    while not documents[:, -1].all():
        documents = random_layout(batch, n, config.coarsest_span, generator)
    rows = [*random_inputs(case, torch.float32, d=16)]
    rows.append(torch.randn(rows[0].shape, generator=generator))
    return config, [x.to(DEVICE) for x in rows], documents.to(DEVICE)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_agrees_with_the_vectorised_code(name: str, poison: None) -> None:
    """Selections agree too, on scores without near-ties."""
    config, (*inputs, grad), documents = whole(name, 2)
    ours, theirs = (
        select(*inputs, config, documents=documents, impl=impl) for impl in ("triton", "torch")
    )
    assert all(map(torch.equal, ours, theirs))
    if config.scorer != "norm":
        # Scorers change nothing else.
        return
    options: dict[str, Any] = {"documents": documents}
    found, expected = (
        output_and_gradients(lighthouse_attention, inputs, grad, config, impl=impl, **options)
        for impl in ("triton", "torch")
    )
    for value, want in zip(found, expected, strict=True):
        assert relative_error(value, want) < 2e-6
    assert found[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("combine", ["sum", "finest"])
def test_outputs_stay_in_documents_through_scatter_and_merge(combine: Any, poison: None) -> None:
    """Random selections, rows and layouts, forward and backward."""
    for seed in range(4):
        config, (q, k, v, grad), documents = whole(combine, seed)
        geometry, generator = PyramidGeometry(config, q.shape[2]), torch.Generator().manual_seed(9)
        selection = select(q, k, v, config, documents=documents)
        shape = (*q.shape[:2], geometry.gathered_length, q.shape[3])
        rows = torch.randn(shape, generator=generator).to(DEVICE)
        found = []
        for scatter in (kernels.scatter_back, scatter_back):
            leaf = rows.clone().requires_grad_()
            out = scatter(leaf, selection, geometry, documents=documents)
            found.append((out.detach(), *torch.autograd.grad(out, leaf, grad)))
        for value, want in zip(*found, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["finest", "window"])
def test_no_token_of_a_document_changes_another(name: str) -> None:
    """No bit of an output or gradient, with the selection made anew."""
    config, (*inputs, grad), documents = whole(name, 7)
    kept = torch.ones(documents.shape, dtype=torch.bool, device=DEVICE)
    for part in positions_of(documents, 0)[::2]:
        kept[0, part] = False
    assert kept[0].any()
    changed = [x.clone() for x in inputs]
    for x in changed:
        x.transpose(1, 2)[~kept] *= -3
    options: dict[str, Any] = {"documents": documents, "impl": "triton"}
    before, after = (
        output_and_gradients(lighthouse_attention, rows, grad, config, **options)
        for rows in (inputs, changed)
    )
    for value, want in zip(before, after, strict=True):
        assert torch.equal(value.transpose(1, 2)[kept], want.transpose(1, 2)[kept])
        assert not torch.equal(value, want)


def test_compiles_to_one_graph_for_all_layouts() -> None:
    """One document changes no bit."""
    config, (*inputs, grad), documents = whole("window", 3)
    torch.compiler.reset()
    compiled = torch.compile(lighthouse_attention, fullgraph=True, backend="aot_eager")
    one = torch.zeros_like(documents)
    for step, layout in enumerate((documents, one)):
        options: dict[str, Any] = {"documents": layout, "impl": "triton"}
        plain = output_and_gradients(lighthouse_attention, inputs, grad, config, **options)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            found = output_and_gradients(compiled, inputs, grad, config, **options)
        assert all(map(torch.equal, plain, found))
    none = output_and_gradients(lighthouse_attention, inputs, grad, config, impl="triton")
    assert all(map(torch.equal, none, found))


def with_lse(attend: Any, inputs: Any, grad: torch.Tensor, grad_lse: torch.Tensor) -> list[Any]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = attend(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (grad, grad_lse))]


@pytest.mark.parametrize("size", [1, 5, 40, 70])
@pytest.mark.parametrize("batch", [1, 2])
def test_windows_stay_in_documents(size: int, batch: int, poison: None) -> None:
    """Also with gradients of the logsumexp, and a window of the whole sequence."""
    case = dict(n=67, batch=batch, heads=4, kv_heads=2, tied=False, seed=size)
    inputs = [x.to(DEVICE) for x in random_inputs(case, torch.float32)]
    generator = torch.Generator().manual_seed(size)
    grad = torch.randn(inputs[0].shape, generator=generator).to(DEVICE)
    grad_lse = torch.randn(grad.shape[:3], generator=generator).to(DEVICE)
    for _ in range(3):
        documents = random_layout(batch, 67, 1, generator).to(DEVICE)
        found, expected = (
            with_lse(
                partial(window_attention, window=size, return_lse=True, impl=impl, scale=0.5,
                        documents=documents),
                inputs, grad, grad_lse,
            )
            for impl in ("triton", "torch")
        )  # fmt: skip
        for value, want in zip(found, expected, strict=True):
            assert relative_error(value, want) < 1e-5


def test_dense_attention_stays_in_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, against the oracle."""
    monkeypatch.setattr(dense_attention, "_by_kernel", lambda q: True)
    case = dict(n=64, batch=2, heads=4, kv_heads=2, tied=False, seed=4)
    inputs = [x.to(DEVICE) for x in random_inputs(case)]
    documents = random_layout(2, 64, 1, torch.Generator().manual_seed(8)).to(DEVICE)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64, device=DEVICE)

    def run(attend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attend(*leaves, documents, scale=0.3)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact = run(reference.dense_attention, torch.float64)
    for value, want in zip(run(document_attention, torch.float32), exact, strict=True):
        assert relative_error(value, want) < 1e-5


def test_merged_attention_within_documents_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    config, (*inputs, grad), documents = whole("window", 4)
    options: dict[str, Any] = {"documents": documents}
    expected = output_and_gradients(
        lighthouse_attention, inputs, grad, config, impl="torch", **options
    )
    monkeypatch.setattr(merge, "window_by_documents", lambda q: "triton")
    found = output_and_gradients(
        lighthouse_attention, inputs, grad, config, impl="triton", **options
    )
    for value, want in zip(found, expected, strict=True):
        assert relative_error(value, want) < 1e-5


def test_compiled_code_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in validation, where torch's compiler calls the forward of a function by itself."""
    config, (*inputs, _), documents = whole("window", 4)
    options: dict[str, Any] = {"documents": documents}
    monkeypatch.setattr(merge, "window_by_documents", lambda q: "triton")

    def attend(*rows: torch.Tensor) -> torch.Tensor:
        return lighthouse_attention(*rows, config, impl="triton", **options)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(*inputs), attend(*inputs)) < 1e-6


def test_operations_within_documents_are_registered() -> None:
    case = dict(n=12, batch=2, heads=4, kv_heads=2, tied=False, seed=1)
    q, k, v = (x.to(DEVICE) for x in random_inputs(case, torch.float32))
    documents = random_layout(2, 12, 1, torch.Generator().manual_seed(0)).to(DEVICE)
    ops, more = torch.ops.lighthouse, (5, 0.5, documents)
    out, lse = ops.window_by_kernel(q, k, v, *more)
    names = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(ops.window_by_kernel.default, (q, k, v, *more), **names)
    backward = ops.window_by_kernel_backward.default
    torch.library.opcheck(backward, (out, q, k, v, out, lse, *more), **names)
