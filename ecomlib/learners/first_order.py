"""Meta-learning without second derivatives: chapter "MAML, derived", section on first-order methods.

First-order MAML is ``Inner(first_order=True)`` with any outer step. Reptile is an outer step of its own, below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..families.base import check, number
from .meta import MetaObjective, adam_step


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

    def __post_init__(self):
        check(self, "lr", lambda x: number(x, 0), "a finite number > 0")
        check(self, "adam", lambda x: isinstance(x, bool), "True or False")

    def update(self, objective: MetaObjective, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``meta.OuterStep.update``. Raises ``ValueError`` where step sizes are learned."""
        if objective.inner.learn_lr:
            raise ValueError(
                "Inner.learn_lr = True; allowed: False with ReptileStep, which has no gradient of step sizes"
            )
        direction = [-p for p in meta]
        for stages, tasks in objective.chunks():
            phi = objective.adapted([p.detach() for p in meta], stages, tasks, create_graph=False)[-1]
            for i, p in enumerate(meta):
                share = tasks / objective.tasks
                direction[i] = direction[i] + (phi[i].mean(0) if i in objective.inner.adapts(meta) else p) * share
        direction = [d.detach() for d in direction]
        if self.adam:
            meta, memory = adam_step(meta, [-d for d in direction], self.lr, memory)
        else:
            meta = [p + self.lr * d for p, d in zip(meta, direction)]
        return meta, memory, {"distance": sum((d**2).sum() for d in direction).sqrt().item()}
