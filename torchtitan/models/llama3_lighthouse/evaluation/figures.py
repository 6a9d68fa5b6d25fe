"""Common parts of all plots. matplotlib is imported only to draw."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserValueError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120


def check_plots(wanted: bool) -> None:
    """Check that plots can be drawn, if any are wanted.

    Raises:
        ValueError: matplotlib is missing.
    """
    if wanted and not importlib.util.find_spec("matplotlib"):
        raise UserValueError(
            "plots need matplotlib: pip install matplotlib, or pass --no-plots to get tables alone"
        )


def new_figure(width: float = 10.0, height: float = 5.0) -> "Figure":
    """A figure of so many inches, to be drawn on without a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure to a file of the type that its name says."""
    figure.savefig(path, dpi=DOTS_PER_INCH)


def colours(count: int) -> Sequence[Any]:
    """Colours for ``count`` lines; they repeat after twenty."""
    import matplotlib

    palette = matplotlib.color_sequences["tab10" if count <= 10 else "tab20"]
    return [palette[number % len(palette)] for number in range(count)]
