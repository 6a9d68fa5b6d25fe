"""Documents that do not see each other: against the oracle, by properties, and messages."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import cases, output_and_gradients, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from lighthouse import (
    ContextParallel,
    LighthouseAttention,
    LighthouseConfig,
    WindowAttention,
    check_layout,
    document_attention,
    first_positions,
    lighthouse_attention,
    reference,
    select,
    window_attention,
)
from lighthouse.config import SCORERS
from lighthouse.document_attention import cumulative_lengths
from lighthouse.documents import gathered_documents, shares
from lighthouse.geometry import PyramidGeometry
from lighthouse.scoring import GLA_CHUNK, gated_linear_attention

GOLDEN = sorted(Path(__file__).parents[1].glob("data/*.npz"))


def random_layout(batch: int, n: int, span: int, generator: torch.Generator) -> torch.Tensor:
    """Documents [B, N] that begin at multiples of ``span``, few in some rows, many in others."""
    rows = []
    for _ in range(batch):
        share = torch.rand((), generator=generator) ** 2
        begins = torch.rand(n // span, generator=generator) < share
        rows.append(begins.cumsum(0).repeat_interleave(span))
    return first_positions(torch.stack(rows))


def positions_of(documents: torch.Tensor, row: int) -> list[slice]:
    """The positions of each document of a row."""
    bounds = [*documents[row].unique().tolist(), documents.shape[1]]
    return list(itertools.starmap(slice, itertools.pairwise(bounds)))


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """A case of Lighthouse attention with a scorer, inputs, documents and a gradient."""
    case = draw(cases())
    config, n = case["config"], case["n"]
    scorer = draw(st.sampled_from(SCORERS))
    # Dilations that the coarsest span is no multiple of too.
    dilation = draw(st.sampled_from([d for d in (1, 2, 3, 4, 8) if n % d == 0]))
    generator = torch.Generator().manual_seed(case["seed"])
    return {
        "config": replace(config, scorer=scorer, dilation=dilation),
        "inputs": random_inputs(case),
        "documents": random_layout(case["batch"], n, config.coarsest_span, generator),
        "grad": torch.randn(
            case["batch"], case["heads"], n, 4, generator=generator, dtype=torch.float64
        ),
        "generator": generator,
    }


def attentions(config: LighthouseConfig) -> dict[str, Callable[..., torch.Tensor]]:
    """Every attention that takes documents, called as Lighthouse attention is."""
    size = config.window or 7
    return {
        "lighthouse": lighthouse_attention,
        "window": lambda q, k, v, _, **options: window_attention(q, k, v, size, **options),
        "dense": lambda q, k, v, _, **options: document_attention(q, k, v, **options),
    }


@settings(max_examples=40, deadline=None)
@given(case=layouts())
def test_agrees_with_the_oracle(case: dict[str, Any]) -> None:
    config, inputs, documents = case["config"], case["inputs"], case["documents"]
    options = {"documents": documents}
    chosen = select(*inputs, config, **options)
    expected = reference.select(*inputs, config, **options)
    assert torch.equal(chosen.index, expected[0])
    assert torch.equal(chosen.slot, expected[1])
    size = config.window or 7
    oracles = {
        "lighthouse": reference.lighthouse_attention,
        "window": lambda q, k, v, _, **o: reference.window_attention(q, k, v, size, **o)[0],
        "dense": lambda q, k, v, _, **o: reference.dense_attention(q, k, v, **o),
    }
    for name, attention in attentions(config).items():
        ours = output_and_gradients(attention, inputs, case["grad"], config, **options)
        oracle = output_and_gradients(oracles[name], inputs, case["grad"], config, **options)
        for value, want in zip(ours, oracle, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10, msg=name)


@settings(max_examples=60, deadline=None)
@given(case=layouts(), data=st.data())
def test_no_token_of_a_document_changes_another(case: dict[str, Any], data: st.DataObject) -> None:
    """No bit of an output or gradient, with the selection made anew."""
    config, documents = case["config"], case["documents"]
    row = data.draw(st.integers(0, len(documents) - 1))
    spoiled = data.draw(st.sampled_from(positions_of(documents, row)))
    changed = [x.clone() for x in case["inputs"]]
    for x in changed:
        x[row, :, spoiled] = 3 * torch.randn(
            x[row, :, spoiled].shape, generator=case["generator"], dtype=x.dtype
        )
    kept = torch.ones(documents.shape, dtype=torch.bool)
    kept[row, spoiled] = False
    for name, attention in attentions(config).items():
        results = [
            output_and_gradients(attention, inputs, case["grad"], config, documents=documents)
            for inputs in (case["inputs"], changed)
        ]
        for before, after in zip(*results, strict=True):
            assert torch.equal(before.transpose(1, 2)[kept], after.transpose(1, 2)[kept]), name
        # Outputs of this document send no gradient to others.
        own = case["grad"].clone()
        own.transpose(1, 2)[kept] = 0
        options = {"documents": documents}
        for grad in output_and_gradients(attention, changed, own, config, **options)[1:]:
            assert not grad.transpose(1, 2)[kept].any(), name


def test_five_hundred_documents_do_not_see_each_other() -> None:
    config = LighthouseConfig(3, 2, 64, picks_per_stratum=16, window=32)
    n, span = 4096, config.coarsest_span
    inputs = random_inputs(dict(n=n, batch=1, heads=2, kv_heads=1, tied=False, seed=7))
    numbers = torch.zeros(n // span, dtype=torch.int64)
    numbers[torch.randperm(n // span - 1, generator=torch.Generator().manual_seed(7))[:499] + 1] = 1
    documents = first_positions(numbers.cumsum(0).repeat_interleave(span)[None])
    parts = positions_of(documents, 0)
    assert len(parts) == 500
    grad = torch.randn(1, 2, n, 4, dtype=torch.float64)
    # Every second document gets other tokens.
    changed = [x.clone() for x in inputs]
    kept = torch.ones(1, n, dtype=torch.bool)
    for part in parts[::2]:
        kept[0, part] = False
    for x in changed:
        x.transpose(1, 2)[~kept] *= -3
    for name, attention in attentions(config).items():
        results = [
            output_and_gradients(attention, rows, grad, config, documents=documents)
            for rows in (inputs, changed)
        ]
        for before, after in zip(*results, strict=True):
            assert torch.equal(before.transpose(1, 2)[kept], after.transpose(1, 2)[kept]), name
            assert not torch.equal(before, after)


@settings(max_examples=30, deadline=None)
@given(case=layouts())
def test_dense_attention_and_windows_compute_a_document_alone(case: dict[str, Any]) -> None:
    """Documents may begin anywhere there."""
    config, inputs, generator = case["config"], case["inputs"], case["generator"]
    batch, _, n, _ = inputs[0].shape
    documents = random_layout(batch, n, 1, generator)
    for name, attention in attentions(config).items():
        if name == "lighthouse":
            continue
        options = {"documents": documents}
        together = output_and_gradients(attention, inputs, case["grad"], config, **options)
        for row in range(batch):
            for part in positions_of(documents, row):
                own = [x[row : row + 1, :, part] for x in (*inputs, case["grad"])]
                one = torch.zeros(1, own[0].shape[2], dtype=torch.int32)
                alone = output_and_gradients(attention, own[:3], own[3], config, documents=one)
                for value, want in zip(together, alone, strict=True):
                    torch.testing.assert_close(
                        value[row : row + 1, :, part], want, rtol=1e-12, atol=1e-12, msg=name
                    )


def test_linear_attention_in_chunks_stops_at_documents() -> None:
    """Its chunks are longer than the sequences above, so a document here passes several of them."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, 5 * GLA_CHUNK + 10, 4)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    bounds = [0, 3, GLA_CHUNK - 1, 3 * GLA_CHUNK, 3 * GLA_CHUNK + 20, 5 * GLA_CHUNK + 1, shape[2]]
    lengths = torch.tensor(bounds).diff()
    documents = first_positions(torch.arange(len(lengths)).repeat_interleave(lengths)[None])
    # The second row has one document.
    documents = torch.cat([documents, torch.zeros_like(documents)])
    together = gated_linear_attention(q, k, v, documents)
    for first, end in itertools.pairwise(bounds):
        alone = gated_linear_attention(*(x[:1, :, first:end] for x in (q, k, v)))
        torch.testing.assert_close(together[:1, :, first:end], alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(together[1:], gated_linear_attention(*(x[1:] for x in (q, k, v))))


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("window", [0, 5])
def test_a_document_of_whole_strata_is_as_if_alone(scorer: str, window: int) -> None:
    """Its selection, outputs and gradients are those of a sequence that holds it alone."""
    config = LighthouseConfig(3, 2, 12, scorer, 2, dilation=2, window=window)
    stratum = 3 * config.coarsest_span
    torch.manual_seed(len(scorer))
    inputs = [torch.randn(1, h, 6 * stratum, 4, dtype=torch.float64) for h in (4, 2, 2)]
    grad = torch.randn(1, 4, 6 * stratum, 4, dtype=torch.float64)
    bounds = [0, 2 * stratum, 3 * stratum, 6 * stratum]
    lengths = torch.tensor(bounds).diff()
    documents = first_positions(torch.arange(3).repeat_interleave(lengths)[None])
    together = output_and_gradients(lighthouse_attention, inputs, grad, config, documents=documents)
    for first, end in itertools.pairwise(bounds):
        own = [x[:, :, first:end] for x in (*inputs, grad)]
        alone = replace(config, top_k=(end - first) // stratum * config.picks_per_stratum)
        results = output_and_gradients(lighthouse_attention, own[:3], own[3], alone)
        for value, want in zip(together, results, strict=True):
            torch.testing.assert_close(value[:, :, first:end], want, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(case=layouts())
def test_shares_and_places_follow_from_the_layout(case: dict[str, Any]) -> None:
    config, inputs, documents = case["config"], case["inputs"], case["documents"]
    geometry = PyramidGeometry(config, documents.shape[1])
    selection = select(*inputs, config, documents=documents)
    assert selection.index.shape[2] == geometry.gathered_length
    places = gathered_documents(documents, geometry)
    share = shares(documents, geometry)
    bounds, m = geometry.stratum_bounds, config.picks_per_stratum
    for row, own_places in enumerate(places):
        for first, end in itertools.pairwise(bounds):
            parts = {(share.before[row, e].item(), share.after[row, e].item())
                     for e in range(first, end)}  # fmt: skip
            assert sum(after - before for before, after in parts) == m
            assert sum((after + 1) // 2 - (before + 1) // 2 for before, after in parts) == m // 2
        # Every head has the documents' entries at the same places, next to one another.
        for index in selection.index[row]:
            level = torch.bucketize(index, torch.tensor(geometry.offsets[1:]), right=True)
            number = index - torch.tensor(geometry.offsets)[level]
            document = documents[row, number * torch.tensor(geometry.spans)[level]]
            assert torch.equal(first_positions(document[None])[0].long(), own_places)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("combine, window", [("sum", 0), ("finest", 0), ("finest", 9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_document_changes_no_bit(scorer: str, combine: Any, window: int, dtype: Any) -> None:
    config = LighthouseConfig(
        3, 4, 8, scorer, picks_per_stratum=4, combine=combine, window=window, dilation=2
    )
    case = dict(n=11 * 16, batch=2, heads=4, kv_heads=2, tied=False, seed=window)
    inputs = random_inputs(case, dtype, d=8)
    grad = torch.randn(inputs[0].shape).to(dtype)
    one = torch.zeros(2, case["n"], dtype=torch.int64)
    for attention in (lighthouse_attention, attentions(config)["window"]):
        without = output_and_gradients(attention, inputs, grad, config)
        with_one = output_and_gradients(attention, inputs, grad, config, documents=one)
        assert all(map(torch.equal, without, with_one))
    for ours, theirs in zip(select(*inputs, config), select(*inputs, config, documents=one),
                            strict=True):  # fmt: skip
        assert torch.equal(ours, theirs)

    def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    dense = output_and_gradients(attentions(config)["dense"], inputs, grad, config, documents=one)
    assert all(map(torch.equal, dense, output_and_gradients(stock, inputs, grad, config)))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_one_document_gives_the_bits_of_the_golden_vectors(path: Path) -> None:
    golden = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    n, levels, p, top_k, *_ = golden["meta"].tolist()
    config = LighthouseConfig(levels, p, top_k, entry_score="max", combine="sum")
    inputs = [golden[name].transpose(1, 2) for name in "qkv"]
    one = torch.zeros(len(inputs[0]), n, dtype=torch.int32)
    assert torch.equal(select(*inputs, config, documents=one).index, golden["idx"])
    arguments = lighthouse_attention, inputs, golden["go"], config
    results = [output_and_gradients(*arguments, documents=layout) for layout in (None, one)]
    assert all(map(torch.equal, *results))


def test_gradients_by_finite_differences() -> None:
    config = LighthouseConfig(3, 2, 4, picks_per_stratum=2, window=3)
    case = dict(n=16, batch=1, heads=2, kv_heads=1, tied=False, seed=5)
    inputs = [x.requires_grad_() for x in random_inputs(case, d=2)]
    documents = first_positions(torch.tensor([[0] * 4 + [1] * 8 + [2] * 4]))
    selection = select(*inputs, config, documents=documents)
    options: dict[str, Any] = {"documents": documents}
    for attend in (
        lambda *x: lighthouse_attention(*x, config, selection=selection, **options),
        lambda *x: window_attention(*x, 3, return_lse=True, **options),
        lambda *x: document_attention(*x, **options),
    ):
        assert torch.autograd.gradcheck(attend, inputs)


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
        with pytest.raises(ValueError, match="context parallelism"):
            module(*inputs, enable_gqa=True, **options)


def test_lengths_for_flash_attention() -> None:
    numbers = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    bounds = cumulative_lengths(first_positions(numbers), 6)
    assert bounds.tolist() == [0, 2, 5, 6, 12, 12, 12] and bounds.dtype == torch.int32
    assert cumulative_lengths(first_positions(numbers), 4).tolist() == [0, 2, 5, 6, 12]


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
    refused(ValueError, 'pass impl="torch"', good, impl="triton")
    with pytest.raises(ValueError, match="not supported yet by impl = 'triton'"):
        select(*inputs, config, documents=good, impl="triton")
    for impl in ("flash", "flash4"):
        with pytest.raises(ValueError, match="not supported yet"):
            window_attention(*inputs, 3, documents=good, impl=impl)
    with pytest.raises(ValueError, match="context parallelism"):
        window_attention(*inputs, 3, documents=good, context_parallel=ContextParallel(None, 0, 2))
    with pytest.raises(ValueError, match="at least 1"):
        document_attention(*inputs, good, most_documents=0)
    with pytest.raises(ValueError, match="got 1 at position 0"):
        check_layout(torch.ones(1, 4, dtype=torch.int32))
    check_layout(good, 4)
