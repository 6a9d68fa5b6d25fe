"""The numbers on the page of the contests of YaRN are those of their records."""

import json
import re
import statistics

import pandas
import pytest
from contest_records import (
    between,
    costs_of_yarn,
    difference,
    results_of,
    steps_by_kind,
    undisturbed_seconds,
    untrained_by_seed,
    with_half,
)
from pages import DOCS, words

from torchtitan.models.llama3_lighthouse.studies.contest_statistics import t_interval

RESULTS = results_of("scaling_17m_98k")
PAGE = words(DOCS / "studies/scaling.md")
OURS, DENSE, SHORT, PLAIN = (
    "scaled_skip_then_long",
    "scaled_dense",
    "scaled_short_then_long",
    "skip_then_long",
)
UNTRAINED = "YaRN alone"
FAR, SEEDS = "repeated/65536/loss", (1, 2)
NEARER = ("repeated/8192/loss", "repeated/32768/loss")
KEYS = [f"retrieval/passkey/{length}" for length in (24576, 49152, 98304)]
RECORD = pandas.read_csv(DOCS / "studies/results/contest_scaling_17m_98k/untrained.csv")


def values(arm: str, measure: str) -> list[float]:
    """A measure of an arm for each seed; that of the starts under YaRN if none was trained."""
    if arm != UNTRAINED:
        return [RESULTS.value(arm, seed, measure) for seed in SEEDS]
    return untrained_by_seed("scaling_17m_98k", measure, "yarn factor=24 ")


def mean(arm: str, measure: str) -> float:
    return statistics.fmean(values(arm, measure))


def percent(share: float) -> str:
    # A half is rounded up.
    return f"{100 * share + 1e-6:.0f}%"


def row(first: str, count: int) -> list[str]:
    """The other cells of the row of a table with so many columns."""
    lines = (DOCS / "studies/scaling.md").read_text().splitlines()
    bars = count + 1
    (found,) = [
        each for each in lines if each.startswith(f"| {first} |") and each.count("|") == bars
    ]
    return [cell.strip() for cell in found.split("|")[2:-1]]


@pytest.mark.parametrize("arm", [UNTRAINED, *RESULTS.contest.arms])
def test_table_of_arms(arm: str) -> None:
    trained, rate, near, middle, far, books, keys, seconds = row(
        arm if arm == UNTRAINED else f"`{arm}`", 9
    )
    for shown, measure in zip((near, middle, far, books), (*NEARER, FAR, "loss"), strict=True):
        assert shown == ", ".join(f"{each:.3f}" for each in values(arm, measure))
    assert keys == ", ".join(map(percent, values(arm, KEYS[-1])))
    if arm == UNTRAINED:
        assert (trained, rate, seconds) == ("not at all", "", "0")
        return
    runs = RESULTS.runs[RESULTS.runs.arm == arm]
    assert {float(rate)} == {*runs.rate} and [*runs.seed] == [*SEEDS]
    assert seconds == f"{runs['GPU seconds'].mean():.1f}"
    steps = [*json.loads(runs["steps by kind"].iloc[0]).values()]
    if not trained.startswith(("as ", "the same")):
        assert [int(x) for x in re.findall(r"(?:^|then )(\d+)", trained)] == steps
    else:
        assert steps == [*json.loads(
            RESULTS.runs[RESULTS.runs.arm == SHORT]["steps by kind"].iloc[0]).values()]  # fmt: skip


@pytest.mark.parametrize("rival", [arm for arm in RESULTS.contest.arms if arm != OURS])
def test_table_of_differences(rival: str) -> None:
    shown = row(f"`{rival}`", 5)
    for place, measure in ((0, FAR), (2, "loss")):
        found = RESULTS.over_documents(OURS, rival, measure)
        assert found and found.low is not None and found.high is not None
        low, high = (f"{end:.3f}" if end < 0 else f"{end:+.3f}" for end in (found.low, found.high))
        assert shown[place] == f"{found.mean:.3f} ({low} to {high})"
        gaps = RESULTS.differences(OURS, rival, measure)
        assert shown[place + 1] == ", ".join(f"{x:.3f}" if x < 0 else f"{x:+.3f}" for x in gaps)


def test_the_outcome_in_short() -> None:
    gain = "repeated/65536"
    assert (f"gain {mean(UNTRAINED, gain):.3f} nats, and their loss is "
            f"{mean(UNTRAINED, FAR):.3f}.") in PAGE  # fmt: skip
    assert (f"without YaRN gain {mean(PLAIN, gain):.3f}, and the loss is "
            f"{mean(PLAIN, FAR):.3f}.") in PAGE  # fmt: skip
    level = [mean(arm, FAR) for arm in (OURS, DENSE, "scaled_lighthouse_half")]
    assert f"level there, at {min(level):.3f} to {max(level):.3f}." in PAGE
    assert f"without skips have {mean(SHORT, FAR):.3f}, at twice the rate" in PAGE
    others = [arm for arm in RESULTS.contest.arms if arm != OURS]
    for seed in range(2):
        assert all(values(OURS, "loss")[seed] < values(arm, "loss")[seed] for arm in others)
    assert all(mean(OURS, KEYS[-1]) > mean(arm, KEYS[-1]) for arm in (*others, UNTRAINED))
    report = (DOCS / "studies/results/contest_scaling_17m_98k/results.md").read_text()
    verdicts = re.findall(r"(?m)^- \w+ against \w+: (.*)", report)
    assert {*verdicts} == {"no verdict, as 2 of 3 seeds have finished in both."}


def test_what_it_tells() -> None:
    lower = [mean(UNTRAINED, each) - mean(DENSE, each) for each in (FAR, "loss")]
    assert "by {:.3f} nats more (`scaled_dense`), and that of plain books by {:.3f}.".format(
        *lower) in PAGE  # fmt: skip
    seconds = RESULTS.runs[RESULTS.runs.arm == PLAIN]["GPU seconds"]
    assert f"from afar than {seconds.mean():.0f} GPU seconds" in PAGE
    found = RESULTS.over_documents(OURS, SHORT, FAR)
    assert found and found.low is not None and found.high is not None
    assert between(found.low, found.high) and f"They are {-found.mean:.3f} nats better" in PAGE
    ahead = [mean(OURS, each) - mean(DENSE, each) for each in NEARER]
    assert all(min(RESULTS.contest.arms, key=lambda arm: mean(arm, each)) == DENSE
               for each in NEARER)  # fmt: skip
    assert "skips are {:.3f} and {:.3f} nats above `scaled_dense`".format(*ahead) in PAGE
    apart = [abs(mean("scaled_lighthouse_half", each) - mean(DENSE, each))
             for each in (FAR, "loss")]  # fmt: skip
    assert "in passages ({:.3f} nats apart) and in plain books ({:.3f}).".format(*apart) in PAGE
    gaps = [RESULTS.differences("scaled_lighthouse_half", DENSE, each) for each in (FAR, "loss")]
    assert all(first * second < 0 for first, second in gaps)
    sizes = [abs(gap) for pair in gaps for gap in pair]
    seconds = RESULTS.runs.groupby("arm")["GPU seconds"].mean()
    longer = seconds["scaled_lighthouse_half"] / seconds[DENSE] - 1
    assert (f"differ by {min(sizes):.3f} to {max(sizes):.3f} nats in opposite directions, and it "
            f"had {longer:.0%} more time.") in PAGE  # fmt: skip
    costs = costs_of_yarn("scaling_17m_98k")
    assert f"it costs {min(costs):.3f} to {max(costs):.3f} nats within the first 4,096" in PAGE
    gain = "repeated/65536"
    trend = results_of("trend_17m_98k").value(PLAIN, 1, gain)
    assert f"gains {mean(PLAIN, gain):.3f} nats after 65,536 tokens. In" in PAGE
    loss = results_of("trend_17m_98k").value(PLAIN, 1, FAR)
    assert f"the same arm gains {trend:.3f}, and its loss there is {loss:.3f}, below" in PAGE
    assert loss < min(values(UNTRAINED, FAR))


def test_passkeys() -> None:
    def ends(*arms: str) -> str:
        shares = [share for arm in arms for each in KEYS for share in values(arm, each)]
        return f"{percent(min(shares))} to {percent(max(shares))}"

    others = [arm for arm in RESULTS.contest.arms if arm != OURS]
    assert f"They find {ends(OURS)} at each of 24,576 to 98,304 tokens" in PAGE
    assert f"the other trained arms find {ends(*others)}." in PAGE
    assert f"YaRN alone, without training, finds {ends(UNTRAINED)} there." in PAGE


def test_both_are_of_the_same_books_and_starts() -> None:
    assert RESULTS.runs.groupby("seed").start.nunique().tolist() == [1, 1]
    assert {*RESULTS.runs.revision} == {"dd4f724"}
    books = RECORD[RECORD.measure == FAR].groupby(["scaling", "seed"]).document.apply(set)
    assert len(books) == 4 and all(each == {*RESULTS.values[DENSE, 1, FAR]} for each in books)
    # Without a scaling the starts fail at this length altogether.
    plain = RECORD[(RECORD.scaling == "none") & (RECORD.measure == "loss")]
    assert plain.groupby("seed").value.mean().min() > 2.5


SHORTER, AT = results_of("scaling_17m_32k"), (1, 2, 3, 4)
SHORTER_RECORD = pandas.read_csv(DOCS / "studies/results/contest_scaling_17m_32k/untrained.csv")
RETURNED = [f"repeated/{tokens}/loss" for tokens in (4096, 16384, 31744)]
JUDGED = RETURNED[1]


def shorter(arm: str, measure: str) -> list[float]:
    """As ``values``, at 32,768 tokens."""
    if arm != UNTRAINED:
        assert tuple(SHORTER.seeds(arm, measure)) == AT
        return [SHORTER.value(arm, seed, measure) for seed in AT]
    assert {*SHORTER_RECORD.scaling} == {"yarn factor=8 original_max_position_embeddings=4096"}
    return untrained_by_seed("scaling_17m_32k", measure)


def mean_of(arm: str, measure: str) -> float:
    return statistics.fmean(shorter(arm, measure))


@pytest.mark.parametrize("arm", [UNTRAINED, *SHORTER.contest.arms])
def test_table_of_arms_at_32k(arm: str) -> None:
    trained, *losses, keys, seconds = row(arm if arm == UNTRAINED else f"`{arm}`", 8)
    assert losses == [with_half(shorter(arm, each)) for each in (*RETURNED, "loss")]
    assert keys == ", ".join(map(percent, shorter(arm, "retrieval/passkey/32768")))
    if arm == UNTRAINED:
        assert (trained, seconds) == ("not at all", "0")
        return
    assert seconds == f"{undisturbed_seconds('scaling_17m_32k', arm):.1f}"
    counts = steps_by_kind("scaling_17m_32k", arm)
    assert [int(x) for x in re.findall(r"(?:^|then )(\d+)", trained)] == [*counts.values()]
    assert {*SHORTER.runs[SHORTER.runs.arm == arm].rate} == {1e-3}
    tried = SHORTER.all_runs[SHORTER.all_runs.stage == "rates"]
    assert sorted(tried[tried.arm == arm].rate) == [1e-3, 2e-3]


@pytest.mark.parametrize(("arm", "control"), [
    ("skip_then_long", "short_then_long"),
    ("skip_then_long", "dense"),
    ("short_then_long", "dense"),
    ("dense", UNTRAINED),
    ("short_then_long", UNTRAINED),
    ("skip_then_long", UNTRAINED),
])  # fmt: skip
def test_table_of_differences_at_32k(arm: str, control: str) -> None:
    name = control if control == UNTRAINED else f"`{control}`"
    shown = row(f"`{arm}` less {name}", 4)
    for cell, measure in zip(shown, (JUDGED, RETURNED[2], "loss"), strict=True):
        pairs = zip(shorter(arm, measure), shorter(control, measure), strict=True)
        found = t_interval([ours - theirs for ours, theirs in pairs], SHORTER.level(measure))
        assert cell == f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
        if control != UNTRAINED:
            assert (found.mean, found.low) == pytest.approx(
                difference("scaling_17m_32k", arm, control, measure)[:2]
            )
    named = arm == "skip_then_long" and control != UNTRAINED
    assert ((arm, control) in SHORTER.contest.compare) == named


def test_what_it_tells_at_32k() -> None:
    arms = [*SHORTER.contest.arms]
    assert (f"YaRN alone has a loss of {mean_of(UNTRAINED, JUDGED):.3f} after 16,384 tokens. Dense "
            f"training under YaRN has {mean_of('dense', JUDGED):.3f}, short sequences first "
            f"{mean_of('short_then_long', JUDGED):.3f}, and skips "
            f"{mean_of('skip_then_long', JUDGED):.3f}.") in PAGE  # fmt: skip
    fair = [arm for arm in arms if arm != "lighthouse_half"]
    ends = sorted(mean_of(arm, JUDGED) - mean_of(UNTRAINED, JUDGED) for arm in fair)
    assert f"{-ends[0]:.3f} nats below YaRN alone to {ends[-1]:.3f} above" in PAGE
    near = [mean_of(UNTRAINED, RETURNED[0]) - mean_of(arm, RETURNED[0]) for arm in fair]
    assert f"after 4,096 tokens, by {min(near):.3f} to {max(near):.3f} nats." in PAGE
    skips_far = [ours - theirs for ours, theirs in
                 zip(shorter("skip_then_long", RETURNED[2]), shorter(UNTRAINED, RETURNED[2]),
                     strict=True)]  # fmt: skip
    assert max(skips_far) < 0
    assert f"seeds, by {-statistics.fmean(skips_far):.3f} in the mean." in PAGE
    plain, skips = (-difference("scaling_17m_32k", arm, "dense", "loss")[0]
                    for arm in ("short_then_long", "skip_then_long"))  # fmt: skip
    assert f"{plain:.3f} nats more than dense training, and {skips:.3f} with skips." in PAGE
    for arm in ("short_then_long", "skip_then_long"):
        assert all(SHORTER.value(arm, seed, "loss") < SHORTER.value("dense", seed, "loss")
                   for seed in AT)  # fmt: skip
    far = SHORTER.differences("skip_then_long", "short_then_long", RETURNED[2])
    assert len(far) == 4 and max(far) < 0
    keys = {arm: shorter(arm, "retrieval/passkey/32768") for arm in (UNTRAINED, *arms)}
    assert all(each[seed] < 0.15 for each in keys.values() for seed in (0, 2))
    fewer = [keys[arm][seed] < keys[UNTRAINED][seed] for arm in fair for seed in (1, 3)]
    assert (sum(fewer), len(fewer)) == (5, 6)
    assert all(keys["skip_then_long"][seed] == min(keys[arm][seed] for arm in fair)
               for seed in (1, 3))  # fmt: skip


def test_a_rate_of_2e_3_is_too_high_at_32k() -> None:
    measures = pandas.read_csv(DOCS / "studies/results/contest_scaling_17m_32k/measures.csv")
    by_rate = measures[measures.stage == "rates"].groupby(["arm", "measure", "rate"]).value.mean()
    for arm in SHORTER.contest.arms:
        assert by_rate[arm, JUDGED, 1e-3] < by_rate[arm, JUDGED, 2e-3]
    cost = by_rate["short_then_long", "loss", 2e-3] - by_rate["short_then_long", "loss", 1e-3]
    lead = mean(SHORT, "loss") - mean(OURS, "loss")
    passages = (by_rate["short_then_long", JUDGED, 2e-3]
                - by_rate["short_then_long", JUDGED, 1e-3])  # fmt: skip
    assert (f"it costs short sequences first {cost:.3f} nats on plain books, and {passages:.3f} on "
            "passages after 16,384 tokens.") in PAGE  # fmt: skip
    far = mean(SHORT, FAR) - mean(OURS, FAR)
    assert f"lead on passages there, {far:.3f} nats, is more than the rate" in PAGE and far > 0.1
    assert f"at 98,304 tokens, {lead:.3f} nats, may well be that of 1e-3 over 2e-3." in PAGE


def test_lighthouse_had_too_little_time_at_32k() -> None:
    folder = DOCS / "studies/results/contest_scaling_17m_32k"
    times = pandas.read_csv(folder / "times.csv").set_index(["arm", "kind"])
    seconds, spread, *_ = times.loc["lighthouse_half", "1 lighthouse"]
    assert (f"seemed to take {1e3 * seconds:.0f} ms, and took "
            f"{1e3 * seconds / (1 + spread):.0f}.") in PAGE  # fmt: skip
    counts = steps_by_kind("scaling_17m_32k", "lighthouse_half")
    taken = undisturbed_seconds("scaling_17m_32k", "lighthouse_half")
    assert f"it got {sum(counts.values())} steps, {taken:.1f} of 15 seconds." in PAGE
    assert SHORTER.unsteady.keys() == {"dense", "lighthouse_half"}
    short, skips, dense = (undisturbed_seconds("scaling_17m_32k", arm)
                           for arm in ("short_then_long", "skip_then_long", "dense"))  # fmt: skip
    assert (f"it had {1 - dense / skips:.0%} less time than skips, and {1 - dense / short:.0%} "
            "less than short sequences without them.") in PAGE  # fmt: skip


def test_the_runs_at_32k_are_of_one_start_each() -> None:
    assert {*SHORTER.runs.groupby("seed").start.nunique()} == {1}
    assert {*SHORTER.runs.revision} == {"0e20317"}
    report = (DOCS / "studies/results/contest_scaling_17m_32k/results.md").read_text()
    verdicts = re.findall(r"(?m)^- \w+ against \w+: (.*)", report)
    assert {*verdicts} == {"no verdict, as 4 of 6 seeds have finished in both."}
    books = SHORTER_RECORD[SHORTER_RECORD.measure == JUDGED].groupby("seed").document.apply(set)
    assert all(each == {*SHORTER.values["dense", 1, JUDGED]} for each in books)
