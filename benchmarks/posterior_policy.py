"""How much more than Bayes' rule can be had from the exact posterior: a Bayesian index rule whose optimism is learned.

The posterior is that of a Bayesian with the prior of training; nothing about inference is learned. What is learned is
how many posterior standard deviations to add to the means, as a function of how much of the trial is left, of how
uncertain the best value is, and of where an action stands: greedy Bayes and Bayes-UCB are two such rules. It shows
whether there is room above them, which a learned memory could use only if it knew as much as the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from ecomlib.baselines.bayes import Belief, belief
from ecomlib.families.base import TaskFamily, check, number, whole
from ecomlib.learners.meta import iteration_generator
from ecomlib.rollout import trial

FEATURES = 6


@dataclass(frozen=True)
class PosteriorConfig:
    """The search for a rule, by the cross-entropy method (Rubinstein 1999)."""

    episodes: int = 5
    """E, episodes of a trial."""
    width: float = 0.0
    """Standard deviations that the first rule adds, everywhere: 0 is greedy Bayes."""
    spread: float = 0.5
    """Standard deviation of the rules tried first, around it."""
    rules: int = 16
    """Rules of an iteration, played on the same tasks with the same luck."""
    kept: int = 4
    """The best of them, whose mean and spread the next rules are drawn with."""
    tasks: int = 256
    """Tasks of an iteration."""
    step: float = 0.6
    """How far mean and spread move towards those of the rules kept."""
    particles: int = 512
    """Of the belief in training."""
    test_particles: int = 2048
    """Of the belief in use."""

    def __post_init__(self):
        for name in ("episodes", "tasks"):
            check(self, name, lambda x: whole(x, 1, 10**5), "a whole number from 1 to 100000")
        for name in ("rules", "particles", "test_particles"):
            check(self, name, lambda x: whole(x, 2, 10**5), "a whole number from 2 to 100000")
        check(self, "kept", lambda x: whole(x, 2, self.rules), f"a whole number from 2 to rules = {self.rules}")
        check(self, "width", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "spread", lambda x: number(x, 0), "a finite number > 0")
        check(self, "step", lambda x: number(x, 0) and x <= 1, "a number in (0, 1]")


class Found(NamedTuple):
    """The result of a search."""

    meta: list[Tensor]  # the rule (FEATURES,)
    history: list[dict[str, float]]


class IndexAgent:
    """Takes the action of highest posterior mean plus a learned multiple of the standard deviation; bids as if rates
    were that much higher. ``rules`` (R, FEATURES): tasks lie side by side in R equal shares, each played by one."""

    noise_size = 1

    def __init__(self, family: Any, rules: Tensor, episodes: int, particles: int):
        self.family, self.rules, self.length = family, rules, episodes * family.horizon
        self.belief: Belief = belief(family, particles, stores=True)

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Back to the prior."""
        self.belief.begin(context, tasks, episodes)
        self.steps = 0
        self.rule = self.rules.repeat_interleave(tasks // len(self.rules), 0)[:, None]  # (M, 1, FEATURES)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (M, N, ...)."""
        self.observation = observation
        if self.family.actions:
            mean, deviation = self.belief.moments(observation)
            best = mean.max(-1, keepdim=True)
            doubt = deviation.gather(-1, best.indices) / (best.values.abs() + 1e-3)
            return (mean + self.width(doubt, mean.shape[-1]) * deviation).argmax(-1)
        rate, price, spread, deviation = self.belief.means()
        raised = rate + self.width(deviation / rate, 1) * deviation
        return self.belief._bid(observation, raised.clamp(min=1e-6), price, spread)

    def width(self, doubt: Tensor, places: int) -> Tensor:
        """Standard deviations to add: linear in what is left, its square, the logarithm of the relative uncertainty,
        the product of both, and the place of an action."""
        left = torch.full_like(doubt, 1 - self.steps / self.length)
        uncertain = doubt.clamp(min=1e-3).log() / 3 + 1
        features = (torch.ones_like(doubt), left - 0.5, (left - 0.5) ** 2, uncertain, left * uncertain)
        place = torch.linspace(-1, 1, places).to(doubt) if places > 1 else torch.zeros(1).to(doubt)
        weight = self.rule.unbind(-1)
        return sum(w[..., None] * x for w, x in zip(weight, features)) + weight[-1][..., None] * place

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Bayes' rule."""
        self.belief.update(self.observation, action, reward, next_observation)
        self.steps += 1

    def end_episode(self) -> None:
        """Nothing to do."""


class PosteriorLearner:
    """Used as an ``RL2``: ``meta_train``, then ``agent``."""

    def __init__(self, family: TaskFamily, config: PosteriorConfig):
        self.family, self.config = family, config

    def agent(self, parameters: list[Tensor], sample: bool | None = None) -> IndexAgent:
        """The rule as an ``Agent``; ``sample`` is not used, it never draws."""
        return IndexAgent(self.family, parameters[0][None], self.config.episodes, self.config.test_particles)

    def meta_train(self, source: TaskFamily, seed: int, iterations: int, progress: bool = True) -> Found:
        """Search for a rule on fresh tasks in every iteration."""
        c, history = self.config, []
        generator = Generator().manual_seed(seed)
        mean, spread = torch.zeros(FEATURES), torch.full((FEATURES,), c.spread)
        mean[0] = c.width
        for iteration in tqdm(range(iterations), desc="posterior", unit="iteration", disable=not progress):
            ids = torch.randint(2**62, (c.tasks,), generator=iteration_generator(seed, iteration))
            rules = mean + spread * torch.randn(c.rules, FEATURES, generator=generator)
            rules[0] = mean
            agent = IndexAgent(source, rules, c.episodes, c.particles)
            luck = seed * 1_000_003 + iteration
            played = trial(source, source.tasks(ids.repeat(c.rules)), agent, c.episodes, 1, luck, progress=False)
            earned = played.returns.mean(0)[:, 0].view(c.rules, -1).mean(1)
            best = rules[earned.topk(c.kept).indices]
            mean = mean + c.step * (best.mean(0) - mean)
            spread = spread + c.step * (best.std(0) - spread)
            history.append({"return": earned[0].item()})
        return Found([mean], history)
