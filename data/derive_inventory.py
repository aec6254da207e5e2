"""Derive the inventory table from the Complete Journey panel: python data/derive_inventory.py [folder]

Writes complete_journey_inventory.parquet into the folder, by default this one: units a day of the products of
complete_journey_pricing.parquet. Same panel, same rows: the panel's files are pinned by sha256.
"""

import sys
from pathlib import Path

import pandas as pd

from ecomlib.calibration import complete_journey

HERE = Path(__file__).parent


def derive(folder: Path) -> None:
    products = pd.read_parquet(HERE / "complete_journey_pricing.parquet", columns=["product"])["product"].unique()
    units = complete_journey.daily_units(products)
    compact = units.astype({"product": "int32", "day": "int16", "units": "int16"})
    compact.to_parquet(folder / "complete_journey_inventory.parquet", compression="zstd", index=False)
    print(f"{len(units)} rows of {units['product'].nunique()} products")


if __name__ == "__main__":
    derive(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
