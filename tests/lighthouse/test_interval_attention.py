"""Attention to intervals of keys by kernels, on a GPU or in Triton's interpreter, in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from attention_cases import relative_error

from lighthouse.documents import first_positions

kernels = pytest.importorskip("lighthouse.kernels")
module = kernels.interval_attention
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows of a program, and rows that it takes at once.
TILES = [(16, 16), (32, 16), (16, 32)]
# Queries, keys, query heads, key-value heads, head dimension.
SHAPES = [(100, 100, 2, 1, 16), (70, 130, 4, 2, 24), (130, 40, 3, 3, 8), (1, 1, 1, 1, 1)]


@pytest.fixture(params=TILES, ids=str)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    one = module.Tiles(*request.param, warps=4, stages=1)
    monkeypatch.setattr(module, "launches", lambda q, longest: module.Launches(one, one, one))


def random_intervals(queries: int, keys: int, longest: int) -> Any:
    """Both ends ascend. Some queries see nothing, at either end or between others."""
    first = torch.randint(0, keys + 1, (queries,)).sort().values
    end = first + torch.randint(-longest // 4, longest, (queries,))
    end = end.clamp(0, keys).cummax(0).values
    return kernels.Intervals(first.int().to(DEVICE), end.int().to(DEVICE))


def exact(seen: Any, rows: list[torch.Tensor], dout: torch.Tensor, scale: float) -> list[Any]:
    """Output, logsumexp and gradients in float64, of a softmax over what each query sees."""
    q, k, v = (x.double().detach().requires_grad_() for x in rows)
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
    key = torch.arange(len(k), device=q.device)
    hidden = (key < seen.first[:, None]) | (key >= seen.end[:, None])
    lse = scores.masked_fill(hidden, -math.inf).logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp().masked_fill(hidden, 0.0)
    out = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]


def attend(seen: Any, rows: list[torch.Tensor], dout: torch.Tensor, scale: float) -> list[Any]:
    """The same by the kernels, whose batch is one sequence here."""
    *rows, dout = (x.transpose(0, 1)[None] for x in (*rows, dout))
    more = seen, scale, rows[1].shape[2]
    out, lse = kernels.interval_forward(*rows, *more)
    grads = kernels.interval_backward(dout, *rows, out, lse, *more)
    out, *grads = (x[0].transpose(0, 1) for x in (out, *grads))
    return [out, lse[0], *grads]


def random_rows(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output, in a layout with gaps."""
    queries, keys, heads, kv_heads, d = shape
    sizes = (queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)
    return [torch.randn(n, h + 1, d, device=DEVICE).to(dtype)[:, :h] for n, h in sizes]


@pytest.mark.parametrize("longest", [9, 200])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(
    tiles: None, shape: tuple[int, ...], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    *rows, dout = random_rows(shape, torch.float32)
    seen = random_intervals(*shape[:2], longest)
    expected = exact(seen, rows, dout, 0.3)
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        found = new_empty(self, *shape, **options)
        return found.fill_(math.nan) if found.is_floating_point() else found

    # Nothing of an output may be left unwritten.
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for name, value, want in zip(
        ("out", "lse", "dq", "dk", "dv"), attend(seen, rows, dout, 0.3), expected, strict=True
    ):
        assert torch.equal(value.isinf(), want.isinf()), name
        value, want = (x.nan_to_num(neginf=0.0) for x in (value.where(~value.isinf(), 0), want))
        assert (value - want).norm() <= 2e-6 * (1 + want.norm()), name


def beside_nan(batch: int, heads: int, length: int, d: int) -> torch.Tensor:
    """Random rows [B, H, N, D], with NaN in memory before and after each position and all."""
    rows = torch.full((batch * length + 2, heads + 2, d), math.nan, device=DEVICE)
    rows = rows[1:-1, 1:-1].unflatten(0, (batch, length)).transpose(1, 2)
    return rows.copy_(torch.randn(rows.shape))


# Sequences shorter than a tile and longer; one key before them, some, as many as their own, none.
# Any two values stand together in one of these.
@pytest.mark.parametrize(
    "length, reach, documents, heads, kv_heads, d",
    [
        (*lengths, documents, *((1, 1, 1) if documents == even else (4, 2, 24)))
        for lengths, even in (
            ((3, 1), True),
            ((40, 17), False),
            ((20, 20), True),
            ((9, 0), False),
        )
        for documents in (False, True)
    ],
)
def test_keys_before_sequences(
    tiles: None, length: int, reach: int, documents: bool, heads: int, kv_heads: int, d: int
) -> None:
    """Agree with float64, where they are joined with those of the sequence."""
    shown = torch.tensor([reach, 0, reach // 2, reach], dtype=torch.int32, device=DEVICE)
    q, dout = (beside_nan(4, heads, length, d) for _ in range(2))
    k, v = (beside_nan(4, kv_heads, length, d) for _ in range(2))
    before = [beside_nan(4, kv_heads, reach, d) for _ in range(2)]
    numbers = (torch.rand(4, length, device=DEVICE) < (0.2 if documents else 0)).cumsum(1)
    layout = first_positions(numbers)
    place = torch.arange(length, device=DEVICE)
    first = torch.where(layout == 0, reach - shown[:, None], reach + layout).maximum(place)
    sequence = torch.arange(4, device=DEVICE)[:, None] * (reach + length)
    joined = module.joined
    rows = [q, *(torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))]
    both = kernels.Intervals((sequence + first).flatten(), (sequence + reach + place + 1).flatten())
    expected = exact(both, [*map(joined, rows)], joined(dout), 0.3)
    given = kernels.Before(*before, shown), reach + 1, 0.3, layout if documents else None
    out, lse = kernels.halo_forward(q, k, v, *given)
    dq, *grads = kernels.halo_backward(dout, None, q, k, v, given[0], out, lse, *given[1:])
    grads = [torch.cat([grads[number + 2], grads[number]], dim=2) for number in range(2)]
    found = [joined(out), lse.transpose(0, 1).flatten(1), *map(joined, (dq, *grads))]
    for name, value, want in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert (value - want).norm() <= 2e-6 * (want.numel() ** 0.5 + want.norm()), name


def test_work_on_keys_before_follows_the_queries_that_see_them(tiles: None) -> None:
    """Programs read no gradients of later queries: a NaN among these would come through."""
    length, reach = 200, 17
    q, k, v, out, dout = (beside_nan(3, 1, length, 8) for _ in range(5))
    # A tile holds 32 queries at most, and may begin before the sequence.
    dout[:, :, 64:150] = math.nan
    before = kernels.Before(
        *(beside_nan(3, 1, reach, 8) for _ in range(2)),
        torch.full((3,), reach, dtype=torch.int32, device=DEVICE),
    )
    lse = torch.zeros(3, 1, length, device=DEVICE)
    *_, dk, dv = kernels.halo_backward(dout, None, q, k, v, before, out, lse, reach + 1, 0.3, None)
    assert dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_errors_are_those_of_rounding(dtype: torch.dtype) -> None:
    *rows, dout = random_rows((150, 150, 4, 2, 16), dtype)
    place = torch.arange(150, dtype=torch.int32, device=DEVICE)
    seen = kernels.Intervals((place - 40).clamp(min=0), place + 1)
    bound = 4 * torch.finfo(dtype).eps
    for value, want in zip(
        attend(seen, rows, dout, 0.25), exact(seen, rows, dout, 0.25), strict=True
    ):
        assert relative_error(value, want) < bound


@pytest.mark.parametrize("seed", range(5))
def test_the_queries_of_a_key_are_those_that_see_it(seed: int) -> None:
    torch.manual_seed(seed)
    seen = random_intervals(37, 53, 20)
    key, query = torch.arange(53, device=DEVICE), torch.arange(37, device=DEVICE)
    found = seen.of_keys(53)
    pairs = (key >= seen.first[:, None]) & (key < seen.end[:, None])
    assert torch.equal((query >= found.first[:, None]) & (query < found.end[:, None]), pairs.T)
    for ends in (*found, *seen):
        assert ends.dtype == torch.int32 and (ends.diff() >= 0).all()


@pytest.mark.parametrize("queries, keys", [(1, 1), (7, 7), (5, 9), (600, 600)])
@pytest.mark.parametrize("window", [1, 4, 2000])
@pytest.mark.parametrize("documents", [False, True])
def test_windows_are_the_intervals_that_they_stand_for(
    queries: int, keys: int, window: int, documents: bool
) -> None:
    place = torch.arange(keys - queries + 1, keys + 1, device=DEVICE)
    layout = torch.randint(0, keys, (3, queries)).sort().values.to(DEVICE).minimum(place - 1)
    layout = layout if documents else torch.zeros_like(layout)
    begin = torch.arange(0, 3 * keys, keys, device=DEVICE)[:, None]
    first = (place - window).maximum(layout) + begin
    expected = kernels.Intervals(first.flatten().int(), (place + begin).flatten().int())
    q, k = (torch.empty(3, 1, length, 1, device=DEVICE) for length in (queries, keys))
    seen = kernels.window.keys_seen(q, k, window, layout if documents else None)
    of_keys = seen.of_keys(3 * keys).tensors(q.device)
    for found, want in ((seen.tensors(q.device), expected), (of_keys, expected.of_keys(3 * keys))):
        for value, other in zip(found, want, strict=True):
            assert torch.equal(value, other)


def test_what_a_query_does_not_see_changes_no_bit(tiles: None) -> None:
    """Neither of its output and gradient, nor of those of keys that only others see."""
    *rows, dout = random_rows((60, 60, 2, 1, 16), torch.float32)
    place = torch.arange(60, dtype=torch.int32, device=DEVICE)
    seen = kernels.Intervals(torch.where(place < 23, 0, 23).int(), place + 1)
    before = attend(seen, rows, dout, 0.25)
    changed = [x.clone() for x in (*rows, dout)]
    for x in changed:
        x[23:] *= -3
    after = attend(seen, changed[:3], changed[3], 0.25)
    for value, other in itertools.islice(zip(before, after, strict=True), 5):
        value, other = (x.T if x.ndim == 2 else x for x in (value, other))
        assert torch.equal(value[:23], other[:23]) and not torch.equal(value, other)


def test_programs_fit_the_gpu() -> None:
    """Every head dimension has tiles, and a program's rows are powers of two."""
    for dtype in (torch.bfloat16, torch.float32):
        for d in (1, 64, 65, 128, 200, 256):
            for tile in module.launches(torch.empty(1, 1, 1, d, dtype=dtype), 512):
                assert tile.own & (tile.own - 1) == tile.other & (tile.other - 1) == 0
