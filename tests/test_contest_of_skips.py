"""The numbers on the page of the contest of positions that skip are those of its records."""

import json
import re
import statistics
from itertools import combinations

import pandas
from contest_records import between, check_steps, difference, results_of, with_half
from pages import DOCS, words

NAME, OURS, MOSTLY = "distance_skips_17m", "skip_then_long", "skip_mostly"
RETURNED = "repeated/16384/loss"
RESULTS, PAGE = results_of(NAME), words(DOCS / "studies/skips.md")
RUNS = RESULTS.runs


def values(arm: str, measure: str) -> list[float]:
    return [RESULTS.value(arm, seed, measure) for seed in RESULTS.seeds(arm, measure)]


def either_way(mean: float, low: float, high: float) -> str:
    return f"{-mean:.3f} nats below{{}} ({-low:.3f} below to {high:.3f} above)"


def test_table_and_verdicts() -> None:
    rows = re.findall(r"\| `(\w+)`(, seeds 1 to 3)? \|" + r" ([^|]*) \|" * 9, PAGE)
    assert {arm for arm, *_ in rows} == {*RESULTS.contest.arms} and len(rows) == 5
    for arm, some, trained, tokens, rate, returned, far, gain, loss, seconds, dense in rows:
        check_steps(RESULTS, arm, trained, tokens, seconds, dense)
        assert {float(rate)} == {*RUNS[RUNS.arm == arm].rate}
        assert RESULTS.seeds(arm, RETURNED) == ([1, 2, 3] if some else [1, 2, 3, 4, 5, 6])
        assert [returned, far, loss] == [
            with_half(values(arm, each)) for each in (RETURNED, "repeated/31744/loss", "loss")
        ]
        assert gain == f"{statistics.fmean(values(arm, 'repeated/16384')):.3f}"
    first_three = [statistics.fmean(values(arm, RETURNED)[:3]) for arm in (MOSTLY, OURS)]
    assert "`skip_mostly` has {:.3f} nats and `skip_then_long` {:.3f}.".format(*first_three) in PAGE
    for control, measure, before in (
        ("short_then_long", RETURNED, "at the end, have a loss "),
        ("dense", RETURNED, "without skips, and "),
        ("short_then_long", "repeated/31744/loss", "`skip_then_long` ends "),
        ("dense", "repeated/31744/loss", "below `short_then_long` and "),
        ("dense", "loss", "That of `skip_then_long` is "),
        ("short_then_long", "loss", "at the same rate. It is "),
    ):
        mean, low, high = difference(NAME, OURS, control, measure)
        assert mean < 0 and f"{before}{-mean:.3f} nats {between(low, high)} below" in PAGE
    mean, low, high = difference(NAME, OURS, "lighthouse_half", RETURNED)
    assert f"({-mean:.3f} below; {-low:.3f} below to {high:.3f} above)" in PAGE


def test_starts_and_single_seeds() -> None:
    # Which runs differ most, and which have a start of their own.
    for arm in RESULTS.contest.arms:
        assert max(values(arm, RETURNED)) == values(arm, RETURNED)[3 if arm != MOSTLY else -1]
    starts = RUNS.set_index(["arm", "seed"]).start
    own = {(arm, seed) for arm, seed in starts.index if starts[arm, seed] != starts[OURS, seed]}
    assert own == {*(("dense", seed) for seed in (1, 2, 3)),
                   *((arm, 2) for arm in ("short_then_long", "lighthouse_half"))}  # fmt: skip
    mean, low, high = difference(NAME, OURS, "short_then_long", RETURNED, [1, 3, 4, 5, 6])
    assert f"is {-mean:.3f} nats {between(low, high)} below `short_then_long`" in PAGE
    with_dense = either_way(*difference(NAME, OURS, "dense", RETURNED, [4, 5, 6])).format(
        " `dense`"
    )
    assert f"where both share a start, it is {with_dense}" in PAGE
    for control, crossing in (("dense", [1, 3, 4, 5, 6]), ("short_then_long", [])):
        rest = {seed: [each for each in RESULTS.contest.seeds if each != seed]
                for seed in RESULTS.contest.seeds}  # fmt: skip
        assert [
            n for n in rest if difference(NAME, OURS, control, RETURNED, rest[n])[2] > 0
        ] == crossing
    assert "If seed 1, 3, 4, 5 or 6 is left out, its interval reaches beyond zero." in PAGE


def test_arm_of_which_three_seeds_have_finished() -> None:
    found = either_way(*difference(NAME, MOSTLY, OURS, RETURNED, [1, 2, 3])).format(
        " `skip_then_long`"
    )
    assert f"it is {found}" in PAGE
    mean, low, high = difference(NAME, MOSTLY, OURS, "loss", [1, 2, 3])
    assert f"held-out loss is {-mean:.3f} nats {between(low, high)} lower" in PAGE
    steps = {arm: json.loads(RUNS[RUNS.arm == arm]["steps by kind"].iloc[0])
             for arm in (MOSTLY, OURS)}  # fmt: skip
    shares = [each["2 dense"] / sum(each.values()) for each in steps.values()]
    assert [f"{share:.0%}" for share in shares] == ["5%", "30%"]
    assert round(steps[OURS]["2 dense"] / steps[MOSTLY]["2 dense"]) == 4
    tokens = RUNS.groupby("arm").tokens.mean()
    assert f"{tokens[MOSTLY] / tokens[OURS]:.1f} times its tokens" in PAGE


def test_other_distances_and_passkeys() -> None:
    near = [statistics.fmean(values(arm, f"repeated/{distance}/loss"))
            for arm in (OURS, "lighthouse_half") for distance in (4096, 8192)]  # fmt: skip
    listed = "`skip_then_long` has {:.3f} and {:.3f} nats, and `lighthouse_half` {:.3f} and {:.3f}"
    assert listed.format(*near) in PAGE
    found = [statistics.fmean(values(arm, "retrieval/passkey/8192")[:3]) for arm in (MOSTLY, OURS)]
    assert "it finds {:.0%} and `skip_then_long` {:.0%}".format(*found) in PAGE
    found = {arm: statistics.fmean(values(arm, "retrieval/passkey/32768"))
             for arm in RESULTS.contest.arms if arm != MOSTLY}  # fmt: skip
    for arm, share in found.items():
        assert re.search(rf"`{arm}` (finds )?{share:.0%}", PAGE)
    for arm, control in combinations(RESULTS.contest.arms, 2):
        seeds = [1, 2, 3] if MOSTLY in (arm, control) else RESULTS.contest.seeds
        _, low, high = difference(NAME, arm, control, "retrieval/passkey/32768", seeds)
        assert low < 0 < high


def test_rates_times_and_revisions() -> None:
    chosen = {
        contest: pandas.read_csv(DOCS / f"studies/results/contest_{contest}/measures.csv")
        .query("stage == 'rates'")
        .groupby(["measure", "arm", "rate", "seed"])
        .value.mean()
        for contest in (NAME, "distance_17m")
    }
    for contest, measure, arm, rate, words_around in (
        (NAME, "loss", OURS, 2e-3, "{:.3f} and {:.3f} with skips"),
        ("distance_17m", "loss", "short_then_long", 2e-3, "{:.3f} and {:.3f} without"),
        (NAME, "loss", MOSTLY, 5e-4, "{:.3f} and {:.3f} for `skip_mostly`"),
        (NAME, "loss", OURS, 5e-4, "{:.3f} and {:.3f} for `skip_then_long`"),
        (NAME, RETURNED, OURS, 1e-3, "`skip_then_long` has {:.3f} and {:.3f} nats, and"),
        ("distance_17m", RETURNED, "short_then_long", 2e-3, "other starts, {:.3f} and {:.3f}."),
        (NAME, RETURNED, OURS, 2e-3, "skips have {:.3f} and {:.3f}."),
    ):
        assert words_around.format(*chosen[contest][measure, arm, rate]) in PAGE
    assert RUNS[RUNS.arm == MOSTLY].rate.min() == min(RESULTS.contest.arms[MOSTLY].rates)
    curves = RESULTS.curves.groupby(["arm", "step"]).validation.mean()
    with_skips, without = curves[OURS][60], curves["short_then_long"][60]
    second = 60 * RESULTS.times[OURS]["1 dense"]
    assert f"After 60 short steps, {second:.1f} seconds" in PAGE
    assert f"is {with_skips:.3f} with skips and {without:.3f} without" in PAGE
    revisions = sorted({*RESULTS.all_runs.revision})
    assert "of revisions {} and {}".format(*revisions) in PAGE
    seconds = RUNS.groupby("arm")["GPU seconds"].mean()
    assert 1.01 < seconds.max() / seconds.min() < 1.02 and "equal to 2%" in PAGE
