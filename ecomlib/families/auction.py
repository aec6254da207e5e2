"""What bids win and cost on average when prices and qualities are log-normal, and the bids that spend a budget best.

Symbols (chapter "Advertising"): a request of segment k has a predicted quality w, log w ~ N(0, q^2), and a best
competing price p, log p ~ N(m_k, d_k^2), independent. A *level* l_k is the logarithm of the bid on a request of quality
1, so that the bid is e^(l_k) w. Everything is per request, for levels of any shape, and in closed form; with many
requests a day it is what a campaign gets (the *fluid* limit).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import log_ndtr, ndtr

HALVINGS = 60
"""Of an interval of at most 60 in a logarithm: the bisections end at rounding."""


class Outcome(NamedTuple):
    """Means per request offered, in the shape of the levels."""

    wins: Tensor  # probability of winning it
    quality: Tensor  # w of the request if it is won, else 0
    spend: Tensor  # what is paid for it


def outcome(level: Tensor, price: Tensor, spread: Tensor, quality_sd: float, first_price: bool = False) -> Outcome:
    """What bids at ``level`` get where competing prices have ``price`` = m and ``spread`` = d, equations (eq-win),
    (eq-won-quality) and (eq-fluid-spend); at first price the bid itself is paid."""
    scale = (spread.square() + quality_sd**2).sqrt()
    z = (level - price) / scale
    won = math.exp(quality_sd**2 / 2) * ndtr(z + quality_sd**2 / scale)
    if first_price:
        return Outcome(ndtr(z), won, level.exp() * won)
    return Outcome(ndtr(z), won, torch.exp(price + spread.square() / 2) * ndtr(z - spread.square() / scale))


def best_levels(
    worth: Tensor,
    price: Tensor,
    spread: Tensor,
    budget: Tensor,
    quality_sd: float,
    lowest_cost: float,
    first_price: bool = False,
    halvings: int = HALVINGS,
) -> Tensor:
    """(..., K) levels of the highest mean worth whose spend does not exceed ``budget``, equation (eq-pacing).

    =============  =========  ===========================================================================
    Argument       Shape      Meaning
    =============  =========  ===========================================================================
    worth          (..., K)   mean worth of a won request of quality 1: value times conversion rate
    price, spread  (..., K)   m and d of the competing prices
    budget         (...)      money for one request of each segment
    lowest_cost    number     the least that a unit of money counts: 1 if money kept is profit, nearly 0 if
                              only worth counts
    halvings       number     of an interval of 60 around log lambda; 60 are exact to rounding
    =============  =========  ===========================================================================

    A unit of money counts lambda >= ``lowest_cost``, found by bisection: the least at which the budget suffices. At
    second price the best bid is then worth / lambda; at first price it is shaded (``shaded_level``).
    """
    log_worth = worth.log()

    def levels(log_cost: Tensor) -> Tensor:
        truthful = log_worth - log_cost[..., None]
        return shaded_level(truthful, price, spread, quality_sd, halvings) if first_price else truthful

    low = torch.full_like(budget, lowest_cost).log()
    high = low + 60.0
    for _ in range(halvings):
        middle = (low + high) / 2
        over = outcome(levels(middle), price, spread, quality_sd, first_price).spend.sum(-1) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return levels(high)


def shaded_level(
    truthful: Tensor, price: Tensor, spread: Tensor, quality_sd: float, halvings: int = HALVINGS
) -> Tensor:
    """(...) levels l that maximise (e^truthful - e^l) times the quality won: what to bid where the winner pays the bid,
    among bids proportional to w.

    The derivative is zero where log(e^(truthful - l) - 1) equals log of Phi / phi times the scale, which falls and
    rises in l: one root, found by bisection.
    """
    scale = (spread.square() + quality_sd**2).sqrt()
    low, high = truthful - 60.0, truthful
    for _ in range(halvings):
        middle = (low + high) / 2
        z = (middle - price + quality_sd**2) / scale
        log_density = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        more = torch.log(torch.expm1(truthful - middle)) > log_ndtr(z) - log_density + scale.log()
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return low
