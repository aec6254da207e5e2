"""CensoredInventory: the daily order of one product whose demand is hidden, and seen only as far as the stock reaches
(chapter "Inventory")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import inventory_planning as planning
from .base import Prior, check, number, numbers, take, whole
from .constants import constant
from .demand import normal_quantile, table_inverse
from .inventory_priors import DemandPrior, DemandRanges, LogNormalDemand, demand_probabilities, largest_demand

__all__ = ["CensoredInventory", "DemandRanges", "LogNormalDemand", "Product", "SeenStock", "StockState"]


class Product(NamedTuple):
    """M products. Every field but the last is (M,); mean, dispersion and staircase are hidden from the merchant."""

    id: Tensor
    mean: Tensor  # mu, mean units demanded a day
    dispersion: Tensor  # phi, variance of a day's demand over its mean
    price: Tensor  # p, in unit costs
    holding: Tensor  # h, cost of a unit left overnight, in unit costs
    staircase: Tensor  # (M, W * K) distribution function of demand on day w of the cycle, plus w, one after the other


class StockState(NamedTuple):
    """Where N episodes of M products stand. Every field but the last is (M, N)."""

    day: Tensor
    stock: Tensor  # units on the shelf this morning, before ordering
    available: Tensor  # units that could be sold yesterday; 0 on the first day
    sold: Tensor  # units sold yesterday
    lost: Tensor  # units demanded and not there, this episode; hidden
    regime: Tensor  # 0 or 1; hidden
    pipeline: Tensor  # (M, N, lead_time - 1) earlier orders on their way, the next to arrive first


class SeenStock(NamedTuple):
    """An observation, decoded. Every field but the last is (M, N)."""

    day: Tensor
    price: Tensor
    holding: Tensor
    weekday: Tensor  # today's demand multiplier
    stock: Tensor
    available: Tensor
    sold: Tensor
    pipeline: Tensor


@dataclass(frozen=True)
class CensoredInventory(Prior):
    """Demand of a day is negative binomial; what exceeds the stock is lost, and nobody sees it.

    Every morning the merchant orders up to one of ``levels``: the order tops up what is on the shelf and on its way.
    A unit costs 1, is sold at price p, and costs h for every night on the shelf. The reward is the day's profit as an
    accountant books it, (p - 1) sold - h left: a unit's cost is charged when it is sold. Summed over an episode this is
    the cash flow, p sold - ordered - h left, with unsold and undelivered units given back at cost on the last evening
    (``tests/test_inventory.py``). Lost sales cost the margin that was not earned. A further ``penalty`` for each is 0
    unless asked for, because booking it would show the merchant the demand that a real one never sees; if set, it is
    paid in one sum on the last day, which shows the episode's total and nothing of its days.

    Equations (eq-negative-binomial), (eq-censoring) and (eq-inventory-profit) of chapter "Inventory".
    """

    days: int = 14
    """Days in an episode. It begins with an empty shelf."""
    levels: tuple[int, ...] = (
        *(0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 21, 24),
        *(27, 31, 35, 40, 46, 52, 60, 68, 77, 88, 100, 113, 127, 142, 158, 176),
    )
    """Order-up-to levels on offer, roughly log-spaced."""
    lead_time: int = 0
    """Days between an order and its arrival: 0, 1 or 2. The oracle's work grows by a factor of levels[-1] with each."""
    weekday: tuple[float, ...] = (1.0,)
    """Demand multipliers of a cycle of days, known to the merchant; their mean is 1. (1,) is demand without season."""
    regimes: tuple[float, float] | None = None
    """Demand multipliers of two hidden regimes, or None. The oracle sees the regime, so no merchant reaches it."""
    switch: float = 0.1
    """Probability that the regime changes overnight."""
    penalty: float = 0.0
    """Cost of a lost sale beyond its margin, in unit costs; paid on the last day."""
    prior: DemandPrior = field(default_factory=DemandRanges)
    """Distribution of the hidden parameters."""

    def __post_init__(self):
        rising = lambda x: len(x) >= 2 and x[0] >= 0 and all(low < high for low, high in zip(x, x[1:]))
        units = lambda x: isinstance(x, tuple) and all(whole(level, 0, 10_000) for level in x)
        mean_one = lambda x: min(x) > 0 and abs(sum(x) / len(x) - 1) < 1e-9
        two = lambda x: x is None or (numbers(x, 2) and min(x) > 0)
        is_prior = lambda x: not isinstance(x, type) and all(hasattr(x, n) for n in ("hidden", "seen", "largest"))
        check(self, "days", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "levels", lambda x: units(x) and rising(x), "at least 2 increasing whole numbers from 0 to 10000")
        check(self, "lead_time", lambda x: whole(x, 0, 2), "0, 1 or 2")
        check(self, "weekday", lambda x: numbers(x) and mean_one(x), "positive multipliers with mean 1")
        check(self, "regimes", two, "None or two positive multipliers")
        check(self, "switch", lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")
        check(self, "penalty", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "prior", is_prior, "a prior, such as DemandRanges()")

    # -------------------------------------------------------------------------------------------- the protocol
    prior_size, hidden_size = 4, 2

    @property
    def noise_size(self) -> int:
        """Uniforms a day: one for demand, and one for the regime if there are any."""
        return 1 if self.regimes is None else 2

    @property
    def observation_size(self) -> int:
        """Length of an observation: 9, and one for each order that can be on its way in the morning."""
        return 9 + max(0, self.lead_time - 1)

    @property
    def horizon(self) -> int:
        """Days in an episode."""
        return self.days

    @property
    def actions(self) -> int:
        """Number of order-up-to levels."""
        return len(self.levels)

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Demand multipliers of every weekday, and of both regimes on it."""
        return tuple(w * r for w in self.weekday for r in self.regimes or (1.0,))

    @property
    def demand_size(self) -> int:
        """Entries of a table of demand, 0, 1, ...: more than the prior is likely to need (``TAIL``)."""
        return _demand_size(self)

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> Product:
        """Products of ``uniforms`` (M, 4): two for the prior's hidden parameters, two for price and holding cost."""
        return self.product(task_id, *self.prior.hidden(uniforms[:, :2]), *self.prior.seen(uniforms[:, 2:]))

    def product(self, task_id: Tensor, mean: Tensor, dispersion: Tensor, price: Tensor, holding: Tensor) -> Product:
        """Products with these numbers, each (M,), and the tables that demand is drawn from."""
        rows = self.demand_table(mean, dispersion).cumsum(-1).clamp(max=1)
        rows[..., -1] = 1
        steps = torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype)[:, None]
        # With one row single precision is enough; further rows stand above it, where floats are coarser.
        staircase = (rows + steps).flatten(1).to(mean.dtype if rows.shape[1] == 1 else rows.dtype)
        return Product(task_id, mean, dispersion, price, holding, staircase)

    def demand_table(self, mean: Tensor, dispersion: Tensor) -> Tensor:
        """(M, W, K) float64 probabilities of a day's demand, for every entry of ``multipliers``."""
        multiplier = constant(self.multipliers, mean, torch.float64)
        return demand_probabilities(multiplier * mean[:, None].double(), dispersion[:, None], self.demand_size)

    def shifted(self) -> CensoredInventory:
        """The same shelf in a market that training never saw."""
        return replace(self, prior=self.prior.shifted())

    def wide(self) -> CensoredInventory:
        """The same shelf under a vague prior that contains both this one and the shifted one."""
        return replace(self, prior=self.prior.wide())

    def context(self, tasks: Product) -> Tensor:
        """(M, 2), price and holding cost."""
        return torch.stack((tasks.price, tasks.holding), -1)

    def reset(self, tasks: Product, episodes: int, noise: Tensor) -> StockState:
        """An empty shelf; with regimes, either one with equal probability."""
        zeros = tasks.price.new_zeros(len(tasks.price), episodes)
        regime = zeros if self.regimes is None else (noise[..., 1] < 0.5).to(zeros.dtype)
        pipeline = zeros[..., None].expand(-1, -1, max(0, self.lead_time - 1))
        return StockState(zeros, zeros, zeros, zeros, zeros, regime, pipeline)

    def observe(self, tasks: Product, state: StockState) -> Tensor:
        """(M, N, 9 + lead_time - 1): day / days, price, holding cost, safety factor (normal quantile of the critical
        fractile), today's multiplier, then logarithms (log1p) of the units on the shelf, available yesterday and sold
        yesterday, whether yesterday sold out, and what is on its way."""
        shape = state.day.shape
        fractile = (tasks.price - 1) / (tasks.price - 1 + tasks.holding)
        context = torch.stack((tasks.price, tasks.holding, normal_quantile(fractile)), -1)
        sold_out = (state.sold >= state.available) & (state.day > 0)
        units = torch.stack((state.stock, state.available, state.sold), -1).log1p()
        parts = [(state.day / self.days)[..., None], context[:, None].expand(*shape, 3),
                 self._weekday(state.day)[..., None], units, sold_out.to(units.dtype)[..., None]]  # fmt: skip
        if self.lead_time > 1:
            parts.append(state.pipeline.log1p())
        return torch.cat(parts, -1)

    def seen(self, observation: Tensor) -> SeenStock:
        """The same observation in days and units: the inverse of the scaling in ``observe``."""
        day, price, holding, _, weekday = observation[..., :5].unbind(-1)
        stock, available, sold = observation[..., 5:8].expm1().round().unbind(-1)
        on_the_way = observation[..., 9:].expm1().round()
        return SeenStock((day * self.days).round(), price, holding, weekday, stock, available, sold, on_the_way)

    def step(
        self, tasks: Product, state: StockState, action: Tensor, noise: Tensor
    ) -> tuple[StockState, Tensor, Tensor]:
        """Order up to ``levels[action]``, (M, N) int64, and sell for a day."""
        demand = self._demand(tasks, state, noise[..., 0])
        level = constant(self.levels, state.stock)[action]
        on_the_way = state.pipeline.sum(-1) if self.lead_time > 1 else 0.0
        order = (level - state.stock - on_the_way).clamp(min=0)
        available = state.stock + order if self.lead_time == 0 else state.stock
        sold = torch.minimum(demand, available)
        left = available - sold
        reward = (tasks.price - 1)[:, None] * sold - tasks.holding[:, None] * left
        stock, pipeline, lost, regime = left, state.pipeline, state.lost, state.regime
        if self.lead_time == 1:
            stock = left + order
        elif self.lead_time > 1:
            stock, pipeline = left + pipeline[..., 0], torch.cat((pipeline[..., 1:], order[..., None]), -1)
        done = state.day + 1 >= self.days
        if self.penalty:
            lost = lost + demand - sold
            reward = reward - torch.where(done, self.penalty * lost, 0.0)
        if self.regimes is not None:
            regime = torch.where(noise[..., 1] < self.switch, 1 - regime, regime)
        return StockState(state.day + 1, stock, available, sold, lost, regime, pipeline), reward, done

    def _demand(self, tasks: Product, state: StockState, uniform: Tensor) -> Tensor:
        """Units demanded (M, N): the smallest k whose distribution function reaches the uniform."""
        if len(self.multipliers) == 1:
            return table_inverse(tasks.staircase, uniform.to(tasks.staircase.dtype)).to(uniform.dtype)
        row = state.day.long() % len(self.weekday)
        if self.regimes is not None:
            row = 2 * row + state.regime.long()
        size = tasks.staircase.shape[1] // len(self.multipliers)
        found = torch.searchsorted(tasks.staircase, uniform.to(tasks.staircase.dtype) + row)
        return (found - row * size).clamp(min=0).to(uniform.dtype)

    def _weekday(self, day: Tensor) -> Tensor:
        return constant(self.weekday, day)[day.long() % len(self.weekday)]

    # ------------------------------------------------------------------------------------- oracle and blind policy
    def oracle_return(self, tasks: Product) -> Tensor:
        """(M,) expected return of the best levels for a merchant who knows the product: exact, by dynamic programming.

        Without season, regimes and lead time this is ``days`` times the profit at the critical fractile, equation
        (eq-fractile), rounded to the levels. With regimes the merchant also sees each morning's regime, so the number
        bounds from above what anyone can earn who has to infer it.
        """
        return self._planned(tasks, None)

    def blind_return(self, tasks: Product) -> Tensor:
        """(M,) expected return of the merchant who knows the prior, price, holding cost and day, and orders up to
        ``blind_level`` without ever learning from sales. Exact, given the levels."""
        day = torch.arange(self.days, device=tasks.price.device)[:, None].expand(-1, len(tasks.price))
        return self._planned(tasks, self.blind_level(tasks.price.expand_as(day), tasks.holding.expand_as(day), day))

    def blind_level(self, price: Tensor, holding: Tensor, day: Tensor) -> Tensor:
        """Index of the level (same shape) that earns most on average over the prior, given what is seen.

        Without lead time it maximises the expected profit of the day over the prior's demand: the newsvendor's order
        for the prior predictive distribution, optimal for a merchant who never learns if demand has no season, and
        myopic if it has (``tests/test_inventory.py`` bounds what that costs). With a lead time it is the constant level
        with the best mean profit in a simulation of 1,024 products of the prior.
        """
        sold, left = planning.blind_table(self)
        row = day.long() % len(sold)
        sold, left = (x.to(price)[row] for x in (sold, left))
        return ((price - 1 + self.penalty)[..., None] * sold - holding[..., None] * left).argmax(-1)

    def _planned(self, tasks: Product, policy: Tensor | None) -> Tensor:
        size = max(1, 20_000_000 // (self.levels[-1] + 1) ** (1 + self.lead_time))
        parts = [
            self._plan(take(tasks, slice(i, i + size)), policy if policy is None else policy[:, i : i + size])
            for i in range(0, len(tasks.id), size)
        ]
        return torch.cat(parts).to(tasks.price.dtype)

    def _plan(self, tasks: Product, policy: Tensor | None) -> Tensor:
        table, mean = self.demand_table(tasks.mean, tasks.dispersion), tasks.mean.double()
        regimes = len(self.regimes or (1.0,))
        table = table.unflatten(1, (len(self.weekday), regimes))
        multiplier = constant(self.multipliers, mean).view(-1, regimes)
        trade = planning.Trade(tasks.price.double() - 1, tasks.holding.double(), torch.full_like(mean, self.penalty))

        def demand(day: int) -> tuple[Tensor, Tensor]:
            row = day % len(self.weekday)
            return table[:, row], mean[:, None] * multiplier[row]

        switch = 0.0 if self.regimes is None else self.switch
        return planning.best_return(demand, self.days, trade, self.levels, self.lead_time, switch, policy)


@lru_cache(maxsize=64)
def _demand_size(family: CensoredInventory) -> int:
    mean, dispersion = family.prior.largest()
    return max(largest_demand(max(family.multipliers) * mean, dispersion), family.levels[-1]) + 2
