"""Trajectories -> the scalar whose gradient is the policy gradient, one per task: chapter "Policy gradients"."""

from __future__ import annotations

from torch import Tensor

from .policies import Policy
from .rollout import Trajectories


def log_likelihood(policy: Policy, parameters: list[Tensor], data: Trajectories, advantage: Tensor) -> Tensor:
    """(M,) mean over episodes of sum_t log pi(a_t | s_t) A_t, equation (eq-surrogate). Maximise it.

    Its gradient at the parameters that acted is the REINFORCE estimate of each task's policy gradient (Williams
    1992); its *value* means nothing. ``advantage`` is (T, M, N) and is held constant.
    """
    log_prob = policy.log_prob(parameters, data.observation, data.action)
    return (log_prob * advantage.detach() * data.mask).sum(0).mean(-1)
