"""Distributions of what is hidden of a product's demand, each a function of uniforms (inverse transform), and the
negative binomial law of its days (chapter "Inventory")."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from scipy.stats import nbinom
from torch import Tensor

from .base import check, number, numbers
from .constants import constant
from .priors import _check_range, _log_uniform

TAIL = 1e-9
"""Probability that may lie beyond the table of the largest demand a prior is likely to draw."""


def demand_probabilities(mean: Tensor, dispersion: Tensor, size: int) -> Tensor:
    """(..., size) P(D = 0), ..., P(D = size - 1) of the negative binomial law with this mean and variance / mean.

    Equation (eq-negative-binomial): the ratio of neighbours is (k - 1 + r) (1 - 1/phi) / k with r = mu / (phi - 1).
    What lies beyond is put on the last entry, so a row sums to 1. Computed in float64. ``mean`` may be 0,
    ``dispersion`` is above 1.
    """
    mean, dispersion = mean.double()[..., None], dispersion.double()[..., None]
    shape = mean / (dispersion - 1)
    count = torch.arange(1, size, device=mean.device, dtype=torch.float64)
    ratio = (count - 1 + shape).log() + (1 - 1 / dispersion).log() - count.log()
    log_probability = torch.cat((torch.zeros_like(shape), ratio.cumsum(-1)), -1) - shape * dispersion.log()
    probability = log_probability.exp()
    beyond = (1 - probability.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat((probability[..., :-1], probability[..., -1:] + beyond), -1)


def largest_demand(mean: float, dispersion: float) -> int:
    """The smallest k with P(D > k) <= TAIL."""
    return math.ceil(nbinom.isf(TAIL, mean / (dispersion - 1), 1 / dispersion))


class _Trade:
    """What the merchant sees of a product: ranges ``gross_margin`` and ``holding``."""

    def seen(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2) uniforms -> price and holding cost a night, each (...), in units of the product's unit cost."""
        (low, high), (cheap, dear) = self.gross_margin, self.holding
        return 1 / (1 - low - (high - low) * uniforms[..., 0]), cheap + (dear - cheap) * uniforms[..., 1]

    def _check_trade(self) -> None:
        _check_range(self, "gross_margin", upper=1.0)
        _check_range(self, "holding")


@dataclass(frozen=True)
class DemandRanges(_Trade):
    """Independent ranges: the prior of chapter "Inventory" before any data are seen."""

    mean: tuple[float, float] = (4.0, 60.0)
    """Range of mu, mean units demanded a day (log-uniform)."""
    dispersion: tuple[float, float] = (1.1, 4.0)
    """Range of phi, variance of a day's demand over its mean (uniform); 1 would be Poisson."""
    gross_margin: tuple[float, float] = (0.2, 0.6)
    """Range of (price - unit cost) / price (uniform); the merchant sees it."""
    holding: tuple[float, float] = (0.05, 0.5)
    """Range of the cost of holding a unit overnight, in unit costs (uniform); the merchant sees it."""

    def __post_init__(self):
        _check_range(self, "mean")
        _check_range(self, "dispersion")
        check(self, "dispersion", lambda x: x[0] > 1, "two finite numbers with 1 < low <= high")
        self._check_trade()

    def hidden(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2) uniforms -> mean and dispersion, each (...)."""
        low, high = self.dispersion
        return _log_uniform(uniforms[..., 0], self.mean), low + (high - low) * uniforms[..., 1]

    def largest(self) -> tuple[float, float]:
        """Mean and dispersion of the product that sells most, for the size of tables."""
        return self.mean[1], self.dispersion[1]

    def shifted(self) -> DemandRanges:
        """Half as much demand again, and more erratic: a market that training never saw."""
        return self._stretched(1.5, 1.5, 1.5, 1.5)

    def wide(self) -> DemandRanges:
        """A vague prior that contains this one and the shifted one."""
        return self._stretched(0.4, 3.0, 0.5, 2.0)

    def _stretched(self, low_mean: float, high_mean: float, low: float, high: float) -> DemandRanges:
        mean, (least, most) = self.mean, self.dispersion
        dispersion = (1 + low * (least - 1), 1 + high * (most - 1))
        return replace(self, mean=(low_mean * mean[0], high_mean * mean[1]), dispersion=dispersion)


@dataclass(frozen=True)
class LogNormalDemand(_Trade):
    """Jointly normal (log mean, log of dispersion - 1): what ``ecomlib.calibration`` returns."""

    mean: tuple[float, float]
    """Mean of (log mu, log (phi - 1))."""
    factor: tuple[tuple[float, float], tuple[float, float]]
    """Lower-triangular 2 x 2 factor L; the covariance is L L'."""
    cut: float = 4.0
    """Normal quantiles are cut at plus and minus this number, so that a table of demand has an end."""
    gross_margin: tuple[float, float] = (0.2, 0.6)
    """Range of (price - unit cost) / price (uniform); the merchant sees it."""
    holding: tuple[float, float] = (0.05, 0.5)
    """Range of the cost of holding a unit overnight, in unit costs (uniform); the merchant sees it."""

    def __post_init__(self):
        check(self, "mean", lambda x: numbers(x, 2), "2 finite numbers")
        rows = lambda x: isinstance(x, tuple) and len(x) == 2 and all(numbers(row, 2) for row in x)
        lower = lambda x: rows(x) and x[0][1] == 0 and all(number(x[i][i], -1e-300) for i in (0, 1))
        check(self, "factor", lower, "2 x 2 finite numbers, lower-triangular, diagonal >= 0")
        check(self, "cut", lambda x: number(x, 0), "a finite number > 0")
        self._check_trade()

    def hidden(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2) uniforms -> mean and dispersion, each (...)."""
        normal = torch.special.ndtri(uniforms).clamp(-self.cut, self.cut)
        log_mean, log_excess = (constant(self.mean, uniforms) + normal @ constant(self.factor, uniforms).T).unbind(-1)
        return log_mean.exp(), 1 + log_excess.exp()

    def largest(self) -> tuple[float, float]:
        """Mean and dispersion at ``cut`` standard deviations each, for the size of tables."""
        mean, excess = (math.exp(m + self.cut * math.hypot(*row)) for m, row in zip(self.mean, self.factor))
        return mean, 1 + excess

    def shifted(self) -> LogNormalDemand:
        """Log mean and log (dispersion - 1) up by one prior standard deviation each."""
        return replace(self, mean=tuple(m + math.hypot(*row) for m, row in zip(self.mean, self.factor)))

    def wide(self) -> LogNormalDemand:
        """Twice the standard deviations, cut where this prior is: its tails hold more, and reach no further."""
        return replace(self, factor=tuple(tuple(2 * x for x in row) for row in self.factor), cut=self.cut / 2)


DemandPrior = DemandRanges | LogNormalDemand
"""Either kind of prior over a product's demand."""
