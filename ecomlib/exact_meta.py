"""Expectations of meta-gradients without sampling: every batch of support episodes, with its probability.

Against these numbers the chapter "Meta-reinforcement learning" checks its estimators. A row is one way in which all
support and query episodes of one task can turn out. Rows stand where tasks stand elsewhere, so the surrogates of the
library are evaluated on them as they are. The order of the episodes of a batch does not matter to any of them, so
batches that differ in it only share a row: N episodes with n possible courses make (n + N - 1 choose N) rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .exact import all_trajectories, expected_return
from .families.base import require, take, whole
from .families.tabular import TabularTasks
from .policies import CategoricalMLP
from .rollout import Trajectories

Update = Callable[[int, list[Tensor], Trajectories], list[Tensor]]
"""(inner step k, parameters (R, in, out), D_k (T, R, N, ...)) -> parameters of the next step: one row, one update."""


class Outcomes(NamedTuple):
    """Every way in which K rounds of support and one round of query episodes can turn out, R rows."""

    support: list[Trajectories]  # D_0 .. D_{K-1}, each (T, R, N, ...)
    query: Trajectories  # (T, R, N', ...)
    probability: Tensor  # (R,)
    per_support: int  # rows that share their support: the outcomes of the query, next to each other


def all_batches(
    family: Any, tasks: TabularTasks, policy: CategoricalMLP, parameters: list[Tensor], episodes: int
) -> tuple[Trajectories, Tensor]:
    """Every batch of N episodes that can happen, in any order, and its probability, differentiable in ``parameters``.

    Where ``all_trajectories`` lists n episodes of M tasks, there are B = (n + N - 1 choose N) batches of each. They
    are returned as (T, M * B, N, ...), those of a task next to each other, with probabilities (M * B,).
    """
    require(whole(episodes, 1), "episodes", episodes, "a whole number >= 1")
    single, probability = all_trajectories(family, tasks, policy, parameters)
    count = probability.shape[1]
    pick = torch.tensor(list(combinations_with_replacement(range(count), episodes)))  # (B, N)
    repeats = (pick[..., None] == torch.arange(count)).sum(1)  # (B, n)
    orders = (torch.lgamma(torch.tensor(episodes + 1.0)) - torch.lgamma(repeats + 1.0).sum(-1)).exp().round()
    batch = Trajectories(*(field[:, :, pick].flatten(1, 2) for field in single))
    return batch, (orders * probability[:, pick].prod(-1)).flatten()


def objective_expected(
    family: Any,
    tasks: TabularTasks,
    policy: CategoricalMLP,
    parameters: list[Tensor],
    inner_lr: float,
    steps: int = 1,
) -> Tensor:
    """() objective I of equation (eq-objective-expected): the return after K steps along the exact gradient of one
    task's expected return. Differentiable in ``parameters``."""
    adapted = list(parameters)
    for _ in range(steps):
        value = expected_return(family, tasks, policy, adapted).sum()
        gradient = torch.autograd.grad(value, adapted, create_graph=True)
        adapted = [p + inner_lr * g for p, g in zip(adapted, gradient)]
    return expected_return(family, tasks, policy, adapted).sum()


def objective_sampled(
    family: Any,
    tasks: TabularTasks,
    policy: CategoricalMLP,
    parameters: list[Tensor],
    update: Update,
    episodes: int,
    steps: int = 1,
) -> Tensor:
    """() objective II of equation (eq-objective-sampled): the mean, over all support batches of one task, of the return
    after the updates they lead to. Differentiable in ``parameters``, on which the batches' probabilities depend."""
    adapted, chance = [p[None] for p in parameters], tasks.start.new_ones(1)
    for step in range(steps):
        support, probability = all_batches(family, _rows(tasks, len(chance)), policy, adapted, episodes)
        size = len(probability) // len(chance)
        adapted = [p.repeat_interleave(size, 0) for p in adapted]
        chance = chance.repeat_interleave(size) * probability
        adapted = update(step, adapted, support)
    return (chance * expected_return(family, _rows(tasks, len(chance)), policy, adapted)).sum()


def all_outcomes(
    family: Any,
    tasks: TabularTasks,
    policy: CategoricalMLP,
    parameters: list[Tensor],
    update: Update,
    episodes: int,
    steps: int = 1,
    query_episodes: int = 1,
) -> Outcomes:
    """Every outcome of K rounds of N support episodes, each by the parameters that the rounds before led to, and of the
    query episodes by the adapted ones. No gradient."""
    adapted, chance, support = [p.detach()[None] for p in parameters], tasks.start.new_ones(1), []
    for step in range(steps + 1):
        last = step == steps
        batch, probability = all_batches(
            family, _rows(tasks, len(chance)), policy, adapted, query_episodes if last else episodes
        )
        size = len(probability) // len(chance)
        support = [Trajectories(*(field.repeat_interleave(size, 1) for field in data)) for data in support]
        chance = chance.repeat_interleave(size) * probability.detach()
        if last:
            return Outcomes(support, batch, chance, size)
        batch = Trajectories(*(field.detach() for field in batch))
        adapted = update(step, [p.repeat_interleave(size, 0).requires_grad_() for p in adapted], batch)
        adapted = [p.detach() for p in adapted]
        support.append(batch)


def moments(estimate: Tensor, outcomes: Outcomes, query_episodes: int = 1) -> tuple[Tensor, Tensor]:
    """Exact mean (P,) and total variance () of an estimator whose value in each row is ``estimate`` (R, P).

    ``query_episodes`` > 1 gives the variance when that many query episodes are averaged instead of the one that the
    rows list: given the support they are independent, so only the variance that the query adds shrinks.
    """
    weight = outcomes.probability.view(-1, outcomes.per_support)  # (supports, outcomes of the query)
    rows = estimate.view(*weight.shape, -1)
    chance = weight.sum(-1)
    given_support = (weight[..., None] * rows).sum(1) / chance[:, None]
    mean = chance @ given_support
    between = chance @ (given_support - mean).square().sum(-1)
    within = (weight * (rows - given_support[:, None]).square().sum(-1)).sum()
    return mean, between + within / query_episodes


def _rows(tasks: TabularTasks, rows: int) -> TabularTasks:
    """The one task, once per row."""
    require(len(tasks.id) == 1, "tasks", len(tasks.id), "one task at a time")
    return take(tasks, torch.zeros(rows, dtype=torch.int64, device=tasks.id.device))
