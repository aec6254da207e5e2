"""How good predicted probabilities of events are: losses between base rate and ceiling, ranking, calibration (chapter
"Behaviour prediction with a pretrained encoder"). scikit-learn does the counting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, classification_report, f1_score

from ..evaluation.statistics import Interval, normalised_score
from ..families.base import require, whole
from .behaviour import EVENTS

Array = NDArray[np.float64]
LABELS = list(range(len(EVENTS)))


def event_losses(event: ArrayLike, probability: ArrayLike) -> Array:
    """(rows,) log-loss of each impression, in nats, from events (rows,) and probabilities (rows, 5). Raises ValueError
    where they do not fit, a label is unknown, or a row does not sum to 1."""
    event, probability = checked(event, probability)
    return -np.log(np.maximum(probability[np.arange(len(event)), event], np.finfo(float).tiny))


def event_score(event: ArrayLike, probability: ArrayLike, base: ArrayLike, exact: ArrayLike) -> float:
    """(base - loss) / (base - exact): 0 for the base rates (5,) or (rows, 5), 1 for the probabilities that generated
    the events, equation (eq-behaviour-score). A ratio of means over rows, as every score of the book."""
    event, probability = checked(event, probability)
    rates = np.broadcast_to(np.asarray(base, float), probability.shape)
    return normalised_score(*(-event_losses(event, p) for p in (probability, rates, exact)))


def score_interval(
    event: ArrayLike,
    probability: ArrayLike,
    base: ArrayLike,
    exact: ArrayLike,
    session: ArrayLike,
    level: float = 0.95,
    resamples: int = 999,
    seed: int = 0,
) -> Interval:
    """The score of one model with a percentile interval over resampled *sessions*: impressions of a session share a
    shopper, so they do not count as independent. ``n`` is the number of sessions."""
    event, probability = checked(event, probability)
    require(whole(resamples, 99, 100_000), "resamples", resamples, "a whole number from 99 to 100000")
    rates = np.broadcast_to(np.asarray(base, float), probability.shape)
    own, low, high = (event_losses(event, p) for p in (probability, rates, exact))
    number = pd.factorize(np.asarray(session))[0]
    above, gap = np.bincount(number, low - own), np.bincount(number, low - high)
    draw = np.random.default_rng(seed).integers(len(gap), size=(resamples, len(gap)))
    values = above[draw].sum(1) / gap[draw].sum(1)
    ends = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(above.sum() / gap.sum()), float(ends[0]), float(ends[1]), len(gap))


def decided(probability: ArrayLike, rates: ArrayLike | None = None) -> NDArray[np.int64]:
    """(rows,) one event for each impression: the likeliest or, given base rates (5,), the one that is likeliest
    *relative to its base rate*. Where one event is nine in ten, the first answers it almost always."""
    probability = np.asarray(probability, float)
    return (probability if rates is None else probability / np.asarray(rates)).argmax(-1)


def event_report(event: ArrayLike, predicted: ArrayLike) -> pd.DataFrame:
    """scikit-learn's classification report: precision, recall, F1 and support of each event, and their means."""
    report = classification_report(
        event, predicted, labels=LABELS, target_names=EVENTS, output_dict=True, zero_division=0.0
    )
    accuracy = report.pop("accuracy", None)
    table = pd.DataFrame(report).T
    if accuracy is not None:
        table.loc["accuracy", ["f1-score", "support"]] = accuracy, len(np.asarray(event))
    return table


def calibration(event: ArrayLike, probability: ArrayLike, bins: int = 10) -> pd.DataFrame:
    """Predicted and observed shares of "click or more", in bins of about equally many impressions."""
    event, probability = checked(event, probability)
    require(whole(bins, 1, len(event)), "bins", bins, f"1..{len(event)}")
    observed, predicted = calibration_curve(event > 0, 1 - probability[:, 0], n_bins=bins, strategy="quantile")
    return pd.DataFrame({"predicted": predicted, "observed": observed})


def summary(
    event: ArrayLike,
    probability: ArrayLike,
    rates: ArrayLike,
    exact: ArrayLike | None = None,
    groups: Mapping[str, NDArray[np.bool_]] | None = None,
    bins: int = 10,
) -> dict[str, dict[str, Any]]:
    """Group of rows -> log-loss, score (where the exact probabilities are known), PR-AUC of click or more beside its
    share, macro-F1 of ``decided`` with base rates, and the calibration curve. ``rates`` (5,) are the base rates of the
    training part."""
    event, probability = checked(event, probability)
    rates, found = np.asarray(rates, float), {}
    for name, rows in (groups or {"all": np.ones(len(event), bool)}).items():
        require(rows.any(), f"groups[{name!r}]", 0, "at least one row")
        own, truth = probability[rows], event[rows]
        base = np.broadcast_to(rates, own.shape)
        result = {
            "rows": int(rows.sum()),
            "log-loss": float(event_losses(truth, own).mean()),
            "base": float(event_losses(truth, base).mean()),
            "PR-AUC": float(average_precision_score(truth > 0, 1 - own[:, 0])),
            "acted": float((truth > 0).mean()),
            "macro-F1": float(f1_score(truth, decided(own, rates), labels=LABELS, average="macro", zero_division=0.0)),
            "macro-F1 likeliest": float(
                f1_score(truth, decided(own), labels=LABELS, average="macro", zero_division=0.0)
            ),
            "accuracy likeliest": float((decided(own) == truth).mean()),
            "calibration": calibration(truth, own, min(bins, len(own))).round(5).to_dict("list"),
        }
        if exact is not None:
            ceiling = np.asarray(exact, float)[rows]
            result["exact"] = float(event_losses(truth, ceiling).mean())
            result["score"] = _score_or_none(truth, own, base, ceiling)
            result["score of the click"] = _score_or_none(*map(_two, (truth, own, base, ceiling)))
        found[name] = result
    return found


def _score_or_none(event: Array, probability: Array, base: Array, exact: Array) -> float | None:
    """The score; None where a handful of rows suit the base rates better than the truth, by luck."""
    if event_losses(event, base).mean() <= event_losses(event, exact).mean():
        return None
    return event_score(event, probability, base, exact)


def _two(x: Array) -> Array:
    """Events as 0 or "click or more", written as the first two of five."""
    if x.ndim == 1:
        return (x > 0).astype(np.int64)
    none = x[:, :1]
    return np.concatenate((none, 1 - none, np.zeros((len(x), len(EVENTS) - 2))), 1)


def checked(event: ArrayLike, probability: ArrayLike) -> tuple[NDArray[np.int64], Array]:
    """Both as arrays that fit each other, or ValueError."""
    event, probability = np.asarray(event), np.asarray(probability, float)
    if event.ndim != 1 or probability.shape != (len(event), len(EVENTS)) or len(event) == 0:
        raise ValueError(
            f"events (rows,) and probabilities (rows, 5) needed, got {event.shape} and {probability.shape}"
        )
    unknown = ~np.isin(event, LABELS)
    if unknown.any():
        row = int(unknown.argmax())
        raise ValueError(
            f"event[{row}] = {event[row]}; allowed: 0..{len(EVENTS) - 1}, the numbers of {', '.join(EVENTS)}"
        )
    wrong = ~(np.isclose(probability.sum(1), 1, atol=1e-4) & (probability >= 0).all(1))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"probability[{row}] = {probability[row]}; allowed: 5 numbers >= 0 of sum 1")
    return event.astype(np.int64), probability
