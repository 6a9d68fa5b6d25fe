"""The scorers beside "norm" against their formulas and the oracle, and the kernels' twins."""

import ast
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import cases, output_and_gradients, random_inputs, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import lighthouse
from lighthouse import (
    LighthouseConfig,
    kernels,
    lighthouse_attention,
    reference,
    scoring,
    select,
)
from lighthouse.config import ATTENDS, CHOICES, SCORERS
from lighthouse.context_parallel import check_chunks
from lighthouse.geometry import PyramidGeometry
from lighthouse.precision import accumulation_dtype
from lighthouse.scoring import score

ATTENDING = tuple(scorer for scorer in SCORERS if ATTENDS.get(scorer))
OTHERS = tuple(scorer for scorer in SCORERS if scorer not in kernels.scoring.SCORED_BY_POOLING)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A scorer needs an entry in each of these places. A kernel of its own is optional.
PLACES = {
    "its name in Scorer of lighthouse/config.py": lambda: CHOICES["scorer"],
    "an entry of ATTENDS in lighthouse/config.py": lambda: ATTENDS,
    "an entry of SCORER_FUNCTIONS in lighthouse/scoring.py": lambda: scoring.SCORER_FUNCTIONS,
    "an entry of SCORED_ROWS in lighthouse/reference.py": lambda: reference.SCORED_ROWS,
}


def missing_places(scorer: str) -> list[str]:
    return [place for place, entries in PLACES.items() if scorer not in entries()]


def test_every_scorer_is_complete() -> None:
    known = {scorer for entries in PLACES.values() for scorer in entries()}
    known |= {*kernels.scoring.KERNELS, *kernels.scoring.SCORED_BY_POOLING}
    missing = [
        f"scorer {scorer!r} lacks {place}"
        for scorer in sorted(known)
        for place in missing_places(scorer)
    ]
    assert not missing, "; ".join(missing)


@pytest.mark.parametrize(("attends", "with_kernel"), [(True, False), (False, True)])
def test_a_scorer_needs_no_other_place(attends: bool, with_kernel: bool, monkeypatch) -> None:
    """Register a scorer by values; everything selects by it and keeps its rules."""

    def norms(q, k, v, _):
        by_value = torch.linalg.vector_norm(v, dim=-1, dtype=accumulation_dtype(v.dtype))
        return by_value.repeat_interleave(q.shape[1] // v.shape[1], dim=1), by_value

    assert len(missing_places("made_up")) == len(PLACES)
    with pytest.raises(ValueError, match="scorer must be one of norm, .* got scorer = 'made_up'"):
        LighthouseConfig(scorer="made_up")
    monkeypatch.setitem(CHOICES, "scorer", (*SCORERS, "made_up"))
    monkeypatch.setitem(ATTENDS, "made_up", attends)
    assert missing_places("made_up") == list(PLACES)[2:]
    with pytest.raises(AssertionError, match="'made_up' lacks an entry of SCORED_ROWS in light"):
        test_every_scorer_is_complete()
    functions = scoring.ScorerFunctions(norms, lambda *_: 7.0)
    monkeypatch.setitem(scoring.SCORER_FUNCTIONS, "made_up", functions)
    monkeypatch.setitem(reference.SCORED_ROWS, "made_up", lambda q, k, v, _: (v, v))
    test_every_scorer_is_complete()
    ran = []
    if with_kernel:
        monkeypatch.setitem(
            kernels.scoring.KERNELS, "made_up", lambda *rows: ran.append(rows) or norms(*rows)
        )

    settings = LighthouseConfig(3, 2, 16, "made_up", picks_per_stratum=4, dilation=3)
    case = dict(n=96, batch=1, heads=4, kv_heads=2, tied=False, seed=6)
    inputs = [rows.to(DEVICE) for rows in random_inputs(case, torch.float32, 16)]
    expected = reference.select(*inputs, settings)
    for impl in ("torch", "triton"):
        chosen = select(*inputs, settings, impl=impl)
        assert torch.equal(chosen.index, expected[0]) and torch.equal(chosen.slot, expected[1])
    assert len(ran) == with_kernel
    assert not torch.equal(select(*inputs, replace(settings, scorer="norm")).index, chosen.index)
    lighthouse_attention(*inputs, settings, impl="triton")
    assert scoring.flops_per_position(settings, 192, 4, 16) == 7.0
    # The dilation does not divide 128, and two chunks leave no rank the whole sequence.
    refusal = pytest.raises(ValueError, match="'made_up'") if attends else nullcontext()
    with refusal:
        PyramidGeometry(settings, 128)
    refusal = pytest.raises(ValueError, match="'made_up' attends") if attends else nullcontext()
    with refusal:
        check_chunks(settings, 192, 2)


def test_scorers_are_told_apart_in_their_places_alone() -> None:
    """No file outside the places above names a scorer that attends."""
    root = Path(lighthouse.__file__).parents[1]
    own = {"config.py", "scoring.py", "reference.py", "kernels/scoring.py"}
    own = {root / "lighthouse" / name for name in own}
    folders = (root / "lighthouse", root / "torchtitan" / "models" / "llama3_lighthouse")
    files = [file for folder in folders for file in folder.rglob("*.py") if file not in own]
    assert len(files) > 20
    for file in files:
        named = {
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not named & {*ATTENDING}, f"{file} tells scorers apart"


def formula(scorer: str, x, y, v, dilation: int) -> torch.Tensor:
    """Output norms [B, H, N] of x over y by a whole matrix of weights, in float64."""
    x, y, v = (rows.double() for rows in (x, y, v))
    n, d = x.shape[-2:]
    t = torch.arange(n, dtype=torch.float64)
    steps = (t[:, None] - t) / dilation
    reached = (steps >= 0) & (steps == steps.floor())
    products = x @ y.mT / d**0.5
    if scorer == "dilated":
        weights = products.masked_fill(~reached, float("-inf")).softmax(dim=-1)
    elif scorer == "gla":
        per_step = torch.sigmoid(torch.zeros((), dtype=torch.float64)).log() / 16
        weights = products * (per_step * steps).exp() * reached
    else:
        pytest.fail(f"write the formula of scorer {scorer!r} here, in {__file__}")
    return (weights @ v).norm(dim=-1)


@pytest.mark.parametrize("scorer", ATTENDING)
@pytest.mark.parametrize("dilation", [1, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scores_follow_the_formula(scorer: str, dilation: int, dtype: torch.dtype) -> None:
    """The sequence fills several chunks of linear attention, and the last one in part."""
    config = LighthouseConfig(3, 2, 16, scorer, 4, dilation, entry_score="max")
    inputs = random_inputs(dict(n=600, batch=2, heads=6, kv_heads=2, tied=False, seed=1), dtype, 16)
    q, k, v = inputs
    k, v = (rows.repeat_interleave(3, dim=1) for rows in (k, v))
    expected = [
        formula(scorer, *rows, dilation).unflatten(1, (2, 3)).amax(2)
        for rows in ((q, k, v), (k, q, v))
    ]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    for level, scores in enumerate(score(*inputs, PyramidGeometry(config, 600))):
        for ours, base in zip(scores, expected, strict=True):
            want = base.unflatten(-1, (-1, 2**level)).amax(-1).to(dtype)
            torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(cases(), st.sampled_from(OTHERS), st.data())
def test_selections_are_the_oracles(case, scorer, data) -> None:
    """Try every dilation that divides the length, without ties, which rounding would decide."""
    divisors = [d for d in range(1, case["n"] + 1) if case["n"] % d == 0]
    dilation = data.draw(st.sampled_from(divisors))
    config = replace(case["config"], scorer=scorer, dilation=dilation)
    inputs = random_inputs({**case, "tied": False})
    chosen, expected = select(*inputs, config), reference.select(*inputs, config)
    assert torch.equal(chosen.index, expected[0])
    assert torch.equal(chosen.slot, expected[1])


@pytest.mark.parametrize("scorer", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_kernels_score_as_float64_does(scorer, dtype, heads, kv_heads) -> None:
    """There are more rows than linear attention's window holds; D is no power of two."""
    config = LighthouseConfig(3, 2, 16, scorer, picks_per_stratum=4, dilation=2)
    case = dict(n=1040, batch=1, heads=heads, kv_heads=kv_heads, tied=False, seed=2)
    inputs = [rows.to(DEVICE) for rows in random_inputs(case, dtype, 48)]
    geometry = PyramidGeometry(config, 1040)
    exact = score(*(rows.double() for rows in inputs), geometry)[1]
    a, b = kernels.score(*inputs, geometry)
    a = a.unflatten(1, (kv_heads, -1)).amax(2)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, want in zip((a, b), exact, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("scorer", OTHERS)
def test_whole_is_the_same_by_either_implementation(scorer: str) -> None:
    config = LighthouseConfig(3, 2, 16, scorer, picks_per_stratum=8, dilation=4)
    case = dict(n=128, batch=2, heads=4, kv_heads=2, tied=False, seed=3)
    leaves = [rows.to(DEVICE) for rows in random_inputs(case, torch.float32, 32)]
    grad = torch.randn_like(leaves[0])
    mine, theirs = (select(*leaves, config, impl=impl) for impl in ("triton", "torch"))
    assert torch.equal(mine.index, theirs.index) and torch.equal(mine.slot, theirs.slot)
    ours, other = (
        output_and_gradients(lighthouse_attention, leaves, grad, config, impl=impl)
        for impl in ("triton", "torch")
    )
    for value, want in zip(ours, other, strict=True):
        assert relative_error(value, want) < 1e-6
    # The scorer "norm" selects otherwise, which shows that this scorer ran.
    assert not torch.equal(select(*leaves, replace(config, scorer="norm")).index, mine.index)


@pytest.mark.parametrize("scorer", OTHERS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_whole_and_opaquely(scorer: str, impl: str) -> None:
    config = LighthouseConfig(3, 2, 8, scorer, picks_per_stratum=4, dilation=4)
    case = dict(n=64, batch=1, heads=2, kv_heads=1, tied=False, seed=4)
    leaves = [rows.to(DEVICE) for rows in random_inputs(case, torch.float32, 16)]
    grad = torch.randn_like(leaves[0])
    # Compilations of this function by other tests count as well.
    torch.compiler.reset()
    compiled = torch.compile(lighthouse_attention, fullgraph=True, backend="aot_eager")
    for value, want in zip(
        output_and_gradients(compiled, leaves, grad, config, impl=impl),
        output_and_gradients(lighthouse_attention, leaves, grad, config, impl=impl),
        strict=True,
    ):
        assert relative_error(value, want) < 1e-6
    if impl == "triton":
        torch.library.opcheck(torch.ops.lighthouse.score.default, (*leaves, scorer, 4, 2, 1))


def test_dilation_that_does_not_divide_is_refused() -> None:
    leaves = [torch.randn(1, 2, 128, 8) for _ in range(3)]
    config = LighthouseConfig(3, 2, 16, "dilated", picks_per_stratum=4, dilation=12)
    with pytest.raises(ValueError, match=r"dilation = 12 .* must divide .* 128; .* such as 4"):
        lighthouse_attention(*leaves, config)
    lighthouse_attention(*leaves, replace(config, scorer="norm"))
