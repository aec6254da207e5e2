"""What a policy would have earned, from decisions that another one logged: estimators for policies that do not learn.

A log is n decisions. Decision i was taken in a context x_i by a logging policy, which chose action a_i with the logged
probability (propensity) p_i and earned r_i. The target policy chooses action a in x_i with probability target[i, a],
and w_i = target[i, a_i] / p_i is the *weight* of the row.

====================== ================================================== ==========================================
Estimator              Mean over rows of                                  Wrong when
====================== ================================================== ==========================================
``direct_method``      sum_a target[i, a] model[i, a]                     the model of rewards is
``inverse_propensity`` w_i r_i                                            the propensities are, or support is missing
``self_normalised``    w_i r_i, divided by the mean of w_i                the same
``doubly_robust``      direct method + w_i (r_i - model[i, a_i])          both are
====================== ================================================== ==========================================

Policies that learn as they go need ``ecomlib.evaluation.trial_logs``. Chapter "Evaluating adaptive policies"; Dudik et
al. (2014), Swaminathan and Joachims (2015), Saito et al. (2020).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecomlib.evaluation.row_ratios import ratio_estimate
from ecomlib.evaluation.statistics import Interval, _array, _require_finite
from ecomlib.families.base import number, require, whole


class LoggedDecisions(NamedTuple):
    """Checked arrays of n decisions; made by ``logged``."""

    action: NDArray[np.int64]  # (n,)
    reward: NDArray[np.float64]  # (n,)
    propensity: NDArray[np.float64]  # (n,), of the action that was taken
    target: NDArray[np.float64]  # (n, actions)

    @property
    def weight(self) -> NDArray[np.float64]:
        """(n,) how much likelier the target policy is to do what was done."""
        return self.target[np.arange(len(self.action)), self.action] / self.propensity


def logged(action: ArrayLike, reward: ArrayLike, propensity: ArrayLike, target: ArrayLike) -> LoggedDecisions:
    """A log and the policy that is to be judged by it.

    ========== =========== ===========================================================================================
    Symbol     Shape       Description
    ========== =========== ===========================================================================================
    action     (n,)        actions taken, from 0
    reward     (n,)        what each earned
    propensity (n,)        probability, as logged, with which the taken action was chosen: in (0, 1]
    target     (n, action) probability of every action under the target policy in the context of the row; (action,) for
                           a policy without context
    ========== =========== ===========================================================================================

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, an action out of range, a propensity outside
            (0, 1], or a row of ``target`` that is negative or does not sum to 1 (to 1e-6).
    """
    act, earned, chance, wanted = (_array(x) for x in (action, reward, propensity, target))
    require(act.ndim == 1 and len(act) >= 2, "action", act.shape, "a shape (n,) with n >= 2")
    for name, array in (("reward", earned), ("propensity", chance)):
        require(array.shape == act.shape, name, array.shape, f"{act.shape}, the shape of action")
    wanted = np.broadcast_to(wanted, (len(act), wanted.shape[-1])) if wanted.ndim == 1 else wanted
    require(
        wanted.ndim == 2 and len(wanted) == len(act), "target", wanted.shape, f"({len(act)}, actions) or (actions,)"
    )
    for name, array in (("action", act), ("reward", earned), ("propensity", chance), ("target", wanted)):
        _require_finite(name, array)
    actions = wanted.shape[1]
    inside = (act == np.floor(act)) & (act >= 0) & (act < actions)
    _first_bad("action", act, inside, f"whole numbers from 0 to {actions - 1}")
    _first_bad("propensity", chance, (chance > 0) & (chance <= 1), "above 0 and at most 1")
    _first_bad("target", wanted.min(1), wanted.min(1) >= 0, "no negative probability")
    _first_bad("target", wanted.sum(1), np.abs(wanted.sum(1) - 1) < 1e-6, "rows that sum to 1")
    return LoggedDecisions(act.astype(np.int64), earned, chance, wanted)


class Estimate(NamedTuple):
    """What the target policy earns a decision, by one estimator."""

    estimate: float
    """Mean reward of a decision, in the unit of the rewards."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    n: int
    """Rows of the log."""
    effective: float
    """Rows drawn from the target policy itself that would be as informative, (sum w)^2 / sum w^2. Of the direct method,
    which uses no weights, n."""


def inverse_propensity(
    log: LoggedDecisions, clip: float = math.inf, level: float = 0.95, interval: str = "normal", **bootstrap: int
) -> Estimate:
    """Inverse propensity score: mean of w_i r_i, equation (eq-ips). Unbiased if every action that the target policy
    may take had a chance in the log, with the propensities that the log states.

    Args:
        log: from ``logged``.
        clip: largest weight allowed; less variance, and a bias towards 0 for rewards that are not negative.
        level: probability that the interval is to cover the target policy's mean reward.
        interval: ``"normal"`` (Student's, of the rows' contributions), ``"studentised"`` or ``"percentile"`` bootstrap.
            Each treats rows as independent, and none sees a rare, heavy weight that did not happen to be drawn.
        bootstrap: ``resamples`` and ``seed`` of the two bootstraps.

    Raises:
        ValueError: ``clip`` not positive, ``level`` outside (0, 1), unknown ``interval``, too few ``resamples``.
    """
    weight = _clipped(log, clip)
    return _estimate(weight * log.reward, np.ones_like(weight), weight, level, interval, **bootstrap)


def self_normalised(
    log: LoggedDecisions, clip: float = math.inf, level: float = 0.95, interval: str = "normal", **bootstrap: int
) -> Estimate:
    """The same divided by the mean weight, equation (eq-snips): never outside the range of the rewards, and unmoved by
    a constant added to them. A ratio, so its bias, of order 1/n, vanishes as the log grows.

    Arguments as ``inverse_propensity``; the normal interval is of the linearised ratio.

    Raises:
        ValueError: as ``inverse_propensity``, or every weight is 0: nothing of what the target policy does was logged.
    """
    weight = _clipped(log, clip)
    require(bool((weight > 0).any()), "target", "weights all 0", "some action that is in the log")
    return _estimate(weight * log.reward, weight, weight, level, interval, **bootstrap)


def direct_method(
    log: LoggedDecisions, model: ArrayLike, level: float = 0.95, interval: str = "normal", **bootstrap: int
) -> Estimate:
    """Mean reward that a model predicts for the target policy, equation (eq-direct). ``model`` is (n, action) or
    (action,): the predicted reward of every action.

    The interval is over contexts, the model taken as true. It holds nothing of the model's error, and is therefore not
    one that can be relied on; it has no width at all where contexts do not matter.

    Raises:
        ValueError: ``model`` of another shape or not finite, or as ``inverse_propensity``.
    """
    value = (log.target * _model(log, model)).sum(1)
    return _estimate(value, np.ones_like(value), np.ones_like(value), level, interval, **bootstrap)


def doubly_robust(
    log: LoggedDecisions,
    model: ArrayLike,
    clip: float = math.inf,
    level: float = 0.95,
    interval: str = "normal",
    **bootstrap: int,
) -> Estimate:
    """Direct method plus the weighted error of its model, equation (eq-doubly-robust). Unbiased if either the
    propensities or the model are right; the better the model, the less the weights matter.

    The model must not have been fitted to the rows that it corrects: use ``cross_fitted_rates``, or other data.
    Arguments and errors as ``inverse_propensity`` and ``direct_method``.
    """
    predicted, weight = _model(log, model), _clipped(log, clip)
    taken = predicted[np.arange(len(log.action)), log.action]
    value = (log.target * predicted).sum(1) + weight * (log.reward - taken)
    return _estimate(value, np.ones_like(value), weight, level, interval, **bootstrap)


def effective_size(weight: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """(sum w)^2 / sum w^2 along ``axis``: equation (eq-effective-size). n for equal weights, 1 where one row has all
    the weight, 0 where all are 0."""
    weight = _array(weight)
    squares = (weight**2).sum(axis)
    return np.divide(weight.sum(axis) ** 2, squares, out=np.zeros_like(squares), where=squares > 0)


class Diagnosis(NamedTuple):
    """Whether a log can answer the question at all."""

    mean_weight: Interval
    """Of the weights; 1 where propensities are right and the log has every action that the target policy takes."""
    effective: float
    """``effective_size`` of the weights."""
    largest: float
    """Share of the total weight that a single row has."""
    unseen: float
    """Probability that the target policy takes an action that is not in the log at all: at least this much of its value
    is a guess."""


def diagnose(log: LoggedDecisions, level: float = 0.95) -> Diagnosis:
    """Look at the weights before looking at any estimate.

    A mean weight whose interval excludes 1 says that propensities or support are wrong; one that includes it does not
    say that they are right, since the interval, too, is blind to weights that did not happen to be drawn.
    """
    weight = log.weight
    mean = _estimate(weight, np.ones_like(weight), weight, level, "normal")
    never = np.bincount(log.action, minlength=log.target.shape[1]) == 0
    total = weight.sum()
    largest = float(weight.max() / total) if total > 0 else 0.0
    return Diagnosis(Interval(*mean[:4]), mean.effective, largest, float(log.target[:, never].sum(1).mean()))


def cross_fitted_rates(
    action: ArrayLike, reward: ArrayLike, actions: int, folds: int = 5, strength: float = 100.0
) -> NDArray[np.float64]:
    """(n, actions) mean reward of every action, for each row from the *other* folds: a model for ``doubly_robust``.

    An action's mean is drawn towards that of all actions by ``strength`` decisions' worth. Row i belongs to fold i mod
    ``folds``; there is no context in it.

    Raises:
        ValueError: shapes, actions out of range, ``folds`` not from 2 to n, or a negative ``strength``.
    """
    act, earned = _array(action), _array(reward)
    require(whole(actions, 1, 1_000_000), "actions", actions, "a whole number from 1 to 1,000,000")
    require(act.ndim == 1 and act.shape == earned.shape, "reward", earned.shape, f"{act.shape}, the shape of action")
    require(whole(folds, 2, len(act)), "folds", folds, f"a whole number from 2 to {len(act)}")
    require(number(strength) and strength >= 0, "strength", strength, "a number >= 0")
    inside = (act == np.floor(act)) & (act >= 0) & (act < actions)
    _first_bad("action", act, inside, f"whole numbers from 0 to {actions - 1}")
    index, fold = act.astype(np.int64), np.arange(len(act)) % folds
    rates = np.empty((folds, actions))
    for k in range(folds):
        other = fold != k
        count = np.bincount(index[other], minlength=actions)
        total = np.bincount(index[other], weights=earned[other], minlength=actions)
        mean = earned[other].mean()
        rates[k] = np.divide(
            total + strength * mean, count + strength, out=np.full(actions, mean), where=count + strength > 0
        )
    return rates[fold]


# ---------------------------------------- all estimators are ratios of means of rows
def _estimate(top, bottom, weight, level: float, interval: str, **bootstrap: int) -> Estimate:
    return Estimate(*ratio_estimate(top, bottom, level, interval, **bootstrap), float(effective_size(weight)))


# ---------------------------------------- checked arguments
def _clipped(log: LoggedDecisions, clip: float) -> NDArray[np.float64]:
    require(clip == math.inf or number(clip, 0), "clip", clip, "a number above 0, or math.inf")
    return np.minimum(log.weight, clip)


def _model(log: LoggedDecisions, model: ArrayLike) -> NDArray[np.float64]:
    predicted = _array(model)
    shapes = (log.target.shape, log.target.shape[1:])
    require(predicted.shape in shapes, "model", predicted.shape, " or ".join(map(str, shapes)))
    _require_finite("model", predicted)
    return np.broadcast_to(predicted, log.target.shape)


def _first_bad(field: str, values: NDArray[np.float64], good: NDArray[np.bool_], allowed: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(f"{field} of row {row} is {values[row]:g}; allowed: {allowed}")
