"""Proximal policy optimisation (Schulman et al. 2017; chapter "Trust regions"): several gradient steps on one batch of
episodes, with the incentive to move a probability clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from ..families.base import TaskFamily, check, number, require, whole
from ..policies import Policy, per_task
from ..returns import Advantage, leave_one_out_advantage
from ..rollout import Trajectories, rollout
from .finite import check_finite, deferred
from .reinforce import LearningCurve
from .trpo import mean_kl


@dataclass(frozen=True)
class PPOConfig:
    """Settings of the update from one batch of episodes."""

    clip: float = 0.2
    """How far a probability ratio may move from 1 before its step stops counting."""
    epochs: int = 5
    """Steps of Adam on one batch, each on all of it."""
    learning_rate: float = 0.01
    """Step size of Adam."""
    target_kl: float | None = None
    """Mean KL divergence from the old policy above which a task takes no further step on its batch; None: no limit."""

    def __post_init__(self):
        check(self, "clip", lambda x: number(x, 0, 1), "a number in (0, 1)")
        check(self, "epochs", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "learning_rate", lambda x: number(x, 0), "a finite number > 0")
        check(self, "target_kl", lambda x: x is None or number(x, 0), "None or a finite number > 0")


class PPOReport(NamedTuple):
    """What an update did. Every field is (M,)."""

    epochs: Tensor  # int64, steps taken
    kl: Tensor  # mean KL divergence of the new policy from the old one
    clipped: Tensor  # share of the visited steps whose ratio ended outside [1 - clip, 1 + clip]


def clipped_surrogate(
    policy: Policy, parameters: list[Tensor], data: Trajectories, advantage: Tensor, clip: float
) -> Tensor:
    """(M,) mean over episodes of sum_t min(r_t A_t, clamp(r_t, 1 - clip, 1 + clip) A_t), to be maximised; r_t is the
    ratio of pi(a_t | s_t) to the probability with which a_t was taken. Equation (eq-clipped-surrogate).

    A step contributes no gradient once its ratio is beyond the clip on the side that its advantage favours; on the
    other side it always does. ``advantage`` is (T, M, N) and is held constant.
    """
    ratio = (policy.log_prob(parameters, data.observation, data.action) - data.log_prob).exp()
    return (clipped_gain(ratio, advantage.detach(), clip) * data.mask).sum(0).mean(-1)


def clipped_gain(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(r A, clamp(r, 1 - clip, 1 + clip) A) of every step, (...)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


class PPO:
    """Plain PPO: every task is learned from scratch. No minibatches: an epoch is one step on the whole batch."""

    def __init__(
        self,
        policy: Policy,
        config: PPOConfig | None = None,
        iterations: int = 200,
        episodes: int = 8,
        advantage: Advantage | None = None,
    ):
        """``iterations`` updates, each from ``episodes`` new episodes of a task; ``advantage`` is by default the reward
        to go less the others' mean (``leave_one_out_advantage(standardised=True)`` is the option of most programs)."""
        require(whole(iterations, 1), "iterations", iterations, "a whole number >= 1")
        require(whole(episodes, 2), "episodes", episodes, "a whole number >= 2")
        self.policy, self.config = policy, config or PPOConfig()
        self.iterations, self.episodes = iterations, episodes
        self.advantage = advantage or leave_one_out_advantage()

    def update(
        self, parameters: list[Tensor], data: Trajectories, adam: PerTaskAdam | None = None
    ) -> tuple[list[Tensor], PPOReport]:
        """All epochs on the episodes that ``parameters`` (M, ...) collected. ``adam`` is carried on, in place."""
        config, policy, advantage = self.config, self.policy, self.advantage(data)
        adam = adam or PerTaskAdam(parameters)
        parameters = [p.detach() for p in parameters]
        with torch.no_grad():
            old = policy.distribution(parameters, data.observation, data.action)
        going = torch.ones(data.reward.shape[1], dtype=torch.bool, device=data.reward.device)
        epochs = torch.zeros_like(going, dtype=torch.int64)
        for epoch in range(config.epochs):
            leaves = [p.requires_grad_() for p in parameters]
            objective = clipped_surrogate(policy, leaves, data, advantage, config.clip)
            gradient = torch.autograd.grad(objective.sum(), leaves)
            check_finite(f"gradient at epoch {epoch}", gradient)
            parameters, epochs = adam.ascend(leaves, gradient, config.learning_rate, going), epochs + going
            if config.target_kl is not None:
                with torch.no_grad():
                    going = going & (mean_kl(policy, old, parameters, data) <= config.target_kl)
                if not going.any():
                    break
        with torch.no_grad():
            ratio = (policy.log_prob(parameters, data.observation, data.action) - data.log_prob).exp()
            outside = ((ratio - 1).abs() > config.clip) * data.mask
            clipped = outside.sum((0, 2)) / data.mask.sum((0, 2))
            return parameters, PPOReport(epochs, mean_kl(policy, old, parameters, data), clipped)

    def train(self, family: TaskFamily, tasks: Any, seed: int, progress: bool = True) -> LearningCurve:
        """Learn every task from the same initial parameters. Returns of an iteration are those of *new* episodes.

        The bar shows the mean KL divergence of the last update. Raises ``FloatingPointError`` naming iteration, epoch,
        task and tensor if a gradient is not finite.
        """
        start = self.policy.initial(Generator().manual_seed(seed))
        parameters = per_task([p.to(tasks.id.device) for p in start], len(tasks.id))
        adam, curve = PerTaskAdam(parameters), []
        bar = tqdm(range(self.iterations), desc="PPO", unit="update", disable=not progress)
        for iteration in bar:
            data = rollout(family, tasks, self.policy, parameters, self.episodes, seed, episode=iteration)
            curve.append(data.returns.mean(-1))
            try:
                with deferred():
                    parameters, report = self.update(parameters, data, adam)
            except FloatingPointError as error:
                raise FloatingPointError(f"iteration {iteration}: {error}") from None
            if progress:
                bar.set_postfix(kl=f"{report.kl.mean().item():.4f}")
        episodes = torch.arange(self.iterations) * self.episodes
        return LearningCurve(torch.stack(curve), episodes, [p.detach() for p in parameters])


class PerTaskAdam:
    """Adam (Kingma and Ba 2015) whose step count is each task's own, so that one task may stop while others go on:
    ``torch.optim.Adam`` has one count for all and would move a stopped task by its momentum."""

    def __init__(self, parameters: list[Tensor], decay: float = 0.9, square_decay: float = 0.999, floor: float = 1e-8):
        self.decay, self.square_decay, self.floor = decay, square_decay, floor
        self.steps = torch.zeros(len(parameters[0]), device=parameters[0].device)
        self.mean, self.square = ([torch.zeros_like(p.detach()) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def ascend(
        self, parameters: list[Tensor], gradient: tuple[Tensor, ...], learning_rate: float, going: Tensor
    ) -> list[Tensor]:
        """New parameters, each (M, ...), one step up ``gradient`` in the tasks where ``going`` (M,) is true."""
        self.steps += going
        result = []
        for i, (p, g) in enumerate(zip(parameters, gradient, strict=True)):
            shape = (-1, *[1] * (p.dim() - 1))
            moves, steps = going.view(shape), self.steps.view(shape)
            self.mean[i] = torch.where(moves, self.decay * self.mean[i] + (1 - self.decay) * g, self.mean[i])
            square = self.square_decay * self.square[i] + (1 - self.square_decay) * g**2
            self.square[i] = torch.where(moves, square, self.square[i])
            first, second = self.mean[i] / (1 - self.decay**steps), self.square[i] / (1 - self.square_decay**steps)
            result.append(torch.where(moves, p + learning_rate * first / (second.sqrt() + self.floor), p))
        return result
