"""Products of the Complete Journey panel as a shop would label them: words, size, brand and price.

The panel is read by path and checked as in `complete_journey.py`; `data/complete_journey.md` says what must not be
concluded from it. Departments are ours (`data/shop_departments.csv`), since the panel's own put two thirds of all
products in one. Chapters of the part "Large models".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ecomlib.families.base import check, whole

from .complete_journey import _checked

TIERS = ("low", "middle", "high")
"""Thirds of a category by price."""
WORDS = {"frzn": "frozen", "refrgratd": "refrigerated", "oz": "ounce", "ct": "count", "pk": "pack", "lb": "pound"}
WORDS |= {"gal": "gallon", "ltr": "liter", "ml": "milliliter", "pwdr": "powder", "veg": "vegetable", "jce": "juice"}
"""Abbreviations of the panel, written out."""


@dataclass(frozen=True)
class ProductSelection:
    """Which products of the panel are listed. Of those with the same words, size and brand, the one sold most often."""

    minimum_lines: int = 20
    """Receipt lines that a product must have: fewer give no price to speak of."""
    minimum_products: int = 8
    """Products that a category must have left."""
    maximum_products: int = 20
    """Most products of a category: those sold most often."""

    def __post_init__(self):
        check(self, "minimum_lines", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "minimum_products", lambda x: whole(x, 1), "a whole number >= 1")
        least = self.minimum_products
        check(self, "maximum_products", lambda x: whole(x, least), f"a whole number >= minimum_products = {least}")


def product_texts(departments: Path | str, selection: ProductSelection = ProductSelection()) -> pd.DataFrame:
    """The listed products: product, department, category, description, size, brand, price, tier.

    ``departments`` is the table (department, category) that says which categories of the panel are listed, and where.
    The price is the median over receipt lines of what a loyalty card holder paid for one unit (as in
    ``complete_journey.weekly_sales``), in dollars; the tier is its third within the category.

    Raises:
        PanelError: the package is missing or its files are not the pinned ones.
    """
    columns = ["product_id", "quantity", "sales_value", "coupon_match_disc"]
    lines = pd.read_parquet(_checked("transactions.parquet"), columns=columns)
    paid = lines["sales_value"] + lines["coupon_match_disc"]
    lines = lines.assign(price=paid / lines["quantity"])[(lines["quantity"] > 0) & (paid > 0)]
    sold = lines.groupby("product_id").agg(lines=("quantity", "size"), price=("price", "median"))
    products = pd.read_parquet(_checked("products.parquet")).drop(columns="department")
    products = products.merge(pd.read_csv(departments), left_on="product_category", right_on="category")
    products = products.merge(sold[sold["lines"] >= selection.minimum_lines], on="product_id")
    products = products.dropna(subset=["product_type", "package_size"])
    products = products.assign(
        description=products["product_type"].map(plain_words), size=products["package_size"].map(plain_words)
    )
    products = products.sort_values(["lines", "product_id"], ascending=[False, True])
    products = products.drop_duplicates(["category", "description", "size", "brand"])
    products = products.groupby("category").head(selection.maximum_products)
    products = products[products.groupby("category")["category"].transform("size") >= selection.minimum_products]
    rank = products.groupby("category")["price"].rank(method="first", pct=True)
    products = products.assign(
        brand=products["brand"].map({"National": "national brand", "Private": "store brand"}),
        tier=pd.cut(rank, [0, 1 / 3, 2 / 3, 1], labels=TIERS).astype(str),
        price=products["price"].round(2),
        product=products["product_id"],
    )
    names = ["product", "department", "category", "description", "size", "brand", "price", "tier"]
    return products[names].sort_values(["department", "category", "product"], ignore_index=True)


def plain_words(text: str) -> str:
    """Lower case, without punctuation between words, the panel's abbreviations written out.

    >>> plain_words("FRZN BREADED PREPARED CHICK/12 OZ")
    'frozen breaded prepared chick 12 ounce'
    """
    words = re.sub(r"[^a-z0-9.%]+", " ", text.lower()).split()
    return " ".join(WORDS.get(word, word) for word in words)
