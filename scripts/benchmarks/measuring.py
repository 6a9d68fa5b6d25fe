"""How the benchmarks measure: what they time, in which order, and on what."""

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
# About 5 ms, longer than the host takes to launch any variant.
RUNWAY_CYCLES = 10_000_000
# A variant slower than this is measured SLOW_TURNS times, others at least TURNS times.
SLOW_MS, SLOW_TURNS, TURNS = 200.0, 3, 10


def dense(q, k, v, is_causal=True, enable_gqa=False, scale=None) -> torch.Tensor:
    with sdpa_kernel(BACKENDS, set_priority=True):
        return scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, enable_gqa=enable_gqa, scale=scale
        )


def measure(variants: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict]:
    """Median and spread in ms of each variant, in random order, for about ``seconds`` in all.

    Also the memory in GiB that each needs beyond what was there before.
    """
    results, durations = {}, {name: [] for name in variants}
    for name, run in variants.items():
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        results[name] = {"GiB": (torch.cuda.max_memory_allocated() - before) / 2**30}
    start = time.perf_counter()
    order = list(variants.items())
    shuffle = random.Random(0).shuffle
    while True:
        shuffle(order)
        for name, run in order:
            if len(durations[name]) >= SLOW_TURNS and durations[name][0] > SLOW_MS:
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # As in training, the host is ahead: the device starts with all launches queued.
            torch.cuda._sleep(RUNWAY_CYCLES)
            begin.record()
            run()
            end.record()
            end.synchronize()
            durations[name].append(begin.elapsed_time(end))
        turns = max(map(len, durations.values()))
        if turns >= 50 or (turns >= TURNS and time.perf_counter() - start > seconds):
            break
    for name, times in durations.items():
        low, _, high = statistics.quantiles(times, n=4)
        results[name].update(ms=statistics.median(times), spread=(high - low) / 2, turns=len(times))
    return results


def forward_and_backward(
    function: Callable, leaves: list[torch.Tensor]
) -> tuple[Callable, Callable]:
    """Two thunks: ``function`` of the leaves without a graph, and with its backward."""
    with torch.no_grad():
        grad = torch.randn_like(function(*leaves))

    def forward():
        with torch.no_grad():
            return function(*leaves)

    def both():
        inputs = [x.detach().requires_grad_() for x in leaves]
        return torch.autograd.grad(function(*inputs), inputs, grad)

    return forward, both


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.float() - exact).norm() / exact.norm()).item()


def copy_bandwidth() -> float:
    """GB/s of a large copy on the device, read and written bytes counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = measure({"copy": lambda: target.copy_(source)}, 1.0)["copy"]["ms"]
    return 2 * source.numel() / ms / 1e6


def environment(revision: str | None) -> dict[str, object]:
    """What a record has to name to be repeated.

    Args:
        revision: git revision; by default that of this file, as git says, or None.
    """
    import triton

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    if revision is None:
        found = subprocess.run(git, text=True, capture_output=True)
        revision = found.stdout.strip() or None
    return {
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "revision": revision,
        "date": date.today().isoformat(),
    }
