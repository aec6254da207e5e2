"""Distributions of the hidden parameters of a market, each a function of uniforms (inverse transform).

Prices are quoted as *markups*: the price divided by the product's unit cost. A shopper buys at markup m with
probability sigmoid(u - a m), so the sensitivity ``a`` is utility lost per unit of markup, and no prior depends on the
currency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import check, number, numbers
from .constants import constant


def _log_uniform(uniform: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = math.log(bounds[0]), math.log(bounds[1])
    return torch.exp(low + (high - low) * uniform)


def _twice_as_wide(own: tuple[float, float], moved: tuple[float, float], most: float = math.inf) -> tuple[float, float]:
    """A log-uniform range that holds two others and whose logarithm is at least twice as wide as that of the first;
    what ``most`` cuts off above is added below."""
    low, high = min(own[0], moved[0]), max(own[1], moved[1])
    factor = math.sqrt(max(1.0, (own[1] / own[0]) ** 2 * low / high))
    excess = max(1.0, high * factor / most)
    return low / factor / excess, high * factor / excess


def _check_range(config: object, field: str, upper: float = math.inf) -> None:
    limit = f" < {upper:g}" if upper < math.inf else ""
    valid = lambda x: numbers(x, 2) and 0 < x[0] <= x[1] < upper
    check(config, field, valid, f"two finite numbers with 0 < low <= high{limit}")


def _is_factor(value: object) -> bool:
    if not (isinstance(value, tuple) and len(value) == 3 and all(numbers(row, 3) for row in value)):
        return False
    return all(value[i][i] >= 0 and all(x == 0 for x in value[i][i + 1 :]) for i in range(3))


@dataclass(frozen=True)
class LogUniformPrior:
    """Independent log-uniform ranges: the prior of chapter "Dynamic pricing" before any data are seen.

    The defaults imply own-price elasticities at the best price between about -2 and -6 (5 % to 95 %).
    """

    sensitivity: tuple[float, float] = (1.0, 6.0)
    """Range of a, utility lost per unit of markup."""
    share: tuple[float, float] = (0.02, 0.3)
    """Range of the purchase probability at the product's own best markup."""
    traffic: tuple[float, float] = (20.0, 300.0)
    """Range of the mean number of shoppers a day."""
    unit_cost: tuple[float, float] = (0.5, 1.7)
    """Range of the unit cost; the merchant sees it. Money is in units of the average unit cost."""

    def __post_init__(self):
        for field in ("sensitivity", "traffic", "unit_cost"):
            _check_range(self, field)
        _check_range(self, "share", upper=1.0)

    def hidden(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., 3) uniforms -> sensitivity, utility, traffic, each (...)."""
        sensitivity = _log_uniform(uniforms[..., 0], self.sensitivity)
        share = _log_uniform(uniforms[..., 1], self.share)
        best = 1 + 1 / (sensitivity * (1 - share))  # first-order condition of (m - 1) sigmoid(u - a m)
        utility = torch.logit(share) + sensitivity * best
        return sensitivity, utility, _log_uniform(uniforms[..., 2], self.traffic)

    def cost(self, uniform: Tensor) -> Tensor:
        """(...) uniforms -> unit cost (...)."""
        return _log_uniform(uniform, self.unit_cost)

    def shifted(self) -> LogUniformPrior:
        """Shoppers half as sensitive again, who buy half as often: a market that training never saw."""
        return replace(
            self,
            sensitivity=tuple(1.5 * x for x in self.sensitivity),
            share=tuple(0.5 * x for x in self.share),
        )

    def wide(self) -> LogUniformPrior:
        """Ranges that are twice as wide, on a logarithmic scale, and hold these and the shifted ones: what a merchant
        believes who knows nothing."""
        moved = self.shifted()
        limits = {"sensitivity": math.inf, "share": max(0.9, self.share[1]), "traffic": math.inf}
        wider = {k: _twice_as_wide(getattr(self, k), getattr(moved, k), most) for k, most in limits.items()}
        return replace(self, **wider)


@dataclass(frozen=True)
class GaussianPrior:
    """Jointly normal (log sensitivity, logit of the purchase share at a reference markup, log daily traffic).

    What ``ecomlib.calibration`` returns: the spread over a retailer's products, with the noise of each product's own
    fit taken out.
    """

    mean: tuple[float, float, float]
    """Mean of (log a, logit share at ``reference_markup``, log traffic)."""
    factor: tuple[tuple[float, float, float], ...]
    """Lower-triangular 3 x 3 factor L; the covariance is L L'."""
    reference_markup: float = 1.5
    """The markup at which the share is quoted."""
    unit_cost: tuple[float, float] = (0.5, 1.7)
    """Range of the unit cost (log-uniform); the merchant sees it."""

    def __post_init__(self):
        check(self, "mean", lambda x: numbers(x, 3), "3 finite numbers")
        check(self, "factor", _is_factor, "3 x 3 finite numbers, lower-triangular, diagonal >= 0")
        check(self, "reference_markup", lambda x: number(x, 0), "a finite number > 0")
        _check_range(self, "unit_cost")

    def hidden(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., 3) uniforms -> sensitivity, utility, traffic, each (...)."""
        mean, factor = constant(self.mean, uniforms), constant(self.factor, uniforms)
        log_sensitivity, logit_share, log_traffic = (mean + torch.special.ndtri(uniforms) @ factor.T).unbind(-1)
        sensitivity = log_sensitivity.exp()
        return sensitivity, logit_share + sensitivity * self.reference_markup, log_traffic.exp()

    def cost(self, uniform: Tensor) -> Tensor:
        """(...) uniforms -> unit cost (...)."""
        return _log_uniform(uniform, self.unit_cost)

    def shifted(self) -> GaussianPrior:
        """Sensitivity up and share down, each by one prior standard deviation."""
        log_sd = math.sqrt(sum(x * x for x in self.factor[0]))
        share_sd = math.sqrt(sum(x * x for x in self.factor[1]))
        return replace(self, mean=(self.mean[0] + log_sd, self.mean[1] - share_sd, self.mean[2]))

    def wide(self) -> GaussianPrior:
        """Twice the standard deviations around the same mean: what a merchant believes who knows nothing. The shifted
        prior lies half a standard deviation from its middle."""
        return replace(self, factor=tuple(tuple(2 * x for x in row) for row in self.factor))


MarketPrior = LogUniformPrior | GaussianPrior
"""Either kind of prior over a market's hidden parameters."""
