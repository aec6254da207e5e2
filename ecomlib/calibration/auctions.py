"""A log of auctions: reading it, the law of competing prices behind wins and payments, and how well rates predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import gammaln, log_ndtr, ndtr

from ..plotting import COLOURS
from .rates import fit_rates
from .report import score_table, two_panels
from .service import log_ticks
from .shrinkage import Array
from .tables import TableError, at_most, counts, identifiers, numbers, read_table, refuse

if TYPE_CHECKING:
    from .bidding import BiddingCalibration


class Prices(NamedTuple):
    """Log-normal prices of U pairs of campaign and segment; nan where the table does not tell."""

    centre: Array
    """(U,) mean m of the log price."""
    spread: Array
    """(U,) standard deviation d of the log price."""


def read_auctions(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    """Read and check a table with one row per campaign, day, hour and segment. The input is never modified.

    ===========  ========  ============================================================================
    Column       Needed    Meaning and allowed values
    ===========  ========  ============================================================================
    segment      required  any identifier: an audience, a placement, a keyword
    requests     required  impressions that were bid on, a whole number >= 0
    wins         required  those that were won, a whole number from 0 to `requests`
    spend        required  money paid for them, >= 0
    conversions  required  what they led to, a whole number >= 0; `clicks` is taken where it is missing
    campaign     optional  any identifier; missing: one campaign
    day          optional  any identifier of a day
    hour         optional  0 to 23, whole
    bid          optional  the bid on a request of quality 1 (of any, if all got the same bid), > 0
    quality      optional  sum of the predicted qualities of the requests won, >= 0
    ===========  ========  ============================================================================

    Returns:
        A new table; `conversions` and `campaign` are always there, numbers are float64.

    Raises:
        TableError: (a `ValueError`) naming the column, the number of offending rows, the first of them (counted from
            1, header not counted) and what is allowed.
    """
    table = read_table(source, ("segment", "requests", "wins", "spend"), "one row per campaign, hour and segment")
    outcome = next((name for name in ("conversions", "clicks") if name in table), None)
    if outcome is None:
        found = ", ".join(map(str, table.columns))
        raise TableError(f"missing column 'conversions' (or 'clicks'); found: {found}")
    keys = tuple(name for name in ("campaign", "day", "hour", "segment") if name in table)
    for name in ("campaign", "segment", "day"):
        if name in table:
            identifiers(table, keys, name, f"any identifier, one per {name}")
    for name in ("requests", "wins", outcome):
        counts(table, keys, name)
    at_most(table, keys, "wins", "requests")
    numbers(table, keys, "spend", lambda x: x >= 0, "numbers >= 0")
    refuse(table, keys, "spend", (table["wins"] == 0) & (table["spend"] > 0), "without a win", "0 where wins = 0")
    if "hour" in table:
        hours = lambda x: (x >= 0) & (x <= 23) & (x == np.floor(x))
        numbers(table, keys, "hour", hours, "whole numbers from 0 to 23")
    if "bid" in table:
        numbers(table, keys, "bid", lambda x: x > 0, "numbers > 0")
    if "quality" in table:
        numbers(table, keys, "quality", lambda x: x >= 0, "numbers >= 0")
    table["conversions"] = table[outcome]
    if "campaign" not in table:
        table["campaign"] = "all"
    return table


def price_law(rows: pd.DataFrame, pairs: int, quality_sd: float) -> Prices:
    """Prices of every pair from its rows: see `calibrate_bidding`, step 3."""
    total = rows.groupby("pair")[["requests", "wins", "spend"]].sum().reindex(range(pairs), fill_value=0.0)
    share = (total["wins"] / total["requests"].clip(lower=1)).to_numpy()
    unknown = np.full(pairs, np.nan)
    told = (total["spend"] > 0).to_numpy(copy=True)
    if "bid" not in rows:
        centre = np.log(total["spend"] / total["wins"].clip(lower=1), where=told, out=unknown.copy())
        return Prices(np.asarray(centre), unknown)
    told &= (share > 0.005) & (share < 0.995) & (total["wins"] >= 20).to_numpy()
    rows = rows[told[rows["pair"]]]
    index = np.cumsum(told)[rows["pair"]] - 1  # 0, 1, ... among the pairs that tell
    log_bid, requests = np.log(rows["bid"].to_numpy()), rows["requests"].to_numpy()
    wins, spend = total["wins"].to_numpy()[told], total["spend"].to_numpy()[told]
    spreads = np.geomspace(0.03, 3, 60)
    gap, centres = np.empty((60, told.sum())), np.empty((60, told.sum()))
    for i, d in enumerate(spreads):
        scale = np.hypot(d, quality_sd)
        low, high = np.full(told.sum(), log_bid.min() - 12.0), np.full(told.sum(), log_bid.max() + 12.0)
        for _ in range(40):  # the mean price at which the bids win as often as they did
            middle = (low + high) / 2
            expected = np.bincount(index, requests * ndtr((log_bid - middle[index]) / scale), told.sum())
            low, high = np.where(expected > wins, middle, low), np.where(expected > wins, high, middle)
        centres[i] = (low + high) / 2
        m = centres[i][index]
        paid = requests * np.exp(m + d * d / 2 + log_ndtr((log_bid - m - d * d) / scale))
        gap[i] = np.log(np.bincount(index, paid, told.sum())) - np.log(spend)
    # The wider the prices, the cheaper those won: the gap falls with d, and its zero is sought on the grid.
    first = np.clip((gap > 0).sum(0), 1, 59)
    columns = np.arange(told.sum())
    above, below = gap[first - 1, columns], gap[first, columns]
    weight = np.clip(above / np.where(above == below, 1.0, above - below), 0, 1)
    between = lambda x: x[first - 1, columns] + weight * (x[first, columns] - x[first - 1, columns])
    centre, spread = unknown.copy(), unknown.copy()
    centre[told] = between(centres)
    spread[told] = np.exp(between(np.broadcast_to(np.log(spreads)[:, None], gap.shape)))
    return Prices(centre, spread)


def held_out_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Rates from one half of every pair's rows, scored on the conversions of the other half."""
    total = rows.groupby(["pair", "half"])[["conversions", "exposure"]].sum().unstack("half", fill_value=0.0)
    if 1 not in rows["half"].unique():
        return pd.DataFrame(columns=["model", "log_score", "gain", "gain_se"])
    y, n = (total[name][0].to_numpy() for name in ("conversions", "exposure"))
    later, offered = (total[name][1].to_numpy() for name in ("conversions", "exposure"))
    both = (n > 0) & (offered > 0)
    y, n, later, offered = y[both], n[both], later[both], offered[both]
    mean = max(y.sum(), 0.5) / n.sum()
    found = {
        "one rate for all": np.full(len(y), mean),
        "each segment alone": (y + 0.5) / (n + 0.5 / mean),
        "shrunk": np.exp(fit_rates(y, n).log_rate),
    }
    score = lambda rate: later * np.log(rate * offered) - rate * offered - gammaln(later + 1)
    return score_table({name: score(rate) for name, rate in found.items()})


def plot_segments(found: BiddingCalibration, axes=None):
    """Two panels over pairs of campaign and segment: the fitted law of rates with the shrunk ones; price against rate.

    Args:
        found: the calibration.
        axes: two matplotlib axes, or None for a new figure.

    Returns:
        The matplotlib figure.
    """
    left, right = two_panels(axes)
    table, prior = found.segments, found.prior
    model, data = COLOURS["model"], COLOURS["data"]
    order = np.sort(table["rate"].to_numpy())
    share = (np.arange(len(order)) + 0.5) / len(order)
    centre = np.log(prior.rate) - prior.rate_sd**2 / 2
    grid = centre + max(prior.rate_sd, 0.05) * np.linspace(-3, 3, 200)
    left.plot(1000 * np.exp(grid), ndtr((grid - centre) / max(prior.rate_sd, 1e-3)), "-", color=model, label="prior")
    left.plot(1000 * order, share, "o", color=data, label="segments, shrunk")
    left.set(xscale="log", xlabel="conversions per 1,000 requests won", ylabel="share of segments with at most that")
    log_ticks(left.xaxis)
    left.legend(frameon=False)
    rate, price = np.log(table["rate"]), np.exp(table["price"])
    right.plot(1000 * np.exp(rate), price, "o", color=data, label="segments")
    line = found.value * prior.rate * np.exp(prior.price + prior.price_slope * (grid - np.log(prior.rate)))
    right.plot(1000 * np.exp(grid), line, "-", color=model, label="prior, mean")
    right.set(xscale="log", yscale="log", xlabel="conversions per 1,000 requests won", ylabel="median competing price")
    log_ticks(right.xaxis)
    right.legend(frameon=False)
    return left.figure
