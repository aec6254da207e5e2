"""SegmentBidding: a day's bids for ad space of several audience segments whose conversion rates are hidden (chapter
"Advertising")."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from .auction import Outcome, best_levels, outcome
from .base import Prior, check, number, numbers, whole
from .constants import constant
from .demand import poisson_inverse
from .segments import AuctionState, Campaigns, Seen, SegmentPrior

__all__ = ["AuctionState", "Campaigns", "Seen", "SegmentBidding", "SegmentPrior"]


_TINY = 1e-12
"""Least budget that a share is taken of, so that a budget of 0 is a share of 0."""


@dataclass(frozen=True)
class SegmentBidding(Prior):
    """A day of auctions for requests of K segments, won by the higher bid, under a budget that is never exceeded.

    In every tick (an hour) an action gives each segment a multiplier e^(a_k): a request of predicted quality w is bid
    for with ``base`` bid x e^(a_k) x w. If that is more than the best competing price, the request is won and the
    competing price is paid (second price). A request won converts with a small probability c_k w, so that conversions
    of a tick are Poisson. The reward is value x conversions less what was spent. Equations (eq-bid) to (eq-bid-reward)
    of chapter "Advertising".

    Requests come in *lots* of requests alike, each segment's in turn. A lot is bought whole or not at all, and the
    first one that costs more than what is left of the budget ends the buying of the tick.
    """

    segments: int = 8
    """K, audience segments, each with the same number of requests."""
    profile: tuple[float, ...] = tuple(round(1 - 0.75 * math.cos(math.pi * (t - 3.5) / 12), 3) for t in range(24))
    """Requests of each tick of the day relative to the mean, known to the advertiser; their mean is 1."""
    requests: float = 30_000.0
    """Requests in an average tick, of all segments together."""
    lots: int = 8
    """Lots in which the requests of one segment come in a tick."""
    quality_sd: float = 0.5
    """q, standard deviation of the logarithm of the predicted quality w, which has median 1."""
    prior: SegmentPrior = field(default_factory=SegmentPrior)
    """Distribution of the hidden parameters, of budgets and values."""
    first_price: bool = False
    """If true, the winner pays the bid."""
    profit: bool = True
    """If false, the reward is value x conversions alone, as for a campaign whose budget is to be spent anyway."""
    delay: int = 0
    """Ticks until a conversion is reported, and counted in the reward; at the end of the day all are."""
    base: tuple[float, float, float] = (-1.25, 0.7, 1.0)
    """(l, e, g): the bid of action 0 on quality 1 is ``typical_rate`` x value x exp(l) x (budget / (value x
    ``typical_budget``))^e x (money left / requests to come, each as a share of the day's)^g. The defaults are near the
    best for the default prior (``blind_policy``), so that a policy that does nothing is the blind one."""
    typical_rate: float = 8e-4
    """Scale of bids and of what the advertiser sees; not a hidden parameter."""
    typical_budget: float = 40.0
    """Scale of the budget in an observation."""
    limit: float = 5.0
    """Actions are clipped to [-limit, limit]."""

    def __post_init__(self):
        mean_one = lambda x: min(x) > 0 and abs(sum(x) / len(x) - 1) < 1e-6
        check(self, "segments", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "profile", lambda x: numbers(x) and mean_one(x), "positive multipliers with mean 1")
        check(self, "lots", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "prior", lambda x: isinstance(x, SegmentPrior), "a SegmentPrior")
        for name in ("first_price", "profit"):
            check(self, name, lambda x: isinstance(x, bool), "True or False")
        check(self, "delay", lambda x: whole(x, 0, len(self.profile) - 1), f"a whole number in 0..{self.horizon - 1}")
        check(self, "base", lambda x: numbers(x, 3), "three finite numbers")
        for name in ("requests", "quality_sd", "typical_rate", "typical_budget", "limit"):
            check(self, name, lambda x: number(x, 0), "a finite number > 0")

    # -------------------------------------------------------------------------------------------- the protocol
    actions = 0

    @property
    def horizon(self) -> int:
        """Ticks in a day."""
        return len(self.profile)

    @property
    def action_size(self) -> int:
        """K, one multiplier for each segment."""
        return self.segments

    blocks = 4, 4
    """Entries of an observation: of the campaign, and of each segment."""

    @property
    def noise_size(self) -> int:
        """Uniforms of a tick, for each segment: two that shift its lattice of lots, one for its conversions."""
        return 3 * self.segments

    @property
    def observation_size(self) -> int:
        """Four numbers of the campaign and four of each segment."""
        return 4 + 4 * self.segments

    @property
    def hidden_size(self) -> int:
        """Three hidden parameters of each segment."""
        return 3 * self.segments

    @property
    def prior_size(self) -> int:
        """The hidden parameters, then budget and value."""
        return self.hidden_size + 2

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> Campaigns:
        """Campaigns of ``uniforms`` (M, 3 K + 2)."""
        hidden = self.prior.hidden(uniforms[:, : self.hidden_size].unflatten(1, (self.segments, 3)))
        seen = zip(uniforms[:, -2:].unbind(1), (self.prior.budget, self.prior.value))
        return Campaigns(task_id, *hidden, *(low * (high / low) ** u for u, (low, high) in seen))

    def shifted(self) -> SegmentBidding:
        """The same auctions under a prior that training never saw."""
        return replace(self, prior=self.prior.shifted())

    def wide(self) -> SegmentBidding:
        """The same auctions under a vague prior, about twice as wide in every hidden parameter."""
        return replace(self, prior=self.prior.wide())

    def context(self, tasks: Campaigns) -> Tensor:
        """(M, 2): budget and value of a conversion."""
        return torch.stack((tasks.budget, tasks.value), -1)

    def reset(self, tasks: Campaigns, episodes: int, noise: Tensor) -> AuctionState:
        """Midnight: the whole budget, nothing seen; no chance is involved."""
        zeros = tasks.budget.new_zeros(len(tasks.budget), episodes)
        each = zeros[..., None].expand(-1, -1, self.segments)
        waiting = zeros[..., None, None].expand(-1, -1, self.delay, self.segments)
        return AuctionState(zeros, zeros + tasks.budget[:, None], each, each, each, each, waiting)

    def observe(self, tasks: Campaigns, state: AuctionState) -> Tensor:
        """(M, N, 4 + 4 K): tick / ticks, share of the budget left, log(budget / typical_budget), log value; then, by
        segment, the share of requests won in the last tick, and log(1 + x) of the day's totals so far: of the
        conversions that the quality won is worth at the typical rate, of 100 times the share of the budget spent, and
        of conversions reported."""
        budget, value = tasks.budget[:, None].clamp(min=_TINY), tasks.value[:, None]
        columns = (
            state.tick / self.horizon,
            state.left / budget,
            (budget / self.typical_budget).log().expand_as(state.tick),
            value.log().expand_as(state.tick),
        )
        segments = (
            state.wins,
            torch.log1p(self.typical_rate * state.quality),
            torch.log1p(100 * state.spend / budget[..., None]),
            torch.log1p(state.conversions),
        )
        return torch.cat((torch.stack(columns, -1), *segments), -1)

    def seen(self, observation: Tensor) -> Seen:
        """The same observation in ticks, money and counts: the inverse of the scaling in ``observe``."""
        tick, left, budget, value = observation[..., :4].unbind(-1)
        wins, quality, spend, conversions = observation[..., 4:].unflatten(-1, (4, self.segments)).unbind(-2)
        budget = budget.exp() * self.typical_budget
        return Seen(
            (tick * self.horizon).round(),
            left * budget,
            budget,
            value.exp(),
            wins,
            quality.expm1() / self.typical_rate,
            spend.expm1() * budget[..., None] / 100,
            conversions.expm1().round(),
        )

    def step(
        self, tasks: Campaigns, state: AuctionState, action: Tensor, noise: Tensor
    ) -> tuple[AuctionState, Tensor, Tensor]:
        """Bid for a tick. ``action`` (M, N, K) are logarithms of multipliers."""
        log_quality, log_price = self.arrivals(tasks, noise)
        base = self.base_level(state.tick, state.left, tasks.budget[:, None], tasks.value[:, None])
        level = base[..., None] + action.clamp(-self.limit, self.limit)
        log_bid = level[:, :, None] + log_quality
        size = self.offered(state.tick)[..., None] / self.lots  # requests in a lot, (M, N, 1)
        wanted = log_bid > log_price
        cost = torch.exp(log_bid if self.first_price else log_price) * (size[..., None] * wanted)
        affordable = cost.flatten(2).cumsum(-1) <= state.left[..., None]
        won = wanted * affordable.unflatten(-1, wanted.shape[2:])
        quality = size * (log_quality.exp() * won).sum(2)
        spend = (cost * won).sum(2)
        converted = poisson_inverse(noise[..., -self.segments :], tasks.rate[:, None] * quality)

        last = state.tick >= self.horizon - 1
        queue = torch.cat((state.waiting, converted[:, :, None]), 2)
        reported = torch.where(last[..., None], queue.sum(2), queue[:, :, 0])
        left = (state.left - spend.sum(-1)).clamp(min=0)
        state = AuctionState(
            state.tick + 1,
            left,
            won.to(spend.dtype).mean(2),
            state.quality + quality,
            state.spend + spend,
            state.conversions + reported,
            queue[:, :, 1:],
        )
        reward = tasks.value[:, None] * reported.sum(-1) - self.profit * spend.sum(-1)
        return state, reward, last

    def arrivals(self, tasks: Campaigns, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of quality and best competing price of a tick's lots, each (M, N, lots, K), in order of arrival:
        lots row by row, and segments 0 to K - 1 within each.

        Each lot has exactly the distribution of a request. The lots of a segment are one lattice of quantiles, shifted
        at random, so that their averages vary far less than those of as many independent draws would: there are
        thousands of requests behind them.
        """
        shift = noise[..., : 2 * self.segments].unflatten(-1, (2, 1, self.segments))
        quantile = (shift + constant(self._lattice, noise)[:, :, None]).remainder(1)
        normal = torch.special.ndtri(quantile.clamp(min=torch.finfo(noise.dtype).eps))
        log_price = tasks.price[:, None, None] + tasks.spread[:, None, None] * normal[:, :, 1]
        return self.quality_sd * normal[:, :, 0], log_price

    @property
    def _lattice(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Quantiles of quality and price of a tick's lots before the random shift."""
        golden = (math.sqrt(5) - 1) / 2
        return tuple(j / self.lots for j in range(self.lots)), tuple(j * golden % 1 for j in range(self.lots))

    # -------------------------------------------------------------------------------------------- what is known
    def offered(self, tick: Tensor) -> Tensor:
        """Requests of one segment in a tick, same shape."""
        return constant(self.profile, tick)[tick.long() % self.horizon] * (self.requests / self.segments)

    def to_come(self, tick: Tensor) -> Tensor:
        """Share of the day's requests that come from this tick on, same shape; never 0."""
        later = [sum(self.profile[t:]) / sum(self.profile) for t in range(self.horizon)]
        return constant(tuple(later), tick)[tick.long() % self.horizon]

    def base_level(
        self,
        tick: Tensor,
        left: Tensor,
        budget: Tensor,
        value: Tensor,
        base: Tensor | tuple[float, float, float] | None = None,
    ) -> Tensor:
        """Level (the logarithm of the bid on a request of quality 1) of action 0, equation (eq-base-bid), of the
        arguments' shape. It reads time, context and what is left, no feedback."""
        level, exponent, pacing = self.base if base is None else base
        budget = budget.clamp(min=_TINY)
        ahead = ((left / budget).clamp(min=1e-3) / self.to_come(tick)).log().clamp(-2, 2)
        scarce = (budget / (value * self.typical_budget)).log()
        return math.log(self.typical_rate) + value.log() + level + exponent * scarce + pacing * ahead

    # ------------------------------------------------------------------------------------- oracle and blind policy
    def oracle_level(self, tasks: Campaigns) -> Tensor:
        """(M, K) levels that are best if the campaign is known and its day is fluid (``auction.best_levels``)."""
        per_request = tasks.budget * self.segments / (self.requests * self.horizon)
        worth = tasks.value[:, None] * tasks.rate
        lowest = 1.0 if self.profit else 1e-9
        return best_levels(worth, tasks.price, tasks.spread, per_request, self.quality_sd, lowest, self.first_price)

    def oracle_return(self, tasks: Campaigns) -> Tensor:
        """(M,) return of the best levels that know the campaign, in the fluid limit.

        No policy of this action set has a higher expected return but for the randomness of prices within a day; how
        far a simulated day falls short, and the hindsight optimum exceeds it, is in ``tests/test_bidding.py``.
        """
        requests = self.requests * self.horizon / self.segments
        return self._gain(tasks, outcome(self.oracle_level(tasks), *self._prices(tasks)), requests).sum(-1)

    def blind_return(self, tasks: Campaigns) -> Tensor:
        """(M,) return, in the fluid limit, of the best policy of the form ``base`` for the prior: one level for all
        segments, which depends on the budget and is paced by what is left of it, and on nothing that was won or
        converted. Its three numbers are found by quasi-random search (``blind_policy``)."""
        base = constant(blind_policy(self), tasks.budget)[:, None]
        return self.fluid_return(tasks, base)[:, 0]

    def fluid_return(self, tasks: Campaigns, base: Tensor) -> Tensor:
        """(M, C) return of C policies that bid at the base level, ``base`` (3, C), in the fluid limit: tick by tick
        each wins, spends and converts its mean, and a tick that would exceed the budget is cut short."""
        left = tasks.budget[:, None].expand(-1, base.shape[1])
        total, prices = torch.zeros_like(left), self._prices(tasks)
        prices = prices[0][:, None], prices[1][:, None], *prices[2:]
        wider = tasks._replace(rate=tasks.rate[:, None], value=tasks.value[:, None])
        for tick in range(self.horizon):
            now = torch.full_like(left, tick)
            level = self.base_level(now, left, tasks.budget[:, None], tasks.value[:, None], tuple(base))
            got = outcome(level[..., None].expand(-1, -1, self.segments), *prices)
            requests = self.offered(now)
            cost = requests * got.spend.sum(-1)
            share = (left / cost.clamp(min=torch.finfo(cost.dtype).tiny)).clamp(max=1)
            total = total + share * self._gain(wider, got, requests[..., None]).sum(-1)
            left = (left - share * cost).clamp(min=0)
        return total

    def _prices(self, tasks: Campaigns) -> tuple[Tensor, Tensor, float, bool]:
        return tasks.price, tasks.spread, self.quality_sd, self.first_price

    def _gain(self, tasks: Campaigns, got: Outcome, requests: Tensor | float) -> Tensor:
        return requests * (tasks.value[..., None] * tasks.rate * got.quality - self.profit * got.spend)


@lru_cache(maxsize=32)
def blind_policy(family: SegmentBidding, candidates: int = 256, campaigns: int = 256) -> tuple[float, float, float]:
    """The three numbers of ``SegmentBidding.base`` with the highest mean return over ``campaigns`` quasi-random
    campaigns of the prior: the best of ``candidates`` in a box, then of as many in a box a fifth as wide around it."""
    prior = family.prior_sample(campaigns)
    low, high = (torch.tensor(x, dtype=prior.budget.dtype) for x in ((-3.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    centre, width = (low + high) / 2, high - low
    for _ in range(2):
        points = SobolEngine(3, scramble=True, seed=0).draw(candidates, dtype=prior.budget.dtype)
        base = (centre + width * (points - 0.5)).T
        parts = [family.fluid_return(prior, part).mean(0) for part in base.split(64, 1)]
        centre, width = base[:, torch.cat(parts).argmax()], width / 5
    return tuple(centre.tolist())
