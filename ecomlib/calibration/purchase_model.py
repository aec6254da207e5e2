"""The purchase model fitted to every product's weekly sales at once. Chapter "Dynamic pricing"."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, wrightomega, xlogy

Array = NDArray[np.float64]


class Weeks(NamedTuple):
    """Weekly observations of P products, padded to W weeks. Padding has `observed` False."""

    units: Array
    """(P, W) units sold."""
    visitors: Array
    """(P, W) shoppers who could have bought."""
    gap: Array
    """(P, W) reference markup minus markup, so that its coefficient is the sensitivity a > 0."""
    controls: Array
    """(P, W, C) promotion and season, centred per product."""
    observed: NDArray[np.bool_]
    """(P, W) which entries are data."""


class PurchaseFit(NamedTuple):
    """Estimates of P products: [logit share at the reference markup, sensitivity a, C controls]."""

    coefficients: Array
    """(P, 2 + C)."""
    covariance: Array
    """(P, 2 + C, 2 + C), quasi-Poisson: multiplied by the dispersion."""
    dispersion: Array
    """(P,) Pearson chi-square per degree of freedom, not below 1."""
    converged: NDArray[np.bool_]
    """(P,)."""


def design(weeks: Weeks) -> Array:
    """(P, W, 2 + C): the constant, the markup gap and the controls."""
    constant = np.ones_like(weeks.gap)
    return np.concatenate((np.stack((constant, weeks.gap), -1), weeks.controls), -1)


def expected_units(weeks: Weeks, coefficients: Array) -> Array:
    """(P, W): visitors * sigmoid(q + a (reference - markup) + controls)."""
    return weeks.visitors * expit(np.einsum("pwk,pk->pw", design(weeks), coefficients))


def poisson_deviance(units: Array, expected: Array) -> Array:
    """Elementwise Poisson deviance 2 (y log(y / mu) - (y - mu)), with 0 log 0 = 0."""
    return 2 * (xlogy(units, units / expected) - (units - expected))


def best_markup(sensitivity: Array, logit_share: Array, reference_markup: float) -> Array:
    """Markup that maximises (m - 1) sigmoid(u - a m), with u = logit_share + a * reference_markup.

    m* = 1 + (1 + W(exp(u - a - 1))) / a with Lambert's W, not clipped to any range of prices (eq-lambert).
    """
    exponent = logit_share + sensitivity * (reference_markup - 1) - 1
    return 1 + (1 + wrightomega(exponent)) / sensitivity  # W(exp(x)) that cannot overflow


def fit_purchases(weeks: Weeks, control_sd: float, slope_sd: float = 100.0, iterations: int = 100) -> PurchaseFit:
    """Fit units ~ Poisson(visitors * sigmoid(q + a (reference - markup) + b . controls)), product by product.

    The logit rather than the log link, because this *is* the model that the task family simulates: a and q
    carry over without translation, and shares stay below one. At the small shares of a grocery panel the two
    links agree. All products are fitted together by Fisher scoring with step halving.

    Controls get a ridge penalty, a Normal(0, control_sd^2) prior in units of the coefficient, since a
    product that is never (or always) promoted cannot tell its promotion effect; the slope gets one so wide
    (slope_sd) that it only keeps a product whose price did not move from breaking the solver. Counts vary
    more than Poisson; the estimate stays consistent and its covariance is multiplied by the dispersion
    (quasi-Poisson). Weeks are taken as independent: autocorrelated demand makes these errors too small.
    """
    x, y, n = design(weeks), weeks.units, weeks.visitors
    seen = weeks.observed.astype(float)
    size = x.shape[-1]
    precision = np.r_[0.0, slope_sd**-2, np.full(size - 2, control_sd**-2)]

    share = np.maximum((y * seen).sum(1), 0.5) / (n * seen).sum(1)
    beta = np.zeros((len(y), size))
    beta[:, 0] = np.log(share) - np.log1p(-share)

    def objective(beta: Array) -> Array:
        expected = n * expit(np.einsum("pwk,pk->pw", x, beta))
        return (seen * (xlogy(y, expected) - expected)).sum(1) - 0.5 * (precision * beta**2).sum(1)

    def scoring(beta: Array) -> tuple[Array, Array, Array]:
        share = expit(np.einsum("pwk,pk->pw", x, beta))
        expected = n * share
        score = np.einsum("pw,pwk->pk", seen * (y - expected) * (1 - share), x) - precision * beta
        weight = seen * expected * (1 - share) ** 2
        return score, np.einsum("pwk,pwl->pkl", x * weight[..., None], x) + np.diag(precision), expected

    value = objective(beta)
    converged = np.zeros(len(y), bool)
    for _ in range(iterations):
        score, information, _ = scoring(beta)
        step = np.linalg.solve(information, score[..., None])[..., 0]
        converged = (score * step).sum(1) < 1e-12  # squared length of the step in standard errors
        if converged.all():
            break
        length = np.where(converged, 0.0, 1.0)
        for _ in range(30):
            trial = beta + length[:, None] * step
            trial_value = objective(trial)
            worse = trial_value < value - 1e-9 * np.abs(value)
            if not worse.any():
                break
            length = np.where(worse, length / 2, length)
        beta, value = np.where(worse[:, None], beta, trial), np.where(worse, value, trial_value)

    _, information, expected = scoring(beta)
    freedom = np.maximum(seen.sum(1) - size, 1.0)
    pearson = (seen * (y - expected) ** 2 / expected).sum(1) / freedom
    dispersion = np.maximum(pearson, 1.0)
    return PurchaseFit(beta, dispersion[:, None, None] * np.linalg.inv(information), dispersion, converged)
