"""A shop's own log of events, read and checked (chapter "Behaviour prediction with a pretrained encoder", section on
your own log)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..calibration.tables import TableError, identifiers, numbers, read_table, refuse
from .behaviour import EVENTS


class EventLog(NamedTuple):
    """A log as the rest of ``ecomlib.language`` wants it."""

    events: pd.DataFrame
    """shop, session, time (days), slate, place, product (row of ``products``), event (number in EVENTS)."""
    products: pd.DataFrame
    """text, and category if the log has one: one row for each text."""


def load_events(source: pd.DataFrame | str | Path, names: Mapping[str, str] | None = None) -> EventLog:
    """A log of impressions from a DataFrame, CSV or Parquet file, one row for each product shown.

    ===========  ======================================================================================================
    Column       Meaning
    ===========  ======================================================================================================
    session      which visit; text or number
    time         when: days as a number, or a date and time such as 2026-01-31 18:05
    text         the product in words, as a shopper reads it
    event        O (shown, nothing happened), click, browse, cart or purchase: the furthest that happened
    slate        optional: which list of the visit; without it, rows of a session with the same time are one list
    place        optional: place in the list, from 0; without it, the order of the rows
    shop         optional: 0
    category     optional: which products belong together
    ===========  ======================================================================================================

    ``names`` translates the shop's own words for events, {"product_view": "click", "add_to_cart": "cart"}. Upper and
    lower case do not matter. A log without impressions that led to nothing (no O) is refused: from such a log nobody
    can learn what is *not* clicked. Raises TableError naming column, row and what is allowed.
    """
    table = read_table(source, ("session", "time", "text", "event"), "one product shown to one visitor")
    keys = ("session",)
    identifiers(table, keys, "session", "an identifier of the visit")
    table["time"] = _days(table)
    text = table["text"].astype("string").str.strip()
    refuse(table, keys, "text", table["text"].isna() | (text == ""), "empty", "text with at least one character")
    event = table["event"].astype("string").str.strip().str.lower()
    words = {word.lower(): number for number, word in enumerate(EVENTS)}
    for word, meaning in (names or {}).items():
        if meaning.lower() not in words:
            raise TableError(f"names[{word!r}] = {meaning!r}; allowed: {', '.join(EVENTS)}")
        words[word.lower()] = words[meaning.lower()]
    number = event.map(words)
    allowed = f"{', '.join(EVENTS)}, or a word that `names` translates to one of them"
    refuse(table, keys, "event", number.isna(), "unknown", allowed)
    if not (number == 0).any():
        raise TableError(f"column 'event': none of {len(table)} rows is O; allowed: also products that led to nothing")
    for name in ("slate", "place"):
        if name in table:
            whole = lambda x: (x >= 0) & (x == np.floor(x))
            numbers(table, keys, name, whole, "whole numbers >= 0")
    session = pd.factorize(table["session"])[0]
    if "slate" not in table:
        table["slate"] = table.groupby(session)["time"].rank(method="dense") - 1
    group = [session, table["slate"]]
    if "place" not in table:
        table["place"] = table.groupby(group).cumcount()
    twice = pd.Series(pd.DataFrame({"s": session, "l": table["slate"], "p": table["place"]}).duplicated())
    refuse(table, ("session", "slate"), "place", twice, "there twice in one slate", "one product at each place")
    product, unique = pd.factorize(text)
    products = pd.DataFrame({"text": np.asarray(unique, dtype=object)})
    if "category" in table:
        identifiers(table, keys, "category", "the name of a category")
        kinds = table.groupby(product)["category"]
        first = kinds.first()
        several = table["category"] != first.reindex(product).to_numpy()
        refuse(table, ("text",), "category", several, "another than before for the same text", "one for each text")
        products["category"] = first.to_numpy()
    shop = pd.factorize(table["shop"])[0] if "shop" in table else np.zeros(len(table), np.int64)
    events = pd.DataFrame(
        {
            "shop": shop,
            "session": session,
            "time": table["time"],
            "slate": table["slate"].astype("int64"),
            "place": table["place"].astype("int64"),
            "product": product,
            "event": number.astype("int64"),
        }
    )
    order = np.lexsort((events["place"], events["slate"], events["session"]))
    return EventLog(events.iloc[order].reset_index(drop=True), products)


def _days(table: pd.DataFrame) -> pd.Series:
    """The column time in days: numbers as they are, dates from the midnight before the first."""
    column = table["time"]
    allowed = "days as a number, or dates and times such as 2026-01-31 18:05"
    if not pd.api.types.is_datetime64_any_dtype(column):
        number = pd.to_numeric(column, errors="coerce")
        if number.notna().any():
            refuse(table, ("session",), "time", ~np.isfinite(number.astype("float64")), "not a finite number", allowed)
            return number.astype("float64")
        column = pd.to_datetime(column.astype(str), errors="coerce", format="ISO8601", utc=True)
    refuse(table, ("session",), "time", column.isna(), "neither a number nor a date", allowed)
    if column.dt.tz is not None:
        column = column.dt.tz_convert("UTC").dt.tz_localize(None)
    return (column - column.min().normalize()) / pd.Timedelta(days=1)
