"""Kernels with documents, on a GPU or in Triton's interpreter, against vectorised PyTorch."""

import importlib
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
from flash_stand_ins import replace_flash_attention

from lighthouse import LighthouseConfig, lighthouse_attention, merge, select, window
from lighthouse.documents import cumulative_lengths
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
    options: dict[str, Any] = {"documents": documents, "most_documents": documents.numel()}
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


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put PyTorch in the place of flash attention, which does not run on a CPU."""
    replace_flash_attention(monkeypatch)


def with_lse(attend: Any, inputs: Any, grad: torch.Tensor, grad_lse: torch.Tensor) -> list[Any]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = attend(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (grad, grad_lse))]


@pytest.mark.parametrize("size, shortest", [(1, 4), (2, 8), (5, 4), (5, 2**20), (40, 4), (70, 4)])
@pytest.mark.parametrize("batch", [1, 2])
def test_flash_attention_gets_documents_as_lengths(
    flash: None, monkeypatch: pytest.MonkeyPatch, size: int, shortest: int, batch: int
) -> None:
    """Also in pieces, which documents end within or pass, and with gradients of the logsumexp."""
    monkeypatch.setattr(kernels.document_window, "SHORTEST_SEGMENT", shortest)
    q_shape = dict(n=67, batch=batch, heads=4, kv_heads=2, tied=False, seed=size)
    inputs = random_inputs(q_shape, torch.float32)
    generator = torch.Generator().manual_seed(size)
    grad = torch.randn(inputs[0].shape, generator=generator)
    grad_lse = torch.randn(grad.shape[:3], generator=generator)
    for _ in range(3):
        documents = random_layout(batch, 67, 1, generator)

        def by_flash(*x: torch.Tensor, layout: torch.Tensor = documents) -> Any:
            bounds = cumulative_lengths(layout, 2 * 67)
            return window._WindowAttention.apply(*x, size, 0.5, "flash", True, bounds)

        def by_torch(*x: torch.Tensor, layout: torch.Tensor = documents) -> Any:
            options: dict[str, Any] = {"documents": layout, "scale": 0.5}
            return window.window_attention(*x, size, return_lse=True, impl="torch", **options)

        found = with_lse(by_flash, inputs, grad, grad_lse)
        for value, want in zip(found, with_lse(by_torch, inputs, grad, grad_lse), strict=True):
            assert relative_error(value, want) < 1e-5
    assert torch.get_deterministic_debug_mode() == 0


def test_merged_attention_gives_flash_attention_the_lengths(
    flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, (*inputs, grad), documents = whole("window", 4)
    options: dict[str, Any] = {"documents": documents, "most_documents": documents.numel() // 2}
    expected = output_and_gradients(
        lighthouse_attention, inputs, grad, config, impl="torch", **options
    )
    monkeypatch.setattr(merge, "window_by_documents", lambda q: "flash")
    monkeypatch.setattr(kernels.document_window, "SHORTEST_SEGMENT", 4)
    found = output_and_gradients(
        lighthouse_attention, inputs, grad, config, impl="triton", **options
    )
    for value, want in zip(found, expected, strict=True):
        assert relative_error(value, want) < 1e-5


def test_compiled_code_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in validation, where torch's compiler calls the forward of a function by itself."""
    config, (*inputs, _), documents = whole("window", 4)
    options: dict[str, Any] = {"documents": documents, "most_documents": documents.numel() // 2}
    # Stand-ins do not come before the compiler's own table of operations is made.
    importlib.import_module("torch.utils.flop_counter")
    replace_flash_attention(monkeypatch)
    monkeypatch.setattr(merge, "window_by_documents", lambda q: "flash")

    def attend(*rows: torch.Tensor) -> torch.Tensor:
        return lighthouse_attention(*rows, config, impl="triton", **options)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(*inputs), attend(*inputs)) < 1e-6


def test_another_shape_of_the_logsumexp_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.ones(1, 2, 8, 4)
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", lambda q, *x, **y: (q, q.new_ones(1, 2, 8))
    )
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"as \(1, 2, 8\), and not as .heads, rows."):
        torch.ops.lighthouse.flash_window(q, q, q, 2, 1.0, bounds)


def test_operations_for_lengths_are_registered(flash: None) -> None:
    q, k, v = random_inputs(
        dict(n=12, batch=2, heads=4, kv_heads=2, tied=False, seed=1), torch.float32
    )
    bounds = cumulative_lengths(random_layout(2, 12, 1, torch.Generator().manual_seed(0)))
    ops, more = torch.ops.lighthouse, (5, 0.5, bounds)
    out, lse = ops.flash_window(q, k, v, *more)
    names = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(ops.flash_window.default, (q, k, v, *more), **names)
    backward = ops.flash_window_backward.default
    torch.library.opcheck(backward, (out, q, k, v, out, lse, *more), **names)
