"""Generated product pictures and promotions: what is in a picture, and what is not."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2
from sklearn.neighbors import KNeighborsClassifier

from ecomlib.language.behaviour import BehaviourModel
from ecomlib.language.product_images import BOX, FORMS, forms, product_images
from ecomlib.language.products import read_products
from ecomlib.language.promotions import WEEK, PromotedBehaviour, with_conversions


@pytest.fixture(scope="module")
def products(data):
    return read_products(data / "complete_journey_products.parquet")


@pytest.fixture(scope="module")
def data(request):
    return request.config.rootpath / "data"


@pytest.fixture(scope="module")
def log(products):
    return PromotedBehaviour().generate(products, [10_000], 2000, seed=1)


# ------------------------------------------------------------------------------------------------ pictures
def test_a_picture_depends_on_its_own_row_alone(products):
    """Alone, among others, and again: the same numbers in 0..1; another seed, other speckles."""
    some = products.iloc[[3, 700, 1500]]
    everything = product_images(products)
    assert everything.shape == (len(products), 3, 16, 16) and everything.dtype == np.float32
    assert everything.min() >= 0 and everything.max() <= 1
    np.testing.assert_array_equal(product_images(some), everything[[3, 700, 1500]])
    np.testing.assert_array_equal(product_images(some.iloc[[1]])[0], everything[700])
    assert (product_images(some, seed=1) != product_images(some)).mean() > 0.9


def test_category_price_and_tier_are_not_in_a_picture(products):
    """Other categories, departments, prices and tiers: the same pictures."""
    generator = np.random.default_rng(0)
    other = products.copy()
    for name in ("department", "category", "price", "tier"):
        other[name] = generator.permutation(products[name].to_numpy())
    np.testing.assert_array_equal(product_images(other), product_images(products))


def test_a_sticker_changes_a_few_pixels_and_nothing_else(products):
    usual, marked = product_images(products, False), product_images(products, True)
    changed = (usual != marked).any(1).reshape(len(products), -1).mean(1)
    assert changed.min() > 0.04 and changed.max() < 0.2
    flags = np.arange(len(products)) % 3 == 0
    mixed = product_images(products, flags)
    np.testing.assert_array_equal(mixed, np.where(flags[:, None, None, None], marked, usual))


def test_form_and_brand_can_be_told_from_the_picture(products):
    """The nearest outline among half of the products has the form of most of the others, where the commonest form
    alone is right in three of five; and store brands share a colour."""
    form, pictures = np.array(forms(products)), product_images(products)
    assert set(form) == {*FORMS, BOX}
    ink = ((pictures.max(1) - pictures.min(1)) > 0.3).reshape(len(products), -1)
    known = KNeighborsClassifier(5).fit(ink[::2], form[::2])
    assert known.score(ink[1::2], form[1::2]) > 0.9
    middle = pictures[:, :, 9:12, 6:10].mean((2, 3))
    own = products["brand"] == "store brand"
    assert middle[own].std(0).mean() < 0.5 * middle[~own].std(0).mean()


def test_forms_come_from_words():
    words = [("cut green beans canned", "14 ounce"), ("spring water", "1 l"), ("yellow onions", "3 pound")]
    table = pd.DataFrame([*words, ("paper towels", "6 count"), ("oatmeal", "12 ounce")])
    table.columns = ["description", "size"]
    assert forms(table) == ["can", "bottle", "bag", "pack", "box"]


@pytest.mark.parametrize("change", [{"size": 7}, {"size": 65}, {"size": 16.0}, {"promoted": [True, False]}])
def test_what_does_not_fit_is_named(products, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        product_images(products.iloc[:3], **change)


# ------------------------------------------------------------------------------------------------ promotions
def test_no_lift_is_the_plain_model(products):
    """A promotion that does nothing leaves events and probabilities as they are."""
    plain = BehaviourModel().generate(products, [10_000], 300, seed=1)
    idle = PromotedBehaviour(lift=0.0).generate(products, [10_000], 300, seed=1)
    pd.testing.assert_frame_equal(idle.events[plain.events.columns], plain.events)
    np.testing.assert_allclose(idle.probability, plain.probability, rtol=0, atol=1e-15)


def test_promotions_last_a_week_and_the_feed_never_lists_too_many(products, log):
    events = log.events
    week = (events.groupby("session")["time"].transform("min") // WEEK).astype(int)
    assert (events.groupby([events["product"], week])["promoted"].nunique() == 1).all()
    assert not (events["recorded"] & ~events["promoted"]).any()
    model = PromotedBehaviour()
    assert abs(model.promoted(2000).mean() - model.promotion) < 0.01
    share = model.listed_promotions(2000).sum() / model.promoted(2000).sum()
    assert abs(share - model.recorded) < 0.02
    np.testing.assert_array_equal(model.promoted(50), model.promoted(2000)[:50])


def test_the_feed_changes_no_event(products, log):
    full = PromotedBehaviour(recorded=1.0).generate(products, [10_000], 2000, seed=1)
    pd.testing.assert_frame_equal(full.events.drop(columns="recorded"), log.events.drop(columns="recorded"))
    assert (full.events["recorded"] == full.events["promoted"]).all()


def test_events_come_at_their_exact_probabilities(log):
    """Counts of each event in ten groups of rows by exact probability: chi-square over all, below its 99.9 % point."""
    statistic, cells = 0.0, 0
    for number in range(1, 5):
        p, seen = log.probability[:, number], log.events["event"].to_numpy() == number
        for group in np.array_split(np.argsort(p), 10):
            statistic += (seen[group].sum() - p[group].sum()) ** 2 / (p[group] * (1 - p[group])).sum()
            cells += 1
    assert statistic < chi2.ppf(0.999, cells)


def test_other_conversions_keep_the_clicks(products, log):
    """The share of clicks that end in the cart is the one asked for, product by product; clicks stay."""
    cart = np.where(np.arange(len(products)) % 2 == 0, 0.6, 0.1)
    other = with_conversions(log, cart, np.full(len(products), 0.5), seed=2)
    old, new = log.events["event"].to_numpy(), other.events["event"].to_numpy()
    np.testing.assert_array_equal(new > 0, old > 0)
    np.testing.assert_allclose(other.probability.sum(1), 1, atol=1e-12)
    np.testing.assert_array_equal(other.probability[:, 0], log.probability[:, 0])
    even = other.events["product"].to_numpy() % 2 == 0
    for rows, share in ((even, 0.6), (~even, 0.1)):
        clicks = (new[rows] > 0).sum()
        assert abs((new[rows] >= 3).sum() / clicks - share) < 4 * (share * (1 - share) / clicks) ** 0.5


@pytest.mark.parametrize("change", [{"promotion": 1.1}, {"recorded": -0.1}, {"lift": float("nan")}, {"slates": 0}])
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PromotedBehaviour(**change)
