"""Documents that do not see each other: against the oracle, by properties, and messages."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import output_and_gradients, random_inputs
from document_cases import attentions, layouts, positions_of, random_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from lighthouse import (
    LighthouseConfig,
    document_attention,
    first_positions,
    lighthouse_attention,
    reference,
    select,
    window_attention,
)
from lighthouse.config import SCORERS
from lighthouse.documents import gathered_documents, shares
from lighthouse.geometry import PyramidGeometry
from lighthouse.scoring import GLA_CHUNK, gated_linear_attention

GOLDEN = sorted(Path(__file__).parents[1].glob("data/*.npz"))


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
