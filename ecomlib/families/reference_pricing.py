"""ReferencePricing: the daily price of one product whose shoppers remember what it used to cost (chapter "Dynamic
pricing")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Prior, check, number, numbers, whole
from .constants import constant
from .demand import poisson_inverse
from .pricing import LogitPricing
from .priors import LogUniformPrior, MarketPrior

__all__ = ["ReferenceMarket", "MemoryState", "ReferencePricing"]


class ReferenceMarket(NamedTuple):
    """M products. Every field is (M,); all but ``id`` and ``cost`` are hidden from the merchant."""

    id: Tensor
    sensitivity: Tensor  # a, utility lost per unit of markup
    utility: Tensor  # u, utility of the product at markup 0 and at its reference
    gain: Tensor  # g, utility won per unit of markup below the reference
    loss: Tensor  # l, utility lost per unit of markup above the reference
    traffic: Tensor  # lambda, mean shoppers a day
    cost: Tensor  # c, unit cost, in units of the average unit cost


class MemoryState(NamedTuple):
    """Where N episodes of M products stand. Every field is (M, N)."""

    day: Tensor
    reference: Tensor  # r, the markup that shoppers remember
    markup: Tensor  # yesterday's; 0 on the first day
    sold: Tensor  # units sold yesterday


@dataclass(frozen=True)
class ReferencePricing(Prior):
    """A shopper who remembers markup r and sees m buys with probability sigmoid(u - a m + g (r - m)+ - l (m - r)+);
    overnight the reference becomes rho r + (1 - rho) m. Equations (eq-reference) and (eq-reference-plan) of chapter
    "Dynamic pricing".

    Where gains weigh more than losses (g > l), a high price that builds the reference and a discount that uses it earn
    more than any fixed price. Where losses weigh more, hardly anything is better than a fixed price. The merchant knows
    rho and the first reference, hence the reference of every day: it is a function of posted prices.
    """

    days: int = 14
    """Selling days in an episode."""
    markups: tuple[float, ...] = tuple(round(1.05 + 0.145 * k, 3) for k in range(11))
    """Prices that may be posted, as multiples of the unit cost."""
    memory: float = 0.6
    """rho, the weight of yesterday's reference in today's."""
    first_reference: float = 1.63
    """The reference on the first day of an episode."""
    gain: tuple[float, float] = (0.1, 0.6)
    """Range of g / a, how much a discount counts in comparison with the price itself (uniform)."""
    loss: tuple[float, float] = (0.0, 0.1)
    """Range of l / a (uniform)."""
    weekday: tuple[float, ...] = (0.9, 0.85, 0.85, 0.9, 1.05, 1.25, 1.2)
    """Traffic multipliers, Monday first, known to the merchant; their mean is 1."""
    prior: MarketPrior = field(default_factory=LogUniformPrior)
    """Distribution of sensitivity, utility and traffic."""
    mean_traffic: float = 100.0
    """Scale of the units sold in an observation."""
    resolution: int = 16
    """Intervals between two neighbouring markups into which the planner divides the references. The plan's value is
    exact; how far it is from the best plan's is tested."""

    noise_size = 1
    observation_size = 6
    prior_size, hidden_size = 6, 5

    def __post_init__(self):
        LogitPricing(self.days, self.markups, False, self.weekday, self.prior, None, self.mean_traffic)  # checks these
        for name in ("markups", "weekday"):  # a tuple where a list came in
            check(self, name, numbers, "numbers")
        check(self, "memory", lambda x: number(x) and 0 <= x < 1, "a number in [0, 1)")
        inside = lambda x: number(x) and self.markups[0] <= x <= self.markups[-1]
        check(self, "first_reference", inside, "a number between the smallest and the largest of markups")
        for name in ("gain", "loss"):
            check(self, name, lambda x: numbers(x, 2) and 0 <= x[0] <= x[1], "two numbers with 0 <= low <= high")
        check(self, "resolution", lambda x: whole(x, 1), "a whole number >= 1")

    # -------------------------------------------------------------------------------------------- the protocol
    @property
    def horizon(self) -> int:
        """Selling days in an episode."""
        return self.days

    @property
    def actions(self) -> int:
        """Number of prices."""
        return len(self.markups)

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> ReferenceMarket:
        """Products of ``uniforms`` (M, 6): three for the prior's hidden parameters, gain, loss, and the unit cost."""
        sensitivity, utility, traffic = self.prior.hidden(uniforms[:, :3])
        between = lambda bounds, x: bounds[0] + (bounds[1] - bounds[0]) * x
        gain = sensitivity * between(self.gain, uniforms[:, 3])
        loss = sensitivity * between(self.loss, uniforms[:, 4])
        return ReferenceMarket(task_id, sensitivity, utility, gain, loss, traffic, self.prior.cost(uniforms[:, 5]))

    def shifted(self) -> ReferencePricing:
        """The same shop in a market that training never saw."""
        return replace(self, prior=self.prior.shifted())

    def wide(self) -> ReferencePricing:
        """The same shop under a prior that is about twice as wide in every hidden parameter."""
        wider = lambda low, high: (max(0.0, low - (high - low) / 2), high + (high - low) / 2)
        return replace(self, prior=self.prior.wide(), gain=wider(*self.gain), loss=wider(*self.loss))

    def context(self, tasks: ReferenceMarket) -> Tensor:
        """(M, 1), the unit cost."""
        return tasks.cost[:, None]

    def reset(self, tasks: ReferenceMarket, episodes: int, noise: Tensor) -> MemoryState:
        """A Monday morning, with the same reference for every product; no chance is involved."""
        zeros = tasks.cost.new_zeros(len(tasks.cost), episodes)
        return MemoryState(zeros, zeros + self.first_reference, zeros, zeros)

    def observe(self, tasks: ReferenceMarket, state: MemoryState) -> Tensor:
        """(M, N, 6): day / days, cost, today's multiplier, yesterday's markup, yesterday's units / mean traffic,
        today's reference."""
        cost = tasks.cost[:, None].expand_as(state.day)
        today = self._weekday(state.day)
        columns = (state.day / self.days, cost, today, state.markup, state.sold / self.mean_traffic, state.reference)
        return torch.stack(columns, -1)

    def step(
        self, tasks: ReferenceMarket, state: MemoryState, action: Tensor, noise: Tensor
    ) -> tuple[MemoryState, Tensor, Tensor]:
        """Post the markup of number ``action`` (M, N) for a day; shoppers then remember it."""
        markup = constant(self.markups, action, state.day.dtype)[action]
        chance = remembering(tasks, markup, state.reference)
        sold = poisson_inverse(noise[..., 0], tasks.traffic[:, None] * self._weekday(state.day) * chance)
        after = MemoryState(state.day + 1, self._remembered(state.reference, markup), markup, sold)
        return after, tasks.cost[:, None] * (markup - 1) * sold, state.day >= self.days - 1

    def _remembered(self, reference: Tensor, markup: Tensor) -> Tensor:
        return self.memory * reference + (1 - self.memory) * markup

    def _weekday(self, day: Tensor) -> Tensor:
        return constant(self.weekday, day)[day.long() % len(self.weekday)]

    # ------------------------------------------------------------------------------------- oracle and blind policy
    @property
    def references(self) -> tuple[float, ...]:
        """The planner's references: every markup, and ``resolution - 1`` points between two neighbours."""
        pairs = zip(self.markups, self.markups[1:])
        fine = [low + (high - low) * k / self.resolution for low, high in pairs for k in range(self.resolution)]
        return (*fine, self.markups[-1])

    def daily_profit(self, tasks: ReferenceMarket, reference: Tensor) -> Tensor:
        """(M, R, A) expected profit of a day of mean traffic of each price at each of the references (R,)."""
        own = constant(self.markups, tasks.cost)
        r, m = torch.meshgrid(reference, own, indexing="ij")
        every = lambda x: x.flatten().expand(len(tasks.cost), -1)
        chance = remembering(tasks, every(m), every(r)).view(-1, *m.shape)
        return (tasks.traffic * tasks.cost)[:, None, None] * (m - 1) * chance

    def action_values(self, profit: Tensor) -> Tensor:
        """(days, M, R, A) profit to come of each price at each of ``references``, by backward induction, equation
        (eq-reference-plan), from the ``profit`` of a day (M, R, A). Between references, linear interpolation."""
        points, own = constant(self.references, profit), constant(self.markups, profit)
        following = self._remembered(points[:, None], own)  # (R, A)
        above = torch.bucketize(following, points).clamp(1, len(points) - 1)
        share = (following - points[above - 1]) / (points[above] - points[above - 1])
        value, result = torch.zeros_like(profit[..., 0]), []
        for day in reversed(range(self.days)):
            tomorrow = torch.lerp(value[:, above - 1], value[:, above], share)
            result.append(self.weekday[day % len(self.weekday)] * profit + tomorrow)
            value = result[-1].amax(-1)
        return torch.stack(result[::-1])

    def plan(self, profit: Tensor) -> Tensor:
        """(days, M) int64: the prices that ``action_values`` of a ``profit`` (M, R, A) leads to from the first
        reference. What is sold changes no reference, so the best prices of a known product are a list."""
        values, points = self.action_values(profit), constant(self.references, profit)
        own = constant(self.markups, profit)
        reference, plan = torch.full_like(profit[:, 0, 0], self.first_reference), []
        for day in range(self.days):
            above = torch.bucketize(reference, points).clamp(1, len(points) - 1)
            share = (reference - points[above - 1]) / (points[above] - points[above - 1])
            row = torch.arange(len(profit), device=profit.device)
            plan.append(torch.lerp(values[day, row, above - 1], values[day, row, above], share[:, None]).argmax(-1))
            reference = self._remembered(reference, own[plan[-1]])
        return torch.stack(plan)

    def planned_return(self, tasks: ReferenceMarket, plan: Tensor) -> Tensor:
        """(M,) expected return of the prices ``plan`` (days, M) or (days, 1): exact."""
        own, total = constant(self.markups, tasks.cost), torch.zeros_like(tasks.cost)
        reference = torch.full_like(tasks.cost, self.first_reference)
        for day in range(self.days):
            markup = own[plan[day]].expand_as(reference)
            chance = remembering(tasks, markup[:, None], reference[:, None])[:, 0]
            total = total + self.weekday[day % len(self.weekday)] * (markup - 1) * chance
            reference = self._remembered(reference, markup)
        return tasks.traffic * tasks.cost * total

    def oracle_return(self, tasks: ReferenceMarket) -> Tensor:
        """(M,) expected return of the plan found by ``plan`` when the market is known: exactly what it earns, which is
        at most the best plan's; ``tests/test_pricing_extensions.py`` bounds the difference."""
        points, size = constant(self.references, tasks.cost), 256
        parts = [type(tasks)(*(x[i : i + size] for x in tasks)) for i in range(0, len(tasks.id), size)]
        found = [self.planned_return(part, self.plan(self.daily_profit(part, points))) for part in parts]
        return torch.cat(found)

    def blind_return(self, tasks: ReferenceMarket) -> Tensor:
        """(M,) expected return of the prices that are best on average over 4,096 products of the prior. Since all
        products have the same reference under the same prices, they too follow from one induction, on mean profit."""
        return self.planned_return(tasks, blind_plan(self).to(tasks.cost.device))

    def blind_action(self, observation: Tensor) -> Tensor:
        """(M, N) what the policy behind ``blind_return`` does."""
        day = (observation[..., 0] * self.days).round().long().clamp(max=self.days - 1)
        return blind_plan(self).to(observation.device)[day, 0]


@lru_cache(maxsize=32)
def blind_plan(family: ReferencePricing) -> Tensor:
    """(days, 1) int64, the list of prices behind ``blind_return``."""
    prior = family.prior_sample(4096)
    return family.plan(family.daily_profit(prior, constant(family.references, prior.cost)).mean(0, keepdim=True))


def remembering(tasks: ReferenceMarket, markup: Tensor, reference: Tensor) -> Tensor:
    """(M, N) probability that a shopper who remembers ``reference`` buys at ``markup``, equation (eq-reference)."""
    below = reference - markup
    weight = torch.where(below > 0, tasks.gain[:, None], tasks.loss[:, None])
    return torch.sigmoid(tasks.utility[:, None] - tasks.sensitivity[:, None] * markup + weight * below)
