"""Tools that time functions in turns and measure errors, and the inputs that they run on.

Shapes: B batch, Hq query heads, Hkv key-value heads, H either, N positions, D head dimension.
"""

import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lighthouse import LighthouseConfig
from lighthouse.geometry import PyramidGeometry
from torchtitan.models.llama3_lighthouse.errors import UserValueError

# The paper's choices where the defaults are others; what is on record was measured with them.
PAPERS: dict[str, Any] = dict(entry_score="max", combine="sum")
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
# About 5 ms, longer than the host takes to launch any variant.
RUNWAY_CYCLES = 10_000_000
# A variant slower than SLOW_MS is measured SLOW_TURNS times, the others at least TURNS times.
SLOW_MS, SLOW_TURNS, TURNS = 200.0, 3, 10


def require_cuda() -> None:
    """End the script in one line if torch finds no CUDA device."""
    if not torch.cuda.is_available():
        sys.exit(f"{Path(sys.argv[0]).name} needs a CUDA device and found none")


def method_of(case: str, flag: str, **settings: Any) -> tuple[int, LighthouseConfig]:
    """Sequence length N and the method from "N,L,p,k", a value of ``flag``.

    Args:
        settings: further settings of the method.

    Raises:
        ValueError: ``case`` is not four numbers, or a rule of the method forbids them.
    """
    if not re.fullmatch(r"\d+(,\d+){3}", case):
        raise UserValueError(f"{flag} {case}: not N,L,p,k; use four numbers such as 98304,3,4,1536")
    n, *method = map(int, case.split(","))
    try:
        config = LighthouseConfig(*method, **settings)
        PyramidGeometry(config, n)
    except ValueError as error:
        raise UserValueError(f"{flag} {case}: {error}") from None
    return n, config


def random_rows(length: int, heads: Sequence[int], d: int, seed: int = 0) -> list[torch.Tensor]:
    """Random bf16 tensors [1, H, N, D], one for each number of heads.

    They are views of [1, N, H, D], as a model hands over q, k and v.
    """
    torch.manual_seed(seed)
    return [
        torch.randn(1, length, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in heads
    ]


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    is_causal: bool = True,
    enable_gqa: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Dense attention [B, Hq, N, D] by cuDNN, or by flash attention where cuDNN has no kernel."""
    with sdpa_kernel(BACKENDS, set_priority=True):
        return scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, enable_gqa=enable_gqa, scale=scale
        )


def measure(
    variants: dict[str, Callable[[], object]], seconds: float
) -> dict[str, dict[str, float]]:
    """Time every variant in random order, for about ``seconds`` in all.

    Returns:
        For each name: "ms", the median; "spread", half the distance between the quartiles in ms;
        "turns"; and "GiB", the memory that the variant needs beyond what was in use before.
    """
    results = {name: {"GiB": peak_memory(run)} for name, run in variants.items()}
    durations: dict[str, list[float]] = {name: [] for name in variants}
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


def peak_memory(run: Callable[[], object]) -> float:
    """GiB that the second call of ``run`` needs beyond what was in use before it."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def forward_and_backward(
    function: Callable[..., torch.Tensor], leaves: list[torch.Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two functions without arguments.

    The first runs ``function`` on the leaves without a graph, the second with its backward.
    """
    with torch.no_grad():
        grad = torch.randn_like(function(*leaves))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(*leaves)

    def both() -> tuple[torch.Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in leaves]
        return torch.autograd.grad(function(*inputs), inputs, grad)

    return forward, both


def sequence_first(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``function`` of tensors [B, H, N, D] as one of tensors [B, N, H, D], to compile.

    A model's graph holds these transposes too. A graph with a transposed output would first copy
    the output's gradient, as torch takes that to be laid out in order of its dimensions.
    """

    def transposed(*tensors: torch.Tensor) -> torch.Tensor:
        return function(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)

    return transposed


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``exact``."""
    return ((value.float() - exact).norm() / exact.norm()).item()


def copy_bandwidth() -> float:
    """GB/s of a large copy on the device; bytes read and bytes written both count."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = measure({"copy": lambda: target.copy_(source)}, 1.0)["copy"]["ms"]
    return 2 * source.numel() / ms / 1e6
