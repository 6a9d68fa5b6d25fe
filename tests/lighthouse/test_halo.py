"""A window whose sequence lies in chunks on several ranks against the whole on one."""

import os
import random
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention_cases import relative_error
from functorch.compile import make_boxed_func
from gathering_ranks import gathered
from launch import run_ranks
from torch._dynamo.backends.common import aot_autograd
from torch.testing._internal.distributed.fake_pg import FakeStore

from lighthouse import (
    ContextParallel,
    LighthouseAttention,
    LighthouseConfig,
    WindowAttention,
    lighthouse_attention,
    window_attention,
)
from lighthouse.context_parallel import check_halo
from lighthouse.implementation import kernels

RANKS = 4
# A multiple of the chunks of every number of ranks, and of the coarsest span in each.
N = 384
METHOD = LighthouseConfig(
    3, 2, 48, picks_per_stratum=2, entry_score="first", combine="finest", window=9
)
# By numbers of positions, few of them, because Triton's interpreter is slow.
SMALL = {
    32: LighthouseConfig(2, 2, 8, picks_per_stratum=2, combine="finest", window=5),
    # Entries that end with a chunk are absent at some levels, and positions take seams of three.
    64: LighthouseConfig(4, 2, 8, picks_per_stratum=2, combine="finest", window=1),
    128: LighthouseConfig(3, 4, 8, picks_per_stratum=2, entry_score="first", combine="finest",
                          window=13),
}  # fmt: skip


def attended(q, k, v, mask, scale):
    """Plain attention with its logsumexp, under a mask [N, M]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp() @ v, lse


def mask_of(layout, length):
    whole = torch.arange(length * layout.world_size)
    return layout.take(whole, dim=0)[:, None] >= whole


def dense_forward(layout, q, k, v, scale):
    k, v = (gathered(x, layout) for x in (k, v))
    return attended(q, k, v, mask_of(layout, q.shape[2]), scale)


def dense_backward(layout, dout, dlse, q, k, v, out, lse, scale):
    """By the given output and logsumexp, which a merge replaces."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (gathered(x, layout).repeat_interleave(group, dim=1) for x in (k, v))
    mask = mask_of(layout, q.shape[2])
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    probabilities = (scores - lse[..., None]).exp()
    shift = (dout * out).sum(-1) - (0 if dlse is None else dlse)
    dscores = probabilities * (dout @ v.mT - shift[..., None]) * scale
    others = [dscores.mT @ q, probabilities.mT @ dout]
    others = [grad.unflatten(1, (heads, group)).sum(2) for grad in others]
    for grad in others:
        dist.all_reduce(grad, group=layout.group)
    return dscores @ k, *(layout.take(grad, dim=2) for grad in others)


def with_operations(layout: ContextParallel) -> ContextParallel:
    operations = partial(dense_forward, layout), partial(dense_backward, layout)
    return ContextParallel(
        layout.group, layout.rank, layout.world_size, layout.balanced, operations
    )


def results_of(attention, leaves, grads):
    """Outputs, and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    found = attention(*leaves)
    torch.autograd.backward(found, grads)
    return [*(x.detach() for x in found), *(x.grad for x in leaves)]


def alone(window, impl, q, k, v, layout):
    options = {"return_lse": True, "scale": 0.3, "impl": impl}
    return window_attention(q, k, v, window, **options, context_parallel=layout)


def merged(config, impl, q, k, v, layout):
    return [lighthouse_attention(q, k, v, config, impl=impl, context_parallel=layout)]


@cache
def on_one_device(function, arguments, batch, n, heads, dtype, seed):
    """Inputs, gradients and what comes of them, once for all layouts that they are cut into."""
    generator = torch.Generator().manual_seed(seed)
    drawn = partial(torch.randn, dtype=dtype, generator=generator)
    leaves = [drawn(batch, n, h, 16).transpose(1, 2) for h in heads]
    grads = [drawn(batch, n, heads[0], 16).transpose(1, 2)]
    if function is alone:
        grads.append(drawn(batch, heads[0], n))
    attention = partial(function, *arguments, layout=ContextParallel(None, 0, 1))
    return leaves, grads, results_of(attention, leaves, grads)


def check(layout, attention, n, heads, window, dtype, seed, batch=2) -> None:
    """``attention(q, k, v, layout)`` gives outputs, and on several ranks what it gives on one."""
    inputs = attention.func, attention.args, batch, n, heads, dtype, seed
    leaves, grads, expected = on_one_device(*inputs)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    take = partial(layout.take, dim=2)
    found = results_of(partial(attention, layout=layout), [*map(take, leaves)], [*map(take, grads)])
    length, reach = n // layout.chunks, max(1, window - 1)
    for value, want in zip(found, map(take, expected), strict=True):
        assert relative_error(value, want) < tolerance
        # The norm of the whole would hide an error in the few positions beside a seam, and
        # float32 rounds more in a single position than in many.
        of_a_position = want.norm() / want.shape[2] ** 0.5
        for start in range(0, len(layout.held) * length, length):
            for first, count in ((start, 1), (start, reach), (start + length - reach, reach)):
                here = slice(first, first + count)
                error = (value[:, :, here] - want[:, :, here]).norm()
                # Gradients of q are zero where there is one key, save for rounding.
                scale = max(want[:, :, here].norm(), of_a_position * count**0.5)
                assert error < 5 * tolerance * scale, (first, count, error / scale)


def check_all(layout: ContextParallel, dtype: torch.dtype, seed: int) -> None:
    length = N // layout.chunks
    for heads, window in (
        ((2, 2, 2), 1),
        ((2, 2, 2), 2),
        ((4, 2, 2), random.randint(3, length)),
        ((4, 1, 1), length + 1),
    ):
        check(layout, partial(alone, window, "torch"), N, heads, window, dtype, seed)
        config = replace(METHOD, window=window)
        check(layout, partial(merged, config, "torch"), N, heads, window, dtype, seed)


def worker(rank: int, port: int, seed: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for world_size in range(2, RANKS + 1):
        group = dist.new_group(list(range(world_size)))
        for balanced in (True, False) if rank < world_size else ():
            layout = with_operations(ContextParallel(group, rank, world_size, balanced))
            # Float64 shows errors best; two ranks are enough to show that float32 stays float32.
            for dtype in (torch.float32, torch.float64)[world_size > 2 :]:
                # All ranks draw the same.
                random.seed(seed)
                check_all(layout, dtype, seed)
            if world_size == 2:
                for n, config in SMALL.items():
                    attention = partial(merged, config, "triton")
                    # The shortest has several sequences.
                    rows = n, (2, 1, 1), config.window, torch.float32, seed
                    check(layout, attention, *rows, batch=2 if n == min(SMALL) else 1)
                attention = partial(alone, config.window, "triton")
                check(layout, attention, n, (4, 2, 2), config.window, torch.float32, seed)
    dist.destroy_process_group()


def test_ranks_together_give_what_one_device_gives(free_port: int) -> None:
    """On 2, 3 and 4 ranks, in one launch."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    run_ranks(worker, free_port, seed, processes=RANKS)


def test_a_window_over_more_than_one_chunk_is_refused() -> None:
    rows = torch.randn(3, 1, 2, N // 2, 16)
    layout = ContextParallel(None, 0, 2)
    message = (
        "window = 98 reaches over more than one of the 4 chunks that context parallelism cuts "
        "384 positions into; use a window of at most 97, a longer"
    )
    with pytest.raises(ValueError, match=message):
        window_attention(*rows, 98, context_parallel=layout)
    module = WindowAttention(98)
    module.context_parallel = layout
    with pytest.raises(ValueError, match=message):
        module(*rows)
    check_halo(97, N, 4)
    check_halo(98, N, 1)


def test_a_window_beside_the_selection_needs_operations() -> None:
    module = LighthouseAttention(METHOD)
    module.context_parallel = ContextParallel(None, 0, 2)
    with pytest.raises(ValueError, match="window = 9 is merged by .* ContextParallel its oper"):
        module(*torch.randn(3, 1, 2, N // 2, 16))


# These windows reach into the first 4, 7 and all of a chunk's 8 positions.
@pytest.mark.skipif(kernels is None, reason="the kernels need Triton")
@pytest.mark.parametrize("window", [1, 5, 8, 9])
@pytest.mark.parametrize("first", [-1, 0, 1])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_kernels_see_the_halo(first: int, window: int, with_dlse: bool) -> None:
    """As vectorised PyTorch does; nothing of the zeros before the sequence's first chunk."""
    q, dout = torch.randn(2, 4, 4, 8, 16)
    k, v = torch.randn(2, 4, 2, 8, 16)
    before = torch.randn(2, 4, 2, window - 1, 16)
    found = []
    for impl in ("torch", "triton"):
        more = window, 0.3, impl, first, 2
        out, lse = torch.ops.lighthouse.halo_window(q, k, v, *before, *more)
        dlse = torch.linspace(-1, 1, lse.numel()).view_as(lse) if with_dlse else None
        rows = dout, dlse, q, k, v, *before, out, lse
        found.append([out, lse, *torch.ops.lighthouse.halo_window_backward(*rows, *more)])
    torch.testing.assert_close(found[1], found[0])
    if first >= 0:
        for grad in found[1][-2:]:
            assert not grad.unflatten(0, (-1, 2))[:, first].any()


@pytest.mark.skipif(kernels is None, reason="the kernels need Triton")
def test_the_halo_starts_no_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer under context parallelism starts those of a layer without, and each of them once."""
    started = []

    class Started:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels.interval_attention, name)

        def __getitem__(self, grid: tuple[int]) -> Any:
            started.append(self.name)
            return self.kernel[grid]

    names = ["_attend", "_query_gradients", "_key_gradients"]
    for name in names:
        monkeypatch.setattr(kernels.interval_attention, name, Started(name))
    monkeypatch.setattr(ContextParallel, "send", lambda self, *rows, step=1: lambda: rows)
    leaves = [torch.randn(2, h, 32, 16, requires_grad=True) for h in (4, 2, 2)]
    out, _ = alone(5, "triton", *leaves, ContextParallel(None, 1, 2))
    out.sum().backward()
    assert started == names


def attend_here(q, k, v, scale):
    return torch.ops.lighthouse.window(q, k, v, q.shape[2], scale)


def attend_here_backward(dout, dlse, q, k, v, out, lse, scale):
    rows = dout, dlse, q, k, v, out, lse
    return torch.ops.lighthouse.window_backward(*rows, q.shape[2], scale)


@pytest.mark.skipif(kernels is None, reason="the merge is by kernels, which need Triton")
@pytest.mark.parametrize(
    "attention",
    [partial(merged, SMALL[32], "triton"), partial(alone, 5, None)],
    ids=["merged", "alone"],
)
def test_compiled_backward_copies_no_gradient_to_add_the_halo(attention: partial) -> None:
    """A compiler makes an assignment to a slice a new tensor, which is a pass over all of it."""
    found = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Any:
        found.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        operations = attend_here, attend_here_backward
        layout = ContextParallel(dist.group.WORLD, 0, 2, operations=operations)
        torch.compiler.reset()
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        attention = partial(attention, layout=layout)
        compiled = torch.compile(attention, fullgraph=True, backend=backend)
        leaves = [torch.randn(1, h, 16, 16, requires_grad=True) for h in (2, 1, 1)]
        compiled(*leaves)[0].sum().backward()
    finally:
        dist.destroy_process_group()
    _, backward = found
    assert "lighthouse.halo_window_backward.default" in backward
    assert not [each for each in backward if "scatter" in each or "slice_backward" in each]
