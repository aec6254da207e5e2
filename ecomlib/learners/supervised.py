"""MAML for regression and classification (Finn, Abbeel and Levine 2017): chapter "MAML, derived"."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from ..families.base import require, whole
from ..networks import MLP, Network
from . import mlp_adjoint, output_losses
from .adaptation import Inner, adapt, meta_gradient
from .meta import GradientStep, MetaLearner, OuterStep, Seeds
from .objective import MetaObjective, split_meta


class Examples(NamedTuple):
    """Labelled examples of M tasks."""

    x: Tensor  # (M, points, features)
    y: Tensor  # (M, points, outputs), or (M, points) int64 classes


class ExampleSource(Protocol):
    """A distribution of regression or classification tasks."""

    def tasks(self, task_id: Tensor) -> Any:
        """Tasks named by their ids (M,) int64."""

    def sample(self, tasks: Any, points: int, seed: int | Tensor, episode: int = 0) -> tuple[Tensor, Tensor]:
        """(x, y) of every task; another ``episode`` gives other points. ``seed`` is one of all tasks or, where several
        seeds train together, one of each, (M,)."""


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
        by_hand: bool = False,
        compile: bool = False,
    ):
        """``by_hand`` differentiates an MLP with one of this file's two losses by ``mlp_adjoint``: the same numbers up
        to rounding, several times faster. ``compile`` hands the meta-gradient, by hand or (any other network) by
        ``torch.func``, to ``torch.compile``: some 10 seconds at the first iteration, several times faster after it;
        without ``by_hand`` it needs the loss after the last step alone, and step sizes that are not learned."""
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
        self.same_support, self.by_hand, self.compile = same_support, by_hand, compile
        if by_hand:
            known = isinstance(network, MLP) and network.activation in mlp_adjoint.ACTIVATIONS and loss in AT_OUTPUTS
            require(
                known, "SupervisedMAML.by_hand", by_hand, "False, but for a tanh or ReLU MLP and a loss of this file"
            )
        elif compile:
            plain = not any(self.stage_weights[:-1]) and not inner.learn_lr
            require(
                plain, "SupervisedMAML.compile", compile, "True with by_hand, or without stage weights and learn_lr"
            )
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
        data = [support] * (self.inner.steps if steps is None else steps)
        return adapt(self.loss, self.inner, theta, data, len(support[0]), step_sizes, create_graph=False, guard=False)

    def evaluate_task(self, parameters: list[Tensor], query: Examples) -> Tensor:
        """(M,) loss on query examples."""
        with torch.no_grad():
            return self.loss(parameters, query)

    @property
    def batches_seeds(self) -> bool:
        """Whether ``meta_train`` takes a sequence of seeds; not with the compiled ``torch.func`` engine."""
        return self.outer.batches_seeds and (self.by_hand or not self.compile)

    def objective(self, source: ExampleSource, meta: list[Tensor], seed: Seeds, iteration: int) -> MetaObjective:
        """Fresh tasks, their support sets and their query."""
        ids, luck = self.draw(self.tasks, seed, iteration, meta[0].device)
        tasks, steps = source.tasks(ids), self.inner.steps
        draw = lambda points, episode: Examples(*source.sample(tasks, points, luck, episode))
        support = [draw(self.shots, 0)] * steps if self.same_support else [draw(self.shots, k) for k in range(steps)]
        query = draw(self.queries, steps)
        return SupervisedObjective(self, support, query, len(seed) if isinstance(luck, Tensor) else None)


AT_OUTPUTS = {mean_squared_error: output_losses.squared_error, cross_entropy_loss: output_losses.cross_entropy}
"""Loss -> the same for ``mlp_adjoint``."""


@lru_cache(maxsize=8)
def _compiled(learner: SupervisedMAML) -> Callable[..., list[Tensor]]:
    """The meta-gradient of ``adaptation.meta_gradient`` as one compiled function of (theta, support, query)."""
    loss = lambda parameters, data: learner.loss(parameters, Examples(*data))
    gradient = lambda theta, support, query: meta_gradient(loss, loss, learner.inner, theta, support, query, 0)
    return torch.compile(gradient, fullgraph=True, dynamic=False)


class SupervisedObjective(MetaObjective):
    """The meta-objective with one query set, which scores every stage that counts."""

    def __init__(self, learner: SupervisedMAML, support: list[Examples], query: Examples, seeds: int | None = None):
        self.learner = learner
        take = lambda data, part: Examples(data.x[part], data.y[part])
        super().__init__(
            learner.inner,
            learner.loss,
            [*support, query],
            learner.stage_weights,
            len(query.x) // (seeds or 1),
            take,
            learner.chunk,
            seeds=seeds,
            shards=learner.shards,
        )

    def weighted(self, outer: Any, phi: Any, stages: Any) -> Tensor:
        """(M,) as in ``MetaObjective``, on the query whatever the stage."""
        return super().weighted(outer, phi, [stages[-1]] * len(stages))

    def gradient(self, meta: list[Tensor], outer: Any) -> tuple[Tensor, list[Tensor]]:
        """As in ``MetaObjective``, by the engine that the learner was given. The compiled ``torch.func`` engine gives
        no loss: it is computed besides."""
        learner, data = self.learner, [tuple(stage) for stage in self.stages]
        if learner.by_hand:
            loss = AT_OUTPUTS[learner.of_outputs]
            pairs = [(support, data[-1]) for support in data]
            return self.gradient_by_hand(meta, learner.network, loss, loss, pairs, compile=learner.compile)
        if learner.compile:
            gradient = _compiled(learner)([p.detach() for p in meta], data[:-1], data[-1])
            return self._averaged(self._value(meta, outer), gradient)
        return super().gradient(meta, outer)
