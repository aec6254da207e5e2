"""LayeredMDP: random decision problems so small that every batch of episodes can be listed (chapter
"Meta-reinforcement learning")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .. import noise as noise_
from .base import check, whole
from .tabular import ShopMDP, TabularState, TabularTasks, action_value


@dataclass(frozen=True)
class LayeredMDP:
    """One state, then a choice, then one of ``width`` states, then a choice, and so on, ``horizon`` choices in all.

    State 0 is the first; those of step t >= 1 follow in blocks of ``width``; the last one is the end. With horizon 1
    it is a bandit. Where an action leads and what it pays, in [0, 1], is hidden and drawn at random for every task.
    An episode has actions * (width * actions)^(horizon - 1) possible courses.
    """

    horizon: int = 2
    """Choices in an episode."""
    width: int = 2
    """States at every step after the first."""
    actions: int = 2
    """Actions in every state."""

    def __post_init__(self):
        for field in ("horizon", "width"):
            check(self, field, lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "actions", lambda x: whole(x, 2), "a whole number >= 2")

    noise_size = 1

    @property
    def observation_size(self) -> int:
        """Number of states, the end included: an observation is a one-hot state."""
        return 2 + self.width * (self.horizon - 1)

    def tasks(self, task_id: Tensor) -> TabularTasks:
        """The problems named by ``task_id`` (M,)."""
        states, width = self.observation_size, self.width
        replica = torch.arange(states * self.actions, device=task_id.device)
        drawn = noise_.uniform(0, task_id, replica, 0, 0, noise_.PRIOR, width + 1)
        drawn = drawn.view(len(task_id), states, self.actions, width + 1)
        transition = drawn.new_zeros(len(task_id), states, self.actions, states)
        transition[:, -1, :, -1] = 1
        for state in range(states - 1):
            layer = (state + width - 1) // width  # state 0 is step 0, the next `width` are step 1, ...
            if layer == self.horizon - 1:
                transition[:, state, :, -1] = 1
            else:
                following = slice(1 + width * layer, 1 + width * (layer + 1))
                weight = drawn[:, state, :, :width]
                transition[:, state, :, following] = weight / weight.sum(-1, keepdim=True)
        reward = drawn[..., width, None].expand_as(transition).clone()
        reward[:, -1] = 0
        start = drawn.new_zeros(len(task_id), states)
        start[:, 0] = 1
        return TabularTasks(task_id, transition, reward, start)

    def shifted(self) -> LayeredMDP:
        """The same problems: their prior has no parameter that could move."""
        return self

    context, reset, oracle_return = ShopMDP.context, ShopMDP.reset, ShopMDP.oracle_return

    def observe(self, tasks: TabularTasks, state: TabularState) -> Tensor:
        """(M, N, states): one-hot state, which tells the time too."""
        return one_hot(state.state, self.observation_size).to(tasks.start.dtype)

    def step(
        self, tasks: TabularTasks, state: TabularState, action: Tensor, noise: Tensor
    ) -> tuple[TabularState, Tensor, Tensor]:
        """One choice. ``action`` (M, N) int64."""
        task = torch.arange(len(tasks.id), device=action.device)[:, None].expand_as(action)
        following = noise_.inverse_transform(tasks.transition[task, state.state, action], noise[..., 0])
        reward = tasks.reward[task, state.state, action, following]
        time = state.time + 1
        return TabularState(following, time), reward, time >= self.horizon

    def blind_return(self, tasks: TabularTasks) -> Tensor:
        """(M,) of always taking action 0. The prior does not distinguish the actions: no other plan is better."""
        value = torch.zeros_like(tasks.start)
        for _ in range(self.horizon):
            value = action_value(tasks, value, 1.0)[..., 0]
        return value[:, 0]
