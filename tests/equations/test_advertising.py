"""Both sides of every numbered equation of chapter "Advertising"."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri
from scipy.stats import binom, norm, poisson

from ecomlib import noise
from ecomlib.baselines.bidding import SegmentBelief, base_level
from ecomlib.families import sample_tasks
from ecomlib.families.auction import outcome
from ecomlib.families.bidding import SegmentBidding
from ecomlib.learners.credit import segment_credits
from ecomlib.rollout import Trajectories


def tasks_of(family, count, seed=0):
    return sample_tasks(family, count, torch.Generator().manual_seed(seed))


def day(family, tasks, episodes, actions, seed=0):
    """Observations (T + 1), actions (T) and rewards (T) of a day under ``actions(tick, M, N, K)``."""
    replica, state = torch.arange(episodes), family.reset(tasks, episodes, None)
    seen, taken, rewards = [family.observe(tasks, state)], [], []
    for tick in range(family.horizon):
        uniforms = noise.uniform(seed, tasks.id, replica, 0, tick, noise.FAMILY, family.noise_size)
        action = actions(tick, len(tasks.id), episodes, family.segments)
        state, reward, _ = family.step(tasks, state, action, uniforms)
        seen.append(family.observe(tasks, state))
        taken.append(action)
        rewards.append(reward)
    return torch.stack(seen), torch.stack(taken), torch.stack(rewards)


def test_bid_wins_where_it_exceeds_the_price():
    """(eq-bid): requests won and money paid, by a loop over the lots of a tick with money to spare."""
    family = SegmentBidding(segments=2, lots=5)
    tasks = tasks_of(family, 6)._replace(budget=torch.full((6,), 1e4))
    uniforms = noise.uniform(0, tasks.id, torch.arange(1), 0, 0, noise.FAMILY, family.noise_size)
    action = torch.full((6, 1, 2), -2.0)
    state, _, _ = family.step(tasks, family.reset(tasks, 1, uniforms), action, uniforms)
    log_quality, log_price = (x[:, 0] for x in family.arrivals(tasks, uniforms))
    start = family.base_level(torch.zeros(6), tasks.budget, tasks.budget, tasks.value)
    size = family.requests * family.profile[0] / 10
    for i in range(6):
        for k in range(2):
            level = float(start[i]) - 2.0
            won = [j for j in range(5) if math.exp(level + log_quality[i, j, k]) > math.exp(log_price[i, j, k])]
            assert float(state.wins[i, 0, k]) == pytest.approx(len(won) / 5)
            assert float(state.quality[i, 0, k]) == pytest.approx(size * sum(log_quality[i, won, k].exp().tolist()))
            assert float(state.spend[i, 0, k]) == pytest.approx(size * sum(log_price[i, won, k].exp().tolist()))


def test_reward_is_value_of_poisson_conversions_less_spend():
    """(eq-bid-reward): the reward of every tick; and conversions, given the qualities won, by their distribution."""
    family = SegmentBidding(segments=2)
    tasks = tasks_of(family, 4)
    seen, _, rewards = day(family, tasks, 3000, lambda tick, *shape: torch.zeros(shape))
    decoded = family.seen(seen)
    conversions, quality, spend = (x.diff(dim=0) for x in (decoded.conversions, decoded.quality, decoded.spend))
    assert torch.allclose(rewards, tasks.value[:, None] * conversions.sum(-1) - spend.sum(-1), atol=1e-6)
    mean = tasks.rate[:, None] * quality
    lower = torch.tensor(poisson.cdf(conversions.numpy() - 1, mean.numpy()))
    upper = torch.tensor(poisson.cdf(conversions.numpy(), mean.numpy()))
    middle = ((lower + upper) / 2)[mean > 0.05]  # mid-distribution values: mean 1/2, whatever the Poisson mean
    assert float((middle.mean() - 0.5).abs()) < 5 * float(middle.std()) / len(middle) ** 0.5
    small = (conversions <= 0)[mean > 0.05].double() - torch.exp(-mean[mean > 0.05])
    assert float(small.mean().abs()) < 5 * float(small.std()) / len(small) ** 0.5


def test_base_bid_by_hand():
    """(eq-base-bid): at noon, with 60 per cent of the budget left."""
    family = SegmentBidding(base=(-1.0, 0.6, 0.8))
    budget, value, left = 50.0, 1.2, 30.0
    ahead = sum(family.profile[12:]) / sum(family.profile)
    by_hand = 8e-4 * value * math.exp(-1.0) * (budget / (value * 40)) ** 0.6 * ((left / budget) / ahead) ** 0.8
    found = family.base_level(*(torch.tensor(x) for x in (12.0, left, budget, value)))
    assert float(found) == pytest.approx(math.log(by_hand), rel=1e-9)


def test_what_a_level_wins_and_costs():
    """(eq-win), (eq-won-quality), (eq-fluid-spend): formulas, code and two million draws."""
    level, m, d, q = -7.2, -7.5, 0.6, 0.5
    s = math.hypot(d, q)
    z = (level - m) / s
    formulas = ndtr(z), math.exp(q * q / 2) * ndtr(z + q * q / s), math.exp(m + d * d / 2) * ndtr(z - d * d / s)
    code = outcome(*(torch.tensor(x) for x in (level, m, d)), q)
    assert np.allclose([float(x) for x in code], formulas, rtol=1e-12)
    draws = np.random.default_rng(0).standard_normal((2, 2_000_000))
    w, p = np.exp(q * draws[0]), np.exp(m + d * draws[1])
    won = np.exp(level) * w > p
    for sample, exact in zip((won, won * w, won * p), formulas):
        assert abs(sample.mean() - exact) < 5 * sample.std() / 2e6**0.5


def test_best_levels_divide_worth_by_the_price_of_money():
    """(eq-pacing): against scipy's constrained maximiser of profit on ten campaigns with three segments."""
    family = SegmentBidding(segments=3)
    tasks = tasks_of(family, 10)
    level = family.oracle_level(tasks)
    over = (tasks.value[:, None] * tasks.rate).log() - level  # log lambda of every segment
    assert torch.allclose(over, over[:, :1].expand(-1, 3)) and (over >= 0).all() and (over > 0.1).any()
    requests = family.requests * family.horizon / 3
    for i in range(10):
        m, d, c = (getattr(tasks, name)[i].numpy() for name in ("price", "spread", "rate"))
        v, budget, s = float(tasks.value[i]), float(tasks.budget[i]), np.hypot(tasks.spread[i].numpy(), 0.5)
        spend = lambda x, m=m, d=d, s=s: requests * (np.exp(m + d**2 / 2) * ndtr((x - m - d**2) / s)).sum()
        worth = lambda x, m=m, s=s, c=c, v=v: v * requests * (c * np.exp(0.125) * ndtr((x - m + 0.25) / s)).sum()
        found = minimize(
            lambda x, spend=spend, worth=worth: (spend(x) - worth(x)) / 100,
            np.log(v * c) - 1.0,
            method="SLSQP",
            constraints={"type": "ineq", "fun": lambda x, spend=spend, budget=budget: budget - spend(x)},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert -100 * found.fun == pytest.approx(float(family.oracle_return(tasks)[i]), rel=1e-5)


def test_level_of_a_single_segment():
    """(eq-one-segment): spends the budget, and is what bisection finds."""
    family = SegmentBidding(segments=1, profit=False)
    tasks = tasks_of(family, 50)
    n, q = family.requests * family.horizon, family.quality_sd
    m, d = tasks.price[:, 0].numpy(), tasks.spread[:, 0].numpy()
    share = tasks.budget.numpy() / (n * np.exp(m + d**2 / 2))
    binding = share < 1
    level = m + d**2 + np.hypot(d, q) * ndtri(np.minimum(share, 1))
    spend = n * np.exp(m + d**2 / 2) * ndtr((level - m - d**2) / np.hypot(d, q))
    assert binding.sum() > 30 and np.allclose(spend[binding], tasks.budget.numpy()[binding], rtol=1e-9)
    assert np.allclose(family.oracle_level(tasks)[:, 0].numpy()[binding], level[binding], atol=1e-8)


def test_segment_posterior():
    """(eq-segment-posterior): after a day, weights on 16 particles by scipy's probabilities."""
    family = SegmentBidding(segments=1, base=(-1.0, 0.0, 0.0))
    tasks = tasks_of(family, 1)._replace(budget=torch.tensor([1e4]), value=torch.tensor([math.exp(0.2)]))
    belief = SegmentBelief(family, 16)
    belief.begin(family.context(tasks), 1, 1)
    seen, taken, rewards = day(family, tasks, 1, lambda tick, *shape: torch.full(shape, 0.2 * (tick % 5)))
    log_likelihood = np.zeros(16)
    rate, price, spread = (x.numpy() for x in belief.particles)
    decoded = family.seen(seen)
    for tick in range(24):
        belief.update(seen[tick], taken[tick], rewards[tick], seen[tick + 1])
        level = float(base_level(family, family.seen(seen[tick]))[0, 0] + taken[tick, 0, 0, 0])
        quality, new = (float(getattr(decoded, x).diff(dim=0)[tick, 0, 0, 0]) for x in ("quality", "conversions"))
        wins = round(family.lots * float(decoded.wins[tick + 1, 0, 0, 0]))
        chance = norm.cdf((level - price) / np.hypot(spread, family.quality_sd))
        log_likelihood += poisson.logpmf(round(new), rate * quality) + binom.logpmf(wins, family.lots, chance)
    weight = np.exp(log_likelihood - log_likelihood.max())
    assert np.allclose(belief.weight[0, 0, 0].numpy(), weight / weight.sum(), rtol=1e-5, atol=1e-10)


def test_segment_credit():
    """(eq-segment-credit) and (eq-price-of-money), written out with numpy for one campaign of three days."""
    family = SegmentBidding(segments=2)
    tasks = tasks_of(family, 1)
    generator = torch.Generator().manual_seed(0)
    seen, taken, rewards = day(family, tasks, 3, lambda tick, *shape: 0.3 * torch.randn(shape, generator=generator))
    data = Trajectories(seen[:-1], taken, torch.zeros_like(rewards), rewards, torch.ones_like(rewards))
    decoded = family.seen(data.observation)
    worth = float(tasks.value[0]) * np.diff(decoded.conversions[:, 0].numpy(), axis=0)  # (23, N, K)
    spend = np.diff(decoded.spend[:, 0].numpy(), axis=0)
    h = np.array(family.profile[:23])[:, None, None]
    centred = lambda x: x - h / h.mean() * x.mean((0, 1))
    deviation = taken[:-1, 0].numpy()
    slope = (centred(worth) * deviation).sum() / max((centred(spend) * deviation).sum(), 1e-3 * spend.sum())
    per_money = worth.sum() / spend.sum()
    price = min(max(slope, 0.3 * per_money), per_money)
    paid = price * spend.mean((0, 1))
    by_hand = centred(worth - price * spend) / (paid + paid.mean()) / 23
    found = segment_credits(family, data, data.action, floor=1.0)[:, 0].numpy()
    assert np.allclose(found[:-1], by_hand, rtol=1e-6, atol=1e-12) and (found[-1] == 0).all()
