"""Chapter "From prediction to decision": both sides of every numbered equation."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import log_loss, ndcg_score

from ecomlib import noise
from ecomlib.families import SlateRecommendation, sample_tasks, sessions, take
from ecomlib.families.recommendation import HashedCatalogue
from ecomlib.families.slates import best_slate, expected_gain
from ecomlib.language.behaviour import event_probabilities
from ecomlib.language.choice import Choice, family_of
from ecomlib.language.decisions import StageFilter, own_effects
from ecomlib.language.ranking import ranking_scores
from ecomlib.language.review import spent


@pytest.fixture
def family():
    return SlateRecommendation(slates=4, slate=3, catalogue=HashedCatalogue(items=6, categories=3))


@pytest.fixture
def tasks(family):
    return sample_tasks(family, 20, torch.Generator().manual_seed(11))


def every_slate(family):
    return torch.tensor(list(permutations(range(family.items), family.slate)))


def gains_of(family, tasks, slates):
    """(slates, M) expected margin of each slate at once, for each segment, at stage 0."""
    weight = sessions.weights(family, tasks)[:, 0]
    value = torch.tensor(family.table.margin) * family.cart[0] * family.order[0]
    return torch.stack(
        [
            expected_gain(s.expand(len(weight), -1), weight, value.expand_as(weight), family.attention(tasks))
            for s in slates
        ]
    )


def test_a_slate_is_worth_its_purchases(family, tasks):
    """(eq-slate-events): margins times purchase probabilities, against the gain of the funnel."""
    shown = torch.tensor([4, 0, 2]).expand(20, 1, -1)
    zero = torch.zeros(20, 1, dtype=torch.int64)
    chance = event_probabilities(family, tasks, zero, zero, shown)[:, 0]
    assert torch.allclose(chance.sum(-1), torch.ones(20, 3))
    worth = (chance[..., 4] * torch.tensor(family.table.margin)[shown[0, 0]]).sum(-1)
    assert torch.allclose(worth, gains_of(family, tasks, shown[0])[0])


def test_log_odds_are_bilinear_in_text_and_taste(family, tasks):
    """(eq-bilinear): W'e, v'e and the family that the shop believes in, against the sum over single entries."""
    rng = np.random.default_rng(0)
    text, w, v = rng.normal(size=(6, 5)), rng.normal(size=(5, 4)), rng.normal(size=5)
    choice = Choice(text @ w, 0.3 + text @ v, np.full(6, 0.2), np.zeros(3), np.zeros((1, 4)))
    believed = family_of(choice, family, range(6))
    found = believed.log_weight(tasks).numpy()
    for m, i in ((0, 0), (7, 3)):
        u = tasks.taste[m].numpy()
        single = sum(text[i, a] * w[a, b] * u[b] for a in range(5) for b in range(4)) + text[i] @ v + 0.3
        assert np.isclose(found[m, i], single)
    stage, fatigue = torch.full((20, 1), 1), torch.full((20, 1), 2)
    shown = torch.tensor([3, 5, 1]).expand(20, 1, -1)
    log_odds = believed.shown_weight(tasks, stage, fatigue, shown)[:, 0].log().numpy()
    level = family.click[1] - 2 * family.tiredness
    place = tasks.bias.numpy()[:, None] * np.log(family.places[:3])
    assert np.allclose(log_odds, found[:, [3, 5, 1]] + level + place)


def test_information_is_worth_what_it_changes(family, tasks):
    """(eq-information): never negative, on all slates; zero where one slate is best for all, whatever is learned."""
    gains = gains_of(family, tasks, every_slate(family))
    informed, uninformed = gains.max(0).values.mean(), gains.mean(1).max()
    worth = informed - uninformed
    assert worth > 0
    known = best_slate(
        sessions.weights(family, tasks)[:, 0],
        (torch.tensor(family.table.margin) * family.cart[0] * family.order[0]).expand(20, -1),
        family.attention(tasks),
    )[1].mean()
    assert torch.isclose(informed, known)
    partly = torch.stack([gains[:, half].mean(1).max() for half in (slice(0, 10), slice(10, 20))]).mean()
    assert uninformed <= partly <= informed  # a prediction of which half: between the two
    same = gains_of(family, replace_taste(tasks), every_slate(family))
    assert torch.isclose(same.max(0).values.mean(), same.mean(1).max())


def replace_taste(tasks):
    """The same taste and position bias for all, who differ only in how soon they leave."""
    one = take(tasks, [0])
    return tasks._replace(taste=one.taste.expand(20, -1), bias=one.bias.expand(20))


def test_a_rising_function_of_the_prediction_changes_the_loss_and_no_list(family):
    """(eq-rank-invariance): the sort is the same, the log-loss not; with margins only a common factor is harmless."""
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.02, 0.5, (400, 10))
    clicked = rng.random(chance.shape) < chance
    for rising in (lambda p: p**3, lambda p: 0.2 + 0.1 * p):
        assert (np.argsort(-rising(chance), 1) == np.argsort(-chance, 1)).all()
        assert log_loss(clicked.ravel(), rising(chance).ravel()) > log_loss(clicked.ravel(), chance.ravel()) + 0.03
    margin = rng.uniform(0.5, 1.5, 10)
    assert (np.argsort(-0.3 * chance * margin, 1) == np.argsort(-chance * margin, 1)).all()
    assert (np.argsort(-(chance**3) * margin, 1) != np.argsort(-chance * margin, 1)).any()


def test_what_a_wrong_prediction_costs_is_bounded_by_its_errors(family, tasks):
    """(eq-regret): for every segment, over all slates, with predictions of odds that are off by up to a factor."""
    slates, truth = every_slate(family), gains_of(family, tasks, every_slate(family))
    wrong = tasks._replace(taste=tasks.taste + 0.4 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    believed = gains_of(family, wrong, slates)
    lost = truth.max(0).values - truth.gather(0, believed.argmax(0, keepdim=True))[0]
    bound = 2 * (believed - truth).abs().max(0).values
    assert (lost >= 0).all() and (lost <= bound).all() and lost.max() > 0


def test_the_stage_filter_is_the_share_of_sessions(family):
    """(eq-stage-filter): among simulated sessions that showed the same clicks, carts and purchases, the share at each
    stage; with the same level of clicks at all stages, since the filter does not use their number."""
    shares = {"cart": (0.2, 0.5, 0.8), "order": (0.3, 0.6, 0.9)}  # so that carts and orders tell of the stage
    family = replace(family, click=(0.5, 0.5, 0.5), tiredness=0.0, **shares)
    one, n = take(sample_tasks(family, 1, torch.Generator().manual_seed(0)), [0]), 300_000
    one = one._replace(leave=torch.zeros(1))
    state, found = family.reset(one, n, None), StageFilter(family, np.array(family.table.pull))
    found.begin(1, n, torch.device("cpu"))
    story = torch.zeros(n, dtype=torch.int64)
    for time in range(3):
        luck = noise.uniform(0, one.id, torch.arange(n), 0, time, noise.FAMILY, family.noise_size)
        state, _, _ = family.step(one, state, torch.tensor([0, 3, 5]).expand(1, n, -1), luck)
        found.update(family.seen(family.observe(one, state)))
        story = story * 16 + (state.place + 4 * state.cart + 8 * state.order)[0]
    compared = 0
    for name in story.unique():
        rows = story == name
        if rows.sum() < 2000:
            continue
        share = torch.nn.functional.one_hot(state.stage[0, rows], 3).double().mean(0)
        filtered = found.chance[0, rows]
        assert (filtered - filtered[0]).abs().max() < 1e-12
        error = 5 * (filtered[0] * (1 - filtered[0]) / rows.sum()).sqrt() + 1e-9
        assert ((share - filtered[0]).abs() <= error).all()
        compared += (filtered[0, 1] > 0.05).item()
    assert compared >= 5


def test_own_effects_add_to_the_variance_of_each_product(family):
    """(eq-own-effects): the covariance of log-odds over the prior is X X' + tau^2 I."""
    rng = np.random.default_rng(0)
    choice = Choice(rng.normal(size=(6, 4)), rng.normal(size=6), np.full(6, 0.2), np.zeros(3), np.zeros((1, 4)))
    believed = own_effects(family_of(choice, family, range(6)), 0.8)
    log_weight = believed.log_weight(believed.prior_sample(2**15)).numpy()
    exact = choice.features @ choice.features.T + 0.64 * np.eye(6)
    assert np.allclose(log_weight.mean(0), choice.appeal, atol=0.01)
    assert np.allclose(np.cov(log_weight.T), exact, atol=0.02 * exact.max())


def test_ndcg_is_the_discounted_gain_over_the_best():
    """(eq-ndcg): against scikit-learn, and by hand for one list."""
    rng = np.random.default_rng(0)
    wanted, score = rng.poisson(1.0, (100, 15)) + np.eye(100, 15), rng.normal(size=(100, 15))
    assert np.isclose(ranking_scores(wanted, score, 10).means["ndcg"], ndcg_score(wanted, score, k=10))
    found = ranking_scores([[0, 2, 1]], [[0.9, 0.5, 0.1]], 2)
    assert np.isclose(found.ndcg[0], (2 / np.log2(3)) / (2 + 1 / np.log2(3)))


def test_the_levels_of_all_looks_spend_the_whole():
    """(eq-spending): their sum; and the share of stretches with a false alarm among exchangeable losses."""
    total = sum(spent(0.05, look) for look in range(1, 100_001))
    assert 0.05 - 1e-6 < total < 0.05
    rng, stretches, looks = np.random.default_rng(0), 2000, 12
    reference = rng.gamma(2.0, size=(stretches, 30))
    alarm = np.zeros(stretches, bool)
    for look in range(1, looks + 1):
        now = rng.gamma(2.0, size=(stretches, 30))
        p = stats.wilcoxon(now - reference, alternative="greater", axis=1).pvalue
        alarm |= p <= spent(0.05, look)
    assert alarm.mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / stretches)
    assert alarm.mean() > 0.02  # not a test that never fires
