"""The inner loop: phi = theta - alpha grad loss(theta, support), and the gradient through it (chapter "MAML, derived").

Two engines, tested equal. ``adapt_task`` and ``meta_gradient`` read like the equations: one task, ``torch.func.grad``
inside ``vmap`` inside ``torch.func.grad``. ``adapt`` does M tasks at once on parameters with a task axis; it is what
the learners use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from ..families.base import check, number, whole
from ..surrogates import Surrogate, log_likelihood
from .finite import check_finite

Loss = Callable[[list[Tensor], Any], Tensor]
"""(parameters, data) -> (M,) loss of each task, to be minimised; a scalar when neither has a task axis."""


@dataclass(frozen=True)
class Inner:
    """How a task is adapted to: gradient descent from the meta-parameters."""

    steps: int = 1
    """Inner steps, each on support data of its own. With 0 nothing is adapted: theta itself is trained, on all tasks (a
    recurrent policy then has its memory to adapt with)."""
    lr: float | tuple[float, ...] = 0.1
    """alpha, one for all steps or one a step; where ``learn_lr``, only the first guess."""
    surrogate: Surrogate = log_likelihood
    """What a reinforcement learner descends (its negative); a supervised learner brings its loss instead."""
    first_order: bool = False
    """Leave out second derivatives: first-order MAML (FOMAML)."""
    adapted: tuple[int, ...] | None = None
    """Indices of the parameters that adapt, None for all: ``policy.head`` is ANIL, the context vector alone CAVIA."""
    learn_lr: bool = False
    """Meta-SGD: a step size for every single parameter, learned with the parameters."""

    def __post_init__(self):
        check(self, "steps", lambda x: whole(x, 0, 10**4), "a whole number from 0 to 10000")
        per_step = lambda x: isinstance(x, tuple) and len(x) == max(self.steps, 1) and all(number(a, 0) for a in x)
        check(
            self, "lr", lambda x: number(x, 0) or per_step(x), f"a finite number > 0, or steps = {self.steps} of them"
        )
        check(self, "surrogate", callable, "a function (policy, parameters, data, advantage) -> (M,)")
        check(self, "first_order", lambda x: isinstance(x, bool), "True or False")
        indices = lambda x: isinstance(x, tuple) and len(x) > 0 and all(whole(i, 0) for i in x)
        check(self, "adapted", lambda x: x is None or indices(x), "None or indices of parameters, whole numbers >= 0")
        one_rate = lambda x: isinstance(x, bool) and not (x and (isinstance(self.lr, tuple) or self.steps == 0))
        check(self, "learn_lr", one_rate, "True or False; True needs steps >= 1 and one lr for all of them")

    def rate(self, step: int) -> float:
        """alpha of a step; steps beyond the last keep the last one's."""
        return self.lr[min(step, len(self.lr) - 1)] if isinstance(self.lr, tuple) else self.lr

    def adapts(self, parameters: Sequence[Tensor]) -> tuple[int, ...]:
        """Indices of the parameters that adapt."""
        return tuple(range(len(parameters))) if self.adapted is None else self.adapted

    def step_sizes(self, parameters: list[Tensor]) -> list[Tensor]:
        """Meta-SGD's first step sizes: one tensor for each adapted parameter, filled with ``lr``."""
        return [torch.full_like(parameters[i], self.rate(0)) for i in self.adapts(parameters)]


def adapt(
    loss: Loss,
    inner: Inner,
    parameters: list[Tensor],
    support: Sequence[Any],
    tasks: int,
    step_sizes: list[Tensor] | None = None,
    shared: bool = True,
    create_graph: bool = True,
    guard: bool = True,
) -> list[list[Tensor]]:
    """Adapt M tasks at once, equation (eq-inner-step): [phi_0, ..., phi_K], phi_0 = the parameters of every task.

    ================  ==========================================================================================
    Argument          Meaning
    ================  ==========================================================================================
    loss              (parameters with a task axis, one data set of all tasks) -> (M,)
    parameters        of the network, without a task axis; with one, (M, ...), where ``shared`` is False
    support           K data sets, one for each inner step (K may differ from ``inner.steps``); with none, phi_0 is
                      returned as it came
    tasks             M
    step_sizes        Meta-SGD's, one tensor for each adapted parameter, of its shape; or one per task, (M, ...)
    create_graph      keep the graph, so that gradients of phi with respect to the parameters exist
    guard             raise ``FloatingPointError`` naming task, step and tensor where a gradient is not finite
    ================  ==========================================================================================

    The gradient of the *sum* over tasks is the stack of the tasks' own gradients, since they share no parameter.
    Parameters that do not adapt stay shared.
    """
    adapts = inner.adapts(parameters) if support else ()
    phi = list(parameters)
    for i in adapts:
        phi[i] = phi[i].expand(tasks, *phi[i].shape) if shared else phi[i]
        phi[i] = phi[i] if phi[i].requires_grad else phi[i].detach().requires_grad_()
    stages = [phi]
    for step, data in enumerate(support):
        own = [phi[i] for i in adapts]
        # First order cuts the graph of the gradient only: phi still depends on theta, with derivative 1.
        with torch.enable_grad():
            total = loss(phi, data).sum()
        gradient = torch.autograd.grad(total, own, create_graph=create_graph and not inner.first_order)
        if guard:
            check_finite(f"inner gradient at step {step}", gradient)
        phi = list(phi)
        for j, i in enumerate(adapts):
            rate = inner.rate(step) if step_sizes is None else step_sizes[j]
            phi[i] = own[j] - rate * gradient[j]
            if not create_graph:
                phi[i] = phi[i].detach().requires_grad_()
        stages.append(phi)
    return stages


def adapt_task(
    loss: Loss, inner: Inner, parameters: list[Tensor], support: Sequence[Any], step_sizes: list[Tensor] | None = None
) -> list[Tensor]:
    """One task, as the equation (eq-inner-step) reads: phi_K from parameters and data without a task axis.

    ``loss`` is then (parameters, data) -> scalar. The reference that ``adapt`` is tested against; differentiable by
    ``torch.func`` to any order, for any ``nn.Module`` (``networks.Module``).
    """
    adapts, phi = inner.adapts(parameters), list(parameters)
    for step, data in enumerate(support):

        def own_loss(own: list[Tensor], phi: list[Tensor] = phi, data: Any = data) -> Tensor:
            replaced = list(phi)
            for i, value in zip(adapts, own):
                replaced[i] = value
            return loss(replaced, data)

        own = [phi[i] for i in adapts]
        gradient = grad(own_loss)(own)
        phi = list(phi)
        for j, i in enumerate(adapts):
            g = gradient[j].detach() if inner.first_order else gradient[j]
            phi[i] = own[j] - (inner.rate(step) if step_sizes is None else step_sizes[j]) * g
    return phi


def meta_gradient(
    loss: Loss,
    outer_loss: Loss,
    inner: Inner,
    parameters: list[Tensor],
    support: Sequence[Any],
    query: Any,
    task_axis: int,
) -> list[Tensor]:
    """Gradient of the mean over tasks of outer_loss(phi_K, query), equation (eq-maml-gradient), by ``torch.func``.

    Data have their task axis at ``task_axis`` (1 for trajectories, 0 for a batch of regressions); the losses see one
    task at a time. ``torch.compile`` takes this function whole: the fast form for an arbitrary module.
    """

    def after_adaptation(theta: list[Tensor]) -> Tensor:
        one = lambda support, query: outer_loss(adapt_task(loss, inner, theta, support), query)
        return vmap(one, in_dims=(task_axis, task_axis))(tuple(support), query).mean()

    return grad(after_adaptation)(list(parameters))
