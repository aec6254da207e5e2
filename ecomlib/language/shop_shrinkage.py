"""The classical few-shot learner: what a shop's own log adds to the pooled model, shrunk towards nothing (chapter
"Few-shot across categories and shops", equations (eq-shop-offset) and (eq-shop-prior)).

A click's log-odds are those of the pooled model, the offset, plus z'w with weights w of the shop's own. Their prior is
normal: with one variance for all weights this is ridge regression; with a covariance estimated from the shops of
training, empirical Bayes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..families.base import require, whole
from .few_shot import PADDING


class OwnWeights(NamedTuple):
    """Normal approximation of what logs say of the weights of M shops."""

    mode: Tensor  # (M, F)
    covariance: Tensor  # (M, F, F)


def own_weights(z: Tensor, y: Tensor, offset: Tensor, prior: Tensor, steps: int = 8) -> OwnWeights:
    """Mode of the posterior of w ~ Normal(0, ``prior``), and the inverse curvature there, by Newton's method.

    ======  =========  ======================================================================
    Symbol  Shape      Description
    ======  =========  ======================================================================
    z       (M, n, F)  features
    y       (M, n)     int64, 1 for a click; PADDING where there is no row
    offset  (M, n)     log-odds of the pooled model
    prior   (F, F)     covariance, positive definite
    ======  =========  ======================================================================

    The log-posterior is strictly concave; a step is cut where it would move a weight by more than 2.
    """
    require(whole(steps, 1), "steps", steps, "a whole number >= 1")
    real = (y != PADDING).to(z.dtype)
    clicks, precision = y.clamp(min=0) * real, torch.linalg.inv(prior)
    w = z.new_zeros(len(z), z.shape[-1])

    def curved(w: Tensor) -> tuple[Tensor, Tensor]:
        rate = torch.sigmoid(offset + (z @ w[..., None])[..., 0])
        weight = (real * rate * (1 - rate))[..., None]
        return rate, z.mT @ (weight * z) + precision

    for _ in range(steps):
        rate, curvature = curved(w)
        gradient = (z.mT @ (clicks - real * rate)[..., None])[..., 0] - w @ precision
        step = torch.linalg.solve(curvature, gradient)
        w = w + step / (step.abs().amax(1, keepdim=True) / 2).clamp(min=1)
    return OwnWeights(w, torch.linalg.inv(curved(w)[1]))


def shrunk_log_odds(found: OwnWeights, z: Tensor, offset: Tensor) -> Tensor:
    """(M, n) log-odds for rows z (M, n, F) with offset (M, n), averaged over the posterior by the usual correction of
    a normal log-odds, equation (eq-shop-predictive)."""
    mean = offset + (z @ found.mode[..., None])[..., 0]
    variance = ((z @ found.covariance) * z).sum(-1)
    return mean / torch.sqrt(1 + torch.pi / 8 * variance)


def ridge_prior(features: int, sd: float, like: Tensor) -> Tensor:
    """Covariance of independent weights of one standard deviation."""
    require(sd > 0, "sd", sd, "a number > 0")
    return sd**2 * torch.eye(features, dtype=like.dtype, device=like.device)


def learned_prior(
    z: Tensor, y: Tensor, offset: Tensor, start: Tensor, rounds: int = 10, steps: int = 3, chunk: int = 50
) -> Tensor:
    """(F, F) covariance of the shops' weights under which the logs of training shops are most likely, by EM with a
    normal approximation of each shop's posterior: the mean of mode mode' + covariance, equation (eq-shop-prior).

    Arguments as ``own_weights``, from the covariance ``start`` on; ``chunk`` shops at a time bound the memory.
    """
    prior = start
    for _ in range(rounds):
        total = torch.zeros_like(prior)
        for first in range(0, len(z), chunk):
            part = slice(first, first + chunk)
            mode, covariance = own_weights(z[part], y[part], offset[part], prior, steps)
            total += (mode[:, :, None] * mode[:, None] + covariance).sum(0)
        prior = total / len(z)
    return prior
