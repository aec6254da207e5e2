"""Outer steps of a meta-learner of policies: how the meta-parameters move, given an iteration's data. Chapter
"Meta-reinforcement learning"; the same three ideas without an inner loop are in the chapters "Policy gradients" and
"Trust regions"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..families.base import check, number, require, whole
from ..rollout import Trajectories
from ..surrogates import dice, log_likelihood, ratio
from .maml import PolicyObjective, Stage
from .meta import adam_step, to_device
from .output_losses import of_clipped_surrogate, of_surrogate
from .ppo import clipped_surrogate
from .trpo import TRPOConfig, fisher_vector_product, mean_kl, trust_region_step


def _rates(objective: PolicyObjective, meta: list[Tensor], lr: float, log_std_lr: float | None) -> list[float]:
    """One Adam step size for each meta-parameter."""
    rates = [lr] * len(meta)
    own = objective.policy.network.tensors  # what a policy has besides its network: log std
    if log_std_lr is not None and objective.policy.tensors > own:
        rates[own] = log_std_lr
    return rates


@dataclass(frozen=True)
class ReinforceStep:
    """One Adam step along the REINFORCE estimate of the meta-gradient: RL-MAML."""

    lr: float = 1e-2
    """beta, the outer step size."""
    log_std_lr: float | None = None
    """beta of a Gaussian's log standard deviation; None is ``lr``."""
    name = "RL"
    batches_seeds = True

    def __post_init__(self):
        check(self, "lr", lambda x: number(x, 0), "a finite number > 0")
        check(self, "log_std_lr", lambda x: x is None or number(x, 0), "None or a finite number > 0")

    def update(self, objective: PolicyObjective, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``meta.OuterStep.update``."""
        at_outputs = of_surrogate(objective.policy, log_likelihood)
        _, gradient = objective.policy_gradient(meta, log_likelihood, at_outputs)
        meta, memory = adam_step(
            meta, [-g for g in gradient], _rates(objective, meta, self.lr, self.log_std_lr), memory, objective.seeds
        )
        return meta, memory, objective.returns()


@dataclass(frozen=True)
class PPOStep:
    """A few Adam steps up PPO's clipped surrogate, adapting anew from each theta on the same support: PPO-MAML."""

    lr: float = 1e-3
    """beta, the outer step size."""
    epochs: int = 5
    """Adam steps on the data of one iteration."""
    clip: float = 0.2
    """How far the likelihood ratio of an adapted policy counts, on either side of 1."""
    log_std_lr: float | None = None
    """beta of a Gaussian's log standard deviation; None is ``lr``. Adam moves a parameter by about one step size an
    update, whatever its gradient, so that log std hardly moves at rates that suit weights."""
    name = "PPO"
    batches_seeds = True

    def __post_init__(self):
        check(self, "lr", lambda x: number(x, 0), "a finite number > 0")
        check(self, "epochs", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "clip", lambda x: number(x, 0, 1), "a number in (0, 1)")
        check(self, "log_std_lr", lambda x: x is None or number(x, 0), "None or a finite number > 0")

    def update(self, objective: PolicyObjective, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``meta.OuterStep.update``."""
        surrogate = partial(clipped_surrogate, clip=self.clip)
        at_outputs = of_clipped_surrogate(objective.policy, self.clip)
        rates = _rates(objective, meta, self.lr, self.log_std_lr)
        for _ in range(self.epochs):
            value, gradient = objective.policy_gradient(meta, surrogate, at_outputs)
            meta, memory = adam_step(meta, [-g for g in gradient], rates, memory, objective.seeds)
        return meta, memory, {**objective.returns(), "surrogate": value}


@dataclass(frozen=True)
class TRPOStep:
    """One trust-region step on the likelihood ratio of the adapted policies: TRPO-MAML.

    The divergence is that of the *adapted* policies, with the same stage weights as the return. Its curvature at the
    old parameters is J^T F J, J the derivative of phi with respect to theta and F the Fisher matrix of the adapted
    policy, so no third derivatives are needed (equation (eq-adapted-fisher)).
    """

    trust: TRPOConfig = TRPOConfig()
    """Radius, damping, conjugate gradient and line search."""
    transitions: int | None = None
    """Steps of each task, drawn at random, that Fisher-vector products are computed on; None is all. The gradient and
    the line search always see all."""
    name = "TRPO"
    batches_seeds = False  # conjugate gradient and line search are one decision

    def __post_init__(self):
        check(self, "trust", lambda x: isinstance(x, TRPOConfig), "a TRPOConfig")
        check(self, "transitions", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")

    def update(self, objective: PolicyObjective, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``meta.OuterStep.update``."""
        policy = objective.policy
        outer = lambda phi, stage: -ratio(policy, phi, stage.data, stage.advantage)
        _, gradient = objective.policy_gradient(meta, ratio, of_surrogate(policy, ratio))
        old = list(_old_distributions(objective, meta))

        def evaluate(candidate: list[Tensor]) -> tuple[Tensor, Tensor]:
            value, divergence = 0.0, 0.0
            for (stages, tasks), before in zip(objective.chunks(), old):
                phi = objective.adapted(candidate, stages, tasks, create_graph=False)
                with torch.no_grad():
                    value = value - objective.mean(objective.weighted(outer, phi, stages))
                    divergence = divergence + objective.mean(_weighted_kl(objective, before, phi, stages))
            return tuple(objective.average([value, divergence]))

        product = adapted_fisher_vector_product(objective, meta, self.transitions)
        meta, report = trust_region_step(meta, gradient, product, evaluate, self.trust)
        return meta, None, {**objective.returns(), **report._asdict()}


def _old_distributions(objective: PolicyObjective, meta: list[Tensor]):
    """For each chunk, the distributions of the adapted policies on each stage that counts, held constant."""
    for stages, tasks in objective.chunks():
        phi = objective.adapted([p.detach() for p in meta], stages, tasks, create_graph=False)
        with torch.no_grad():
            yield [
                objective.policy.distribution(p, stage.data.observation, stage.data.action) if w else None
                for w, p, stage in zip(objective.weights, phi, stages)
            ]


def _weighted_kl(objective: PolicyObjective, old: Sequence, phi: Sequence, stages: Sequence[Stage]) -> Tensor:
    """(M,) divergence of the adapted policies from the old ones, mean over steps, weighted as the return is."""
    total = sum(w for w in objective.weights)
    terms = []
    for w, before, p, (data, *_) in zip(objective.weights, old, phi, stages):
        if w:
            terms.append(w / total * mean_kl(objective.policy, before, p, data))
    return torch.stack(terms).sum(0)


def adapted_fisher_vector_product(
    objective: PolicyObjective, meta: list[Tensor], transitions: int | None = None
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """v -> J^T F J v, the curvature of the weighted divergence of the adapted policies at ``meta``.

    Exact, by hand where ``mlp_adjoint`` applies, else from two retained graphs: J^T w is one backward pass through
    adaptation; it is linear in w, so that J v is one backward pass through J^T w with respect to w.
    """
    policy, parts = objective.policy, []
    leaves = [p.detach().requires_grad_() for p in meta]
    total = sum(objective.weights)
    if transitions is not None:
        require(objective.inner.surrogate is not dice, "TRPOStep.transitions", transitions, "None with dice")
        recurrent = hasattr(policy.network, "step")
        require(not recurrent, "TRPOStep.transitions", transitions, "None with a recurrent policy")
        require(objective.shards.size == 1, "TRPOStep.transitions", transitions, "None with several processes")
    thinned = lambda stages: stages if transitions is None else [thin(stage, transitions) for stage in stages]
    if objective.by_hand and not objective.inner.learn_lr:
        own = objective.fisher_vector_product(meta, thinned(objective.stages))
        return lambda vector: objective.average(own(vector))
    for stages, tasks in objective.chunks():
        stages = thinned(stages)
        phi = objective.adapted(leaves, stages, tasks, create_graph=True)
        for w, p, (data, *_) in zip(objective.weights, phi, stages):
            if not w:
                continue
            moving = [i for i, q in enumerate(p) if q.requires_grad]
            own = [q.detach().requires_grad_() for q in p]
            old = tuple(d.detach() for d in policy.distribution(p, data.observation, data.action))
            kl = mean_kl(policy, old, own, data) * (w / total / objective.tasks)
            fisher = fisher_vector_product(kl, own)
            cotangent = [torch.zeros_like(q).requires_grad_() for q in p]
            pulled = torch.autograd.grad(
                [p[i] for i in moving], leaves, [cotangent[i] for i in moving], create_graph=True, allow_unused=True
            )
            pulled = [g if g is not None else torch.zeros_like(q) for g, q in zip(pulled, leaves)]
            parts.append(([p[i] for i in moving], moving, fisher, cotangent, pulled))

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        result = [torch.zeros_like(q) for q in leaves]
        for phi, moving, fisher, cotangent, pulled in parts:
            along = sum((g * v).sum() for g, v in zip(pulled, vector))
            pushed = torch.autograd.grad(along, cotangent, retain_graph=True, materialize_grads=True)  # J v
            image = fisher(pushed)  # F J v
            back = torch.autograd.grad(phi, leaves, [image[i] for i in moving], retain_graph=True, allow_unused=True)
            for total_, g in zip(result, back):
                if g is not None:
                    total_ += g
        return objective.average(result)

    return product


def thin(stage: Stage, transitions: int) -> Stage:
    """``transitions`` steps of each task, drawn among those before an episode's end, as one-step episodes (all of them
    if there are fewer): sums are rescaled, so that a surrogate of single steps keeps its expectation.

    The draw is the same in every call. Evenly spaced steps would not do: where the spacing and the number of episodes
    have a common factor they come from a few episodes only, whose advantages do not cancel, and curvature is
    overestimated a hundredfold.
    """
    data, advantage, score = stage
    steps, tasks, episodes = data.mask.shape
    mask = data.mask.transpose(0, 1).flatten(1)  # (M, T N)
    key = to_device(torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)), mask.device).to(mask)
    index = (key + mask).topk(min(transitions, steps * episodes), -1).indices  # live steps first
    task = torch.arange(tasks, device=mask.device)[:, None]
    pick = lambda x: x.transpose(0, 1).flatten(1, 2)[task, index][None]
    drawn = pick(data.mask).sum(-1, keepdim=True)
    scale = mask.sum(-1)[:, None] / drawn * index.shape[1] / episodes
    return Stage(Trajectories(*map(pick, data)), pick(advantage) * scale, score)
