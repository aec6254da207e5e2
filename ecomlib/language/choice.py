"""A choice model whose products are their texts: what the log of earlier shops says of products, in the form in which
a recommender can use it (chapter "From prediction to decision")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..families.base import check, number, require, whole
from ..families.recommendation import Catalogue, SegmentPrior, SlateRecommendation
from ..families.sessions import FATIGUE, STAGES


class Slates(NamedTuple):
    """A log with one row for each slate; only what a shop sees."""

    shop: NDArray[np.int64]  # (n,)
    session: NDArray[np.int64]  # (n,)
    product: NDArray[np.int64]  # (n, k), in the order of the places
    clicked: NDArray[np.int64]  # (n,), place that was clicked; k if none
    event: NDArray[np.int64]  # (n,), furthest event of the slate, a number in EVENTS
    fatigue: NDArray[np.int64]  # (n,), slates in a row without a click before this one, at most 3
    reads: NDArray[np.int64]  # (n,), "browse" events since the last purchase of the session, at most 2

    def take(self, rows: NDArray) -> Slates:
        """Only these slates; the histories stay what they were."""
        return Slates(*(field[rows] for field in self))


def slates_of(events: pd.DataFrame) -> Slates:
    """The slates of a log with the columns of ``behaviour.Log``. All must have the same number of products."""
    order = np.lexsort((events["place"], events["slate"], events["session"]))
    session, slate, shop, product, event = (
        events[name].to_numpy()[order] for name in ("session", "slate", "shop", "product", "event")
    )
    starts = np.flatnonzero(np.r_[True, (session[1:] != session[:-1]) | (slate[1:] != slate[:-1])])
    sizes = np.diff(np.r_[starts, len(order)])
    require(len(events) > 0 and (sizes == sizes[0]).all(), "events", set(sizes.tolist()), "slates of one size")
    k = int(sizes[0])
    product, event, session, shop = product.reshape(-1, k), event.reshape(-1, k), session[starts], shop[starts]
    furthest = event.max(1)
    clicked = np.where(furthest > 0, event.argmax(1), k)
    fatigue, reads = np.zeros(len(session), np.int64), np.zeros(len(session), np.int64)
    new = np.r_[True, session[1:] != session[:-1]]
    first = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
    for step in range(1, int((np.arange(len(new)) - first).max()) + 1):
        rows = np.flatnonzero(np.arange(len(new)) - first == step)  # the slates at this place of their sessions
        before = furthest[rows - 1]
        fatigue[rows] = np.where(before > 0, 0, np.minimum(fatigue[rows - 1] + 1, FATIGUE - 1))
        reads[rows] = np.where(before == 4, 0, np.minimum(reads[rows - 1] + (before == 2), STAGES - 1))
    return Slates(shop, session, product, clicked, furthest, fatigue, reads)


@dataclass(frozen=True)
class ChoiceConfig:
    """Settings of ``fit_choice``."""

    factors: int = 6
    """Numbers that describe a product to its shoppers, found in the log."""
    ridge: float = 30.0
    """Weight of the squared weights of the text: larger for fewer slates."""
    steps: int = 100
    """Steps of L-BFGS."""
    seed: int = 0
    """Of the starting point."""

    def __post_init__(self):
        check(self, "factors", lambda x: whole(x, 1, 100), "a whole number from 1 to 100")
        check(self, "ridge", lambda x: number(x, 0), "a finite number > 0")
        check(self, "steps", lambda x: whole(x, 1, 10_000), "a whole number from 1 to 10000")
        check(self, "seed", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2147483648")


class Choice(NamedTuple):
    """What ``fit_choice`` found. Products are rows of the vectors that it was given."""

    features: NDArray[np.float64]  # (products, factors): x_i = W'e_i
    appeal: NDArray[np.float64]  # (products,): c_i = c_0 + v'e_i
    pull: NDArray[np.float64]  # (products,): probability that a click makes the shopper keener
    place: NDArray[np.float64]  # (k,): log attention to each place, the first 0
    tastes: NDArray[np.float64]  # (shops of the log, factors): u_s, with mean 0 and covariance 1


def fit_choice(
    events: pd.DataFrame,
    vectors: NDArray[np.floating],
    family: SlateRecommendation,
    config: ChoiceConfig = ChoiceConfig(),
) -> Choice:
    """Fit the bilinear logit model of equation (eq-bilinear) to a log of slates, and the pull to its clicks.

    ``vectors`` (products, d) describe the products: embeddings of their texts, or one indicator for each product
    (matrix factorisation). Of ``family`` only the levels of the funnel are read (``click``, ``tiredness``): what a shop
    measures on itself. The stage of intent is not in a log; the "browse" events seen so far stand for it.

    Raises:
        ValueError: a product of the log without a vector, or no click at all.
    """
    data = slates_of(events)
    require(data.product.max() < len(vectors), "vectors", len(vectors), "a row for every product of the events")
    k = data.product.shape[1]
    require((data.clicked < k).any(), "events", "no click", "a log with clicks")
    shops, shop = np.unique(data.shop, return_inverse=True)
    e = np.asarray(vectors, np.float64)
    e = torch.as_tensor(e - e[np.unique(data.product)].mean(0))  # what all texts share is the constant's
    product, shop = torch.as_tensor(data.product), torch.as_tensor(shop)
    level = torch.tensor(family.click, dtype=torch.float64)[torch.as_tensor(data.reads)]
    level = (level - family.tiredness * torch.as_tensor(data.fatigue))[:, None]
    clicked = torch.as_tensor(data.clicked)
    generator = torch.Generator().manual_seed(config.seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    d, f = e.shape[1], config.factors
    scale = e.square().sum(1).mean().sqrt()
    found = [normal(d, f) / scale, normal(len(shops), f), torch.zeros(d, dtype=torch.float64)]
    found += [torch.zeros(k - 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    for x in found:
        x.requires_grad_()
    weight, taste, common, place, constant = found
    zero = torch.zeros(1, dtype=torch.float64)

    def loss() -> Tensor:
        x, c = e @ weight, e @ common + constant
        own = (x[product] * taste[shop][:, None]).sum(-1)
        logits = own + c[product] + torch.cat((zero, place)) + level
        logits = torch.cat((logits, torch.zeros_like(level)), 1)
        # The sizes of texts' vectors differ between encoders: the ridge is on what they add to the log-odds.
        penalty = config.ridge * scale**2 * (weight.square().sum() + common.square().sum()) / 2
        return torch.nn.functional.cross_entropy(logits, clicked, reduction="sum") + penalty + taste.square().sum() / 2

    optimiser = torch.optim.LBFGS(found, max_iter=config.steps, history_size=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    with torch.no_grad():
        # The same model in the units of the prior: tastes of mean 0 and covariance 1 over the shops of the log.
        mean, root = taste.mean(0), torch.linalg.cholesky(torch.cov(taste.T).reshape(f, f))
        x, c = e @ weight, e @ common + constant
        x, c = x @ root, c + x @ mean
        taste = torch.linalg.solve_triangular(root, (taste - mean).T, upper=False).T
        attention = torch.cat((zero, place))
    pull = fit_pull(data, vectors)
    return Choice(x.numpy(), c.numpy(), pull, attention.numpy(), taste.numpy())


def fit_pull(data: Slates, vectors: NDArray[np.floating], strength: float = 0.1) -> NDArray[np.float64]:
    """(products,) probability that a click makes the shopper keener: a logistic regression of "browse" against "click"
    on the clicked product's vector. Clicks that ended in the cart say nothing of it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = np.flatnonzero((data.event == 1) | (data.event == 2))
    product, keener = data.product[known, data.clicked[known]], data.event[known] == 2
    if keener.all() or not keener.any():
        return np.full(len(vectors), float(np.mean(keener)) if len(keener) else 0.3)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200))
    return model.fit(vectors[product], keener).predict_proba(vectors)[:, 1]


def family_of(
    choice: Choice, family: SlateRecommendation, rows: Sequence[int], prior: SegmentPrior | None = None
) -> SlateRecommendation:
    """The decision problem as the shop believes it to be: ``family``'s margins and funnel for the products ``rows``,
    with ``choice``'s estimates of what shoppers see in them.

    ``family`` has as many items as ``rows``. Its features, appeal, pull and tastes are not read. The prior of tastes is
    standard normal, as in the fit; the ranges of position bias and leaving are those of ``family``.
    """
    rows = np.asarray(rows)
    require(len(rows) == family.items, "rows", len(rows), f"a product for each of the {family.items} items")
    own = choice.features[rows]
    if prior is None:
        prior = replace(family.prior, types=1, centre=0.0, deviation=1.0)
    catalogue = Catalogue(
        family.table.margin,
        tuple(own.flatten().tolist()),
        tuple(choice.appeal[rows].tolist()),
        tuple(np.clip(choice.pull[rows], 0, 1).tolist()),
    )
    return replace(family, catalogue=catalogue, prior=prior)
