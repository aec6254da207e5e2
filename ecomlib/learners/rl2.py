"""RL^2 (Duan et al. 2016): a policy with a memory, trained by PPO over whole trials, so that what it learns is how to
learn: what to find out, and how to use it (chapter "Memory and belief")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from ..families.base import TaskFamily, check, number, require, whole
from ..memories import KINDS, memory_network
from ..policies import Categorical, Gaussian, PlackettLuce, Policy
from ..returns import gae
from ..rollout import trial
from ..trials import MemoryAgent, Recorded, TrialInput
from .adaptation import Inner
from .finite import check_finite
from .meta import MetaLearner, Seeds, adam_step, iteration_generator
from .ppo import clipped_gain


@dataclass(frozen=True)
class RL2Config:
    """What an iteration plays, and how the policy moves."""

    episodes: int = 5
    """E, episodes of a trial; the memory lasts through all of them."""
    units: int = 1
    """N, parallel units of a task."""
    pooled: bool = True
    """Whether the units of a task share one memory."""
    memory: Literal["gru", "sum", "attention"] = "gru"
    """gru: recurrent, as in the paper. sum: sums of what was met, for tasks that do not change. attention: looks back
    at every step."""
    hidden: int = 64
    """Units of every layer."""
    by_action: bool = False
    """One network for all numbered actions, each with a memory of its own: for actions without an order (arms)."""
    tasks: int = 64
    """Tasks of an iteration."""
    replicas: int = 8
    """Trials of each task. The others are the baseline of each: without one that knows the task, the differences
    between tasks drown those between actions."""
    lr: float = 5e-3
    """Step size of Adam, at the start."""
    epochs: int = 3
    """Passes over the trials of an iteration."""
    minibatches: int = 4
    """Steps of a pass, each on a share of the trials."""
    clip: float = 0.2
    """How far a likelihood ratio counts, on either side of 1."""
    entropy: float = 0.02
    """Reward for being undecided, at the start."""
    gae_lambda: float = 0.97
    """lambda of the advantages; the discount is 1, because a trial has an end."""
    own_unit: float = 1.0
    """1 divides rewards by each task's own spread, 0 by that of all tasks; between, by a geometric mean."""
    anneal: int | None = None
    """Iterations over which step size and entropy fall to a fiftieth; None keeps them."""
    initial_std: float = 0.5
    """Standard deviation of real actions before training."""
    pretrain: int = 0
    """Iterations that imitate a teacher who knows the task, before those of PPO."""
    sample: bool = True
    """In use, act at random as in training; False takes the most likely action (of slates the most likely items, of
    real actions the mean)."""

    def __post_init__(self):
        for name in ("episodes", "units", "tasks", "epochs", "minibatches"):
            check(self, name, lambda x: whole(x, 1, 10**5), "a whole number from 1 to 100000")
        check(self, "hidden", lambda x: whole(x, 1, 4096), "a whole number from 1 to 4096")
        check(self, "replicas", lambda x: whole(x, 2, 10**5), "a whole number from 2 to 100000")
        check(self, "memory", lambda x: isinstance(x, str) and x in KINDS, f"one of {', '.join(KINDS)}")
        for name in ("pooled", "by_action", "sample"):
            check(self, name, lambda x: isinstance(x, bool), "True or False")
        for name in ("lr", "initial_std"):
            check(self, name, lambda x: number(x, 0), "a finite number > 0")
        check(self, "clip", lambda x: number(x, 0, 1), "a number in (0, 1)")
        check(self, "entropy", lambda x: number(x) and x >= 0, "a finite number >= 0")
        for name in ("gae_lambda", "own_unit"):
            check(self, name, lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")
        check(self, "pretrain", lambda x: whole(x, 0), "a whole number >= 0")
        check(self, "anneal", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")
        most = self.tasks * self.replicas
        check(self, "minibatches", lambda x: x <= most, f"a whole number from 1 to tasks * replicas = {most}")


Teacher = Callable[[TaskFamily, Any], Callable[[Tensor, Tensor], Tensor]]
"""(family, tasks) -> (observation (B, N, observation), number of the task (B,)) -> actions (B, N, ...)."""


class RL2(MetaLearner):
    """A policy that adapts by what it remembers of a trial. Nothing about it is told which task it is.

    >>> learner = RL2(LogitPricing(), RL2Config(anneal=300))
    >>> state = learner.meta_train(LogitPricing(), seed=0, iterations=300)
    >>> played = trial(family, tasks, learner.agent(state.meta), episodes_per_trial=5, replicas=1, seed=1)
    """

    name = "RL2"
    inner = Inner(steps=0)
    batches_seeds = False

    def __init__(self, family: TaskFamily, config: RL2Config | None = None, teacher: Teacher | None = None):
        """``teacher`` is needed for ``pretrain``: (family, tasks) -> what to do if they were known
        (``baselines.oracle.oracle_decisions``)."""
        self.config, self.teacher = config or RL2Config(), teacher
        require(self.config.pretrain == 0 or teacher is not None, "pretrain", self.config.pretrain, "0 without teacher")
        self.inputs = TrialInput(family, self.config.episodes, self.config.by_action)
        self.policy = memory_policy(self.inputs, self.config)
        self.outer = self

    def initial(self, generator: Generator) -> list[Tensor]:
        """The policy's."""
        return self.policy.initial(generator)

    def agent(self, parameters: list[Tensor], sample: bool | None = None, record: bool = False) -> MemoryAgent:
        """The trained policy as an ``Agent``, for ``rollout.trial`` and everything that compares agents. ``sample``
        None is as configured."""
        sample = self.config.sample if sample is None else sample
        return MemoryAgent(self.policy, [p.detach() for p in parameters], self.inputs, sample, record)

    def tasks_of(self, iteration: int) -> int:
        """Tasks of an iteration, of all processes together."""
        teaching = iteration < self.config.pretrain
        return self.config.tasks * (self.config.replicas if teaching else 1)

    def play(
        self, family: TaskFamily, parameters: list[Tensor], ids: Tensor, seed: int, replicas: int
    ) -> tuple[Recorded, Tensor]:
        """R = ``replicas`` trials of each task in ``ids`` (M,): what was met, (L, M R, N, ...), and rewards
        (L, M R, N).

        A task's replicas lie side by side, and each has a luck of its own.
        """
        c, tasks = self.config, family.tasks(ids.repeat_interleave(replicas))
        luck = seed + torch.arange(replicas, device=ids.device).repeat(len(ids))
        agent = self.agent(parameters, True, record=True)
        played = trial(family, tasks, agent, c.episodes, c.units, luck, progress=False)
        return agent.recorded, played.reward.flatten(0, 1)

    def objective(self, source: TaskFamily, meta: list[Tensor], seed: Seeds, iteration: int) -> TrialBatch:
        """Draw tasks and play their trials."""
        c, teaching = self.config, iteration < self.config.pretrain
        # A teacher needs no baseline: each of its trials may be of another task.
        replicas = 1 if teaching else c.replicas
        ids, _ = self.draw(self.tasks_of(iteration), seed, iteration, meta[0].device)
        generator = iteration_generator(seed, iteration)
        luck = (seed * 1_000_003 + iteration) * c.replicas  # and the numbers up to the next iteration's
        recorded, reward = self.play(source, meta, ids, luck, replicas)
        taught = None
        if teaching:
            decide, task = self.teacher(source, source.tasks(ids)), torch.arange(len(ids), device=ids.device)
            taught = torch.stack([decide(seen, task) for seen in recorded.observation])
        return TrialBatch(recorded, reward, taught, generator, iteration)

    def update(self, objective: TrialBatch, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``meta.OuterStep.update``: PPO on the trials of an iteration."""
        c, (inputs, action, old, _) = self.config, objective.recorded
        left = annealed(objective.iteration, c.anneal)
        if objective.taught is not None:
            loss_of, data = self._surprise, (inputs, objective.taught)
        else:
            with torch.no_grad():
                _, value = self.policy.network.outputs_and_values(self.policy._weights(meta), inputs)
                advantages = trial_advantages(objective.reward, value, c.replicas, c.pooled, c.gae_lambda, c.own_unit)
            loss_of, data = partial(self._ppo, entropy=c.entropy * left), (inputs, action, old, *advantages)
        logged = {"return after 0 steps": objective.reward.sum(0).mean() / c.episodes}
        for _ in range(c.epochs):
            order = torch.randperm(inputs.shape[1], generator=objective.generator).to(inputs.device)
            for part in order.chunk(c.minibatches):
                leaves = [p.detach().requires_grad_() for p in meta]
                loss, numbers = loss_of(leaves, *(x[:, part] for x in data))
                gradient = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
                gradient = self.shards.average(gradient) if self.shards.size > 1 else gradient
                check_finite("gradient", gradient, tasks=False)
                meta, memory = adam_step(meta, clip_by_norm(gradient, 0.5), c.lr * left, memory)
        logged |= numbers
        if self.shards.size > 1:
            logged = dict(zip(logged, self.shards.average(list(logged.values()))))
        return meta, memory, logged

    def _surprise(self, parameters: list[Tensor], inputs: Tensor, taught: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        policy = self.policy
        output, _ = policy.network.outputs_and_values(policy._weights(parameters), inputs)
        named = policy._named(output, parameters, taught)
        surprise = -policy._log_prob(named, taught).mean()
        return surprise, {"entropy": policy.entropy(named).mean().detach(), "surprise": surprise.detach()}

    def _ppo(
        self,
        parameters: list[Tensor],
        inputs: Tensor,
        action: Tensor,
        old: Tensor,
        advantage: Tensor,
        target: Tensor,
        entropy: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        c, policy = self.config, self.policy
        output, value = policy.network.outputs_and_values(policy._weights(parameters), inputs)
        named = policy._named(output, parameters, action)
        missed = ((value - target) ** 2).mean()
        ratio = (policy._log_prob(named, action) - old).exp()
        gain = clipped_gain(ratio, advantage, c.clip).mean()
        undecided = policy.entropy(named).mean()
        numbers = {"entropy": undecided.detach(), "value error": missed.detach()}
        return -gain - entropy * undecided + 0.5 * missed, numbers


class TrialBatch(NamedTuple):
    """The trials of an iteration."""

    recorded: Recorded
    reward: Tensor  # (L, M R, N)
    taught: Tensor | None  # as the actions: what a teacher would have done
    generator: Generator
    iteration: int


def annealed(iteration: int, over: int | None) -> float:
    """What is left of a step size: falls from 1 to a fiftieth ``over`` so many iterations; None keeps it."""
    return 1.0 if over is None else max(0.02, 1 - iteration / over)


def memory_policy(inputs: TrialInput, config: RL2Config, network: Any = None) -> Policy:
    """A policy with the memory that ``config`` names, or another ``network``: softmax for numbered actions,
    Plackett-Luce for slates, else Gaussian."""
    family = inputs.family
    if network is None:
        network = memory_network(config.memory, hidden=config.hidden, pooled=config.pooled, **inputs.sizes)
    if getattr(family, "slate", None):
        return PlackettLuce(network, family.items, family.slate)
    return Categorical(network) if family.actions else Gaussian(network, initial_std=config.initial_std)


def trial_advantages(
    reward: Tensor, value: Tensor, replicas: int, pooled: bool, gae_lambda: float, own_unit: float
) -> tuple[Tensor, Tensor]:
    """Advantages (L, M R, N) and what the values should have been, of R trials of each of M tasks, side by side.

    Rewards are first centred by those of the task's other trials at the same step and brought to a unit: the spread of
    the task's centred rewards. With ``pooled`` units an action counts with its own unit's reward now and with those of
    all units later, because all learn from it. Generalised advantage estimates (equation (eq-gae)) of what is left.
    """
    length, _, units = reward.shape
    grouped = reward.unflatten(1, (-1, replicas))  # (L, M, R, N)
    earned = grouped.mean(-1, keepdim=True) if pooled else grouped
    others = earned.sum((2, 3), keepdim=True)
    count = earned.shape[2] * earned.shape[3]
    mean = (others - earned) / (count - 1)
    centred = earned - mean
    spread = centred.square().mean((0, 2, 3), keepdim=True).sqrt()
    spread = spread.clamp(min=1e-6 * spread.max().clamp(min=1e-9))
    scale = spread**own_unit * spread.square().mean().sqrt() ** (1 - own_unit)
    now = (centred / scale).flatten(1, 2)
    unit = length**0.5  # values are guessed in a unit that keeps them near 1
    guess = (value.mean(-1, keepdim=True) if pooled else value) * unit
    advantage = gae(now, guess, torch.ones_like(now), 1.0, gae_lambda)
    target = ((advantage + guess) / unit).expand_as(value)
    if pooled and units > 1:
        own = ((grouped - mean) / scale).flatten(1, 2) / units
        advantage = advantage - now + own
    advantage = advantage.expand(length, -1, units)
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8), target


def clip_by_norm(gradient: Sequence[Tensor], most: float) -> list[Tensor]:
    """The same gradient, shortened where it is longer than ``most``."""
    require(number(most, 0), "most", most, "a finite number > 0")
    norm = torch.nn.utils.get_total_norm(gradient)
    return [g * (most / norm.clamp(min=most)) for g in gradient]
