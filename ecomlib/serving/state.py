"""What a service remembers of one task under one model, and its bytes."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

FORMAT = "ecomlib served task 1"


class Decision(NamedTuple):
    """A price that was posted."""

    id: str
    """Names it: a function of model, task and number."""
    number: int
    """Decisions of the task before it."""
    day: int
    """Day of the episode, from 0, a Monday."""
    unit_cost: float
    """In units of the average unit cost."""
    action: float
    """Number of the price in the family's grid; the markup itself where prices are continuous."""
    markup: float
    """Price / unit cost."""
    price: float
    """What to post, in the money of ``unit_cost``."""
    probability: float
    """With which the policy chose it (a density where prices are continuous): what a later evaluation needs."""


class Support(NamedTuple):
    """Days that the next inner step will learn from, oldest first."""

    observation: Tensor  # (days, observation)
    action: Tensor  # (days,)
    log_prob: Tensor  # (days,)
    reward: Tensor  # (days,)


class TaskState(NamedTuple):
    """Everything that the next decision and the next inner step depend on."""

    task: str
    """Its name."""
    answered: int = 0
    """Decisions with feedback: day and episode follow from it."""
    markup: float = 0.0
    """Yesterday's; 0 on the first day of an episode."""
    sold: float = 0.0
    """Yesterday's units; 0 on the first day of an episode."""
    stock: float = float("inf")
    """Units left."""
    earned: float = 0.0
    """In the episode so far."""
    stage: int = 0
    """Inner steps done."""
    diverged: bool = False
    """An inner step gave numbers that are not finite and was left out."""
    open: Decision | None = None
    """The decision that waits for feedback."""
    phi: tuple[Tensor, ...] = ()
    """The task's own parameters, (1, ...): those that adapt; empty before the first inner step."""
    memory: Tensor | None = None
    """A recurrent policy's, (1, 1, hidden)."""
    support: Support | None = None
    """None where nothing waits to be learned from."""


_NUMBERS = ("task", "answered", "markup", "sold", "stock", "earned", "stage", "diverged")


def pack(state: TaskState) -> bytes:
    """A safetensors file in memory: tensors, and the rest as JSON in its header."""
    tensors = {f"phi.{i}": p for i, p in enumerate(state.phi)}
    if state.memory is not None:
        tensors["memory"] = state.memory
    if state.support is not None:
        tensors |= {f"support.{name}": value for name, value in state.support._asdict().items()}
    header = {name: getattr(state, name) for name in _NUMBERS} | {"format": FORMAT, "open": state.open}
    contiguous = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return safetensors.torch.save(contiguous, {"ecomlib": json.dumps(header)})


def unpack(data: bytes) -> TaskState:
    """The inverse of ``pack``. Raises ``RuntimeError`` for bytes that it did not write; nothing in them is executed."""
    try:
        length = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["ecomlib"])
        tensors = safetensors.torch.load(data)
        if header["format"] != FORMAT:
            raise ValueError
        phi = tuple(tensors[f"phi.{i}"] for i in range(sum(name.startswith("phi.") for name in tensors)))
        support = None
        if "support.action" in tensors:
            support = Support(*(tensors[f"support.{name}"] for name in Support._fields))
        waiting = None if header["open"] is None else Decision(*header["open"])
        kept = {name: header[name] for name in _NUMBERS}
        return TaskState(**kept, open=waiting, phi=phi, memory=tensors.get("memory"), support=support)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError):
        raise RuntimeError(f"{len(data)} bytes that are no state of a served task ({FORMAT})") from None
