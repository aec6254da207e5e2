"""What a practitioner would use for pricing: Bayes with a particle posterior, and a price experiment (chapter
"Dynamic pricing")."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families.base import require
from ..families.pricing import LogitPricing, blind_policy, purchase_probability
from ..noise import inverse_transform


class ParticlePosterior:
    """Posterior over a product's hidden parameters: weights on a fixed quasi-random sample of the family's prior.

    The likelihood of a day is Poisson(units | traffic x weekday x purchase probability), or, when the shelf sold out,
    the probability that demand was at least what was left. Equation (eq-posterior).

    With ``stores``, the N replicas are stores of one chain that sell the same product: a day of any of them is evidence
    for all, equation (eq-stores-posterior) of chapter "Meta-reinforcement learning".
    """

    def __init__(self, family: LogitPricing, particles: int = 2048, stores: bool = False):
        if family.continuous:
            raise ValueError("ParticlePosterior needs the price grid: build the family with continuous=False")
        if not isinstance(particles, int) or particles < 2:
            raise ValueError(f"particles = {particles!r}: need a whole number, at least 2")
        require(isinstance(stores, bool), "stores", stores, "True or False")
        self.family, self.size, self.stores = family, particles, stores

    def begin(self, tasks: int, episodes: int, device: torch.device) -> None:
        """Back to the prior for M tasks in N replicas."""
        self.particles = self.family.prior_sample(self.size, device)
        markup = torch.tensor(self.family.markups, device=device, dtype=self.particles.cost.dtype)
        share = purchase_probability(self.particles, markup.expand(self.size, -1))
        self.rate = (self.particles.traffic[:, None] * share).T.contiguous()  # (A, P), units a day at multiplier 1
        self.log_rate = self.rate.log()
        # Sufficient statistics of the Poisson days: units sold and weekday multipliers, summed by price. Days on which
        # the shelf sold out have no such summary; their log-likelihood is added up by particle.
        self.units = torch.zeros(tasks, episodes, self.family.actions, device=device, dtype=self.rate.dtype)
        self.exposure = torch.zeros_like(self.units)
        self.sold_out = 0.0

    def update(self, action: Tensor, before: Tensor, after: Tensor) -> None:
        """Bayes' rule for one day: observations (M, N, 6) before and after posting ``action`` (M, N)."""
        before, after = self.family.seen(before), self.family.seen(after)
        counted = torch.ones_like(before.stock)
        if self.family.stock is not None:
            sold_out, nothing_to_sell = after.stock == 0, before.stock == 0
            counted = (~sold_out).to(self.units.dtype)
            mean = before.weekday[..., None] * self.rate[action]
            at_least = torch.special.gammainc(before.stock.clamp(min=1)[..., None], mean)
            at_least = at_least.clamp(min=torch.finfo(mean.dtype).tiny).log()
            self.sold_out = self.sold_out + torch.where((sold_out & ~nothing_to_sell)[..., None], at_least, 0.0)
        self.units.scatter_add_(-1, action[..., None], (after.sold * counted)[..., None])
        self.exposure.scatter_add_(-1, action[..., None], (before.weekday * counted)[..., None])

    @property
    def weight(self) -> Tensor:
        """(M, N, P) posterior probability of each particle; (M, 1, P), one for all stores, with ``stores``."""
        if not self.stores:
            return torch.softmax(self.units @ self.log_rate - self.exposure @ self.rate + self.sold_out, -1)
        units, exposure = self.units.sum(1, keepdim=True), self.exposure.sum(1, keepdim=True)
        sold_out = self.sold_out.sum(1, keepdim=True) if torch.is_tensor(self.sold_out) else 0.0
        return torch.softmax(units @ self.log_rate - exposure @ self.rate + sold_out, -1)


class _Bayes:
    """Shared by the two Bayesian agents: a posterior, and every particle's own table of action values."""

    noise_size = 1

    def __init__(self, family: LogitPricing, particles: int | None = None, stores: bool = False):
        self.family = family
        # With a stock limit a particle's table has days x (stock + 1) x actions entries: fewer are affordable.
        if particles is None:
            particles = 2048 if family.stock is None else 512
        self.posterior = ParticlePosterior(family, particles, stores)

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Back to the prior, with every particle's own table of action values."""
        self.posterior.begin(tasks, episodes, context.device)
        particles = self.posterior.particles
        # Cost is seen and only scales profit: with cost 1 in every particle, prices are ranked as with the true cost.
        self.values = self.family.action_values(particles._replace(cost=torch.ones_like(particles.cost)))
        self.best = self.values.argmax(-1)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (M, N) for observations (M, N, 6), by ``choose``."""
        self.observation = observation
        seen = self.family.seen(observation)
        day = seen.day.long().clamp(max=self.family.days - 1)
        level = torch.zeros_like(day) if self.family.stock is None else seen.stock.long()
        return self.choose(day, level, noise)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Bayes' rule for the day that just ended."""
        self.posterior.update(action, self.observation, next_observation)

    def end_episode(self) -> None:
        """Nothing to do: the posterior carries over to the next episode of the same product."""


class GreedyBayes(_Bayes):
    """Posts the price with the highest posterior mean profit, and never pays for information (certainty equivalence's
    Bayesian cousin). It can stop learning: chapter "Dynamic pricing", section on incomplete learning."""

    def choose(self, day: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """The price (M, N) of highest posterior mean action value on that day at that level of stock."""
        # Every replica of every task is on the same day, so only the shelf's level differs.
        table = self.values[:, day[0, 0]]  # (P, levels, A)
        if table.shape[1] == 1:
            return (self.posterior.weight @ table[:, 0]).argmax(-1).expand_as(day)
        mean = torch.einsum("mnp,pla->mnla", self.posterior.weight, table).expand(-1, day.shape[1], -1, -1)
        return mean.gather(2, level[..., None, None].expand(-1, -1, 1, mean.shape[-1]))[:, :, 0].argmax(-1)


class Thompson(_Bayes):
    """Draws one market from the posterior each day and posts its best price (Thompson 1933)."""

    def choose(self, day: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """The best price (M, N) of one particle, drawn from the posterior."""
        cumulative = self.posterior.weight.cumsum(-1)
        if self.posterior.stores:  # one posterior, and a draw of its own for every store
            particle = torch.searchsorted(cumulative[:, 0], noise[..., 0].contiguous(), right=True)
        else:
            particle = torch.searchsorted(cumulative, noise, right=True)[..., 0]
        return self.best[particle.clamp(max=self.posterior.size - 1), day, level]


class EpsilonGreedy:
    """A price experiment without a model: try each price once in random order, then post the best average, at random
    with probability epsilon. Profits are divided by the weekday multiplier before averaging."""

    noise_size = 2

    def __init__(self, family: LogitPricing, epsilon: float = 0.1):
        if family.continuous or family.stock is not None:
            raise ValueError("EpsilonGreedy needs the price grid and no stock limit")
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon = {epsilon}: must lie in [0, 1]")
        self.family, self.epsilon = family, epsilon

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No price has been tried."""
        self.total = torch.zeros(tasks, episodes, self.family.actions, device=context.device)
        self.count = torch.zeros_like(self.total)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """An untried price while there is one, then the best average, or any price with probability epsilon."""
        self.weekday = self.family.seen(observation).weekday
        untried = self.count == 0
        mean = torch.where(untried, torch.inf, self.total / self.count.clamp(min=1))
        everything = torch.ones_like(untried)
        explore = (noise[..., 0] < self.epsilon)[..., None]
        candidates = torch.where(
            untried.any(-1, keepdim=True),
            untried,
            torch.where(explore, everything, mean == mean.amax(-1, keepdim=True)),
        )
        return inverse_transform(candidates / candidates.sum(-1, keepdim=True), noise[..., 1])

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Add the day's profit to the average of its price."""
        self.total.scatter_add_(-1, action[..., None], (reward / self.weekday)[..., None])
        self.count.scatter_add_(-1, action[..., None], torch.ones_like(reward)[..., None])

    def end_episode(self) -> None:
        """Nothing to do: averages carry over to the next episode of the same product."""


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
