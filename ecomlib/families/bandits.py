"""BernoulliBandit: k banners or product photos, n visitors, chances of a click that nobody knows (chapter "Bandits
against the optimum")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from scipy.special import betaincinv
from torch import Tensor

from .base import Prior, check, number, whole

LARGEST = 10_000
"""Bound on the number of arms and of pulls."""


class Arms(NamedTuple):
    """M bandits. ``chance`` is hidden from the merchant."""

    id: Tensor  # (M,)
    chance: Tensor  # (M, arms), probability that a pull pays 1


class BanditState(NamedTuple):
    """Where N episodes of M bandits stand. Both fields are (M, N)."""

    pull: Tensor  # pulls made
    reward: Tensor  # of the last pull; 0 before the first


@dataclass(frozen=True)
class BernoulliBandit(Prior):
    """A pull of an arm pays 1 with the arm's chance, else 0; an episode is ``pulls`` pulls.

    The story: a page has room for one of k banners, every visitor sees one and clicks or does not. The chances are
    drawn independently from Beta(a, b), once a task. A trial is one episode: learning and earning are the same pulls.
    Exact optima: ``ecomlib.exact_bandits``.
    """

    arms: int = 5
    """Number of arms, k."""
    pulls: int = 10
    """Pulls in an episode, n."""
    prior: tuple[float, float] = (1.0, 1.0)
    """Beta(a, b), from which every arm's chance is drawn: as if a - 1 successes and b - 1 failures had been seen of a
    chance of which nothing was known."""

    def __post_init__(self):
        positive = lambda x: isinstance(x, tuple) and len(x) == 2 and all(number(v, 0, 1e6) for v in x)
        check(self, "arms", lambda x: whole(x, 1, LARGEST), f"a whole number from 1 to {LARGEST}")
        check(self, "pulls", lambda x: whole(x, 1, LARGEST), f"a whole number from 1 to {LARGEST}")
        check(self, "prior", positive, "two numbers above 0 and below 1,000,000")

    # -------------------------------------------------------------------------------------------- the protocol
    noise_size = 1
    observation_size = 2

    @property
    def horizon(self) -> int:
        """Pulls in an episode."""
        return self.pulls

    @property
    def actions(self) -> int:
        """Number of arms."""
        return self.arms

    @property
    def prior_size(self) -> int:
        """One uniform an arm."""
        return self.arms

    @property
    def hidden_size(self) -> int:
        """All of them are of hidden chances."""
        return self.arms

    @property
    def prior_mean(self) -> float:
        """Chance of an arm that was never pulled."""
        return self.prior[0] / sum(self.prior)

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> Arms:
        """Bandits of ``uniforms`` (M, arms): the prior's quantiles."""
        return Arms(task_id, _beta_quantile(uniforms, *self.prior))

    def shifted(self) -> BernoulliBandit:
        """Bandits whose arms pay less: two more failures in the prior, Beta(1, 3) for Beta(1, 1)."""
        a, b = self.prior
        return replace(self, prior=(a, b + 2))

    def context(self, tasks: Arms) -> Tensor:
        """(M, 0): nothing is known of a bandit beforehand."""
        return tasks.chance[:, :0]

    def reset(self, tasks: Arms, episodes: int, noise: Tensor) -> BanditState:
        """Before the first pull; no chance is involved."""
        zeros = tasks.chance.new_zeros(len(tasks.chance), episodes)
        return BanditState(zeros, zeros)

    def observe(self, tasks: Arms, state: BanditState) -> Tensor:
        """(M, N, 2): pulls made / pulls, and the last reward. Which arm it came from is the agent's own memory."""
        return torch.stack((state.pull / self.pulls, state.reward), -1)

    def step(
        self, tasks: Arms, state: BanditState, action: Tensor, noise: Tensor
    ) -> tuple[BanditState, Tensor, Tensor]:
        """Pull the arms ``action`` (M, N) int64."""
        reward = (noise[..., 0] < tasks.chance.gather(1, action)).to(tasks.chance.dtype)
        return BanditState(state.pull + 1, reward), reward, state.pull >= self.pulls - 1

    def mean_reward(self, tasks: Arms, action: Tensor) -> Tensor:
        """Expected reward of ``action`` (..., M, N), given that it was chosen, in the same shape: the arms' chances.

        Replacing each reward of a trial by this number leaves every expectation as it is and takes out the luck of the
        pulls themselves.
        """
        chance = tasks.chance.expand(*action.shape[:-2], -1, -1)
        return chance.gather(-1, action)

    def oracle_return(self, tasks: Arms) -> Tensor:
        """(M,) exact: the best arm at every pull."""
        return self.pulls * tasks.chance.amax(-1)

    def blind_return(self, tasks: Arms) -> Tensor:
        """(M,) exact: an arm at random at every pull, since all are alike before any feedback. Its mean over tasks
        tends to pulls x a / (a + b)."""
        return self.pulls * tasks.chance.mean(-1)


def _beta_quantile(uniform: Tensor, a: float, b: float) -> Tensor:
    """The inverse of the Beta(a, b) distribution function: a power of a uniform where a or b is 1."""
    if b == 1:
        return uniform ** (1 / a)
    if a == 1:
        return 1 - (1 - uniform) ** (1 / b)
    quantile = betaincinv(a, b, uniform.cpu().double().numpy())
    return torch.as_tensor(quantile, dtype=uniform.dtype, device=uniform.device)
