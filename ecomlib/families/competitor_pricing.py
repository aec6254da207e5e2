"""CompetitorPricing: the daily price of one product next to a competitor's, whose price moves by itself (chapter
"Dynamic pricing")."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..noise import inverse_transform
from .base import Prior, check, number, numbers, whole
from .constants import constant
from .demand import poisson_inverse
from .pricing import LogitPricing
from .priors import LogUniformPrior, MarketPrior

__all__ = ["CompetitorPricing", "Duopoly", "DuopolyState"]


class Duopoly(NamedTuple):
    """M products with a competitor each. Every field is (M,); all but ``id`` and ``cost`` are hidden."""

    id: Tensor
    sensitivity: Tensor  # a, utility lost per unit of markup
    utility: Tensor  # u, utility of the merchant's product at markup 0
    rival: Tensor  # b, utility of the competitor's at markup 0
    traffic: Tensor  # lambda, mean shoppers a day
    cost: Tensor  # c, unit cost; the competitor's markups are in units of it too


class DuopolyState(NamedTuple):
    """Where N episodes of M products stand. Every field is (M, N)."""

    day: Tensor
    competitor: Tensor  # today's place in ``competitor_markups``, int64
    markup: Tensor  # yesterday's; 0 on the first day
    sold: Tensor  # units sold yesterday


@dataclass(frozen=True)
class CompetitorPricing(Prior):
    """A shopper buys from the merchant, from the competitor or not at all, with probabilities in proportion to exp(u -
    a m), exp(b - a k) and 1, where m and k are the two markups; shoppers a day are Poisson(lambda w_weekday).

    The competitor's log markup is an AR(1) process on ``competitor_states`` points (Rouwenhorst's chain, which has the
    process's mean, variance and autocorrelation exactly; Kopecky and Suen 2010). The merchant sees it before posting.
    It reacts to nothing, so that the best price today is the best against today's competitor, equation
    (eq-competitor).
    """

    days: int = 14
    """Selling days in an episode."""
    markups: tuple[float, ...] = tuple(round(1.05 + 0.145 * k, 3) for k in range(11))
    """Prices that may be posted, as multiples of the unit cost."""
    competitor_mean: float = 1.6
    """Median of the competitor's markup."""
    competitor_spread: float = 0.2
    """Standard deviation of its logarithm."""
    competitor_memory: float = 0.8
    """Correlation of its logarithm from one day to the next."""
    competitor_states: int = 7
    """Points that it is rounded to."""
    weekday: tuple[float, ...] = (0.9, 0.85, 0.85, 0.9, 1.05, 1.25, 1.2)
    """Traffic multipliers, Monday first, known to the merchant; their mean is 1."""
    prior: MarketPrior = field(default_factory=lambda: LogUniformPrior(share=(0.1, 0.6)))
    """Distribution of sensitivity, utility and traffic, where utility is such that the prior's purchase share is that
    against a competitor at its median."""
    strength: tuple[float, float] = (1.0, 1.0)
    """Mean and standard deviation over products of the log odds that a shopper who leaves the merchant's product buys
    from a competitor at its median."""
    mean_traffic: float = 100.0
    """Scale of the units sold in an observation."""

    noise_size = 2
    observation_size = 6
    prior_size, hidden_size = 5, 4

    def __post_init__(self):
        LogitPricing(self.days, self.markups, False, self.weekday, self.prior, None, self.mean_traffic)  # checks these
        check(self, "competitor_mean", lambda x: number(x, 0), "a finite number > 0")
        check(self, "competitor_spread", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "competitor_memory", lambda x: number(x, -1, 1), "a number in (-1, 1)")
        check(self, "competitor_states", lambda x: whole(x, 2), "a whole number >= 2")
        check(self, "strength", lambda x: numbers(x, 2) and x[1] >= 0, "two finite numbers, the second >= 0")
        for name in ("markups", "weekday"):  # a tuple where a list came in
            check(self, name, numbers, "numbers")

    # -------------------------------------------------------------------------------------------- the protocol
    @property
    def horizon(self) -> int:
        """Selling days in an episode."""
        return self.days

    @property
    def actions(self) -> int:
        """Number of prices."""
        return len(self.markups)

    @cached_property
    def competitor_markups(self) -> tuple[float, ...]:
        """The competitor's markups, evenly spaced in their logarithm, sqrt(states - 1) deviations to either side."""
        reach, last = self.competitor_spread * math.sqrt(self.competitor_states - 1), self.competitor_states - 1
        return tuple(self.competitor_mean * math.exp(reach * (2 * i / last - 1)) for i in range(last + 1))

    @cached_property
    def competitor_moves(self) -> tuple[tuple[float, ...], ...]:
        """Probability of the competitor's next markup (column) after each (row)."""
        return rouwenhorst(self.competitor_states, self.competitor_memory)

    @cached_property
    def competitor_share(self) -> tuple[float, ...]:
        """Long-run share of days at each of the competitor's markups, that of an episode's first day too: binomial."""
        last = self.competitor_states - 1
        return tuple(math.comb(last, i) / 2**last for i in range(last + 1))

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> Duopoly:
        """Products of ``uniforms`` (M, 5): three for the prior's hidden parameters, one for the competitor's utility,
        one for the unit cost."""
        sensitivity, utility, traffic = self.prior.hidden(uniforms[:, :3])
        odds = self.strength[0] + self.strength[1] * torch.special.ndtri(uniforms[:, 3])
        rival = odds + sensitivity * self.competitor_mean
        return Duopoly(task_id, sensitivity, utility + softplus(odds), rival, traffic, self.prior.cost(uniforms[:, 4]))

    def shifted(self) -> CompetitorPricing:
        """The same shop in a market that training never saw."""
        return replace(self, prior=self.prior.shifted())

    def wide(self) -> CompetitorPricing:
        """The same shop under a prior that is about twice as wide in every hidden parameter."""
        return replace(self, prior=self.prior.wide(), strength=(self.strength[0], 2 * self.strength[1]))

    def context(self, tasks: Duopoly) -> Tensor:
        """(M, 1), the unit cost."""
        return tasks.cost[:, None]

    def reset(self, tasks: Duopoly, episodes: int, noise: Tensor) -> DuopolyState:
        """A Monday morning; the competitor's markup is drawn from its long-run distribution."""
        zeros = tasks.cost.new_zeros(len(tasks.cost), episodes)
        share = constant(self.competitor_share, noise).expand(*zeros.shape, -1)
        return DuopolyState(zeros, inverse_transform(share, noise[..., 0]), zeros, zeros)

    def observe(self, tasks: Duopoly, state: DuopolyState) -> Tensor:
        """(M, N, 6): day / days, cost, today's multiplier, yesterday's markup, yesterday's units / mean traffic, the
        competitor's markup today."""
        cost = tasks.cost[:, None].expand_as(state.day)
        rival = constant(self.competitor_markups, state.day)[state.competitor]
        today = self._weekday(state.day)
        columns = (state.day / self.days, cost, today, state.markup, state.sold / self.mean_traffic, rival)
        return torch.stack(columns, -1)

    def step(
        self, tasks: Duopoly, state: DuopolyState, action: Tensor, noise: Tensor
    ) -> tuple[DuopolyState, Tensor, Tensor]:
        """Post the markup of number ``action`` (M, N) for a day; overnight the competitor's moves."""
        markup = constant(self.markups, action, state.day.dtype)[action]
        rival = constant(self.competitor_markups, state.day)[state.competitor]
        mean = tasks.traffic[:, None] * self._weekday(state.day) * share_of(tasks, markup, rival)
        sold = poisson_inverse(noise[..., 0], mean)
        following = constant(self.competitor_moves, noise)[state.competitor]
        after = DuopolyState(state.day + 1, inverse_transform(following, noise[..., 1]), markup, sold)
        return after, tasks.cost[:, None] * (markup - 1) * sold, state.day >= self.days - 1

    def _weekday(self, day: Tensor) -> Tensor:
        return constant(self.weekday, day)[day.long() % len(self.weekday)]

    # ------------------------------------------------------------------------------------- oracle and blind policy
    def daily_profit(self, tasks: Duopoly) -> Tensor:
        """(M, K, A) expected profit of a day of mean traffic, of each price against each of the competitor's."""
        own, rival = constant(self.markups, tasks.cost), constant(self.competitor_markups, tasks.cost)
        m, k = torch.meshgrid(own, rival, indexing="xy")  # (K, A)
        every = lambda x: x.flatten().expand(len(tasks.cost), -1)
        share = share_of(tasks, every(m), every(k)).view(-1, *m.shape)
        return (tasks.traffic * tasks.cost)[:, None, None] * (m - 1) * share

    def oracle_return(self, tasks: Duopoly) -> Tensor:
        """(M,) expected return when the market is known: exact, equation (eq-competitor). What is posted does not
        change what the competitor does, so the best price for each of its markups is best whatever comes."""
        return self._expected(self.daily_profit(tasks).amax(-1))

    def blind_return(self, tasks: Duopoly) -> Tensor:
        """(M,) expected return of the policy that looks at the competitor's markup, never at a sale, and is best on
        average over 4,096 products of the prior."""
        profit = self.daily_profit(tasks)
        choice = blind_prices(self).to(profit.device).expand(len(profit), -1)
        return self._expected(profit.gather(-1, choice[..., None])[..., 0])

    def blind_action(self, observation: Tensor) -> Tensor:
        """(M, N) what the policy behind ``blind_return`` does."""
        points = constant(self.competitor_markups, observation)
        seen = torch.bucketize(observation[..., 5].contiguous(), (points[1:] + points[:-1]) / 2)
        return blind_prices(self).to(observation.device)[seen]

    def _expected(self, profit: Tensor) -> Tensor:
        """(M,) return of an episode from the profit (M, K) of a day of mean traffic at each competitor markup."""
        days = sum(self.weekday[day % len(self.weekday)] for day in range(self.days))
        return days * profit @ constant(self.competitor_share, profit)


@lru_cache(maxsize=32)
def blind_prices(family: CompetitorPricing) -> Tensor:
    """(K,) int64, the price that is best on average over the prior against each of the competitor's."""
    return family.daily_profit(family.prior_sample(4096)).mean(0).argmax(-1)


def share_of(tasks: Duopoly, markup: Tensor, rival: Tensor) -> Tensor:
    """(M, N) probability that a shopper buys from the merchant at ``markup`` next to a competitor at ``rival``."""
    utility = tasks.utility[:, None] - tasks.sensitivity[:, None] * markup
    theirs = tasks.rival[:, None] - tasks.sensitivity[:, None] * rival
    return torch.sigmoid(utility - softplus(theirs))


def rouwenhorst(states: int, correlation: float) -> tuple[tuple[float, ...], ...]:
    """Transition probabilities of Rouwenhorst's chain, which is AR(1) with this correlation on evenly spaced points."""
    stay = (1 + correlation) / 2
    moves = [[stay, 1 - stay], [1 - stay, stay]]
    for size in range(2, states):
        grown = [[0.0] * (size + 1) for _ in range(size + 1)]
        for i in range(size):
            for j in range(size):
                half = moves[i][j] / (2 if i > 0 else 1)  # middle rows are counted twice
                above = moves[i][j] / (2 if i < size - 1 else 1)
                grown[i][j] += stay * half
                grown[i][j + 1] += (1 - stay) * half
                grown[i + 1][j] += (1 - stay) * above
                grown[i + 1][j + 1] += stay * above
        moves = grown
    return tuple(map(tuple, moves))
