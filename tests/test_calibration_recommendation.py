"""Calibration from clicks: position effect, spreads and click rate come back; bad tables are refused."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize

from ecomlib.calibration import (
    RecommendationConfig,
    TableError,
    calibrate_recommendation,
    open_bandit,
    read_clicks,
    taste_spread,
)
from ecomlib.calibration.clicks import Cells, cells, exposures, fit_positions, fit_spreads
from ecomlib.families.base import sample_tasks
from ecomlib.families.recommendation import HashedCatalogue, SegmentPrior, SlateRecommendation

DATA = Path(__file__).parents[1] / "data"
FAMILY = SlateRecommendation(catalogue=HashedCatalogue(items=60, appeal=0.5), click=(-4.5, -4.2, -3.9))
PLACES = np.array(FAMILY.places)


def log(segments, slates, seed, family=FAMILY, batch=500):
    """First slates of so many shoppers of each segment, drawn at random from the catalogue; and the segments."""
    tasks = sample_tasks(family, segments, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (segments, family.items, family.slate)
    sums = {name: np.zeros(shape) for name in ("impressions", "clicks", "carts", "orders")}
    row, place = np.arange(segments)[:, None, None], np.arange(family.slate)
    for _ in range(slates // batch):
        draw = lambda *size: torch.rand(segments, batch, *size, generator=generator)
        slate = draw(family.items).topk(family.slate).indices
        state, _, _ = family.step(tasks, family.reset(tasks, batch, draw(5)), slate, draw(5))
        hit = (state.place[..., None] == torch.arange(family.slate)).numpy()
        outcomes = (np.ones_like(hit), hit, hit & state.cart[..., None].numpy(), hit & state.order[..., None].numpy())
        for total, value in zip(sums.values(), outcomes):
            np.add.at(total, (np.broadcast_to(row, hit.shape), slate.numpy(), np.broadcast_to(place, hit.shape)), value)
    shopper, item, position = np.indices(shape).reshape(3, -1)
    columns = {"shopper": shopper, "item": item, "position": position + 1}
    return pd.DataFrame(columns | {name: x.ravel().astype(int) for name, x in sums.items()}), tasks


@pytest.fixture(scope="module")
def book():
    return log(200, 4000, seed=0)


@pytest.fixture(scope="module")
def fitted(book):
    return calibrate_recommendation(book[0])


# ------------------------------------------------------------------------------------------- the family comes back
def test_the_family_is_recovered(book, fitted):
    _, truth = book
    prior, default = fitted.prior, SegmentPrior()
    bias = truth.bias.numpy()
    assert fitted.positions.bias == pytest.approx(bias.mean(), abs=3 * fitted.positions.bias_error)
    assert fitted.positions.bias_error < 0.03
    assert fitted.positions.bias_sd == pytest.approx(bias.std(), rel=0.2)
    assert prior.attention == pytest.approx(default.attention, abs=0.12)
    assert prior.centre == pytest.approx(default.centre, rel=0.12)
    assert prior.deviation == pytest.approx(default.deviation, rel=0.12)
    assert fitted.click == pytest.approx(FAMILY.click[0], abs=0.1)
    assert fitted.cart == pytest.approx(FAMILY.cart[0], abs=0.006)
    assert fitted.order == pytest.approx(FAMILY.order[0], abs=0.03)


def test_spreads_are_those_of_the_odds(book, fitted):
    """Against the same moments of the segments' true odds."""
    odds = FAMILY.log_weight(book[1]).double().exp().numpy()
    taste = np.sqrt(np.log((odds**2).mean() / (odds.mean(0) ** 2).mean()))
    item = np.sqrt(np.log((odds.mean(0) ** 2).mean() / odds.mean() ** 2))
    found = fitted.spreads
    assert found.taste_sd == pytest.approx(taste, abs=0.05)
    assert found.appeal_sd == pytest.approx(item, abs=0.06)
    assert np.log(found.odds) == pytest.approx(np.log(odds.mean()) + FAMILY.click[0], abs=0.1)
    assert 0.01 < found.taste_error < 0.1 and 0.01 < found.odds_error < 0.2


def test_the_invented_catalogue_has_the_spreads_found(fitted):
    """A log of the calibrated family gives the same numbers again."""
    family = fitted.family()
    again = calibrate_recommendation(log(200, 4000, seed=7, family=family)[0])
    assert again.spreads.taste_sd == pytest.approx(fitted.spreads.taste_sd, abs=0.1)
    assert again.spreads.appeal_sd == pytest.approx(fitted.spreads.appeal_sd, abs=0.1)
    assert np.log(again.spreads.odds) == pytest.approx(np.log(fitted.spreads.odds), abs=0.15)
    assert again.positions.bias == pytest.approx(fitted.positions.bias, abs=0.08)


def test_no_spread_and_no_position_effect_are_found_where_there_is_none():
    rng = np.random.default_rng(1)
    shopper, item, position = np.indices((60, 30, 3)).reshape(3, -1)
    table = pd.DataFrame({"shopper": shopper, "item": item, "position": position + 1, "impressions": 300})
    found = calibrate_recommendation(table.assign(clicks=rng.binomial(300, 0.01, len(table))))
    assert found.spreads.taste_sd < 0.15 and found.spreads.appeal_sd < 0.1
    assert abs(found.positions.bias) < 3 * found.positions.bias_error
    assert found.positions.attention == pytest.approx([1, 1, 1], abs=0.1)
    assert any("No position effect" in x for x in found.assumptions)
    assert any("spread between items is within" in x for x in found.assumptions)


# ------------------------------------------------------------------------------------------- positions
def test_position_effect_is_not_fooled_by_who_is_shown_what_first():
    """Liked items stand first: the raw click rate falls three times as fast as attention does."""
    rng = np.random.default_rng(0)
    rate = np.sort(np.exp(rng.normal(-3, 1.0, (500, 4))), 1)[:, ::-1]
    shown = rng.multinomial(600, [0.7, 0.1, 0.1, 0.1], (500, 4))
    shown = np.stack([np.roll(shown[:, i], i, 1) for i in range(4)], 1)  # item i mostly at place i
    clicked = rng.poisson(shown * rate[..., None] * PLACES**0.4)
    data = Cells(np.repeat(np.arange(500), 4), np.tile(np.arange(4), 500), shown.reshape(-1, 4), clicked.reshape(-1, 4))
    found = fit_positions(data, PLACES)
    raw = data.clicked.sum(0) / data.shown.sum(0)
    assert raw[3] / raw[0] < 0.6 * PLACES[3] ** 0.4
    assert np.abs(np.log(found.attention) - 0.4 * np.log(PLACES))[1:].max() < 3 * found.error[1:].max() < 0.1
    assert found.bias == pytest.approx(0.4, abs=3 * found.bias_error)


def test_conditional_likelihood_is_maximal():
    rng = np.random.default_rng(4)
    shown, clicked = rng.integers(0, 50, (40, 3)).astype(float), rng.poisson(3, (40, 3)) * 1.0
    clicked = np.where(shown > 0, clicked, 0.0)
    data = Cells(np.zeros(40, dtype=int), np.arange(40), shown, clicked)

    def loss(log_attention):
        weight = shown * np.exp(log_attention)
        return -(clicked * np.log(np.maximum(weight, 1e-300) / weight.sum(1, keepdims=True))).sum()

    best = optimize.minimize(lambda x: loss(np.r_[0, x]), np.zeros(2), method="BFGS", options={"gtol": 1e-9})
    found = fit_positions(data, np.array([1, 0.5, 0.3]))
    assert np.log(found.attention[1:]) == pytest.approx(best.x, abs=1e-5)
    assert found.error[1:] == pytest.approx(np.sqrt(np.diag(best.hess_inv)), rel=0.05)
    slope = optimize.minimize_scalar(lambda b: loss(b * np.log([1, 0.5, 0.3])), bounds=(-3, 3), method="bounded")
    assert found.bias == pytest.approx(slope.x, abs=1e-4)


# ------------------------------------------------------------------------------------------- moments
def test_moments_are_those_of_log_normal_odds():
    """Means over many shops: rate, items and tastes drawn from the model itself, with unequal impressions."""
    rng, found = np.random.default_rng(2), []
    for _ in range(60):
        shown = rng.integers(50, 800, (80, 40))
        log_rate = -6 + 0.5 * rng.normal(size=40) + 0.7 * rng.normal(size=(80, 40))
        shopper, item = np.indices(shown.shape).reshape(2, -1)
        clicked = rng.poisson(shown * np.exp(log_rate)).reshape(-1, 1)
        spread = fit_spreads(Cells(shopper, item, shown.reshape(-1, 1), clicked), np.ones(1))
        found.append((np.log(spread.odds), spread.appeal_sd**2, spread.taste_sd**2))
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(60)
    expected = np.array([-6 + (0.25 + 0.49) / 2, 0.25, 0.49])
    # Logarithms of ratios of totals: a bias of the order of 1 / items is left.
    assert (np.abs(mean - expected) < 3 * error + [0.02, 0.02, 0.02]).all()


def test_exposure_counts_attention_and_slates_without_a_click():
    table = pd.DataFrame({"shopper": ["a", "a", "b", "b"], "item": [1, 2, 1, 2], "position": [1, 2, 2, 1],
                          "impressions": [100, 100, 50, 50], "clicks": [10, 0, 0, 0]})  # fmt: skip
    data = cells(table)
    assert exposures(data, np.array([1.0, 0.5])) == pytest.approx([90.0, 45.0, 25.0, 50.0])


def test_taste_spread_recovers_the_spread_of_shares():
    rng = np.random.default_rng(0)
    households, sd = 3000, np.array([0.2, 0.6, 1.0])
    share = np.array([0.1, 0.05, 0.02]) * np.exp(sd * rng.normal(size=(households, 3)) - sd**2 / 2)
    share = np.column_stack((share, 1 - share.sum(1)))
    share = np.maximum(share, 1e-6)
    total = rng.integers(20, 400, households)
    count = np.stack([rng.multinomial(n, p / p.sum()) for n, p in zip(total, share)])
    table = pd.DataFrame(count, columns=["a", "b", "c", "rest"]).rename_axis("household").reset_index()
    table = table.melt("household", var_name="category", value_name="baskets")
    found = taste_spread(table).set_index("category").loc[["a", "b", "c"]]
    assert (np.abs(found["taste_sd"] - sd) < 3 * found["taste_error"] + 0.03).all()
    assert found["taste_error"].max() < 0.15
    with pytest.raises(TableError, match="'baskets': 1 of .* rows out of range"):
        taste_spread(table.assign(baskets=table["baskets"].where(table.index > 0, -1)))


# ------------------------------------------------------------------------------------------- the data of the book
def test_open_bandit_shows_neither_position_nor_items():
    """The claim of the chapter: with 130 clicks, nothing but the rate is known."""
    taste = taste_spread(DATA / "complete_journey_tastes.parquet")
    config = RecommendationConfig(taste_sd=float(taste["taste_sd"].median()))
    found = calibrate_recommendation(open_bandit.random_clicks(DATA / "open_bandit_clicks.csv"), config)
    assert found.log["clicks"].sum() == 130
    assert found.spreads.odds == pytest.approx(130 / 30_000, rel=0.2)
    assert abs(found.positions.bias) < 2 * found.positions.bias_error
    assert found.spreads.appeal_sd < 2 * found.spreads.appeal_error
    text = " ".join(found.assumptions)
    assert "No position effect" in text and "tastes was given" in text and "Carts are not in the table" in text
    family = found.family()
    tasks = family.prior_sample(512)
    odds = family.log_weight(tasks).double().exp().numpy()
    spread = np.log((odds**2).mean() / (odds.mean(0) ** 2).mean())
    assert np.sqrt(spread) == pytest.approx(config.taste_sd, abs=0.03)
    assert odds.mean() * np.exp(family.click[0]) == pytest.approx(found.spreads.odds, rel=0.02)
    assert family.cart == SlateRecommendation().cart


def test_families_settings_reach_it(fitted):
    assert fitted.family(slates=5).slates == 5
    short = calibrate_recommendation(fitted.log, RecommendationConfig(places=(1.0, 0.5), features=2))
    family = short.family()
    assert family.places == (1.0, 0.5) and family.slate == 2 and family.features == 2


def test_report_and_picture(fitted):
    matplotlib.use("agg")
    for part in ("48,000 rows, 200 shoppers, 60 items", "position bias", "items and tastes differ", "Assumptions"):
        assert part in str(fitted)
    assert len(fitted.plot_fit().axes) == 2
    gain = fitted.held_out["gain"].to_numpy()[1:]
    assert (gain > 3 * fitted.held_out["gain_se"].to_numpy()[1:]).all()


# ------------------------------------------------------------------------------------------- tables
def good():
    shopper, item, position = np.indices((4, 6, 2)).reshape(3, -1)
    clicks = np.random.default_rng(0).integers(1, 6, len(item))
    return pd.DataFrame(
        {"shopper": shopper, "item": item, "position": position + 1, "impressions": 100, "clicks": clicks,
         "carts": 1, "orders": 0}
    )  # fmt: skip


def with_value(column, row, value):
    table = good()
    table[column] = table[column].astype(object)
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: good().drop(columns="clicks"), "missing column 'clicks' in a table of 48 rows.*found: shopper, item"),
        (
            lambda: with_value("clicks", 5, 101),
            r"'clicks': 1 of 48 rows above .impressions.*row 6 \(shopper 0",
        ),
        (lambda: with_value("clicks", 5, -1), "'clicks': 1 of 48 rows out of range.*whole numbers >= 0"),
        (lambda: with_value("impressions", 5, np.nan), "'impressions': 1 of 48 rows missing or not a finite number"),
        (lambda: with_value("position", 5, 0), "'position': 1 of 48 rows out of range.*whole numbers, 1 to 100"),
        (lambda: with_value("position", 5, 1.5), "'position': 1 of 48 rows out of range"),
        (lambda: with_value("item", 5, None), "'item': 1 of 48 rows missing"),
        (lambda: with_value("item", 5, "tea"), "'item': 1 of 48 rows mix text and numbers"),
        (lambda: with_value("carts", 5, 50), "'carts': 1 of 48 rows above 'clicks'"),
        (lambda: with_value("orders", 5, 2), "'orders': 1 of 48 rows above 'carts'"),
        (lambda: good().drop(columns="carts"), "'orders': 48 of 48 rows without a column 'carts'"),
        (lambda: good().iloc[:0], "the table is empty: 0 rows"),
        (lambda: good().assign(clicks=0, carts=0), "'clicks': 0 in all; at least 30 are needed"),
        (lambda: good().assign(item=1), "'item': 1 in all; at least 5 are needed"),
    ],
)
def test_bad_table_is_refused_by_name_and_row(make, message):
    with pytest.raises(TableError, match=message):
        calibrate_recommendation(make())


def test_smallest_tables_are_fitted_with_what_they_tell():
    plain = calibrate_recommendation(good()[["item", "impressions", "clicks"]])
    assert plain.prior.attention == SegmentPrior().attention and plain.cart is None
    assert np.isnan(plain.spreads.taste_sd) and plain.prior.centre == SegmentPrior().centre
    text = " ".join(plain.assumptions)
    assert "one segment" in text and "does not tell positions apart" in text
    plain.family()
    no_first = calibrate_recommendation(good()[good()["position"] == 2])
    assert np.isfinite(no_first.click)


def test_rows_are_added_up_and_the_input_is_untouched(tmp_path):
    table = good()
    before = table.copy(deep=True)
    twice = read_clicks(pd.concat((table, table)))
    pd.testing.assert_frame_equal(table, before)
    once = read_clicks(table)
    assert len(twice) == len(once) and (twice["clicks"] == 2 * once["clicks"]).all()
    table.to_csv(tmp_path / "clicks.csv", index=False)
    pd.testing.assert_frame_equal(read_clicks(tmp_path / "clicks.csv"), once, check_dtype=False)


@pytest.mark.parametrize(
    "setting",
    [{"taste_sd": 0.0}, {"features": 0}, {"places": (1.0, 1.2)}, {"minimum_clicks": 4}, {"minimum_items": 1}],
)
def test_settings_are_checked(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"RecommendationConfig.{name} = .*; allowed: "):
        RecommendationConfig(**setting)
