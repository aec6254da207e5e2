"""Networks as pure functions of (parameters, observation), for one parameter set or one per task.

Parameters are a list of tensors. Each is shared by all tasks, (in, out), or one per task, (task, in, out): broadcasting
does the rest, so adapting a network to M tasks is replacing its parameters, never copying a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap

from .families.base import check, require, whole


class Network(Protocol):
    """What a policy or a regression needs of a network."""

    output_size: int
    """Length of an output."""
    tensors: int
    """Number of parameters in the list."""
    head: tuple[int, ...]
    """Indices of the last layer's parameters: what ANIL adapts (chapter "MAML, derived")."""

    def initial(self, generator: Generator) -> list[Tensor]:
        """Parameters to start from, shared by all tasks, on the generator's device."""

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, output)."""


def _task_first(x: Tensor) -> Tensor:
    """(time, ..., task, episode, in) -> (task, time * ... * episode, in): one product per task instead of one per task
    and step."""
    return x.movedim(-3, 0).flatten(1, -2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias, x, weight) if x.dim() == weight.dim() == bias.dim() == 3 else x @ weight + bias


def check_sizes(owner: Any) -> None:
    """Refuse ``owner.sizes`` unless it is (observation, hidden..., output)."""
    layers = lambda x: isinstance(x, tuple) and len(x) >= 2 and all(whole(size, 1) for size in x)
    check(owner, "sizes", layers, "whole numbers >= 1, at least (observation, output)")


class MLP:
    """Layers of ``sizes`` = (observation, hidden..., output) with ``activation`` between them, batched by hand.

    Parameters alternate weight (in, out) and bias (1, out).
    """

    def __init__(self, sizes: tuple[int, ...], activation: Callable[[Tensor], Tensor] = torch.tanh):
        self.sizes, self.activation = sizes, activation
        check_sizes(self)
        self.output_size = self.sizes[-1]
        self.tensors = 2 * (len(self.sizes) - 1)
        self.head = (self.tensors - 2, self.tensors - 1)

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
        own = observation.dim() > 3 and any(p.dim() == 3 for p in parameters)
        hidden = _task_first(observation) if own else observation
        for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2]):
            hidden = self.activation(_linear(hidden, weight, bias))
        output = _linear(hidden, parameters[-2], parameters[-1])
        if not own:
            return output
        lead, (tasks, episodes) = observation.shape[:-3], observation.shape[-3:-1]
        return output.view(tasks, *lead, episodes, -1).movedim(0, -3)


class BySegment:
    """One small network for all segments of a task, and a number of each segment's own: what a day teaches of one
    segment serves all, what differs is adapted.

    An observation is ``common`` entries and then ``own`` blocks of one entry for each segment. The network sees, of
    every segment, the common entries and its own; ``inputs`` numbers those it sees, None is all. Parameters: those of
    an MLP, then a bias (1, segments), which is the head.
    """

    def __init__(
        self,
        segments: int,
        common: int,
        own: int,
        hidden: tuple[int, ...],
        inputs: tuple[int, ...] | None = None,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ):
        for name, value in (("segments", segments), ("own", own)):
            require(whole(value, 1), f"BySegment.{name}", value, "a whole number >= 1")
        require(whole(common, 0), "BySegment.common", common, "a whole number >= 0")
        self.common, self.own = common, own
        self.inputs = list(range(common + own) if inputs is None else inputs)
        self.network = MLP((len(self.inputs), *hidden, 1), activation)
        self.output_size = segments
        self.tensors = self.network.tensors + 1
        self.head = (self.network.tensors,)

    def initial(self, generator: Generator) -> list[Tensor]:
        """The MLP's; biases 0."""
        return [*self.network.initial(generator), torch.zeros(1, self.output_size, device=generator.device)]

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, common + own * segments) -> (..., task, episode, segments)."""
        *network, bias = parameters
        common, own = observation[..., : self.common], observation[..., self.common :]
        common = common.unsqueeze(-2).expand(*common.shape[:-1], self.output_size, self.common)
        own = own.unflatten(-1, (self.own, self.output_size)).transpose(-1, -2)
        rows = torch.cat((common, own), -1)[..., self.inputs]
        output = self.network.outputs(network, rows.flatten(-3, -2))[..., 0]
        return output.unflatten(-1, (-1, self.output_size)) + bias


class GRU:
    """A gated recurrent unit (Cho et al. 2014) and a linear layer, written out in matrix products and sigmoids.

    ``torch.nn.GRU`` cannot be differentiated twice under ``vmap``; this one can, and equals it number for number. An
    output depends on the observations of its own and all earlier steps of the episode, from a hidden state of 0.
    Parameters: input weight (in, 3 hidden) and bias, recurrent weight (hidden, 3 hidden) and bias, in torch's order
    (reset, update, new); then weight and bias of the output.
    """

    def __init__(self, observation: int, hidden: int, output: int):
        for name, value in (("observation", observation), ("hidden", hidden), ("output", output)):
            require(whole(value, 1), f"GRU.{name}", value, "a whole number >= 1")
        self.observation, self.hidden, self.output_size = observation, hidden, output
        self.tensors, self.head = 6, (4, 5)

    def initial(self, generator: Generator) -> list[Tensor]:
        """Weights ~ Normal(0, 1 / fan-in), the output's 100 times smaller; biases 0."""
        parameters = []
        for fan_in, fan_out in ((self.observation, 3 * self.hidden), (self.hidden, 3 * self.hidden), (self.hidden, 0)):
            shape = (fan_in, fan_out or self.output_size)
            scale = 1.0 if fan_out else 0.01
            weight = torch.randn(shape, generator=generator, device=generator.device) * (scale / math.sqrt(fan_in))
            parameters += [weight, torch.zeros(1, shape[1], device=generator.device)]
        return parameters

    def begin(self, observation: Tensor) -> Tensor:
        """(..., episode, hidden) zeros: the memory before the first step, for one step's ``observation``."""
        return observation.new_zeros(*observation.shape[:-1], self.hidden)

    def step(self, parameters: list[Tensor], observation: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """One step: observation (task, episode, observation), memory (task, episode, hidden) -> output, memory."""
        weight, bias, recurrent, recurrent_bias, out, out_bias = parameters
        memory = self._update(observation @ weight + bias, memory, recurrent, recurrent_bias)
        return memory @ out + out_bias, memory

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(time, task, episode, observation) -> (time, task, episode, output). Time is the first axis."""
        weight, bias, recurrent, recurrent_bias, out, out_bias = parameters
        memory, memories = self.begin(observation[0]), []
        for projected in observation @ weight + bias:
            memory = self._update(projected, memory, recurrent, recurrent_bias)
            memories.append(memory)
        return torch.stack(memories) @ out + out_bias

    def _update(self, projected: Tensor, memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        reset, update, new = projected.split(self.hidden, -1)
        reset_, update_, new_ = (memory @ weight + bias).split(self.hidden, -1)
        update = torch.sigmoid(update + update_)
        candidate = torch.tanh(new + torch.sigmoid(reset + reset_) * new_)
        return (1 - update) * candidate + update * memory


class Context:
    """A network with ``size`` extra inputs that are parameters, the first of the list, (1, size), started at 0.

    Adapt them alone (``Inner(adapted=(0,))``) and this is CAVIA (Zintgraf et al. 2019): few numbers describe a task.
    """

    def __init__(self, network: Network, size: int):
        """``network`` takes an observation and ``size`` numbers more."""
        require(whole(size, 1), "Context.size", size, "a whole number >= 1")
        self.network, self.size = network, size
        self.output_size, self.tensors = network.output_size, network.tensors + 1
        self.head = tuple(i + 1 for i in network.head)

    def initial(self, generator: Generator) -> list[Tensor]:
        """Zeros, then the network's."""
        return [torch.zeros(1, self.size, device=generator.device), *self.network.initial(generator)]

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, output)."""
        context = parameters[0].expand(*observation.shape[:-1], self.size)
        return self.network.outputs(parameters[1:], torch.cat((observation, context), -1))


class Module:
    """Any ``torch.nn.Module`` that maps (..., observation) to (..., output), as a network of this library.

    Called through ``torch.func.functional_call``, under ``vmap`` when parameters have a task axis, so it needs no
    change; it may not draw random numbers (dropout), update buffers (batch normalisation in training mode) or contain
    ``torch.nn.GRU``, which cannot be differentiated twice under ``vmap`` (use ``GRU`` of this file). The hand-batched
    ``MLP`` gives the same numbers faster.
    """

    def __init__(self, module: nn.Module, output_size: int, head: tuple[int, ...] | None = None):
        require(isinstance(module, nn.Module), "Module.module", module, "a torch.nn.Module")
        require(whole(output_size, 1), "Module.output_size", output_size, "a whole number >= 1")
        self.module, self.output_size = module, output_size
        self.names = [name for name, _ in module.named_parameters()]
        self.dimensions = [parameter.dim() for parameter in module.parameters()]
        self.tensors = len(self.names)
        self.head = tuple(range(self.tensors))[-2:] if head is None else head

    def initial(self, generator: Generator) -> list[Tensor]:
        """A copy of the parameters that the module was built with, on the generator's device: a module draws its own
        when it is made (``torch.manual_seed``), so nothing is drawn here."""
        return [p.detach().clone().to(generator.device) for p in self.module.parameters()]

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, output)."""
        call = lambda own, x: functional_call(self.module, dict(zip(self.names, own)), (x,))
        axes = [0 if p.dim() > d else None for p, d in zip(parameters, self.dimensions, strict=True)]
        if all(axis is None for axis in axes):
            return call(parameters, observation)
        task = observation.dim() - 3
        return vmap(call, in_dims=(axes, task), out_dims=task)(list(parameters), observation)
