"""Reports of the benchmarks: records as JSON, tables as Markdown, and plots over the length."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]


def write_report(run: dict[str, Any], folder: Path, name: str, text: str | None = None) -> None:
    """Write NAME.json and, if there is a text, NAME.md; create the folder if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(run, indent=1) + "\n")
    if text is not None:
        (folder / f"{name}.md").write_text(text)


def origin(run: dict[str, Any], with_cudnn: bool = False) -> str:
    """GPU, versions, git revision and date of a run, to begin a table with."""
    cudnn = f"cuDNN {run['cudnn']}, " if with_cudnn else ""
    return (
        f"{run.get('GPU') or run['device']}, torch {run['torch']}, {cudnn}triton {run['triton']}, "
        f"revision {run['revision']}, {run['date']}"
    )


def with_spread(value: float, spread: float, digits: str) -> str:
    """A table's cell: a median in the format ``digits``, and its spread."""
    return f"{value:{digits}} ± {spread:.1g}"


def table_row(cells: Iterable[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_head(names: Sequence[str]) -> list[str]:
    """The first two rows of a Markdown table."""
    return [table_row(names), "|---" * len(names) + "|"]


def crossover(faster: dict[int, bool]) -> str:
    """A sentence that says from which length on Lighthouse is faster than dense attention.

    Args:
        faster: for each length measured with both, whether Lighthouse was the faster one.
    """
    if not faster:
        return "No length has both."
    slower = [length for length, is_faster in faster.items() if not is_faster]
    if not slower:
        return f"Lighthouse is faster at every length measured, from {min(faster):,} tokens on."
    if len(slower) == len(faster):
        return "Dense attention is faster at every length measured."
    longer = [length for length in faster if length > max(slower)]
    if not longer:
        return f"Dense attention is faster at {max(slower):,} tokens, the longest measured."
    return (
        f"Lighthouse is faster from {min(longer):,} tokens on, dense attention at {max(slower):,}."
    )


def plot_over_length(
    path: Path, title: str, panels: dict[str, dict[str, tuple[str, str, Points]]], note: str = ""
) -> None:
    """Draw panels side by side, both axes logarithmic, over the sequence length.

    Args:
        panels: for each label of a y axis its lines: name, colour, style, and points of length and
            value. Lines without points are left out.
        note: small print below.
    """
    # The import is here, because it also imports torch, and --help would wait for that.
    from torchtitan.models.llama3_lighthouse.evaluation.figures import (
        length_axis,
        new_figure,
        plain_numbers,
        save,
    )

    figure = new_figure(11)
    axes = figure.subplots(1, len(panels))
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for name, (colour, style, points) in lines.items():
            if points:
                axis.plot(*zip(*sorted(points), strict=True), style, color=colour, label=name)
        axis.set(yscale="log", xlabel="sequence length N, tokens", ylabel=label)
        plain_numbers(axis)
        length_axis(axis, [n for *_, points in lines.values() for n, _ in points])
        axis.grid(alpha=0.3)
    if axes[0].lines:
        axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(note, fontsize=7)
    save(figure, path)
