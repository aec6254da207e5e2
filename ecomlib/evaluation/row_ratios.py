"""Ratios of means of independent rows, with intervals: what all off-policy estimators are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ecomlib.evaluation.statistics import Interval, _array, _level, _resamples, _tails
from ecomlib.families.base import require

AT_ONCE = 2_000_000
"""Numbers that a bootstrap holds in memory at a time."""


def ratio_estimate(
    numerator: ArrayLike, denominator: ArrayLike, level: float, interval: str, resamples: int = 999, seed: int = 0
) -> Interval:
    """mean(numerator) / mean(denominator) of independent rows (n,), with a normal or a bootstrap interval.

    Raises:
        ValueError: unknown ``interval``, ``level`` outside (0, 1) or too few ``resamples``.
    """
    require(interval in BOUNDS, "interval", interval, f"one of {', '.join(BOUNDS)}")
    top, bottom = _array(numerator), _array(denominator)
    low, high = BOUNDS[interval](top, bottom, _level(level), _resamples(resamples, level), seed)
    return Interval(float(top.mean() / bottom.mean()), float(low), float(high), len(top))


def _error(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ratio of means (...) of rows (..., n) and the standard error of its linearisation."""
    n = top.shape[-1]
    ratio = top.mean(-1) / bottom.mean(-1)
    rest = top - ratio[..., None] * bottom  # mean 0
    return ratio, np.sqrt((rest**2).sum(-1) / (n - 1) / n) / bottom.mean(-1)


def _normal(top, bottom, level: float, resamples: int, seed: int) -> tuple[float, float]:
    ratio, error = _error(top, bottom)
    half = stats.t.ppf((1 + level) / 2, len(top) - 1) * error
    return ratio - half, ratio + half


def _resampled(top, bottom, resamples: int, seed: int, of: Callable) -> NDArray[np.float64]:
    """(resamples, ...) what ``of`` makes of resampled rows, a few resamples at a time."""
    generator, n = np.random.default_rng(seed), len(top)
    block, found = max(1, AT_ONCE // n), []
    for start in range(0, resamples, block):
        picks = generator.integers(n, size=(min(block, resamples - start), n))
        with np.errstate(divide="ignore", invalid="ignore"):  # resamples without any weight
            found.append(np.stack(of(top[picks], bottom[picks]), -1))
    return np.concatenate(found)


def _percentile(top, bottom, level: float, resamples: int, seed: int) -> tuple[float, float]:
    ratio = _resampled(top, bottom, resamples, seed, lambda a, b: (a.mean(-1) / b.mean(-1),))[:, 0]
    return _tails(np.where(np.isnan(ratio), 0.0, ratio), level)


def _studentised(top, bottom, level: float, resamples: int, seed: int) -> tuple[float, float]:
    ratio, error = _error(top, bottom)
    if error == 0:
        return ratio, ratio
    drawn = _resampled(top, bottom, resamples, seed, _error)
    difference = drawn[:, 0] - ratio
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(drawn[:, 1] > 0, difference / drawn[:, 1], np.sign(difference) * np.inf)
    lower, upper = _tails(np.where(np.isnan(t), 0.0, t), level)
    return ratio - upper * error, ratio - lower * error


BOUNDS = {"normal": _normal, "studentised": _studentised, "percentile": _percentile}
"""Intervals known by name."""
