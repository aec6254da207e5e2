"""Campaigns that buy ad space for audience segments, and the distribution they come from (``families.bidding``)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .base import check, number, numbers


class Campaigns(NamedTuple):
    """M campaigns. ``id``, ``budget`` and ``value`` are (M,), the others, hidden from the advertiser, (M, K)."""

    id: Tensor
    rate: Tensor  # c, conversions per request of quality 1
    price: Tensor  # m, mean of the logarithm of the best competing price of a request
    spread: Tensor  # d, its standard deviation
    budget: Tensor  # B, money for a day, in units of the average value of a conversion
    value: Tensor  # v, of a conversion, in the same units


class AuctionState(NamedTuple):
    """Where N days of M campaigns stand. ``tick`` and ``left`` are (M, N), ``waiting`` (M, N, delay, K), the others
    (M, N, K)."""

    tick: Tensor
    left: Tensor  # money left
    wins: Tensor  # requests won in the last tick, as a share of those offered
    quality: Tensor  # sum of the predicted qualities of the requests won today
    spend: Tensor  # money spent today
    conversions: Tensor  # reported today
    waiting: Tensor  # conversions that will be reported in one, two, ... ticks


class Seen(NamedTuple):
    """An observation, decoded. The first four fields are (M, N), the others (M, N, K)."""

    tick: Tensor
    left: Tensor
    budget: Tensor
    value: Tensor
    wins: Tensor
    quality: Tensor
    spend: Tensor
    conversions: Tensor


@dataclass(frozen=True)
class SegmentPrior:
    """Segments are alike and independent given the prior; rates and prices are log-normal, and prices follow rates.

    log c ~ N(log rate - rate_sd^2 / 2, rate_sd^2), so that ``rate`` is the mean conversion rate;
    m ~ N(log rate + price + price_slope (log c - log rate), price_sd^2): competitors know something of what a segment
    is worth. The default rate is the click rate of a campaign of iPinYou, 0.080 % (Zhang et al. 2014, campaign 1458).
    """

    rate: float = 8e-4
    """Mean number of conversions per request of quality 1."""
    rate_sd: float = 1.0
    """Standard deviation of log c between segments."""
    price: float = -0.5
    """Mean of m less log ``rate`` in a segment with c = ``rate``, for competitors to whom a conversion is worth 1."""
    price_sd: float = 0.5
    """Standard deviation of m between segments of the same rate."""
    price_slope: float = 0.3
    """By how much m rises with log c."""
    spread: tuple[float, float] = (0.4, 0.8)
    """Range of d, the standard deviation of log prices within a segment (uniform)."""
    budget: tuple[float, float] = (18.0, 90.0)
    """Range of the daily budget (log-uniform); the advertiser sees it."""
    value: tuple[float, float] = (0.7, 1.4)
    """Range of the value of a conversion (log-uniform); the advertiser sees it."""

    def __post_init__(self):
        for name in ("rate", "rate_sd", "price_sd"):
            least = (lambda x: number(x, 0)) if name == "rate" else (lambda x: number(x) and x >= 0)
            check(self, name, least, f"a finite number {'>' if name == 'rate' else '>='} 0")
        for name in ("price", "price_slope"):
            check(self, name, number, "a finite number")
        for name in ("spread", "budget", "value"):
            check(self, name, lambda x: numbers(x, 2) and 0 < x[0] <= x[1], "two finite numbers with 0 < low <= high")

    def hidden(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., 3) uniforms -> c, m, d of as many segments, each (...)."""
        normal = torch.special.ndtri(uniforms[..., :2])
        deviation = self.rate_sd * normal[..., 0] - self.rate_sd**2 / 2
        price = self.price + self.price_slope * deviation + self.price_sd * normal[..., 1]
        low, high = self.spread
        log_rate = math.log(self.rate)
        return torch.exp(log_rate + deviation), log_rate + price, low + (high - low) * uniforms[..., 2]

    def shifted(self) -> SegmentPrior:
        """Half the conversions, at prices that say nothing of what a segment is worth."""
        return replace(self, rate=self.rate / 2, price=self.price + math.log(2), price_slope=0.0)

    def wide(self) -> SegmentPrior:
        """Twice the standard deviations, and no knowledge of how prices follow rates."""
        middle, half = sum(self.spread) / 2, self.spread[1] - self.spread[0]
        spread = max(middle - half, self.spread[0] / 2), middle + half
        shift = 2 * self.rate_sd**2 - self.rate_sd**2 / 2  # the median rate stays where it is
        return replace(
            self,
            rate=self.rate * math.exp(shift),
            rate_sd=2 * self.rate_sd,
            price=self.price - shift + self.price_slope * (-(self.rate_sd**2) / 2),
            price_sd=2 * math.hypot(self.price_sd, self.price_slope * self.rate_sd),
            price_slope=0.0,
            spread=spread,
        )
