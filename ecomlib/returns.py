"""Trajectories -> returns and advantages, all (T, M, N): chapter "Policy gradients"."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .rollout import Trajectories


def reward_to_go(reward: Tensor, discount: float = 1.0) -> Tensor:
    """sum_{k >= t} discount^(k - t) r_k, shape as ``reward`` (T, ...), equation (eq-reward-to-go)."""
    total, result = torch.zeros_like(reward[0]), []
    for r in reward.flip(0):
        total = r + discount * total
        result.append(total)
    return torch.stack(result).flip(0)


def leave_one_out(value: Tensor, counts: Tensor | None = None) -> Tensor:
    """Minus the mean of the *other* episodes of the task, shape as ``value`` (T, M, N), equation (eq-leave-one-out).

    A baseline that does not depend on the episode it scores, so the gradient stays unbiased; the mean over all N
    episodes shrinks it by (N - 1) / N. ``counts`` (M, N) is 0 for spare episodes (``rollout_transitions``), which
    belong to no mean; a task with a single episode that counts gets 0.
    """
    episodes = value.shape[-1]
    if episodes < 2:
        raise ValueError(f"episodes = {episodes}: a leave-one-out baseline needs at least 2 episodes of each task")
    if counts is None:
        return (value - value.mean(-1, keepdim=True)) * (episodes / (episodes - 1))
    number = counts.sum(-1, keepdim=True)
    mean = (value * counts).sum(-1, keepdim=True) / number
    return (value - mean) * (number / (number - 1).clamp(min=1)) * counts * (number > 1)


def gae(reward: Tensor, value: Tensor, mask: Tensor, discount: float = 1.0, gae_lambda: float = 1.0) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), shape (T, M, N), equation (eq-gae).

    ``value`` (T, M, N) predicts the return to come of each visited state; the value after the last step of an episode
    is 0.
    """
    following = torch.cat((value[1:] * mask[1:], torch.zeros_like(value[:1])))
    return reward_to_go((reward + discount * following - value) * mask, discount * gae_lambda) * mask


def standardise(advantage: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the steps of each task, (T, M, N): one step size then serves tasks whose
    rewards differ a hundredfold. Biases the gradient's length, not (much) its direction."""
    count = mask.sum((0, -1), keepdim=True).clamp(min=1)
    centred = (advantage - (advantage * mask).sum((0, -1), keepdim=True) / count) * mask
    spread = ((centred**2).sum((0, -1), keepdim=True) / count).sqrt()
    return centred / (spread + 1e-8)


def per_transition(advantage: Tensor, mask: Tensor) -> Tensor:
    """Rescaled so that a surrogate's mean over episodes of a sum over steps becomes its mean over *steps*, (T, M, N):
    the convention of rllab (Duan et al. 2016, benchmarking), to which published inner step sizes refer."""
    return advantage * (mask.shape[-1] / mask.sum((0, -1), keepdim=True).clamp(min=1))


Advantage = Callable[[Trajectories], Tensor]
"""Trajectories -> advantages (T, M, N)."""


def leave_one_out_advantage(discount: float = 1.0, standardised: bool = False) -> Advantage:
    """Reward to go less the mean of the task's other episodes; unbiased. Needs at least 2 episodes of each task."""

    def advantage(data: Trajectories) -> Tensor:
        value = leave_one_out(reward_to_go(data.reward * data.mask, discount), data.mask[0]) * data.mask
        return standardise(value, data.mask) if standardised else value

    return advantage


def same_step_advantage() -> Advantage:
    """Reward less the mean of the task's rewards over all steps and episodes, then ``per_transition``: for families
    whose actions do not change what later steps earn, so that later rewards would only be noise. Needs no second
    episode; its expected gradient is short by one part in the number of steps (eq-sampling-baseline)."""

    def advantage(data: Trajectories) -> Tensor:
        steps = data.mask.sum((0, -1), keepdim=True).clamp(min=1)
        mean = (data.reward * data.mask).sum((0, -1), keepdim=True) / steps
        return per_transition((data.reward - mean) * data.mask, data.mask)

    return advantage


def linear_feature_advantage(
    discount: float = 1.0, gae_lambda: float = 1.0, standardised: bool = True, transitions: bool = True
) -> Advantage:
    """GAE on a ``LinearFeatureBaseline`` fitted, in double precision, to the same episodes, as rllab does; then
    ``standardise`` and ``per_transition``."""

    def advantage(data: Trajectories) -> Tensor:
        # Powers of time and ridge 1e-5: single precision would not do.
        exact = Trajectories(*(x.double() if x.is_floating_point() else x for x in data))
        value = LinearFeatureBaseline().fit(exact, discount).predict(exact)
        result = gae(exact.reward, value, exact.mask, discount, gae_lambda)
        result = standardise(result, exact.mask) if standardised else result
        return (per_transition(result, exact.mask) if transitions else result).to(data.reward.dtype)

    return advantage


class LinearFeatureBaseline:
    """Return to come as a linear function of (observation, its square, t, t^2, t^3, 1), one ridge fit per task.

    The baseline of Duan et al. (2016, benchmarking), batched over tasks. Fit on some episodes, predict others:
    predicting the episodes it was fitted on biases the gradient.
    """

    def __init__(self, ridge: float = 1e-5):
        if not ridge > 0:
            raise ValueError(f"ridge = {ridge}: must be > 0")
        self.ridge = ridge
        self.weights: Tensor | None = None

    def fit(self, data: Trajectories, discount: float = 1.0) -> LinearFeatureBaseline:
        """Least squares of the reward to go over the steps before an episode's end; keeps ``weights`` (M, features)."""
        features, mask = self._features(data), data.mask.transpose(0, 1)[..., None]
        target = reward_to_go(data.reward * data.mask, discount).transpose(0, 1)[..., None]
        x, y = (features * mask).flatten(1, 2), (target * mask).flatten(1, 2)
        gram = x.mT @ x
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        # Positive definite; the check that plain ``solve`` makes would wait for the device.
        self.weights = torch.linalg.solve_ex(gram + self.ridge * scale * eye, x.mT @ y).result[..., 0]
        return self

    def predict(self, data: Trajectories) -> Tensor:
        """(T, M, N) predicted return to come."""
        if self.weights is None:
            raise RuntimeError("LinearFeatureBaseline.predict was called before fit")
        return torch.einsum("mtnf,mf->tmn", self._features(data), self.weights)

    @staticmethod
    def _features(data: Trajectories) -> Tensor:
        """(M, T, N, features), task first."""
        steps, tasks, episodes = data.reward.shape
        time = torch.arange(steps, dtype=data.reward.dtype, device=data.reward.device) / steps
        time = torch.stack((time, time**2, time**3, torch.ones_like(time)), -1)[:, None, None].expand(
            -1, tasks, episodes, -1
        )
        return torch.cat((data.observation, data.observation**2, time), -1).transpose(0, 1)
