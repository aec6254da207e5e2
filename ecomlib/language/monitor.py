"""Headlines by topic and sentiment, and the streams that a monitor watches (chapter "Language applications")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ..calibration.tables import TableError, refuse
from ..families.base import check, number, require, whole
from .cusum import Source
from .headline_text import HEADLINES, PREFIXES, SLOTS, SUFFIXES
from .templates import fill
from .text_tables import read_texts

SENTIMENTS = ("negative", "neutral", "positive")
"""What a headline is to somebody who holds the firm's shares or bonds."""
TOPICS = tuple(dict.fromkeys(name.split("/")[0] for name in HEADLINES))
"""Topics of the generated headlines."""


@dataclass(frozen=True)
class HeadlineGenerator:
    """Headlines about made-up firms: 8 topics, 3 sentiments, 9 wordings of each, with slots. Generated text."""

    renderings: int = 4
    """Headlines made from each wording."""
    trimmings: float = 0.4
    """Chance of a word before the headline; the same again of some after it."""

    def __post_init__(self):
        check(self, "renderings", lambda x: whole(x, 1, 1000), "a whole number in 1..1000")
        check(self, "trimmings", lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")

    def headlines(self, seed: int = 0) -> pd.DataFrame:
        """Columns headline, topic, sentiment, wording (0..8 within topic and sentiment), a row for each rendering."""
        rows = []
        for entry, (name, (_, wordings)) in enumerate(HEADLINES.items()):
            for wording, text in enumerate(wordings):
                for copy in range(self.renderings):
                    generator = np.random.default_rng((seed, entry, wording, copy))
                    before, after = (generator.random(2) < self.trimmings).tolist()
                    text_ = str(generator.choice(PREFIXES)) * before + text + str(generator.choice(SUFFIXES)) * after
                    filled = fill(text_, SLOTS, generator)
                    rows.append((filled[0].upper() + filled[1:], *name.split("/"), wording))
        return pd.DataFrame(rows, columns=["headline", "topic", "sentiment", "wording"])


def load_headlines(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    """A reader's own headlines from a DataFrame, `.csv`, `.csv.gz` or `.parquet`, in the order of their dates.

    ==========  =============================================================
    Column      Allowed
    ==========  =============================================================
    date        ISO dates such as 2024-01-31, with or without a time
    text        text of 1 to 5,000 characters
    topic       optional: text
    sentiment   optional: negative, neutral or positive
    ==========  =============================================================

    Returns date (midnight, without a zone), text and what else is there. Raises TableError naming column and row.
    """
    first = read_texts(source, ["date", "text"], ["text"], "at least one headline")
    labels = [name for name in ("topic", "sentiment") if name in first.columns]
    table = read_texts(first, ["date", "text", *labels], ["text", *labels], "at least one headline")
    allowed = "ISO dates such as 2024-01-31"
    if pd.api.types.is_numeric_dtype(table["date"]):
        raise TableError(f"column 'date': {len(table)} rows of {table['date'].dtype}; allowed: {allowed}")
    date = pd.to_datetime(table["date"].astype(str).str[:10], errors="coerce", format="%Y-%m-%d")
    refuse(table, (), "date", date.isna(), "not a date", allowed)
    if "sentiment" in labels:
        unknown = ~table["sentiment"].isin(SENTIMENTS)
        refuse(table, (), "sentiment", unknown, "of an unknown label", " or ".join(SENTIMENTS))
    table["date"] = date
    return table[["date", "text", *labels]].sort_values("date", kind="stable", ignore_index=True)


def split_wordings(table: pd.DataFrame, seed: int, train: int = 5) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of ``train`` wordings of each topic and sentiment, and of the others: a wording is never in both."""
    require(whole(train, 1), "train", train, "a whole number >= 1")
    early = np.zeros(len(table), dtype=bool)
    for place, (name, rows) in enumerate(table.groupby(["topic", "sentiment"], sort=True).indices.items()):
        wordings = pd.unique(table["wording"].to_numpy()[rows])
        require(len(wordings) > train, f"wordings of {name}", len(wordings), f"more than train = {train}")
        chosen = np.random.default_rng((seed, place)).permutation(wordings)[:train]
        early[rows] = table["wording"].iloc[rows].isin(chosen)
    return np.flatnonzero(early), np.flatnonzero(~early)


def vader_sentiment(texts: Sequence[str], cut: float = 0.05) -> NDArray[np.object_]:
    """(texts,) sentiment by the lexicon VADER (Hutto and Gilbert 2014): its compound score above ``cut`` is positive,
    below -``cut`` negative. It needs no training, and no topic.

    Raises ImportError with the command to install it where the package vaderSentiment is missing.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("VADER is not installed; to install it: pip install vaderSentiment==3.3.2") from error
    analyser = SentimentIntensityAnalyzer()
    score = np.array([analyser.polarity_scores(text)["compound"] for text in texts])
    return np.where(score <= -cut, "negative", np.where(score >= cut, "positive", "neutral")).astype(object)


# ----------------------------------------------------------------------------------------------- streams
@dataclass(frozen=True)
class NewsStream:
    """Days of headlines on every topic; from a hidden day on, the share of negatives of one topic is higher."""

    daily: int = 10
    """Headlines a day on each topic."""
    quiet: float = 0.15
    """Share of negatives while all is well; the others are neutral or positive, half and half."""
    alarming: float = 0.5
    """Share of negatives of one topic after the change."""

    def __post_init__(self):
        check(self, "daily", lambda x: whole(x, 1, 1000), "a whole number in 1..1000")
        check(self, "quiet", lambda x: number(x, 0, 1), "a number in (0, 1)")
        check(self, "alarming", lambda x: number(x, self.quiet, 1), f"a number in (quiet = {self.quiet}, 1)")

    def draw(
        self, table: pd.DataFrame, topic: str, change: int, days: int, streams: int, seed: int
    ) -> NDArray[np.int64]:
        """(streams, days, headlines) rows of ``table``, headlines of every topic of it; from day ``change`` on (from 0)
        those on ``topic`` are ``alarming``. A change at ``days`` is none. Rows are drawn with replacement."""
        require(whole(streams * days * self.daily, 1, 10**8), "streams", streams, "at most 1e8 headlines of a topic")
        generator, drawn = np.random.default_rng(seed), []
        for name, pools in self._pools(table).items():
            share = np.where((np.arange(days) >= change) & (name == topic), self.alarming, self.quiet)[:, None]
            shape = (streams, days, self.daily)
            negative, half = generator.random(shape) < share, generator.random(shape) < 0.5
            sentiment = np.where(negative, 0, np.where(half, 1, 2))
            place, rows = generator.random(shape), np.zeros(shape, np.int64)
            for number_, pool in enumerate(pools):
                rows = np.where(sentiment == number_, pool[(place * len(pool)).astype(np.int64)], rows)
            drawn.append(rows)
        return np.concatenate(drawn, -1)

    def day(
        self, table: pd.DataFrame, negative: ArrayLike, counted: ArrayLike, topic: str | None = None
    ) -> list[Source]:
        """The law of a day for ``Cusum``: a quiet one, or after the change of ``topic``. ``counted`` (rows,) says which
        rows of ``table`` the monitor counts (as its topic), ``negative`` (rows,) which of them as negative."""
        counted = np.asarray(counted, dtype=bool)
        negative = np.asarray(negative, dtype=bool) & counted
        sources = []
        for name, pools in self._pools(table).items():
            share = self.alarming if name == topic else self.quiet
            weights = (share, (1 - share) / 2, (1 - share) / 2)
            chance = [
                float(sum(w * mask[pool].mean() for w, pool in zip(weights, pools))) for mask in (negative, counted)
            ]
            sources.append(Source(self.daily, *chance))
        return sources

    def _pools(self, table: pd.DataFrame) -> dict[str, list[NDArray[np.int64]]]:
        groups = table.groupby(["topic", "sentiment"], sort=True).indices
        topics = sorted(table["topic"].unique())
        for name in topics:
            for sentiment in SENTIMENTS:
                require((name, sentiment) in groups, "table", (name, sentiment), "headlines of every sentiment")
        return {name: [groups[name, sentiment] for sentiment in SENTIMENTS] for name in topics}


def seen_share(share: float, hit_rate: float, false_rate: float) -> float:
    """Share of headlines that a classifier calls negative, equation (eq-seen-share): it finds ``hit_rate`` of the
    negative ones and calls ``false_rate`` of the others negative."""
    return share * hit_rate + (1 - share) * false_rate


def error_rates(predicted: ArrayLike, truth: ArrayLike, weights: ArrayLike | None = None) -> tuple[float, float]:
    """(hit rate, false rate) of "negative" from sentiments (rows,). Raises ValueError where a rate has no rows."""
    called, negative = np.asarray(predicted) == "negative", np.asarray(truth) == "negative"
    require(0 < negative.sum() < len(negative), "truth", f"{negative.sum()} negative", "some negative, some not")
    weights = np.ones(len(called)) if weights is None else np.asarray(weights)
    rate = lambda mask: float(np.average(called[mask], weights=weights[mask]))
    return rate(negative), rate(~negative)
