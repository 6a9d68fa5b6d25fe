#!/usr/bin/env python3
"""Time the kernels that can attend over a causal window, forward and with backward.

    python scripts/benchmarks/windows.py --cases 98304,8,128,256 32768,6,64,256

A case is N,H,D,W: positions, heads, head dimension and window. The kernels are that of
Lighthouse and, where it is installed, FlashAttention 4, both as ``window_attention`` runs them, and
FlexAttention. Before a case is timed, the errors of each against float32 are taken, and whether its
gradients repeat their bits. Kernels then take turns in random order, as in attention.py.

The floor is the larger of two times: FLOPs, of which backward has 2.5 times as many as forward, at
FLOPS; and the bytes of q, k, v, the output and their gradients, each once, at the bandwidth of a
copy.

Prints a table, and writes it and a JSON record to the output folder.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from arguments import add_seconds, benchmark_parser, run_benchmark
from measuring import (
    copy_bandwidth,
    forward_and_backward,
    measure,
    random_rows,
    relative_error,
    require_cuda,
)
from reporting import origin, table_head, table_row, with_spread, write_report
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lighthouse import kernels, window_attention
from lighthouse.window import window_pairs
from torchtitan.models.llama3_lighthouse.environment import environment
from torchtitan.models.llama3_lighthouse.errors import UserValueError

Attention = Callable[..., torch.Tensor]
# The rate that dense kernels for bf16 reach on Hopper.
FLOPS = 600e12
# Largest error relative to float32: the distance of neighbours in bf16.
LARGEST_ERROR = 2**-7
CASES = ["98304,8,128,256", "98304,8,128,512", "98304,8,128,1024", "32768,6,64,256"]


def numbers_of(case: str) -> tuple[int, int, int, int]:
    """N, H, D and W.

    Raises:
        ValueError: ``case`` is not four numbers from 1 on.
    """
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", case):
        raise UserValueError(
            f"--cases {case}: not N,H,D,W; use four numbers such as 98304,8,128,256"
        )
    n, heads, d, window = map(int, case.split(","))
    return n, heads, d, window


def flex(n: int, window: int) -> Attention:
    """FlexAttention over a window, compiled; its kernel exists only in compiled code."""

    def sees(
        _batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (key <= query) & (query - key < window)

    # Compiled, it does not hold the whole N x N mask.
    create = torch.compile(create_block_mask, dynamic=False)
    mask = create(sees, None, None, n, n, device="cuda")
    return torch.compile(partial(flex_attention, block_mask=mask), fullgraph=True, dynamic=False)


def variants(rows: list[torch.Tensor], window: int) -> dict[str, Attention]:
    """The kernels, by name."""
    found = {"kernel": partial(window_attention, window=window, impl="triton")}
    if not kernels.obstacle_to_flash4(rows[0]) and kernels.flash4_is_installed():
        found["FlashAttention 4"] = partial(window_attention, window=window, impl="flash4")
    found["FlexAttention"] = flex(rows[0].shape[2], window)
    return found


def gradients(attend: Attention, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v, for one gradient of the output."""
    inputs = [x.detach().requires_grad_() for x in rows]
    out = attend(*inputs)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, device=out.device).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def floor(n: int, heads: int, d: int, window: int, bandwidth: float) -> dict[str, float]:
    """Milliseconds forward and with backward; ``bandwidth`` in GB/s."""
    flops = 4 * d * heads * window_pairs(n, window) / FLOPS
    bytes_of_one = 2 * n * heads * d / (bandwidth * 1e9)
    # Backward reads q, k, v, the output and its gradient, and writes three gradients.
    return {
        "forward": 1e3 * max(flops, 4 * bytes_of_one),
        "both": 1e3 * max(3.5 * flops, 12 * bytes_of_one),
    }


def benchmark(case: str, seconds: float, bandwidth: float) -> dict[str, Any]:
    """The record of one case.

    Raises:
        SystemExit: an error exceeds ``LARGEST_ERROR``.
    """
    n, heads, d, window = numbers_of(case)
    rows = random_rows(n, (heads,) * 3, d)
    exact = gradients(
        partial(window_attention, window=window, impl="torch"), [x.float() for x in rows]
    )
    timed, errors, repeats = {}, {}, {}
    for name, attend in variants(rows, window).items():
        first, again = (gradients(attend, rows) for _ in range(2))
        errors[name] = [relative_error(x, y) for x, y in zip(first, exact, strict=True)]
        if not max(errors[name]) <= LARGEST_ERROR:
            raise SystemExit(f"wrong result: errors of {name} in case {case} are {errors[name]}")
        repeats[name] = all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        timed[f"{name}, forward"], timed[f"{name}, both"] = forward_and_backward(attend, rows)
    del exact, first, again
    return {
        "case": case,
        "error": errors,
        "bits repeat": repeats,
        "floor": floor(n, heads, d, window, bandwidth),
        "results": measure(timed, seconds),
    }


def table(run: dict[str, Any]) -> str:
    """The run as Markdown."""
    lines = [
        f"{origin(run)}. bf16, B = 1; copy {run['copy GB/s']:.0f} GB/s, floor at "
        f"{FLOPS / 1e12:.0f} TFLOP/s. ms, median ± spread, and in brackets over the floor.",
        "",
        *table_head(["N, H, D, W", "kernel", "forward", "and backward", "GiB", "bits repeat"]),
    ]
    for record in run["records"]:
        for name, repeat in record["bits repeat"].items():
            times = {mode: record["results"][f"{name}, {mode}"] for mode in ("forward", "both")}
            cells = [
                f"{with_spread(time['ms'], time['spread'], '.3g')} "
                f"({time['ms'] / record['floor'][mode]:.1f}x)"
                for mode, time in times.items()
            ]
            memory = f"{times['both']['GiB']:.2f}"
            lines.append(
                table_row([record["case"], name, *cells, memory, "yes" if repeat else "no"])
            )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "windows")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="N,H,D,W",
                        help=f"default: {' '.join(CASES)}")  # fmt: skip
    add_seconds(parser, 3.0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    require_cuda()
    for case in options.cases:
        numbers_of(case)
    run = environment(options.revision) | {"copy GB/s": copy_bandwidth(), "records": []}
    for number, case in enumerate(options.cases, 1):
        print(f"case {number} of {len(options.cases)}: {case}", flush=True)
        run["records"].append(benchmark(case, options.seconds, run["copy GB/s"]))
        torch.cuda.empty_cache()
        write_report(run, options.output, options.name, table(run))
    print(table(run))


if __name__ == "__main__":
    run_benchmark(main)
