"""Negative-binomial demand of many products from sales that a stock-out may have cut, and the population of products
behind it (chapter "Inventory")."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import betainc, gammaln

from .shrinkage import Array, location_variance

FLATTEST, WIDEST = -7.0, 6.0
"""Range of log(dispersion - 1): below, a negative binomial is Poisson; above, most periods sell nothing."""


class Counts(NamedTuple):
    """Sales of P products as a table of the numbers that occur, K for each."""

    units: Array
    """(P, K) units sold in a period."""
    periods: Array
    """(P, K) periods with these sales; 0 fills up."""
    cut: Array
    """(P, K) bool: everything was sold, so that demand was at least `units`."""


class Demand(NamedTuple):
    """Normal distribution of (log mean, log(dispersion - 1)) over products, and each product's posterior mean."""

    mean: Array
    """(2,)."""
    covariance: Array
    """(2, 2)."""
    mean_error: Array
    """(2,) standard error of `mean`."""
    products: Array
    """(P, 2) posterior mean of (log mean, log(dispersion - 1))."""
    log_likelihood: Array
    """(iterations,) log marginal likelihood; it never falls."""
    converged: bool


def log_likelihood(counts: Counts, log_mean: Array, log_size: Array) -> Array:
    """(P, S) log probability of each product's sales where demand is negative binomial.

    Args:
        log_mean: (P, S) log of the mean mu.
        log_size: (P, S) log of r = mu / (phi - 1), where phi is variance / mean. Demand D has probabilities
            Gamma(k + r) / (Gamma(r) k!) (1 - q)^r q^k with q = mu / (mu + r); a period in which all of s units were
            sold has probability P(D >= s) = I_q(s, r), the regularised incomplete beta function.
    """
    size = np.exp(log_size)
    log_q = -np.logaddexp(0.0, log_size - log_mean)
    log_rest = -np.logaddexp(0.0, log_mean - log_size)
    start, q = gammaln(size), np.exp(log_q)
    total = np.zeros_like(log_mean)
    for k in range(counts.units.shape[1]):
        for cut in (False, True):
            rows = np.flatnonzero((counts.periods[:, k] > 0) & (counts.cut[:, k] == cut))
            if len(rows) == 0:
                continue
            units, periods = counts.units[rows, k, None], counts.periods[rows, k, None]
            r = size[rows]
            if cut:
                survival = betainc(np.maximum(units, 1.0), r, q[rows])
                value = np.where(units > 0, np.log(np.maximum(survival, 1e-300)), 0.0)
            else:
                value = gammaln(units + r) - start[rows] - gammaln(units + 1) + r * log_rest[rows] + units * log_q[rows]
            total[rows] += periods * value
    return total


def fit_demand(counts: Counts, iterations: int = 1000, tolerance: float = 1e-7) -> Demand:
    """Fit a population of products by marginal maximum likelihood (an expectation-maximisation algorithm).

    Product i has mean demand mu_i and dispersion phi_i = variance / mean, with (log mu_i, log(phi_i - 1)) normal over
    products. Its sales enter with their exact likelihood, periods that sold out by P(D >= stock). The integrals over a
    product's parameters are trapezoid sums on a grid of its own in (log mu, log r), r = mu / (phi - 1), where the
    likelihood of uncut counts has its axes.
    """
    u, v, weight = _grid(counts)
    weight = weight + log_likelihood(counts, u, u - v)
    highest = weight.max(1, keepdims=True)
    weight -= highest
    top = (weight > -40).any(0)  # columns of the grid that matter to any product
    u, v, weight = u[:, top], v[:, top], weight[:, top]
    features = np.stack((u, v, u * u, u * v, v * v), -1)

    first = (np.exp(weight)[..., None] * features).sum(1) / np.exp(weight).sum(1)[:, None]
    mean = np.median(first[:, :2], 0)
    covariance = np.diag(np.maximum(first[:, :2].var(0), 0.05))
    left_out = float(highest.sum()) - len(u) * np.log(2 * np.pi)
    history: list[float] = []
    converged = False
    while True:
        precision = np.linalg.inv(covariance)
        linear = precision @ mean
        form = np.array([*linear, -0.5 * precision[0, 0], -precision[0, 1], -0.5 * precision[1, 1]])
        constant = -0.5 * mean @ linear + 0.5 * np.linalg.slogdet(precision)[1]
        density = features @ form + weight
        peak = density.max(1, keepdims=True)
        posterior = np.exp(density - peak)
        evidence = posterior.sum(1, keepdims=True)
        moments = np.einsum("ps,psf->pf", posterior, features) / evidence
        history.append(float((np.log(evidence) + peak).sum()) + constant * len(u) + left_out)
        converged = len(history) > 1 and history[-1] - history[-2] < tolerance * len(u)
        if converged or len(history) == iterations:
            break  # the parameters used above stay, so the posteriors belong to them
        mean = moments[:, :2].mean(0)
        a, b, c = moments[:, 2:].mean(0) - np.array([mean[0] ** 2, mean[0] * mean[1], mean[1] ** 2])
        covariance = np.array([[a, b], [b, c]]) + 1e-6 * np.eye(2)

    products = moments[:, :2]
    a, b, c = (moments[:, 2:] - np.stack((products[:, 0] ** 2, products.prod(1), products[:, 1] ** 2), 1)).T
    second = np.stack((a, b, b, c), 1).reshape(-1, 2, 2)
    error = np.sqrt(location_variance(products - mean, second, covariance))
    return Demand(mean, covariance, error, products, np.array(history), converged)


def _grid(counts: Counts, sizes: int = 41) -> tuple[Array, Array, Array]:
    """(P, S) values of (log mu, log(phi - 1)) where a product's likelihood has its mass, and log trapezoid weights."""
    sold = (counts.units * counts.periods).sum(1)
    periods = counts.periods.sum(1)
    known = (counts.periods * ~counts.cut).sum(1)
    censored = known < periods
    centre = np.log(np.maximum(sold, 0.5) / periods)

    # A coarse look along log r, at the log mu of the highest likelihood there, finds the part within 30 of the best.
    coarse = centre[:, None] - np.linspace(WIDEST, FLATTEST - 2 * censored.any(), 27)
    best = np.broadcast_to(centre[:, None], coarse.shape).copy()
    if censored.any():
        best[censored] = _uncut_mean(Counts(*(part[censored] for part in counts)), coarse[censored])
    height = log_likelihood(counts, best, coarse)
    near = height > height.max(1, keepdims=True) - 30
    step = coarse[:, 1] - coarse[:, 0]
    rows = np.arange(len(coarse))
    low = coarse[rows, near.argmax(1)] - step
    high = coarse[rows, near.shape[1] - 1 - near[:, ::-1].argmax(1)] + step
    fine = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, sizes)
    best = np.stack([np.interp(*row) for row in zip(fine, coarse, best)])
    spread = np.sqrt((1 + np.exp(best - fine)) / (np.maximum(known, 1)[:, None] * np.exp(best)))
    spread = np.minimum(spread, 1.0)

    reach = np.arange(-8.0, 9.0)
    if censored.any():  # a likelihood that falls slowly, or not at all, towards large means
        reach = np.arange(-8.0, 15.0)
    log_mean = best[..., None] + spread[..., None] * reach
    log_size = np.broadcast_to(fine[..., None], log_mean.shape)
    weight = np.broadcast_to((np.log(spread) + np.log((high - low) / (sizes - 1))[:, None])[..., None], log_mean.shape)
    shape = (len(centre), -1)
    u, v = log_mean.reshape(shape), (log_mean - log_size).reshape(shape)
    return u, v, weight.reshape(shape)


def _uncut_mean(counts: Counts, log_size: Array, steps: int = 25) -> Array:
    """(P, W) log mu of (nearly) the highest likelihood at each log r: cut periods are filled in by E[D | D >= s]."""
    size = np.exp(log_size)
    periods = counts.periods.sum(1)
    log_mean = np.log(np.maximum((counts.units * counts.periods).sum(1), 0.5) / periods)[:, None] + 0 * log_size
    most = np.log(np.maximum((counts.units * (counts.periods > 0)).max(1), 1.0))[:, None] + 2.0
    plain = (counts.units * counts.periods * ~counts.cut).sum(1)[:, None]
    for _ in range(steps):
        q = 1 / (1 + np.exp(log_size - log_mean))
        filled = np.zeros_like(log_mean)
        for k in range(counts.units.shape[1]):
            rows = np.flatnonzero((counts.periods[:, k] > 0) & counts.cut[:, k])
            if len(rows) == 0:
                continue
            units, r = counts.units[rows, k, None], size[rows]
            above = np.maximum(betainc(np.maximum(units, 1.0), r, q[rows]), 1e-300)
            # E[D; D >= s] = mu P(D' >= s - 1), D' with size r + 1
            shifted = np.where(units > 1, betainc(np.maximum(units - 1, 1.0), r + 1, q[rows]), 1.0)
            ratio = np.where(units > 0, np.exp(log_mean[rows]) * shifted / above, np.exp(log_mean[rows]))
            filled[rows] += counts.periods[rows, k, None] * np.maximum(ratio, units)
        log_mean = np.minimum(np.log(np.maximum(plain + filled, 0.5) / periods[:, None]), most)
    return log_mean
