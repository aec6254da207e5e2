"""Reading a merchant's table, and refusing what cannot be used in words that name column, row, value and what is
allowed."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd


class TableError(ValueError):
    """A table cannot be used. The message names the column, the rows and what is allowed."""


def read_table(source: pd.DataFrame | str | Path, required: Sequence[str], row: str) -> pd.DataFrame:
    """A new table with its rows numbered from 0, from a DataFrame or a `.csv`, `.csv.gz` or `.parquet` file.

    Args:
        source: the table or its path; a DataFrame is not modified.
        required: columns that must be there, each once.
        row: what a row is, for the message about a table without any.

    Raises:
        TableError: no such file, not a table, a column that is missing or there twice, or no rows.
    """
    table = source if isinstance(source, pd.DataFrame) else read_file(source)
    missing = [name for name in required if name not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns)) or "none"
        raise TableError(
            f"missing column{'s'[: len(missing) > 1]} {', '.join(map(repr, missing))} in a table of "
            f"{len(table)} rows; required are {', '.join(required)}; found: {found}"
        )
    repeated = sorted({str(name) for name in table.columns[table.columns.duplicated()]})
    if repeated:
        raise TableError(f"column {repeated[0]!r} appears more than once; allowed: once")
    if len(table) == 0:
        raise TableError(f"the table is empty: 0 rows; needed is {row}")
    return table.reset_index(drop=True)


def read_file(path: str | Path) -> pd.DataFrame:
    """The table in a file. Raises TableError naming the file."""
    path = Path(path)
    name = path.name.lower()
    if not name.endswith((".csv", ".csv.gz", ".parquet")):
        raise TableError(f"{path}: unknown kind of file; allowed are .csv, .csv.gz and .parquet")
    if not path.is_file():
        raise TableError(f"{path}: there is no such file")
    try:
        return pd.read_parquet(path) if name.endswith(".parquet") else pd.read_csv(path)
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: cannot be read as CSV: {_not_utf8(path)}") from error
    except Exception as error:  # pandas and pyarrow raise a dozen kinds for a foreign file
        kind = "Parquet" if name.endswith(".parquet") else "CSV"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TableError(f"{path}: cannot be read as {kind} ({reason})") from error


def _not_utf8(path: Path) -> str:
    """Where a CSV file first is not UTF-8, by column and line, and what to do."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            header, fields = (next(csv.reader([raw.decode("utf-8", "replace")]), []) for raw in (lines[0], line))
            place = next((i for i, field in enumerate(fields) if "\ufffd" in field), 0)
            name = header[place] if place < len(header) else f"number {place + 1}"
            return (
                f"column {name!r}, line {number}: byte {line[error.start]:#04x} is not UTF-8; allowed: text saved as "
                "UTF-8 (a spreadsheet offers it as 'CSV UTF-8')"
            )
    raise AssertionError("every line is UTF-8")


def identifiers(table: pd.DataFrame, keys: Sequence[str], name: str, allowed: str) -> None:
    """Refuse a column of identifiers with missing values, or with text in some rows and numbers in others."""
    refuse(table, keys, name, table[name].isna(), "missing", allowed)
    if pd.api.types.infer_dtype(table[name]).startswith("mixed"):
        text = table[name].map(lambda value: isinstance(value, str))
        minority = text if text.mean() < 0.5 else ~text
        refuse(table, keys, name, minority, "mix text and numbers", "one kind of identifier for all rows")


def numbers(
    table: pd.DataFrame, keys: Sequence[str], name: str, valid: Callable[[pd.Series], pd.Series], allowed: str
) -> None:
    """Replace a column of a table of one's own by its checked float64 values."""
    column = table[name]
    dates = pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_timedelta64_dtype(column)
    number = column if dates else pd.to_numeric(column, errors="coerce")
    if number.dtype.kind not in "iufb":  # to_numeric turns dates into nanoseconds and lets complex numbers pass
        raise TableError(f"column {name!r}: {len(table)} rows of {number.dtype}; allowed: {allowed}")
    number = number.astype("float64")
    refuse(table, keys, name, ~np.isfinite(number), "missing or not a finite number", allowed)
    refuse(table, keys, name, ~valid(number), "out of range", allowed)
    table[name] = number


def counts(table: pd.DataFrame, keys: Sequence[str], name: str, hint: str = "") -> None:
    """`numbers` that are whole and at least 0."""
    allowed = "whole numbers >= 0" + f" ({hint})" * bool(hint)
    numbers(table, keys, name, lambda x: (x >= 0) & (x == np.floor(x)), allowed)


def at_most(table: pd.DataFrame, keys: Sequence[str], name: str, limit: str) -> None:
    """Refuse rows in which one column is larger than another."""
    refuse(table, keys, name, table[name] > table[limit], f"above {limit!r}", f"at most {limit!r} of the row")


def refuse(table: pd.DataFrame, keys: Sequence[str], name: str, bad: pd.Series, problem: str, allowed: str) -> None:
    """Raise TableError where some rows are `bad`; the first is shown by its number (from 1), `keys` and value."""
    count = int(bad.sum())
    if count:
        first = int(np.flatnonzero(bad.to_numpy())[0])
        shown = ", ".join(f"{column} {plain(table[column].iloc[first])!r}" for column in dict.fromkeys((*keys, name)))
        raise TableError(
            f"column {name!r}: {count} of {len(table)} rows {problem}; the first is row {first + 1} ({shown}); "
            f"allowed: {allowed}"
        )


def whole_periods(table: pd.DataFrame, keys: Sequence[str], name: str, days: int) -> pd.Series:
    """(rows,) int64: whole numbers as they are, or dates counted in periods of so many days from the earliest.

    A date is the shop's calendar: its time zone and hour do not count.
    """
    column = table[name]
    allowed = f"whole {name} numbers, or ISO dates such as 2024-01-31"
    if not pd.api.types.is_datetime64_any_dtype(column):
        number = pd.to_numeric(column, errors="coerce")
        if number.notna().any():
            bad = ~np.isfinite(number.astype("float64")) | (number != np.floor(number))
            refuse(table, keys, name, bad, "not a whole number", allowed)
            beyond = "beyond 10,000 (write dates as 2024-01-31)"
            refuse(table, keys, name, number.abs() > 10_000, beyond, allowed)
            return number.astype("int64")
        text = column.astype(str).str.replace(r"(:\d\d(?:\.\d+)?)(?:Z|[+-]\d\d(?::?\d\d)?)$", r"\1", regex=True)
        column = pd.to_datetime(text, errors="coerce", format="ISO8601", utc=True)
    column = column.dt.tz_localize(None)  # the shop's calendar: a week may have 167 hours
    refuse(table, keys, name, column.isna(), "neither a number nor a date", allowed)
    return ((column - column.min()).dt.days // days).astype("int64")


def plain(value: object) -> object:
    """A NumPy scalar as the Python number that a reader would recognise."""
    return value.item() if isinstance(value, np.generic) else value
