"""REINFORCE from scratch on many tasks at once, each with its own parameters (Williams 1992; chapter "Policy
gradients")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from ..families.base import TaskFamily, check, number, whole
from ..policies import Policy, per_task
from ..returns import leave_one_out, reward_to_go
from ..rollout import rollout
from ..surrogates import log_likelihood
from .finite import check_finite


@dataclass(frozen=True)
class ReinforceConfig:
    """Settings of REINFORCE. The baseline is leave-one-out over the episodes of an iteration."""

    iterations: int = 200
    """Gradient steps."""
    episodes: int = 8
    """Episodes of each task that one gradient step is estimated from; every one is paid for by the merchant."""
    learning_rate: float = 0.03
    """Step size of Adam."""
    discount: float = 1.0
    """gamma of the reward to go."""

    def __post_init__(self):
        several = "a whole number >= 2 (the baseline of an episode is the mean of the others)"
        check(self, "iterations", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "episodes", lambda x: whole(x, 2), several)
        check(self, "learning_rate", lambda x: number(x, 0), "a finite number > 0")
        check(self, "discount", lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")


class LearningCurve(NamedTuple):
    """What training cost and earned: mean return of the episodes sampled at each iteration, and the final policy."""

    returns: Tensor  # (iterations, M)
    episodes: Tensor  # (iterations,), episodes of each task consumed before the iteration
    parameters: list[Tensor]  # each (M, in, out)


class Reinforce:
    """Plain policy-gradient learning: sample, estimate the gradient, step; no knowledge carried from task to task."""

    def __init__(self, policy: Policy, config: ReinforceConfig | None = None):
        self.policy, self.config = policy, config or ReinforceConfig()

    def train(self, family: TaskFamily, tasks: Any, seed: int, progress: bool = True) -> LearningCurve:
        """Learn every task from the same initial parameters. Returns of an iteration are those of *new* episodes.

        Adam's steps do not depend on the unit of reward, so one step size serves products that sell 1 unit a day and
        products that sell 100. Raises ``FloatingPointError`` naming iteration, task and tensor if a gradient is not
        finite.
        """
        config, policy = self.config, self.policy
        # On the CPU whatever the device, so that a seed starts from the same parameters everywhere.
        start = policy.initial(Generator().manual_seed(seed))
        parameters = per_task([p.to(tasks.id.device) for p in start], len(tasks.id))
        optimiser = torch.optim.Adam(parameters, lr=config.learning_rate)
        curve = []
        for iteration in tqdm(range(config.iterations), desc="REINFORCE", unit="step", disable=not progress):
            data = rollout(family, tasks, policy, parameters, config.episodes, seed, episode=iteration)
            curve.append(data.returns.mean(-1))
            advantage = leave_one_out(reward_to_go(data.reward, config.discount))
            # The gradient of the sum over tasks is the stack of the tasks' own gradients: they share no parameter.
            gradient = torch.autograd.grad(log_likelihood(policy, parameters, data, advantage).sum(), parameters)
            try:
                check_finite("gradient", gradient)
            except FloatingPointError as error:
                raise FloatingPointError(f"iteration {iteration}: {error}") from None
            for parameter, g in zip(parameters, gradient):
                parameter.grad = -g
            optimiser.step()
        episodes = torch.arange(config.iterations) * config.episodes
        return LearningCurve(torch.stack(curve), episodes, [p.detach() for p in parameters])
