"""Intervals by resampling documents, whose losses are not normal and differ widely."""

from collections.abc import Sequence

import numpy as np

from .held_out_loss import Estimate

DRAWS = 2000


def bootstrap(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean of ``values`` with its 95% percentile interval; None without two of them.

    Args:
        values: one for each document, at least one. Differences give a paired interval.
        draws: samples with replacement, each of as many documents.

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
    low, high = np.quantile(found[picked].mean(axis=1), (0.025, 0.975))
    return Estimate(mean, float(low), float(high))
