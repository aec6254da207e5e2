"""Sales and stock by product and period: reading them, and which products are fitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..families.base import check, whole
from .shrinkage import Array
from .stock_model import Counts
from .tables import TableError, at_most, counts, identifiers, read_table, refuse, whole_periods


@dataclass(frozen=True)
class InventoryConfig:
    """Settings of `calibrate_inventory`."""

    absent_is_zero: bool = False
    """A period without a row, between a product's first and last, sold nothing. If false it is unobserved."""
    minimum_periods: int = 20
    """Periods in which a product must be observed."""
    minimum_units: int = 20
    """Units that a product must have sold in all."""
    minimum_products: int = 10
    """Products that must survive the filters: a population is fitted to them."""
    holdout_every: int = 5
    """Every so many periods one is held out to judge the fit. The prior itself is fitted on all periods."""

    def __post_init__(self):
        check(self, "absent_is_zero", lambda x: isinstance(x, bool), "True or False")
        check(self, "minimum_periods", lambda x: whole(x, 10), "a whole number >= 10")
        check(self, "minimum_units", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "minimum_products", lambda x: whole(x, 5), "a whole number >= 5")
        check(self, "holdout_every", lambda x: whole(x, 2, 10), "a whole number 2 to 10")


class Periods(NamedTuple):
    """Sales of P products over T periods, each (P, T)."""

    units: Array
    stock: Array
    """Units on hand at the start; infinite where the table does not say."""
    observed: Array
    """bool."""

    @property
    def cut(self) -> Array:
        """(P, T) bool: all that was there was sold."""
        return self.observed & (self.units >= self.stock)


def read_stock(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    """Read and check a table with one row per product and day (or week). The input is never modified.

    =======  ============  ===============================================================================
    Column   Needed        Meaning and allowed values
    =======  ============  ===============================================================================
    product  required      any identifier, not missing
    day      this or week  a whole number, or an ISO date
    week     this or day   a whole number, or an ISO date (weeks are then counted from the earliest)
    units    required      units sold, a whole number >= 0
    stock    optional      units that could be sold, a whole number >= `units`: on hand at the start, and what
                           was delivered during the period
    =======  ============  ===============================================================================

    Where units = stock the shelf was sold empty, and demand was at least that. Other columns are kept as they are.

    Returns:
        A new table sorted by product and period; numbers as float64, the period as int64.

    Raises:
        TableError: (a `ValueError`) naming the column, the number of offending rows, the first of them (counted from
            1, header not counted) and what is allowed.
    """
    table = read_table(source, ("product", "units"), "one row per product and day")
    period = period_of(table)
    keys = ("product", period)
    identifiers(table, keys, "product", "any identifier, one per product")
    table[period] = whole_periods(table, keys, period, 7 if period == "week" else 1)
    counts(table, keys, "units", "take returns out")
    if "stock" in table:
        counts(table, keys, "stock")
        at_most(table, keys, "units", "stock")
    repeated = table.duplicated(list(keys))
    refuse(
        table, keys, period, repeated, f"repeat a product and {period}", f"one row per product and {period} (add up)"
    )
    return table.sort_values(list(keys), kind="stable", ignore_index=True)


def prepare_stock(sales: pd.DataFrame, period: str, config: InventoryConfig) -> tuple[pd.Index, Periods, pd.DataFrame]:
    by_product = sales.groupby("product")
    first, last = by_product[period].min(), by_product[period].max()
    seen = last - first + 1 if config.absent_is_zero else by_product.size()
    keep = pd.Series(True, seen.index)
    funnel = [("in the table", len(keep))]
    for rule, passed in (
        (f"observed in at least {config.minimum_periods} {period}s", seen >= config.minimum_periods),
        (f"at least {config.minimum_units} units sold", by_product["units"].sum() >= config.minimum_units),
    ):
        keep &= passed
        funnel.append((rule, int(keep.sum())))
    table = pd.DataFrame(funnel, columns=["filter", "products"])
    if keep.sum() < config.minimum_products:
        raise TableError(
            f"column 'product': only {keep.sum()} of {len(keep)} products survive the filters, at least "
            f"{config.minimum_products} are needed; products left after each filter: "
            + "; ".join(f"{rule}: {left}" for rule, left in funnel)
        )
    sales = sales[sales["product"].map(keep)]
    products = keep.index[keep]
    row, start = products.get_indexer(sales["product"]), int(sales[period].min())
    column = sales[period].to_numpy() - start
    if config.absent_is_zero:
        place = np.arange(column.max() + 1)
    else:
        place, column = np.unique(column, return_inverse=True)
    shape = (len(products), len(place))
    units, stock, observed = np.zeros(shape), np.full(shape, np.inf), np.zeros(shape, dtype=bool)
    units[row, column], observed[row, column] = sales["units"], True
    if "stock" in sales:
        stock[row, column] = sales["stock"]
    if config.absent_is_zero:
        begin, end = (x[products].to_numpy()[:, None] - start for x in (first, last))
        observed = (place >= begin) & (place <= end)
    return products, Periods(units, stock, observed), table


def count(periods: Periods, among: Array) -> Counts:
    """The numbers of units that occur in the periods of `among` (P, T) bool, and how often."""
    row, column = np.nonzero(among & periods.observed & (periods.stock > 0))
    table = pd.DataFrame(
        {"row": row, "units": periods.units[row, column], "cut": periods.cut[row, column]}
    ).value_counts(sort=False)
    table = table.sort_index().reset_index(name="periods")
    place = table.groupby("row").cumcount().to_numpy()
    shape = (len(periods.units), place.max() + 1)
    result = [np.zeros(shape) for _ in range(3)]
    for array, name in zip(result, ("units", "periods", "cut")):
        array[table["row"], place] = table[name]
    return Counts(result[0], result[1], result[2] > 0)


def period_of(table: pd.DataFrame) -> str:
    found = [name for name in ("day", "week") if name in table.columns]
    if len(found) == 1:
        return found[0]
    problem = "columns 'day' and 'week' are both there" if found else "missing column 'day' or 'week'"
    raise TableError(f"{problem}; allowed: one of the two; found: {', '.join(map(str, table.columns))}")
