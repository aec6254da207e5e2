"""What a shop recommends from, and to whom: a catalogue of items, and a prior over segments of shoppers (chapter
"Recommendation")."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import noise
from .base import _plain, check, number, numbers, whole
from .constants import constant


class Table(NamedTuple):
    """A catalogue as nested tuples of numbers, one entry an item."""

    features: tuple[tuple[float, ...], ...]
    margin: tuple[float, ...]
    appeal: tuple[float, ...]
    pull: tuple[float, ...]
    category: tuple[int, ...]


@dataclass(frozen=True)
class HashedCatalogue:
    """An invented catalogue: the items of a category lie close together in the space of features. The same settings
    give the same items on any machine."""

    items: int = 20
    """Items that may be recommended."""
    features: int = 4
    """Features of an item; its vector has length 1."""
    categories: int = 5
    """Categories, of equal size as nearly as possible."""
    margin: tuple[float, float] = (0.5, 1.5)
    """Range of the margin of an item (uniform), in units of the average unit cost."""
    appeal: float = 0.3
    """Standard deviation of what makes items attractive to everyone, in log-odds of a click."""
    pull: tuple[float, float] = (0.1, 0.6)
    """Range of the probability that a click on the item makes a shopper more serious (uniform)."""
    seed: int = 0
    """Another seed, other items."""

    def __post_init__(self):
        # The items are made where a family is: a number without bound would fill the memory before anything is said.
        check(self, "items", lambda x: whole(x, 1, 10_000), "a whole number from 1 to 10000")
        check(self, "features", lambda x: whole(x, 1, 100), "a whole number from 1 to 100")
        check(self, "categories", lambda x: whole(x, 1, self.items), f"a whole number in 1..items = {self.items}")
        check(self, "margin", lambda x: numbers(x, 2) and 0 < x[0] <= x[1], "two numbers with 0 < low <= high")
        check(self, "appeal", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "pull", lambda x: numbers(x, 2) and 0 <= x[0] <= x[1] <= 1, "two numbers, 0 <= low <= high <= 1")
        check(self, "seed", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2147483648")

    def table(self) -> Table:
        """The items."""
        return _hashed(self)


@dataclass(frozen=True)
class Catalogue:
    """A shop's own items."""

    margin: tuple[float, ...]
    """Margin of each item, in units of the average unit cost."""
    features: tuple[float, ...]
    """Features, item after item: ``len(features) / len(margin)`` of each. Vectors of length about 1 suit the prior."""
    appeal: tuple[float, ...] | None = None
    """How attractive each item is to everyone, in log-odds of a click; None is 0."""
    pull: tuple[float, ...] | None = None
    """Probability that a click on the item makes a shopper more serious; None is 0.3."""
    category: tuple[int, ...] | None = None
    """Category of each item, which nothing depends on; None is 0."""

    def __post_init__(self):
        check(self, "margin", lambda x: numbers(x) and min(x) >= 0, "numbers >= 0, one for each item")
        items = len(self.margin)
        rows = lambda x: numbers(x) and len(x) % items == 0
        check(self, "features", rows, f"finite numbers, the same count for each of the {items} items")
        each = lambda x, low, high: x is None or (numbers(x, items) and low <= min(x) and max(x) <= high)
        check(self, "appeal", lambda x: each(x, -math.inf, math.inf), f"None or {items} finite numbers")
        check(self, "pull", lambda x: each(x, 0, 1), f"None or {items} probabilities")
        labels = lambda x: x is None or (len(x) == items and all(whole(i, 0) for i in x))
        check(self, "category", labels, f"None or {items} whole numbers >= 0")

    def table(self) -> Table:
        """The items."""
        items = len(self.margin)
        width = len(self.features) // items
        rows = tuple(self.features[i : i + width] for i in range(0, len(self.features), width))
        same = lambda values, default: (default,) * items if values is None else values
        return Table(rows, self.margin, same(self.appeal, 0.0), same(self.pull, 0.3), same(self.category, 0))


@lru_cache(maxsize=32)
def _hashed(catalogue: HashedCatalogue) -> Table:
    items, features, categories = catalogue.items, catalogue.features, catalogue.categories
    category = torch.arange(items) % categories
    draws = _uniforms(catalogue.seed, 0, items, features + 3)
    centre = torch.special.ndtri(_uniforms(catalogue.seed, 1, categories, features))
    vector = centre / centre.norm(dim=-1, keepdim=True)
    vector = vector[category] + 0.6 / math.sqrt(features) * torch.special.ndtri(draws[:, 3:])
    between = lambda u, bounds: bounds[0] + (bounds[1] - bounds[0]) * u
    columns = (
        vector / vector.norm(dim=-1, keepdim=True),
        between(draws[:, 0], catalogue.margin),
        catalogue.appeal * torch.special.ndtri(draws[:, 1]),
        between(draws[:, 2], catalogue.pull),
        category,
    )
    return Table(*map(_plain, columns))


def _uniforms(seed: int, stream: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) fixed uniforms."""
    replica = torch.zeros(1, dtype=torch.int64)
    return noise.uniform(seed, torch.arange(rows), replica, stream, 0, noise.PRIOR, columns, torch.float64)[:, 0]


@dataclass(frozen=True)
class SegmentPrior:
    """Who the shoppers may be. A task is a segment: everybody in it has the same taste.

    Tastes come in a few types. The taste of a segment, a vector u, is its type's centre plus a normal deviation; an
    item with features x then gains x'u in log-odds of a click.
    """

    types: int = 4
    """Types of shopper, equally likely."""
    centre: float = 2.0
    """Length of the vector at a type's centre."""
    deviation: float = 0.7
    """Standard deviation of a segment around its type, in each feature."""
    attention: tuple[float, float] = (0.0, 1.0)
    """Range of the position bias (uniform): 0 is the same attention to every place, 1 is the family's ``places``."""
    leave: tuple[float, float] = (0.01, 0.06)
    """Range of the probability of leaving after the first slate without a click (log-uniform)."""
    seed: int = 0
    """Another seed, other types."""

    def __post_init__(self):
        check(self, "types", lambda x: whole(x, 1), "a whole number >= 1")
        for field in ("centre", "deviation"):
            check(self, field, lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "attention", lambda x: numbers(x, 2) and 0 <= x[0] <= x[1], "two numbers with 0 <= low <= high")
        valid = lambda x: numbers(x, 2) and 0 < x[0] <= x[1] <= 1
        check(self, "leave", valid, "two numbers with 0 < low <= high <= 1")
        check(self, "seed", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2147483648")

    def centres(self, features: int) -> tuple[tuple[float, ...], ...]:
        """The types' centres, ``types`` rows of ``features`` numbers."""
        return _centres(self, features)

    def hidden(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(M, d + 3) uniforms -> taste (M, d), position bias (M,), probability of leaving (M,).

        The first uniform chooses the type, d make the deviation, one the position bias, one the leaving.
        """
        features = uniforms.shape[-1] - 3
        centres = constant(self.centres(features), uniforms)
        kind = (uniforms[:, 0] * self.types).long().clamp(max=self.types - 1)
        taste = centres[kind] + self.deviation * torch.special.ndtri(uniforms[:, 1:-2])
        (low, high), (few, many) = self.attention, map(math.log, self.leave)
        return taste, low + (high - low) * uniforms[:, -2], torch.exp(few + (many - few) * uniforms[:, -1])

    def shifted(self) -> SegmentPrior:
        """Types that training never saw, with a stronger position bias, who leave half as soon again."""
        low, high = self.attention
        return replace(
            self,
            attention=(low + 0.5 * (high - low), high + 0.25 * (high - low)),
            leave=tuple(min(1.0, 1.5 * x) for x in self.leave),
            seed=self.seed + 1,
        )

    def wide(self, features: int) -> SegmentPrior:
        """No types: one normal cloud with 1.5 times the spread of all tastes, and ranges that hold this prior's and
        the shifted one's."""
        spread = math.sqrt(self.centre**2 / features + self.deviation**2)
        low, high = self.attention
        return replace(
            self,
            types=1,
            centre=0.0,
            deviation=1.5 * spread,
            attention=(low, high + 0.5 * (high - low)),
            leave=(self.leave[0] / 2, min(1.0, 2 * self.leave[1])),
        )


@lru_cache(maxsize=64)
def _centres(prior: SegmentPrior, features: int) -> tuple[tuple[float, ...], ...]:
    direction = torch.special.ndtri(_uniforms(prior.seed, 2, prior.types, features))
    return _plain(prior.centre * direction / direction.norm(dim=-1, keepdim=True))
