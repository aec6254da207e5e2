"""Ordering with known demand: the expected profit of the best order-up-to levels, by backward induction.

Shapes: M products, G regimes of demand, A levels, amounts of stock 0..X with X the highest level. A day's demand has
probabilities (M, G, K) with K > X + 1, and the regime changes overnight with probability ``switch``. Everything is in
float64. Chapter "Inventory" has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import noise as noise_
from .constants import constant


class Trade(NamedTuple):
    """What a unit earns and costs. Every field is (M,)."""

    margin: Tensor  # price - unit cost, of a unit sold
    holding: Tensor  # of a unit left overnight
    penalty: Tensor  # of a unit demanded and not there


def expected_sales(probability: Tensor, most: int) -> Tensor:
    """(..., most + 1) E min(D, y) for y = 0, ..., most: the sum of P(D >= j) over j <= y, equation (eq-newsvendor)."""
    at_least = (1 - probability[..., :most].cumsum(-1)).clamp(min=0)
    return pad(at_least.cumsum(-1), (1, 0))


def day_profit(probability: Tensor, trade: Trade, most: int, mean: Tensor) -> Tensor:
    """(M, G, most + 1) expected profit of a day that begins with y units: equation (eq-newsvendor)."""
    sales = expected_sales(probability, most)
    units = torch.arange(most + 1, device=sales.device, dtype=sales.dtype)
    margin, holding, penalty = (x[:, None, None] for x in trade)
    return margin * sales - holding * (units - sales) - penalty * (mean[..., None] - sales)


def best_return(
    demand: Callable[[int], tuple[Tensor, Tensor]],
    days: int,
    trade: Trade,
    levels: Sequence[int],
    lead_time: int,
    switch: float = 0.0,
    policy: Tensor | None = None,
) -> Tensor:
    """(M,) expected profit of ``days`` days from an empty shelf under the best order-up-to levels.

    ``demand(day)`` is a day's probabilities (M, G, K) and means (M, G). The level may depend on the day, the regime,
    the stock and what is on its way; with ``policy`` (days, M) int64, indices into ``levels``, it is that of the day.
    An episode begins in either regime with equal probability. Time grows as X log X a day without lead time, as X^2
    log X with a lead time of one day, and as X^3 log X with two.
    """
    most, value = levels[-1], None
    for day in reversed(range(days)):
        probability, mean = demand(day)
        profit = day_profit(probability, trade, most, mean)
        if value is None:
            value = torch.zeros(*profit.shape, *[most + 1] * (lead_time == 2), device=profit.device, dtype=profit.dtype)
        following = value if switch == 0 else (1 - switch) * value + switch * value.flip(1)
        chosen = None if policy is None else policy[day]
        if lead_time == 0:
            value = _best(profit + _tomorrow(probability, following), levels, chosen)
        else:
            value = _on_the_way(profit, probability, following, levels, lead_time, chosen)
    return value.flatten(2)[..., 0].mean(1)


def _best(ready: Tensor, levels: Sequence[int], policy: Tensor | None) -> Tensor:
    """(M, G, X + 1) value of each morning's stock, given that of each stock after delivery: order at once."""
    stock = torch.arange(ready.shape[-1], device=ready.device)
    after = torch.maximum(stock[:, None], constant(tuple(levels), ready, torch.int64))  # (X + 1, A)
    if policy is None:
        return ready[..., after].amax(-1)
    return ready.gather(-1, after.T[policy][:, None].expand_as(ready))


def _on_the_way(
    profit: Tensor, probability: Tensor, following: Tensor, levels: Sequence[int], lead_time: int, policy: Tensor | None
) -> Tensor:
    """Value of each morning's stock (M, G, X + 1), or stock and yesterday's order (M, G, X + 1, X + 1), when an order
    takes one or two days."""
    stock = torch.arange(profit.shape[-1], device=profit.device)
    most = len(stock) - 1
    arriving, left = stock[:, None], stock  # what comes tomorrow morning, what is left tonight
    with_delivery = (left + arriving).clamp(max=most)
    if lead_time == 1:
        # (M, G, order, stock): tonight's order is what arrives.
        ready = profit[:, :, None] + _tomorrow(probability[:, :, None], following[..., with_delivery])
        position, value = stock, ready.mT  # (M, G, stock, order)
    else:
        # (M, G, order, arriving, stock): yesterday's order arrives, tonight's is on its way.
        shifted = following.mT[..., with_delivery]
        ready = profit[:, :, None, None] + _tomorrow(probability[:, :, None, None], shifted)
        position, value = stock[:, None] + stock, ready.permute(0, 1, 4, 3, 2)  # (M, G, stock, arriving, order)
    level = constant(tuple(levels), profit, torch.int64)
    order = (level - position[..., None]).clamp(min=0)  # (stock, ..., A)
    if policy is not None:
        order = order[..., policy].movedim(-1, 0)[:, None, ..., None]  # (M, 1, stock, ..., 1)
        return value.gather(-1, order.expand(*value.shape[:-1], 1))[..., 0]
    return value.gather(-1, order.expand(*value.shape[:-1], len(levels))).amax(-1)


def _tomorrow(probability: Tensor, value: Tensor) -> Tensor:
    """(..., X + 1) expected value (..., X + 1) of what is left of y = 0, ..., X units after a day of demand: the sum
    over d < y of P(D = d) V(y - d), and P(D >= y) V(0). A convolution, by fast Fourier transform."""
    size = value.shape[-1]
    probability = probability[..., :size]
    length = 2 * size
    spectrum = torch.fft.rfft(probability, length) * torch.fft.rfft(value, length)
    sold_out = (1 - probability.cumsum(-1)).clamp(min=0) * value[..., :1]
    return torch.fft.irfft(spectrum, length)[..., :size] + sold_out


def level_tables(family: Any, products: Any) -> tuple[Tensor, Tensor]:
    """Mean units sold and units left overnight of every level, each (W, P, A) float64, W the days of the cycle.

    Without lead time they are exact, for a day that begins with that level; over the regimes they are averaged. With a
    lead time they are means over the days of 8 simulated episodes that order up to one level throughout, the same
    uniforms for all levels and products, and W is 1.
    """
    if family.lead_time:
        return _simulated_tables(family, products)
    table = family.demand_table(products.mean, products.dispersion)
    level = constant(family.levels, table, torch.int64)
    sold = expected_sales(table, family.levels[-1])[..., level]
    sold = sold.unflatten(1, (len(family.weekday), -1)).mean(2).movedim(1, 0)
    return sold, level - sold


def _simulated_tables(family: Any, products: Any, replicas: int = 8) -> tuple[Tensor, Tensor]:
    action = torch.arange(family.actions, device=products.id.device).expand(len(products.id), -1)
    sold = left = torch.zeros(action.shape, dtype=torch.float64, device=action.device)
    one = torch.zeros(1, dtype=torch.int64, device=action.device)
    for replica in range(replicas):

        def draw(time: int, replica: int = replica) -> Tensor:
            uniform = noise_.uniform(0, one, one + replica, 0, time, noise_.PRIOR, family.noise_size)
            return uniform.expand(*action.shape, -1)

        state = family.reset(products, family.actions, draw(family.days))
        for day in range(family.days):
            state, _, _ = family.step(products, state, action, draw(day))
            sold, left = sold + state.sold, left + state.available - state.sold
    days = replicas * family.days
    return (sold / days)[None], (left / days)[None]


@lru_cache(maxsize=32)
def blind_table(family: Any) -> tuple[Tensor, Tensor]:
    """``level_tables`` averaged over the prior, each (W, A): behind ``blind_level``. On the CPU."""
    sold, left = level_tables(family, family.prior_sample(1024 if family.lead_time else 4096))
    return sold.mean(1), left.mean(1)
