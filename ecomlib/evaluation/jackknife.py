"""Intervals over tasks for scores, which are ratios of means over tasks."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ecomlib.evaluation.statistics import Interval, _array, _level, _require_finite


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike, level: float = 0.95) -> Interval:
    """Jackknife interval for mean(numerator) / mean(denominator) in the population that M tasks were drawn from.

    ============  =======  ===========================================================================
    Symbol        Shape    Description
    ============  =======  ===========================================================================
    numerator     (task,)  value - blind for a score; value b - value a for the difference of two scores
    denominator   (task,)  oracle - blind of the same tasks
    ============  =======  ===========================================================================

    The estimate is the ratio itself. Its standard error is that of the ratios with one task left out, times
    sqrt((M - 1) / M) (Efron and Tibshirani 1993, chapter 11), and the ends are Student's with M - 1 degrees of freedom.
    It says how surely M tasks stand for all tasks of their distribution, with the trained policies as they are; how
    surely a few training seeds stand for all is another question (``t_interval``). Tasks that differ a hundredfold in
    turnover make it somewhat too short below a hundred of them (``tests/test_run_evaluation.py`` measures it).

    Raises:
        ValueError: fewer than 2 tasks, shapes that differ, a value that is not finite, a denominator whose mean is not
            positive with any one task left out, or ``level`` outside (0, 1).
    """
    top, bottom = _array(numerator), _array(denominator)
    if top.ndim != 1 or top.shape != bottom.shape:
        raise ValueError(
            f"numerator and denominator must hold the same tasks, got shapes {top.shape} and {bottom.shape}"
        )
    if (tasks := len(top)) < 2:
        raise ValueError(f"numerator must hold at least 2 tasks, got {tasks}")
    _require_finite("numerator", top)
    _require_finite("denominator", bottom)
    without = bottom.sum() - bottom
    if not (bottom.sum() > 0 and (without > 0).all()):
        raise ValueError("denominator must have a positive mean, with any one task left out too")
    ratio = top.sum() / bottom.sum()
    left_out = (top.sum() - top) / without
    error = np.sqrt((tasks - 1) / tasks * ((left_out - left_out.mean()) ** 2).sum())
    half = stats.t.ppf((1 + _level(level)) / 2, tasks - 1) * error
    return Interval(float(ratio), float(ratio - half), float(ratio + half), tasks)
