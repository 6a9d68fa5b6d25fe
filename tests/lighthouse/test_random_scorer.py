"""The scorer "random": its picks are the oracle's, know nothing of the content, and repeat."""

import math

import pytest
import torch
from attention_cases import output_and_gradients, random_inputs, relative_error
from torch.utils.checkpoint import checkpoint

from lighthouse import (
    ContextParallel,
    LighthouseConfig,
    kernels,
    lighthouse_attention,
    reference,
    select,
)
from lighthouse.geometry import PyramidGeometry
from lighthouse.scoring import position_scores, score

CONFIG = LighthouseConfig(3, 2, 16, "random", picks_per_stratum=4, entry_score="max")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# A value beyond this many standard deviations comes about once in ten million draws.
DEVIATIONS = 5.3


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rows_of(
    dtype: torch.dtype, n: int = 96, heads: int = 4, batch: int = 1, seed: int = 0
) -> list[torch.Tensor]:
    case = dict(n=n, batch=batch, heads=heads, kv_heads=2, tied=False, seed=seed)
    return [x.to(DEVICE) for x in random_inputs(case, dtype, d=8)]


def hashes(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key scores of all positions, in one row each."""
    a, b = position_scores(q, k, k, CONFIG)
    return a.flatten(), b.flatten()


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].item()


@pytest.mark.parametrize(
    ("dtype", "entry_score"),
    [
        (torch.float32, "first"),
        (torch.bfloat16, "max"),
        pytest.param(torch.float16, "first", marks=pytest.mark.slow),
    ],
)
def test_picks_outputs_and_gradients_are_the_oracles(dtype: torch.dtype, entry_score: str) -> None:
    """Float64 that came from another dtype has the same hashes."""
    config = LighthouseConfig(3, 2, 16, "random", 4, entry_score=entry_score)
    given = rows_of(dtype)
    inputs = [x.double() for x in given]
    expected = reference.select(*inputs, config)
    for rows, impl in ((inputs, "torch"), (given, "torch"), (given, "triton")):
        chosen = select(*rows, config, impl=impl)
        assert torch.equal(chosen.index, expected[0]) and torch.equal(chosen.slot, expected[1])
    grad = torch.randn_like(inputs[0])
    ours = output_and_gradients(lighthouse_attention, inputs, grad, config)
    oracle = output_and_gradients(reference.lighthouse_attention, inputs, grad, config)
    for value, want in zip(ours, oracle, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("d", [1, 32, 33, 160])
def test_every_column_counts(d: int) -> None:
    """A hash is the oracle's at any width, and any one column changes it."""
    row = torch.randn(1, 1, 1, d)
    before = [x.item() for x in hashes(row, row)]
    (q,), (k,) = reference.SCORED_ROWS["random"](row[0, 0], row[0, 0], row[0, 0], CONFIG)
    assert before == [q.item(), k.item()] and 0 <= min(before) and max(before) < 1
    changed = row.expand(1, 1, d, d).clone()
    changed.diagonal(dim1=2, dim2=3).mul_(1 + 2**-20)
    # Two of these hashes of 24 bits may be equal by chance.
    assert (hashes(changed, changed)[0] == before[0]).sum() <= 1


def test_zeros_of_both_signs_are_the_same() -> None:
    for dtype in DTYPES:
        rows = torch.randn(1, 1, 64, 8).masked_fill(torch.rand(1, 1, 64, 8) < 0.5, 0).to(dtype)
        negative = torch.where(rows == 0, -rows, rows)
        assert negative.signbit().sum() > rows.signbit().sum()
        for one, other in zip(hashes(rows, rows), hashes(negative, negative), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hashes_are_uniform_and_know_nothing_of_the_rows(dtype: torch.dtype) -> None:
    """Rows differ in norm by large factors, as a scorer by content would notice."""
    n = 2**15
    factors = torch.rand(1, 1, n, 1) * 4 + 0.1
    rows = (torch.randn(1, 1, n, 64) * factors).to(dtype)
    norms = rows.double().norm(dim=-1).flatten()
    by_query, by_key = hashes(rows, rows)
    for values in (by_query, by_key):
        assert values.min() >= 0 and values.max() < 1
        # Kolmogorov and Smirnov's distance. Its tail is 2 exp(-2 n distance^2): here 1e-7.
        expected = (torch.arange(n) + 0.5) / n
        distance = (values.double().sort().values - expected).abs().max().item()
        assert distance < math.sqrt(math.log(2 / 1e-7) / (2 * n))
        # Among 2^24 numbers few of these coincide: n^2 / 2^25 = 32 on average.
        assert n - values.unique().numel() < 32 + DEVIATIONS * math.sqrt(32)
        # Neighbours in the sequence are unrelated too.
        for other in (norms, rows[..., 0].flatten(), values.roll(1), torch.arange(n)):
            assert abs(correlation(ranks(values), ranks(other))) < DEVIATIONS / math.sqrt(n)
        assert abs(correlation((values - 0.5).abs(), norms)) < DEVIATIONS / math.sqrt(n)
    # A row's scores as a query and as a key are unrelated.
    assert abs(correlation(by_query, by_key)) < DEVIATIONS / math.sqrt(n)


def test_rows_of_equal_norm_score_apart() -> None:
    """A permutation, a sign and a rounding each make another row of the same norm."""
    row = torch.randn(64).bfloat16()
    rows = [row[torch.randperm(64)] for _ in range(100)]
    rows += [torch.where(torch.rand(64) < 0.5, row, -row) for _ in range(100)]
    rows = torch.stack(rows)[None, None]
    for values in hashes(rows, rows):
        assert values.unique().numel() >= 198
        assert 0.2 < values.mean() < 0.8
    # Doubling multiplies every norm by the same factor; it would not move one pick by norms.
    inputs = rows_of(torch.float32)
    doubled = [2 * x for x in inputs]
    by_norm = LighthouseConfig(3, 2, 16, "norm", 4)
    assert torch.equal(select(*inputs, by_norm).index, select(*doubled, by_norm).index)
    assert not torch.equal(select(*inputs, CONFIG).index, select(*doubled, CONFIG).index)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_picks_are_fresh_for_each_head_and_sequence(impl: str) -> None:
    index = select(*rows_of(torch.bfloat16, batch=2), CONFIG, impl=impl).index.flatten(0, 1)
    for one in range(len(index)):
        for other in range(one):
            assert not torch.equal(index[one], index[other])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("balanced", [True, False])
def test_chunks_pick_what_the_whole_picks(ranks: int, balanced: bool) -> None:
    """Where a position lies does not enter its score."""
    inputs = rows_of(torch.bfloat16, n=256, batch=2)
    geometry = PyramidGeometry(CONFIG, 256)
    whole = score(*inputs, geometry)
    slots = select(*inputs, CONFIG).slot.split(list(geometry.lengths), dim=-1)
    for rank in range(ranks):
        layout = ContextParallel(None, rank, ranks, balanced)
        held = [layout.take(x, 2) for x in inputs]
        for pairs, there in zip(
            whole, score(*held, PyramidGeometry(CONFIG, held[0].shape[2])), strict=True
        ):
            for one, other in zip(pairs, there, strict=True):
                assert torch.equal(layout.take(one, -1), other)
        picked = select(*held, CONFIG, context_parallel=layout).slot.unflatten(
            0, (-1, len(layout.held))
        )
        for number, chunk in enumerate(layout.held):
            mine = [x.chunk(layout.chunks, dim=-1)[chunk] >= 0 for x in slots]
            assert torch.equal(picked[:, number] >= 0, torch.cat(mine, dim=-1))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_recomputation_picks_the_same(impl: str) -> None:
    """Backward runs on a second selection, which no state of a generator may change."""
    leaves = rows_of(torch.float32)
    grad = torch.randn_like(leaves[0])
    projection = torch.randn(8, 8, device=DEVICE)
    calls = []

    def attention(q, k, v, config):
        q, k = q @ projection, k @ projection
        calls.append(select(q, k, v, config, impl=impl))
        return lighthouse_attention(q, k, v, config, selection=calls[-1], impl="torch")

    def recomputed(q, k, v, config):
        out = checkpoint(attention, q, k, v, config, use_reentrant=False)
        # Random numbers drawn in between are of no consequence.
        torch.rand(7)
        return out

    expected = output_and_gradients(attention, leaves, grad, CONFIG)
    found = output_and_gradients(recomputed, leaves, grad, CONFIG)
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(found, expected, strict=True))
    assert len(calls) == 3
    for index, slot in calls[1:]:
        assert torch.equal(index, calls[0].index) and torch.equal(slot, calls[0].slot)


def test_groups_take_the_largest_hash() -> None:
    """Of three query heads, and of the positions of an entry, the largest counts."""
    q, k, v = rows_of(torch.bfloat16, heads=6)
    by_query, by_key = position_scores(q, k, v, CONFIG)
    geometry = PyramidGeometry(CONFIG, q.shape[2])
    for level, (a, b) in enumerate(score(q, k, v, geometry)):
        by_head = by_query.unflatten(1, (2, 3)).amax(2)
        assert torch.equal(a, by_head.unflatten(-1, (-1, 2**level)).amax(-1))
        assert torch.equal(b, by_key.unflatten(-1, (-1, 2**level)).amax(-1))
    a, b = kernels.score(q, k, v, geometry)
    assert torch.equal(a, by_query.unflatten(-1, (-1, 2)).amax(-1))
    assert torch.equal(b, by_key.unflatten(-1, (-1, 2)).amax(-1))
