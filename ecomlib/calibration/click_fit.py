"""How well calibrated odds of a click predict pairs of shopper and item that were not seen, and pictures of the fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import gammaln, ndtr

from ..plotting import COLOURS
from .clicks import Cells, exposures
from .rates import fit_rates
from .report import score_table, two_panels
from .service import log_ticks
from .shrinkage import Array

if TYPE_CHECKING:
    from .recommendation import RecommendationCalibration


def held_out_clicks(data: Cells, attention: Array, taste_sd: float) -> pd.DataFrame:
    """Rates from four fifths of the pairs of shopper and item, scored on the clicks of the others."""
    clicks, exposure = data.clicked.sum(1), exposures(data, attention)
    held = np.random.default_rng(0).permutation(len(clicks)) % 5 == 4
    seen = ~held
    items = int(data.item.max()) + 1
    y, e = (np.bincount(data.item[seen], x[seen], items) for x in (clicks, exposure))
    overall = np.log(max(y.sum(), 0.5) / e.sum())
    population = fit_rates(y[e > 0], e[e > 0])
    own = np.full(items, population.mean)
    own[e > 0] = population.log_rate
    spread = np.full(items, np.hypot(population.sd, taste_sd))  # of an item that was not seen
    spread[e > 0] = taste_sd
    node, weight = np.polynomial.hermite_e.hermegauss(40)
    weight = weight / weight.sum()
    y, e, item = clicks[held], exposure[held], data.item[held]

    def score(log_mean: Array, sd: Array) -> Array:
        rate = log_mean[:, None] + sd[:, None] * node - sd[:, None] ** 2 / 2
        terms = y[:, None] * (rate + np.log(e)[:, None]) - np.exp(rate) * e[:, None] - gammaln(y + 1)[:, None]
        return np.log(np.exp(terms) @ weight)

    none = np.zeros(held.sum())
    found = {
        "one rate for all": score(overall + none, none),
        "items differ": score(own[item], np.where(spread[item] > taste_sd, population.sd, 0.0)),
        "items and tastes differ": score(own[item], spread[item]),
    }
    return score_table(found)


def plot_clicks(found: RecommendationCalibration, axes=None):
    """Two panels: attention by position with two standard errors; click rates of items, and what the spread says.

    Args:
        found: the calibration.
        axes: two matplotlib axes, or None for a new figure.

    Returns:
        The matplotlib figure.
    """
    left, right = two_panels(axes)
    model, data = COLOURS["model"], COLOURS["data"]
    p, place = found.positions, np.sort(found.log["position"].unique())
    error = 2 * np.nan_to_num(p.error) * np.nan_to_num(p.attention)
    left.errorbar(place, p.attention, error, fmt="o", color=data, capsize=4, label="table, two standard errors")
    if np.isfinite(p.bias):
        steps = np.arange(1, max(len(place), len(found.config.places)) + 1)
        usual = np.array([*found.config.places, *[found.config.places[-1]] * len(steps)])[: len(steps)]
        left.plot(steps, usual**p.bias, "-", color=model, label=f"places to the power {p.bias:.2f}")
    left.set(xlabel="place", ylabel="clicks against the first place", ylim=(0, None))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)

    by_item = found.log.groupby("item")[["impressions", "clicks"]].sum()
    by_item = by_item[by_item["impressions"] > 0]
    fitted = fit_rates(by_item["clicks"].to_numpy(), by_item["impressions"].to_numpy())
    order = 1000 * np.sort(np.exp(fitted.log_rate))
    right.plot(order, (np.arange(len(order)) + 0.5) / len(order), "o", color=data, label="items, shrunk")
    grid = np.linspace(-3, 3, 200)
    sd = max(found.spreads.appeal_sd, 1e-3)
    right.plot(1000 * np.exp(fitted.mean + sd * grid), ndtr(grid), "-", color=model, label="spread found")
    right.set(xlabel="clicks per 1,000 impressions", ylabel="share of items with at most that", xscale="log")
    log_ticks(right.xaxis)
    right.legend(frameon=False)
    return left.figure
