"""``python -m ecomlib calibrate``: a merchant's table in, a market that ``train --market`` reads out."""

import hashlib
import subprocess
import sys
import tomllib
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from ecomlib.__main__ import main
from ecomlib.calibration import (
    BiddingConfig,
    CalibrationConfig,
    InventoryConfig,
    RecommendationConfig,
    calibrate_bidding,
    calibrate_inventory,
    calibrate_pricing,
    calibrate_recommendation,
)
from ecomlib.cli.calibrate import CALIBRATIONS
from ecomlib.cli.train import read_market
from ecomlib.runs import Run


@pytest.fixture(scope="module")
def sales(tmp_path_factory):
    """30 products with 40 weeks of sales, drawn from the model of the calibration."""
    rng = np.random.default_rng(0)
    sensitivity, share = np.exp(rng.normal(0.3, 0.5, 30)), rng.normal(-3.0, 0.7, 30)
    deal = rng.choice([0.8, 0.9, 1.0, 1.0, 1.1, 1.2], (30, 40))
    visitors = np.broadcast_to(rng.integers(400, 600, 40), deal.shape)
    units = rng.poisson(visitors * expit(share[:, None] - sensitivity[:, None] * (deal - 1) / 0.7))
    product, week = np.indices(deal.shape).reshape(2, -1)
    columns = {"product": product, "week": week, "price": 2 * deal.ravel(), "units": units.ravel()}
    path = tmp_path_factory.mktemp("sales") / "sales.parquet"
    pd.DataFrame(columns | {"visitors": visitors.ravel()}).to_parquet(path)
    return path


@pytest.fixture
def calibrate(sales, tmp_path, capsys):
    """Run the command in this process: exit status, stdout, stderr."""

    def run(*flags, table=sales, out=tmp_path / "market.toml"):
        status = main(["calibrate", "pricing", "--table", str(table), "--out", str(out), *flags])
        return status, *capsys.readouterr()

    return run


def test_the_market_is_the_calibrations_own_and_says_where_it_is_from(calibrate, sales, tmp_path):
    status, told, _ = calibrate("--minimum-units", "100")
    found = calibrate_pricing(sales, CalibrationConfig(minimum_units=100))
    assert status == 0 and str(found) in told
    assert read_market(tmp_path / "market.toml", "pricing") == found.family()
    stored = tomllib.loads((tmp_path / "market.toml").read_text())
    calibration = stored["calibration"]
    assert calibration["sha256"] == hashlib.sha256(sales.read_bytes()).hexdigest()
    assert (calibration["table"], calibration["rows"], calibration["products"]) == ("sales.parquet", 1200, 30)
    assert calibration["assumptions"] == list(found.assumptions)
    assert calibration["settings"]["minimum_units"] == 100 and calibration["grid"]["prices"] == 11
    assert (tmp_path / "market.svg").read_text().startswith("<?xml")
    assert str(sales.parent) not in (tmp_path / "market.toml").read_text()


def test_settings_reach_the_calibration(calibrate, sales, tmp_path):
    assert calibrate("--margin", "0.4", "--prices", "5", "--daily-shoppers", "70", "--minimum-products", "10")[0] == 0
    found = calibrate_pricing(sales, CalibrationConfig(margin=0.4, minimum_products=10))
    assert read_market(tmp_path / "market.toml", "pricing") == found.family(5, 70.0)


def test_a_calibrated_market_is_trained_on(calibrate, tmp_path):
    """Training in a process of its own."""
    assert calibrate("--prices", "12")[0] == 0
    tiny = "--iterations 1 --data.tasks 6 --data.episodes 2 --policy.hidden 4 --run run --market market.toml".split()
    command = [sys.executable, "-m", "ecomlib", "train", "pricing", *tiny]
    subprocess.run(command, cwd=tmp_path, check=True)
    family = Run.open(tmp_path / "run").config.family
    assert family == read_market(tmp_path / "market.toml", "pricing") and len(family.markups) == 12


def test_nothing_is_overwritten_unless_asked(calibrate, tmp_path):
    assert calibrate("--prices", "4")[0] == 0
    before = (tmp_path / "market.toml").read_bytes()
    status, _, error = calibrate("--prices", "5")
    assert status == 2 and "exists" in error and "--overwrite" in error
    assert (tmp_path / "market.toml").read_bytes() == before
    assert calibrate("--prices", "5", "--overwrite")[0] == 0
    assert len(read_market(tmp_path / "market.toml", "pricing").markups) == 5
    (tmp_path / "other.svg").write_text("mine")
    status, _, error = calibrate(out=tmp_path / "other.toml")
    assert status == 2 and "other.svg exists" in error and not (tmp_path / "other.toml").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(price=-t["price"]), "column 'price': 1200 of 1200 rows out of range; the first is row 1"),
        (lambda t: t.drop(columns="units"), "missing column 'units'"),
        (lambda t: t[t["product"] < 5], "column 'product': only 5 of 5 products survive"),
    ],
)
def test_bad_tables_are_refused_with_the_calibrations_words(calibrate, sales, tmp_path, change, message):
    change(pd.read_parquet(sales)).to_csv(tmp_path / "bad.csv", index=False)
    status, told, error = calibrate(table=tmp_path / "bad.csv")
    assert status == 2 and error.startswith("error: ") and message in error and told == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv"]


def test_what_is_no_table_or_no_place_is_refused(calibrate, tmp_path):
    (tmp_path / "code.parquet").write_bytes(b"\x80\x04cos\nsystem\n")
    assert "cannot be read as Parquet" in calibrate(table=tmp_path / "code.parquet")[2]
    assert "there is no such file" in calibrate(table=tmp_path / "none.csv")[2]
    status, _, error = calibrate(out=tmp_path / "folder" / "market.toml")
    assert status == 2 and "there is no such folder" in error
    status, _, error = calibrate(out=tmp_path / "market.json")
    assert status == 2 and "out = " in error and ".toml" in error
    status, _, error = calibrate("--margin", "1.5")
    assert status == 2 and "CalibrationConfig.margin = 1.5; allowed: 0 < margin < 1" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["navigation", "--table", "x"],
            "family = 'navigation'; allowed for calibrate: pricing, inventory, bidding, rec",
        ),
        (
            ["--table", "x"],
            "name a task family first: python -m ecomlib calibrate {pricing,inventory,bidding,rec",
        ),
        ([], "name a task family first"),
    ],
)
def test_families_that_can_be_calibrated_are_named(arguments, message, capsys):
    assert main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_setting_of_the_calibration_is_a_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "pricing", "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    for field in fields(CalibrationConfig):
        assert f"--{field.name.replace('_', '-')} " in told


# ------------------------------------------------------------------------------------------- the other families
def stock_table(rng):
    """40 products, 40 days: a stock that does not know the product, and what was sold of it."""
    mean, dispersion = np.exp(rng.normal(1.5, 0.6, (40, 1))), 1 + np.exp(rng.normal(0.2, 0.4, (40, 1)))
    demand = rng.negative_binomial(mean / (dispersion - 1), 1 / dispersion, (40, 40))
    stock = rng.integers(0, 20, demand.shape)
    product, day = np.indices(demand.shape).reshape(2, -1)
    sold = np.minimum(demand, stock).ravel()
    return pd.DataFrame({"product": product, "day": day, "units": sold, "stock": stock.ravel()})


def auction_table(rng):
    """3 campaigns, 4 segments, all hours of 2 days."""
    campaign, segment, day, hour = np.indices((3, 4, 2, 24)).reshape(4, -1)
    rate, price = np.exp(rng.normal(-4, 0.8, (3, 4))), np.exp(rng.normal(-4.5, 0.4, (3, 4)))
    bid = 0.012 * np.exp(rng.normal(0, 0.5, len(hour)))
    wins = rng.binomial(500, 1 / (1 + (price[campaign, segment] / bid) ** 2))
    paid = wins * np.minimum(bid, price[campaign, segment]) * 0.8
    columns = {"campaign": campaign, "segment": segment, "day": day, "hour": hour, "requests": 500, "wins": wins}
    return pd.DataFrame(columns | {"spend": paid, "bid": bid, "clicks": rng.poisson(wins * rate[campaign, segment])})


def click_table(rng):
    """12 segments, 15 items, 3 places."""
    shopper, item, position = np.indices((12, 15, 3)).reshape(3, -1)
    rate = np.exp(rng.normal(-4, 0.7, (12, 15)))[shopper, item] * 0.8**position
    clicks = rng.binomial(400, rate)
    columns = {"shopper": shopper, "item": item, "position": position + 1, "impressions": 400, "clicks": clicks}
    return pd.DataFrame(columns | {"carts": rng.binomial(clicks, 0.1)})


OTHERS = {
    "inventory": (stock_table, calibrate_inventory, InventoryConfig(minimum_units=30),
                  {"levels": 9, "daily_units": 7.0}, "units"),
    "bidding": (auction_table, calibrate_bidding, BiddingConfig(value=0.5), {"segments": 3}, "wins"),
    "recommendation": (click_table, calibrate_recommendation, RecommendationConfig(features=3), {"slates": 4},
                       "clicks"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_family_is_calibrated_written_and_trained_on(name, tmp_path, capsys, monkeypatch):
    """The same market in the file as from the library, a picture, and a run of one iteration on it."""
    make, fit, config, grid, column = OTHERS[name]
    monkeypatch.chdir(tmp_path)
    table = make(np.random.default_rng(3))
    table.to_csv("table.csv", index=False)
    given = {k: v for k, v in vars(config).items() if v != getattr(type(config)(), k)} | grid
    flags = [x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    assert main(["calibrate", name, "--table", "table.csv", "--out", "market.toml", *flags]) == 0
    told, found = capsys.readouterr().out, fit("table.csv", config)
    assert str(found) in told and f"train {name} --market market.toml" in told
    family = read_market(tmp_path / "market.toml", name)
    assert family == found.family(**grid)
    stored = tomllib.loads((tmp_path / "market.toml").read_text())["calibration"]
    assert stored["rows"] == len(table) and stored["assumptions"] == list(found.assumptions)
    assert stored["sha256"] == hashlib.sha256((tmp_path / "table.csv").read_bytes()).hexdigest()
    assert (tmp_path / "market.svg").read_text().startswith("<?xml")
    tiny = "--iterations 1 --data.tasks 4 --data.episodes 2 --policy.hidden 4 --run run --market market.toml".split()
    assert main(["train", name, *tiny]) == 0
    assert Run.open(tmp_path / "run").config.family == family

    # A bad table: refused by column and row, and nothing on disk is touched.
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    table.loc[4, column] = -3
    table.to_csv("bad.csv", index=False)
    assert main(["calibrate", name, "--table", "bad.csv", "--out", "market.toml", "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert f"error: column '{column}': 1 of {len(table)} rows out of range; the first is row 5" in error
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_help_names_the_columns_and_every_setting(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", name, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "one row per" in told
    for kind in (CALIBRATIONS[name].config, CALIBRATIONS[name].grid):
        for field in fields(kind):
            assert f"--{field.name.replace('_', '-')}" in told
