"""The vectorised code and the oracle, against each other and the published outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import cases, output_and_gradients, random_inputs, relative_error
from hypothesis import given, settings

from lighthouse import LighthouseConfig, Selection, lighthouse_attention, reference, select

GOLDEN = sorted(Path(__file__).parents[1].glob("data/*.npz"))
SLOWEST = ("oracle", GOLDEN[-1])


# The oracle takes half a minute for the longer sequence.
@pytest.mark.parametrize(
    ("implementation", "path"),
    [
        pytest.param(implementation, path, id=f"{implementation}-{path.stem}",
                     marks=[pytest.mark.slow] if (implementation, path) == SLOWEST else [])
        for implementation in ("vectorised", "oracle")
        for path in GOLDEN
    ],
)  # fmt: skip
def test_golden_vectors(implementation: str, path: Path) -> None:
    golden = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    n, levels, p, top_k, *_ = golden["meta"].tolist()
    # The published code.
    config = LighthouseConfig(levels, p, top_k, entry_score="max", combine="sum")
    inputs = [golden[name].transpose(1, 2) for name in "qkv"]
    chosen = select if implementation == "vectorised" else reference.select
    attention = lighthouse_attention if implementation == "vectorised" else (
        reference.lighthouse_attention
    )  # fmt: skip
    assert torch.equal(chosen(*inputs, config)[0], golden["idx"])
    results = output_and_gradients(attention, inputs, golden["go"], config)
    expected = [golden["out"], *(golden[name].transpose(1, 2) for name in ("dq", "dk", "dv"))]
    assert n == inputs[0].shape[2]
    for name, value, want in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        assert relative_error(value, want) <= 2e-6, name


@settings(max_examples=100, deadline=None)
@given(cases())
def test_random_configurations_agree(case) -> None:
    config, inputs = case["config"], random_inputs(case)
    chosen, expected = select(*inputs, config), reference.select(*inputs, config)
    assert torch.equal(chosen.index, expected[0])
    assert torch.equal(chosen.slot, expected[1])
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    ours = output_and_gradients(lighthouse_attention, inputs, grad, config)
    oracle = output_and_gradients(reference.lighthouse_attention, inputs, grad, config)
    for value, want in zip(ours, oracle, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_the_precision(dtype: torch.dtype) -> None:
    """Against float64 our error is at most twice the oracle's own at this precision."""
    config = LighthouseConfig(levels=3, pooling_factor=4, top_k=16, picks_per_stratum=8)
    case = dict(n=512, batch=1, heads=2, kv_heads=1, tied=False, seed=3)
    inputs = random_inputs(case, dtype, d=32)
    selection = select(*inputs, config)
    grad = torch.randn(1, 2, 512, 32).to(dtype)
    exact = output_and_gradients(
        reference.lighthouse_attention,
        [x.double() for x in inputs],
        grad.double(),
        config,
        selection=selection,
    )
    plain = output_and_gradients(
        reference.lighthouse_attention, inputs, grad, config, selection=selection
    )
    ours = output_and_gradients(lighthouse_attention, inputs, grad, config, selection=selection)
    for value, rough, want in zip(ours, plain, exact, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, want) <= 2 * relative_error(rough, want)


@pytest.mark.parametrize("combine, window", [("sum", 0), ("finest", 0), ("finest", 6)])
def test_gradcheck_with_fixed_selection(combine: str, window: int) -> None:
    config = LighthouseConfig(3, 2, 4, picks_per_stratum=2, combine=combine, window=window)
    # A window takes longer.
    case = dict(n=16 if window else 20, batch=1, heads=2, kv_heads=1, tied=False, seed=5)
    inputs = [x.requires_grad_() for x in random_inputs(case, d=3)]
    selection = Selection(*(x.clone() for x in select(*inputs, config)))
    assert torch.autograd.gradcheck(
        lambda q, k, v: lighthouse_attention(q, k, v, config, selection=selection), inputs
    )


def test_scale_reaches_the_attention() -> None:
    config = LighthouseConfig(levels=2, pooling_factor=2, top_k=4, picks_per_stratum=2)
    inputs = random_inputs(dict(n=16, batch=1, heads=1, kv_heads=1, tied=False, seed=1))
    ours = lighthouse_attention(*inputs, config, scale=0.3)
    torch.testing.assert_close(ours, reference.lighthouse_attention(*inputs, config, scale=0.3))
    assert not torch.allclose(ours, lighthouse_attention(*inputs, config))
