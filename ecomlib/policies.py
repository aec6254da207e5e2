"""Policies as pure functions of (parameters, observation).

Parameters are a list of tensors. Each is shared by all tasks, (in, out), or one per task, (task, in, out):
broadcasting does the rest, so adapting a policy to M tasks is replacing its parameters, never copying a module.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from .families.base import check, number, whole
from .noise import inverse_transform


class _MLP:
    """Tanh layers shared by every policy below; ``sizes`` is (observation, hidden..., output)."""

    def __init__(self, sizes: tuple[int, ...]):
        self.sizes = sizes
        layers = lambda x: isinstance(x, tuple) and len(x) >= 2 and all(whole(size, 1) for size in x)
        check(self, "sizes", layers, "whole numbers >= 1, at least (observation, output)")

    def initial(self, generator: Generator) -> list[Tensor]:
        """Weights ~ Normal(0, 1 / fan-in), except a small last layer (so the first policy is near uniform); biases
        0."""
        parameters = []
        for fan_in, fan_out in zip(self.sizes, self.sizes[1:]):
            weight = torch.randn(fan_in, fan_out, generator=generator, device=generator.device) / math.sqrt(fan_in)
            parameters += [weight, torch.zeros(1, fan_out, device=generator.device)]
        parameters[-2] = parameters[-2] * 0.01
        return parameters

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, output)."""
        hidden = observation
        for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2]):
            hidden = torch.tanh(hidden @ weight + bias)
        return hidden @ parameters[-2] + parameters[-1]


class CategoricalMLP(_MLP):
    """Softmax over the outputs of an MLP. With no hidden layer and one-hot states it is the tabular softmax policy."""

    noise_size = 1

    def log_probs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, action), log pi(a | s) of every action."""
        return torch.log_softmax(self.outputs(parameters, observation), -1)

    def log_prob(self, parameters: list[Tensor], observation: Tensor, action: Tensor) -> Tensor:
        """(...) log pi(action | observation)."""
        return self.log_probs(parameters, observation).gather(-1, action[..., None])[..., 0]

    def sample(self, parameters: list[Tensor], observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action (task, episode) by inverse transform of one uniform (task, episode, 1), and its log-probability."""
        log_probs = self.log_probs(parameters, observation)
        action = inverse_transform(log_probs.exp(), noise[..., 0])
        return action, log_probs.gather(-1, action[..., None])[..., 0]


class GaussianMLP(_MLP):
    """A real action: Normal(MLP(observation), exp(log_std)^2); the last parameter is log_std, (1, 1) or (task, 1,
    1)."""

    noise_size = 1

    def __init__(self, sizes: tuple[int, ...], initial_mean: float = 0.0, initial_std: float = 1.0):
        super().__init__(sizes)
        self.initial_mean, self.initial_std = initial_mean, initial_std
        check(self, "sizes", lambda x: x[-1] == 1, "one output")
        check(self, "initial_mean", number, "a finite number")
        check(self, "initial_std", lambda x: number(x, 0), "a finite number > 0")

    def initial(self, generator: Generator) -> list[Tensor]:
        """As the MLP's, its mean started at ``initial_mean``, then log_std."""
        parameters = super().initial(generator)
        parameters[-1] = parameters[-1] + self.initial_mean
        return [*parameters, torch.full((1, 1), math.log(self.initial_std), device=generator.device)]

    def log_prob(self, parameters: list[Tensor], observation: Tensor, action: Tensor) -> Tensor:
        """(...) log density of ``action`` (...)."""
        mean, log_std = self.outputs(parameters[:-1], observation)[..., 0], parameters[-1][..., 0]
        return -0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)

    def sample(self, parameters: list[Tensor], observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action (task, episode) by inverse transform of one uniform (task, episode, 1), and its log density."""
        mean, std = self.outputs(parameters[:-1], observation)[..., 0], parameters[-1][..., 0].exp()
        action = mean + std * torch.special.ndtri(noise[..., 0])
        return action, self.log_prob(parameters, observation, action)


Policy = CategoricalMLP | GaussianMLP
"""Any policy of this module."""


def per_task(parameters: list[Tensor], tasks: int) -> list[Tensor]:
    """A leaf copy of the shared ``parameters`` for each of M tasks: (in, out) -> (M, in, out), ready for a gradient."""
    return [p.detach().expand(tasks, *p.shape).clone().requires_grad_() for p in parameters]
