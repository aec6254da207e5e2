"""Rates that differ between units: Poisson counts whose log rate is normal over units."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from .shrinkage import Array


class Rates(NamedTuple):
    """Normal distribution of log rates over U units, and each unit's posterior."""

    mean: float
    sd: float
    mean_error: float
    """Standard error of `mean`."""
    sd_error: float
    """Standard error of `sd`."""
    log_rate: Array
    """(U,) posterior mean of the log rate."""
    log_likelihood: Array
    """(iterations,); it never falls."""


def fit_rates(events: Array, exposure: Array, iterations: int = 2000, tolerance: float = 1e-8) -> Rates:
    """Marginal maximum likelihood (an expectation-maximisation algorithm) of the population of log rates.

    Unit i has `events` ~ Poisson(exposure exp(z)), z ~ Normal(mean, sd^2), both (U,); exposure > 0. The integral over z
    is a trapezoid sum on a grid of its own around each unit's likelihood.
    """
    centre, width = np.log((events + 0.5) / exposure), 1 / np.sqrt(events + 0.5)
    z = centre[:, None] + width[:, None] * np.linspace(-9, 9, 61)
    log_weight = events[:, None] * z - exposure[:, None] * np.exp(z) - gammaln(events + 1)[:, None]
    log_weight += (events * np.log(exposure))[:, None] + np.log(width * 0.3)[:, None]
    total = np.log(max(events.sum(), 0.5) / exposure.sum())
    mean, variance = min(float(np.average(centre, weights=events + 0.5)), total), 0.5
    history: list[float] = []
    while True:
        density = log_weight - 0.5 * (z - mean) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)
        peak = density.max(1, keepdims=True)
        posterior = np.exp(density - peak)
        evidence = posterior.sum(1, keepdims=True)
        posterior /= evidence
        history.append(float((np.log(evidence) + peak).sum()))
        first = (posterior * z).sum(1)
        second = (posterior * (z - mean) ** 2).sum(1)
        if len(history) == iterations or (len(history) > 1 and history[-1] - history[-2] < tolerance * len(events)):
            break  # the parameters used above stay, so the posteriors belong to them
        mean = float(first.mean())
        variance = max(float((posterior * (z - mean) ** 2).sum(1).mean()), 1e-6)
    scores = np.stack(((first - mean) / variance, 0.5 * (second / variance - 1) / variance), 1)
    information = scores.T @ scores + 1e-12 * np.eye(2)
    error = np.sqrt(np.diag(np.linalg.inv(information)))
    sd = float(np.sqrt(variance))
    return Rates(mean, sd, float(error[0]), float(error[1] / (2 * sd)), first, np.array(history))


def range_in_sd(units: int) -> float:
    """Mean range (largest less smallest) of so many independent normal variables, in standard deviations."""
    from scipy.integrate import quad
    from scipy.stats import norm

    return quad(lambda x: 1 - norm.cdf(x) ** units - norm.sf(x) ** units, -12, 12)[0]
