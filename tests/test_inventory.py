"""CensoredInventory: oracles against the critical fractile, brute force and simulation; what is seen; conservation."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import nbinom, norm, poisson

from ecomlib import noise
from ecomlib.families import sample_tasks, split, take
from ecomlib.families.inventory import CensoredInventory, DemandRanges, LogNormalDemand
from ecomlib.families.inventory_planning import blind_table
from ecomlib.families.inventory_priors import TAIL, demand_probabilities

SLOW = DemandRanges(mean=(2.0, 6.0), dispersion=(1.1, 2.0))
WEEK = (0.7, 0.8, 0.8, 0.9, 1.1, 1.5, 1.2)
VARIANTS = {
    "plain": CensoredInventory(),
    "season": CensoredInventory(weekday=WEEK),
    "regimes": CensoredInventory(regimes=(0.6, 1.4)),
    "both": CensoredInventory(days=9, weekday=WEEK, regimes=(0.5, 1.5), switch=0.2, penalty=0.3),
    "lead 1": CensoredInventory(lead_time=1, levels=tuple(range(0, 25, 2)), prior=SLOW),
    "lead 2": CensoredInventory(days=8, lead_time=2, levels=(0, 5, 8, 12, 16, 20, 24), prior=SLOW, weekday=WEEK),
}


@pytest.fixture
def family():
    return CensoredInventory()


def tasks_of(family, count, seed=0):
    return sample_tasks(family, count, torch.Generator().manual_seed(seed))


def play(family, tasks, choose, episodes=1, seed=0):
    """Order by ``choose(day, state)``; rewards (T, M, N), states (T + 1) and whether the episode is over."""
    replica, rewards = torch.arange(episodes), []

    def draw(time):
        return noise.uniform(seed, tasks.id, replica, 0, time, noise.FAMILY, family.noise_size)

    states = [family.reset(tasks, episodes, draw(family.horizon))]
    for day in range(family.days):
        state, reward, done = family.step(tasks, states[-1], choose(day, states[-1]), draw(day))
        rewards.append(reward)
        states.append(state)
    return torch.stack(rewards), states, done


def at_random(family, tasks, episodes, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return lambda day, state: torch.randint(family.actions, (len(tasks.id), episodes), generator=generator)


def fractile(tasks, family):
    """(M,) critical fractile by scipy, equation (eq-fractile)."""
    under, over = (tasks.price - 1 + family.penalty).numpy(), tasks.holding.numpy()
    r, q = (tasks.mean / (tasks.dispersion - 1)).numpy(), (1 / tasks.dispersion).numpy()
    return torch.tensor(nbinom.ppf(under / (under + over), r, q))


def day_profit(tasks, level, penalty=0.0):
    """(M,) expected profit of a day that begins with ``level`` (M,) units, by scipy's sums."""
    units = np.arange(2000)
    law = nbinom(*(x.numpy()[:, None] for x in (tasks.mean / (tasks.dispersion - 1), 1 / tasks.dispersion)))
    sold = (law.pmf(units) * np.minimum(units, level.numpy()[:, None])).sum(1)
    lost = tasks.mean.numpy() - sold
    return torch.tensor(
        (tasks.price.numpy() - 1) * sold - tasks.holding.numpy() * (level.numpy() - sold) - penalty * lost
    )


# ------------------------------------------------------------------------------------------------ demand
def test_demand_is_negative_binomial(family):
    """Demand by one uniform equals scipy's quantile, product by product; the table ends where TAIL is left."""
    tasks = tasks_of(family, 300)
    uniform = noise.uniform(1, tasks.id, torch.arange(50), 0, 0, noise.FAMILY, 1)[..., 0]
    state = family.reset(tasks, 50, uniform[..., None])
    law = nbinom((tasks.mean / (tasks.dispersion - 1)).numpy()[:, None], (1 / tasks.dispersion).numpy()[:, None])
    assert np.array_equal(family._demand(tasks, state, uniform).numpy(), law.ppf(uniform.numpy()))
    assert law.sf(family.demand_size - 2).max() <= TAIL
    table = family.demand_table(tasks.mean, tasks.dispersion)[:, 0]
    assert np.allclose(table[:, :-1].numpy(), law.pmf(np.arange(family.demand_size - 1)), rtol=1e-9, atol=1e-15)
    assert torch.allclose(table.sum(-1), torch.ones(300), rtol=1e-14)


def test_demand_of_each_weekday_and_regime():
    """With season and regimes a day draws from its own row of the table."""
    family = VARIANTS["both"]
    tasks = tasks_of(family, 40)
    uniform = noise.uniform(1, tasks.id, torch.arange(9), 0, 0, noise.FAMILY, 1)[..., 0]
    state = family.reset(tasks, 9, torch.rand(40, 9, 2, generator=torch.Generator().manual_seed(0)))
    assert 0.3 < state.regime.mean() < 0.7
    for day in range(8):
        found = family._demand(tasks, state._replace(day=torch.full_like(state.day, day)), uniform)
        multiplier = WEEK[day % 7] * (0.5 + state.regime)
        shape = multiplier * (tasks.mean / (tasks.dispersion - 1))[:, None]
        assert np.array_equal(found.numpy(), nbinom.ppf(uniform, shape, (1 / tasks.dispersion)[:, None]))


def test_a_dispersion_near_one_is_poisson():
    law = demand_probabilities(torch.tensor([6.0]), torch.tensor([1 + 1e-9]), 60)[0]
    assert np.allclose(law.numpy(), poisson.pmf(np.arange(60), 6.0), atol=1e-8)


def test_single_precision_sees_the_same_days():
    torch.set_default_dtype(torch.float32)
    for family in (VARIANTS["plain"], VARIANTS["both"]):
        tasks = tasks_of(family, 200)
        single, states, _ = play(family, tasks, lambda day, s: torch.full(s.day.shape, 20))
        assert single.dtype == tasks.mean.dtype == family.observe(tasks, states[-1]).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        double, _, _ = play(family, tasks_of(family, 200), lambda day, s: torch.full(s.day.shape, 20))
        assert torch.allclose(single.double().sum(), double.sum(), rtol=1e-3)
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------ oracle
@pytest.mark.parametrize("penalty", [0.0, 0.4])
def test_dynamic_programme_equals_the_critical_fractile(penalty):
    """With every level on offer the best plan orders up to F^-1((p - 1 + pi) / (p - 1 + pi + h)) on all days."""
    family = CensoredInventory(levels=tuple(range(0, 180)), penalty=penalty)
    tasks = tasks_of(family, 200)
    best = fractile(tasks, family)
    assert best.max() < 179
    assert torch.allclose(family.oracle_return(tasks), 14 * day_profit(tasks, best, penalty), rtol=1e-10)
    policy = best.long().expand(14, -1)
    assert torch.allclose(family.oracle_return(tasks), family._planned(tasks, policy), rtol=1e-12)


def test_oracle_on_the_levels_on_offer(family):
    """At least the best constant level and hardly more; the levels cost little against all whole numbers."""
    tasks = tasks_of(family, 300)
    constant = torch.stack([day_profit(tasks, torch.full((300,), x)) for x in family.levels]).amax(0) * 14
    exact = family.oracle_return(tasks)
    assert (exact >= constant * (1 - 1e-12)).all() and (exact / constant).max() < 1.005
    every = CensoredInventory(levels=tuple(range(0, 177))).oracle_return(tasks)
    assert (exact <= every * (1 + 1e-12)).all() and exact.mean() > 0.99 * every.mean()


def test_newsvendor_of_a_poisson_day():
    """Mean 20 and critical fractile 0.9 give 26 units: ``newsvendor_poisson`` of stockpyl gives the same."""
    family = CensoredInventory(levels=tuple(range(0, 60)))
    one = torch.ones(1)
    task = family.product(torch.tensor([1]), 20 * one, (1 + 1e-9) * one, 1.9 * one, 0.1 * one)
    value = torch.stack([family._planned(task, torch.full((14, 1), y)) for y in range(60)])
    assert value.argmax() == 26 == poisson.ppf(0.9, 20)
    assert torch.allclose(family.oracle_return(task), value.amax(0))


@pytest.mark.parametrize(("fixed", "order_up_to", "cost"), [(4, 9, 7.2704), (5, 10, 8.034111561471642)])
def test_demand_law_reproduces_published_reorder_points(fixed, order_up_to, cost):
    """(s, S) = (4, 9) and (4, 10) at h = 1, b = 4, Poisson(6): the second is example 4.7 of Snyder and Shen as solved
    by ``s_s_discrete_exact`` in stockpyl's documentation. Long-run cost by the renewal formula of Zheng and Federgruen
    (1991) over all pairs, with the library's demand law."""
    law = demand_probabilities(torch.tensor(6.0), torch.tensor(1 + 1e-9), 60).numpy()
    units = np.arange(60)
    one_day = lambda y: (law * (np.maximum(y - units, 0) + 4 * np.maximum(units - y, 0))).sum()
    visits = np.zeros(30)  # of each depth below S until s is passed, for a gap of 30 at most
    visits[0] = 1 / (1 - law[0])
    for depth in range(1, 30):
        visits[depth] = sum(law[k] * visits[depth - k] for k in range(1, depth + 1)) / (1 - law[0])
    best = min(
        ((fixed + sum(visits[j] * one_day(top - j) for j in range(top - low))) / visits[: top - low].sum(), low, top)
        for low in range(0, 9)
        for top in range(low + 1, 16)
    )
    assert best[1:] == (4, order_up_to) and best[0] == pytest.approx(cost, abs=5e-5)


def brute_force(family, task):
    """Best expected profit from the morning of ``day``, by recursion over all that can happen, with scipy."""
    mean, phi, price, holding = (float(x) for x in (task.mean, task.dispersion, task.price, task.holding))
    units = np.arange(family.levels[-1] + 1)
    regimes, memory = family.regimes or (1.0,), {}

    def value(day, regime, stock, pipeline):
        key = day, regime, stock, pipeline
        if day == family.days:
            return 0.0
        if key in memory:
            return memory[key]
        mu = mean * family.weekday[day % len(family.weekday)] * regimes[regime]
        law = nbinom(mu / (phi - 1), 1 / phi)
        totals = []
        for level in family.levels:
            order = max(0, level - stock - sum(pipeline))
            coming = (*pipeline, order)
            ready = stock + order if family.lead_time == 0 else stock
            chance = np.append(law.pmf(units[:ready]), law.sf(ready - 1))  # sales 0, ..., ready
            total = -family.penalty * (mu - (chance * units[: ready + 1]).sum())
            for sold in range(ready + 1):
                left = ready - sold
                tomorrow = (left, ()) if family.lead_time == 0 else (left + coming[0], coming[1:])
                switch = family.switch if family.regimes else 0.0
                after = (1 - switch) * value(day + 1, regime, *tomorrow)
                if switch:
                    after += switch * value(day + 1, 1 - regime, *tomorrow)
                total += chance[sold] * ((price - 1) * sold - holding * left + after)
            totals.append(total)
        memory[key] = max(totals)
        return memory[key]

    start = (0,) * max(0, family.lead_time - 1)
    return np.mean([value(0, g, 0, start) for g in range(len(regimes))])


@pytest.mark.parametrize(
    "family",
    [
        CensoredInventory(days=3, levels=(0, 3, 5, 8), prior=SLOW, weekday=(1.6, 0.4)),
        CensoredInventory(days=3, levels=(1, 4, 8), prior=SLOW, regimes=(0.3, 1.7), switch=0.3, penalty=0.5),
        CensoredInventory(days=4, levels=(0, 4, 7, 10), prior=SLOW, lead_time=1),
        CensoredInventory(days=3, levels=(0, 6, 9), prior=SLOW, lead_time=1, weekday=(0.5, 1.5), regimes=(0.5, 1.5)),
        CensoredInventory(days=4, levels=(0, 4, 8), prior=SLOW, lead_time=2),
    ],
    ids=["season", "regimes", "lead 1", "lead 1, season, regimes", "lead 2"],
)
def test_oracle_equals_brute_force(family):
    tasks = tasks_of(family, 4)
    exact = family.oracle_return(tasks)
    for i in range(4):
        assert exact[i].item() == pytest.approx(brute_force(family, take(tasks, slice(i, i + 1))), rel=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_blind_return_is_what_the_blind_policy_earns(name):
    """Mean of 4,000 simulated episodes at ``blind_level``, within 5 standard errors: the planner and ``step`` agree,
    season, regimes, lead times and penalty included."""
    family = VARIANTS[name]
    tasks = tasks_of(family, 6, seed=3)
    price, holding = (x[:, None].expand(-1, 4000) for x in (tasks.price, tasks.holding))
    rewards, _, done = play(family, tasks, lambda day, s: family.blind_level(price, holding, s.day), 4000)
    total = rewards.sum(0)
    error = total.std(1) / 4000**0.5
    assert done.all() and ((total.mean(1) - family.blind_return(tasks)).abs() < 5 * error).all()


def test_oracle_return_is_what_the_best_level_earns(family):
    """Mean of 10,000 simulated episodes at the level of the critical fractile, within 5 standard errors."""
    every = CensoredInventory(levels=tuple(range(0, 180)))
    tasks = tasks_of(every, 5, seed=4)
    action = fractile(tasks, every).long()[:, None].expand(-1, 10_000)
    total = play(every, tasks, lambda day, state: action, 10_000)[0].sum(0)
    error = total.std(1) / 100
    assert ((total.mean(1) - every.oracle_return(tasks)).abs() < 5 * error).all()


# ------------------------------------------------------------------------------------------------ blind policy
@pytest.mark.parametrize("name", VARIANTS)
def test_blind_is_below_the_oracle_for_every_task(name):
    family = VARIANTS[name]
    tasks = tasks_of(family, 60 if family.lead_time == 2 else 300)
    oracle, blind = family.oracle_return(tasks), family.blind_return(tasks)
    assert (blind <= oracle + 1e-9).all() and blind.mean() < 0.97 * oracle.mean()


def test_blind_level_is_the_newsvendor_of_the_prior_predictive(family):
    """Against the quantile of demand of 20,000 fresh products, one day each: no level of the offer is nearer."""
    tasks = tasks_of(family, 20_000, seed=8)
    table = family.demand_table(tasks.mean, tasks.dispersion)[:, 0].mean(0)
    sales = torch.tensor([(table * torch.arange(len(table)).clamp(max=y)).sum() for y in family.levels])
    level = torch.tensor(family.levels)
    for price, holding in product((1.3, 1.7, 2.4), (0.06, 0.2, 0.45)):
        mean_profit = (price - 1) * sales - holding * (level - sales)
        found = family.blind_level(torch.tensor(price), torch.tensor(holding), torch.tensor(0))
        assert mean_profit[found] >= mean_profit.max() * (1 - 1e-3)


def test_blind_level_with_season_is_close_to_the_best_plan_that_never_looks():
    """Moving any one weekday's level by one step, for products of one price and holding cost, gains less than 1 % of
    the mean return: the myopic levels are nearly the best ones, also where demand falls overnight."""
    family = VARIANTS["season"]
    tasks = family.prior_sample(512)._replace(price=torch.full((512,), 1.6), holding=torch.full((512,), 0.3))
    day = torch.arange(14)[:, None].expand(-1, 512)
    level = family.blind_level(tasks.price.expand_as(day), tasks.holding.expand_as(day), day)
    assert len(level.unique()) > 3
    base = family._planned(tasks, level).mean()
    for weekday, step in product(range(7), (-1, 1)):
        moved = level + step * (day % 7 == weekday)
        assert family._planned(tasks, moved).mean() < base * 1.01


def test_blind_level_with_a_lead_time_is_the_best_constant_level():
    family = VARIANTS["lead 1"]
    tasks = tasks_of(family, 300)._replace(price=torch.full((300,), 1.6), holding=torch.full((300,), 0.1))
    returns = torch.stack([family._planned(tasks, torch.full((14, 300), k)).mean() for k in range(family.actions)])
    found = family.blind_level(torch.tensor(1.6), torch.tensor(0.1), torch.tensor(3))
    assert returns[found] > 0.98 * returns.max()


# ------------------------------------------------------------------------------------------------ what is seen
@pytest.mark.parametrize("family", [VARIANTS["plain"], VARIANTS["lead 1"]], ids=["no lead time", "lead 1"])
def test_lost_demand_leaves_no_trace(family):
    """Two products whose demand differs only above the stock: every observation and reward is the same."""
    tasks = tasks_of(family, 2)._replace(price=torch.full((2,), 1.5), holding=torch.full((2,), 0.2))
    size = family.demand_size
    modest, huge = torch.zeros(size), torch.zeros(size)
    modest[9:], huge[size - 1 :] = 1, 1  # always 9 units; always as many as the table holds
    tasks = tasks._replace(staircase=torch.stack((modest, huge)))
    level = max(k for k, y in enumerate(family.levels) if y <= 9)
    rewards, states, _ = play(family, tasks, lambda day, state: torch.full(state.day.shape, level), 3)
    assert torch.equal(rewards[:, 0], rewards[:, 1]) and rewards.sum() > 0
    for state in states:
        first, second = family.observe(tasks, state)
        assert torch.equal(first, second)


def test_a_penalty_shows_the_episodes_total_and_nothing_of_its_days():
    free, strict = CensoredInventory(), CensoredInventory(penalty=0.5)
    tasks = tasks_of(free, 50)
    choose = lambda day, state: torch.full(state.day.shape, 9)
    plain, fined = play(free, tasks, choose, 2)[0], play(strict, tasks, choose, 2)[0]
    assert torch.equal(plain[:-1], fined[:-1]) and (plain[-1] > fined[-1]).any()


@pytest.mark.parametrize("name", VARIANTS)
def test_seen_inverts_observe(name):
    family = VARIANTS[name]
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        tasks = tasks_of(family, 20)
        _, states, _ = play(family, tasks, at_random(family, tasks, 4), 4)
        for state in states[:-1]:
            observation = family.observe(tasks, state)
            assert observation.shape == (20, 4, family.observation_size)
            seen = family.seen(observation)
            for field in ("day", "stock", "available", "sold", "pipeline"):
                assert torch.equal(getattr(seen, field), getattr(state, field)), field
            assert torch.equal(seen.price, tasks.price[:, None].expand(20, 4))
            assert torch.allclose(
                seen.weekday[0, 0], torch.tensor(family.weekday)[int(state.day[0, 0]) % len(family.weekday)]
            )
            assert torch.equal(observation[..., 8] > 0, (state.sold == state.available) & (state.day > 0))


def test_observation_by_hand(family):
    """Day 3 of 14, 3 of 10 units left: the scales are part of what a trained policy expects."""
    tasks = tasks_of(family, 1)._replace(price=torch.tensor([1.5]), holding=torch.tensor([0.2]))
    state = family.reset(tasks, 1, torch.zeros(1, 1, 1))
    state = state._replace(day=state.day + 3, stock=state.stock + 3, available=state.stock + 10, sold=state.stock + 7)
    expected = [3 / 14, 1.5, 0.2, norm.ppf(0.5 / 0.7), 1.0, *np.log1p([3, 10, 7]), 0.0]
    assert torch.allclose(family.observe(tasks, state)[0, 0], torch.tensor(expected))


# ------------------------------------------------------------------------------------------------ dynamics
def or_gym(demands, levels, lead_time, price, holding, penalty):
    """One stage of the multi-period inventory problem of Hubbs et al. (2020), "OR-Gym", without backlog, written from
    the paper's equations: I' = I + R(t - L) - S, S = min(D, I + R(t - L)), U = D - S,
    profit = p S - r R - k U - h I', r = 1. Returns profits and the final stock and pipeline."""
    inventory, orders, profits = 0, [], []
    for day, (demand, level) in enumerate(zip(demands, levels)):
        outstanding = sum(orders[max(0, day - lead_time) : day])
        orders.append(max(0, level - inventory - outstanding))
        arriving = orders[day - lead_time] if day >= lead_time else 0
        sales = min(demand, inventory + arriving)
        unmet = demand - sales
        inventory = inventory + arriving - sales
        profits.append(price * sales - orders[day] - penalty * unmet - holding * inventory)
    return profits, inventory, sum(orders[len(demands) - lead_time :]) if lead_time else 0


@pytest.mark.parametrize("lead_time", [0, 1, 2])
def test_dynamics_equal_or_gyms(lead_time):
    """On the same demands and levels, cash flow with what is left at cost equals the booked profit, to 1e-10; what is
    left is equal; and so is every day's profit once the day's order and stock are booked at cost."""
    family = CensoredInventory(lead_time=lead_time, penalty=0.7)
    tasks = tasks_of(family, 8)
    generator = torch.Generator().manual_seed(1)
    actions = torch.randint(family.actions, (14, 8, 3), generator=generator)
    rewards, states, _ = play(family, tasks, lambda day, state: actions[day], 3)
    uniforms = torch.stack(
        [noise.uniform(0, tasks.id, torch.arange(3), 0, t, noise.FAMILY, 1)[..., 0] for t in range(14)]
    )
    for i, j in product(range(8), range(3)):
        mean, phi = tasks.mean[i].item(), tasks.dispersion[i].item()
        demands = nbinom.ppf(uniforms[:, i, j].numpy(), mean / (phi - 1), 1 / phi)
        levels = [family.levels[k] for k in actions[:, i, j]]
        price, holding = tasks.price[i].item(), tasks.holding[i].item()
        profits, stock, coming = or_gym(demands, levels, lead_time, price, holding, 0.7)
        end = states[-1]
        on_shelf = end.stock[i, j] + end.pipeline[i, j].sum()
        assert on_shelf == stock + coming
        assert sum(profits) + stock + coming == pytest.approx(rewards[:, i, j].sum().item(), abs=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_stock_is_conserved(name):
    """Ordered = sold + on the shelf + on its way; nothing is negative; the task stays what it was."""
    family = VARIANTS[name]
    tasks = tasks_of(family, 100)
    before = [field.clone() for field in tasks]
    choose, ordered = at_random(family, tasks, 3), 0

    def watch(day, state):
        nonlocal ordered
        action = choose(day, state)
        position = state.stock + state.pipeline.sum(-1)
        ordered = ordered + (torch.tensor(family.levels)[action] - position).clamp(min=0)
        return action

    rewards, states, done = play(family, tasks, watch, 3)
    sold = sum(state.sold for state in states)
    assert torch.equal(ordered, sold + states[-1].stock + states[-1].pipeline.sum(-1))
    assert done.all() and all((field >= 0).all() for state in states for field in state)
    assert all(torch.equal(a, b) for a, b in zip(before, tasks)) and (sold > 0).any()


def test_without_demand_only_holding_is_paid():
    family = CensoredInventory(levels=(0, 4, 9))
    one = torch.ones(2)
    tasks = family.product(torch.arange(2), 0 * one, 2 * one, 1.5 * one, 0.25 * one)
    rewards, states, _ = play(family, tasks, lambda day, state: torch.ones(2, 1, dtype=torch.int64))
    assert (rewards == -1.0).all() and all((state.sold == 0).all() for state in states)
    assert (family.oracle_return(tasks).abs() < 1e-12).all()
    rewards, _, _ = play(family, tasks, lambda day, state: torch.zeros(2, 1, dtype=torch.int64))
    assert (rewards == 0).all()


def test_free_holding_orders_all_and_a_thin_margin_little(family):
    """Limits of the critical fractile: towards 1 and towards 0."""
    family = CensoredInventory(levels=tuple(range(0, 177)))
    one = torch.ones(1)
    make = lambda price, holding: family.product(torch.tensor([1]), 20 * one, 2 * one, price * one, holding * one)
    assert torch.allclose(family.oracle_return(make(2.0, 1e-12)), torch.tensor([14 * 20.0]), rtol=1e-9)
    assert family.oracle_return(make(1.0 + 1e-6, 1.0)).item() < 1e-4


# ------------------------------------------------------------------------------------------------ the protocol
@pytest.mark.parametrize("name", ["plain", "both", "lead 2"])
def test_outcome_of_a_task_does_not_depend_on_its_batch(name):
    family = VARIANTS[name]
    tasks = tasks_of(family, 512)
    choose = lambda day, state: torch.full(state.day.shape, 5)
    large = play(family, tasks, choose)[0]
    small = play(family, take(tasks, slice(100, 108)), choose)[0]
    assert torch.equal(large[:, 100:108], small)
    alone = play(family, family.tasks(tasks.id[100:101]), choose, 3)[0]
    assert torch.equal(alone[..., :1], small[:, :1])
    part = take(tasks, slice(40, 50))
    assert torch.allclose(
        family.oracle_return(take(tasks, slice(0, 60)))[40:50], family.oracle_return(part), rtol=1e-12
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_step_compiles_without_a_graph_break(name):
    family = VARIANTS[name]
    tasks = tasks_of(family, 16)
    luck = noise.uniform(0, tasks.id, torch.arange(4), 0, 0, noise.FAMILY, family.noise_size)
    state, action = family.reset(tasks, 4, luck), torch.full((16, 4), 3)
    compiled = torch.compile(family.step, fullgraph=True, backend="eager")(tasks, state, action, luck)
    for a, b in zip(compiled[0], family.step(tasks, state, action, luck)[0]):
        assert torch.equal(a, b)


def test_splits_and_drift(family):
    moved, shifted = split(family, "shifted", 1000)
    _, usual = split(family, "test", 1000)
    assert torch.allclose(shifted.mean.log().mean() - usual.mean.log().mean(), torch.tensor(np.log(1.5)), atol=0.1)
    assert moved.blind_level != family.blind_level and shifted.dispersion.max() > usual.dispersion.max()
    later = family.drifted(usual.id, 4, 0.1)
    assert torch.equal(later.price, usual.price) and torch.equal(later.holding, usual.holding)
    assert (later.mean != usual.mean).all() and later.mean.min() >= 4 and later.mean.max() <= 60
    assert torch.equal(family.drifted(usual.id, 0, 0.1).staircase, usual.staircase)


@pytest.mark.parametrize("prior", [DemandRanges(), LogNormalDemand((2.5, 0.0), ((0.5, 0.0), (0.2, 0.4)))])
def test_the_wide_prior_contains_the_others(prior):
    """About twice the spread in the log mean and in the dispersion, and the shifted prior within it."""
    family = CensoredInventory(prior=prior)
    hidden = lambda f: torch.stack((f.prior_sample(4096).mean.log(), f.prior_sample(4096).dispersion))
    usual, moved, wide = hidden(family), hidden(family.shifted()), hidden(family.wide())
    low, high = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    for prior_draws in (usual, moved):  # all but the most extreme one in a hundred
        ends = prior_draws.quantile(torch.tensor([0.005, 0.995]), dim=1)
        assert (ends[0] > low[:, 0]).all() and (ends[1] < high[:, 0]).all()
    assert (wide.std(1) > 1.4 * usual.std(1)).all()
    assert family.wide().demand_size < 4 * family.demand_size  # tables of many particles must fit in memory


def test_lognormal_demand_has_the_stated_moments():
    prior = LogNormalDemand((2.5, 0.0), ((0.5, 0.0), (0.2, 0.4)))
    tasks = CensoredInventory(prior=prior).prior_sample(1 << 14)
    sample = torch.stack((tasks.mean.log(), (tasks.dispersion - 1).log()))
    root = torch.tensor(prior.factor)
    assert torch.allclose(sample.mean(1), torch.tensor(prior.mean), atol=2e-3)
    assert torch.allclose(torch.cov(sample), root @ root.T, atol=4e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CensoredInventory(days=0), "CensoredInventory.days = 0"),
        (lambda: CensoredInventory(levels=(3, 3)), "CensoredInventory.levels"),
        (lambda: CensoredInventory(levels=(0, 2.5)), "CensoredInventory.levels"),
        (lambda: CensoredInventory(lead_time=3), "lead_time = 3; allowed: 0, 1 or 2"),
        (lambda: CensoredInventory(weekday=(1.0, 2.0)), "multipliers with mean 1"),
        (lambda: CensoredInventory(regimes=(1.0,)), "regimes"),
        (lambda: CensoredInventory(switch=1.5), "switch = 1.5"),
        (lambda: CensoredInventory(penalty=-1), "penalty = -1"),
        (lambda: CensoredInventory(prior=3), "prior = 3"),
        (lambda: DemandRanges(dispersion=(0.5, 2.0)), "1 < low <= high"),
        (lambda: DemandRanges(gross_margin=(0.2, 1.0)), "gross_margin"),
        (lambda: LogNormalDemand((1.0, 0.0), ((0.5, 0.1), (0.0, 0.4))), "lower-triangular"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_are_hashable_and_kept_once():
    assert CensoredInventory(levels=[0, 5, 9]) == CensoredInventory(levels=(0, 5, 9))
    assert blind_table(CensoredInventory()) is blind_table(replace(CensoredInventory(), days=14))
