"""Bayes for any task family: weights on a sample of the prior, and four ways to decide with them (chapter "Dynamic
pricing").

A family's own file says what a particle makes of an observation and what it would do (``Belief``); the agents here are
the same for all families.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..families.base import check, number, require, whole
from ..rollout import Agent, trial


class ParticlePrior(NamedTuple):
    """A prior as weighted particles."""

    particles: Any
    """Tasks, every field (P, ...)."""
    weight: Tensor
    """(P,), positive, summing to 1."""


class Belief:
    """Posterior over a task's hidden parameters: weights on a fixed sample of the prior, equation (eq-posterior).

    With ``stores``, the N replicas are parallel units of one task (stores of a chain, shoppers of a segment): evidence
    of each is evidence for all, equation (eq-stores-posterior) of chapter "Meta-reinforcement learning". A subclass
    for a family fills in ``prepare``, ``log_likelihood``, ``best_for`` and, where actions are numbered, ``moments``;
    elsewhere ``best_on_average`` and, if it can, ``optimistic``.
    """

    default_particles = 2048

    def __init__(
        self, family: Any, particles: int | None = None, stores: bool = False, prior: ParticlePrior | None = None
    ):
        self.family, self.stores, self.prior = family, stores, prior
        self.size = self.default_particles if particles is None else particles
        if prior is not None:
            self.size = len(prior.weight)
        require(whole(self.size, 2), "particles", particles, "a whole number >= 2")
        require(isinstance(stores, bool), "stores", stores, "True or False")

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Back to the prior for M tasks in N replicas, of which ``context`` (M, C) is known."""
        if self.prior is None:
            self.particles = self.sample(context.device)
            log_prior = torch.zeros(self.size, device=context.device)
        else:
            self.particles = type(self.prior.particles)(*(x.to(context.device) for x in self.prior.particles))
            log_prior = self.prior.weight.to(context.device).log()
        self.log_prior = log_prior
        self.log_weight = log_prior.repeat(tasks, 1 if self.stores else episodes, 1)
        self.prepare(context)

    def update(self, before: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> None:
        """Bayes' rule for one step: observations (M, N, observation) before and after, ``action`` and ``reward``."""
        evidence = self.log_likelihood(before, action, reward, after)
        self.log_weight = self.log_weight + (evidence.sum(1, keepdim=True) if self.stores else evidence)

    def fade(self, power: float) -> None:
        """Everything seen so far counts only as its likelihood to the ``power``: 1 leaves the posterior as it is, 0 is
        the prior. A belief that keeps sums of what was seen scales them, too."""
        self.log_weight = self.log_prior + power * (self.log_weight - self.log_prior)

    @property
    def weight(self) -> Tensor:
        """(M, N, P) posterior probability of each particle; (M, 1, P), one for all units, with ``stores``."""
        return torch.softmax(self.log_posterior, -1)

    @property
    def log_posterior(self) -> Tensor:
        """Its logarithm, up to a constant in each row."""
        return self.log_weight

    def draw(self, uniform: Tensor) -> Tensor:
        """Particles (M, N) int64 drawn from the posterior by one uniform (M, N) each."""
        cumulative = self.weight.cumsum(-1)
        if self.stores:  # one posterior, and a draw of its own for every unit
            particle = torch.searchsorted(cumulative[:, 0], uniform.contiguous(), right=True)
        else:
            particle = torch.searchsorted(cumulative, uniform[..., None].contiguous(), right=True)[..., 0]
        return particle.clamp(max=self.size - 1)

    # ------------------------------------------------------------------------------- what a family fills in
    def sample(self, device: torch.device) -> Any:
        """The particles of the family's own prior, equally likely."""
        return self.family.prior_sample(self.size, device)

    def prepare(self, context: Tensor) -> None:
        """Tables that depend on ``self.particles`` and on what is known of the tasks."""

    def log_likelihood(self, before: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> Tensor:
        """(M, N, P) log-probability, up to a constant, of what the merchant saw in one step if particle P were true."""
        raise NotImplementedError

    def best_for(self, particle: Tensor, observation: Tensor) -> Tensor:
        """What the oracle would do if ``particle`` (M, N) int64 were true: actions (M, N, ...)."""
        raise NotImplementedError

    def moments(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(M, N, A) posterior mean and standard deviation of the value of every numbered action."""
        raise NotImplementedError

    def best_on_average(self, observation: Tensor) -> Tensor:
        """The action of highest posterior mean value, (M, N, ...)."""
        return self.moments(observation)[0].argmax(-1)

    def optimistic(self, observation: Tensor, width: float) -> Tensor:
        """The action of highest posterior mean plus ``width`` standard deviations, (M, N, ...)."""
        mean, deviation = self.moments(observation)
        return (mean + width * deviation).argmax(-1)


@singledispatch
def belief(
    family: Any, particles: int | None = None, stores: bool = False, prior: ParticlePrior | None = None
) -> Belief:
    """The ``Belief`` of a family; each family's file registers its own."""
    raise TypeError(f"{type(family).__name__} has no Bayesian baselines")


class _Bayes:
    """Shared by the Bayesian agents: a belief that every step updates."""

    noise_size = 1

    def __init__(
        self, family: Any, particles: int | None = None, stores: bool = False, prior: ParticlePrior | None = None
    ):
        self.family = family
        self.belief = belief(family, particles, stores, prior)

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Back to the prior."""
        self.belief.begin(context, tasks, episodes)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Bayes' rule for the step that just ended."""
        self.belief.update(self.observation, action, reward, next_observation)

    def end_episode(self) -> None:
        """Nothing to do: the posterior carries over to the next episode of the same task."""

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (M, N, ...) for observations (M, N, observation), by ``choose``."""
        self.observation = observation
        return self.choose(observation, noise)

    def choose(self, observation: Tensor, noise: Tensor) -> Tensor:
        """What to do with the present belief."""
        raise NotImplementedError


class GreedyBayes(_Bayes):
    """Takes the action of highest posterior mean value, and never pays for information (certainty equivalence's
    Bayesian cousin). It can stop learning: chapter "Dynamic pricing", section on incomplete learning."""

    def choose(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The best action on average."""
        return self.belief.best_on_average(observation)


class Thompson(_Bayes):
    """Draws one task from the posterior at every step and does what is best for it (Thompson 1933).

    ``until``: after so many steps of the trial it exploits, as ``GreedyBayes`` does; None never.
    """

    def __init__(
        self,
        family: Any,
        particles: int | None = None,
        stores: bool = False,
        prior: ParticlePrior | None = None,
        until: int | None = None,
    ):
        super().__init__(family, particles, stores, prior)
        self.until = until
        check(self, "until", lambda x: x is None or whole(x, 0), "None or a whole number >= 0")

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Back to the prior, before the first step."""
        super().begin(context, tasks, episodes)
        self.steps = 0

    def choose(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The best action for a particle drawn from the posterior; the best on average after ``until`` steps."""
        self.steps += 1
        if self.until is not None and self.steps > self.until:
            return self.belief.best_on_average(observation)
        return self.belief.best_for(self.belief.draw(noise[..., 0]), observation)


class BayesUCB(_Bayes):
    """Takes the action of highest posterior mean plus ``width`` posterior standard deviations: optimism that shrinks
    with what is known. (Kaufmann, Cappé and Garivier 2012 use a quantile in place of the deviation.)"""

    def __init__(
        self,
        family: Any,
        particles: int | None = None,
        stores: bool = False,
        prior: ParticlePrior | None = None,
        width: float = 1.0,
    ):
        super().__init__(family, particles, stores, prior)
        self.width = width
        check(self, "width", lambda x: number(x) and x >= 0, "a finite number >= 0")

    def choose(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The most promising action."""
        return self.belief.optimistic(observation, self.width)


# ------------------------------------------------------------------------------------------------ empirical Bayes
def empirical_prior(
    family: Any,
    tasks: Any,
    agent: Agent,
    episodes: int,
    particles: int = 4096,
    iterations: int = 100,
    seed: int = 0,
    wide_share: float = 0.1,
) -> ParticlePrior:
    """The prior that a practitioner really has: estimated from the logs of M earlier tasks under ``agent``.

    The weights of a wide sample (``family.wide()``) that make all logs together most likely: the nonparametric maximum
    likelihood of Kiefer and Wolfowitz (1956) on fixed particles, by expectation maximisation from equal weights.
    Stopped after ``iterations``, before it would put all weight on a few particles. Hidden parameters are never read.

    Such an estimate has its weight near the tasks that were seen and none between them, so a new task would never be
    found however much it shows of itself. Hence ``wide_share`` of the weight stays evenly on the wide sample.
    """
    require(number(wide_share) and 0 <= wide_share < 1, "wide_share", wide_share, "a number in [0, 1)")
    for name, value in (("particles", particles), ("iterations", iterations), ("episodes", episodes)):
        require(whole(value, 1), name, value, "a whole number >= 1")
    logs = _Logged(agent, belief(family.wide(), particles))
    trial(family, tasks, logs, episodes, 1, seed, progress=False)
    log_likelihood = (logs.belief.log_posterior - logs.belief.log_prior)[:, 0]
    log_likelihood = log_likelihood.flatten(0, -2)  # where the parts of a task are alike, each is one of many
    weight = torch.full_like(log_likelihood[0], 1 / particles)
    for _ in range(iterations):
        weight = torch.softmax(log_likelihood + weight.log(), -1).mean(0)
    weight = wide_share / particles + (1 - wide_share) * weight
    kept = weight > 1e-3 / particles
    chosen = type(logs.belief.particles)(*(x[kept] for x in logs.belief.particles))
    return ParticlePrior(chosen, weight[kept] / weight[kept].sum())


class _Logged(_Bayes):
    """Another agent's decisions, and what a belief makes of their consequences."""

    def __init__(self, agent: Agent, belief: Belief):
        self.agent, self.belief, self.noise_size = agent, belief, agent.noise_size

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Both begin."""
        super().begin(context, tasks, episodes)
        self.agent.begin(context, tasks, episodes)

    def choose(self, observation: Tensor, noise: Tensor) -> Tensor:
        """As the agent."""
        return self.agent.act(observation, noise)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Both learn."""
        super().observe(action, reward, next_observation, done)
        self.agent.observe(action, reward, next_observation, done)

    def end_episode(self) -> None:
        """Both are told."""
        self.agent.end_episode()


class Random:
    """Chooses at random: a numbered action, or a slate without repetition, each equally likely."""

    def __init__(self, family: Any):
        self.items, self.slate = getattr(family, "items", family.actions), getattr(family, "slate", None)
        if not self.items:
            raise ValueError(f"Random needs numbered actions or slates; {type(family).__name__} has real ones")
        self.noise_size = self.items if self.slate else 1

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Nothing to forget."""

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (M, N), or slates (M, N, slate)."""
        if self.slate:
            return noise.topk(self.slate, -1).indices
        return (noise[..., 0] * self.items).long()

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Nothing to learn."""

    def end_episode(self) -> None:
        """Nothing to do."""
