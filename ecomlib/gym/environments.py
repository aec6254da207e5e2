"""A family as a Gymnasium environment, and its batch as a vector environment."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ..families.base import TaskFamily, require
from .rows import Rows, build, check_options, numbers, seeds


class TaskEnv(gymnasium.Env):
    """One task of a family, episode after episode.

    ==========  =================================================================================================
    Argument    Meaning
    ==========  =================================================================================================
    family      a family, or its name (``FAMILIES``) for the one with default settings
    split       ``train``, ``test`` or ``shifted``: which fixed list tasks come from (``families.split``)
    tasks       length of that list; a task is named by its number in it, from 0
    task        number of the task to begin with, or "new" to have the first reset draw it
    resample    if true, every reset draws a task of the list by its seed
    oracle      if true, ``info`` has the expected returns of the task's oracle and of the blind policy
    settings    fields of the family, in place of its own
    ==========  =================================================================================================

    ``reset()`` starts the next episode of the *same* task with fresh luck, so consecutive episodes are a trial. Only
    ``options={"task": number}``, ``options={"task": "new"}`` or ``resample`` change the task. ``reset(seed=s)`` begins
    again: the same seed, tasks and actions make the same episodes, those that ``rollout`` plays with this seed.

    Where the observation tells the time, the last step *terminates* the episode: the end belongs to the problem, what
    comes after it is worth nothing, and a learner must not bootstrap there. A family without the time in its
    observation (``PointNavigation``) is *truncated* at its horizon. ``info`` has the task's number (``task``) and the
    episode of the trial (``trial_episode``); never a hidden parameter.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        family: TaskFamily | str,
        split: str = "train",
        tasks: int = 1000,
        task: int | str = 0,
        resample: bool = False,
        oracle: bool = False,
        **settings: Any,
    ):
        self.rows = Rows(build(family, settings), split, tasks, 1, resample, oracle)
        self.family = self.rows.family
        self.observation_space, self.action_space = self.rows.observation_space, self.rows.action_space
        self._first = numbers(task, tasks, 1, "task")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """First observation (observation_size,) and info of the next episode. ``options``: ``task``."""
        super().reset(seed=seed)
        options = check_options(options, ("task",))
        task = numbers(options.get("task"), len(self.rows.list.id), 1, 'options["task"]')
        started = self.rows.state is not None
        if task is None and not started:
            task = self._first
        if seed is None and not started:
            seed = self.np_random_seed
        own = None if seed is None else seeds(seed, 1).astype(np.int64)
        with torch.no_grad():
            self.rows.begin(np.ones(1, dtype=bool), own, task)
            return self.rows.observe()[0], self._info()

    def step(self, action: Any):
        """Observation, reward, terminated, truncated, info. Raises ``ResetNeeded`` where no episode is going on."""
        if self.rows.over[0]:
            raise ResetNeeded("no episode is going on: call reset() before the first step and after the last")
        with torch.no_grad():
            reward, terminated, truncated = self.rows.step(np.asarray(action)[None], np.ones(1, dtype=bool))
            return self.rows.observe()[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), self._info()

    def _info(self) -> dict[str, Any]:
        return {name: value[0].item() for name, value in self.rows.info().items()}


class TaskVectorEnv(VectorEnv):
    """``num_envs`` tasks of a family side by side, one row of the batch each.

    Arguments, tasks and ends are those of ``TaskEnv``; besides, ``task`` may have one number a row (by default row r
    begins with task r of the list, beginning again where the list ends) and ``autoreset_mode`` is one of Gymnasium's:
    ``NextStep`` (a row that has ended is reset by the next step, which ignores its action), ``SameStep`` (it is reset
    at once; the last observation and info are ``info["final_obs"]`` and ``info["final_info"]``) or ``Disabled`` (reset
    by ``options={"reset_mask": ...}``). ``reset(seed=s)`` gives row r the seed s + r, or its own of a list: the row is
    then ``TaskEnv`` with that seed and task.
    """

    def __init__(
        self,
        num_envs: int,
        family: TaskFamily | str,
        split: str = "train",
        tasks: int = 1000,
        task: int | list[int] | str | None = None,
        resample: bool = False,
        oracle: bool = False,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **settings: Any,
    ):
        self.rows = Rows(build(family, settings), split, tasks, num_envs, resample, oracle)
        modes = [mode.value for mode in AutoresetMode]
        valid = isinstance(autoreset_mode, AutoresetMode) or autoreset_mode in modes
        require(valid, "autoreset_mode", autoreset_mode, f"one of {', '.join(modes)}")
        self.family, self.num_envs, self.autoreset_mode = self.rows.family, num_envs, AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = self.rows.observation_space, self.rows.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._first = numbers(np.arange(num_envs) % tasks if task is None else task, tasks, num_envs, "task")

    def reset(self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None):
        """First observations (num_envs, observation_size) and info. ``options``: ``task``, and ``reset_mask``
        (num_envs,) bool for the rows to reset, all without it."""
        super().reset(seed=None if isinstance(seed, (list, tuple, np.ndarray)) else seed)
        options = check_options(options, ("task", "reset_mask"))
        task = numbers(options.get("task"), len(self.rows.list.id), self.num_envs, 'options["task"]')
        which = np.asarray(options.get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        some = which.dtype == bool and which.shape == (self.num_envs,) and which.any()
        require(some, 'options["reset_mask"]', which, f"({self.num_envs},) bool, true somewhere")
        if self.rows.state is None:
            require(which.all(), 'options["reset_mask"]', which, "all true at the first reset")
            task = self._first if task is None else task
            seed = self.np_random_seed if seed is None else seed
        with torch.no_grad():
            self.rows.begin(which.copy(), self._seeds(seed), task)
            return self.rows.observe(), self._info(which)

    def step(self, actions: Any):
        """Observations, rewards, terminations, truncations (num_envs, ...) and info."""
        rows, again = self.rows, self.rows.over.copy()
        if rows.state is None or (self.autoreset_mode is AutoresetMode.DISABLED and again.any()):
            raise ResetNeeded("call reset() before the first step and, without autoreset, for every row that has ended")
        if np.shape(actions)[:1] != (self.num_envs,):
            raise ValueError(f"actions have shape {np.shape(actions)}; expected {self.action_space.shape}, one a row")
        final = {}
        with torch.no_grad():
            if again.any():
                rows.begin(again)
            reward, terminated, truncated = rows.step(actions, ~again)
            if self.autoreset_mode is AutoresetMode.SAME_STEP and rows.over.any():
                over = rows.over.copy()
                last = np.full(self.num_envs, None, dtype=object)  # an array a row, as Gymnasium's own
                last[over] = np.fromiter(rows.observe()[over], dtype=object)
                final = {"final_obs": last, "_final_obs": over, "final_info": self._info(over)}
                final["_final_info"] = over.copy()
                rows.begin(over)
            return rows.observe(), reward, terminated, truncated, self._info() | final

    def _seeds(self, seed: Any) -> np.ndarray | None:
        if seed is None or isinstance(seed, (int, np.integer)):
            return None if seed is None else seeds(int(seed), self.num_envs).astype(np.int64)
        array = np.asarray(seed)
        known = np.issubdtype(array.dtype, np.integer) and array.shape == (self.num_envs,) and array.min() >= 0
        require(known, "seed", seed, f"None, a whole number >= 0, or {self.num_envs} of them")
        return array.astype(np.int64)

    def _info(self, which: np.ndarray | None = None) -> dict[str, Any]:
        """Arrays of all rows and, under the same name after "_", the rows for which they are meant."""
        which = np.ones(self.num_envs, dtype=bool) if which is None else which
        info = {}
        for name, value in self.rows.info().items():
            info[name], info[f"_{name}"] = np.where(which, value, 0), which.copy()
        return info
