"""The numbers on the page of the contests at several lengths are those of their records."""

import itertools
import json
import re
import statistics

import pytest
from contest_records import between, results_of, untrained_by_seed
from pages import DOCS, words

from torchtitan.models.llama3_lighthouse.studies.contest_results import Results

PAGE = words(DOCS / "studies/trend.md")
NAMES = ("trend_17m_16k", "distance_skips_17m", "trend_17m_98k", "trend_50m_32k")
RESULTS = [results_of(name) for name in NAMES]
SHORT, MIDDLE, LONG, LARGER = RESULTS
OURS, MOSTLY, RIVALS = (
    "skip_then_long",
    "skip_mostly",
    ("dense", "short_then_long", "lighthouse_half"),
)
FAR = "repeated/65536/loss"


def mean(results: Results, arm: str, measure: str) -> float:
    return statistics.fmean(
        results.value(arm, seed, measure) for seed in results.seeds(arm, measure)
    )


def cells(row: str) -> list[str]:
    """The cells of a row of the tables that have a column for each contest."""
    lines = (DOCS / "studies/trend.md").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith(f"| {row} |") and line.count("|") == 6]
    return [cell.strip() for cell in found.split("|")[2:-1]]


def over_books(results: Results, arm: str, control: str, measure: str) -> tuple[float, ...]:
    found = results.over_documents(arm, control, measure)
    assert found and found.low is not None and found.high is not None
    return found.mean, found.low, found.high


def spread(values: list[float], digits: int = 3) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


@pytest.mark.parametrize("arm", [*RIVALS, OURS, MOSTLY])
def test_losses_of_passages(arm: str) -> None:
    shown = [f"{mean(each, arm, each.contest.primary):.3f}" if arm in each.contest.arms else ""
             for each in RESULTS]  # fmt: skip
    assert cells(f"`{arm}`") == shown


def test_what_was_measured_where() -> None:
    distances = [each.contest.primary.split("/")[1] for each in RESULTS]
    assert [cell.replace(",", "") for cell in cells("after so many tokens")] == distances
    seeds = [len(each.seeds(OURS, each.contest.primary)) for each in RESULTS]
    assert [int(cell[0]) for cell in cells("seeds")] == seeds
    some = MIDDLE.seeds(MOSTLY, MIDDLE.contest.primary)
    ours = statistics.fmean(MIDDLE.value(OURS, seed, MIDDLE.contest.primary) for seed in some)
    assert cells("seeds")[1] == f"6, `{MOSTLY}` {len(some)}, on which `{OURS}` has {ours:.3f}"
    seconds = [each.runs["GPU seconds"].dropna().tolist() for each in RESULTS]
    assert cells("GPU seconds") == [spread(each, 1) for each in seconds]


@pytest.mark.parametrize("rival", RIVALS)
def test_differences_over_books(rival: str) -> None:
    for text, measure in (("passages", ""), ("plain books", "loss")):
        shown = []
        for each in RESULTS:
            middle, *ends = over_books(each, OURS, rival, measure or each.contest.primary)
            low, high = (f"{end:.3f}" if end < 0 else f"{end:+.3f}" for end in ends)
            shown.append(f"{middle:.3f} ({low} to {high})")
        assert cells(f"`{rival}`, {text}") == shown


def test_the_outcome_in_short() -> None:
    rivals = [mean(LONG, arm, FAR) for arm in RIVALS]
    assert f"a loss of {mean(LONG, OURS, FAR):.3f} nats on passages" in PAGE
    assert f"three rivals have {spread(rivals)}" in PAGE
    leads = [
        spread([mean(each, arm, each.contest.primary) - mean(each, OURS, each.contest.primary)
                for arm in RIVALS])
        for each in RESULTS
    ]  # fmt: skip
    assert f"32,768 tokens the lead is {leads[1]} nats, and at 16,384 tokens {leads[0]}." in PAGE
    assert f"50M parameters it is {leads[3]}, within" in PAGE
    # No verdict names an arm, and no interval over the two seeds excludes zero.
    for each in (SHORT, LONG, LARGER):
        folder = DOCS / f"studies/results/contest_{each.contest.path.stem}"
        report = (folder / "results.md").read_text()
        verdicts = re.findall(r"(?m)^- \w+ against \w+: (.*?)[;,]", report)
        assert verdicts and {*verdicts} <= {"no difference shown by these seeds", "no verdict"}


def test_distances_at_full_length() -> None:
    gains = {arm: mean(LONG, arm, "repeated/65536") for arm in LONG.contest.arms}
    first, second = gains.pop(OURS), gains.pop(MOSTLY)
    assert (
        f"its loss by {first:.3f} nats with `{OURS}` and {second:.3f} with `{MOSTLY}`, and" in PAGE
    )
    assert f"by {spread([*gains.values()])} with the others" in PAGE
    order = (OURS, "lighthouse_half", "short_then_long", "dense")
    listed = [f"{mean(LONG, arm, 'repeated/32768/loss'):.3f} for `{arm}`" for arm in order]
    assert f"losses are {', '.join(listed[:3])} and {listed[3]}." in PAGE
    near = [mean(LONG, arm, "repeated/8192/loss") for arm in order]
    assert f"the four are within {max(near) - min(near):.3f} nats" in PAGE
    for measure, before in (
        (FAR, "`skip_mostly` is "),
        ("repeated/8192/loss", "after 65,536 tokens, and "),
    ):
        middle, low, high = over_books(LONG, MOSTLY, OURS, measure)
        assert f"{before}{middle:.3f} nats {between(low, high)}" in PAGE
    middle, low, high = over_books(LONG, MOSTLY, OURS, "loss")
    assert f"plain books is {-middle:.3f} nats {between(low, high)} lower" in PAGE
    middle, low, high = over_books(LONG, "lighthouse_half", "dense", "repeated/32768/loss")
    assert f"by {-middle:.3f} nats {between(low, high)}, and" in PAGE
    middle, low, high = over_books(
        LONG, "lighthouse_half", "short_then_long", "repeated/32768/loss"
    )
    assert f"by {-middle:.3f} nats {between(low, high)} after 32,768" in PAGE
    middle, low, high = over_books(LONG, "lighthouse_half", "dense", "loss")
    assert f"{-middle:.3f} nats on plain books ({-low:.3f} below to {high:.3f} above)" in PAGE


def test_gains_under_yarn_alone() -> None:
    first, second = untrained_by_seed("scaling_17m_98k", "repeated/65536")
    ours = mean(LONG, OURS, "repeated/65536")
    assert min(first, second) > ours
    assert f"gains {first:.3f} and {second:.3f} nats in two seeds" in PAGE
    assert f"`skip_then_long` gains {ours:.3f} above." in PAGE
    first, second = untrained_by_seed("scaling_17m_98k", "repeated/65536/loss")
    loss = mean(LONG, OURS, "repeated/65536/loss")
    assert (f"are {first:.3f} and {second:.3f} there, and {loss:.3f} here, so skips end lower." in
            PAGE and loss < min(first, second))  # fmt: skip


def test_steps_and_times_at_full_length() -> None:
    steps = {arm: json.loads(LONG.runs[LONG.runs.arm == arm]["steps by kind"].item())
             for arm in LONG.contest.arms}  # fmt: skip
    last = {arm: [*each.values()][-1] for arm, each in steps.items()}
    assert f"`short_then_long` has {last['short_then_long']} steps at 98,304" in PAGE
    assert f"`dense` {last['dense']}." in PAGE
    assert f"**{last[MOSTLY]} long steps were too few.**" in PAGE
    assert f"5% of its steps, and `{OURS}` has {last[OURS]}" in PAGE
    assert round(100 * last[MOSTLY] / sum(steps[MOSTLY].values())) == 5
    assert sum(steps["short_then_long"].values()) == 190
    times = {arm: 1000 * [*each.values()][-1] for arm, each in LONG.times.items()}
    assert f"{times.pop('short_then_long'):.0f} ms, where" in PAGE
    assert f"have {spread([*times.values()], 0)}." in PAGE
    curves = {arm: LONG.curve(arm, 1) for arm in LONG.contest.arms}
    seconds, loss = curves["dense"][-1]
    assert f"held-out loss of {loss:.3f} after {seconds:.1f} seconds" in PAGE
    found = {arm: next((time for time, value in curve if value <= loss), None)
             for arm, curve in curves.items()}  # fmt: skip
    assert found["short_then_long"] is None
    for arm, words_before in ((OURS, "has it after "), (MOSTLY, f"`{MOSTLY}` after "),
                              ("lighthouse_half", "`lighthouse_half` after ")):  # fmt: skip
        assert f"{words_before}{found[arm]:.1f}" in PAGE
    ratios = [f"{seconds / found[arm]:.1f}" for arm in (OURS, MOSTLY, "lighthouse_half")]
    assert "about {}, {} and {} times as fast to equal loss".format(*ratios) in PAGE
    early = [next(value for time, value in curves[arm] if time > 2.2)
             for arm in (OURS, "lighthouse_half")]  # fmt: skip
    (dense,) = [value for time, value in curves["dense"] if 25 < time < 30]
    assert max(early) < dense and "lower after 2.5 seconds" in PAGE


def test_passkeys_and_seeds() -> None:
    def share(results: Results, arm: str, length: int) -> float:
        return mean(results, arm, f"retrieval/passkey/{length}")

    at_most = {share(LONG, arm, 98304) for arm in LONG.contest.arms if arm != "short_then_long"}
    assert {f"{each:.1%}" for each in at_most} == {"7.5%"} and "all others 8%" in PAGE
    assert f"{share(LONG, 'short_then_long', 98304) + 1e-9:.0%} of 40" in PAGE
    shorter = (12288, 24576, 49152)
    for arm in ("short_then_long", "dense", OURS):
        ends = [f(100 * share(LONG, arm, n) + 0.01 for n in shorter) for f in (min, max)]
        assert re.search(rf"`{arm}`( finds)? {ends[0]:.0f}% to {ends[1]:.0f}%", PAGE)
    for results, length in ((SHORT, 16384), (LARGER, 32768)):
        others = [100 * share(results, arm, length) for arm in RIVALS]
        ours = 100 * share(results, OURS, length)
        assert re.search(
            rf"finds {ours:.0f}%,? and the others {min(others):.0f}% to {max(others):.0f}%", PAGE
        )
    gaps = [-x for x in MIDDLE.differences(OURS, "short_then_long", MIDDLE.contest.primary)]
    assert f"lies between {min(gaps):.3f} and {max(gaps):.3f} nats" in PAGE


def test_starts_and_revisions() -> None:
    starts = [
        set(zip(each.runs.seed, each.runs.start, strict=True)) for each in (SHORT, LONG, LARGER)
    ]
    assert [len(each) for each in starts] == [2, 1, 1]
    assert starts[1] < starts[0]
    assert {*itertools.chain(*(each.runs.revision for each in (SHORT, LONG, LARGER)))} == {
        "ecfc2fc"
    }
