"""Tables and plots of a sweep, from what every run logged; see run_ablations.py."""

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lighthouse.geometry import PyramidGeometry

from ..model.model import lighthouse_config
from ..stages import stage_at
from .sweeps import Run, read_metrics, value_of

LOSS, THROUGHPUT = "loss_metrics/global_avg_loss", "throughput(tps)"
HELD_OUT_LOSS = "validation_metrics/loss"
MEMORY, STAGE = "memory/max_reserved(GiB)", "lighthouse/stage"
# Of all logged steps, the share at a stage's end that its loss is the mean of.
FINAL_SHARE = 0.1
# Log lines of a stage that may hold compilation, kernels' and graphs'.
WARMUP_LINES = 2
# Runs of one plot that get colours of their own before markers have to tell them apart.
MARKERS = "osD^vP*X<>"


def summarise(run: Run, keys: Iterable[str]) -> dict[str, Any]:
    """A row of the table; losses in nats per token, memory and tokens/s for each device.

    Args:
        keys: section.key of every setting that the table shows.
    """
    steps = read_metrics(run.folder)
    trained = [entry for entry in steps.values() if LOSS in entry]
    lighthouse = [entry for entry in trained if entry[STAGE]]
    dense = [entry for entry in trained if not entry[STAGE]]
    section = run.config.lighthouse
    # In the Lighthouse stage some steps may be dense.
    dense_stage = [
        entry
        for step, entry in steps.items()
        if LOSS in entry and stage_at(step, section.stage, section.dense_from_step) == "dense"
    ]

    row: dict[str, Any] = {"run": run.name}
    for key in keys:
        # What selects is of no account where nothing was selected.
        idle = not lighthouse and key.startswith("lighthouse.") and key not in run.settings
        row[key] = None if idle else value_of(run.config, key)
    final = max(1, round(FINAL_SHARE * len(trained)))
    held_out = [entry[HELD_OUT_LOSS] for entry in steps.values() if HELD_OUT_LOSS in entry]
    row["final loss"] = _mean_loss((dense_stage or lighthouse)[-final:])
    row["held-out loss"] = held_out[-1] if held_out else None
    row["loss, Lighthouse stage"] = _mean_loss(lighthouse[-final:])
    speeds = {name: _speed(entries) for name, entries in
              (("Lighthouse", lighthouse), ("dense", dense))}  # fmt: skip
    shares = [(len(entries), _speed(entries)) for entries in (lighthouse, dense) if entries]
    row["tokens/s"] = round(len(trained) / sum(count / speed for count, speed in shares))
    for name, speed in speeds.items():
        row[f"tokens/s, {name}"] = round(speed) if speed else None
    row["peak memory, GiB"] = max(entry[MEMORY] for entry in trained)
    row["S"] = row["N/S"] = None
    if lighthouse:
        n = run.config.training.seq_len
        row["S"] = PyramidGeometry(lighthouse_config(run.config.lighthouse), n).gathered_length
        row["N/S"] = n / row["S"]
    return row | _last_selections(steps)


def _mean_loss(entries: list[dict[str, float]]) -> float | None:
    return statistics.fmean(entry[LOSS] for entry in entries) if entries else None


def _speed(entries: list[dict[str, float]]) -> float | None:
    """Median tokens per second of a stage, warm."""
    entries = entries[WARMUP_LINES:] or entries
    return statistics.median(entry[THROUGHPUT] for entry in entries) if entries else None


def _last_selections(steps: dict[int, dict[str, float]]) -> dict[str, float]:
    """ "NAME, level L" to the last value that was logged of it."""
    last = {}
    for entry in steps.values():
        for key, value in entry.items():
            if key.startswith("selection/"):
                _, level, name = key.split("/")
                last[f"{name.replace('_', ' ')}, {level.replace('_', ' ')}"] = value
    return dict(sorted(last.items()))


def write_tables(rows: list[dict[str, Any]], output: Path) -> None:
    """results.csv and results.md; columns that no run fills are left out."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    with (output / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    selections = [c for c in columns if ", level " in c]
    text = markdown(rows, [c for c in columns if c not in selections])
    selected = [row for row in rows if any(row.get(c) is not None for c in selections)]
    if selected:
        text += "\nSelections, when last recorded:\n\n" + markdown(selected, ["run", *selections])
    (output / "results.md").write_text(text)


def markdown(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """A table of some columns of the rows."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return "" if value is None else str(value)

    lines = [[column.removeprefix("lighthouse.") for column in columns], ["---"] * len(columns)]
    lines += [[cell(row.get(column)) for column in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def plot(runs: list[Run], rows: list[dict[str, Any]], output: Path) -> None:
    """loss_curves.png, and loss_and_throughput.png: final loss over the speed of the whole run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("tab10" if len(runs) <= 10 else "tab20").colors
    styles = [(colours[i % len(colours)], MARKERS[i % len(MARKERS)]) for i in range(len(runs))]

    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    _plot_curves(axis, runs, rows, styles)
    _finish(figure, axis, output / "loss_curves.png")
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    held_out = all(row.get("held-out loss") is not None for row in rows)
    key = "held-out loss" if held_out else "final loss"
    for row, (colour, marker) in zip(rows, styles, strict=True):
        axis.scatter(row["tokens/s"], row[key], color=colour, marker=marker, s=70, label=row["run"])
    axis.set(xlabel="tokens/s on each device, both stages", ylabel=f"{key}, nats per token")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    _finish(figure, axis, output / "loss_and_throughput.png")
    plt.close(figure)


def _plot_curves(axis, runs, rows, styles) -> None:
    switches, early, late = set(), [], []
    for run, (colour, _) in zip(runs, styles, strict=True):
        points = {s: entry[LOSS] for s, entry in read_metrics(run.folder).items() if LOSS in entry}
        losses = list(points.values())
        width = max(1, len(losses) // 50)
        smooth = [statistics.fmean(losses[max(0, end - width) : end])
                  for end in range(1, len(losses) + 1)]  # fmt: skip
        axis.plot(list(points), smooth, color=colour, label=run.name, linewidth=1.3)
        section = run.config.lighthouse
        if section.stage == "auto" and 0 < section.dense_from_step < run.config.training.steps:
            switches.add(section.dense_from_step)
        early.append(smooth[len(smooth) // 3])
        late.append(min(smooth))
    # The fall of the first steps would flatten all that tells runs apart.
    margin = 0.1 * (max(early) - min(late))
    axis.set_ylim(min(late) - margin, max(early) + margin)
    for step in switches:
        axis.axvline(step + 0.5, color="grey", linestyle=":", linewidth=1)
    switch = f"; dense after {', '.join(f'{step:,}' for step in sorted(switches))}"
    axis.set(xlabel=f"step{switch if switches else ''}",
             ylabel="training loss, nats per token, moving mean")  # fmt: skip


def _finish(figure, axis, path: Path) -> None:
    axis.grid(alpha=0.3)
    entries = len(axis.get_legend_handles_labels()[0])
    figure.legend(loc="outside right upper", fontsize=8, ncols=1 + entries // 25)
    figure.savefig(path, dpi=120)
