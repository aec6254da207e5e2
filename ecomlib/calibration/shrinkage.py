"""Empirical Bayes: what the population of products looks like once the noise of each estimate is taken off."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Population(NamedTuple):
    """Normal distribution of (log a, logit share, log traffic) over products, and each product's posterior."""

    mean: Array
    """(3,)."""
    covariance: Array
    """(3, 3)."""
    mean_error: Array
    """(3,) standard error of `mean`."""
    log_sensitivity: Array
    """(P,) posterior mean of log a."""
    log_sensitivity_sd: Array
    """(P,) posterior standard deviation of log a."""
    sensitivity: Array
    """(P,) posterior mean of a."""
    logit_share: Array
    """(P,) posterior mean of the logit share."""
    log_likelihood: Array
    """(iterations,) log marginal likelihood; it never falls."""
    converged: bool
    """False if it was still rising: the estimates say next to nothing about the population."""


def fit_population(
    slope: Array,
    logit_share: Array,
    covariance: Array,
    log_traffic: Array,
    iterations: int = 500,
    tolerance: float = 1e-9,
    nodes: int = 101,
) -> Population:
    """Fit a population of products by marginal maximum likelihood (an expectation-maximisation algorithm).

    Product i has z_i = log a_i, logit share q_i and log traffic t_i. Its estimates are taken as
    (slope, logit_share)_i ~ Normal((exp z_i, q_i), covariance_i), t_i as known, and
    (z_i, q_i, t_i) ~ Normal(mean, covariance) over products. The slope, not its logarithm, has the normal error, so
    an estimate of the wrong sign needs no special case: no positive a explains it well, its posterior is
    the part of the population that its standard error still allows, and it pulls the population towards small a.
    The integral over q is exact; the one over z is a trapezoid rule of `nodes` points around each
    product's posterior, accurate to rounding for these smooth densities.

    Args:
        slope, logit_share: (P,) estimates.
        covariance: (P, 2, 2) of (slope, logit_share).
        log_traffic: (P,).

    The standard error of the mean is from the outer product of the products' scores in (mean, covariance)
    of (z, q); log traffic has the usual sd / sqrt(P).
    """
    observed = np.stack((slope, logit_share), 1)
    error = np.sqrt(covariance[:, 0, 0])
    traffic = log_traffic - log_traffic.mean()
    count = len(slope)

    # Start from moments: robust ones, since raw slopes may have any sign.
    centre = np.log(max(np.median(slope), 0.1 * np.abs(slope).mean(), 1e-3))
    location = np.array([centre, logit_share.mean()])  # of (z, q) at mean traffic
    loading = np.zeros(2)  # regression of (z, q) on log traffic
    spread = np.diag([0.5**2, max(logit_share.var(), 1e-4)])  # covariance of (z, q) given log traffic
    history: list[float] = []
    converged = False

    while True:
        prior_mean = location + traffic[:, None] * loading  # (P, 2)
        z, weight = _nodes(slope, error, prior_mean[:, 0], np.sqrt(spread[0, 0]), nodes)
        regression = spread[0, 1] / spread[0, 0]
        variance = spread[1, 1] - regression * spread[0, 1]  # of q given z
        q_prior = prior_mean[:, 1:] + regression * (z - prior_mean[:, :1])
        slope_left, share_left = observed[:, :1] - np.exp(z), observed[:, 1:] - q_prior  # residuals, (P, nodes)
        total = covariance + np.diag([0.0, variance])
        inverse = np.linalg.inv(total)[..., None]
        log_density = (
            -0.5 * (inverse[:, 0, 0] * slope_left**2 + inverse[:, 1, 1] * share_left**2)
            - inverse[:, 0, 1] * slope_left * share_left
            - 0.5 * np.log(np.linalg.det(total))[:, None]
            - 0.5 * (z - prior_mean[:, :1]) ** 2 / spread[0, 0]
            - 0.5 * np.log(spread[0, 0])
            - 1.5 * np.log(2 * np.pi)
        )
        peak = log_density.max(1, keepdims=True)
        posterior = np.exp(log_density - peak) * weight
        evidence = posterior.sum(1, keepdims=True)
        posterior /= evidence
        history.append(float((np.log(evidence) + peak).sum()))

        q = q_prior + variance * (inverse[:, 1, 0] * slope_left + inverse[:, 1, 1] * share_left)
        q_variance = variance - variance**2 * inverse[:, 1, 1, 0]
        mean = np.stack(((posterior * z).sum(1), (posterior * q).sum(1)), 1)
        second = np.empty((count, 2, 2))
        second[:, 0, 0] = (posterior * (z - mean[:, :1]) ** 2).sum(1)
        second[:, 1, 1] = (posterior * (q - mean[:, 1:]) ** 2).sum(1) + q_variance
        second[:, 0, 1] = second[:, 1, 0] = (posterior * (z - mean[:, :1]) * (q - mean[:, 1:])).sum(1)

        converged = len(history) > 1 and history[-1] - history[-2] < tolerance * count
        if converged or len(history) == iterations:
            break  # the parameters used above stay, so the posteriors belong to them
        location = mean.mean(0)
        scale = (traffic**2).sum()
        loading = traffic @ mean / scale if scale > 1e-12 * count else np.zeros(2)
        deviation = mean - location - traffic[:, None] * loading
        spread = (deviation[:, :, None] * deviation[:, None, :] + second).mean(0) + 1e-8 * np.eye(2)

    deviation = mean - location - traffic[:, None] * loading
    joint = np.zeros((3, 3))
    joint[:2, :2] = spread + traffic.var() * np.outer(loading, loading)
    joint[:2, 2] = joint[2, :2] = traffic.var() * loading
    joint[2, 2] = traffic.var()
    mean_error = np.append(
        np.sqrt(location_variance(deviation, second, spread) + loading**2 * traffic.var() / count),
        np.sqrt(traffic.var() / count),
    )
    return Population(
        mean=np.append(location, log_traffic.mean()),
        covariance=joint,
        mean_error=mean_error,
        log_sensitivity=mean[:, 0],
        log_sensitivity_sd=np.sqrt(second[:, 0, 0]),
        sensitivity=(posterior * np.exp(z)).sum(1),
        logit_share=mean[:, 1],
        log_likelihood=np.array(history),
        converged=converged,
    )


def _nodes(slope: Array, error: Array, centre: Array, sd: float, nodes: int) -> tuple[Array, Array]:
    """(P, nodes) values of z = log a where the posterior of each product has its mass, and trapezoid weights."""
    low, high = centre - 8 * sd, centre + 8 * sd
    smallest = np.exp(low)
    like_low = np.log(np.maximum(slope - 8 * error, smallest))
    like_high = np.log(np.maximum(slope + 8 * error, smallest))
    # Where the two ranges do not meet (or hardly) the estimate contradicts the population: cover both.
    meet = np.minimum(high, like_high) - np.maximum(low, like_low) > 1e-6
    left = np.where(meet, np.maximum(low, like_low), np.minimum(low, like_low))
    right = np.where(meet, np.minimum(high, like_high), np.maximum(high, like_high))
    z = left[:, None] + (right - left)[:, None] * np.linspace(0, 1, nodes)
    weight = np.ones((len(slope), nodes)) * ((right - left) / (nodes - 1))[:, None]
    weight[:, [0, -1]] /= 2
    return z, weight


def location_variance(deviation: Array, second: Array, spread: Array) -> Array:
    """(2,) sampling variance of the population mean of (z, q), from the scores of mean and covariance."""
    inverse = np.linalg.inv(spread)
    outer = deviation[:, :, None] * deviation[:, None, :] + second
    location = deviation @ inverse
    scale = 0.5 * (inverse @ outer @ inverse - inverse)
    scores = np.column_stack((location, scale[:, 0, 0], 2 * scale[:, 0, 1], scale[:, 1, 1]))
    return np.diag(np.linalg.inv(scores.T @ scores))[:2]
