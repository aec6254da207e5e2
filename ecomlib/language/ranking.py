"""How good is a ranking, and of what use: metrics of ordered lists, and the shops' tastes that rank them (chapter
"From prediction to decision")."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..families.base import require, whole
from ..families.recommendation import Segments, SlateRecommendation
from ..families.slates import expected_gain
from .choice import slates_of


class RankingScores(NamedTuple):
    """Metrics of n ranked lists, each (n,); nan where a list has nothing relevant."""

    ndcg: NDArray[np.float64]
    """Normalised discounted cumulative gain of the first k: equation (eq-ndcg)."""
    recall: NDArray[np.float64]
    """Share of the relevance that is among the first k."""
    reciprocal_rank: NDArray[np.float64]
    """1 / rank of the first relevant item, over the whole list."""

    @property
    def means(self) -> dict[str, float]:
        """Mean of each over the lists that have something relevant."""
        return {name: float(np.nanmean(values)) for name, values in self._asdict().items()}


def ranking_scores(relevance: ArrayLike, score: ArrayLike, k: int = 10) -> RankingScores:
    """Score lists that are sorted by ``score`` (n, items), where ``relevance`` (n, items) >= 0 says what was wanted.

    Equal scores are counted in the order of the items (scikit-learn's ``ndcg_score`` averages over their orders;
    without ties the two agree). Raises ValueError where shapes differ or a value is negative or not finite.
    """
    wanted, ranked = np.asarray(relevance, float), np.asarray(score, float)
    require(wanted.ndim == 2 and wanted.shape == ranked.shape, "score", ranked.shape, f"{wanted.shape}, (lists, items)")
    require(whole(k, 1, wanted.shape[1]), "k", k, f"a whole number in 1..{wanted.shape[1]}")
    require(bool(np.isfinite(ranked).all()), "score", "not finite", "finite numbers")
    require(bool((np.isfinite(wanted) & (wanted >= 0)).all()), "relevance", "negative or not finite", "numbers >= 0")
    order = np.argsort(-ranked, 1, kind="stable")
    found = np.take_along_axis(wanted, order, 1)
    discount = 1 / np.log2(np.arange(2, k + 2))
    total = wanted.sum(1)
    some = np.where(total > 0, 1.0, np.nan)
    ideal = (-np.sort(-wanted, 1)[:, :k] * discount).sum(1)
    divide = lambda a, b: a / np.where(b > 0, b, 1) * some
    first = (found > 0).argmax(1) + 1
    return RankingScores(
        divide((found[:, :k] * discount).sum(1), ideal), divide(found[:, :k].sum(1), total), some / first
    )


def tastes_of(
    believed: SlateRecommendation, events: pd.DataFrame, shops: ArrayLike, steps: int = 20
) -> NDArray[np.float64]:
    """(shops, features) most likely taste of each of ``shops`` given its slates in ``events``, by Newton's method.

    ``events`` has the columns of ``behaviour.Log``, with ``product`` numbering the items of ``believed``, whose
    features, appeal, levels and normal prior are taken for true; attention is that of the middle of its range. A shop
    without slates keeps the prior's mean, 0.
    """
    require(believed.prior.types == 1 and believed.prior.centre == 0, "believed.prior", believed.prior, "one cloud")
    shops = np.asarray(shops)
    dtype, d = torch.float64, believed.features
    taste = torch.zeros(len(shops), d, dtype=dtype)
    if not len(events):
        return taste.numpy()
    data = slates_of(events)
    place = {name: row for row, name in enumerate(shops.tolist())}
    kept = np.isin(data.shop, shops)
    data = data.take(kept)
    require(data.product.max(initial=0) < believed.items, "events.product", int(data.product.max(initial=0)),
            f"an item below {believed.items}")  # fmt: skip
    shop = torch.tensor([place[name] for name in data.shop.tolist()], dtype=torch.int64)
    number = lambda x: torch.tensor(x, dtype=dtype)
    shown = number(believed.table.features)[data.product]  # (n, k, d)
    level = number(believed.click)[data.reads] - believed.tiredness * number(data.fatigue)
    middle = sum(believed.prior.attention) / 2
    base = (
        number(believed.table.appeal)[data.product]
        + level[:, None]
        + middle * number(believed.places[: believed.slate]).log()
    )
    hit = torch.tensor(data.clicked)[:, None] == torch.arange(believed.slate)
    precision = torch.eye(d, dtype=dtype) / believed.prior.deviation**2
    summed = lambda x: torch.zeros(len(shops), *x.shape[1:], dtype=dtype).index_add(0, shop, x)
    for _ in range(steps):
        odds = (base + (shown * taste[shop][:, None]).sum(-1)).exp()
        chance = odds / (1 + odds.sum(-1, keepdim=True))
        mean = (chance[..., None] * shown).sum(1)
        gradient = summed(((hit.to(dtype) - chance)[..., None] * shown).sum(1)) - taste @ precision
        curvature = torch.einsum("nk,nki,nkj->nij", chance, shown, shown) - mean[:, :, None] * mean[:, None]
        step = torch.linalg.solve(summed(curvature) + precision, gradient[..., None])[..., 0]
        taste = taste + step / step.norm(dim=-1, keepdim=True).clamp(min=1)  # at most 1: the likelihood is no parabola
    return taste.numpy()


def money_of(family: SlateRecommendation, tasks: Segments, score: ArrayLike, stage: int = 0) -> Tensor:
    """(M,) exact expected margin of showing each of M segments the first places of its list, sorted by ``score`` (M or
    1, items), once, to a fresh shopper at ``stage``: equation (eq-slate-gain)."""
    score = torch.as_tensor(np.asarray(score)).expand(len(tasks.id), -1)
    slate = score.topk(family.slate, -1).indices
    weight = torch.exp(family.log_weight(tasks) + family.click[stage])
    value = torch.tensor(family.table.margin).to(weight) * family.cart[stage] * family.order[stage]
    return expected_gain(slate, weight, value.expand_as(weight), family.attention(tasks))
