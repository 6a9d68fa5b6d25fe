"""Copies of a rank's rows, sums and fills that a layer makes beside its attentions and kernels."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from row_copies import Pass, RowPasses
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lighthouse import (
    ContextParallel,
    LighthouseAttention,
    LighthouseConfig,
    WindowAttention,
    merge_over_ranks,
    window,
)
from lighthouse.kernels.launch import INTERPRETED
from torchtitan.models.llama3_lighthouse.infra.context_parallel import RingAttention
from torchtitan.models.llama3_lighthouse.infra.ring_operations import operations_of

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels")

HEADS, D, CHUNK, WINDOW = 4, 16, 67, 4
CONFIG = LighthouseConfig(
    2, 2, 16, picks_per_stratum=2, entry_score="first", combine="finest", window=WINDOW
)


class Order(TorchDispatchMode):
    """Lists the operations in the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(
        self, function: Any, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.names.append(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=[0, 1])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One of two ranks, to which nothing comes. A window is by the kernel."""
    for module in (merge_over_ranks, window):
        monkeypatch.setattr(module, "choose_window_implementation", lambda *x: "triton")
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    try:
        found = ContextParallel(dist.group.WORLD, request.param, 2)
        yield replace(found, operations=operations_of(found))
    finally:
        dist.destroy_process_group()


def passes_of(
    attention: LighthouseAttention | WindowAttention,
    layout: ContextParallel,
    length: int,
    least: int,
) -> list[Pass]:
    """Passes over tensors of ``least`` elements or more, forward and backward."""
    attention.context_parallel = layout
    rows = [torch.randn(1, length, HEADS, D).transpose(1, 2) for _ in range(4)]
    *leaves, grad = rows
    leaves = [x.requires_grad_() for x in leaves]
    with RowPasses(least) as watched:
        torch.autograd.grad(attention(*leaves), leaves, grad)
    return watched.found


def large_passes_of(
    attention: LighthouseAttention | WindowAttention, layout: ContextParallel, length: int
) -> list[Pass]:
    """Passes over a quarter of a rank's rows or more.

    What is exchanged is left out: here it is counted in bytes, and the window is long beside a
    chunk.
    """
    found = passes_of(attention, layout, length, length * HEADS * D // 4)
    return [each for each in found if not each.line.startswith("lighthouse/context_parallel.py")]


def test_a_window_copies_nothing(layout: ContextParallel) -> None:
    found = large_passes_of(WindowAttention(WINDOW), layout, 2 * CHUNK)
    assert not found, found


def test_a_layer_with_a_window_copies_nothing(layout: ContextParallel) -> None:
    passes = large_passes_of(LighthouseAttention(CONFIG, impl="triton"), layout, 128)
    # The ring's sums, and its merging, which is a kernel on GPUs, are of the gathered sequence.
    found = [each for each in passes if each.elements > 128 * HEADS * D // 3 and not_of_ring(each)]
    assert not found, found


def test_a_layer_with_a_window_starts_few_kernels_of_torch(layout: ContextParallel) -> None:
    """They do little, and take longer to start. In our operations a compiler cannot join them."""
    passes = passes_of(LighthouseAttention(CONFIG, impl="triton"), layout, 128, 1)
    # The rank with the first and the last chunk gives one of them zeros.
    first = int(layout.rank == 0)
    most = Counter(
        {
            "send": 2 * (1 + first),
            "receive": 2,
            # How many keys before a chunk are seen, and a copy of the logsumexps.
            "halo_window": 2 + first,
            "halo_window_backward": 2 + first,
            "add_to_last_rows": 2,
        }
    )
    # On CPUs the ring adds and merges by other operations than on GPUs.
    others = {None, "attention", "attention_backward"}
    found = [each for each in passes if each.operation not in others]
    more = Counter(each.operation for each in found) - most
    assert not more, [each for each in found if each.operation in more]


@pytest.mark.parametrize(
    "config, passes",
    [
        (
            replace(CONFIG, window=0),
            [
                *("send", "spread", "receive", "spread_with_seam"),
                *("send", "collect", "receive", "add_to_last_rows"),
            ],
        ),
        (
            CONFIG,
            [
                *("send", "receive", "merge_outputs"),
                *("send", "collect_merged", "receive"),
                # Keys' and values' gradients of the halo.
                *("add_to_last_rows", "add_to_last_rows", "add_seam_sums"),
            ],
        ),
    ],
    ids=["no window", "window"],
)
def test_what_crosses_a_seam_travels_beside_a_kernel(
    layout: ContextParallel, config: LighthouseConfig, passes: list[str]
) -> None:
    attention = LighthouseAttention(config, RingAttention(layout), impl="triton")
    attention.context_parallel = layout
    *leaves, grad = (torch.randn(1, HEADS, 128, D, requires_grad=True) for _ in range(4))
    with Order() as order:
        torch.autograd.grad(attention(*leaves), leaves, grad)
    watched = {*passes, "spread"}
    assert [name for name in order.names if name in watched] == [*passes, *["spread"] * 3]
    # Autograd would add the gradient of a few rows to a whole tensor of zeros.
    assert "slice_backward" not in order.names


def not_of_ring(each: Pass) -> bool:
    return not ("ring_attention.py" in each.line or "online_softmax.py" in each.line)


def test_an_exchange_takes_rows_that_lie_apart(layout: ContextParallel) -> None:
    """Compiled code gives it such rows where it keeps something between them."""
    apart = torch.randn(2, HEADS, 1, 2)[..., :1]
    (found,) = layout.send(apart)()
    assert found.shape == apart.shape


def test_an_exchange_starts_a_kernel_on_each_side(layout: ContextParallel) -> None:
    """The fewer the better: sending so little takes no longer than starting a few of them."""
    seams = torch.randn(2, HEADS, 2, D), torch.randn(2, HEADS, 2, dtype=torch.float64)
    halo = torch.randn(2, CHUNK, HEADS, D)[:, 1 - WINDOW :]
    parts = *seams, halo[:, :0], halo
    for step in (1, -1):
        with RowPasses(1) as watched:
            found = layout.send(*parts, step=step)()
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in parts]
        # The rank with the first and the last chunk gives one of them zeros.
        names = ["cat", *["zero_"] * (layout.rank == 0), "cat"]
        assert [each.name for each in watched.found] == names, watched.found
