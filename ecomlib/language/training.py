"""Training an event classifier: AdamW with warm-up, early stopping, augmented texts, class weights, and a checkpoint to
go on from (chapter "Behaviour prediction with a pretrained encoder")."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Generator, Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from tqdm import tqdm

from ..calibration.product_texts import WORDS
from ..checkpoints import CheckpointError
from ..families.base import check, number, require, whole
from ..files import remove_unfinished, write_atomically
from .behaviour import EVENTS
from .encoder import Encoder
from .models import EventClassifier, evaluated, on_device
from .sessions import Batch, SessionDataset

FILE = "training.safetensors"
"""The checkpoint in the folder that ``fit`` is given."""
FORMAT, VERSION = "ecomlib event classifier", 1


@dataclass(frozen=True)
class TrainingConfig:
    """How ``fit`` trains."""

    epochs: int = 4
    """Most passes over the training slates."""
    batch: int = 32
    """Slates of a step."""
    lr: float = 5e-5
    """Largest step size of the encoder's weights and of LoRA's."""
    head_lr: float = 1e-3
    """Largest step size of the head."""
    weight_decay: float = 0.01
    """Of AdamW (Loshchilov and Hutter 2019), on matrices alone."""
    warm_up: float = 0.1
    """Share of all steps in which the step size grows linearly; then it falls linearly to 0."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    patience: int = 2
    """Training stops after as many epochs without a better log-loss on the validation slates; the best weights are
    kept."""
    word_dropout: float = 0.0
    """Share of the tokens of product texts that are hidden from a training step: augmentation."""
    balanced: bool = False
    """Weight each event by 1 / its frequency. Predictions take the weights out again."""
    autocast: bool = False
    """Compute in bfloat16 where that is fast."""
    seed: int = 0
    """Of the order of slates, of dropout and of hidden words."""

    def __post_init__(self):
        for name, most in (("epochs", 10_000), ("batch", 65_536), ("patience", 10_000)):
            check(self, name, lambda x, most=most: whole(x, 1, most), f"a whole number from 1 to {most}")
        for name in ("lr", "head_lr", "clip"):
            check(self, name, lambda x: number(x) and x > 0, "a number > 0")
        check(self, "weight_decay", lambda x: number(x) and x >= 0, "a number >= 0")
        for name in ("warm_up", "word_dropout"):
            check(self, name, lambda x: number(x) and 0 <= x < 1, "a number >= 0 and < 1")
        check(self, "seed", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2147483648")


class Fit(NamedTuple):
    """How a training went; the model has the best weights."""

    train: list[float]
    """Mean event log-loss of each epoch's steps, in nats; weighted where the classes are."""
    validation: list[float]
    """Log-loss of an impression after each epoch, class weights taken out."""
    seconds: list[float]
    """Seconds a training step took, on average over each epoch."""

    @property
    def best(self) -> int:
        """The epoch whose weights were kept, from 0."""
        return int(np.argmin(self.validation))


def fit(
    model: EventClassifier,
    train: SessionDataset | Sequence[SessionDataset],
    validation: SessionDataset,
    config: TrainingConfig = TrainingConfig(),
    encoder: Encoder | None = None,
    folder: Path | str | None = None,
    progress: bool = False,
) -> Fit:
    """Train ``model`` in place, on the device where it is.

    Several training sets are taken in turn, one an epoch: the same slates with reworded texts. ``encoder`` is needed
    for word dropout, whose mark is the tokenizer's. With ``folder`` every epoch is kept there, and a training that was
    stopped goes on from the last, with the result of one that was not. On one thread of a CPU it is a function of the
    two configurations and the data.

    Raises:
        CheckpointError: the folder holds another training, or half a file.
        FloatingPointError: a loss is not finite.
    """
    sets = [train] if isinstance(train, SessionDataset) else list(train)
    require(len(sets) > 0, "train", train, "at least one data set")
    require(config.word_dropout == 0 or encoder is not None, "encoder", None, "an Encoder, for word dropout")
    rates = event_rates(sets[0])
    weight = 1 / (len(EVENTS) * rates) if config.balanced else np.ones(len(EVENTS))
    model.shift.copy_(torch.as_tensor(np.log(weight)))
    at_place = place_event_rates(sets[0], len(model.place)) * weight
    model.start_from(at_place / at_place.sum(1, keepdims=True))
    hide = _hider(encoder, sets[0], config) if config.word_dropout > 0 else lambda batch, generator: batch
    optimiser = optimiser_for(model, config)
    run = _Run(model, optimiser, _key(model, config, sets, validation), None if folder is None else Path(folder))
    steps = [math.ceil(len(sets[e % len(sets)]) / config.batch) for e in range(config.epochs)]
    history = run.resume()
    cuda = [model.device] if model.device.type == "cuda" else []
    weight = torch.as_tensor(weight, dtype=torch.float32, device=model.device)
    with tqdm(
        total=sum(steps), initial=sum(steps[: len(history.validation)]), unit="step", disable=not progress
    ) as bar:
        for epoch in range(len(history.validation), config.epochs):
            if history.validation and epoch - 1 - history.best >= config.patience:
                break
            luck = Generator().manual_seed(1_000_003 * config.seed + epoch)
            with torch.random.fork_rng(devices=cuda):
                torch.manual_seed(1_000_003 * config.seed + epoch)  # dropout's: an epoch is a function of its number
                model.train()
                total, began, done = torch.zeros((), device=model.device), time.perf_counter(), sum(steps[:epoch])
                for number, part in enumerate(sets[epoch % len(sets)].batches(config.batch, luck)):
                    _set_lr(optimiser, config, (done + number) / sum(steps))
                    total += training_step(model, optimiser, hide(part, luck), weight, config)
                    bar.update()
                mean = (total / steps[epoch]).item()
                seconds = (time.perf_counter() - began) / steps[epoch]
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss of epoch {epoch + 1} is {mean}: lower TrainingConfig.lr = {config.lr}"
                )
            history.train.append(mean)
            history.seconds.append(seconds)
            history.validation.append(mean_log_loss(model, validation, config.autocast))
            bar.set_postfix(validation=f"{history.validation[-1]:.4f}")
            run.keep(history)
    run.restore_best()
    model.eval()
    return history


def event_rates(data: SessionDataset) -> NDArray[np.float64]:
    """(5,) shares of the events among a data set's impressions, each counted once more than it came."""
    counts = np.bincount(data.event[data.event >= 0].numpy(), minlength=len(EVENTS)) + 1.0
    return counts / counts.sum()


def place_event_rates(data: SessionDataset, places: int) -> NDArray[np.float64]:
    """(places, 5) shares of the events at each place, with five impressions of the average place added to each."""
    found = np.tile(5 * event_rates(data), (places, 1))
    for place in range(min(places, data.event.shape[1])):
        column = data.event[:, place]
        found[place] += np.bincount(column[column >= 0].numpy(), minlength=len(EVENTS))
    return found / found.sum(1, keepdims=True)


def mean_log_loss(model: EventClassifier, data: SessionDataset, autocast: bool = False) -> float:
    """Mean log-loss of an impression, nats, class weights taken out."""
    total, rows = 0.0, 0
    for part, logits in evaluated(model, data, autocast=autocast):
        event = part.event.to(logits.event.device)
        log_odds = (logits.event - model.shift).flatten(0, 1)
        total += cross_entropy(log_odds, event.flatten(), ignore_index=-100, reduction="sum").item()
        rows += int((part.event >= 0).sum())
    return total / rows


def reworded(texts: Sequence[str], seed: int, share: float = 0.3, swap: float = 0.1) -> list[str]:
    """Other wordings of product texts: a word with an abbreviation is abbreviated with probability ``share`` ("ounce"
    becomes "oz"), and two neighbours change places once in a text with probability ``swap``."""
    for name, value in (("share", share), ("swap", swap)):
        require(number(value) and 0 <= value <= 1, name, value, "a number from 0 to 1")
    short = {word: abbreviation for abbreviation, word in WORDS.items()}
    luck, result = np.random.default_rng(seed), []
    for text in texts:
        words = text.split(" ")
        for i, word in enumerate(words):
            plain = word.rstrip(",")
            if plain in short and luck.random() < share:
                words[i] = short[plain] + word[len(plain) :]
        if len(words) > 1 and luck.random() < swap:
            i = int(luck.integers(len(words) - 1))
            words[i], words[i + 1] = words[i + 1], words[i]
        result.append(" ".join(words))
    return result


def shuffled_labels(data: SessionDataset, seed: int) -> None:
    """Deal the events and session targets of a data set anew among its slates, in place: the control that must learn
    nothing. Histories in the sequences stay."""
    order = torch.randperm(len(data), generator=Generator().manual_seed(seed))
    data.targets = data.targets[order]
    inside = data.event >= 0
    events = data.event[inside]
    data.event[inside] = events[torch.randperm(len(events), generator=Generator().manual_seed(seed + 1))]


# ---------------------------------------------------------------------------------------------- steps
def training_step(
    model: EventClassifier, optimiser: torch.optim.Optimizer, batch: Batch, weight: Tensor, config: TrainingConfig
) -> Tensor:
    """One step; the event loss before it."""
    batch = on_device(batch, model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=config.autocast):
        logits = model(batch)
    loss = cross_entropy(logits.event.flatten(0, 1), batch.event.flatten(), weight, ignore_index=-100)
    session = binary_cross_entropy_with_logits(logits.session, batch.targets)
    optimiser.zero_grad(set_to_none=True)
    (loss + model.config.session_weight * session).backward()
    torch.nn.utils.clip_grad_norm_(model.trained().values(), config.clip)
    optimiser.step()
    return loss.detach()


def optimiser_for(model: EventClassifier, config: TrainingConfig) -> torch.optim.AdamW:
    """Four groups: encoder or head, decayed or not."""
    groups = []
    for body in (True, False):
        for decayed in (True, False):
            own = [
                p
                for name, p in model.trained().items()
                if name.startswith("encoder.") == body and (p.dim() > 1 and name != "place") == decayed
            ]
            lr = config.lr if body else config.head_lr
            groups.append(
                {"params": own, "lr": lr, "largest": lr, "weight_decay": config.weight_decay if decayed else 0.0}
            )
    return torch.optim.AdamW([g for g in groups if g["params"]], fused=model.device.type == "cuda")


def _set_lr(optimiser: torch.optim.Optimizer, config: TrainingConfig, done: float) -> None:
    factor = done / config.warm_up if done < config.warm_up else (1 - done) / (1 - config.warm_up)
    for group in optimiser.param_groups:
        group["lr"] = group["largest"] * factor


def _hider(encoder: Encoder, data: SessionDataset, config: TrainingConfig) -> Callable[[Batch, Generator], Batch]:
    """A function that replaces tokens of product texts by [MASK]; marks and the words for events are left alone."""
    tokenizer = encoder.tokenizer
    marks = torch.tensor(sorted(tokenizer.all_special_ids))
    verbs = torch.tensor(sorted({token for verb in data.verbs for token in verb}))

    def hide(batch: Batch, generator: Generator) -> Batch:
        chance, ids = torch.rand(batch.input_ids.shape, generator=generator), batch.input_ids
        words = ~torch.isin(ids, marks) & ((batch.product >= 0) | ~torch.isin(ids, verbs))
        hidden = torch.where((chance < config.word_dropout) & words, tokenizer.mask_token_id, ids)
        return batch._replace(input_ids=hidden)

    return hide


# ---------------------------------------------------------------------------------------------- checkpoint
def _key(
    model: EventClassifier, config: TrainingConfig, sets: Sequence[SessionDataset], validation: SessionDataset
) -> str:
    data = [
        hashlib.sha256(d.ids.numpy().tobytes() + d.event.numpy().tobytes()).hexdigest() for d in (*sets, validation)
    ]
    about = [asdict(config), asdict(model.config), model.digest, data]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


class _Run:
    """The best weights so far, and the file to go on from: trained weights, the optimiser's memory, the history."""

    def __init__(self, model: EventClassifier, optimiser: torch.optim.Optimizer, key: str, folder: Path | None):
        self.model, self.optimiser, self.key, self.folder = model, optimiser, key, folder
        self.names = {p: name for name, p in model.trained().items()}
        self.best: dict[str, Tensor] = {}

    def keep(self, history: Fit) -> None:
        if history.best == len(history.validation) - 1:
            self.best = {name: p.detach().cpu().clone() for name, p in self.model.trained().items()}
        if self.folder is None:
            return
        tensors = {f"now.{name}": p.detach().cpu() for name, p in self.model.trained().items()}
        tensors |= {f"best.{name}": p for name, p in self.best.items()}
        for p, memory in self.optimiser.state.items():
            for kind, value in memory.items():
                tensors[f"memory.{kind}.{self.names[p]}"] = value.detach().cpu()
        header = {"format": FORMAT, "version": VERSION, "key": self.key, "history": history._asdict()}
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        write_atomically(self.folder / FILE, safetensors.torch.save(tensors, {"ecomlib": json.dumps(header)}))

    def resume(self) -> Fit:
        path = None if self.folder is None else self.folder / FILE
        if path is None or not path.is_file():
            return Fit([], [], [])
        data = path.read_bytes()
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["ecomlib"])
            tensors = safetensors.torch.load(data)
            known, history = (header["format"], header["version"]) == (FORMAT, VERSION), Fit(**header["history"])
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path} is no checkpoint of a classifier, or is damaged: delete it to start"
            ) from error
        if not known or header["key"] != self.key:
            raise CheckpointError(
                f"{path} belongs to another training (configuration, encoder or data): name another folder"
            )
        with torch.no_grad():
            for name, p in self.model.trained().items():
                p.copy_(tensors[f"now.{name}"])
                self.best[name] = tensors[f"best.{name}"]
                for kind in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors[f"memory.{kind}.{name}"]
                    fused = self.model.device.type == "cuda"
                    self.optimiser.state[p][kind] = value if kind == "step" and not fused else value.to(p.device)
        return history

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, p in self.model.trained().items():
                p.copy_(self.best[name])
