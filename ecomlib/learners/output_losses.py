"""Losses as functions of a network's outputs: value, gradient and curvature there, for ``mlp_adjoint.py``.

An output loss takes ``outputs``, a list of what the network returns (M, ..., output) and of parameters that only the
loss reads (such as log_std, one per task), and a task-first data set. It is minimised. Whatever the loss, the matrix
products below the outputs are the same; so a new surrogate needs no new code there, and ``by_autograd`` makes an output
loss of any differentiable function: autograd then handles numbers as few as the actions, never the network's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..policies import Categorical, CategoricalMLP, Policy
from ..rollout import Trajectories
from ..surrogates import Surrogate, log_likelihood, ratio
from .ppo import clipped_surrogate

SOFTMAX = (Categorical, CategoricalMLP)
"""Policies whose outputs are the logits of a softmax. These very classes: a subclass may read its outputs otherwise."""


class AtOutputs(NamedTuple):
    """An output loss at one point."""

    loss: Tensor  # (M,)
    gradient: list[Tensor]  # by the outputs, shapes as the outputs
    curvature: Callable[[list[Tensor]], list[Tensor]]  # product with the Hessian by the outputs


OutputLoss = Callable[[list[Tensor], Any], AtOutputs]
"""(outputs, data) -> AtOutputs."""


class Episodes(NamedTuple):
    """Trajectories and their advantages, task first."""

    observation: Tensor  # (M, T, N, observation)
    action: Tensor  # (M, T, N) or (M, T, N, D)
    log_prob: Tensor  # (M, T, N), of the policy that acted
    mask: Tensor  # (M, T, N)
    advantage: Tensor  # (M, T, N)

    @classmethod
    def of(cls, data: Trajectories, advantage: Tensor) -> Episodes:
        """From time-major trajectories and advantages (T, M, N)."""
        fields = (data.observation, data.action, data.log_prob, data.mask, advantage.detach())
        return cls(*(field.transpose(0, 1).contiguous() for field in fields))


def squared_error(outputs: list[Tensor], data: tuple[Tensor, Tensor]) -> AtOutputs:
    """Mean squared error of (input, target (M, B, output)) over examples and outputs."""
    error = outputs[0] - data[1]
    scale = 2 / error[0].numel()
    return AtOutputs((error * error).flatten(1).mean(1), [scale * error], lambda tangent: [scale * tangent[0]])


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-probabilities. Written out: over a dozen actions torch's own is three times slower."""
    shifted = logits - logits.amax(-1, keepdim=True)
    exponent = shifted.exp()
    total = exponent.sum(-1, keepdim=True)
    return exponent / total, shifted - total.log()


def _chosen(logits: Tensor, action: Tensor) -> Tensor:
    """One at the action, zero elsewhere, (..., action)."""
    return (action[..., None] == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)


def _weighted_log_likelihood(probabilities: Tensor, chosen: Tensor, weight: Tensor, loss: Tensor, slope: Tensor | None):
    """The loss whose gradient by the logits is weight * (chosen - pi), where weight changes by slope * d log pi(a)."""
    score = chosen - probabilities

    def curvature(tangent: list[Tensor]) -> list[Tensor]:
        centred = tangent[0] - (probabilities * tangent[0]).sum(-1, keepdim=True)
        result = -weight * probabilities * centred
        if slope is not None:
            result = result + slope * (chosen * centred).sum(-1, keepdim=True) * score
        return [result]

    return AtOutputs(loss.flatten(1).sum(1), [weight * score], curvature)


def cross_entropy(outputs: list[Tensor], data: tuple[Tensor, Tensor]) -> AtOutputs:
    """Mean cross entropy of (input, class (M, B)) over examples."""
    probabilities, log_probs = _softmax(outputs[0])
    chosen = _chosen(log_probs, data[1])
    weight = torch.full_like(log_probs[..., :1], -1 / data[1][0].numel())
    return _weighted_log_likelihood(probabilities, chosen, weight, weight * (chosen * log_probs).sum(-1, True), None)


def softmax_log_likelihood(outputs: list[Tensor], data: Episodes) -> AtOutputs:
    """Minus ``surrogates.log_likelihood`` of a softmax policy."""
    probabilities, log_probs = _softmax(outputs[0])
    chosen = _chosen(log_probs, data.action)
    weight = -(data.advantage * data.mask)[..., None] / data.mask.shape[-1]
    return _weighted_log_likelihood(probabilities, chosen, weight, weight * (chosen * log_probs).sum(-1, True), None)


def softmax_ratio(outputs: list[Tensor], data: Episodes) -> AtOutputs:
    """Minus ``surrogates.ratio`` of a softmax policy."""
    probabilities, log_probs = _softmax(outputs[0])
    chosen = _chosen(log_probs, data.action)
    ratio = ((chosen * log_probs).sum(-1) - data.log_prob).exp()
    weight = -(ratio * data.advantage * data.mask)[..., None] / data.mask.shape[-1]
    return _weighted_log_likelihood(probabilities, chosen, weight, weight, weight)


@cache
def softmax_clipped_ratio(clip: float) -> OutputLoss:
    """Minus ``ppo.clipped_surrogate`` of a softmax policy."""

    def loss(outputs: list[Tensor], data: Episodes) -> AtOutputs:
        probabilities, log_probs = _softmax(outputs[0])
        chosen = _chosen(log_probs, data.action)
        ratio = ((chosen * log_probs).sum(-1) - data.log_prob).exp()
        scale = -(data.advantage * data.mask) / data.mask.shape[-1]
        free, clipped = scale * ratio, scale * ratio.clamp(1 - clip, 1 + clip)
        weight = torch.where(free >= clipped, free, 0.0)[..., None]
        return _weighted_log_likelihood(probabilities, chosen, weight, torch.maximum(free, clipped), weight)

    return loss


def softmax_divergence(outputs: list[Tensor], data: Episodes) -> AtOutputs:
    """KL(pi || itself), averaged over the visited states of each task: 0, gradient 0, curvature the Fisher
    information."""
    probabilities, _ = _softmax(outputs[0])
    weight = data.mask[..., None] / data.mask.flatten(1).sum(1)[:, None, None, None]

    def curvature(tangent: list[Tensor]) -> list[Tensor]:
        centred = tangent[0] - (probabilities * tangent[0]).sum(-1, keepdim=True)
        return [weight * probabilities * centred]

    return AtOutputs(weight.new_zeros(len(weight)), [torch.zeros_like(probabilities)], curvature)


def by_autograd(loss: Callable[[list[Tensor], Any], Tensor]) -> OutputLoss:
    """The output loss of any differentiable ``loss(outputs, data)`` -> (M,), a task's loss reading only its own
    rows."""

    def at(outputs: list[Tensor], data: Any) -> AtOutputs:
        def total(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
            each = loss(outputs, data)
            return each.sum(), each

        gradient, pull, each = torch.func.vjp(torch.func.grad(total, has_aux=True), outputs, has_aux=True)
        return AtOutputs(each, gradient, lambda tangent: pull(tangent)[0])  # a Hessian is symmetric

    return at


class _Given:
    """A network that returns what it is given: the policy of given outputs."""

    def __init__(self, output_size: int):
        self.output_size, self.tensors, self.head = output_size, 1, (0,)

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        return parameters[0]


def _time_major(policy: Policy, outputs: list[Tensor], data: Episodes):
    """The policy of given outputs, its parameters, the trajectories and the advantages as surrogates take them."""
    given = copy.copy(policy)
    given.network = _Given(policy.network.output_size)
    observation, action, log_prob, mask, advantage = (field.transpose(0, 1) for field in data)
    data = Trajectories(observation, action, log_prob, torch.zeros_like(mask), mask)
    return given, [outputs[0].transpose(0, 1), *outputs[1:]], data, advantage


@cache
def of_surrogate(policy: Policy, surrogate: Surrogate) -> OutputLoss:
    """Minus ``surrogate`` of ``policy``: written out for a softmax policy where this file has it, else by autograd at
    the outputs. The network must have one row of outputs per step; surrogates get no rewards."""
    if type(policy) in SOFTMAX and surrogate in (log_likelihood, ratio):
        return softmax_log_likelihood if surrogate is log_likelihood else softmax_ratio
    return by_autograd(lambda outputs, data: -surrogate(*_time_major(policy, outputs, data)))


@cache
def of_clipped_surrogate(policy: Policy, clip: float) -> OutputLoss:
    """Minus ``ppo.clipped_surrogate`` of ``policy``."""
    if type(policy) in SOFTMAX:
        return softmax_clipped_ratio(clip)
    return of_surrogate(policy, partial(clipped_surrogate, clip=clip))


@cache
def of_divergence(policy: Policy) -> OutputLoss:
    """KL(pi || itself) of ``policy``, averaged over the visited states of each task."""
    if type(policy) in SOFTMAX:
        return softmax_divergence

    def divergence(outputs: list[Tensor], data: Episodes) -> Tensor:
        given, parameters, data, _ = _time_major(policy, outputs, data)
        new = given.distribution(parameters, data.observation, data.action)
        kl = given.kl(tuple(x.detach() for x in new), new)
        return (kl * data.mask).sum((0, 2)) / data.mask.sum((0, 2))

    return by_autograd(divergence)
