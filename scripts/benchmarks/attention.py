#!/usr/bin/env python3
"""Time Lighthouse attention against dense SDPA and against SDPA on the gathered sub-sequence.

    python scripts/benchmark_attention.py --cases 98304,3,4,1536 131072,3,4,2048 --plot

--plot needs the extra "benchmark" (pip install -e '.[benchmark]').

Every case of up to 131,072 positions is checked before it is timed: its error against float32 is
bounded by that of vectorised PyTorch in the same precision. Variants take turns within one process,
in an order drawn anew each time, as a hot GPU is a slower one; a figure is the median of the turns
and its spread half the distance between the quartiles. The host runs ahead of the device, as it
does in training.
Prints a table; writes it, a JSON record with the GPU, versions, git revision and date, and with
--plot latency and memory over the length, to the output folder.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import (
    copy_bandwidth,
    dense,
    environment,
    forward_and_backward,
    measure,
    relative_error,
)
from torch.nn.functional import scaled_dot_product_attention

from lighthouse import LighthouseConfig, Selection, kernels, lighthouse_attention, select
from lighthouse.geometry import PyramidGeometry

SWEEP = ["2048,3,4,128", "4096,3,4,128", "8192,3,4,128", "16384,3,4,256",
         "32768,3,4,512", "65536,3,4,1024", "98304,3,4,1536", "131072,3,4,2048",
         "262144,3,4,4096", "524288,3,4,8192", "1048576,4,4,4096"]  # fmt: skip
# Beyond this length the check, which holds float32 copies, would not fit beside the rest.
LARGEST_CHECKED = 131072


def exact_dense(q, k, v, enable_gqa, **options) -> torch.Tensor:
    # In float32, torch knows shared heads only in the variant that holds all N x N scores.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, **options)


def check(leaves: list[torch.Tensor], config: LighthouseConfig) -> dict[str, list[float]]:
    """Errors of output and gradients against float32: the kernels', and vectorised PyTorch's.

    Raises:
        SystemExit: the former are not about as small.
    """
    selection = select(*leaves, config)
    grad = torch.randn_like(leaves[0])

    def run(impl, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        sdpa = dense if dtype == torch.bfloat16 else exact_dense
        out = lighthouse_attention(*inputs, config, selection=selection, impl=impl, sdpa=sdpa)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    errors = {}
    exact = run("torch", torch.float32)
    ours, plain = run("triton", torch.bfloat16), run("torch", torch.bfloat16)
    for name, value, rough, want in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        errors[name] = error, bound = relative_error(value, want), relative_error(rough, want)
        if not error <= 1.1 * bound:
            raise SystemExit(f"wrong result: error of {name} is {error}, of PyTorch's {bound}")
    return errors


def parts(leaves: list[torch.Tensor], config: LighthouseConfig) -> dict[str, tuple[Callable, int]]:
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
    # Bytes of one position: of q, and of q, k and v.
    row = q.element_size() * q.shape[1] * q.shape[3] * q.shape[0]
    rows = row + 2 * row * k.shape[1] // q.shape[1]
    n, s, coarse = geometry.sequence_length, geometry.gathered_length, geometry.lengths[-1]
    # Rows below picks of the coarsest level: what finer levels gather lies among them.
    picked = config.top_k * geometry.spans[-1]

    def adjoint(function, rows, grad):
        leaf = rows.detach().requires_grad_()
        result = function(leaf)
        return lambda: torch.autograd.grad(result, leaf, grad, retain_graph=True)

    gather_backwards = [adjoint(*each) for each in zip(gathers, leaves, gathered, strict=True)]
    return {
        "pool q, k, v": (
            lambda: [kernels.pool_coarsest(x, geometry, x is not v) for x in leaves],
            rows * (n + coarse),
        ),
        "select": (lambda: kernels.select_from_norms(a, b, geometry), 4 * (a.numel() + b.numel())),
        "gather q, k, v": (
            lambda: [gather(x) for gather, x in zip(gathers, leaves, strict=True)],
            rows * (picked + coarse + s),
        ),
        "scatter": (lambda: scatter(gathered[0]), row * (s + n)),
        "scatter, backward": (
            adjoint(scatter, gathered[0], out),
            row * (n + s),
        ),
        "gather, backward": (
            lambda: [backward() for backward in gather_backwards],
            rows * (s + n),
        ),
    }


def benchmark(
    case: str, heads: int, kv_heads: int, d: int, seconds: float, skip_dense: bool
) -> dict:
    n, levels, p, top_k = map(int, case.split(","))
    config = LighthouseConfig(levels, p, top_k)
    geometry = PyramidGeometry(config, n)
    torch.manual_seed(0)
    # As a model hands them over: views of [B, N, H, D].
    leaves = [
        torch.randn(1, n, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]
    record = {"case": case, "heads": heads, "kv_heads": kv_heads, "D": d,
              "S": geometry.gathered_length, "N": n}  # fmt: skip
    if n <= LARGEST_CHECKED:
        record["error"] = check(leaves, config)

    gqa = heads != kv_heads

    def lighthouse(q, k, v):
        return lighthouse_attention(q, k, v, config, sdpa=dense)

    functions = {"dense": lambda q, k, v: dense(q, k, v, enable_gqa=gqa), "lighthouse": lighthouse,
                 "compiled": torch.compile(lighthouse, fullgraph=True, dynamic=False)}  # fmt: skip
    torch._dynamo.reset()
    if skip_dense:
        del functions["dense"]
    variants = {}
    for name, function in functions.items():
        variants[f"{name}, forward"], variants[f"{name}, both"] = forward_and_backward(
            function, leaves
        )
    # The floor attends over what Lighthouse does: means draw less power than fresh noise.
    short = []
    lighthouse_attention(*leaves, config, sdpa=lambda *rows, **_: short.extend(rows) or rows[0])
    variants["SDPA on S, forward"], variants["SDPA on S, both"] = forward_and_backward(
        lambda q, k, v: dense(q, k, v, enable_gqa=gqa), short
    )
    steps = parts(leaves, config)
    results = measure({**variants, **{name: run for name, (run, _) in steps.items()}}, seconds)
    for name, (_, moved) in steps.items():
        results[name]["GB/s"] = moved / results[name]["ms"] / 1e6
    record["results"] = results
    return record


def tables(run: dict) -> str:
    """The run as Markdown: whole attention, then its parts."""
    lines = [
        f"{run['GPU']}, torch {run['torch']}, triton {run['triton']}, revision {run['revision']}, "
        f"{run['date']}. bf16, B = 1; copy {run['copy GB/s']:.0f} GB/s. ms, median ± spread.",
        "",
        "| N, L, p, k | heads | S | | dense | Lighthouse | compiled | SDPA on S | speedup | "
        "over SDPA on S | sum of parts | GiB: dense, Lighthouse |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in run["records"]:
        for mode in ("forward", "both"):
            cells = {n: record["results"].get(f"{n}, {mode}") for n in
                     ("dense", "lighthouse", "compiled", "SDPA on S")}  # fmt: skip
            text = [f"{c['ms']:.4g} ± {c['spread']:.1g}" if c else "" for c in cells.values()]
            ours = [cells[name]["ms"] for name in ("lighthouse", "compiled")]
            dense_ms = cells["dense"]["ms"] if cells["dense"] else math.nan
            ratios = ", ".join(f"{dense_ms / ms:.1f}x" for ms in ours)
            over = ", ".join(f"{ms - cells['SDPA on S']['ms']:.2f}" for ms in ours)
            counted = PART_NAMES if mode == "both" else FORWARD_PARTS
            parts_ms = sum(record["results"][part]["ms"] for part in counted)
            memory = ", ".join(
                f"{cells[n]['GiB']:.2f}" for n in ("dense", "lighthouse") if cells[n]
            )
            lines.append(
                f"| {record['case']} | {record['heads']}/{record['kv_heads']} | {record['S']:,} | "
                f"{'forward' if mode == 'forward' else 'and backward'} | {' | '.join(text)} | "
                f"{ratios} | {over} | {parts_ms:.2f} | {memory} |"
            )
    lines += ["", "| N, L, p, k | " + " | ".join(PART_NAMES) + " |", "|---" * 7 + "|"]
    for record in run["records"]:
        cells = [record["results"][name] for name in PART_NAMES]
        text = " | ".join(f"{c['ms']:.3f} ({c['GB/s']:.0f})" for c in cells)
        lines.append(f"| {record['case']} | {text} |")
    lines += ["", "Speedup, and what comes on top of SDPA on S: eager, compiled. "
              "Parts: ms (GB/s of the bytes that have to move, each once)."]  # fmt: skip
    return "\n".join(lines) + "\n"


FORWARD_PARTS = ("pool q, k, v", "select", "gather q, k, v", "scatter")
PART_NAMES = (*FORWARD_PARTS, "scatter, backward", "gather, backward")


def crossover(run: dict) -> str:
    """From which measured length on Lighthouse is the faster one."""
    wins = {
        record["N"]: record["results"]["lighthouse, both"]["ms"] < dense["ms"]
        for record in run["records"]
        if (dense := record["results"].get("dense, both"))
    }
    slower = [n for n, faster in wins.items() if not faster]
    first = min((n for n in wins if n > max(slower, default=0)), default=None)
    if not slower:
        return f"Lighthouse is faster at every length measured, from N = {min(wins):,} on"
    return f"Lighthouse is faster from N = {first:,} on" if first else "dense is faster throughout"


def plot(run: dict, path: Path) -> None:
    """Latency and memory of forward and backward over the length, dense and Lighthouse."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    styles = {"dense": "o-", "lighthouse": "s-", "compiled": "x--", "SDPA on S": "^:"}
    for axis, key, label in zip(axes, ("ms", "GiB"), ("forward + backward, ms", "memory, GiB"),
                                strict=True):  # fmt: skip
        for name, style in styles.items():
            points = [(r["N"], r["results"][f"{name}, both"][key]) for r in run["records"]
                      if f"{name}, both" in r["results"]]  # fmt: skip
            axis.plot(*zip(*sorted(points), strict=True), style, label=name)
        axis.set(xscale="log", yscale="log", xlabel="sequence length N", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    cases = "   ".join(record["case"] for record in run["records"])
    figure.suptitle(f"Attention layer, {run['GPU']}, bf16, B = 1: {crossover(run)}")
    figure.text(0.5, 0.01, f"N,L,p,k: {cases}", ha="center", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=SWEEP, metavar="N,L,p,k")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as --heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure each case for")
    parser.add_argument("--skip-dense", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--name", default="attention", help="stem of the files written")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--revision", help="git revision to record; default: as git says")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("scripts/benchmark_attention.py needs a CUDA device and found none")

    run = environment(arguments.revision)
    run |= {"copy GB/s": copy_bandwidth(), "records": []}
    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(arguments.cases, 1):
        print(f"case {number} of {len(arguments.cases)}: {case}", flush=True)
        run["records"].append(
            benchmark(case, arguments.heads, arguments.kv_heads or arguments.heads,
                      arguments.head_dim, arguments.seconds, arguments.skip_dense)
        )  # fmt: skip
        torch.cuda.empty_cache()
        (arguments.output / f"{arguments.name}.json").write_text(json.dumps(run, indent=1) + "\n")
    (arguments.output / f"{arguments.name}.md").write_text(tables(run))
    print(tables(run))
    if arguments.plot:
        plot(run, arguments.output / f"{arguments.name}.png")


if __name__ == "__main__":
    main()
