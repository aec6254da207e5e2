"""A policy with a memory as an adaptive agent: what it is fed at every step of a trial, and how it plays one (chapter
"Memory and belief")."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .families.base import TaskFamily, require, whole
from .policies import Policy


class TrialInput:
    """What a memory network is fed at every step: what is seen now, the last action, what it earned and led to, and how
    much of the trial is over.

    Logarithms of observations and rewards stand beside (or in place of) them: units sold and money differ a hundredfold
    from task to task. ``rows`` says how the entries are laid out for ``memories.Memory``: one row; one for each action
    (``by_action``, for actions that are alike but for what they have shown: arms of a bandit); one for each segment of
    a campaign; or one for each item of a slate.
    """

    def __init__(self, family: TaskFamily, episodes: int, by_action: bool = False):
        """``episodes`` of a trial, E. ``ValueError`` for ``by_action`` where actions are not numbered."""
        require(whole(episodes, 1), "episodes", episodes, "a whole number >= 1")
        require(not by_action or family.actions > 0, "by_action", by_action, "False where actions are not numbered")
        self.family, self.episodes, self.by_action = family, episodes, by_action
        self.length = episodes * family.horizon
        self.items = family.items if getattr(family, "slate", None) else 0
        self.blocks = getattr(family, "blocks", None) or (0, 0)
        self.rows, self.outputs = self.items or (self.blocks[1] and self._segments) or 1, 1
        seen = family.observation_size
        if by_action:
            self.rows, self.size = family.actions, 5 + 2 * seen
        elif self.items:
            self.size = 3 + 2 * (seen // self.items)
        elif self.blocks[1]:
            self.size = 4 + sum(self.blocks) + self.blocks[1]
        else:
            action = family.actions or getattr(family, "action_size", 1)
            self.outputs = action
            self.size = 3 + 4 * seen + action * (3 if family.actions else 1)

    @cached_property
    def unit(self) -> Tensor:
        """() what a step earns about: mean absolute return of the blind policy, by step. Rewards are divided by it."""
        family, count = self.family, 256
        sample = family.prior_sample(count) if hasattr(family, "prior_sample") else family.tasks(torch.arange(count))
        return family.blind_return(sample).abs().mean() / family.horizon + 1e-9

    @property
    def sizes(self) -> dict[str, int]:
        """What a ``memories.Memory`` has to know of it."""
        return {"size": self.size, "rows": self.rows, "outputs": self.outputs}

    @property
    def _segments(self) -> int:
        return (self.family.observation_size - self.blocks[0]) // self.blocks[1]

    def __call__(self, observation: Tensor, last: Step | None, number: int) -> Tensor:
        """(task, unit, rows * size) from what is seen now, (task, unit, observation), the last step of the trial, None
        before the first, and the number of steps so far."""
        now = observation
        if last is None:
            action = torch.zeros(now.shape[:2], dtype=torch.int64, device=now.device)
            last = Step(action, torch.zeros_like(now[..., 0]), torch.zeros_like(now))
        last = last._replace(reward=last.reward / self.unit.to(last.reward))
        first = 0.0 if number == 0 else 1.0  # whether there was a step
        start = float(number % self.family.horizon == 0)  # of an episode
        ones = torch.ones_like(last.reward)
        common = torch.stack((logarithm(last.reward), ones * start, ones * (number / self.length)), -1)
        if self.by_action:
            chosen = torch.nn.functional.one_hot(last.action, self.rows).to(now)[..., None] * first
            earned = chosen * logarithm(last.reward)[..., None, None]
            both = torch.cat((common, now, last.after), -1)[..., None, :].expand(*chosen.shape[:-1], -1)
            rows = torch.cat((chosen, earned, both), -1)
        elif self.items:
            own = torch.cat((now.unflatten(-1, (self.items, -1)), last.after.unflatten(-1, (self.items, -1))), -1)
            rows = torch.cat((own, common[..., None, :].expand(*own.shape[:-1], -1)), -1)
        elif self.blocks[1]:
            rows = self._segment_rows(now, last, common, first)
        else:
            return torch.cat((common, _with_logarithm(now), _with_logarithm(last.after), self._coded(last, first)), -1)
        return rows.flatten(-2)

    def _coded(self, last: Step, first: float) -> Tensor:
        """The last action: as one of the numbered ones, and the same times what it earned; or as it is."""
        if not self.family.actions:
            action = last.action if last.action.dim() > 2 else last.action[..., None]
            return action.to(last.reward) * first if first else last.reward.new_zeros(*last.reward.shape, self.outputs)
        chosen = torch.nn.functional.one_hot(last.action, self.outputs).to(last.reward) * first
        earned = last.reward[..., None]
        return torch.cat((chosen, chosen * earned, chosen * logarithm(earned)), -1)

    def _segment_rows(self, now: Tensor, last: Step, common: Tensor, first: float) -> Tensor:
        shared, own = self.blocks
        split = lambda x: x[..., shared:].unflatten(-1, (own, self.rows)).transpose(-1, -2)
        every = torch.cat((common, now[..., :shared]), -1)[..., None, :].expand(*now.shape[:-1], self.rows, -1)
        bid = last.action[..., None].to(now) if first else torch.zeros_like(every[..., :1])
        return torch.cat((every, bid, split(now), split(last.after)), -1)


class Step(NamedTuple):
    """A step of a trial, as the merchant knows it."""

    action: Tensor  # (task, unit, ...)
    reward: Tensor  # (task, unit)
    after: Tensor  # (task, unit, observation), what it led to


class Recorded(NamedTuple):
    """What a policy met in a trial of L steps: what it learns from."""

    inputs: Tensor  # (L, M, N, rows * size)
    action: Tensor  # (L, M, N, ...)
    log_prob: Tensor  # (L, M, N)
    observation: Tensor  # (L, M, N, observation), a part of the inputs


class MemoryAgent:
    """A policy with a memory network as an ``Agent``: it adapts by what it remembers; its parameters stay.

    ``sample`` False takes the most likely action (the mean of a Gaussian) in place of a random one. ``record`` keeps
    what ``recorded`` returns.
    """

    def __init__(
        self,
        policy: Policy,
        parameters: list[Tensor],
        inputs: TrialInput,
        sample: bool = True,
        record: bool = False,
    ):
        self.policy, self.parameters, self.inputs = policy, parameters, inputs
        self.sample, self.record, self.noise_size = sample, record, policy.noise_size

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Forget everything."""
        self.memory, self.last, self.number = None, None, 0
        self.kept: list[tuple[Tensor, ...]] = []

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (M, N, ...) for observations (M, N, observation)."""
        network, seen = self.policy.network, self.inputs(observation, self.last, self.number)
        memory = network.begin(seen) if self.memory is None else self.memory
        output, self.memory = network.step(self.policy._weights(self.parameters), seen, memory)
        named = self.policy._named(output, self.parameters, None)
        action, log_prob = self.policy._draw(named, noise) if self.sample else (self.policy.mode(named), None)
        if self.record:
            self.kept.append((seen, action, log_prob, observation))
        return action

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Remember the step for the next decision."""
        self.last, self.number = Step(action, reward, next_observation), self.number + 1

    def end_episode(self) -> None:
        """Nothing to do: the memory carries over."""

    @property
    def recorded(self) -> Recorded:
        """What was met since ``begin``."""
        return Recorded(*map(torch.stack, zip(*self.kept)))


def logarithm(x: Tensor) -> Tensor:
    """``sign(x) log(1 + 100 abs(x)) / 5``, (...): straight below 0.01, 0.9 at 1, 0.46 more for every factor of 10."""
    return x.sign() * torch.log1p(100 * x.abs()) / 5


def _with_logarithm(x: Tensor) -> Tensor:
    return torch.cat((x, logarithm(x)), -1)
