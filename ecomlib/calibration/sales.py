"""Reading a table of weekly sales, and refusing one that cannot be calibrated from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .tables import TableError, counts, identifiers, numbers, read_table, refuse, whole_periods

KEYS = ("product", "week")
REQUIRED = ("product", "week", "price", "units")
OPTIONAL = ("unit_cost", "visitors", "promotion")
SalesTableError = TableError
"""What a table of sales is refused with."""


def read_sales(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    """Read and check a table with one row per product and week. The input is never modified.

    =========  ========  ==============================================================================
    Column     Needed    Meaning and allowed values
    =========  ========  ==============================================================================
    product    required  any identifier, not missing
    week       required  a whole week number, or an ISO date (weeks are then counted from the earliest)
    price      required  what a unit cost the shopper that week, > 0, in one currency
    units      required  units sold, a whole number >= 0
    unit_cost  optional  what the unit cost the merchant, > 0, in the same currency
    visitors   optional  shoppers who could have bought that week, > 0
    promotion  optional  flag or share of the week (or of the stores) on promotion, 0 to 1
    =========  ========  ==============================================================================

    Other columns are kept as they are. A week in which nothing was sold belongs in the table with
    `units = 0` when its price is known; a week that is absent is treated as unobserved.

    Args:
        source: a DataFrame, or the path of a `.csv`, `.csv.gz` or `.parquet` file.

    Returns:
        A new table sorted by product and week; numbers as float64, `week` as int64.

    Raises:
        TableError: (a `ValueError`) naming the column, the number of offending rows, the first of
            them (counted from 1, header not counted) and what is allowed.
    """
    table = read_table(source, REQUIRED, "one row per product and week")
    identifiers(table, KEYS, "product", "any identifier, one per product")
    table["week"] = whole_periods(table, KEYS, "week", 7)
    numbers(table, KEYS, "price", lambda x: x > 0, "numbers > 0")
    counts(table, KEYS, "units", "take returns out")
    for name in ("unit_cost", "visitors"):
        if name in table:
            numbers(table, KEYS, name, lambda x: x > 0, "numbers > 0")
    if "promotion" in table:
        share = lambda x: (x >= 0) & (x <= 1)
        numbers(table, KEYS, "promotion", share, "a flag or a share between 0 and 1")

    duplicate = table.duplicated(["product", "week"])
    refuse(table, KEYS, "week", duplicate, "repeat a product and week", "one row per product and week (add up)")
    if table["product"].nunique() < 2:
        raise SalesTableError(
            f"column 'product': all {len(table)} rows are of one product, {table['product'].iloc[0]!r}; "
            "a prior describes how products differ and needs at least two"
        )
    return table.sort_values(["product", "week"], kind="stable", ignore_index=True)
