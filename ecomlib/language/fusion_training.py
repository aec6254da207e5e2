"""Training of a fusion model, and its predictions (chapter "More than text")."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Generator, Tensor
from tqdm import tqdm

from ..families.base import require
from .funnel import HEADS
from .fusion import Fusion, FusionConfig, Inputs


class Trained(NamedTuple):
    """A model, and how its training went."""

    model: Fusion
    """In evaluation mode, with the weights of the best pass."""
    train: list[float]
    """Mean loss of each pass over the training rows, nats."""
    validation: list[float]
    """Mean loss after it on the validation rows, nats."""

    @property
    def best(self) -> int:
        """The pass whose weights were kept, from 0."""
        return int(np.argmin(self.validation))


def train_fusion(
    config: FusionConfig,
    train: Inputs,
    event: ArrayLike,
    validation: Inputs,
    validation_event: ArrayLike,
    progress: bool = False,
) -> Trained:
    """Minimise the head's mean loss by AdamW; stop when the validation loss has not improved for ``patience`` passes,
    and keep the best weights.

    ``event`` are numbers in ``behaviour.EVENTS``, one for each row. Raises ValueError where they do not fit, or where a
    number is not finite, naming the row.
    """
    event, validation_event = (torch.as_tensor(np.asarray(e), dtype=torch.int64) for e in (event, validation_event))
    for name, rows, own in (("event", train, event), ("validation_event", validation, validation_event)):
        require(
            len(own) == len(rows.context) > 0, name, len(own), f"one for each of {len(rows.context)} rows, not none"
        )
        require(bool(((own >= 0) & (own <= 4)).all()), name, (int(own.min()), int(own.max())), "numbers 0..4 of EVENTS")
        broken = ~rows.numbers.isfinite().all(1)
        require(not broken.any(), "numbers", f"row {int(broken.int().argmax())}", "finite numbers in every row")
    generator = Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):  # torch.nn draws first weights and dropout from the global generator
        torch.manual_seed(config.seed)
        model = Fusion(config, train)
        optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        losses: list[float] = []
        on_validation: list[float] = []
        best = deepcopy(model.state_dict())
        with tqdm(total=config.epochs, desc="training", unit="pass", disable=not progress) as bar:
            while len(losses) < config.epochs:
                model.train()
                losses.append(_one_pass(model, optimiser, train, event, generator))
                on_validation.append(mean_loss(model, validation, validation_event))
                bar.update()
                if on_validation[-1] == min(on_validation):
                    best = deepcopy(model.state_dict())
                if len(losses) - 1 - int(np.argmin(on_validation)) >= config.patience:
                    break
    model.load_state_dict(best)
    return Trained(model.eval(), losses, on_validation)


def _one_pass(
    model: Fusion, optimiser: torch.optim.Optimizer, train: Inputs, event: Tensor, generator: Generator
) -> float:
    config, total = model.config, 0.0
    head, kept = HEADS[config.head], 1 - config.modality_dropout
    for index in torch.randperm(len(event), generator=generator).split(config.batch):
        present = None
        if config.modality_dropout > 0:
            present = torch.rand(len(index), len(config.modalities), generator=generator) < kept
        loss = head.loss(model(train.rows(index), present), event[index]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item() * len(index)
    return total / len(event)


def logits(model: Fusion, rows: Inputs, without: Sequence[str] = (), batch: int = 8192) -> Tensor:
    """(rows, size) numbers for the head in evaluation mode, with the modalities ``without`` missing everywhere."""
    names = model.config.modalities
    require(set(without) <= set(names), "without", tuple(without), f"modalities of the model: {names}")
    model.eval()
    kept = torch.tensor([name not in without for name in names], dtype=torch.bool)
    with torch.no_grad():
        parts = torch.arange(len(rows.context)).split(batch)
        return torch.cat([model(rows.rows(p), kept.expand(len(p), -1) if without else None) for p in parts])


def mean_loss(model: Fusion, rows: Inputs, event: Tensor) -> float:
    """Mean loss of the head over rows, nats."""
    return HEADS[model.config.head].loss(logits(model, rows), event).mean().item()


def event_probabilities(model: Fusion, rows: Inputs, without: Sequence[str] = ()) -> NDArray[np.float64]:
    """(rows, 5) predicted probabilities of the events."""
    events = HEADS[model.config.head].events
    require(events is not None, "head", model.config.head, "one that knows the events: 'funnel' or 'softmax'")
    return events(logits(model, rows, without).double()).exp().numpy()


def target_probabilities(model: Fusion, rows: Inputs, without: Sequence[str] = ()) -> NDArray[np.float64]:
    """(rows, targets) predicted probabilities that each target of the head is reached."""
    return HEADS[model.config.head].reached(logits(model, rows, without).double()).numpy()
