"""The folder of a training run: what is in it, who may write to it, and how to read a trained learner back.

======================  ==================================================================================
``config.toml``         everything that the numbers depend on (``configuration.TrainConfig``)
``environment.json``    versions, hardware, commit, command: one entry for every start of the run
``metrics.jsonl``       a row for each iteration and seed; "seconds" is the only number that varies
``tensorboard/``        the same as events: ``tensorboard --logdir RUN``
``checkpoints/SEEDS/``  safetensors and an index (``checkpoints.py``), for each batch of seeds
``result.json``         written when all seeds are done
``evaluation-*.*``      written by ``python -m ecomlib evaluate``
======================  ==================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from .checkpoints import CheckpointError, CheckpointFolder
from .config_files import config_hash, read_config, write_config
from .configuration import TrainConfig
from .families.base import TaskFamily
from .files import locked, remove_unfinished, write_atomically, write_json
from .learners import MAML, MetaTraining
from .learners.rl2 import RL2


class RunError(ValueError):
    """A folder that cannot be used as asked. The message says why and what to do."""


class Run:
    """A run's folder and configuration."""

    def __init__(self, path: Path, config: TrainConfig):
        self.path, self.config, self.hash = path, config, config_hash(config)

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> Run:
        """Make the folder. Raises ``RunError`` if there is a run already or somebody is about to make one, ``OSError``
        if it cannot be written."""
        path = Path(path)
        cls._check_new(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, config)
        with run.lock():
            cls._check_new(path)  # nobody was faster
            remove_unfinished(path)
            write_config(config, path / "config.toml")
        return run

    @staticmethod
    def _check_new(path: Path) -> None:
        if (path / "config.toml").exists():
            raise RunError(f"{path} holds a run already: go on with it (--resume), or name another folder (--run)")
        if path.is_dir():
            foreign = [p.name for p in path.iterdir() if p.name != ".lock" and p.suffix != ".unfinished"]
            if foreign:
                raise RunError(f"{path} is no run and not empty ({foreign[0]}): name another folder (--run)")
        elif path.exists():
            raise RunError(f"{path} is a file: name a folder (--run)")

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. Raises ``RunError`` if there is none, ``ValueError`` if its configuration is damaged."""
        path = Path(path)
        if not (path / "config.toml").exists():
            raise RunError(f"{path} holds no run: there is no config.toml in it")
        return cls(path, read_config(path / "config.toml"))

    def lock(self) -> AbstractContextManager[None]:
        """Nobody else trains here; otherwise ``RunError``."""
        return locked(self.path, RunError)

    def checkpoints(self, seeds: tuple[int, ...]) -> CheckpointFolder:
        """Checkpoints of one batch of seeds."""
        name = f"seed-{seeds[0]}" if len(seeds) == 1 else f"seeds-{seeds[0]}-{seeds[-1]}"
        return CheckpointFolder(self.path / "checkpoints" / name, self.hash, seeds, self.config.keep)

    # ------------------------------------------------------------------------------------------ metrics
    @property
    def returns(self) -> list[str]:
        """Names of the returns after 0, ..., K inner steps in a row of metrics."""
        return [f"return after {k} steps" for k in range(self.config.inner.steps + 1)]

    def score(self, rows: Sequence[dict[str, Any]]) -> float | None:
        """Normalised score of the tasks of these rows after adaptation, a ratio of means; None where the oracle gains
        nothing on them (few tasks: one price is best for all)."""
        mean = lambda name: sum(row[name] for row in rows) / len(rows)
        blind, gap = mean("blind return"), mean("oracle return") - mean("blind return")
        return (mean(self.returns[-1]) - blind) / gap if gap > 0 else None

    @property
    def metrics_path(self) -> Path:
        """``metrics.jsonl``."""
        return self.path / "metrics.jsonl"

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``, in the order written. A last line that a crash cut off is left out. Raises
        ``RunError`` naming the line where there is something else."""
        if not self.metrics_path.exists():
            return []
        rows, lines = [], self.metrics_path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line else None
                if line and not (isinstance(row, dict) and type(row.get("seed")) is type(row.get("iteration")) is int):
                    raise ValueError
            except (ValueError, RecursionError):
                if number == len(lines):  # no line end: never finished
                    break
                raise RunError(f"{self.metrics_path}, line {number}: not a row of metrics. Delete the line, or restore "
                               "the file from a copy") from None  # fmt: skip
            if line:
                rows.append(row)
        return rows

    def metrics_until(self, seeds: tuple[int, ...], iteration: int) -> list[list[dict[str, Any]]]:
        """For each iteration up to this one the rows of these seeds. Raises ``RunError`` where one is missing or is
        not of this run."""
        numbers = [*self.returns, "blind return", "oracle return"]
        rows = {s: [] for s in seeds}
        for row in self.metrics():
            if row["seed"] in rows and row["iteration"] <= iteration:
                rows[row["seed"]].append(row)
        for seed, own in rows.items():
            complete = all(type(r.get(name)) in (int, float) for r in own for name in numbers)
            if not complete or [r["iteration"] for r in own] != list(range(1, iteration + 1)):
                raise RunError(
                    f"{self.metrics_path} does not hold seed {seed} at all iterations from 1 to {iteration}, which led "
                    "to the last checkpoint: restore it from a copy, or delete the folder checkpoints to begin anew"
                )
        return [list(same) for same in zip(*rows.values())]

    def rewind(self, seeds: tuple[int, ...], iteration: int) -> None:
        """Forget rows of these seeds after ``iteration``, which will be computed again."""
        kept = [r for r in self.metrics() if r["seed"] not in seeds or r["iteration"] <= iteration]
        remove_unfinished(self.path)
        write_atomically(self.metrics_path, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def record_environment(self, environment: dict[str, Any]) -> None:
        """Add a start to ``environment.json``. Raises ``RunError`` if that is damaged."""
        path = self.path / "environment.json"
        seeds = [seed for group in self.config.groups for seed in group]
        known = {"config": self.hash, "seeds": seeds, "starts": []}
        try:
            known = json.loads(path.read_bytes()) if path.exists() else known
            known["starts"].append(environment)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise RunError(f"{path} is damaged: restore it from a copy, or delete it") from None
        write_json(path, known)


class LoadedRun(NamedTuple):
    """A trained learner, read back."""

    config: TrainConfig
    family: TaskFamily
    learner: MAML | RL2
    meta: list[Tensor]  # of one seed
    seed: int
    iteration: int


def load_run(
    path: str | Path, seed: int | None = None, checkpoint: Literal["last", "best"] = "last", device: str = "cpu"
) -> LoadedRun:
    """The learner and meta-parameters of one ``seed`` (by default the first) of a run, finished or not.

    Tensors have the run's precision; set torch's default dtype to it (``config.dtype``) before using them. Raises
    ``RunError`` for a folder without a run, a seed it was not trained with or a run without a checkpoint, and
    ``CheckpointError`` for a damaged file.
    """
    run = Run.open(path)
    seeds = [s for group in run.config.groups for s in group]
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise RunError(f"{path}: seed = {seed}; allowed: {', '.join(map(str, seeds))}")
    group = next(group for group in run.config.groups if seed in group)
    state = run.checkpoints(group).load(checkpoint)
    if state is None:
        raise RunError(f"{path} has no checkpoint of seed {seed} yet")
    learner = run.config.learner()
    check_state(learner, state, group, run)
    meta = state.meta if len(group) == 1 else [p[group.index(seed)] for p in state.meta]
    return LoadedRun(run.config, run.config.family, learner, [p.to(device) for p in meta], seed, state.iteration)


def check_state(learner: MAML | RL2, state: MetaTraining, seeds: tuple[int, ...], run: Run) -> None:
    """Raise ``CheckpointError`` unless a checkpoint of these seeds fits the learner."""
    seed_axis = () if len(seeds) == 1 else (len(seeds),)
    initial, dtype = learner.initial(Generator().manual_seed(0)), getattr(torch, run.config.dtype)
    expected = [(*seed_axis, *p.shape) for p in initial]
    found = [tuple(p.shape) for p in state.meta]
    right = found == expected and all(p.dtype == dtype for p in state.meta)
    if not right:
        dtypes = ", ".join(sorted({str(p.dtype) for p in state.meta}))
        raise CheckpointError(f"a checkpoint of {run.path} holds parameters {found}, {dtypes}; its config.toml says "
                              f"{expected}, {dtype}")  # fmt: skip
    memory = state.memory
    if memory is not None:
        shapes = {"step": [seed_axis] * len(expected), "exp_avg": expected, "exp_avg_sq": expected}
        tensors = lambda x: isinstance(x, list) and all(isinstance(t, Tensor) for t in x)
        right = isinstance(memory, dict) and set(memory) == set(shapes) and all(map(tensors, memory.values()))
        if not right or any([tuple(t.shape) for t in memory[name]] != shapes[name] for name in shapes):
            raise CheckpointError(f"a checkpoint of {run.path} holds a memory that is not Adam's of its parameters")
