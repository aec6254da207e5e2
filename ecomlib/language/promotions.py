"""Promotions: what raises a product's appeal for a week, and where it can be seen (chapter "More than text")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import noise
from ..families.base import check, number, require
from ..families.recommendation import Catalogue, SlateRecommendation
from .behaviour import BehaviourModel, Log

WEEK = 7
"""Days that a promotion lasts."""
PROMOTED, RECORDED = 103, 104
"""Streams of ``noise`` that choose what is on promotion, and whether the data feed says so."""


@dataclass(frozen=True)
class PromotedBehaviour(BehaviourModel):
    """A ``BehaviourModel`` in which some products are on promotion, other ones every week.

    A promotion adds ``lift`` to the log-odds of a click, for all shoppers alike: equation (eq-promotion). Every
    promotion is a sticker on the product's picture; only some are in the shop's data feed. Neither says anything of
    the product, and the product's text and price say nothing of it.
    """

    promotion: float = 0.25
    """Share of products on promotion in a week."""
    lift: float = 1.2
    """Log-odds of a click that a promotion adds."""
    recorded: float = 0.5
    """Share of the promotions that the data feed lists; stores arrange the others at short notice."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("promotion", "recorded"):
            check(self, name, lambda x: number(x) and 0 <= x <= 1, "a number from 0 to 1")
        check(self, "lift", lambda x: number(x) and abs(x) <= 10, "a number from -10 to 10")

    def promoted(self, products: int) -> NDArray[np.bool_]:
        """(products, weeks) what is on promotion. The first rows do not depend on how many follow."""
        return self._chance(products, PROMOTED) < self.promotion

    def listed_promotions(self, products: int) -> NDArray[np.bool_]:
        """(products, weeks) what the data feed says is on promotion: never too much, sometimes too little."""
        return self.promoted(products) & (self._chance(products, RECORDED) < self.recorded)

    def family(self, products: pd.DataFrame) -> SlateRecommendation:
        """The decision problem: item 2 i is product i as usual, item 2 i + 1 the same on promotion."""
        return _twice(super().family(products), self.lift)

    def listed(self, shown: Tensor, start: Tensor) -> Tensor:
        """Items of the catalogue that products ``shown`` (M, N, k) are in the week of a ``start`` (M, N), in days."""
        table = torch.as_tensor(self.promoted(int(shown.max()) + 1))
        week = (start / WEEK).long()[..., None].expand_as(shown)
        return 2 * shown + table[shown, week]

    def generate(
        self,
        products: pd.DataFrame,
        shops: Sequence[int],
        sessions: int,
        seed: int = 0,
        assortment: Sequence[int] | None = None,
    ) -> Log:
        """As ``BehaviourModel.generate``, with two more columns: promoted (the truth, which the picture shows) and
        recorded (what the data feed says), both bool."""
        log = super().generate(products, shops, sessions, seed, assortment)
        week = (log.events.groupby("session")["time"].transform("min").to_numpy() / WEEK).astype(int)
        row = log.events["product"].to_numpy()
        tables = {"promoted": self.promoted(len(products)), "recorded": self.listed_promotions(len(products))}
        return Log(log.events.assign(**{name: table[row, week] for name, table in tables.items()}), log.probability)

    def _chance(self, products: int, stream: int) -> NDArray[np.float64]:
        weeks = torch.arange(-(-self.days[-1] // WEEK))
        return noise.uniform(self.seed, torch.arange(products), weeks, 0, 0, stream, 1, torch.float64)[..., 0].numpy()


def with_conversions(
    log: Log, cart: NDArray[np.float64], order: NDArray[np.float64], browse: float = 0.3, seed: int = 0
) -> Log:
    """The same clicks with another funnel behind them: what follows a click is drawn anew.

    ``cart`` and ``order`` (products,) are the shares of clicks on a product that end in the cart, and of its carts that
    are bought, whatever the stage; ``browse`` is the share of the other clicks that reads on. Probabilities stay exact:
    a click's is the old one, and what follows depends on the product alone.
    """
    row = log.events["product"].to_numpy()
    for name, share in (("cart", cart), ("order", order)):
        require(len(share) > row.max(), name, len(share), "one share for each product")
        require(share.min() >= 0 and share.max() <= 1, name, (share.min(), share.max()), "probabilities")
    click, into, bought = 1 - log.probability[:, 0], cart[row], order[row]
    parts = ((1 - into) * (1 - browse), (1 - into) * browse, into * (1 - bought), into * bought)
    probability = np.column_stack((1 - click, *(click * part for part in parts)))
    luck = np.random.default_rng(seed).random((len(row), 1))
    after = 1 + (np.cumsum(parts, 0).T[:, :-1] <= luck).sum(1)
    event = np.where(log.events["event"].to_numpy() > 0, after, 0)
    return Log(log.events.assign(event=event), probability)


@lru_cache(maxsize=8)
def _twice(family: SlateRecommendation, lift: float) -> SlateRecommendation:
    table = family.table
    double = lambda values: tuple(value for value in values for _ in range(2))
    appeal = tuple(value + extra for value in table.appeal for extra in (0.0, lift))
    features = tuple(number for row in table.features for _ in range(2) for number in row)
    return replace(family, catalogue=Catalogue(double(table.margin), features, appeal, double(table.pull)))
