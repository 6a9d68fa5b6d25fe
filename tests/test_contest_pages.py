"""The numbers on pages of contests are those of their records."""

import json
import math
import re
import statistics

from contest_records import between, difference, results_of, with_half
from pages import DOCS, words

RETURNED = "repeated/16384/loss"


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


def test_page_of_the_contest_of_distance_is_its_record() -> None:
    results, page = results_of("distance_17m"), words(DOCS / "studies/distance.md")
    seeds, runs = results.contest.seeds, results.runs

    def values(arm: str, measure: str) -> list[float]:
        return [results.value(arm, seed, measure) for seed in seeds]

    rows = re.findall(r"\| `(\w+)` \|" + r" ([^|]*) \|" * 7, page)
    assert len(rows) == len(results.contest.arms) == 6
    means = {arm: statistics.fmean(values(arm, RETURNED)) for arm, *_ in rows}
    assert list(means) == sorted(means, key=means.__getitem__)
    for arm, trained, tokens, rate, returned, gain, loss, seconds in rows:
        own = runs[(runs.arm == arm) & (runs.stage == "seeds")]
        assert tokens == f"{own.tokens.iloc[0] / 1e6:.1f}M"
        assert float(rate) == own.rate.iloc[0]
        steps = json.loads(own["steps by kind"].iloc[0]).values()
        assert [int(x) for x in re.findall(r"(?:^|then )(\d+)", trained)] == list(steps)
        assert returned == with_half(values(arm, RETURNED))
        assert gain == f"{statistics.fmean(values(arm, 'repeated/16384')):.3f}"
        assert loss == with_half(values(arm, "loss"))
        assert seconds == f"{own['GPU seconds'].mean():.1f}"
    for arm, control, measure, verb in (
        ("lighthouse", "dense", RETURNED, "is behind: "),
        ("lighthouse", "short_then_long", RETURNED, "dense training and "),
        ("lighthouse", "window", RETURNED, "It is "),
        ("lighthouse", "published", RETURNED, "a window alone and "),
        ("lighthouse_half", "lighthouse", RETURNED, "lowers the measure by "),
        ("lighthouse_half", "short_then_long", "loss", "Its held-out loss is "),
    ):
        mean, low, high = difference("distance_17m", arm, control, measure)
        assert f"{verb}{abs(mean):.3f} nats {between(low, high)}" in page
    mean, low, high = difference("distance_17m", "lighthouse_half", "short_then_long", RETURNED)
    assert f"({-mean:.3f} below; {-low:.3f} below to {high:.3f} above)" in page
    ahead = results.differences("lighthouse_half", "short_then_long", "loss")
    assert len(ahead) == 6 and max(ahead) < 0
    half = "lighthouse_half"
    mean, low, high = difference("distance_17m", half, "dense", "loss")
    assert f"{-mean:.3f} below ({-low:.3f} below to {high:.3f} above)" in page
    chosen = runs[(runs.arm == "published") & (runs.stage == "seeds")].rate
    assert set(chosen) == {min(results.contest.arms["published"].rates)}
    found = [statistics.fmean(values(arm, "retrieval/passkey/32768")) for arm in means]
    assert "`dense` finds 31%, `short_then_long` 25%, `lighthouse_half` 24%" in page
    assert [f"{x:.0%}" for x in found] == ["24%", "31%", "25%", "13%", "12%", "12%"]
    assert max(statistics.fmean(values(arm, "beyond/8192")) for arm in means) < 0.011
