"""``python -m ecomlib calibrate FAMILY``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import tomli_w
import tyro

from ..calibration import (
    BiddingConfig,
    CalibrationConfig,
    InventoryConfig,
    RecommendationConfig,
    calibrate_bidding,
    calibrate_inventory,
    calibrate_pricing,
    calibrate_recommendation,
)
from ..config_files import plain
from ..environment import distribution_version
from ..families.base import check, number, whole
from ..files import write_atomically
from ..pictures import picture

ConfigT = TypeVar("ConfigT")
GridT = TypeVar("GridT")


@dataclass(frozen=True)
class PricingGrid:
    """What the table of sales does not say of the family."""

    prices: int = 11
    """Prices that may be posted: a geometric grid that spans the best markups of nine in ten products."""
    daily_shoppers: float | None = None
    """Shoppers a day of the products to be priced; None is as in the table."""

    def __post_init__(self):
        check(self, "prices", lambda x: whole(x, 2), "a whole number >= 2")
        check(self, "daily_shoppers", lambda x: x is None or number(x, 0), "None or a finite number > 0")


@dataclass(frozen=True)
class InventoryGrid:
    """What the table of sales does not say of the family."""

    levels: int = 32
    """Order-up-to levels on offer: roughly log-spaced, to what the best-selling products need."""
    daily_units: float | None = None
    """Units a day of the median product; None is as in the table."""

    def __post_init__(self):
        check(self, "levels", lambda x: whole(x, 2), "a whole number >= 2")
        check(self, "daily_units", lambda x: x is None or number(x, 0), "None or a finite number > 0")


@dataclass(frozen=True)
class BiddingGrid:
    """What the log of auctions does not say of the family."""

    segments: int | None = None
    """Segments of a campaign; None is as the table's median campaign."""

    def __post_init__(self):
        check(self, "segments", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")


@dataclass(frozen=True)
class RecommendationGrid:
    """What the log of clicks does not say of the family."""

    slates: int = 20
    """Most slates in a session."""

    def __post_init__(self):
        check(self, "slates", lambda x: whole(x, 1), "a whole number >= 1")


class Calibration(NamedTuple):
    """How a family is calibrated."""

    config: type
    """Settings of the fit, a frozen dataclass."""
    grid: type
    """Settings of the family that the table does not hold; its fields are arguments of the result's ``family``."""
    fit: Callable[[Path, Any], Any]
    """(table, config) -> a result like ``calibration.PricingCalibration``: with ``family``, ``plot_fit``, ``summary``,
    ``assumptions`` and a report as its text."""
    columns: str
    """What a row of the table is, and its columns."""


CALIBRATIONS = {
    "pricing": Calibration(
        CalibrationConfig,
        PricingGrid,
        calibrate_pricing,
        "one row per product and week with product, week, price, units, and if known unit_cost, visitors, promotion",
    ),
    "inventory": Calibration(
        InventoryConfig,
        InventoryGrid,
        calibrate_inventory,
        "one row per product and day (or week) with product, day, units, and if known stock (what could be sold)",
    ),
    "bidding": Calibration(
        BiddingConfig,
        BiddingGrid,
        calibrate_bidding,
        "one row per campaign, day, hour and segment with segment, requests, wins, spend, conversions (or clicks), and "
        "if known campaign, day, hour, bid, quality",
    ),
    "recommendation": Calibration(
        RecommendationConfig,
        RecommendationGrid,
        calibrate_recommendation,
        "one row per shopper (or segment), item and position with item, impressions, clicks, and if known shopper, "
        "position, carts, orders",
    ),
}
"""Families that can be calibrated."""


@dataclass(frozen=True)
class CalibrateOptions(Generic[ConfigT, GridT]):
    """Fit a task family to a table. Writes a file for `train --market` and a picture of the fit."""

    table: Path
    """The table: .csv, .csv.gz or .parquet."""
    out: Path
    """File to write, .toml; the picture goes next to it with the ending .svg."""
    settings: Annotated[ConfigT, tyro.conf.arg(name="")]
    grid: Annotated[GridT, tyro.conf.arg(name="")]
    overwrite: bool = False
    """Replace the file if it exists."""


def main(arguments: Sequence[str]) -> int:
    """Parse, fit, print the fit's own report and write."""
    family, rest = named_family(arguments, "calibrate", CALIBRATIONS)
    chosen = CALIBRATIONS[family]
    options = tyro.cli(
        CalibrateOptions[chosen.config, chosen.grid],
        default=CalibrateOptions(tyro.MISSING, tyro.MISSING, chosen.config(), chosen.grid()),
        args=rest,
        prog=f"python -m ecomlib calibrate {family}",
        description=f"Fit a task family to a table: {chosen.columns}. Writes a file for `train --market` and a picture "
        "of the fit.",
    )
    check(options, "out", lambda x: x.suffix == ".toml", "a file that ends in .toml")
    files = [options.out, options.out.with_suffix(".svg")]
    for file in files:
        if file.exists() and not options.overwrite:
            raise ValueError(f"{file} exists: name another file (--out), or replace it (--overwrite)")
    if not os.access(options.out.parent, os.W_OK):
        raise OSError(f"{options.out.parent}: there is no such folder, or it cannot be written to")
    found = chosen.fit(options.table, options.settings)
    market = {
        "family_name": family,
        "family": plain(found.family(**vars(options.grid))),
        "calibration": provenance(found, options),
    }
    print(found)
    with picture(files[1], figsize=(9, 3.6)) as figure:
        found.plot_fit(figure.subplots(1, 2))
    write_atomically(files[0], tomli_w.dumps(market).encode())
    print(f"\nwritten: {files[0]}, {files[1]}\nNext: python -m ecomlib train {family} --market {files[0]}")
    return 0


def named_family(arguments: Sequence[str], command: str, allowed: Iterable[str]) -> tuple[str, list[str]]:
    """The family, which is the first argument, and the others. Where only help is asked for, any family explains it."""
    names = tuple(allowed)
    if arguments and arguments[0] in names:
        return arguments[0], list(arguments[1:])
    if {"-h", "--help"} & set(arguments):
        return names[0], ["--help"]
    usage = f"python -m ecomlib {command} {{{','.join(names)}}} [--help]"
    if arguments and not arguments[0].startswith("-"):
        raise ValueError(f"family = {arguments[0]!r}; allowed for {command}: {', '.join(names)}. Usage: {usage}")
    raise ValueError(f"name a task family first: {usage}")


def provenance(found: Any, options: CalibrateOptions) -> dict[str, Any]:
    """What the family was fitted to, and what had to be assumed."""
    return {
        "table": options.table.name,
        "sha256": hashlib.sha256(options.table.read_bytes()).hexdigest(),
        **found.summary(),
        "assumptions": list(found.assumptions),
        "ecomlib": distribution_version("ecomlib") or "not installed",
        "settings": plain(options.settings),
        "grid": plain(options.grid),
    }
