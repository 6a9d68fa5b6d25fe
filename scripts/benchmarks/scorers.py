#!/usr/bin/env python3
"""Time the scorers alone and the attention layer with each of them.

    python scripts/benchmarks/scorers.py

Scores are checked against float64 at a smaller length before anything is timed. The following then
take turns in random order, as in attention.py: each scorer alone, forward only, because scores have
no backward; the layer, forward and with backward; the two SDPA calls that "dilated" makes; and, if
flash-linear-attention is installed (pip install fla-core), its two calls and the norms that "gla"
would take with it. The last two show how fast the scorers could be.

Prints a table, and writes it and a JSON record to the output folder.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from arguments import add_layer_arguments, benchmark_parser, run_benchmark
from measuring import (
    PAPERS,
    dense,
    forward_and_backward,
    measure,
    method_of,
    random_rows,
    relative_error,
    require_cuda,
)
from reporting import origin, table_head, table_row, with_spread, write_report

from lighthouse import LighthouseConfig, kernels, lighthouse_attention, scoring
from lighthouse.config import SCORERS
from lighthouse.geometry import PyramidGeometry
from torchtitan.models.llama3_lighthouse.environment import environment

try:
    from fla.ops.simple_gla import chunk_simple_gla
except ImportError:
    chunk_simple_gla = None

CHECKED_LENGTH, CHECKED_TOP_K = 8192, 256
# Largest error of the scores relative to float64: half the distance of neighbours in bf16.
LARGEST_ERROR = 2**-8
SDPA_CALLS, FLA = "two SDPA calls of dilated", "gla by flash-linear-attention"


def dilated_rows(rows: list[torch.Tensor], dilation: int) -> list[torch.Tensor]:
    """q, k and v [B, d Hq, N / d, D] by residue class of positions modulo the dilation d.

    Shared key-value heads are repeated.
    """
    group = rows[0].shape[1] // rows[1].shape[1]
    repeats = (1, group, group)
    return [
        scoring.dilate(x.repeat_interleave(n, dim=1) if n > 1 else x, dilation)
        for x, n in zip(rows, repeats, strict=True)
    ]


def fla_norms(rows: list[torch.Tensor], dilation: int) -> list[torch.Tensor]:
    """Position norms of "gla", by flash-linear-attention: by query and by key, [B, Hq, N] each."""
    q, k, v = (x.transpose(1, 2) for x in dilated_rows(rows, dilation))
    decay = torch.full((q.shape[2],), scoring.LOG2_DECAY * math.log(2), device=q.device)
    outputs = [chunk_simple_gla(x, y, v, g_gamma=decay)[0] for x, y in ((q, k), (k, q))]
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in outputs]
    return [scoring.undilate(x.transpose(1, 2), dilation) for x in norms]


def check(heads: int, kv_heads: int, d: int) -> dict[str, list[float]]:
    """Errors of query and key scores against float64.

    Raises:
        SystemExit: an error exceeds ``LARGEST_ERROR``.
    """
    rows = random_rows(CHECKED_LENGTH, (heads, kv_heads, kv_heads), d)
    errors = {}
    for scorer in SCORERS:
        config = LighthouseConfig(3, 4, CHECKED_TOP_K, scorer, **PAPERS)
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
            errors[name] = [
                relative_error(x, y.float()) for x, y in zip(scores, exact, strict=True)
            ]
            if not max(errors[name]) <= LARGEST_ERROR:
                raise SystemExit(
                    f"wrong result: errors of {name} are {errors[name]}, at most {LARGEST_ERROR} "
                    "is allowed"
                )
    return errors


def variants(case: str, heads: int, kv_heads: int, d: int) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name."""
    n, _ = method_of(case, "--case")
    rows = random_rows(n, (heads, kv_heads, kv_heads), d)
    found: dict[str, Callable[[], object]] = {}
    for scorer in SCORERS:
        _, config = method_of(case, "--case", scorer=scorer, **PAPERS)
        geometry = PyramidGeometry(config, n)
        found[f"{scorer}, alone"] = lambda g=geometry: kernels.score(*rows, g)
        layer = lambda q, k, v, c=config: lighthouse_attention(q, k, v, c, sdpa=dense)  # noqa: E731
        found[f"{scorer}, forward"], found[f"{scorer}, both"] = forward_and_backward(layer, rows)

    def sdpa_calls() -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = dilated
        return scoring.dilated_attention(q, k, v), scoring.dilated_attention(k, q, v)

    dilated = dilated_rows(rows, config.dilation)
    found[f"{SDPA_CALLS}, alone"] = sdpa_calls
    if chunk_simple_gla:
        found[f"{FLA}, alone"] = torch.no_grad()(lambda: fla_norms(rows, config.dilation))
    return found


def table(run: dict[str, Any]) -> str:
    """The run as Markdown."""
    results = run["results"]
    lines = [
        f"{origin(run, with_cudnn=True)}. bf16, B = 1, N, L, p, k = {run['case']}, "
        f"{run['heads']} query and {run['kv_heads']} key-value heads of {run['D']}, dilation 4. "
        "ms, median ± spread.",
        "",
        *table_head(
            ["scorer", "alone", "layer, forward", "and backward", "GiB alone"]
            + ["error by query, by key"]
        ),
    ]
    for name in (*SCORERS, SDPA_CALLS, FLA):
        if f"{name}, alone" not in results:
            continue
        times = [results.get(f"{name}, {mode}") for mode in ("alone", "forward", "both")]
        cells = [with_spread(t["ms"], t["spread"], ".4g") if t else "" for t in times]
        errors = ", ".join(f"{error:.1e}" for error in run["error"].get(name, []))
        lines.append(table_row([name, *cells, f"{times[0]['GiB']:.2f}", errors]))

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


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "scorers")
    parser.add_argument("--case", default="98304,3,4,1536", metavar="N,L,p,k",
                        help="default: 98304,3,4,1536")  # fmt: skip
    add_layer_arguments(parser, 20.0)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    require_cuda()
    for scorer in SCORERS:
        method_of(arguments.case, "--case", scorer=scorer)
    if chunk_simple_gla is None:
        print("flash-linear-attention is not installed and left out: pip install fla-core")

    heads = (arguments.heads, arguments.kv_heads or arguments.heads)
    run: dict[str, Any] = environment(arguments.revision)
    run |= {
        "case": arguments.case,
        "heads": heads[0],
        "kv_heads": heads[1],
        "D": arguments.head_dim,
    }
    run["error"] = check(*heads, arguments.head_dim)
    torch.cuda.empty_cache()
    timed = variants(arguments.case, *heads, arguments.head_dim)
    run["results"] = measure(timed, arguments.seconds)
    write_report(run, arguments.output, arguments.name, table(run))
    print(table(run))


if __name__ == "__main__":
    run_benchmark(main)
