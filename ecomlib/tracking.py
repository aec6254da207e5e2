"""Where the numbers of an iteration go besides ``metrics.jsonl``: TensorBoard, and Weights & Biases if asked for."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Tracker(Protocol):
    """Something that keeps curves."""

    def log(self, seed: int, iteration: int, numbers: dict[str, float]) -> None:
        """Numbers of one iteration of one seed."""

    def flush(self) -> None:
        """Everything logged so far is on disk. Raises ``OSError``; what was logged is then kept for the next call."""

    def close(self) -> None:
        """Flush, if that is possible, and let go of files."""


class TensorBoard:
    """Event files under ``path``/seed-S. Rows after ``start``, which a killed run may have left, are hidden.

    TensorBoard's own writer hands events to a thread, whose errors nobody can handle: here a full disk costs nothing
    but the wait for room.
    """

    def __init__(self, path: Path, seeds: Sequence[int], start: int):
        self.path, self.next = path, start + 1  # the iteration that the next file begins with
        self.files: dict[int, tuple[BinaryIO, RecordWriter]] = {}
        self.waiting: dict[int, list[bytes]] = {seed: [] for seed in seeds}
        self.iteration = start

    def log(self, seed: int, iteration: int, numbers: dict[str, float]) -> None:
        """As ``Tracker.log``."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        event = Event(wall_time=time.time(), step=iteration, summary=Summary(value=values))
        self.waiting[seed].append(event.SerializeToString())
        self.iteration = iteration

    def flush(self) -> None:
        """As ``Tracker.flush``."""
        try:
            for seed, events in self.waiting.items():
                if seed not in self.files:
                    self.files[seed] = self._begin(self.path / f"seed-{seed}")
                file, records = self.files[seed]
                for event in events:
                    records.write(event)
                file.flush()
        except OSError:
            self._abandon()  # the files may end in half a record: new ones hide what is in them since the last flush
            raise
        self.waiting = {seed: [] for seed in self.waiting}
        self.next = self.iteration + 1

    def close(self) -> None:
        """As ``Tracker.close``."""
        with suppress(OSError):
            self.flush()
        self._abandon()

    def _begin(self, folder: Path) -> tuple[BinaryIO, RecordWriter]:
        folder.mkdir(parents=True, exist_ok=True)
        # The name that TensorBoard looks for; it reads files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
        file = (folder / name).open("xb")
        records = RecordWriter(file)
        head = {"wall_time": time.time(), "step": self.next}
        records.write(Event(**head, file_version="brain.Event:2").SerializeToString())
        start = SessionLog(status=SessionLog.START)  # steps from here on that are in earlier files do not count
        records.write(Event(**head, session_log=start).SerializeToString())
        return file, records

    def _abandon(self) -> None:
        for file, _ in self.files.values():
            with suppress(OSError):
                file.close()
        self.files = {}


class WeightsAndBiases:
    """One run for each seed. Offline (files under ``path``, for ``wandb sync``) unless WANDB_MODE says otherwise.
    Needs ``pip install .[track]``."""

    def __init__(self, path: Path, name: str, config: dict[str, Any], seeds: Sequence[int]):
        try:
            import wandb
        except ImportError:
            raise ValueError("--track wandb needs the package wandb: pip install 'ecomlib[track]'") from None
        name = re.sub(r"[^\w.-]", "-", name)  # part of an address there
        mode = os.environ.get("WANDB_MODE", "offline")
        path.mkdir(parents=True, exist_ok=True)
        self.runs = {
            seed: wandb.init(
                project="ecomlib",
                name=f"{name} seed {seed}",
                id=f"{name}-{config['hash'][:8]}-{seed}",
                config=config | {"seed": seed},
                dir=str(path),
                mode=mode,
                resume="allow",
                reinit="create_new",
            )  # fmt: skip
            for seed in seeds
        }

    def log(self, seed: int, iteration: int, numbers: dict[str, float]) -> None:
        """As ``Tracker.log``."""
        self.runs[seed].log(numbers, step=iteration)

    def flush(self) -> None:
        """As ``Tracker.flush``; the package writes by itself."""

    def close(self) -> None:
        """As ``Tracker.close``."""
        for run in self.runs.values():
            run.finish()
