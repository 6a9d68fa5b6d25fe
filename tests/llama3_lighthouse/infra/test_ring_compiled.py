"""Ring attention compiled, and its bits from run to run, on CPU processes and on GPUs."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from emulated_attention import ATTENTIONS, emulate_attention_of_gpus
from launch import run_ranks
from ring_ranks import Calls, Layer, join_ranks, with_gradients
from torch.utils.checkpoint import checkpoint

from lighthouse import ContextParallel
from torchtitan.models.llama3_lighthouse.infra import ring_operations
from torchtitan.models.llama3_lighthouse.infra.activation_checkpoint import RING, contexts_that_keep
from torchtitan.models.llama3_lighthouse.infra.context_parallel import apply_context_parallel
from torchtitan.models.llama3_lighthouse.job_config import Parallelism

N = 768
LAYOUTS = (Parallelism(), Parallelism(context_parallel_load_balancer=None))


def compiled_worker(
    rank: int,
    world_size: int,
    port: int,
    kinds: list[str],
    backend: str = "inductor",
    device: str = "cpu",
) -> None:
    mesh = join_ranks(rank, world_size, port, device)
    # A pool of compiling processes takes longer to start than these few kernels to compile.
    torch._inductor.config.compile_threads = 1
    if device == "cpu":
        emulate_attention_of_gpus()
    torch.manual_seed(0)
    leaves = [torch.randn(1, N, 2, 64).transpose(1, 2) for _ in range(3)]
    leaves = [rows.to(device) for rows in leaves]
    here = ContextParallel(None, rank, world_size).take(torch.arange(N), dim=0)

    def results(function: Callable, part: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        # Queries lie in memory as a dense layer's do, keys and values as a Lighthouse layer's.
        q, k, v = (x[:, :, part].to(dtype) for x in leaves)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        inputs = [x.detach().requires_grad_() for x in (q, k.contiguous(), v.contiguous())]
        out = function(*inputs)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in inputs)]

    def block(attention: Layer, *inputs: torch.Tensor) -> torch.Tensor:
        return attention(*(x.sin() for x in inputs)).cos()

    want = results(partial(block, Layer()), torch.arange(N), torch.float32)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    attention_of = ring_operations._attention_of
    for kind in kinds:
        attention = Layer()
        apply_context_parallel(attention, mesh, Parallelism())
        pair = ATTENTIONS.get(kind)
        ring_operations._attention_of = attention_of if pair is None else lambda *_, pair=pair: pair
        compiled = torch.compile(block, fullgraph=True, backend=backend)
        for mode, run in (("eager", block), ("compiled", compiled)):
            storages = {}

            def keep(rows: torch.Tensor, storages=storages) -> torch.Tensor:
                storage = rows.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                return rows

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda rows: rows):
                found = results(partial(run, attention), here, dtype)
            # Inputs, their sines, and outputs before and after the cosine; nothing received.
            rows = leaves[0].numel() * dtype.itemsize // world_size
            assert sum(storages.values()) < 9 * rows, (kind, sum(storages.values()) / rows)
            for name, value, whole in zip(("out", "dq", "dk", "dv"), found, want, strict=True):
                error = (value - whole[:, :, here]).norm() / whole[:, :, here].norm()
                tolerance = 1e-5 if device == "cpu" else 1e-2
                assert error < tolerance, (kind, mode, name, float(error))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world_size", "kinds", "backend"),
    [
        # The same graphs as inductor's, without the half minute that its C++ takes.
        (2, ["cudnn"], "aot_eager_decomp_partition"),
        pytest.param(4, ["default", "cudnn", "kernel"], "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_ring_equals_one_device(
    world_size: int, kinds: list[str], backend: str, free_port: int
) -> None:
    run_ranks(compiled_worker, world_size, free_port, kinds, backend, processes=world_size)


@pytest.mark.gpu
def test_compiled_ring_of_gpus_equals_one_device(free_port: int) -> None:
    """The ring in bfloat16 against one device in float32."""
    world_size = torch.cuda.device_count()
    if world_size < 2:
        # The other gpu tests need only one.
        pytest.skip(f"a ring needs two or more GPUs to send between, found {world_size}")
    kinds = ["default", "cudnn", "kernel"]
    run_ranks(
        compiled_worker, world_size, free_port, kinds, "inductor", "cuda", processes=world_size
    )


class Block(torch.nn.Module):
    """A block, as far as checkpointing sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Layer()

    def forward(self, *rows: torch.Tensor) -> torch.Tensor:
        return self.attention(*(x.sin() for x in rows)).cos()


def checkpointed_worker(rank: int, world_size: int, port: int) -> None:
    """Mode "lighthouse" repeats a dense layer's sines in backward, and not its ring."""
    mesh = join_ranks(rank, world_size, port)
    block = Block()
    apply_context_parallel(block, mesh, Parallelism())
    contexts = contexts_that_keep(block, frozenset())

    def checkpointed(*rows: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, *rows, use_reentrant=False, context_fn=contexts)

    *rows, grad = torch.randn(4, 1, 2, N // world_size, 64)
    counts, results = [], []
    for run in (block, checkpointed):
        with Calls() as calls:
            results.append(with_gradients(run, rows, grad))
        counts.append(calls.count)
    assert all(map(torch.equal, *results))
    sine = torch.ops.aten.sin.default
    (ring,) = RING
    assert [count[ring] for count in counts] == [1, 1]
    assert counts[1][sine] > counts[0][sine]
    dist.destroy_process_group()


def test_checkpointing_keeps_the_ring(free_port: int) -> None:
    run_ranks(checkpointed_worker, 2, free_port, processes=2)


PLACES = 10240
RUNS = 3


def repeating_worker(rank: int, world_size: int, port: int, device: str = "cpu") -> None:
    """The same inputs give the same bits, forward and backward, at ten thousand places."""
    mesh = join_ranks(rank, world_size, port, device)
    torch.use_deterministic_algorithms(True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    places = PLACES // world_size
    torch.manual_seed(rank)
    rows = [torch.randn(1, places, heads, 64) for heads in (2, 1, 1, 2)]
    *rows, grad = (x.to(device, dtype).transpose(1, 2) for x in rows)
    for config in LAYOUTS:
        module = Layer()
        apply_context_parallel(module, mesh, config)
        first, *others = (with_gradients(module, rows, grad, enable_gqa=True) for _ in range(RUNS))
        for found in others:
            assert all(map(torch.equal, found, first))
        # Another input has to show, or the comparison would hold for anything.
        rows[1] = rows[1].clone()
        rows[1][..., -1, :] += 1
        changed = with_gradients(module, rows, grad, enable_gqa=True)
        assert not any(map(torch.equal, changed[:3], first))
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ring_repeats_bit_for_bit(world_size: int, free_port: int) -> None:
    run_ranks(repeating_worker, world_size, free_port, processes=world_size)


@pytest.mark.gpu
def test_ring_of_gpus_repeats_bit_for_bit(free_port: int) -> None:
    world_size = torch.cuda.device_count()
    if world_size < 2:
        pytest.skip(f"a ring needs two or more GPUs to send between, found {world_size}")
    run_ranks(repeating_worker, world_size, free_port, "cuda", processes=world_size)
