"""A policy with a memory, meta-trained from logged trials alone: no simulator is played and no hidden parameter read
(chapter "Memory and belief").

Three things may be imitated in the context of what the trial showed so far: the logged actions (algorithm distillation,
Laskin et al. 2022); the same, more where they turned out better than in the task's other trials (advantage-weighted
regression, Peng et al. 2019); or the action of an oracle that knows the task (decision pretraining, Lee et al. 2023).
The last needs a simulator, or someone who knew: it is here to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from ..families.base import TaskFamily, check, number, require, whole
from ..memories import KINDS
from ..rollout import Agent, trial
from ..trials import MemoryAgent, Step, TrialInput
from .adaptation import Inner
from .finite import check_finite
from .meta import MetaLearner, Seeds, adam_step, iteration_generator
from .rl2 import Teacher, annealed, clip_by_norm, memory_policy, trial_advantages

TARGETS = ("log", "advantage", "oracle")


class TrialLog(NamedTuple):
    """Trials of L steps that were played, R of each of M tasks side by side, with N units each."""

    observation: Tensor  # (L, M R, N, observation), before the step
    action: Tensor  # (L, M R, N, ...)
    reward: Tensor  # (L, M R, N)
    after: Tensor  # (L, M R, N, observation), what the step led to
    label: Tensor | None = None  # as ``action``: what an oracle would have done

    def part(self, index: Tensor) -> TrialLog:
        """The trials that ``index`` (B,) int64 numbers."""
        return TrialLog(*(None if x is None else x[:, index] for x in self))


def record_trials(
    family: TaskFamily,
    ids: Tensor,
    agent: Agent,
    episodes: int,
    units: int,
    replicas: int,
    seed: int,
    teacher: Teacher | None = None,
) -> TrialLog:
    """The log that ``agent`` leaves of R = ``replicas`` trials of each task in ``ids`` (M,), each with a luck of its
    own. A ``teacher`` (``rl2.Teacher``) adds labels, from the hidden parameters."""
    for name, value in (("units", units), ("replicas", replicas)):
        require(whole(value, 1), name, value, "a whole number >= 1")
    tasks = family.tasks(ids.repeat_interleave(replicas))
    keeping = _Keeping(agent)
    luck = seed + torch.arange(replicas, device=ids.device).repeat(len(ids))
    trial(family, tasks, keeping, episodes, units, luck, progress=False)
    log = TrialLog(*map(torch.stack, zip(*keeping.kept)))
    if teacher is None:
        return log
    decide = teacher(family, tasks)
    number_ = torch.arange(len(tasks.id), device=ids.device)
    return log._replace(label=torch.stack([decide(seen, number_) for seen in log.observation]))


class _Keeping:
    """Another agent, and what it saw, did and met."""

    def __init__(self, agent: Agent):
        self.agent, self.noise_size = agent, agent.noise_size
        self.end_episode = agent.end_episode

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        self.kept: list[tuple[Tensor, ...]] = []
        self.agent.begin(context, tasks, episodes)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        self.before = observation
        return self.agent.act(observation, noise)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        self.kept.append((self.before, action, reward, next_observation))
        self.agent.observe(action, reward, next_observation, done)


@dataclass(frozen=True)
class OfflineConfig:
    """What is imitated, and how the policy moves."""

    target: Literal["log", "advantage", "oracle"] = "advantage"
    """log: the logged actions. advantage: those, weighted. oracle: the log's labels."""
    temperature: float = 1.0
    """An action counts exp(advantage / temperature) times, where advantages have standard deviation 1."""
    most_weight: float = 20.0
    """But no more than this."""
    episodes: int = 5
    """E, episodes of a logged trial."""
    pooled: bool = True
    """Whether the units of a task share one memory."""
    memory: Literal["gru", "sum", "attention"] = "gru"
    """As in ``RL2Config``."""
    hidden: int = 64
    """Units of every layer."""
    by_action: bool = False
    """As in ``RL2Config``."""
    tasks: int = 16
    """Tasks of an iteration, drawn from the log without repetition."""
    replicas: int = 8
    """R, trials of each task in the log: the others are the baseline of each."""
    lr: float = 3e-3
    """Step size of Adam, at the start."""
    gae_lambda: float = 0.97
    """lambda of the advantages."""
    own_unit: float = 1.0
    """As in ``RL2Config``."""
    anneal: int | None = None
    """Iterations over which the step size falls to a fiftieth; None keeps it."""
    initial_std: float = 0.5
    """Standard deviation of real actions before training."""

    def __post_init__(self):
        check(self, "target", lambda x: isinstance(x, str) and x in TARGETS, f"one of {', '.join(TARGETS)}")
        check(self, "memory", lambda x: isinstance(x, str) and x in KINDS, f"one of {', '.join(KINDS)}")
        for name in ("episodes", "tasks", "replicas"):
            check(self, name, lambda x: whole(x, 1, 10**5), "a whole number from 1 to 100000")
        check(self, "hidden", lambda x: whole(x, 1, 4096), "a whole number from 1 to 4096")
        for name in ("pooled", "by_action"):
            check(self, name, lambda x: isinstance(x, bool), "True or False")
        for name in ("temperature", "lr", "initial_std"):
            check(self, name, lambda x: number(x, 0), "a finite number > 0")
        check(self, "most_weight", lambda x: number(x) and x >= 1, "a finite number >= 1")
        for name in ("gae_lambda", "own_unit"):
            check(self, name, lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")
        check(self, "anneal", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")
        enough = self.target != "advantage" or self.replicas > 1
        check(self, "replicas", lambda _: enough, "a whole number >= 2 with target = 'advantage'")


class Offline(MetaLearner):
    """Learns to adapt from logs. An iteration is one step of Adam on the trials of ``tasks`` tasks of the log.

    >>> log = record_trials(family, ids, Thompson(family), 5, 1, 8, seed=0)
    >>> learner = Offline(family, log, OfflineConfig(anneal=1000))
    >>> state = learner.meta_train(log, seed=0, iterations=1000)
    >>> trial(family, tasks, learner.agent(state.meta), 5, 1, seed=1)
    """

    name = "offline"
    inner = Inner(steps=0)
    batches_seeds = False

    def __init__(self, family: TaskFamily, log: TrialLog, config: OfflineConfig | None = None):
        """Of ``family`` only the shapes of observations and actions are used, and of ``log`` the size of its rewards,
        which sets the unit of what the memory is fed."""
        self.config = config or OfflineConfig()
        self.inputs = TrialInput(family, self.config.episodes, self.config.by_action)
        self.inputs.unit = log.reward.abs().mean() + 1e-9
        self.policy = memory_policy(self.inputs, self.config)
        self.outer = self

    def initial(self, generator: Generator) -> list[Tensor]:
        """The policy's."""
        return self.policy.initial(generator)

    def agent(self, parameters: list[Tensor], sample: bool = True) -> MemoryAgent:
        """The trained policy as an ``Agent``."""
        return MemoryAgent(self.policy, [p.detach() for p in parameters], self.inputs, sample)

    def memory_inputs(self, log: TrialLog) -> Tensor:
        """(L, M R, N, rows * size): what the memory would have been fed in the logged trials."""
        found, last = [], None
        for number_, (seen, action, reward, after) in enumerate(zip(*log[:4])):
            found.append(self.inputs(seen, last, number_))
            last = Step(action, reward, after)
        return torch.stack(found)

    def objective(self, source: TrialLog, meta: list[Tensor], seed: Seeds, iteration: int) -> LoggedBatch:
        """Draw trials from the log ``source``."""
        c = self.config
        trials = source.action.shape[1]
        whole_tasks = trials % c.replicas == 0 and len(source.action) == self.inputs.length
        shape = f"(L, M R, ...) with L = {self.inputs.length} and R = {c.replicas}"
        require(whole_tasks, "source.action.shape", tuple(source.action.shape), shape)
        if c.target == "oracle":
            require(source.label is not None, "source.label", None, "labels with target = 'oracle'")
        chosen = torch.randperm(trials // c.replicas, generator=iteration_generator(seed, iteration))[: c.tasks]
        index = (chosen[:, None] * c.replicas + torch.arange(c.replicas)).flatten().to(source.action.device)
        part = source.part(index)
        return LoggedBatch(part, self.memory_inputs(part), iteration)

    def update(self, objective: LoggedBatch, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``meta.OuterStep.update``: a step of (weighted) imitation."""
        c = self.config
        left = annealed(objective.iteration, c.anneal)
        leaves = [p.detach().requires_grad_() for p in meta]
        loss, logged = self.loss(leaves, objective)
        gradient = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
        check_finite("gradient", gradient, tasks=False)
        meta, memory = adam_step(meta, clip_by_norm(gradient, 0.5), c.lr * left, memory)
        return meta, memory, logged

    def loss(self, parameters: list[Tensor], batch: LoggedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean weighted surprise, equation (eq-distillation), and with weights the error of the values that they are
        made with."""
        c, policy, log = self.config, self.policy, batch.log
        action = log.label if c.target == "oracle" else log.action
        output, value = policy.network.outputs_and_values(policy._weights(parameters), batch.inputs)
        surprise = -policy._log_prob(policy._named(output, parameters, action), action)
        logged = {"surprise": surprise.mean().detach()}
        if c.target != "advantage":
            return surprise.mean(), logged
        advantage, target = trial_advantages(log.reward, value.detach(), c.replicas, c.pooled, c.gae_lambda, c.own_unit)
        weight = (advantage / c.temperature).exp().clamp(max=c.most_weight)
        weight = weight / weight.mean()
        missed = ((value - target) ** 2).mean()
        logged["share of the weights"] = (1 / weight.square().mean()).detach()  # that of the trials that count
        return (weight * surprise).mean() + 0.5 * missed, logged


class LoggedBatch(NamedTuple):
    """The trials of an iteration, and what a memory would have been fed in them."""

    log: TrialLog
    inputs: Tensor  # (L, M R, N, rows * size)
    iteration: int
