"""What a practitioner would use for orders when only sales are seen: Bayes with the likelihood of what was seen, a
moving average of sales, and the adaptive rule for censored demand (chapter "Inventory")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..families.base import check, number, whole
from ..families.constants import constant
from ..families.inventory import CensoredInventory
from ..families.inventory_planning import level_tables
from ..rollout import Agent
from .bayes import Belief, belief


class DemandBelief(Belief):
    """Posterior over mean and dispersion of a product's demand. A day on which something was left adds log P(D = sold);
    a day that sold out adds log P(D >= available), the most that can be said: equation (eq-censored-likelihood).

    The greedy agent on this belief is the Bayesian base-stock rule: it orders up to the level of highest posterior mean
    profit, ``families.inventory_planning.level_tables``, as if nothing were left to learn.
    """

    def __init__(self, family: CensoredInventory, *args, **kwargs):
        super().__init__(family, *args, **kwargs)
        if family.regimes is not None:
            raise ValueError(
                f"regimes = {family.regimes}: this belief has no filter for a hidden regime (regimes=None)"
            )

    def prepare(self, context: Tensor) -> None:
        """Tables (2 W K, P) of log-likelihoods, and (W, P, A) of units sold and left."""
        table = self.family.demand_table(self.particles.mean, self.particles.dispersion).movedim(0, -1)  # (W, K, P)
        at_least = table.flip(1).cumsum(1).flip(1)
        tiny = torch.finfo(self.log_prior.dtype).tiny
        seen = torch.stack((table, at_least)).clamp(min=tiny).log()
        self.days, self.counts = table.shape[:2]
        self.log_seen = seen.flatten(0, 2).to(self.log_prior.dtype)
        self.sold, self.left = (x.to(self.log_prior.dtype) for x in level_tables(self.family, self.particles))

    def log_likelihood(self, before: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> Tensor:
        """(M, N, P) log-probability of yesterday's sales, given what could be sold."""
        seen = self.family.seen(after)
        row = self.family.seen(before).day.long() % self.days
        sold_out = (seen.sold >= seen.available).long()
        return self.log_seen[(sold_out * self.days + row) * self.counts + seen.sold.long()]

    def moments(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(M, N, A) posterior mean and standard deviation of a day's expected profit at every level."""
        seen = self.family.seen(observation)
        margin = (seen.price - 1 + self.family.penalty)[..., None]
        holding, weight, row = seen.holding[..., None], self.weight, self._row(observation)
        sold, left = self.sold[row], self.left[row]
        average = lambda x: (weight @ x).expand(-1, seen.price.shape[1], -1)
        mean = margin * average(sold) - holding * average(left)
        # Profit is linear in what is sold and left, so its second moment needs three tables for any price.
        square = (
            margin**2 * average(sold**2) + holding**2 * average(left**2) - 2 * margin * holding * average(sold * left)
        )
        return mean, (square - mean**2).clamp(min=0).sqrt()

    def best_on_average(self, observation: Tensor) -> Tensor:
        """The level of highest posterior mean profit, (M, N)."""
        seen, weight, row = self.family.seen(observation), self.weight, self._row(observation)
        sold, left = (weight @ table[row] for table in (self.sold, self.left))
        margin = (seen.price - 1 + self.family.penalty)[..., None]
        return (margin * sold - seen.holding[..., None] * left).argmax(-1)

    def best_for(self, particle: Tensor, observation: Tensor) -> Tensor:
        """The best level of one particle each, (M, N)."""
        seen, row = self.family.seen(observation), self._row(observation)
        margin = (seen.price - 1 + self.family.penalty)[..., None]
        return (margin * self.sold[row][particle] - seen.holding[..., None] * self.left[row][particle]).argmax(-1)

    def _row(self, observation: Tensor) -> Tensor:
        """Today's row of the tables: every replica of every task is on the same day."""
        return self.family.seen(observation[:1, :1]).day.long()[0, 0] % len(self.sold)


@belief.register
def _(family: CensoredInventory, particles=None, stores=False, prior=None) -> DemandBelief:
    return DemandBelief(family, particles, stores, prior)


class FirstDay(NamedTuple):
    """What each level would bring if ordered on the first day, each (M, A): equation (eq-look-ahead)."""

    today: Tensor
    """Expected profit of the day."""
    later: Tensor
    """Expected profit of a later day on which the best level is ordered, given what the first day has shown."""


def first_day(family: CensoredInventory, price: Tensor, holding: Tensor, particles: int = 1024) -> FirstDay:
    """What the first order earns and what it teaches, for M products of which price and holding cost (M,) are known.

    A higher order sees more of the demand, so ``later`` rises with the level. Exact for the particle prior; no lead
    time, season or regimes. Stock left over is not a constraint on the later day.
    """
    if family.lead_time or len(family.multipliers) > 1:
        raise ValueError("first_day needs a family without lead time, season and regimes")
    prior = family.prior_sample(particles, price.device)
    law = family.demand_table(prior.mean, prior.dispersion)[:, 0]  # (P, K)
    sold = level_tables(family, prior)[0][0]  # (P, A)
    level, at_least = constant(family.levels, sold), law.flip(1).cumsum(1).flip(1)
    profit = lambda mean: _profit(price.to(law), holding.to(law), family.penalty, mean, level)
    later = []
    for most in family.levels:
        seen = torch.cat((law[:, :most], at_least[:, most : most + 1]), 1)  # P(sales = 0), ..., P(sold out)
        joint = seen.T @ sold / particles  # sum over the particles of P(sales) E sold, (most + 1, A)
        chance = seen.mean(0)  # (most + 1,)
        # The best level of each outcome, weighted by its chance: profit is linear in expected sales.
        given = profit(joint / chance.clamp(min=torch.finfo(law.dtype).tiny)[:, None]).amax(-1)
        later.append((given * chance).sum(-1))
    return FirstDay(profit(sold.mean(0)), torch.stack(later, -1))


def _profit(price: Tensor, holding: Tensor, penalty: float, sold: Tensor, level: Tensor) -> Tensor:
    """(M, ..., A) expected profit of products (M,) at levels (A,) with expected sales (..., A)."""
    shape = (-1, *[1] * sold.dim())
    return (price - 1 + penalty).view(shape) * sold - holding.view(shape) * (level - sold)


class BlindStock:
    """Orders up to ``CensoredInventory.blind_level``: the prior, the price and the day, and never a sale."""

    noise_size = 1

    def __init__(self, family: CensoredInventory):
        self.family = family

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Nothing to forget."""

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The blind level, (M, N)."""
        seen = self.family.seen(observation)
        return self.family.blind_level(seen.price, seen.holding, seen.day)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Nothing to learn."""

    def end_episode(self) -> None:
        """Nothing to do."""


class _Stock(BlindStock):
    """Shared by the rules without a model of demand: the nearest level to a wished-for number of units."""

    def __init__(self, family: CensoredInventory, stores: bool = False):
        super().__init__(family)
        self.stores = stores
        check(self, "stores", lambda x: isinstance(x, bool), "True or False")

    def _nearest(self, units: Tensor) -> Tensor:
        """Index of the level nearest to ``units`` (M, N), on the logarithmic scale of the levels."""
        levels = constant(self.family.levels, units).log1p()
        return (units.clamp(min=0).log1p()[..., None] - levels).abs().argmin(-1)

    def _pooled(self, values: Tensor) -> Tensor:
        """The mean over the stores, for each of them, if there are stores."""
        return values.mean(1, keepdim=True).expand_as(values) if self.stores else values


class MovingAverage(_Stock):
    """The spreadsheet rule: orders up to the mean of recent daily sales plus z standard deviations, as if sales were
    demand, with z the normal quantile of the critical fractile.

    A day that sells out hides demand, so mean and deviation come out too low, the next order is lower, and sells out
    more often: the spiral-down effect (Cooper, Homem-de-Mello and Kleywegt 2006). Until ``start`` days have been seen
    it orders up to the blind level. With a lead time, mean and deviation are those of lead_time + 1 days.
    """

    def __init__(self, family: CensoredInventory, stores: bool = False, window: int = 14, start: int = 3):
        super().__init__(family, stores)
        self.window, self.start = window, start
        check(self, "window", lambda x: whole(x, 2), "a whole number >= 2")
        check(self, "start", lambda x: whole(x, 2, self.window), f"a whole number from 2 to window = {self.window}")

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No sales yet."""
        self.sales: list[Tensor] = []

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The level nearest to mean + z deviations, (M, N)."""
        seen = self.family.seen(observation)
        self.weekday = seen.weekday
        if len(self.sales) < self.start:
            return super().act(observation, noise)
        sales, days = torch.stack(self.sales[-self.window :]), self.family.lead_time + 1
        over = (0, 2) if self.stores else (0,)
        variance, mean = torch.var_mean(sales, over, keepdim=True)
        variance, mean = (x.expand(1, *seen.price.shape)[0] for x in (variance, mean))
        z = torch.special.ndtri((seen.price - 1) / (seen.price - 1 + seen.holding))
        return self._nearest(seen.weekday * (days * mean + z * (days * variance).sqrt()))

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Note the day's sales, without season. A day before the first delivery says nothing."""
        seen = self.family.seen(next_observation)
        if self.family.lead_time < seen.day[0, 0]:
            self.sales.append(seen.sold / self.weekday)


class AdaptiveStock(_Stock):
    """The adaptive inventory rule of Huh and Rusmevichientong (2009): after a day with units left the target comes down
    by ``step`` h / (p - 1 + h), after a day that sold out it goes up by ``step`` (p - 1) / (p - 1 + h), a stochastic
    gradient of the newsvendor's profit that needs no model, no prior and no lost sales.

    Step sizes fall as the square root of the days seen, in units of ``step`` times the first target, the blind level.
    """

    def __init__(self, family: CensoredInventory, stores: bool = False, step: float = 1.0):
        super().__init__(family, stores)
        if family.lead_time:
            raise ValueError(f"lead_time = {family.lead_time}: AdaptiveStock needs orders that arrive at once")
        self.step = step
        check(self, "step", lambda x: number(x, 0), "a finite number > 0")

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No target yet."""
        self.target, self.steps = None, 0

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The level nearest to the target, (M, N)."""
        seen = self.family.seen(observation)
        self.weekday = seen.weekday
        if self.target is None:
            level = self.family.blind_level(seen.price, seen.holding, seen.day)
            self.target = self.first = constant(self.family.levels, seen.price)[level] / seen.weekday
        return self._nearest(self.target * seen.weekday)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """A step up or down. A day that began with more than the target says nothing about it, unless it sold out."""
        seen, self.steps = self.family.seen(next_observation), self.steps + 1
        fractile = (seen.price - 1) / (seen.price - 1 + seen.holding)
        up = torch.where(seen.sold >= seen.available, fractile, fractile - 1)
        change = self.step * self.first * self._pooled(up) / self.steps**0.5
        self.target = (self.target + change).clamp(min=0)


def agents(family: CensoredInventory, stores: bool = False) -> dict[str, Agent]:
    """The blind rule and those of this domain that need no prior, by the names of chapter "Inventory". The Bayesian
    base-stock rule is ``GreedyBayes``."""
    rules: dict[str, Agent] = {"blind": BlindStock(family), "moving average": MovingAverage(family, stores)}
    if not family.lead_time:
        rules["adaptive stock"] = AdaptiveStock(family, stores)
    return rules
