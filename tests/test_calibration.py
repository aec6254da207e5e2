"""Calibration: known parameters are recovered, bad tables are refused, and the numbers hold up against other code."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize, stats
from scipy.special import expit, logit

from ecomlib import calibration
from ecomlib.baselines import Thompson
from ecomlib.calibration import CalibrationConfig, SalesTableError, calibrate_pricing, read_sales
from ecomlib.calibration.preparation import centred, prepare
from ecomlib.calibration.purchase_model import Weeks, best_markup, design, expected_units, fit_purchases
from ecomlib.calibration.shrinkage import fit_population
from ecomlib.evaluation import normalised_score
from ecomlib.families.base import sample_tasks
from ecomlib.families.pricing import LogitPricing
from ecomlib.rollout import trial

PANEL = Path(__file__).parents[1] / "data" / "complete_journey_pricing.parquet"
TRUTH = {"mean": np.array([0.3, -3.0]), "sd": np.array([0.5, 0.7]), "correlation": -0.3, "reference": 1 / 0.7}


def simulate(products, weeks, visitors, seed, dispersion=1.0, truth=TRUTH):
    """A sales table drawn from the model, and the (log a, logit share) of its products."""
    rng = np.random.default_rng(seed)
    off = truth["correlation"] * truth["sd"].prod()
    covariance = np.diag(truth["sd"] ** 2) + off * (1 - np.eye(2))
    log_a, q = rng.multivariate_normal(truth["mean"], covariance, products).T
    # A regular price on most weeks and symmetric deals, so that the median price is the regular one.
    deal = rng.choice([0.8, 0.9, 1.0, 1.0, 1.0, 1.1, 1.2], (products, weeks))
    regular = np.exp(rng.normal(0.7, 0.6, products))
    week = np.arange(1, weeks + 1)
    season = 0.2 * np.sin(2 * np.pi * week / (365.25 / 7) + rng.uniform(0, 6, (products, 1)))
    promotion = (rng.random((products, weeks)) < 0.3).astype(float)
    shoppers = np.broadcast_to(np.round(visitors * rng.uniform(0.8, 1.2, weeks)), deal.shape)
    utility = q[:, None] - np.exp(log_a)[:, None] * truth["reference"] * (deal - 1)
    mean = shoppers * expit(utility + season + 0.5 * (promotion - 0.3))
    if dispersion > 1:  # variance = dispersion * mean
        mean = rng.gamma(mean / (dispersion - 1), dispersion - 1)
    units = rng.poisson(mean)
    units = np.minimum(units, shoppers - 1)
    index = np.indices(deal.shape).reshape(2, -1)
    return pd.DataFrame(
        {
            "product": index[0],
            "week": week[index[1]],
            "price": (regular[:, None] * deal).ravel(),
            "units": units.ravel(),
            "visitors": shoppers.ravel(),
            "promotion": promotion.ravel(),
        }
    ), np.stack((log_a, q), 1)


@pytest.fixture(scope="module")
def small():
    return simulate(60, 52, 500, seed=3)[0]


@pytest.fixture(scope="module")
def panel():
    return calibrate_pricing(PANEL)


# ---------------------------------------------------------------------------------------- reading a table
def good(rows=12):
    return pd.DataFrame(
        {
            "product": np.repeat(["tea", "rice"], rows // 2),
            "week": np.tile(np.arange(rows // 2), 2),
            "price": np.linspace(1.0, 2.0, rows),
            "units": np.arange(rows),
        }
    )


def with_value(column, row, value):
    table = good()
    if column not in table:
        table[column] = 0.5
    table[column] = table[column].astype(object)
    table.loc[row, column] = value
    return table


BAD_TABLES = [
    (lambda: good().drop(columns="price"), "missing column 'price' in a table of 12 rows.*found: product, week, units"),
    (lambda: good().drop(columns=["price", "units"]), "missing columns 'price', 'units'"),
    (lambda: with_value("price", 4, -1.0), r"'price': 1 of 12 rows.*row 5 \(product 'tea', week 4.*-1.0.*numbers > 0"),
    (lambda: with_value("price", [4, 9], 0), "'price': 2 of 12 rows out of range; the first is row 5.*numbers > 0"),
    (lambda: with_value("price", 0, "cheap"), "'price': 1 of 12 rows missing or not a finite number.*row 1 .*'cheap'"),
    (lambda: with_value("price", [3, 4, 5], np.nan), "'price': 3 of 12 rows missing.*row 4 "),
    (lambda: with_value("price", 11, np.inf), "'price': 1 of 12 rows.*row 12 .*inf"),
    (lambda: good().assign(price=pd.Timestamp("2020-01-01")), "'price': 12 rows of datetime64.*allowed: numbers > 0"),
    (lambda: good().assign(price=1 + 1j), "'price': 12 rows of complex128; allowed: numbers > 0"),
    (lambda: with_value("units", 7, -2), "'units': 1 of 12 rows out of range.*row 8 .*whole numbers >= 0"),
    (lambda: with_value("units", 7, 1.5), "'units': 1 of 12 rows out of range.*1.5.*whole numbers >= 0"),
    (lambda: with_value("units", 7, None), "'units': 1 of 12 rows missing"),
    (lambda: with_value("unit_cost", 2, 0.0), "'unit_cost': 1 of 12 rows out of range.*row 3 .*numbers > 0"),
    (lambda: with_value("visitors", 2, -5), "'visitors': 1 of 12 rows out of range.*row 3 "),
    (lambda: with_value("promotion", 2, 1.2), "'promotion': 1 of 12 rows out of range.*between 0 and 1"),
    (lambda: with_value("product", 6, None), "'product': 1 of 12 rows missing; the first is row 7 "),
    (lambda: with_value("product", 6, 3), "'product': 1 of 12 rows mix text and numbers; the first is row 7 "),
    (lambda: with_value("week", 6, 1.5), "'week': 1 of 12 rows not a whole number; the first is row 7 "),
    (lambda: with_value("week", 6, "soon"), "'week': 1 of 12 rows not a whole number.*'soon'.*or ISO dates"),
    (lambda: good().assign(week="soon"), "'week': 12 of 12 rows neither a number nor a date"),
    (lambda: good().assign(week=pd.NaT), "'week': 12 of 12 rows"),
    (lambda: pd.concat([good(), good().iloc[[3]]]), "'week': 1 of 13 rows repeat a product and week.*row 13 "),
    (lambda: good().iloc[:0], "empty: 0 rows"),
    (lambda: pd.DataFrame(), "missing columns.*found: none"),
    (lambda: good().iloc[:6], "'product': all 6 rows are of one product, 'tea'"),
    (lambda: pd.concat([good(), good()["price"]], axis=1), "'price' appears more than once"),
]


@pytest.mark.parametrize("make, message", BAD_TABLES)
def test_bad_table_is_refused_by_name_and_row(make, message):
    with pytest.raises(SalesTableError, match=message) as caught:
        read_sales(make())
    assert isinstance(caught.value, ValueError)


def test_good_table_passes_and_the_input_is_untouched():
    table = good().sample(frac=1, random_state=0)
    before = table.copy(deep=True)
    sales = read_sales(table)
    pd.testing.assert_frame_equal(table, before)
    assert sales["price"].dtype == np.float64 and sales["week"].dtype == np.int64
    pd.testing.assert_frame_equal(
        sales[["product", "week"]], good().sort_values(["product", "week"], ignore_index=True)[["product", "week"]]
    )


@pytest.mark.parametrize("name", ["sales.csv", "sales.csv.gz", "sales.parquet", "SALES.CSV"])
def test_files_read_like_the_frame(tmp_path, name):
    path = tmp_path / name
    table = good().assign(note="kept")
    table.to_parquet(path) if name.endswith("parquet") else table.to_csv(path, index=False)
    pd.testing.assert_frame_equal(read_sales(path), read_sales(table), check_dtype=False)
    pd.testing.assert_frame_equal(read_sales(str(path)), read_sales(path))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("sales.xlsx", b"", "unknown kind of file; allowed are .csv, .csv.gz and .parquet"),
        ("sales", b"", "unknown kind of file"),
        ("sales.parquet", b"product,week\n1,2\n", "cannot be read as Parquet"),
        ("sales.csv", b"\xff\xfe\x00\x81binary", "cannot be read as CSV"),
        ("sales.csv.gz", b"not gzip", "cannot be read as CSV"),
        ("sales.csv", b"", "cannot be read as CSV"),
        ("sales.csv", b"product;week;price;units\n1;2;3;4\n", "missing columns"),
    ],
)
def test_foreign_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SalesTableError, match=message):
        read_sales(tmp_path / name)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(SalesTableError, match="no such file"):
        read_sales(tmp_path / "sales.csv")


def test_dates_become_weeks():
    dates = pd.date_range("2024-01-01", periods=6, freq="7D")
    for column in (np.tile(dates, 2), np.tile(dates.strftime("%Y-%m-%d"), 2)):
        assert read_sales(good().assign(week=column))["week"].tolist() == [*range(6)] * 2
    daily = np.tile(pd.date_range("2024-01-01", periods=6, freq="D"), 2)
    with pytest.raises(SalesTableError, match="repeat a product and week"):
        read_sales(good().assign(week=daily))


# ---------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "field, value",
    [
        *[("margin", value) for value in (0.0, 1.0, -0.1, float("nan"), "0.3", None)],
        *[("weekly_visitors", value) for value in (0, -1.0, float("inf"), "many")],
        *[("visitors_scale", value) for value in (0.0, -1.0, float("nan"))],
        *[("minimum_weeks", value) for value in (9, 26.0, True)],
        *[("minimum_units", value) for value in (0, 1.5)],
        *[("minimum_price_variation", value) for value in (0.0, 1.0)],
        *[("minimum_products", value) for value in (9, 20.5)],
        *[("holdout_every", value) for value in (1, 11, 2.5)],
        *[("season_harmonics", value) for value in (-1, 4, 1.0)],
        *[("control_sd", value) for value in (0.0, float("inf"))],
    ],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"{field} = .*; allowed: \S"):
        CalibrationConfig(**{field: value})


def test_too_few_products_reports_the_funnel(small):
    with pytest.raises(
        SalesTableError, match=r"only 0 of 60 products.*in the table: 60.*at least 10000000 units sold: 0"
    ):
        calibrate_pricing(small, CalibrationConfig(minimum_units=10_000_000))


def test_each_filter_drops_what_it_says(small):
    table = small.copy()
    table = table[~((table["product"] == 0) & (table["week"] > 20))]
    table.loc[table["product"] == 1, "units"] = 2
    table.loc[table["product"] == 2, "price"] = 3.0
    busy = table.index[table["product"] == 3][0]
    table.loc[busy, "units"] = table.loc[busy, "visitors"]
    result = calibrate_pricing(table)
    assert result.funnel["products"].tolist() == [60, 59, 58, 57, 56, 56]
    assert not set(result.products["product"]) & {0, 1, 2, 3}


# ---------------------------------------------------------------------------------------- the purchase model
def scipy_fit(x, units, visitors, precision):
    """The same penalised likelihood, maximised by a general-purpose optimiser."""

    def loss(beta):
        mean = visitors * expit(x @ beta)
        return -(units * np.log(mean) - mean).sum() + 0.5 * (precision * beta**2).sum()

    def gradient(beta):
        share = expit(x @ beta)
        return -x.T @ ((units - visitors * share) * (1 - share)) + precision * beta

    start = np.zeros(x.shape[1])
    start[0] = logit(units.sum() / visitors.sum())
    return optimize.minimize(loss, start, jac=gradient, method="BFGS", options={"gtol": 1e-9}).x


@pytest.mark.parametrize("source", ["panel", "large shares"])
def test_fit_equals_a_general_purpose_optimiser(source, panel):
    sales = (
        panel.sales
        if source == "panel"
        else read_sales(simulate(30, 40, 60, 5, truth=TRUTH | {"mean": np.zeros(2)})[0])
    )
    prepared = prepare(sales, CalibrationConfig(minimum_units=50))
    weeks = centred(prepared.weeks, prepared.weeks.observed)
    fit = fit_purchases(weeks, control_sd=1.0)
    assert fit.converged.all()
    precision = np.r_[0, 1e-4, np.ones(design(weeks).shape[-1] - 2)]
    for i in (0, 7, 19):
        seen = weeks.observed[i]
        other = scipy_fit(design(weeks)[i][seen], weeks.units[i][seen], weeks.visitors[i][seen], precision)
        np.testing.assert_allclose(fit.coefficients[i], other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dispersion", [1.0, 3.0])
def test_standard_errors_equal_the_spread_over_repeated_samples(dispersion):
    """800 copies of one product: the reported error is the standard deviation of the estimates."""
    copies, weeks = 800, 60
    rng = np.random.default_rng(1)
    gap = np.broadcast_to(rng.choice([-0.3, 0.0, 0.3], weeks), (copies, weeks))
    ones = np.ones((copies, weeks))
    empty = Weeks(0 * ones, 400 * ones, gap, np.zeros((copies, weeks, 0)), ones > 0)
    mean = expected_units(empty, np.tile([-2.5, 1.2], (copies, 1)))
    noise = rng.gamma(mean / (dispersion - 1), dispersion - 1) / mean if dispersion > 1 else 1.0
    fit = fit_purchases(empty._replace(units=rng.poisson(mean * noise).astype(float)), control_sd=1.0)
    error = np.sqrt(fit.covariance[:, 1, 1])
    assert fit.coefficients[:, 1].mean() == pytest.approx(1.2, abs=4 * error.mean() / np.sqrt(copies))
    assert fit.dispersion.mean() == pytest.approx(dispersion, rel=0.1)
    # The standard deviation of 800 values is itself known to 2.5 %; Poisson errors get the floor at 1 on top.
    assert np.sqrt((error**2).mean()) == pytest.approx(fit.coefficients[:, 1].std(), rel=0.1)


def test_controls_take_promotion_out_of_the_slope():
    """Deals are advertised: without the control the slope doubles as the advertising effect."""
    table, truth = simulate(200, 52, 2000, seed=11)
    rng = np.random.default_rng(0)
    cheap = table["price"] < 0.95 * table.groupby("product")["price"].transform("median")
    lift = np.where(cheap & (rng.random(len(table)) < 0.9), 1.0, 0.0)
    table["units"] = np.minimum(rng.poisson(table["units"] * np.exp(0.5 * lift)), table["visitors"] - 1)
    table["promotion"] = lift
    with_control = calibrate_pricing(table).prior.mean[0]
    without = calibrate_pricing(table.drop(columns="promotion")).prior.mean[0]
    assert abs(with_control - truth[:, 0].mean()) < 0.1 < without - truth[:, 0].mean()


def test_best_markup_maximises_profit():
    rng = np.random.default_rng(0)
    a, q, reference = rng.uniform(0.4, 8, 1000), rng.uniform(-7, 2, 1000), 1.4
    best = best_markup(a, q, reference)
    for i in range(0, 1000, 25):
        found = optimize.minimize_scalar(
            lambda m, i=i: -(m - 1) * expit(q[i] + a[i] * (reference - m)), bounds=(1, 15), method="bounded",
            options={"xatol": 1e-9},
        )  # fmt: skip
        assert best[i] == pytest.approx(found.x, abs=1e-5)


# ---------------------------------------------------------------------------------------- shrinkage
def test_marginal_likelihood_equals_brute_force_and_is_maximal():
    """Two-dimensional Gauss-Hermite integration of each product's likelihood; no other population does better."""
    rng = np.random.default_rng(4)
    count = 40
    z, q = rng.multivariate_normal([0.0, -4.0], [[0.3, -0.1], [-0.1, 0.5]], count).T
    error = np.zeros((count, 2, 2))
    error[:, 0, 0], error[:, 1, 1] = rng.uniform(0.1, 1.0, count), rng.uniform(0.01, 0.1, count)
    error[:, 0, 1] = error[:, 1, 0] = 0.3 * np.sqrt(error[:, 0, 0] * error[:, 1, 1])
    seen = np.stack([rng.multivariate_normal([np.exp(a), b], e) for a, b, e in zip(z, q, error, strict=True)])
    found = fit_population(seen[:, 0], seen[:, 1], error, np.full(count, 5.0), tolerance=1e-12, iterations=5000)
    assert found.converged and (np.diff(found.log_likelihood) > -1e-6).all()

    node, weight = np.polynomial.hermite_e.hermegauss(60)
    grid = np.stack(np.meshgrid(node, node, indexing="ij"), -1).reshape(-1, 2)
    weights = np.outer(weight, weight).ravel() / (2 * np.pi)
    inverse, scale = np.linalg.inv(error), np.linalg.slogdet(error)[1]

    def log_likelihood(parameters):
        m, (s, t, u) = parameters[:2], parameters[2:]
        latent = m + grid @ np.array([[np.exp(s), 0], [t, np.exp(u)]]).T
        residual = seen[:, None] - np.stack((np.exp(latent[:, 0]), latent[:, 1]), -1)
        density = -0.5 * np.einsum("pgi,pij,pgj->pg", residual, inverse, residual) - 0.5 * scale[:, None]
        return np.log((np.exp(density) / (2 * np.pi) * weights).sum(1))

    factor = np.linalg.cholesky(found.covariance[:2, :2])
    at = np.r_[found.mean[:2], np.log(factor[0, 0]), factor[1, 0], np.log(factor[1, 1])]
    assert found.log_likelihood[-1] == pytest.approx(log_likelihood(at).sum(), abs=1e-3)
    for direction in np.r_[np.eye(5), -np.eye(5)]:
        assert log_likelihood(at + 0.03 * direction).sum() < log_likelihood(at).sum()
    # Standard errors of the mean: the outer product of the scores, here by central differences.
    step = 1e-4 * np.eye(5)
    scores = np.stack([log_likelihood(at + h) - log_likelihood(at - h) for h in step], 1) / 2e-4
    expected = np.sqrt(np.diag(np.linalg.inv(scores.T @ scores))[:2])
    np.testing.assert_allclose(found.mean_error[:2], expected, rtol=0.01)


def test_noisy_slopes_move_and_precise_ones_stay():
    rng = np.random.default_rng(0)
    slope = np.exp(rng.normal(0.3, 0.4, 100))
    error = np.tile(np.diag([1e-6, 1e-4]), (100, 1, 1))
    slope[:3], error[:3, 0, 0] = (-0.8, 0.8, 9.0), 1.0
    found = fit_population(slope, rng.normal(-4, 0.5, 100), error, np.full(100, 5.0))
    np.testing.assert_allclose(found.sensitivity[3:], slope[3:], rtol=1e-3)
    wrong_sign, small, large = found.sensitivity[:3]
    centre = np.exp(found.mean[0])
    assert 0 < wrong_sign < small < centre < large < 9.0


@pytest.mark.parametrize("products, weeks, visitors", [(50, 52, 2000), (300, 52, 500), (1000, 30, 200)])
def test_known_population_is_recovered(products, weeks, visitors):
    """Mean within four standard errors, spread and correlation within what that many products can tell."""
    table, truth = simulate(products, weeks, visitors, seed=products, dispersion=1.5)
    result = calibrate_pricing(table, CalibrationConfig(minimum_units=20))
    kept = truth[result.products["product"]]
    assert len(kept) > 0.95 * products
    factor = np.array(result.prior.factor)
    covariance = factor @ factor.T
    for k in (0, 1):
        # The median observed price is the regular one, so shares are quoted where they were drawn.
        assert abs(result.prior.mean[k] - kept[:, k].mean()) < 4 * result.prior_error[k]
        assert np.sqrt(covariance[k, k]) == pytest.approx(kept[:, k].std(), rel=0.35 if products == 50 else 0.2)
    correlation = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert abs(correlation - TRUTH["correlation"]) < (0.4 if products == 50 else 0.2)
    assert result.prior.mean[2] == pytest.approx(np.log(visitors / 7), abs=0.05)
    error = np.log(result.products["sensitivity"]) - kept[:, 0]
    alone = np.log(result.products["slope"].clip(lower=0.05)) - kept[:, 0]
    assert (error**2).mean() < (alone**2).mean()


def test_interval_of_the_population_mean_covers():
    """95 % intervals from `prior_error` over repeated panels: products and weeks are drawn anew each time."""
    runs, hits = 120, np.zeros(2)
    for seed in range(runs):
        table, _ = simulate(60, 40, 300, seed=1000 + seed, dispersion=2.0)
        shape = (60, 40)
        columns = {name: table[name].to_numpy(float).reshape(shape) for name in table}
        markup = columns["price"] / np.median(columns["price"], 1, keepdims=True) * TRUTH["reference"]
        angle = 2 * np.pi * columns["week"] / (365.25 / 7)
        controls = np.stack((columns["promotion"] - 0.3, np.sin(angle), np.cos(angle)), -1)
        gap = TRUTH["reference"] - markup
        weeks = Weeks(columns["units"], columns["visitors"], gap, controls, np.ones(shape, bool))
        fit = fit_purchases(weeks, control_sd=1.0)
        swap = np.ix_(range(60), (1, 0), (1, 0))
        found = fit_population(fit.coefficients[:, 1], fit.coefficients[:, 0], fit.covariance[swap], np.full(60, 4.0))
        hits += np.abs(found.mean[:2] - TRUTH["mean"]) < 1.96 * found.mean_error[:2]
    for hit in hits:  # what 120 draws with 93 % to 97 % coverage would give, at the 0.1 % level
        assert stats.binom.ppf(0.001, runs, 0.93) <= hit <= stats.binom.ppf(0.999, runs, 0.97), hits / runs


# ---------------------------------------------------------------------------------------- assumptions
def test_currency_does_not_matter(small):
    one, two = calibrate_pricing(small), calibrate_pricing(small.assign(price=small["price"] * 100))
    np.testing.assert_allclose(one.prior.mean, two.prior.mean, rtol=1e-9)
    np.testing.assert_allclose(one.prior.factor, two.prior.factor, atol=1e-9)
    np.testing.assert_allclose(one.prior.unit_cost, two.prior.unit_cost, rtol=1e-9)


def test_margin_only_rescales_the_markup(small):
    """m = price / cost: another margin multiplies every markup by a constant and divides a by it."""
    low, high = (calibrate_pricing(small, CalibrationConfig(margin=margin)) for margin in (0.2, 0.5))
    assert high.prior.mean[0] - low.prior.mean[0] == pytest.approx(np.log(0.5 / 0.8), abs=2e-3)
    assert high.prior.mean[1] == pytest.approx(low.prior.mean[1], abs=1e-4)
    np.testing.assert_allclose(high.products["elasticity"], low.products["elasticity"], rtol=5e-3)


def test_unit_cost_column_replaces_the_assumption(small):
    cost = 0.7 * small.groupby("product")["price"].transform("median")
    known, assumed = calibrate_pricing(small.assign(unit_cost=cost)), calibrate_pricing(small)
    np.testing.assert_allclose(known.prior.mean, assumed.prior.mean, rtol=1e-9)
    assert any("assumed a margin of 30%" in text for text in assumed.assumptions)
    assert not any("margin" in text for text in known.assumptions)
    assert known.sensitivity(visitors_scale=(1.0,))["margin"].isna().all()
    with pytest.raises(ValueError, match="margins: the table has a unit_cost column"):
        known.sensitivity(margins=(0.3,))


def test_unit_cost_range_has_mean_one_and_the_spread_of_the_costs(panel):
    low, high = panel.prior.unit_cost
    assert (high - low) / np.log(high / low) == pytest.approx(1.0)
    assert np.log(high / low) / np.sqrt(12) == pytest.approx(np.log(panel.products["unit_cost"]).std(ddof=0))


def test_visitors_move_the_share_against_the_traffic(small):
    table = small.assign(units=small["units"] // 10)
    config = CalibrationConfig(minimum_units=20)
    result = calibrate_pricing(table, config)
    rows = result.sensitivity(margins=(0.3,), visitors_scale=(1.0, 4.0))
    assert rows["shoppers_a_day"][1] == pytest.approx(4 * rows["shoppers_a_day"][0], rel=1e-9)
    assert rows["share"][1] == pytest.approx(rows["share"][0] / 4, rel=0.02)
    assert rows["sensitivity"][1] == pytest.approx(rows["sensitivity"][0], rel=0.05)


def test_tables_without_visitors_state_what_they_assume(small):
    table = small.drop(columns="visitors")
    proxy = calibrate_pricing(table)
    assert "one shopper for every unit sold" in proxy.assumptions[0]
    total = table.groupby("week")["units"].sum().mean()
    assert np.exp(proxy.prior.mean[2]) == pytest.approx(total / 7, rel=1e-6)
    stated = calibrate_pricing(table, CalibrationConfig(weekly_visitors=700))
    assert "assumed 700 a week" in stated.assumptions[0]
    assert np.exp(stated.prior.mean[2]) == pytest.approx(100, rel=1e-6)


def test_sensitivity_moves_as_the_assumptions_say(panel):
    rows = panel.sensitivity(margins=(0.2, 0.4), visitors_scale=(1.0,))
    assert rows["sensitivity"][1] / rows["sensitivity"][0] == pytest.approx(0.6 / 0.8, rel=5e-3)
    assert rows["elasticity"][0] == pytest.approx(rows["elasticity"][1], rel=5e-3)
    same = panel.sensitivity(margins=(panel.config.margin,), visitors_scale=(1.0,))
    assert np.log(same["sensitivity"][0]) == pytest.approx(panel.prior.mean[0])
    assert same["outside"][0] == pytest.approx(1 - panel.outside["share"][1])
    with pytest.raises(ValueError, match="margin = 1.5"):
        panel.sensitivity(margins=(1.5,))


# ---------------------------------------------------------------------------------------- result
def test_best_prices_outside_the_observed_range_are_counted(panel):
    """Profit is single-peaked, so the best price is above the range exactly if profit still rises at its top."""
    p = panel.products
    reference = panel.prior.reference_markup

    def rises(markup):
        share = expit(logit(p["share"]) + p["sensitivity"] * (reference - markup))
        return (markup - 1) * p["sensitivity"] * (1 - share) < 1

    above, below = rises(p["highest_markup"]), ~rises(p["lowest_markup"])
    assert panel.outside["products"].tolist() == [below.sum(), (~above & ~below).sum(), above.sum()]
    assert panel.outside["share"].sum() == pytest.approx(1.0)
    assert set(p.loc[above, "best_price"]) == {"above"}


def test_held_out_weeks_are_not_used(small):
    first = calibrate_pricing(small)
    table = small.copy()
    held = table["week"].isin(first.held_out.weeks)
    assert held.sum() == 60 * len(first.held_out.weeks) and len(first.held_out.weeks) == 10
    table.loc[held, "units"] = table.loc[held, "units"] // 2
    second = calibrate_pricing(table)
    pd.testing.assert_series_equal(first.held_out.deciles["predicted"], second.held_out.deciles["predicted"])
    assert (second.held_out.deciles["actual"] < 0.6 * first.held_out.deciles["actual"]).all()


def test_held_out_deviance_rewards_price_only_where_price_matters():
    table, _ = simulate(100, 52, 1500, seed=2)
    explained = calibrate_pricing(table).held_out.models.set_index("model")["explained"]
    assert explained["constant share"] == 0
    assert explained["with price, shrunk"] > explained["promotion and season, no price"] + 0.1
    flat, _ = simulate(100, 52, 1500, seed=2, truth=TRUTH | {"mean": np.array([-6.0, -3.0])})
    without = calibrate_pricing(flat)
    assert "did not settle" in without.assumptions[-1]
    models = without.held_out.models.set_index("model")
    gain = models["explained"]["with price, shrunk"] - models["explained"]["promotion and season, no price"]
    assert abs(gain) < 0.01


def test_predictions_are_calibrated_on_held_out_weeks_of_the_model():
    table, _ = simulate(300, 52, 1500, seed=8)
    deciles = calibrate_pricing(table).held_out.deciles
    np.testing.assert_allclose(deciles["actual"], deciles["predicted"], rtol=0.06)


def test_panel_slopes_agree_with_plain_log_log_regression(panel):
    """Same products, no controls: the model's elasticity is the familiar slope of log units on log price."""
    config = CalibrationConfig(season_harmonics=0)
    plain = calibrate_pricing(panel.sales.drop(columns="promotion"), config).products.set_index("product")
    groups = panel.sales[panel.sales["product"].isin(plain.index)].groupby("product")
    slope = groups.apply(lambda g: np.polyfit(np.log(g["price"]), np.log(g["units"]), 1)[0])
    assert stats.spearmanr(slope, plain["elasticity_raw"].loc[slope.index]).statistic > 0.9
    assert -2.3 < slope.median() < -1.6
    assert plain["elasticity_raw"].median() == pytest.approx(slope.median(), abs=0.25)


def test_panel_controls_and_shrinkage_do_what_is_said(panel):
    products, models = panel.products, panel.held_out.models.set_index("model")
    assert products["sensitivity"].gt(0).all() and products["slope"].lt(0).any()
    assert products["elasticity"].std() < products["elasticity_raw"].std()
    order = ["constant share", "promotion and season, no price", "with price, each product alone", "with price, shrunk"]
    assert models["deviance"].loc[order].is_monotonic_decreasing
    assert np.allclose(models["gain"].loc[order].cumsum(), models["explained"].loc[order], atol=1e-12)
    # Paired: the products' common ups and downs cancel, so the gain is known better than either of the two.
    assert models["gain_se"].iloc[-1] < models["explained_se"].iloc[-2:].min()
    assert models["gain"].iloc[-1] > 2 * models["gain_se"].iloc[-1]
    assert (panel.funnel["products"].diff().dropna() <= 0).all()


def test_prior_feeds_the_task_family(panel):
    family = LogitPricing(prior=panel.prior)
    tasks = sample_tasks(family, 4000, torch.Generator().manual_seed(0))
    log_a = tasks.sensitivity.double().log()
    sd = panel.prior.factor[0][0]
    assert log_a.mean().item() == pytest.approx(panel.prior.mean[0], abs=4 * sd / 4000**0.5)
    quantiles = panel.prior_table().loc["sensitivity a, per unit of markup"]
    assert log_a.exp().median().item() == pytest.approx(quantiles["median"], rel=0.05)
    share = torch.sigmoid(tasks.utility - tasks.sensitivity * panel.prior.reference_markup).double()
    assert share.median().item() == pytest.approx(expit(panel.prior.mean[1]), rel=0.05)


@pytest.mark.parametrize("margin", [0.3, 0.8])
def test_records_to_score(margin):
    """A reader's table to a family whose prices reach the best ones, at ordinary and at high margins, to a score."""
    table, _ = simulate(100, 52, 1500, seed=3)
    fit = calibrate_pricing(table.drop(columns=["unit_cost"], errors="ignore"), CalibrationConfig(margin=margin))
    family = fit.family(daily_shoppers=2000.0)
    tasks = sample_tasks(family, 200, torch.Generator().manual_seed(0))
    best = family.oracle_markup(tasks)
    inside = (best > family.markups[0]) & (best < family.markups[-1])
    assert inside.double().mean() > 0.9
    returns = trial(family, tasks, Thompson(family), 4, 1, seed=0, progress=False).returns.mean(-1)
    blind, oracle = family.blind_return(tasks), family.oracle_return(tasks)
    assert 0.3 < normalised_score(returns[-1], blind, oracle) < 1.05
    assert fit.family(days=7).days == 7 and fit.family().prior == fit.prior


def test_for_traffic_moves_only_the_traffic(panel):
    prior = panel.for_traffic(5000.0)
    assert prior.mean == (*panel.prior.mean[:2], np.log(5000.0)) and prior.factor == panel.prior.factor
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="daily_shoppers = .*allowed: a finite number > 0"):
            panel.for_traffic(value)


def test_summary_and_picture_show_everything(panel):
    text = str(panel)
    assert all(sentence in text for sentence in panel.assumptions)
    assert all(str(count) in text for count in panel.funnel["products"])
    assert all(model in text for model in panel.held_out.models["model"])
    figure = panel.plot_fit()
    left, right = figure.axes
    deciles, response = panel.held_out.deciles, panel.held_out.response
    np.testing.assert_array_equal(left.lines[1].get_xydata(), deciles[["predicted", "actual"]])
    np.testing.assert_array_equal(right.lines[1].get_xydata(), response[["price", "actual"]])
    assert response["rows"].sum() == deciles["rows"].sum()


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.sample(frac=1, random_state=1),
        lambda table: table.assign(product=table["product"].astype("category")),
        lambda table: table.convert_dtypes(),
        lambda table: table.convert_dtypes(dtype_backend="pyarrow"),
        lambda table: table.assign(promotion=table["promotion"] > 0, price=table["price"].astype(str)),
    ],
)
def test_same_sales_same_prior_whatever_the_row_order_and_the_column_types(small, change):
    assert calibrate_pricing(change(small)).prior == calibrate_pricing(small).prior


def test_public_names_exist():
    assert set(calibration.__all__) <= set(dir(calibration))
