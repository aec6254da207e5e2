"""Expectations without sampling, for tabular families: every trajectory with its probability, and every value.

Against these numbers the chapter "Policy gradients" checks its estimators. Nothing here is meant for a learner: an
enumeration grows as (actions x states) to the power of the horizon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .families.tabular import TabularState, TabularTasks, action_value
from .policies import CategoricalMLP
from .rollout import Trajectories


def action_probabilities(family: Any, tasks: TabularTasks, policy: CategoricalMLP, parameters: list[Tensor]) -> Tensor:
    """(T, M, S, A), pi(a | s) at every time and in every state: the policy sees what the merchant would see there."""
    state = torch.arange(tasks.start.shape[1], device=tasks.id.device).expand(len(tasks.id), -1)
    seen = [family.observe(tasks, TabularState(state, torch.full_like(state, t))) for t in range(family.horizon)]
    return policy.log_probs(parameters, torch.stack(seen)).exp()


def state_values(
    family: Any, tasks: TabularTasks, policy: CategoricalMLP, parameters: list[Tensor], discount: float = 1.0
) -> Tensor:
    """(T, M, S) expected return to come of each state at each time, by backward induction, differentiable."""
    probabilities = action_probabilities(family, tasks, policy, parameters)
    value, values = torch.zeros_like(tasks.start), []
    for probability in probabilities.flip(0):
        value = (probability * action_value(tasks, value, discount)).sum(-1)
        values.append(value)
    return torch.stack(values[::-1])


def expected_return(
    family: Any, tasks: TabularTasks, policy: CategoricalMLP, parameters: list[Tensor], discount: float = 1.0
) -> Tensor:
    """(M,) J of equation (eq-expected-return). Its autograd gradient is the exact policy gradient."""
    return (tasks.start * state_values(family, tasks, policy, parameters, discount)[0]).sum(-1)


def all_trajectories(
    family: Any, tasks: TabularTasks, policy: CategoricalMLP, parameters: list[Tensor]
) -> tuple[Trajectories, Tensor]:
    """Every trajectory that can happen, (T, M, N, ...), and its probability (M, N), equation (eq-trajectory).

    N is the number of trajectories possible in at least one task; a state that no action leaves ends the episode. The
    probability is differentiable in ``parameters``.
    """
    absorbing = (tasks.transition.diagonal(dim1=1, dim2=3) == 1).all(1).all(0)  # (S,)
    possible = (tasks.transition > 0).any(0)  # (S, A, S)
    possible[absorbing, 1:] = False  # after the end one nameless action will do
    moves = possible.nonzero()  # rows (s, a, s')
    paths = (tasks.start > 0).any(0).nonzero()  # rows (s_0), growing to (s_0, a_0, s_1, ...)
    for _ in range(family.horizon):
        path, move = (paths[:, -1:] == moves[:, 0]).nonzero(as_tuple=True)
        paths = torch.cat((paths[path], moves[move, 1:]), 1)
    state, action = paths[:, 0::2].T, paths[:, 1::2].T
    visited, following = state[:-1], state[1:]
    tasks_ = len(tasks.id)
    seen = [
        family.observe(tasks, TabularState(s.expand(tasks_, -1), torch.full((tasks_, len(s)), t, device=s.device)))
        for t, s in enumerate(visited)
    ]
    mask = (~absorbing[visited]).to(tasks.reward.dtype)[:, None].expand(-1, tasks_, -1)
    reward = tasks.reward[:, visited, action, following].transpose(0, 1) * mask
    observation, action_ = torch.stack(seen), action[:, None].expand(-1, tasks_, -1)
    log_prob = policy.log_prob(parameters, observation, action_)
    chance = tasks.start[:, state[0]] * tasks.transition[:, visited, action, following].prod(1)
    return Trajectories(observation, action_, log_prob, reward, mask), chance * (log_prob * mask).sum(0).exp()
