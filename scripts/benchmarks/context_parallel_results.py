"""Results of the context parallelism benchmark: its table and its plot."""

import json
from pathlib import Path
from typing import Any

from reporting import table_head, table_row

from torchtitan.models.llama3_lighthouse.evaluation.figures import (
    DENSE,
    LIGHTHOUSE,
    length_axis,
    new_figure,
    plain_numbers,
    save,
)


def table(run: dict[str, Any]) -> str:
    """The run as Markdown."""
    lines = [f"{run['GPUs']} x {run['GPU']}, torch {run['torch']}, NCCL {run['NCCL']}. bf16.", ""]
    parts = (f"{part}: {origin}" for part, origin in run["measured"].items())
    lines += [f"Measured at revision ({'; '.join(parts)}).", ""]
    for part in ("layer", "equivalence", "resume"):
        if part in run:
            lines += [f"**{part}**", ""]
            lines += [f"- {key}: {json.dumps(value)}" for key, value in run[part].items()]
            lines.append("")
    rows = [row for part in ("training", "short", "longest") for row in run.get(part, [])]
    if rows:
        lines += table_head(
            ["stage", "GPUs", "N", "checkpointing", "tokens/s and GPU", "MFU", "GiB a GPU"]
        )
    for row in rows:
        cells = [row["stage"], str(row["GPUs"]), f"{row['N']:,}", row["checkpointing"]]
        cells += [f"{row['tps']:,.0f}", f"{row['mfu']:.1f}%"] if "tps" in row else ["", ""]
        cells.append(f"{row['GiB']:.1f}" if "GiB" in row else "does not fit")
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def plot(run: dict[str, Any], path: Path) -> None:
    """Draw tokens/s for each GPU over the context length, if any part measured them."""
    rows = run.get("training", []) + run.get("short", [])
    longest = [row for row in run.get("longest", []) if "tps" in row]
    if not rows and not longest:
        return
    figure = new_figure(8)
    axis = figure.subplots()
    for attention, colour in (("Lighthouse", LIGHTHOUSE), ("dense", DENSE)):
        for gpus in sorted({row["GPUs"] for row in rows}):
            points = sorted(
                (row["N"], row["tps"])
                for row in rows
                if (row["stage"], row["GPUs"]) == (attention, gpus)
            )
            if points:
                style, plural = ("o-", "") if gpus == 1 else ("s--", "s")
                label = f"{attention}, {gpus} GPU{plural}"
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axis.set(
        yscale="log",
        xlabel="context length N, tokens",
        ylabel="tokens/s for each GPU",
        title=f"Training 270M on {run['GPU']}",
    )
    if longest:
        axis.plot(
            [row["N"] for row in longest],
            [row["tps"] for row in longest],
            "*",
            color=LIGHTHOUSE,
            markersize=12,
            label=f"Lighthouse, {longest[0]['GPUs']} GPUs, other levels and checkpointing",
        )
    length_axis(axis, [row["N"] for row in rows + longest])
    plain_numbers(axis)
    axis.legend()
    axis.grid(alpha=0.3)
    save(figure, path)
