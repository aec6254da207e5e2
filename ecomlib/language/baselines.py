"""Event predictions without fine-tuning: rates by place, words as indicators, a linear head on fixed product vectors
(chapter "Behaviour prediction with a pretrained encoder")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from ..families.base import require
from .behaviour import EVENTS
from .features import PLACES, impression_features
from .metrics import event_losses

STRENGTHS = (3e-5, 3e-4, 0.003, 0.03, 0.3, 3.0)
"""Inverse strengths of the penalty that are tried on the validation part."""
LIGHT = 10.0
"""The last seven columns of ``impression_features`` (place, slate, counts) are few and matter: after standardising they
are multiplied by this, so that a penalty strong enough for hundreds of text columns hardly touches them."""


class Features(Protocol):
    """Rows of numbers for impressions."""

    def __call__(self, events: pd.DataFrame) -> Any:
        """(rows, F), dense or sparse; rows in the order of ``events``."""


def place_rates(events: pd.DataFrame) -> Callable[[pd.DataFrame], NDArray[np.float64]]:
    """The shares of the events at each place of the slate in ``events``, each counted once more than it came: a
    function of other events to probabilities (rows, 5). It reads no text, so a model that reads has to beat it."""
    counts = np.ones((PLACES, len(EVENTS)))
    at = lambda table: np.minimum(table["place"].to_numpy(), PLACES - 1)
    np.add.at(counts, (at(events), events["event"].to_numpy()), 1.0)
    rates = counts / counts.sum(1, keepdims=True)
    return lambda table: rates[at(table)]


class Linear(NamedTuple):
    """Multinomial logistic regression on features, its penalty chosen on a validation part."""

    features: Features
    scaler: StandardScaler | None
    """Of dense features; TF-IDF has its scale, and a rare word must not be blown up."""
    model: LogisticRegression
    strength: float
    """The inverse penalty that was chosen."""
    losses: dict[float, float]
    """Validation log-loss of an impression for each one tried, nats."""

    def probabilities(self, events: pd.DataFrame) -> NDArray[np.float64]:
        """(rows, 5) in the order of ``events``."""
        return _all_events(self.model, _scaled(self.scaler, self.features(events)))

    @property
    def parameters(self) -> int:
        """Numbers that were fitted."""
        return self.model.coef_.size + self.model.intercept_.size


def fit_linear(
    features: Features,
    train: pd.DataFrame,
    validation: pd.DataFrame,
    strengths: Sequence[float] = STRENGTHS,
    balanced: bool = False,
    steps: int = 200,
    progress: bool = False,
) -> Linear:
    """Fit for every strength on ``train``; keep the one with the best log-loss on ``validation``.

    Dense features, those of ``vector_features``, are standardised by the training part (see LIGHT), sparse ones taken
    as they are. ``balanced`` gives every event the same total weight, without a correction: what that does to
    calibration is in the chapter.
    """
    require(len(strengths) > 0, "strengths", strengths, "at least one number > 0")
    own = features(train)
    scaler = None if sparse.issparse(own) else StandardScaler().fit(own)
    own, other = _scaled(scaler, own), _scaled(scaler, features(validation))
    y, y_other, models, losses = train["event"].to_numpy(), validation["event"].to_numpy(), {}, {}
    for strength in tqdm(sorted(strengths), desc="penalties", disable=not progress):
        weight = "balanced" if balanced else None
        models[strength] = LogisticRegression(C=strength, class_weight=weight, max_iter=steps, tol=1e-3).fit(own, y)
        losses[strength] = float(event_losses(y_other, _all_events(models[strength], other)).mean())
    best = min(losses, key=losses.get)
    return Linear(features, scaler, models[best], best, losses)


def _scaled(scaler: StandardScaler | None, rows: Any) -> Any:
    if scaler is None:
        return rows
    rows = scaler.transform(rows)
    rows[:, -(PLACES + 3) :] *= LIGHT
    return rows


def _all_events(model: LogisticRegression, rows: Any) -> NDArray[np.float64]:
    """(rows, 5), also where an event was not in the training part: it gets one in a million."""
    result = np.full((rows.shape[0], len(EVENTS)), 1e-6)
    result[:, model.classes_] = model.predict_proba(rows)
    return result / result.sum(1, keepdims=True)


def vector_features(vectors: NDArray[np.floating]) -> Features:
    """``features.impression_features`` of fixed product vectors (products, d)."""
    return lambda events: impression_features(events, vectors)


@dataclass(frozen=True)
class WordFeatures:
    """TF-IDF (Spärck Jones 1972; Salton and Buckley 1988) of the product shown, of the products acted on and skipped
    before, entry-wise products of the first with the others, their cosines, place and counts: (rows, 5 v + 9) sparse.
    """

    words: sparse.csr_matrix
    """(products, v) TF-IDF of each product's words and pairs of words, rows of length 1."""
    vocabulary: tuple[str, ...]
    """The v terms."""

    def __call__(self, events: pd.DataFrame) -> sparse.csr_matrix:
        """Rows in the order of ``events``, whose columns are those of ``behaviour.Log``."""
        acted, skipped = earlier(events)
        shown = self.words[events["product"].to_numpy()]
        liked, passed = (_mean_rows(matrix) @ shown for matrix in (acted, skipped))
        both, neither = shown.multiply(liked), shown.multiply(passed)
        place = np.minimum(events["place"].to_numpy(), PLACES - 1)[:, None] == np.arange(PLACES)
        counts = [np.log1p(matrix.sum(1)) for matrix in (acted, skipped)]
        cosines = [np.asarray(x.sum(1)) / _lengths(y) for x, y in ((both, liked), (neither, passed))]
        slate = events["slate"].to_numpy()[:, None] / 10
        others = np.concatenate((place, slate, *counts, *cosines), 1).astype(np.float64)
        return sparse.hstack((shown, liked, passed, both, neither, others), format="csr")


def word_features(texts: Sequence[str], fit_rows: Sequence[int], fewest: int = 2) -> WordFeatures:
    """Word features whose vocabulary and weights come from the texts ``fit_rows`` alone, those sold in training. Terms
    that fewer than ``fewest`` of them have are left out."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=fewest)
    texts = list(texts)
    vectorizer.fit([texts[row] for row in fit_rows])
    words = sparse.csr_matrix(vectorizer.transform(texts))
    return WordFeatures(words, tuple(vectorizer.get_feature_names_out()))


def earlier(events: pd.DataFrame) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Two (rows, rows) indicators: for each impression, those of *earlier* slates of its session that the shopper acted
    on, and those not. Nothing of the same slate or of later ones is in them."""
    n = len(events)
    session, slate, event = (events[name].to_numpy() for name in ("session", "slate", "event"))
    order = np.lexsort((slate, session))
    session, slate = session[order], slate[order]
    new_session = np.r_[True, session[1:] != session[:-1]]
    new_slate = new_session | np.r_[True, slate[1:] != slate[:-1]]
    first = lambda new: np.maximum.accumulate(np.where(new, np.arange(n), 0))
    start, end = first(new_session), first(new_slate)
    length = end - start
    row = np.repeat(np.arange(n), length)
    column = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length) + np.repeat(start, length)
    acted = event[order][column] > 0
    matrix = lambda mask: sparse.csr_matrix((np.ones(mask.sum()), (order[row[mask]], order[column[mask]])), (n, n))
    return matrix(acted), matrix(~acted)


def _mean_rows(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Each row divided by its sum, where there is one."""
    return sparse.diags(1 / np.maximum(np.asarray(matrix.sum(1))[:, 0], 1)) @ matrix


def _lengths(matrix: sparse.csr_matrix) -> NDArray[np.float64]:
    """(rows, 1) lengths of rows; 1 where a row is 0."""
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)))
    return np.where(length > 0, length, 1.0)
