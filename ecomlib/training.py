"""Meta-training that survives: progress, metrics, checkpoints, resuming bit for bit, Ctrl-C, full disks (chapter
"Running experiments")."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from .configuration import TrainConfig
from .distributed import Processes
from .environment import environment
from .evaluation.statistics import normalised_score
from .families.base import check, sample_tasks, whole
from .files import write_json
from .learners import MetaTraining
from .learners.meta import iteration_generator
from .runs import Run, RunError, check_shapes
from .tracking import TensorBoard, Tracker, WeightsAndBiases


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
        check(self, "track", lambda x: isinstance(x, tuple) and set(x) <= {"wandb"}, "wandb, or nothing")
        check(self, "device", lambda x: x in ("auto", "cpu", "cuda"), "one of auto, cpu, cuda")
        missing = self.device == "cuda" and not torch.cuda.is_available()
        check(self, "device", lambda x: not missing, "auto or cpu: this machine has no GPU that torch can use")


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; the state is saved. The message says how to go on."""


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train(
    config: TrainConfig | None,
    path: str | Path,
    resume: bool = False,
    machine: Machine | None = None,
    progress: bool = True,
) -> Run:
    """Train every seed of ``config`` in the folder ``path``; with ``resume`` go on with the run that is there.

    A resumed run equals an uninterrupted one bit for bit on the same kind of device. ``config`` may be None with
    ``resume``. Under ``torchrun`` the tasks of an iteration are shared among its processes.

    Raises ``RunError`` (folder), ``CheckpointError`` (damaged file), ``OSError`` (disk), ``Interrupted`` (Ctrl-C or
    SIGTERM, after saving), ``FloatingPointError`` (divergence, naming the last good checkpoint).
    """
    machine = machine or Machine()
    with Processes.start(machine.device) as processes:
        torch.set_num_threads(machine.threads)
        resume = resume or (processes.restarted and (Path(path) / "config.toml").exists())
        if resume:
            run = Run.open(path)
            if config is not None and config != run.config:
                raise RunError(f"{path} was started with another configuration")
        elif processes.first:
            run = Run.create(path, config)
        processes.wait()
        if not processes.first and not resume:
            run = Run.open(path)
        with precision(run.config.dtype):
            if not processes.first:
                for group in run.config.groups:
                    Training(run, group, machine, processes, progress=False).train()
                return run
            with run.lock():
                run.record_environment(environment(processes.device) | {"resumed": resume})
                seconds = sum(Training(run, group, machine, processes, progress).train() for group in run.config.groups)
                _write_result(run, seconds)
    return run


class Training:
    """One batch of seeds: meta-training with everything that happens around an iteration."""

    def __init__(self, run: Run, seeds: tuple[int, ...], machine: Machine, processes: Processes, progress: bool):
        self.run, self.seeds, self.machine, self.processes, self.progress = run, seeds, machine, processes, progress
        self.config, self.device = run.config, processes.device
        self.folder = run.checkpoints(seeds)
        self.learner = self.config.learner()
        self.learner.shards = processes.shards
        self.family: Any = Compiled(self.config.family) if machine.compile else self.config.family
        self.unsaved: list[dict[str, Any]] = []  # rows of metrics that are not on disk yet
        self.scores: list[float] = []  # since the last checkpoint
        self.stopping = self.due = False

    def train(self) -> float:
        """Train to the end; seconds of this process."""
        start = self._state()
        done = start.iteration if start else 0
        self.processes.wait()  # all have read what the first one is about to change
        begin = self.last = time.perf_counter()
        if done == self.config.iterations:
            return 0.0
        if not self.processes.first:
            self._meta_train(start, None)
            return 0.0
        self._check_disk()
        self.run.rewind(self.seeds, done)
        self.trackers = self._trackers(done)
        name = f"{self.learner.name} seed{'s' if len(self.seeds) > 1 else ''} " + "-".join(
            map(str, sorted({self.seeds[0], self.seeds[-1]})))  # fmt: skip
        self.bar = tqdm(total=self.config.iterations, initial=done, desc=name, unit="it", disable=not self.progress)
        try:
            with self._signals():
                self._meta_train(start, self._after_iteration)
                if self.due:
                    raise OSError(f"the result could not be saved in {self.run.path}: make room and resume")
        except FloatingPointError as error:
            last = self.folder.entries()
            where = f"the last good checkpoint is {self.folder.path / last[-1].file}" if last else "no checkpoint yet"
            raise FloatingPointError(f"{error}; {where}") from None
        finally:
            self.bar.close()
            for tracker in self.trackers:
                tracker.close()
        return time.perf_counter() - begin

    def _meta_train(self, start: MetaTraining | None, callback: Any) -> None:
        seed = self.seeds[0] if len(self.seeds) == 1 else self.seeds
        self.learner.meta_train(
            self.family, seed, self.config.iterations, start, self.device, progress=False, callback=callback
        )

    def _state(self) -> MetaTraining | None:
        """Where the run stands, on the device."""
        state = self.folder.load()
        if state is None:
            return None
        one = state.meta if len(self.seeds) == 1 else [p[0] for p in state.meta]
        check_shapes(self.learner, one, self.run)
        move = lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x
        return state._replace(meta=[move(p) for p in state.meta], memory=_map(move, state.memory))

    # ------------------------------------------------------------------------------------ after an iteration
    def _after_iteration(self, state: MetaTraining) -> None:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        rows = [{"seed": s, "iteration": state.iteration, **r, "seconds": round(seconds, 4)}
                for s, r in zip(self.seeds, self._numbers(state))]  # fmt: skip
        self.unsaved += rows
        for row in rows:
            numbers = {k: v for k, v in row.items() if k not in ("seed", "iteration")}
            for tracker in self.trackers:
                tracker.log(row["seed"], state.iteration, numbers)
        final = f"return after {self.config.inner.steps} steps"
        mean = lambda name: sum(row[name] for row in rows) / len(rows)
        self.scores.append(mean("score"))
        steps = sum(row["steps"] for row in rows)
        shown = {"return": f"{mean(final):.3g}", "score": f"{mean('score'):.2f}", "steps/s": f"{steps / seconds:,.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        last = state.iteration == self.config.iterations
        self.due |= last or self.stopping or state.iteration % self.config.checkpoint_every == 0
        if self.due:
            self._save(state)
        else:
            with suppress(OSError):  # they stay unsaved; the next checkpoint reports it
                self._write_rows(synchronise=False)
        if self.stopping and not last:
            raise Interrupted(
                f"stopped after iteration {state.iteration}; "
                + (f"that could NOT be saved in {self.run.path}" if self.due else "saved")
                + f". Go on with: python -m ecomlib train {self.config.family_name} --run {self.run.path} --resume"
            )

    def _numbers(self, state: MetaTraining) -> list[dict[str, Any]]:
        """What this iteration logged, for each seed, with the score of its tasks and the steps that were played."""
        log, several = state.history[-1], len(self.seeds) > 1
        result = []
        for i, seed in enumerate(self.seeds):
            row = {name: value[i] if several else value for name, value in log.items()}
            tasks = sample_tasks(
                self.config.family, self.config.data.tasks, iteration_generator(seed, state.iteration - 1), self.device
            )
            blind, oracle = (
                f(tasks).cpu() for f in (self.config.family.blind_return, self.config.family.oracle_return)
            )
            mean = torch.full_like(blind, row[f"return after {self.config.inner.steps} steps"])
            data = self.config.data
            episode_steps = data.transitions or data.episodes * self.config.family.horizon
            steps = data.tasks * episode_steps * (self.config.inner.steps + 1)
            result.append(row | {"score": float(normalised_score(mean, blind, oracle)), "steps": steps})
        return result

    def _save(self, state: MetaTraining) -> None:
        """Metrics first: a checkpoint never stands without the rows that led to it. What cannot be saved now is tried
        again after the next iteration."""
        try:
            self._write_rows(synchronise=True)
            self.folder.save(state, sum(self.scores) / len(self.scores))
            self.scores, self.due = [], False
        except OSError as error:
            tqdm.write(
                f"warning: iteration {state.iteration} could not be saved ({error.strerror or error}); training goes "
                "on and saving is tried again after every iteration: make room, or press Ctrl-C",
                file=sys.stderr,
            )

    def _write_rows(self, synchronise: bool) -> None:
        """Append rows to ``metrics.jsonl``: all of them or, with ``OSError``, none."""
        with self.run.metrics_path.open("a", encoding="utf-8") as file:
            size = file.tell()
            try:
                file.write("".join(json.dumps(row) + "\n" for row in self.unsaved))
                file.flush()
                if synchronise:
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self.run.metrics_path, size)
                raise
        self.unsaved = []

    # ------------------------------------------------------------------------------------ around the loop
    def _check_disk(self) -> None:
        """Refuse to start where the checkpoints will not fit."""
        one = sum(p.numel() * p.element_size() for p in self.learner.initial(torch.Generator().manual_seed(0)))
        size = 3 * one * len(self.seeds)  # Adam remembers two numbers for each parameter
        needed, free = 2 * size * (self.config.keep + 2) + 2_000_000, shutil.disk_usage(self.run.path).free
        if free < needed:
            raise OSError(f"{self.run.path}: {free / 1e6:.1f} MB are free and a run may need {needed / 1e6:.1f} MB: "
                          "make room, name another folder (--run), or keep fewer checkpoints (--keep)")  # fmt: skip

    def _trackers(self, done: int) -> list[Tracker]:
        trackers: list[Tracker] = [TensorBoard(self.run.path / "tensorboard", self.seeds, done)]
        if "wandb" in self.machine.track:
            settings = {"hash": self.run.hash}
            trackers.append(WeightsAndBiases(self.run.path / "wandb", self.run.path.name, settings, self.seeds))
        return trackers

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM stops after the iteration at hand, the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self.stopping = True
            signal.signal(number, before[number])

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Compiled:
    """A family whose ``step`` is compiled as one graph."""

    def __init__(self, family: Any):
        self.family, self.step = family, torch.compile(family.step, fullgraph=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _map(function, x) for k, x in tree.items()}
    return [_map(function, x) for x in tree] if isinstance(tree, list) else function(tree)


def _write_result(run: Run, seconds: float) -> None:
    """Score and return of the last tenth of the iterations of every seed: means of fresh tasks, no peaks."""
    config, rows = run.config, run.metrics()
    names = [f"return after {k} steps" for k in range(config.inner.steps + 1)] + ["score"]
    last = max(1, config.iterations // 10)
    by_seed = {}
    for seed in (s for group in config.groups for s in group):
        tail = [r for r in rows if r["seed"] == seed and r["iteration"] > config.iterations - last]
        by_seed[str(seed)] = {name: sum(r[name] for r in tail) / len(tail) for name in names}
    write_json(run.path / "result.json", {
        "config": run.hash,
        "algorithm": run.config.learner().name,
        "iterations": config.iterations,
        "mean of the last iterations": last,
        "training tasks": by_seed,
    })  # fmt: skip
