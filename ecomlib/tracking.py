"""Where the numbers of an iteration go besides ``metrics.jsonl``: TensorBoard, and Weights & Biases if asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

TRACKERS = ("tensorboard", "wandb")


class Tracker(Protocol):
    """Something that keeps curves."""

    def log(self, seed: int, iteration: int, numbers: dict[str, float]) -> None:
        """Numbers of one iteration of one seed."""

    def close(self) -> None:
        """Everything logged so far is on disk."""


class TensorBoard:
    """Event files under ``path``/seed-S. Rows after ``start``, which a killed run may have left, are hidden."""

    def __init__(self, path: Path, seeds: Sequence[int], start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writers = {seed: SummaryWriter(str(path / f"seed-{seed}"), purge_step=start + 1) for seed in seeds}

    def log(self, seed: int, iteration: int, numbers: dict[str, float]) -> None:
        """As ``Tracker.log``."""
        for name, value in numbers.items():
            self.writers[seed].add_scalar(name, value, iteration)

    def close(self) -> None:
        """As ``Tracker.close``."""
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """One run for each seed. Offline (files under ``path``, for ``wandb sync``) unless WANDB_MODE says otherwise.
    Needs ``pip install .[track]``."""

    def __init__(self, path: Path, name: str, config: dict[str, Any], seeds: Sequence[int]):
        try:
            import wandb
        except ImportError:
            raise ValueError("--track wandb needs the package wandb: pip install 'ecomlib[track]'") from None
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

    def close(self) -> None:
        """As ``Tracker.close``."""
        for run in self.runs.values():
            run.finish()
