"""Properties that hold for every configuration."""

import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import run_twice
from torch.utils._python_dispatch import TorchDispatchMode

from lighthouse import LighthouseConfig, lighthouse_attention, select
from lighthouse.config import ENTRY_SCORES, SCORERS
from lighthouse.geometry import PyramidGeometry
from lighthouse.scoring import score

CONFIGS = [
    LighthouseConfig(levels, p, m * strata, picks_per_stratum=m, entry_score="max", combine="sum")
    for levels, p, m, strata in itertools.product((2, 3, 4), (2, 4), (2, 4), (1, 3))
]


def inputs(config: LighthouseConfig, extra: int = 1, heads=2, kv_heads=1, d=4, seed=0):
    """Random q, k, v [1, heads, N, D] in float64, the coarsest level ``extra`` longer than k."""
    n = (config.top_k + extra) * config.pooling_factor ** (config.levels - 1)
    torch.manual_seed(seed)
    return [torch.randn(1, h, n, d, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


def entries(config: LighthouseConfig, n: int, index: torch.Tensor) -> list[tuple[int, int]]:
    """(level, number) of pyramid indices, worked out from the definition of the layout."""
    layout = [
        (level, i)
        for level in range(config.levels)
        for i in range(n // config.pooling_factor**level)
    ]
    return [layout[i] for i in index.tolist()]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_gathered_length_and_order(config: LighthouseConfig, extra: int) -> None:
    q, k, v = inputs(config, extra, seed=extra)
    n, p = q.shape[2], config.pooling_factor
    index, slot = select(q, k, v, config)
    coarsest = n // p ** (config.levels - 1)
    s = coarsest + (config.levels - 1) * p * config.top_k
    assert index.shape == (1, 1, s) and index.dtype == slot.dtype == torch.int32
    assert PyramidGeometry(config, n).gathered_length == s

    gathered = entries(config, n, index[0, 0])
    assert len(set(gathered)) == s
    assert {(config.levels - 1, i) for i in range(coarsest)} <= set(gathered)
    order = [((i + 1) * p**level - 1, level) for level, i in gathered]
    assert order == sorted(order)
    # Every included entry but the coarsest has its siblings and its parent with it.
    for level, i in gathered:
        if level < config.levels - 1:
            siblings = {(level, i // p * p + child) for child in range(p)}
            assert siblings | {(level + 1, i // p)} <= set(gathered)
    # The two maps invert each other.
    places = torch.arange(s, dtype=torch.int32)
    assert torch.equal(slot[0, 0][index[0, 0].long()], places)
    assert int((slot >= 0).sum()) == s


@pytest.mark.parametrize("config", CONFIGS[::3], ids=str)
def test_coverage(config: LighthouseConfig) -> None:
    """Position t sums, over levels, the entry ((t - p^l + 1) // p^l) if it is included."""
    q, k, v = inputs(config)
    n, p = q.shape[2], config.pooling_factor
    selection = select(q, k, v, config)
    gathered = entries(config, n, selection.index[0, 0])
    # Attention that returns which place it is: the output then shows what reached a position.
    one_hot = torch.eye(len(gathered), dtype=torch.float64).expand(1, 2, -1, -1)
    out = lighthouse_attention(q, k, v, config, selection=selection, sdpa=lambda *_, **__: one_hot)
    for t in range(n):
        reached = {gathered[place] for place in out[0, 0, t].nonzero().flatten().tolist()}
        expected = {
            (level, (t - p**level + 1) // p**level)
            for level in range(config.levels)
            if t >= p**level - 1
        }
        assert reached == expected & set(gathered)
        assert out[0, 0, t].sum() == len(reached)
    uncovered = [t for t in range(p ** (config.levels - 1) - 1) if not out[0, 0, t].any()]
    assert all(not out[0, :, t].any() for t in uncovered)

    finest = replace(config, combine="finest")
    out = lighthouse_attention(q, k, v, finest, selection=selection, sdpa=lambda *_, **__: one_hot)
    for t in range(n):
        reached = [gathered[place] for place in out[0, 0, t].nonzero().flatten().tolist()]
        found = {
            (level, (t - p**level + 1) // p**level)
            for level in range(config.levels)
            if t >= p**level - 1
        }
        assert reached == sorted(found & set(gathered))[:1]


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("entry_score", ENTRY_SCORES)
def test_what_entries_score_by(scorer: str, entry_score: str) -> None:
    """Under "first" no score depends on a token after the entry's first; under "max" some do."""
    config = LighthouseConfig(3, 4, 8, scorer, 4, dilation=2, entry_score=entry_score)
    rows = inputs(config)
    geometry = PyramidGeometry(config, rows[0].shape[2])
    before = score(*rows, geometry)
    changed = 0
    for t in range(geometry.sequence_length):
        spoiled = [x.clone() for x in rows]
        for x in spoiled:
            x[:, :, t + 1 :] *= 3
        for span, pairs in zip(geometry.spans, zip(before, score(*spoiled, geometry), strict=True),
                               strict=True):  # fmt: skip
            begun = t // span + 1
            for ours, theirs in zip(*pairs, strict=True):
                changed += (ours[..., :begun] != theirs[..., :begun]).sum().item()
    assert (changed == 0) == (entry_score == "first")


@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS[:20:4],
        pytest.param(CONFIGS[20], marks=pytest.mark.slow),
        replace(CONFIGS[8], combine="finest", window=5),
    ],
    ids=str,
)
def test_values_never_flow_backwards(config: LighthouseConfig) -> None:
    """With a fixed selection, no later token changes an output or sends it a gradient."""
    q, k, v = inputs(config, d=2)
    n = q.shape[2]
    selection = select(q, k, v, config)

    def attention(q, k, v):
        return lighthouse_attention(q, k, v, config, selection=selection)

    for argument, jacobian in enumerate(torch.autograd.functional.jacobian(attention, (q, k, v))):
        # [1, 2, N, D, 1, heads, N, D] -> whether output position t feels input position u.
        felt = jacobian.abs().sum(dim=(0, 1, 3, 4, 5, 7)) > 0
        assert not felt.triu(diagonal=1).any(), "qkv"[argument]
        # Some input does arrive at each position, or the check above would be empty.
        assert felt.any(dim=1)[config.pooling_factor ** (config.levels - 1) :].all()

    out = attention(q, k, v)
    for t in range(n - 1):
        spoiled = [x.clone() for x in (q, k, v)]
        for x in spoiled:
            x[:, :, t + 1 :] = 1e3 * torch.randn_like(x[:, :, t + 1 :])
        assert torch.equal(attention(*spoiled)[:, :, : t + 1], out[:, :, : t + 1])


def test_repeated_runs_give_the_same_bits() -> None:
    run_twice("cpu", torch.float32, 4096, LighthouseConfig(3, 4, 128, picks_per_stratum=32))
    run_twice("cpu", torch.bfloat16, 4096, LighthouseConfig(3, 4, 128, picks_per_stratum=32))
    config = LighthouseConfig(3, 4, 32, picks_per_stratum=16, combine="finest", window=100)
    run_twice("cpu", torch.float32, 1024, config)
    for scorer in ("dilated", "gla", "random"):
        run_twice("cpu", torch.float32, 1024, LighthouseConfig(3, 4, 32, scorer, 16))


def test_deterministic_algorithms_are_enough() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        run_twice("cpu", torch.float32, 1024, LighthouseConfig(3, 4, 32, picks_per_stratum=16))
    finally:
        torch.use_deterministic_algorithms(False)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_is_linear_in_the_sequence() -> None:
    config = LighthouseConfig(3, 4, 64, picks_per_stratum=32)
    for n in (2048, 16384):
        q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3))
        with LargestTensor() as largest:
            lighthouse_attention(q, k, v, config, sdpa=lambda q, k, v, **_: v).sum().backward()
        assert largest.elements <= 2 * q.numel()
