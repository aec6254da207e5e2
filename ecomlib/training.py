"""Meta-training that survives: progress, metrics, checkpoints, resuming bit for bit, Ctrl-C, full disks (chapter
"Running experiments")."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .configuration import TrainConfig
from .distributed import Processes
from .environment import environment
from .families.base import sample_tasks
from .files import write_json
from .learners import MetaTraining
from .learners.meta import iteration_generator
from .machine import Compiled, Machine, precision
from .runs import Run, RunError, check_state
from .tracking import TensorBoard, Tracker, WeightsAndBiases

SECONDS_BETWEEN_CURVES = 10
"""How often TensorBoard sees something new, besides at every checkpoint."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; the state is saved. The message says how to go on."""


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
        with precision(run.config.dtype), run.lock() if processes.first else nullcontext():
            # All is read and checked before anything is written: a run that is refused stays as it was.
            groups = [Training(run, seeds, machine, processes, progress) for seeds in run.config.groups]
            processes.wait()
            if processes.first:
                run.record_environment(environment(processes.device) | {"resumed": resume})
            try:
                for group in groups:
                    group.train()
                    if group.stopping and group is not groups[-1]:
                        raise Interrupted(f"stopped between seeds; saved. {_go_on(run)}")
            except KeyboardInterrupt as interrupt:
                if isinstance(interrupt, Interrupted):
                    raise
                raise Interrupted(f"stopped at once; saved is the last checkpoint. {_go_on(run)}") from None
            if processes.first:
                _write_result(run)
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
        self.stopping = self.due = False
        self.failures = 0  # to save, since the last success
        self.start = self._state()
        self.done = self.start.iteration if self.start else 0
        rows = self.run.metrics_until(self.seeds, self.done) if processes.first else []
        # Rows since the last iteration at which a checkpoint was due: what it is scored by.
        self.recent = [r for same in rows[self.done - self.done % self.config.checkpoint_every :] for r in same]

    def train(self) -> None:
        """Train to the end."""
        done = self.done
        if not self.processes.first:
            if done < self.config.iterations:
                self._follow()
            return
        for file in self.folder.missing():
            _say(f"note: {file} was deleted; going on from {f'iteration {done}' if done else 'the beginning'}")
        if done < self.config.iterations:
            self._check_disk()
        self.folder.tidy()
        self.run.rewind(self.seeds, done)
        if done == self.config.iterations:
            return
        self.last = self.flushed = time.perf_counter()
        self.trackers = self._trackers(done)
        name = f"{self.learner.name} seed{'s' if len(self.seeds) > 1 else ''} " + "-".join(
            map(str, sorted({self.seeds[0], self.seeds[-1]})))  # fmt: skip
        self.bar = tqdm(total=self.config.iterations, initial=done, desc=name, unit="it", disable=not self.progress)
        try:
            with self._signals():
                self._meta_train(self._after_iteration)
                if self.due:
                    raise OSError(f"training is done but THE RESULT IS NOT SAVED in {self.run.path} ({self.problem}): "
                                  f"make room and compute what is missing again. {_go_on(self.run)}")  # fmt: skip
        except FloatingPointError as error:
            last = self.folder.entries()
            where = f"the last good checkpoint is {self.folder.path / last[-1].file}" if last else "no checkpoint yet"
            raise FloatingPointError(f"{error}; {where}") from None
        finally:
            self.bar.close()
            for tracker in self.trackers:
                tracker.close()

    def _follow(self) -> None:
        """Train with the first process until it ends: Ctrl-C reaches all of them, and the first one decides when to
        stop. It then leaves, which is an error for those that wait for it."""
        with self._signals():
            try:
                self._meta_train(None)
            except RuntimeError:
                if not self.stopping:
                    raise
                raise Interrupted("stopped with the first process") from None

    def _meta_train(self, callback: Any) -> None:
        seed = self.seeds[0] if len(self.seeds) == 1 else self.seeds
        iterations = self.config.iterations
        try:
            self.learner.meta_train(self.family, seed, iterations, self.start, self.device, False, callback)
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise FloatingPointError(f"a step size is too large for {self.config.dtype} ({error})") from None

    def _state(self) -> MetaTraining | None:
        """Where the run stands, on the device."""
        state = self.folder.load()
        if state is None:
            return None
        check_state(self.learner, state, self.seeds, self.run)
        move = lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x
        return state._replace(meta=[move(p) for p in state.meta], memory=_map(move, state.memory))

    # ------------------------------------------------------------------------------------ after an iteration
    def _after_iteration(self, state: MetaTraining) -> None:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        rows = [{"seed": s, "iteration": state.iteration, **r, "seconds": round(seconds, 4)}
                for s, r in zip(self.seeds, self._numbers(state))]  # fmt: skip
        self.unsaved += rows
        self.recent += rows
        for row in rows:
            numbers = {k: v for k, v in row.items() if k not in ("seed", "iteration") and v is not None}
            for tracker in self.trackers:
                tracker.log(row["seed"], state.iteration, numbers)
        final = sum(row[self.run.returns[-1]] for row in rows) / len(rows)
        score, steps = self.run.score(rows), sum(row["steps"] for row in rows)
        shown = {"return": f"{final:.3g}", "score": "-" if score is None else f"{score:.2f}"}
        shown["steps/s"] = f"{steps / seconds:,.0f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        last = state.iteration == self.config.iterations
        scheduled = last or state.iteration % self.config.checkpoint_every == 0
        self.due |= scheduled or self.stopping
        if self.due:
            self._save(state, scheduled)
        else:
            with suppress(OSError):  # they stay unsaved; the next checkpoint reports it
                self._write_rows(synchronise=False)
                if now - self.flushed > SECONDS_BETWEEN_CURVES:
                    self._flush_trackers()
        if scheduled:
            self.recent = []
        if self.stopping and not last:
            saved = f"that could NOT be saved in {self.run.path} ({self.problem})" if self.due else "saved"
            raise Interrupted(f"stopped after iteration {state.iteration}; {saved}. {_go_on(self.run)}")

    def _numbers(self, state: MetaTraining) -> list[dict[str, Any]]:
        """What this iteration logged, for each seed, with the score of its tasks and the steps that were played."""
        log, several = state.history[-1], len(self.seeds) > 1
        result = []
        for i, seed in enumerate(self.seeds):
            row = {name: value[i] if several else value for name, value in log.items()}
            tasks = sample_tasks(
                self.config.family,
                self.learner.tasks_of(state.iteration - 1),
                iteration_generator(seed, state.iteration - 1),
                self.device,
            )
            row["blind return"] = self.config.family.blind_return(tasks).mean().item()
            row["oracle return"] = self.config.family.oracle_return(tasks).mean().item()
            result.append(row | {"score": self.run.score([row]), "steps": self.config.steps_of_iteration})
        return result

    def _save(self, state: MetaTraining, scheduled: bool) -> None:
        """Metrics first: a checkpoint never stands without the rows that led to it. What cannot be saved now is tried
        again after the next iteration; warnings become rarer as they repeat."""
        try:
            self._write_rows(synchronise=True)
            with suppress(OSError):  # curves wait; a disk that is full fails the checkpoint as well
                self._flush_trackers()
            score = self.run.score(self.recent) if scheduled else None
            self.folder.save(state, score, out_of_turn=not scheduled)
        except OSError as error:
            self.failures, self.problem = self.failures + 1, error.strerror or str(error)
            if self.failures & (self.failures - 1) == 0:  # 1, 2, 4, 8, ...
                _say(f"warning: iteration {state.iteration} could not be saved ({self.problem}); training goes on and "
                     "saving is tried again after every iteration: make room, or press Ctrl-C")  # fmt: skip
            return
        if self.failures:
            _say(f"iteration {state.iteration} is saved, after {self.failures} attempts that failed")
        self.due, self.failures = False, 0

    def _write_rows(self, synchronise: bool) -> None:
        """Append rows to ``metrics.jsonl``: all of them or, with ``OSError``, none."""
        rows = memoryview("".join(json.dumps(row) + "\n" for row in self.unsaved).encode())
        # Unbuffered: a buffer would try to write its rest once more when it is closed.
        with self.run.metrics_path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while rows:
                    rows = rows[file.write(rows) :]
                if synchronise:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        self.unsaved = []

    def _flush_trackers(self) -> None:
        self.flushed = time.perf_counter()
        for tracker in self.trackers:
            tracker.flush()

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
            trackers.append(
                WeightsAndBiases(self.run.path / "wandb", self.run.path.resolve().name, settings, self.seeds)
            )
        return trackers

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM stops after the iteration at hand, the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self.stopping = True
            # A shell's background job starts with Ctrl-C ignored; it took the first one, so it takes the second.
            ignored = before[number] is signal.SIG_IGN
            signal.signal(number, signal.default_int_handler if ignored else before[number])

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _map(function, x) for k, x in tree.items()}
    return [_map(function, x) for x in tree] if isinstance(tree, list) else function(tree)


def _go_on(run: Run) -> str:
    """What to type."""
    path = shlex.quote(str(run.path))
    return f"Go on with: python -m ecomlib train {run.config.family_name} --run {path} --resume"


def _say(message: str) -> None:
    """A line for the user, beside the progress bar."""
    tqdm.write(message, file=sys.stderr)


def _write_result(run: Run) -> None:
    """Score and returns of the last tenth of the iterations of every seed: fresh tasks in each, no peaks."""
    config, rows = run.config, run.metrics()
    last = max(1, config.iterations // 10)
    by_seed = {}
    for seed in (s for group in config.groups for s in group):
        tail = [r for r in rows if r["seed"] == seed and r["iteration"] > config.iterations - last]
        by_seed[str(seed)] = {name: sum(r[name] for r in tail) / len(tail) for name in run.returns}
        by_seed[str(seed)]["score"] = run.score(tail)
    write_json(run.path / "result.json", {
        "config": run.hash,
        "algorithm": run.config.learner().name,
        "iterations": config.iterations,
        "mean of the last iterations": last,
        "training tasks": by_seed,
    })  # fmt: skip
