"""The meta-objective on the data of one iteration, and its gradient (chapters "MAML, derived" and "Meta-reinforcement
learning").

Tasks may be shared out over processes (``sharding.py``): an objective then has this process's tasks, and what it
returns are means over all processes. Each gradient is one all-reduce.

Seeds of one experiment may train in one batch. Meta-parameters then have the seed as first axis, (S, ...), and a task
axis holds each of M tasks for every seed in turn: task 0 of seeds 0, ..., S - 1, then task 1, and so on. Seeds share no
parameter, so that the gradient of the *sum* over seeds of each seed's mean is the stack of the seeds' own gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..networks import MLP
from . import mlp_adjoint
from .adaptation import Inner, Loss, adapt
from .finite import check_finite, open_checks
from .output_losses import OutputLoss
from .sharding import ALONE, Shards


class MetaObjective:
    """The loss after adaptation as a function of the meta-parameters, at the data of one iteration.

    ``stages`` are data sets D_0, ..., D_K: D_k is the support of inner step k + 1 and the query of phi_k, so a data set
    never scores parameters that it has been used to adapt. ``weights`` (K + 1,) say how much the loss of phi_k on D_k
    counts; (0, ..., 0, 1) is the loss after the last step. ``take(data, slice)`` selects tasks. Meta-parameters are
    theta, then Meta-SGD's step sizes where they are learned. ``tasks`` is M and ``seeds`` S, None without a seed axis;
    a mean over tasks is () then, else (S,).
    """

    def __init__(
        self,
        inner: Inner,
        loss: Loss,
        stages: Sequence[Any],
        weights: Sequence[float],
        tasks: int,
        take: Callable[[Any, slice], Any],
        chunk: int | None = None,
        extra: Callable[[list[list[Tensor]], Sequence[Any]], Tensor] | None = None,
        seeds: int | None = None,
        shards: Shards = ALONE,
    ):
        self.inner, self.loss, self.stages, self.weights, self.tasks = inner, loss, stages, weights, tasks
        self.take, self.chunk, self.extra, self.seeds = take, chunk or tasks, extra, seeds
        self.shards = shards
        self.numbers: list[Tensor] = []
        """Means over this process's tasks that go with each gradient to become means over all, ``averages``."""
        self.averages: list[Tensor] = []

    def chunks(self) -> Iterator[tuple[list[Any], int]]:
        """The stages of ``chunk`` tasks (of every seed) at a time, and the length of their task axis: memory grows with
        the chunk, not with M."""
        seeds = self.seeds or 1
        for start in range(0, self.tasks, self.chunk):
            part = slice(start * seeds, min(start + self.chunk, self.tasks) * seeds)
            yield [self.take(stage, part) for stage in self.stages], part.stop - part.start

    def mean(self, values: Tensor) -> Tensor:
        """Mean over this process's tasks of what has the task axis first, or of a chunk its share of that mean."""
        return (values if self.seeds is None else values.unflatten(0, (-1, self.seeds))).sum(0) / self.tasks

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Means over processes. Whether all was finite so far goes with them: all processes stop if one has to."""
        if self.shards.size == 1:
            return list(tensors)
        checks = open_checks()
        flag = None if checks is None else checks.flag()
        *tensors, flag = self.shards.average([*tensors, tensors[0].new_zeros(()) if flag is None else flag])
        if checks is not None:
            checks.add("a value of another process, which names it", flag[None])
        return tensors

    def average_with_numbers(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Means over processes of ``tensors`` and, in the same message, of ``numbers``."""
        means = self.average([*tensors, *self.numbers])
        return means[: len(tensors)], means[len(tensors) :]

    def returns(self) -> dict[str, Tensor]:
        """Mean returns worth logging, where tasks have returns."""
        return {}

    def _averaged(self, value: Tensor, gradient: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        (value, *gradient), self.averages = self.average_with_numbers([value, *gradient])
        check_finite("meta-gradient", gradient, tasks=False)
        return value, gradient

    def adapted(self, meta: list[Tensor], stages: Sequence[Any], tasks: int, create_graph: bool) -> list[list[Tensor]]:
        """[phi_0, ..., phi_K] of these tasks, each adapted on the stages before it."""
        shared = self.seeds is None
        meta = meta if shared else for_tasks(meta, tasks // self.seeds)
        theta, step_sizes = split_meta(self.inner, meta)
        return adapt(self.loss, self.inner, theta, stages[:-1], tasks, step_sizes, shared, create_graph)

    def weighted(self, outer: Loss, phi: Sequence[list[Tensor]], stages: Sequence[Any]) -> Tensor:
        """(M,) sum over k of weight_k times the outer loss of phi_k on D_k."""
        terms = [w * outer(p, data) for w, p, data in zip(self.weights, phi, stages, strict=True) if w]
        total = torch.stack(terms).sum(0)
        return total if self.extra is None else total + self.extra(phi, stages)

    def gradient(self, meta: list[Tensor], outer: Loss) -> tuple[Tensor, list[Tensor]]:
        """Mean over tasks of the weighted loss, and its gradient, equation (eq-maml-gradient), chunk by chunk."""
        leaves = [p.detach().requires_grad_() for p in meta]
        value, gradient = 0.0, [torch.zeros_like(p) for p in meta]
        for stages, tasks in self.chunks():
            loss = self.weighted(outer, self.adapted(leaves, stages, tasks, create_graph=True), stages)
            check_finite("meta-loss", [loss])
            loss = self.mean(loss)
            value = value + loss.detach()
            for total, g in zip(gradient, torch.autograd.grad(loss.sum(), leaves, allow_unused=True)):
                if g is not None:
                    total += g
        return self._averaged(value, gradient)

    def gradient_by_hand(
        self,
        meta: list[Tensor],
        network: MLP,
        inner: OutputLoss,
        outer: OutputLoss,
        stages: Sequence[Any],
        **options: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """As ``gradient``, by ``mlp_adjoint.meta_gradient``: ``inner`` and ``outer`` are losses of the outputs, and
        ``stages`` hold for each stage what it is adapted on and what it is scored on, (support, query)."""
        theta, sizes = self.theta_and_sizes(meta)
        found = mlp_adjoint.meta_gradient(
            network,
            inner,
            theta,
            [support for support, _ in stages[:-1]],
            [query for _, query in stages],
            sizes,
            outer=outer,
            stage_weights=self.weights,
            first_order=self.inner.first_order,
            learn_lr=self.inner.learn_lr,
            chunk=None if self.chunk == self.tasks else self.chunk,
            seeds=self.seeds,
            **options,
        )
        check_finite("meta-loss", [found.loss])
        gradient = list(found.gradient)
        if self.inner.learn_lr:  # one step size for all steps
            gradient += [sum(step[i] for step in found.by_step_size) for i in self.inner.adapts(theta)]
        return self._averaged(self.mean(found.loss), gradient)

    def theta_and_sizes(self, meta: list[Tensor]) -> tuple[list[Tensor], list[list[Any]]]:
        """theta, and for each inner step the step size of each parameter, 0 where it does not adapt."""
        theta, learned = split_meta(self.inner, [p.detach() for p in meta])
        adapts, sizes = self.inner.adapts(theta), []
        for step in range(self.inner.steps):
            own = [self.inner.rate(step)] * len(adapts) if learned is None else learned
            sizes.append([own[adapts.index(i)] if i in adapts else 0.0 for i in range(len(theta))])
        return theta, sizes

    def value(self, meta: list[Tensor], outer: Loss) -> Tensor:
        """Mean over tasks of the weighted loss, without a gradient."""
        return self.average([self._value(meta, outer)])[0]

    def _value(self, meta: list[Tensor], outer: Loss) -> Tensor:
        total = 0.0
        for stages, tasks in self.chunks():
            phi = self.adapted([p.detach() for p in meta], stages, tasks, create_graph=False)
            with torch.no_grad():
                total = total + self.mean(self.weighted(outer, phi, stages))
        return total


def split_meta(inner: Inner, meta: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Meta-parameters -> (theta, step sizes or None)."""
    if not inner.learn_lr:
        return meta, None
    adapted = len(meta) // 2 if inner.adapted is None else len(inner.adapted)
    return meta[:-adapted], meta[-adapted:]


def for_tasks(meta: Sequence[Tensor], tasks: int) -> list[Tensor]:
    """Of parameters (S, ...), one set per seed, each task's own: (M S, ...), the seeds of task 0 first."""
    return [p.expand(tasks, *p.shape).flatten(0, 1) for p in meta]
