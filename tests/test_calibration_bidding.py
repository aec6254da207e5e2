"""Calibration from logs of auctions and from published numbers: what went in comes back, bad tables are refused."""

import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize, stats

from ecomlib.calibration import BiddingConfig, TableError, auction_prior, calibrate_bidding, read_auctions
from ecomlib.calibration.auction_statistics import day_profile
from ecomlib.calibration.auctions import price_law
from ecomlib.calibration.rates import fit_rates, range_in_sd
from ecomlib.families.base import sample_tasks
from ecomlib.families.bidding import SegmentBidding, SegmentPrior

STATISTICS = Path(__file__).parents[1] / "data" / "auction_statistics.csv"
CONFIG = BiddingConfig(value=1.0, quality_sd=0.5)


def log(campaigns, days, seed):
    """The log of an advertiser who bids at random levels on every segment, with money that never ends; the truth."""
    prior = SegmentPrior()
    family = SegmentBidding(prior=replace(prior, budget=(1e6, 2e6)), lots=40, limit=50.0)
    tasks = sample_tasks(family, campaigns, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    draw = lambda: torch.rand(campaigns, days, family.noise_size, generator=generator)
    state, parts = family.reset(tasks, days, draw()), []
    for hour in range(24):
        log_bid = math.log(prior.rate) - 0.5 + 0.7 * torch.randn(campaigns, days, 8, generator=generator)
        base = family.base_level(state.tick, state.left, tasks.budget[:, None], tasks.value[:, None])
        offered = family.offered(state.tick)[..., None].expand_as(log_bid)
        before = state  # totals of the day so far
        state, _, _ = family.step(tasks, state, log_bid - base[..., None], draw())
        shape = np.indices(log_bid.shape)
        columns = {
            "campaign": shape[0],
            "day": shape[1],
            "segment": shape[2],
            "requests": offered.round(),
            "wins": (state.wins * offered).round(),
            "spend": (state.spend - before.spend) * (state.wins > 0),
            "conversions": (state.conversions - before.conversions).round(),
            "quality": (state.quality - before.quality).clamp(min=0),
            "bid": log_bid.exp(),
        }
        parts.append(pd.DataFrame({name: np.ravel(x) for name, x in columns.items()}).assign(hour=hour))
    return pd.concat(parts, ignore_index=True), tasks


@pytest.fixture(scope="module")
def book():
    return log(24, 3, seed=0)


@pytest.fixture(scope="module")
def fitted(book):
    return calibrate_bidding(book[0], CONFIG)


# ------------------------------------------------------------------------------------------- the prior comes back
def test_the_prior_is_recovered(book, fitted):
    """Against what these very campaigns are."""
    _, truth = book
    log_rate, price = truth.rate.log().numpy().ravel(), truth.price.numpy().ravel()
    prior, (rate_error, sd_error) = fitted.prior, fitted.prior_error
    assert np.log(prior.rate) - prior.rate_sd**2 / 2 == pytest.approx(log_rate.mean(), abs=2 * rate_error)
    assert prior.rate_sd == pytest.approx(log_rate.std(), abs=2 * sd_error)
    slope, intercept = np.polyfit(log_rate, price, 1)
    assert prior.price_slope == pytest.approx(slope, abs=0.03)
    centre = np.log(prior.rate)
    assert prior.price + centre == pytest.approx(intercept + slope * centre, abs=0.05)
    assert prior.price_sd == pytest.approx((price - slope * log_rate - intercept).std(), abs=0.05)
    assert prior.spread == pytest.approx((0.4, 0.8), abs=0.06)


def test_the_law_of_prices_of_each_segment_is_recovered(book, fitted):
    table = fitted.segments.sort_values(["campaign", "segment"])
    truth = book[1]
    assert (table["price"] - truth.price.numpy().ravel()).abs().quantile(0.95) < 0.04
    assert (table["spread"] - truth.spread.numpy().ravel()).abs().quantile(0.95) < 0.08


def test_without_bids_prices_are_those_paid_and_said_to_be(book, fitted):
    blind = calibrate_bidding(book[0].drop(columns=["bid"]), CONFIG)
    assert blind.prior.spread == SegmentPrior().spread
    assert any("Bids are not in the table" in x for x in blind.assumptions)
    paid = book[0].groupby(["campaign", "segment"])[["spend", "wins"]].sum()
    table = blind.segments.set_index(["campaign", "segment"])
    np.testing.assert_allclose(table["price"], np.log(paid["spend"] / paid["wins"]))
    assert (table["price"] < fitted.segments.set_index(["campaign", "segment"])["price"]).mean() > 0.6


def test_without_the_predicted_quality_a_request_counts_as_one(book):
    plain = calibrate_bidding(book[0].drop(columns=["quality"]), CONFIG)
    total = book[0].groupby(["campaign", "segment"])[["conversions", "wins"]].sum()
    raw = plain.segments.set_index(["campaign", "segment"])["rate_raw"]
    np.testing.assert_allclose(raw, total["conversions"] / total["wins"])
    assert any("quality 1" in x for x in plain.assumptions)


def test_what_is_known_of_the_day_and_the_money(book, fitted):
    family = SegmentBidding()
    assert fitted.segments_each == 8
    assert fitted.requests == pytest.approx(family.requests, rel=0.001)
    assert fitted.profile == pytest.approx(family.profile, abs=0.002)
    daily = book[0].groupby(["campaign", "day"])["spend"].sum()
    assert fitted.prior.budget == pytest.approx(tuple(np.quantile(daily, (0.05, 0.95))))
    twice = calibrate_bidding(book[0], replace(CONFIG, value=2.0))
    assert twice.prior.price == pytest.approx(fitted.prior.price - np.log(2))
    assert twice.prior.budget == pytest.approx(tuple(x / 2 for x in fitted.prior.budget))
    assumed = calibrate_bidding(book[0], replace(CONFIG, value=None))
    assert assumed.value == pytest.approx(1.5 * book[0]["spend"].sum() / book[0]["conversions"].sum())
    assert "1.5 times" in assumed.assumptions[0] and "1.5 times" not in fitted.assumptions[0]


def test_family_starts_from_its_best_base_bid(fitted):
    """A campaign that does nothing bids what is best on average for this prior, not for the default one."""
    family = fitted.family()
    tasks = sample_tasks(family, 200, torch.Generator().manual_seed(0))
    base = lambda x: family.fluid_return(tasks, torch.tensor(x)[:, None]).mean()
    assert base(family.base) == pytest.approx(family.blind_return(tasks).mean().item(), rel=1e-3)
    assert base(family.base) > base(SegmentBidding().base)
    assert family.segments == 8 and fitted.family(segments=3).segments == 3
    assert fitted.family(segments=4).requests == pytest.approx(family.requests / 2)


# ------------------------------------------------------------------------------------------- rates and prices
def test_marginal_likelihood_of_rates_equals_quadrature_and_is_maximal():
    rng = np.random.default_rng(3)
    exposure = rng.uniform(20, 2000, 60)
    events = rng.poisson(exposure * np.exp(rng.normal(-4, 0.8, 60))).astype(float)
    found = fit_rates(events, exposure, tolerance=1e-13, iterations=20_000)
    assert (np.diff(found.log_likelihood) > -1e-9).all()
    z = np.linspace(-12, 4, 8001)

    def evidence(mean, sd):
        pmf = stats.poisson.logpmf(events[:, None], exposure[:, None] * np.exp(z))
        return np.log(np.exp(pmf + stats.norm.logpdf(z, mean, sd)).sum(1) * (z[1] - z[0])).sum()

    at = (found.mean, found.sd)
    assert found.log_likelihood[-1] == pytest.approx(evidence(*at), abs=1e-6)
    for change in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)):
        assert evidence(at[0] + change[0], at[1] + change[1]) < evidence(*at)
    best = optimize.minimize(lambda x: -evidence(*x), at, method="Nelder-Mead", options={"xatol": 1e-5}).x
    assert at == pytest.approx(tuple(best), abs=2e-3)


def test_errors_of_rates_are_those_of_repeated_samples():
    rng = np.random.default_rng(5)
    found = []
    for _ in range(200):
        exposure = rng.uniform(50, 500, 80)
        found.append(fit_rates(rng.poisson(exposure * np.exp(rng.normal(-4, 0.7, 80))).astype(float), exposure))
    for name, truth in (("mean", -4.0), ("sd", 0.7)):
        values = np.array([getattr(f, name) for f in found])
        errors = np.array([getattr(f, f"{name}_error") for f in found])
        assert values.mean() == pytest.approx(truth, abs=0.02)
        # The standard deviation of 200 values is known to 5 %.
        assert values.std() == pytest.approx(np.sqrt((errors**2).mean()), rel=0.15)


def test_equal_rates_have_no_spread():
    rng = np.random.default_rng(0)
    events = rng.poisson(np.full(300, 20.0)).astype(float)
    assert fit_rates(events, np.full(300, 1000.0)).sd < 0.06


def test_prices_follow_from_wins_and_spend_without_noise():
    """Expected wins and spend of three bids go in; the two parameters of the prices come out."""
    rows, truth = [], [(-7.5, 0.3), (-7.0, 0.9), (-8.0, 0.55)]
    for pair, (m, d) in enumerate(truth):
        for log_bid in (-8.0, -7.4, -6.9):
            z = (log_bid - m) / d
            spend = 1e6 * math.exp(m + d * d / 2) * stats.norm.cdf(z - d)
            rows.append((pair, math.exp(log_bid), 1e6, 1e6 * stats.norm.cdf(z), spend))
    table = pd.DataFrame(rows, columns=["pair", "bid", "requests", "wins", "spend"])
    found = price_law(table, 3, quality_sd=0.0)
    assert found.centre == pytest.approx([m for m, _ in truth], abs=0.01)
    assert found.spread == pytest.approx([d for _, d in truth], rel=0.02)


def test_mean_range_of_normals():
    """Control-chart constants d2 of 2, 5 and 9 observations."""
    assert [range_in_sd(n) for n in (2, 5, 9)] == pytest.approx([1.1284, 2.3259, 2.9700], abs=1e-4)


# ------------------------------------------------------------------------------------------- published numbers
def test_published_prior_reads_the_table_as_it_says():
    found = auction_prior(STATISTICS)
    value = found.statistics.set_index("quantity")["value"]
    assert found.prior.rate == value["clicks"] / value["impressions"]
    placements = value[["click_rate_first_view", "click_rate_second_view", "click_rate_third_view",
                        "click_rate_fourth_view"]]  # fmt: skip
    assert found.prior.rate_sd == pytest.approx(np.log(placements).std(), abs=1e-3)
    low, high = found.prior.spread
    for d, quantile, z in ((low, "price_mean", None), (high, "price_p95", 1.645)):
        implied = value["price_median"] * math.exp(d * d / 2 if z is None else z * d)
        assert implied == pytest.approx(value[quantile], rel=2e-3)
    assert found.swing == pytest.approx(8.338, abs=1e-3)
    assert len(found.profile) == 24 and sum(found.profile) == pytest.approx(24)
    assert max(found.profile) / min(found.profile) == pytest.approx(found.swing, rel=0.01)
    assert found.profile.index(min(found.profile)) == value["hour_of_least_impressions"]
    SegmentBidding(prior=found.prior, profile=found.profile)


def test_every_published_number_has_a_source_that_the_card_names():
    table = pd.read_csv(STATISTICS)
    assert list(table.columns) == ["quantity", "value", "unit", "source"]
    card = STATISTICS.with_suffix(".md").read_text(encoding="utf-8")
    for source in table["source"]:
        assert f"`{source.split(' section')[0]}`" in card
    assert table["quantity"].is_unique and table.notna().all().all()
    assert table["value"][0] > table["value"][1] > table["value"][2] > table["value"][3]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[t["quantity"] != "price_p95"], "'quantity': there is no row 'price_p95'"),
        (lambda t: pd.concat((t, t.iloc[:1])), "'quantity': 'bids' appears more than once"),
        (lambda t: t.assign(value=-1), "'value': 24 of 24 rows out of range"),
        (lambda t: t.drop(columns="source"), "missing column 'source'"),
    ],
)
def test_bad_statistics_are_refused(change, message):
    with pytest.raises(TableError, match=message):
        auction_prior(change(pd.read_csv(STATISTICS)))


def test_flat_day_is_flat():
    assert day_profile(1.0, 4) == (1.0,) * 24


# ------------------------------------------------------------------------------------------- report, picture, tables
def test_report_and_picture(fitted):
    matplotlib.use("agg")
    for part in ("Pairs of campaign and segment", "conversions per 1,000", "shrunk", "Assumptions"):
        assert part in str(fitted)
    assert [len(axes.lines) for axes in fitted.plot_fit().axes] == [2, 2]
    assert fitted.summary() | {"prior_error": 0} == {
        "rows": 24 * 3 * 8 * 24, "segments": 192, "fitted_segments": 192, "prior_error": 0
    }  # fmt: skip
    gain = fitted.held_out.set_index("model")["gain"]
    assert gain["each segment alone"] > 0 and gain["shrunk"] > 0


def good(segments=8, hours=6):
    segment, hour = np.indices((segments, hours)).reshape(2, -1)
    rng = np.random.default_rng(0)
    wins = rng.integers(50, 300, segments * hours)
    rates = np.exp(rng.normal(-3, 0.7, segments))[segment]
    return pd.DataFrame(
        {
            "segment": segment,
            "hour": hour,
            "requests": 400,
            "wins": wins,
            "spend": wins * 0.02,
            "conversions": rng.poisson(wins * rates),
        }
    )


def with_value(column, row, value):
    table = good()
    table[column] = table[column].astype(object) if column in table else 1.0
    table[column] = table[column].astype(object)
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: good().drop(columns="wins"), "missing column 'wins' in a table of 48 rows.*found: segment, hour"),
        (lambda: good().drop(columns="conversions"), r"missing column 'conversions' \(or 'clicks'\)"),
        (lambda: with_value("wins", 7, 401), r"'wins': 1 of 48 rows above 'requests'.*row 8 \(hour 1, segment 1"),
        (lambda: with_value("wins", 7, -1), "'wins': 1 of 48 rows out of range.*whole numbers >= 0"),
        (lambda: with_value("spend", 7, -0.5), "'spend': 1 of 48 rows out of range.*-0.5.*allowed: numbers >= 0"),
        (lambda: with_value("wins", 7, 0), "'spend': 1 of 48 rows without a win.*allowed: 0 where wins = 0"),
        (lambda: with_value("hour", 7, 24), "'hour': 1 of 48 rows out of range.*whole numbers from 0 to 23"),
        (lambda: with_value("bid", 7, 0), "'bid': 1 of 48 rows out of range.*numbers > 0"),
        (lambda: with_value("conversions", 7, "two"), "'conversions': 1 of 48 rows missing or not a finite number"),
        (lambda: with_value("segment", 7, None), "'segment': 1 of 48 rows missing"),
        (lambda: with_value("quality", 7, -1), "'quality': 1 of 48 rows out of range"),
        (lambda: good().iloc[:0], "the table is empty: 0 rows"),
        (lambda: good(segments=1), "'segment': only 1 of 1 pairs of campaign and segment survive, at least 5"),
        (lambda: good().assign(requests=1, wins=1, spend=1), "only 0 of 8.*at least 200 requests: 0"),
        (lambda: good().assign(conversions=0), "'conversions': 0 in all rows"),
    ],
)  # fmt: skip
def test_bad_table_is_refused_by_name_and_row(make, message):
    with pytest.raises(TableError, match=message):
        calibrate_bidding(make())


def test_smallest_table_is_fitted_with_what_it_tells():
    found = calibrate_bidding(good())
    assert found.profile is None and found.segments_each == 8 and found.prior.budget == SegmentPrior().budget
    assert found.requests == 8 * 400
    text = " ".join(found.assumptions)
    for missing in ("24 hours", "no day column", "Bids are not", "1.5 times", "quality 1"):
        assert missing in text
    clicks = good().rename(columns={"conversions": "clicks"})
    assert calibrate_bidding(clicks).prior == found.prior


def test_the_input_is_untouched_and_files_read_alike(tmp_path):
    table = good().assign(note="kept")
    before = table.copy(deep=True)
    read = read_auctions(table)
    pd.testing.assert_frame_equal(table, before)
    table.to_csv(tmp_path / "auctions.csv.gz", index=False)
    pd.testing.assert_frame_equal(read_auctions(tmp_path / "auctions.csv.gz"), read, check_dtype=False)


@pytest.mark.parametrize(
    "setting", [{"value": 0.0}, {"quality_sd": -0.1}, {"minimum_requests": 0}, {"minimum_segments": 2}]
)
def test_settings_are_checked(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"BiddingConfig.{name} = .*; allowed: "):
        BiddingConfig(**setting)
