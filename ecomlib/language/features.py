"""What a session so far says of the next products, as one row of numbers for each impression (chapter "Behaviour
prediction with a pretrained encoder", equation (eq-session-features))."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..families.base import require, whole

PLACES = 4
"""Places of a slate that are told apart; later ones count as the last."""


def impression_features(events: pd.DataFrame, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """(rows, 5 d + 7) features of the impressions ``events`` from product vectors (products, d).

    ==============  ==============================================================================================
    Columns         Meaning
    ==============  ==============================================================================================
    d               c, the vector of the product shown
    d               h+, mean vector of the products that the shopper acted on in *earlier* slates of the session
    d               h-, mean vector of those shown in earlier slates without an event
    d, d            c h+ and c h-, entry by entry
    4               place in the slate, one indicator each
    1               slates before this one, divided by 10
    2               log(1 + products acted on), log(1 + products not acted on), in earlier slates
    ==============  ==============================================================================================

    ``events`` has the columns session, slate, place, product, event of ``behaviour.Log`` in any order; rows keep it.
    """
    n, d = len(events), vectors.shape[1]
    order = np.lexsort((events["slate"].to_numpy(), events["session"].to_numpy()))
    session, slate = (events[name].to_numpy()[order] for name in ("session", "slate"))
    product, acted = events["product"].to_numpy()[order], events["event"].to_numpy()[order] > 0
    require(n == 0 or product.max() < len(vectors), "vectors", len(vectors), "a row for every product of the events")
    rows = np.asarray(vectors, np.float32)[product]
    new_session = np.flatnonzero(np.r_[True, session[1:] != session[:-1]]) if n else np.zeros(0, int)
    new_slate = np.r_[True, (session[1:] != session[:-1]) | (slate[1:] != slate[:-1])] if n else np.zeros(0, bool)
    first_of_session = np.repeat(new_session, np.diff(np.r_[new_session, n]))
    first_of_slate = np.maximum.accumulate(np.where(new_slate, np.arange(n), 0))

    def before(values: NDArray) -> NDArray:
        """Sums over the session's earlier slates."""
        total = np.concatenate((np.zeros((1, *values.shape[1:])), np.cumsum(values, 0, dtype=np.float64)))
        return total[first_of_slate] - total[first_of_session]

    found, means = [rows], []
    counts = [before(mask.astype(np.float64)) for mask in (acted, ~acted)]
    for mask, count in zip((acted, ~acted), counts):
        means.append((before(rows * mask[:, None]) / np.maximum(count, 1)[:, None]).astype(np.float32))
    place = np.minimum(events["place"].to_numpy()[order], PLACES - 1)[:, None] == np.arange(PLACES)
    others = np.column_stack((place, slate / 10, *(np.log1p(count) for count in counts))).astype(np.float32)
    found += [*means, rows * means[0], rows * means[1], others]
    result = np.empty((n, 5 * d + PLACES + 3), np.float32)
    result[order] = np.concatenate(found, 1)
    return result


def reduced(vectors: NDArray[np.floating], fit_rows: Sequence[int], components: int) -> NDArray[np.float32]:
    """(products, components) principal components, scaled to variance 1 over ``fit_rows``: the products whose texts may
    be used to find them (those sold in training)."""
    from sklearn.decomposition import PCA

    most = min(len(fit_rows), vectors.shape[1])
    require(whole(components, 1, most), "components", components, f"a whole number in 1..{most}")
    pca = PCA(components, whiten=True, svd_solver="full").fit(np.asarray(vectors, np.float64)[np.asarray(fit_rows)])
    return pca.transform(np.asarray(vectors, np.float64)).astype(np.float32)


def tfidf_vectors(texts: Sequence[str], fit_rows: Sequence[int], components: int) -> NDArray[np.float32]:
    """(texts, components) latent semantic vectors of length at most 1: TF-IDF of words and pairs of words, then a
    truncated singular value decomposition, both fitted on ``fit_rows`` alone."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    chosen = [texts[row] for row in fit_rows]
    svd = TruncatedSVD(components, random_state=0)
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), svd).fit(chosen)
    return pipeline.transform(list(texts)).astype(np.float32)
