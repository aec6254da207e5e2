"""Model-based learners for random Markov decision processes: a conjugate posterior, and what to plan with it (chapter
"Bandits against the optimum").

All plan once an episode, by backward induction in a world made of the posterior: a draw of it (PSRL), the best of
several draws, its mean, or its mean with a bonus for what was seldom tried.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import noise as noise_
from ..families.base import check, number, whole
from ..families.random_mdps import RandomMDP
from ..families.tabular import TabularState, TabularTasks, finite_horizon


@dataclass(frozen=True)
class ConjugatePrior:
    """What an agent believes of every state and action before it has seen anything."""

    mean: float = 1.0
    """Mean of the mean reward."""
    deviation: float = 1.0
    """Standard deviation of the mean reward."""
    concentration: float = 1.0
    """Of the Dirichlet distribution of where an action leads: moves to each state that count as seen."""

    def __post_init__(self):
        check(self, "mean", number, "a finite number")
        for field in ("deviation", "concentration"):
            check(self, field, lambda x: number(x, 0), "a finite number > 0")

    @staticmethod
    def of(family: RandomMDP) -> ConjugatePrior:
        """The family's own prior."""
        return ConjugatePrior(family.reward_mean, family.reward_deviation)


class MDPPosterior:
    """Posterior of M tasks in N replicas: Normal mean rewards, Dirichlet transitions, equations (eq-mdp-reward) and
    (eq-mdp-transition).

    ``visits`` and ``rewards`` (M, N, S, A): how often an action was taken in a state, and the sum of what it paid.
    ``moves`` (M, N, S, A, S): how often it led where; the last move of an episode is not seen.
    """

    def __init__(self, family: RandomMDP, prior: ConjugatePrior, tasks: int, episodes: int, device: torch.device):
        self.family, self.prior = family, prior
        shape = (tasks, episodes, family.states, family.actions)
        self.visits, self.rewards = (torch.zeros(shape, device=device) for _ in range(2))
        self.moves = torch.zeros(*shape, family.states, device=device)
        self.history: list[Tensor] = []  # of each move the number of its entry in a flat ``moves``, (M, N)

    def update(self, before: TabularState, action: Tensor, reward: Tensor, after: TabularState) -> None:
        """Bayes' rule for one step; every argument is (M, N)."""
        pair = before.state * self.family.actions + action
        add = lambda table, index, value: table.flatten(2).scatter_add_(2, index[..., None], value[..., None])
        add(self.visits, pair, torch.ones_like(reward))
        add(self.rewards, pair, reward)
        seen = (after.time < self.family.horizon).to(reward.dtype)
        move = pair * self.family.states + after.state
        add(self.moves, move, seen)
        self.history.append(torch.where(seen > 0, move, -1))

    def reward_moments(self) -> tuple[Tensor, Tensor]:
        """(M, N, S, A) posterior mean and standard deviation of the mean rewards, equation (eq-mdp-reward)."""
        prior, precision = self.prior.deviation**-2, self.family.noise**-2
        total = prior + precision * self.visits
        return (prior * self.prior.mean + precision * self.rewards) / total, total**-0.5

    def mean(self) -> TabularTasks:
        """M N worlds of posterior mean rewards and transitions, equation (eq-mdp-transition)."""
        pseudo = self.moves + self.prior.concentration
        return self._worlds(pseudo / pseudo.sum(-1, keepdim=True), self.reward_moments()[0])

    def draw(self, key: Tensor, index: int) -> TabularTasks:
        """M N worlds drawn from the posterior, ``index`` the how-manieth of those that ``key`` (M, N) int64 names.

        A Dirichlet variable of whole parameters is a sum of as many exponential ones in each entry, divided by the sum
        of all: one for each move that was seen and one for each entry of the flat prior (Rubin 1981, the Bayesian
        bootstrap). So the draw is exact and needs no rejection.
        """
        mean, deviation = self.reward_moments()
        chance = self._uniforms(key, index, 0, mean[0, 0].numel())
        reward = mean + deviation * torch.special.ndtri(chance).view_as(mean)
        weight = -self._uniforms(key, index, 1, self.moves[0, 0].numel()).log()
        if self.history:
            history = torch.stack(self.history, -1)  # (M, N, steps)
            own = -self._uniforms(key, index, 2, history.shape[-1]).log()
            weight = weight.scatter_add(2, history.clamp(min=0), own * (history >= 0))
        weight = weight.view_as(self.moves)
        return self._worlds(weight / weight.sum(-1, keepdim=True), reward)

    def _uniforms(self, key: Tensor, index: int, kind: int, size: int) -> Tensor:
        """(M, N, size) from the numbers (M, N) by which a decision's uniform is named."""
        replica = torch.zeros(1, dtype=torch.int64, device=key.device)
        uniforms = noise_.uniform(kind, key.flatten(), replica, 0, index, noise_.AGENT, size, self.visits.dtype)
        return uniforms.view(*key.shape, size)

    def _worlds(self, transition: Tensor, reward: Tensor) -> TabularTasks:
        transition, reward = transition.flatten(0, 1), reward.flatten(0, 1)
        start = torch.zeros_like(reward[..., 0])
        start[:, 0] = 1
        number_ = torch.arange(len(start), device=start.device)
        return TabularTasks(number_, transition, reward[..., None].expand_as(transition), start)


class _Planner:
    """Shared by the agents of this file: a posterior that every step updates, and a plan that is made once an
    episode."""

    noise_size = 3

    def __init__(self, family: RandomMDP, prior: ConjugatePrior | None = None):
        self.family, self.prior = family, ConjugatePrior.of(family) if prior is None else prior

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Back to the prior."""
        self.posterior = MDPPosterior(self.family, self.prior, tasks, episodes, context.device)
        self.values = None

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (M, N): the plan's."""
        self.before = self.family.seen(observation)
        if self.values is None:
            tasks, episodes = observation.shape[:2]
            # A row's uniform is its name; its place makes sure that no two rows of a batch have the same.
            place = torch.arange(episodes, device=noise.device)
            key = (noise[..., 0].double() * 2**52).long() * episodes + place
            self.values = self.plan(key).unflatten(1, (tasks, episodes))
        return self.choose(noise[..., 1:])

    def choose(self, noise: Tensor) -> Tensor:
        """The action of highest value at the present step in the present state; one of them at random where several
        are: an episode that comes back to a state then tries another of those that nothing is known of."""
        time = self.before.time[0, 0]  # all episodes of a batch are at the same step
        place = self.before.state[..., None, None].expand(-1, -1, 1, self.family.actions)
        values = self.values[time].gather(2, place)[:, :, 0]
        best = values.amax(-1, keepdim=True)
        tied = values >= best - 1e-6 * (1 + best.abs())  # alike but for rounding
        return ((tied.cumsum(-1) / tied.sum(-1, keepdim=True)) <= noise[..., :1]).sum(-1)

    def plan(self, key: Tensor) -> Tensor:
        """(T, M N, S, A) action values for the episode to come."""
        raise NotImplementedError

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Bayes' rule for the step that just ended."""
        self.posterior.update(self.before, action, reward, self.family.seen(next_observation))

    def end_episode(self) -> None:
        """The next episode needs a new plan."""
        self.values = None


class PSRL(_Planner):
    """Posterior sampling (Strens 2000; Osband, Russo and Van Roy 2013): draws a world an episode and does what is best
    in it.

    With ``draws`` > 1 every action's value is the largest of so many worlds' (optimistic posterior sampling, "OPSRL" in
    the tables of Duan et al. 2016; ``OptimisticPSRL`` of iosband/TabulaRL).
    """

    def __init__(self, family: RandomMDP, prior: ConjugatePrior | None = None, draws: int = 1):
        super().__init__(family, prior)
        self.draws = draws
        check(self, "draws", lambda x: whole(x, 1, 1000), "a whole number in [1, 1000]")
        if self.prior.concentration != 1:
            raise ValueError(f"concentration = {self.prior.concentration!r}: draws are made with 1 only")

    def plan(self, key: Tensor) -> Tensor:
        """The values of the world drawn, or the envelope of those of several."""
        values = None
        for index in range(self.draws):
            drawn = finite_horizon(self.posterior.draw(key, index), self.family.horizon)
            values = drawn if values is None else torch.maximum(values, drawn)
        return values


class PosteriorMean(_Planner):
    """Plans in the world of posterior means; with probability ``epsilon`` an action is random instead."""

    def __init__(self, family: RandomMDP, prior: ConjugatePrior | None = None, epsilon: float = 0.0):
        super().__init__(family, prior)
        self.epsilon = epsilon
        check(self, "epsilon", lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")

    def plan(self, key: Tensor) -> Tensor:
        """The values in the world of means."""
        return finite_horizon(self.posterior.mean(), self.family.horizon)

    def choose(self, noise: Tensor) -> Tensor:
        """One uniform decides whether to plan, another which action."""
        random = (noise[..., 0] * self.family.actions).long()
        return torch.where(noise[..., 1] < self.epsilon, random, super().choose(noise))


class ExplorationBonus(_Planner):
    """Plans in the world of posterior means, in which a reward is raised by ``bonus`` / (1 + visits): the Bayesian
    exploration bonus, "BEB" (Kolter and Ng 2009)."""

    def __init__(self, family: RandomMDP, prior: ConjugatePrior | None = None, bonus: float = 1.0):
        super().__init__(family, prior)
        self.bonus = bonus
        check(self, "bonus", lambda x: number(x) and x >= 0, "a finite number >= 0")

    def plan(self, key: Tensor) -> Tensor:
        """The values in the world of means with its bonus."""
        world = self.posterior.mean()
        bonus = self.bonus / (1 + self.posterior.visits.flatten(0, 1))
        return finite_horizon(world._replace(reward=world.reward + bonus[..., None]), self.family.horizon)
