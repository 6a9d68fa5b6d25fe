"""Ranks on one machine that share a sequence, and layers for them to attend in."""

import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.models.attention import ScaledDotProductAttentionWrapper


def join_ranks(rank: int, world_size: int, port: int, device: str = "cpu") -> DeviceMesh:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    # Without a timeout, ranks that wait for each other in vain would do so for half an hour.
    timeout = timedelta(seconds=120)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    return init_device_mesh(device, (world_size,))


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.count[function] += 1
        return function(*args, **(kwargs or {}))


class Layer(torch.nn.Module):
    """A dense layer, as far as context parallelism and activation checkpointing see it."""

    norms_heads = False

    def __init__(self, inner: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.inner_attention = inner or ScaledDotProductAttentionWrapper()

    def forward(self, *rows: torch.Tensor, **options: object) -> torch.Tensor:
        return self.inner_attention(*rows, **options)


def with_gradients(
    function: Callable, rows: list[torch.Tensor], grad: torch.Tensor, **options: object
) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in rows]
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]
