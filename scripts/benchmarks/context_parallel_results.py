"""Results of the context parallelism benchmark: its tables."""

import json
from typing import Any

from gpu_profile import as_cell, function_table, wait_table
from reporting import table_head, table_row

PROFILES = "profiles of rank 0"
TIMING = ("training", "alone", "short")
# Times of a profiled step, and the kernels that are listed below them.
PROFILED = {"step": "ms a step", "busy": "busy ms", "sending alone": "sending alone ms"}
LISTED = 20
COLUMNS = ["stage", "GPUs", "N", "checkpointing", "tokens/s and GPU", "MFU", "GiB a GPU"]
ESTIMATES = {
    "active GiB": ".1f",
    "estimated GiB": ".1f",
    "active GiB over estimate": ".2f",
    "GiB over estimate": ".2f",
}


def table(run: dict[str, Any]) -> str:
    """The run as Markdown."""
    gpu = run["GPU"] or "CPU process"
    nccl = f", NCCL {run['NCCL']}" if run["NCCL"] else ""
    precision = "tiny sizes, to try the code out" if run.get("tiny") else "bf16"
    lines = [f"{run['GPUs']} x {gpu}, torch {run['torch']}{nccl}. {precision}.", ""]
    parts = (f"{part}: {origin}" for part, origin in run["measured"].items())
    lines += [f"Measured at revision ({'; '.join(parts)}).", ""]
    layers = run.get("layer", [])
    for found in [layers] if isinstance(layers, dict) else layers:
        hidden = ("measured", PROFILES)
        lines += named("layer", {key: x for key, x in found.items() if key not in hidden})
        for name, profile in found.get(PROFILES, {}).items():
            lines += function_table(f"{name}, on rank 0", profile)
    for part in ("equivalence", "resume", "meshes", "killed"):
        if part in run:
            lines += named(part, run[part])
    timed = timed_rows(run)
    if rows := timed + run.get("longest", []):
        lines += [*table_head(COLUMNS), *(table_row(cells(row)) for row in rows)]
    if compared := comparisons(timed):
        lines += ["", *compared]
    if compared := profile_lines(run.get("profile", [])):
        lines += [*([""] if lines[-1] else []), *compared]
    if rows := run.get("8b", []):
        lines += ["", f"**{rows[0]['model']}**", "", *table_head([*COLUMNS, *ESTIMATES])]
        lines += [
            table_row([*cells(row), *(f"{row[x]:{f}}" if x in row else "" for x, f in
                                      ESTIMATES.items())])
            for row in rows
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def named(part: str, found: dict[str, Any]) -> list[str]:
    """The lines of a part that has values with names."""
    return [f"**{part}**", "", *items(found), ""]


def items(found: dict[str, Any], indent: str = "") -> list[str]:
    """List items, one for each value; a run's own values are items below it."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict) and any(name.startswith("losses") for name in value):
            lines += [f"{indent}- {key}:", *items(value, indent + "    ")]
        else:
            lines.append(f"{indent}- {key}: {json.dumps(value)}")
    return lines


def timed_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of 270M on W GPUs and on each of them alone."""
    return [row for part in TIMING for row in run.get(part, [])]


def cells(row: dict[str, Any]) -> list[str]:
    found = [row["stage"], str(row["GPUs"]), f"{row['N']:,}", row["checkpointing"]]
    found.append(f"{row['tps']:,.0f}" if "tps" in row else "")
    found.append(f"{row['mfu']:.1f}%" if "mfu" in row else "")
    return [*found, f"{row['GiB']:.1f}" if "GiB" in row else "does not fit"]


def comparisons(rows: list[dict[str, Any]]) -> list[str]:
    """A table of W GPUs against the slowest of them alone, at each length that has both.

    "Less" is the share of the speed that is lost, and the last three columns are the speed over
    that of dense attention, and the share of it that is lost.
    """
    speeds = {(row["N"], row["GPUs"], row["stage"]): row["tps"] for row in rows if "tps" in row}
    lines = []
    for (n, gpus, stage), speed in sorted(speeds.items()):
        one = speeds.get((n, 1, stage))
        if gpus == 1 or one is None:
            continue
        found = [f"{n:,}", str(gpus), stage, f"{1 - speed / one:.1%}"]
        dense = speeds.get((n, gpus, "dense")), speeds.get((n, 1, "dense"))
        if stage != "dense" and all(dense):
            together, alone = speed / dense[0], one / dense[1]
            found += [f"{together:.2f}x", f"{alone:.2f}x", f"{1 - together / alone:.1%}"]
        lines.append(table_row(found + [""] * (7 - len(found))))
    head = ["N", "GPUs", "stage", "less than alone", "over dense", "over dense alone", "less"]
    return [*table_head(head), *lines] if lines else []


def rank_lines(ranks: list[dict[str, float]]) -> list[str]:
    """List items of what each rank's GPU did in a step."""
    return [
        f"- rank {rank}: {found['busy ms']:.1f} ms busy, {found['sending ms']:.1f} in kernels that "
        f"send, {found['sending alone ms']:.1f} with sending alone"
        for rank, found in enumerate(ranks)
    ]


def profile_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table of where a step of W GPUs is longer than its share of one GPU's step."""
    by_gpus = {row["GPUs"]: row for row in rows}
    if 1 not in by_gpus:
        return []
    lines, one = [], by_gpus[1]
    for gpus, row in sorted(by_gpus.items()):
        if gpus == 1:
            continue

        def line(name: str, together: float, alone: float, gpus: int = gpus) -> list[Any]:
            return [name, together, alone / gpus, together - alone / gpus]

        ms = [{x["name"]: x["ms"] for x in found["kernels"]} for found in (row, one)]
        kernels = [line(name, *(x.get(name, 0.0) for x in ms)) for name in {**ms[0], **ms[1]}]
        kernels.sort(key=lambda found: -abs(found[-1]))
        shown = [line(name, row[key], one[key]) for name, key in PROFILED.items()]
        shown += [[f"`{as_cell(name, 100)}`", *values] for name, *values in kernels[:LISTED]]
        lines += [
            f"**profile**, Lighthouse, {row['N']:,} tokens, ms on rank 0",
            "",
            *table_head(["", f"{gpus} GPUs", f"one GPU / {gpus}", "more"]),
            *(table_row([name, *(f"{x:.1f}" for x in values)]) for name, *values in shown),
            "",
            *rank_lines(row["ranks"]),
            "",
            f"Times on {gpus} GPUs in which nothing is computed:",
            "",
            *wait_table(row["waits"]),
            "",
        ]
    return lines
