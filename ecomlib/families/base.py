"""The task-family protocol: pure functions over explicit state, on tensors with a task axis and an episode axis.

Shapes: M tasks, N episodes in parallel (independent replicas), so a state or a reward is (M, N). A hidden parameter
is (M,).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.quasirandom import SobolEngine

from .. import noise as noise_

SPLITS = ("train", "test", "shifted")


class TaskFamily(Protocol):
    """What every family offers. A family is an immutable object; whatever changes is in ``tasks`` and ``state``."""

    horizon: int
    """Steps in an episode."""
    noise_size: int
    """Uniforms that one step of one episode consumes."""
    observation_size: int
    """Length of an observation."""
    actions: int
    """Number of actions; 0 when the action is a real number."""

    def tasks(self, task_id: Tensor) -> Any:
        """Tasks named by their ids (M,) int64: a NamedTuple of (M, ...) tensors. The same id is always the same
        task."""

    def shifted(self) -> TaskFamily:
        """The same family under a prior that training never saw."""

    def context(self, tasks: Any) -> Tensor:
        """(M, C) what the merchant knows of each task before the first step."""

    def reset(self, tasks: Any, episodes: int, noise: Tensor) -> Any:
        """The first state of N episodes. Never changes the task. ``noise`` is (M, N, noise_size)."""

    def observe(self, tasks: Any, state: Any) -> Tensor:
        """(M, N, observation_size), what the merchant sees; never a hidden parameter."""

    def step(self, tasks: Any, state: Any, action: Tensor, noise: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Next state, reward (M, N), done (M, N). ``noise`` is (M, N, noise_size) uniforms."""

    def oracle_return(self, tasks: Any) -> Tensor:
        """(M,) expected episode return of the best policy, within this action set, that knows the task."""

    def blind_return(self, tasks: Any) -> Tensor:
        """(M,) expected episode return of the best policy that uses time, context and physical state, never
        feedback."""


class Prior:
    """What a family gets whose task is a function of a few uniforms: tasks by id, a quasi-random sample of the prior,
    and hidden parameters that drift. The family says how many uniforms and what they mean (``from_uniforms``)."""

    prior_size: int
    """Uniforms that make a task."""
    hidden_size: int
    """How many of them, the first, are of hidden parameters; the others are of what the merchant sees."""

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> Any:
        """Tasks of ``uniforms`` (M, prior_size), by inverse transform."""
        raise NotImplementedError

    def tasks(self, task_id: Tensor) -> Any:
        """The tasks named by ``task_id`` (M,): a function of the id alone."""
        return self.from_uniforms(task_id, self._uniforms(task_id, 0))

    def prior_sample(self, size: int, device: torch.device | str = "cpu") -> Any:
        """A fixed quasi-random (Sobol) sample of the prior: the particles of the Bayesian baselines, the blind
        search."""
        points = SobolEngine(self.prior_size, scramble=True, seed=0).draw(size, dtype=torch.float64)
        points = points.clamp(1e-9, 1 - 1e-9).to(device=device, dtype=torch.get_default_dtype())
        return self.from_uniforms(torch.arange(size, device=device), points)

    def drifted(self, task_id: Tensor, episode: int, pace: float) -> Any:
        """The same tasks in the given episode of a trial, 0 the first: hidden parameters walk at random, what the
        merchant sees of them stays.

        An episode moves each hidden parameter by ``pace`` times a standard normal, in units of the prior's quantiles,
        and is reflected at the prior's ends, so that the prior stays that of every episode.
        """
        uniforms = self._uniforms(task_id, 0)
        hidden, seen = uniforms[:, : self.hidden_size], uniforms[:, self.hidden_size :]
        for step in range(1, episode + 1):
            hidden = hidden + pace * torch.special.ndtri(self._uniforms(task_id, step)[:, : self.hidden_size])
            hidden = 1 - (hidden.remainder(2) - 1).abs()
        return self.from_uniforms(task_id, torch.cat((hidden.clamp(1e-9, 1 - 1e-7), seen), 1))

    def _uniforms(self, task_id: Tensor, step: int) -> Tensor:
        replica = torch.zeros(1, dtype=torch.int64, device=task_id.device)
        return noise_.uniform(0, task_id, replica, 0, step, noise_.PRIOR, self.prior_size)[:, 0]


def sample_tasks(family: TaskFamily, tasks: int, generator: Generator, device: str = "cpu") -> Any:
    """M fresh tasks. Only the ids are drawn, with a CPU generator; a task is a function of its id, so it is the same
    on any device."""
    require(whole(tasks, 1), "tasks", tasks, "a whole number >= 1")
    return family.tasks(torch.randint(2**62, (tasks,), generator=generator).to(device))


SPLIT_SEEDS = {"train": 1, "test": 2, "shifted": 3}
"""Seeds of the generators that draw the fixed lists."""


def split(family: TaskFamily, name: str, tasks: int, device: str = "cpu") -> tuple[TaskFamily, Any]:
    """The first M tasks of a fixed list: ``train``, ``test`` (both from the family's prior) or ``shifted``.

    Returns the family to evaluate with (for ``shifted``, the one whose prior moved) and its tasks. The first 100
    tasks of a list are the same whether 100 or 1,000 are asked for.
    """
    require(name in SPLITS, "split", name, f"one of {', '.join(SPLITS)}")
    moved = family.shifted() if name == "shifted" else family
    return moved, sample_tasks(moved, tasks, Generator().manual_seed(SPLIT_SEEDS[name]), device)


def take(tasks: Any, index: Any) -> Any:
    """The same NamedTuple with only the tasks that ``index`` selects along the task axis."""
    return type(tasks)(*(field[index] for field in tasks))


# ------------------------------------------------------------------------------------------ checks of settings
def require(valid: bool, name: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming the setting, its value and what is allowed, unless ``valid``."""
    if not valid:
        raise ValueError(f"{name} = {value!r}; allowed: {allowed}")


def check(config: object, field: str, valid: Callable[[Any], bool], allowed: str) -> None:
    """Refuse a field of a configuration unless ``valid(value)``. A list or array is first replaced by a tuple and a
    NumPy number by Python's, so that equal settings are equal, hashable keys of a cache."""
    value = _plain(getattr(config, field))
    require(valid(value), f"{type(config).__name__}.{field}", value, allowed)
    object.__setattr__(config, field, value)  # the configuration may be frozen


def whole(value: object, low: float, high: float = math.inf) -> bool:
    """Whether this is a whole number with low <= value <= high; True and 3.0 are not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high


def number(value: object, above: float = -math.inf, below: float = math.inf) -> bool:
    """Whether this is a finite real number with above < value < below; True is not, nor a whole number that no float
    can hold."""
    real = isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    exact = real and (not isinstance(value, Integral) or float(value) == value)
    return exact and above < value < below


def numbers(value: object, length: int | None = None) -> bool:
    """Whether this is a tuple of finite real numbers, ``length`` of them if given, else at least one."""
    sized = isinstance(value, tuple) and (len(value) == length if length else len(value) > 0)
    return sized and all(map(number, value))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # an array, a tensor, or a number of theirs
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
