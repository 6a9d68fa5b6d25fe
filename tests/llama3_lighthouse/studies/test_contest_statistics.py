"""Verdicts of contests: intervals, the level of a comparison, the margin and the rule."""

import numpy as np
import pytest
from contest_cases import contest_with
from scipy import stats

from torchtitan.models.llama3_lighthouse.studies.contest_statistics import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    comparison_level,
    in_words,
    judge,
    t_interval,
)


def test_intervals_are_students_t() -> None:
    # By hand: mean 3, standard deviation 1.5811, t of 4 degrees of freedom 2.7764.
    found = t_interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.95)
    assert found.low == pytest.approx(3 - 2.776445 * 1.581139 / 5**0.5, abs=1e-5)
    values = np.random.default_rng(0).normal(size=7)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    ours = t_interval(values.tolist(), 0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert t_interval([1.0], 0.95).low is None


def test_an_arm_against_itself_is_no_difference() -> None:
    contest = contest_with(margin=0.0)
    random = np.random.default_rng(1)
    draws = 600
    words = [judge(contest, (random.normal(size=6) - random.normal(size=6)).tolist()).word
             for _ in range(draws)]  # fmt: skip
    alarms = draws - words.count(NO_DIFFERENCE)
    level = 1 - comparison_level(contest)
    # No more than chance allows at the stated level, 0.025 for one of two comparisons.
    assert level == pytest.approx(0.025)
    assert 0 < alarms <= stats.binom.ppf(0.999, draws, level)


@pytest.mark.parametrize(("direction", "word"), [("higher", BETTER), ("lower", WORSE)])
def test_a_planted_difference_is_found_on_its_side(direction: str, word: str) -> None:
    contest = contest_with(direction=direction, margin=0.01)
    gaps = (0.05 + 0.005 * np.random.default_rng(2).normal(size=6)).tolist()
    assert judge(contest, gaps).word == word
    assert judge(contest, [-gap for gap in gaps]).word == (WORSE if word == BETTER else BETTER)
    assert word in in_words(contest, "a", "b", judge(contest, gaps))


def test_the_margin_decides_by_the_rule() -> None:
    gaps = [-0.011, -0.012, -0.012, -0.013, -0.0125, -0.008]
    assert judge(contest_with(rule="mean", margin=0.01), gaps).word == BETTER
    assert judge(contest_with(rule="interval", margin=0.01), gaps).word == NO_DIFFERENCE
    within = judge(contest_with(margin=0.02), gaps)
    assert within.word == NO_DIFFERENCE and within.equal
    for gaps in ([-0.5], [-0.5, -0.5]):
        alone = judge(contest_with(), gaps)
        assert "no verdict" in in_words(contest_with(), "a", "b", alone)
    assert judge(contest_with(), [0.0, 0.0]).equal
