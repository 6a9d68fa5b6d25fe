"""The part "layer" of the context parallelism benchmark: one attention layer on W GPUs.

``context_parallel.py`` starts this file through torchrun, one process for each GPU, with the folder
for layer.json as its argument.

Shapes: B batch, H heads, N positions, D head dimension.
"""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from context_parallel_results import PROFILES
from gpu_profile import profile_of
from measuring import PAPERS, random_rows, relative_error
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from lighthouse import ContextParallel, LighthouseAttention, LighthouseConfig, select
from lighthouse.attention import lighthouse_attention
from lighthouse.implementation import choose_window_implementation, operations_by
from lighthouse.precision import SDPA_BACKENDS
from torchtitan.models.llama3_lighthouse.infra.context_parallel import apply_context_parallel
from torchtitan.models.llama3_lighthouse.infra.ring_attention import Ring
from torchtitan.models.llama3_lighthouse.job_config import Parallelism

PER_GPU = 98304
HEADS, HEAD_DIM = 8, 128
TURNS = 30
WINDOW = 512
WINDOWED = {"window": WINDOW}
# Variables of the environment that change how NCCL sends.
SETTINGS = ("NCCL_", "TORCH_NCCL_HIGH_PRIORITY")
OF_WINDOW, OF_SEAM, WITH_HALO = "the window alone", "an exchange of seam rows", " and the halo"
NOTHING_SENT, NO_EXCHANGE, AGAIN = ", nothing sent", ", no exchange", ", again"
HALO_OVER_LAYER = "the halo by itself over the layer with a window, quartiles"
ONE_GPU = ", one GPU, the whole sequence"


def time_in_turns(variants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Each variant's ms, turn by turn, on the slowest rank.

    The order is drawn anew for each turn, and is the same on all ranks.
    """
    order, shuffle = list(variants), random.Random(0).shuffle
    durations: dict[str, list[float]] = {name: [] for name in order}
    together = torch.zeros((), device="cuda")
    for turn in range(TURNS + 2):
        shuffle(order)
        for name in order:
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host gets ahead, and the GPUs then start together, whatever their clocks.
            torch.cuda._sleep(30_000_000)
            dist.all_reduce(together)
            begin.record()
            variants[name]()
            end.record()
            end.synchronize()
            if turn >= 2:
                durations[name].append(begin.elapsed_time(end))
    slowest = torch.tensor(list(durations.values()), device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return dict(zip(durations, slowest.tolist(), strict=True))


def median_of_each(durations: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in durations.items()}


def with_gradients(
    function: Callable[..., torch.Tensor], rows: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """Output of ``function`` and the gradients of its inputs ``rows``."""
    leaves = [x.detach().requires_grad_() for x in rows]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Causal attention [B, H, N, D] in float64, in blocks of queries.

    torch would hold all N x N scores at once.
    """
    outputs = []
    for start in range(0, q.shape[2], 1024):
        rows = q[:, :, start : start + 1024]
        reached = slice(0, start + rows.shape[2])
        scores = rows @ k[:, :, reached].mT / q.shape[-1] ** 0.5
        later = torch.arange(reached.stop, device=q.device) > torch.arange(
            start, reached.stop, device=q.device
        ).unsqueeze(-1)
        outputs.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ v[:, :, reached])
    return torch.cat(outputs, dim=2)


def rows_and_gradient(length: int, seed: int) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output, the same on all ranks, [1, H, N, D] each."""
    return random_rows(length, [HEADS] * 4, HEAD_DIM, seed)


def on_one_gpu(config: LighthouseConfig) -> LighthouseAttention:
    sdpa = ScaledDotProductAttentionWrapper()
    sdpa.sdpa_backends = SDPA_BACKENDS
    return LighthouseAttention(config, sdpa)


def on_all_gpus(config: LighthouseConfig, mesh: DeviceMesh) -> LighthouseAttention:
    attention = on_one_gpu(config)
    apply_context_parallel(attention, mesh, Parallelism())
    return attention


def errors(mesh: DeviceMesh, method: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Errors of output and gradients against float64, on all GPUs of ``mesh`` and on one."""
    world_size = mesh.size()
    config = LighthouseConfig(3, 4, 128 * world_size, picks_per_stratum=32, **method)
    # Attention with a window takes no sdpa, and is exact by itself in float64.
    sdpa = None if config.window else exact_dense
    *rows, grad = rows_and_gradient(8192 * world_size, 1)
    selection = select(*rows, config)
    whole = with_gradients(on_one_gpu(config), rows, grad)
    attention = on_all_gpus(config, mesh)
    layout = attention.context_parallel
    parts = with_gradients(attention, [layout.take(x, 2) for x in rows], layout.take(grad, 2))

    def in_float64(*x: torch.Tensor) -> torch.Tensor:
        return lighthouse_attention(*x, config, selection=selection, impl="torch", sdpa=sdpa)

    exact = with_gradients(in_float64, [x.double() for x in rows], grad.double())
    found = {}
    for name, part, one, want in zip(("out", "dq", "dk", "dv"), parts, whole, exact, strict=True):
        want = layout.take(want, 2)
        found[name] = relative_error(part, want), relative_error(layout.take(one, 2), want)
    return found


def through_one_gpu() -> dict[str, Any]:
    """Bits and times of one GPU with context parallelism over itself alone, and without."""
    # torch wants every rank to make every group.
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    config = LighthouseConfig(3, 4, 1536, **PAPERS)
    *rows, grad = rows_and_gradient(PER_GPU, 2)
    plain, through = on_one_gpu(config), on_one_gpu(config)
    through.context_parallel = ContextParallel(groups[dist.get_rank()], 0, 1)
    torch.use_deterministic_algorithms(True)
    pairs = zip(with_gradients(plain, rows, grad), with_gradients(through, rows, grad), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    torch.use_deterministic_algorithms(False)
    durations = time_in_turns(
        {
            "no context parallelism": lambda: with_gradients(plain, rows, grad),
            "no context parallelism, again": lambda: with_gradients(plain, rows, grad),
            "W = 1": lambda: with_gradients(through, rows, grad),
        }
    )
    return {"W = 1 gives the same bits": equal, "one GPU, ms": median_of_each(durations)}


def without_exchange(function: Callable[[], object]) -> Callable[[], object]:
    """The same attention without the exchange of seam and halo: no packing and no sending."""

    def run() -> object:
        with patch.object(ContextParallel, "send", lambda self, *rows, step=1: lambda: rows):
            return function()

    return run


def silent(function: Callable[[], object]) -> Callable[[], object]:
    """The same with nothing sent: every rank goes on with its own keys and values too."""

    def run() -> object:
        with patch.object(Ring, "pass_on", lambda self, tensors: lambda: tensors):
            return without_exchange(function)()

    return run


def parts_of_halo(
    rows: list[torch.Tensor], grad: torch.Tensor, layout: ContextParallel
) -> dict[str, Callable[[], object]]:
    """What a layer with a window does for its halo, forward and backward, and the same without.

    Args:
        rows: q, k and v of this rank, [1, H, N, D].
    """
    q, k, v, dout = map(layout.split, (*rows, grad))
    scale, impl = HEAD_DIM**-0.5, choose_window_implementation(None, q)
    forward, backward = operations_by(impl)
    settings = WINDOW, scale, impl, layout.first, len(layout.held)
    # In one piece, as they come from another rank.
    before = [x[:, :, 1 - WINDOW :].transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    # As many seam rows as levels above the base, each with its logsumexp.
    seams = [q[:, :, :2], q[:, :, :2, :1].float()]

    def attend() -> object:
        out, lse = forward(q, k, v, WINDOW, scale)
        return backward(dout, None, q, k, v, out, lse, WINDOW, scale)

    def attend_with_halo() -> object:
        out, lse = torch.ops.lighthouse.halo_window(q, k, v, *before, *settings)
        _, *into, dk, dv = torch.ops.lighthouse.halo_window_backward(
            dout, None, q, k, v, *before, out, lse, *settings
        )
        for x, part in zip(into, (dk, dv), strict=True):
            torch.ops.lighthouse.add_to_last_rows(x, part)
        return into

    def exchange(*parts: torch.Tensor) -> object:
        return [layout.send(*parts, step=step)() for step in (1, -1)]

    return {
        OF_WINDOW: attend,
        f"{OF_WINDOW}{WITH_HALO}": attend_with_halo,
        OF_SEAM: partial(exchange, *seams),
        f"{OF_SEAM}{WITH_HALO}": partial(exchange, *seams, *(x.transpose(1, 2) for x in before)),
    }


def sending(mesh: DeviceMesh) -> dict[str, Any]:
    """Times of the layer on all GPUs of ``mesh``, with and without sending, and its kernels.

    Without any loss the layer would take W times as long on one GPU that has the whole sequence.

    The time over that without exchange bounds the cost of the halo from above: the seam rows travel
    in the same collective. What the halo takes by itself is far less than two runs of a layer
    differ by, so its parts are timed alone. The layer with a window has the default settings and
    the others the paper's, so their difference is not the cost of the window.
    """
    world_size = mesh.size()
    configs = {
        name: LighthouseConfig(3, 4, 1536 * world_size, **method)
        for name, method in (("Lighthouse", PAPERS), (f"Lighthouse, window {WINDOW}", WINDOWED))
    }
    spread = {name: on_all_gpus(config, mesh) for name, config in configs.items()}
    plain = spread["Lighthouse"]
    layout = plain.context_parallel
    *whole, whole_grad = rows_and_gradient(PER_GPU * world_size, 3)
    # Joined chunks lie in memory as they are joined, and a model's rows are [1, N, H, D].
    *rows, grad = (layout.take(x.transpose(1, 2), 1).transpose(1, 2) for x in (*whole, whole_grad))

    def with_attention(attention: LighthouseAttention, enabled: bool) -> Callable[[], object]:
        def run() -> object:
            attention.enabled = enabled
            return with_gradients(attention, rows, grad)

        return run

    layers = {name: with_attention(attention, True) for name, attention in spread.items()}
    layers["dense"] = with_attention(plain, False)
    alone = {
        f"{name}{ONE_GPU}": partial(with_gradients, on_one_gpu(config), whole, whole_grad)
        for name, config in configs.items()
    }
    variants: dict[str, Callable[[], object]] = dict(alone)
    for name, layer in layers.items():
        variants |= {name: layer, f"{name}{AGAIN}": layer, f"{name}{NOTHING_SENT}": silent(layer)}
        if name != "dense":
            variants[f"{name}{NO_EXCHANGE}"] = without_exchange(layer)
    durations = time_in_turns(variants | parts_of_halo(rows, grad, layout))

    def ratios(left_out: str) -> dict[str, list[float]]:
        # Both times come from the same turn, when the GPU has the same temperature and clock.
        return {
            name: statistics.quantiles(
                a / b for a, b in zip(durations[name], durations[f"{name}{left_out}"], strict=True)
            )
            for name in layers
            if f"{name}{left_out}" in durations
        }

    def more_with_halo(part: str) -> list[float]:
        pairs = zip(durations[f"{part}{WITH_HALO}"], durations[part], strict=True)
        return [a - b for a, b in pairs]

    windowed = durations[f"Lighthouse, window {WINDOW}"]
    parts = zip(more_with_halo(OF_WINDOW), more_with_halo(OF_SEAM), windowed, strict=True)
    return {
        f"W GPUs, {PER_GPU:,} tokens each, ms": median_of_each(durations),
        HALO_OVER_LAYER: statistics.quantiles(
            (attending + sent) / layer for attending, sent, layer in parts
        ),
        "time with sending over without, quartiles": ratios(NOTHING_SENT),
        "time over that without exchange, quartiles": ratios(NO_EXCHANGE),
        "time over that of the same again, quartiles": ratios(AGAIN),
        PROFILES: {name: profile_of(function) for name, function in (layers | alone).items()},
    }


def parts_of(mesh: DeviceMesh) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, by what a log line calls it."""
    return {
        "errors": lambda: {"error: W GPUs, one GPU": errors(mesh, PAPERS)},
        "errors with a window": lambda: {
            f"error with a window of {WINDOW}: W GPUs, one GPU": errors(mesh, WINDOWED)
        },
        "one GPU": through_one_gpu,
        "sending": lambda: sending(mesh),
    }


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world_size = int(os.environ["WORLD_SIZE"])
    mesh = dist.init_device_mesh("cuda", (world_size,))
    settings = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
    record: dict[str, Any] = {"W": world_size, "settings of NCCL": settings}
    for name, part in parts_of(mesh).items():
        start = time.monotonic()
        record |= part()
        if dist.get_rank() == 0:
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    if dist.get_rank() == 0:
        Path(sys.argv[1], "layer.json").write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
