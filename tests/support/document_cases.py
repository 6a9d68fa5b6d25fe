"""Layouts of documents, and the attentions that take them, for tests."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from attention_cases import cases, random_inputs
from hypothesis import strategies as st

from lighthouse import (
    LighthouseConfig,
    document_attention,
    first_positions,
    lighthouse_attention,
    window_attention,
)
from lighthouse.config import SCORERS


def random_layout(batch: int, n: int, span: int, generator: torch.Generator) -> torch.Tensor:
    """Documents [B, N] that begin at multiples of ``span``, few in some rows, many in others."""
    rows = []
    for _ in range(batch):
        share = torch.rand((), generator=generator) ** 2
        begins = torch.rand(n // span, generator=generator) < share
        rows.append(begins.cumsum(0).repeat_interleave(span))
    return first_positions(torch.stack(rows))


def length_layout(batch: int, n: int, span: int, median: int, most: int, seed: int) -> torch.Tensor:
    """Documents [B, N] of log-normal lengths, that begin at multiples of ``span``.

    The last of ``most`` documents takes the rest of a row.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        lengths = median * torch.randn(most, generator=generator, dtype=torch.float64).exp()
        begins = (lengths / span).ceil().long().cumsum(0)[:-1]
        number = torch.bucketize(torch.arange(n // span), begins, right=True)
        rows.append(number.repeat_interleave(span))
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
    # Others sum in an order of their own, and rounding then decides between equal scores.
    case["tied"] = case["tied"] and scorer in ("norm", "random")
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
