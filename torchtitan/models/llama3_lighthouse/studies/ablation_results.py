"""Tables and plots of the runs of a grid, from what every run logged."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighthouse.geometry import PyramidGeometry

from ..evaluation.figures import DENSE, colours, mark_switches, new_figure, save
from ..evaluation.tables import Row, columns_of, markdown, write_csv
from ..metrics import HELD_OUT_LOSS, LOSS, MEMORY, THROUGHPUT, UNDER_LIGHTHOUSE
from ..model.model import selecting_config
from ..stages import stage_at, stages_of
from .settings import value_of
from .sweeps import Run, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The final loss is the mean over this share of all logged steps.
FINAL_SHARE = 0.1
# The first lines that an attention logs: their time may include the compilation of its kernels.
WARMUP_LINES = 2
# Markers tell runs of one plot apart once their colours repeat.
MARKERS = "osD^vP*X<>"


def summarise(run: Run, keys: Iterable[str]) -> Row:
    """A row of the table; losses in nats per token, memory and tokens/s for each device.

    Args:
        keys: section.key of every setting that the table shows.
    """
    steps = read_metrics(run.folder)
    trained = [entry for entry in steps.values() if LOSS in entry]
    lighthouse = [entry for entry in trained if entry[UNDER_LIGHTHOUSE]]
    dense = [entry for entry in trained if not entry[UNDER_LIGHTHOUSE]]
    stages = stages_of(run.config)
    # ``dense`` may also hold steps of the Lighthouse stage, which do not belong here.
    dense_stage = [
        entry
        for step, entry in steps.items()
        if LOSS in entry and stage_at(step, stages).attention == "dense"
    ]

    row: dict[str, Any] = {"run": run.name}
    for key in keys:
        # The settings of selection mean nothing where nothing was selected.
        idle = not lighthouse and key.startswith("lighthouse.") and key not in run.settings
        row[key] = None if idle else value_of(run.config, key)
    final = max(1, round(FINAL_SHARE * len(trained)))
    held_out = [entry[HELD_OUT_LOSS] for entry in steps.values() if HELD_OUT_LOSS in entry]
    row["final loss"] = _mean_loss((dense_stage or lighthouse)[-final:])
    row["held-out loss"] = held_out[-1] if held_out else None
    row["loss, Lighthouse stage"] = _mean_loss(lighthouse[-final:])
    kinds = {"Lighthouse": lighthouse, "dense": dense}
    speeds = {name: _speed(entries) for name, entries in kinds.items() if entries}
    row["tokens/s"] = round(
        len(trained) / sum(len(kinds[name]) / speed for name, speed in speeds.items())
    )
    for name in kinds:
        row[f"tokens/s, {name}"] = round(speeds[name]) if name in speeds else None
    row["peak memory, GiB"] = max(entry[MEMORY] for entry in trained)
    row["S"] = row["N/S"] = None
    selecting = next((each for each in stages if each.attention == "lighthouse"), stages[0])
    if lighthouse and (method := selecting_config(selecting.config.lighthouse)):
        n = selecting.seq_len
        row["S"] = PyramidGeometry(method, n).gathered_length
        row["N/S"] = n / row["S"]
    return row | _last_selections(steps)


def _mean_loss(entries: list[dict[str, float]]) -> float | None:
    return statistics.fmean(entry[LOSS] for entry in entries) if entries else None


def _speed(entries: list[dict[str, float]]) -> float:
    """Median tokens per second, without the first lines."""
    entries = entries[WARMUP_LINES:] or entries
    return statistics.median(entry[THROUGHPUT] for entry in entries)


def _last_selections(steps: dict[int, dict[str, float]]) -> dict[str, float]:
    """Map "NAME, level L" to the last value that was logged."""
    last = {}
    for entry in steps.values():
        for key, value in entry.items():
            if key.startswith("selection/"):
                _, level, name = key.split("/")
                last[f"{name.replace('_', ' ')}, {level.replace('_', ' ')}"] = value
    return dict(sorted(last.items()))


def write_tables(rows: list[Row], output: Path) -> None:
    """Write results.csv and results.md; columns that no run fills are left out."""
    columns = [c for c in columns_of(rows) if any(row.get(c) is not None for row in rows)]
    write_csv(rows, output / "results.csv", columns)
    selections = [c for c in columns if ", level " in c]
    text = markdown(rows, [c for c in columns if c not in selections])
    selected = [row for row in rows if any(row.get(c) is not None for c in selections)]
    if selected:
        text += "\nSelections, when last recorded:\n\n" + markdown(selected, ["run", *selections])
    (output / "results.md").write_text(text)


def plot(runs: list[Run], rows: list[Row], output: Path) -> None:
    """Draw loss_curves.png, and loss_and_throughput.png: final loss over the whole run's speed."""
    figure = new_figure()
    axis = figure.subplots()
    _plot_curves(axis, runs, _styles(len(runs)))
    _finish(figure, axis, output / "loss_curves.png")
    plot_speed(rows, output / "loss_and_throughput.png")


def plot_speed(rows: list[Row], path: Path) -> None:
    """Draw the final loss over the speed, a dot for each run."""
    figure = new_figure()
    axis = figure.subplots()
    held_out = all(row.get("held-out loss") is not None for row in rows)
    key = "held-out loss" if held_out else "final loss"
    for row, (free, marker) in zip(rows, _styles(len(rows)), strict=True):
        dense = row.get("lighthouse.dense_from_step") == 0
        colour = DENSE if dense else free
        axis.scatter(row["tokens/s"], row[key], color=colour, marker=marker, s=70, label=row["run"])
    axis.set(xlabel="tokens/s on each device, both stages", ylabel=f"{key}, nats per token")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    _finish(figure, axis, path)


def _styles(count: int) -> list[tuple[Any, str]]:
    markers = [MARKERS[number % len(MARKERS)] for number in range(count)]
    # The palette begins with the colour of dense.
    return list(zip(colours(count + 1)[1:], markers, strict=True))


def _plot_curves(axis: "Axes", runs: list[Run], styles: Sequence[tuple[Any, str]]) -> None:
    switches: set[int] = set()
    shown = []
    for run, (colour, _) in zip(runs, styles, strict=True):
        points = {s: entry[LOSS] for s, entry in read_metrics(run.folder).items() if LOSS in entry}
        losses = list(points.values())
        width = max(1, len(losses) // 50)
        smooth = [statistics.fmean(losses[max(0, end - width) : end])
                  for end in range(1, len(losses) + 1)]  # fmt: skip
        axis.plot(list(points), smooth, color=colour, label=run.name, linewidth=1.3)
        switches |= {stage.last for stage in stages_of(run.config)[:-1]}
        # With the steep fall of the first steps in view, the runs would look alike.
        shown += smooth[len(smooth) // 3 :]
    margin = 0.1 * (max(shown) - min(shown)) + 1e-6
    axis.set_ylim(min(shown) - margin, max(shown) + margin)
    mark_switches(axis, [step + 0.5 for step in switches])
    axis.set(xlabel="step", ylabel="training loss, nats per token, moving mean")


def _finish(figure: "Figure", axis: "Axes", path: Path) -> None:
    axis.grid(alpha=0.3)
    entries = len(axis.get_legend_handles_labels()[0])
    figure.legend(loc="outside right upper", fontsize=8, ncols=1 + entries // 25)
    save(figure, path)
