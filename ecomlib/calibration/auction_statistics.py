"""Published statistics of ad auctions, and the prior of `SegmentBidding` that they allow (chapter "Advertising").

`data/auction_statistics.csv` holds one number a row with its unit and source; `data/auction_statistics.md` says what
the sources are and what the numbers must not be used to claim.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..families.bidding import SegmentPrior
from .rates import range_in_sd
from .tables import TableError, numbers, read_table

FEN = 1e-5
"""Money in the table is fen for 1,000 impressions: this many yuan for one."""


class PublishedAuctions(NamedTuple):
    """A prior from published numbers, and how each of its numbers came about."""

    prior: SegmentPrior
    swing: float
    """Requests in the busiest hour over those in the quietest."""
    profile: tuple[float, ...]
    """Requests of each hour relative to the mean, as `SegmentBidding` takes them."""
    derivation: pd.DataFrame
    """setting, value, from: the reading of the table behind each setting."""
    statistics: pd.DataFrame
    """The table."""
    assumptions: tuple[str, ...]
    """Sentences: what the numbers do not say and was assumed."""


def auction_prior(statistics: pd.DataFrame | str | Path) -> PublishedAuctions:
    """The prior of `SegmentBidding` that published auction statistics allow; a conversion is a click.

    ============  ==============================================================================================
    Setting       Reading
    ============  ==============================================================================================
    rate          clicks / impressions of all campaigns
    rate_sd       standard deviation of the logarithms of the click rates of four kinds of placement
    price_sd      range of the advertisers' median prices (logarithms), over the mean range of so many normals
    spread        log-normal: sqrt(2 log(mean / median)) and log(95th percentile / median) / 1.645 of the prices
    profile       a cosine with the quietest hour and the swing that are reported
    ============  ==============================================================================================

    Raises:
        TableError: a quantity is missing, is there twice or is not a positive number.
    """
    table = read_table(statistics, ("quantity", "value", "unit", "source"), "one row per quantity")
    numbers(table, ("quantity",), "value", lambda x: x > 0, "numbers > 0")
    if table["quantity"].duplicated().any():
        name = table["quantity"][table["quantity"].duplicated()].iloc[0]
        raise TableError(f"column 'quantity': {name!r} appears more than once; allowed: once")
    values = dict(zip(table["quantity"], table["value"]))

    def of(name: str) -> float:
        if name not in values:
            raise TableError(f"column 'quantity': there is no row {name!r}")
        return float(values[name])

    placements = [of(f"click_rate_{place}_view") for place in ("first", "second", "third", "fourth")]
    advertisers = int(of("advertisers"))
    low, high = of("advertiser_price_median_low"), of("advertiser_price_median_high")
    median = of("price_median")
    from_mean = math.sqrt(2 * math.log(of("price_mean") / median))
    from_tail = math.log(of("price_p95") / median) / 1.645
    least, most = of("impressions_least_hour"), of("impressions_most_hour")
    rate = of("clicks") / of("impressions")
    rate_sd = float(np.log(placements).std(ddof=1))
    price_sd = math.log(high / low) / range_in_sd(advertisers)
    default = SegmentPrior()
    prior = SegmentPrior(
        rate=rate,
        rate_sd=round(rate_sd, 3),
        price_sd=round(price_sd, 3),
        spread=tuple(sorted((round(from_mean, 3), round(from_tail, 3)))),
    )
    value = median * FEN / (rate * math.exp(default.price))
    swing = most / least
    by_advertiser = math.log(of("advertiser_click_rate_high") / of("advertiser_click_rate_low"))
    rows = (
        ("rate", prior.rate, "clicks / impressions"),
        ("rate_sd", prior.rate_sd, "sd of log click rates of four placements"),
        ("rate_sd, advertisers instead", by_advertiser / range_in_sd(advertisers), "range of log click rates"),
        ("price_sd", prior.price_sd, "range of log median prices of advertisers"),
        ("spread, low", prior.spread[0], "log-normal prices: mean over median"),
        ("spread, high", prior.spread[1], "log-normal prices: 95th percentile over median"),
        ("swing", swing, "busiest over quietest hour"),
        ("value of a click, yuan", value, "assumed: the median price is exp(price) of the mean worth"),
    )
    assumptions = (
        "A conversion is a click: with 61 conversions in a million impressions no campaign learns anything in a day.",
        "Segments are placements. Between advertisers click rates differ about as much; between groups of users no "
        "number was found.",
        "The value of a click is not published: it was set so that the median price is "
        f"{math.exp(default.price):.0%} of an impression's mean worth, as in the default prior.",
        "Prices are those of auctions won (24 in 100): competitors' prices are higher and differ more than this says.",
        "How prices follow click rates, budgets and values are not published: the default prior's numbers.",
    )
    return PublishedAuctions(
        prior,
        swing,
        day_profile(swing, of("hour_of_least_impressions")),
        pd.DataFrame(rows, columns=["setting", "value", "from"]),
        table,
        assumptions,
    )


def day_profile(swing: float, quietest: float, ticks: int = 24) -> tuple[float, ...]:
    """Requests of each tick of a day relative to the mean: a cosine, `swing` times as many in the busiest as in the
    quietest hour."""
    depth = (swing - 1) / (swing + 1)
    angle = 2 * math.pi * (np.arange(ticks) * 24 / ticks - quietest) / 24
    profile = (1 - depth * np.cos(angle)).round(3)
    profile[-1] += ticks - profile.sum()
    return tuple(map(float, profile.round(6)))
