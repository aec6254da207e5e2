"""The meta-gradient of an MLP without a graph: backward pass by hand, and the adjoint of the inner steps.

K inner steps phi_{k+1} = phi_k - a_k * grad L(phi_k; D_k), from parameters shared by M tasks, have the Jacobian

    J = (I - diag(a_{K-1}) H_{K-1}) ... (I - diag(a_0) H_0),        H_k the Hessian of L at phi_k,

so the meta-gradient J^T grad L(phi_K; D_K) is the recursion v <- v - H_k (a_k * v) from the last step to the first:
nothing of third order, and no graph through the gradient. A Hessian-vector product is one more forward and backward
pass over saved activations (the R-operator, Pearlmutter 1994). The natural gradient of TRPO needs J^T F J, F the Fisher
information at phi_K: at the parameters that acted, it equals the Hessian of the divergence *through* adaptation.

The numbers are those of ``adaptation.py``, which reads like the equation; this file is for speed. A Hessian-vector
product is a method of ``mlp_pass.Pass``. All data are task first: a data set is a tuple whose first entry is the input
(M, ..., in), and a *loss* looks at outputs only (``output_losses.py``). Chapter "MAML, derived".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..families.base import require, whole
from ..networks import MLP
from .mlp_pass import ACTIVATIONS, Parameters, Pass
from .output_losses import OutputLoss

CACHE = 2**20
"""Bytes of activations that one core's cache is trusted with."""


class Adaptation:
    """K inner steps of M tasks from shared ``parameters``, and the products with their Jacobian.

    ``stages`` are phi_0 (shared), phi_1, ..., phi_K (one per task). If ``parameters`` have a task axis, nothing is
    shared, and derivatives by them are each task's own instead of sums over tasks. ``step_sizes`` holds for each step
    one number or 0-d tensor for all parameters, or one tensor per parameter (0 where a parameter is not adapted).
    ``first_order`` takes J = I (FOMAML).
    """

    def __init__(self, activation: Callable, loss: OutputLoss, parameters: Parameters, support: Sequence[Any],
                 step_sizes: Sequence[Any], layers: int, first_order: bool = False):  # fmt: skip
        self.sizes = [size if isinstance(size, (list, tuple)) else [size] * len(parameters) for size in step_sizes]
        self.stages, self.passes, self.first_order = [parameters], [], first_order
        self.shared = parameters[0].dim() == 2
        self.total = lambda x: x.sum(0) if self.shared else x
        for data, sizes in zip(support, self.sizes, strict=True):
            self.passes.append(Pass(activation, loss, layers, self.stages[-1], data, not first_order))
            gradient = self.passes[-1].gradient()
            self.stages.append([p - a * g for p, a, g in zip(self.stages[-1], sizes, gradient)])

    def push_forward(self, direction: Parameters) -> list[Parameters]:
        """Derivatives of phi_0, ..., phi_K along a ``direction`` v (in, out) of the shared parameters: v, ..., J v."""
        tangents = [direction]
        for step, sizes in zip(self.passes, self.sizes):
            change = [0.0] * len(direction) if self.first_order else step.hessian(tangents[-1])
            tangents.append([v - a * h for v, a, h in zip(tangents[-1], sizes, change)])
        return tangents

    def pull_back(
        self, cotangents: Sequence[Parameters | None], learn_lr: bool = False
    ) -> tuple[Parameters, list[Parameters]]:
        """Gradient, by the shared parameters, of a sum over tasks; and by the step sizes, if ``learn_lr``.

        ``cotangents`` are the gradients by phi_0 (summed over tasks) to phi_K (one per task), each as if the others
        were constants; None stands for 0. The second result has (in, out) for each step and parameter.
        """
        *earlier, adjoint = cotangents
        if adjoint is None:
            adjoint = [torch.zeros_like(p) for p in self.stages[-1]]
        by_step_size = []
        for k in reversed(range(len(self.passes))):
            if learn_lr:
                by_step_size.insert(0, [-self.total(v * g) for v, g in zip(adjoint, self.passes[k].gradient())])
            before = [v.sum(0) for v in adjoint] if k == 0 and self.shared else adjoint
            if not self.first_order:
                stepped = [a * v for a, v in zip(self.sizes[k], adjoint)]
                before = [v - h for v, h in zip(before, self.passes[k].hessian(stepped, k == 0 and self.shared))]
            adjoint = before if earlier[k] is None else [v + c for v, c in zip(before, earlier[k])]
        return adjoint, by_step_size


class MetaGradient(NamedTuple):
    """Loss after adaptation, and the gradients of its mean over tasks."""

    loss: Tensor  # (M,), the sum over stages
    gradient: Parameters  # by the shared parameters
    by_step_size: list[Parameters]  # by the step sizes of each step and parameter; empty unless asked for


def _meta_gradient(
    network, inner, outer, first_order, learn_lr, stage_weights, tasks, seeds, parameters, support, query, step_sizes
):
    """One chunk's share of the mean over all ``tasks``."""
    layers, rows = len(network.sizes) - 1, len(query[-1][0])
    if seeds is not None:  # every task has parameters of its own, the seeds' in turn
        own = lambda p: p.expand(rows // seeds, *p.shape).flatten(0, 1) if isinstance(p, Tensor) else p
        parameters, step_sizes = tree_map(own, (list(parameters), list(step_sizes)))
    adaptation = Adaptation(network.activation, inner, parameters, support, step_sizes, layers, first_order)
    loss, cotangents = query[-1][0].new_zeros(rows), []
    for k, (stage, data, weight) in enumerate(zip(adaptation.stages, query, stage_weights, strict=True)):
        if weight == 0:
            cotangents.append(None)
            continue
        at = Pass(network.activation, outer, layers, stage, data, second_order=False)
        loss = loss + weight * at.loss
        gradient = at.gradient(total=k == 0 and seeds is None)
        del at  # its activations
        cotangents.append(gradient if weight == 1 else [weight * g for g in gradient])
    gradient, by_step_size = adaptation.pull_back(cotangents, learn_lr)
    mean = lambda g: (g if seeds is None else g.unflatten(0, (-1, seeds)).sum(0)) / tasks
    return loss, *tree_map(mean, (gradient, by_step_size))


@cache
def _compiled(*settings: Any) -> Callable:
    return torch.compile(partial(_meta_gradient, *settings), fullgraph=True, dynamic=False)


@torch.no_grad()
def meta_gradient(
    network: MLP,
    inner: OutputLoss,
    parameters: Parameters,
    support: Sequence[Any],
    query: Any,
    step_sizes: Sequence[Any],
    outer: OutputLoss | None = None,
    stage_weights: Sequence[float] | None = None,
    first_order: bool = False,
    learn_lr: bool = False,
    chunk: int | None = None,
    compile: bool = False,
    seeds: int | None = None,
) -> MetaGradient:
    """Gradient of the mean over tasks of sum_k w_k outer(phi_k; query_k), by the shared ``parameters``.

    =============  ==============================  ===========================================================
    Argument       Shape                           Meaning
    =============  ==============================  ===========================================================
    inner, outer   OutputLoss                      losses of the inner steps and of the result (default inner)
    parameters     (in, out) each                  weight and bias of each layer, then those of the loss alone
    support        K data sets                     task first, input first
    query          one data set, or K + 1          for phi_K, or for every stage phi_0 to phi_K
    step_sizes     K x number or list of tensors   of each inner step, for all parameters or for each
    stage_weights  K + 1 numbers                   w_0 to w_K (default 0, ..., 0, 1)
    chunk          int                             tasks at a time; bounds memory, changes no number. Default: on
                                                   the CPU as many as keep activations in cache, elsewhere all
    compile        bool                            ``torch.compile`` (fixed shapes; 10 to 20 seconds, once)
    seeds          int S                           a seed axis: parameters, step sizes that are tensors, and results
                                                   are (S, in, out), data (M S, ...) as in ``objective.py``
    =============  ==============================  ===========================================================

    Equal to ``adaptation.meta_gradient`` to rounding. Raises ``ValueError`` if a number of data sets does not
    fit, or if the activation is not ``torch.tanh`` or ``torch.relu``.
    """
    weights, query, tasks = _stages(network, support, query, step_sizes, stage_weights)
    settings = (network, inner, outer or inner, first_order, learn_lr, weights, tasks // (seeds or 1), seeds)
    run = _compiled(*settings) if compile else partial(_meta_gradient, *settings)
    parts = _chunks(network, tasks, chunk, list(support), query, seeds=seeds or 1)
    results = [run(parameters, *part, step_sizes) for part in parts]
    if len(results) == 1:
        return MetaGradient(*results[0])
    losses, gradients, by_step_size = zip(*results)
    add = lambda parts: [sum(same[1:], same[0]) for same in zip(*parts)]
    return MetaGradient(torch.cat(losses), add(gradients), [add(parts) for parts in zip(*by_step_size)])


def _stages(network: MLP, support: Sequence, query: Any, step_sizes: Sequence, stage_weights: Sequence[float] | None):
    """Weights and data of phi_0 to phi_K, and M."""
    require(network.activation in ACTIVATIONS, "activation", network.activation, "torch.tanh or torch.relu")
    steps = len(step_sizes)
    require(len(support) == steps, "support", len(support), f"{steps} data sets, one for each step size")
    weights = tuple(stage_weights or [0.0] * steps + [1.0])
    query = query if isinstance(query, list) else [*support, query]
    for name, given in (("stage_weights", weights), ("query", query)):
        require(len(given) == steps + 1, name, len(given), f"{steps + 1}, one for each of phi_0 to phi_{steps}")
    return weights, query, len(query[-1][0])


def _chunks(network: MLP, rows: int, chunk: int | None, *data: Any, seeds: int = 1):
    """The data of a few tasks, of every seed, at a time."""
    inputs, tasks = data[-1][0][0], rows // seeds
    if chunk is None:
        row = inputs[0].numel() // inputs.shape[-1] * sum(network.sizes[1:-1]) * inputs.element_size() * seeds
        chunk = max(1, CACHE // max(row, 1)) if inputs.device.type == "cpu" else tasks
        chunk = -(-tasks // -(-tasks // chunk))  # equal parts
    require(whole(chunk, 1), "chunk", chunk, "a whole number of tasks >= 1")
    if chunk >= tasks:
        yield data
        return
    for first in range(0, tasks, chunk):
        part = slice(first * seeds, (first + chunk) * seeds)
        yield tree_map(lambda x, part=part: x[part] if isinstance(x, Tensor) else x, data)


@torch.no_grad()
def fisher_vector_product(
    network: MLP,
    inner: OutputLoss,
    divergence: OutputLoss,
    parameters: Parameters,
    support: Sequence[Any],
    query: Any,
    step_sizes: Sequence[Any],
    stage_weights: Sequence[float] | None = None,
    first_order: bool = False,
    chunk: int | None = None,
) -> Callable[[Parameters], Parameters]:
    """v -> mean over tasks of sum_k w_k J_k^T F_k J_k v, for TRPO-MAML. Arguments as of ``meta_gradient``.

    J_k is the Jacobian of phi_k and F_k the curvature of ``divergence`` at phi_k on query_k. At the parameters that
    collected the query episodes a divergence has gradient 0, so this *is* the Hessian of the mean divergence as a
    function of the shared parameters, equation (eq-adapted-fisher), without third derivatives. Activations of all
    tasks are kept between calls.
    """
    layers = len(network.sizes) - 1
    weights, query, tasks = _stages(network, support, query, step_sizes, stage_weights)
    parts = []
    for own, data in _chunks(network, tasks, chunk, list(support), query):
        adaptation = Adaptation(network.activation, inner, parameters, own, step_sizes, layers, first_order)
        at = lambda phi, data: Pass(network.activation, divergence, layers, phi, data, second_order=False)
        scored = [at(phi, data) if w else None for w, phi, data in zip(weights, adaptation.stages, data)]
        parts.append((adaptation, scored))

    @torch.no_grad()
    def product(direction: Parameters) -> Parameters:
        total = None
        for adaptation, scored in parts:
            cotangents = []
            for k, (tangent, at) in enumerate(zip(adaptation.push_forward(direction), scored)):
                image = None if at is None else at.gauss_newton(tangent, total=k == 0)
                cotangents.append(image if weights[k] in (0, 1) else [weights[k] * x for x in image])
            pulled, _ = adaptation.pull_back(cotangents)
            total = pulled if total is None else [t + p for t, p in zip(total, pulled)]
        return [t / tasks for t in total]

    return product
