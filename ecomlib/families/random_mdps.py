"""Random Markov decision processes (Duan et al. 2016): nothing is known of a task but the prior (chapter "Bandits
against the optimum")."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import noise as noise_
from .base import Prior, check, number, whole
from .tabular import TabularState, TabularTasks, finite_horizon

LARGEST_PRIOR = 21_201
"""Dimensions of torch's Sobol sequence, which samples the prior: the most numbers that may make a task."""


@dataclass(frozen=True)
class RandomMDP(Prior):
    """Every state and action has a mean reward ~ Normal and a row of transition probabilities ~ Dirichlet(1, ..., 1).

    A reward is Normal(mean of the state and action, ``noise``^2); every episode starts in state 0 and lasts ``horizon``
    steps. ``TabularTasks.reward`` holds the *mean* rewards, which do not depend on where an action leads. After its
    last step an episode shows state 0 again, so that its last move teaches nothing.

    The defaults are the "tabular MDPs" of Duan et al. (2016, section 3.2), with which Mishra et al. (2018) compare.
    Confirmed in two public programs, ``rl2/envs/mdp_env.py`` of lucaslingle/pytorch_rl2 and
    ``sandbox/rocky/neural_learner/envs/random_tabular_mdp_env.py`` in florensacc/rllab-curriculum: both draw means ~
    Normal(1, 1), noise of variance 1, rows ~ Dirichlet(1, ..., 1) and start in state 0, and the first goes back to
    state 0 with the last step. The paper itself was not at hand.
    """

    states: int = 10
    """Number of states."""
    actions: int = 5
    """Number of actions in every state."""
    horizon: int = 10
    """Steps in an episode."""
    reward_mean: float = 1.0
    """Mean of the mean rewards."""
    reward_deviation: float = 1.0
    """Standard deviation of the mean rewards."""
    noise: float = 1.0
    """Standard deviation of a reward around its mean."""

    def __post_init__(self):
        check(self, "states", lambda x: whole(x, 1, 1000), "a whole number in [1, 1000]")
        check(self, "actions", lambda x: whole(x, 2, 1000), "a whole number in [2, 1000]")
        small = lambda x: self.states * x * (self.states + 1) <= LARGEST_PRIOR
        check(self, "actions", small, f"states * actions * (states + 1) <= {LARGEST_PRIOR}")
        check(self, "horizon", lambda x: whole(x, 1, 10_000), "a whole number in [1, 10000]")
        check(self, "reward_mean", number, "a finite number")
        for field in ("reward_deviation", "noise"):
            check(self, field, lambda x: number(x, 0), "a finite number > 0")

    # -------------------------------------------------------------------------------------------- the protocol
    noise_size = 2

    @property
    def observation_size(self) -> int:
        """One entry for each state, and the time."""
        return self.states + 1

    @property
    def prior_size(self) -> int:
        """A mean reward and a row of transition probabilities for each state and action."""
        return self.states * self.actions * (self.states + 1)

    @property
    def hidden_size(self) -> int:
        """All of them."""
        return self.prior_size

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> TabularTasks:
        """Tasks of ``uniforms`` (M, prior_size): first those of the mean rewards, then those of the transitions.

        Exponential variables divided by their sum are Dirichlet(1, ..., 1).
        """
        pairs = self.states * self.actions
        mean = self.reward_mean + self.reward_deviation * torch.special.ndtri(uniforms[:, :pairs])
        weight = -uniforms[:, pairs:].log().unflatten(-1, (self.states, self.actions, self.states))
        start = torch.zeros_like(uniforms[:, : self.states])
        start[:, 0] = 1
        reward = mean.unflatten(-1, (self.states, self.actions))[..., None].expand_as(weight)
        return TabularTasks(task_id, weight / weight.sum(-1, keepdim=True), reward, start)

    def shifted(self) -> RandomMDP:
        """Rewards that are lower by a standard deviation: what was not tried yet is worth less than it was in
        training."""
        return replace(self, reward_mean=self.reward_mean - self.reward_deviation)

    def context(self, tasks: TabularTasks) -> Tensor:
        """(M, 0): nothing is known of a task beforehand."""
        return tasks.start[:, :0]

    def reset(self, tasks: TabularTasks, episodes: int, noise: Tensor) -> TabularState:
        """Every episode starts in state 0; no chance is involved."""
        zeros = torch.zeros(len(tasks.id), episodes, dtype=torch.int64, device=tasks.id.device)
        return TabularState(zeros, zeros)

    def observe(self, tasks: TabularTasks, state: TabularState) -> Tensor:
        """(M, N, states + 1): one-hot state, then time / horizon."""
        one_hot = torch.nn.functional.one_hot(state.state, self.states).to(tasks.start.dtype)
        return torch.cat((one_hot, (state.time / self.horizon).to(one_hot.dtype)[..., None]), -1)

    def seen(self, observation: Tensor) -> TabularState:
        """The inverse of ``observe``."""
        time = (observation[..., -1] * self.horizon).round().long()
        return TabularState(observation[..., :-1].argmax(-1), time)

    def step(
        self, tasks: TabularTasks, state: TabularState, action: Tensor, noise: Tensor
    ) -> tuple[TabularState, Tensor, Tensor]:
        """One step: a reward, then a move. ``action`` (M, N) int64."""
        task = torch.arange(len(tasks.id), device=action.device)[:, None].expand_as(action)
        following = noise_.inverse_transform(tasks.transition[task, state.state, action], noise[..., 0])
        reward = tasks.reward[task, state.state, action, 0] + self.noise * torch.special.ndtri(noise[..., 1])
        time = state.time + 1
        done = time >= self.horizon
        return TabularState(torch.where(done, 0, following), time), reward, done

    # ------------------------------------------------------------------------------------- oracle and blind policy
    def oracle_return(self, tasks: TabularTasks) -> Tensor:
        """(M,) exact, by backward induction over the episode, equation (eq-backward-induction)."""
        return finite_horizon(tasks, self.horizon)[0, :, 0].amax(-1)

    def blind_return(self, tasks: TabularTasks) -> Tensor:
        """(M,) exact expected return of choosing at random: a best policy of those that ignore rewards.

        All of them are equally good. Which states are visited depends on the transitions and on the policy alone, and
        these are independent of the mean rewards; so every step of every policy of time and state earns
        ``reward_mean`` on average over the prior, and an episode horizon * ``reward_mean``.
        """
        policy = torch.full_like(tasks.start[0], 1 / self.actions)[:, None].expand(-1, self.actions)
        return (policy * finite_horizon(tasks, self.horizon, policy=policy)[0])[:, 0].sum(-1)
