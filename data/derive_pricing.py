"""Derive the pricing table from the Complete Journey panel: python data/derive_pricing.py [folder]

Writes complete_journey_pricing.parquet and complete_journey_selection.csv into the folder, by default this
one. Same panel, same rows: the panel's files are pinned by sha256 and nothing is drawn at random.
"""

import sys
from pathlib import Path

from ecomlib.calibration import complete_journey


def derive(folder: Path) -> None:
    sales, funnel = complete_journey.weekly_sales()
    compact = {"product": "int32", "week": "int16", "units": "int32", "visitors": "int32"}
    compact |= {"category": "category", "description": "category"}
    file = folder / "complete_journey_pricing.parquet"
    sales.astype(compact).to_parquet(file, compression="zstd", index=False)
    funnel.to_csv(folder / "complete_journey_selection.csv", index=False)
    print(f"{len(sales)} rows of {sales['product'].nunique()} products")


if __name__ == "__main__":
    derive(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
