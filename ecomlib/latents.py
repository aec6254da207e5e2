"""A belief as a few numbers: networks that infer a hidden task variable from a trial, and that say what the variable
makes of a step (chapter "Memory and belief").

The hidden variable z has a standard normal prior. An encoder reads the trial so far and names a normal distribution of
z; a decoder names, for z and a decision, the distribution of what the step leads to. What is decoded are signed square
roots: those of counts and of money vary by the same amount whether a product sells ten a day or a thousand, and the
mean of what is decoded is mean^2 + variance of its root, whatever its distribution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.distributions import Normal

from .families.base import require, whole
from .memories import Memory, _bias, _weight
from .trials import TrialInput


class Latent(NamedTuple):
    """A normal distribution of the hidden variable, independent by entry: both (..., unit, rows, Z)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + standard deviation * ``noise``, standard normal numbers of a shape that broadcasts."""
        return self.mean + (self.log_variance / 2).exp() * noise

    def divergence(self) -> Tensor:
        """(..., unit) Kullback-Leibler divergence from the standard normal prior, in nats, equation (eq-latent-kl)."""
        return 0.5 * (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance).sum((-2, -1))


class Step(NamedTuple):
    """Steps of trials, in the layout of the rows (``StepRows``)."""

    given: Tensor  # (..., unit, rows, given_size), what was seen and done
    led: Tensor  # (..., unit, rows, led_size), what it led to, as roots
    reward: Tensor  # (..., unit), the root of the reward in units of the family
    action: Tensor  # (..., unit, ...)


class StepRows:
    """How a step is laid out for a decoder, in the rows of ``TrialInput``: one; that of the action taken; one for each
    segment or item."""

    def __init__(self, inputs: TrialInput):
        self.inputs, family = inputs, inputs.family
        seen, self.rows = family.observation_size, 1 if inputs.by_action else inputs.rows
        if inputs.items:
            self.given_size, self.led_size = seen // inputs.items + 2, seen // inputs.items
        elif inputs.blocks[1]:
            self.given_size, self.led_size = sum(inputs.blocks) + 1, inputs.blocks[1]
        else:
            code = 0 if inputs.by_action else family.actions or getattr(family, "action_size", 1)
            self.given_size, self.led_size = seen + code, seen

    def step(self, observation: Tensor, action: Tensor, after: Tensor, reward: Tensor) -> Step:
        """From (..., unit, observation), (..., unit, ...), (..., unit, observation) and (..., unit)."""
        unit = self.inputs.unit.to(reward)
        return Step(self.given(observation, action), self.led(after), signed_root(reward / unit), action)

    def given(self, observation: Tensor, action: Tensor) -> Tensor:
        """(..., unit, rows, given_size)."""
        inputs, seen = self.inputs, signed_root(observation)
        if inputs.by_action:
            return seen[..., None, :]
        if inputs.items:
            shape, slate = (*action.shape[:-1], inputs.items), action.shape[-1]
            place = (slate - torch.arange(slate, device=action.device)) / slate
            place = seen.new_zeros(shape).scatter(-1, action, place.to(seen).expand(action.shape))
            return torch.cat((self._split(seen), (place > 0).to(seen)[..., None], place[..., None]), -1)
        if inputs.blocks[1]:
            shared = seen[..., None, : inputs.blocks[0]].expand(*seen.shape[:-1], self.rows, -1)
            return torch.cat((shared, self._split(seen), action[..., None].to(seen)), -1)
        if inputs.family.actions:
            code = torch.nn.functional.one_hot(action, inputs.family.actions).to(seen)
        else:
            code = (action if action.dim() == seen.dim() else action[..., None]).to(seen)
        return torch.cat((seen, code), -1)[..., None, :]

    def led(self, after: Tensor) -> Tensor:
        """(..., unit, rows, led_size): of segments only what is their own, or what they share would count often."""
        return self._split(signed_root(after))

    def own(self, z: Tensor, action: Tensor) -> Tensor:
        """(..., unit, rows, Z): of the action taken, where each has a hidden variable of its own; else all of ``z``."""
        if not self.inputs.by_action:
            return z
        z = z.expand(*action.shape, *z.shape[-2:])
        return z.gather(-2, action[..., None, None].expand(*action.shape, 1, z.shape[-1]))

    def _split(self, x: Tensor) -> Tensor:
        inputs = self.inputs
        if inputs.items:
            return x.unflatten(-1, (inputs.items, -1))
        if inputs.blocks[1]:
            return x[..., inputs.blocks[0] :].unflatten(-1, (inputs.blocks[1], self.rows)).transpose(-1, -2)
        return x[..., None, :]


class LatentMemory:
    """A policy's network that reads what is seen now and a belief, and nothing else of the past.

    A ``Memory`` infers the belief, mean and log variance of Z numbers for each row; a reader of two tanh layers makes
    outputs and a guess of the return to come of it. It offers what a ``Memory`` offers. Its parameters are those of the
    encoder, then those of the reader; no gradient of its outputs reaches the encoder.
    """

    def __init__(self, encoder: Memory, outputs: int):
        """``encoder`` with 2 Z outputs for each row; ``outputs`` of the policy for each."""
        require(encoder.row_outputs % 2 == 0, "encoder.row_outputs", encoder.row_outputs, "an even number")
        self.encoder, self.latent = encoder, encoder.row_outputs // 2
        self.reader = Reader(encoder.size + 2 * self.latent, encoder.rows, outputs, encoder.hidden)
        self.size, self.rows, self.hidden = encoder.size, encoder.rows, encoder.hidden
        self.output_size, self.tensors = encoder.rows * outputs, encoder.tensors + self.reader.tensors
        self.head, self.begin = (self.tensors - 2, self.tensors - 1), encoder.begin

    def initial(self, generator: Generator) -> list[Tensor]:
        """The encoder's and the reader's. The encoder's last weights are of full size: beliefs that start alike for all
        tasks first learn to be sure, and only then of what, and means close together tell a policy little."""
        *encoder, weight, bias = self.encoder.initial(generator)
        return [*encoder, 100 * weight, bias, *self.reader.initial(generator)]

    def step(self, parameters: list[Tensor], inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Memory.step``."""
        output, memory = self.encoder.step(parameters[: self.encoder.tensors], inputs, memory)
        joined = self.join(inputs, self._latent(output))
        return self.reader.outputs_and_values(parameters[self.encoder.tensors :], joined)[0], memory

    def outputs(self, parameters: list[Tensor], inputs: Tensor) -> Tensor:
        """As ``Memory.outputs``."""
        return self.outputs_and_values(parameters, inputs)[0]

    def outputs_and_values(self, parameters: list[Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Memory.outputs_and_values``."""
        joined = self.join(inputs, self.belief(parameters[: self.encoder.tensors], inputs))
        return self.reader.outputs_and_values(parameters[self.encoder.tensors :], joined)

    def belief(self, parameters: list[Tensor], inputs: Tensor) -> Latent:
        """The belief before every decision of a trial, (time, task, unit, rows, Z), from the encoder's ``parameters``
        and (time, task, unit, rows * size); one unit for all where they share a memory."""
        return self._latent(self.encoder.outputs(parameters, inputs))

    def _latent(self, output: Tensor) -> Latent:
        output = output.unflatten(-1, (self.rows, 2 * self.latent))
        # Units of one task have one hidden variable, whatever each of them sees now.
        output = output.mean(-3, keepdim=True) if self.encoder.pooled else output
        return Latent(*output.split(self.latent, -1))

    def join(self, inputs: Tensor, belief: Latent) -> Tensor:
        """(..., unit, rows * (size + 2 Z)): what the reader is fed, with the belief held fixed."""
        rows = inputs.unflatten(-1, (self.rows, self.size))
        both = torch.cat((belief.mean, belief.log_variance / 2), -1).detach()
        return torch.cat((rows, both.expand(*rows.shape[:-1], -1)), -1).flatten(-2)


class Reader:
    """Two tanh layers for each row, the second of which sees the mean of the first over rows; no memory."""

    def __init__(self, size: int, rows: int, outputs: int, hidden: int):
        self.size, self.rows, self.outputs, self.hidden = size, rows, outputs, hidden
        self.tensors, self.output_size = 9, rows * outputs

    def initial(self, generator: Generator) -> list[Tensor]:
        """Weights ~ Normal(0, 1 / fan-in), those of outputs and value 100 times smaller; biases 0."""
        return [
            _weight(generator, self.size, self.hidden),
            _bias(generator, self.hidden),
            _weight(generator, self.hidden, self.hidden),
            _weight(generator, self.hidden, self.hidden),
            _bias(generator, self.hidden),
            _weight(generator, self.hidden, 1, 0.01),
            _bias(generator, 1),
            _weight(generator, self.hidden, self.outputs, 0.01),
            _bias(generator, self.outputs),
        ]

    def outputs_and_values(self, parameters: list[Tensor], joined: Tensor) -> tuple[Tensor, Tensor]:
        """(..., unit, rows * size) -> (..., unit, rows * outputs), and (..., unit) guesses of the return to come."""
        weight, bias, own, every, second, value, value_bias, out, out_bias = parameters
        hidden = torch.tanh(joined.unflatten(-1, (self.rows, self.size)) @ weight + bias)
        hidden = torch.tanh(hidden @ own + hidden.mean(-2, keepdim=True) @ every + second)
        return (hidden @ out + out_bias).flatten(-2), (hidden.mean(-2) @ value + value_bias)[..., 0]


class Decoder:
    """What a step leads to, and then what it earns, if the hidden variable is z: normal distributions of roots.

    The chain rule is kept: the reward's distribution is given what the step led to. As two independent witnesses of
    one sale, units and profit would count it twice, and the belief would be too sure.
    """

    tensors = 14

    def __init__(self, steps: StepRows, latent: int, hidden: int, least_std: float):
        require(whole(latent, 1), "Decoder.latent", latent, "a whole number >= 1")
        require(whole(hidden, 1), "Decoder.hidden", hidden, "a whole number >= 1")
        self.steps, self.latent, self.hidden, self.least_std = steps, latent, hidden, least_std

    def initial(self, generator: Generator) -> list[Tensor]:
        """Weights ~ Normal(0, 1 / fan-in), those of outputs 100 times smaller; biases 0."""
        given, led, z, hidden = self.steps.given_size, self.steps.led_size, self.latent, self.hidden
        weight, bias = (lambda *sizes: _weight(generator, *sizes)), (lambda size: _bias(generator, size))
        return [
            *(weight(given, hidden), weight(z, hidden), bias(hidden), weight(hidden, hidden), bias(hidden)),
            *(weight(hidden, 2 * led, 0.01), bias(2 * led)),
            *(weight(given, hidden), weight(z, hidden), weight(led, hidden), bias(hidden)),
            *(weight(hidden, hidden), weight(hidden, 2, 0.01), bias(2)),
        ]

    def leads_to(self, parameters: list[Tensor], given: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (..., unit, rows, led_size) of the roots of what a step leads to; ``z`` (...,
        unit, rows, Z) is that of the rows (``StepRows.own``)."""
        seen, hidden, bias, weight, second, out, out_bias = parameters[:7]
        x = torch.tanh(torch.tanh(given @ seen + z @ hidden + bias) @ weight + second)
        return self._normal(x @ out + out_bias)

    def log_likelihood(self, parameters: list[Tensor], step: Step, z: Tensor) -> Tensor:
        """(..., unit) log-density of what steps led to and earned, if the hidden variable is ``z`` (..., unit, rows,
        Z)."""
        z = self.steps.own(z, step.action)
        evidence = (
            Normal(*self.leads_to(parameters, step.given, z), validate_args=False).log_prob(step.led).sum((-2, -1))
        )
        seen, hidden, led, bias, weight, out, out_bias = parameters[7:]
        x = torch.tanh(step.given @ seen + z @ hidden + step.led @ led + bias).mean(-2)
        mean, std = self._normal(torch.tanh(x @ weight) @ out + out_bias)
        return evidence + Normal(mean[..., 0], std[..., 0], validate_args=False).log_prob(step.reward)

    def _normal(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = output.chunk(2, -1)
        return mean, self.least_std + torch.nn.functional.softplus(raw - 1)


def signed_root(x: Tensor) -> Tensor:
    """sign(x) sqrt|x|, (...)."""
    return x.sign() * x.abs().sqrt()


def mean_of_square(mean: Tensor, std: Tensor) -> Tensor:
    """(...) expected value of ``y abs(y)`` for a normal y, what ``signed_root`` was taken of."""
    ratio = mean / std
    density = (-0.5 * ratio**2).exp() / math.sqrt(2 * math.pi)
    return (mean**2 + std**2) * (2 * torch.special.ndtr(ratio) - 1) + 2 * mean * std * density
