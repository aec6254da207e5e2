"""From a checked sales table to the arrays that are fitted: settings, filters and assumptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from ecomlib.calibration.purchase_model import Array, Weeks
from ecomlib.calibration.sales import SalesTableError
from ecomlib.families.base import check, number, whole

WEEKS_PER_YEAR = 365.25 / 7


@dataclass(frozen=True)
class CalibrationConfig:
    """Settings of `calibrate_pricing`."""

    margin: float = 0.3
    """Assumed gross margin (price - cost) / price at a product's median price. Used without a unit_cost column."""
    weekly_visitors: float | None = None
    """Assumed shoppers a week, used without a visitors column. None: that week's units of all products."""
    visitors_scale: float = 1.0
    """Multiplies the visitors, from whichever source, to see how much depends on them."""
    minimum_weeks: int = 26
    """Weeks in which a product must be observed."""
    minimum_units: int = 200
    """Units that a product must have sold in all."""
    minimum_price_variation: float = 0.05
    """Smallest standard deviation of a product's weekly price, as a share of its mean price."""
    minimum_products: int = 20
    """Products that must survive the filters: a population is fitted to them."""
    holdout_every: int = 5
    """Every so many weeks one is held out to judge the fit. The prior itself is fitted on all weeks."""
    season_harmonics: int = 1
    """Pairs of yearly sine and cosine terms per product."""
    control_sd: float = 1.0
    """Prior standard deviation of each promotion and season coefficient (log odds per unit of the control)."""

    def __post_init__(self):
        visitors = lambda x: x is None or number(x, 0)
        check(self, "margin", lambda x: number(x, 0, 1), "0 < margin < 1")
        check(self, "weekly_visitors", visitors, "None or a finite number > 0")
        check(self, "visitors_scale", lambda x: number(x, 0), "a finite number > 0")
        check(self, "minimum_weeks", lambda x: whole(x, 10), "a whole number >= 10")
        check(self, "minimum_units", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "minimum_price_variation", lambda x: number(x, 0, 1), "0 < variation < 1")
        check(self, "minimum_products", lambda x: whole(x, 10), "a whole number >= 10")
        check(self, "holdout_every", lambda x: whole(x, 2, 10), "a whole number 2 to 10")
        check(self, "season_harmonics", lambda x: whole(x, 0, 3), "0, 1, 2 or 3")
        check(self, "control_sd", lambda x: number(x, 0), "a finite number > 0")


class Prepared(NamedTuple):
    """The products that survive the filters, as arrays with one row per product."""

    products: pd.Index
    """(P,) identifiers."""
    week: np.ndarray
    """(W,) week numbers of the padded axis."""
    weeks: Weeks
    """What is fitted."""
    markup: Array
    """(P, W) price / unit cost; nan where not observed."""
    reference_markup: float
    """The markup at which shares are quoted."""
    unit_cost: Array
    """(P,)."""
    median_price: Array
    """(P,)."""
    funnel: pd.DataFrame
    """filter, products."""
    assumptions: tuple[str, ...]
    """Sentences: what had to be assumed because the table does not hold it."""


def prepare(sales: pd.DataFrame, config: CalibrationConfig) -> Prepared:
    """Filter products, attach visitors, cost and controls, and pad to (product, week).

    Raises:
        TableError: fewer than `minimum_products` survive; the message holds the funnel.
    """
    visitors, visitors_assumption = _visitors(sales, config)
    sales = sales.assign(visitors=visitors)
    sales, funnel = _filter(sales, config)
    by_product = sales.groupby("product")
    products = pd.Index(by_product.size().index)
    median_price = by_product["price"].median().to_numpy()
    if "unit_cost" in sales:
        unit_cost = by_product["unit_cost"].median().to_numpy()
        reference = float(np.median(median_price / unit_cost))
        cost_assumption = (
            "Unit cost: each product's median in the table, so that a markup moves only when the price does."
        )
    else:
        unit_cost = (1 - config.margin) * median_price
        reference = 1 / (1 - config.margin)
        cost_assumption = (
            f"Unit cost is not in the table: assumed a margin of {config.margin:.0%} at each product's median "
            f"price, so cost = {1 - config.margin:.2g} x median price. Price and units cannot reveal it."
        )

    row = products.get_indexer(sales["product"])
    week = np.unique(sales["week"])
    column = np.searchsorted(week, sales["week"])

    def pad(values: pd.Series | float, fill: float) -> Array:
        array = np.full((len(products), len(week)), fill)
        array[row, column] = values
        return array

    observed = pad(1.0, 0.0) > 0
    controls, controls_assumption = _controls(sales, week, config, pad)
    markup = pad(sales["price"], np.nan) / unit_cost[:, None]
    weeks = Weeks(
        units=pad(sales["units"], 0.0),
        visitors=pad(sales["visitors"], 1.0),
        gap=np.where(observed, reference - markup, 0.0),
        controls=controls,
        observed=observed,
    )
    assumptions = (
        visitors_assumption,
        cost_assumption,
        controls_assumption,
        "Slopes are descriptive, not causal: the merchant chose these prices knowing its market, and "
        "competitors' prices are not in the table.",
        "A week absent from the table counts as unobserved, not as zero units: where weeks without a sale are "
        "left out, slopes come out a little too small.",
    )
    return Prepared(products, week, weeks, markup, reference, unit_cost, median_price, funnel, assumptions)


def centred(weeks: Weeks, among: np.ndarray) -> Weeks:
    """Controls minus their mean over each product's weeks in `among` (P, W), zero outside the observed."""
    among = (among & weeks.observed)[..., None]
    mean = (weeks.controls * among).sum(1, keepdims=True) / np.maximum(among.sum(1, keepdims=True), 1)
    return weeks._replace(controls=(weeks.controls - mean) * weeks.observed[..., None])


def _visitors(sales: pd.DataFrame, config: CalibrationConfig) -> tuple[pd.Series, str]:
    if "visitors" in sales:
        visitors = sales["visitors"]
        text = "Visitors: the table's column (baskets or sessions: everyone who came could have bought)"
    elif config.weekly_visitors is not None:
        visitors = pd.Series(float(config.weekly_visitors), sales.index)
        text = f"Visitors are not in the table: assumed {config.weekly_visitors:g} a week for every product"
    else:
        visitors = sales.groupby("week")["units"].transform("sum")
        text = "Visitors are not in the table: assumed one shopper for every unit sold that week, all products"
    if config.visitors_scale != 1:
        text += f", times {config.visitors_scale:g}"
    return visitors * config.visitors_scale, (
        f"{text}. Sales show only visitors x share: a wrong count moves the share, hardly the slope."
    )


def _controls(sales: pd.DataFrame, week: np.ndarray, config: CalibrationConfig, pad) -> tuple[Array, str]:
    angle = 2 * np.pi * week / WEEKS_PER_YEAR
    shape = pad(0.0, 0.0).shape
    columns = [
        np.broadcast_to(wave(k * angle), shape)
        for k in range(1, config.season_harmonics + 1)
        for wave in (np.sin, np.cos)
    ]
    season = f"{config.season_harmonics} yearly harmonic(s) per product" if columns else "none"
    promotion = "none, as the table has no promotion column"
    if "promotion" in sales:
        columns.append(pad(sales["promotion"], 0.0))
        promotion = "the table's column"
    controls = np.stack(columns, -1) if columns else np.zeros((*shape, 0))
    return controls, (
        f"Controls: promotion: {promotion}; season: {season}, besides the visitors of the week. "
        "The share of the prior is that of an average week, average promotion included."
    )


def _filter(sales: pd.DataFrame, config: CalibrationConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    by_product = sales.groupby("product")
    price = by_product["price"]
    rules = (
        (f"observed in at least {config.minimum_weeks} weeks", by_product.size() >= config.minimum_weeks),
        (f"at least {config.minimum_units} units sold", by_product["units"].sum() >= config.minimum_units),
        (
            f"price varies by at least {config.minimum_price_variation:.0%} of its mean",
            price.std() >= config.minimum_price_variation * price.mean(),
        ),
        (
            "fewer units than visitors in every week",
            (sales["visitors"] > sales["units"]).groupby(sales["product"]).all(),
        ),
    )
    keep = pd.Series(True, by_product.size().index)
    funnel = [("in the table", len(keep))]
    for rule, passed in rules:
        keep &= passed
        funnel.append((rule, int(keep.sum())))
    table = pd.DataFrame(funnel, columns=["filter", "products"])
    if keep.sum() < config.minimum_products:
        raise SalesTableError(
            f"column 'product': only {keep.sum()} of {len(keep)} products survive the filters, at least "
            f"{config.minimum_products} are needed; products left after each filter: "
            + "; ".join(f"{rule}: {count}" for rule, count in funnel)
        )
    return sales[sales["product"].map(keep)], table
