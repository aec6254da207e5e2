"""The listed products, and what a model reads of each (chapter "Behaviour prediction with a pretrained encoder")."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..calibration.tables import TableError, read_table

COLUMNS = ("product", "department", "category", "description", "size", "brand", "price", "tier")


def read_products(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    """Products with a column ``text``: description, size and brand, "instant oatmeal, 14.2 ounce, national brand".

    ``source`` is ``data/complete_journey_products.parquet``, or a table with its columns. Department, category, price
    and tier are *not* in the text: what the encoder is to find out. Raises TableError naming column and row.
    """
    table = read_table(source, COLUMNS, "one product")
    names = ["description", "size", "brand"]
    for name in names:
        empty = table[name].isna() | (table[name].astype(str).str.strip() == "")
        if empty.any():
            row = int(empty.to_numpy().argmax())
            raise TableError(f"column {name!r}: row {row + 1} is empty; allowed: text")
    return table.assign(text=table[names].astype(str).agg(", ".join, axis=1))
