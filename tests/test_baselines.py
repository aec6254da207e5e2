"""Bayesian and experimental pricing: the posterior against exact integration, and the order of the agents."""

import numpy as np
import pytest
import torch
from scipy.stats import poisson

from ecomlib.baselines import EpsilonGreedy, FixedMarkup, GreedyBayes, PricingBelief, Thompson
from ecomlib.evaluation import adaptation_curves
from ecomlib.families import LogitPricing, split, take
from ecomlib.families.pricing import ShelfState, purchase_probability
from ecomlib.rollout import trial


def history(shelf, tasks, markups, sold, stock):
    """Observations before and after each of ``len(sold)`` days."""
    states = [ShelfState(*(torch.full((1, 1), float(x)) for x in (0, 0, 0, stock[0])))]
    for day, (m, units) in enumerate(zip(markups, sold), 1):
        states.append(ShelfState(*(torch.full((1, 1), float(x)) for x in (day, m, units, stock[day]))))
    return [shelf.observe(tasks, state) for state in states]


@pytest.mark.parametrize("stock", [None, 20])
def test_posterior_weights_are_bayes_rule_on_the_particles(stock):
    """Against scipy's Poisson pmf and tail, day by day; the last day sells out when stock is finite."""
    shelf = LogitPricing(stock=stock)
    tasks = take(split(shelf, "test", 1)[1], slice(0, 1))
    posterior = PricingBelief(shelf, 64)
    posterior.begin(shelf.context(tasks), 1, 1)
    actions, sold = [2, 5, 3], [6, 4, 10]
    left = [np.inf] * 4 if stock is None else [20, 14, 10, 0]
    seen = history(shelf, tasks, [shelf.markups[a] for a in actions], sold, left)
    likelihood = np.ones(64)
    for day, (action, units) in enumerate(zip(actions, sold)):
        posterior.update(seen[day], torch.tensor([[action]]), torch.zeros(1, 1), seen[day + 1])
        share = purchase_probability(posterior.particles, torch.full((64, 1), shelf.markups[action]))[:, 0]
        rate = (posterior.particles.traffic * share).numpy() * shelf.weekday[day]
        sold_out = stock is not None and left[day + 1] == 0
        likelihood *= poisson.sf(units - 1, rate) if sold_out else poisson.pmf(units, rate)
    assert np.allclose(posterior.weight[0, 0].numpy(), likelihood / likelihood.sum(), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("stock", [None, 60])
def test_stores_of_a_chain_share_one_posterior(stock):
    """(eq-stores-posterior): the pooled weights are the normalised product of what each store's days say by
    themselves; with one store nothing changes."""
    shelf = LogitPricing(stock=stock)
    tasks = split(shelf, "test", 6)[1]
    for stores in (1, 4):
        alone, pooled = Thompson(shelf, 64), Thompson(shelf, 64, stores=True)
        for agent in (alone, pooled):
            agent.choose = lambda x, noise: (5 * noise[..., 0]).long() * 2 + (14 * x[..., 0]).long() % 2  # for both
            trial(shelf, tasks, agent, 1, stores, seed=3, progress=False)
        product = alone.belief.weight.log().sum(1, keepdim=True).softmax(-1)
        assert pooled.belief.weight.shape == product.shape
        assert torch.allclose(pooled.belief.weight, product, rtol=1e-6, atol=1e-12)
    assert (product.amax(-1) > 0.9).any() and not torch.allclose(product[:, 0], alone.belief.weight[:, 0], atol=0.1)


@pytest.mark.parametrize("stock", [None, 60])
def test_more_stores_learn_faster(stock):
    """In the first episode already, ten stores that pool their days earn more each than one alone; and draw for draw
    every store of a Thompson chain posts a price of its own, every store of a greedy chain the same one."""
    shelf = LogitPricing(stock=stock)
    _, tasks = split(shelf, "test", 200)
    earned = {}
    for kind in (GreedyBayes, Thompson):
        for stores in (1, 10):
            done = trial(shelf, tasks, kind(shelf, 256, stores=True), 1, stores, seed=0, progress=False)
            earned[kind, stores] = done.returns.mean().item()
        assert earned[kind, 10] > 1.02 * earned[kind, 1]
        if stock is None:
            assert (done.action[0] == done.action[0, :, :, :1]).all() == (kind is GreedyBayes)


def test_posterior_concentrates_as_fast_as_the_data_allow():
    """After 40 weeks of three prices, the error of predicted demand is about its Poisson standard error."""
    shelf = LogitPricing(days=280)
    tasks = split(shelf, "test", 200)[1]

    class Rotating(GreedyBayes):
        def choose(self, observation, noise):
            return (shelf.seen(observation).day.long() % 3) * 4 + 1

    agent = Rotating(shelf, 8192)
    trial(shelf, tasks, agent, 1, 1, seed=0, progress=False)
    grid = torch.tensor(shelf.markups).expand(len(tasks.id), -1)
    truth = (tasks.traffic[:, None] * purchase_probability(tasks, grid))[:, [1, 5, 9]]
    predicted = (agent.belief.weight @ agent.belief.rate.T)[:, 0, [1, 5, 9]]
    days = 280 / 3
    in_standard_errors = (predicted - truth) * days / (truth * days).sqrt()
    assert (in_standard_errors.square().mean(0).sqrt() < 1.25).all()


def test_eight_times_the_particles_change_little():
    """Lifetime score of a trial of 8 episodes with 2,048 and with 16,384 particles, paired, over 4 x 100 products."""
    shelf = LogitPricing()
    agents = {"few": Thompson(shelf, 2048), "many": Thompson(shelf, 16_384)}
    curves = adaptation_curves(shelf, agents, 8, 100, seeds=range(4), expected=True, progress=False)
    difference = curves.difference("many", "few")
    assert abs(difference.estimate) < 0.02 and difference.low < 0.02


def test_order_of_the_agents_on_1000_tasks():
    """blind <= greedy Bayes, Thompson <= oracle in mean lifetime return on the test split."""
    shelf = LogitPricing()
    _, tasks = split(shelf, "test", 1000)
    blind, oracle = shelf.blind_return(tasks).mean(), shelf.oracle_return(tasks).mean()
    lifetime = {
        agent: trial(shelf, tasks, agent, 5, 1, seed=1, progress=False).returns.mean()
        for agent in (GreedyBayes(shelf), Thompson(shelf))
    }
    for value in lifetime.values():
        assert blind + 0.2 * (oracle - blind) < value < oracle


def test_thompson_explores_and_greedy_gets_stuck():
    """Incomplete learning (Harrison, Keskin and Zeevi 2012): in the fifth episode Thompson is ahead, paired by seed."""
    shelf = LogitPricing()
    agents = {"greedy": GreedyBayes(shelf), "thompson": Thompson(shelf)}
    curves = adaptation_curves(shelf, agents, 5, 200, seeds=range(5), progress=False)
    last = curves.by_episode["thompson"][:, -1] - curves.by_episode["greedy"][:, -1]
    assert (last > 0).all()
    assert curves.difference("thompson", "greedy").low > 0
    table = curves.table()
    assert list(table.columns) == ["agent", "episode", "score", "low", "high", "n"] and len(table) == 10


def test_finite_stock_agents_beat_the_blind_table():
    """The table reads the shelf and is hard to beat; after one episode both agents do, and neither beats the oracle."""
    shelf = LogitPricing(stock=60)
    _, tasks = split(shelf, "test", 200)
    blind, oracle = shelf.blind_return(tasks).mean(), shelf.oracle_return(tasks).mean()
    for agent in (GreedyBayes(shelf, 128), Thompson(shelf, 128)):
        value = trial(shelf, tasks, agent, 4, 2, seed=0, progress=False).returns[1:].mean()
        assert blind + 0.3 * (oracle - blind) < value < oracle


@pytest.mark.parametrize("stock", [None, 50])
def test_agents_in_single_precision(stock):
    """float32 is the library's default: finite posteriors, and returns as in float64 up to rounding of the luck."""
    returns = {}
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        shelf = LogitPricing(stock=stock)
        _, tasks = split(shelf, "test", 100)
        for agent in (GreedyBayes(shelf, 256), Thompson(shelf, 256)):
            value = trial(shelf, tasks, agent, 2, 1, seed=0, progress=False).returns
            assert agent.belief.weight.isfinite().all() and value.dtype == dtype
            returns[dtype, type(agent)] = value.mean().item()
    for kind in (GreedyBayes, Thompson):
        assert returns[torch.float32, kind] == pytest.approx(returns[torch.float64, kind], rel=0.02)


def test_fixed_markup_earns_the_blind_return():
    shelf = LogitPricing()
    _, tasks = split(shelf, "test", 400)
    returns = trial(shelf, tasks, FixedMarkup(shelf), 5, 20, seed=0, progress=False).returns
    assert returns.mean().item() == pytest.approx(shelf.blind_return(tasks).mean().item(), rel=2e-3)


def test_epsilon_greedy_tries_every_price_once_and_then_keeps_the_best():
    shelf = LogitPricing(days=22)
    _, tasks = split(shelf, "test", 50)
    actions = trial(shelf, tasks, EpsilonGreedy(shelf, 0.0), 1, 2, seed=0, progress=False).action[0]
    first = actions[:11].sort(0).values
    assert torch.equal(first, torch.arange(11)[:, None, None].expand_as(first))
    curves = adaptation_curves(shelf, {"epsilon": EpsilonGreedy(shelf)}, 3, 200, seeds=range(3), progress=False)
    assert (curves.by_episode["epsilon"][:, -1] > 0.2).all()


def test_agents_meet_the_same_luck_and_do_not_depend_on_the_batch():
    shelf = LogitPricing()
    _, tasks = split(shelf, "test", 300)
    for build in (lambda: Thompson(shelf, 256), lambda: EpsilonGreedy(shelf)):
        large = trial(shelf, tasks, build(), 2, 1, seed=5, progress=False)
        small = trial(shelf, take(tasks, slice(40, 48)), build(), 2, 1, seed=5, progress=False)
        assert torch.equal(large.action[:, :, 40:48], small.action)


def test_trial_and_agents_refuse_bad_input():
    shelf = LogitPricing()
    with pytest.raises(ValueError, match="epsilon = 2"):
        EpsilonGreedy(shelf, 2)
    with pytest.raises(ValueError, match=r"markup = 9: must lie in \[1.05, 2.5\]"):
        FixedMarkup(shelf, 9)
    with pytest.raises(ValueError, match="particles = 1"):
        PricingBelief(shelf, 1)
    with pytest.raises(ValueError, match="particles = 0"):
        Thompson(shelf, 0)
    with pytest.raises(ValueError, match="stores = 5; allowed: True or False"):
        Thompson(shelf, stores=5)
    with pytest.raises(ValueError, match="no stock limit"):
        EpsilonGreedy(LogitPricing(stock=5))
    with pytest.raises(ValueError, match="continuous=False"):
        GreedyBayes(LogitPricing(continuous=True))
    with pytest.raises(ValueError, match="episodes_per_trial = 0"):
        trial(shelf, split(shelf, "test", 2)[1], Thompson(shelf), 0, 1, seed=0)
    with pytest.raises(ValueError, match="seeds"):
        adaptation_curves(shelf, {"t": Thompson(shelf)}, 1, 2, seeds=[1])
    with pytest.raises(KeyError, match="no agent 'x'"):
        adaptation_curves(shelf, {"e": EpsilonGreedy(shelf)}, 1, 2, seeds=[1, 2], progress=False).difference("x", "e")
