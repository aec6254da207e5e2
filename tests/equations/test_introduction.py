"""Equations of chapter "Introduction": each evaluated on both sides."""

import numpy as np
import pytest
import torch
from scipy.stats import poisson

from ecomlib.baselines import EpsilonGreedy
from ecomlib.evaluation import normalised_score
from ecomlib.families.base import sample_tasks
from ecomlib.families.pricing import LogitPricing
from ecomlib.rollout import trial


@pytest.fixture
def returns():
    """Policy, blind and oracle returns of 50 tasks whose scale and gap differ by orders of magnitude."""
    generator = np.random.default_rng(0)
    blind = np.exp(generator.normal(0, 2, 50))
    oracle = blind + np.exp(generator.normal(-3, 2, 50))
    return blind + generator.normal(0, 1, 50), blind, oracle


def test_score_is_a_ratio_of_means(returns):
    """(eq-score): the library against two plain sums."""
    value, blind, oracle = returns
    above = sum(float(v) - float(b) for v, b in zip(value, blind))
    gap = sum(float(o) - float(b) for o, b in zip(oracle, blind))
    assert abs(normalised_score(*returns) - above / gap) < 1e-12
    assert normalised_score(blind, blind, oracle) == 0 and normalised_score(oracle, blind, oracle) == 1


def test_score_weights_tasks_by_what_there_is_to_gain(returns):
    """(eq-score-weights): both terms reproduce the score; neither the first alone nor equal weights do."""
    value, blind, oracle = returns
    oracle = oracle.copy()
    oracle[:7] = blind[:7]  # nothing to gain on these
    gain = oracle - blind
    some = gain > 0
    weight = gain / gain.sum()
    per_task = np.array([normalised_score([v], [b], [o]) for v, b, o in zip(value[some], blind[some], oracle[some])])
    first = weight[some] @ per_task
    second = (value - blind)[~some].sum() / gain.sum()
    score = normalised_score(value, blind, oracle)
    assert (~some).sum() == 7 and abs(weight.sum() - 1) < 1e-12
    assert abs(score - (first + second)) < 1e-10
    assert abs(score - first) > 1e-3
    assert abs(score - per_task.mean()) > 1


def test_trial_return_by_enumeration():
    """(eq-trial-return): three days of a price experiment, exactly, against 40,000 simulated trials of each product.

    Two prices, one day an episode: each price is tried for a day, in random order, and the third day takes the one that
    earned more. Its expectation needs the joint distribution of the two days' sales, which is a table.
    """
    family = LogitPricing(days=1, markups=(1.2, 1.78315), weekday=(1.0,))
    tasks = sample_tasks(family, 4, torch.Generator().manual_seed(1))
    replicas = 40_000
    agent = EpsilonGreedy(family, epsilon=0.0)
    simulated = trial(family, tasks, agent, 3, replicas, seed=2, progress=False).returns.sum(0)  # (M, N)
    exact = []
    for k in range(4):
        a, u, rate, cost = (getattr(tasks, name)[k].item() for name in ("sensitivity", "utility", "traffic", "cost"))
        margin = cost * (np.array(family.markups) - 1)
        mean = rate / (1 + np.exp(a * np.array(family.markups) - u))
        units = np.arange(400)
        joint = np.outer(poisson.pmf(units, mean[0]), poisson.pmf(units, mean[1]))
        earned = margin[0] * units[:, None], margin[1] * units[None]
        tie = np.isclose(*np.broadcast_arrays(*earned), atol=1e-12)
        first = joint[(earned[0] > earned[1]) & ~tie].sum() + joint[tie].sum() / 2  # a tie: a fair coin
        profit = margin * mean
        exact.append(profit.sum() + first * profit[0] + (1 - first) * profit[1])
    error = simulated.std(1) / replicas**0.5
    assert ((simulated.mean(1) - torch.tensor(exact)).abs() < 4.5 * error).all()
    # The objective is the mean over tasks.
    pooled = (error**2).sum().sqrt() / 4
    assert abs(simulated.mean() - np.mean(exact)) < 4.5 * pooled
