"""PointNavigation: a point walks to a hidden goal, the benchmark of Finn, Abbeel and Levine (2017) (chapter
"Meta-reinforcement learning")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import noise as noise_
from .base import check, number, whole

__all__ = ["Goals", "PointNavigation", "PointState"]


class Goals(NamedTuple):
    """M tasks. ``goal`` is hidden from the policy."""

    id: Tensor  # (M,)
    goal: Tensor  # (M, 2), units of length


class PointState(NamedTuple):
    """Where N episodes of M tasks stand."""

    position: Tensor  # (M, N, 2)
    time: Tensor  # (M, N) int64


@dataclass(frozen=True)
class PointNavigation:
    """A point starts at (0, 0), sees its position, and pays its distance to a goal it cannot see at every step.

    An action (2,) is a displacement in units of ``stride``, each coordinate clipped to [-1, 1]. The reward is minus the
    Euclidean distance to the goal *after* the move. The episode ends when both coordinates are nearer to the goal's
    than ``tolerance``. Nothing is random but the goal and the policy. The defaults are the protocol of the published
    experiment (environment ``PointEnvRandGoal`` of the authors' code), in which an action of the policy is clipped by
    the environment and its log-probability is that of the action before clipping.
    """

    horizon: int = 100
    """Most steps in an episode."""
    inner: float = 0.0
    """Goals are uniform on the square [-outer, outer]^2 without the square [-inner, inner]^2 ..."""
    outer: float = 0.5
    """... so by default on [-0.5, 0.5]^2. Units of length."""
    stride: float = 0.1
    """Longest move in each coordinate, units of length."""
    tolerance: float = 0.01
    """The goal is reached when both coordinates differ by less than this, units of length."""

    def __post_init__(self):
        check(self, "horizon", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "inner", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "outer", lambda x: number(x, self.inner), f"a finite number > inner = {self.inner!r}")
        check(self, "stride", lambda x: number(x, 0), "a finite number > 0")
        check(self, "tolerance", lambda x: number(x, 0), "a finite number > 0")

    # -------------------------------------------------------------------------------------------- the protocol
    noise_size = 0
    observation_size = 2
    actions = 0
    action_size = 2

    def tasks(self, task_id: Tensor) -> Goals:
        """The goals named by ``task_id`` (M,): a function of the id alone."""
        replica = torch.zeros(1, dtype=torch.int64, device=task_id.device)
        area, edge = noise_.uniform(0, task_id, replica, 0, 0, noise_.PRIOR, 2)[:, 0].unbind(-1)
        # The square of half-width r has area 4 r^2; a goal lies anywhere on the border of its own square.
        radius = (self.inner**2 + area * (self.outer**2 - self.inner**2)).sqrt()
        side = (4 * edge).floor()
        along = radius * (2 * (4 * edge - side) - 1)
        across = torch.where(side % 2 == 0, radius, -radius)
        horizontal = side < 2
        return Goals(
            task_id, torch.stack((torch.where(horizontal, along, across), torch.where(horizontal, across, along)), -1)
        )

    def test_goals(self, device: str = "cpu") -> Goals:
        """The 40 goals of the published evaluation: NumPy's generator of 2017 with seed 1, uniform on [-0.5, 0.5]^2.

        Their ids are -1 ... -40, which no sampled task has. They do not depend on ``inner`` and ``outer``.
        """
        goal = np.random.RandomState(1).uniform(-0.5, 0.5, size=(40, 2))  # noqa: NPY002, the published stream
        goal = torch.as_tensor(goal, dtype=torch.get_default_dtype(), device=device)
        return Goals(-1 - torch.arange(40, device=device), goal)

    def shifted(self) -> PointNavigation:
        """Goals further out than any in training: between ``outer`` and 1.5 ``outer`` in the larger coordinate."""
        return replace(self, inner=self.outer, outer=1.5 * self.outer)

    def context(self, tasks: Goals) -> Tensor:
        """(M, 0): nothing is known of a goal beforehand."""
        return tasks.goal[:, :0]

    def reset(self, tasks: Goals, episodes: int, noise: Tensor) -> PointState:
        """Every episode starts at (0, 0); no chance is involved."""
        position = tasks.goal.new_zeros(len(tasks.id), episodes, 2)
        return PointState(position, torch.zeros(position.shape[:2], dtype=torch.int64, device=position.device))

    def observe(self, tasks: Goals, state: PointState) -> Tensor:
        """(M, N, 2): the position."""
        return state.position

    def step(self, tasks: Goals, state: PointState, action: Tensor, noise: Tensor) -> tuple[PointState, Tensor, Tensor]:
        """Move by ``stride`` times ``action`` (M, N, 2), clipped to [-1, 1] in each coordinate."""
        position = state.position + self.stride * action.clamp(-1, 1)
        away = position - tasks.goal[:, None]
        time = state.time + 1
        done = (away.abs() < self.tolerance).all(-1) | (time >= self.horizon)
        return PointState(position, time), -away.square().sum(-1).sqrt(), done

    # ------------------------------------------------------------------------------------- oracle and blind policy
    def oracle_return(self, tasks: Goals) -> Tensor:
        """(M,) exact return of the best policy that knows the goal.

        It moves each coordinate as far towards the goal as a step allows. That makes both coordinates' distances the
        smallest possible after every number of steps, hence every reward the largest possible and the end of the
        episode, after which nothing more is paid, the earliest possible: no policy does better at any step. The
        "oracle" line of the published experiment, about -2.3, is a *trained* policy that observes the goal.
        """
        time = torch.arange(1, self.horizon + 1, device=tasks.goal.device, dtype=tasks.goal.dtype)[:, None, None]
        away = (tasks.goal.abs() - self.stride * time).clamp(min=0)  # (T, M, 2)
        arrived = (away < self.tolerance).all(-1)
        before = torch.cat((torch.zeros_like(arrived[:1]), arrived[:-1]))  # arrived is monotone in time
        return -(away.square().sum(-1).sqrt() * ~before).sum(0)

    def blind_return(self, tasks: Goals) -> Tensor:
        """(M,) return of staying at (0, 0), nearly the best plan that ignores the rewards.

        If episodes did not end at the goal it would be exactly the best: the prior is symmetric about (0, 0), which
        therefore minimises the mean distance. Ends help a plan that happens to pass over the goal, but in a step it
        passes over at most (2 tolerance)^2 of area, 0.04 % of the default prior. Removing the farthest goals at that
        rate bounds the gain of any plan by 4 % of this return; a search over plans finds less than 0.1 %.
        """
        distance = tasks.goal.square().sum(-1).sqrt()
        at_once = (tasks.goal.abs() < self.tolerance).all(-1)
        return -distance * torch.where(at_once, 1, self.horizon)
