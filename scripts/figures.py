#!/usr/bin/env python3
"""Draw every figure of the docs anew from its record.

    python scripts/figures.py

Records are the JSON and CSV files below docs/. --output FOLDER draws into another folder, in the
same places. Needs matplotlib (.venv/bin/pip install -e '.[trainer,plots]').
"""

import argparse
import csv
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "scripts/benchmarks"))

import attention  # noqa: E402
import context_parallel_plots  # noqa: E402
import training_results  # noqa: E402

from torchtitan.models.llama3_lighthouse.evaluation import (  # noqa: E402
    loss_report,
    retrieval_report,
)
from torchtitan.models.llama3_lighthouse.evaluation.figures import (  # noqa: E402
    DENSE,
    LIGHTHOUSE,
    WINDOW,
    colours,
    length_axis,
    mark_switches,
    new_figure,
    save,
)
from torchtitan.models.llama3_lighthouse.evaluation.retrieval_accuracy import Cell  # noqa: E402
from torchtitan.models.llama3_lighthouse.studies import (  # noqa: E402
    ablation_results,
    contest_plots,
    recovery_plots,
)
from torchtitan.models.llama3_lighthouse.studies.contest_file import read_contest  # noqa: E402
from torchtitan.models.llama3_lighthouse.studies.contest_results import Results  # noqa: E402
from torchtitan.models.llama3_lighthouse.studies.recovery_plots import Line  # noqa: E402

Rows = list[dict[str, Any]]
STUDIES = DOCS / "studies/results"
LOSS = "held-out loss, nats per token"
SKIPS = "tab:green"
# Arms of the study of learning rates: in its record, in the legend, colour and marker.
ARMS = (
    ("dense", "dense", DENSE, "o"),
    ("Lighthouse to 1,500, then dense", "Lighthouse, then dense", LIGHTHOUSE, "s"),
)

# Arms of the contest of distance as the README names them, by the colour of their first attention.
RECIPES = {
    "dense": ("dense", DENSE),
    "short_then_long": ("short sequences first", DENSE),
    "lighthouse_half": ("Lighthouse, half dense", LIGHTHOUSE),
    "lighthouse": ("Lighthouse, an eighth dense", LIGHTHOUSE),
    "window": ("window of 256", WINDOW),
    "published": ("published selection", LIGHTHOUSE),
}
# Arms of the contests at several lengths: name, colour, and style of the line.
ARMS_OF_TREND = {
    "dense": ("dense", DENSE, "o-"),
    "short_then_long": ("short sequences first", DENSE, "^--"),
    "lighthouse_half": ("Lighthouse, half dense", LIGHTHOUSE, "s-"),
    "skip_then_long": ("short first, positions skip", SKIPS, "D-"),
    "skip_mostly": ("the same, 5% at full length", SKIPS, "v--"),
}
# Arms of the contests of YaRN, as above; the last were not trained.
UNTRAINED = "YaRN alone"
UNDER_YARN = {
    "short_then_long": ("short first, YaRN", DENSE, "^--"),
    "lighthouse_half": ("Lighthouse, half dense, YaRN", LIGHTHOUSE, "s-"),
    "dense": ("dense, YaRN", DENSE, "o-"),
    "skip_then_long": ("positions skip, YaRN", SKIPS, "D-"),
}
NOT_TRAINED = {UNTRAINED: ("YaRN alone, not trained", "grey", "x--")}
ARMS_OF_SCALING = {
    "scaling_17m_98k": {"skip_then_long": ("positions skip, no YaRN", SKIPS, "v:")}
    | {f"scaled_{arm}": style for arm, style in UNDER_YARN.items()}
    | NOT_TRAINED,
    "scaling_17m_32k": UNDER_YARN
    | {"lighthouse_half": ("Lighthouse, half dense, YaRN,\nin less time", LIGHTHOUSE, "s-")}
    | NOT_TRAINED,
}
# Contests of these arms: size, sequence length, and number of seeds.
TREND = {
    "trend_17m_16k": ("17M", 16384, "two seeds"),
    "distance_skips_17m": ("17M", 32768, "six seeds"),
    "trend_17m_98k": ("17M", 98304, "one seed"),
    "trend_50m_32k": ("50M", 32768, "one seed"),
}


def read_json(name: str) -> Any:
    return json.loads((DOCS / "benchmarks" / name).read_text())


def read_csv(name: str) -> Rows:
    """Rows of a record of a study; whatever is a number becomes one, and an empty cell None."""

    def value(cell: str) -> Any:
        try:
            return float(cell)
        except ValueError:
            return cell or None

    with (STUDIES / name).open() as file:
        return [{key: value(cell) for key, cell in row.items()} for row in csv.DictReader(file)]


def benchmark(name: str, plot: Callable[[dict[str, Any], Path], None]) -> Callable[[Path], None]:
    """The figure of a benchmark's record."""
    return lambda path: plot(read_json(f"{name}.json"), path)


def at_rates(axis: Any) -> None:
    """Held-out loss at the end over the learning rate, one seed, and a second one where it ran."""
    rows = [row for row in read_csv("learning_rates/held_out.csv") if row["step"] == 2400]
    for arm, name, colour, marker in ARMS:
        for seed, style in ((0, f"{marker}-"), (1, marker)):
            points = sorted(
                (row["learning_rate"], row["held_out_loss"])
                for row in rows
                if (row["arm"], row["seed"]) == (arm, seed)
            )
            if points:
                filled = colour if seed == 0 else "none"
                axis.plot(*zip(*points, strict=True), style, color=colour, markerfacecolor=filled,
                          label=f"{name}, seed {seed}")  # fmt: skip
    rates = sorted({row["learning_rate"] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="learning rate", ylabel=f"{LOSS}, at the end")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def learning_rates(path: Path) -> None:
    """Held-out loss over the learning rate, and over steps at the best one."""
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    at_rates(left)
    for arm, name, colour, marker in ARMS:
        for seed, filled in ((0, colour), (1, "none")):
            points = [(row["step"], row["held_out_loss"])
                      for row in read_csv("learning_rates/held_out.csv")
                      if (row["arm"], row["seed"], row["learning_rate"]) == (arm, seed, 1e-3)
                      and row["step"] >= 300]  # fmt: skip
            if points:
                right.plot(*zip(*points, strict=True), f"{marker}-", color=colour, markersize=4,
                           markerfacecolor=filled, label=f"{name}, seed {seed}")  # fmt: skip
    mark_switches(right, [1500])
    right.set(xlabel="step of 32,768 tokens, learning rate 0.001", ylabel=LOSS)
    right.grid(alpha=0.3)
    right.legend(fontsize=8, loc="upper right")
    save(figure, path)


def overview(path: Path) -> None:
    """The README's figure: speed over the length, and loss of returning passages by recipe."""
    (run,) = [run for run in read_json("training_98k.json") if run["config"] == "270m_98k.toml"]
    figure = new_figure(11, 6.4)
    grid = figure.add_gridspec(2, 2)
    left, upper, lower = map(figure.add_subplot, (grid[:, 0], grid[0, 1], grid[1, 1]))
    speed: dict[str, dict[int, float]] = {}
    for stage, name, colour, style in (("lighthouse", "Lighthouse stage", LIGHTHOUSE, "s-"),
                                       ("dense", "dense", DENSE, "o-")):  # fmt: skip
        # Lighthouse as configured, and dense training in its fastest mode of checkpointing.
        modes = {stage: run["records"][0]["mode"], "dense": None}
        records = [r for r in run["records"] if r["stage"] == stage]
        speed[stage] = {
            n: max(r["tokens/s"] for r in records
                   if r["N"] == n and r["mode"] == (modes[stage] or r["mode"]))
            for n in {r["N"] for r in records}
        }  # fmt: skip
        left.plot(*zip(*sorted(speed[stage].items()), strict=True), style, color=colour, label=name)
    ratio = {n: speed["lighthouse"][n] / speed["dense"][n] for n in sorted(speed["dense"])}
    whole = {n: speed["dense"][n] / (0.625 / r + 0.375) for n, r in ratio.items()}
    left.plot(*zip(*whole.items(), strict=True), "--", color=LIGHTHOUSE,
              label="whole run: 10k of 16k steps\nin the Lighthouse stage (computed)")  # fmt: skip
    for n in ratio:
        offset = (8, -3) if n == max(ratio) else (-8, 8)
        for y in (speed["lighthouse"][n], whole[n]):
            text = f"{y / speed['dense'][n]:.1f}x"
            left.annotate(text, (n, y), offset, textcoords="offset points")
    length_axis(left, ratio)
    left.set(xlabel="sequence length, tokens", ylabel="tokens/s, 268M model, one H200")
    left.set(xlim=(27_000, 130_000), ylim=(0, 245_000))
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc="upper left")
    contest_plots.by_arm(upper, contest_results("distance_17m"), RECIPES)
    upper.set(xlabel="first contest: loss of passages that return after 16,384\n"
                     "tokens, nats per token; lower is better; 17M model")  # fmt: skip
    passages_with_yarn(lower, "scaling_17m_98k")
    lower.set_ylabel("loss of passages, nats")
    save(figure, path)


def trend(path: Path) -> None:
    """Loss of returning passages over the distance, a panel for each length and size."""
    figure = new_figure(12, 4.2)
    axes = figure.subplots(1, len(TREND), sharey=True)
    for axis, (each, (size, length, seeds)) in zip(axes, TREND.items(), strict=True):
        lines = contest_plots.distance_lines(contest_results(each))
        for arm, x, estimates in lines:
            name, colour, style = ARMS_OF_TREND[arm]
            axis.plot(x, [each.mean for each in estimates], style, color=colour, markersize=4,
                      linewidth=1, label=name)  # fmt: skip
        length_axis(axis, [place for _, x, _ in lines for place in x])
        axis.set_title(f"{size}, {length:,} tokens, {seeds}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(contest_plots.RETURNED)
    figure.supxlabel(contest_plots.DISTANCE, fontsize=10)
    handles, names = axes[2].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=8)
    save(figure, path)


def measured_with_yarn(name: str, measure: str) -> dict[str, list[float]]:
    """A measure of each arm of a contest of YaRN, by seed."""
    results = contest_results(name)
    found = {arm: [results.value(arm, seed, measure) for seed in results.seeds(arm, measure)]
             for arm in results.contest.arms}  # fmt: skip
    by_seed: dict[float, list[float]] = {}
    for row in read_csv(f"contest_{name}/untrained.csv"):
        if row["measure"] == measure and row["scaling"].startswith("yarn"):
            by_seed.setdefault(row["seed"], []).append(row["value"])
    return found | {UNTRAINED: [*map(statistics.fmean, by_seed.values())]}


def passages_with_yarn(axis: Any, contest: str) -> None:
    """Loss of returning passages over the distance."""
    lines = contest_plots.distance_lines(contest_results(contest))
    lengths = sorted({int(length) for _, x, _ in lines for length in x})
    by_length = [measured_with_yarn(contest, f"repeated/{length}/loss") for length in lengths]
    for arm, (name, colour, style) in ARMS_OF_SCALING[contest].items():
        values = [each[arm] for each in by_length]
        axis.plot(lengths, [*map(statistics.fmean, values)], style, color=colour, label=name,
                  markersize=5, linewidth=1)  # fmt: skip
        for length, each in zip(lengths, values, strict=True):
            axis.plot([length] * len(each), each, style[0], color=colour, markersize=4,
                      fillstyle="none")  # fmt: skip
    length_axis(axis, lengths)
    axis.set(xlabel=contest_plots.DISTANCE, ylabel=contest_plots.RETURNED)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def scaling(contest: str, tokens: int) -> Callable[[Path], None]:
    """Loss of returning passages over the distance, and of plain books, under YaRN.

    Args:
        tokens: length of the sequences.
    """

    def draw(path: Path) -> None:
        arms = ARMS_OF_SCALING[contest]
        figure = new_figure(11, 4.2)
        left, right = figure.subplots(1, 2)
        passages_with_yarn(left, contest)
        books = measured_with_yarn(contest, "loss")
        for place, (arm, (_, colour, style)) in enumerate(arms.items()):
            right.plot(books[arm], [place] * len(books[arm]), style[0], color=colour,
                       fillstyle="none")  # fmt: skip
            right.plot(statistics.fmean(books[arm]), place, "|", color=colour, markersize=16)
        right.set_yticks(range(len(arms)), [name for name, *_ in arms.values()], fontsize=8)
        right.invert_yaxis()
        right.set(xlabel=f"loss of plain books in {tokens:,} tokens, nats per token")
        right.grid(alpha=0.3)
        save(figure, path)

    return draw


def name_of(run: str) -> str:
    """The name in a figure of a run in a record."""
    if run.startswith("lighthouse_to"):
        return recovery_plots.LIGHTHOUSE_STAGE
    if run.startswith("dense,steps="):
        return f"dense, {run.rpartition('=')[2]} steps"
    return run.replace("=", " ")


def recovery_lines(study: str, tokens: int, switches: dict[str, int]) -> list[Line]:
    """The held-out losses of a study by ``tokens`` a step, in the lines that its plots draw.

    Args:
        switches: last Lighthouse step of each split.
    """
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in read_csv(f"{study}/held_out.csv"):
        run, seed = str(row["run"]), row.get("seed")
        if seed is None and ", seed " in run:
            run, _, seed = run.rpartition(", seed ")
        if "every" in run:
            continue
        name, step, key = name_of(run), int(row["step"]), int(seed or 0)
        # One study's record has the Lighthouse stage in the rows of its splits.
        in_stage = step <= switches.get(name, 0)
        if in_stage and name != max(switches, key=switches.__getitem__):
            continue
        name = recovery_plots.LIGHTHOUSE_STAGE if in_stage else name
        found.setdefault((name, key), []).append((step * tokens / 1e6, row["held-out loss"]))
    lines = []
    for (name, seed), points in found.items():
        x, values = zip(*sorted(set(points)), strict=True)
        lines.append(Line(name, seed, list(x), list(values)))
    return sorted(lines, key=lambda line: (line.name != "dense", line.name, line.seed))


def over_tokens(study: str, tokens: int, switches: dict[str, int]) -> Callable[[Path], None]:
    """Held-out loss over tokens."""
    return lambda path: recovery_plots.draw(
        path,
        recovery_lines(study, tokens, switches),
        "Held-out loss",
        (recovery_plots.TOKENS, recovery_plots.LOSS),
        [step * tokens / 1e6 for step in switches.values()],
    )


def minus_dense(study: str, tokens: int, switches: dict[str, int]) -> Callable[[Path], None]:
    """Held-out loss less that of dense training at equal tokens."""

    def draw(path: Path) -> None:
        lines = recovery_lines(study, tokens, switches)
        dense = {line.seed: dict(zip(line.x, line.values, strict=True))
                 for line in lines if line.name == "dense"}  # fmt: skip
        gaps = [
            Line(line.name, line.seed, [x for x in line.x if x in dense[line.seed]],
                 [y - dense[line.seed][x] for x, y in zip(line.x, line.values, strict=True)
                  if x in dense[line.seed]])
            for line in lines if not line.name.startswith("dense, ")
        ]  # fmt: skip
        labels = (recovery_plots.TOKENS, "nats per token")
        places = [step * tokens / 1e6 for step in switches.values()]
        recovery_plots.draw(path, gaps, recovery_plots.MINUS_DENSE, labels, places)

    return draw


def losses_by_context(path: Path) -> None:
    loss_report.plot(read_csv("recovery_books_2400/losses.csv"), path)


def selection(path: Path) -> None:
    """Held-out loss over steps at two lengths, both under the attention of the stage."""
    figure = new_figure(12, 5.0)
    axes = figure.subplots(1, 2)
    for axis, length, switch in zip(axes, ("16k", "32k"), (150, 550), strict=True):
        rows = [
            row for row in read_csv(f"selection_books/held_out_{length}.csv") if row["step"] > 1
        ]
        runs = list(dict.fromkeys(str(row["run"]) for row in rows))
        kinds = list(dict.fromkeys(run.partition(", seed")[0] for run in runs))
        free = iter(colours(10)[2:])
        colour_of: dict[str, Any] = {}
        for kind in kinds:
            if kind.startswith("dense"):
                colour_of[kind] = DENSE
            else:
                colour_of[kind] = LIGHTHOUSE if "finest" in kind else next(free)
        for run in runs:
            kind, _, seed = run.partition(", seed ")
            points = [(row["step"], row["held-out loss"]) for row in rows if row["run"] == run]
            style = "s--" if seed == "1" or kind.endswith("k = 256") else "o-"
            axis.plot(*zip(*points, strict=True), style, label=run, color=colour_of[kind],
                      markersize=3, linewidth=1)  # fmt: skip
        mark_switches(axis, [switch])
        axis.set(xlabel=f"step, {length.upper()} tokens a sequence", ylabel=LOSS)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save(figure, path)


def passkeys(path: Path) -> None:
    """Accuracy over depth and length, of the six models of start 1."""
    found: dict[str, retrieval_report.Evaluated] = {}
    for row in read_csv("passkey_16k/passkey.csv"):
        if row["start"] != 1:
            continue
        name = str(row["run"])
        length, own = int(row["length"]), int(row["sequence_length"])
        each = found.setdefault(name, retrieval_report.Evaluated(name, path, None, None, 16384))
        each.cells.append(
            Cell("passkey", str(row["stage"]), length, length - 1.0, own, row["depth"],
                 int(row["trials"]), row["accuracy"], row["low"], row["high"], row["accuracy"], 0.1)
        )  # fmt: skip
    retrieval_report.plot(path.parent, list(found.values()), path.stem)


def neighbourhood(path: Path) -> None:
    """Held-out loss and pass keys of each arrangement of the first stage, a mark for each seed."""
    from matplotlib.lines import Line2D

    rows = [row for row in read_csv("neighbourhood/seeds.csv") if row["tail"] == 0.125]
    arms = list(dict.fromkeys(str(row["arm"]) for row in rows))
    colour_of = {"dense": DENSE, "merged": LIGHTHOUSE, "window": WINDOW}
    marker_of = dict(enumerate(recovery_plots.MARKERS[:3]))
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, key, factor, label in (
        (left, "books", 1, "held-out loss of books, nats per byte"),
        (right, "keys 32768", 100, "pass keys found at 32,768 bytes, %"),
    ):
        for row in rows:
            arm = str(row["arm"])
            axis.plot(row[key] * factor, arms.index(arm), marker_of[int(row["seed"])],
                      color=colour_of[arm.split()[0]], markerfacecolor="none")  # fmt: skip
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    left.set_yticks(range(len(arms)), arms, fontsize=8)
    left.invert_yaxis()
    seeds = [Line2D([], [], color="black", linestyle="", marker=marker, markerfacecolor="none",
                    label=f"seed {seed}") for seed, marker in marker_of.items()]  # fmt: skip
    right.legend(handles=seeds, fontsize=8)
    save(figure, path)


def contest_results(name: str) -> Results:
    """The records of a contest in train_configs/contests."""
    file = ROOT / f"train_configs/contests/{name}.toml"
    return Results(read_contest(file), STUDIES / f"contest_{name}")


def contest(name: str, plot: Callable[[Results, Path], None]) -> Callable[[Path], None]:
    """A figure of a contest's records."""
    return lambda path: plot(contest_results(name), path)


def copying(path: Path) -> None:
    """What a model makes of passages that return, over the tokens that it was trained on."""
    rows = read_csv("copying_17m/training.csv")
    runs = list(dict.fromkeys(str(row["run"]) for row in rows))
    figure = new_figure(9, 4.2)
    axis = figure.subplots()
    for run, colour, marker in zip(runs, colours(len(runs)), MARKS, strict=True):
        points = [(row["tokens"] / 1e6, row["gain"]) for row in rows if row["run"] == run]
        axis.plot(*zip(*points, strict=True), f"{marker}-", label=run, color=colour, markersize=3,
                  linewidth=1)  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="million tokens of training", ylabel="gain, nats per returned token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save(figure, path)


def extension(path: Path) -> None:
    """Held-out loss by position: of scalings before any training, and of extended models."""
    scalings = read_csv("extension_17m/scalings.csv")
    trained = read_csv("extension_17m/distance.csv")
    # The last row of each scaling is the loss of whole sequences.
    left = [(row["scaling"], row["context to"], row["loss"], row) for row in scalings
            if row["context from"] != 1 or row["context to"] == 256]  # fmt: skip
    right = [(row["checkpoint"], row["tokens"], row["value"], row) for row in trained
             if row["measure"] == "position"]  # fmt: skip
    # A model has the same colour on both sides.
    number = {"none": 0, "before": 0, "yarn factor=24": 1, "yarn": 1, "base 8,000,000": 2}
    number |= {"linear factor=24": 3, "extended": 4, "dense": 5}
    figure = new_figure(9, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, points in zip(axes, (left, right), strict=True):
        for name in dict.fromkeys(point[0] for point in points):
            own = [point[1:] for point in points if point[0] == name]
            tokens, losses, rows = zip(*own, strict=True)
            colour, marker = colours(len(MARKS))[number[name]], MARKS[number[name]]
            label = "YaRN alone" if name == "yarn" else name
            axis.plot(tokens, losses, f"{marker}-", label=label, color=colour, markersize=3)
            bounds = ([row[end] for row in rows] for end in ("low", "high"))
            axis.fill_between(tokens, *bounds, color=colour, alpha=0.15, linewidth=0)
        length_axis(axis, sorted({point[1] for point in points}))
        axis.set_xlabel("tokens of context, up to")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set(ylabel=LOSS, title="scalings, not trained")
    axes[1].set_title("before and after training")
    save(figure, path)


def ablations(path: Path) -> None:
    ablation_results.plot_speed(read_csv("ablations_books_16k/results.csv"), path)


MARKS = "os^vDx"
LONG, SHORT = {"split 0.625": 1500, "split 0.75": 1800}, {"split 0.625": 550, "split 0.75": 660}
FIGURES: dict[str, Callable[[Path], None]] = {
    "overview.png": overview,
    "benchmarks/attention.png": benchmark("attention", attention.plot),
    "benchmarks/training.png": benchmark("training", training_results.plot),
    "benchmarks/context_parallel.png": benchmark("context_parallel", context_parallel_plots.plot),
    "studies/results/learning_rates/held_out.png": learning_rates,
    "studies/results/recovery_books_2400/minus_dense.png": minus_dense(
        "recovery_books_2400", 32768, LONG
    ),
    "studies/results/recovery_books_2400/loss_over_tokens.png": over_tokens(
        "recovery_books_2400", 32768, LONG
    ),
    "studies/results/recovery_books_2400/losses.png": losses_by_context,
    "studies/results/recovery_books/loss_over_tokens.png": over_tokens(
        "recovery_books", 65536, SHORT
    ),
    "studies/results/recovery_books_17m/loss_over_tokens.png": over_tokens(
        "recovery_books_17m", 65536, SHORT
    ),
    "studies/results/selection_books/held_out.png": selection,
    "studies/results/passkey_16k/passkey.png": passkeys,
    "studies/results/neighbourhood/seeds.png": neighbourhood,
    "studies/results/contest_books_17m/primary.png": contest("books_17m", contest_plots.primary),
    "studies/results/contest_books_17m/loss_by_position.png": contest(
        "books_17m", contest_plots.by_position
    ),
    "studies/results/contest_books_17m/loss_over_time.png": contest(
        "books_17m", contest_plots.over_time
    ),
    "studies/results/contest_distance_17m/primary.png": contest(
        "distance_17m", contest_plots.primary
    ),
    "studies/results/contest_distance_17m/loss_over_time.png": contest(
        "distance_17m", contest_plots.over_time
    ),
    "studies/results/contest_distance_17m/loss_over_distance.png": contest(
        "distance_17m", contest_plots.by_distance
    ),
    "studies/results/contest_distance_skips_17m/primary.png": contest(
        "distance_skips_17m", contest_plots.primary
    ),
    "studies/results/contest_distance_skips_17m/loss_over_time.png": contest(
        "distance_skips_17m", contest_plots.over_time
    ),
    "studies/results/contest_distance_skips_17m/loss_over_distance.png": contest(
        "distance_skips_17m", contest_plots.by_distance
    ),
    "studies/results/contest_trend_17m_98k/loss_over_time.png": contest(
        "trend_17m_98k", contest_plots.over_time
    ),
    "studies/results/contest_trend_17m_98k/trend.png": trend,
    "studies/results/contest_scaling_17m_98k/scaling.png": scaling("scaling_17m_98k", 98304),
    "studies/results/contest_scaling_17m_32k/scaling.png": scaling("scaling_17m_32k", 32768),
    "studies/results/contest_headline_270m_98k/loss_over_time.png": contest(
        "headline_270m_98k", contest_plots.over_time
    ),
    "studies/results/contest_headline_270m_98k/loss_over_distance.png": contest(
        "headline_270m_98k", contest_plots.by_distance
    ),
    "studies/results/contest_documents_17m/primary.png": contest(
        "documents_17m", contest_plots.primary
    ),
    "studies/results/contest_documents_17m/loss_by_position.png": contest(
        "documents_17m", contest_plots.by_position
    ),
    "studies/results/copying_17m/training.png": copying,
    "studies/results/extension_17m/extension.png": extension,
    "studies/results/ablations_books_16k/loss_and_throughput.png": ablations,
}


def draw_all(output: Path, names: Iterable[str] = FIGURES) -> None:
    """Draw the figures into ``output``, in the places that they have below docs/."""
    for name in names:
        print(f"{output / name}", flush=True)
        FIGURES[name](output / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS, metavar="FOLDER",
                        help="folder to draw into; default: docs")  # fmt: skip
    options = parser.parse_args()
    if not importlib.util.find_spec("matplotlib"):
        parser.error("figures need matplotlib: .venv/bin/pip install -e '.[trainer,plots]'")
    draw_all(options.output)


if __name__ == "__main__":
    main()
