"""Ring attention on CPU processes: its result, and the bytes that it sends."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from lighthouse import ContextParallel, LighthouseAttention, LighthouseConfig
from torchtitan.models.llama3_lighthouse import flavors
from torchtitan.models.llama3_lighthouse.infra.context_parallel import (
    apply_context_parallel,
    bytes_sent_per_layer,
)
from torchtitan.models.llama3_lighthouse.job_config import LighthouseConfigManager, Parallelism
from torchtitan.models.llama3_lighthouse.model import LighthouseModelArgs

ARGS = LighthouseModelArgs(
    dim=128, n_heads=4, n_kv_heads=4, lighthouse=LighthouseConfig(3, 2, 64, picks_per_stratum=8)
)
N = 512


class SentBytes(TorchDispatchMode):
    """Bytes handed to all-to-all, which the ring and the seam exchange send with."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            # Look inside: at the collectives that it runs on local tensors.
            return NotImplemented
        if "all_to_all_single" in str(function):
            self.sent.append(args[0].numel() * args[0].element_size())
        return function(*args, **(kwargs or {}))


def worker(rank: int, world_size: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    plain = LighthouseAttention(ARGS.lighthouse, ScaledDotProductAttentionWrapper())
    ring = LighthouseAttention(ARGS.lighthouse, ScaledDotProductAttentionWrapper())
    apply_context_parallel([ring], mesh, Parallelism())

    torch.manual_seed(0)
    leaves = [torch.randn(1, N, 4, 32).transpose(1, 2) for _ in range(3)]
    chunks = torch.arange(N).view(ring.context_parallel.chunks, -1)
    here = chunks[list(ring.context_parallel.held)].flatten()
    results = []
    for module, part in ((plain, torch.arange(N)), (ring, here)):
        inputs = [x[:, :, part].detach().requires_grad_() for x in leaves]
        counter = SentBytes()
        with counter:
            out = module(*inputs)
            out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for value, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(value, want[:, :, here], rtol=1e-5, atol=1e-6)

    expected = bytes_sent_per_layer(ARGS, N, ring.context_parallel, 4)
    rows = ARGS.n_heads * (ARGS.lighthouse.levels - 1) * 32 * 4
    # The last chunk of all has no next one.
    last = rows * 2 if chunks.shape[0] - 1 in ring.context_parallel.held else 0
    assert sum(counter.sent) == expected["ring"] + expected["seam"] - last
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ring_equals_one_device_and_sends_what_is_said(world_size: int, free_port: int) -> None:
    torch.multiprocessing.spawn(worker, (world_size, free_port), nprocs=world_size)


def test_bytes_at_a_million_tokens(config_file="train_configs/paper_530m_1m_cp8.toml") -> None:
    """As docs/parallelism.md states them."""
    args = flavors["530M"]
    args.update_from_config(
        LighthouseConfigManager().parse_args(["--job.config_file", config_file])
    )
    sent = bytes_sent_per_layer(args, 2**20, ContextParallel(None, 1, 8), element_size=2)
    # 8,192 places a rank, keys and values of 1,024 numbers each: 7 hops of bfloat16 forward and
    # backward, 8 of float32 gradients.
    assert sent["ring"] == 8192 * 2048 * (2 * 7 * 2 + 8 * 4)
    # 3 rows of 1,024 numbers after each of 2 chunks, there and back.
    assert sent["seam"] == 3 * 1024 * 2 * 2 * 2
