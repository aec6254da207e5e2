"""The meta-gradient of an MLP without a graph: backward pass by hand, and the adjoint of the inner steps.

K inner steps phi_{k+1} = phi_k - a_k * grad L(phi_k; D_k), from parameters shared by M tasks, have the Jacobian

    J = (I - diag(a_{K-1}) H_{K-1}) ... (I - diag(a_0) H_0),        H_k the Hessian of L at phi_k,

so the meta-gradient J^T grad L(phi_K; D_K) is the recursion v <- v - H_k (a_k * v) from the last step to the first:
nothing of third order, and no graph through the gradient. A Hessian-vector product is one more forward and backward
pass over saved activations (the R-operator, Pearlmutter 1994). The natural gradient of TRPO needs J^T F J, F the Fisher
information at phi_K: at the parameters that acted, it equals the Hessian of the divergence *through* adaptation.

The numbers are those of ``adaptation.py``, which reads like the equation; this file is for speed. All data are task
first: a data set is a tuple whose first entry is the input (M, ..., in), and a *loss* looks at outputs only
(``output_losses.py``). Chapter "MAML, derived".
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
from .output_losses import OutputLoss

Parameters = list[Tensor]
"""Weight (in, out) and bias (1, out) in turn, then what the outputs' loss has of its own, such as log_std; or all of
them with a task axis in front."""
CACHE = 2**20
"""Bytes of activations that one core's cache is trusted with."""


def _tanh(x: Tensor) -> Tensor:
    # On the CPU in single precision tanh(x) = 2 sigmoid(2x) - 1 is several times as fast, within 2.5e-7.
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return (x * 2).sigmoid_().mul_(2).sub_(1)
    return torch.tanh(x)


ACTIVATIONS = {
    torch.tanh: (_tanh, lambda h: 1 - h * h, lambda h: -2 * h),
    torch.relu: (torch.relu, lambda h: (h > 0).to(h.dtype), None),
}
"""Activation -> h of z; its first derivative, given h; its second derivative over the first, given h (None is 0)."""


def _multiply(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h W (+ b) for h (M, B, in): one plain product if all tasks share W (in, out), else one per task."""
    compiling = torch.compiler.is_compiling()  # what is not a matrix product, the compiler fuses with what follows
    fused = bias is not None and not compiling
    if h.shape[-1] == 1:
        return h * weight if bias is None else h * weight + bias
    if compiling and weight.shape[-1] == 1:
        product = (h * weight.mT).sum(-1, keepdim=True)
    elif weight.dim() == 3:
        product = torch.baddbmm(bias, h, weight) if fused else h @ weight
    else:
        rows = h.flatten(0, 1)
        product = (torch.addmm(bias, rows, weight) if fused else rows @ weight).unflatten(0, h.shape[:2])
    return product if fused or bias is None else product + bias


def _add_product(total: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """``total`` + h W, in place."""
    if h.shape[-1] == 1:
        return total.addcmul_(h, weight)
    if torch.compiler.is_compiling():
        return total + _multiply(h, weight)
    if weight.dim() == 3:
        return total.baddbmm_(h, weight)
    total.flatten(0, 1).addmm_(h.flatten(0, 1), weight)
    return total


def _outer(h: Tensor, delta: Tensor, total: bool) -> Tensor:
    """h^T delta of each task (M, in, out), or summed over tasks (in, out)."""
    h, delta = (h.flatten(0, 1), delta.flatten(0, 1)) if total else (h, delta)
    if torch.compiler.is_compiling() and (h.shape[-1] == 1 or delta.shape[-1] == 1):
        return (h * delta).sum(-2).unsqueeze(-2 if h.shape[-1] == 1 else -1)
    return h.mT @ delta


class Pass:
    """Forward and backward pass of M tasks' losses at one point, keeping what second-order products use again.

    ``loss`` (M,), ``gradient`` of each task, and products with the Hessian (unless ``second_order`` is False) and the
    Gauss-Newton matrix of each task.
    """

    def __init__(self, activation: Callable, loss: OutputLoss, layers: int, parameters: Parameters, data: Any,
                 second_order: bool = True):  # fmt: skip
        self.weights, self.biases = parameters[: 2 * layers : 2], parameters[1 : 2 * layers : 2]
        forward, slope, bend = ACTIVATIONS[activation]
        tasks, *self.shape, _ = data[0].shape
        hidden = [data[0].flatten(1, -2)]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            hidden.append(forward(_multiply(hidden[-1], weight, bias)))
        outputs = _multiply(hidden[-1], self.weights[-1], self.biases[-1])
        # A task's loss reads its own copy of the extra parameters, so that their gradient is the task's own.
        extra = [p if p.dim() == 3 else p.expand(tasks, *p.shape) for p in parameters[2 * layers :]]
        self.hidden, self.extra_shape = hidden, [p.shape for p in extra]
        self.loss, gradient, self.curvature = loss([outputs.unflatten(1, self.shape), *extra], data)
        self.extra_gradient = gradient[1:]
        self.slope = [slope(h) for h in hidden[1:]]
        self.delta, self.bend = [gradient[0].flatten(1, -2)], []
        for weight, h, slope in zip(self.weights[:0:-1], hidden[:0:-1], self.slope[::-1]):
            behind = _multiply(self.delta[0], weight.mT)
            self.bend.insert(0, bend(h) * behind if bend and second_order else None)
            self.delta.insert(0, behind * slope)

    def gradient(self, total: bool = False) -> Parameters:
        """Of each task, (M, in, out), or summed over tasks, (in, out)."""
        return self._collect([_outer(h, d, total) for h, d in zip(self.hidden, self.delta)], self.delta,
                             self.extra_gradient, total)  # fmt: skip

    def _collect(self, weights: list[Tensor], delta: list[Tensor], extra: Sequence[Tensor], total: bool) -> Parameters:
        biases = [d.flatten(0, 1).sum(0, keepdim=True) if total else d.sum(1, keepdim=True) for d in delta]
        extra = [e.sum(0) for e in extra] if total else extra
        return [*(p for pair in zip(weights, biases) for p in pair), *extra]

    def _tangents(self, direction: Parameters) -> tuple[list[Tensor], list[Tensor]]:
        """Derivatives along ``direction`` of the hidden layers and of what the loss reads."""
        layers, along, tangents = len(self.weights), None, []
        for l, (h, weight) in enumerate(zip(self.hidden, self.weights)):
            change = _multiply(h, direction[2 * l], direction[2 * l + 1])
            along = change if along is None else _add_product(change, along, weight)
            if l < layers - 1:
                tangents.append(along.mul_(self.slope[l]))
        extra = [v.expand(shape) for v, shape in zip(direction[2 * layers :], self.extra_shape)]
        return tangents, [along.unflatten(1, self.shape), *extra]

    def hessian(self, direction: Parameters, total: bool = False) -> Parameters:
        """H v of each task, or summed over tasks; ``direction`` v is shared or one per task."""
        tangents, outputs = self._tangents(direction)
        change, *extra = self.curvature(outputs)
        change, changes, weights = change.flatten(1, -2), [], []
        for l in reversed(range(len(self.weights))):
            changes.insert(0, change)
            weights.insert(0, _outer(self.hidden[l], change, total))
            if l > 0:
                weights[0] += _outer(tangents[l - 1], self.delta[l], total)
                change = _multiply(change, self.weights[l].mT)
                change = _add_product(change, self.delta[l], direction[2 * l].mT).mul_(self.slope[l - 1])
                if self.bend[l - 1] is not None:
                    change.addcmul_(self.bend[l - 1], tangents[l - 1])
        return self._collect(weights, changes, extra, total)

    def gauss_newton(self, direction: Parameters, total: bool = False) -> Parameters:
        """G v: the Hessian where the loss has gradient 0 at the outputs, as a divergence has from its own policy."""
        change, *extra = self.curvature(self._tangents(direction)[1])
        deltas = [change.flatten(1, -2)]
        for weight, slope in zip(self.weights[:0:-1], self.slope[::-1]):
            deltas.insert(0, _multiply(deltas[0], weight.mT).mul_(slope))
        return self._collect([_outer(h, d, total) for h, d in zip(self.hidden, deltas)], deltas, extra, total)


class Adaptation:
    """K inner steps of M tasks from shared ``parameters``, and the products with their Jacobian.

    ``stages`` are phi_0 (shared), phi_1, ..., phi_K (one per task). ``step_sizes`` holds for each step one number or
    0-d tensor for all parameters, or one tensor per parameter (0 where a parameter is not adapted). ``first_order``
    takes J = I (FOMAML).
    """

    def __init__(self, activation: Callable, loss: OutputLoss, parameters: Parameters, support: Sequence[Any],
                 step_sizes: Sequence[Any], layers: int, first_order: bool = False):  # fmt: skip
        self.sizes = [size if isinstance(size, (list, tuple)) else [size] * len(parameters) for size in step_sizes]
        self.stages, self.passes, self.first_order = [parameters], [], first_order
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
                by_step_size.insert(0, [-(v * g).sum(0) for v, g in zip(adjoint, self.passes[k].gradient())])
            before = [v.sum(0) for v in adjoint] if k == 0 else adjoint
            if not self.first_order:
                stepped = [a * v for a, v in zip(self.sizes[k], adjoint)]
                before = [v - h for v, h in zip(before, self.passes[k].hessian(stepped, total=k == 0))]
            adjoint = before if earlier[k] is None else [v + c for v, c in zip(before, earlier[k])]
        return adjoint, by_step_size


class MetaGradient(NamedTuple):
    """Loss after adaptation, and the gradients of its mean over tasks."""

    loss: Tensor  # (M,), the sum over stages
    gradient: Parameters  # by the shared parameters
    by_step_size: list[Parameters]  # by the step sizes of each step and parameter; empty unless asked for


def _meta_gradient(
    network, inner, outer, first_order, learn_lr, stage_weights, tasks, parameters, support, query, step_sizes
):
    """One chunk's share of the mean over all ``tasks``."""
    layers = len(network.sizes) - 1
    adaptation = Adaptation(network.activation, inner, parameters, support, step_sizes, layers, first_order)
    loss, cotangents = query[-1][0].new_zeros(len(query[-1][0])), []
    for k, (stage, data, weight) in enumerate(zip(adaptation.stages, query, stage_weights, strict=True)):
        if weight == 0:
            cotangents.append(None)
            continue
        at = Pass(network.activation, outer, layers, stage, data, second_order=False)
        loss = loss + weight * at.loss
        gradient = at.gradient(total=k == 0)
        del at  # its activations
        cotangents.append(gradient if weight == 1 else [weight * g for g in gradient])
    gradient, by_step_size = adaptation.pull_back(cotangents, learn_lr)
    return loss, [g / tasks for g in gradient], [[g / tasks for g in step] for step in by_step_size]


@cache
def _compiled(*settings: Any) -> Callable:
    return torch.compile(partial(_meta_gradient, *settings), fullgraph=True, dynamic=False)


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
    =============  ==============================  ===========================================================

    Equal to ``adaptation.meta_gradient_reference`` to rounding. Raises ``ValueError`` if a number of data sets does not
    fit, or if the activation is not ``torch.tanh`` or ``torch.relu``.
    """
    weights, query, tasks = _stages(network, support, query, step_sizes, stage_weights)
    settings = (network, inner, outer or inner, first_order, learn_lr, weights, tasks)
    run = _compiled(*settings) if compile else partial(_meta_gradient, *settings)
    results = [run(parameters, *part, step_sizes) for part in _chunks(network, tasks, chunk, list(support), query)]
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


def _chunks(network: MLP, tasks: int, chunk: int | None, *data: Any):
    """The data of a few tasks at a time."""
    inputs = data[0][0][0]
    if chunk is None:
        row = inputs[0].numel() // inputs.shape[-1] * sum(network.sizes[1:-1]) * inputs.element_size()
        chunk = max(1, CACHE // max(row, 1)) if inputs.device.type == "cpu" else tasks
        chunk = -(-tasks // -(-tasks // chunk))  # equal parts
    require(whole(chunk, 1), "chunk", chunk, "a whole number of tasks >= 1")
    if chunk >= tasks:
        yield data
        return
    for first in range(0, tasks, chunk):
        part = slice(first, first + chunk)
        yield tree_map(lambda x, part=part: x[part] if isinstance(x, Tensor) else x, data)


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
