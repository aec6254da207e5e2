"""Trust-region policy optimisation (Schulman et al. 2015; chapter "Trust regions"): the longest step along the natural
gradient that keeps the mean KL divergence below a radius, made certain by a line search.

:func:`trust_region_step` knows nothing of policies: the outer loop of TRPO-MAML takes the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from ..families.base import TaskFamily, check, number, require, whole
from ..policies import Policy, per_task
from ..returns import Advantage, leave_one_out_advantage
from ..rollout import Trajectories, rollout
from ..surrogates import ratio
from .finite import check_finite, deferred
from .reinforce import LearningCurve


@dataclass(frozen=True)
class TRPOConfig:
    """Settings of one trust-region step."""

    radius: float = 0.01
    """Largest mean KL divergence of the new policy from the old one, in nats."""
    damping: float = 1e-5
    """Added to the diagonal of the Fisher matrix, which need not have full rank."""
    cg_iterations: int = 10
    """Iterations of conjugate gradient, each one Fisher-vector product."""
    backtracks: int = 15
    """How often the step may be shortened before it is given up."""
    backtrack_ratio: float = 0.8
    """Factor of each shortening."""

    def __post_init__(self):
        check(self, "radius", lambda x: number(x, 0), "a finite number > 0")
        check(self, "damping", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "cg_iterations", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "backtracks", lambda x: whole(x, 0), "a whole number >= 0")
        check(self, "backtrack_ratio", lambda x: number(x, 0, 1), "a number in (0, 1)")


class TrustRegionReport(NamedTuple):
    """What the line search did. Every field has the shape of the objective: () or, with a task axis, (M,)."""

    accepted: Tensor  # bool; where False the old parameters are kept
    backtracks: Tensor  # int64, how often the step was shortened
    kl: Tensor  # of the parameters returned from the old ones; 0 where not accepted
    improvement: Tensor  # of the objective; 0 where not accepted


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """x with A x = b, (..., P), for a symmetric positive definite A that is known only as ``matvec``: x -> A x.

    Leading axes are separate systems (one per task), solved side by side. A system stops when its residual is shorter
    than ``tolerance`` times b, or when A turns out not to be positive along a direction. Chapter "Trust regions",
    section on conjugate gradient.
    """
    x, residual = torch.zeros_like(b), b
    direction, squared = residual, (b * b).sum(-1, keepdim=True)
    enough = tolerance**2 * squared
    for _ in range(iterations):
        image = matvec(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        going = (squared > enough) & ~(curvature <= 0)  # a curvature that is not a number must show in x
        if not going.any():
            break
        length = torch.where(going, squared / curvature, 0)
        x, residual = x + length * direction, residual - length * image
        before, squared = squared, torch.where(going, (residual * residual).sum(-1, keepdim=True), 0)
        direction = torch.where(going, residual + squared / before * direction, 0)
    return x


def fisher_vector_product(kl: Tensor, parameters: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """v -> F v, lists like ``parameters``, by differentiating twice; F is the Hessian of ``kl``, equation (eq-fisher).

    ``kl`` must have been computed, with a graph, from ``parameters`` and a *detached* old distribution. Summed over
    tasks that share no parameter it gives each task its own product.
    """
    gradient = torch.autograd.grad(kl.sum(), parameters, create_graph=True)

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        along = sum((g * v).sum() for g, v in zip(gradient, vector, strict=True))
        return list(torch.autograd.grad(along, parameters, retain_graph=True))

    return product


def trust_region_step(
    parameters: Sequence[Tensor],
    gradient: Sequence[Tensor],
    fisher_vector_product: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    evaluate: Callable[[list[Tensor]], tuple[Tensor | float, Tensor | float]],
    config: TRPOConfig,
) -> tuple[list[Tensor], TrustRegionReport]:
    """Go as far along the natural gradient as the radius allows, equation (eq-trpo-step), then shorten until it helps.

    ``gradient`` is that of the objective, which is maximised. ``evaluate(parameters)`` returns (objective, mean KL from
    the old policy) for detached parameters: two numbers if one vector of parameters is shared, or two (M,) tensors if
    every parameter is (M, ...), one set per task; then directions, lengths and line searches are the tasks' own.

    A step is accepted if the objective rises and the KL divergence is at most the radius. If no length passes, the old
    parameters come back, and the report says so. Raises ``FloatingPointError`` if the gradient or the direction is not
    finite; an objective that is not finite only shortens the step.
    """
    device = parameters[0].device

    def values(candidate: list[Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in evaluate(candidate))

    before, _ = values([p.detach() for p in parameters])
    tasks = before.shape  # () or (M,)

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(*tasks, -1) for t in tensors], -1)

    def shaped(vector: Tensor) -> list[Tensor]:
        parts = vector.split([p[0].numel() if tasks else p.numel() for p in parameters], -1)
        return [part.reshape(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def damped(vector: Tensor) -> Tensor:
        return flat(fisher_vector_product(shaped(vector))) + config.damping * vector

    check_finite("gradient", gradient, tasks=len(tasks) > 0)
    natural = conjugate_gradient(damped, flat(gradient), config.cg_iterations)
    curvature = (natural * damped(natural)).sum(-1, keepdim=True)
    check_finite("natural gradient", shaped(natural * curvature), tasks=len(tasks) > 0)
    # Where there is no gradient, or no curvature to measure it with, there is no step: the search fails and keeps.
    step = torch.where(curvature > 0, (2 * config.radius / curvature).sqrt(), 0) * natural

    old = new = flat(parameters)
    pending = torch.ones(tasks, dtype=torch.bool, device=device)
    backtracks = torch.full(tasks, config.backtracks, device=device)
    kl, improvement = torch.zeros_like(before), torch.zeros_like(before)
    for shortened in range(config.backtracks + 1):
        candidate = old + config.backtrack_ratio**shortened * step
        objective, divergence = values(shaped(candidate))
        passed = pending & (objective > before) & (divergence <= config.radius)
        new = torch.where(passed[..., None], candidate, new)
        kl, improvement = torch.where(passed, divergence, kl), torch.where(passed, objective - before, improvement)
        backtracks = torch.where(passed, shortened, backtracks)
        pending = pending & ~passed
        if not pending.any():
            break
    return shaped(new), TrustRegionReport(~pending, backtracks, kl, improvement)


def mean_kl(policy: Policy, old: tuple[Tensor, ...], parameters: list[Tensor], data: Trajectories) -> Tensor:
    """(M,) KL divergence of the policy from the distributions ``old``, mean over the visited steps of a task."""
    divergence = policy.kl(old, policy.distribution(parameters, data.observation, data.action))
    return (divergence * data.mask).sum((0, 2)) / data.mask.sum((0, 2))


class TRPO:
    """Plain TRPO: every task is learned from scratch, with a trust region of its own."""

    def __init__(
        self,
        policy: Policy,
        config: TRPOConfig | None = None,
        iterations: int = 200,
        episodes: int = 8,
        advantage: Advantage | None = None,
    ):
        """``iterations`` steps, each from ``episodes`` new episodes of a task; ``advantage`` is by default the reward
        to go less the others' mean."""
        require(whole(iterations, 1), "iterations", iterations, "a whole number >= 1")
        require(whole(episodes, 2), "episodes", episodes, "a whole number >= 2")
        self.policy, self.config = policy, config or TRPOConfig()
        self.iterations, self.episodes = iterations, episodes
        self.advantage = advantage or leave_one_out_advantage()

    def step(self, parameters: list[Tensor], data: Trajectories) -> tuple[list[Tensor], TrustRegionReport]:
        """One trust-region step of every task from the episodes that ``parameters`` (M, ...) collected."""
        policy, advantage = self.policy, self.advantage(data)
        parameters = [p.detach().requires_grad_() for p in parameters]
        old = tuple(d.detach() for d in policy.distribution(parameters, data.observation, data.action))

        @torch.no_grad()
        def evaluate(candidate: list[Tensor]) -> tuple[Tensor, Tensor]:
            return ratio(policy, candidate, data, advantage), mean_kl(policy, old, candidate, data)

        gradient = torch.autograd.grad(ratio(policy, parameters, data, advantage).sum(), parameters)
        product = fisher_vector_product(mean_kl(policy, old, parameters, data), parameters)
        return trust_region_step(parameters, gradient, product, evaluate, self.config)

    def train(self, family: TaskFamily, tasks: Any, seed: int, progress: bool = True) -> LearningCurve:
        """Learn every task from the same initial parameters. Returns of an iteration are those of *new* episodes.

        The bar shows the share of tasks whose last step was accepted. Raises ``FloatingPointError`` naming tensor, task
        and iteration if a value is not finite.
        """
        start = self.policy.initial(Generator().manual_seed(seed))
        parameters = per_task([p.to(tasks.id.device) for p in start], len(tasks.id))
        curve = []
        bar = tqdm(range(self.iterations), desc="TRPO", unit="step", disable=not progress)
        for iteration in bar:
            data = rollout(family, tasks, self.policy, parameters, self.episodes, seed, episode=iteration)
            curve.append(data.returns.mean(-1))
            try:
                with deferred():
                    parameters, report = self.step(parameters, data)
            except FloatingPointError as error:
                raise FloatingPointError(f"iteration {iteration}: {error}") from None
            if progress:
                bar.set_postfix(accepted=f"{report.accepted.double().mean().item():.2f}")
        episodes = torch.arange(self.iterations) * self.episodes
        return LearningCurve(torch.stack(curve), episodes, [p.detach() for p in parameters])
