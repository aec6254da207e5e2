"""Few-shot tasks of shops and departments, and the classical learner on them."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Generator

from ecomlib.language.behaviour import BehaviourModel
from ecomlib.language.features import impression_features
from ecomlib.language.few_shot import (
    PADDING,
    click_rate,
    compact_features,
    event_loss,
    few_shot_learner,
    fine_tuned,
    initial,
    log_odds,
    losses,
    reference,
    score,
    session_tasks,
)
from ecomlib.language.ideal import ideal_probabilities, posterior_particles
from ecomlib.language.shop_shrinkage import learned_prior, own_weights, ridge_prior, shrunk_log_odds
from ecomlib.learners.adaptation import Inner
from ecomlib.learners.supervised import cross_entropy_loss
from ecomlib.networks import MLP

MODEL = BehaviourModel(unseen_departments=("b",), unseen_share=0.0)
PRODUCTS = pd.DataFrame({
    "department": ["a"] * 12 + ["b"] * 8, "category": [f"c{i // 2}" for i in range(20)],
    "tier": ["low", "middle", "high", "middle"] * 5, "text": [f"product {i}" for i in range(20)],
})  # fmt: skip
VECTORS = np.eye(20, dtype=np.float32)[:, :10] + 0.1
EVERYTHING = np.arange(20)


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def made(shops=(0, 1, 2), sessions=8, parts=(EVERYTHING,), seed=0):
    return session_tasks(MODEL, PRODUCTS, shops, sessions, lambda e: impression_features(e, VECTORS), parts, seed)


def test_tasks_are_the_log():
    tasks, events = made()
    assert tasks.x.shape == (3, 8, 24, 57)
    at = tasks.row >= 0
    assert (at == (tasks.y != PADDING)).all() and at.sum() == len(events)
    assert tasks.row[at].unique().numel() == len(events), "an impression is missing or twice there"
    rows = tasks.row[at].numpy()
    assert (tasks.y[at].numpy() == (events["event"].to_numpy()[rows] > 0)).all()
    expected = impression_features(events, VECTORS)[rows]
    assert np.allclose(tasks.x[at].numpy(), expected)
    for task, session in ((0, 3), (2, 7)):
        own = events.iloc[tasks.row[task, session][at[task, session]].numpy()]
        assert own["session"].nunique() == 1 and (own["shop"] == task).all()
        assert (np.diff(own["slate"] * 4 + own["place"]) == 1).all()


def test_exact_probability_is_the_generators():
    tasks, events = made(shops=range(40), sessions=30)
    real = tasks.y != PADDING
    hits, p = tasks.y[real].double(), tasks.exact[real]
    assert abs(hits.mean() - p.mean()) < 4 * (p * (1 - p)).mean().sqrt() / len(p) ** 0.5
    ends = reference(tasks, click_rate(tasks))
    assert ends.exact.mean() < ends.base.mean() - 0.01


def test_departments_are_tasks_of_their_own():
    parts = [np.arange(12), np.arange(12, 20)]
    tasks, events = made(parts=parts)
    assert len(tasks.x) == 6 and events["task"].nunique() == 6
    for number, rows in enumerate(parts):
        own = events[events["task"].isin(range(3 * number, 3 * number + 3))]
        assert set(own["product"]) <= set(rows.tolist())
        assert set(own["shop"]) == {0, 1, 2}
    assert events.groupby("session")["task"].nunique().max() == 1


def test_support_and_query_never_share_a_session():
    tasks, _ = made(sessions=10)
    marked = tasks._replace(x=torch.arange(30.0).view(3, 10, 1, 1).expand(3, 10, 24, 1))
    ids = torch.tensor([0, 4, 2**61])
    draws = {}
    for episode in (0, 1, 3):
        x, y = marked.sample(marked.tasks(ids), 5, 7, episode)
        assert x.shape == (3, 120, 1) and y.shape == (3, 120)
        draws[episode] = [set(row.unique().tolist()) for row in x]
        assert all(len(own) == 5 for own in draws[episode])
        for number, own in zip(ids.tolist(), draws[episode]):  # of its own task
            assert {int(i) // 10 for i in own} == {number % 3}
    for support, query in zip(draws[0], draws[1]):
        assert not support & query
    two = marked.sample(ids, 3, 7, 0)[0], marked.sample(ids, 3, 8, 0)[0]
    assert (two[0] != two[1]).any()
    assert (marked.sample(ids, 3, 7, 0)[0] == two[0]).all()
    alone = marked.sample(ids[1:2], 3, 7, 0)[0]  # a task's draw does not depend on its batch
    assert (alone[0] == two[0][1]).all()
    with pytest.raises(ValueError, match=r"points = 6; allowed: a whole number in 1..5"):
        marked.sample(ids, 6, 7, 0)


def test_several_seeds_draw_as_each_alone():
    tasks, _ = made(sessions=10)
    ids, seeds = torch.tensor([5, 5, 6, 6]), torch.tensor([1, 2, 1, 2])
    together = tasks.sample(ids, 3, seeds, 0)[0]
    for place, seed in enumerate(seeds.tolist()):
        assert (together[place] == tasks.sample(ids[place : place + 1], 3, seed, 0)[0][0]).all()


def test_loss_leaves_padding_out():
    output, y = torch.randn(2, 5, 2), torch.tensor([[0, 1, 1, 0, 1], [1, 0, PADDING, PADDING, PADDING]])
    found = event_loss(output, y)
    assert torch.allclose(found[0], cross_entropy_loss(output[:1], y[:1])[0])
    assert torch.allclose(found[1], cross_entropy_loss(output[1:, :2], y[1:, :2])[0])
    changed = output.clone()
    changed[1, 2:] += 5.0
    assert torch.equal(event_loss(changed, y), found)
    assert torch.allclose(losses(log_odds(output), y), found)
    assert event_loss(output[:1], torch.full((1, 5), PADDING)).tolist() == [0.0]


@pytest.mark.parametrize("name", ["pooled", "MAML", "FOMAML", "ANIL", "Reptile"])
def test_learners(name):
    tasks, _ = made(shops=range(6), sessions=8)
    network = MLP((57, 8, 2))
    settings = {"tasks": 4, "shots": 2, "queries": 4, "lr": 0.01}
    learner = few_shot_learner(network, name, Inner(steps=2, lr=0.1), **settings)
    state = learner.meta_train(tasks, 0, 15, progress=False)
    start = learner.initial(Generator().manual_seed(0))
    every = tasks.rows()
    assert (
        event_loss(network.outputs(state.meta, every.x), every.y).mean()
        < event_loss(network.outputs(start, every.x), every.y).mean()
    )
    assert learner.inner.steps == (0 if name == "pooled" else 2)
    assert learner.inner.adapted == (network.head if name == "ANIL" else None)


def test_only_maml_and_anil_have_second_derivatives():
    order = lambda name: few_shot_learner(MLP((3, 2)), name, Inner()).inner.first_order
    assert [order(name) for name in ("MAML", "ANIL", "FOMAML", "Reptile")] == [False, False, True, True]
    with pytest.raises(ValueError, match="name = 'PEARL'"):
        few_shot_learner(MLP((3, 2)), "PEARL", Inner())


def test_fine_tuning_is_descent_and_stops_where_it_is_told():
    tasks, _ = made()
    network = MLP((57, 8, 2))
    start, support = initial(network, 0), tasks.first(3)
    stages = fine_tuned(network, start, support, support.x, 0.5, 4)
    assert len(stages) == 5
    values = [losses(odds, support.y).mean() for odds in stages]
    assert all(later < before for before, later in zip(values, values[1:]))
    (last,) = fine_tuned(network, start, support, support.x, 0.5, 4, last=True)
    assert torch.equal(last, stages[-1])
    head = fine_tuned(network, start, support, support.x, 0.5, 4, network.head, last=True)[0]
    assert (head - last).abs().max() > 1e-6


def test_own_weights_are_the_mode_and_its_curvature():
    generator = Generator().manual_seed(0)
    z = torch.randn(2, 30, 3, generator=generator)
    y = (torch.rand(2, 30, generator=generator) < 0.4).long()
    y[1, 20:] = PADDING
    offset, prior = torch.randn(2, 30, generator=generator), ridge_prior(3, 0.7, z)

    def negative(w, task):
        odds = offset[task] + z[task] @ w
        pair = torch.stack((torch.zeros_like(odds), odds), -1)[None]
        rows = (y[task] != PADDING).sum()
        return event_loss(pair, y[task][None])[0] * rows + 0.5 * w @ torch.linalg.inv(prior) @ w

    found = own_weights(z, y, offset, prior, 20)
    for task in range(2):
        gradient = torch.func.grad(negative)(found.mode[task], task)
        assert gradient.abs().max() < 1e-9
        curvature = torch.func.hessian(negative)(found.mode[task], task)
        assert torch.allclose(found.covariance[task], torch.linalg.inv(curvature), atol=1e-9)
    nothing = own_weights(z, torch.full_like(y, PADDING), offset, prior)
    assert nothing.mode.abs().max() == 0 and torch.allclose(nothing.covariance[0], prior)


def test_learned_prior_finds_the_covariance_that_shops_were_drawn_from():
    generator = Generator().manual_seed(1)
    true = torch.tensor([[1.0, 0.6], [0.6, 0.5]])
    w = torch.randn(300, 2, generator=generator) @ torch.linalg.cholesky(true).T
    z = torch.randn(300, 60, 2, generator=generator)
    odds = -0.5 + (z @ w[..., None])[..., 0]
    y = (torch.rand(odds.shape, generator=generator) < torch.sigmoid(odds)).long()
    offset = torch.full_like(odds, -0.5)
    found = learned_prior(z, y, offset, ridge_prior(2, 0.3, z), rounds=30)
    assert (found - true).abs().max() < 0.2
    assert torch.allclose(found, learned_prior(z, y, offset, ridge_prior(2, 0.3, z), rounds=30, chunk=7))
    fresh = torch.randn(300, 40, 2, generator=generator)
    odds = -0.5 + (fresh @ w[..., None])[..., 0]
    labels = (torch.rand(odds.shape, generator=generator) < torch.sigmoid(odds)).long()
    by = lambda prior: losses(
        shrunk_log_odds(own_weights(z[:, :5], y[:, :5], offset[:, :5], prior), fresh, offset[:, :40]), labels
    ).mean()
    assert by(found) < min(by(ridge_prior(2, sd, z)) for sd in (0.1, 0.3, 1.0, 3.0))


def test_nobody_beats_the_generator_and_the_ideal_comes_close():
    """The Bayesian who knows the prior lies between the base rate and the exact probabilities on held-out sessions."""
    tasks, events = made(shops=range(500, 512), sessions=60)
    query = tasks.after(40)
    ends, family = reference(query, click_rate(tasks)), MODEL.family(PRODUCTS)
    found = torch.full((len(events),), 0.5)
    for _, own in events.groupby("task"):
        number = own["session"] % 60
        shop = posterior_particles(family, own[number < 40], 400, seed=0)
        rows = own[number >= 40]
        found[rows.index.to_numpy().copy()] = torch.tensor(1 - ideal_probabilities(family, rows, shop)[:, 0])
    odds = torch.special.logit(found)[query.row.clamp(min=0)].flatten(1)
    value = score(losses(odds, query.rows().y), ends)
    assert 0.5 < value < 1.05
    assert score(ends.exact, ends) == 1 and score(ends.base, ends) == 0


def test_compact_features():
    events = pd.DataFrame({"session": [0, 0], "slate": [0, 0], "place": [0, 1], "product": [3, 4], "event": [0, 1]})
    found = compact_features(events, VECTORS)
    assert found.shape == (2, 17)
    assert np.allclose(found[:, :10], VECTORS[[3, 4]]) and np.allclose(found[:, 10:14], np.eye(4)[:2])
