"""Reading a table of weekly sales, and refusing one that cannot be calibrated from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

REQUIRED = ("product", "week", "price", "units")
OPTIONAL = ("unit_cost", "visitors", "promotion")


class SalesTableError(ValueError):
    """The sales table cannot be used. The message names the column, the rows and what is allowed."""


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
        SalesTableError: (a `ValueError`) naming the column, the number of offending rows, the first of
            them (counted from 1, header not counted) and what is allowed.
    """
    table = source if isinstance(source, pd.DataFrame) else _read_file(source)
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns)) or "none"
        raise SalesTableError(
            f"missing column{'s'[: len(missing) > 1]} {', '.join(map(repr, missing))} in a table of "
            f"{len(table)} rows; required are {', '.join(REQUIRED)}; found: {found}"
        )
    repeated = sorted({str(name) for name in table.columns[table.columns.duplicated()]})
    if repeated:
        raise SalesTableError(f"column {repeated[0]!r} appears more than once; allowed: once")
    if len(table) == 0:
        raise SalesTableError("the table is empty: 0 rows; needed is one row per product and week")

    table = table.reset_index(drop=True)  # a new table from here on
    _refuse(table, "product", table["product"].isna(), "missing", "any identifier, one per product")
    if pd.api.types.infer_dtype(table["product"]).startswith("mixed"):
        text = table["product"].map(lambda value: isinstance(value, str))
        minority = text if text.mean() < 0.5 else ~text
        _refuse(table, "product", minority, "mix text and numbers", "one kind of identifier for all rows")
    table["week"] = _weeks(table)
    _numbers(table, "price", lambda x: x > 0, "numbers > 0")
    _numbers(table, "units", lambda x: (x >= 0) & (x == np.floor(x)), "whole numbers >= 0 (take returns out)")
    if "unit_cost" in table:
        _numbers(table, "unit_cost", lambda x: x > 0, "numbers > 0")
    if "visitors" in table:
        _numbers(table, "visitors", lambda x: x > 0, "numbers > 0")
    if "promotion" in table:
        _numbers(table, "promotion", lambda x: (x >= 0) & (x <= 1), "a flag or a share between 0 and 1")

    duplicate = table.duplicated(["product", "week"])
    _refuse(table, "week", duplicate, "repeat a product and week", "one row per product and week (add up)")
    if table["product"].nunique() < 2:
        raise SalesTableError(
            f"column 'product': all {len(table)} rows are of one product, {table['product'].iloc[0]!r}; "
            "a prior describes how products differ and needs at least two"
        )
    return table.sort_values(["product", "week"], kind="stable", ignore_index=True)


def _read_file(path: str | Path) -> pd.DataFrame:
    path = Path(path)
    name = path.name.lower()
    if not name.endswith((".csv", ".csv.gz", ".parquet")):
        raise SalesTableError(f"{path}: unknown kind of file; allowed are .csv, .csv.gz and .parquet")
    if not path.is_file():
        raise SalesTableError(f"{path}: there is no such file")
    try:
        return pd.read_parquet(path) if name.endswith(".parquet") else pd.read_csv(path)
    except Exception as error:  # pandas and pyarrow raise a dozen kinds for a foreign file
        kind = "Parquet" if name.endswith(".parquet") else "CSV"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SalesTableError(f"{path}: cannot be read as {kind} ({reason})") from error


def _weeks(table: pd.DataFrame) -> pd.Series:
    """Whole week numbers, (rows,) int64."""
    column = table["week"]
    allowed = "whole week numbers, or ISO dates such as 2024-01-31"
    if not pd.api.types.is_datetime64_any_dtype(column):
        number = pd.to_numeric(column, errors="coerce")
        if number.notna().any():
            bad = ~np.isfinite(number.astype("float64")) | (number != np.floor(number))
            _refuse(table, "week", bad, "not a whole number", allowed)
            _refuse(table, "week", number.abs() > 10_000, "beyond 10,000 (write dates as 2024-01-31)", allowed)
            return number.astype("int64")
        text = column.astype(str).str.replace(r"(:\d\d(?:\.\d+)?)(?:Z|[+-]\d\d(?::?\d\d)?)$", r"\1", regex=True)
        column = pd.to_datetime(text, errors="coerce", format="ISO8601", utc=True)
    column = column.dt.tz_localize(None)  # the shop's calendar: a week may have 167 hours
    _refuse(table, "week", column.isna(), "neither a number nor a date", allowed)
    return ((column - column.min()).dt.days // 7).astype("int64")


def _numbers(table: pd.DataFrame, name: str, valid: Callable[[pd.Series], pd.Series], allowed: str) -> None:
    """Replace a column of the (already copied) table by its checked float64 values."""
    column = table[name]
    dates = pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_timedelta64_dtype(column)
    number = column if dates else pd.to_numeric(column, errors="coerce")
    if number.dtype.kind not in "iufb":  # to_numeric turns dates into nanoseconds and lets complex numbers pass
        raise SalesTableError(f"column {name!r}: {len(table)} rows of {number.dtype}; allowed: {allowed}")
    number = number.astype("float64")
    _refuse(table, name, ~np.isfinite(number), "missing or not a finite number", allowed)
    _refuse(table, name, ~valid(number), "out of range", allowed)
    table[name] = number


def _refuse(table: pd.DataFrame, name: str, bad: pd.Series, problem: str, allowed: str) -> None:
    count = int(bad.sum())
    if count:
        first = int(np.flatnonzero(bad.to_numpy())[0])
        product, week, value = (_plain(table[column].iloc[first]) for column in ("product", "week", name))
        raise SalesTableError(
            f"column {name!r}: {count} of {len(table)} rows {problem}; the first is row {first + 1} "
            f"(product {product!r}, week {week!r}, {name} {value!r}); allowed: {allowed}"
        )


def _plain(value: object) -> object:
    """A NumPy scalar as the Python number that a reader would recognise."""
    return value.item() if isinstance(value, np.generic) else value
