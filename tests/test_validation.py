"""Every public setting refuses a bad value by name, and takes lists, arrays and NumPy numbers as it takes Python's."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from ecomlib.calibration import CalibrationConfig, SalesTableError, read_sales
from ecomlib.calibration.complete_journey import PanelSelection
from ecomlib.families.base import sample_tasks, split
from ecomlib.families.pricing import GaussianPrior, LogitPricing, LogUniformPrior, blind_policy
from ecomlib.families.tabular import ShopMDP, value_iteration
from ecomlib.learners import reinforce
from ecomlib.policies import CategoricalMLP, GaussianMLP
from ecomlib.rollout import rollout, trial

NAN, INF = math.nan, math.inf
NOT_NUMBERS = (NAN, INF, -INF, "x", None, True)
NOT_WHOLE = (*NOT_NUMBERS, 2.5, 20.0)
NOT_TUPLES = (5, "x", None, (), ("a", "b"), (1.1, INF), (1.1, NAN), (1.1, None), (True, 2.0), {1.1: 1, 1.5: 2})
EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

gaussian = partial(GaussianPrior, mean=(0.4, -4.0, 5.0), factor=EYE)
gaussian.__name__ = "GaussianPrior"
continuous = partial(GaussianMLP, sizes=(3, 1))
continuous.__name__ = "GaussianMLP"


def without(values, *accepted):
    return tuple(value for value in values if not any(value is other for other in accepted))


def factor(row, column, value):
    rows = np.eye(3).tolist()
    rows[row][column] = value
    return rows


FIELDS = [
    (LogitPricing, ("days",), NOT_WHOLE),
    (LogitPricing, ("stock",), without(NOT_WHOLE, None)),
    (LogitPricing, ("markups", "weekday"), NOT_TUPLES),
    (LogitPricing, ("markups",), ((1.1,), (1.5, 1.5), np.eye(2))),
    (LogitPricing, ("mean_traffic",), (*NOT_NUMBERS, 0.0)),
    (LogitPricing, ("continuous",), (None, "no", 0, 1.0)),
    (LogitPricing, ("prior",), (None, "x", 5, LogUniformPrior)),
    (LogUniformPrior, ("sensitivity", "share", "traffic", "unit_cost"), (*NOT_TUPLES, (0.1, 0.2, 0.3), (0.0, 0.2))),
    (gaussian, ("mean",), (*NOT_TUPLES, ("a", 0, 0), (0.0, 0.0), (0.0, 0.0, INF))),
    (gaussian, ("factor",), (*NOT_TUPLES, EYE[:2], (1.0, 1.0, 1.0), np.eye(3)[:, :2])),
    (gaussian, ("factor",), [factor(*place, bad) for place in ((1, 0), (0, 1), (2, 2)) for bad in NOT_NUMBERS]),
    (gaussian, ("factor",), (factor(1, 1, -1.0), factor(0, 2, 0.1))),
    (gaussian, ("reference_markup",), (*NOT_NUMBERS, 0.0)),
    (gaussian, ("unit_cost",), NOT_TUPLES),
    (ShopMDP, ("horizon",), NOT_WHOLE),
    (ShopMDP, ("discount_cost", "leave", "annoyance"), NOT_NUMBERS),
    (reinforce.ReinforceConfig, ("iterations", "episodes"), (*NOT_WHOLE, "3", 0)),
    (reinforce.ReinforceConfig, ("learning_rate",), (*NOT_NUMBERS, 0)),
    (reinforce.ReinforceConfig, ("discount",), (*NOT_NUMBERS, 1.1)),
    (CategoricalMLP, ("sizes",), (*NOT_TUPLES, (6, 2.5, 11), (6, 3.0), (6,), (6, 0))),
    (continuous, ("sizes",), (*NOT_TUPLES, (6,), (6, 0))),
    (continuous, ("initial_mean", "initial_std"), NOT_NUMBERS),
    (continuous, ("initial_std",), (0.0, -1.0)),
    (PanelSelection, ("first_week", "last_week", "minimum_weeks", "minimum_units"), NOT_WHOLE),
    (PanelSelection, ("maximum_price_spread",), NOT_NUMBERS),
    (CalibrationConfig, ("minimum_weeks", "minimum_units", "minimum_products"), NOT_WHOLE),
    (CalibrationConfig, ("holdout_every", "season_harmonics"), NOT_WHOLE),
    (CalibrationConfig, ("margin", "visitors_scale", "minimum_price_variation", "control_sd"), NOT_NUMBERS),
    (CalibrationConfig, ("weekly_visitors",), without(NOT_NUMBERS, None)),
]


@pytest.mark.parametrize(
    ("build", "field", "value"),
    [(build, field, bad) for build, names, values in FIELDS for field in names for bad in values],
)
def test_a_bad_value_is_named(build, field, value):
    with pytest.raises(ValueError, match=rf"^{build.__name__}\.{field} = .*; allowed: \S"):
        build(**{field: value})


@pytest.mark.parametrize(
    ("build", "field", "spelled", "meant"),
    [
        (LogitPricing, "days", np.int64(14), 14),
        (LogitPricing, "stock", np.int64(20), 20),
        (LogitPricing, "mean_traffic", np.float64(50.0), 50.0),
        (LogitPricing, "continuous", np.bool_(True), True),
        (LogitPricing, "markups", [1.1, 1.5], (1.1, 1.5)),
        (LogitPricing, "markups", np.array([1.1, 1.5]), (1.1, 1.5)),
        (LogitPricing, "weekday", [0.5, 1.5], (0.5, 1.5)),
        (LogitPricing, "weekday", torch.tensor([0.5, 1.5]), (0.5, 1.5)),
        (LogUniformPrior, "traffic", [10, 20], (10, 20)),
        (LogUniformPrior, "share", (np.float64(0.1), np.float64(0.2)), (0.1, 0.2)),
        (gaussian, "mean", np.zeros(3), (0.0, 0.0, 0.0)),
        (gaussian, "factor", np.eye(3), EYE),
        (gaussian, "factor", np.eye(3).tolist(), EYE),
        (ShopMDP, "horizon", np.int32(5), 5),
        (reinforce.ReinforceConfig, "episodes", np.int64(4), 4),
        (PanelSelection, "first_week", np.int64(3), 3),
        (CalibrationConfig, "minimum_weeks", np.int64(30), 30),
    ],
)
def test_other_spellings_of_a_value_give_the_same_configuration(build, field, spelled, meant):
    config = build(**{field: spelled})
    assert config == build(**{field: meant}) and hash(config) == hash(build(**{field: meant}))
    assert type(getattr(config, field)) is type(meant)


def test_a_family_from_lists_finds_its_blind_policy():
    prior = gaussian(factor=np.eye(3) / 4, unit_cost=[0.5, 1.5])
    family = LogitPricing(days=np.int64(2), markups=[1.1, 1.5], weekday=np.array([0.5, 1.5]), prior=prior)
    assert blind_policy(family).shape == (2, 1)
    assert CategoricalMLP(np.array([6, 3])).sizes == (6, 3)


@pytest.mark.parametrize("count", [0, 1.5, 2.0, NAN, "x", None, True])
def test_counts_must_be_whole(count):
    shop, policy = ShopMDP(), CategoricalMLP((6, 3))
    generator = torch.Generator().manual_seed(0)
    _, tasks = split(shop, "test", 2)
    calls = {
        "tasks": (lambda: sample_tasks(shop, count, generator), lambda: split(shop, "test", count)),
        "episodes": (lambda: rollout(shop, tasks, policy, policy.initial(generator), count, 0),),
        "episodes_per_trial": (lambda: trial(shop, tasks, None, count, 1, 0),),
        "replicas": (lambda: trial(shop, tasks, None, 1, count, 0),),
    }
    for name, functions in calls.items():
        for call in functions:
            with pytest.raises(ValueError, match=f"^{name} = .*a whole number >= 1"):
                call()


@pytest.mark.parametrize("tolerance", [*NOT_NUMBERS, 0.0, -1e-9])
def test_value_iteration_needs_a_positive_tolerance(tolerance):
    with pytest.raises(ValueError, match="^tolerance = .*a finite number > 0"):
        value_iteration(split(ShopMDP(), "test", 2)[1], 0.9, tolerance)


@pytest.mark.parametrize("annoyance", [0.0, 0.12, 0.25, 0.299])
@pytest.mark.parametrize("leave", [0.0, 0.08, 0.4, 0.7])
def test_shoppers_of_the_shifted_shop_leave_more(leave, annoyance):
    shop = ShopMDP(leave=leave, annoyance=annoyance)
    moved = shop.shifted()
    for openness in (0.0, 0.5, 1.0):
        before = shop.leave + shop.annoyance * (1 - openness)
        after = moved.leave + moved.annoyance * (1 - openness)
        assert after > before or before == 0
        assert after <= (1 + before) / 2 + 1e-12


def weekly(week):
    rows = 2 * len(week)
    return pd.DataFrame({"product": np.repeat(["tea", "rice"], len(week)), "week": [*week] * 2}).assign(
        price=np.linspace(1.0, 2.0, rows), units=np.arange(rows)
    )


@pytest.mark.parametrize("weeks", [[20240131, 20240207], [202405, 202406], ["20240131", "20240207"], [-20000, 3]])
def test_dates_written_as_numbers_are_refused(weeks):
    with pytest.raises(SalesTableError, match="column 'week': .*write dates as 2024-01-31"):
        read_sales(weekly(weeks))


def test_weeks_are_counted_on_the_calendar_of_the_shop():
    days = pd.date_range("2024-03-25", periods=3, freq="7D", tz="Europe/Berlin")  # the clocks change on 31 March
    assert (days[1] - days[0]).days == 6
    for spelling in (days, days.map(str), days.map(lambda day: day.isoformat()), list(days.to_pydatetime())):
        assert read_sales(weekly(spelling))["week"].tolist() == [0, 1, 2] * 2
    assert read_sales(weekly(["2024-01-01T00:00Z", "2024-01-08T00:00Z"]))["week"].tolist() == [0, 1] * 2
