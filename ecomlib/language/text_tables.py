"""Tables of texts from a file, refused in words that name column and row where they cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..calibration.tables import read_table, refuse

LONGEST = 5_000
"""Most characters of a text."""


def read_texts(source: pd.DataFrame | str | Path, required: Sequence[str], texts: Sequence[str], row: str):
    """A new table as of ``calibration.tables.read_table``, whose columns ``texts`` hold readable, non-empty text.

    Spaces around a text are removed. Raises TableError: as ``read_table``; a text that is missing, empty, not text,
    longer than 5,000 characters, or spoilt by an earlier reading in a wrong encoding.
    """
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
