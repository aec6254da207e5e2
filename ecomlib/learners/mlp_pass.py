"""Forward and backward pass of an MLP by hand, for M tasks at once, and its second-order products (the R-operator,
Pearlmutter 1994): what ``mlp_adjoint.py`` is built from. Chapter "MAML, derived"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .output_losses import OutputLoss

Parameters = list[Tensor]
"""Weight (in, out) and bias (1, out) in turn, then what the outputs' loss has of its own, such as log_std; or all of
them with a task axis in front."""


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
