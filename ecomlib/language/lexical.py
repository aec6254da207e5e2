"""TF-IDF: texts as weighted counts of their words and letters, the baseline beside every encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import FeatureUnion

from ..families.base import require, whole


class TfIdf:
    """Words, pairs of words and runs of 3 to 5 letters, each weighted by how rare it is in the texts of ``fit``.

    It has the face of an ``Encoder`` (``name``, ``size``, ``embed``), so that either can stand where the other does.
    """

    name = "TF-IDF"

    def __init__(self, texts: Sequence[str], features: int = 20_000):
        """Learns vocabulary and weights from ``texts``, keeping the ``features`` most frequent of either kind."""
        require(len(texts) > 0, "texts", texts, "at least one text")
        require(whole(features, 1, 10**6), "features", features, "a whole number in 1..1,000,000")
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=features)
        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, max_features=features)
        self.union = FeatureUnion([("words", words), ("letters", letters)]).fit(texts)
        self.size = len(self.union.get_feature_names_out())

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, size) vectors of length 1; a text without a known word or run of letters is 0."""
        found = self.union.transform(texts)
        length = np.sqrt(np.asarray(found.multiply(found).sum(1)).ravel())
        return (found.toarray() / np.maximum(length, 1e-12)[:, None]).astype(np.float32)
