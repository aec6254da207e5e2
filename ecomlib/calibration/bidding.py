"""From a campaign's log of auctions to the prior of `SegmentBidding`. Chapter "Advertising"."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..families.base import check, number, whole
from ..families.bidding import SegmentBidding, SegmentPrior, blind_policy
from .auctions import Prices, held_out_rates, plot_segments, price_law, read_auctions
from .rates import Rates, fit_rates
from .report import block, report
from .shrinkage import Array
from .tables import TableError

KEYS = ("campaign", "segment")


@dataclass(frozen=True)
class BiddingConfig:
    """Settings of `calibrate_bidding`."""

    value: float | None = None
    """What a conversion is worth, in the table's money. None: 1.5 times what one cost on average (an assumption)."""
    quality_sd: float = 0.0
    """Standard deviation of the logarithm of a row's bids around its `bid`; 0 if every request got the same bid."""
    minimum_requests: int = 200
    """Requests that a campaign must have bid on in a segment."""
    minimum_segments: int = 5
    """Pairs of campaign and segment that must survive the filter: a population is fitted to them."""

    def __post_init__(self):
        check(self, "value", lambda x: x is None or number(x, 0), "None or a finite number > 0")
        check(self, "quality_sd", lambda x: number(x) and 0 <= x <= 2, "a number from 0 to 2")
        check(self, "minimum_requests", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "minimum_segments", lambda x: whole(x, 3), "a whole number >= 3")


@dataclass(frozen=True)
class BiddingCalibration:
    """What a log of auctions says about how segments differ, and what had to be assumed to hear it."""

    prior: SegmentPrior
    """For `SegmentBidding(prior=...)`; money in units of the value of a conversion."""
    prior_error: tuple[float, float]
    """Standard errors of log rate and rate_sd (sampling of segments and requests; not of the assumptions)."""
    segments: pd.DataFrame
    """One row per campaign and segment that was fitted, see `calibrate_bidding`."""
    funnel: pd.DataFrame
    """filter, segments: how many pairs of campaign and segment are left after each filter."""
    held_out: pd.DataFrame
    """model, log_score (mean log probability of a pair's conversions in the half of the rows that no model saw), gain
    and gain_se (more than the row above, over pairs)."""
    requests: float
    """Requests a campaign bids on in an average tick (an hour), in the segments that were fitted."""
    profile: tuple[float, ...] | None
    """Requests of each hour relative to the mean; None without an `hour` column or with an hour missing."""
    segments_each: int
    """Segments of the median campaign."""
    value: float
    """What a conversion is worth, in the table's money."""
    assumptions: tuple[str, ...]
    """Sentences: what the table does not hold and was assumed."""
    config: BiddingConfig
    """The settings used."""
    log: pd.DataFrame = field(repr=False)
    """The checked table, before the filter."""

    def prior_table(self, draws: int = 20_000) -> pd.DataFrame:
        """The prior in natural units: 5 %, 50 % and 95 % quantiles of what a segment drawn from it looks like."""
        normal = np.random.default_rng(0).standard_normal((2, draws))
        prior = self.prior
        deviation = prior.rate_sd * normal[0] - prior.rate_sd**2 / 2
        price = prior.price + prior.price_slope * deviation + prior.price_sd * normal[1]
        natural = {
            "conversions per 1,000 requests": 1000 * prior.rate * np.exp(deviation),
            "median price / mean worth of a request": np.exp(price),
            "median price / worth of this segment's request": np.exp(price - deviation),
        }
        quantiles = {name: np.quantile(x, (0.05, 0.5, 0.95)) for name, x in natural.items()}
        return pd.DataFrame.from_dict(quantiles, orient="index", columns=["5 %", "median", "95 %"])

    def family(self, segments: int | None = None, **settings) -> SegmentBidding:
        """`SegmentBidding` with this prior, the table's requests and hours, and a base bid that is best for them.

        `segments` is how many a campaign has, None as the median campaign of the table; further settings go to
        `SegmentBidding`. The base bid is searched for, which takes some seconds.
        """
        chosen = self.segments_each if segments is None else segments
        low, high = self.prior.budget
        requests = self.requests * chosen / self.segments_each
        own = {"segments": chosen, "prior": self.prior, "requests": requests, "typical_rate": self.prior.rate}
        own |= {"typical_budget": float(np.sqrt(low * high))}
        if self.profile is not None:
            own["profile"] = self.profile
        family = SegmentBidding(**(own | settings))
        if "base" in settings:
            return family
        return replace(family, base=tuple(round(x, 3) for x in blind_policy(family)))

    def plot_fit(self, axes=None):
        """Conversion rates of the half of the rows that was not seen, and prices against rates. Returns the figure."""
        return plot_segments(self, axes)

    def summary(self) -> dict[str, int | list[float]]:
        """What the table held: rows, pairs of campaign and segment, and those that were fitted; errors of the prior."""
        return {
            "rows": len(self.log),
            "segments": int(self.log.groupby(list(KEYS)).ngroups),
            "fitted_segments": len(self.segments),
            "prior_error": list(self.prior_error),
        }

    def __str__(self) -> str:
        blocks = (
            block("Pairs of campaign and segment", self.funnel, index=False),
            block("Prior in natural units", self.prior_table()),
            block("Held-out half of the rows", self.held_out, index=False),
        )
        return report(blocks, self.assumptions)


def calibrate_bidding(log: pd.DataFrame | str | Path, config: BiddingConfig | None = None) -> BiddingCalibration:
    """Fit the prior of `SegmentBidding` to a log of auctions of several segments.

    1. *Filter* pairs of campaign and segment with too few requests; the funnel counts the survivors.
    2. *Rates*: conversions of a pair are Poisson(rate x quality won), and log rates are normal over pairs, fitted by
       marginal maximum likelihood (`rates.fit_rates`). Without a `quality` column every request won has quality 1.
    3. *Prices*: the best competing price of a pair is log-normal. With a `bid` column its two parameters are those
       under which the bids of the rows win as often, and pay as much, as they did (equations (eq-win) and
       (eq-fluid-spend)). Without one they are not in the data: the log of the mean price paid stands for the first (too
       low, since dear requests were lost), the default prior for the second.
    4. *How prices follow rates*: regression of the one on the posterior mean of the other, over pairs. The noise of the
       prices, known from the difference between the odd and the even rows, is taken off their spread.

    `segments` has one row per pair: campaign, segment, requests, wins, spend, conversions, rate_raw (conversions per
    quality), rate (shrunk: exp of the posterior mean of the log), price (m) and spread (d), in the table's money.

    Args:
        log: as `read_auctions` takes it.
        config: settings; default `BiddingConfig()`.

    Raises:
        TableError: the table is bad, or too few pairs survive; the message says what to change.
    """
    config = config or BiddingConfig()
    log = read_auctions(log)
    kept, pairs, funnel = _prepare(log, config)
    kept["exposure"] = kept["quality"] if "quality" in kept else kept["wins"]
    total = kept.groupby("pair")[["requests", "wins", "spend", "conversions", "exposure"]].sum()
    seen = (total["exposure"] > 0).to_numpy()
    if total["conversions"].sum() == 0:
        raise TableError("column 'conversions': 0 in all rows; allowed: some conversions (or clicks)")
    rates = fit_rates(total["conversions"].to_numpy()[seen], total["exposure"].to_numpy()[seen])
    log_rate = np.full(len(total), rates.mean)
    log_rate[seen] = rates.log_rate
    prices = price_law(kept, len(total), config.quality_sd)
    value = config.value or 1.5 * total["spend"].sum() / total["conversions"].sum()
    prior, told = _prior(kept, rates, log_rate, prices, value, config)
    hours = kept["hour"].nunique() if "hour" in kept else 1
    rows = kept.groupby([c for c in ("campaign", "day", "hour") if c in kept]).ngroups
    segments = pairs.assign(**total.drop(columns="exposure"), rate_raw=total["conversions"] / total["exposure"])
    segments = segments.assign(rate=np.exp(log_rate), price=prices.centre, spread=prices.spread)
    each = int(segments.groupby("campaign").size().median())
    ticks = rows if "hour" in kept else 24 * rows
    return BiddingCalibration(
        prior=prior,
        prior_error=(rates.mean_error, rates.sd_error),
        segments=segments.reset_index(drop=True),
        funnel=funnel,
        held_out=held_out_rates(kept),
        requests=float(total["requests"].sum() / ticks),
        profile=_profile(kept) if hours == 24 else None,
        segments_each=max(1, each),
        value=float(value),
        assumptions=_assumptions(kept, config, value, told, hours),
        config=config,
        log=log,
    )


def _prepare(log: pd.DataFrame, config: BiddingConfig) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    requests = log.groupby(list(KEYS))["requests"].transform("sum")
    kept = log[requests >= config.minimum_requests].copy()
    funnel = [
        ("in the table", log.groupby(list(KEYS)).ngroups),
        (f"at least {config.minimum_requests} requests", kept.groupby(list(KEYS)).ngroups),
    ]
    if funnel[-1][1] < config.minimum_segments:
        raise TableError(
            f"column 'segment': only {funnel[-1][1]} of {funnel[0][1]} pairs of campaign and segment survive, at least "
            f"{config.minimum_segments} are needed; pairs left after each filter: "
            + "; ".join(f"{rule}: {left}" for rule, left in funnel)
        )
    groups = kept.groupby(list(KEYS))
    kept["pair"] = groups.ngroup()
    kept["half"] = groups.cumcount() % 2
    pairs = kept.drop_duplicates("pair").set_index("pair")[list(KEYS)].sort_index()
    return kept, pairs, pd.DataFrame(funnel, columns=["filter", "segments"])


def _prior(
    rows: pd.DataFrame, rates: Rates, log_rate: Array, prices: Prices, value: float, config: BiddingConfig
) -> tuple[SegmentPrior, dict[str, bool]]:
    """The prior, and which of its parts the table told."""
    default = SegmentPrior()
    log_mean_rate = rates.mean + rates.sd**2 / 2
    halves = [price_law(rows[rows["half"] == half], len(log_rate), config.quality_sd) for half in (0, 1)]
    whole_, both = np.isfinite(prices.centre), np.isfinite(halves[0].centre) & np.isfinite(halves[1].centre)
    told = {"price": whole_.sum() >= config.minimum_segments, "noise": both.sum() >= config.minimum_segments}
    price, price_sd, slope = default.price, default.price_sd, default.price_slope
    if told["price"]:
        x, m = log_rate[whole_] - log_mean_rate, prices.centre[whole_] - np.log(value) - log_mean_rate
        slope = float(np.cov(x, m)[0, 1] / x.var(ddof=1)) if x.std() > 0.05 * rates.sd > 1e-3 else 0.0
        noise = float(((halves[0].centre - halves[1].centre)[both] ** 2).mean() / 4) if told["noise"] else 0.0
        # x leaves part of log c unexplained, and with it slope^2 times that part of the prices.
        unexplained = slope**2 * max(rates.sd**2 - x.var(ddof=1), 0.0)
        residual = (m - slope * x).var(ddof=2) - noise - unexplained
        price, price_sd = float((m - slope * x).mean()), float(np.sqrt(max(residual, 0.0)))
    spread = default.spread
    wide = prices.spread[np.isfinite(prices.spread)]
    told["spread"] = len(wide) >= config.minimum_segments
    if told["spread"]:
        noise = ((halves[0].spread - halves[1].spread)[both] ** 2).mean() / 4 if told["noise"] else 0.0
        half = np.sqrt(3 * max(wide.var(ddof=1) - noise, 0.0))
        spread = (round(float(max(wide.mean() - half, 0.02)), 4), round(float(wide.mean() + half), 4))
    budget = default.budget
    told["budget"] = "day" in rows
    if told["budget"]:
        daily = rows.groupby(["campaign", "day"])["spend"].sum() / value
        low, high = np.quantile(daily[daily > 0], (0.05, 0.95))
        budget = (float(low), float(high))
    prior = SegmentPrior(
        rate=float(np.exp(log_mean_rate)), rate_sd=rates.sd, price=price, price_sd=price_sd, price_slope=slope,
        spread=spread, budget=budget,
    )  # fmt: skip
    return prior, told


def _profile(rows: pd.DataFrame) -> tuple[float, ...]:
    by_hour = rows.groupby("hour")["requests"].sum().to_numpy()
    profile = (by_hour / by_hour.mean()).round(3)
    if profile.min() <= 0:
        profile = np.maximum(profile, 0.001)
    profile[-1] += len(profile) - profile.sum()
    return tuple(map(float, profile.round(6)))


def _assumptions(
    rows: pd.DataFrame, config: BiddingConfig, value: float, told: dict[str, bool], hours: int
) -> tuple[str, ...]:
    result = []
    if config.value is None:
        result.append(
            f"A conversion is worth 1.5 times what one cost: {value:.4g} in the table's money (setting: value)."
        )
    if "quality" not in rows:
        result.append("Every request won has quality 1: what the bidder predicted of it is not in the table.")
    if "bid" in rows:
        result.append("Competing prices are log-normal, and do not depend on the hour or on one's own bid.")
    else:
        result.append(
            "Bids are not in the table: prices are those of the requests won, so competitors' are higher than this "
            "prior says, and how they spread within a segment is the default prior's."
        )
    if told["price"] and not told["noise"]:
        result.append("Too few rows to tell the noise of prices from their spread between segments, which is too wide.")
    if not told["budget"]:
        result.append("There is no day column: the range of budgets is the default prior's.")
    else:
        result.append("A day's budget is what was spent that day.")
    if hours < 24:
        result.append("Not all 24 hours are in the table: the day's profile is the default family's.")
    result.append(
        "Rates are what was seen after bids that were chosen by someone who knew the segments; a segment that was "
        "hardly bid on says little. Pairs of campaign and segment are independent draws."
    )
    return tuple(result)
