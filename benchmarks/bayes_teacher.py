"""Learners with a memory whose first iterations imitate a Bayesian: the memory starts as an approximation of Bayes'
rule, before PPO improves what is done with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ecomlib.baselines import BayesUCB, GreedyBayes
from ecomlib.families.base import TaskFamily
from ecomlib.learners.belief import BeliefLearner
from ecomlib.learners.meta import iteration_generator
from ecomlib.learners.rl2 import RL2, RL2Config, TrialBatch
from ecomlib.rollout import Agent, trial

EXPERTS = {
    "greedy Bayes": lambda family: GreedyBayes(family, 512, stores=True),
    "Bayes-UCB": lambda family: BayesUCB(family, 1024, stores=True, width=1.0),
}
"""Who is imitated, with the prior of training."""


class _Taught(RL2):
    """Plays its own trials, and for ``pretrain`` iterations learns what the expert would have done in each of its steps
    after the same history (imitation on the learner's own states: Ross, Gordon and Bagnell 2011)."""

    def __init__(self, family: TaskFamily, config: RL2Config, expert: str, ppo_lr: float | None = None):
        """``ppo_lr``: PPO's step size, if another than that of imitation, at the start of training (both fall)."""
        super().__init__(family, config, lambda *_: None)  # the expert sees histories, not tasks
        self.expert = EXPERTS[expert](family)
        self.imitating, self.improving = config, replace(config, lr=ppo_lr or config.lr)

    def objective(self, source: TaskFamily, meta: list[Tensor], seed: Any, iteration: int) -> TrialBatch:
        """As ``RL2.objective``."""
        c = self.config
        if iteration >= c.pretrain:
            return super().objective(source, meta, seed, iteration)
        ids, _ = self.draw(self.tasks_of(iteration), seed, iteration, meta[0].device)
        agent = self.agent(meta, True, record=True)
        watched = Watched(agent, self.expert)
        luck = (seed * 1_000_003 + iteration) * c.replicas
        done = trial(source, source.tasks(ids), watched, c.episodes, c.units, luck, progress=False)
        generator = iteration_generator(seed, iteration)
        return TrialBatch(agent.recorded, done.reward.flatten(0, 1), torch.stack(watched.labels), generator, iteration)

    def update(self, objective: TrialBatch, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``RL2.update``."""
        self.config = self.improving if objective.taught is None else self.imitating
        return super().update(objective, meta, memory)


class TaughtByBayes(_Taught):
    """RL^2 with an expert."""


class BeliefTaughtByBayes(_Taught, BeliefLearner):
    """A policy that reads a learned belief, with an expert. ``ppo_lr`` is not used."""


class Watched:
    """One agent decides; another sees what it saw and did, and says what it would have done."""

    def __init__(self, agent: Agent, expert: Agent):
        self.agent, self.expert, self.noise_size = agent, expert, agent.noise_size

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Both begin."""
        self.labels: list[Tensor] = []
        for one in (self.agent, self.expert):
            one.begin(context, tasks, episodes)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The agent's action."""
        self.labels.append(self.expert.act(observation, noise[..., : self.expert.noise_size]))
        return self.agent.act(observation, noise)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Both learn from the agent's action."""
        for one in (self.agent, self.expert):
            one.observe(action, reward, next_observation, done)

    def end_episode(self) -> None:
        """Both are told."""
        for one in (self.agent, self.expert):
            one.end_episode()
