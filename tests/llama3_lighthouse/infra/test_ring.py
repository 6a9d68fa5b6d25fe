"""Ring attention on CPU processes: its result, and the bytes that it sends and holds."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from emulated_attention import ATTENTIONS, emulate_attention_of_gpus
from launch import run_ranks
from ring_ranks import Layer, join_ranks, with_gradients
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from lighthouse import LighthouseConfig, WindowAttention
from lighthouse.cpu_flash import cpu_backward, cpu_forward
from lighthouse.cudnn import takes_cudnn
from torchtitan.models.llama3_lighthouse.infra import ring_operations
from torchtitan.models.llama3_lighthouse.infra.context_parallel import (
    apply_context_parallel,
    bytes_sent_per_layer,
    held_batch,
    layout_of,
)
from torchtitan.models.llama3_lighthouse.infra.ring_attention import (
    Ring,
    ring_backward,
    ring_forward,
)
from torchtitan.models.llama3_lighthouse.job_config import Parallelism
from torchtitan.models.llama3_lighthouse.model.model import LighthouseModelArgs

LIGHTHOUSE = LighthouseConfig(3, 2, 96, picks_per_stratum=4)
BATCH, N, HEADS, HEAD_DIM = 2, 768, 4, 32
WINDOW = 24
BESIDE = replace(LIGHTHOUSE, entry_score="first", combine="finest", window=WINDOW)
WITHOUT_WINDOW = LighthouseModelArgs(lighthouse=LIGHTHOUSE)
CONTIGUOUS = Parallelism(context_parallel_load_balancer=None)
# Heads of keys and values, their dtype, and the layout.
VARIANTS = [
    (4, torch.float32, Parallelism()),
    (2, torch.float32, CONTIGUOUS),
    (1, torch.float32, CONTIGUOUS),
    (4, torch.float64, Parallelism()),
    (2, torch.bfloat16, Parallelism()),
]
# The same with a window beside the selection, and with a window alone.
WITH_WINDOW = [
    (4, torch.float32, Parallelism()),
    (2, torch.float32, CONTIGUOUS),
    (1, torch.float64, Parallelism()),
    (2, torch.bfloat16, Parallelism()),
]


def count_sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the bytes of every collective from now on: the ring's and the exchange's."""
    sent, all_to_all = [], dist.all_to_all_single

    def counting(into: torch.Tensor, rows: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(rows.nbytes)
        return all_to_all(into, rows, *arguments, **options)

    monkeypatch.setattr(dist, "all_to_all_single", counting)
    return sent


class HeldBytes(TorchDispatchMode):
    """The most bytes held at any time, the memory of ``inputs`` not counted."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.inputs = {rows.untyped_storage()._cdata for rows in inputs}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        results = function(*args, **(kwargs or {}))
        for rows in tree_leaves((args, results)):
            if isinstance(rows, torch.Tensor):
                storage = rows.untyped_storage()
                if storage._cdata not in self.inputs:
                    self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.held.values()))
        return results


DENSE = list(
    itertools.product(
        (lambda: Layer(), lambda: switched_off()),
        (torch.float32, torch.float64),
        (Parallelism(), CONTIGUOUS),
    )
)


# Largest difference of an element from one device. In float32 one device itself is up to 8e-6 from
# float64, and how far the ring is from it depends on the processor.
ELEMENTS_AGREE = {torch.float32: 4e-6, torch.float64: 1e-12}
# Query heads and key-value heads. Backward computes the latter in two parts, if there are two.
ODD_HEADS = [(1, 1), (3, 1), (3, 3), (6, 3)]


def worker(rank: int, world_size: int, port: int) -> None:
    mesh = join_ranks(rank, world_size, port)
    for key_heads, dtype, config in VARIANTS:
        check_layer(mesh, key_heads, dtype, config)
        check_held_batch(mesh, config)
    for variant in WITH_WINDOW:
        check_layer(mesh, *variant, LighthouseModelArgs(lighthouse=BESIDE))
        check_layer(mesh, *variant, LighthouseModelArgs(window=WINDOW))
    for make, dtype, config in DENSE:
        check_dense_attention(mesh, make, dtype, config)
    for heads, config in itertools.product(ODD_HEADS, (Parallelism(), CONTIGUOUS)):
        check_dense_attention(mesh, Layer, torch.float64, config, heads=heads, n=96)
    check_attention_of_gpus(mesh)
    check_refusals(mesh)
    if world_size == 2:
        check_memory(mesh)
    dist.destroy_process_group()


def check_layer(
    mesh: DeviceMesh,
    key_heads: int,
    dtype: torch.dtype,
    config: Parallelism,
    args: LighthouseModelArgs = WITHOUT_WINDOW,
) -> None:
    args = replace(args, dim=HEADS * HEAD_DIM, n_heads=HEADS, n_kv_heads=key_heads)
    plain = args.stage_one_attention(ScaledDotProductAttentionWrapper())
    ring = args.stage_one_attention(ScaledDotProductAttentionWrapper())
    apply_context_parallel(ring, mesh, config)
    layout = ring.context_parallel

    torch.manual_seed(0)
    heads = (HEADS, key_heads, key_heads)
    leaves = [torch.randn(BATCH, N, count, HEAD_DIM).to(dtype).transpose(1, 2) for count in heads]
    here = layout.take(torch.arange(N), dim=0)
    results = []
    for module, part in ((plain, torch.arange(N)), (ring, here)):
        inputs = [x[:, :, part].detach().requires_grad_() for x in leaves]
        with pytest.MonkeyPatch.context() as monkeypatch:
            sent = count_sent(monkeypatch)
            out = module(*inputs, enable_gqa=key_heads < HEADS)
            out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for value, want in zip(*reversed(results), strict=True):
        want = want[:, :, here]
        if dtype in ELEMENTS_AGREE:
            # A small element is a sum of large terms, and rounds like the largest of its row.
            bound = ELEMENTS_AGREE[dtype] * (1 + want.abs().amax(-1, keepdim=True))
            assert ((value - want).abs() <= bound).all()
        error = (value.double() - want).norm() / want.double().norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6), (dtype, error)

    expected = bytes_sent_per_layer(args, N, layout, dtype)
    # The sequence's last chunk sends no rows forward, and its first chunk no gradients back.
    ends = (0 in here) + (N - 1 in here)
    crossing = expected["seam"] + expected["halo"]
    crossing = crossing * (2 * len(layout.held) - ends) // (2 * len(layout.held))
    assert sum(sent) == BATCH * (expected["ring"] + crossing)


def check_held_batch(mesh: DeviceMesh, config: Parallelism) -> None:
    """The batch is cut as torchtitan cuts it."""
    torch.manual_seed(0)
    inputs, labels = torch.randint(1000, (2, BATCH, N))
    *want, options = prepare_context_parallel_input(
        inputs, labels, {}, mesh, torch.device("cpu"), config.context_parallel_load_balancer
    )
    *found, more = held_batch(inputs, labels, {}, mesh, config)
    for rows, expected in zip(
        (*found, more["positions"]), (*want, options["positions"]), strict=True
    ):
        assert torch.equal(rows, expected)


def switched_off() -> WindowAttention:
    """A window in the dense stage."""
    module = WindowAttention(4, ScaledDotProductAttentionWrapper())
    module.enabled = False
    return module


def check_dense_attention(
    mesh: DeviceMesh, make: Callable[[], torch.nn.Module], dtype: torch.dtype, config: Parallelism,
    width: int = HEAD_DIM, n: int = N, heads: tuple[int, int] = (4, 2),
) -> None:  # fmt: skip
    """The dense attention of a layer is that of all ranks, gradients included."""
    module = make()
    apply_context_parallel(module, mesh, config)
    assert not any(isinstance(x, ScaledDotProductAttentionWrapper) for x in module.modules())
    torch.manual_seed(0)
    query_heads, key_heads = heads
    counts = query_heads, key_heads, key_heads, query_heads
    *rows, grad = (torch.randn(BATCH, count, n, width, dtype=dtype) for count in counts)
    here = layout_of(mesh, config).take(torch.arange(n), dim=0)
    options = {"enable_gqa": True, "is_causal": True, "scale": 0.3}
    attend = torch.nn.functional.scaled_dot_product_attention
    wanted = with_gradients(attend, rows, grad, **options)
    local = [x[:, :, here] for x in rows]
    found = with_gradients(module, local, grad[:, :, here], **options)
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    for value, want in zip(found, wanted, strict=True):
        want = want[:, :, here]
        assert value.dtype == dtype
        assert (value - want).norm() < bound * want.norm()
        # In float64 every row by itself, because the norm of the whole would hide a few wrong ones.
        errors = (value - want).norm(dim=-1)
        assert dtype == torch.float32 or (errors <= bound * (1 + want.norm(dim=-1))).all()


def check_attention_of_gpus(mesh: DeviceMesh) -> None:
    """cuDNN gets the arguments of torch's operations, and the kernel computes any width."""
    emulate_attention_of_gpus()
    # Triton's interpreter is slow.
    sizes = {"cudnn": (HEAD_DIM, N), "kernel": (20, 96)}
    for kind, operations in ATTENTIONS.items():
        with patch.object(ring_operations, "_attention_of", lambda *_, pair=operations: pair):
            check_dense_attention(mesh, Layer, torch.float32, Parallelism(), *sizes[kind])


def check_refusals(mesh: DeviceMesh) -> None:
    with pytest.raises(TypeError, match="got Identity; make it an InnerAttention"):
        apply_context_parallel(Layer(torch.nn.Identity()), mesh, Parallelism())
    module = Layer()
    apply_context_parallel(module, mesh, Parallelism())
    rows = [torch.zeros(BATCH, heads, N // mesh.size(), HEAD_DIM) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match="pass is_causal = True"):
        module(*rows, enable_gqa=True, is_causal=False)
    with pytest.raises(ValueError, match="q has 4 heads and k 2; pass enable_gqa = True"):
        module(*rows)


def check_memory(mesh: DeviceMesh) -> None:
    """Peak memory, in units of one rank's keys; with a million tokens a rank, a unit is 2 GiB."""
    ring = Ring(mesh.get_group(), balanced=True)
    rows = [torch.randn(1, N, HEADS, 64).bfloat16().transpose(1, 2) for _ in range(4)]
    query, key, value, grad = rows
    forward = partial(cpu_forward, scale=0.125)
    backward = partial(cpu_backward, scale=0.125)
    with HeldBytes(rows) as held:
        out, logsumexp = ring_forward(forward, ring, query, key, value)
    # Received keys and values, and two outputs, one of which is in float32 as well.
    assert held.peak < 6.5 * key.nbytes, held.peak / key.nbytes
    rows += [out, logsumexp]
    with HeldBytes(rows) as held:
        ring_backward(backward, ring, grad, query, key, value, out, logsumexp)
    # Half of the gradients computed at home; received keys and values; the queries' gradients for
    # those; and gradients of keys and values, both those that leave and those that arrive.
    assert held.peak < 9 * key.nbytes, held.peak / key.nbytes


@pytest.mark.parametrize(
    "world_size", [1, 2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 4))]
)
def test_ring_equals_one_device_and_sends_what_is_said(world_size: int, free_port: int) -> None:
    run_ranks(worker, world_size, free_port, processes=world_size)


class RecordingRing(Ring):
    """A rank by itself that notes when transfers begin and when they are waited for.

    It receives what it sends.
    """

    def __init__(self, rank: int, size: int, balanced: bool) -> None:
        self.rank, self.size, self.balanced = rank, size, balanced
        self.attended = 0
        # For each transfer, how often attention ran before it began and before it was waited for.
        self.transfers: list[list[int]] = []

    def pass_on(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        transfer = [self.attended]
        self.transfers.append(transfer)

        def wait() -> list[torch.Tensor]:
            transfer.append(self.attended)
            return [x.clone() for x in tensors]

        return wait

    def attend(self, attention: Callable, *rows: torch.Tensor, **options: Any) -> tuple:
        self.attended += 1
        return attention(*rows, scale=1.0, **options)


@pytest.mark.parametrize("key_heads", [1, 2, 3])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_attention_runs_beside_the_transfers(
    world_size: int, balanced: bool, key_heads: int
) -> None:
    """The last gradients too travel while a rank attends, unless its work is of one head."""
    for rank in range(world_size):
        rows = [torch.randn(1, key_heads, 8, 4) for _ in range(4)]
        *inputs, grad = rows
        forward, backward = (RecordingRing(rank, world_size, balanced) for _ in range(2))
        results = ring_forward(partial(forward.attend, cpu_forward), forward, *inputs)
        ring_backward(partial(backward.attend, cpu_backward), backward, grad, *inputs, *results)
        assert len(forward.transfers) == world_size - 1
        assert len(backward.transfers) == 2 * (world_size - 1)
        beside = [end - begin for begin, end in forward.transfers + backward.transfers]
        assert beside.pop() == (1 if key_heads > 1 else 0)
        # Contiguous, a rank has nothing to attend to in the chunks of later ranks.
        assert all(beside) or not balanced
        parts = world_size if balanced else rank + 1
        assert forward.attended == parts and backward.attended == parts + (key_heads > 1)


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_attention_is_chosen_as_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward runs without gradients, and must not take a kernel that has no backward."""
    rows = [torch.zeros(1, heads, 8, 16).as_subclass(OnCuda) for heads in (4, 2, 2)]
    asked, answers = [], {"cudnn": True}

    def answer(kind: str, parameters: torch.backends.cuda.SDPAParams) -> bool:
        asked.append(kind)
        assert parameters.is_causal and parameters.enable_gqa
        assert parameters.query.requires_grad and torch.is_grad_enabled()
        return answers[kind]

    for kind in answers:
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{kind}_attention", partial(answer, kind))
    with torch.no_grad():
        assert ring_operations._attention_of(*rows) == ATTENTIONS["cudnn"]
        answers["cudnn"] = False
        assert not takes_cudnn(*rows)
        assert ring_operations._attention_of(*rows) == ATTENTIONS["kernel"]
        with pytest.raises(NotImplementedError, match="kernels, which compute bfloat16, .*float64"):
            ring_operations._attention_of(*(x.double() for x in rows))
        monkeypatch.setattr(ring_operations, "kernels", None)
        with pytest.raises(NotImplementedError, match="pip install triton"):
            ring_operations._attention_of(*rows)
        assert asked == ["cudnn"] * 5
    assert not rows[0].requires_grad


def test_graphs_of_operations_with_other_arguments_are_compiled_again() -> None:
    """The compiler's cache outlives an update of the package."""
    for operation in (
        torch.ops.lighthouse_ring.attention,
        torch.ops.lighthouse_ring.attention_backward,
    ):
        arguments = str(operation.default._schema).removeprefix("lighthouse_ring::")
        assert arguments in torch.compiler.config.cache_key_tag


@pytest.mark.parametrize(
    "shape, dtype, message",
    [((8, 16), torch.float64, "compute bfloat16, .*float64"), ((8, 264), torch.float16, "256")],
)
def test_what_the_kernels_do_not_compute_is_refused_with_documents(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype, message: str
) -> None:
    """At the first hop vectorised PyTorch would run, and fail to take its place at the second."""
    monkeypatch.setattr(ring_operations, "Ring", lambda *_: None)
    monkeypatch.setattr(ring_operations, "GROUPS", {"any": None})
    q = torch.zeros(1, 2, *shape, dtype=dtype).as_subclass(OnCuda)
    documents, settings = torch.zeros(1, 16, dtype=torch.int32), (1.0, "any", True)
    for operation, rows in (
        (ring_operations._run_forward, (q, q, q)),
        (ring_operations._run_backward, (q, q, q, q, q, q[..., 0])),
    ):
        with pytest.raises(
            NotImplementedError, match=f"knows no documents, and kernels.*{message}"
        ):
            operation(*rows, *settings, documents)
