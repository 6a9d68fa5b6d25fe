"""Kernels with documents, on a GPU or in Triton's interpreter, against vectorised PyTorch."""

import pytest
import torch
from attention_cases import SCORES, vectorised_selection
from document_cases import random_layout

from lighthouse import LighthouseConfig
from lighthouse.geometry import PyramidGeometry

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
    "name, entry_score", zip(SHAPES, 3 * ["max", "first"], strict=True), ids=str
)
def test_selection_is_exact(name: str, entry_score: str, poison: None) -> None:
    """The same scores and documents select the same entries in the same places."""
    levels, p, m, strata, coarsest, batch, kv_heads, group = SHAPES[name]
    config = LighthouseConfig(levels, p, m * strata, picks_per_stratum=m, entry_score=entry_score)
    geometry = PyramidGeometry(config, coarsest * config.coarsest_span)
    torch.manual_seed(len(name))
    makers, planes = list(SCORES.values()), batch * kv_heads
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
