"""Configurations, inputs and comparisons that the tests of the attention share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from lighthouse import LighthouseConfig, Selection, lighthouse_attention, select
from lighthouse.config import COMBINATIONS, ENTRY_SCORES
from lighthouse.geometry import PyramidGeometry
from lighthouse.selection import included_entries, place

NAN, INFINITY = float("nan"), float("inf")


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm()).item()


def output_and_gradients(
    attention: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad: torch.Tensor,
    config: LighthouseConfig,
    **options: Any,
) -> list[torch.Tensor]:
    """Output and the gradients of q, k and v, each [B, heads, N, D]."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*inputs, config, **options)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in inputs)]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A configuration with uneven strata, shared heads and tied scores, and a seed."""
    levels = draw(st.integers(2, 4))
    p = draw(st.sampled_from([2, 4] if levels < 4 else [2]))
    m = draw(st.sampled_from([2, 4]))
    top_k = m * draw(st.integers(1, 3))
    coarsest = top_k + draw(st.integers(0, 5))
    combine = draw(st.sampled_from(COMBINATIONS))
    config = LighthouseConfig(
        levels,
        p,
        top_k,
        picks_per_stratum=m,
        entry_score=draw(st.sampled_from(ENTRY_SCORES)),
        combine=combine,
        window=draw(st.sampled_from([0, 0, 0, 0, 1, 5, 40])) if combine == "finest" else 0,
    )
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 2, 3), (2, 2, 1)]))
    return dict(
        config=config,
        n=coarsest * p ** (levels - 1),
        batch=batch,
        kv_heads=kv_heads,
        heads=kv_heads * group,
        tied=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def random_inputs(
    case: dict[str, Any], dtype: torch.dtype = torch.float64, d: int = 4
) -> list[torch.Tensor]:
    """q, k and v as a model hands them over: transposed views [B, heads, N, D], not contiguous."""
    generator = torch.Generator().manual_seed(case["seed"])
    inputs = []
    for heads in (case["heads"], case["kv_heads"], case["kv_heads"]):
        shape = (case["batch"], case["n"], heads, d)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if case["tied"]:
            # Few distinct norms, so that most ranks are decided by the order of entries.
            x = x.sign() * torch.randint(1, 3, (*shape[:3], 1), generator=generator)
        inputs.append(x.to(dtype).transpose(1, 2))
    return inputs


class Dense(nn.Module):
    """Stands for torchtitan's wrapper: remembers how it was called."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any
    ) -> torch.Tensor:
        self.keywords = keywords
        return nn.functional.scaled_dot_product_attention(q, k, v, **keywords)


# Makers of level-1 scores, by what is hard about them.
SCORES = {
    "random": torch.rand,
    "tied": lambda *shape: torch.randint(0, 3, shape).float(),
    "constant": torch.ones,
    "zero": torch.zeros,
    "heavy-tailed": lambda *shape: torch.randn(*shape).abs() ** 20,
    "tiny": lambda *shape: torch.rand(*shape) * 1e-40,
    "not a number": lambda *shape: torch.rand(*shape).masked_fill(torch.rand(*shape) < 0.2, NAN),
    "infinite": lambda *shape: torch.rand(*shape).masked_fill(torch.rand(*shape) < 0.2, INFINITY),
}


def vectorised_selection(
    a: torch.Tensor,
    b: torch.Tensor,
    geometry: PyramidGeometry,
    documents: torch.Tensor | None = None,
) -> Selection:
    """The selection of vectorised PyTorch by level-1 scores a [B, Hq, n1] and b [B, Hkv, n1]."""
    level = (a.unflatten(1, (b.shape[1], -1)).amax(2), b)
    scores = [level, level]
    for length in geometry.lengths[2:]:
        under = (x.unflatten(-1, (length, -1)) for x in level)
        by_first = geometry.config.entry_score == "first"
        level = tuple(x[..., 0] if by_first else x.amax(-1) for x in under)
        scores.append(level)
    # The base scores rank nothing; any of the right shape do.
    scores[0] = (b.new_zeros(*b.shape[:2], geometry.sequence_length),) * 2
    return place(included_entries(scores, geometry, documents), geometry)


def run_twice(device: str, dtype: torch.dtype, n: int, config: LighthouseConfig) -> None:
    """Select, attend and run backward, all twice, and check for the same bits."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, n, h, 64).to(device, dtype) for h in (4, 2, 2)]
    grad = torch.randn(1, 4, n, 64).to(device, dtype)
    results = []
    for _ in range(2):
        copies = [x.clone().transpose(1, 2).requires_grad_() for x in leaves]
        selection = select(*copies, config)
        out = lighthouse_attention(*copies, config, selection=selection)
        out.backward(grad)
        results.append([*selection, out, *(x.grad for x in copies)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def rows(
    n: int, heads: int = 2, kv_heads: int = 1, batch: int = 1, d: int = 4, seed: int = 0
) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output as a model has them, float64, not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n, h, d, generator=generator, dtype=torch.float64).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads, heads)
    ]
