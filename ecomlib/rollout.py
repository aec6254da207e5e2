"""Family x policy -> trajectories; family x adaptive agent -> a trial. No Python loop over tasks or episodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from . import noise as noise_
from .families.base import TaskFamily, require, take, whole
from .policies import Policy


class Trajectories(NamedTuple):
    """What one policy met in N episodes of each of M tasks, time-major."""

    observation: Tensor  # (T, M, N, observation)
    action: Tensor  # (T, M, N)
    log_prob: Tensor  # (T, M, N), of the policy that acted
    reward: Tensor  # (T, M, N)
    mask: Tensor  # (T, M, N), 1 while the episode lasts, 0 after its end

    @property
    def returns(self) -> Tensor:
        """(M, N) undiscounted return of each episode."""
        return (self.reward * self.mask).sum(0)


class Trial(NamedTuple):
    """What an adaptive agent met in E consecutive episodes of each of M tasks, in N independent replicas."""

    reward: Tensor  # (E, T, M, N)
    action: Tensor  # (E, T, M, N), or (E, T, M, N, D) where an action is a vector or a slate

    @property
    def returns(self) -> Tensor:
        """(E, M, N) undiscounted return of each episode."""
        return self.reward.sum(1)


class Agent(Protocol):
    """A decision maker that adapts within a trial, classical or meta-learned. Memory lives between begin and the next
    begin."""

    noise_size: int
    """Uniforms that one decision consumes (at least 1)."""

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Forget everything: M new tasks in N replicas, of which only ``context`` (M, C) is known."""

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (M, N) for observations (M, N, observation); ``noise`` (M, N, noise_size) are uniforms."""

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """What the action led to."""

    def end_episode(self) -> None:
        """The episode is over; the next one is of the same task."""


def rollout(
    family: TaskFamily,
    tasks: Any,
    policy: Policy,
    parameters: list[Tensor],
    episodes: int,
    seed: int | Tensor,
    episode: int = 0,
) -> Trajectories:
    """N episodes of every task under one policy, without gradient.

    ``seed`` names the experiment and ``episode`` the round within it: the pair, with each task's id, fixes all luck.
    Tasks of several experiments may share a batch: ``seed`` is then (M,), one of each task, as its parameters are.
    Rewards after the end of an episode are masked, and its observations are kept as they are.
    """
    require(whole(episodes, 1), "episodes", episodes, "a whole number >= 1")
    replica = torch.arange(episodes, device=tasks.id.device)

    def draw(time: int, stream: int, size: int) -> Tensor:
        return noise_.uniform(seed, tasks.id, replica, episode, time, stream, size)

    with torch.no_grad():
        state = family.reset(tasks, episodes, draw(family.horizon, noise_.FAMILY, family.noise_size))
        alive, steps = torch.ones(len(tasks.id), episodes, device=tasks.id.device), []
        memory = None
        for time in range(family.horizon):
            observation = family.observe(tasks, state)
            luck = draw(time, noise_.POLICY, policy.noise_size)
            action, log_prob, memory = policy.act(parameters, observation, luck, memory)
            state, reward, done = family.step(tasks, state, action, draw(time, noise_.FAMILY, family.noise_size))
            steps.append((observation, action, log_prob, reward * alive, alive))
            alive = alive * ~done
    return Trajectories(*map(torch.stack, zip(*steps)))


def rollout_transitions(
    family: TaskFamily,
    tasks: Any,
    policy: Policy,
    parameters: list[Tensor],
    transitions: int,
    seed: int | Tensor,
    episode: int = 0,
) -> Trajectories:
    """Whole episodes of every task until it has at least ``transitions`` steps, without gradient.

    The rule of rllab (Duan et al. 2016), where a batch is counted in transitions: where episodes get shorter as a
    policy learns, a task gets more of them. Episodes count in the order of their replica number, and are those of
    ``rollout`` with the same numbers (counting whichever ends first would prefer short ones); the first that reaches
    the budget is the last. N is the largest number that any task needs: the spare episodes of the others have ``mask``
    and ``reward`` 0 throughout, so an episode counts where ``mask[0]`` is 1. What a policy saw and did where ``mask``
    is 0 is not kept. ``parameters`` with three axes are one per task, with two shared.
    """
    require(whole(transitions, 1), "transitions", transitions, "a whole number >= 1")
    count, device = len(tasks.id), tasks.id.device
    short = torch.arange(count, device=device)  # tasks below the budget
    total, episodes, block, blocks = torch.zeros(count, device=device), 0, math.ceil(transitions / family.horizon), []
    while len(short):
        own = [p[short] if p.dim() > 2 else p for p in parameters]
        luck = seed[short] if isinstance(seed, Tensor) and seed.dim() else seed
        data = _rollout_compacted(
            family, take(tasks, short), policy, own, range(episodes, episodes + block), luck, episode
        )
        blocks.append([x.new_zeros(len(x), count, *x.shape[2:]).index_copy_(1, short, x) for x in data])
        total[short] += data.mask.sum((0, 2)).to(total)
        episodes += block
        short = (total < transitions).nonzero()[:, 0]
        if len(short):  # as many more as the task that needs most has to play, judged by its episodes so far
            block = math.ceil(1.05 * ((transitions - total) * episodes / total)[short].max().item())
    data = Trajectories(*(torch.cat(fields, 2) for fields in zip(*blocks)))
    length = data.mask.sum(0)
    counts = (length.cumsum(-1) - length < transitions) * data.mask[0]
    used = int(counts.sum(-1).max().item())
    data = data._replace(mask=data.mask * counts, reward=data.reward * counts)
    return Trajectories(*(x[:, :, :used] for x in data))


def _rollout_compacted(
    family: TaskFamily,
    tasks: Any,
    policy: Policy,
    parameters: list[Tensor],
    replicas: range,
    seed: int | Tensor,
    episode: int,
    every: int = 8,
) -> Trajectories:
    """What ``rollout`` plays with these replica numbers, less what comes after an episode's end: every few steps the
    episodes that still last are moved together, and only those are played on."""
    device, count = tasks.id.device, len(tasks.id)
    row = torch.arange(count, device=device)[:, None]
    column = torch.arange(len(replicas), device=device).expand(count, -1)  # where each episode being played is stored

    def draw(time: int | Tensor, stream: int, size: int) -> Tensor:
        return noise_.uniform(seed, tasks.id, column + replicas.start, episode, time, stream, size)

    kept: Trajectories | None = None
    with torch.no_grad():
        state = family.reset(tasks, len(replicas), draw(family.horizon, noise_.FAMILY, family.noise_size))
        alive, memory = torch.ones(count, len(replicas), device=device), None
        for time in range(family.horizon):
            if time % every == 0:
                lasting = int(alive.sum(-1).max().item())
                if lasting == 0:
                    break
                if lasting < alive.shape[1]:
                    chosen = row, alive.argsort(dim=1, descending=True, stable=True)[:, :lasting]
                    state = type(state)(*(x[chosen] for x in state))
                    alive, column, memory = (None if x is None else x[chosen] for x in (alive, column, memory))
                times = torch.arange(time, time + every, device=device)
                choice = torch.vmap(lambda t: draw(t, noise_.POLICY, policy.noise_size))(times)
                chance = torch.vmap(lambda t: draw(t, noise_.FAMILY, family.noise_size))(times)
            observation = family.observe(tasks, state)
            action, log_prob, memory = policy.act(parameters, observation, choice[time % every], memory)
            state, reward, done = family.step(tasks, state, action, chance[time % every])
            step = Trajectories(observation, action, log_prob, reward * alive, alive)
            if kept is None:
                shape = (family.horizon, count, len(replicas))
                kept = Trajectories(*(x.new_zeros(*shape, *x.shape[2:]) for x in step))
            for all_steps, now in zip(kept, step):
                all_steps[time, row, column] = now
            alive = alive * ~done
    return kept


def trial(
    family: TaskFamily,
    tasks: Any,
    agent: Agent,
    episodes_per_trial: int,
    replicas: int,
    seed: int,
    progress: bool = True,
    drift: Callable[[int], Any] | None = None,
) -> Trial:
    """E consecutive episodes of every task, in N independent replicas, under an agent that learns as it goes.

    Two agents with the same seed meet the same luck: on the same day of the same replica, the same uniform decides.
    ``drift``: episode -> what the tasks are in it, where hidden parameters move between episodes (the same ids and
    contexts as ``tasks``).
    """
    for name, value in (("episodes_per_trial", episodes_per_trial), ("replicas", replicas)):
        require(whole(value, 1), name, value, "a whole number >= 1")
    replica = torch.arange(replicas, device=tasks.id.device)
    rewards, actions = [], []
    with torch.no_grad():
        agent.begin(family.context(tasks), len(tasks.id), replicas)
        for episode in tqdm(range(episodes_per_trial), desc=type(agent).__name__, unit="episode", disable=not progress):

            def draw(time: int, stream: int, size: int, episode: int = episode) -> Tensor:
                return noise_.uniform(seed, tasks.id, replica, episode, time, stream, size)

            now = tasks if drift is None else drift(episode)
            state = family.reset(now, replicas, draw(family.horizon, noise_.FAMILY, family.noise_size))
            observation, alive = family.observe(now, state), True
            for time in range(family.horizon):
                action = agent.act(observation, draw(time, noise_.AGENT, agent.noise_size))
                state, reward, done = family.step(now, state, action, draw(time, noise_.FAMILY, family.noise_size))
                observation, reward = family.observe(now, state), reward * alive
                agent.observe(action, reward, observation, done)
                rewards.append(reward)
                actions.append(action)
                alive = alive * ~done
            agent.end_episode()
    shape = (episodes_per_trial, family.horizon, len(tasks.id), replicas)
    return Trial(torch.stack(rewards).view(shape), torch.stack(actions).view(*shape, *actions[0].shape[2:]))
