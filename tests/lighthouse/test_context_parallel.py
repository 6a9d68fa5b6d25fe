"""Chunks of a sequence on several ranks against the whole on one."""

import itertools
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from attention_cases import output_and_gradients, relative_error
from gathering_ranks import slot_of_chunk
from launch import run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from lighthouse import (
    ContextParallel,
    LighthouseConfig,
    context_parallel,
    lighthouse_attention,
    select,
)
from lighthouse.config import COMBINATIONS
from lighthouse.context_parallel import ONE_DEVICE
from lighthouse.geometry import PyramidGeometry


def positions(layout: ContextParallel, n: int, rank: int) -> torch.Tensor:
    """The positions that lie on ``rank``, in order."""
    chunks = torch.arange(n).view(layout.chunks, -1)
    return chunks[list(layout.held_by(rank))].flatten()


class _AllGather(torch.autograd.Function):
    """[W, ...] gathered from every rank; gloo has no differentiable operation for it."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def dense_over_ranks(layout: ContextParallel, q, k, v, is_causal, enable_gqa, scale):
    """Causal attention of this rank's queries over the keys and values of all ranks."""
    s = q.shape[2] * layout.world_size
    order = torch.cat([positions(layout, s, rank) for rank in range(layout.world_size)])
    k, v = (_AllGather.apply(x).movedim(0, 2).flatten(2, 3) for x in (k, v))
    mask = positions(layout, s, layout.rank)[:, None] >= order
    assert is_causal
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=enable_gqa, scale=scale
    )


def check(rank, world_size, balanced, levels, heads, impl, **options) -> None:
    layout = ContextParallel(dist.group.WORLD, rank, world_size, balanced)
    config = LighthouseConfig(levels, 2, 32, picks_per_stratum=4, **options)
    n = 40 * 2 ** (levels - 1)
    torch.manual_seed(levels)
    # Triton's interpreter is slow.
    batch = 1 if impl == "triton" else 2
    leaves = [torch.randn(batch, n, h, 32).transpose(1, 2) for h in heads]
    grad = torch.randn(batch, n, heads[0], 32).transpose(1, 2)
    here = positions(layout, n, rank)
    local = [x[:, :, here] for x in leaves]

    whole = select(*leaves, config, impl=impl)
    mine = select(*local, config, impl=impl, context_parallel=layout)
    geometry = PyramidGeometry(config, n)
    chunk_slots = mine.slot.unflatten(0, (batch, -1))
    for number, chunk in enumerate(layout.held):
        expected = slot_of_chunk(whole.slot, geometry, layout.chunks, chunk)
        assert torch.equal(chunk_slots[:, number], expected)

    expected = output_and_gradients(lighthouse_attention, leaves, grad, config, impl=impl)
    results = output_and_gradients(
        lighthouse_attention, local, grad[:, :, here], config, impl=impl,
        context_parallel=layout, sdpa=partial(dense_over_ranks, layout),
    )  # fmt: skip
    for value, want in zip(results, expected, strict=True):
        want = want[:, :, here]
        assert relative_error(value, want) < 1e-6
        # The norm of the whole would hide an error in the few positions after a seam.
        reach = geometry.spans[-1] - 1
        for start in range(0, len(here), n // layout.chunks):
            after = slice(start, start + reach)
            assert relative_error(value[:, :, after], want[:, :, after]) < 1e-6


EQUAL, SHARED = (2, 2, 2), (4, 2, 2)
PAPER = {"entry_score": "max", "combine": "sum"}
FIRST = {"entry_score": "first", "combine": "finest"}
ALL = list(itertools.product((True, False), (2, 3, 4), (EQUAL, SHARED), (PAPER, FIRST)))
RANDOM = (True, 3, SHARED, {"scorer": "random"})
# Any two values stand together in one of these.
EVERY_PAIR = [
    (True, 2, EQUAL, PAPER),
    (False, 2, SHARED, FIRST),
    (True, 3, SHARED, FIRST),
    (False, 3, EQUAL, PAPER),
    (True, 4, EQUAL, FIRST),
    (False, 4, SHARED, PAPER),
]


def worker(rank: int, world_size: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    for balanced, levels, heads, options in [*(ALL if world_size == 4 else EVERY_PAIR), RANDOM]:
        check(rank, world_size, balanced, levels, heads, "torch", **options)
    if world_size == 2:
        for combine in COMBINATIONS:
            check(rank, world_size, True, 3, (2, 1, 1), "triton", combine=combine)
    dist.destroy_process_group()


# One rank repeats the operations of one device bit for bit, as the test below shows.
@pytest.mark.parametrize(
    "world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))]
)
def test_ranks_together_give_what_one_device_gives(world_size: int, free_port: int) -> None:
    run_ranks(worker, world_size, free_port, processes=world_size)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("options", [PAPER, FIRST, {"scorer": "random"}], ids=str)
def test_one_rank_costs_nothing(balanced: bool, options: dict) -> None:
    """One rank runs the same operations in the same order, hence gives the same bits."""
    config = LighthouseConfig(3, 2, 16, picks_per_stratum=4, **options)
    leaves = [torch.randn(2, 128, h, 8).transpose(1, 2) for h in (4, 2, 2)]
    grad = torch.randn_like(leaves[0])
    operations = []
    for layout in (ONE_DEVICE, ContextParallel(None, 0, 1, balanced)):
        with torch.profiler.profile() as profile:
            results = output_and_gradients(
                lighthouse_attention, leaves, grad, config, context_parallel=layout
            )
        operations.append([event.name for event in profile.events()])
        if layout is ONE_DEVICE:
            expected = results
    assert operations[0] == operations[1]
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(top_k=24), r"must divide the strata, got top_k / picks_per_stratum = 24 / 4 = 6"),
        (dict(n=204), r"multiple of 4 chunks times pooling_factor\^\(levels - 1\) = 4, .* of 16"),
        (dict(scorer="dilated"), "scorer = 'dilated' attends over the whole sequence"),
    ],
)
def test_chunks_that_would_select_something_else_are_refused(changed, message) -> None:
    n = changed.pop("n", 192)
    config = LighthouseConfig(3, 2, **{"top_k": 32, "picks_per_stratum": 4, **changed})
    leaves = [torch.randn(1, 2, n // 2, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        lighthouse_attention(*leaves, config, context_parallel=ContextParallel(None, 0, 2))


def test_rows_are_not_read_from_a_copy_made_before_they_came() -> None:
    """A compiler that copied them would otherwise train on what the memory held before."""
    coming = torch.zeros(2, 16, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="got a copy of what lighthouse::send returned"):
        torch.ops.lighthouse.receive(coming, [32], 2, 0, 2, True, 1)


def test_a_copy_where_earlier_rows_lay_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocators give a copy the address of rows that were freed, and all of that size had come."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        layout = ContextParallel(dist.group.WORLD, 0, 2)
        place = layout.rank, layout.world_size, layout.balanced, 1
        coming = torch.ops.lighthouse.send([torch.zeros(2, 4)], layout.group.group_name, *place)
        for _ in range(2):
            torch.ops.lighthouse.receive(coming, [32], 2, *place)
        monkeypatch.setattr(context_parallel, "_ON_THE_WAY", dict(context_parallel._ON_THE_WAY))
        copy, address = coming.clone(), coming.data_ptr()
        # As if the copy lay there.
        context_parallel._ON_THE_WAY[copy.data_ptr()] = context_parallel._ON_THE_WAY.pop(address)
        del coming
        with pytest.raises(RuntimeError, match="got a copy of what lighthouse::send returned"):
            torch.ops.lighthouse.receive(copy, [32], 2, *place)
    finally:
        dist.destroy_process_group()
