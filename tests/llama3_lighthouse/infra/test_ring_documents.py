"""Documents that do not see each other in the ring, and the kernels that attend there on GPUs."""

import itertools
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from document_cases import random_layout
from launch import run_ranks
from ring_ranks import Layer, join_ranks, with_gradients
from torch.distributed.device_mesh import DeviceMesh

from lighthouse import LighthouseAttention, LighthouseConfig, document_attention, first_positions
from lighthouse.implementation import kernels
from torchtitan.models.llama3_lighthouse.infra import ring_documents
from torchtitan.models.llama3_lighthouse.infra.context_parallel import (
    apply_context_parallel,
    layout_of,
)
from torchtitan.models.llama3_lighthouse.infra.ring_documents import Seen
from torchtitan.models.llama3_lighthouse.job_config import Parallelism

BATCH, N, D = 2, 96, 8
# As many strata as the chunks of two, three and four ranks divide.
METHOD = LighthouseConfig(3, 2, 48, picks_per_stratum=2, combine="finest", window=5)
BALANCES = (Parallelism(), Parallelism(context_parallel_load_balancer=None))


def rows_of(
    seed: int, dtype: torch.dtype = torch.float64, n: int = N, heads: tuple[int, int] = (4, 2)
) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output, for ``heads`` of queries and of keys and values."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = heads
    return [
        torch.randn(BATCH, count, n, D, generator=generator, dtype=dtype)
        for count in (queries, keys, keys, queries)
    ]


def documents_of(*begins: int) -> torch.Tensor:
    """The layout [B, N] of documents that begin at these positions and at 0."""
    marks = torch.zeros(N, dtype=torch.int64)
    marks[list(begins)] = 1
    return first_positions(marks.cumsum(0).expand(BATCH, -1))


def layouts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        documents_of(),
        documents_of(*range(N)),
        # At the chunks of two, three and four ranks, beside them, and over several of them.
        documents_of(8, 12, 16, 24, 32, 48, 64, 72),
        documents_of(13, 47, 49, 95),
        *(random_layout(BATCH, N, 1, generator) for _ in range(3)),
    ]


def worker(rank: int, world_size: int, port: int) -> None:
    mesh = join_ranks(rank, world_size, port)
    # torch warns of rows that it has to copy.
    warnings.filterwarnings("error", message=".*non-contiguous")
    for config, (number, documents) in itertools.product(BALANCES, enumerate(layouts())):
        check_against_one_device(mesh, config, documents, rows_of(number))
    check_against_one_device(mesh, Parallelism(), layouts()[-1], rows_of(9, torch.float32))
    for config, heads in itertools.product(BALANCES, ((3, 1), (6, 3))):
        check_against_one_device(mesh, config, layouts()[-1], rows_of(9, heads=heads))
    rows, documents = rows_of(5), layouts()[-2]
    eager, compiled = (attend(mesh, Parallelism(), rows, documents, x) for x in (False, True))
    assert all(map(torch.equal, eager, compiled))
    for config in BALANCES:
        check_lighthouse(mesh, config, 6)
        check_that_no_document_sees_another(mesh, config)
    dist.destroy_process_group()


def attend(
    mesh: DeviceMesh,
    config: Parallelism,
    rows: list[torch.Tensor],
    documents: torch.Tensor,
    compiled: bool = False,
    **more: int,
) -> list[torch.Tensor]:
    """Output and gradients of this rank's part of ``rows``."""
    module = Layer()
    apply_context_parallel(module, mesh, config)
    *inputs, grad = (layout_of(mesh, config).take(x, dim=2) for x in rows)
    options = {"enable_gqa": True, "scale": 0.3, "documents": documents, **more}
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    return with_gradients(run, inputs, grad, **options)


def check_against_one_device(
    mesh: DeviceMesh, config: Parallelism, documents: torch.Tensor, rows: list[torch.Tensor]
) -> None:
    *inputs, grad = rows
    wanted = with_gradients(document_attention, inputs, grad, documents=documents, scale=0.3)
    found = attend(mesh, config, rows, documents)
    bound = 1e-6 if grad.dtype == torch.float32 else 1e-12
    for value, want in zip(found, wanted, strict=True):
        want = layout_of(mesh, config).take(want, dim=2)
        assert value.dtype == grad.dtype
        assert ((value - want).norm(dim=-1) <= bound * (1 + want.norm(dim=-1))).all()


def check_lighthouse(mesh: DeviceMesh, config: Parallelism, seed: int) -> None:
    """The selection, the window, the seam and this ring together."""
    n, generator = 4 * N, torch.Generator().manual_seed(seed)
    rows = rows_of(seed, n=n)
    documents = random_layout(BATCH, n, METHOD.coarsest_span, generator)
    options = {"enable_gqa": True, "scale": 0.3, "documents": documents}
    *inputs, grad = rows
    wanted = with_gradients(LighthouseAttention(METHOD), inputs, grad, **options)
    module = LighthouseAttention(METHOD)
    apply_context_parallel(module, mesh, config)
    layout = module.context_parallel
    *inputs, grad = (layout.take(x, dim=2) for x in rows)
    for value, want in zip(with_gradients(module, inputs, grad, **options), wanted, strict=True):
        want = layout.take(want, dim=2)
        assert ((value - want).norm(dim=-1) <= 1e-10 * (1 + want.norm(dim=-1))).all()


def check_that_no_document_sees_another(mesh: DeviceMesh, config: Parallelism) -> None:
    """Other tokens in the second document, which lies on several ranks, change no other bit."""
    documents = documents_of(13, 71)
    rows, others = rows_of(1), rows_of(2)
    second = ((documents == 13).unsqueeze(1).unsqueeze(-1)).expand(-1, 1, -1, 1)
    changed = [torch.where(second, y, x) for x, y in zip(rows, others, strict=True)]
    kept = ~layout_of(mesh, config).take(second, dim=2)
    before, after = (attend(mesh, config, x, documents) for x in (rows, changed))
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x.masked_fill(~kept, 0), y.masked_fill(~kept, 0))
    # On a rank that holds some of it, it does change.
    assert kept.all() or not torch.equal(before[0], after[0])


def worker_on_gpus(rank: int, world_size: int, port: int) -> None:
    """Attention over ranks against that of one GPU, both in bf16, and compiled."""
    mesh = join_ranks(rank, world_size, port, "cuda")
    n, generator = 3072, torch.Generator().manual_seed(0)
    layouts = [*(random_layout(BATCH, n, 1, generator) for _ in range(2)), first_positions(
        torch.arange(n).div(700, rounding_mode="floor").expand(BATCH, -1)
    )]  # fmt: skip
    shapes = [(BATCH, heads, n, 64) for heads in (4, 2, 2, 4)]
    rows = [torch.randn(x, generator=generator).cuda().bfloat16() for x in shapes]
    for config, layout, mode in itertools.product(BALANCES, layouts, (False, True)):
        torch.compiler.reset()
        documents, (*inputs, grad) = layout.cuda(), rows
        options = {"documents": documents, "scale": 0.3}
        wanted = with_gradients(document_attention, inputs, grad, **options)
        found = attend(mesh, config, rows, documents, compiled=mode)
        for value, want in zip(found, wanted, strict=True):
            want = layout_of(mesh, config).take(want, dim=2)
            assert (value - want).norm() < 2e-2 * want.norm(), (config, mode)
        # The host waits for nothing, and so not for the layout.
        torch.cuda.set_sync_debug_mode("error")
        attend(mesh, config, rows, documents, compiled=mode)
        torch.cuda.set_sync_debug_mode("default")
    dist.destroy_process_group()


@pytest.mark.gpu
def test_documents_over_gpus_equal_those_on_one(free_port: int) -> None:
    world_size = min(3, torch.cuda.device_count())
    if world_size < 2:
        # The other gpu tests need only one.
        pytest.skip(f"context parallelism needs two or more GPUs, found {world_size}")
    run_ranks(worker_on_gpus, world_size, free_port, processes=world_size)


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_documents_over_ranks_equal_those_on_one_device(world_size: int, free_port: int) -> None:
    run_ranks(worker, world_size, free_port, processes=world_size)


def test_kernels_attend_to_what_is_seen() -> None:
    """As on GPUs. Queries that see nothing, and keys that nobody sees, lie between."""
    queries, keys = 12, 10
    seen = Seen(torch.tensor([5, 0, 12, 1]), torch.tensor([4, 10, 0, 9]))
    generator = torch.Generator().manual_seed(3)
    shapes = ((4, queries), (2, keys), (2, keys), (4, queries))
    q, k, v, dout = (torch.randn(4, *x, D, generator=generator) for x in shapes)
    out, lse = ring_documents.forward_to_seen(q, k, v, 0.5, seen)
    intervals = ring_documents.intervals_of(seen, queries, keys)
    by_kernels = kernels.interval_forward(q, k, v, intervals, 0.5, keys)
    for found, want in zip(by_kernels, (out, lse), strict=True):
        torch.testing.assert_close(found, want)
    sees = torch.arange(queries) < seen.queries[:, None]
    assert (lse.isfinite() == sees[:, None]).all() and (out[1] == 0).all()
    # In the ring the logsumexp is over more keys, and always finite.
    lse = torch.logaddexp(lse, torch.zeros(())) + math.log(2)
    rows = dout, q, k, v, out, lse, 0.5, seen
    wanted = ring_documents.backward_to_seen(*rows)
    found_grads = kernels.interval_backward(*rows[:6], intervals, 0.5, keys)
    for found, want in zip(found_grads, wanted, strict=True):
        torch.testing.assert_close(found, want)
    assert all(grad[1].eq(0).all() and grad[0].ne(0).any() for grad in wanted)
