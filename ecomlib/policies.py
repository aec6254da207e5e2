"""Policies as pure functions of (parameters, observation): a network, and what its outputs mean for actions.

Parameters are those of the network (``networks.py``), shared by all tasks or one set per task. A log-probability is of
the whole action: the *sum* over the dimensions of a vector, or over the positions of a slate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid

from .families.base import check, number, require, whole
from .networks import MLP, Network, check_sizes
from .noise import inverse_transform


class Policy:
    """What every policy offers. ``network`` maps an observation to the numbers that the distribution is made of."""

    noise_size: int
    """Uniforms that one action consumes."""

    def __init__(self, network: Network):
        self.network = network

    def initial(self, generator: Generator) -> list[Tensor]:
        """Parameters to start from, shared by all tasks."""
        return self.network.initial(generator)

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, output) of the network."""
        return self.network.outputs(parameters, observation)

    @property
    def tensors(self) -> int:
        """Number of parameters in the list."""
        return self.network.tensors

    @property
    def head(self) -> tuple[int, ...]:
        """Indices of the parameters of the last layer: what ANIL adapts."""
        return self.network.head

    def distribution(self, parameters: list[Tensor], observation: Tensor, action: Any = None) -> tuple[Tensor, ...]:
        """The numbers that name pi(. | observation), from which ``kl`` is computed."""
        return self._named(self.outputs(parameters, observation), parameters, action)

    def log_prob(self, parameters: list[Tensor], observation: Tensor, action: Tensor) -> Tensor:
        """(...) log pi(action | observation)."""
        return self._log_prob(self.distribution(parameters, observation, action), action)

    def kl(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """(...) Kullback-Leibler divergence KL(old || new) of two results of ``distribution``."""
        raise NotImplementedError

    def sample(self, parameters: list[Tensor], observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action (task, episode, ...) from uniforms (task, episode, noise_size), and its log-probability."""
        return self._draw(self._named(self.outputs(parameters, observation), parameters, None), noise)

    def act(self, parameters: list[Tensor], observation: Tensor, noise: Tensor, memory: Any) -> tuple:
        """As ``sample``, and the memory after it; ``memory`` is None before the first step of an episode.

        Only a recurrent network (one with ``begin`` and ``step``) has a memory.
        """
        if not hasattr(self.network, "step"):
            return *self.sample(parameters, observation, noise), None
        memory = self.network.begin(observation) if memory is None else memory
        output, memory = self.network.step(self._weights(parameters), observation, memory)
        return *self._draw(self._named(output, parameters, None), noise), memory

    def mode(self, named: tuple[Tensor, ...]) -> Tensor:
        """The most likely action of a distribution."""
        raise NotImplementedError

    def entropy(self, named: tuple[Tensor, ...]) -> Tensor:
        """(...) entropy of a result of ``distribution``."""
        raise NotImplementedError

    # What a kind of policy fills in; ``named`` is its distribution.
    def _weights(self, parameters: list[Tensor]) -> list[Tensor]:
        return parameters

    def _named(self, output: Tensor, parameters: list[Tensor], action: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _log_prob(self, named: tuple[Tensor, ...], action: Tensor) -> Tensor:
        raise NotImplementedError

    def _draw(self, named: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Categorical(Policy):
    """Softmax over the outputs. With one-hot states and no hidden layer it is the tabular softmax policy."""

    noise_size = 1

    def log_probs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, action), log pi(a | s) of every action."""
        return torch.log_softmax(self.outputs(parameters, observation), -1)

    def kl(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """(...) sum over actions of pi_old (log pi_old - log pi_new)."""
        return (old[0].exp() * (old[0] - new[0])).sum(-1)

    def mode(self, named: tuple[Tensor, ...]) -> Tensor:
        """(...) int64."""
        return named[0].argmax(-1)

    def entropy(self, named: tuple[Tensor, ...]) -> Tensor:
        """(...) -sum over actions of pi log pi."""
        return -(named[0].exp() * named[0]).sum(-1)

    def distribution(self, parameters: list[Tensor], observation: Tensor, action: Any = None) -> tuple[Tensor, ...]:
        """(log pi(. | observation),), (..., action)."""
        return (self.log_probs(parameters, observation),)

    def sample(self, parameters: list[Tensor], observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action (task, episode) by inverse transform of one uniform (task, episode, 1), and its log-probability."""
        return self._draw((self.log_probs(parameters, observation),), noise)

    def _named(self, output: Tensor, parameters: list[Tensor], action: Any) -> tuple[Tensor, ...]:
        return (torch.log_softmax(output, -1),)

    def _log_prob(self, named: tuple[Tensor, ...], action: Tensor) -> Tensor:
        return named[0].gather(-1, action[..., None])[..., 0]

    def _draw(self, named: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        action = inverse_transform(named[0].exp(), noise[..., 0])
        return action, self._log_prob(named, action)


class Gaussian(Policy):
    """Real actions: Normal(outputs, exp(log_std)^2), independent by dimension. The last parameter is log_std, (1, D).

    With one output an action is (task, episode), with D > 1 it is (task, episode, D).
    """

    def __init__(self, network: Network, initial_mean: float = 0.0, initial_std: float = 1.0, minimum_std: float = 0.0):
        super().__init__(network)
        self.initial_mean, self.initial_std, self.minimum_std = initial_mean, initial_std, minimum_std
        check(self, "initial_mean", number, "a finite number")
        check(self, "initial_std", lambda x: number(x, 0), "a finite number > 0")
        check(self, "minimum_std", lambda x: number(x) and x >= 0, "a finite number >= 0")
        self.noise_size = network.output_size

    def initial(self, generator: Generator) -> list[Tensor]:
        """The network's, its last bias moved by ``initial_mean``, then log_std."""
        parameters = super().initial(generator)
        parameters[-1] = parameters[-1] + self.initial_mean
        size = (1, self.network.output_size)
        return [*parameters, torch.full(size, math.log(self.initial_std), device=generator.device)]

    @property
    def tensors(self) -> int:
        """Number of parameters in the list, log_std included."""
        return self.network.tensors + 1

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, D), the mean; log_std may be left out."""
        return self.network.outputs(self._weights(parameters), observation)

    def kl(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """(...) closed form, summed over dimensions. The same for squashed actions: a bijection does not change it."""
        ratio = ((old[1] - new[1]) * 2).exp()
        distance = ((old[0] - new[0]) * (-new[1]).exp()) ** 2
        return (0.5 * (ratio + distance - 1) + new[1] - old[1]).sum(-1)

    def mode(self, named: tuple[Tensor, ...]) -> Tensor:
        """The mean, (...) or (..., D)."""
        return named[0][..., 0] if self.noise_size == 1 else named[0]

    def entropy(self, named: tuple[Tensor, ...]) -> Tensor:
        """(1,) sum over dimensions of log_std + log(2 pi e) / 2."""
        return (named[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def _weights(self, parameters: list[Tensor]) -> list[Tensor]:
        # log_std comes on top of what the network itself has.
        return parameters[: self.network.tensors]

    def _named(self, output: Tensor, parameters: list[Tensor], action: Any) -> tuple[Tensor, ...]:
        log_std = parameters[-1]
        if self.minimum_std > 0:
            log_std = log_std.clamp(min=math.log(self.minimum_std))
        return output, log_std

    def _log_prob(self, named: tuple[Tensor, ...], action: Tensor) -> Tensor:
        action = action[..., None] if self.noise_size == 1 else action
        mean, log_std = named
        return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def _draw(self, named: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        action = named[0] + named[1].exp() * torch.special.ndtri(noise)
        action = action[..., 0] if self.noise_size == 1 else action
        return action, self._log_prob(named, action)


class SquashedGaussian(Gaussian):
    """Real actions in (low, high): tanh of a Gaussian, stretched. Its density has the Jacobian of that map."""

    def __init__(self, network: Network, low: float = -1.0, high: float = 1.0, **settings: float):
        super().__init__(network, **settings)
        self.low, self.high = low, high
        check(self, "low", number, "a finite number")
        check(self, "high", lambda x: number(x, low), f"a finite number > low = {low}")

    def mode(self, named: tuple[Tensor, ...]) -> Tensor:
        """Where the mean is mapped to: the median, not the mode, of a squashed action."""
        return self.low + (self.high - self.low) * torch.sigmoid(2 * super().mode(named))

    def entropy(self, named: tuple[Tensor, ...]) -> Tensor:
        """There is no closed form."""
        raise NotImplementedError

    def _log_prob(self, named: tuple[Tensor, ...], action: Tensor) -> Tensor:
        # An action rounded onto its bound has an infinite pre-image; the largest number below 1 stands for it.
        edge = 1 - torch.finfo(action.dtype).eps
        centred = (2 * (action - self.low) / (self.high - self.low) - 1).clamp(-edge, edge)
        return self._squashed_log_prob(named, torch.atanh(centred))

    def _squashed_log_prob(self, named: tuple[Tensor, ...], before: Tensor) -> Tensor:
        # log(1 - tanh(x)^2) without cancellation: sigmoid(2x) (1 - sigmoid(2x)) = (1 - tanh(x)^2) / 4.
        jacobian = logsigmoid(2 * before) + logsigmoid(-2 * before) + math.log(2 * (self.high - self.low))
        jacobian = jacobian if self.noise_size == 1 else jacobian.sum(-1)
        return super()._log_prob(named, before) - jacobian

    def _draw(self, named: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        before, _ = super()._draw(named, noise)
        action = self.low + (self.high - self.low) * torch.sigmoid(2 * before)
        return action, self._log_prob(named, action)


class PlackettLuce(Policy):
    """Slates: ``slate`` of ``items`` items in order, without replacement (Plackett 1975; Luce 1959).

    Each position of the slate is a softmax over the items not yet shown. Actions: (task, episode, slate). A network of
    one output scores items one by one: an observation then holds ``items`` rows of features, (..., task, episode,
    items * features). A network of ``items`` outputs scores all at once, from any observation. ``constant``: what the
    network sees of a task's items never changes, so it scores them once and not at every step of every episode.
    """

    def __init__(self, network: Network, items: int, slate: int, constant: bool = False):
        super().__init__(network)
        self.items, self.slate, self.constant = items, slate, constant
        check(self, "items", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "slate", lambda x: whole(x, 1, items), f"a whole number in 1..items = {items}")
        require(network.output_size in (1, items), "output_size", network.output_size, f"1 or items = {items}")
        self.noise_size = items

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, items), scores."""
        if self.network.output_size > 1:
            return self.network.outputs(parameters, observation)
        *lead, episodes, width = observation.shape
        if self.constant:
            rows = observation[(0,) * (len(lead) - 1)][:, 0].unflatten(-1, (self.items, -1))
            return self.network.outputs(parameters, rows)[:, None, :, 0].expand(*lead, episodes, -1)
        rows = observation.reshape(*lead, episodes * self.items, width // self.items)
        return self.network.outputs(parameters, rows).reshape(*lead, episodes, self.items)

    def kl(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """(...) sum over positions of the divergence of the next item's choice, given the items shown before it: its
        mean over slates drawn from ``old`` is the divergence of the slates (chain rule)."""
        shown = old[0].isinf()
        difference = (old[0] - new[0]).masked_fill(shown, 0.0)
        return (old[0].exp() * difference).sum((-2, -1))

    def mode(self, named: tuple[Tensor, ...]) -> Tensor:
        """(..., slate) int64, the items of the highest scores in order; ``named`` are the scores, (..., items)."""
        return named[0].topk(self.slate, -1).indices

    def entropy(self, named: tuple[Tensor, ...]) -> Tensor:
        """(...) sum over positions of the entropy of the next item's choice, given the items shown before it: its mean
        over slates is the entropy of the slates (chain rule)."""
        logs = named[0].masked_fill(named[0].isinf(), 0.0)
        return -(named[0].exp() * logs).sum((-2, -1))

    def _named(self, output: Tensor, parameters: list[Tensor], action: Any) -> tuple[Tensor, ...]:
        """(log-probability of every item at every position,), (..., slate, items); -inf for an item already shown."""
        if action is None:
            return (output,)
        shown = torch.nn.functional.one_hot(action, self.items).cumsum(-2).roll(1, -2)
        shown = torch.cat((torch.zeros_like(shown[..., :1, :]), shown[..., 1:, :]), -2).bool()
        return (torch.log_softmax(output[..., None, :].masked_fill(shown, -math.inf), -1),)

    def _log_prob(self, named: tuple[Tensor, ...], action: Tensor) -> Tensor:
        return named[0].gather(-1, action[..., None])[..., 0].sum(-1)

    def _draw(self, named: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        # Scores plus Gumbel noise, in descending order, are a Plackett-Luce draw (Yellott 1977).
        action = (named[0] - torch.log(-torch.log(noise))).topk(self.slate, -1).indices
        return action, self._log_prob(self._named(named[0], [], action), action)


class CategoricalMLP(Categorical):
    """Softmax over the outputs of an MLP of ``sizes`` = (observation, hidden..., action)."""

    def __init__(self, sizes: tuple[int, ...], activation: Callable[[Tensor], Tensor] = torch.tanh):
        self.sizes = sizes
        check_sizes(self)
        super().__init__(MLP(self.sizes, activation))


class GaussianMLP(Gaussian):
    """Normal(MLP(observation), exp(log_std)^2), an MLP of ``sizes`` = (observation, hidden..., action dimensions)."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        initial_mean: float = 0.0,
        initial_std: float = 1.0,
        minimum_std: float = 0.0,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ):
        self.sizes = sizes
        check_sizes(self)
        super().__init__(MLP(self.sizes, activation), initial_mean, initial_std, minimum_std)


def per_task(parameters: list[Tensor], tasks: int) -> list[Tensor]:
    """A leaf copy of the shared ``parameters`` for each of M tasks: (in, out) -> (M, in, out), ready for a gradient."""
    return [p.detach().expand(tasks, *p.shape).clone().requires_grad_() for p in parameters]
