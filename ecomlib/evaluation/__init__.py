"""How good an adaptive policy is, and how surely: scores and intervals."""

from ecomlib.evaluation.adaptation import AdaptationReturns, adaptation_returns
from ecomlib.evaluation.curves import AdaptationCurves, adaptation_curves
from ecomlib.evaluation.off_policy import (
    LoggedDecisions,
    cross_fitted_rates,
    diagnose,
    direct_method,
    doubly_robust,
    effective_size,
    inverse_propensity,
    logged,
    self_normalised,
)
from ecomlib.evaluation.profiles import Profile, performance_profile, probability_of_improvement
from ecomlib.evaluation.rounds import TrialScores, trial_scores
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
from ecomlib.evaluation.trial_logs import Replay, TrialWeights, replay, trial_weights, weight_variance

__all__ = [
    "POPULATIONS",
    "AdaptationCurves",
    "AdaptationReturns",
    "Interval",
    "LoggedDecisions",
    "Population",
    "Profile",
    "Replay",
    "TrialScores",
    "TrialWeights",
    "adaptation_curves",
    "adaptation_returns",
    "cross_fitted_rates",
    "diagnose",
    "direct_method",
    "doubly_robust",
    "effective_size",
    "interquartile_mean",
    "interval_coverage",
    "inverse_propensity",
    "logged",
    "normalised_score",
    "paired_difference",
    "percentile_bootstrap_interval",
    "performance_profile",
    "probability_of_improvement",
    "replay",
    "self_normalised",
    "studentised_bootstrap_interval",
    "t_interval",
    "trial_scores",
    "trial_weights",
    "weight_variance",
]
