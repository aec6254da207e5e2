"""Beyond the mean: how scores are distributed over tasks, and how often one method beats another (Agarwal et al. 2021).

A table of scores is (seed, task): row s is one trained policy, which played every task. Who was resampled decides what
an interval means:

================ =====================================================================================================
``resample``     Stands for
================ =====================================================================================================
``"seeds"``      other training seeds on the same tasks: whole rows are drawn
``"tasks"``      other tasks for the same trained policies: whole columns are drawn
``"both"``       other seeds on other tasks: rows and columns are drawn, independently (the crossed bootstrap)
``"stratified"`` the entries of each column are drawn by themselves, as in ``rliable``; right where every task was
                 trained on its own, too narrow where one policy plays all tasks, as in meta-learning
================ =====================================================================================================

Ends are quantiles of resampled values, and have the shortfall of ``percentile_bootstrap_interval`` where seeds are few.
Chapter "Evaluating adaptive policies".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecomlib.evaluation.statistics import Interval, _array, _level, _require_finite, _resamples, _tails
from ecomlib.families.base import require

RESAMPLE = ("seeds", "tasks", "both", "stratified")
AT_ONCE = 2_000_000
"""Numbers that a resampling holds in memory at a time."""


class Profile(NamedTuple):
    """A performance profile with its band. Every field has shape (thresholds,)."""

    thresholds: NDArray[np.float64]
    """Scores."""
    share: NDArray[np.float64]
    """Share of tasks (of seeds and tasks) with a score above."""
    low: NDArray[np.float64]
    """Lower ends, point by point."""
    high: NDArray[np.float64]
    """Upper ends, point by point."""


def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    level: float = 0.95,
    resamples: int = 1999,
    seed: int = 0,
    resample: str = "both",
) -> Profile:
    """Share of (seed, task) with a score above each threshold: equation (eq-profile).

    One line a method; where a line lies above another everywhere, its method is better at every quantile of tasks.
    Unlike a mean it is not moved by how far the tails reach, so scores of single tasks may be used. It is widened by
    noise, though: a score measured on few episodes is spread by luck, and so is its profile.

    Args:
        scores: (seed, task); (task,) is one seed.
        thresholds: (thresholds,), finite.
        level: probability that the band is to cover each point.
        resamples: number of resamples.
        seed: seed of the resampling.
        resample: what is drawn; see the head of this module.

    Raises:
        ValueError: shapes, values that are not finite, an unknown ``resample``, ``level`` outside (0, 1) or too few
            ``resamples``.
    """
    table, at = _table("scores", scores), _array(thresholds)
    require(at.ndim == 1 and len(at) > 0, "thresholds", at.shape, "a shape (thresholds,)")
    _require_finite("thresholds", at)
    above = (table > at[:, None, None]).astype(float)  # (threshold, seed, task)
    drawn = []
    for weight in _weights(table.shape, _resamples(resamples, level), seed, resample, above.size):
        drawn.append(_weighted(above, weight))
    low, high = _tails(np.concatenate(drawn).T, _level(level))
    return Profile(at, above.mean((1, 2)), low, high)


def probability_of_improvement(
    a: ArrayLike,
    b: ArrayLike,
    level: float = 0.95,
    resamples: int = 1999,
    seed: int = 0,
    resample: str = "both",
    paired: bool = False,
) -> Interval:
    """How probable it is that ``a`` scores higher than ``b`` on a task: equation (eq-improvement). Ties count half.

    Without ``paired``, every seed of a meets every seed of b on a task (the Mann-Whitney statistic, averaged over
    tasks). With it, seed s of a meets seed s of b: the right question where both met the same luck. It says how often,
    not by how much: a method that wins on most tasks by little may lose in the mean.

    Args:
        a: (seed, task) or (task,).
        b: (seed, task) or (task,), the same tasks; the same seeds if ``paired``. The numbers of seeds may differ.
        level, resamples, seed, resample: as ``performance_profile``; a task is drawn for both methods at once.
        paired: whether a seed of a is compared with the same seed of b only.

    Returns:
        The probability with its interval; ``n`` is the number of tasks.

    Raises:
        ValueError: as ``performance_profile``, or the numbers of tasks (if ``paired``: of seeds) differ.
    """
    first, second = _table("a", a), _table("b", b)
    require(first.shape[1] == second.shape[1], "b", second.shape, f"the {first.shape[1]} tasks of a on the last axis")
    count = _resamples(resamples, level)
    if paired:
        require(first.shape == second.shape, "b", second.shape, f"the shape of a, {first.shape}, when paired")
        wins = ((first > second) + 0.5 * (first == second))[None]
        drawn = [_weighted(wins, w)[:, 0] for w in _weights(first.shape, count, seed, resample, wins.size)]
    else:
        against = (first[:, None] > second) + 0.5 * (first[:, None] == second)  # (seed a, seed b, task)
        wins = against.mean(1)[None]
        drawn = list(_against(against, count, seed, resample))
    low, high = _tails(np.concatenate(drawn), _level(level))
    return Interval(float(wins.mean()), float(low), float(high), first.shape[1])


# ---------------------------------------- resampling: how often each seed and task was drawn
class _Weights(NamedTuple):
    seeds: NDArray[np.float64]  # (B, seed, 1) or, stratified, (B, seed, task); sums to the number of seeds
    tasks: NDArray[np.float64]  # (B, task); sums to the number of tasks


def _weights(shape: tuple[int, int], count: int, seed: int, resample: str, size: int) -> Iterator[_Weights]:
    """``count`` resamples of a (seed, task) table, a few at a time; ``size`` is what one of them needs."""
    require(resample in RESAMPLE, "resample", resample, f"one of {', '.join(RESAMPLE)}")
    generator = np.random.default_rng(seed)
    block = max(1, AT_ONCE // size)
    for start in range(0, count, block):
        yield _draw(generator, shape, min(block, count - start), resample)


def _draw(generator: np.random.Generator, shape: tuple[int, int], count: int, resample: str) -> _Weights:
    seeds, tasks = shape
    # Whole numbers: their sums are exact, so that equal shares compare equal.
    counts = lambda n, size: generator.multinomial(n, np.full(n, 1 / n), size).astype(float)
    if resample == "stratified":
        return _Weights(counts(seeds, (count, tasks)).swapaxes(1, 2), np.ones((count, tasks)))
    of_seeds = counts(seeds, count) if resample in ("seeds", "both") else np.ones((count, seeds))
    of_tasks = counts(tasks, count) if resample in ("tasks", "both") else np.ones((count, tasks))
    return _Weights(of_seeds[..., None], of_tasks)


def _weighted(values: NDArray[np.float64], weight: _Weights) -> NDArray[np.float64]:
    """(B, K) weighted means of ``values`` (K, seed, task)."""
    if weight.seeds.shape[-1] == 1:
        total = np.einsum("bs,kst,bt->bk", weight.seeds[..., 0], values, weight.tasks, optimize=True)
    else:
        total = np.einsum("bst,kst,bt->bk", weight.seeds, values, weight.tasks, optimize=True)
    return total / values[0].size


def _against(wins: NDArray[np.float64], count: int, seed: int, resample: str) -> Iterator[NDArray[np.float64]]:
    """Resampled means of ``wins`` (seed a, seed b, task): the seeds of a and of b are drawn independently."""
    of_a, of_b, tasks = wins.shape
    generator = np.random.default_rng([seed, 1])  # for the seeds of b
    for weight in _weights((of_a, tasks), count, seed, resample, wins.size):
        other = _draw(generator, (of_b, tasks), len(weight.tasks), resample)
        axes = "t" if resample == "stratified" else ""
        own, its = (x.seeds if axes else x.seeds[..., 0] for x in (weight, other))
        # A task is drawn once, for both methods.
        yield np.einsum(f"bx{axes},by{axes},xyt,bt->b", own, its, wins, weight.tasks, optimize=True) / wins.size


def _table(field: str, values: ArrayLike) -> NDArray[np.float64]:
    table = _array(values)
    table = table[None] if table.ndim == 1 else table
    require(table.ndim == 2 and table.size > 0, field, table.shape, "a shape (seed, task) or (task,)")
    _require_finite(field, table)
    return table
