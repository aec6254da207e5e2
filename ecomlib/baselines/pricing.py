"""What a practitioner would use for pricing: Bayes with a particle posterior, and a price experiment (chapter
"Dynamic pricing")."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families.base import check, number
from ..families.constants import constant
from ..families.pricing import LogitPricing, blind_policy, purchase_probability
from ..noise import inverse_transform
from ..rollout import Agent
from .bayes import Belief, ParticlePrior, belief


class PricingBelief(Belief):
    """Posterior over a product's hidden parameters.

    The likelihood of a day is Poisson(units | traffic x weekday x purchase probability), or, when the shelf sold out,
    the probability that demand was at least what was left. Equation (eq-posterior).
    """

    def __init__(
        self,
        family: LogitPricing,
        particles: int | None = None,
        stores: bool = False,
        prior: ParticlePrior | None = None,
    ):
        if family.continuous:
            raise ValueError("PricingBelief needs the price grid: build the family with continuous=False")
        # With a stock limit a particle's table has days x (stock + 1) x actions entries: fewer are affordable.
        self.default_particles = 2048 if family.stock is None else 512
        super().__init__(family, particles, stores, prior)

    def prepare(self, context: Tensor) -> None:
        """Demand rates and action values of every particle, and empty statistics."""
        tasks, units, _ = self.log_weight.shape
        # Cost is seen and only scales profit: with cost 1 in every particle, prices are ranked as with the true cost.
        self.particles = self.particles._replace(cost=torch.ones_like(self.particles.cost))
        markup = torch.tensor(self.family.markups, device=context.device, dtype=self.particles.cost.dtype)
        share = purchase_probability(self.particles, markup.expand(self.size, -1))
        self.rate = (self.particles.traffic[:, None] * share).T.contiguous()  # (A, P), units a day at multiplier 1
        self.log_rate = self.rate.log()
        self.values = self.family.action_values(self.particles)  # (P, days, levels, A)
        # Sufficient statistics of the Poisson days: units sold and weekday multipliers, summed by price. Days on which
        # the shelf sold out have no such summary; their log-likelihood is added up by particle.
        self.units = torch.zeros(tasks, units, self.family.actions, device=context.device, dtype=self.rate.dtype)
        self.exposure = torch.zeros_like(self.units)

    def update(self, before: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> None:
        """Bayes' rule for one day: observations (M, N, 6) before and after asking for the price ``action`` (M, N)."""
        action = _posted(self.family, action, after)
        before, after = self.family.seen(before), self.family.seen(after)
        pooled = lambda x: x.sum(1, keepdim=True) if self.stores else x
        counted = torch.ones_like(before.stock)
        if self.family.stock is not None:
            sold_out, nothing_to_sell = after.stock == 0, before.stock == 0
            counted = (~sold_out).to(self.units.dtype)
            mean = before.weekday[..., None] * self.rate[action]
            at_least = torch.special.gammainc(before.stock.clamp(min=1)[..., None], mean)
            at_least = at_least.clamp(min=torch.finfo(mean.dtype).tiny).log()
            evidence = torch.where((sold_out & ~nothing_to_sell)[..., None], at_least, 0.0)
            self.log_weight = self.log_weight + pooled(evidence)
        by_price = torch.zeros(*action.shape, self.family.actions, device=action.device, dtype=self.units.dtype)
        add = lambda x: pooled(by_price.scatter(-1, action[..., None], x[..., None]))
        self.units = self.units + add(after.sold * counted)
        self.exposure = self.exposure + add(before.weekday * counted)

    def fade(self, power: float) -> None:
        """As ``Belief.fade``."""
        super().fade(power)
        self.units, self.exposure = power * self.units, power * self.exposure

    @property
    def log_posterior(self) -> Tensor:
        """As ``Belief.log_posterior``."""
        return self.log_weight + self.units @ self.log_rate - self.exposure @ self.rate

    def _shelf(self, observation: Tensor) -> tuple[int, Tensor]:
        """The day, on which all replicas of all tasks are, and the level of stock (M, N), 0 without a limit."""
        seen = self.family.seen(observation)
        day = seen.day.long().clamp(max=self.family.days - 1)
        return day[0, 0], torch.zeros_like(day) if self.family.stock is None else seen.stock.long()

    def best_for(self, particle: Tensor, observation: Tensor) -> Tensor:
        """The price of highest action value in the market of ``particle`` (M, N)."""
        day, level = self._shelf(observation)
        return self.values[particle, day, level].argmax(-1)

    def moments(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Of every price's action value on that day at that level of stock. Without a stock limit the prices of later
        days are free of today's, so it is that of a day's profit (the last day's)."""
        day, level = self._shelf(observation)
        day = self.family.days - 1 if self.family.stock is None else day
        table, weight = self.values[:, day], self.weight  # (P, levels, A), (M, N or 1, P)
        mean = self._average(weight, table, level)
        square = self._average(weight, table**2, level)
        return mean, (square - mean**2).clamp(min=0).sqrt()

    def best_on_average(self, observation: Tensor) -> Tensor:
        """The price of highest posterior mean action value."""
        day, level = self._shelf(observation)
        return self._average(self.weight, self.values[:, day], level).argmax(-1)

    def _average(self, weight: Tensor, table: Tensor, level: Tensor) -> Tensor:
        if table.shape[1] == 1:
            return (weight @ table[:, 0]).expand(-1, level.shape[1], -1)
        mean = torch.einsum("mnp,pla->mnla", weight, table).expand(-1, level.shape[1], -1, -1)
        return mean.gather(2, level[..., None, None].expand(-1, -1, 1, mean.shape[-1]))[:, :, 0]


belief.register(LogitPricing, PricingBelief)


def _posted(family: LogitPricing, action: Tensor, after: Tensor) -> Tensor:
    """The price that was posted when ``action`` (M, N) was asked for: a limit on changes may have kept the old one."""
    return action if family.changes_per_week is None else family.posted(after)


class EpsilonGreedy:
    """A price experiment without a model: try each price once in random order, then post the best average, at random
    with probability epsilon. Profits are divided by the weekday multiplier before averaging. With ``stores``, the
    averages are over all stores of a chain, each of which makes its own draws."""

    noise_size = 2

    def __init__(self, family: LogitPricing, epsilon: float = 0.1, stores: bool = False):
        if family.continuous or family.stock is not None:
            raise ValueError("EpsilonGreedy needs the price grid and no stock limit")
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon = {epsilon}: must lie in [0, 1]")
        self.family, self.epsilon, self.stores = family, epsilon, stores

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No price has been tried."""
        self.total = torch.zeros(tasks, 1 if self.stores else episodes, self.family.actions, device=context.device)
        self.count = torch.zeros_like(self.total)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """An untried price while there is one, then the best average, or any price with probability epsilon."""
        self.weekday = self.family.seen(observation).weekday
        untried = self.count == 0
        mean = torch.where(untried, torch.inf, self.total / self.count.clamp(min=1))
        everything = torch.ones_like(untried)
        explore = (noise[..., 0] < self.epsilon)[..., None]
        candidates = torch.where(  # (M, N, A)
            untried.any(-1, keepdim=True),
            untried,
            torch.where(explore, everything, mean == mean.amax(-1, keepdim=True)),
        )
        return inverse_transform(candidates / candidates.sum(-1, keepdim=True), noise[..., 1])

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Add the day's profit to the average of its price."""
        action = _posted(self.family, action, next_observation)
        if self.stores:
            action, reward, weekday = (x.flatten(1)[:, None] for x in (action, reward, self.weekday))
        else:
            action, reward, weekday = (x[..., None] for x in (action, reward, self.weekday))
        self.total.scatter_add_(-1, action, reward / weekday)
        self.count.scatter_add_(-1, action, torch.ones_like(reward))

    def end_episode(self) -> None:
        """Nothing to do: averages carry over to the next episode of the same product."""


class ControlledVariance:
    """Controlled variance pricing (den Boer and Zwart 2014): the price that is best under the estimated demand curve,
    but no nearer to the average of past prices than c t^(-1/4), so that past prices never stop varying.

    Adapted to this family: the demand curve is the logit (eq-demand), and its estimate the particle of the prior with
    the highest posterior weight, the mode, where they take the maximum of a quasi-likelihood, which needs two prices to
    begin with; the first price is the one that is best on average over the prior. Of the prices outside the interval
    the best under the estimate is posted, where they step to the interval's end. With ``distance`` 0 this is plain
    certainty equivalence. With ``stores``, t counts days of all stores and the average is over all of them.
    """

    noise_size = 1

    def __init__(
        self, family: LogitPricing, distance: float = 0.05, particles: int | None = None, stores: bool = False
    ):
        if family.continuous or family.stock is not None:
            raise ValueError("ControlledVariance needs the price grid and no stock limit")
        self.family, self.distance, self.stores = family, distance, stores
        half = (family.markups[-1] - family.markups[0]) / 2  # a wider interval could hold the whole grid
        check(self, "distance", lambda x: number(x) and 0 <= x <= half, f"a number in [0, {half:g}]")
        self.belief = PricingBelief(family, particles, stores)

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No price has been posted."""
        self.belief.begin(context, tasks, episodes)
        units = 1 if self.stores else episodes
        self.total = torch.zeros(tasks, units, device=context.device, dtype=self.belief.rate.dtype)
        self.days = 0

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The best price (M, N) for the most likely market, outside the interval."""
        self.observation = observation
        if self.days == 0:
            return self.belief.best_on_average(observation)
        markup = constant(self.family.markups, self.total)
        mode = self.belief.log_posterior.argmax(-1)  # (M, 1) or (M, N)
        near = (markup - self.total[..., None] / self.days).abs() < self.distance * self.days**-0.25
        profit = torch.where(near, -torch.inf, (markup - 1) * self.belief.rate.T[mode])
        return profit.argmax(-1).expand(observation.shape[:2])

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Bayes' rule for the mode, and one more price in the average."""
        self.belief.update(self.observation, action, reward, next_observation)
        markup = self.family.seen(next_observation).markup
        self.total = self.total + (markup.sum(1, keepdim=True) if self.stores else markup)
        self.days += markup.shape[1] if self.stores else 1

    def end_episode(self) -> None:
        """Nothing to do: estimates carry over to the next episode of the same product."""


class FixedMarkup:
    """Posts one markup for ever: the blind price by default, or the grid price nearest to ``markup``."""

    noise_size = 1

    def __init__(self, family: LogitPricing, markup: float | None = None):
        if family.continuous or family.stock is not None:
            raise ValueError("FixedMarkup needs the price grid and no stock limit")
        low, high = family.markups[0], family.markups[-1]
        if markup is not None and not low <= markup <= high:
            raise ValueError(f"markup = {markup}: must lie in [{low}, {high}]")
        distance = [abs(m - markup) for m in family.markups] if markup is not None else None
        self.action = distance.index(min(distance)) if distance else int(blind_policy(family)[0, 0])
        self.markup = family.markups[self.action]

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Nothing to forget."""

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The same action (M, N) every day."""
        return torch.full(observation.shape[:2], self.action, device=observation.device)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Nothing to learn."""

    def end_episode(self) -> None:
        """Nothing to do."""


def agents(family: LogitPricing, stores: bool) -> dict[str, Agent]:
    """Pricing's own baselines, by the names of the book; ``stores`` as in ``Belief``. Their settings were chosen on
    training products."""
    return {
        "epsilon-greedy": EpsilonGreedy(family, 0.01, stores),
        "controlled variance": ControlledVariance(family, 0.05, stores=stores),
    }
