"""Tables and verdicts of a contest, drawn from its CSV files."""

import statistics
from pathlib import Path
from typing import Any

from ..evaluation.held_out_loss import Estimate
from ..evaluation.tables import Row, markdown, write_csv
from .contest_data import GPU_SECONDS, spreads_in_words
from .contest_file import RETRIEVAL, VALIDATION, Contest
from .contest_plots import PLOTS
from .contest_results import Results
from .contest_statistics import in_words, judge, t_interval

RESULTS, COMPARISONS = "results.md", "comparisons.csv"
EQUAL_TIME = f"{VALIDATION}, equal time"
NOTES = """
Differences are arm minus control, paired by seed. `t` is the interval by Student's t over seeds,
for all comparisons together in the primary measure and 95% in the others. `bootstrap` is that over
held-out documents, with these seeds held fixed: 95%, too narrow below about 30 documents, and no
part of a verdict.

GPU seconds are those of the steps alone, each at the median of its kind in runs that shared no GPU
with others of this contest; compilation, validation and checkpoints are left out. Equal time:
held-out loss where the faster of two runs ends, on a straight line between two validations of the
other, which has not decayed its learning rate there.
"""


def report(contest: Contest, output: Path, plots: bool) -> str:
    """Write results.md and comparisons.csv, draw the plots, and return the verdicts in words."""
    results = Results(contest, output)
    # The primary measure and those a reader asks for first; comparisons.csv has all of them.
    arms = [_arm_row(results, arm) for arm in contest.arms if results.seeds(arm, VALIDATION)]
    rows, words = [], []
    for arm, control in contest.compare:
        gaps, wanted = results.differences(arm, control, contest.primary), len(contest.seeds)
        if len(gaps) < wanted:
            # A look before the end is no test by the rule.
            words.append(
                f"{arm} against {control}: no verdict, as {len(gaps)} of {wanted} seeds have "
                "finished in both."
            )
        else:
            words.append(in_words(contest, arm, control, judge(contest, gaps)))
        for measure in results.measures:
            if gaps := results.differences(arm, control, measure):
                estimate = t_interval(gaps, results.level(measure))
                documents = results.over_documents(arm, control, measure)
                rows.append(_difference_row(arm, control, measure, len(gaps), estimate, documents))
        if equal := results.at_equal_time(arm, control):
            estimate = t_interval(equal, 0.95)
            rows.append(_difference_row(arm, control, EQUAL_TIME, len(equal), estimate, None))
    if rows:
        write_csv(rows, output / COMPARISONS)
    verdict = "\n".join(f"- {each}" for each in words)
    first = {contest.primary, VALIDATION, EQUAL_TIME, "loss"}
    short = [row for row in rows if row["measure"] in first or _is_longest(results, row)]
    columns = list(dict.fromkeys(key for row in arms for key in row))
    text = f"# {contest.path.name}\n\nSHA-256 of the file and its base: {contest.digest}\n\n"
    if start := contest.start:
        steps = start.settings["training.steps"]
        text += f"All arms begin from the weights of {steps:,} steps at rate {start.rate:g}. "
        text += "Tokens and seconds below leave these steps out.\n\n"
        text += starts_apart(results)
    text += revisions(results) + taken(results)
    text += f"{verdict}\n\n{markdown(arms, columns)}{NOTES}\n{times_unknown(results)}"
    text += times_unsteady(results)
    text += markdown(short, list(rows[0])) if rows else ""
    (output / RESULTS).write_text(text)
    if plots and arms:
        for name, plot in PLOTS.items():
            plot(results, output / name)
    return verdict


def starts_apart(results: Results) -> str:
    """A paragraph about seeds whose runs began from several trainings of their start, if any."""
    if "start" not in results.runs:
        return ""
    counts = results.runs.groupby("seed").start.nunique()
    if not (seeds := [str(seed) for seed, count in counts.items() if count > 1]):
        return ""
    return (
        f"Runs of seed {', '.join(seeds)} began from several trainings of their start, which are "
        "different models on GPUs. The column `start` of runs.csv tells them apart.\n\n"
    )


def revisions(results: Results) -> str:
    """A paragraph with the git revisions at which runs trained, as far as they are recorded."""
    if "revision" not in results.all_runs:
        return ""
    known = results.all_runs.revision.dropna()
    names = dict.fromkeys(name for each in known for name in each.split())
    text = f"Runs trained at revision {', '.join(names)}"
    if len(names) > 1:
        text += "; the column `revision` of runs.csv tells them apart"
    if unknown := len(results.all_runs) - len(known):
        text += f"; it was not recorded for {unknown} of {len(results.all_runs)}"
    return f"{text}.\n\n"


def taken(results: Results) -> str:
    """A paragraph about runs that were taken from earlier contests, if any."""
    if "taken from" not in results.all_runs:
        return ""
    counts = results.all_runs["taken from"].value_counts(sort=False)
    listed = ", ".join(f"{count} from {name}" for name, count in counts.items())
    return (
        f"Runs taken from earlier contests: {listed}; the column `taken from` of runs.csv names "
        "them.\n\n"
    )


def times_unknown(results: Results) -> str:
    """A paragraph about runs whose GPU seconds are unknown, if any."""
    lines = []
    for arm in results.contest.arms:
        number, kinds = results.untimed(arm)
        if number:
            shown = " and ".join(f"`{kind}`" for kind in kinds)
            lines.append(
                f"GPU seconds are unknown for {number} of {sum(results.runs.arm == arm)} runs of "
                f"{arm}, as too few steps of kind {shown} were timed; equal time leaves them out.\n"
            )
    return "".join(lines) + "\n" if lines else ""


def times_unsteady(results: Results) -> str:
    """A paragraph about arms that were timed beside another process, as it seems, if any."""
    lines = [
        f"The median of timed steps of {arm} of {spreads_in_words(kinds)} above their lower "
        "quartile. Another process may have used the GPU then, so its runs may have less time than "
        "the table says.\n"
        for arm, kinds in results.unsteady.items()
        if arm in results.contest.arms
    ]
    return "".join(lines) + "\n" if lines else ""


def _is_longest(results: Results, row: Row) -> bool:
    """Whether a row is of retrieval at the longest length."""
    name, _, length = row["measure"].rpartition("/")
    lengths = [int(each.rpartition("/")[2]) for each in results.measures
               if each.rpartition("/")[0] == name and name.startswith(RETRIEVAL)]  # fmt: skip
    return bool(lengths) and int(length) == max(lengths)


def _arm_row(results: Results, arm: str) -> Row:
    runs = results.runs[results.runs.arm == arm]
    tried = sorted(results.all_runs[results.all_runs.arm == arm].rate.unique())
    row: dict[str, Any] = {
        "arm": arm,
        "rate": f"{runs.rate.iloc[0]:g}",
        "tried": f"{tried[0]:g} to {tried[-1]:g}",
        "seeds": len(runs),
    }
    row["tokens"] = round(runs.tokens.mean())
    if runs[GPU_SECONDS].notna().all():
        row[GPU_SECONDS] = float(runs[GPU_SECONDS].mean())
    for measure in dict.fromkeys((results.contest.primary, VALIDATION)):
        if seeds := results.seeds(arm, measure):
            row[measure] = statistics.fmean(results.value(arm, seed, measure) for seed in seeds)
    return row


def _difference_row(
    arm: str, control: str, measure: str, seeds: int, found: Estimate, documents: Estimate | None
) -> Row:
    return {
        "arm": arm, "control": control, "measure": measure, "seeds": seeds,
        "difference": found.mean, "t, low": found.low, "t, high": found.high,
        "bootstrap, low": documents.low if documents else None,
        "bootstrap, high": documents.high if documents else None,
    }  # fmt: skip
