"""Calibration of demand from cut sales: known parameters come back, the likelihood is exact, bad tables are refused."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import nbinom

from ecomlib.calibration import InventoryConfig, TableError, calibrate_inventory, read_stock
from ecomlib.calibration.stock_model import Counts, fit_demand, log_likelihood
from ecomlib.calibration.stock_table import count, prepare_stock
from ecomlib.families.base import sample_tasks
from ecomlib.families.inventory import CensoredInventory, LogNormalDemand

PANEL = Path(__file__).parents[1] / "data" / "complete_journey_inventory.parquet"
TRUTH = LogNormalDemand(mean=(1.6, 0.1), factor=((0.6, 0.0), (0.3, 0.5)))


def log(products, days, seed, prior=TRUTH, levels=None):
    """A shop's book: what each product of the prior sold in `days` days, and what there was to sell.

    The order-up-to level of a product changes from day to day and knows nothing of the product.
    """
    family = CensoredInventory(days=days, prior=prior)
    tasks = sample_tasks(family, products, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    state = family.reset(tasks, 1, torch.rand(products, 1, 1, generator=generator))
    rows = []
    for _ in range(days):
        low, high = levels or (0, 15)
        action = torch.randint(low, high, (products, 1), generator=generator)
        state, _, _ = family.step(tasks, state, action, torch.rand(products, 1, 1, generator=generator))
        rows.append(torch.stack((state.sold, state.available), -1)[:, 0])
    sold, stock = torch.stack(rows, 1).numpy().astype(int).transpose(2, 0, 1)
    product, day = np.indices(sold.shape).reshape(2, -1)
    table = pd.DataFrame({"product": product, "day": day, "units": sold.ravel(), "stock": stock.ravel()})
    return table, torch.stack((tasks.mean.log(), (tasks.dispersion - 1).log()), 1).numpy()


@pytest.fixture(scope="module")
def book():
    return log(300, 70, seed=5)


@pytest.fixture(scope="module")
def fitted(book):
    return calibrate_inventory(book[0])


# ------------------------------------------------------------------------------------------- the prior comes back
def test_the_prior_is_recovered_from_sales_that_stock_cut(book, fitted):
    """Against what these very products are: their mean within 3 standard errors, their spread within 15 %."""
    _, truth = book
    assert 0.2 < fitted.products["sold_out"].mean() < 0.8
    assert np.abs(fitted.prior.mean - truth.mean(0)).max() < 3 * min(fitted.prior_error) < 0.2
    factor = np.array(fitted.prior.factor)
    spread = np.sqrt(np.diag(factor @ factor.T))
    assert spread == pytest.approx(truth.std(0), rel=0.15)
    correlation = (factor @ factor.T)[0, 1] / spread.prod()
    assert correlation == pytest.approx(np.corrcoef(truth.T)[0, 1], abs=0.15)
    assert np.corrcoef(np.log(fitted.products["mean"]), truth[:, 0])[0, 1] > 0.97


def test_taking_sales_for_demand_is_biased_low(book, fitted):
    """Without the stock column the same sales say that products sell less and vary less, the more so the more often a
    product sold out; with it, its mean is right however often that was."""
    naive = calibrate_inventory(book[0].drop(columns="stock"))
    assert (np.array(fitted.prior.mean) - naive.prior.mean > 3 * np.array(fitted.prior_error)).all()
    truth, sold_out = book[1][:, 0], fitted.products["sold_out"]
    for low, high, lost in ((0.2, 0.4, 0.15), (0.4, 0.6, 0.3), (0.6, 1.0, 0.5)):
        some = ((sold_out >= low) & (sold_out < high)).to_numpy()
        assert some.sum() > 30
        assert (np.log(naive.products["mean"]) - truth)[some].mean() < -lost
        assert np.abs((np.log(fitted.products["mean"]) - truth)[some].mean()) < 0.05
        assert (naive.products["mean"] < fitted.products["mean"])[some].all()
    assert "Stock is not in the table" in naive.assumptions[0]


def test_standard_errors_are_those_of_repeated_samples():
    """30 shops of the same prior: their estimates spread as much as their standard errors say."""
    found = []
    for i in range(30):
        sales = read_stock(log(60, 40, seed=100 + 2 * i)[0])
        _, periods, _ = prepare_stock(sales, "day", InventoryConfig())
        found.append(fit_demand(count(periods, periods.observed)))
    means, errors = np.array([f.mean for f in found]), np.array([f.mean_error for f in found])
    assert np.abs((means.mean(0) - TRUTH.mean) / (means.std(0) / np.sqrt(30))).max() < 3.5
    # The standard deviation of 30 values is known to 13 %.
    assert means.std(0) == pytest.approx(np.sqrt((errors**2).mean(0)), rel=0.35)


def test_stock_that_never_cuts_changes_nothing():
    table, _ = log(40, 40, seed=1, levels=(30, 32))
    assert (table["units"] < table["stock"]).all()
    assert calibrate_inventory(table).prior == calibrate_inventory(table.drop(columns="stock")).prior


def test_days_that_began_without_stock_say_nothing():
    table, _ = log(40, 40, seed=1)
    empty = table.assign(day=table["day"] + 100, units=0, stock=0)
    assert calibrate_inventory(pd.concat((table, empty))).prior == calibrate_inventory(table).prior


def test_weeks_of_independent_days_give_the_prior_of_days():
    table, truth = log(300, 280, seed=3, levels=(30, 32))
    table = table.drop(columns="stock")
    days = calibrate_inventory(table)
    weekly = table.assign(week=table["day"] // 7).groupby(["product", "week"], as_index=False)["units"].sum()
    weeks = calibrate_inventory(weekly)
    assert weeks.prior.mean[0] == pytest.approx(days.prior.mean[0], abs=0.01)
    assert weeks.prior.mean[1] == pytest.approx(truth[:, 1].mean(), abs=3 * weeks.prior_error[1])
    assert "seventh" in " ".join(weeks.assumptions) and "seventh" not in " ".join(days.assumptions)


# ------------------------------------------------------------------------------------------- the likelihood
def test_likelihood_is_that_of_scipy():
    units = np.array([[0.0, 3.0, 17.0, 5.0, 0.0, 12.0]])
    counts = Counts(units, np.array([[2.0, 1.0, 1.0, 3.0, 1.0, 2.0]]), np.array([[0, 0, 0, 1, 1, 1]]) > 0)
    for mean, dispersion in ((4.0, 1.3), (9.0, 6.0), (0.3, 1.001)):
        size = mean / (dispersion - 1)
        law = nbinom(size, 1 / dispersion)
        by_hand = 2 * law.logpmf(0) + law.logpmf(3) + law.logpmf(17) + 3 * law.logsf(4) + 0.0 + 2 * law.logsf(11)
        found = log_likelihood(counts, np.log([[mean]]), np.log([[size]]))
        assert found[0, 0] == pytest.approx(by_hand, rel=1e-9)


def test_marginal_likelihood_equals_brute_force_and_is_maximal():
    """A fine grid over all products' parameters at once, instead of one grid for each; no other population is
    likelier."""
    rng = np.random.default_rng(2)
    units = np.zeros((12, 30))
    cut = rng.random(units.shape) < 0.3
    for i in range(12):
        mean, dispersion = np.exp(rng.normal(1.5, 0.6)), 1 + np.exp(rng.normal(0.3, 0.5))
        units[i] = rng.negative_binomial(mean / (dispersion - 1), 1 / dispersion, 30)
    counts = Counts(units, np.ones_like(units), cut)
    found = fit_demand(counts, iterations=5000, tolerance=1e-10)
    assert found.converged and (np.diff(found.log_likelihood) > -1e-7).all()

    u, v = np.meshgrid(np.linspace(-1, 6, 250), np.linspace(-7, 5, 150), indexing="ij")
    u, v, cell = u.ravel(), v.ravel(), (7 / 249) * (12 / 149)
    likelihood = log_likelihood(counts, np.tile(u, (12, 1)), np.tile(u - v, (12, 1)))

    def evidence(mean, covariance):
        inverse = np.linalg.inv(covariance)
        off = np.stack((u, v), 1) - mean
        density = -0.5 * np.einsum("si,ij,sj->s", off, inverse, off) - 0.5 * np.log(np.linalg.det(covariance))
        terms = likelihood + density
        peak = terms.max(1, keepdims=True)
        return float((np.log(np.exp(terms - peak).sum(1) * cell) + peak[:, 0] - np.log(2 * np.pi)).sum())

    best = evidence(found.mean, found.covariance)
    assert found.log_likelihood[-1] == pytest.approx(best, abs=2e-2)
    for i in range(2):
        for step in (-0.1, 0.1):
            assert evidence(found.mean + step * np.eye(2)[i], found.covariance) < best
            scale = np.eye(2)
            scale[i, i] += step
            assert evidence(found.mean, scale @ found.covariance @ scale) < best


def test_a_product_that_always_sold_out_is_pulled_by_the_others():
    table, _ = log(60, 40, seed=9, levels=(20, 24))
    always = pd.DataFrame({"product": 1000, "day": range(40), "units": 4, "stock": 4})
    found = calibrate_inventory(pd.concat((table, always)))
    row = found.products.set_index("product").loc[1000]
    assert row["sold_out"] == 1 and 4 < row["mean"] < 60


# ------------------------------------------------------------------------------------------- the panel
@pytest.fixture(scope="module")
def panel():
    return calibrate_inventory(PANEL, InventoryConfig(absent_is_zero=True))


def test_service_levels_hold_on_days_of_the_panel_that_were_not_seen(panel):
    """A stock that the fitted demand calls enough on 95 days of 100 is; the one that Poisson demand asks for is not."""
    table = panel.held_out.service.set_index(["model", "level"])
    ours, poisson = (table.loc[name] for name in ("negative binomial, shrunk", table.index[0][0]))
    assert (ours["predicted"] - ours["actual"]).abs().max() < 0.01
    assert (poisson["predicted"] - poisson["actual"])[[0.9, 0.95, 0.98]].min() > 0.03
    gain = panel.held_out.models.iloc[1]
    assert gain["gain"] > 10 * gain["gain_se"]
    deciles = panel.held_out.deciles
    assert deciles["actual"].to_numpy() == pytest.approx(deciles["predicted"].to_numpy(), rel=0.12)


def test_panel_covers_every_day_of_every_product(panel):
    assert len(panel.products) == 1578 and (panel.products["periods"] <= 364).all()
    assert panel.products["periods"].median() > 355
    units = panel.sales.groupby("product")["units"].sum()
    assert (panel.products.set_index("product")["units"] == units).all()
    both = np.log(panel.products["mean"] / panel.products["mean_sales"])
    assert (both.abs() < 0.05).mean() > 0.95  # a year of days outweighs the population


def test_weeks_of_the_panel_are_more_dispersed_than_its_days(panel):
    sales = panel.sales.assign(week=(panel.sales["day"] - 2) // 7)
    weekly = sales.groupby(["product", "week"], as_index=False)["units"].sum()
    weeks = calibrate_inventory(weekly, InventoryConfig(absent_is_zero=True))
    assert weeks.prior.mean[0] == pytest.approx(panel.prior.mean[0], abs=0.03)
    assert weeks.prior.mean[1] > panel.prior.mean[1] + 5 * panel.prior_error[1]


# ------------------------------------------------------------------------------------------- what is made of it
def test_family_reaches_the_best_levels_of_its_products(fitted):
    family = fitted.family(daily_units=15.0)
    tasks = sample_tasks(family, 400, torch.Generator().manual_seed(0))
    assert tasks.mean.median() == pytest.approx(15, rel=0.2)
    assert family.levels[0] == 0 and len(set(family.levels)) == len(family.levels) <= 32
    ratio = (tasks.price - 1) / (tasks.price - 1 + tasks.holding)
    best = nbinom.ppf(ratio.numpy(), (tasks.mean / (tasks.dispersion - 1)).numpy(), (1 / tasks.dispersion).numpy())
    assert (best <= family.levels[-1]).mean() > 0.97
    assert fitted.family(levels=8, days=3).actions == 8
    assert family.wide().demand_size <= family.demand_size < 2000
    with pytest.raises(ValueError, match="daily_units = 0.0; allowed: a finite number > 0"):
        fitted.family(daily_units=0.0)
    with pytest.raises(ValueError, match="levels = 1; allowed: a whole number >= 2"):
        fitted.family(levels=1)


def test_report_and_picture(fitted):
    matplotlib.use("agg")
    text = str(fitted)
    for part in (
        "Products",
        "Prior in natural units",
        "Service levels",
        "Assumptions",
        "stock was sold",
        "mean units a day",
    ):
        assert part in text
    figure = fitted.plot_fit()
    assert len(figure.axes) == 2 and len(figure.axes[1].lines) == 4
    assert fitted.summary() | {"prior_error": 0} == {
        "rows": 21000,
        "products": 300,
        "fitted_products": 300,
        "prior_error": 0,
    }


# ------------------------------------------------------------------------------------------- tables
def good(products=12, days=30):
    product, day = np.indices((products, days)).reshape(2, -1)
    units = np.random.default_rng(0).poisson(5, products * days)
    return pd.DataFrame({"product": product, "day": day, "units": units, "stock": units + 1})


def with_value(column, row, value):
    table = good()
    table[column] = table[column].astype(object)
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: good().drop(columns="units"), "missing column 'units' in a table of 360 rows; .*found: product, day"),
        (lambda: good().drop(columns="day"), "missing column 'day' or 'week'; allowed: one of the two"),
        (lambda: good().assign(week=1), "columns 'day' and 'week' are both there"),
        (lambda: with_value("units", 31, -2), r"'units': 1 of 360 rows .*row 32 \(product 1, day 1, units -2\)"),
        (lambda: with_value("units", 31, 1.5), "'units': .*allowed: whole numbers >= 0"),
        (lambda: with_value("units", 31, "many"), "'units': 1 of 360 rows missing or not a finite number.*'many'"),
        (lambda: with_value("stock", 31, 0), "'units': 1 of 360 rows above 'stock'.*allowed: at most 'stock'"),
        (lambda: with_value("stock", 31, np.nan), "'stock': 1 of 360 rows missing"),
        (lambda: with_value("day", 31, 0.5), "'day': 1 of 360 rows not a whole number"),
        (lambda: with_value("day", 31, 0), "'day': 1 of 360 rows repeat a product and day.*row 32"),
        (lambda: with_value("product", 31, None), "'product': 1 of 360 rows missing"),
        (lambda: good().iloc[:0], "the table is empty: 0 rows"),
        (lambda: good(products=1), "'product': only 1 of 1 products survive.*in the table: 1"),
        (lambda: good().assign(units=0), "'product': only 0 of 12.*at least 20 units sold: 0"),
        (lambda: good(days=15), "only 0 of 12.*observed in at least 20 days: 0"),
    ],
)
def test_bad_table_is_refused_by_name_and_row(make, message):
    with pytest.raises(TableError, match=message):
        calibrate_inventory(make())


def test_dates_in_any_order_are_read_and_the_input_is_untouched(tmp_path):
    table = good().assign(note="kept")
    dated = table.assign(day=pd.Timestamp("2024-03-01") + pd.to_timedelta(table["day"], unit="D"))
    dated = dated.sample(frac=1, random_state=0)
    before = dated.copy(deep=True)
    read = read_stock(dated)
    pd.testing.assert_frame_equal(dated, before)
    pd.testing.assert_frame_equal(read, read_stock(table), check_dtype=False)
    dated.to_csv(tmp_path / "stock.csv", index=False)
    pd.testing.assert_frame_equal(read_stock(tmp_path / "stock.csv"), read, check_dtype=False)


def test_absent_days_are_unobserved_unless_said_to_be_zero():
    table = good().drop(columns="stock")
    some = table[table["units"] > 3]
    unobserved, zero = (calibrate_inventory(some, InventoryConfig(absent_is_zero=flag)) for flag in (False, True))
    assert unobserved.prior.mean[0] == pytest.approx(np.log(some["units"].mean()), abs=0.1)
    assert zero.prior.mean[0] < unobserved.prior.mean[0] - 0.1
    with pytest.raises(TableError, match="'stock': a period without a row has no stock"):
        calibrate_inventory(good(), InventoryConfig(absent_is_zero=True))


@pytest.mark.parametrize(
    "setting",
    [{"absent_is_zero": 1}, {"minimum_periods": 9}, {"minimum_units": 0}, {"minimum_products": 4},
     {"holdout_every": 1}],
)  # fmt: skip
def test_settings_are_checked(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"InventoryConfig.{name} = .*; allowed: "):
        InventoryConfig(**setting)
