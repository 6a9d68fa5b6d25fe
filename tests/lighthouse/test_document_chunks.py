"""Documents of a sequence that lies in chunks on several ranks, against the whole on one."""

import itertools
import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from document_cases import positions_of, random_layout
from gathering_ranks import slot_of_chunk, with_operations
from launch import run_ranks

from lighthouse import (
    ContextParallel,
    LighthouseConfig,
    WindowAttention,
    document_attention,
    first_positions,
    lighthouse_attention,
    select,
    window_attention,
)
from lighthouse.context_parallel import ONE_DEVICE
from lighthouse.document_chunks import documents_of_chunks, gathered_documents_of_chunks
from lighthouse.documents import check_layout, gathered_documents
from lighthouse.geometry import PyramidGeometry
from lighthouse.halo import layouts_in_chunks
from lighthouse.implementation import kernels

METHOD = LighthouseConfig(3, 2, 24, picks_per_stratum=2, combine="finest", window=5)
# By the most ranks: positions and picks that the chunks of every number of ranks divide.
SIZES = {2: (96, replace(METHOD, top_k=16)), 3: (144, METHOD), 4: (384, replace(METHOD, top_k=48))}
# Few positions, because Triton's interpreter is slow.
SMALL = {
    48: LighthouseConfig(3, 2, 8, picks_per_stratum=2, combine="finest", window=5),
    64: LighthouseConfig(4, 2, 8, picks_per_stratum=2, combine="finest", window=1),
}
# The same for code that is compiled, with fewer levels because the compiler is slow too.
COMPILED = {True: (32, replace(SMALL[48], levels=2)), False: (48, SMALL[48])}


def layout_of(begins: list[int], n: int) -> torch.Tensor:
    """The layout [N] of documents that begin at these positions."""
    position = torch.arange(n)
    return first_positions(torch.bucketize(position, torch.tensor(begins), right=True)[None])[0]


def layouts(n: int, chunks: int, span: int) -> dict[str, torch.Tensor]:
    """Layouts [2, N] of documents that begin at multiples of ``span``."""
    length = n // chunks
    some = layout_of([span, length, 3 * length - span], n)
    many = layout_of(list(range(0, n, span)), n)
    one, two = torch.zeros_like(some), layout_of([0, n // 2 + span], n)
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    return {
        "one, and many": torch.stack([one, many]),
        "over several chunks, and from chunk to chunk": torch.stack(
            [two, layout_of(list(range(0, n, length)), n)]
        ),
        "over a chunk, at its end": torch.stack([some, one]).long(),
        "random": random_layout(2, n, span, generator),
    }


def results_of(
    attention: Callable[..., Any], leaves: list[torch.Tensor], grads: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Outputs, and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    found = attention(*leaves)
    torch.autograd.backward(found, grads)
    return [*(x.detach() for x in found), *(x.grad for x in leaves if x.grad is not None)]


def alone(window, q, k, v, layout, documents):
    options = {"scale": 0.3, "return_lse": True}
    return window_attention(
        q, k, v, window, **options, context_parallel=layout, documents=documents
    )


def merged(config, impl, q, k, v, layout, documents):
    options = {"impl": impl, "context_parallel": layout, "documents": documents}
    return [lighthouse_attention(q, k, v, config, **options)]


def dense(q, k, v, layout, documents):
    """The dense stage of a module, whose ``sdpa`` does not run with documents."""
    if layout.chunks == 1:
        return [document_attention(q, k, v, documents)]
    module = WindowAttention(1)
    module.enabled, module.context_parallel = False, layout
    return [module(q, k, v, enable_gqa=True, documents=documents)]


def drawn(attention, n, heads, dtype):
    """Leaves, and gradients of the outputs."""
    leaves = [torch.randn(2, n, h, 16, dtype=dtype).transpose(1, 2) for h in heads]
    grads = [torch.randn(2, n, heads[0], 16, dtype=dtype).transpose(1, 2)]
    if getattr(attention, "func", None) is alone:
        grads.append(torch.randn(2, heads[0], n, dtype=dtype))
    return leaves, grads


def check_same(layout, attention, n, heads, dtype, documents) -> None:
    """Several ranks give what one gives, at each position."""
    leaves, grads = drawn(attention, n, heads, dtype)
    one = partial(attention, layout=ONE_DEVICE, documents=documents)
    expected = results_of(one, leaves, grads)
    take = partial(layout.take, dim=2)
    here = partial(attention, layout=layout, documents=documents)
    found = results_of(here, [*map(take, leaves)], [*map(take, grads)])
    bound = 1e-10 if dtype == torch.float64 else 1e-6
    for value, want in zip(found, map(take, expected), strict=True):
        assert value.isfinite().all()
        assert (value - want).abs().max() < 20 * bound
        # Gradients of q are zero where there is one key, save for rounding.
        assert (value - want).norm() < bound * max(want.norm(), want.numel() ** 0.5)


def check_apart(layout, attention, n, heads, dtype, documents) -> None:
    """Other tokens in one document change no bit of another, on any rank."""
    leaves, grads = drawn(attention, n, heads, dtype)
    others, _ = drawn(attention, n, heads, dtype)
    row = random.randrange(2)
    there = random.choice(positions_of(documents, row))
    kept = torch.ones(2, n, dtype=torch.bool)
    kept[row, there] = False
    changed = [
        torch.where(kept[:, None, :, None], *pair) for pair in zip(leaves, others, strict=True)
    ]
    take = partial(layout.take, dim=2)
    here = partial(attention, layout=layout, documents=documents)
    kept = layout.take(kept, dim=1)
    results = [
        results_of(here, [*map(take, each)], [*map(take, grads)]) for each in (leaves, changed)
    ]
    for before, after in zip(*results, strict=True):
        assert torch.equal(before.transpose(1, 2)[kept], after.transpose(1, 2)[kept])
    before, after = (each[0].transpose(1, 2)[~kept] for each in results)
    assert (before != after).all()


def check_selected(layout, config, n, impl, dtype, documents) -> None:
    """Each chunk selects what one device selects there."""
    leaves, _ = drawn(None, n, (4, 2, 2), dtype)
    whole = select(*leaves, config, impl=impl, documents=documents)
    here = [layout.take(x, dim=2) for x in leaves]
    options: dict[str, Any] = {"documents": documents, "context_parallel": layout}
    mine = select(*here, config, impl=impl, **options)
    slots, geometry = mine.slot.unflatten(0, (2, -1)), PyramidGeometry(config, n)
    for place, number in enumerate(layout.held):
        expected = slot_of_chunk(whole.slot, geometry, layout.chunks, number)
        assert torch.equal(slots[:, place], expected)
    if layout.operations is not None:
        chosen, free = (
            lighthouse_attention(*here, config, impl=impl, **options, **more)
            for more in ({"selection": mine}, {})
        )
        assert torch.equal(chosen, free)


def check_all(layout: ContextParallel, n: int, method: LighthouseConfig) -> None:
    length = n // layout.chunks
    for number, documents in enumerate(layouts(n, layout.chunks, method.coarsest_span).values()):
        heads = ((2, 2, 2), (4, 2, 2), (4, 1, 1))[number % 3]
        check_selected(layout, method, n, "torch", torch.float64, documents)
        rest = n, heads, torch.float64, documents
        check_same(layout, dense, *rest)
        for window in (1, 2, 5, length + 1):
            attentions = (
                partial(alone, window),
                partial(merged, replace(method, window=window), "torch"),
            )
            for attention in attentions:
                check_same(layout, attention, *rest)
                check_apart(layout, attention, *rest)


def check_kernels(layout: ContextParallel, quick: bool) -> None:
    """Another case by each balance, because Triton's interpreter is slow.

    Args:
        quick: whether each balance shows one of two further properties, and not both.
    """
    n, name = (48, "random") if layout.balanced else (64, "over a chunk, at its end")
    config = SMALL[n]
    documents = layouts(n, layout.chunks, config.coarsest_span)[name]
    attention = partial(merged, config, "triton")
    rest = n, (2, 1, 1), torch.float32, documents
    check_same(layout, attention, *rest)
    if layout.balanced or not quick:
        check_apart(layout, attention, *rest)
    if not layout.balanced or not quick:
        check_selected(layout, config, n, "triton", torch.float32, documents)


def check_compiled(layout: ContextParallel, quick: bool) -> None:
    """To one graph, which other documents take too.

    Args:
        quick: whether the merge is that of kernels alone, and not that of vectorised PyTorch too.
    """
    n, config = COMPILED[quick]
    attentions = {
        "window": partial(alone, 5),
        "vectorised": partial(merged, config, "torch"),
        "kernels": partial(merged, config, "triton"),
    }
    if kernels is None:
        del attentions["kernels"]
    elif quick:
        del attentions["vectorised"]
    first, other = list(layouts(n, layout.chunks, 4).values())[:2]
    for name, attention in attentions.items():
        # Triton's interpreter is slow.
        heads = (1, 1, 1) if name == "kernels" else (2, 1, 1)
        leaves, grads = drawn(attention, n, heads, torch.float32)
        leaves, grads = ([layout.take(x, dim=2) for x in each] for each in (leaves, grads))
        torch.compiler.reset()
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        for documents in (first,) if name == "kernels" else (first, other):
            both = [partial(x, layout=layout, documents=documents) for x in (attention, compiled)]
            # A graph with other documents would be another one.
            with torch._dynamo.config.patch(error_on_recompile=documents is other):
                plain, found = (results_of(each, leaves, grads) for each in both)
            torch.testing.assert_close(found, plain)
        # Where nothing needs a gradient, Dynamo calls functions in another way.
        torch.testing.assert_close([*both[1](*leaves)], plain[: len(plain) - len(leaves)])


def worker(rank: int, ranks: int, port: int, seed: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    quick = ranks == 2
    for world_size in range(1, ranks + 1):
        group = dist.new_group(list(range(world_size)))
        # One rank holds the whole sequence by either balance.
        for balanced in (True, False)[:world_size] if rank < world_size else ():
            layout = with_operations(ContextParallel(group, rank, world_size, balanced))
            # All ranks draw the same.
            torch.manual_seed(seed)
            random.seed(seed)
            check_all(layout, *SIZES[ranks])
            if world_size == 2 and kernels is not None:
                check_kernels(layout, quick)
            if world_size == 2 and balanced:
                check_compiled(layout, quick)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_ranks_together_give_what_one_device_gives(ranks: int, free_port: int) -> None:
    """On every number of ranks up to this one, in one launch."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    run_ranks(worker, ranks, free_port, seed, processes=ranks)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_chunks_take_their_documents(world_size: int, balanced: bool) -> None:
    """By definition, position by position; and the joined layouts of gathered sequences."""
    ranks = [ContextParallel(None, rank, world_size, balanced) for rank in range(world_size)]
    chunks, span = ranks[0].chunks, METHOD.coarsest_span
    length = 144 // chunks
    config = replace(METHOD, top_k=METHOD.top_k // chunks)
    for documents in layouts(144, chunks, span).values():
        for layout in ranks:
            own, before = found = documents_of_chunks(documents, layout)
            assert own.dtype == before.dtype == documents.dtype
            check_layout(own, span)
            rows = own.unflatten(0, (2, -1)), before.unflatten(0, (2, -1))
            for row, (place, chunk) in itertools.product(range(2), enumerate(layout.held)):
                first = chunk * length
                there = documents[row, first : first + length].tolist()
                assert rows[0][row, place].tolist() == [max(x - first, 0) for x in there]
                assert rows[1][row, place] == first - min(there[0], first)
            assert torch.equal(found.continues, before != 0)
        whole = gathered_documents(documents, PyramidGeometry(METHOD, 144))
        parts = gathered_documents_of_chunks(documents, PyramidGeometry(config, length), ranks[0])
        assert torch.equal(parts, whole) and parts.dtype == torch.int32


def test_the_operation_is_registered() -> None:
    documents = layouts(144, 4, 1)["random"]
    operation = torch.ops.lighthouse.documents_of_chunks.default
    torch.library.opcheck(
        operation, (documents, 1, 2, True), test_utils=("test_schema", "test_faketensor")
    )


# These windows reach into the first, 4, 7 and all of a chunk's 8 positions.
@pytest.mark.skipif(kernels is None, reason="the kernels need Triton")
@pytest.mark.parametrize("window", [2, 5, 8, 9])
@pytest.mark.parametrize("first", [-1, 0])
def test_kernels_see_the_halo_of_a_document(first: int, window: int) -> None:
    """By one call for the beginnings of all chunks, and without a gradient of keys unseen."""
    q, dout = torch.randn(2, 4, 4, 8, 16)
    k, v = torch.randn(2, 4, 2, 8, 16)
    before = torch.randn(2, 4, 2, window - 1, 16)
    layout = ContextParallel(None, 0 if first == 0 else 1, 3)
    # In the last layout the chunks here hold parts of more documents than there are.
    for documents in (*layouts(48, 6, 1).values(), torch.zeros(2, 48, dtype=torch.int32)):
        layouts_here = layouts_in_chunks(documents_of_chunks(documents, layout), window)
        found = []
        for impl in ("torch", "triton"):
            more = window, 0.3, impl, first, 2, *layouts_here
            out, lse = torch.ops.lighthouse.halo_window(q, k, v, *before, *more)
            # ``test_halo.py`` has both for each window.
            dlse = None if first else torch.linspace(-1, 1, lse.numel()).view_as(lse)
            rows = dout, dlse, q, k, v, *before, out, lse
            grads = torch.ops.lighthouse.halo_window_backward(*rows, *more)
            found.append([out, lse, *grads])
        torch.testing.assert_close(found[1], found[0])
        unseen = torch.arange(window - 1) < window - 1 - layouts_here[1][:, None]
        for grad in found[1][-2:]:
            assert not grad.transpose(1, 2)[unseen].any()
