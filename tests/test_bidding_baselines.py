"""Bidding agents: the posterior of a segment against Bayes' rule, the order of the agents, pacing, and credit."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm, poisson

from ecomlib import noise
from ecomlib.baselines import BayesUCB, GreedyBayes, ParticlePrior, Thompson, empirical_prior
from ecomlib.baselines.bidding import (
    Blind,
    PIDPacing,
    RandomMultipliers,
    SegmentBelief,
    SegmentParticles,
    UCBBidding,
    agents,
    base_level,
)
from ecomlib.families import sample_tasks, split, take
from ecomlib.families.auction import outcome
from ecomlib.families.bidding import SegmentBidding
from ecomlib.learners.credit import segment_credit, segment_credits
from ecomlib.rollout import Trajectories, trial


def lifetime(family, agent, tasks, units=1, rounds=2, seed=0):
    returns = trial(family, tasks, agent, rounds, units, seed, progress=False).returns.mean()
    blind, oracle = family.blind_return(tasks).mean(), family.oracle_return(tasks).mean()
    return float((returns - blind) / (oracle - blind))


def test_posterior_weights_are_bayes_rule_on_the_particles():
    """Against scipy's Poisson and binomial probabilities over three ticks of two segments, at levels that are centres
    of the belief's bins."""
    family = SegmentBidding(segments=2, limit=20.0)
    tasks = take(split(family, "test", 1)[1], slice(0, 1))
    belief = SegmentBelief(family, 32)
    belief.begin(family.context(tasks), 1, 1)
    state = family.reset(tasks, 1, None)
    likelihood = np.ones((2, 32))
    for tick, bins in enumerate(((2, -3), (0, 4), (-5, 1))):
        before = family.observe(tasks, state)
        level = math.log(family.typical_rate) + belief.step * torch.tensor(bins, dtype=torch.get_default_dtype())
        action = level[None, None] - base_level(family, family.seen(before))[..., None]
        uniforms = noise.uniform(0, tasks.id, torch.arange(1), 0, tick, noise.FAMILY, family.noise_size)
        quality, count = state.quality, state.conversions
        state, reward, _ = family.step(tasks, state, action, uniforms)
        belief.update(before, action, reward, family.observe(tasks, state))
        for k in range(2):
            rate, price, spread = (x.numpy() for x in belief.particles)
            won = float(state.quality[0, 0, k] - quality[0, 0, k])
            new = float(state.conversions[0, 0, k] - count[0, 0, k])
            chance = norm.cdf((float(level[k]) - price) / np.hypot(spread, family.quality_sd))
            wins = round(family.lots * float(state.wins[0, 0, k]))
            likelihood[k] *= poisson.pmf(new, rate * won) * binom.pmf(wins, family.lots, chance)
    expected = likelihood / likelihood.sum(-1, keepdims=True)
    assert np.allclose(belief.weight[0, 0].numpy(), expected, rtol=1e-7, atol=1e-12)
    assert (expected.max(-1) > 2 / 32).all()


def test_units_of_a_campaign_share_one_posterior():
    """The pooled weights are the normalised product of what each unit's days say by themselves."""
    family = SegmentBidding()
    tasks = split(family, "test", 5)[1]
    alone, pooled = Thompson(family, 64), Thompson(family, 64, stores=True)
    for agent in (alone, pooled):
        agent.choose = lambda observation, noise: 0.3 * (noise - 0.5).expand(*noise.shape[:2], 8)  # the same for both
        trial(family, tasks, agent, 1, 3, seed=3, progress=False)
    product = alone.belief.weight.log().sum(1, keepdim=True).softmax(-1)
    assert pooled.belief.weight.shape == (5, 1, 8, 64)
    assert torch.allclose(pooled.belief.weight, product, rtol=1e-6, atol=1e-9)


def test_draws_follow_the_posterior_of_every_segment():
    family = SegmentBidding()
    tasks = split(family, "test", 2)[1]
    agent = Thompson(family, 16)
    trial(replace(family, profile=(1.0,)), tasks, agent, 1, 1, seed=0, progress=False)
    belief = agent.belief
    uniform = (torch.arange(20_000) + 0.5).expand(2, -1) / 20_000
    belief.conversions, belief.quality, belief.wins, belief.losses = (
        x.expand(-1, 20_000, *x.shape[2:]) if x.dim() == 3 else x for x in
        (belief.conversions, belief.quality, belief.wins, belief.losses)
    )  # fmt: skip
    drawn = belief.draw(uniform)  # (2, 20000, 8)
    share = torch.nn.functional.one_hot(drawn, 16).double().mean(1)
    assert torch.allclose(share, belief.weight[:, 0].double(), atol=2e-4)
    belief.begin(family.context(tasks), 2, 20_000)  # where all segments have the same posterior, draws still differ
    alike = belief.draw(uniform)
    assert all(float((alike[..., 0] == alike[..., k]).double().mean()) < 0.2 for k in range(1, 8))


def test_order_of_the_agents():
    """Of 100 campaigns: who learns what a segment is worth is far ahead; who learns one multiplier stays at blind."""
    family = SegmentBidding()
    _, tasks = split(family, "train", 100)
    score = {name: lifetime(family, agent, tasks) for name, agent in agents(family).items()}
    score["greedy"] = lifetime(family, GreedyBayes(family), tasks)
    score["thompson"] = lifetime(family, Thompson(family), tasks)
    score["optimistic"] = lifetime(family, BayesUCB(family, width=0.5), tasks)
    assert abs(score["blind"]) < 0.03 and score["random multipliers"] < score["blind"] - 0.05
    assert abs(score["even pacing"]) < 0.1 and abs(score["PID pacing"]) < 0.1
    assert 0.75 < score["UCB bidding"] < score["greedy"] < 1
    assert score["thompson"] < score["greedy"] and abs(score["optimistic"] - score["greedy"]) < 0.03


def test_more_units_learn_faster_and_more_particles_change_little():
    family = SegmentBidding()
    _, tasks = split(family, "train", 80)
    one, many = (lifetime(family, GreedyBayes(family, stores=True), tasks, units, rounds=1) for units in (1, 8))
    assert many > one + 0.02
    more = lifetime(family, GreedyBayes(family, 1536), tasks)
    assert abs(more - lifetime(family, GreedyBayes(family, 512), tasks)) < 0.02


@pytest.mark.parametrize("settings", [{"first_price": True}, {"profit": False}, {"delay": 2}])
def test_agents_run_in_every_variant(settings):
    family = SegmentBidding(**settings)
    _, tasks = split(family, "train", 30)
    assert 0.5 < lifetime(family, GreedyBayes(family, 128), tasks) < 1
    assert 0.3 < lifetime(family, UCBBidding(family), tasks) < 1


def test_empirical_prior_recovers_the_spread_of_segments():
    """From two days of random multipliers on 100 campaigns: mean and spread of log rates and of log prices; and with
    it an agent does about as well as with the true prior."""
    family = SegmentBidding()
    _, tasks = split(family, "train", 100)
    prior = empirical_prior(family, tasks, RandomMultipliers(family), 2, 1024)
    assert isinstance(prior.particles, SegmentParticles) and float(prior.weight.sum()) == pytest.approx(1)
    for found, truth in ((prior.particles.rate.log(), tasks.rate.log()), (prior.particles.price, tasks.price)):
        mean = (prior.weight * found).sum()
        spread = (prior.weight * (found - mean).square()).sum().sqrt()
        assert float(mean) == pytest.approx(float(truth.mean()), abs=0.15)
        assert float(spread) == pytest.approx(float(truth.std()), abs=0.3)
    new = split(family, "test", 80)[1]
    known = lifetime(family, GreedyBayes(family), new)
    assert abs(lifetime(family, GreedyBayes(family, prior=prior), new) - known) < 0.03


def test_feedback_makes_spending_follow_the_requests():
    """On the third day, share of the budget spent by each tick against that of the requests: nearer with the
    controller than without feedback, and nearer than on its first day."""
    family = SegmentBidding()
    _, tasks = split(family, "train", 100)

    def distance(agent):
        lefts = []
        act = agent.act

        def watched(observation, noise):
            lefts.append(family.seen(observation).left / family.seen(observation).budget)
            return act(observation, noise)

        agent.act = watched
        trial(family, tasks, agent, 3, 1, seed=0, progress=False)
        left = torch.stack(lefts).view(3, 24, 100)
        planned = family.to_come(torch.arange(24.0))[:, None]
        return [float(x) for x in (left - planned).abs().mean((1, 2))]

    class Constant(Blind):
        def __init__(self, family):
            super().__init__(family)
            self.base = (*self.base[:2], 0.0)

    controlled, constant = distance(PIDPacing(family)), distance(Constant(family))
    assert controlled[2] < controlled[0] and controlled[2] < 0.5 * constant[2]


def test_agents_meet_the_same_luck_and_do_not_depend_on_the_batch():
    family = SegmentBidding()
    _, tasks = split(family, "test", 60)
    for build in (lambda: Thompson(family, 64), lambda: UCBBidding(family), lambda: PIDPacing(family)):
        large = trial(family, tasks, build(), 1, 1, seed=5, progress=False)
        small = trial(family, take(tasks, slice(40, 44)), build(), 1, 1, seed=5, progress=False)
        assert torch.allclose(large.action[:, :, 40:44], small.action, atol=1e-6)


def test_agents_in_single_precision():
    found = {}
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        family = SegmentBidding()
        _, tasks = split(family, "test", 60)
        found[dtype] = [lifetime(family, a, tasks) for a in (GreedyBayes(family, 256), Thompson(family, 256))]
    assert found[torch.float32] == pytest.approx(found[torch.float64], abs=0.02)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda f: GreedyBayes(f, 1), "particles = 1"),
        (
            lambda f: GreedyBayes(f, prior=ParticlePrior(f.prior_sample(4), torch.ones(4) / 4)),
            "allowed: SegmentParticles",
        ),
        (lambda f: RandomMultipliers(f, -1.0), "RandomMultipliers.sd = -1"),
        (lambda f: PIDPacing(f, integral=-1), "integral = -1"),
        (lambda f: UCBBidding(f, width=-1), "width = -1"),
        (lambda f: UCBBidding(f, stores=1), "stores = 1"),
        (lambda f: segment_credit("shop"), "segment_credit needs SegmentBidding; got str"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build(SegmentBidding())


# ------------------------------------------------------------------------------------------------ credit
def log_of(family, tasks, episodes, sd, seed=0):
    """A day of ``episodes`` units around the base bid, as trajectories, and how far actions were from their mean."""
    replica, state, rows = torch.arange(episodes), family.reset(tasks, episodes, None), []
    for tick in range(family.horizon):
        draw = lambda stream, size, tick=tick: noise.uniform(seed, tasks.id, replica, 0, tick, stream, size)
        action = sd * torch.special.ndtri(draw(noise.POLICY, family.segments))
        observation = family.observe(tasks, state)
        state, reward, _ = family.step(tasks, state, action, draw(noise.FAMILY, family.noise_size))
        rows.append((observation, action, torch.zeros_like(reward), reward, torch.ones_like(reward)))
    data = Trajectories(*map(torch.stack, zip(*rows)))
    return data, data.action


def test_credit_of_a_segment_is_its_derivative_of_worth_less_priced_spend():
    """Without a binding budget, the mean of credit x deviation / sd^2 is d(worth - lambda spend) / d level of the fluid
    day, in the credit's unit: 3 campaigns, 4,000 days, within 5 standard errors and 2 % for smoothing."""
    family = SegmentBidding(segments=3, base=(-1.0, 0.0, 0.0))
    tasks = sample_tasks(family, 3, torch.Generator().manual_seed(1))._replace(budget=torch.full((3,), 1e5))
    data, deviation = log_of(family, tasks, 4000, sd=0.1)
    credit = segment_credits(family, data, deviation, floor=1.0)
    seen = family.seen(data.observation)
    worth = seen.value[:-1, ..., None] * seen.conversions.diff(dim=0)
    spend = seen.spend.diff(dim=0)
    product = (credit * deviation).sum(0) / 0.01  # (M, N, K)
    estimate, error = product.mean(1), product.std(1) / 4000**0.5

    level = base_level(family, seen)[:-1].mean(-1).T[..., None].expand(-1, -1, 3)  # (M, T - 1, K)
    offered = family.offered(seen.tick[:-1, 0, 0])[:, None]
    got = [outcome(level + h, tasks.price[:, None], tasks.spread[:, None], 0.5) for h in (-1e-4, 1e-4)]
    slope = lambda name: (getattr(got[1], name) - getattr(got[0], name)) / 2e-4 * offered
    d_worth = (tasks.value[:, None, None] * tasks.rate[:, None] * slope("quality")).sum(1)
    d_spend = slope("spend").sum(1)
    price = (d_worth.sum(-1) / d_spend.sum(-1))[:, None]  # a common change gains nothing
    per_money = (worth.sum((0, 2, 3)) / spend.sum((0, 2, 3)))[:, None]
    price = torch.minimum(torch.maximum(price, 0.3 * per_money), per_money)
    paid = price * spend.mean((0, 2))
    unit = paid + paid.mean(-1, keepdim=True)
    exact = (d_worth - price * d_spend) / unit / 23
    assert ((estimate - exact).abs() < 5 * error + 0.02 * exact.abs().amax(-1, keepdim=True)).all()
    assert (exact.abs() > 10 * error).any(-1).all()  # there is something to find


def test_credit_points_at_better_bids():
    """Correlation with the change of levels that the oracle would make: above 0.6 from five days, above 0.75 from
    twenty; the joint reward's gradient (leave-one-out) stays below half of that."""
    family = SegmentBidding()
    _, tasks = split(family, "train", 150)
    start = family.base_level(torch.zeros(150), tasks.budget, tasks.budget, tasks.value)
    target = family.oracle_level(tasks) - start[:, None]
    target = target - target.mean(1, keepdim=True)
    for episodes, least in ((5, 0.6), (20, 0.75)):
        data, deviation = log_of(family, tasks, episodes, sd=0.2)
        credit = segment_credits(family, data, deviation, 1.0)
        to_go = data.reward.flip(0).cumsum(0).flip(0)
        joint = (to_go - to_go.mean(-1, keepdim=True))[..., None]
        found = []
        for weight in (credit, joint):
            gradient = (weight * deviation).mean((0, 2))
            gradient = gradient / gradient.square().mean(1, keepdim=True).sqrt()
            found.append(float(np.corrcoef(gradient.flatten(), target.flatten())[0, 1]))
        assert found[0] > least and found[1] < 0.5 * found[0]
