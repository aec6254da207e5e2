"""Sessions as sequences of tokens with a target for every product shown (chapter "Behaviour prediction with a
pretrained encoder")."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import Dataset

from ..families.base import require, whole
from .encoder import Encoder

VERBS = ("skipped", "clicked", "read", "carted", "bought")
"""What stands before a product of the history, for each of ``behaviour.EVENTS``."""
TARGETS = ("click", "cart", "purchase")
"""What a session may come to, from the slate on: an event of at least this kind."""
REACHED = (1, 3, 4)
"""The number of the event from which each target counts as reached."""


class Splits(NamedTuple):
    """A log cut by time. A session that runs across a cut is in no part."""

    train: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame


def split_by_time(events: pd.DataFrame, until: tuple[float, float]) -> Splits:
    """Sessions that end before the first time of ``until``, those between the two, and those that start after.

    ``until`` are days of the column time. Raises ValueError where a part would be empty.
    """
    first, last = (events.groupby("session")["time"].transform(how) for how in ("min", "max"))
    validation, test = until
    require(validation < test, "until", until, "two times that increase")
    parts = Splits(
        *(
            events[mask].reset_index(drop=True)
            for mask in (last < validation, (first >= validation) & (last < test), first >= test)
        )
    )
    for name, part in zip(Splits._fields, parts):
        require(len(part) > 0, "until", until, f"times that leave sessions in {name}; the log has {span(events)}")
    return parts


def span(events: pd.DataFrame) -> str:
    """The times of a log, for messages."""
    return f"times from {events['time'].min():g} to {events['time'].max():g}"


class Batch(NamedTuple):
    """B slates, each with its history: L tokens, k products."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64, 1 where there is a token
    product: Tensor  # (B, L) int64, place in the slate of the product that a token belongs to; -1 elsewhere
    event: Tensor  # (B, k) int64, number in EVENTS; -100 where the slate has fewer than k products
    targets: Tensor  # (B, 3) float, 1 where the session comes to a click, a cart, a purchase from this slate on
    row: Tensor  # (B, k) int64, row of each product in the events that the data set was made from; -1 as above


class SessionDataset(Dataset):
    """One example for each slate: what the shopper did before, in words, and then the products shown.

    ``[CLS] clicked apples 5 pound skipped soup [SEP] milk 1 gallon [SEP] tea 20 count [SEP]``: a token-level target
    is the event of the product that the token belongs to; history, marks and padding have none. The history has the
    last ``history`` products acted on and as many of those that were not, oldest first; where the whole is longer than
    ``max_tokens``, the oldest are left out, and then the ends of the slate's texts, with a warning.
    """

    def __init__(
        self,
        events: pd.DataFrame,
        texts: Sequence[str],
        encoder: Encoder,
        max_tokens: int = 128,
        history: int = 4,
    ):
        """``events`` as in ``behaviour.Log``; ``texts`` are those of the products that its column product numbers."""
        require(len(events) > 0, "events", "no rows", "at least one session with one product")
        require(whole(history, 0), "history", history, "a whole number >= 0")
        require(
            whole(max_tokens, 16, encoder.longest), "max_tokens", max_tokens, f"a whole number in 16..{encoder.longest}"
        )
        self.pad = encoder.tokenizer.pad_token_id
        self.start, self.end = encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id
        self.max_tokens, self.history = max_tokens, history
        used = np.unique(events["product"].to_numpy())
        require(used.min() >= 0 and used.max() < len(texts), "events.product", int(used.max()), "a row of texts")
        inner = [ids[1:-1] for ids in encoder.tokens([texts[row] for row in used], encoder.longest)]
        self.words = dict(zip(used.tolist(), inner))
        self.verbs = [ids[1:-1] for ids in encoder.tokens(VERBS, encoder.longest)]
        self._examples(events)

    def _examples(self, events: pd.DataFrame) -> None:
        order = np.lexsort((events["place"], events["slate"], events["session"]))
        session, slate, product, event = (
            events[name].to_numpy()[order] for name in ("session", "slate", "product", "event")
        )
        starts = np.flatnonzero(np.r_[True, (session[1:] != session[:-1]) | (slate[1:] != slate[:-1])])
        ends = np.r_[starts[1:], len(order)]
        self.places = int((ends - starts).max())
        sequences, products, cut = [], [], 0
        first = 0
        for start, end in zip(starts, ends):
            first = start if session[start] != session[first] else first
            before = range(first, start)
            ids, owner, short = self._sequence(
                [(product[i], event[i]) for i in before], [product[i] for i in range(start, end)]
            )
            sequences.append(ids)
            products.append(owner)
            cut += short
        if cut:
            warnings.warn(
                f"{cut} of {len(starts)} slates do not fit in max_tokens = {self.max_tokens} even without a history: "
                "the ends of their products' texts are not read",
                stacklevel=3,
            )
        self.lengths = np.array([len(ids) for ids in sequences])
        self.offsets = np.r_[0, np.cumsum(self.lengths)]
        self.ids = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int32)
        self.owner = torch.tensor([place for places in products for place in places], dtype=torch.int16)
        column = np.arange(len(order)) - np.repeat(starts, ends - starts)
        slate_of = np.repeat(np.arange(len(starts)), ends - starts)
        self.event = torch.full((len(starts), self.places), -100)
        self.row = torch.full((len(starts), self.places), -1)
        self.event[slate_of, column] = torch.as_tensor(event.astype(np.int64))
        self.row[slate_of, column] = torch.as_tensor(order)
        self.targets = torch.as_tensor(_outlook(session[starts], np.maximum.reduceat(event, starts)))

    def _sequence(self, before: list[tuple[int, int]], shown: list[int]) -> tuple[list[int], list[int], bool]:
        """Token numbers, the place that each belongs to (-1: none), and whether a text of the slate was cut."""
        words = [self.words[product] for product in shown]
        room = self.max_tokens - 2 - len(shown)
        short = sum(map(len, words)) > room
        if short:
            words = [text[: max(room // len(shown), 1)] for text in words]
        room -= sum(map(len, words))
        acted = [i for i, (_, event) in enumerate(before) if event > 0][-self.history :] if self.history else []
        other = [i for i, (_, event) in enumerate(before) if event == 0][-self.history :] if self.history else []
        past: list[int] = []
        for i in sorted((*acted, *other), reverse=True):  # newest first, until there is no room
            product, event = before[i]
            piece = [*self.verbs[event], *self.words[product]]
            if len(piece) > room:
                break
            past, room = [*piece, *past], room - len(piece)
        ids, owner = [self.start, *past, self.end], [-1] * (len(past) + 2)
        for place, text in enumerate(words):
            ids += [*text, self.end]
            owner += [place] * len(text) + [-1]
        return ids, owner, short

    def __len__(self) -> int:
        """Slates."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> Batch:
        """One slate, as a batch of one."""
        return self.collate([range(len(self))[index]])

    def collate(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The slates ``indices``, padded to the longest of them."""
        indices = np.asarray(indices)
        lengths = self.lengths[indices]
        inside = torch.as_tensor(np.arange(lengths.max()) < lengths[:, None])
        take = torch.as_tensor(np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices]))
        ids = torch.full(inside.shape, self.pad)
        product = torch.full(inside.shape, -1)
        ids[inside], product[inside] = self.ids[take].long(), self.owner[take].long()
        rows = torch.as_tensor(indices)
        return Batch(ids, inside.long(), product, self.event[rows], self.targets[rows], self.row[rows])

    def batches(self, size: int, generator: Generator | None = None, pool: int = 20) -> Iterator[Batch]:
        """All slates once, ``size`` at a time: in their order or, with a ``generator``, shuffled.

        Shuffled slates are sorted by length within pools of ``pool`` batches, so that little is padding, and the
        batches shuffled again.
        """
        require(whole(size, 1), "size", size, "a whole number >= 1")
        if generator is None:
            for start in range(0, len(self), size):
                yield self.collate(np.arange(start, min(start + size, len(self))))
            return
        order = torch.randperm(len(self), generator=generator).numpy()
        parts = []
        for start in range(0, len(order), size * pool):
            own = order[start : start + size * pool]
            own = own[np.argsort(self.lengths[own], kind="stable")]
            parts += [own[i : i + size] for i in range(0, len(own), size)]
        for part in torch.randperm(len(parts), generator=generator).tolist():
            yield self.collate(parts[part])


def _outlook(session: NDArray, furthest: NDArray) -> NDArray[np.float32]:
    """(slates, 3) whether the session comes to each of TARGETS in this slate or later, from the furthest event of every
    slate; slates in the order of sessions and time."""
    result = np.zeros((len(session), len(TARGETS)), np.float32)
    ahead = 0
    for i in range(len(session) - 1, -1, -1):
        ahead = max(ahead if i + 1 < len(session) and session[i + 1] == session[i] else 0, int(furthest[i]))
        result[i] = [ahead >= event for event in REACHED]
    return result
