"""SegmentBidding: closed forms against quadrature, oracles against knapsacks and grids; the budget; the protocol."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from ecomlib import noise
from ecomlib.families import sample_tasks, split, take
from ecomlib.families.auction import outcome, shaded_level
from ecomlib.families.bidding import SegmentBidding, SegmentPrior, blind_policy


@pytest.fixture(scope="module")
def family():
    return SegmentBidding()


def tasks_of(family, count, seed=0):
    return sample_tasks(family, count, torch.Generator().manual_seed(seed))


def draw(family, tasks, episodes, tick, seed=0):
    return noise.uniform(seed, tasks.id, torch.arange(episodes), 0, tick, noise.FAMILY, family.noise_size)


def play(family, tasks, choose, episodes=1, seed=0):
    """A day under ``choose(state) -> (M, N, K)``; returns rewards (T, M, N) and states."""
    state, rewards, states = family.reset(tasks, episodes, draw(family, tasks, episodes, family.horizon, seed)), [], []
    for tick in range(family.horizon):
        state, reward, done = family.step(tasks, state, choose(state), draw(family, tasks, episodes, tick, seed))
        rewards.append(reward)
        states.append(state)
    assert done.all()
    return torch.stack(rewards), states


def at_level(family, tasks, level, pacing=0.0):
    """A policy that bids at ``level`` (M, K), moved by ``pacing`` times the log of how far spending lags behind."""

    def choose(state):
        budget, value = tasks.budget[:, None], tasks.value[:, None]
        lag = ((state.left / budget).clamp(min=1e-3) / family.to_come(state.tick)).log()
        base = family.base_level(state.tick, state.left, budget, value)
        return level[:, None] + (pacing * lag - base)[..., None]

    return choose


def nothing(state):
    return torch.zeros_like(state.wins)


def spend_of(family, tasks, level):
    per_request = outcome(level, tasks.price, tasks.spread, family.quality_sd, family.first_price).spend
    return per_request.sum(-1) * family.requests * family.horizon / family.segments


# ------------------------------------------------------------------------------------------------ closed forms
@pytest.mark.parametrize("first_price", [False, True])
def test_outcome_equals_quadrature(first_price):
    """Wins, quality and spend of one request by numerical integration over the price, for five levels."""
    m, d, q = -0.3, 0.6, 0.5

    def means(level):  # a log price x is beaten by log qualities above x - level
        beaten = lambda x: norm.sf((x - level) / q)
        quality = lambda x: math.exp(q * q / 2) * norm.sf((x - level) / q - q)
        paid = (lambda x: math.exp(level) * quality(x)) if first_price else (lambda x: math.exp(x) * beaten(x))
        return [
            quad(lambda x, f=f: norm.pdf(x, m, d) * f(x), m - 12 * d, m + 12 * d, epsabs=1e-13, limit=200)[0]
            for f in (beaten, quality, paid)
        ]

    for level in (-3.0, -1.0, 0.0, 0.5, 2.0):
        got = outcome(*(torch.tensor(x) for x in (level, m, d)), q, first_price)
        expected = means(level)
        assert np.allclose([float(x) for x in got], expected, rtol=1e-9, atol=1e-13)


def test_best_level_of_one_segment_is_the_closed_form():
    """log alpha* = m - log(v c) + d^2 + s Phi^-1(B / (n e^(m + d^2 / 2))), equation (eq-one-segment)."""
    shop = SegmentBidding(segments=1, profit=False)
    tasks = tasks_of(shop, 500)
    m, d = tasks.price[:, 0], tasks.spread[:, 0]
    everything = shop.requests * shop.horizon * torch.exp(m + d**2 / 2)
    scale = (d**2 + shop.quality_sd**2).sqrt()
    closed = m + d**2 + scale * torch.special.ndtri((tasks.budget / everything).clamp(max=1))
    affordable = tasks.budget < everything
    assert affordable.sum() > 400
    assert torch.allclose(shop.oracle_level(tasks)[affordable, 0], closed[affordable], atol=1e-8)


@pytest.mark.parametrize("first_price", [False, True])
@pytest.mark.parametrize("profit", [True, False])
def test_no_other_levels_of_the_same_spend_gain_more(first_price, profit):
    """200 random directions for each of 100 campaigns; the budget is spent unless a bid would exceed its worth."""
    shop = SegmentBidding(first_price=first_price, profit=profit)
    tasks = tasks_of(shop, 100)
    level = shop.oracle_level(tasks)
    spend = spend_of(shop, tasks, level)
    assert (spend <= tasks.budget * (1 + 1e-9)).all()
    short = spend < tasks.budget * (1 - 1e-6)
    truthful = (tasks.value[:, None] * tasks.rate).log()
    unlimited = shaded_level(truthful, tasks.price, tasks.spread, 0.5) if first_price else truthful
    assert torch.allclose(level[short], unlimited[short]) if profit else not short.any()
    best = shop.oracle_return(tasks)
    generator = torch.Generator().manual_seed(0)
    for size in (0.02, 0.3):
        for _ in range(100):
            other = level + size * torch.randn(level.shape, generator=generator)
            low, high = torch.full_like(best, -3.0), torch.full_like(best, 3.0)
            for _ in range(40):  # the same spend: a common shift of all levels
                middle = (low + high) / 2
                over = spend_of(shop, tasks, other + middle[:, None]) > spend
                low, high = torch.where(over, low, middle), torch.where(over, middle, high)
            other = other + low[:, None]
            got = outcome(other, tasks.price, tasks.spread, 0.5, first_price)
            requests = shop.requests * shop.horizon / shop.segments
            gain = requests * (tasks.value[:, None] * tasks.rate * got.quality - profit * got.spend).sum(-1)
            assert (gain <= best * (1 + 1e-9)).all()


def test_shaded_level_equals_a_fine_grid():
    """First price: the best of 20,001 levels below the truthful one, for 200 segments."""
    generator = torch.Generator().manual_seed(1)
    price, spread = torch.randn(200, generator=generator), 0.4 + 0.4 * torch.rand(200, generator=generator)
    truthful = torch.randn(200, generator=generator)
    grid = truthful + torch.linspace(-6, 0, 20_001)[:, None]
    got = outcome(grid, price, spread, 0.5, True)
    gain = truthful.exp() * got.quality - got.spend
    found = shaded_level(truthful, price, spread, 0.5)
    assert ((grid.gather(0, gain.argmax(0)[None])[0] - found).abs() <= 6 / 20_000).all()


def test_at_second_price_with_money_to_spare_the_truthful_bid_is_best(family):
    """Vickrey (1961): whatever the lots of the day are, no other level earns more, lot by lot."""
    tasks = tasks_of(family, 50)._replace(budget=torch.full((50,), 1e6))
    truthful = (tasks.value[:, None] * tasks.rate).log()
    assert torch.allclose(family.oracle_level(tasks), truthful)
    wide = replace(family, limit=40.0)

    def worth(shift):
        _, states = play(wide, tasks, at_level(wide, tasks, truthful + shift), episodes=4)
        return (tasks.value[:, None] * tasks.rate)[:, None] * states[-1].quality - states[-1].spend

    best = worth(0.0)
    for shift in (-1.0, -0.1, 0.1, 1.0):
        other = worth(shift)
        assert (other <= best + 1e-12).all() and other.mean() < best.mean()


# ------------------------------------------------------------------------------------------------ simulated days
def test_days_without_a_budget_have_the_fluid_means(family):
    """Monte Carlo: 500 days of 20 campaigns at fixed levels; wins, quality, spend and conversions of each segment
    within 5 standard errors, and their mean over all within 2 %."""
    tasks = tasks_of(family, 20)._replace(budget=torch.full((20,), 1e6))
    wide = replace(family, limit=40.0)
    level = (tasks.value[:, None] * tasks.rate).log() - 0.5
    _, states = play(wide, tasks, at_level(wide, tasks, level), episodes=500)
    got = outcome(level, tasks.price, tasks.spread, family.quality_sd)
    requests = family.requests * family.horizon / family.segments
    profile = torch.tensor(family.profile)[:, None, None, None] / family.horizon
    expected = {"wins": got.wins, "quality": requests * got.quality, "spend": requests * got.spend}
    expected["conversions"] = tasks.rate * expected["quality"]
    for name, mean in expected.items():
        wins = (torch.stack([s.wins for s in states]) * profile).sum(0)
        total = wins if name == "wins" else getattr(states[-1], name)  # (M, N, K)
        error = total.std(1) / 500**0.5
        assert ((total.mean(1) - mean).abs() < 5 * error + 1e-12).all(), name
        assert abs(float(total.mean() / mean.mean()) - 1) < 0.02, name


def test_oracle_return_is_a_close_upper_bound(family):
    """A policy that knows the campaign and corrects for the day's luck earns 99 % to 100 % of the fluid optimum; and
    choosing lots by hindsight, at best worth for money (fractional knapsack), is worth at most 2 % more than it."""
    for shop in (family, replace(family, profit=False)):
        tasks = split(shop, "train", 200)[1]
        level, best = shop.oracle_level(tasks), shop.oracle_return(tasks)
        rewards, _ = play(shop, tasks, at_level(shop, tasks, level, pacing=0.5), episodes=10)
        reached = float(rewards.sum(0).mean() / best.mean())
        assert 0.985 < reached < 1.0
        hindsight = knapsack(shop, tasks, 10)
        assert 0.0 < float(hindsight.mean() / best.mean()) - 1 < 0.02
        assert reached < float(hindsight.mean() / best.mean())


def knapsack(shop, tasks, episodes):
    """(M,) mean gain of the best lots of the day, bought in order of worth per money until the budget is spent."""
    worth, cost = [], []
    for tick in range(shop.horizon):
        log_quality, log_price = shop.arrivals(tasks, draw(shop, tasks, episodes, tick))
        size = shop.requests * shop.profile[tick] / shop.segments / shop.lots
        worth.append((size * (tasks.value[:, None] * tasks.rate)[:, None, None] * log_quality.exp()).flatten(2))
        cost.append((size * log_price.exp()).flatten(2))
    worth, cost = torch.cat(worth, -1), torch.cat(cost, -1)
    order = (worth / cost).argsort(-1, descending=True)
    worth, cost = worth.gather(-1, order), cost.gather(-1, order)
    bought = ((tasks.budget[:, None, None] - (cost.cumsum(-1) - cost)) / cost).clamp(0, 1)
    if shop.profit:
        bought = bought * (worth > cost)
    return ((worth - shop.profit * cost) * bought).sum(-1).mean(1)


def test_budget_is_never_exceeded_and_money_is_conserved(family):
    """Greedy bids at both auctions: what is left plus what was spent is the budget, and nothing is won without it."""
    for shop in (family, replace(family, first_price=True)):
        tasks = tasks_of(shop, 100)
        rewards, states = play(shop, tasks, lambda state: torch.full_like(state.wins, 1.5), episodes=4)
        spend = states[-1].spend.sum(-1)
        assert (spend <= tasks.budget[:, None] * (1 + 1e-12)).all()
        assert torch.allclose(spend + states[-1].left, tasks.budget[:, None].expand_as(spend))
        assert (torch.stack([s.left for s in states]) >= 0).all() and (
            states[-1].left < 0.02 * spend
        ).double().mean() > 0.9
        wins = torch.stack([s.wins for s in states])
        assert (wins >= 0).all() and (wins <= 1).all()
        conversions = torch.stack([s.conversions for s in states])
        assert torch.allclose(rewards.sum(0), tasks.value[:, None] * conversions[-1].sum(-1) - spend)
        new = conversions.diff(dim=0)
        assert torch.equal(new, new.round()) and (new >= 0).all() and (new[wins[1:] == 0] == 0).all()


def test_the_first_lot_that_cannot_be_paid_ends_the_buying_of_the_tick():
    """Against a loop over the lots in their order of arrival."""
    shop = SegmentBidding(segments=3, lots=4)
    tasks = tasks_of(shop, 40)._replace(budget=torch.full((40,), 2.0))
    uniforms = draw(shop, tasks, 1, 0)
    state = shop.reset(tasks, 1, uniforms)
    action = torch.full((40, 1, 3), 4.0)
    after, _, _ = shop.step(tasks, state, action, uniforms)
    log_quality, log_price = shop.arrivals(tasks, uniforms)
    level = shop.base_level(state.tick, state.left, tasks.budget[:, None], tasks.value[:, None]) + 4.0
    size = shop.requests * shop.profile[0] / 12
    crossed = 0
    for i in range(40):
        left, spent = 2.0, [0.0] * 3
        for lot, k in ((lot, k) for lot in range(4) for k in range(3)):
            price = float(log_price[i, 0, lot, k])
            if float(level[i, 0] + log_quality[i, 0, lot, k]) > price:
                if size * math.exp(price) > left:
                    crossed += 1
                    break
                left -= size * math.exp(price)
                spent[k] += size * math.exp(price)
        assert after.spend[i, 0].tolist() == pytest.approx(spent, rel=1e-9)
    assert crossed > 5


def test_limits_no_budget_one_segment_one_lot():
    shop = SegmentBidding()
    broke = tasks_of(shop, 5)._replace(budget=torch.zeros(5))
    rewards, states = play(shop, broke, lambda state: torch.full_like(state.wins, 5.0))
    assert (rewards == 0).all() and (states[-1].left == 0).all()
    assert shop.observe(broke, states[-1]).isfinite().all()
    assert torch.allclose(shop.oracle_return(broke), torch.zeros(5), atol=1e-6)
    assert torch.allclose(shop.blind_return(broke), torch.zeros(5), atol=1e-6)
    small = SegmentBidding(segments=1, lots=1, profile=(1.0,))
    rewards, _ = play(small, tasks_of(small, 3), nothing, episodes=2)
    assert rewards.shape == (1, 3, 2) and small.observation_size == 8 and small.noise_size == 3


def test_late_reports_lose_no_conversion():
    """The same day with a delay of 3 ticks: the same money, the same conversions, 3 ticks later or at midnight."""
    prompt, late = SegmentBidding(), SegmentBidding(delay=3)
    tasks = tasks_of(prompt, 20)
    at_once, states = play(prompt, tasks, nothing, episodes=3)
    delayed, later = play(late, tasks, nothing, episodes=3)
    assert torch.allclose(at_once.sum(0), delayed.sum(0))
    reported, counted = (torch.stack([s.conversions for s in x]) for x in (later, states))
    assert torch.equal(reported[3:-1], counted[:-4]) and (reported[:3] == 0).all()
    assert torch.equal(reported[-1], counted[-1]) and later[-1].waiting.shape == (20, 3, 3, 8)


# ------------------------------------------------------------------------------------------------ blind policy
def test_blind_is_below_the_oracle_and_doing_nothing_is_blind(family):
    tasks = tasks_of(family, 400)
    blind, best = family.blind_return(tasks), family.oracle_return(tasks)
    assert (blind <= best * (1 + 1e-12)).all() and 0.4 < float(blind.mean() / best.mean()) < 0.7
    rewards, _ = play(family, tasks, nothing, episodes=10)
    assert float(rewards.sum(0).mean()) == pytest.approx(float(blind.mean()), rel=0.02)


@pytest.mark.parametrize("shop", [SegmentBidding(), SegmentBidding(first_price=True, profit=False)])
def test_blind_policy_is_the_best_of_its_neighbours_on_campaigns_it_never_saw(shop):
    """Levels and budget exponents on either side earn less; more pacing than 1 earns less when days are simulated."""
    tasks = tasks_of(shop, 4000, seed=9)
    level, exponent, pacing = blind_policy(shop)
    moved = [(0, 0), (0.3, 0), (-0.3, 0), (0, 0.3), (0, -0.3)]
    base = torch.tensor([(level + a, exponent + b, pacing) for a, b in moved]).T
    value = shop.fluid_return(tasks, base).mean(0)
    assert (value[1:] < value[0]).all()
    paced = [replace(shop, base=(level, exponent, g)) for g in (0.0, pacing, 3.0)]
    none, found, much = (float(play(f, take(tasks, slice(0, 400)), nothing, 5)[0].sum(0).mean()) for f in paced)
    assert none < found and much < found


# ---------------------------------------------------------------------------------------- chance and the protocol
def test_outcome_of_a_task_does_not_depend_on_its_batch(family):
    tasks = tasks_of(family, 300)
    again = family.tasks(tasks.id.flip(0))
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(tasks, again))
    large, _ = play(family, tasks, nothing, episodes=2)
    small, _ = play(family, take(tasks, slice(100, 108)), nothing, episodes=2)
    assert torch.allclose(large[:, 100:108], small, rtol=1e-12)


def test_observation_holds_no_hidden_parameter_and_is_decoded(family):
    tasks = tasks_of(family, 2)
    alike = tasks._replace(budget=torch.full((2,), 40.0), value=torch.ones(2))
    start = family.observe(alike, family.reset(alike, 3, None))
    assert torch.equal(start[0], start[1]) and start.shape == (2, 3, family.observation_size)
    assert torch.allclose(start[0, 0], torch.tensor([0.0, 1.0] + [0.0] * 34))
    _, states = play(family, tasks, nothing, episodes=4)
    for state in states:
        seen = family.seen(family.observe(tasks, state))
        for name in ("tick", "left", "wins", "quality", "spend", "conversions"):
            assert torch.allclose(getattr(seen, name), getattr(state, name), rtol=1e-9), name
        assert torch.allclose(seen.budget[:, 0], tasks.budget) and torch.allclose(seen.value[:, 0], tasks.value)


def test_prior_has_the_stated_moments_and_the_vague_one_contains_both():
    family = SegmentBidding()
    for prior in (family.prior, family.prior.shifted(), family.prior.wide()):
        tasks = replace(family, prior=prior).prior_sample(1 << 13)
        deviation = tasks.rate.log() - math.log(prior.rate)
        assert float(tasks.rate.mean()) == pytest.approx(prior.rate, rel=0.05 if prior.rate_sd == 1 else 0.6)
        assert float(deviation.mean()) == pytest.approx(-(prior.rate_sd**2) / 2, abs=0.01)
        assert float(deviation.std()) == pytest.approx(prior.rate_sd, rel=0.01)
        rest = tasks.price - math.log(prior.rate) - prior.price - prior.price_slope * deviation
        assert abs(float(rest.mean())) < 0.01 and float(rest.std()) == pytest.approx(prior.price_sd, rel=0.01)
        assert abs(float(np.corrcoef(rest.flatten(), deviation.flatten())[0, 1])) < 0.01
    vague, own, moved = (f.prior_sample(1 << 12) for f in (family.wide(), family, family.shifted()))
    for name in ("rate", "price"):
        of = lambda tasks, name=name: getattr(tasks, name).flatten().log() if name == "rate" else tasks.price.flatten()
        ends = of(vague).quantile(0.02), of(vague).quantile(0.98)
        for tasks in (own, moved):
            assert ends[0] < of(tasks).quantile(0.02) and of(tasks).quantile(0.98) < ends[1]


def test_drift_moves_what_is_hidden_and_keeps_what_is_seen(family):
    ids = tasks_of(family, 200).id
    first, later = family.drifted(ids, 0, 0.1), family.drifted(ids, 4, 0.1)
    assert torch.equal(first.rate, family.tasks(ids).rate) and torch.equal(first.budget, later.budget)
    assert 0.2 < float((later.rate / first.rate).log().std()) < 2.0


def test_step_compiles_without_a_graph_break():
    shop = SegmentBidding(delay=2)
    tasks = tasks_of(shop, 8)
    uniforms = draw(shop, tasks, 2, 0)
    state = shop.reset(tasks, 2, uniforms)
    action = torch.full((8, 2, 8), 0.3)
    compiled = torch.compile(shop.step, fullgraph=True)(tasks, state, action, uniforms)
    for a, b in zip(compiled[0], shop.step(tasks, state, action, uniforms)[0]):
        assert torch.allclose(a, b)


def test_runs_in_single_precision():
    returns = {}
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        shop = SegmentBidding()
        tasks = tasks_of(shop, 200)
        rewards, _ = play(shop, tasks, nothing, episodes=2)
        values = rewards.sum(0).mean(), shop.blind_return(tasks).mean(), shop.oracle_return(tasks).mean()
        assert all(x.dtype == dtype for x in values)
        returns[dtype] = [float(x) for x in values]
    assert returns[torch.float32] == pytest.approx(returns[torch.float64], rel=2e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SegmentBidding(segments=0), "SegmentBidding.segments = 0"),
        (lambda: SegmentBidding(profile=(1.0, 2.0)), "SegmentBidding.profile = .*mean 1"),
        (lambda: SegmentBidding(lots=0), "SegmentBidding.lots = 0"),
        (lambda: SegmentBidding(prior=3), "SegmentBidding.prior = 3.*SegmentPrior"),
        (lambda: SegmentBidding(delay=24), "SegmentBidding.delay = 24.*0..23"),
        (lambda: SegmentBidding(base=(1.0, 2.0)), "SegmentBidding.base"),
        (lambda: SegmentBidding(profit=1), "SegmentBidding.profit = 1"),
        (lambda: SegmentBidding(limit=0), "SegmentBidding.limit = 0"),
        (lambda: SegmentPrior(rate=0), "SegmentPrior.rate = 0"),
        (lambda: SegmentPrior(spread=(0.8, 0.4)), "SegmentPrior.spread = .*low <= high"),
        (lambda: SegmentPrior(budget=(0.0, 1.0)), "SegmentPrior.budget"),
        (lambda: SegmentPrior(price_slope=math.inf), "SegmentPrior.price_slope"),
    ],
)
def test_bad_settings_name_field_value_and_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()
