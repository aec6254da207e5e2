"""How good an adaptive policy is, and how surely: scores and intervals."""

from ecomlib.evaluation.adaptation import AdaptationReturns, adaptation_returns
from ecomlib.evaluation.curves import AdaptationCurves, adaptation_curves
from ecomlib.evaluation.statistics import (
    POPULATIONS,
    Interval,
    Population,
    interquartile_mean,
    interval_coverage,
    normalised_score,
    paired_difference,
    percentile_bootstrap_interval,
    studentised_bootstrap_interval,
    t_interval,
)

__all__ = [
    "POPULATIONS",
    "AdaptationCurves",
    "AdaptationReturns",
    "Interval",
    "Population",
    "adaptation_curves",
    "adaptation_returns",
    "interquartile_mean",
    "interval_coverage",
    "normalised_score",
    "paired_difference",
    "percentile_bootstrap_interval",
    "studentised_bootstrap_interval",
    "t_interval",
]
