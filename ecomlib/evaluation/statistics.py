"""Scores, and how far a handful of training seeds can be trusted.

A result of the book is a *score*: 0 is the best policy that never adapts, 1 the policy that knows the task.
Training is random, so a score is a sample with one value per training seed, usually of 5 to 10 values. The
functions below turn such samples into an estimate with an interval. They take anything array-like (NumPy,
Torch, lists) and return floats.

Chapter "Introduction" uses the score first; chapter "Notation" lists the symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    estimate: float
    """The point estimate, in the unit of the values."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int
    """Number of independent values behind it."""


def normalised_score(value: ArrayLike, blind: ArrayLike, oracle: ArrayLike) -> float | NDArray[np.float64]:
    """Share of the gap between the blind policy and the oracle that a policy closes.

    The score is the ratio of means over tasks, ``mean(value - blind) / mean(oracle - blind)``, and never the
    mean of per-task ratios: on a task where knowing the hidden parameters is worth almost nothing, the ratio
    of that one task is noise divided by almost zero, and a mean of ratios would consist of it.

    ====== ============== ======================================================
    Symbol Shape          Description
    ====== ============== ======================================================
    value  (..., task)    returns of the policy under study, in money
    blind  (..., task)    returns of the best policy that never uses feedback
    oracle (..., task)    returns of the policy that knows the hidden parameters
    ====== ============== ======================================================

    Leading axes (episode, seed) are kept and broadcast: the result has shape ``(...)``, and is a float when
    there are none. A score may be negative or, for a single noisy sample, above 1.

    Raises:
        ValueError: a value is not finite, there are no tasks, the numbers of tasks differ, or the mean gap
            between oracle and blind is not positive, so that there is nothing to normalise by.
    """
    arrays = {"value": _array(value), "blind": _array(blind), "oracle": _array(oracle)}
    for field, array in arrays.items():
        _require_finite(field, array)
        if array.ndim == 0 or array.shape[-1] == 0:
            raise ValueError(f"{field} must hold at least one task on its last axis, got shape {array.shape}")
    tasks = {field: array.shape[-1] for field, array in arrays.items()}
    if len(set(tasks.values())) > 1:
        raise ValueError(f"value, blind and oracle must hold the same tasks, got {tasks} tasks")
    gap = (arrays["oracle"] - arrays["blind"]).mean(-1)
    if not np.all(gap > 0):
        raise ValueError(
            f"oracle - blind must have a positive mean over tasks, got {float(np.min(gap)):.6g}: there is nothing to "
            "gain by adapting (do the actions on offer reach the best one?)"
        )
    score = (arrays["value"] - arrays["blind"]).mean(-1) / gap
    return float(score) if score.ndim == 0 else score


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half of ``values`` (n,): a quarter is dropped at either end, rounded down.

    Less moved by one failed training run than the mean, more precise than the median. Equal to
    ``scipy.stats.trim_mean(values, 0.25)``; recommended for comparing learners by Agarwal et al. (2021).

    Raises:
        ValueError: ``values`` is empty, not one-dimensional or not finite.
    """
    ordered = np.sort(_sample("values", values, at_least=1))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's interval for the mean of the population that ``values`` (n,) were drawn from.

    ``mean +- t * s / sqrt(n)``, with ``s`` the sample standard deviation (divisor n - 1) and ``t`` the
    quantile of Student's distribution with n - 1 degrees of freedom. Exact for independent normal values at
    every n >= 2. Identical values give an interval of width zero.

    Raises:
        ValueError: fewer than 2 values, not one-dimensional, not finite, or ``level`` outside (0, 1).
    """
    sample = _sample("values", values, at_least=2)
    return _interval(sample, *_t_bounds(sample, _level(level)))


def percentile_bootstrap_interval(
    values: ArrayLike, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval:
    """The interval many papers print, kept here so that its shortfall can be measured. Prefer the other two.

    Its ends are quantiles of the means of resampled values. A resample of n values spreads less than the
    population, by the factor sqrt((n - 1) / n), and no allowance is made for an estimated standard deviation:
    the interval of five values is too short (see :func:`interval_coverage`).

    Raises:
        ValueError: as :func:`studentised_bootstrap_interval`, but 2 values suffice.
    """
    sample = _sample("values", values, at_least=2)
    return _interval(sample, *_percentile_bounds(sample, _level(level), _resamples(resamples, level), seed))


def studentised_bootstrap_interval(
    values: ArrayLike, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval:
    """Bootstrap-t interval for the mean of ``values`` (n,), for skewed values, which Student's serves badly.

    Every resample is turned into the statistic ``t* = (mean* - mean) / (s* / sqrt(n))``; the quantiles of
    ``t*`` take the place of Student's, so the interval may be longer on one side (Efron and Tibshirani 1993,
    chapter 12). A resample of n equal values has ``s* = 0`` and counts as ``t* = +inf`` or ``-inf``, which is
    why 4 values are the least.

    Args:
        values: (n,) independent values, one per training seed.
        level: probability that the interval is to cover the mean.
        resamples: number of resamples.
        seed: seed of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: fewer than 4 values, not one-dimensional, not finite, so many ties that an end would be
            infinite, ``level`` outside (0, 1), or too few ``resamples`` to hold the tail.
    """
    sample = _sample("values", values, at_least=4)
    low, high = _studentised_bounds(sample, _level(level), _resamples(resamples, level), seed)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"values holds too many ties for a studentised interval at level {level}: {sample.tolist()}")
    return _interval(sample, low, high)


def paired_difference(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, interval: Callable[..., Interval] = t_interval
) -> Interval:
    """Mean of ``a - b`` with its interval, where ``a[i]`` and ``b[i]`` share seed, tasks and noise.

    Both have shape (n,). Shared luck cancels in the difference, so the interval is often much shorter than the
    two separate intervals suggest. ``interval`` is :func:`t_interval` or :func:`studentised_bootstrap_interval`.

    Raises:
        ValueError: ``a`` and ``b`` differ in length, or as ``interval``.
    """
    first, second = _sample("a", a, at_least=2), _sample("b", b, at_least=2)
    if len(first) != len(second):
        raise ValueError(f"a and b must be paired one to one, got {len(first)} and {len(second)} values")
    return interval(first - second, level)


class Population(NamedTuple):
    """A distribution with a known mean, for :func:`interval_coverage`."""

    draw: Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
    """Maps (generator, shape) to independent values of that shape."""
    mean: float
    """The exact mean of those values."""


POPULATIONS = {
    "normal": Population(lambda generator, shape: generator.standard_normal(shape), 0.0),
    "exponential": Population(lambda generator, shape: generator.standard_exponential(shape), 1.0),
    "lognormal": Population(lambda generator, shape: np.exp(generator.standard_normal(shape)), float(np.exp(0.5))),
}
"""Populations known by name: symmetric, skewed (skewness 2) and very skewed (skewness about 6)."""


def interval_coverage(
    method: str,
    n: int = 5,
    distribution: str | Population = "normal",
    level: float = 0.95,
    repetitions: int = 2000,
    resamples: int = 999,
    seed: int = 0,
) -> Interval:
    """How often an interval of ``n`` values really contains the mean, measured on fresh samples.

    Args:
        method: ``"t"``, ``"studentised"`` or ``"percentile"``.
        n: values in a sample, for instance the number of training seeds.
        distribution: a name in :data:`POPULATIONS` or a :class:`Population`.
        level: what the interval promises.
        repetitions: number of samples.
        resamples: bootstrap resamples per sample; ignored by ``"t"``.
        seed: seed of the samples and of the resampling.

    Returns:
        The measured share, with a Wilson interval at 95 % and ``n = repetitions``.

    Raises:
        ValueError: an unknown ``method`` or ``distribution``, too small an ``n``, or fewer than 100
            repetitions.
    """
    least = {"t": 2, "percentile": 2, "studentised": 4}
    if method not in least:
        raise ValueError(f"method must be one of {sorted(least)}, got {method!r}")
    if n < least[method]:
        raise ValueError(f"n must be at least {least[method]} for method {method!r}, got {n}")
    if repetitions < 100:
        raise ValueError(f"repetitions must be at least 100, got {repetitions}")
    if isinstance(distribution, str):
        if distribution not in POPULATIONS:
            raise ValueError(f"distribution must be a Population or one of {sorted(POPULATIONS)}, got {distribution!r}")
        distribution = POPULATIONS[distribution]
    level, resamples = _level(level), _resamples(resamples, level)
    generator, covered = np.random.default_rng(seed), 0
    for start in range(
        0, repetitions, 250
    ):  # in chunks, since a resample of every sample at once would fill the memory
        samples = distribution.draw(generator, (min(250, repetitions - start), n))
        if method == "t":
            low, high = _t_bounds(samples, level)
        elif method == "percentile":
            low, high = _percentile_bounds(samples, level, resamples, generator)
        else:
            low, high = _studentised_bounds(samples, level, resamples, generator)
        covered += int(((low <= distribution.mean) & (distribution.mean <= high)).sum())
    wilson = stats.binomtest(covered, repetitions).proportion_ci(0.95, method="wilson")
    return Interval(covered / repetitions, float(wilson.low), float(wilson.high), repetitions)


# ---------------------------------------- ends of intervals, for samples (..., n) at once
Bounds = tuple[NDArray[np.float64], NDArray[np.float64]]


def _t_bounds(samples: NDArray[np.float64], level: float) -> Bounds:
    n = samples.shape[-1]
    mean, half = samples.mean(-1), stats.t.ppf((1 + level) / 2, n - 1) * samples.std(-1, ddof=1) / np.sqrt(n)
    return mean - half, mean + half


def _resampled(samples: NDArray[np.float64], resamples: int, seed: int | np.random.Generator) -> NDArray[np.float64]:
    """(..., n) -> (..., resamples, n), drawn with replacement."""
    *lead, n = samples.shape
    picks = np.random.default_rng(seed).integers(n, size=(*lead, resamples, n))
    return np.take_along_axis(samples[..., None, :], picks, -1)


def _tails(statistic: NDArray[np.float64], level: float) -> Bounds:
    """The order statistics at rank (B + 1) (1 - level) / 2 from either end; infinite values are allowed."""
    ordered, count = np.sort(statistic, -1), statistic.shape[-1]
    rank = max(1, round((count + 1) * (1 - level) / 2))
    return ordered[..., rank - 1], ordered[..., count - rank]


def _percentile_bounds(samples, level: float, resamples: int, seed: int | np.random.Generator) -> Bounds:
    return _tails(_resampled(samples, resamples, seed).mean(-1), level)


def _studentised_bounds(samples, level: float, resamples: int, seed: int | np.random.Generator) -> Bounds:
    root_n, drawn = np.sqrt(samples.shape[-1]), _resampled(samples, resamples, seed)
    mean, error = samples.mean(-1), samples.std(-1, ddof=1) / root_n
    difference, spread = drawn.mean(-1) - mean[..., None], drawn.std(-1, ddof=1) / root_n
    # Equal values can leave a standard deviation of rounding size; compare the extremes instead.
    flat = drawn.max(-1) == drawn.min(-1)
    endless = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    statistic = np.where(flat, endless, difference / np.where(flat, 1.0, spread))
    lower, upper = _tails(statistic, level)
    constant = samples.max(-1) == samples.min(-1)
    ends = (mean - np.where(constant, 0.0, upper) * error, mean - np.where(constant, 0.0, lower) * error)
    return np.where(constant, mean, ends[0]), np.where(constant, mean, ends[1])


# ---------------------------------------- checked arguments
def _array(values: ArrayLike) -> NDArray[np.float64]:
    if hasattr(values, "detach"):  # a Torch tensor, perhaps with a gradient or on another device
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


def _require_finite(field: str, array: NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{field} must be finite, but element {bad[0]} is {array.flat[bad[0]]}")


def _sample(field: str, values: ArrayLike, at_least: int) -> NDArray[np.float64]:
    array = _array(values)
    if array.ndim != 1:
        raise ValueError(f"{field} must have one axis, got shape {array.shape}")
    if len(array) < at_least:
        raise ValueError(f"{field} must hold at least {at_least} values, got {len(array)}: {array.tolist()}")
    _require_finite(field, array)
    return array


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, both excluded, got {level}")
    return float(level)


def _resamples(resamples: int, level: float) -> int:
    least = int(np.ceil(2 / (1 - level) - 1e-9)) - 1  # one resample in either tail
    if resamples < least:
        raise ValueError(f"resamples must be at least {least} at level {level}, got {resamples}")
    return int(resamples)


def _interval(sample: NDArray[np.float64], low, high) -> Interval:
    return Interval(float(sample.mean()), float(low), float(high), len(sample))
