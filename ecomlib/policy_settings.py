"""The policy of a training run by names: what it sees, its network, its distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .families.base import TaskFamily, check, number, whole
from .networks import GRU, MLP, BySegment, Network
from .policies import Categorical, Gaussian, PlackettLuce, Policy


def check_name(config: object, field: str, names: tuple[str, ...]) -> None:
    """Refuse a field unless it is one of ``names``."""
    check(config, field, lambda x: isinstance(x, str) and x in names, f"one of {', '.join(names)}")


@dataclass(frozen=True)
class PolicySettings:
    """The policy: what it sees, its network, its distribution (softmax where actions are numbered, Plackett-Luce where
    they are slates, else Gaussian)."""

    network: Literal["mlp", "gru", "segments"] = "mlp"
    """mlp; gru, a recurrent network that remembers the episode so far; or segments, one mlp that serves every segment
    of a task and a bias of each."""
    hidden: tuple[int, ...] = (64, 64)
    """Units of each hidden layer; a gru has one."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Between the layers of an mlp."""
    inputs: tuple[int, ...] | None = None
    """Numbers of the observation's entries that an mlp sees, or of an item's where it scores items; None is all."""
    minimum_std: float = 0.0
    """Lower bound of a Gaussian policy's standard deviation."""
    initial_std: float | None = None
    """A Gaussian policy's standard deviation before training; None is 1."""

    def __post_init__(self):
        check_name(self, "network", ("mlp", "gru", "segments"))
        check_name(self, "activation", ("tanh", "relu"))
        sizes = lambda x: isinstance(x, tuple) and all(whole(size, 1) for size in x)
        check(self, "hidden", sizes, "whole numbers >= 1, one for each hidden layer")
        check(self, "hidden", lambda x: self.network != "gru" or len(x) == 1, "one whole number >= 1 for a gru")
        chosen = lambda x: isinstance(x, tuple) and len(x) > 0 and all(whole(i, 0) for i in x)
        check(self, "inputs", lambda x: x is None or chosen(x), "None or whole numbers >= 0")
        check(self, "inputs", lambda x: x is None or self.network != "gru", "None with a gru")
        check(self, "minimum_std", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "initial_std", lambda x: x is None or number(x, 0), "None or a finite number > 0")

    def build(self, family: TaskFamily) -> Policy:
        """A policy for ``family``."""
        items = getattr(family, "items", None) if getattr(family, "slate", None) else None
        rows = items if self.network == "mlp" else None  # an mlp scores items one by one, with the same weights
        seen = family.observation_size // (rows or 1)
        blocks = getattr(family, "blocks", None)  # entries of an observation: common ones, and of each segment
        if self.network == "segments":
            check(self, "network", lambda x: blocks, "mlp or gru, for a family without segments")
            seen = sum(blocks)
        if self.inputs is not None:
            check(self, "inputs", lambda x: max(x) < seen, f"numbers of the {seen} entries of an observation, from 0")
        outputs = 1 if rows else items or family.actions or getattr(family, "action_size", 1)
        activation = getattr(torch, self.activation)
        if self.network == "gru":
            network: Network = GRU(seen, self.hidden[0], outputs)
        elif self.network == "segments":
            network = BySegment(outputs, *blocks, self.hidden, self.inputs, activation)
        elif self.inputs is None:
            network = MLP((seen, *self.hidden, outputs), activation)
        else:
            network = Inputs(MLP((len(self.inputs), *self.hidden, outputs), activation), self.inputs)
        if items:
            constant = rows is not None and set(self.inputs or range(seen)) <= set(getattr(family, "constant", ()))
            return PlackettLuce(network, items, family.slate, constant)
        return (
            Categorical(network)
            if family.actions
            else Gaussian(network, 0.0, self.initial_std or 1.0, self.minimum_std)
        )


class Inputs:
    """A network that sees only some entries of an observation: what it does not see reaches it by adaptation alone."""

    def __init__(self, network: MLP, inputs: tuple[int, ...]):
        self.network, self.inputs = network, list(inputs)
        self.output_size, self.tensors, self.head = network.output_size, network.tensors, network.head
        self.initial = network.initial

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., task, episode, observation) -> (..., task, episode, output)."""
        return self.network.outputs(parameters, observation[..., self.inputs])
