"""What a practitioner would use for a Bernoulli bandit, from a coin to the optimum (chapter "Bandits against the
optimum").

All keep the same memory, successes and failures of every arm, and pull the arm of the highest index; they differ in the
index. Ties are broken at random: by the arms' numbers they would favour the first arms.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from scipy.special import betaincinv, logit, ndtr
from torch import Tensor

from ..exact_bandits import LARGEST_EXACT, Counts, bayes_optimal, gittins_index
from ..families.bandits import BernoulliBandit
from ..families.base import check, number, require, whole
from ..rollout import Agent
from .bayes import Random

__all__ = [
    "BanditGreedy",
    "BanditThompson",
    "GittinsBandit",
    "IndexAgent",
    "OptimalBandit",
    "Random",
    "UCB1",
    "agents",
]


class IndexAgent:
    """Counts of every arm, and a pull of the arm of the highest ``index``. Counts carry over to the next episode of a
    trial of ``episodes``."""

    def __init__(self, family: BernoulliBandit, episodes: int = 1):
        require(whole(episodes, 1), "episodes", episodes, "a whole number >= 1")
        self.family, self.noise_size, self.pulls = family, 2 * family.arms, episodes * family.pulls

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No arm was pulled."""
        self.success = torch.zeros(tasks, episodes, self.family.arms, device=context.device)
        self.failure, self.pulled = torch.zeros_like(self.success), 0

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The arms (M, N) of the highest index; of several that tie, any."""
        if self.pulled >= self.pulls:
            raise ValueError(
                f"pull {self.pulled + 1} of a trial of {self.pulls}: give the agent the trial's `episodes`"
            )
        luck, ties = noise.chunk(2, -1)
        index = self.index(luck)
        best = index >= index.amax(-1, keepdim=True) - 1e-6
        return torch.where(best, ties, -1.0).argmax(-1)

    def index(self, luck: Tensor) -> Tensor:
        """(M, N, arms); ``luck`` are as many uniforms."""
        raise NotImplementedError

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Count it."""
        self.success = self.success.scatter_add(-1, action[..., None], reward[..., None])
        self.failure = self.failure.scatter_add(-1, action[..., None], 1 - reward[..., None])
        self.pulled += 1

    def end_episode(self) -> None:
        """Nothing to do."""

    @property
    def mean(self) -> Tensor:
        """(M, N, arms) posterior mean of every arm's chance, equation (eq-beta-mean)."""
        a, b = self.family.prior
        return (a + self.success) / (a + b + self.success + self.failure)


class BanditGreedy(IndexAgent):
    """The highest posterior mean, or with probability ``epsilon`` any arm."""

    def __init__(self, family: BernoulliBandit, epsilon: float = 0.0, episodes: int = 1):
        super().__init__(family, episodes)
        self.epsilon = epsilon
        check(self, "epsilon", lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")

    def index(self, luck: Tensor) -> Tensor:
        """The posterior mean, or 0 of all arms alike."""
        return torch.where(luck[..., :1] < self.epsilon, 0.0, self.mean)


class BanditThompson(IndexAgent):
    """A chance drawn from each arm's posterior (Thompson 1933). ``optimistic``: never below the posterior mean, so that
    doubt only ever speaks for an arm (May et al. 2012)."""

    def __init__(self, family: BernoulliBandit, optimistic: bool = False, episodes: int = 1):
        super().__init__(family, episodes)
        require(self.pulls <= 200, "pulls", self.pulls, "at most 200 for the table of posterior quantiles")
        self.optimistic = optimistic
        check(self, "optimistic", lambda x: isinstance(x, bool), "True or False")

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No arm was pulled."""
        super().begin(context, tasks, episodes)
        self.table = posterior_quantiles(self.pulls, self.family.prior).to(self.success)

    def index(self, luck: Tensor) -> Tensor:
        """Posterior quantiles of uniforms, interpolated in ``posterior_quantiles``."""
        place = ((torch.special.ndtri(luck) + SPAN) / (2 * SPAN)).clamp(0, 1) * (POINTS - 1)
        low = place.long().clamp(max=POINTS - 2)
        row = self.success.long() * self.table.shape[1] + self.failure.long()
        flat = self.table.view(-1)
        below, above = flat[row * POINTS + low], flat[row * POINTS + low + 1]
        draw = torch.sigmoid(below + (place - low) * (above - below))
        return torch.maximum(draw, self.mean) if self.optimistic else draw


SPAN, POINTS = 5.0, 81
"""A draw beyond this many standard deviations, one in two million, is taken to be there; points of the table."""


@lru_cache(maxsize=8)
def posterior_quantiles(pulls: int, prior: tuple[float, float]) -> Tensor:
    """(successes, failures, POINTS) float64: log odds of the quantiles of Beta(a + successes, b + failures) that belong
    to evenly spaced points of a normal distribution.

    Between the points log odds are nearly straight: interpolated quantiles are right to 2e-4 for whole a and b.
    """
    s, f = np.indices((pulls + 1, pulls + 1))
    used = s + f <= pulls
    table = np.zeros((pulls + 1, pulls + 1, POINTS))
    level = ndtr(np.linspace(-SPAN, SPAN, POINTS))
    quantile = betaincinv(prior[0] + s[used][:, None], prior[1] + f[used][:, None], level)
    table[used] = logit(quantile.clip(1e-300, 1 - 1e-16))
    return torch.as_tensor(table)


class UCB1(IndexAgent):
    """Mean reward of an arm plus ``width`` x sqrt(2 log t / pulls of the arm), each arm once before any twice (Auer,
    Cesa-Bianchi and Fischer 2002, whose width is 1).

    ``prior``: the prior counts as pulls that were made, as if a successes and b failures had been seen; then no arm has
    to be tried.
    """

    def __init__(self, family: BernoulliBandit, width: float = 1.0, prior: bool = False, episodes: int = 1):
        super().__init__(family, episodes)
        self.width, self.prior = width, prior
        check(self, "width", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "prior", lambda x: isinstance(x, bool), "True or False")

    def index(self, luck: Tensor) -> Tensor:
        """The upper end of the arm's confidence interval."""
        pulls = self.success + self.failure + (sum(self.family.prior) if self.prior else 0)
        mean = self.mean if self.prior else self.success / pulls.clamp(min=1)
        bound = mean + self.width * (2 * math.log(self.pulled + 1) / pulls.clamp(min=1e-9)).sqrt()
        return torch.where(pulls == 0, 1e9, bound)


class GittinsBandit(IndexAgent):
    """The finite-horizon Gittins index of every arm: what a pull of it is worth to someone who owns this arm and may
    stop, equation (eq-gittins)."""

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No arm was pulled."""
        super().begin(context, tasks, episodes)
        table = gittins_index(self.pulls, self.family.prior).table
        self.table = torch.as_tensor(np.nan_to_num(table)).to(self.success)

    def index(self, luck: Tensor) -> Tensor:
        """By look-up."""
        return self.table[self.pulls - self.pulled][self.success.long(), self.failure.long()]


class OptimalBandit(IndexAgent):
    """The Bayes-optimal policy, from the dynamic programme (``exact_bandits.BayesOptimal``)."""

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No arm was pulled."""
        super().begin(context, tasks, episodes)
        self.optimum, self.rows = bayes_optimal(replace(self.family, pulls=self.pulls)), {}

    def index(self, luck: Tensor) -> Tensor:
        """1 for the arms that are best, 0 for the others."""
        base = self.pulls + 1
        code = (self.success * base + self.failure).long()
        touched = code.sort(-1, descending=True).values[..., : self.pulls]
        states, place = torch.unique(touched.flatten(0, -2), dim=0, return_inverse=True)
        best = torch.stack([self._best(state, base) for state in states.tolist()]).to(luck)
        return best[place].gather(-1, code.flatten(0, -2)).view_as(luck)

    def _best(self, codes: list[int], base: int) -> Tensor:
        """(base^2,) 1 where an arm with that code is best."""
        state: Counts = tuple(sorted(divmod(code, base) for code in codes if code))
        if state not in self.rows:
            row = torch.zeros(base * base)
            for s, f in self.optimum.best(state):
                row[s * base + f] = 1.0
            self.rows[state] = row
        return self.rows[state]


def agents(family: BernoulliBandit, episodes: int = 1) -> dict[str, Agent]:
    """The bandit's baselines that have nothing to tune, by the names of the book; the optimum where it can be had."""
    found: dict[str, Agent] = {
        "random": Random(family),
        "greedy": BanditGreedy(family, episodes=episodes),
        "Thompson": BanditThompson(family, episodes=episodes),
        "optimistic Thompson": BanditThompson(family, optimistic=True, episodes=episodes),
        "Gittins": GittinsBandit(family, episodes),
    }
    if episodes * family.pulls <= LARGEST_EXACT:
        found["optimal"] = OptimalBandit(family, episodes)
    return found
