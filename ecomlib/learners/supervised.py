"""MAML for regression and classification (Finn, Abbeel and Levine 2017): chapter "MAML, derived"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from ..families.base import require, whole
from ..networks import Network
from .adaptation import Inner, adapt
from .meta import GradientStep, MetaLearner, MetaObjective, OuterStep, iteration_generator, split_meta


class Examples(NamedTuple):
    """Labelled examples of M tasks."""

    x: Tensor  # (M, points, features)
    y: Tensor  # (M, points, outputs), or (M, points) int64 classes


class ExampleSource(Protocol):
    """A distribution of regression or classification tasks."""

    def tasks(self, task_id: Tensor) -> Any:
        """Tasks named by their ids (M,) int64."""

    def sample(self, tasks: Any, points: int, seed: int, episode: int = 0) -> tuple[Tensor, Tensor]:
        """(x, y) of every task; another ``episode`` gives other points."""


def mean_squared_error(output: Tensor, y: Tensor) -> Tensor:
    """(M,) from outputs and targets (M, points, outputs)."""
    return ((output - y) ** 2).mean((-2, -1))


def cross_entropy_loss(output: Tensor, y: Tensor) -> Tensor:
    """(M,) from scores (M, points, classes) and classes (M, points) int64."""
    return cross_entropy(output.movedim(-1, -2) if output.dim() > 2 else output, y, reduction="none").mean(-1)


class SupervisedMAML(MetaLearner):
    """Initial weights from which ``inner.steps`` gradient steps on ``shots`` examples fit a new task.

    Every data set of a task (each support set and the query) holds fresh examples. With several inner steps the same
    support serves all of them if ``same_support``, as in the paper; else each step has its own.
    """

    def __init__(
        self,
        network: Network,
        inner: Inner,
        outer: OuterStep | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = mean_squared_error,
        shots: int = 10,
        queries: int = 10,
        tasks: int = 25,
        stage_weights: tuple[float, ...] | None = None,
        same_support: bool = True,
        chunk: int | None = None,
    ):
        for name, value in (("shots", shots), ("queries", queries), ("tasks", tasks)):
            require(whole(value, 1), f"SupervisedMAML.{name}", value, "a whole number >= 1")
        self.network, self.inner, self.outer, self.of_outputs = network, inner, outer or GradientStep(), loss
        self.shots, self.queries, self.tasks, self.chunk = shots, queries, tasks, chunk
        self.stage_weights = stage_weights or (0.0,) * inner.steps + (1.0,)
        require(
            len(self.stage_weights) == inner.steps + 1 and any(self.stage_weights),
            "SupervisedMAML.stage_weights",
            stage_weights,
            f"inner.steps + 1 = {inner.steps + 1} numbers, not all 0",
        )
        self.same_support = same_support
        self.name = f"{self.outer.name} MAML"

    def initial(self, generator: Generator) -> list[Tensor]:
        """Weights as the network draws them, then step sizes where they are learned."""
        theta = self.network.initial(generator)
        return theta + (self.inner.step_sizes(theta) if self.inner.learn_lr else [])

    def loss(self, parameters: list[Tensor], data: Examples) -> Tensor:
        """(M,) loss of one data set."""
        return self.of_outputs(self.network.outputs(parameters, data[0]), data[1])

    def train_task(self, meta: list[Tensor], support: Examples, steps: int | None = None) -> list[list[Tensor]]:
        """Adapt to M tasks from their support examples: [phi_0, ..., phi_K]. A task that diverges is left to do so (it
        is counted at evaluation), and does not touch the others."""
        theta, step_sizes = split_meta(self.inner, [p.detach() for p in meta])
        data = [support] * (steps or self.inner.steps)
        return adapt(self.loss, self.inner, theta, data, len(support[0]), step_sizes, create_graph=False, guard=False)

    def evaluate_task(self, parameters: list[Tensor], query: Examples) -> Tensor:
        """(M,) loss on query examples."""
        with torch.no_grad():
            return self.loss(parameters, query)

    def objective(self, source: ExampleSource, meta: list[Tensor], seed: int, iteration: int) -> MetaObjective:
        """Fresh tasks, their support sets and their query."""
        ids = torch.randint(2**62, (self.tasks,), generator=iteration_generator(seed, iteration)).to(meta[0].device)
        tasks, steps = source.tasks(ids), self.inner.steps
        draw = lambda points, episode: Examples(*source.sample(tasks, points, seed, episode))
        support = [draw(self.shots, 0)] * steps if self.same_support else [draw(self.shots, k) for k in range(steps)]
        query = draw(self.queries, steps)
        return SupervisedObjective(self, support, query)


class SupervisedObjective(MetaObjective):
    """The meta-objective with one query set, which scores every stage that counts."""

    def __init__(self, learner: SupervisedMAML, support: list[Examples], query: Examples):
        take = lambda data, part: Examples(data.x[part], data.y[part])
        super().__init__(
            learner.inner,
            learner.loss,
            [*support, query],
            learner.stage_weights,
            learner.tasks,
            take,
            learner.chunk,
        )

    def weighted(self, outer: Any, phi: Any, stages: Any) -> Tensor:
        """(M,) as in ``MetaObjective``, on the query whatever the stage."""
        return super().weighted(outer, phi, [stages[-1]] * len(stages))
