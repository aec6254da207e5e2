"""A policy that reads a learned belief (PEARL, Rakelly et al. 2019; VariBAD, Zintgraf et al. 2020): an encoder infers a
hidden task variable from the trial so far, a decoder that has to explain the trial with it teaches the encoder, and PPO
trains a policy that is fed the belief (chapter "Memory and belief")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from ..families.base import TaskFamily, check, number, require, whole
from ..latents import Decoder, Latent, LatentMemory, Step, StepRows, mean_of_square
from ..memories import memory_network
from ..policies import Policy
from ..trials import MemoryAgent, Recorded, TrialInput
from .finite import check_finite
from .meta import Memory, adam_step
from .rl2 import RL2, RL2Config, Teacher, TrialBatch, annealed, clip_by_norm, memory_policy


@dataclass(frozen=True)
class BeliefConfig(RL2Config):
    """What an iteration plays, how the policy moves (``RL2Config``), and how the belief is learned."""

    latent: int = 4
    """Z, numbers of the hidden variable of a task; of each row where the input has several."""
    decode: Literal["past", "all"] = "past"
    """What a belief has to explain. past: the steps it has seen, so that it becomes the posterior. all: steps to come,
    too, as in VariBAD; its spread is then that of the end of the trial from the start, equation (eq-latent-all)."""
    warmup: int = 20
    """Iterations that train the belief alone, on what the untrained policy meets: a policy that is improved before
    there is anything to read in its belief settles for the blind action."""
    beliefs: int = 2
    """Moments of a trial whose beliefs are decoded in a gradient."""
    steps: int = 8
    """Steps that each of them is decoded at: a sample, scaled to all."""
    reconstruction: float = 1.0
    """Weight of the log-likelihood of what is decoded."""
    divergence: float = 1.0
    """Weight of the divergence from the prior. With both weights 1 the objective is the ELBO."""
    belief_lr: float = 3e-3
    """Step size of Adam for encoder and decoder, at the start."""
    decoder_hidden: int = 64
    """Units of the decoder's layers."""
    least_std: float = 0.03
    """Smallest standard deviation that the decoder may claim, in roots: what is certain must not weigh without end."""

    def __post_init__(self):
        super().__post_init__()
        check(self, "latent", lambda x: whole(x, 1, 1024), "a whole number from 1 to 1024")
        check(self, "decode", lambda x: x in ("past", "all"), "past or all")
        check(self, "warmup", lambda x: whole(x, 0), "a whole number >= 0")
        for name in ("beliefs", "steps"):
            check(self, name, lambda x: whole(x, 1, 10**4), "a whole number from 1 to 10000")
        for name in ("reconstruction", "divergence"):
            check(self, name, lambda x: number(x) and x >= 0, "a finite number >= 0")
        for name in ("belief_lr", "least_std"):
            check(self, name, lambda x: number(x, 0), "a finite number > 0")
        check(self, "decoder_hidden", lambda x: whole(x, 1, 4096), "a whole number from 1 to 4096")


class Lived(NamedTuple):
    """What a policy met in a trial of L steps, and what each step led to: ``Recorded`` and ``after``."""

    inputs: Tensor  # (L, M, N, rows * size)
    action: Tensor  # (L, M, N, ...)
    log_prob: Tensor  # (L, M, N)
    observation: Tensor  # (L, M, N, observation)
    after: Tensor  # (L, M, N, observation)


class BeliefAgent(MemoryAgent):
    """A policy that reads a belief, as an ``Agent``. ``record`` also keeps what every step led to."""

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Back to the prior."""
        super().begin(context, tasks, episodes)
        self.led: list[Tensor] = []

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """As ``MemoryAgent.observe``."""
        super().observe(action, reward, next_observation, done)
        if self.record:
            self.led.append(next_observation)

    @property
    def recorded(self) -> Lived:
        """What was met since ``begin``."""
        return Lived(*super().recorded, torch.stack(self.led))


class BeliefLearner(RL2):
    """A policy that adapts by what a learned belief says of the task. Same use as ``RL2``.

    Meta-parameters: those of the decoder, of the encoder, and of the policy that reads the belief. An iteration plays
    trials, improves the policy by PPO with the beliefs held fixed, and then encoder and decoder by the ELBO of the same
    trials, equation (eq-latent-elbo).

    >>> learner = BeliefLearner(LogitPricing(), BeliefConfig(anneal=300))
    >>> state = learner.meta_train(LogitPricing(), seed=0, iterations=300)
    """

    name = "belief"

    def __init__(self, family: TaskFamily, config: BeliefConfig | None = None, teacher: Teacher | None = None):
        """As ``RL2``."""
        self.config, self.teacher = config or BeliefConfig(), teacher
        c = self.config
        require(c.pretrain == 0 or teacher is not None, "pretrain", c.pretrain, "0 without teacher")
        self.inputs = TrialInput(family, c.episodes, c.by_action)
        sizes = self.inputs.sizes
        encoder = memory_network(c.memory, hidden=c.hidden, pooled=c.pooled, **{**sizes, "outputs": 2 * c.latent})
        self.network = LatentMemory(encoder, sizes["outputs"])
        self.policy = memory_policy(self.inputs, c, self.network)
        self.decoder = Decoder(StepRows(self.inputs), c.latent, c.decoder_hidden, c.least_std)
        self.reading = _Reading(c, memory_policy(self.inputs, c, self.network.reader))
        self.outer = self

    def initial(self, generator: Generator) -> list[Tensor]:
        """The decoder's, the encoder's and the policy's."""
        return [*self.decoder.initial(generator), *self.policy.initial(generator)]

    @property
    def belief_tensors(self) -> int:
        """Number of the first meta-parameters: those of decoder and encoder."""
        return self.decoder.tensors + self.network.encoder.tensors

    def agent(self, parameters: list[Tensor], sample: bool = True, record: bool = False) -> BeliefAgent:
        """As ``RL2.agent``."""
        own = [p.detach() for p in parameters[self.decoder.tensors :]]
        return BeliefAgent(self.policy, own, self.inputs, sample, record)

    def belief(self, parameters: list[Tensor], inputs: Tensor) -> Latent:
        """The belief before every decision of a trial, (L, M, N, rows, Z), N = 1 where units share a memory; ``inputs``
        as recorded by an agent."""
        return self.network.belief(parameters[self.decoder.tensors : self.belief_tensors], inputs)

    def expected(self, parameters: list[Tensor], observation: Tensor, action: Tensor, z: Tensor) -> Tensor:
        """Expected value of what a step leads to, if the hidden variable is ``z`` (..., N, rows, Z): (..., N, rows,
        observation of a row), from (..., N, observation) and (..., N, ...)."""
        steps = self.decoder.steps
        own = steps.own(z, action)
        return mean_of_square(*self.decoder.leads_to(parameters, steps.given(observation, action), own))

    def update(self, objective: TrialBatch, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``meta.OuterStep.update``: PPO for the policy, then the ELBO for the belief."""
        c, lived, first = self.config, objective.recorded, self.belief_tensors
        memory = memory or _fresh(meta)
        policy, policy_memory = meta[first:], {name: values[first:] for name, values in memory.items()}
        logged = {"return after 0 steps": objective.reward.sum(0).mean() / c.episodes}
        if objective.iteration >= c.warmup:
            with torch.no_grad():
                joined = self.network.join(lived.inputs, self.belief(meta, lived.inputs))
            recorded = Recorded(joined, lived.action, lived.log_prob, lived.observation)
            reading = TrialBatch(recorded, objective.reward, objective.taught, objective.generator, objective.iteration)
            policy, policy_memory, logged = self.reading.update(reading, policy, policy_memory)
        own, own_memory = meta[:first], {name: values[:first] for name, values in memory.items()}
        step = self.decoder.steps.step(lived.observation, lived.action, lived.after, objective.reward)
        left = annealed(objective.iteration, c.anneal)
        for _ in range(c.epochs):
            order = torch.randperm(lived.inputs.shape[1], generator=objective.generator).to(lived.inputs.device)
            for pick in order.chunk(c.minibatches):
                leaves = [p.detach().requires_grad_() for p in own]
                some = Step(*(x[:, pick] for x in step))
                likelihood, divergence = self.elbo(leaves, lived.inputs[:, pick], some, objective.generator)
                loss = c.divergence * divergence.mean() - c.reconstruction * likelihood.mean()
                gradient = torch.autograd.grad(
                    loss / len(step.reward), leaves, materialize_grads=True, allow_unused=True
                )
                check_finite("gradient of the ELBO", gradient, tasks=False)
                own, own_memory = adam_step(own, clip_by_norm(gradient, 0.5), c.belief_lr * left, own_memory)
        numbers = {"likelihood": likelihood.mean().detach(), "divergence": divergence.mean().detach()}
        memory = {name: [*own_memory[name], *policy_memory[name]] for name in own_memory}
        return [*own, *policy], memory, logged | numbers

    def elbo(self, parameters: list[Tensor], inputs: Tensor, step: Step, generator: Generator) -> tuple[Tensor, Tensor]:
        """The two terms of equation (eq-latent-elbo), each (beliefs, M, N), N = 1 where units share a memory: the
        log-likelihood of what a belief, drawn at random from each trial, has to explain, estimated from a sample of
        ``steps`` of it; and the belief's divergence from the prior. ``inputs`` (L, M, N, rows * size)."""
        c, (length, tasks) = self.config, inputs.shape[:2]
        draw = lambda *shape: torch.rand(*shape, tasks, generator=generator).to(inputs)
        moment, row = (draw(c.beliefs) * length).long(), torch.arange(tasks, device=inputs.device)
        latent = Latent(*(x[moment, row] for x in self.belief(parameters, inputs)))  # (K, M, N, rows, Z)
        count = moment if c.decode == "past" else torch.full_like(moment, length)  # steps to be explained
        chosen = (draw(c.steps, c.beliefs) * count).long()  # (S, K, M)
        noise = torch.randn(latent.mean.shape, generator=generator).to(latent.mean)
        some = Step(*(x[chosen, row] for x in step))
        likelihood = self.decoder.log_likelihood(parameters[: self.decoder.tensors], some, latent.sample(noise))
        likelihood = likelihood.sum(0) * (count / c.steps).to(likelihood)[..., None]
        likelihood = likelihood.sum(-1, keepdim=True) if self.network.encoder.pooled else likelihood
        return likelihood, latent.divergence()


class _Reading(RL2):
    """PPO on a policy whose inputs hold the belief."""

    def __init__(self, config: BeliefConfig, policy: Policy):
        self.config, self.policy = config, policy


def _fresh(parameters: list[Tensor]) -> Memory:
    """What Adam remembers before its first step."""
    zeros = lambda: [torch.zeros_like(p) for p in parameters]
    return {"step": [torch.zeros(()) for _ in parameters], "exp_avg": zeros(), "exp_avg_sq": zeros()}
