"""The behaviour model: events come as often as the exact probabilities say, late products wait for the test, and a log
is a function of its seed."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ecomlib.families.recommendation import SegmentPrior
from ecomlib.language.behaviour import EVENTS, BehaviourModel, event_probabilities
from ecomlib.language.products import read_products


@pytest.fixture(scope="module")
def products():
    return read_products("data/complete_journey_products.parquet")


@pytest.fixture(scope="module")
def log(products):
    torch.set_default_dtype(torch.float64)  # as of every test; a fixture of a module is made before that is set
    return BehaviourModel().generate(products, range(40), 50, seed=11)


def test_events_come_as_often_as_their_exact_probabilities_say(log):
    """Every count is a sum of indicators whose chance, given the past, is known: standardised by its exact variance,
    |z| < 4 for each of the 5 events, at each of the 4 places and for all slates after a click."""
    event, chance = log.events["event"].to_numpy(), log.probability
    after_click = log.events.groupby("session")["event"].cumsum().to_numpy() - event > 0
    groups = [np.ones(len(event), bool), after_click, *(log.events["place"].to_numpy() == j for j in range(4))]
    z = [
        [
            ((event == k)[rows] - chance[rows, k]).sum() / np.sqrt((chance * (1 - chance))[rows, k].sum())
            for k in range(5)
        ]
        for rows in groups
    ]
    assert np.abs(z).max() < 4 and len(event) > 40_000
    wrong = chance[:, [0, 2, 1, 3, 4]]  # click and browse exchanged would be noticed at once
    off = [((event == k) - wrong[:, k]).sum() / np.sqrt((wrong * (1 - wrong))[:, k].sum()) for k in range(5)]
    assert np.abs(off).max() > 10


def test_exact_probabilities_are_calibrated_in_bins(log):
    """Chi-square of observed against expected acts in twenty bins of the exact probability, 1 % level."""
    acted, chance = log.events["event"].to_numpy() > 0, 1 - log.probability[:, 0]
    which = np.argsort(np.argsort(chance)) * 20 // len(chance)
    z = [(acted - chance)[which == b].sum() / np.sqrt((chance * (1 - chance))[which == b].sum()) for b in range(20)]
    assert np.square(z).sum() < stats.chi2.ppf(0.99, 20)


def test_a_small_slate_by_enumeration(products):
    """All outcomes of a slate of two: none, or one of them with one of four endings; the family's own steps against the
    products of probabilities."""
    model = BehaviourModel(slate=2)
    family = model.family(products)
    tasks = family.tasks(torch.tensor([3]))
    stage, fatigue, shown = torch.tensor([[1]]), torch.tensor([[2]]), torch.tensor([[[4, 700]]])
    exact = event_probabilities(family, tasks, stage, fatigue, shown)[0, 0]
    weight = torch.exp(family.log_weight(tasks)[0, [4, 700]] + family.click[1] - 2 * family.tiredness)
    weight = weight * family.attention(tasks)[0]
    by_hand = torch.zeros(2, 5)
    for j, item in enumerate((4, 700)):
        click = (weight[j] / (1 + weight.sum())).item()
        pull = family.table.pull[item]
        for cart in (0, 1):
            for order in (0, 1):
                for keen in (0, 1):
                    chance = click * (family.cart[1] if cart else 1 - family.cart[1])
                    chance *= family.order[1] if order else 1 - family.order[1]
                    chance *= pull if keen else 1 - pull
                    by_hand[j, (4 if order else 3) if cart else (2 if keen else 1)] += chance
        by_hand[j, 0] = 1 - click
    assert torch.allclose(exact, by_hand, rtol=0, atol=1e-12)
    count = 200_000
    one = family.reset(tasks, count, torch.zeros(1))
    state = one._replace(stage=one.stage + 1, fatigue=one.fatigue + 2)
    luck = torch.rand(1, count, family.noise_size, generator=torch.Generator().manual_seed(0))
    after, _, _ = family.step(tasks, state, shown.expand(1, count, 2), luck)
    for j in range(2):
        here = after.place[0] == j
        shares = torch.stack([(here & ~after.cart[0]), here & after.cart[0] & ~after.order[0], here & after.order[0]])
        expected = torch.stack([exact[j, 1] + exact[j, 2], exact[j, 3], exact[j, 4]])
        spread = (expected * (1 - expected) / count).sqrt()
        assert ((shares.double().mean(1) - expected).abs() < 4 * spread).all()


def test_probabilities_sum_to_one_and_at_most_one_product_of_a_slate_is_acted_on(log):
    assert np.abs(log.probability.sum(1) - 1).max() < 1e-12 and (log.probability > 0).all()
    acted = (log.events["event"] > 0).groupby([log.events["session"], log.events["slate"]]).sum()
    assert acted.max() == 1 and (1 - log.probability[:, 0]).reshape(-1, 4).sum(1).max() < 1
    shown = log.events.groupby(["session", "slate"])["product"]
    assert (shown.nunique() == 4).all()  # four different products


def test_what_is_late_is_sold_from_the_test_on_and_not_before(products, log):
    model = BehaviourModel()
    late = model.unseen(products)
    assert products.groupby("category")["department"].nunique().max() == 1
    by_category = pd.Series(late).groupby(products["category"].to_numpy()).agg(["min", "max"])
    assert (by_category["min"] == by_category["max"]).all()  # whole categories
    assert late[products["department"].isin(model.unseen_departments)].all() and 0.15 < late.mean() < 0.4
    start = log.events["time"] - log.events["slate"] / 1440
    shown = late[log.events["product"]]
    before, after = shown[start < model.days[1]], shown[start >= model.days[1]]
    assert not before.any()
    spread = np.sqrt(late.mean() * (1 - late.mean()) / len(after))
    assert abs(after.mean() - late.mean()) < 4 * spread  # drawn evenly from what is sold


def test_a_log_is_a_function_of_its_seeds_and_shops_do_not_touch_each_other(products, log):
    model = BehaviourModel()
    again = model.generate(products, range(40), 50, seed=11)
    pd.testing.assert_frame_equal(again.events, log.events)
    alone = model.generate(products, [7], 50, seed=11)
    rows = log.events["shop"] == 7
    same = ["time", "slate", "place", "product", "event"]
    pd.testing.assert_frame_equal(alone.events[same], log.events.loc[rows, same].reset_index(drop=True))
    assert np.allclose(alone.probability, log.probability[rows], rtol=1e-12, atol=0)
    other = model.generate(products, [7], 50, seed=12)
    assert not other.events["product"].head(40).equals(alone.events["product"].head(40))


def test_no_encoder_has_a_say_and_no_text_either(products):
    model, scrambled = BehaviourModel(), products.assign(description="x", text="y", size="z")
    few = {"shops": [1], "sessions": 20, "seed": 0}
    assert model.generate(products, **few).events.equals(model.generate(scrambled, **few).events)
    moved = products.assign(tier=products["tier"].replace({"low": "high", "high": "low"}))
    assert not np.allclose(
        model.generate(products, **few).probability[:24], model.generate(moved, **few).probability[:24]
    )


def test_only_what_is_listed_is_shown(products):
    found = BehaviourModel().generate(products, [0, 1], 10, assortment=[5, 6, 7, 8, 9])
    assert set(found.events["product"]) <= {5, 6, 7, 8, 9}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"unseen_departments": ("toys",)}, "unseen_departments = 'toys'"),
        ({"days": (5, 4, 9)}, "days = "),
        ({"slates": 10**9}, "slates = 1000000000"),
        ({"features": 1}, "features = 1"),
        ({"tier": 1.0}, "tier = 1.0"),
    ],
)
def test_bad_settings_are_named(products, settings, message):
    with pytest.raises(ValueError, match=message):
        BehaviourModel(**settings).unseen(products)


def test_bad_requests_are_named(products):
    model = BehaviourModel()
    with pytest.raises(ValueError, match="shops = "):
        model.generate(products, [], 10)
    with pytest.raises(ValueError, match="sessions = 0"):
        model.generate(products, [0], 0)
    with pytest.raises(ValueError, match="at least a slate, 4"):
        model.generate(products, [0], 5, assortment=[1, 2, 3])


def test_the_world_is_a_function_of_its_seed(products):
    few, other = (
        BehaviourModel(),
        replace(BehaviourModel(), seed=1, taste=SegmentPrior(types=4, centre=2.0, deviation=0.7)),
    )
    assert few.family(products).table.features[0] != other.family(products).table.features[0]
    assert EVENTS[0] == "O" and len(EVENTS) == 5
