"""Common parts of all plots. matplotlib is imported only to draw."""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserValueError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120
# One colour for one thing in all figures.
LIGHTHOUSE, DENSE, UPSTREAM, FLOOR = "tab:orange", "tab:blue", "tab:purple", "tab:gray"
WINDOW = "tab:brown"


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
    """Write a figure to a file of the type that its name says; the same figure, the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


def length_name(length: float) -> str:
    """A sequence length as it is spoken of: 16,384 is 16K, 98,304 is 98K, 1,048,576 is 1M."""
    number = int(length)
    if number < 1000 or (number % 1000 and number % 1024):
        return f"{number:,}"
    return f"{number // 1000}K" if number < 1_000_000 else f"{number // 100_000 / 10:g}M"


def length_axis(axis: "Axes", lengths: Iterable[float]) -> None:
    """Make the x axis logarithmic, with a tick at each of ``lengths``."""
    axis.set_xscale("log")
    ticks = sorted(set(lengths))
    axis.set_xticks(ticks, [length_name(n) for n in ticks], rotation=45 if len(ticks) > 6 else 0)
    axis.set_xticks([], minor=True)


def plain_numbers(axis: "Axes") -> None:
    """Write the ticks of a logarithmic y axis as 60,000 and not as a power of ten."""
    from matplotlib.ticker import NullFormatter

    low, high = axis.get_ylim()
    axis.yaxis.set_major_formatter("{x:,.6g}")
    # Over many decades the ticks between them would overlap.
    few = high / low < 30
    axis.yaxis.set_minor_formatter("{x:,.6g}" if few else NullFormatter())


def mark_switches(axis: "Axes", places: Iterable[float]) -> None:
    """Mark where dense stages begin: dotted lines, and a word at the first."""
    for number, place in enumerate(sorted(set(places))):
        axis.axvline(place, color="grey", linestyle=":", linewidth=1)
        if number == 0:
            axis.annotate("dense from here ", (place, 0.02), xycoords=("data", "axes fraction"),
                          ha="right", va="bottom", fontsize=8, color="grey")  # fmt: skip


def colours(count: int) -> Sequence[Any]:
    """Colours for ``count`` lines; they repeat after twenty."""
    import matplotlib

    palette = matplotlib.color_sequences["tab10" if count <= 10 else "tab20"]
    return [palette[number % len(palette)] for number in range(count)]


def run_styles(names: list[str]) -> dict[str, tuple[Any, str]]:
    """Colour and marker of each checkpoint; runs that differ in their seed share the colour."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r",seed=\d+", "", name), []).append(name)
    # The palette begins with the colours of dense and of Lighthouse.
    free = iter(colours(len(groups) + 2)[2:])
    found = {}
    for group, members in groups.items():
        colour = DENSE if group.startswith("dense") else next(free)
        found |= {name: (colour, "os^Dv*"[n % 6]) for n, name in enumerate(members)}
    return found
