"""Intervals by resampling documents, whose losses are not normal and differ widely."""

from collections.abc import Sequence

import numpy as np

from .held_out_loss import Estimate

DRAWS = 2000


def bootstrap(
    values: Sequence[float], draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Estimate:
    """The mean of ``values`` with its percentile interval; None without two of them.

    Args:
        values: one for each document, at least one. Differences give a paired interval.
        draws: samples with replacement, each of as many documents.
        level: confidence of the interval.

    Raises:
        ValueError: there is no value.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("an estimate needs at least one value")
    mean = float(found.mean())
    if len(found) < 2:
        return Estimate(mean, None, None)
    picked = np.random.default_rng(seed).integers(len(found), size=(draws, len(found)))
    beyond = (1 - level) / 2
    low, high = np.quantile(found[picked].mean(axis=1), (beyond, 1 - beyond))
    return Estimate(mean, float(low), float(high))
