"""Networks that remember a trial: what was met so far -> what to do now (chapter "Memory and belief").

Written as pure functions of (parameters, input), like those of ``networks.py``; parameters are shared by all tasks. An
input (..., task, unit, rows * size) says what the last step led to and what is seen now (``trials.TrialInput``). It has
one row, or one for each arm, segment or item: then every row has a memory of its own and sees the mean of all memories,
with the same weights, so that one network serves 5 rows or 50 and no number of a row means anything.

With ``pooled``, the units of a task (stores of a chain, shoppers of one kind) share one memory, fed by the mean of what
they met: what ``stores`` is to ``baselines.bayes.Belief``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from .families.base import require, whole

KINDS = ("gru", "sum", "attention")


class Memory:
    """What every memory offers. ``outputs`` of all steps at once equal those of ``step`` one after another.

    Every kind embeds an input (tanh of a linear map), folds it into the memory, and reads outputs, and a guess of the
    return to come, off two tanh layers of the embedding and the memory.
    """

    memory_tensors: int
    """Parameters of the memory itself, between those of the embedding and those of the reading."""
    summary_size: int
    """Length of what the reading sees of a row's memory."""

    def __init__(self, size: int, rows: int, outputs: int, hidden: int = 64, pooled: bool = False):
        """``size`` entries of each of ``rows`` rows; ``outputs`` numbers for each."""
        for name, value in (("size", size), ("rows", rows), ("outputs", outputs), ("hidden", hidden)):
            require(whole(value, 1), f"Memory.{name}", value, "a whole number >= 1")
        self.size, self.rows, self.hidden, self.pooled = size, rows, hidden, pooled
        self.row_outputs, self.output_size = outputs, rows * outputs
        self.tensors = 2 + self.memory_tensors + (10 if rows > 1 else 9)
        self.head = (self.tensors - 2, self.tensors - 1)

    def initial(self, generator: Generator) -> list[Tensor]:
        """Weights ~ Normal(0, 1 / fan-in), those of outputs and value 100 times smaller; biases 0."""
        hidden, summary = self.hidden, self.summary_size
        reading = [_weight(generator, hidden, hidden), _weight(generator, summary, hidden)]
        if self.rows > 1:
            reading.append(_weight(generator, summary, hidden))
        return [
            _weight(generator, self.size, hidden),
            _bias(generator, hidden),
            *self._memory_initial(generator),
            *reading,
            _bias(generator, hidden),
            _weight(generator, hidden, hidden),
            _bias(generator, hidden),
            # Small last layers keep the first policy near uniform and the first guess near 0.
            _weight(generator, hidden, 1, 0.01),
            _bias(generator, 1),
            _weight(generator, hidden, self.row_outputs, 0.01),
            _bias(generator, self.row_outputs),
        ]

    def begin(self, inputs: Tensor) -> Any:
        """The memory before the first step, for one step's ``inputs`` (task, unit, rows * size)."""
        raise NotImplementedError

    def step(self, parameters: list[Tensor], inputs: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """One step: inputs (task, unit, rows * size) -> outputs (task, unit, rows * outputs), and the memory."""
        rows, embedded = self._embed(parameters, inputs)
        met = self._pool(self._met(self._own(parameters), rows, embedded))
        summary, memory = self._fold(self._own(parameters), met, memory)
        return self._read(parameters, embedded, summary)[0], memory

    def outputs(self, parameters: list[Tensor], inputs: Tensor) -> Tensor:
        """(time, task, unit, rows * size) -> (time, task, unit, rows * outputs), of a whole trial from its start."""
        return self.outputs_and_values(parameters, inputs)[0]

    def outputs_and_values(self, parameters: list[Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As ``outputs``, and (time, task, unit) guesses of the return to come."""
        rows, embedded = self._embed(parameters, inputs)
        met = self._pool(self._met(self._own(parameters), rows, embedded))
        return self._read(parameters, embedded, self._fold_all(self._own(parameters), met))

    # ------------------------------------------------------------------------------------------- shared parts
    def _own(self, parameters: list[Tensor]) -> list[Tensor]:
        return parameters[2 : 2 + self.memory_tensors]

    def _embed(self, parameters: list[Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        rows = inputs.unflatten(-1, (self.rows, self.size))
        return rows, torch.tanh(rows @ parameters[0] + parameters[1])

    def _pool(self, met: Tensor) -> Tensor:
        return met.mean(-3, keepdim=True) if self.pooled else met

    def _read(self, parameters: list[Tensor], embedded: Tensor, summary: Tensor) -> tuple[Tensor, Tensor]:
        own, remembered, *others = parameters[2 + self.memory_tensors : -7]
        bias, weight, second_bias, value, value_bias, out, out_bias = parameters[-7:]
        hidden = embedded @ own + summary @ remembered + bias
        if self.rows > 1:
            hidden = hidden + summary.mean(-2, keepdim=True) @ others[0]
        hidden = torch.tanh(torch.tanh(hidden) @ weight + second_bias)
        return (hidden @ out + out_bias).flatten(-2), (hidden.mean(-2) @ value + value_bias)[..., 0]

    # ------------------------------------------------------------------------------------------- what a kind fills in
    def _memory_initial(self, generator: Generator) -> list[Tensor]:
        raise NotImplementedError

    def _met(self, parameters: list[Tensor], rows: Tensor, embedded: Tensor) -> Tensor:
        """What a step adds to the memory, (..., unit, rows, hidden), from its inputs and their embedding."""
        raise NotImplementedError

    def _fold(self, parameters: list[Tensor], met: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """(summary for the reading, memory) after one step."""
        raise NotImplementedError

    def _fold_all(self, parameters: list[Tensor], met: Tensor) -> Tensor:
        """Summaries of a whole trial, (time, ...): as ``_fold`` step by step."""
        raise NotImplementedError


class GRUMemory(Memory):
    """A gated recurrent unit (Cho et al. 2014): the memory of RL^2 (Duan et al. 2016). It can forget."""

    memory_tensors = 4

    @property
    def summary_size(self) -> int:
        """The state."""
        return self.hidden

    def begin(self, inputs: Tensor) -> Tensor:
        """Zeros (task, unit, rows, hidden); one unit for all with ``pooled``."""
        units = 1 if self.pooled else inputs.shape[1]
        return inputs.new_zeros(len(inputs), units, self.rows, self.hidden)

    def _memory_initial(self, generator: Generator) -> list[Tensor]:
        size = 3 * self.hidden
        pairs = [(_weight(generator, self.hidden, size), _bias(generator, size)) for _ in range(2)]
        return [tensor for pair in pairs for tensor in pair]

    def _met(self, parameters: list[Tensor], rows: Tensor, embedded: Tensor) -> Tensor:
        return embedded

    def _fold(self, parameters: list[Tensor], met: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias, recurrent, recurrent_bias = parameters
        memory = self._update(met @ weight + bias, memory, recurrent, recurrent_bias)
        return memory, memory

    def _fold_all(self, parameters: list[Tensor], met: Tensor) -> Tensor:
        weight, bias, recurrent, recurrent_bias = parameters
        memory, memories = torch.zeros_like(met[0]), []
        for projected in met @ weight + bias:
            memory = self._update(projected, memory, recurrent, recurrent_bias)
            memories.append(memory)
        return torch.stack(memories)

    def _update(self, projected: Tensor, memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        reset, update, new = projected.split(self.hidden, -1)
        reset_, update_, new_ = (memory @ weight + bias).split(self.hidden, -1)
        candidate = torch.tanh(new + torch.sigmoid(reset + reset_) * new_)
        return candidate + torch.sigmoid(update + update_) * (memory - candidate)


class SumMemory(Memory):
    """Sums of what was met: a permutation-invariant memory, like the context of PEARL (Rakelly et al. 2019).

    For a task that does not change, the order of what was met says nothing that the inputs do not say, so a posterior
    is a function of sums like these; their logarithms are read, because ratios matter (sales per day on offer), and
    ratios are differences of logarithms. It needs no backpropagation through time: all steps of a trial are computed
    at once. It cannot forget: not for tasks that drift.
    """

    memory_tensors = 2

    @property
    def summary_size(self) -> int:
        """Logarithms of the sums."""
        return self.hidden + self.size

    def begin(self, inputs: Tensor) -> Tensor:
        """Sums of zero (task, unit, rows, summary), one unit for all with ``pooled``."""
        units = 1 if self.pooled else inputs.shape[1]
        return inputs.new_zeros(len(inputs), units, self.rows, self.summary_size)

    def _memory_initial(self, generator: Generator) -> list[Tensor]:
        return [_weight(generator, self.size, self.hidden), _bias(generator, self.hidden)]

    def _met(self, parameters: list[Tensor], rows: Tensor, embedded: Tensor) -> Tensor:
        # Learned counts, and the inputs' own: how often each action was taken and what it earned, for example.
        return torch.relu(torch.cat((rows @ parameters[0] + parameters[1], rows), -1))

    def _fold(self, parameters: list[Tensor], met: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = memory + met
        return self._logarithm(memory), memory

    def _fold_all(self, parameters: list[Tensor], met: Tensor) -> Tensor:
        return self._logarithm(met.cumsum(0))

    def _logarithm(self, total: Tensor) -> Tensor:
        return torch.log1p(50 * total) / 4


def memory_network(kind: Literal["gru", "sum", "attention"], **settings: Any) -> Memory:
    """A memory by its name."""
    from .attention import AttentionMemory  # which builds on this file

    require(kind in KINDS, "memory", kind, f"one of {', '.join(KINDS)}")
    return {"gru": GRUMemory, "sum": SumMemory, "attention": AttentionMemory}[kind](**settings)


def _weight(generator: Generator, fan_in: int, fan_out: int, scale: float = 1.0) -> Tensor:
    weight = torch.randn(fan_in, fan_out, generator=generator, device=generator.device)
    return weight * (scale / math.sqrt(fan_in))


def _bias(generator: Generator, size: int) -> Tensor:
    return torch.zeros(size, device=generator.device)
