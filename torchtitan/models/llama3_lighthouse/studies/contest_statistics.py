"""Paired differences over seeds, and the verdict by a rule that was fixed before."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from ..evaluation.held_out_loss import Estimate
from .contest_file import Contest

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference"


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison.

    Attributes:
        word: "better", "worse" or "no difference".
        difference: arm minus control over seeds, with the interval that decided.
        equal: whether that interval lies within the margin on both sides of zero.
    """

    word: str
    difference: Estimate
    seeds: int
    equal: bool


def t_interval(values: Sequence[float], level: float) -> Estimate:
    """The mean of values with its interval by Student's t; None without two of them.

    Values that are all equal tell nothing of their spread, unless they are all 0: no difference.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    error = statistics.stdev(values) / len(values) ** 0.5
    if error == 0:
        return Estimate(mean, None, None) if mean else Estimate(0.0, 0.0, 0.0)
    low, high = stats.t.interval(level, len(values) - 1, loc=mean, scale=error)
    return Estimate(mean, float(low), float(high))


def comparison_level(contest: Contest) -> float:
    """Confidence of one comparison, so that all together have the contest's (Bonferroni)."""
    return 1 - (1 - contest.level) / len(contest.compare)


def judge(contest: Contest, differences: Sequence[float]) -> Verdict:
    """The verdict on an arm's differences to its control in the primary measure, one a seed."""
    estimate = t_interval(differences, comparison_level(contest))
    if estimate.low is None or estimate.high is None:
        return Verdict(NO_DIFFERENCE, estimate, len(differences), False)
    # Gains, of which more is better.
    mean = contest.sign * estimate.mean
    low, high = sorted((contest.sign * estimate.low, contest.sign * estimate.high))
    margin = contest.margin
    if contest.rule == "mean":
        better, worse = low > 0 and mean >= margin, high < 0 and mean <= -margin
    else:
        better, worse = low > margin, high < -margin
    word = BETTER if better else WORSE if worse else NO_DIFFERENCE
    equal = -margin <= low and high <= margin
    return Verdict(word, estimate, len(differences), equal)


def in_words(contest: Contest, arm: str, control: str, verdict: Verdict) -> str:
    """One sentence that says the verdict, its interval and the margin."""
    found = verdict.difference
    if found.low is None or found.high is None:
        without = "one seed gives" if verdict.seeds == 1 else "equal differences give"
        return (
            f"{arm} against {control}: no verdict, as {without} no interval "
            f"(difference {found.mean:+.4f}, seeds: {verdict.seeds})."
        )
    why = ""
    if verdict.word == NO_DIFFERENCE:
        why = ", equal within the margin" if verdict.equal else " shown by these seeds"
    return (
        f"{arm} against {control}: {verdict.word}{why}; {contest.primary} differs by "
        f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}, {verdict.seeds} seeds, "
        f"{contest.direction} is better, margin {contest.margin:g})."
    )
