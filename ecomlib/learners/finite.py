"""Values that must be finite, and numbers worth logging: collected through an iteration, read in one transfer at its
end. On a GPU every look at a value waits for all work before it, so that looking at each step would leave it idle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

ADVICE = "try a smaller step size, fewer inner steps, or a floor on the policy's standard deviation"


class Check(NamedTuple):
    """One call of ``check_finite``: what is left of its tensors."""

    what: str
    values: Tensor  # 0 where all is finite, else not a number: (tensors,), with the tasks or the seeds behind
    tasks: bool


class Checks:
    """What ``check_finite`` was asked while this was open (``deferred``).

    ``seeds`` are those of a batch of runs (chapter "Meta-reinforcement learning", ``MetaLearner.meta_train``): a task
    axis then holds every task once for each of them, and other tensors have them as first axis. ``first_task`` is the
    number of this process's first task among those of an iteration.
    """

    def __init__(self, seeds: Sequence[int] | None = None, first_task: int = 0):
        self.seeds, self.first_task = seeds, first_task
        self.collected: list[Check] = []

    def add(self, what: str, values: Tensor, tasks: bool = False) -> None:
        """One more check, as ``Check`` holds it."""
        self.collected.append(Check(what, values, tasks))

    def flag(self) -> Tensor | None:
        """() 0 as long as all is finite, else not a number; None before the first check."""
        return torch.stack([check.values.sum() for check in self.collected]).sum() if self.collected else None

    def read(self, log: dict[str, Tensor | float] | None = None) -> dict[str, float | list[float]]:
        """Values of ``log`` as Python's numbers, a list where they have an axis. Raises ``FloatingPointError`` that
        names the first check that failed. The one place where an iteration of meta-training waits for the device."""
        log = log or {}
        checks, self.collected = self.collected, []
        values = [torch.as_tensor(value).detach() for value in log.values()] + [check.values for check in checks]
        if not values:
            return {}
        device = next((v.device for v in values if v.device.type != "cpu"), values[0].device)
        flat = torch.cat([v.to(device, torch.float64).flatten() for v in values]).cpu()
        host = [part.view(v.shape) for part, v in zip(flat.split([v.numel() for v in values]), values)]
        for check, found in zip(checks, host[len(log) :]):
            self._refuse(check, found)
        return {name: value.tolist() for name, value in zip(log, host)}

    def _refuse(self, check: Check, values: Tensor) -> None:
        if values.isfinite().all():
            return
        index, *place = values.isnan().nonzero()[0].tolist()
        where = ""
        if place:
            task, seed = divmod(place[0], len(self.seeds)) if self.seeds is not None else (place[0], None)
            where = f" of task {self.first_task + task}" if check.tasks else ""
            where += "" if seed is None else f"{',' if check.tasks else ' of'} seed {self.seeds[seed]}"
        raise FloatingPointError(f"{check.what}{where}, tensor {index}, is not finite: {ADVICE}")


_OPEN: ContextVar[Checks | None] = ContextVar("open checks", default=None)


def open_checks() -> Checks | None:
    """Those that ``check_finite`` adds to; None where it decides at once."""
    return _OPEN.get()


@contextmanager
def deferred(seeds: Sequence[int] | None = None, first_task: int = 0) -> Iterator[Checks]:
    """Collect checks instead of deciding each at once; on leaving, what has not been read is. If an error is raised
    inside, a value that was not finite before it is reported instead."""
    checks = Checks(seeds, first_task)
    token = _OPEN.set(checks)
    try:
        yield checks
    except Exception:
        checks.read()  # what went wrong first, not what it led to
        raise
    finally:
        _OPEN.reset(token)
    checks.read()


def check_finite(what: str, tensors: Sequence[Tensor], tasks: bool = True) -> None:
    """Raise ``FloatingPointError`` naming the tensor and, if the first axis is the task, the task that is not finite;
    inside ``deferred``, at its end."""
    checks = open_checks()
    axes = 1 if tasks or (checks is not None and checks.seeds is not None) else 0
    # 0 times a number is 0, unless the number is infinite or none.
    zeros = [t.detach() * 0 for t in tensors]
    values = torch.stack([z.flatten(axes).sum(-1) if z.dim() > axes else z for z in zeros])
    if checks is not None:
        checks.add(what, values, tasks)
        return
    checks = Checks()
    checks.add(what, values, tasks)
    checks.read()
