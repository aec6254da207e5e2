"""A memory that keeps every step and looks back at all of them: causal self-attention over a trial (chapter "Memory and
belief")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import scaled_dot_product_attention

from .families.base import require, whole
from .memories import Memory, _bias, _weight

LAYER_TENSORS = 8
"""Parameters of a layer: queries, keys and values; what attention found; two of the feed-forward layer; four biases."""


class AttentionMemory(Memory):
    """Transformer layers over the steps of a trial (Vaswani et al. 2017): the memory of algorithm distillation (Laskin
    et al. 2022) and of decision-pretrained transformers (Lee et al. 2023).

    A layer adds to every step what attention to it and to all earlier ones found, and then a feed-forward layer of it,
    each computed from the step's numbers brought to length 1 (times the root of their number; no learned scale). Where
    in the trial a step was is part of its input, so that there is no other code of its position. Nothing is ever
    forgotten: the memory of ``step`` holds keys and values of all steps so far, and an action costs as much as the
    trial is long. All steps of a trial are computed at once with a causal mask.
    """

    def __init__(self, *arguments: Any, layers: int = 1, heads: int = 4, **settings: Any):
        """As ``Memory``; ``heads`` must divide ``hidden``."""
        require(whole(layers, 1, 16), "AttentionMemory.layers", layers, "a whole number in [1, 16]")
        self.layers, self.heads, self.memory_tensors = layers, heads, LAYER_TENSORS * layers
        super().__init__(*arguments, **settings)
        divides = whole(heads, 1, self.hidden) and self.hidden % heads == 0
        require(divides, "AttentionMemory.heads", heads, f"a divisor of hidden = {self.hidden}")

    @property
    def summary_size(self) -> int:
        """The last layer's output."""
        return self.hidden

    def begin(self, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (task, unit, rows, 0, hidden); one unit for all with ``pooled``."""
        units = 1 if self.pooled else inputs.shape[1]
        empty = inputs.new_zeros(len(inputs), units, self.rows, 0, self.hidden)
        return [(empty, empty) for _ in range(self.layers)]

    def _memory_initial(self, generator: Generator) -> list[Tensor]:
        hidden, tensors = self.hidden, []
        for _ in range(self.layers):
            for fan_in, fan_out in ((hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * hidden), (2 * hidden, hidden)):
                tensors += [_weight(generator, fan_in, fan_out), _bias(generator, fan_out)]
        return tensors

    def _met(self, parameters: list[Tensor], rows: Tensor, embedded: Tensor) -> Tensor:
        return embedded

    def _fold(self, parameters: list[Tensor], met: Tensor, memory: list) -> tuple[Tensor, list]:
        memory = list(memory)
        x = met[..., None, :]  # one step
        for layer in range(self.layers):
            own = parameters[LAYER_TENSORS * layer : LAYER_TENSORS * (layer + 1)]
            query, *new = self._project(own, x)
            memory[layer] = tuple(torch.cat(pair, -2) for pair in zip(memory[layer], new))
            x = self._layer(own, x, query, *memory[layer], causal=False)
        return x[..., 0, :], memory

    def _fold_all(self, parameters: list[Tensor], met: Tensor) -> Tensor:
        x = met.movedim(0, -2)  # (task, unit, rows, time, hidden)
        for layer in range(self.layers):
            own = parameters[LAYER_TENSORS * layer : LAYER_TENSORS * (layer + 1)]
            x = self._layer(own, x, *self._project(own, x), causal=True)
        return x.movedim(-2, 0)

    def _project(self, own: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (..., time, hidden)."""
        return (_unit_length(x) @ own[0] + own[1]).chunk(3, -1)

    def _layer(self, own: list[Tensor], x: Tensor, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        *_, out, out_bias, wide, wide_bias, narrow, narrow_bias = own
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(-2, -3).flatten(0, -4)  # (..., heads, time, size)
        found = scaled_dot_product_attention(split(query), split(key), split(value), is_causal=causal)
        found = found.unflatten(0, x.shape[:-2]).transpose(-2, -3).flatten(-2)
        x = x + found @ out + out_bias
        return x + torch.relu(_unit_length(x) @ wide + wide_bias) @ narrow + narrow_bias


def _unit_length(x: Tensor) -> Tensor:
    """``x`` (..., hidden) with a mean square of 1."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
