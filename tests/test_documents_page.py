"""The numbers on the page about document masks are those of the contest's record."""

import json
import math
import re
import statistics
from collections import Counter

import pandas
from contest_records import between, difference, results_of, with_half
from pages import DOCS, words
from scipy import stats

from torchtitan.models.llama3_lighthouse.studies.contest_data import read_times
from torchtitan.models.llama3_lighthouse.studies.contest_statistics import (
    NO_DIFFERENCE,
    judge,
    t_interval,
)

CONTEST = "documents_17m"
FOLDER = DOCS / f"studies/results/contest_{CONTEST}"
PAGE = words(DOCS / "studies/documents.md")
ARMS = ("dense", "lighthouse")


def around_zero(low: float, high: float) -> str:
    """An interval with zero in it, of an arm that is below its control in the mean."""
    assert low < 0 < high
    return f"({-low:.3f} below to {high:.3f} above)"


def table(first: str) -> dict[str, list[str]]:
    """Rows of the table whose head begins with ``first``, by their first cell."""
    lines = (DOCS / "studies/documents.md").read_text().splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def test_no_comparison_is_resolved() -> None:
    contest = results_of(CONTEST).contest
    for arm, control in contest.compare:
        verdict = judge(contest, results_of(CONTEST).differences(arm, control, "loss"))
        assert verdict.word == NO_DIFFERENCE and not verdict.equal
        mean, low, high = difference(CONTEST, arm, control, "loss")
        assert f"{-mean:.3f} nats below" in PAGE and around_zero(low, high) in PAGE
    assert "Nothing is resolved." in PAGE
    assert contest.margin == 0.01 and "The margin is 0.01" in PAGE
    halves = [(high - low) / 2 for _, low, high in
              (difference(CONTEST, *pair, "loss") for pair in contest.compare)]  # fmt: skip
    assert "{:.3f}, {:.3f} and {:.3f} nats here".format(*halves) in PAGE
    level = results_of(CONTEST).level("loss")
    factor = stats.t.ppf((1 + level) / 2, len(contest.seeds) - 1)
    assert f"reaches {factor:.1f} standard errors" in PAGE
    alone = t_interval(results_of(CONTEST).differences("dense_masked", "dense", "loss"), 0.95)
    assert alone.low is not None and alone.high is not None
    assert f"would lie {-alone.low:.3f} to {-alone.high:.3f} below that of `dense`" in PAGE


def test_page_says_the_verdicts_in_their_order() -> None:
    sentences = (
        ("dense_masked", "dense", "Dense training with masks ends {} nats below dense training "
         "without them, and the interval is wide {}."),
        ("lighthouse_masked", "lighthouse",
         "Lighthouse with masks ends {} nats below Lighthouse without them {}."),
        ("lighthouse_masked", "dense_masked",
         "With masks in both, Lighthouse ends {} nats below dense training {}."),
    )  # fmt: skip
    assert [pair[:2] for pair in sentences] == results_of(CONTEST).contest.compare
    for arm, control, sentence in sentences:
        mean, low, high = difference(CONTEST, arm, control, "loss")
        assert sentence.format(f"{-mean:.3f}", around_zero(low, high)) in PAGE


def test_table_of_arms_is_the_record() -> None:
    results, rows = results_of(CONTEST), table("arm")
    assert [name.strip("`") for name in rows] == list(results.contest.arms)
    runs = results.runs
    for name, (_, tried, rate, loss) in rows.items():
        arm = name.strip("`")
        values = [results.value(arm, seed, "loss") for seed in results.contest.seeds]
        assert loss == with_half(values)
        assert {float(rate)} == set(runs[runs.arm == arm].rate)
        rates = results.contest.arms[arm].rates
        assert [float(end) for end in tried.split(" to ")] == [min(rates), max(rates)]
        assert set(runs[runs.arm == arm].tokens) == {9_830_400}
    assert "9.8 million tokens" in PAGE
    measured = results.values["dense", 1, "loss"]
    assert f"each of {len(measured)} held-out files" in PAGE


def test_loss_by_position_is_the_record() -> None:
    results, rows = results_of(CONTEST), table("tokens of context")
    ends = [int(name.rpartition("/")[2]) for name in results.measures if "position" in name]
    names = [f"{begin + 1:,} to {end:,}" for begin, end in zip([0, *ends], ends, strict=False)]
    assert list(rows) == names
    gaps: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
    for cells, end in zip(rows.values(), ends, strict=True):
        expected = []
        for arm in ARMS:
            for name in (arm, f"{arm}_masked"):
                values = [results.value(name, s, f"position/{end}") for s in results.contest.seeds]
                expected.append(f"{statistics.fmean(values):.3f}")
            mean, low, high = difference(CONTEST, f"{arm}_masked", arm, f"position/{end}")
            gaps[arm].append((mean, low, high))
            expected.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        assert cells == expected
    assert all(mean < 0 for found in gaps.values() for mean, *_ in found)
    outside = {arm: sum(high < 0 for *_, high in found) for arm, found in gaps.items()}
    assert outside == {"dense": 5, "lighthouse": 0} and len(ends) == 7
    assert "Five of seven exclude zero in dense training, and none under Lighthouse" in PAGE


def test_rates_are_those_of_the_seed_that_chose() -> None:
    rows = pandas.read_csv(FOLDER / "measures.csv").query("stage == 'rates' and measure == 'loss'")
    losses = rows.groupby(["arm", "rate"]).value.mean()
    dense = losses["dense"]
    assert dense.idxmin() == min(results_of(CONTEST).contest.arms["dense"].rates) == 5e-4
    assert f"chosen by {dense[5e-4]:.3f} against {dense[1e-3]:.3f} at 1e-3" in PAGE
    for arm, sentence in (
        ("dense", "by {:.3f}, {:.3f} and {:.3f} nats in dense training"),
        ("lighthouse", "by {:.3f}, {:.3f} and {:.3f} under Lighthouse"),
    ):
        assert sentence.format(*(losses[arm] - losses[f"{arm}_masked"])) in PAGE


def test_documents_of_the_runs_are_counted() -> None:
    counts = pandas.read_csv(FOLDER / "documents.csv").query("stage == 'seeds'")
    runs = counts.groupby(["arm", "seed"])[["steps", "documents", "padding"]].sum()
    assert (runs.steps == 600).all() and len(runs) == 6
    each = (runs.documents / runs.steps).groupby("arm").mean()
    assert all(f"has {value:.1f} on average" in PAGE for value in each)
    padding = (runs.padding / runs.steps / 16384).groupby("arm").mean()
    assert padding["dense_masked"] == 0
    assert f"takes {padding['lighthouse_masked']:.2%} of the positions" in PAGE
    one = counts.groupby(["arm", "kind"])[["steps of one document", "steps"]].sum()
    assert (one["steps of one document"] / one.steps).between(0.49, 0.51).all()
    assert "So do half of [the runs']" in PAGE
    of_runs: Counter[tuple[str, int]] = Counter()
    masked = results_of(CONTEST).runs.query("arm.str.endswith('_masked')")
    for arm, seed, steps in zip(masked.arm, masked.seed, masked["steps by kind"], strict=True):
        for kind, number in json.loads(steps).items():
            of_runs[arm, seed] += number * kind.endswith(", one document")
    assert counts.groupby(["arm", "seed"])["steps of one document"].sum().to_dict() == of_runs


def test_times_are_the_record() -> None:
    times = read_times(FOLDER)
    places = (("dense{}", "1 dense"), ("lighthouse{}", "1 lighthouse"), ("lighthouse{}", "2 dense"))
    for name, masked, documents in (
        ("without masks", "", ""),
        ("with masks, one document in the sequence", "_masked", ", one document"),
        ("with masks, several documents", "_masked", ", several documents"),
    ):
        found = [times[arm.format(masked)][kind + documents] for arm, kind in places]
        assert table("ms a step")[name] == [f"{1000 * each:.1f}" for each in found]
    # The contest took the medians of the timed steps.
    timed = pandas.read_csv(FOLDER / "timed_steps.csv")
    assert (timed.groupby(["arm", "kind"]).size() == 40).all()
    timed["kind"] += [
        "" if math.isnan(number) else f", {'several documents' if number > 1 else 'one document'}"
        for number in timed.documents
    ]
    for (arm, kind), seconds in timed.groupby(["arm", "kind"])["GPU seconds"].median().items():
        assert abs(seconds - times[arm].pop(kind)) < 1e-6
    assert not any(times.values())
    seconds = results_of(CONTEST).runs.groupby("arm")["GPU seconds"].mean()
    masked = [f"{arm}_masked" for arm in ARMS]
    assert (
        "a run of `dense_masked` takes {:.1f} s and one of `lighthouse_masked` {:.1f} s, "
        "against {:.1f} s and {:.1f} s without masks"
    ).format(*seconds[[*masked, *ARMS]]) in PAGE


def test_losses_at_equal_time_are_the_record() -> None:
    shown = []
    for arm in ARMS:
        found = t_interval(results_of(CONTEST).at_equal_time(f"{arm}_masked", arm), 0.95)
        assert found.low is not None and found.high is not None
        shown.append(f"{found.mean:.3f} nats {between(found.low, found.high)}")
    assert (
        "of `dense_masked` is {} above that of `dense`, and that of `lighthouse_masked` {} above "
        "that of `lighthouse`"
    ).format(*shown) in PAGE


def test_page_names_where_the_contest_ran() -> None:
    record = json.loads((FOLDER / "contest.json").read_text())["environment"]
    assert record["GPU"] == "NVIDIA H200" and "alone on an H200" in PAGE
    assert f"at revision {record['revision']}" in PAGE
    assert f"standard library of Python {record['python']}" in PAGE


def test_nothing_is_gained_from_afar() -> None:
    results = results_of(CONTEST)
    far = [name for name in results.measures if re.fullmatch(r"(beyond|repeated)/\d+", name)]
    means = [statistics.fmean(results.value(arm, seed, name) for seed in results.contest.seeds)
             for name in far for arm in results.contest.arms]  # fmt: skip
    assert len(means) == 24 and max(means) < 0.002
    assert "No arm's mean gains 0.002 nats from context beyond 1,024 tokens" in PAGE
