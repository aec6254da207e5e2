"""What a practitioner would use to bid for segments: a Bayesian with a posterior for each segment, pacing by feedback,
and optimism about what has not been tried (chapter "Advertising")."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import ndtri

from ..families.auction import best_levels
from ..families.base import check, number, require
from ..families.bidding import Seen, SegmentBidding, blind_policy
from .bayes import Belief, ParticlePrior, belief


class SegmentParticles(NamedTuple):
    """Segments as particles. Every field is (P,)."""

    rate: Tensor
    price: Tensor
    spread: Tensor


class SegmentBelief(Belief):
    """A posterior for each segment of its own: weights (M, N, K, P) on P particles (rate, price, spread).

    Segments are independent given the prior, so that the posterior of all is the product of theirs, and P particles
    do for 3 dimensions what no affordable number would do for 3 K. What a segment has shown enters as sums:

    - conversions, given the qualities won: Poisson, exactly;
    - wins out of the lots offered, by level of the bid in steps of ``step``: binomial, as if lots were drawn
      independently. They vary less, so this is cautious about prices. Ticks that ended without money do not count.

    The level that spends what is left is found as the oracle finds it, with posterior means in place of the truth.
    """

    default_particles = 512
    step = 0.2
    """Width of a bin of bid levels."""
    bins = 60
    """Bins, centred on the typical rate; levels beyond them count as in the last."""

    def __init__(
        self,
        family: SegmentBidding,
        particles: int | None = None,
        stores: bool = False,
        prior: ParticlePrior | None = None,
    ):
        super().__init__(family, particles, stores, prior)
        if prior is not None and not isinstance(prior.particles, SegmentParticles):
            raise ValueError(f"prior.particles is a {type(prior.particles).__name__}; allowed: SegmentParticles")

    def sample(self, device: torch.device) -> SegmentParticles:
        """Particles of one segment: all are alike."""
        sample = replace(self.family, segments=1).prior_sample(self.size, device)
        return SegmentParticles(sample.rate[:, 0], sample.price[:, 0], sample.spread[:, 0])

    def prepare(self, context: Tensor) -> None:
        """Chances of winning at every level, and empty sums for every segment."""
        family, device, (tasks, units, _) = self.family, context.device, self.log_weight.shape
        levels = math.log(family.typical_rate) + self.step * (torch.arange(self.bins, device=device) - self.bins // 2)
        scale = (self.particles.spread.square() + family.quality_sd**2).sqrt()
        z = (levels[:, None] - self.particles.price) / scale
        self.log_win, self.log_loss = torch.special.log_ndtr(z), torch.special.log_ndtr(-z)  # (bins, P)
        each = torch.zeros(tasks, units, family.segments, device=device)
        self.conversions, self.quality = each, each
        self.wins = each.new_zeros(*each.shape, self.bins)
        self.losses = self.wins.clone()
        self.summary: tuple[Tensor, Tensor] | None = None

    def update(self, before: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> None:
        """Add a tick's conversions, qualities, wins and losses to the sums."""
        family = self.family
        start, end = family.seen(before), family.seen(after)
        level = base_level(family, start)[..., None] + action.clamp(-family.limit, family.limit)
        index = ((level - math.log(family.typical_rate)) / self.step + self.bins // 2).round().long()
        index = index.clamp(0, self.bins - 1)
        counts = (end.left > 0.01 * end.budget)[..., None].to(end.wins.dtype) * family.lots
        if self.stores:  # evidence of each unit is evidence for all: (M, N, K) to (M, 1, K, N)
            rows = lambda x: x.transpose(1, 2)[:, None]
        else:
            rows = lambda x: x[..., None]
        self.conversions = self.conversions + rows(end.conversions - start.conversions).sum(-1)
        self.quality = self.quality + rows(end.quality - start.quality).sum(-1)
        self.wins.scatter_add_(-1, rows(index), rows(counts * end.wins))
        self.losses.scatter_add_(-1, rows(index), rows(counts * (1 - end.wins)))
        self.summary = None

    def fade(self, power: float) -> None:
        """As ``Belief.fade``."""
        self.conversions, self.quality = power * self.conversions, power * self.quality
        self.wins, self.losses, self.summary = power * self.wins, power * self.losses, None

    @property
    def log_posterior(self) -> Tensor:
        """(M, N, K, P), up to a constant in each row; (M, 1, K, P) with ``stores``."""
        rate = self.particles.rate
        conversions = self.conversions[..., None] * rate.log() - self.quality[..., None] * rate
        return self.log_prior + conversions + self.wins @ self.log_win + self.losses @ self.log_loss

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Posterior means of rate, price and spread and the standard deviation of the rate, each (M, N or 1, K)."""
        if self.summary is None:
            rate, price, spread = self.particles
            columns = torch.stack((rate, price, spread, rate.square()), -1)
            mean, price, spread, square = (self.weight @ columns).unbind(-1)
            self.summary = mean, price, spread, (square - mean.square()).clamp(min=0).sqrt()
        return self.summary

    def draw(self, uniform: Tensor) -> Tensor:
        """Particles (M, N, K) int64, one of each segment, drawn from their posteriors by one uniform (M, N): segment k
        uses it shifted by k golden ratios, so that each draw is exact and no two segments draw alike."""
        shift = torch.arange(self.family.segments, device=uniform.device) * 0.6180339887498949
        uniforms = (uniform[..., None] + shift.to(uniform.dtype)).remainder(1)
        cumulative = self.weight.cumsum(-1).expand(-1, uniform.shape[1], -1, -1).contiguous()
        return torch.searchsorted(cumulative, uniforms[..., None], right=True)[..., 0].clamp(max=self.size - 1)

    def best_for(self, particle: Tensor, observation: Tensor) -> Tensor:
        """What the oracle would bid for the rest of the day if ``particle`` (M, N, K) were true."""
        return self._bid(observation, *(x[particle] for x in self.particles))

    def best_on_average(self, observation: Tensor) -> Tensor:
        """Bids by posterior means."""
        return self._bid(observation, *self.means()[:3])

    def optimistic(self, observation: Tensor, width: float) -> Tensor:
        """Bids by posterior means, that of the rate raised by ``width`` standard deviations."""
        rate, price, spread, deviation = self.means()
        return self._bid(observation, rate + width * deviation, price, spread)

    def _bid(self, observation: Tensor, rate: Tensor, price: Tensor, spread: Tensor) -> Tensor:
        family, seen = self.family, self.family.seen(observation)
        to_come = family.requests * family.horizon / family.segments * family.to_come(seen.tick)
        worth = seen.value[..., None] * rate
        level = best_levels(
            worth,
            price.expand_as(worth),
            spread.expand_as(worth),
            seen.left / to_come,
            family.quality_sd,
            1.0 if family.profit else 1e-9,
            family.first_price,
            halvings=24,
        )
        return level - base_level(family, seen)[..., None]


@belief.register
def _(
    family: SegmentBidding, particles: int | None = None, stores: bool = False, prior: ParticlePrior | None = None
) -> SegmentBelief:
    return SegmentBelief(family, particles, stores, prior)


def base_level(family: SegmentBidding, seen: Seen, base: tuple[float, float, float] | None = None) -> Tensor:
    """(M, N) level of action 0, or of the policy ``base``, at an observation."""
    return family.base_level(seen.tick, seen.left, seen.budget, seen.value, base)


# ------------------------------------------------------------------------------------------------ without a model
class Blind:
    """The non-adaptive policy behind ``SegmentBidding.blind_return``: one level, paced by what is left."""

    noise_size = 1

    def __init__(self, family: SegmentBidding):
        self.family, self.base = family, blind_policy(family)

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Nothing to forget."""

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The same multiplier (M, N, K) for all segments."""
        seen = self.family.seen(observation)
        action = base_level(self.family, seen, self.base) - base_level(self.family, seen)
        return action[..., None].expand_as(seen.wins)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Nothing to learn."""

    def end_episode(self) -> None:
        """Nothing to do."""


class RandomMultipliers(Blind):
    """The blind policy times a log-normal multiplier of each segment, drawn anew in every tick: what logs look like
    where somebody has tried things."""

    def __init__(self, family: SegmentBidding, sd: float = 0.5):
        super().__init__(family)
        self.sd, self.noise_size = sd, family.segments
        check(self, "sd", lambda x: number(x) and x >= 0, "a finite number >= 0")

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Blind, and ``sd`` standard normals."""
        return super().act(observation, noise) + self.sd * ndtri(noise)


class PIDPacing(Blind):
    """One multiplier for all segments, corrected after every tick so that spending follows the requests of the day: a
    proportional-integral-derivative controller of the logarithm of planned over actual spend (as in Zhang et al. 2016
    for key performance indicators of a campaign). It learns the level of prices, not what a segment is worth.

    ``integral`` alone is even pacing. The sum of errors carries over to the next day, at which it starts.
    """

    def __init__(
        self,
        family: SegmentBidding,
        proportional: float = 0.2,
        integral: float = 0.2,
        derivative: float = 0.05,
    ):
        super().__init__(family)
        for name, value in (("proportional", proportional), ("integral", integral), ("derivative", derivative)):
            require(number(value) and value >= 0, name, value, "a finite number >= 0")
        self.gains = proportional, integral, derivative

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No error yet."""
        self.error = torch.zeros(tasks, episodes, device=context.device)
        self.total, self.change = torch.zeros_like(self.error), torch.zeros_like(self.error)

    def correction(self) -> Tensor:
        """(M, N), what is added to the level."""
        proportional, integral, derivative = self.gains
        return proportional * self.error + integral * self.total + derivative * self.change

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The blind level without pacing, plus the correction."""
        self.seen = seen = self.family.seen(observation)
        level, exponent, _ = self.base
        action = base_level(self.family, seen, (level, exponent, 0.0)) - base_level(self.family, seen)
        return (action + self.correction())[..., None].expand_as(seen.wins)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """The tick's share of what was left, against what was spent."""
        after, start = self.family.seen(next_observation), self.seen
        share = self.family.offered(start.tick) / (
            self.family.requests * self.family.horizon / self.family.segments * self.family.to_come(start.tick)
        )
        least = 1e-3 * start.budget / self.family.horizon
        planned, actual = start.left * share, start.left - after.left
        error = ((planned + least) / (actual + least)).log().clamp(-1, 1)
        error = torch.where(start.left > 0.01 * start.budget, error, 0.0)  # nothing can be spent, nothing is learned
        self.change, self.error, self.total = error - self.error, error, self.total + error


class UCBBidding(PIDPacing):
    """Bids each segment's estimated worth, raised by ``width`` standard errors, times one paced multiplier.

    The estimate is conversions over quality won, with one conversion at the typical rate added to both: it uses no
    prior of segments and no model of prices. Optimism in the manner of Auer, Cesa-Bianchi and Fischer (2002).
    """

    def __init__(self, family: SegmentBidding, width: float = 1.0, integral: float = 0.2, stores: bool = False):
        super().__init__(family, 0.0, integral, 0.0)
        require(number(width) and width >= 0, "width", width, "a finite number >= 0")
        require(isinstance(stores, bool), "stores", stores, "True or False")
        self.width, self.stores = width, stores

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Nothing has been tried."""
        super().begin(context, tasks, episodes)
        units = 1 if self.stores else episodes
        self.conversions = torch.ones(tasks, units, self.family.segments, device=context.device)
        self.quality = self.conversions / self.family.typical_rate

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Blind and paced, plus the logarithm of the estimate relative to the typical rate."""
        estimate = (self.conversions + self.width * self.conversions.sqrt()) / self.quality
        return super().act(observation, noise) + (estimate / self.family.typical_rate).log()

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Pace, and add the tick's conversions and qualities."""
        super().observe(action, reward, next_observation, done)
        after = self.family.seen(next_observation)
        pool = (lambda x: x.sum(1, keepdim=True)) if self.stores else (lambda x: x)
        self.conversions = self.conversions + pool(after.conversions - self.seen.conversions)
        self.quality = self.quality + pool(after.quality - self.seen.quality)


def agents(family: SegmentBidding, stores: bool = False) -> dict[str, Blind]:
    """The domain's own baselines by the name that the book shows. ``stores``: parallel units of one campaign pool what
    they learn of segments; each paces its own budget."""
    return {
        "blind": Blind(family),
        "random multipliers": RandomMultipliers(family),
        "even pacing": PIDPacing(family, 0.0, 0.2, 0.0),
        "PID pacing": PIDPacing(family),
        "UCB bidding": UCBBidding(family, stores=stores),
    }
