#!/usr/bin/env python3
"""Time the scorers alone and the attention layer with each of them.

    python scripts/benchmark_scorers.py

Scores are checked against float64 before anything is timed, at a smaller length. Then, in random
order as in benchmark_attention.py: each scorer alone, forward as it has no backward; the layer,
forward and with backward; and what scorers are to be judged by: the two SDPA calls of "dilated",
and the two calls and norms that "gla" would be with flash-linear-attention, where that is
installed.
Writes a table and a JSON record with the GPU, versions, git revision and date to the output folder.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import dense, environment, forward_and_backward, measure, relative_error

from lighthouse import LighthouseConfig, kernels, lighthouse_attention, scoring
from lighthouse.config import SCORERS
from lighthouse.geometry import PyramidGeometry

try:
    from fla.ops.simple_gla import chunk_simple_gla
except ImportError:
    chunk_simple_gla = None

CHECKED_LENGTH, CHECKED_TOP_K = 8192, 256
# Of scores against float64, in the norm over all of them: half of what bf16 can tell apart.
LARGEST_ERROR = 2**-8
SDPA_CALLS, FLA = "two SDPA calls of dilated", "gla by flash-linear-attention"


def random_rows(length: int, heads: int, kv_heads: int, d: int) -> list[torch.Tensor]:
    """q, k and v as a model hands them over: views of [B, N, H, D]."""
    torch.manual_seed(0)
    return [
        torch.randn(1, length, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]


def dilated_rows(rows: list[torch.Tensor], dilation: int) -> list[torch.Tensor]:
    """q, k and v [B, d Hq, N / d, D], shared key-value heads repeated."""
    group = rows[0].shape[1] // rows[1].shape[1]
    repeats = (1, group, group)
    return [
        scoring.dilate(x.repeat_interleave(n, dim=1) if n > 1 else x, dilation)
        for x, n in zip(rows, repeats, strict=True)
    ]


def fla_norms(rows: list[torch.Tensor], dilation: int) -> list[torch.Tensor]:
    """Position norms of "gla", by flash-linear-attention."""
    q, k, v = (x.transpose(1, 2) for x in dilated_rows(rows, dilation))
    decay = torch.full((q.shape[2],), scoring.LOG2_DECAY * math.log(2), device=q.device)
    outputs = [chunk_simple_gla(x, y, v, g_gamma=decay)[0] for x, y in ((q, k), (k, q))]
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in outputs]
    return [scoring.undilate(x.transpose(1, 2), dilation) for x in norms]


def check(heads: int, kv_heads: int, d: int) -> dict[str, list[float]]:
    """Errors of query and key scores against float64.

    Raises:
        SystemExit: one is too large.
    """
    rows = random_rows(CHECKED_LENGTH, heads, kv_heads, d)
    errors = {}
    for scorer in SCORERS:
        config = LighthouseConfig(3, 4, CHECKED_TOP_K, scorer)
        geometry = PyramidGeometry(config, CHECKED_LENGTH)
        exact = scoring.score(*(x.double() for x in rows), geometry)[1]
        a, b = kernels.score(*rows, geometry)
        found = {scorer: (a.unflatten(1, (kv_heads, -1)).amax(2), b)}
        if scorer == "gla" and chunk_simple_gla:
            found[FLA] = [
                x.unflatten(1, (kv_heads, -1)).amax(2).unflatten(-1, (-1, 4)).amax(-1)
                for x in fla_norms(rows, config.dilation)
            ]
        for name, scores in found.items():
            errors[name] = [relative_error(x, y.float())
                            for x, y in zip(scores, exact, strict=True)]  # fmt: skip
            if not max(errors[name]) <= LARGEST_ERROR:
                raise SystemExit(f"wrong result: errors of {name} are {errors[name]}")
    return errors


def variants(case: str, heads: int, kv_heads: int, d: int) -> dict[str, Callable]:
    """Everything that is timed, by name."""
    n, levels, p, top_k = map(int, case.split(","))
    rows = random_rows(n, heads, kv_heads, d)
    found: dict[str, Callable] = {}
    for scorer in SCORERS:
        config = LighthouseConfig(levels, p, top_k, scorer)
        geometry = PyramidGeometry(config, n)
        found[f"{scorer}, alone"] = lambda g=geometry: kernels.score(*rows, g)
        layer = lambda q, k, v, c=config: lighthouse_attention(q, k, v, c, sdpa=dense)  # noqa: E731
        found[f"{scorer}, forward"], found[f"{scorer}, both"] = forward_and_backward(layer, rows)

    def sdpa_calls():
        q, k, v = dilated
        return scoring.dilated_attention(q, k, v), scoring.dilated_attention(k, q, v)

    dilated = dilated_rows(rows, config.dilation)
    found[f"{SDPA_CALLS}, alone"] = sdpa_calls
    if chunk_simple_gla:
        found[f"{FLA}, alone"] = torch.no_grad()(lambda: fla_norms(rows, config.dilation))
    return found


def table(run: dict) -> str:
    """The run as Markdown."""
    results = run["results"]
    lines = [
        f"{run['GPU']}, torch {run['torch']}, cuDNN {run['cudnn']}, triton {run['triton']}, "
        f"revision {run['revision']}, {run['date']}. bf16, B = 1, N, L, p, k = {run['case']}, "
        f"{run['heads']} query and {run['kv_heads']} key-value heads of {run['D']}, dilation 4. "
        "ms, median ± spread.",
        "",
        "| scorer | alone | layer, forward | and backward | GiB alone | error by query, by key |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*SCORERS, SDPA_CALLS, FLA):
        if f"{name}, alone" not in results:
            continue
        times = [results.get(f"{name}, {mode}") for mode in ("alone", "forward", "both")]
        cells = [f"{t['ms']:.4g} ± {t['spread']:.1g}" if t else "" for t in times]
        errors = ", ".join(f"{error:.1e}" for error in run["error"].get(name, []))
        lines.append(f"| {name} | {' | '.join(cells)} | {times[0]['GiB']:.2f} | {errors} |")

    def ms(name: str) -> float:
        return results[name]["ms"]

    share = 1 - ms("norm, both") / ms("dilated, both")
    over = ms("dilated, alone") / ms(f"{SDPA_CALLS}, alone") - 1
    lines += [
        "",
        f'Forward and backward with "norm" take {share:.0%} less time than with "dilated", which '
        f"alone takes {over:.1%} longer than its two SDPA calls.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="98304,3,4,1536", metavar="N,L,p,k")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as --heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure for")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--name", default="scorers", help="stem of the files written")
    parser.add_argument("--revision", help="git revision to record; default: as git says")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("scripts/benchmark_scorers.py needs a CUDA device and found none")
    if chunk_simple_gla is None:
        print("flash-linear-attention is not installed and left out: pip install fla-core")

    heads = (arguments.heads, arguments.kv_heads or arguments.heads)
    run = environment(arguments.revision)
    run |= {
        "case": arguments.case,
        "heads": heads[0],
        "kv_heads": heads[1],
        "D": arguments.head_dim,
    }
    run["error"] = check(*heads, arguments.head_dim)
    torch.cuda.empty_cache()
    run["results"] = measure(variants(arguments.case, *heads, arguments.head_dim),
                             arguments.seconds)  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{arguments.name}.json").write_text(json.dumps(run, indent=1) + "\n")
    (arguments.output / f"{arguments.name}.md").write_text(table(run))
    print(table(run))


if __name__ == "__main__":
    main()
