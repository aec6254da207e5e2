"""Tables of texts from a file, refused in words that name column and row where they cannot be read."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..calibration.tables import TableError, read_table, refuse

LONGEST = 5_000
"""Most characters of a text."""


def read_texts(source: pd.DataFrame | str | Path, required: Sequence[str], texts: Sequence[str], row: str):
    """A new table as of ``calibration.tables.read_table``, whose columns ``texts`` hold readable, non-empty text.

    Spaces around a text are removed. Raises TableError: as ``read_table``; a CSV file that is not UTF-8, naming line
    and column; a text that is missing, empty, not text, longer than 5,000 characters, or spoilt by an earlier reading
    in a wrong encoding.
    """
    if not isinstance(source, pd.DataFrame):
        require_utf8(Path(source))
    table = read_table(source, required, row)
    for name in texts:
        column, allowed = table[name], f"text of 1 to {LONGEST:,} characters"
        is_text = column.map(lambda value: isinstance(value, str))
        refuse(table, (), name, column.isna(), "missing", allowed)
        refuse(table, (), name, ~is_text, "not text", allowed)
        table[name] = column.astype(str).str.strip()
        refuse(table, (), name, table[name] == "", "empty", allowed)
        refuse(table.assign(**{name: table[name].str[:40]}), (), name, table[name].str.len() > LONGEST, "long", allowed)
        spoilt = table[name].str.contains("\ufffd|\u00c3[\u0080-\u00bf]", regex=True)
        refuse(table, (), name, spoilt, "hold characters of a wrong encoding", "text saved as UTF-8")
    return table


def require_utf8(path: Path) -> None:
    """Raise TableError where a `.csv` or `.csv.gz` file is not UTF-8, naming the first line and column at fault."""
    if not path.name.lower().endswith((".csv", ".csv.gz")) or not path.is_file():
        return
    with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            header, fields = (next(csv.reader([raw.decode("utf-8", "replace")]), []) for raw in (lines[0], line))
            place = next((i for i, field in enumerate(fields) if "\ufffd" in field), 0)
            name = header[place] if place < len(header) else f"number {place + 1}"
            raise TableError(
                f"{path}: column {name!r}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8; allowed: text "
                "saved as UTF-8 (a spreadsheet offers it as 'CSV UTF-8')"
            ) from None
