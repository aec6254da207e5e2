"""What a run is computed on: device, threads, precision, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .families.base import check, whole


@dataclass(frozen=True)
class Machine:
    """What a run is computed on: nothing here changes what it computes, up to rounding, so a run may go on with other
    values."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    threads: int = 1
    """Threads of each process on the CPU; small tensors are fastest with 1."""
    compile: bool = False
    """Compile the family's step (torch.compile): a minute at the start, faster rollouts afterwards."""
    track: tuple[Literal["wandb"], ...] = ()
    """Also log to Weights & Biases; offline unless WANDB_MODE says otherwise."""

    def __post_init__(self):
        check(self, "threads", lambda x: whole(x, 1, 1024), "a whole number from 1 to 1024")
        check(self, "compile", lambda x: isinstance(x, bool), "True or False")
        check(self, "track", lambda x: isinstance(x, tuple) and all(y == "wandb" for y in x), "wandb, or nothing")
        check(self, "device", lambda x: x in ("auto", "cpu", "cuda"), "one of auto, cpu, cuda")
        missing = self.device == "cuda" and not torch.cuda.is_available()
        check(self, "device", lambda x: not missing, "auto or cpu: this machine has no GPU that torch can use")


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Compiled:
    """A family whose ``step`` is compiled as one graph."""

    def __init__(self, family: Any):
        self.family, self.step = family, torch.compile(family.step, fullgraph=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)
