"""Meta-learning without second derivatives: chapter "MAML, derived", section on first-order methods.

First-order MAML is ``Inner(first_order=True)`` with any outer step. Reptile is an outer step of its own, below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families.base import check, number, require
from .meta import adam_step
from .objective import MetaObjective


@dataclass(frozen=True)
class ReptileStep:
    """Move towards the adapted parameters, theta <- theta + beta mean(phi_K - theta), equation (eq-reptile) (Nichol,
    Achiam and Schulman 2018).

    The query data are not used; give the inner loop at least 2 steps, for with 1 this is training on the average task.
    Not defined for learned step sizes.
    """

    lr: float = 0.1
    """beta, the share of the way."""
    adam: bool = False
    """Hand the direction to Adam, with step size ``lr``, instead of taking it as it is."""
    name = "Reptile"
    batches_seeds = True

    def __post_init__(self):
        check(self, "lr", lambda x: number(x, 0), "a finite number > 0")
        check(self, "adam", lambda x: isinstance(x, bool), "True or False")

    def update(self, objective: MetaObjective, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``meta.OuterStep.update``. Raises ``ValueError`` where step sizes are learned, or nothing is adapted."""
        inner, seeds = objective.inner, objective.seeds
        no_gradient = "False with ReptileStep, which has no gradient of step sizes"
        require(not inner.learn_lr, "Inner.learn_lr", inner.learn_lr, no_gradient)
        require(inner.steps > 0, "Inner.steps", inner.steps, "a whole number >= 1 with ReptileStep")
        meta = [p.detach() for p in meta]
        direction = [-p if i in inner.adapts(meta) else torch.zeros_like(p) for i, p in enumerate(meta)]
        for stages, tasks in objective.chunks():
            phi = objective.adapted(meta, stages, tasks, create_graph=False)[-1]
            for i in inner.adapts(meta):
                direction[i] = direction[i] + objective.mean(phi[i].detach())
        direction, objective.averages = objective.average_with_numbers(direction)
        if self.adam:
            meta, memory = adam_step(meta, [-d for d in direction], self.lr, memory, seeds)
        else:
            meta = [p + self.lr * d for p, d in zip(meta, direction)]
        axes = 0 if seeds is None else 1
        distance = sum((d**2).flatten(axes).sum(-1) for d in direction).sqrt()
        return meta, memory, {**objective.returns(), "distance": distance}
