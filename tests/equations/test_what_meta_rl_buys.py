"""Chapter "What meta-RL buys": both sides of every numbered equation."""

import numpy as np
import pytest
import torch

from ecomlib.baselines import Random
from ecomlib.baselines.pricing import PricingBelief
from ecomlib.evaluation.statistics import normalised_score
from ecomlib.families import LogitPricing
from ecomlib.families.demand import poisson_inverse
from ecomlib.families.pricing import ShelfState, purchase_probability
from ecomlib.rollout import trial


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_lifetime_is_a_weighted_mean_of_rounds(rng):
    """Equation (eq-lifetime-score): the ratio of sums over rounds is the mean of round scores, weighted by what there
    is to gain; with the same gap in all rounds, their plain mean."""
    blind = rng.uniform(1, 2, (5, 40))
    for oracle in (blind + rng.uniform(0.5, 3, (5, 40)), blind + rng.uniform(0.5, 3, 40)):
        returns = blind + rng.normal(0.5, 1, (5, 40))
        by_round = normalised_score(returns, blind, oracle)
        lifetime = normalised_score(returns.sum(0), blind.sum(0), oracle.sum(0))
        gap = (oracle - blind).mean(1)
        weight = gap / gap.sum()
        assert lifetime == pytest.approx((weight * by_round).sum())
    assert weight == pytest.approx(np.full(5, 1 / 5)) and lifetime == pytest.approx(by_round.mean())


def test_who_starts_lower_overtakes_after_enough_rounds(rng):
    """Equation (eq-overtake): the sign of the sum of differences, for every number of rounds."""
    for c, g in rng.uniform(0.01, 1, (50, 2)):
        for rounds in range(1, 30):
            differences = np.array([-c] + [g] * (rounds - 1))
            assert (differences.sum() > 0) == (rounds > 1 + c / g)


class TwoKinds(LogitPricing):
    """Shoppers of two kinds: the logit model of one kind is wrong."""

    def bought(self, tasks, markup):
        centre = tasks.utility - 1.5 * tasks.sensitivity
        kind = lambda f: torch.sigmoid(centre[:, None] - f * tasks.sensitivity[:, None] * (markup - 1.5))
        return 0.3 * kind(0.2) + 0.7 * kind(3.0)

    def step(self, tasks, state, action, noise):
        markup = self.markup(action)
        mean = tasks.traffic[:, None] * self._weekday(state.day) * self.bought(tasks, markup)
        sold = poisson_inverse(noise[..., 0], mean)
        after = ShelfState(state.day + 1, markup, sold, state.stock)
        return after, tasks.cost[:, None] * (markup - 1) * sold, after.day >= self.days


class Watcher(Random):
    """Random prices among the first ``top``, and a belief that sees what they do."""

    def __init__(self, family, belief, top):
        super().__init__(family)
        self.belief, self.items = belief, top

    def begin(self, context, tasks, episodes):
        self.belief.begin(context, tasks, episodes)

    def act(self, observation, noise):
        self.seen = observation
        return super().act(observation, noise)

    def observe(self, action, reward, after, done):
        self.belief.update(self.seen, action, reward, after)


def test_a_wrong_model_settles_at_the_closest():
    """Equation (eq-closest-model): after twenty thousand days of random prices nearly all weight is on the particle
    that minimises the mean divergence, computed exactly; and it is another one where other prices were posted."""
    market, model = TwoKinds(), LogitPricing()
    tasks = market.tasks(torch.tensor([3]))
    weekday = torch.tensor(model.weekday, dtype=torch.float64)
    closest = []
    for top in (11, 3):
        belief = PricingBelief(model, 64, stores=True)
        trial(market, tasks, Watcher(market, belief, top), 40, 40, 0, progress=False)
        markup = torch.tensor(model.markups[:top], dtype=torch.float64)
        true = (tasks.traffic[:, None] * market.bought(tasks, markup[None]))[0]
        sample = model.prior_sample(64)
        believed = sample.traffic[:, None] * purchase_probability(sample, markup.expand(64, -1))
        true, believed = (x[..., None] * weekday for x in (true, believed))  # (A, 7), (P, A, 7): Poisson means of a day
        divergence = (true * (true / believed).log() - true + believed).mean((1, 2))
        closest.append(int(divergence.argmin()))
        assert belief.weight[0, 0, closest[-1]] > 0.99
        assert divergence.min() > 0.01  # the truth is not among the particles
    assert closest[0] != closest[1]


def test_training_pays_after_enough_tasks(rng):
    """Equation (eq-training-pays): the account of a merchant who trains in the shop against one who never does."""
    for _ in range(200):
        n, rounds, units = int(rng.integers(1, 200)), int(rng.integers(1, 6)), int(rng.integers(1, 6))
        training, later, rival = rng.uniform(-0.5, 1, 3)
        for trials in (0, 1, 3, 10, 100):
            episodes = trials * rounds * units
            learner = np.concatenate([np.full(n, training), np.full(episodes, later)])
            other = np.full(n + episodes, rival)
            ahead = learner.sum() - other.sum() > 0
            assert ahead == (trials * rounds * units * (later - rival) > n * (rival - training))
