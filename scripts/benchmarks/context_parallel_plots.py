"""The plot of the context parallelism benchmark: speed of 270M, and memory of 8B."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from context_parallel_results import timed_rows

from torchtitan.models.llama3_lighthouse.evaluation.figures import (
    DENSE,
    FLOOR,
    LIGHTHOUSE,
    WINDOW,
    length_axis,
    new_figure,
    plain_numbers,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = ("o-", "s--", "^:", "D-.")


def plot(run: dict[str, Any], path: Path) -> None:
    """Draw what the record has: speed of 270M and memory of 8B, over the context length."""
    timed = [row for row in timed_rows(run) if "tps" in row]
    longest = [row for row in run.get("longest", []) if "tps" in row]
    large = [row for row in run.get("8b", []) if "GiB" in row]
    panels = [
        *([lambda axis: draw_speed(axis, run, timed, longest)] if timed or longest else []),
        *([lambda axis: draw_memory(axis, large)] if large else []),
    ]
    if not panels:
        return
    figure = new_figure(8 if len(panels) == 1 else 14)
    for axis, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis)
        axis.legend()
        axis.grid(alpha=0.3)
    save(figure, path)


def colour_of(stage: str) -> str:
    if "window" in stage:
        return WINDOW
    return DENSE if stage == "dense" else LIGHTHOUSE


def draw_speed(
    axis: "Axes", run: dict[str, Any], rows: list[dict[str, Any]], longest: list[dict[str, Any]]
) -> None:
    """Tokens/s for each GPU of 270M."""
    numbers = sorted({row["GPUs"] for row in rows})
    # A dictionary keeps the order of the rows.
    for stage in dict.fromkeys(row["stage"] for row in rows):
        for gpus, style in zip(numbers, STYLES, strict=False):
            points = sorted(
                (row["N"], row["tps"])
                for row in rows
                if (row["stage"], row["GPUs"]) == (stage, gpus)
            )
            if points:
                label = f"{stage}, {gpus} GPU{'' if gpus == 1 else 's'}"
                axis.plot(*zip(*points, strict=True), style, color=colour_of(stage), label=label)
    axis.set(
        yscale="log",
        xlabel="context length N, tokens",
        ylabel="tokens/s for each GPU",
        title=f"Training 270M on {run['GPU'] or 'CPUs'}",
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


def draw_memory(axis: "Axes", rows: list[dict[str, Any]]) -> None:
    """Memory of each GPU of 8B: what the dry run estimates, and what was in use and reserved."""
    for key, style in (("GiB", "^"), ("active GiB", "o"), ("estimated GiB", "_")):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            chosen = [row for row in rows if row["stage"] == stage]
            name = {"GiB": "reserved", "active GiB": "in use"}.get(key, "estimated")
            axis.plot(
                [row["N"] for row in chosen],
                [row[key] for row in chosen],
                style,
                color=FLOOR if key == "estimated GiB" else colour_of(stage),
                markersize=14 if style == "_" else 7,
                label=f"{stage}, {name}",
            )
    axis.set(
        xlabel="context length N, tokens",
        ylabel="GiB of each GPU",
        ylim=(0, None),
        title=f"{rows[0]['model']} on {rows[0]['GPUs']} GPUs",
    )
    length_axis(axis, [row["N"] for row in rows])
