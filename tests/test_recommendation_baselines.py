"""Recommendation baselines: the posterior against Bayes' rule by hand, slates against brute force, the recommenders'
own formulas, and the order of the agents."""

from itertools import permutations

import numpy as np
import pytest
import torch

from ecomlib.baselines import BayesUCB, GreedyBayes, Random, Thompson, belief, empirical_prior, recommenders
from ecomlib.baselines.recommendation import RecommendationBelief, agents
from ecomlib.baselines.recommenders import Blind, Content, ItemBased, LinUCB, MNLThompson, Popularity, logs
from ecomlib.evaluation import normalised_score
from ecomlib.families import SlateRecommendation, sessions, split, take
from ecomlib.families.recommendation import HashedCatalogue
from ecomlib.families.slates import expected_gain
from ecomlib.rollout import trial


@pytest.fixture(scope="module")
def family():
    return SlateRecommendation()


@pytest.fixture(scope="module")
def tasks(family):
    return split(family, "test", 200)[1]


def played(family, tasks, agent, episodes=2, replicas=5, seed=0):
    """(E, M) mean return of each round's parallel shoppers."""
    return trial(family, tasks, agent, episodes, replicas, seed, progress=False).returns.mean(-1)


class Recorded(Random):
    """Random slates, and everything that was seen."""

    def begin(self, context, tasks, episodes):
        self.history = []

    def act(self, observation, noise):
        self.before = observation
        return super().act(observation, noise)

    def observe(self, action, reward, next_observation, done):
        self.history.append((self.before, action, reward, next_observation))


def test_posterior_is_bayes_rule_on_what_the_merchant_saw(family, tasks):
    """Against a loop over slates, places and particles in NumPy, two sessions of three segments."""
    recorded, some = Recorded(family), take(tasks, slice(0, 3))
    trial(family, some, recorded, 1, 2, 0, progress=False)
    posterior = RecommendationBelief(family, 16)
    posterior.begin(family.context(some), 3, 2)
    for step in recorded.history:
        posterior.update(*step)
    particles = posterior.particles
    features, appeal = np.array(family.table.features), np.array(family.table.appeal)
    log_weight = features @ particles.taste.numpy().T + appeal[:, None]  # (I, P)
    attention = np.array(family.places)[:, None] ** particles.bias.numpy()  # (k, P)
    expected = np.zeros((3, 2, 16))
    clicks = leaves = 0
    for before, action, _, after in recorded.history:
        before, after = family.seen(before), family.seen(after)
        for m, n in np.ndindex(3, 2):
            if before.left[m, n]:
                continue
            fatigue = before.fatigue[m, n].item()
            level = family.click[before.stage[m, n]] - family.tiredness * fatigue
            slate = action[m, n].tolist()
            odds = np.array([np.exp(log_weight[i] + level) * e for i, e in zip(slate, attention)])
            if after.item[m, n] >= 0:
                chance = odds[slate.index(after.item[m, n].item())] / (1 + odds.sum(0))
                clicks += 1
            else:
                leave = np.minimum(1, particles.leave.numpy() * (1 + fatigue))
                chance = (leave if after.left[m, n] else 1 - leave) / (1 + odds.sum(0))
                leaves += after.left[m, n].item()
            expected[m, n] += np.log(chance)
    assert clicks > 5 and leaves >= 2
    weight = np.exp(expected - expected.max(-1, keepdims=True))
    assert np.allclose(posterior.weight.numpy(), weight / weight.sum(-1, keepdims=True), rtol=1e-8, atol=1e-12)


def test_shoppers_of_a_segment_share_one_posterior(family, tasks):
    """Pooled weights are the normalised product of what each shopper says alone."""
    recorded, some = Recorded(family), take(tasks, slice(0, 6))
    trial(family, some, recorded, 1, 4, 0, progress=False)
    beliefs = [RecommendationBelief(family, 32, stores=stores) for stores in (False, True)]
    for one in beliefs:
        one.begin(family.context(some), 6, 4)
        for step in recorded.history:
            one.update(*step)
    alone, pooled = (one.weight for one in beliefs)
    assert pooled.shape == (6, 1, 32)
    assert torch.allclose(pooled, alone.log().sum(1, keepdim=True).softmax(-1), rtol=1e-6, atol=1e-12)
    assert not torch.allclose(pooled[:, 0], alone[:, 0], atol=0.1)


def test_slate_of_the_mean_gain_against_brute_force():
    """Posteriors after one random session: at least 98 % of the best of all 120 slates each time, the best itself in
    nine of ten."""
    family = SlateRecommendation(slates=4, slate=3, catalogue=HashedCatalogue(items=6, categories=3))
    tasks = split(family, "test", 60)[1]
    recorded = Recorded(family)
    trial(family, tasks, recorded, 1, 1, 0, progress=False)
    one = RecommendationBelief(family, 64)
    one.begin(family.context(tasks), 60, 1)
    for step in recorded.history[:3]:
        one.update(*step)
    observation = recorded.history[2][3]
    seen = family.seen(observation)
    state = (seen.stage * sessions.FATIGUE + seen.fatigue)[:, 0]
    _, click = sessions.gains(family, one.particles, one.plan.value[:, 4])
    weight = sessions.weights(family, one.particles)[:, state].transpose(0, 1)  # (M, P, I)
    click = click[:, state].transpose(0, 1)
    attention = family.attention(one.particles).expand(60, -1, -1)

    def mean_gain(slate):
        return (one.weight[:, 0] * expected_gain(slate[:, None].expand(-1, 64, -1), weight, click, attention)).sum(-1)

    every = torch.stack([mean_gain(torch.tensor(s).expand(60, -1)) for s in permutations(range(6), 3)], 1).amax(1)
    found = mean_gain(one.best_on_average(observation)[:, 0])
    assert (found <= every * (1 + 1e-9)).all() and (found > 0.98 * every).all()
    assert (found > every * (1 - 1e-6)).double().mean() >= 0.9


def test_greedy_on_one_particle_is_the_oracle_of_that_particle(family, tasks):
    """A belief that is sure of the truth shows the oracle's slates: Thompson, greedy and optimistic alike."""
    some = take(tasks, slice(0, 2))
    one = RecommendationBelief(family, 2)
    one.begin(family.context(some), 2, 3)
    one.log_weight[..., 1] = -torch.inf
    state = family.reset(some, 3, torch.zeros(1))
    stage = torch.tensor([[0, 1, 2], [2, 1, 0]])
    state = state._replace(time=torch.full((2, 3), 7), stage=stage, fatigue=stage.flip(0))
    observation = family.observe(some, state)
    slate = one.best_for(torch.zeros(2, 3, dtype=torch.int64), observation)
    assert torch.equal(slate, one.plan.slate[0, 7, stage * sessions.FATIGUE + stage.flip(0)])
    assert torch.equal(one.best_on_average(observation), slate)
    assert torch.equal(one.optimistic(observation, 2.0), slate)


def test_belief_of_the_truth_recovers_the_hidden_parameters(family):
    """After 40 random sessions of each of 20 segments the posterior mean of the taste is near, and nearer than the
    prior's."""
    some = take(split(family, "test", 20)[1], slice(0, 20))
    recorded = Recorded(family)
    trial(family, some, recorded, 1, 40, 0, progress=False)
    one = RecommendationBelief(family, 4096, stores=True)
    one.begin(family.context(some), 20, 40)
    for step in recorded.history:
        one.update(*step)
    error = lambda mean: (mean - some.taste).norm(dim=-1).mean().item()
    prior = error(one.particles.taste.mean(0))
    assert error(one.weight[:, 0] @ one.particles.taste) < 0.4 * prior
    bias = one.weight[:, 0] @ one.particles.bias
    assert torch.corrcoef(torch.stack((bias, some.bias)))[0, 1] > 0.5


def test_logs_are_what_random_slates_of_training_segments_led_to(family):
    past = logs(family, 200, 5)
    assert past.shown.shape == past.clicks.shape == (200, 20)
    assert (past.clicks <= past.shown).all() and past.shown.sum() % 4 == 0
    assert past.shown.sum(0).min() > 0.9 * past.shown.sum(0).max()  # each item equally often
    recorded, train = Recorded(family), split(family, "train", 200)[1]
    trial(family, train, recorded, 1, 5, 0, progress=False)
    clicks = sum((family.seen(after).item >= 0).sum().item() for *_, after in recorded.history)
    # Who has left is still observed with the last click of before: only steps of present shoppers count.
    present = sum(
        ((family.seen(after).item >= 0) & ~family.seen(before).left).sum().item()
        for before, _, _, after in recorded.history
    )
    assert past.clicks.sum().item() == present <= clicks


def test_recommenders_from_clicks_by_hand(family):
    """One click on item 3 of the slate (3, 7, 1, 0): the score of every item from the stated formula."""
    past = logs(family, 100, 5)
    rate = (past.clicks.sum(0) / past.shown.sum(0)).numpy()
    task = split(family, "test", 1)[1]
    state = family.reset(task, 1, torch.zeros(1))
    slate = torch.tensor([[[3, 7, 1, 0]]])
    before = family.observe(task, state)
    clicked = state._replace(time=state.time + 1, slate=slate, place=torch.zeros_like(state.place))
    after = family.observe(task, clicked)
    own = (past.clicks / past.shown.clamp(min=1)).numpy()
    own = own - own.mean(0)
    own /= np.linalg.norm(own, axis=0)
    features = np.array(family.table.features)
    counted = np.zeros(20)
    counted[3] = 1
    counted[[3, 7, 1, 0]] -= rate[[3, 7, 1, 0]]
    for kind, similarity in ((ItemBased, own.T @ own), (Content, features @ features.T)):
        agent = kind(family, past, weight=2.0, prior=1.5)
        agent.begin(family.context(task), 1, 1)
        agent.act(before, torch.zeros(1, 1, 1))
        agent.observe(slate, torch.zeros(1, 1), after, torch.zeros(1, 1))
        nearness = similarity @ counted / (1.5 + rate[[3, 7, 1, 0]].sum())
        score = np.exp(2.0 * nearness) * rate * np.array(family.table.margin)
        assert np.allclose(agent.score(None, None)[0, 0].numpy(), score, rtol=1e-8)
        assert agent.act(after, torch.zeros(1, 1, 1))[0, 0].tolist() == (-score).argsort()[:4].tolist()


def test_linucb_is_ridge_regression_with_a_bonus(family):
    """Mean and width against NumPy after two slates, one click."""
    past = logs(family, 100, 5)
    task = split(family, "test", 1)[1]
    agent = LinUCB(family, past, width=0.7, prior=3.0)
    agent.begin(family.context(task), 1, 1)
    inputs = np.column_stack((np.ones(20), family.table.features, family.table.appeal))
    shown, clicks = (x.sum(0).numpy() for x in past)
    gram = 3.0 * ((inputs.T * shown) @ inputs / shown.sum() + 1e-3 * np.eye(6))
    target = 3.0 * inputs.T @ clicks / shown.sum()
    state = family.reset(task, 1, torch.zeros(1))
    for slate, place in (([3, 7, 1, 0], 2), ([5, 6, 2, 9], 4)):
        agent.act(family.observe(task, state), torch.zeros(1, 1, 1))
        state = state._replace(slate=torch.tensor([[slate]]), place=torch.tensor([[place]]), time=state.time + 1)
        agent.observe(torch.tensor([[slate]]), torch.zeros(1, 1), family.observe(task, state), None)
        gram += inputs[slate].T @ inputs[slate]
        if place < 4:
            target += inputs[slate[place]]
    inverse = np.linalg.inv(gram)
    bonus = 0.7 * np.sqrt(np.einsum("ki,ij,kj->k", inputs, inverse, inputs))
    score = np.maximum(inputs @ inverse @ target + bonus, 0) * np.array(family.table.margin)
    assert np.allclose(agent.score(None, None)[0, 0].numpy(), score, rtol=1e-8)


def test_mnl_thompson_finds_the_mode_of_the_posterior(family):
    """The running mean after 60 random sessions of a segment against the maximum that L-BFGS finds for all of them at
    once, and its precision against the curvature there."""
    from scipy.optimize import minimize

    task = split(family, "test", 1)[1]._replace(bias=torch.tensor([0.4]))
    recorded = Recorded(family)
    trial(family, task, recorded, 1, 60, 0, progress=False)
    agent = MNLThompson(family, stores=True)
    agent.begin(family.context(task), 1, 60)
    mean, precision = agent.mean[0, 0].clone(), agent.precision[0, 0].clone()
    for before, action, reward, after in recorded.history:
        agent.seen = family.seen(before)
        agent.observe(action, reward, after, None)

    def negative_log_posterior(taste):
        u = torch.tensor(taste, requires_grad=True)
        total = 0.5 * (u - mean) @ precision @ (u - mean)
        for before, action, _, after in recorded.history:
            seen, item = family.seen(before), family.seen(after).item
            level = torch.tensor(family.click)[seen.stage] - family.tiredness * seen.fatigue
            log_odds = (agent.features @ u + agent.appeal)[action] + level[..., None] + agent.attention.log()
            hit = (action == item[..., None]) & (item >= 0)[..., None]
            log_chance = (log_odds * hit).sum(-1) - torch.log1p(log_odds.exp().sum(-1))
            total = total - (log_chance * ~seen.left).sum()
        total.backward()
        return total.item(), u.grad.numpy()

    mode = torch.tensor(minimize(negative_log_posterior, np.zeros(4), jac=True, method="L-BFGS-B").x)
    deviation = torch.linalg.inv(agent.precision[0, 0]).diagonal().sqrt()
    assert ((agent.mean[0, 0] - mode).abs() < 0.5 * deviation).all()
    assert (deviation < 0.5 * torch.linalg.inv(precision).diagonal().sqrt()).all()


def test_order_of_the_agents(family, tasks):
    """Second round of 5 shoppers of 200 test segments: random < 0, blind and popularity near 0, item-based < Bayes."""
    blind, oracle = family.blind_return(tasks), family.oracle_return(tasks)
    own = agents(family, True)
    own |= {"greedy": GreedyBayes(family, 256, True), "Thompson": Thompson(family, 256, True)}
    own["UCB"] = BayesUCB(family, 256, True)
    score = {name: float(normalised_score(played(family, tasks, a)[1], blind, oracle)) for name, a in own.items()}
    assert score["random"] < -0.5 and abs(score["blind"]) < 0.2 and abs(score["popularity"]) < 0.3
    for name in ("content", "item-based CF", "LinUCB", "MNL-Thompson"):
        assert 0.3 < score[name] < 0.9, name
    for name in ("greedy", "Thompson", "UCB"):
        assert 0.65 < score[name] < 1.0, name
    assert set(own) - {"greedy", "Thompson", "UCB"} == set(agents(family, False))


def test_pooled_evidence_of_more_shoppers_is_worth_more(family, tasks):
    blind, oracle = family.blind_return(tasks), family.oracle_return(tasks)
    for make in (lambda s: LinUCB(family, logs(family), s), lambda s: GreedyBayes(family, 128, s)):
        alone, pooled = (
            float(normalised_score(played(family, tasks, make(s), 1)[0], blind, oracle)) for s in (False, True)
        )
        assert pooled > alone + 0.05


def test_empirical_prior_knows_the_types(family):
    """From the logs of 150 training segments: the mean taste of its particles is near that of the prior."""
    _, train = split(family, "train", 150)
    prior = empirical_prior(family, train, Random(family), 5, particles=1024, iterations=30)
    truth = family.prior_sample(1024).taste.mean(0)
    found = prior.weight @ prior.particles.taste
    assert (found - truth).norm() < 0.35 * truth.norm()
    assert belief(family, prior=prior).size == len(prior.weight)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda f: ItemBased(f, logs(f, 10, 2), weight=-1.0), "ItemBased.weight = -1.0"),
        (lambda f: Content(f, logs(f, 10, 2), prior=0.0), "Content.prior = 0.0"),
        (lambda f: LinUCB(f, logs(f, 10, 2), width=-0.1), "LinUCB.width = -0.1"),
        (lambda f: MNLThompson(f, scale=float("nan")), "MNLThompson.scale = nan"),
        (lambda f: MNLThompson(f, stores=1), "stores = 1; allowed: True or False"),
    ],
)
def test_bad_settings_are_named(family, build, message):
    with pytest.raises(ValueError, match=message):
        build(family)


def test_popularity_and_blind_do_not_learn(family, tasks):
    some = take(tasks, slice(0, 5))
    for agent in (Popularity(family, logs(family, 50, 2)), Blind(family)):
        actions = trial(family, some, agent, 2, 2, 0, progress=False).action
        if isinstance(agent, Popularity):
            assert (actions == actions[0, 0, 0, 0]).all()
        assert actions.shape == (2, 20, 5, 2, 4)
    assert recommenders.LOGGED_SEGMENTS == 500
