"""Environments of other libraries, each stepped in the way its own documentation shows, and those of gymnax in a Python
that has it. A measurement is a function: at least so many seconds -> CPU seconds of an env-step."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ecomlib import noise
from ecomlib.families import sample_tasks
from ecomlib.families.base import TaskFamily

from .measure import clock

Measurement = Callable[[float], float]
DISTRIBUTIONS = {
    "or_gym_inventory": "or-gym-inventory",
    "decisionrl": "decisionrl",
    "gymnasium": "gymnasium",
    "stable_baselines3": "stable_baselines3",
}
"""Module -> distribution of each peer that runs in this Python."""


def repeated(run: Callable[[], object], steps: int, device: str = "cpu") -> Measurement:
    """Time ``run``, which plays ``steps`` env-steps, again and again."""

    def measure(least: float) -> float:
        calls, start = 0, clock(device)
        while calls == 0 or clock(device) - start < least:
            run()
            calls += 1
        return (clock(device) - start) / calls / steps

    return measure


def one_by_one(environment: Any, steps: int = 2000) -> Measurement:
    """Step one environment, resetting it where an episode ends. Actions are drawn beforehand."""
    actions = [environment.action_space.sample() for _ in range(steps)]
    environment.reset(seed=0)

    def run() -> None:
        for action in actions:
            _, _, terminated, truncated, _ = environment.step(action)
            if terminated or truncated:
                environment.reset()

    return repeated(run, steps)


def or_gym_inventory() -> dict[str, Measurement]:
    """Its newsvendor with a lead time of 5 days, and its chain of 4 stages that loses sales."""
    with contextlib.redirect_stderr(io.StringIO()):
        from or_gym_inventory.inventory_management import InvManagementLostSalesEnv
        from or_gym_inventory.newsvendor import NewsvendorEnv
    return {
        "or-gym-inventory Newsvendor": one_by_one(NewsvendorEnv()),
        "or-gym-inventory InvManagementLostSales": one_by_one(InvManagementLostSalesEnv()),
    }


def decisionrl() -> dict[str, Measurement]:
    """Its pricing of a finite stock and its inventory, one at a time, and its vector of 64 of the first."""
    from decisionrl.envs.inventory import InventoryManagement
    from decisionrl.envs.pricing import DynamicPricing
    from decisionrl.wrappers.vector import SyncVectorEnv

    shelf = lambda: DynamicPricing(n_prices=8, initial_inventory=8, horizon=20)
    many = SyncVectorEnv([shelf for _ in range(64)])
    many.reset(seed=0)
    actions = list(np.random.default_rng(0).integers(8, size=(100, 64)))
    run = lambda: [many.step(action) for action in actions]
    return {
        "decisionrl DynamicPricing": one_by_one(shelf()),
        "decisionrl InventoryManagement": one_by_one(InventoryManagement()),
        "decisionrl SyncVectorEnv, 64 DynamicPricing": repeated(run, 6400),
    }


def stable_baselines(name: str, settings: dict[str, Any], batch: int) -> dict[str, Measurement]:
    """Its ``DummyVecEnv`` around ``batch`` single environments of ours."""
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv

    make = lambda: gymnasium.make(f"ecomlib.gym:ecomlib/{name}-v0", **settings)
    many = DummyVecEnv([make for _ in range(batch)])
    many.reset()
    actions = [np.stack([many.action_space.sample() for _ in range(batch)]) for _ in range(10)]
    run = lambda: [many.step(action) for action in actions]
    return {f"{name}, DummyVecEnv, {batch}": repeated(run, 10 * batch)}


def installed() -> dict[str, Callable[[], dict[str, Measurement]]]:
    """The peers that can be imported here and have environments of their own."""
    peers = {"or_gym_inventory": or_gym_inventory, "decisionrl": decisionrl}
    return {name: peer for name, peer in peers.items() if importlib.util.find_spec(name)}


class Gymnax:
    """``benchmarks/gymnax_environments.py`` in another Python, which answers line by line. One thread."""

    def __init__(self, python: str):
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        script = Path(__file__).with_name("gymnax_environments.py")
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([python, str(script)], stdin=pipe, stdout=pipe, text=True, env=environment)
        self.folder = tempfile.TemporaryDirectory()
        self.versions = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the Python with gymnax ended; its message is above")
        return json.loads(line)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for the answer."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the other Python."""
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()

    def own(self, name: str, actions: int, steps: int, batch: int) -> Measurement:
        """One of gymnax's own environments; ``actions`` is 0 for its point, which moves in a plane."""
        return self._measurement({"name": name, "actions": actions, "steps": steps, "batch": batch})

    def port(self, name: str, family: TaskFamily, settings: dict[str, Any], batch: int) -> tuple[Measurement, float]:
        """A family written for gymnax, and the largest difference of its observations and rewards from the family's own
        when both are given the same actions and uniforms (relative to 1 + size)."""
        tasks = sample_tasks(family, batch, torch.Generator().manual_seed(0))
        fields = {field: value.numpy() for field, value in zip(tasks._fields, tasks) if field != "id"}
        parameters = Path(self.folder.name) / f"{name}.npz"
        if not parameters.exists():
            np.savez(parameters, **fields)
        difference = self._difference(name, family, settings, tasks, fields)
        order = {"name": name, "settings": settings, "parameters": str(parameters), "actions": family.actions}
        return self._measurement(order | {"steps": family.horizon, "batch": batch}), difference

    def _measurement(self, order: dict[str, Any]) -> Measurement:
        def measure(least: float) -> float:
            answer = self.ask(**order, least=least)
            return answer["seconds"] / answer["steps"]

        return measure

    def _difference(self, name, family, settings, tasks, fields) -> float:
        uniform = np.random.default_rng(1).uniform(size=(family.horizon, len(tasks.id))).astype(np.float32)
        action = np.random.default_rng(2).integers(family.actions, size=uniform.shape)
        given, result = (str(Path(self.folder.name) / file) for file in ("given.npz", "result.npz"))
        np.savez(given, uniform=uniform, action=action, **fields)
        self.ask(replay=given, result=result, name=name, settings=settings)
        theirs, largest = np.load(result), 0.0
        state = family.reset(tasks, 1, torch.zeros(len(tasks.id), 1, family.noise_size))
        for time in range(family.horizon):
            luck = torch.as_tensor(uniform[time])[:, None, None]
            state, reward, _ = family.step(tasks, state, torch.as_tensor(action[time])[:, None], luck)
            ours = {"reward": reward[:, 0], "observation": family.observe(tasks, state)[:, 0]}
            for field, value in ours.items():
                value = value.numpy()
                if theirs[field][time].shape != value.shape:
                    return math.inf
                largest = max(largest, float((np.abs(theirs[field][time] - value) / (1 + np.abs(value))).max()))
        return largest


def luck(family: TaskFamily, tasks: Any, replica: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The uniforms of one step, as ``rollout`` draws them."""
    return noise.uniform(0, tasks.id, replica, 0, time, noise.FAMILY, family.noise_size)
