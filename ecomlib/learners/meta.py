"""What supervised and reinforcement meta-learners share: the meta-objective on the data of one iteration, an outer step
that improves it, and the loop (chapters "MAML, derived" and "Meta-reinforcement learning")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from ..families.base import check, number, require, whole
from ..networks import MLP
from . import mlp_adjoint
from .adaptation import Inner, Loss, adapt, check_finite
from .output_losses import OutputLoss


class MetaObjective:
    """The loss after adaptation as a function of the meta-parameters, at the data of one iteration.

    ``stages`` are data sets D_0, ..., D_K: D_k is the support of inner step k + 1 and the query of phi_k, so a data set
    never scores parameters that it has been used to adapt. ``weights`` (K + 1,) say how much the loss of phi_k on D_k
    counts; (0, ..., 0, 1) is the loss after the last step. ``take(data, slice)`` selects tasks. Meta-parameters are
    theta, then Meta-SGD's step sizes where they are learned.
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
    ):
        self.inner, self.loss, self.stages, self.weights, self.tasks = inner, loss, stages, weights, tasks
        self.take, self.chunk, self.extra = take, chunk or tasks, extra

    def chunks(self) -> Iterator[tuple[list[Any], int]]:
        """The stages of ``chunk`` tasks at a time, and their number: memory grows with the chunk, not with M."""
        for start in range(0, self.tasks, self.chunk):
            part = slice(start, min(start + self.chunk, self.tasks))
            yield [self.take(stage, part) for stage in self.stages], part.stop - start

    def adapted(self, meta: list[Tensor], stages: Sequence[Any], tasks: int, create_graph: bool) -> list[list[Tensor]]:
        """[phi_0, ..., phi_K] of these tasks, each adapted on the stages before it."""
        theta, step_sizes = split_meta(self.inner, meta)
        return adapt(self.loss, self.inner, theta, stages[:-1], tasks, step_sizes, create_graph=create_graph)

    def weighted(self, outer: Loss, phi: Sequence[list[Tensor]], stages: Sequence[Any]) -> Tensor:
        """(M,) sum over k of weight_k times the outer loss of phi_k on D_k."""
        terms = [w * outer(p, data) for w, p, data in zip(self.weights, phi, stages, strict=True) if w]
        total = torch.stack(terms).sum(0)
        return total if self.extra is None else total + self.extra(phi, stages)

    def gradient(self, meta: list[Tensor], outer: Loss) -> tuple[float, list[Tensor]]:
        """Mean over tasks of the weighted loss, and its gradient, equation (eq-maml-gradient), chunk by chunk."""
        leaves = [p.detach().requires_grad_() for p in meta]
        value, gradient = 0.0, [torch.zeros_like(p) for p in meta]
        for stages, tasks in self.chunks():
            loss = self.weighted(outer, self.adapted(leaves, stages, tasks, create_graph=True), stages)
            check_finite("meta-loss", [loss])
            loss = loss.sum() / self.tasks
            value += loss.item()
            for total, g in zip(gradient, torch.autograd.grad(loss, leaves, allow_unused=True)):
                if g is not None:
                    total += g
        check_finite("meta-gradient", gradient, tasks=False)
        return value, gradient

    def gradient_by_hand(
        self,
        meta: list[Tensor],
        network: MLP,
        inner: OutputLoss,
        outer: OutputLoss,
        stages: Sequence[Any],
        **options: Any,
    ) -> tuple[float, list[Tensor]]:
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
            **options,
        )
        check_finite("meta-loss", [found.loss])
        gradient = list(found.gradient)
        if self.inner.learn_lr:  # one step size for all steps
            gradient += [sum(step[i] for step in found.by_step_size) for i in self.inner.adapts(theta)]
        check_finite("meta-gradient", gradient, tasks=False)
        return found.loss.mean().item(), gradient

    def theta_and_sizes(self, meta: list[Tensor]) -> tuple[list[Tensor], list[list[Any]]]:
        """theta, and for each inner step the step size of each parameter, 0 where it does not adapt."""
        theta, learned = split_meta(self.inner, [p.detach() for p in meta])
        adapts, sizes = self.inner.adapts(theta), []
        for step in range(self.inner.steps):
            own = [self.inner.rate(step)] * len(adapts) if learned is None else learned
            sizes.append([own[adapts.index(i)] if i in adapts else 0.0 for i in range(len(theta))])
        return theta, sizes

    def value(self, meta: list[Tensor], outer: Loss) -> float:
        """Mean over tasks of the weighted loss, without a gradient."""
        total = 0.0
        for stages, tasks in self.chunks():
            phi = self.adapted([p.detach() for p in meta], stages, tasks, create_graph=False)
            with torch.no_grad():
                total += self.weighted(outer, phi, stages).sum().item() / self.tasks
        return total


def split_meta(inner: Inner, meta: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Meta-parameters -> (theta, step sizes or None)."""
    if not inner.learn_lr:
        return meta, None
    adapted = len(meta) // 2 if inner.adapted is None else len(inner.adapted)
    return meta[:-adapted], meta[-adapted:]


# ----------------------------------------------------------------------------------------------- outer steps
class OuterStep(Protocol):
    """How the meta-parameters move, given a ``MetaObjective``. Its settings are its only state."""

    name: str
    """What stands before "-MAML" in the name of the learner."""

    def update(self, objective: Any, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict[str, float]]:
        """New meta-parameters, what to remember until the next call (first None), and numbers worth logging."""


def adam_step(
    meta: list[Tensor], gradient: list[Tensor], lr: float | Sequence[float], memory: dict | None
) -> tuple[list[Tensor], dict]:
    """One step of ``torch.optim.Adam`` down ``gradient``, as a function: its state goes in and comes out. ``lr`` is one
    step size, or one for each parameter."""
    leaves = [p.detach().clone().requires_grad_() for p in meta]
    rates = [lr] * len(meta) if isinstance(lr, float | int) else lr
    optimiser = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(leaves, rates, strict=True)])
    if memory is not None:
        optimiser.load_state_dict(memory)
    for leaf, g in zip(leaves, gradient):
        leaf.grad = g
    optimiser.step()
    return [p.detach() for p in leaves], optimiser.state_dict()


@dataclass(frozen=True)
class GradientStep:
    """One Adam step down the meta-gradient of an iteration's data: supervised MAML."""

    lr: float = 1e-3
    """beta, the outer step size."""
    name = "supervised"

    def __post_init__(self):
        check(self, "lr", lambda x: number(x, 0), "a finite number > 0")

    def update(self, objective: MetaObjective, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``OuterStep.update``."""
        value, gradient = objective.gradient(meta, objective.loss)
        meta, memory = adam_step(meta, gradient, self.lr, memory)
        return meta, memory, {"loss": value}


# ----------------------------------------------------------------------------------------------- the loop
class MetaTraining(NamedTuple):
    """Where meta-training stands: everything needed to go on, and what it logged so far."""

    iteration: int
    """Iterations done."""
    meta: list[Tensor]
    """Meta-parameters."""
    memory: Any
    """What the outer step remembers (Adam's moments)."""
    history: list[dict[str, float]]
    """Numbers logged by each iteration."""


class MetaLearner:
    """Learns parameters from which a few steps lead to good ones. The verbs:

    - ``train_task``: adapt to tasks from their support data; gives phi_0, ..., phi_K;
    - ``evaluate_task``: how adapted parameters do on query data that adaptation has not seen;
    - ``meta_train``: many tasks, one outer step each iteration.
    """

    name: str
    inner: Inner
    outer: OuterStep

    def initial(self, generator: Generator) -> list[Tensor]:
        """Meta-parameters to start from: theta, then step sizes where they are learned."""
        raise NotImplementedError

    def objective(self, source: Any, meta: list[Tensor], seed: int, iteration: int) -> MetaObjective:
        """Draw the tasks and the data of an iteration."""
        raise NotImplementedError

    def meta_train(
        self,
        source: Any,
        seed: int,
        iterations: int,
        start: MetaTraining | None = None,
        device: str = "cpu",
        progress: bool = True,
        callback: Callable[[MetaTraining], None] | None = None,
    ) -> MetaTraining:
        """``iterations`` outer steps on fresh tasks of ``source``, a family.

        Continues ``start`` if given, with the same numbers as an uninterrupted run: an iteration depends only on
        (seed, its number, meta-parameters, memory). ``callback`` sees every state, to save or to plot it. Raises
        ``FloatingPointError`` naming iteration, task, step and tensor at the first value that is not finite.
        """
        require(whole(iterations, 1), "iterations", iterations, "a whole number >= 1")
        if start is None:
            meta = [p.to(device) for p in self.initial(Generator().manual_seed(seed))]
            start = MetaTraining(0, meta, None, [])
        state = start._replace(history=list(start.history))
        remaining = range(state.iteration, iterations)
        for iteration in tqdm(remaining, desc=self.name, unit="iteration", disable=not progress):
            try:
                objective = self.objective(source, state.meta, seed, iteration)
                meta, memory, log = self.outer.update(objective, state.meta, state.memory)
                check_finite("meta-parameter", meta, tasks=False)
            except FloatingPointError as error:
                raise FloatingPointError(f"{self.name}, iteration {iteration}: {error}") from None
            state.history.append(log)
            state = MetaTraining(iteration + 1, meta, memory, state.history)
            if callback is not None:
                callback(state)
        return state


def iteration_generator(seed: int, iteration: int) -> Generator:
    """The generator that draws the tasks of one iteration: no state to carry from one to the next."""
    return Generator().manual_seed(seed * 1_000_003 + iteration)
