"""How good predicted click rates are: losses, ranking, calibration, with intervals (chapter "Click-rate prediction with
MAML")."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score

from ..families.base import require, whole

Array = NDArray[np.float64]


def row_losses(label: ArrayLike, rate: ArrayLike) -> Array:
    """(rows,) cross-entropy of each label under its predicted rate, in nats. Raises ``ValueError`` where a label is not
    0 or 1, or a rate not strictly between."""
    label, rate = _rows(label, rate)
    return -np.where(label == 1, np.log(rate), np.log1p(-rate))


def log_loss(label: ArrayLike, rate: ArrayLike) -> float:
    """Mean cross-entropy of an impression, in nats; scikit-learn's ``log_loss``."""
    return float(row_losses(label, rate).mean())


def entropy(rate: float) -> float:
    """Of a click that has this probability, in nats; 0 at 0 and 1."""
    parts = [p * np.log(p) for p in (rate, 1 - rate) if p > 0]
    return float(-sum(parts))


def normalised_entropy(label: ArrayLike, rate: ArrayLike) -> float:
    """Log-loss by the entropy of the observed click rate, equation (eq-click-entropy): 1 for who predicts that rate,
    below 1 is better (He et al. 2014). Raises ``ValueError`` without a click, or with nothing else."""
    label, rate = _rows(label, rate)
    require(0 < label.mean() < 1, "clicks", int(label.sum()), f"some of the {len(label)} labels, and not all")
    return log_loss(label, rate) / entropy(float(label.mean()))


def average_precision(label: ArrayLike, rate: ArrayLike) -> float:
    """Area under the precision-recall curve, scikit-learn's; a random order has the click rate."""
    label, rate = _rows(label, rate)
    require(label.sum() > 0, "clicks", 0, "at least one")
    return float(average_precision_score(label, rate))


def predicted_per_click(label: ArrayLike, rate: ArrayLike) -> float:
    """Clicks that were predicted for each that came: 1 is calibrated as a whole."""
    label, rate = _rows(label, rate)
    require(label.sum() > 0, "clicks", 0, "at least one")
    return float(rate.sum() / label.sum())


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "log-loss": log_loss,
    "normalised entropy": normalised_entropy,
    "PR-AUC": average_precision,
    "predicted / clicks": predicted_per_click,
}
"""Name -> function of labels and rates."""


def bootstrap(
    label: ArrayLike,
    rates: Mapping[str, ArrayLike],
    blocks: ArrayLike,
    reference: str,
    metrics: Mapping[str, Callable[[ArrayLike, ArrayLike], float]] | None = None,
    resamples: int = 399,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Metrics of several predictions of the same rows, and their differences from one of them, with intervals.

    Whole blocks of rows (say, the hours of a log) are drawn with replacement, since what one user sees together is not
    independent; all predictions are judged on the same resamples. The intervals are percentiles: right for some
    hundreds of blocks, too short for a handful.

    Returns one row per metric and prediction: metric, model, estimate, low, high, and the paired difference from the
    ``reference``, difference, difference_low, difference_high (0 for the reference itself).

    Raises:
        ValueError: rows do not match, no such reference, or fewer than 2 blocks.
    """
    label = np.asarray(label, dtype=float)
    rates = {name: _rows(label, rate)[1] for name, rate in rates.items()}
    require(reference in rates, "reference", reference, f"one of {', '.join(rates)}")
    require(whole(resamples, 99, 10**5), "resamples", resamples, "a whole number from 99 to 100,000")
    number = pd.factorize(np.asarray(blocks))[0]
    require(len(number) == len(label), "blocks", len(number), f"one for each of {len(label)} rows")
    require(number.max() > 0, "blocks", int(number.max()) + 1, "at least 2 different ones")
    members = np.split(np.argsort(number, kind="stable"), np.bincount(number).cumsum()[:-1])
    generator = np.random.default_rng(seed)
    draws = [np.concatenate([members[b] for b in generator.integers(len(members), size=len(members))])
             for _ in range(resamples)]  # fmt: skip
    found = []
    for metric, function in (METRICS if metrics is None else metrics).items():
        values = {name: np.array([function(label[d], rate[d]) for d in draws]) for name, rate in rates.items()}
        exact = {name: function(label, rate) for name, rate in rates.items()}
        for name in rates:
            low, high = _ends(values[name], level)
            change = _ends(values[name] - values[reference], level)
            found.append((metric, name, exact[name], low, high, exact[name] - exact[reference], *change))
    columns = ["metric", "model", "estimate", "low", "high", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(found, columns=columns)


def calibration(
    label: ArrayLike, rate: ArrayLike, bins: int = 5, resamples: int = 399, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """The calibration curve of scikit-learn with bins of about equal numbers of impressions: predicted, observed, low,
    high (the interval of the observed rate by a bootstrap of rows), impressions, clicks."""
    label, rate = _rows(label, rate)
    require(whole(bins, 1, len(label)), "bins", bins, f"1 to {len(label)}")
    observed, predicted = calibration_curve(label, rate, n_bins=bins, strategy="quantile")
    edges = np.percentile(rate, np.linspace(0, 1, bins + 1) * 100)
    place = np.searchsorted(edges[1:-1], rate)
    generator, found = np.random.default_rng(seed), []
    for b, rows in enumerate(place == b for b in np.unique(place)):
        count, clicks = int(rows.sum()), int(label[rows].sum())
        low, high = _ends(generator.binomial(count, clicks / count, resamples) / count, level)
        found.append((predicted[b], observed[b], low, high, count, clicks))
    return pd.DataFrame(found, columns=["predicted", "observed", "low", "high", "impressions", "clicks"])


def impressions_needed(label: ArrayLike, rate: ArrayLike, other: ArrayLike, gain: float, level_z: float = 2.8) -> float:
    """Impressions for a difference in log-loss of ``gain`` times that of ``other`` to be seen, with the spread that the
    differences of single impressions have here. 2.8 standard errors: 80 % power at 5 %."""
    difference = row_losses(label, rate) - row_losses(label, other)
    require(gain > 0, "gain", gain, "above 0")
    return float((level_z * difference.std(ddof=1) / (gain * log_loss(label, other))) ** 2)


def _ends(values: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _rows(label: ArrayLike, rate: ArrayLike) -> tuple[Array, Array]:
    label, rate = np.asarray(label, dtype=float), np.asarray(rate, dtype=float)
    if label.ndim != 1 or label.shape != rate.shape or len(label) == 0:
        raise ValueError(f"labels and rates must be two lists of the same rows, got shapes {label.shape}, {rate.shape}")
    if not np.isin(label, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    if not ((rate > 0) & (rate < 1)).all():
        raise ValueError(
            "rates must lie strictly between 0 and 1: a certain prediction that fails costs infinitely much"
        )
    return label, rate
