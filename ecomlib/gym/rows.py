"""Episodes of tasks of a fixed list, side by side: what a single environment (one row) and a vector environment have in
common. Arrays of NumPy in and out; no Python loop over rows."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import noise
from ..families import LogitPricing, PointNavigation
from ..families.base import SPLITS, TaskFamily, require, split, take, whole
from ..families.bidding import SegmentBidding
from ..families.inventory import CensoredInventory
from ..families.recommendation import SlateRecommendation
from .spaces import action_space, family_actions, observation_space

FAMILIES = {
    "Bidding": SegmentBidding,
    "Inventory": CensoredInventory,
    "Navigation": PointNavigation,
    "Pricing": LogitPricing,
    "Recommendation": SlateRecommendation,
}
"""Name in ``ecomlib/NAME-v0`` -> family."""
TIMELESS = (PointNavigation,)
"""Families whose observations do not tell the time: their horizon is a limit of the experiment, not part of the
problem."""


def build(family: TaskFamily | str, settings: dict[str, Any]) -> TaskFamily:
    """The family itself or the one of this name with its defaults, and then ``settings`` in place of its own."""
    if isinstance(family, str):
        require(family in FAMILIES, "family", family, f"one of {', '.join(FAMILIES)}, or a family")
        family = FAMILIES[family]()
    names = [field.name for field in fields(family)]
    for name in settings:
        if name not in names:  # a TypeError, as of any unknown keyword: callers that try keywords rely on it
            raise TypeError(f"{name!r} is no setting of {type(family).__name__}, which has {', '.join(names)}")
    return replace(family, **settings)


class Rows:
    """R rows, each an episode of a task at its own step.

    Luck is that of ``rollout``: the k-th episode of a row since it was given seed s (0 the first) is that of replica 0
    in ``rollout(..., seed=s, episode=k)``, whatever the other rows do.
    """

    def __init__(self, family: TaskFamily, split_name: str, tasks: int, rows: int, resample: bool, oracle: bool):
        require(split_name in SPLITS, "split", split_name, f"one of {', '.join(SPLITS)}")
        require(whole(tasks, 1), "tasks", tasks, "a whole number >= 1")
        require(whole(rows, 1), "num_envs", rows, "a whole number >= 1")
        for name, value in (("resample", resample), ("oracle", oracle)):
            require(isinstance(value, bool), name, value, "True or False")
        self.family, self.list = split(family, split_name, tasks)
        self.rows, self.resample = rows, resample
        self.observation_space, self.action_space = observation_space(family), action_space(family)
        self.horizon, self.timeless = self.family.horizon, isinstance(family, TIMELESS)
        # A timeless family that would end a step later ends within the horizon only of its own accord.
        self.played = replace(self.family, horizon=self.horizon + 1) if self.timeless else self.family
        zeros = torch.zeros(rows, dtype=torch.int64)
        self.seed, self.episode, self.trial_episode, self.time, self.number = (zeros.clone() for _ in range(5))
        self.replica, self.tasks, self.state = zeros[:1], None, None
        self.over = np.ones(rows, dtype=bool)  # rows in which no episode is going on
        self.values = torch.full((2, tasks), torch.nan) if oracle else None

    # -------------------------------------------------------------------------------------------- episodes
    def begin(self, which: np.ndarray, seed: np.ndarray | None = None, task: Any = None) -> None:
        """The next episode of the rows ``which`` (R,) bool.

        ``seed`` (R,) gives them new luck from episode 0 on. ``task`` (R,) numbers of the list, or "new" to draw them,
        gives them other tasks; with neither, and unless ``resample``, they keep theirs. Either starts a new trial.
        """
        mask, task = torch.from_numpy(which), "new" if task is None and self.resample else task
        if seed is None:
            self.episode = self.episode + mask
        else:
            self.seed = torch.where(mask, torch.from_numpy(seed), self.seed)
            self.episode = self.episode.masked_fill(mask, 0)
        fresh = seed is not None or task is not None or self.state is None
        self.trial_episode = self.trial_episode.masked_fill(mask, 0) if fresh else self.trial_episode + mask
        if isinstance(task, str):
            nobody = self.replica.expand(self.rows)
            draw = noise.uniform(self.seed, nobody, self.replica, self.episode, 0, noise.PRIOR, 1)[:, 0, 0]
            task = (draw * len(self.list.id)).long()
        if task is not None:
            self.number = torch.where(mask, torch.as_tensor(task), self.number)
        if task is not None or self.tasks is None:
            self.tasks = take(self.list, self.number)
        self.time = self.time.masked_fill(mask, 0)
        first = self.played.reset(self.tasks, 1, self._luck(torch.full_like(self.time, self.horizon)))
        self.state = first if self.state is None else _where(mask, first, self.state)
        self.over[which] = False

    def step(self, actions: Any, moving: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Play one step in the rows ``moving`` (R,) bool; reward, terminated and truncated (R,), 0 in the others."""
        action = family_actions(self.played, self.action_space, actions)
        state, reward, done = self.played.step(self.tasks, self.state, action, self._luck(self.time))
        mask = torch.from_numpy(moving)
        self.state = state if moving.all() else _where(mask, state, self.state)
        self.time = self.time + mask
        terminated = done[:, 0] & mask
        truncated = (self.time >= self.horizon) & mask & ~terminated if self.timeless else torch.zeros_like(mask)
        self.over = (terminated | truncated).numpy()
        return (reward[:, 0] * mask).double().numpy(), terminated.numpy(), truncated.numpy()

    def observe(self) -> np.ndarray:
        """(R, observation_size) float32, the caller's own: a family may return a part of its state."""
        return self.played.observe(self.tasks, self.state)[:, 0].float().numpy().copy()

    def info(self) -> dict[str, np.ndarray]:
        """Arrays (R,): the number of the task in its list, which names no hidden parameter; the episode of its trial,
        0 the first; and, if asked for, the task's oracle and blind return."""
        info = {"task": self.number.numpy(), "trial_episode": self.trial_episode.numpy()}
        if self.values is not None:
            missing = torch.unique(self.number[self.values[0, self.number].isnan()])
            if len(missing):
                tasks = take(self.list, missing)
                for row, value in enumerate((self.family.oracle_return(tasks), self.family.blind_return(tasks))):
                    self.values[row, missing] = value
            info["oracle_return"], info["blind_return"] = self.values[:, self.number].double().numpy()
        return info

    def _luck(self, time: Tensor) -> Tensor:
        size = self.played.noise_size
        return noise.uniform(self.seed, self.tasks.id, self.replica, self.episode, time, noise.FAMILY, size)


def seeds(first: int, rows: int) -> np.ndarray:
    """(R,) seeds first, first + 1, ..., as Gymnasium numbers the rows of a vector environment. Any whole number >= 0:
    those of 62 bits and more wrap around."""
    return (first + np.arange(rows, dtype=object)) % 2**62


def check_options(options: dict[str, Any] | None, known: tuple[str, ...]) -> dict[str, Any]:
    """The options of a reset, refused if one is unknown."""
    for name in options or {}:
        require(name in known, "options key", name, f"one of {', '.join(known)}")
    return dict(options or {})


def numbers(task: Any, tasks: int, rows: int, name: str) -> np.ndarray | str | None:
    """Task numbers (R,) of what was asked for: one for all rows, one a row, "new", or None to keep them."""
    if task is None or (isinstance(task, str) and task == "new"):
        return task
    allowed = f'"new", or task numbers 0..{tasks - 1} of the split: one, or {rows} (one a row)'
    array = np.asarray(task)
    known = np.issubdtype(array.dtype, np.integer) and array.shape in ((), (1,), (rows,))
    require(known and array.min() >= 0 and array.max() < tasks, name, task, allowed)
    return np.broadcast_to(array, rows).astype(np.int64)


def _where(mask: Tensor, new: Any, old: Any) -> Any:
    pick = lambda a, b: torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)
    return type(new)(*map(pick, new, old))
