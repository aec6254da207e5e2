"""Clicks by shopper, item and position: reading them, the position effect, and how odds of a click spread between items
and tastes (chapter "Recommendation")."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .shrinkage import Array
from .tables import at_most, counts, identifiers, numbers, read_table, refuse

GROUPS = 20
"""Groups of shoppers, and of items, that the jackknife leaves out one at a time."""


class Cells(NamedTuple):
    """Impressions and clicks of C pairs of shopper and item, by J positions."""

    shopper: Array
    """(C,) number of the shopper, from 0."""
    item: Array
    """(C,) number of the item, from 0."""
    shown: Array
    """(C, J) impressions."""
    clicked: Array
    """(C, J) clicks."""


class Positions(NamedTuple):
    """How attention falls with the position."""

    attention: Array
    """(J,) click rate of each position over that of the first, other things equal."""
    error: Array
    """(J,) standard error of the logarithm of `attention`."""
    bias: float
    """The exponent b for which the attentions are nearest to places^b; nan where the table cannot tell."""
    bias_error: float
    bias_sd: float
    """Standard deviation of b between shoppers, the noise taken off."""


class Spreads(NamedTuple):
    """Odds of a click and how they differ. A spread is what log-normal odds with the same first two moments have."""

    odds: float
    """Mean odds, against no click on the slate, of a click on an item at the first position."""
    appeal_sd: float
    """Standard deviation of the log odds between items, for the average shopper."""
    taste_sd: float
    """Standard deviation of the log odds between shoppers, for one item; nan with a single shopper."""
    odds_error: float
    """Standard error of log `odds`; the errors are by jackknife over shoppers and over items."""
    appeal_error: float
    taste_error: float


def read_clicks(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    """Read and check a table with one row per shopper, item and position. The input is never modified.

    ===========  ========  =============================================================================
    Column       Needed    Meaning and allowed values
    ===========  ========  =============================================================================
    item         required  any identifier
    impressions  required  times the item was shown there, a whole number >= 0
    clicks       required  a whole number from 0 to `impressions`
    shopper      optional  any identifier of a shopper, or of a segment; missing: one segment
    position     optional  place in the slate, a whole number from 1, 1 the best; missing: all in place 1
    carts        optional  clicks that put the item in the cart, a whole number from 0 to `clicks`
    orders       optional  carts that were bought, a whole number from 0 to `carts`
    ===========  ========  =============================================================================

    Rows of the same shopper, item and position are added up.

    Raises:
        TableError: (a `ValueError`) naming the column, the number of offending rows, the first of them (counted from
            1, header not counted) and what is allowed.
    """
    table = read_table(source, ("item", "impressions", "clicks"), "one row per shopper, item and position")
    keys = tuple(name for name in ("shopper", "item", "position") if name in table)
    for name in ("shopper", "item"):
        if name in table:
            identifiers(table, keys, name, f"any identifier, one per {name}")
    counts(table, keys, "impressions")
    counts(table, keys, "clicks")
    at_most(table, keys, "clicks", "impressions")
    if "position" in table:
        numbers(
            table, keys, "position", lambda x: (x >= 1) & (x == np.floor(x)) & (x <= 100), "whole numbers, 1 to 100"
        )
    if "carts" in table:
        counts(table, keys, "carts")
        at_most(table, keys, "carts", "clicks")
    if "orders" in table:
        nowhere = pd.Series("carts" not in table, table.index)
        refuse(table, keys, "orders", nowhere, "without a column 'carts'", "orders together with carts")
        counts(table, keys, "orders")
        at_most(table, keys, "orders", "carts")
    if "shopper" not in table:
        table["shopper"] = "all"
    if "position" not in table:
        table["position"] = 1.0
    measures = [name for name in ("impressions", "clicks", "carts", "orders") if name in table]
    return table.groupby(["shopper", "item", "position"], as_index=False)[measures].sum()


def cells(table: pd.DataFrame) -> Cells:
    """The table with one row for each pair of shopper and item that was shown something."""
    places = np.sort(table["position"].unique())
    pair = table.groupby(["shopper", "item"]).ngroup().to_numpy()
    shown, clicked = (np.zeros((pair.max() + 1, len(places))) for _ in range(2))
    column = np.searchsorted(places, table["position"])
    shown[pair, column], clicked[pair, column] = table["impressions"], table["clicks"]
    first = np.unique(pair, return_index=True)[1]
    shopper, item = (pd.factorize(table[name])[0][first] for name in ("shopper", "item"))
    some = shown.sum(1) > 0
    return Cells(shopper[some], item[some], shown[some], clicked[some])


def fit_positions(data: Cells, places: Array) -> Positions:
    """Conditional maximum likelihood: of the clicks of a shopper on an item, the share that falls on each position.

    Given their number, the clicks of one cell are multinomial with shares proportional to impressions x attention, so
    whatever the shopper thinks of the item cancels out; this also holds where the merchant showed liked items first.
    ``places`` (J,) are the attentions at a bias of 1.
    """
    shown, clicked = data.shown, data.clicked
    total = clicked.sum(1, keepdims=True)
    count = shown.shape[1]
    useful = (total[:, 0] > 0) & ((shown > 0).sum(1) > 1)
    shown, clicked, total = shown[useful], clicked[useful], total[useful]
    told = (shown > 0).any(0) & (clicked.sum(0) > 0)  # a position without a click has no finite logarithm
    if count == 1 or not told[0] or len(shown) == 0:
        nothing = np.full(count, np.nan)
        return Positions(np.where(np.arange(count) == 0, 1.0, nothing), nothing, np.nan, np.nan, np.nan)

    log_attention = np.zeros(count)
    free = np.flatnonzero(told)[1:]
    for _ in range(100):
        share = _shares(shown, np.where(told, log_attention, -np.inf))
        score = (clicked - total * share).sum(0)[free]
        spread = np.diag((total * share).sum(0)) - (total * share).T @ share
        information = spread[np.ix_(free, free)]
        step = np.linalg.solve(information + 1e-10 * np.eye(len(free)), score)
        log_attention[free] += np.clip(step, -1, 1)
        if np.abs(step).max(initial=0) < 1e-10:
            break
    error = np.full(count, np.nan)
    error[0], error[free] = 0.0, np.sqrt(np.diag(np.linalg.pinv(information)))

    bias, bias_error, bias_sd = _bias(shown, clicked, data.shopper[useful], np.log(places))
    attention = np.where(told, np.exp(log_attention), np.nan)
    return Positions(attention, error, bias, bias_error, bias_sd)


def _bias(shown: Array, clicked: Array, shopper: Array, steepness: Array) -> tuple[float, float, float]:
    """Mean position bias over shoppers, its standard error, and the standard deviation between shoppers.

    Each shopper's own exponent by Newton's method; then the random-effects mean of those known to within 0.5 and the
    moment estimator of their variance (DerSimonian and Laird 1986). With fewer than five of them, all clicks together.
    """

    def newton(shopper: Array) -> tuple[Array, Array]:
        bias = np.zeros(shopper.max() + 1)
        for _ in range(60):
            share = _shares(shown, bias[shopper][:, None] * steepness)
            mean = share @ steepness
            total = clicked.sum(1)
            score = np.bincount(shopper, clicked @ steepness - total * mean, len(bias))
            information = np.bincount(shopper, total * (share @ steepness**2 - mean**2), len(bias))
            step = np.clip(score / np.maximum(information, 1e-9), -0.5, 0.5)
            bias = np.clip(bias + step, -3, 3)
            if np.abs(step).max() < 1e-9:
                break
        return bias, information

    bias, information = newton(np.unique(shopper, return_inverse=True)[1])
    known = (information > 4) & (np.abs(bias) < 3)
    if known.sum() < 5:
        (pooled,), (information,) = newton(np.zeros_like(shopper))
        return float(pooled), float(1 / np.sqrt(max(information, 1e-9))), 0.0
    bias, weight = bias[known], information[known]
    centre = (weight * bias).sum() / weight.sum()
    excess = (weight * (bias - centre) ** 2).sum() - (len(bias) - 1)
    variance = max(excess / (weight.sum() - (weight**2).sum() / weight.sum()), 0.0)
    weight = 1 / (variance + 1 / weight)
    return float((weight * bias).sum() / weight.sum()), float(1 / np.sqrt(weight.sum())), float(np.sqrt(variance))


def _shares(shown: Array, log_attention: Array) -> Array:
    weight = shown * np.exp(log_attention)
    return weight / np.maximum(weight.sum(1, keepdims=True), 1e-300)


def exposures(data: Cells, attention: Array) -> Array:
    """(C,) impressions, each counted with the attention of its position and the chance that the shopper clicks nothing
    on a slate.

    Where choice is multinomial logit, clicks on an item are to slates without a click as its odds, so that clicks over
    these exposures estimate odds. How often a shopper clicks nothing is taken over all of the shopper's slates; their
    number is that of the impressions of the position shown most.
    """
    shoppers = int(data.shopper.max()) + 1
    clicks = np.bincount(data.shopper, data.clicked.sum(1), shoppers)
    slates = np.stack([np.bincount(data.shopper, column, shoppers) for column in data.shown.T]).max(0)
    nothing = 1 - np.minimum(clicks / np.maximum(slates, 1), 0.9)
    return (data.shown @ attention) * nothing[data.shopper]


def fit_spreads(data: Cells, attention: Array) -> Spreads:
    """Moments of Poisson clicks with log-normal odds.

    The clicks y of shopper s on item i have mean e exp(b + alpha_i + tau_si), with e of `exposures`. Pairs of clicks of
    one cell, y (y - 1), have mean e^2 exp(2 b + 2 (both variances)); products of two shoppers' clicks on one item lack
    a variance of tau, products of two items both, so that ratios of their totals give the two variances. None of the
    three has any noise of its own cell in its mean. What was shown to whom is taken to say nothing about tau: slates
    were random, or the same for all. Where several clicks in 100 slates are on one item, its odds saturate and the
    spread of tastes comes out too small.
    """

    def estimate(keep: Array) -> Array:
        y, e = clicks[keep], exposure[keep]
        mean = y.sum() / e.sum()
        if mean == 0:
            return np.full(3, np.nan)
        own = (y * (y - 1)).sum() / (e**2).sum()
        item_y, item_e = np.bincount(data.item[keep], y), np.bincount(data.item[keep], e)
        across_e = (item_e**2).sum() - (e**2).sum()
        square = (y.sum() ** 2 - y.sum()) / e.sum() ** 2
        if across_e < 1e-9 * (e**2).sum():  # one shopper: all of the spread is counted as between items
            return np.array([np.log(mean), np.log(max(own / max(square, 1e-300), 1e-9)), np.nan])
        across = max(((item_y**2).sum() - (y**2).sum()) / across_e, 1e-300)
        between = np.log(max(across / max(square, 1e-300), 1e-9))
        return np.array([np.log(mean), between, np.log(max(own / across, 1e-9))])

    clicks, exposure = data.clicked.sum(1), exposures(data, attention)
    everything = np.ones(len(clicks), dtype=bool)
    found = estimate(everything)
    variance = np.zeros(3)
    for unit in (data.shopper, data.item):
        groups = min(GROUPS, len(np.unique(unit)))
        if groups > 2:
            left = np.array([estimate(unit % groups != g) for g in range(groups)])
            variance += (groups - 1) * left.var(0)
    sd = np.sqrt(np.maximum(found[1:], 0.0))
    error = np.sqrt(variance)  # nan for the taste of a single shopper
    # Of a variance, turned into one of a standard deviation; near 0 the root of the variance's own error.
    sd_error = np.where(sd**2 > error[1:], error[1:] / (2 * np.maximum(sd, 1e-9)), np.sqrt(error[1:]))
    return Spreads(float(np.exp(found[0])), *map(float, sd), float(error[0]), *map(float, sd_error))


def taste_spread(baskets: pd.DataFrame | str | Path) -> pd.DataFrame:
    """How far the shares of a category in households' purchases spread: a table household, category, baskets in, one
    row per category out, the most bought first.

    With N purchases of a household, Y of them in the category at a share p of its own, E Y (Y - 1) = N (N - 1) E p^2:
    the ratio of the totals to the squared mean share is exp(sd^2) for log-normal shares. A category that runs for
    itself (repeat purchases of one brand) counts as taste.

    Columns: category, share (mean over households, each with its purchases), taste_sd, taste_error (jackknife over
    households).

    Raises:
        TableError: a column is missing or holds what it should not.
    """
    table = read_table(baskets, ("household", "category", "baskets"), "one row per household and category")
    keys = ("household", "category")
    for name in keys:
        identifiers(table, keys, name, f"any identifier, one per {name}")
    counts(table, keys, "baskets")
    wide = table.pivot_table(
        index="household", columns="category", values="baskets", aggfunc="sum", fill_value=0.0, observed=True
    )
    count = wide.to_numpy()
    total = count.sum(1, keepdims=True)

    def variance(keep: Array) -> Array:
        y, n = count[keep], total[keep]
        share = y.sum(0) / n.sum()
        second = (y * (y - 1)).sum(0) / (n * (n - 1)).sum()
        return np.log(np.maximum(second / share**2, 1e-9))

    rows = np.arange(len(count))
    found = variance(rows >= 0)
    groups = min(GROUPS, len(count))
    left = np.array([variance(rows % groups != g) for g in range(groups)])
    error = np.sqrt((groups - 1) * left.var(0))
    sd = np.sqrt(np.maximum(found, 0.0))
    sd_error = np.where(found > error, error / (2 * np.maximum(sd, 1e-9)), np.sqrt(error))
    result = pd.DataFrame(
        {
            "category": wide.columns.astype(str),
            "share": count.sum(0) / total.sum(),
            "taste_sd": sd,
            "taste_error": sd_error,
        }
    )
    return result.sort_values("share", ascending=False, ignore_index=True)
