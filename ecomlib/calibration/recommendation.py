"""From a shop's log of impressions and clicks to `SlateRecommendation`. Chapter "Recommendation"."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..families.base import check, number, numbers, whole
from ..families.recommendation import SlateRecommendation
from ..families.shoppers import HashedCatalogue, SegmentPrior
from .click_fit import held_out_clicks, plot_clicks
from .clicks import Positions, Spreads, cells, fit_positions, fit_spreads, read_clicks
from .report import block, report
from .tables import TableError

PLACES = (1.0, 0.28, 0.17, 0.09)
"""Attention at a position bias of 1: the family's default."""


@dataclass(frozen=True)
class RecommendationConfig:
    """Settings of `calibrate_recommendation`."""

    taste_sd: float | None = None
    """Standard deviation of the log odds of a click between segments, for one item. None: from the table, which needs a
    column `shopper` with several of them."""
    features: int = 4
    """Features of an item in the family: the taste's spread is divided among them."""
    places: tuple[float, ...] = PLACES
    """Attention to each place at a position bias of 1; further positions of the table continue it as the last one."""
    minimum_clicks: int = 30
    """Clicks that the table must hold."""
    minimum_items: int = 5
    """Items that the table must hold."""

    def __post_init__(self):
        falling = lambda x: numbers(x) and x[0] == 1 and x[-1] > 0 and all(a >= b for a, b in zip(x, x[1:]))
        check(self, "taste_sd", lambda x: x is None or number(x, 0, 5), "None or a number > 0 and < 5")
        check(self, "features", lambda x: whole(x, 1, 100), "a whole number from 1 to 100")
        check(self, "places", falling, "positive numbers that begin with 1 and do not increase")
        check(self, "minimum_clicks", lambda x: whole(x, 5), "a whole number >= 5")
        check(self, "minimum_items", lambda x: whole(x, 2), "a whole number >= 2")


@dataclass(frozen=True)
class RecommendationCalibration:
    """What a log of clicks says about items, positions and tastes, and what had to be assumed to hear it."""

    prior: SegmentPrior
    """For `SlateRecommendation(prior=...)`."""
    click: float
    """Log-odds, against no click, of a click by a browser on an average item at the first place."""
    spreads: Spreads
    """Odds of a click and their spread between items and between tastes, with errors."""
    appeal: float
    """Standard deviation of appeal in an invented catalogue whose items then differ as much as the table's."""
    positions: Positions
    """Attention by position."""
    cart: float | None
    """Share of clicks that put the item in the cart; None where the table does not say."""
    order: float | None
    """Share of carts that are bought; None where the table does not say."""
    held_out: pd.DataFrame
    """model, log_score (mean log probability of the clicks of a pair of shopper and item that no model saw), gain and
    gain_se (more than the row above, over pairs)."""
    assumptions: tuple[str, ...]
    """Sentences: what the table does not hold and was assumed."""
    config: RecommendationConfig
    """The settings used."""
    log: pd.DataFrame = field(repr=False)
    """The checked table, one row per shopper, item and position."""

    def prior_table(self) -> pd.DataFrame:
        """What was found, in natural units: estimate and standard error."""
        s, p = self.spreads, self.positions
        rows = {
            "odds of a click at the first place, in 1,000": (1000 * s.odds, 1000 * s.odds * s.odds_error),
            "sd of log odds between items": (s.appeal_sd, s.appeal_error),
            "sd of log odds between tastes": (s.taste_sd, s.taste_error),
            "position bias": (p.bias, p.bias_error),
            "sd of the position bias between shoppers": (p.bias_sd, np.nan),
        }
        rows |= {
            f"attention to place {k + 1}": (p.attention[k], p.attention[k] * p.error[k])
            for k in range(1, len(p.attention))
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=["estimate", "error"])

    def family(self, **settings) -> SlateRecommendation:
        """`SlateRecommendation` with this prior, click rate, spread of items and, if known, shares of carts and orders.

        The catalogue is invented (`HashedCatalogue`): the table does not hold what items have in common. How much
        keener a shopper is at later stages is the default family's.
        """
        default = SlateRecommendation()
        own = {
            "prior": self.prior,
            "catalogue": HashedCatalogue(features=self.config.features, appeal=self.appeal),
            "click": tuple(round(self.click + x - default.click[0], 4) for x in default.click),
            "places": self.config.places,
        }
        for name, share in (("cart", self.cart), ("order", self.order)):
            if share is not None:
                usual = getattr(default, name)
                own[name] = tuple(min(1.0, round(share * x / usual[0], 4)) for x in usual)
        if len(self.config.places) < default.slate:
            own["slate"] = len(self.config.places)
        return SlateRecommendation(**(own | settings))

    def plot_fit(self, axes=None):
        """Attention by position, and click rates of items. Returns the figure."""
        return plot_clicks(self, axes)

    def summary(self) -> dict[str, int]:
        """What the table held: rows, shoppers, items, impressions and clicks."""
        log = self.log
        return {
            "rows": len(log),
            "shoppers": int(log["shopper"].nunique()),
            "items": int(log["item"].nunique()),
            "impressions": int(log["impressions"].sum()),
            "clicks": int(log["clicks"].sum()),
        }

    def __str__(self) -> str:
        blocks = (
            ", ".join(f"{value:,} {name}" for name, value in self.summary().items()),
            block("Found", self.prior_table()),
            block("Held-out pairs of shopper and item", self.held_out, index=False),
        )
        return report(blocks, self.assumptions)


def calibrate_recommendation(
    log: pd.DataFrame | str | Path, config: RecommendationConfig | None = None
) -> RecommendationCalibration:
    """Fit `SlateRecommendation` to impressions and clicks of many items, at several positions, by several shoppers.

    1. *Position*: the share of a pair's clicks at each position (`clicks.fit_positions`), and the one exponent, the
       position bias, that is nearest; its spread between shoppers beyond noise.
    2. *Spread*: of the log odds of a click between items and between shoppers' tastes, by moments
       (`clicks.fit_spreads`).
    3. *Family*: an invented catalogue and a prior under which the odds have the same moments: the lengths of the types'
       centres and the deviation around them, in the default prior's ratio; the spread of the items' appeal; and the
       log-odds of a click at the first place (`_matched`).
    4. *Carts and orders*: shares of clicks and of carts, rising with the stage as in the default family.

    Args:
        log: as `read_clicks` takes it.
        config: settings; default `RecommendationConfig()`.

    Raises:
        TableError: the table is bad, or holds too few clicks or items; the message says what to change.
    """
    config = config or RecommendationConfig()
    log = read_clicks(log)
    for name, found, least in (
        ("clicks", int(log["clicks"].sum()), config.minimum_clicks),
        ("item", log["item"].nunique(), config.minimum_items),
    ):
        if found < least:
            raise TableError(f"column {name!r}: {found} in all; at least {least} are needed")
    data = cells(log)
    number = (np.sort(log["position"].unique()) - 1).astype(int)
    places = np.array([*config.places, *[config.places[-1]] * 100])[number]
    positions = fit_positions(data, places)
    attention = np.where(np.isfinite(positions.attention), positions.attention, 1.0)
    spreads = fit_spreads(data, attention)
    taste = config.taste_sd if config.taste_sd is not None else spreads.taste_sd
    prior, appeal, log_mean = _matched(positions, spreads.appeal_sd, taste, config)
    clicks, carts = log["clicks"].sum(), log["carts"].sum() if "carts" in log else 0
    told = {"taste": np.isfinite(taste), "position": np.isfinite(positions.bias)}
    return RecommendationCalibration(
        prior=prior,
        click=float(np.log(spreads.odds) - log_mean),
        spreads=spreads,
        appeal=appeal,
        positions=positions,
        cart=float(carts / clicks) if "carts" in log else None,
        order=float(log["orders"].sum() / carts) if "orders" in log and carts > 0 else None,
        held_out=held_out_clicks(data, attention, taste if told["taste"] else 0.0),
        assumptions=_assumptions(log, positions, spreads, config, told),
        config=config,
        log=log,
    )


def _matched(
    positions: Positions, appeal_sd: float, taste_sd: float, config: RecommendationConfig
) -> tuple[SegmentPrior, float, float]:
    """The prior, the catalogue's appeal and the log of its mean exp(appeal + x'u), by bisection on the moments."""
    prior, catalogue = SegmentPrior(), HashedCatalogue(features=config.features, appeal=1.0)
    if np.isfinite(positions.bias):
        half = math.sqrt(3 * (positions.bias_sd**2 + positions.bias_error**2))
        low, high = max(positions.bias - half, 0.0), max(positions.bias + half, 0.0)
        prior = replace(prior, attention=(round(low, 4), round(high, 4)))
    table = catalogue.table()
    features, unit = np.array(table.features), np.array(table.appeal)
    family = SlateRecommendation(catalogue=catalogue, prior=prior)
    taste = family.prior_sample(1024).taste.double().numpy() @ features.T  # x'u, (segments, items)

    def moments(scale: float, appeal: float) -> tuple[float, float, float]:
        """Variance of taste, of items (both log-normal equivalents), log mean."""
        odds = np.exp(scale * taste + appeal * unit)
        mean = odds.mean(0)
        return (
            float(np.log((odds**2).mean() / (mean**2).mean())),
            float(np.log((mean**2).mean() / mean.mean() ** 2)),
            float(np.log(mean.mean())),
        )

    def solve(value: Callable[[float], float], target: float) -> float:
        low, high = 0.0, 5.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if value(middle) < target else (low, middle)
        return (low + high) / 2

    pair = [1.0, 0.0]
    for _ in range(5):  # the two hardly depend on each other
        if np.isfinite(taste_sd):
            pair[0] = solve(lambda x: moments(x, pair[1])[0], taste_sd**2)
        pair[1] = solve(lambda x: moments(pair[0], x)[1], appeal_sd**2)
    scale, appeal = (round(x, 4) for x in pair)
    prior = replace(prior, centre=round(scale * prior.centre, 4), deviation=round(scale * prior.deviation, 4))
    return prior, appeal, moments(scale, appeal)[2]


def _assumptions(
    log: pd.DataFrame, positions: Positions, spreads: Spreads, config: RecommendationConfig, told: dict[str, bool]
) -> tuple[str, ...]:
    result = ["What was shown to whom says nothing about tastes: slates were random, or the same for all shoppers."]
    if log["shopper"].nunique() == 1:
        result.append(
            "All clicks are of one segment, so the spread between items holds its shoppers' tastes too; the spread of "
            + ("tastes was given." if config.taste_sd is not None else "tastes is the default prior's.")
        )
    elif config.taste_sd is not None:
        result.append("The spread of tastes was given, not taken from the table.")
    if not told["position"]:
        result.append("The table does not tell positions apart: the position bias is the default prior's.")
    elif positions.bias < 2 * positions.bias_error:
        result.append("No position effect can be seen: the position bias is within two standard errors of 0.")
    if spreads.appeal_sd == 0 or spreads.appeal_sd < 2 * spreads.appeal_error:
        result.append("The spread between items is within two standard errors of 0.")
    if "carts" not in log:
        result.append("Carts are not in the table: shares of carts and orders are the default family's.")
    result.append(
        "All impressions count as those of a browser who is not tired: intent, fatigue and leaving are not in the "
        "table, and are the default family's. Items are those of an invented catalogue with the spread found."
    )
    return tuple(result)
