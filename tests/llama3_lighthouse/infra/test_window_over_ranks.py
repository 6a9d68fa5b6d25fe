"""Windows under context parallelism, compiled and checkpointed, and what layers send."""

import itertools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from document_cases import random_layout
from emulated_attention import ATTENTIONS, emulate_attention_of_gpus
from launch import run_ranks
from ring_ranks import Calls
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from lighthouse import ContextParallel, LighthouseConfig
from torchtitan.models.llama3_lighthouse.infra import ring_operations
from torchtitan.models.llama3_lighthouse.infra.activation_checkpoint import (
    EXCHANGE,
    RING,
    SELECTION,
    WINDOW,
)
from torchtitan.models.llama3_lighthouse.infra.context_parallel import (
    apply_context_parallel,
    bytes_sent_per_layer,
    layout_of,
)
from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager, Parallelism
from torchtitan.models.llama3_lighthouse.model.flavors import flavors
from torchtitan.models.llama3_lighthouse.model.model import LighthouseModelArgs

# Twelve strata, which the chunks of two and of three ranks divide.
N = 384
METHOD = LighthouseConfig(3, 2, 48, picks_per_stratum=4, combine="finest", window=24)
# For Triton's interpreter and the compiler, which are slow. Four strata, for chunks of two ranks.
SMALL_N = 48
SMALL_METHOD = replace(METHOD, top_k=8, picks_per_stratum=2, window=9)
SMALL = LighthouseModelArgs(lighthouse=SMALL_METHOD)
SMALL_WITHOUT = LighthouseModelArgs(lighthouse=replace(SMALL_METHOD, combine="sum", window=0))
TWO_LEVELS = LighthouseModelArgs(lighthouse=replace(SMALL_METHOD, levels=2))
BESIDE, ALONE = LighthouseModelArgs(lighthouse=METHOD), LighthouseModelArgs(window=24)


def check_operations_of_gpus(mesh: DeviceMesh) -> None:
    """cuDNN gets the arguments that it takes, and with the kernel gives what the CPU's does."""
    emulate_attention_of_gpus()
    forward, backward = ring_operations.operations_of(layout_of(mesh, Parallelism()))
    q, k, v, dout = torch.randn(4, 1, 4, 32, 16)
    k, v = k[:, :2], v[:, :2]
    dlse = torch.randn(1, 4, 32)
    found = []
    for pair in (ring_operations._attention_of(q, k, v), *ATTENTIONS.values()):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(ring_operations, "_attention_of", lambda *rows, pair=pair: pair)
            results = forward(q, k, v, 0.3)
            found.append([*results, *backward(dout, dlse, q, k, v, *results, 0.3)])
    for value, want in itertools.chain(*(zip(each, found[0], strict=True) for each in found[1:])):
        torch.testing.assert_close(value, want)


def worker(rank: int, world_size: int, port: int, device: str = "cpu") -> None:
    """A block with a window, compiled, and with what checkpointing keeps of it."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # Without a timeout, ranks that wait for each other in vain would do so for half an hour.
    timeout = timedelta(seconds=120)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    mesh = init_device_mesh(device, (world_size,))
    torch.manual_seed(0)
    leaves = [torch.randn(1, N, 2, 64).to(device).transpose(1, 2) for _ in range(3)]
    dtype, tolerance = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-5)
    leaves = [x.to(dtype) for x in leaves]
    policy = [*RING, *WINDOW, *SELECTION, *EXCHANGE]
    contexts = partial(create_selective_checkpoint_contexts, policy)
    layouts = (Parallelism(), Parallelism(context_parallel_load_balancer=None))
    cases = list(itertools.product((BESIDE, ALONE), layouts, [None], [N], [False]))
    # With documents, within which kernels attend on GPUs.
    cases.append((BESIDE, layouts[0], None, N, True))
    if device == "cuda":
        cases.append((ALONE, layouts[1], None, N, True))
    if device == "cpu":
        check_operations_of_gpus(mesh)
    is_quick = device == "cpu" and world_size == 2
    if is_quick:
        # By kernels, which are the default on GPUs.
        cases.append((SMALL, layouts[1], "triton", SMALL_N, False))
        cases.append((SMALL_WITHOUT, layouts[0], "triton", SMALL_N, False))
        cases.append((TWO_LEVELS, layouts[0], None, SMALL_N, True))
    for args, config, impl, n, masked in cases:
        # The compiler takes seconds for each. In the quick test small ones stand for the others.
        is_compiled = not is_quick or args is not BESIDE
        options = {}
        if masked:
            documents = random_layout(1, n, 4, torch.Generator().manual_seed(1)).to(device)
            options = {"documents": documents}
        plain, ring = (
            args.stage_one_attention(ScaledDotProductAttentionWrapper()) for _ in range(2)
        )
        plain.impl = ring.impl = impl
        apply_context_parallel(ring, mesh, config)
        # All cases compile one function, more often than Dynamo allows.
        torch.compiler.reset()

        def block(
            attention: torch.nn.Module, *inputs: torch.Tensor, options: dict = options
        ) -> torch.Tensor:
            return attention(*(x.sin() for x in inputs), **options).cos()

        def checkpointed(*inputs: torch.Tensor, block=block) -> torch.Tensor:
            return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

        def results(function: Callable, attention: torch.nn.Module, part: torch.Tensor) -> list:
            inputs = [x[:, :, part].detach().requires_grad_() for x in leaves]
            out = function(attention, *inputs)
            out.square().sum().backward()
            return [out.detach(), *(x.grad for x in inputs)]

        here = ring.context_parallel.take(torch.arange(n), dim=0)
        want = results(block, plain, torch.arange(n))
        compiled = torch.compile(
            block, fullgraph=True, backend="aot_eager_decomp_partition", dynamic=False
        )
        calls = Calls()
        runs = {"eager": block, "checkpointed": checkpointed}
        if is_compiled:
            runs["compiled"] = compiled
        for mode, run in runs.items():
            with Calls() if run is checkpointed else nullcontext() as watched:
                found = results(run, ring, here)
            calls = watched or calls
            for name, value, whole in zip(("out", "dq", "dk", "dv"), found, want, strict=True):
                whole = whole[:, :, here]
                error = float((value - whole).norm() / whole.norm())
                case = mode, name, args.window, config, impl, masked
                assert error < tolerance, (error, case)
        if is_compiled:
            # Validation and inference take no gradients.
            with torch.no_grad():
                found = compiled(ring, *(x[:, :, here] for x in leaves))
            whole = want[0][:, :, here]
            assert (found - whole).norm() < tolerance * whole.norm(), (args, config, impl)
        # Backward repeats neither attention nor the exchange.
        assert sum(calls.count[each] for each in EXCHANGE) == 2
        assert sum(calls.count[each] for each in RING) == (1 if args.selects else 0)
        assert sum(calls.count[each] for each in WINDOW) == (0 if args is SMALL_WITHOUT else 1)
    dist.destroy_process_group()


@pytest.mark.gpu
def test_windows_on_gpus_equal_one_device(free_port: int) -> None:
    world_size = min(3, torch.cuda.device_count())
    if world_size < 2:
        # The other gpu tests need only one.
        pytest.skip(f"context parallelism needs two or more GPUs, found {world_size}")
    run_ranks(worker, world_size, free_port, "cuda", processes=world_size)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_compiled_and_checkpointed_windows_equal_one_device(
    world_size: int, free_port: int
) -> None:
    run_ranks(worker, world_size, free_port, processes=world_size)


def test_bytes_at_a_million_tokens() -> None:
    """The numbers are those of docs/guides/parallelism.md."""
    args = flavors["530M"]
    config_file = "train_configs/paper_530m_1m_cp8.toml"
    args.update_from_config(
        LighthouseConfigManager().parse_args(["--job.config_file", config_file])
    )
    sent = bytes_sent_per_layer(args, 2**20, ContextParallel(None, 1, 8), torch.bfloat16)
    # 8,192 places on a rank, with a key and a value of 1,024 numbers each. Each makes 7 hops in
    # bfloat16 forward, 7 backward, and 7 as a float32 gradient.
    assert sent["ring"] == 8192 * 2048 * 7 * (2 + 2 + 4)
    assert sent["halo"] == 0
    # 3 rows of 1,024 numbers after each of 2 chunks, forward and backward, in bfloat16.
    assert sent["seam"] == 3 * 1024 * 2 * 2 * 2
    # 511 keys and values of 1,024 numbers each, and 3 float32 logsumexps of 8 heads.
    args.lighthouse = replace(args.lighthouse, combine="finest", window=512)
    beside = bytes_sent_per_layer(args, 2**20, ContextParallel(None, 1, 8), torch.bfloat16)
    assert beside["halo"] == 511 * 2048 * 2 * 2 * 2 == 8_372_224
    assert beside["seam"] == sent["seam"] + 3 * 8 * 4 * 2 * 2
