"""Long documents get a call of flash attention of their own; stand-ins attend on CPUs."""

import itertools
from typing import Any

import pytest
import torch
from attention_cases import random_inputs, relative_error
from document_cases import random_layout
from flash_stand_ins import replace_flash_attention
from watched_memory import Watch

from lighthouse import (
    dense_attention,
    document_attention,
    first_positions,
    reference,
    window,
)
from lighthouse.documents import cumulative_lengths

kernels = pytest.importorskip("lighthouse.kernels")
order = kernels.document_dense
N = 128
# Documents of up to 17 positions are short where 64 have room.
SIZES = {
    "one": [N],
    "long outside": [60, 1, 2, 65],
    "long inside": [1, 2, 3, 90, 1, 31],
    "short": [*[4] * 31, 3, 1],
    "near the limit": [16, 17, 18, 17, 60],
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program of flash attention take one row, as if it had thousands."""
    monkeypatch.setattr(order, "ROWS_OF_PROGRAM", 1)


def layout_of(sizes: list[int], batch: int = 1) -> torch.Tensor:
    """The layout [B, N] of documents of these sizes, in rows that begin with different ones."""
    rows = [sizes[b % len(sizes) :] + sizes[: b % len(sizes)] for b in range(batch)]
    number = [torch.arange(len(x)).repeat_interleave(torch.tensor(x)) for x in rows]
    return first_positions(torch.stack(number))


def sequences(lengths: Any) -> list[tuple[int, int]]:
    assert torch.equal(lengths.queries, lengths.keys)
    assert lengths.queries.dtype == torch.int32
    return [(a, b) for a, b in itertools.pairwise(lengths.queries.tolist()) if a < b]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_document_is_a_sequence_of_one_call(
    small: None, sizes: list[int], batch: int
) -> None:
    bounds = cumulative_lengths(layout_of(sizes, batch), 64 * batch)
    limit = order.longest_short(64 * batch, N * batch, N)
    found = order.long_first(bounds, N * batch, N)
    rows = torch.arange(N * batch)
    assert torch.equal(found.place.sort().values, rows)
    assert torch.equal(found.place[found.row], rows)
    documents = {(a, b) for a, b in itertools.pairwise(bounds.tolist()) if a < b}
    for call, is_long in ((found.long, True), (found.short, False)):
        theirs = {(a, b) for a, b in documents if (b - a > limit) == is_long}
        runs = sequences(call)
        places = [found.order(rows)[a:b].tolist() for a, b in runs]
        assert {(x[0], x[-1] + 1) for x in places} == theirs
        assert all(x == list(range(x[0], x[-1] + 1)) for x in places)
        assert all(b - a <= call.longest_queries for a, b in runs)
        assert all(found.is_long[a:b].eq(is_long).all() for a, b in runs)
    programs = sum(
        (len(x.queries) - 1) * order._programs(x.longest_queries) for x in (found.long, found.short)
    )
    assert programs <= 64 * batch * order._programs(N) / order.LEAST_SAVED


def test_few_documents_get_one_call() -> None:
    """One call takes no copies. 256 documents of 18,432 rows have eight times fewer programs."""
    for most, length, two in ((256, 18432, True), (16, 18432, False), (256, 512, False)):
        bounds = cumulative_lengths(layout_of([length]), most)
        assert (order.long_first(bounds, length, length) is not None) == two
    assert order.longest_short(256, 18432, 18432) == 1152


class Peak(Watch):
    """Keeps the most memory that operations have held at once."""

    most = 0

    def __torch_dispatch__(self, *call: Any) -> Any:
        found = super().__torch_dispatch__(*call)
        self.most = max(self.most, self.living_bytes())
        return found


def test_copies_take_as_much_memory_as_the_docs_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what one call takes: four outputs forward, and eight backward."""

    def forward(q: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape[1::-1])

    def backward(dout: torch.Tensor, *rows: Any) -> list[torch.Tensor]:
        return [x.new_empty(x.shape) for x in rows[:3]]

    monkeypatch.setattr(order, "flash_forward_by_lengths", forward)
    monkeypatch.setattr(order, "flash_backward_by_lengths", backward)
    n, (heads, d) = 18432, (2, 64)
    q, k, v, dout, out = torch.empty(5, n, heads, d)
    lse, size = torch.empty(heads, n), q.nbytes
    calls = (order.dense_forward, (q, k, v)), (order.dense_backward, (dout, q, k, v, out, lse))
    taken = []
    for most_documents in (16, 256):
        bounds = cumulative_lengths(layout_of([9000, n - 9000]), most_documents)
        for function, rows in calls:
            with Peak() as peak:
                function(*rows, n, 0.5, bounds)
            taken.append(peak.most / size)
    forward_alone, backward_alone, forward_both, backward_both = taken
    assert forward_both - forward_alone == pytest.approx(4, abs=0.2)
    assert backward_both - backward_alone == pytest.approx(8, abs=0.2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_two_calls_attend_as_one(
    small: None, sizes: list[int], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, logsumexp and gradients. What a call leaves out is no number there."""
    replace_flash_attention(monkeypatch)
    inputs = random_inputs(dict(n=N, batch=batch, heads=4, kv_heads=2, tied=False, seed=3))
    inputs = [x.float() for x in inputs]
    documents = layout_of(sizes, batch)
    grad, grad_lse = torch.randn(inputs[0].shape), torch.randn(batch, 4, N)

    def results(most: int, impl: str) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        layout = cumulative_lengths(documents, most) if impl == "flash" else documents
        out, lse = window._WindowAttention.apply(*leaves, N, 0.5, impl, True, layout)
        return [
            out.detach(),
            lse.detach(),
            *torch.autograd.grad((out, lse), leaves, (grad, grad_lse)),
        ]

    exact, found = results(0, "torch"), results(64 * batch, "flash")
    for value, want in zip(found, exact, strict=True):
        assert relative_error(value, want) < 1e-5


@pytest.mark.parametrize("rows", [128, 1], ids=["one call", "two calls"])
def test_dense_attention_within_documents(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, against the oracle."""
    replace_flash_attention(monkeypatch)
    monkeypatch.setattr(dense_attention, "obstacle_to_flash", lambda q: None)
    monkeypatch.setattr(order, "ROWS_OF_PROGRAM", rows)
    inputs = random_inputs(dict(n=64, batch=2, heads=4, kv_heads=2, tied=False, seed=4))
    documents = random_layout(2, 64, 1, torch.Generator().manual_seed(8))
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    assert (order.long_first(cumulative_lengths(documents), 128, 64) is None) == (rows == 128)

    def run(attend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attend(*leaves, documents, scale=0.3)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact = run(reference.dense_attention, torch.float64)
    for value, want in zip(run(document_attention, torch.float32), exact, strict=True):
        assert relative_error(value, want) < 1e-5


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_attention, "obstacle_to_flash", lambda q: None)
    monkeypatch.setattr(dense_attention, "TRITON_IS_INSTALLED", False)
    q = torch.ones(1, 1, 4, 8)
    with pytest.raises(ImportError, match="pip install triton"):
        document_attention(q, q, q, layout_of([4]))
