"""What a campaign's own log says once it is weighed against all other campaigns: logistic regression with normal random
effects (chapter "Click-rate prediction with MAML").

With the true shared log-odds and the true prior, ``predictive_rate`` is the best prediction that a log allows; with
estimates of them (``EmpiricalBayes``) it is the classical method.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.quasirandom import SobolEngine
from torch.special import ndtri

from ..families.base import require, whole


class Posterior(NamedTuple):
    """Normal approximation of what a log says of M campaigns' own effects."""

    mode: Tensor  # (M, effects)
    covariance: Tensor  # (M, effects, effects)


def posterior(design: Tensor, offset: Tensor, counts: Tensor, mean: Tensor, sd: Tensor, steps: int = 30) -> Posterior:
    """Mode of the posterior of effects z ~ Normal(mean, sd^2) and inverse curvature there, by Newton's method.

    ======  ======================  ========================================================
    Symbol  Shape                   Description
    ======  ======================  ========================================================
    design  (cells, effects)        which effects the log-odds of a cell contain
    offset  (cells,) or (M, cells)  log-odds of a cell at z = 0
    counts  (M, cells, 2)           impressions and clicks
    mean    (effects,)              of the prior
    sd      (effects,)              of the prior
    ======  ======================  ========================================================

    The log-posterior is strictly concave. A step is cut where it would move an effect by more than 1.
    """
    shown, clicks = counts.unbind(-1)
    precision = torch.diag(sd**-2)
    z = mean.expand(len(counts), -1).clone()
    for _ in range(steps):
        rate = torch.sigmoid(offset + z @ design.T)
        gradient = (clicks - shown * rate) @ design - (z - mean) @ precision
        curvature = torch.einsum("mc,ci,cj->mij", shown * rate * (1 - rate), design, design) + precision
        step = torch.linalg.solve(curvature, gradient)
        z = z + step / step.abs().amax(1, keepdim=True).clamp(min=1)
    return Posterior(z, torch.linalg.inv(curvature))


def predictive_rate(
    design: Tensor, offset: Tensor, counts: Tensor, mean: Tensor, sd: Tensor, samples: int = 256
) -> tuple[Tensor, Tensor]:
    """Mean click rate of every cell given the log, (M, cells), and the effective number of samples, (M,).

    Importance sampling from the normal approximation, its covariance a quarter wider, with quasi-random points: exact
    as their number grows, whatever the approximation. Arguments as ``posterior``.
    """
    require(whole(samples, 2, 10**5), "samples", samples, "a whole number from 2 to 100,000")
    mode, covariance = posterior(design, offset, counts, mean, sd)
    factor = torch.linalg.cholesky(1.25 * covariance)
    points = SobolEngine(design.shape[1], scramble=True, seed=0).draw(samples).to(mode)
    normal = ndtri(points.clamp(1e-9, 1 - 1e-9))
    z = mode[:, None] + normal @ factor.mT  # (M, samples, effects)
    offset = offset.expand(len(counts), -1)[:, None]
    logit = offset + z @ design.T
    shown, clicks = counts.unbind(-1)
    likelihood = (clicks[:, None] * logit - shown[:, None] * torch.nn.functional.softplus(logit)).sum(-1)
    prior = -0.5 * (((z - mean) / sd) ** 2).sum(-1)
    weight = torch.softmax(likelihood + prior + 0.5 * (normal**2).sum(-1), 1)
    return (weight[..., None] * torch.sigmoid(logit)).sum(1), 1 / (weight**2).sum(1)


class EmpiricalBayes(NamedTuple):
    """Logistic regression on all past campaigns together, and how campaigns differ from it."""

    offset: Tensor
    """(cells,) log-odds of the pooled regression."""
    mean: Tensor
    """(effects,) mean of campaigns' own effects."""
    sd: Tensor
    """(effects,) their standard deviation."""

    def rates(self, design: Tensor, counts: Tensor) -> Tensor:
        """(M, cells) click rates of new campaigns given their counts (M, cells, 2)."""
        return predictive_rate(design, self.offset, counts, self.mean, self.sd)[0]


def pooled_logit(features: Tensor, counts: Tensor, penalty: float = 1.0) -> Tensor:
    """(cells,) log-odds of a logistic regression of all clicks in ``counts`` (M, cells, 2) on ``features`` (cells,
    features), with half ``penalty`` times the squared weights added to the summed loss."""
    shown, clicks = counts.sum(0).unbind(-1)
    x, label = torch.cat((features, features)).numpy(), np.repeat([1, 0], len(features))
    weight = torch.cat((clicks, shown - clicks)).numpy()
    model = fit_logistic(x, label, weight, penalty)
    return torch.as_tensor(model.decision_function(features.numpy()), dtype=features.dtype)


def fit_logistic(x: np.ndarray, label: np.ndarray, weight: np.ndarray | None, penalty: float) -> LogisticRegression:
    """scikit-learn's logistic regression with weights of rows. Raises ``RuntimeError`` if it does not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return LogisticRegression(C=1 / penalty, max_iter=2000, tol=1e-6).fit(x, label, sample_weight=weight)
        except ConvergenceWarning as error:
            raise RuntimeError(f"the pooled logistic regression did not converge: {error}") from None


def fit_empirical_bayes(
    features: Tensor, design: Tensor, counts: Tensor, groups: tuple[int, ...], iterations: int = 50
) -> EmpiricalBayes:
    """From the counts (M, cells, 2) of past campaigns.

    The pooled regression gives the offset. Then mean and variance of the effects are those that make the logs
    likeliest, by an expectation-maximisation algorithm with the normal approximation in the expectation. Effects of a
    group (``groups`` numbers each effect's) share a variance; all but the first effect, the level, have mean 0, for the
    regression has the means of the others.
    """
    offset = pooled_logit(features, counts)
    group = torch.tensor(groups)
    mean, sd = torch.zeros(design.shape[1]), torch.full((design.shape[1],), 0.3)
    for _ in range(iterations):
        mode, covariance = posterior(design, offset, counts, mean, sd, steps=8)
        mean = torch.zeros_like(mean)
        mean[0] = mode[:, 0].mean()
        square = ((mode - mean) ** 2 + covariance.diagonal(dim1=1, dim2=2)).mean(0)
        variance = torch.stack([square[group == g].mean() for g in group])
        sd = variance.sqrt().clamp(min=1e-3)
    return EmpiricalBayes(offset, mean, sd)
