"""One model of a product's text, numbers and picture, for click, cart and purchase (chapter "More than text")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..families.base import check, number, require, whole
from .funnel import HEADS

MODALITIES = ("text", "numbers", "picture")
"""What may be known of a product."""
CONTEXT = 10
"""Numbers of ``session_context``."""


class Inputs(NamedTuple):
    """Impressions as a fusion model takes them. Texts and pictures are stored once, however often they are shown."""

    context: Tensor
    """(rows, CONTEXT) the place, and the session so far."""
    numbers: Tensor
    """(rows, numbers) of the product on that day."""
    text: Tensor
    """(texts, size) vectors of an encoder."""
    text_row: Tensor
    """(rows,) int64, row of ``text``."""
    picture: Tensor
    """(pictures, 3, height, width), in 0..1."""
    picture_row: Tensor
    """(rows,) int64, row of ``picture``."""

    def rows(self, index: Tensor) -> Inputs:
        """Some of the impressions."""
        context, numbers, text_row, picture_row = (
            x[index] for x in (self.context, self.numbers, self.text_row, self.picture_row)
        )
        return self._replace(context=context, numbers=numbers, text_row=text_row, picture_row=picture_row)


def inputs(
    events: pd.DataFrame, text: ArrayLike, price: ArrayLike, pictures: ArrayLike, recorded: bool = True
) -> Inputs:
    """Inputs for a log of ``promotions.PromotedBehaviour``, whole sessions of it, in torch's default dtype.

    ==========  ==========================  ==============================================================
    Argument    Shape                       Meaning
    ==========  ==========================  ==============================================================
    text        (products, size)            vectors of the product texts
    price       (products,)                 list prices in dollars; the model reads their logarithm
    pictures    (2, products, 3, h, w)      without and with a sticker
    recorded    bool                        also a number: 1 where the data feed lists a promotion
    ==========  ==========================  ==============================================================
    """
    dtype, pictures, price = torch.get_default_dtype(), np.asarray(pictures), np.asarray(price, np.float64)
    product = events["product"].to_numpy(np.int64, copy=True)
    require(bool((price > 0).all()), "price", price.min(), "numbers > 0")
    require(pictures.shape[:2] == (2, len(price)), "pictures", pictures.shape, f"(2, products = {len(price)}, ...)")
    columns = [np.log(price)[product]] + ([events["recorded"].to_numpy(np.float64)] if recorded else [])
    tensor = lambda values: torch.as_tensor(np.asarray(values), dtype=dtype)
    return Inputs(
        tensor(session_context(events)),
        tensor(np.stack(columns, 1)),
        tensor(text),
        torch.as_tensor(product),
        tensor(pictures.reshape(-1, *pictures.shape[2:])),
        torch.as_tensor(product + len(price) * events["promoted"].to_numpy(np.int64)),
    )


def session_context(events: pd.DataFrame) -> NDArray[np.float32]:
    """(rows, CONTEXT) what a shop knows of an impression without a look at the product: four indicators of the place,
    the slate / 10, the slates in a row without an event before it (at most 3) / 3, and log(1 + count) of each kind of
    event in earlier slates of the session. ``events`` holds whole sessions, in any order of rows."""
    slates = pd.get_dummies(events["event"]).reindex(columns=range(1, 5), fill_value=False).astype(np.int64)
    slates = slates.groupby([events["session"], events["slate"]]).sum()
    of_session = slates.groupby(level="session")
    before = of_session.cumsum() - slates
    quiet = slates.sum(axis=1) == 0
    run = quiet.groupby([quiet.index.get_level_values("session"), (~quiet).cumsum()]).cumsum()
    fatigue = run.groupby(level="session").shift(fill_value=0).clip(upper=3)
    where = slates.index.get_indexer(pd.MultiIndex.from_frame(events[["session", "slate"]]))
    place = np.minimum(events["place"].to_numpy(), 3)[:, None] == np.arange(4)
    slate = events["slate"].to_numpy()[:, None] / 10
    state = np.column_stack((fatigue.to_numpy() / 3, np.log1p(before.to_numpy())))[where]
    return np.concatenate((place, slate, state), 1).astype(np.float32)


@dataclass(frozen=True)
class FusionConfig:
    """What the model looks at, its sizes, and how it is trained."""

    modalities: tuple[str, ...] = MODALITIES
    """What of a product is read; () is the context alone."""
    head: str = "funnel"
    """How click, cart and purchase are predicted: a name in ``funnel.HEADS``."""
    width: int = 32
    """Numbers that each modality is turned into."""
    hidden: int = 64
    """Units of the layer that reads them together."""
    channels: int = 12
    """Patterns of 4 x 4 dots that are looked for in a picture."""
    dropout: float = 0.1
    """Share of hidden units left out of a training step."""
    modality_dropout: float = 0.0
    """Chance that a training row misses a modality, each on its own."""
    lr: float = 2e-3
    """Step size of AdamW."""
    weight_decay: float = 0.03
    """Weight decay of AdamW."""
    batch: int = 512
    """Rows of a step."""
    epochs: int = 30
    """Most passes over the training rows."""
    patience: int = 3
    """Passes without a better validation loss after which training stops."""
    seed: int = 0
    """Seed of the first weights, of the order of rows, and of what is dropped."""

    def __post_init__(self):
        known = lambda x: len(set(x)) == len(x) and set(x) <= set(MODALITIES)
        check(self, "modalities", known, f"some of {MODALITIES}, each once")
        check(self, "head", lambda x: x in HEADS, f"one of {sorted(HEADS)}")
        for name in ("width", "hidden", "channels", "batch"):
            check(self, name, lambda x: whole(x, 1, 16384), "a whole number from 1 to 16384")
        for name in ("dropout", "modality_dropout"):
            check(self, name, lambda x: number(x) and 0 <= x < 1, "a number >= 0 and < 1")
        check(self, "lr", lambda x: number(x) and x > 0, "a finite number > 0")
        check(self, "weight_decay", lambda x: number(x) and x >= 0, "a finite number >= 0")
        for name in ("epochs", "patience"):
            check(self, name, lambda x: whole(x, 1, 10_000), "a whole number from 1 to 10000")
        check(self, "seed", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2147483648")


class Fusion(nn.Module):
    """Late fusion, equation (eq-fusion): every modality becomes a vector of its own; they are laid side by side with
    the context, and one hidden layer reads them together. A missing modality is a learned vector."""

    def __init__(self, config: FusionConfig, example: Inputs):
        """``example`` are the training rows: sizes, precision, and the scale of context and numbers come from them."""
        super().__init__()
        self.config = config
        colours = example.picture.shape[1]
        build = {
            "text": lambda: nn.Linear(example.text.shape[1], config.width),
            "numbers": lambda: nn.Linear(example.numbers.shape[1], config.width),
            "picture": lambda: nn.Sequential(
                nn.Conv2d(colours, config.channels, 4, stride=2),
                nn.ReLU(),
                nn.AdaptiveMaxPool2d(1),  # wherever it is
                nn.Flatten(),
                nn.Linear(config.channels, config.width),
            ),
        }
        self.encoders = nn.ModuleDict({name: build[name]() for name in config.modalities})
        self.absent = nn.ParameterDict({name: torch.zeros(config.width) for name in config.modalities})
        together = example.context.shape[1] + config.width * len(config.modalities)
        self.trunk = nn.Sequential(nn.Linear(together, config.hidden), nn.ReLU(), nn.Dropout(config.dropout))
        self.head = nn.Linear(config.hidden, HEADS[config.head].size)
        for name in ("context", "numbers"):
            values = getattr(example, name)
            self.register_buffer(f"{name}_mean", values.mean(0))
            self.register_buffer(f"{name}_scale", values.std(0).clamp(min=1e-6))
        self.to(example.text.dtype)

    def read(self, rows: Inputs) -> dict[str, Tensor]:
        """(rows, width) of each modality."""
        numbers = (rows.numbers - self.numbers_mean) / self.numbers_scale
        take = {
            "text": lambda: rows.text[rows.text_row],
            "numbers": lambda: numbers,
            "picture": lambda: rows.picture[rows.picture_row],
        }
        return {name: torch.relu(encoder(take[name]())) for name, encoder in self.encoders.items()}

    def forward(self, rows: Inputs, present: Tensor | None = None) -> Tensor:
        """(rows, size) numbers for the head. ``present`` (rows, modalities) bool says which modalities, in the order of
        the configuration, a row has; None is all of them."""
        parts = [(rows.context - self.context_mean) / self.context_scale]
        for column, (name, vector) in enumerate(self.read(rows).items()):
            if present is not None:
                vector = torch.where(present[:, column, None], vector, self.absent[name])
            parts.append(vector)
        return self.head(self.trunk(torch.cat(parts, -1)))

    def cost(self, height: int = 16, width: int = 16) -> dict[str, tuple[int, int]]:
        """{part: (parameters, multiply-adds for one impression)}, encoders of text vectors not counted."""
        found = {}
        for name, part in (*self.encoders.items(), ("trunk", self.trunk), ("head", self.head)):
            products = 0
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    products += layer.weight.numel()
                elif isinstance(layer, nn.Conv2d):
                    products += layer.weight.numel() * (height // 2 - 1) * (width // 2 - 1)
            found[name] = (sum(p.numel() for p in part.parameters()), products)
        return found
