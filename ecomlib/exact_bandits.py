"""Bernoulli bandits solved exactly: the Bayes-optimal policy by dynamic programming over counts, the finite-horizon
Gittins index, and an upper bound where the dynamic programme is too large. Chapter "Bandits against the optimum".

Counts: after s successes and f failures of an arm its chance has the posterior Beta(a + s, b + f). Arms are
exchangeable before the first pull, so a state is the *multiset* of the (s, f) of the arms that were pulled; with n
pulls at most n arms are ever touched, and 10 pulls of 50 arms have 2,296 states.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .families.bandits import BernoulliBandit
from .families.base import require, whole

Counts = tuple[tuple[int, int], ...]
"""Successes and failures of every arm that was pulled, sorted."""
LARGEST_EXACT = 20
"""Pulls for which the dynamic programme is allowed: its states grow by a factor of nearly two a pull."""
LARGEST_INDEX = 200
"""Pulls for which the index is allowed: its table grows as their cube."""


class BayesOptimal:
    """The best policy of all for a bandit with a known prior, equation (eq-bandit-bellman).

    Solves the Bayes-adaptive problem backwards over the multisets of counts that can be reached: a blink for 10 pulls
    of any number of arms. ``family.pulls`` may be up to 20, or 60 where there are only two arms.
    """

    def __init__(self, family: BernoulliBandit):
        limit = 60 if family.arms <= 2 else LARGEST_EXACT
        require(family.pulls <= limit, "pulls", family.pulls, f"at most {limit} for an exact solution")
        self.family = family
        self.values: dict[Counts, float] = {}
        for pulled in reversed(range(family.pulls)):  # not by recursion: Python's stack is short
            for state in _states(pulled, family.arms):
                self.values[state] = max(self.action_values(state).values())

    @property
    def value(self) -> float:
        """Expected total reward of an episode."""
        return self.values[()]

    def action_values(self, state: Counts) -> dict[tuple[int, int], float]:
        """Expected reward to come of pulling an arm with these counts, and the best ever after, for every arm that
        differs: Q of equation (eq-bandit-bellman). The key (0, 0) is an arm that was not pulled yet."""
        a, b = self.family.prior
        fresh = [(0, 0)] if len(state) < self.family.arms else []
        result = {}
        for s, f in {*state, *fresh}:
            chance = (a + s) / (a + b + s + f)
            others = list(state)
            if (s, f) != (0, 0):
                others.remove((s, f))
            win, lose = (tuple(sorted([*others, new])) for new in ((s + 1, f), (s, f + 1)))
            result[s, f] = chance * (1 + self.values.get(win, 0.0)) + (1 - chance) * self.values.get(lose, 0.0)
        return result

    def best(self, state: Counts, tolerance: float = 1e-9) -> set[tuple[int, int]]:
        """Counts of all arms that are best to pull."""
        values = self.action_values(state)
        return {counts for counts, value in values.items() if value >= max(values.values()) - tolerance}


def _states(pulls: int, arms: int) -> list[Counts]:
    """Every multiset of at most ``arms`` pairs (s, f) != (0, 0) with ``pulls`` pulls in all."""

    def extend(left: int, room: int, largest: tuple[int, int]) -> list[Counts]:
        if left == 0:
            return [()]
        if room == 0:
            return []
        found = []
        for size in range(1, min(left, largest[0]) + 1):
            for s in range(size + 1):
                if (size, s) <= largest:  # each multiset once: pairs in descending order of (pulls, successes)
                    found += [((s, size - s), *rest) for rest in extend(left - size, room - 1, (size, s))]
        return found

    return [tuple(sorted(state)) for state in extend(pulls, arms, (pulls, pulls))]


@lru_cache(maxsize=8)
def bayes_optimal(family: BernoulliBandit) -> BayesOptimal:
    """The same, solved once."""
    if family.arms > family.pulls:  # more arms than pulls are never touched
        return bayes_optimal(BernoulliBandit(family.pulls, family.pulls, family.prior))
    return BayesOptimal(family)


# ------------------------------------------------------------------------------------------------ one arm at a price
class GittinsIndex:
    """The finite-horizon Gittins index of every (successes, failures, pulls left), equation (eq-gittins).

    The index is the price of a pull at which an arm with these counts is just worth playing, if one may stop for good
    at any time. One backward induction, equation (eq-retirement), for all prices of a grid at once; the price at which
    the value of playing crosses zero is interpolated between grid points, which is exact to 1e-4 with 513 of them (the
    tests measure it). About two seconds for 100 pulls.
    """

    def __init__(self, pulls: int, prior: tuple[float, float] = (1.0, 1.0), grid: int = 513):
        require(whole(pulls, 1, LARGEST_INDEX), "pulls", pulls, f"a whole number from 1 to {LARGEST_INDEX}")
        require(whole(grid, 3, 4096), "grid", grid, "a whole number from 3 to 4,096")
        self.pulls, self.prior = pulls, prior
        self.price = np.linspace(0, 1, grid)
        self.table = np.full((pulls + 1, pulls, pulls), np.nan)
        """(pulls left, successes, failures); not a number where there would be more pulls than ``pulls``."""
        stopping = np.zeros((pulls + 1, pulls + 1, grid))  # value of the option to play, none left
        for left in range(1, pulls + 1):
            size = pulls - left + 1  # successes and failures 0..pulls - left
            s, f = np.ogrid[:size, :size]
            chance = ((prior[0] + s) / (sum(prior) + s + f))[..., None]
            win, lose = stopping[1 : size + 1, :size], stopping[:size, 1 : size + 1]
            playing = chance - self.price + chance * win + (1 - chance) * lose
            self.table[left, :size, :size] = np.where(s + f < size, _crossing(self.price, playing), np.nan)
            stopping = playing.clip(min=0)


def _crossing(price: NDArray, playing: NDArray) -> NDArray:
    """Where ``playing`` (..., grid), which falls with the price, is 0."""
    after = (playing > 0).sum(-1).clip(1, len(price) - 1)[..., None]
    high, low = (np.take_along_axis(playing, index, -1)[..., 0] for index in (after - 1, after))
    return price[after[..., 0] - 1] + high / (high - low) * price[1]


@lru_cache(maxsize=8)
def gittins_index(pulls: int, prior: tuple[float, float] = (1.0, 1.0)) -> GittinsIndex:
    """The same, computed once."""
    return GittinsIndex(pulls, prior)


# ------------------------------------------------------------------------------------------------ an upper bound
def relaxation_bound(family: BernoulliBandit, iterations: int = 400) -> tuple[float, NDArray[np.float64]]:
    """What no policy can exceed on average, equation (eq-bandit-relaxation), and the prices (pulls,) that show it.

    One pull at a time is relaxed to one pull on average: every arm may be pulled at every visitor, at that visitor's
    price. Every list of prices gives a bound; ``iterations`` subgradient steps look for a low one. Also no policy earns
    more than the oracle, which is the lower bound of the two where arms are few and pulls many.
    """
    require(whole(iterations, 1), "iterations", iterations, "a whole number >= 1")
    price, squares, best = np.full(family.pulls, family.prior_mean), 1e-3, (np.inf, np.zeros(0))
    for _ in range(iterations):
        value, pulled = arm_at_prices(price, family.prior)
        if price.sum() + family.arms * value < best[0]:
            best = price.sum() + family.arms * value, price
        slope = 1 - family.arms * pulled
        squares = squares + slope**2
        price = price - 0.15 * slope / np.sqrt(squares)
    return float(best[0]), best[1]


def arm_at_prices(price: NDArray[np.float64], prior: tuple[float, float]) -> tuple[float, NDArray[np.float64]]:
    """Largest expected reward less price of one arm that may be pulled or left alone at every visitor, and how often it
    is then pulled at each (pulls,)."""
    pulls = len(price)
    s, f = np.ogrid[:pulls, :pulls]
    chance = (prior[0] + s) / (sum(prior) + s + f)
    value, play = np.zeros((pulls + 1, pulls + 1)), []
    for now in reversed(range(pulls)):
        p = chance[: now + 1, : now + 1]
        pull = p - price[now] + p * value[1 : now + 2, : now + 1] + (1 - p) * value[: now + 1, 1 : now + 2]
        leave = value[: now + 1, : now + 1]
        play.append(pull > leave)
        value = np.maximum(pull, leave)
    reached, pulled = np.ones((1, 1)), []
    for p_size, playing in enumerate(reversed(play), start=1):
        p, now = chance[:p_size, :p_size], reached * playing
        pulled.append(now.sum())
        reached = np.pad(reached - now, (0, 1))
        reached[1:, :-1] += now * p
        reached[:-1, 1:] += now * (1 - p)
    return float(value[0, 0]), np.array(pulled)


# ------------------------------------------------------------------------------------------------ what was played
def histories(family: BernoulliBandit, action: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
    """Successes and failures (T, M, N, arms) before every pull of ``action``, ``reward`` (T, M, N)."""
    pulled = torch.nn.functional.one_hot(action, family.arms).to(reward.dtype)
    before = lambda x: x.cumsum(0) - x
    return before(pulled * reward[..., None]), before(pulled * (1 - reward[..., None]))


def posterior_reward(family: BernoulliBandit, action: Tensor, reward: Tensor) -> Tensor:
    """(T, M, N) mean of each reward given everything before it: the posterior mean of the arm that was pulled.

    In place of the rewards it leaves the mean over the prior as it is and takes out the luck of the pulls and most of
    that of the chances. For tasks from the family's own prior only.
    """
    success, failure = (x.gather(-1, action[..., None])[..., 0] for x in histories(family, action, reward))
    a, b = family.prior
    return (a + success) / (a + b + success + failure)


def optimality_gaps(family: BernoulliBandit, action: Tensor, reward: Tensor) -> Tensor:
    """(T, M, N) what each pull gave away, max Q - Q(pulled), in the optimum's own action values.

    Its mean over tasks, summed over an episode, is the optimum's value less the policy's, equation (eq-bandit-gap),
    and nothing in it is luck: a policy that always pulls a best arm has gap 0 in every episode.
    """
    success, failure = histories(family, action, reward)
    optimum, base = bayes_optimal(family), family.pulls + 1
    code = (success * base + failure).long().flatten(0, -2)
    chosen = code.gather(-1, action.flatten()[:, None])
    touched = code.sort(-1, descending=True).values[:, : family.pulls]
    rows, place = torch.unique(torch.cat((touched, chosen), -1), dim=0, return_inverse=True)
    gaps = []
    for *codes, pulled in rows.tolist():
        values = optimum.action_values(tuple(sorted(divmod(code, base) for code in codes if code)))
        gaps.append(max(values.values()) - values[divmod(pulled, base)])
    return torch.tensor(gaps, dtype=reward.dtype)[place].view_as(reward)
