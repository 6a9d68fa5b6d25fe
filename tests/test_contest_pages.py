"""The numbers on pages of contests are those of their records."""

import math
import re
import shutil
import statistics
from pathlib import Path

import pandas
import pytest
from contest_records import between, check_steps, difference, results_of, with_half
from pages import DOCS, words

from torchtitan.models.llama3_lighthouse.studies.contest_report import report
from torchtitan.models.llama3_lighthouse.studies.contest_statistics import t_interval

RETURNED = "repeated/16384/loss"
FOLDER = DOCS / "studies/results/contest_distance_17m"


@pytest.mark.parametrize("folder", sorted(DOCS.glob("studies/results/contest_*")),
                         ids=lambda folder: folder.name)  # fmt: skip
def test_reports_are_those_of_their_records(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.*"):
        shutil.copy(path, tmp_path)
    report(results_of(folder.name.removeprefix("contest_")).contest, tmp_path, plots=False)
    assert (tmp_path / "results.md").read_text() == (folder / "results.md").read_text()


def test_page_of_the_contest_on_books_is_its_record() -> None:
    results, page = results_of("books_17m"), words(DOCS / "studies/recipes.md")
    for arm in results.contest.arms:
        values = [results.value(arm, seed, "loss") for seed in results.contest.seeds]
        (row,) = re.findall(rf"\| `{arm}` \|(?:[^|]*\|){{2}} ([^|]*) \| ([^|]*)\|", page)
        assert row[0] == with_half(values)
        seconds = results.runs[results.runs.arm == arm]["GPU seconds"].mean()
        assert row[1].strip() == ("" if math.isnan(seconds) else f"{seconds:.1f}")
    for arm, control, words_before in (
        ("recommended", "short_to_long_30", ""),
        ("recommended", "dense", ""),
        ("published", "random", "ends "),
    ):
        mean, low, high = difference("books_17m", arm, control, "loss")
        assert f"{words_before}{abs(mean):.3f} nats {between(low, high)}" in page
    mean, low, high = difference("books_17m", "recommended", "window", "loss")
    assert f"({-mean:.3f} below; {-low:.3f} below to {high:.3f} above)" in page
    far = [name for name in results.measures if re.fullmatch(r"repeated/\d+", name)]
    gains = [results.value(arm, seed, name) for name in far
             for arm in results.contest.arms for seed in results.contest.seeds]  # fmt: skip
    means = [statistics.fmean(gains[n : n + 6]) for n in range(0, len(gains), 6)]
    assert len(means) == 36 and max(map(abs, means)) < 0.0015
    context = [name for name in results.measures if re.fullmatch(r"beyond/\d+", name)]
    means += [statistics.fmean(results.value(arm, seed, name) for seed in results.contest.seeds)
              for name in context for arm in results.contest.arms]  # fmt: skip
    assert len(means) == 54 and max(means) < 0.01 and "No arm gains 0.01 nats" in page
    worth = {arm: statistics.fmean(results.value(arm, seed, "beyond/1024")
             for seed in results.contest.seeds) for arm in results.contest.arms}  # fmt: skip
    assert f"That of `window_tail_5` falls by {-worth.pop('window_tail_5'):.3f}" in page
    assert (
        f"rises by {max(worth.values()):.3f} nats at most" in page and min(worth.values()) > -0.01
    )
    # An arm that was not timed: by the times of the other contest, scaled by the window's and not.
    elsewhere, window = results_of("distance_17m").times, results.times["window"]
    steps, lag = elsewhere["lighthouse"]["1 lighthouse"], elsewhere["window"]["1 lighthouse"]
    assert f"takes {1000 * steps:.1f} ms, and one" in page and f"alone {1000 * lag:.1f} ms" in page
    assert f"latter takes {1000 * window['1 lighthouse']:.1f} ms here" in page
    seconds = [525 * each + 75 * window["2 dense"]
               for each in (steps * window["1 lighthouse"] / lag, steps)]  # fmt: skip
    assert "take {:.0f} to {:.0f} seconds".format(*seconds) in page


def test_page_of_the_contest_of_distance_is_its_record() -> None:
    results, page = results_of("distance_17m"), words(DOCS / "studies/distance.md")
    seeds, runs = results.contest.seeds, results.runs

    def values(arm: str, measure: str) -> list[float]:
        return [results.value(arm, seed, measure) for seed in seeds]

    rows = re.findall(r"\| `(\w+)` \|" + r" ([^|]*) \|" * 8, page)
    assert len(rows) == len(results.contest.arms) == 6
    means = {arm: statistics.fmean(values(arm, RETURNED)) for arm, *_ in rows}
    assert list(means) == sorted(means, key=means.__getitem__)
    for arm, trained, tokens, rate, returned, gain, loss, seconds, dense in rows:
        check_steps(results, arm, trained, tokens, seconds, dense)
        assert {float(rate)} == {*runs[runs.arm == arm].rate}
        assert returned == with_half(values(arm, RETURNED))
        assert gain == f"{statistics.fmean(values(arm, 'repeated/16384')):.3f}"
        assert loss == with_half(values(arm, "loss"))
    for arm, control, measure, verb in (
        ("lighthouse", "dense", RETURNED, "is behind: "),
        ("lighthouse", "short_then_long", RETURNED, "dense training and "),
        ("lighthouse", "window", RETURNED, "It is "),
        ("lighthouse", "published", RETURNED, "a window of 256 alone and "),
        ("lighthouse_half", "lighthouse", RETURNED, "lowers the measure by "),
        ("lighthouse_half", "short_then_long", "loss", "`lighthouse_half` ends "),
    ):
        mean, low, high = difference("distance_17m", arm, control, measure)
        assert f"{verb}{abs(mean):.3f} nats {between(low, high)}" in page
    mean, low, high = difference("distance_17m", "lighthouse_half", "short_then_long", RETURNED)
    assert f"({-mean:.3f} below; {-low:.3f} below to {high:.3f} above)" in page
    # Not among the comparisons of the file, so its interval stands by itself.
    gaps = results.differences("lighthouse_half", "dense", RETURNED)
    found = t_interval(gaps, 0.95)
    assert found.low is not None and found.high is not None
    assert f"{-found.mean:.3f} below ({-found.low:.3f} below to {found.high:.3f} above)" in page
    assert f"{statistics.fmean(gaps[1:]):.3f} above without seed 1" in page
    for control in ("dense", "short_then_long"):
        gaps = results.differences("lighthouse", control, RETURNED)
        assert f"{statistics.fmean([gaps[2], gaps[3], gaps[5]]):.3f} above `{control}`" in page
    chosen = runs[(runs.arm == "published") & (runs.stage == "seeds")].rate
    assert set(chosen) == {min(results.contest.arms["published"].rates)}
    shares = [statistics.fmean(values(arm, "retrieval/passkey/32768")) for arm in means]
    assert "`dense` finds 31%, `short_then_long` 25%, `lighthouse_half` 24%" in page
    assert [f"{x:.0%}" for x in shares] == ["24%", "31%", "25%", "13%", "12%", "12%"]
    assert max(statistics.fmean(values(arm, "beyond/8192")) for arm in means) < 0.011
    # Rates are those of the seeds that chose them.
    rates = pandas.read_csv(FOLDER / "measures.csv").query("stage == 'rates' and measure == 'loss'")
    losses = rates.groupby(["arm", "rate", "seed"]).value.mean()
    gaps = losses["lighthouse_half"] - losses["short_then_long"]
    assert f"from {-gaps.min():.3f} below to {gaps.max():.3f} above" in page
    means = losses.groupby(["arm", "rate"]).mean().unstack()
    rising = [arm for arm in means.index if means.loc[arm].is_monotonic_increasing]
    assert set(means.index) - set(rising) == {"window"}
    curves = pandas.read_csv(FOLDER / "curves.csv").query("stage == 'seeds' and seed == 2")
    first = curves[curves.step == 1].set_index("arm").validation
    assert f"`lighthouse` in seed 2 is {first['lighthouse']:.3f}" in page
    assert f"that of `lighthouse_half` {first['lighthouse_half']:.3f}" in page


def test_page_of_the_headline_is_its_record() -> None:
    results, page = results_of("headline_270m_98k"), words(DOCS / "studies/headline.md")
    runs = results.runs.set_index("arm")
    rows = re.findall(r"\| `(\w+)` \|" + r" ([^|]*) \|" * 8, page)
    assert {arm for arm, *_ in rows} == set(runs.index) and len(rows) == 4
    for arm, trained, tokens, loss, returned, near, far, seconds, dense in rows:
        check_steps(results, arm, trained, tokens, seconds, dense, digits=0)
        measures = ("loss", "repeated/65536/loss", "repeated/8192", "repeated/65536")
        values = [round(results.value(arm, 1, measure), 3) for measure in measures]
        assert [float(loss), float(returned), float(near), float(far)] == values
    ours, primary = "short_to_lighthouse", "repeated/65536/loss"
    for arm, control, measure, before, after in (
        (
            "short_to_long",
            ours,
            primary,
            "`short_to_long`, is ",
            " below `short_to_lighthouse` and ",
        ),
        ("short_to_long", "dense", primary, "below `short_to_lighthouse` and ", " below dense"),
        (ours, "dense", primary, "window of 256 alone. It is ", " below dense"),
        (ours, "short_to_window", primary, "`short_to_lighthouse`, is ", " above the same recipe"),
        (ours, "short_to_long", "loss", "`short_to_lighthouse` is ", " above `short_to_long`"),
        (ours, "short_to_window", "loss", "`short_to_long`, ", " above `short_to_window`"),
        (ours, "dense", "loss", "`short_to_window`, and ", " below `dense`"),
    ):
        found = results.over_documents(arm, control, measure)
        assert f"{before}{abs(found.mean):.3f} nats {between(found.low, found.high)}{after}" in page
    below, above, long = (
        results.at_equal_time(ours, control)[0]
        for control in ("dense", "short_to_window", "short_to_long")
    )
    assert f"is {-below:.3f} nats below `dense` in held-out loss, {above:.3f} above" in page
    assert f"`short_to_window`, and {long:.3f} above `short_to_long`" in page
    assert runs.tokens["short_to_lighthouse"] / runs.tokens["dense"] > 4
    # The loss over time.
    curves = results.curves.set_index(["arm", "step"]).validation
    fast, last = curves["short_to_lighthouse"], curves["dense"].iloc[-1]
    after = (fast < last).idxmax()
    before, second = fast.loc[:after].index[-2], results.times["short_to_lighthouse"]["1 dense"]
    step = before + (after - before) * (fast[before] - last) / (fast[before] - fast[after])
    assert f"held-out loss, {last:.3f}, after some {round(step * second, -1):.0f} seconds" in page
    assert f"it is {fast[600]:.3f} before Lighthouse" in page
    assert f"{fast[920]:.3f} after {920 - 624} of its steps, and {fast[1040]:.3f}" in page
    assert f"do not train on until {round(624 * second, -1):.0f} seconds" in page
    # Three arms train alike in their first stage.
    window, long = curves["short_to_window"], curves["short_to_long"]
    alike = pandas.concat([fast, window, long], axis=1).loc[40:600]
    assert f"up to {(alike.max(axis=1) - alike.min(axis=1)).max():.3f} nats there, but" in page
    both = (fast - window).loc[[680, 720]]
    assert both.abs().max() < 0.003 and "At steps 680 and 720, when the window's arm" in page
    assert f"it is {window[640]:.3f} before the window, and {window[1080]:.3f} at the end" in page
    assert f"it is {long[880]:.3f} before the long steps, and {long[1000]:.3f} at the end" in page
    # One arm copies, another begins to use distance, and none finds what the others do not.
    training = results.curves.set_index(["arm", "step"])["training loss"]
    before, after = training["short_to_long"][[640, 720]]
    assert f"falls from {before:.3f} at steps 601 to 640 to {after:.3f} at steps 681 to 720" in page
    window_before = training["short_to_window"][640]
    assert f"the window's arm, alike but for rounding, has {window_before:.3f}" in page
    for distance, words_between in (
        (32768, "{:.3f}, and {:.3f} if another passage stood there before"),
        (65536, "these are {:.3f} and {:.3f}."),
    ):
        loss, control = (
            results.value("short_to_long", 1, f"repeated/{distance}/{name}")
            for name in ("loss", "control")
        )
        assert words_between.format(loss, control) in page
    arms = "short_to_long", "short_to_window", "dense", ours
    _, window, _, lighthouse = (results.value(arm, 1, "repeated/8192") for arm in arms)
    assert f"after 8,192 tokens gain {window:.3f} nats in the one" in page and lighthouse < 0.001
    long, window, dense, lighthouse = (results.value(arm, 1, "beyond/1024") for arm in arms)
    assert f"by {long:.3f} nats in `short_to_long`, by {window:.3f} in the window's arm" in page
    assert f"and by {dense:.3f} in `dense`" in page
    assert f"In Lighthouse's it raises the loss by {-lighthouse:.3f} nats" in page
    near, whole = (
        results.value("short_to_lighthouse", 1, name) - results.value("short_to_window", 1, name)
        for name in ("context/1024", "context/full")
    )
    assert f"{near:.3f} nats apart on the same targets with 1,024 tokens of context" in page
    assert f"and {whole:.3f} with all" in page
    retrieval = [name for name in results.measures if name.startswith("retrieval/")]
    shares = [[results.value(arm, 1, name) for name in retrieval] for arm in runs.index]
    assert shares == [shares[0]] * 4 and (min(shares[0]), max(shares[0])) == (0, 0.15)
