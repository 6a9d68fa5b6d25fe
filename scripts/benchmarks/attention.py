#!/usr/bin/env python3
"""Time Lighthouse attention against dense SDPA and against SDPA on the gathered sub-sequence.

    python scripts/benchmarks/attention.py --cases 98304,3,4,1536 131072,3,4,2048
    python scripts/benchmarks/attention.py --cases 98304,3,4,1536 --window 256 --name window

With a window, Lighthouse attention also attends over the last positions, and the parts of the
window and of the merge stand in the place of scattering.

Every case of up to 131,072 positions is checked before it is timed: its error against float32 may
not exceed that of vectorised PyTorch in the same precision. Variants take turns within one process,
in an order drawn anew each time, because a hot GPU is slower. A figure is the median of the turns,
and its spread is half the distance between the quartiles. The host runs ahead of the device, as it
does in training.

Prints a table. Writes the table, a JSON record and a plot of latency and memory over the length to
the output folder. The plot needs matplotlib (pip install -e '.[plots]'); --no-plots leaves it out.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arguments import add_layer_arguments, benchmark_parser, run_benchmark
from measuring import (
    PAPERS,
    copy_bandwidth,
    dense,
    forward_and_backward,
    measure,
    method_of,
    random_rows,
    relative_error,
    require_cuda,
    sequence_first,
)
from reporting import (
    crossover,
    origin,
    plot_over_length,
    table_head,
    table_row,
    with_spread,
    write_report,
)
from torch.nn.functional import scaled_dot_product_attention

from lighthouse import LighthouseConfig, Selection, kernels, lighthouse_attention, select
from lighthouse.geometry import PyramidGeometry
from lighthouse.window import window_operations
from torchtitan.models.llama3_lighthouse.environment import environment
from torchtitan.models.llama3_lighthouse.evaluation.figures import (
    DENSE,
    FLOOR,
    LIGHTHOUSE,
    check_plots,
)

SWEEP = [
    "2048,3,4,128",
    "4096,3,4,128",
    "8192,3,4,128",
    "16384,3,4,256",
    "32768,3,4,512",
    "65536,3,4,1024",
    "98304,3,4,1536",
    "131072,3,4,2048",
    "262144,3,4,4096",
    "524288,3,4,8192",
    "1048576,4,4,4096",
]
# The check holds float32 copies, which would not fit beside the rest at greater lengths.
LARGEST_CHECKED = 131072
FORWARD_PARTS = ("pool q, k, v", "select", "gather q, k, v", "window", "merge", "scatter")
BACKWARD_PARTS = (
    "window, backward",
    "merge, backward",
    "scatter, backward",
    "gather, backward",
)
# Vectorised PyTorch keeps the probabilities of windows in float32, where kernels round them.
ERROR_WITH_WINDOW = 2.0**-8
STYLES = {
    "dense": (DENSE, "o-"),
    "lighthouse": (LIGHTHOUSE, "s-"),
    "compiled": (LIGHTHOUSE, "x--"),
    "SDPA on S": (FLOOR, "^:"),
}
NAMES = {"lighthouse": "Lighthouse", "compiled": "Lighthouse compiled", "SDPA on S": "SDPA on S"}


def exact_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, enable_gqa: bool, **options: Any
) -> torch.Tensor:
    # In float32, torch knows shared heads only in the variant that holds all N x N scores.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, **options)


def check(leaves: list[torch.Tensor], config: LighthouseConfig) -> dict[str, tuple[float, float]]:
    """Errors of output and gradients against float32: of the kernels, and of vectorised PyTorch.

    Raises:
        SystemExit: an error of the kernels exceeds PyTorch's by more than a tenth.
    """
    selection = select(*leaves, config)
    grad = torch.randn_like(leaves[0])

    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        sdpa = None if config.window else dense if dtype == torch.bfloat16 else exact_dense
        out = lighthouse_attention(*inputs, config, selection=selection, impl=impl, sdpa=sdpa)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    errors = {}
    exact = run("torch", torch.float32)
    ours, plain = run("triton", torch.bfloat16), run("torch", torch.bfloat16)
    for name, value, rough, want in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        errors[name] = error, bound = relative_error(value, want), relative_error(rough, want)
        if not error <= max(1.1 * bound, ERROR_WITH_WINDOW if config.window else 0.0):
            raise SystemExit(f"wrong result: error of {name} is {error}, PyTorch's is {bound}")
    return errors


def parts(
    leaves: list[torch.Tensor], config: LighthouseConfig
) -> dict[str, tuple[Callable[[], object], int]]:
    """Each step around the dense attention, and the bytes that it has to move at least once."""
    q, k, v = leaves
    geometry = PyramidGeometry(config, q.shape[2])
    pooled = [kernels.pool_coarsest(x, geometry, x is not v) for x in leaves]
    a, b = pooled[0][1], pooled[1][1]
    selection = Selection(*kernels.select_from_norms(a, b, geometry))
    scatter = lambda x: kernels.scatter_back(x, selection, geometry)  # noqa: E731
    gathers = [
        lambda x, means=means: kernels.pool_gather(x, means, selection, geometry)
        for means, _ in pooled
    ]
    gathered = [gather(x) for gather, x in zip(gathers, leaves, strict=True)]
    out = scatter(gathered[0])
    # Bytes that one position has in q, and in q, k and v together.
    row = q.element_size() * q.shape[1] * q.shape[3] * q.shape[0]
    rows = row + 2 * row * k.shape[1] // q.shape[1]
    n, s, coarse = geometry.sequence_length, geometry.gathered_length, geometry.lengths[-1]
    # Finer levels gather only rows that lie below picks of the coarsest level.
    picked = config.top_k * geometry.spans[-1]

    def adjoint(
        function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, grad: torch.Tensor
    ) -> Callable[[], object]:
        leaf = rows.detach().requires_grad_()
        result = function(leaf)
        return lambda: torch.autograd.grad(result, leaf, grad, retain_graph=True)

    gather_backwards = [adjoint(*each) for each in zip(gathers, leaves, gathered, strict=True)]
    found: dict[str, tuple[Callable[[], object], int]] = {
        "pool q, k, v": (
            lambda: [kernels.pool_coarsest(x, geometry, x is not v) for x in leaves],
            rows * (n + coarse),
        ),
        "select": (lambda: kernels.select_from_norms(a, b, geometry), 4 * (a.numel() + b.numel())),
        "gather q, k, v": (
            lambda: [gather(x) for gather, x in zip(gathers, leaves, strict=True)],
            rows * (picked + coarse + s),
        ),
        "gather, backward": (
            lambda: [backward() for backward in gather_backwards],
            rows * (s + n),
        ),
    }
    if not config.window:
        return found | {
            "scatter": (lambda: scatter(gathered[0]), row * (s + n)),
            "scatter, backward": (adjoint(scatter, gathered[0], out), row * (n + s)),
        }
    scale, pyramid = 1 / math.sqrt(q.shape[-1]), (config.pooling_factor, config.levels)
    attend, attend_backward = window_operations(q)
    far, far_lse = attend(*gathered, s, scale)
    near, near_lse = attend(q, k, v, config.window, scale)
    merge = far, far_lse, near, near_lse, selection.slot, *pyramid
    merged, lse = kernels.merge_outputs(*merge)
    collect = out, merged, lse, far, far_lse, *selection, *pyramid
    backward = out, None, q, k, v, merged, lse, config.window, scale
    spread = lambda x, onto: kernels.spread_shares(x, selection.slot, n, *pyramid, onto)  # noqa: E731
    return found | {
        "gather, backward": (lambda: [*map(spread, gathered, leaves)], rows * (s + 2 * n)),
        "window": (
            lambda: attend(q, k, v, config.window, scale),
            (rows + row) * n,
        ),
        "merge": (lambda: kernels.merge_outputs(*merge), row * (s + 2 * n)),
        "window, backward": (lambda: attend_backward(*backward), 2 * (rows + row) * n),
        "merge, backward": (lambda: kernels.collect_merged(*collect), row * (2 * n + 3 * s)),
    }


def whole(
    leaves: list[torch.Tensor], config: LighthouseConfig, skip_dense: bool
) -> dict[str, Callable[[], object]]:
    """Forward, and forward with backward, of each way to compute the whole attention."""
    q, k, _ = leaves
    gqa = q.shape[1] != k.shape[1]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return dense(q, k, v, enable_gqa=gqa)

    def lighthouse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return lighthouse_attention(q, k, v, config, sdpa=None if config.window else dense)

    torch._dynamo.reset()
    compiled = torch.compile(sequence_first(lighthouse), fullgraph=True, dynamic=False)
    functions = {} if skip_dense else {"dense": (plain, leaves)}
    flat = [x.transpose(1, 2) for x in leaves]
    functions |= {"lighthouse": (lighthouse, leaves), "compiled": (compiled, flat)}
    found = {}
    for name, arguments in functions.items():
        found[f"{name}, forward"], found[f"{name}, both"] = forward_and_backward(*arguments)
    # SDPA attends over the rows that Lighthouse gathers: means draw less power than fresh noise.
    short: list[torch.Tensor] = []
    selecting = replace(config, window=0)
    lighthouse_attention(*leaves, selecting, sdpa=lambda *rows, **_: short.extend(rows) or rows[0])
    found["SDPA on S, forward"], found["SDPA on S, both"] = forward_and_backward(plain, short)
    return found


def benchmark(
    case: str, heads: int, kv_heads: int, d: int, window: int, seconds: float, skip_dense: bool
) -> dict[str, Any]:
    """The record of one case."""
    n, config = method_of(case, "--cases", **settings_of(window))
    leaves = random_rows(n, (heads, kv_heads, kv_heads), d)
    record: dict[str, Any] = {
        "case": case,
        "heads": heads,
        "kv_heads": kv_heads,
        "D": d,
        "window": window,
        "S": PyramidGeometry(config, n).gathered_length,
        "N": n,
    }
    if n <= LARGEST_CHECKED:
        record["error"] = check(leaves, config)
    variants = whole(leaves, config, skip_dense)
    steps = parts(leaves, config)
    results = measure({**variants, **{name: run for name, (run, _) in steps.items()}}, seconds)
    for name, (_, moved) in steps.items():
        results[name]["GB/s"] = moved / results[name]["ms"] / 1e6
    record["results"] = results
    return record


def settings_of(window: int) -> dict[str, Any]:
    """Settings of the method: the paper's, or those that a window needs."""
    return dict(window=window) if window else PAPERS


def part_names(results: dict[str, Any], mode: str) -> list[str]:
    """The parts that ``results`` has; ``mode`` is "forward" or "both"."""
    parts = FORWARD_PARTS + (BACKWARD_PARTS if mode == "both" else ())
    return [part for part in parts if part in results]


def whole_row(record: dict[str, Any], mode: str) -> str:
    """The row of a case's whole attention; ``mode`` is "forward" or "both"."""
    results = record["results"]
    cells = {name: results.get(f"{name}, {mode}") for name in STYLES}
    times = [with_spread(c["ms"], c["spread"], ".4g") if c else "" for c in cells.values()]
    ours = [cells[name]["ms"] for name in ("lighthouse", "compiled")]
    plain = cells["dense"]
    counted = part_names(results, mode)
    return table_row(
        [
            record["case"],
            f"{record['heads']}/{record['kv_heads']}",
            f"{record['S']:,}",
            "forward" if mode == "forward" else "and backward",
            *times,
            ", ".join(f"{plain['ms'] / ms:.1f}x" for ms in ours) if plain else "",
            ", ".join(f"{ms - cells['SDPA on S']['ms']:.2f}" for ms in ours),
            f"{sum(results[part]['ms'] for part in counted):.2f}",
            ", ".join(f"{cells[n]['GiB']:.2f}" for n in ("dense", "lighthouse") if cells[n]),
        ]
    )


def tables(run: dict[str, Any]) -> str:
    """The run as Markdown: the whole attention, then its parts."""
    records = run["records"]
    names = part_names(records[0]["results"], "both")
    window = records[0].get("window")
    shape = f"B = 1, window {window}" if window else "B = 1"
    lines = [
        f"{origin(run)}. bf16, {shape}; copy {run['copy GB/s']:.0f} GB/s. ms, median ± spread.",
        "",
        *table_head(
            ["N, L, p, k", "heads", "S", "", "dense", "Lighthouse", "compiled", "SDPA on S"]
            + ["speedup", "over SDPA on S", "sum of parts", "GiB: dense, Lighthouse"]
        ),
        *(whole_row(record, mode) for record in records for mode in ("forward", "both")),
        "",
        *table_head(["N, L, p, k", *names]),
    ]
    for record in records:
        cells = [record["results"][name] for name in names]
        lines.append(
            table_row([record["case"], *(f"{c['ms']:.3f} ({c['GB/s']:.0f})" for c in cells)])
        )
    lines += [
        "",
        "Speedup, and what comes on top of SDPA on S: eager, compiled. "
        "Parts: ms (GB/s of the bytes that have to move, each once).",
    ]
    return "\n".join(lines) + "\n"


def plot(run: dict[str, Any], path: Path) -> None:
    """Draw latency and memory of forward and backward over the length.

    Cases of different levels are different selections, so no line joins them.
    """
    records = run["records"]
    levels = sorted({_levels(record) for record in records})
    panels = {
        label: {
            name if name == "dense" else f"{NAMES[name]}, L = {level}": (
                STYLES[name][0],
                # The marker tells the levels apart.
                STYLES[name][1]
                if name == "dense" or level == levels[0]
                else f"D{STYLES[name][1][1:]}",
                [
                    (record["N"], record["results"][f"{name}, both"][key])
                    for record in records
                    if f"{name}, both" in record["results"]
                    and (name == "dense" or _levels(record) == level)
                ],
            )
            for name in STYLES
            for level in levels
        }
        for key, label in (("ms", "forward + backward, ms"), ("GiB", "memory, GiB"))
    }
    faster = {
        record["N"]: record["results"]["lighthouse, both"]["ms"] < plain["ms"]
        for record in records
        if (plain := record["results"].get("dense, both"))
    }
    title = f"Attention layer, {run['GPU']}, bf16, B = 1. {crossover(faster)}"
    plot_over_length(path, title, panels)


def _levels(record: dict[str, Any]) -> int:
    return int(record["case"].split(",")[1])


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "attention", with_plots=True)
    parser.add_argument("--cases", nargs="+", default=SWEEP, metavar="N,L,p,k",
                        help="default: 11 from 2,048 to 1,048,576 tokens")  # fmt: skip
    add_layer_arguments(parser, 5.0)
    parser.add_argument("--window", type=int, default=0, metavar="W",
                        help="window beside the selection; default: none")  # fmt: skip
    parser.add_argument("--skip-dense", action="store_true", help="leave dense attention out")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    require_cuda()
    check_plots(not arguments.no_plots)
    for case in arguments.cases:
        method_of(case, "--cases", **settings_of(arguments.window))
    output, name = arguments.output, arguments.name
    run = environment(arguments.revision) | {"copy GB/s": copy_bandwidth(), "records": []}
    for number, case in enumerate(arguments.cases, 1):
        print(f"case {number} of {len(arguments.cases)}: {case}", flush=True)
        run["records"].append(
            benchmark(
                case,
                arguments.heads,
                arguments.kv_heads or arguments.heads,
                arguments.head_dim,
                arguments.window,
                arguments.seconds,
                arguments.skip_dense,
            )
        )
        torch.cuda.empty_cache()
        write_report(run, output, name)
    write_report(run, output, name, tables(run))
    print(tables(run))
    if not arguments.no_plots:
        plot(run, output / f"{name}.png")


if __name__ == "__main__":
    run_benchmark(main)
