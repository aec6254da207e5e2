"""MNLPricing: the daily prices of a few products that shoppers choose among (chapter "Dynamic pricing")."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Prior, check, number, numbers, whole
from .constants import constant
from .demand import poisson_inverse
from .pricing import LogitPricing, Market
from .priors import LogUniformPrior, MarketPrior

__all__ = ["Category", "CategoryState", "MNLPricing", "choice_probability"]


class Category(NamedTuple):
    """M categories of n products. All but ``id`` and ``cost`` are hidden from the merchant."""

    id: Tensor  # (M,)
    sensitivity: Tensor  # (M,), a, utility lost per unit of margin
    surplus: Tensor  # (M, n), v_j, utility of product j at its unit cost
    traffic: Tensor  # (M,), lambda, mean shoppers a day
    cost: Tensor  # (M,), average unit cost of the category: the unit of its margins


class CategoryState(NamedTuple):
    """Where N episodes of M categories stand."""

    day: Tensor  # (M, N)
    margin: Tensor  # (M, N, n), yesterday's
    sold: Tensor  # (M, N, n), units sold yesterday


@dataclass(frozen=True)
class MNLPricing(Prior):
    """A shopper who sees n products at margins x_1, ..., x_n buys product j with probability proportional to
    exp(v_j - a x_j), and nothing in proportion to 1; shoppers a day are Poisson(lambda w_weekday).

    A *margin* is price less the product's own unit cost, in units of the category's average unit cost. Equations
    (eq-mnl) and (eq-common-margin) of chapter "Dynamic pricing". At the optimum all products have the same margin, and
    under a common margin a category sells as many units as one product of ``LogitPricing`` at the same prior draw. So
    an action is the number of a common margin: that loses nothing but the grid, and a learner explores one number
    instead of n. With ``continuous`` an action is n logarithms of margins, and that they should be equal is left to be
    discovered.
    """

    days: int = 14
    """Selling days in an episode."""
    products: int = 3
    """Products of a category."""
    margins: tuple[float, ...] = tuple(round(0.05 + 0.145 * k, 3) for k in range(11))
    """Common margins that may be posted, in units of the category's average unit cost."""
    continuous: bool = False
    """If true, an action is the logarithms of n margins, clipped to those of the smallest and largest ``margins``."""
    weekday: tuple[float, ...] = (0.9, 0.85, 0.85, 0.9, 1.05, 1.25, 1.2)
    """Traffic multipliers, Monday first, known to the merchant; their mean is 1."""
    prior: MarketPrior = field(default_factory=LogUniformPrior)
    """Distribution of sensitivity, of the category's share and of its traffic."""
    spread: float = 1.0
    """Standard deviation of the products' log popularities."""
    mean_traffic: float = 100.0
    """Scale of the units sold in an observation."""

    noise_size = property(lambda self: self.products)
    """Uniforms of a step: one for each product's demand."""

    def __post_init__(self):
        check(self, "products", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "continuous", lambda x: isinstance(x, bool), "True or False")
        increasing = lambda x: len(x) >= 2 and x[0] > 0 and all(low < high for low, high in zip(x, x[1:]))
        check(self, "margins", lambda x: numbers(x) and increasing(x), "at least 2 positive, increasing numbers")
        check(self, "spread", lambda x: number(x) and x >= 0, "a finite number >= 0")
        self.one_product()  # checks the other fields
        check(self, "weekday", numbers, "numbers")  # a tuple where a list came in

    def one_product(self) -> LogitPricing:
        """The family of one product that sells, at markup 1 + x, what a category sells at common margin x."""
        markups = tuple(1 + x for x in self.margins)
        return LogitPricing(self.days, markups, self.continuous, self.weekday, self.prior, None, self.mean_traffic)

    # -------------------------------------------------------------------------------------------- the protocol
    @property
    def horizon(self) -> int:
        """Selling days in an episode."""
        return self.days

    @property
    def actions(self) -> int:
        """Number of common margins; 0 if continuous."""
        return 0 if self.continuous else len(self.margins)

    @property
    def action_size(self) -> int:
        """Real numbers of a continuous action."""
        return self.products

    @property
    def observation_size(self) -> int:
        """Length of an observation, 3 + 2 n."""
        return 3 + 2 * self.products

    @property
    def hidden_size(self) -> int:
        """Uniforms of the hidden parameters: sensitivity, share, traffic and n popularities."""
        return 3 + self.products

    @property
    def prior_size(self) -> int:
        """And one for the unit cost."""
        return self.hidden_size + 1

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> Category:
        """Categories of ``uniforms`` (M, 4 + n). The prior's purchase share is that of all products together, and its
        elasticity the category's at a common margin."""
        sensitivity, utility, traffic = self.prior.hidden(uniforms[:, :3])
        popularity = torch.log_softmax(self.spread * torch.special.ndtri(uniforms[:, 3:-1]), -1)
        surplus = (utility - sensitivity)[:, None] + popularity
        return Category(task_id, sensitivity, surplus, traffic, self.prior.cost(uniforms[:, -1]))

    def shifted(self) -> MNLPricing:
        """The same shop in a market that training never saw."""
        return replace(self, prior=self.prior.shifted())

    def wide(self) -> MNLPricing:
        """The same shop under a prior that is about twice as wide in every hidden parameter."""
        return replace(self, prior=self.prior.wide(), spread=2 * self.spread)

    def context(self, tasks: Category) -> Tensor:
        """(M, 1), the average unit cost."""
        return tasks.cost[:, None]

    def reset(self, tasks: Category, episodes: int, noise: Tensor) -> CategoryState:
        """A Monday morning; no chance is involved."""
        zeros = tasks.cost.new_zeros(len(tasks.cost), episodes)
        each = zeros[..., None].expand(-1, -1, self.products)
        return CategoryState(zeros, each, each)

    def observe(self, tasks: Category, state: CategoryState) -> Tensor:
        """(M, N, 3 + 2 n): day / days, cost, today's multiplier, yesterday's n margins and n units / mean traffic."""
        cost = tasks.cost[:, None].expand_as(state.day)
        seen = torch.stack((state.day / self.days, cost, self._weekday(state.day)), -1)
        return torch.cat((seen, state.margin, state.sold / self.mean_traffic), -1)

    def step(
        self, tasks: Category, state: CategoryState, action: Tensor, noise: Tensor
    ) -> tuple[CategoryState, Tensor, Tensor]:
        """Post margins for a day. ``action`` is a number (M, N), or n logarithms (M, N, n) if ``continuous``.

        Shoppers who choose by (eq-mnl) are Poisson for each product, and independent (thinning).
        """
        margin = self.margin(action)
        shoppers = tasks.traffic[:, None] * self._weekday(state.day)
        sold = poisson_inverse(noise, shoppers[..., None] * choice_probability(tasks, margin))
        reward = tasks.cost[:, None] * (margin * sold).sum(-1)
        return CategoryState(state.day + 1, margin, sold), reward, state.day >= self.days - 1

    def margin(self, action: Tensor) -> Tensor:
        """(M, N, n) margins that an action posts."""
        if self.continuous:
            return action.clamp(math.log(self.margins[0]), math.log(self.margins[-1])).exp()
        common = constant(self.margins, action, torch.get_default_dtype())[action]
        return common[..., None].expand(*common.shape, self.products)

    def _weekday(self, day: Tensor) -> Tensor:
        return constant(self.weekday, day)[day.long() % len(self.weekday)]

    # ------------------------------------------------------------------------------------- oracle and blind policy
    def mean_profit(self, tasks: Category, margin: Tensor) -> Tensor:
        """(M, N) expected profit of a day of mean traffic at margins (M, N, n)."""
        return (tasks.traffic * tasks.cost)[:, None] * (margin * choice_probability(tasks, margin)).sum(-1)

    def as_one(self, tasks: Category) -> Market:
        """The single products that sell what these categories sell at a common margin."""
        utility = tasks.surplus.logsumexp(-1) + tasks.sensitivity
        return Market(tasks.id, tasks.sensitivity, utility, tasks.traffic, tasks.cost)

    def oracle_margin(self, tasks: Category) -> Tensor:
        """(M,) the common margin that is best among all vectors of margins, (1 + W(sum_j exp(v_j - 1))) / a, equation
        (eq-common-margin)."""
        return self.one_product().oracle_markup(self.as_one(tasks)) - 1

    def oracle_return(self, tasks: Category) -> Tensor:
        """(M,) expected return when the market is known: exact. The best vector of margins has equal entries; clipped
        to the range of ``margins`` it still has, since profit falls on both sides of the best common margin."""
        return self.one_product().oracle_return(self.as_one(tasks))

    def blind_return(self, tasks: Category) -> Tensor:
        """(M,) expected return of the common margin that is best on average over the prior, found by search
        (``LogitPricing.blind_return``). Products are exchangeable in the prior, so that none deserves a margin of its
        own; ``tests/test_pricing_extensions.py`` tries vectors."""
        return self.one_product().blind_return(self.as_one(tasks))

    def blind_action(self, observation: Tensor) -> Tensor:
        """(M, N) or, if continuous, (M, N, n): what the policy behind ``blind_return`` does."""
        action = self.one_product().blind_action(observation[..., :6])
        return (action - 1).log()[..., None].expand(*action.shape, self.products) if self.continuous else action


def choice_probability(tasks: Category, margin: Tensor) -> Tensor:
    """(M, N, n) probability that a shopper buys each product at margins (M, N, n), equation (eq-mnl)."""
    utility = tasks.surplus[:, None] - tasks.sensitivity[:, None, None] * margin
    nothing = torch.zeros_like(utility[..., :1])
    return torch.softmax(torch.cat((utility, nothing), -1), -1)[..., :-1]
