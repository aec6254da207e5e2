"""LogitPricing: the daily price of one product whose shoppers' price sensitivity is hidden (chapter "Dynamic
pricing")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from scipy.special import wrightomega
from torch import Tensor

from . import shelf
from .base import Prior, check, number, numbers, take, whole
from .constants import constant
from .demand import poisson_inverse
from .priors import GaussianPrior, LogUniformPrior, MarketPrior

__all__ = ["GaussianPrior", "LimitedState", "LogUniformPrior", "LogitPricing", "Market", "Seen", "ShelfState"]


class Market(NamedTuple):
    """M products. Every field is (M,); all but ``id`` and ``cost`` are hidden from the merchant."""

    id: Tensor
    sensitivity: Tensor  # a, utility lost per unit of markup
    utility: Tensor  # u, utility of the product at markup 0
    traffic: Tensor  # lambda, mean shoppers a day
    cost: Tensor  # c, unit cost, in units of the average unit cost


class ShelfState(NamedTuple):
    """Where N episodes of M products stand. Every field is (M, N)."""

    day: Tensor
    markup: Tensor  # yesterday's; 0 on the first day
    sold: Tensor  # units sold yesterday
    stock: Tensor  # units left; infinite without a stock limit


class LimitedState(NamedTuple):
    """The same where changes of the price are limited. Every field is (M, N)."""

    day: Tensor
    markup: Tensor
    sold: Tensor
    stock: Tensor
    changes: Tensor  # changes of the price that are left this week


class Seen(NamedTuple):
    """An observation, decoded, but for the changes that are left. Every field is (M, N)."""

    day: Tensor
    cost: Tensor
    weekday: Tensor  # today's traffic multiplier
    markup: Tensor
    sold: Tensor
    stock: Tensor


@dataclass(frozen=True)
class LogitPricing(Prior):
    """A shopper who sees markup m buys with probability sigmoid(u - a m); shoppers a day are Poisson(lambda w_weekday).

    The merchant posts one markup a day, sees the units sold and earns (price - cost) for each. Equations (eq-purchase),
    (eq-demand) and (eq-lambert) of chapter "Dynamic pricing". With a ``stock`` limit, sales are cut at what is left and
    unsold units keep their cost as value, so the reward of a sale stays price - cost.
    """

    days: int = 14
    """Selling days in an episode."""
    markups: tuple[float, ...] = tuple(round(1.05 + 0.145 * k, 3) for k in range(11))
    """Prices that may be posted, as multiples of the unit cost."""
    continuous: bool = False
    """If true, an action is any markup between the smallest and the largest of ``markups`` (others are clipped)."""
    weekday: tuple[float, ...] = (0.9, 0.85, 0.85, 0.9, 1.05, 1.25, 1.2)
    """Traffic multipliers, Monday first, known to the merchant; their mean is 1. Every episode starts on a Monday."""
    prior: MarketPrior = field(default_factory=LogUniformPrior)
    """Distribution of the hidden parameters."""
    stock: int | None = None
    """Units on the shelf at the start of an episode; None for no limit."""
    mean_traffic: float = 100.0
    """Scale of the units sold in an observation."""
    changes_per_week: int | None = None
    """Changes of the price in a week, None for no limit; a further one is not carried out. An episode's first price is
    no change."""

    def __post_init__(self):
        increasing = lambda x: len(x) >= 2 and x[0] > 0 and all(low < high for low, high in zip(x, x[1:]))
        mean_one = lambda x: min(x) > 0 and abs(sum(x) / len(x) - 1) < 1e-9
        methods = ("hidden", "cost", "shifted")
        is_prior = lambda x: not isinstance(x, type) and all(hasattr(x, name) for name in methods)
        check(self, "days", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "markups", lambda x: numbers(x) and increasing(x), "at least 2 positive, increasing numbers")
        check(self, "continuous", lambda x: isinstance(x, bool), "True or False")
        check(self, "weekday", lambda x: numbers(x) and mean_one(x), "positive multipliers with mean 1")
        check(self, "prior", is_prior, "a prior, such as LogUniformPrior()")
        check(self, "stock", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")
        check(self, "stock", lambda x: not (x and self.continuous), "None, or a price grid (continuous=False)")
        check(self, "mean_traffic", lambda x: number(x, 0), "a finite number > 0")
        check(self, "changes_per_week", lambda x: x is None or whole(x, 0), "None or a whole number >= 0")
        unlimited = self.changes_per_week is None
        check(self, "stock", lambda x: x is None or unlimited, "None with a limit on changes of the price")
        if not unlimited:
            object.__setattr__(self, "observation_size", len(Seen._fields) + 1)

    # -------------------------------------------------------------------------------------------- the protocol
    noise_size = 1
    observation_size = len(Seen._fields)  # one more with a limit on changes of the price
    prior_size, hidden_size = 4, 3

    @property
    def horizon(self) -> int:
        """Selling days in an episode."""
        return self.days

    @property
    def actions(self) -> int:
        """Number of prices; 0 if continuous."""
        return 0 if self.continuous else len(self.markups)

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> Market:
        """Products of ``uniforms`` (M, 4): three for the prior's hidden parameters, one for the unit cost."""
        return Market(task_id, *self.prior.hidden(uniforms[:, :3]), self.prior.cost(uniforms[:, 3]))

    def shifted(self) -> LogitPricing:
        """The same shelf in a market that training never saw."""
        return replace(self, prior=self.prior.shifted())

    def wide(self) -> LogitPricing:
        """The same shelf under a prior that is about twice as wide in every hidden parameter."""
        return replace(self, prior=self.prior.wide())

    def context(self, tasks: Market) -> Tensor:
        """(M, 1), the unit cost."""
        return tasks.cost[:, None]

    def reset(self, tasks: Market, episodes: int, noise: Tensor) -> ShelfState | LimitedState:
        """A full shelf on a Monday morning; no chance is involved."""
        zeros = tasks.cost.new_zeros(len(tasks.cost), episodes)
        state = ShelfState(zeros, zeros, zeros, zeros + (float("inf") if self.stock is None else self.stock))
        return state if self.changes_per_week is None else LimitedState(*state, zeros + self.changes_per_week)

    def observe(self, tasks: Market, state: ShelfState | LimitedState) -> Tensor:
        """(M, N, 6): day / days, cost, today's multiplier, yesterday's markup, yesterday's units / mean traffic,
        stock left; with a limit on changes of the price (M, N, 7): changes left / their number."""
        stock = torch.ones_like(state.day) if self.stock is None else state.stock / self.stock
        cost = tasks.cost[:, None].expand_as(state.day)
        columns = (
            state.day / self.days,
            cost,
            self._weekday(state.day),
            state.markup,
            state.sold / self.mean_traffic,
            stock,
        )
        if self.changes_per_week is not None:
            columns += (state.changes / max(1, self.changes_per_week),)
        return torch.stack(columns, -1)

    def seen(self, observation: Tensor) -> Seen:
        """The same observation in days and units: the inverse of the scaling in ``observe``."""
        day, cost, weekday, markup, sold, stock = observation[..., : len(Seen._fields)].unbind(-1)
        units = torch.ones_like(stock) if self.stock is None else (stock * self.stock).round()
        return Seen((day * self.days).round(), cost, weekday, markup, (sold * self.mean_traffic).round(), units)

    def step(
        self, tasks: Market, state: ShelfState | LimitedState, action: Tensor, noise: Tensor
    ) -> tuple[ShelfState | LimitedState, Tensor, Tensor]:
        """Post a markup for a day. ``action`` (M, N) is an index into ``markups``, or a markup if ``continuous``."""
        markup = self.markup(action)
        if self.changes_per_week is not None:
            markup, changes = self._limited(state, markup)
        mean = tasks.traffic[:, None] * self._weekday(state.day) * purchase_probability(tasks, markup)
        sold = torch.minimum(poisson_inverse(noise[..., 0], mean), state.stock)
        after = ShelfState(state.day + 1, markup, sold, state.stock - sold)
        if self.changes_per_week is not None:
            after = LimitedState(*after, changes)
        return after, tasks.cost[:, None] * (markup - 1) * sold, state.day >= self.days - 1

    def _limited(self, state: LimitedState, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The markup that is posted where ``wanted`` is asked for, and the changes that are left tomorrow morning."""
        change = (state.day > 0) & (wanted != state.markup)
        allowed = change & (state.changes > 0)
        changes = state.changes - allowed.to(wanted.dtype)
        monday = (state.day + 1) % len(self.weekday) == 0
        return (
            torch.where(change & ~allowed, state.markup, wanted),
            torch.where(monday, self.changes_per_week, changes),
        )

    def mean_reward(self, tasks: Market, action: Tensor) -> Tensor:
        """Expected profit of ``action`` (..., days, M, N), given that it was chosen, in the same shape.

        Replacing each reward of a trial by this number leaves every expectation as it is and takes out the shoppers'
        luck, so scores need fewer simulated days. Without a stock limit only: with one, profit depends on what is left.
        """
        if self.stock is not None:
            raise ValueError(f"stock = {self.stock}: mean_reward needs a family without a stock limit (stock=None)")
        markup = self.markup(action)
        if self.changes_per_week is not None:
            markup = self._carried_out(markup)
        chance = purchase_probability(tasks, markup)
        weekday = self._weekday(torch.arange(self.days, device=action.device, dtype=chance.dtype))[:, None, None]
        return (tasks.traffic * tasks.cost)[:, None] * weekday * (markup - 1) * chance

    def _carried_out(self, wanted: Tensor) -> Tensor:
        """The markups (..., days, M, N) that are posted where ``wanted`` are asked for."""
        zeros, posted = torch.zeros_like(wanted.select(-3, 0)), []
        markup, changes = zeros, zeros + self.changes_per_week
        for day in range(self.days):
            state = LimitedState(zeros + day, markup, zeros, zeros, changes)
            markup, changes = self._limited(state, wanted.select(-3, day))
            posted.append(markup)
        return torch.stack(posted, -3)

    def posted(self, observation: Tensor) -> Tensor:
        """(M, N) int64, the number of yesterday's markup, which a limit on changes may have kept from being the one
        asked for."""
        grid = constant(self.markups, observation)
        return torch.bucketize(self.seen(observation).markup.contiguous(), (grid[1:] + grid[:-1]) / 2)

    def markup(self, action: Tensor) -> Tensor:
        """The markup that an action posts, same shape."""
        if self.continuous:
            return action.clamp(self.markups[0], self.markups[-1])
        return constant(self.markups, action, torch.get_default_dtype())[action]

    def _weekday(self, day: Tensor) -> Tensor:
        return constant(self.weekday, day)[day.long() % len(self.weekday)]

    # ------------------------------------------------------------------------------------- oracle and blind policy
    def oracle_markup(self, tasks: Market) -> Tensor:
        """(M,) profit-maximising markup over all positive numbers, 1 + (1 + W(exp(u - a - 1))) / a, equation
        (eq-lambert)."""
        exponent = (tasks.utility - tasks.sensitivity - 1).cpu().numpy()
        return 1 + (1 + torch.as_tensor(wrightomega(exponent)).to(tasks.cost)) / tasks.sensitivity

    def oracle_return(self, tasks: Market) -> Tensor:
        """(M,) expected return when the market is known: exact, over the prices that this family may post.

        Without a stock limit the best price is the same every day, so that a limit on changes costs nothing.
        """
        if self.continuous:
            best = self.oracle_markup(tasks).clamp(self.markups[0], self.markups[-1])
            return self._unlimited_return(tasks, best)
        return self._in_chunks(tasks, lambda part: self.action_values(part)[:, 0, -1].amax(-1))

    def blind_return(self, tasks: Market) -> Tensor:
        """(M,) expected return of the policy that maximises the prior's mean return without learning from sales.

        Without a stock limit this is one fixed markup, found by search over the price grid (1,000 markups if
        continuous) and 4,096 quasi-random products. With a stock limit it is the best table (day, units left) ->
        price for 256 quasi-random products, up to a local optimum (``families.shelf.best_table``). Such a table may
        use what is left, as physical state, so it adapts a little without meaning to. The search takes seconds for 60
        units and about a minute for 200; its result is kept while Python runs.
        """
        policy = blind_policy(self)
        if self.continuous:
            return self._unlimited_return(tasks, policy.to(tasks.cost).expand_as(tasks.cost))
        policy = policy.to(tasks.cost.device)
        return self._in_chunks(tasks, lambda part: self.action_values(part, policy)[:, 0, -1, policy[0, -1]])

    def blind_action(self, observation: Tensor) -> Tensor:
        """(M, N) what the policy behind ``blind_return`` does."""
        policy = blind_policy(self).to(observation.device)
        if self.continuous:
            return policy.to(observation).expand(observation.shape[:2])
        seen = self.seen(observation)
        level = torch.zeros_like(seen.day) if self.stock is None else seen.stock
        return policy[seen.day.long().clamp(max=self.days - 1), level.long()]

    def _in_chunks(self, tasks: Market, function: Callable[[Market], Tensor]) -> Tensor:
        """``function`` of a few tasks at a time: a day of the recursion holds stock^2 numbers for each."""
        size = max(1, 20_000_000 // ((self.stock or 0) + 1) ** 2)
        parts = [function(take(tasks, slice(i, i + size))) for i in range(0, len(tasks.id), size)]
        return torch.cat(parts)

    def _unlimited_return(self, tasks: Market, markup: Tensor) -> Tensor:
        multipliers = sum(self.weekday[day % len(self.weekday)] for day in range(self.days))
        return (
            multipliers * tasks.traffic * tasks.cost * (markup - 1) * purchase_probability(tasks, markup[:, None])[:, 0]
        )

    def action_values(self, tasks: Market, policy: Tensor | None = None) -> Tensor:
        """(M, days, levels, actions) expected profit to come of each price on each day, by backward dynamic
        programming.

        ``levels`` is units left 0..stock, or 1 without a limit. Afterwards the best prices follow, or those of
        ``policy`` (days, levels) int64 if given (``families.shelf``).
        """
        return shelf.action_values(*self._shelf(tasks), policy)

    def _shelf(self, tasks: Market) -> tuple[Tensor, Tensor, int]:
        """Demand rates (T, M, A), margins (M, A) and number of levels, as ``families.shelf`` takes them."""
        if self.continuous:
            raise ValueError("action_values needs the price grid: build the family with continuous=False")
        markup = constant(self.markups, tasks.cost)
        share = purchase_probability(tasks, markup.expand(len(tasks.cost), -1))
        weekday = self._weekday(torch.arange(self.days, device=tasks.cost.device, dtype=tasks.cost.dtype))
        rate = weekday[:, None, None] * tasks.traffic[:, None] * share
        return rate, tasks.cost[:, None] * (markup - 1), 1 if self.stock is None else self.stock + 1


@lru_cache(maxsize=32)
def blind_policy(family: LogitPricing) -> Tensor:
    """The non-adaptive policy behind ``blind_return``: actions (days, levels), or one markup (a scalar) if
    continuous."""
    prior = family.prior_sample(4096 if family.stock is None else 256)
    if family.continuous:
        grid = torch.linspace(family.markups[0], family.markups[-1], 1000, dtype=prior.cost.dtype)
        profit = prior.traffic[:, None] * (grid - 1) * purchase_probability(prior, grid.expand(len(prior.cost), -1))
        return grid[profit.mean(0).argmax()]
    return shelf.best_table(*family._shelf(prior))


def purchase_probability(tasks: Market, markup: Tensor) -> Tensor:
    """(M, ...) probability that a shopper buys at ``markup`` (M, ...), equation (eq-purchase)."""
    return torch.sigmoid(tasks.utility[:, None] - tasks.sensitivity[:, None] * markup)


def elasticity(tasks: Market, markup: Tensor) -> Tensor:
    """(M, ...) own-price elasticity of demand at ``markup`` (M, ...): -a m (1 - sigmoid(u - a m)), equation
    (eq-elasticity)."""
    return -tasks.sensitivity[:, None] * markup * (1 - purchase_probability(tasks, markup))
