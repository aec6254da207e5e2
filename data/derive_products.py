"""Derive the product texts from the Complete Journey panel: python data/derive_products.py [folder]

Writes complete_journey_products.parquet into the folder, by default this one; shop_departments.csv, which is ours, is
read from this one. The panel's files are pinned by sha256 and nothing is drawn at random.
"""

import sys
from pathlib import Path

from ecomlib.calibration.product_texts import product_texts


def derive(folder: Path) -> None:
    products = product_texts(Path(__file__).parent / "shop_departments.csv")
    compact = {"product": "int32", "department": "category", "category": "category", "brand": "category"}
    products = products.astype(compact | {"tier": "category"})
    products.to_parquet(folder / "complete_journey_products.parquet", compression="zstd", index=False)
    print(f"{len(products)} products of {products['category'].nunique()} categories")


if __name__ == "__main__":
    derive(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
