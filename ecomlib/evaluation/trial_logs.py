"""What a policy that learns as it goes would have earned, from logs: replay, and weights of whole trials.

The estimators of ``off_policy`` weigh single decisions and need a target policy that does not change. A policy that
learns chooses by what it was shown before, so either the log is replayed to it, row by row, and only the rows on which
it agrees with the log happen (Li et al. 2011), or the whole history of a trial is weighed at once, and the weights
explode. Chapter "Evaluating adaptive policies".
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecomlib.evaluation.off_policy import effective_size
from ecomlib.evaluation.statistics import Interval, _array, _require_finite, t_interval
from ecomlib.families.base import number, require, whole


class ReplayedPolicy(Protocol):
    """A policy that learns from single decisions."""

    def choose(self, context: Any, generator: np.random.Generator) -> int:
        """Action for a context (a row of ``context``; None where there is none)."""

    def learn(self, context: Any, action: int, reward: float) -> None:
        """What the action earned."""


class Replay(NamedTuple):
    """The decisions that happened to the policy."""

    row: NDArray[np.int64]
    """(k,) rows of the log that were accepted, in order."""
    reward: NDArray[np.float64]
    """(k,) what they earned: the k-th is a reward of the policy after k rounds of learning."""
    rows: int
    """Rows of the log that were looked at."""

    @property
    def mean(self) -> float:
        """Mean reward of the accepted decisions; nan where there are none."""
        return float(self.reward.mean()) if len(self.reward) else float("nan")


def replay(
    policy: ReplayedPolicy,
    action: ArrayLike,
    reward: ArrayLike,
    context: ArrayLike | None = None,
    propensity: ArrayLike | float | None = None,
    seed: int = 0,
    most: int | None = None,
) -> Replay:
    """Play a log of randomised decisions to a policy that learns (Li, Chu, Langford and Wang 2011).

    The policy chooses for every row. Where its choice is the logged action, the row happens to it: the reward
    counts and is learned from. Else the row is skipped as if it had never been. If rows are independent and the log
    chose every action with the same probability, the accepted rows have the law of the policy's own history: equation
    (eq-replay). With unequal propensities a match is accepted with probability min(propensity) / propensity, which
    makes them equal at the price of yet fewer rows. Of n rows and K equally likely actions about n / K are accepted.

    ========== ========== =========================================================================================
    Symbol     Shape      Description
    ========== ========== =========================================================================================
    action     (n,)       logged actions, in the order in which they were taken
    reward     (n,)       what each earned
    context    (n, ...)   what the policy sees of each row; None without
    propensity (n,)       probability with which the logged action was chosen; None where all were equally likely
    ========== ========== =========================================================================================

    ``seed`` is that of the policy's own randomness, ``most`` the number of accepted rows to stop after. To know a
    policy's return over H rounds, replay until H were accepted: stopping where the log ends favours policies that agree
    with it more often.

    Not for logs of a policy that was itself learning: there, what comes after a row depends on it.

    Raises:
        ValueError: shapes, a value that is not finite, a propensity outside (0, 1], or ``most`` below 1.
    """
    act, earned = _array(action), _array(reward)
    require(act.ndim == 1 and len(act) > 0, "action", act.shape, "a shape (n,) with n >= 1")
    require(earned.shape == act.shape, "reward", earned.shape, f"{act.shape}, the shape of action")
    seen = [None] * len(act) if context is None else np.asarray(context)
    require(len(seen) == len(act), "context", len(seen), f"{len(act)} rows")
    chance = np.ones(len(act)) if propensity is None else _array(propensity)
    require(chance.shape == act.shape, "propensity", chance.shape, f"{act.shape}, the shape of action")
    for name, array in (("action", act), ("reward", earned), ("propensity", chance)):
        _require_finite(name, array)
    require(bool(((chance > 0) & (chance <= 1)).all()), "propensity", float(chance.min()), "above 0 and at most 1")
    require(most is None or whole(most, 1), "most", most, "a whole number >= 1, or None")
    generator = np.random.default_rng(seed)
    keep = np.random.default_rng([seed, 1]).random(len(act)) * chance < chance.min()
    accepted = []
    for i, (taken, money) in enumerate(zip(act.astype(int).tolist(), earned.tolist())):
        if policy.choose(seen[i], generator) == taken and keep[i]:
            accepted.append(i)
            policy.learn(seen[i], taken, money)
            if len(accepted) == most:
                break
    rows = np.array(accepted, dtype=np.int64)
    return Replay(rows, earned[rows], i + 1)


class TrialWeights(NamedTuple):
    """Importance weights of trials that were logged, and what they make of the rewards."""

    weight: NDArray[np.float64]
    """(T, n) weight of the first t + 1 steps of each trial."""
    effective: NDArray[np.float64]
    """(T,) ``effective_size`` of the weights at each step."""
    returns: Interval
    """Return of the target policy with Student's interval over trials: an interval that is too short where the weights
    have exploded, because the trials that would carry the estimate are not in the log."""


def trial_weights(log_ratio: ArrayLike, reward: ArrayLike, per_step: bool = True, level: float = 0.95) -> TrialWeights:
    """Importance sampling for whole trials: weights are products over steps, equation (eq-trial-weight).

    ========= ====== ================================================================================================
    Symbol    Shape  Description
    ========= ====== ================================================================================================
    log_ratio (T, n) log target - log logging probability of the action taken at each step of n trials, each given
                     the history so far: either policy may learn within a trial; -inf where the target never does it
    reward    (T, n) what the steps earned
    per_step  bool   weigh each reward by the steps up to it (Precup et al. 2000) instead of by the whole trial
    ========= ====== ================================================================================================

    Unbiased under either choice, and of little use beyond a few steps: the variance of a weight grows like
    (1 + chi^2)^T.

    Raises:
        ValueError: shapes, fewer than 2 trials, nan or +inf, or ``level`` outside (0, 1).
    """
    ratio, earned = _array(log_ratio), _array(reward)
    require(ratio.ndim == 2 and ratio.shape[1] >= 2, "log_ratio", ratio.shape, "a shape (T, n) with n >= 2")
    require(earned.shape == ratio.shape, "reward", earned.shape, f"{ratio.shape}, the shape of log_ratio")
    _require_finite("reward", earned)
    require(bool((ratio < np.inf).all()), "log_ratio", float(ratio.max()), "finite numbers or -inf")
    weight = np.exp(ratio.cumsum(0))
    returns = (weight * earned).sum(0) if per_step else weight[-1] * earned.sum(0)
    return TrialWeights(weight, effective_size(weight), t_interval(returns, level))


def weight_variance(chi_square: float, steps: int) -> float:
    """Variance of the weight of a trial whose steps are independent: (1 + chi^2)^T - 1, equation (eq-weight-variance).

    ``chi_square`` is the chi-square divergence of the target from the logging policy in one step, the mean of w^2 less
    1. The effective share of n trials is about (1 + chi^2)^-T.

    Raises:
        ValueError: a negative ``chi_square``, or ``steps`` not a whole number >= 1.
    """
    require(number(chi_square) and chi_square >= 0, "chi_square", chi_square, "a number >= 0")
    require(whole(steps, 1), "steps", steps, "a whole number >= 1")
    return float((1 + chi_square) ** steps - 1)
