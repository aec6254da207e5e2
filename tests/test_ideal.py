"""The Bayesian predictor of ``language.ideal`` against enumeration, against plain importance sampling, and as a
forecaster: what it calls 20 % must happen in 20 % of cases."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from ecomlib.families.recommendation import Catalogue, SegmentPrior, Segments, SlateRecommendation
from ecomlib.language.behaviour import BehaviourModel, event_probabilities
from ecomlib.language.ideal import (
    Particles,
    _arrays,
    _log_likelihood,
    ideal_probabilities,
    posterior_particles,
    prior_particles,
)

torch.set_num_threads(1)
CATALOGUE = Catalogue(
    (1.0,) * 6, (1.0, 0.0, 0.0, 1.0, 0.6, 0.8, -1.0, 0.0, 0.0, -1.0, 0.8, -0.6), pull=(0.2, 0.5, 0.4, 0.7, 0.3, 0.6)
)
FAMILY = SlateRecommendation(
    slates=4, slate=2, catalogue=CATALOGUE, click=(-1.2, -0.5, 0.3), cart=(0.3, 0.4, 0.5), order=(0.3, 0.4, 0.6)
)


def log_of(slates):
    """Events of one session from [[(product, event), ...], ...]."""
    rows = [(0, 7, 0.0, s, p, *row) for s, slate in enumerate(slates) for p, row in enumerate(slate)]
    return pd.DataFrame(rows, columns=["shop", "session", "time", "slate", "place", "product", "event"])


def by_enumeration(taste, bias, slates):
    """(products of the last slate, 5) for a known taste: sum over every way in which carts hid a rise of interest."""
    tasks = Segments(torch.zeros(1), taste[None], bias[None], torch.zeros(1, dtype=torch.float64))
    carts = [s for s, slate in enumerate(slates[:-1]) if any(event == 3 for _, event in slate)]
    total, mean = 0.0, 0.0
    for risen in itertools.product((False, True), repeat=len(carts)):
        chance, stage, fatigue = 1.0, 0, 0
        for s, slate in enumerate(slates):
            shown = torch.tensor([[[product for product, _ in slate]]])
            state = torch.tensor([[stage]]), torch.tensor([[fatigue]])
            p = event_probabilities(FAMILY, tasks, *state, shown)[0, 0]
            if s == len(slates) - 1:
                total, mean = total + chance, mean + chance * p
                break
            events = [event for _, event in slate]
            hit = next((place for place, event in enumerate(events) if event), None)
            if hit is None:
                chance *= float(1 - (1 - p[:, 0]).sum())
                fatigue = min(fatigue + 1, 3)
                continue
            chance *= float(p[hit, events[hit]])
            rise = events[hit] == 2
            if events[hit] == 3:
                pull = FAMILY.table.pull[slate[hit][0]]
                rise = risen[carts.index(s)]
                chance *= pull if rise else 1 - pull
            stage, fatigue = (0 if events[hit] == 4 else min(stage + rise, 2)), 0
    return mean / total


@pytest.mark.parametrize(
    "slates",
    [
        [[(0, 0), (1, 0)]],
        [[(0, 0), (1, 0)], [(2, 0), (3, 0)]],
        [[(0, 2), (1, 0)], [(2, 0), (3, 1)], [(4, 0), (5, 0)]],
        [[(0, 3), (1, 0)], [(2, 0), (3, 3)], [(4, 3), (5, 0)], [(0, 0), (3, 0)]],
        [[(1, 3), (4, 0)], [(2, 0), (3, 4)], [(4, 0), (5, 0)]],
    ],
)
def test_known_taste_equals_enumeration_of_the_hidden_intent(slates):
    taste, bias = torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    one = Particles(taste[None], bias[None], torch.zeros(1, dtype=torch.float64))
    events = log_of(slates)
    found = ideal_probabilities(FAMILY, events, one)[-len(slates[-1]) :]
    np.testing.assert_allclose(found, by_enumeration(taste, bias, slates).numpy(), rtol=1e-12)


def test_adaptive_sampling_agrees_with_many_draws_from_the_prior():
    products = pd.DataFrame({"department": ["a", "a", "b", "b", "c", "c"] * 2, "category": list("uvwxyz") * 2})
    products["tier"] = ["low", "high"] * 6
    model = BehaviourModel(features=3, unseen_departments=(), unseen_share=0.0)
    family = model.family(products)
    events = model.generate(products, [3], 12, seed=4).events
    support, query = events[events["session"] < 8], events[events["session"] >= 8]
    few = ideal_probabilities(family, query, posterior_particles(family, support, 2000))
    many = prior_particles(family, 60_000, seed=9)
    log_weight = torch.log_softmax(_log_likelihood(family, many, _arrays(support)), 0)
    plain = ideal_probabilities(family, query, many._replace(log_weight=log_weight))
    assert np.abs(few - plain).max() < 0.01  # Monte Carlo error of both, about 0.003
    prior = ideal_probabilities(family, query, prior_particles(family, 2000))
    assert np.abs(prior - plain).max() > 0.03  # the support matters here


def test_forecasts_happen_as_often_as_they_say_and_support_helps():
    products = pd.DataFrame({"department": list("abcdef") * 5, "category": [f"c{i % 15}" for i in range(30)]})
    products["tier"] = ["low", "middle", "high"] * 10
    model = BehaviourModel(features=4, unseen_departments=(), unseen_share=0.0)
    family = model.family(products)
    log = model.generate(products, range(20), 60, seed=1)
    predicted, loss = [], {}
    event = log.events["event"].to_numpy()
    for _, own in log.events.groupby("shop"):
        posterior = posterior_particles(family, own[own["session"] % 60 < 20], 300, rounds=4)
        query = own[own["session"] % 60 >= 20]
        for name, particles in (("prior", prior_particles(family, 300)), ("posterior", posterior)):
            p = ideal_probabilities(family, query, particles)
            loss.setdefault(name, []).append(-np.log(p[np.arange(len(p)), event[query.index]]))
            if name == "posterior":
                predicted.append((p, event[query.index]))
    p, y = (np.concatenate(parts) for parts in zip(*predicted))
    for kind in range(5):
        error = (p[:, kind] - (y == kind)).sum() / np.sqrt((p[:, kind] * (1 - p[:, kind])).sum())
        assert abs(error) < 4
    known = log.probability[
        np.concatenate([own.index[own["session"] % 60 >= 20] for _, own in log.events.groupby("shop")])
    ]
    exact = -np.log(known[np.arange(len(y)), y]).mean()
    prior, posterior = (np.concatenate(loss[name]).mean() for name in ("prior", "posterior"))
    assert exact < posterior < prior


def test_nothing_to_learn_from_gives_the_prior_back():
    events = log_of([[(0, 0), (1, 1)]])
    assert torch.equal(posterior_particles(FAMILY, events[:0], 50).taste, prior_particles(FAMILY, 50).taste)
    fixed = SlateRecommendation(slates=2, slate=2, catalogue=CATALOGUE, prior=SegmentPrior(attention=(1.0, 1.0)))
    assert posterior_particles(fixed, events, 50).bias.eq(1).all()
    with pytest.raises(ValueError, match="particles = 1; allowed"):
        prior_particles(FAMILY, 1)
