"""The numbers on the page of the contest of YaRN and skips are those of its records."""

import json
import re
import statistics

import pandas
import pytest
from contest_records import between, results_of
from pages import DOCS, words

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
    scaled = RECORD[RECORD.scaling.str.startswith("yarn factor=24 ") & (RECORD.measure == measure)]
    return [*scaled.groupby("seed").value.mean()]


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
    assert f"without skips have {mean(SHORT, FAR):.3f}." in PAGE
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
    assert "loss of passages, by {:.3f} and {:.3f} nats.".format(*ahead) in PAGE
    apart = [abs(mean("scaled_lighthouse_half", each) - mean(DENSE, each))
             for each in (FAR, "loss")]  # fmt: skip
    assert "in passages ({:.3f} nats apart) and in plain books ({:.3f}).".format(*apart) in PAGE
    tokens = RESULTS.runs.groupby("arm").tokens.first()
    assert tokens["scaled_lighthouse_half"] == 2 * tokens[DENSE]
    gain = "repeated/65536"
    trend = results_of("trend_17m_98k").value(PLAIN, 1, gain)
    assert f"gains {mean(PLAIN, gain):.3f} nats after 65,536 tokens. In" in PAGE
    assert f"the same arm gains {trend:.3f}." in PAGE


def test_passkeys() -> None:
    def ends(*arms: str) -> str:
        shares = [share for arm in arms for each in KEYS for share in values(arm, each)]
        return f"{percent(min(shares))} to {percent(max(shares))}"

    others = [arm for arm in RESULTS.contest.arms if arm != OURS]
    assert f"beside YaRN: {ends(OURS)} at each of 24,576 to 98,304 tokens" in PAGE
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
