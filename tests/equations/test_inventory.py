"""Chapter "Inventory": both sides of every numbered equation."""

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from scipy.stats import nbinom, norm

from ecomlib import noise
from ecomlib.baselines.bayes import GreedyBayes
from ecomlib.baselines.inventory import AdaptiveStock, MovingAverage, first_day
from ecomlib.families import sample_tasks
from ecomlib.families.inventory import CensoredInventory, DemandRanges
from ecomlib.families.inventory_planning import Trade, day_profit, expected_sales


@pytest.fixture
def family():
    return CensoredInventory()


@pytest.fixture
def tasks(family):
    return sample_tasks(family, 100, torch.Generator().manual_seed(11))


def law_of(tasks):
    """scipy's negative binomial law of each product, (M, 1)."""
    return nbinom((tasks.mean / (tasks.dispersion - 1)).numpy()[:, None], (1 / tasks.dispersion).numpy()[:, None])


def test_demand_is_a_poisson_law_whose_mean_varies(family, tasks):
    """(eq-negative-binomial): the formula against the family's table; mean and variance; days of a Poisson law whose
    mean is gamma-distributed, by simulation."""
    k = np.arange(family.demand_size - 1)
    mu, phi = tasks.mean.numpy()[:, None], tasks.dispersion.numpy()[:, None]
    r = mu / (phi - 1)
    formula = np.exp(gammaln(k + r) - gammaln(r) - gammaln(k + 1) + k * np.log(1 - 1 / phi) - r * np.log(phi))
    table = family.demand_table(tasks.mean, tasks.dispersion)[:, 0].numpy()
    assert np.allclose(table[:, :-1], formula, rtol=1e-9, atol=1e-15)
    mean = (table * np.arange(family.demand_size)).sum(1, keepdims=True)
    variance = (table * (np.arange(family.demand_size) - mean) ** 2).sum(1, keepdims=True)
    assert np.allclose(mean, mu, rtol=1e-6) and np.allclose(variance, phi * mu, rtol=1e-5)
    rng, n = np.random.default_rng(0), 400_000
    days = rng.poisson(rng.gamma(r[0], phi[0] - 1, n))
    frequency = np.bincount(days, minlength=40)[:40] / n
    assert np.all(np.abs(frequency - table[0, :40]) < 5 * np.sqrt(table[0, :40] / n) + 1e-5)


def test_sales_are_cut_at_what_is_there(family, tasks):
    """(eq-censoring) and (eq-inventory-profit), day by day: order, sales, what is left, profit; and the episode's cash
    flow with what is left given back at cost."""
    replica, generator = torch.arange(4), torch.Generator().manual_seed(0)
    state = family.reset(tasks, 4, torch.zeros(100, 4, 1))
    stock, booked, cash = torch.zeros(100, 4), torch.zeros(100, 4), torch.zeros(100, 4)
    for day in range(14):
        action = torch.randint(32, (100, 4), generator=generator)
        uniform = noise.uniform(0, tasks.id, replica, 0, day, noise.FAMILY, 1)
        demand = torch.tensor(law_of(tasks).ppf(uniform[..., 0].numpy()))
        level = torch.tensor(family.levels, dtype=torch.float64)[action]
        ready = torch.maximum(stock, level)
        sales = torch.minimum(demand, ready)
        profit = (tasks.price[:, None] - 1) * sales - tasks.holding[:, None] * (ready - sales)
        state, reward, _ = family.step(tasks, state, action, uniform)
        assert torch.equal(state.available, ready) and torch.equal(state.sold, sales)
        assert torch.allclose(reward, profit, rtol=1e-12)
        cash += tasks.price[:, None] * sales - (ready - stock) - tasks.holding[:, None] * (ready - sales)
        booked, stock = booked + reward, ready - sales
    assert torch.allclose(booked, cash + stock, rtol=1e-10)


def test_expected_profit_of_a_day(family, tasks):
    """(eq-newsvendor): sums of P(D >= j) and the library's profit against expectations by scipy."""
    table = family.demand_table(tasks.mean, tasks.dispersion)
    trade = Trade(tasks.price - 1, tasks.holding, torch.zeros(100))
    profit = day_profit(table, trade, 120, tasks.mean[:, None])[:, 0].numpy()
    units, law = np.arange(1200), law_of(tasks)
    for y in (0, 1, 7, 40, 120):
        sales = (law.pmf(units) * np.minimum(units, y)).sum(1)
        at_least = law.sf(np.arange(y)).sum(1)  # P(D >= 1) + ... + P(D >= y)
        left = (law.pmf(units) * np.maximum(y - units, 0)).sum(1)
        assert np.allclose(sales, at_least, rtol=1e-9)
        assert np.allclose(expected_sales(table, 120)[:, 0, y].numpy(), sales, rtol=1e-6)
        expected = (tasks.price.numpy() - 1) * sales - tasks.holding.numpy() * left
        assert np.allclose(profit[:, y], expected, rtol=1e-6, atol=1e-9)


def test_the_best_order_is_the_critical_fractile(family, tasks):
    """(eq-fractile): the smallest y with F(y) >= (p - 1) / (p - 1 + h) maximises the day's profit; one more unit gains
    (p - 1) P(D > y) - h P(D <= y)."""
    table = family.demand_table(tasks.mean, tasks.dispersion)
    trade = Trade(tasks.price - 1, tasks.holding, torch.zeros(100))
    profit = day_profit(table, trade, 170, tasks.mean[:, None])[:, 0]
    fractile = ((tasks.price - 1) / (tasks.price - 1 + tasks.holding)).numpy()
    best = law_of(tasks).ppf(fractile[:, None])[:, 0]
    at_best = profit.gather(1, torch.tensor(best).long()[:, None])[:, 0]
    assert torch.allclose(at_best, profit.amax(1), rtol=1e-12)
    y = np.arange(170)
    gain = (tasks.price.numpy() - 1)[:, None] * law_of(tasks).sf(y) - tasks.holding.numpy()[:, None] * law_of(
        tasks
    ).cdf(y)
    assert np.allclose(profit.diff(dim=1).numpy(), gain, atol=1e-8)


def test_the_recursion_of_the_planner():
    """(eq-inventory-bellman): backward over days and stocks in plain Python, where demand changes from day to day so
    that the shelf of yesterday binds; with steady demand the best level is the same every day."""
    family = CensoredInventory(days=5, weekday=(1.7, 0.3), levels=tuple(range(0, 31)), prior=DemandRanges((3.0, 9.0)))
    tasks = sample_tasks(family, 3, torch.Generator().manual_seed(2))
    units = np.arange(31)
    for i in range(3):
        mu, phi, p, h = (x[i].item() for x in (tasks.mean, tasks.dispersion, tasks.price, tasks.holding))
        value, order = np.zeros(31), []
        for day in reversed(range(5)):
            law = nbinom(mu * family.weekday[day % 2] / (phi - 1), 1 / phi)
            ready = []
            for y in units:
                chance = np.append(law.pmf(np.arange(y)), law.sf(y - 1))
                left = y - np.arange(y + 1)
                ready.append((chance * ((p - 1) * (y - left) - h * left + value[left])).sum())
            value = np.array([max(ready[x:]) for x in units])
            order.append(int(np.argmax(ready)))
        assert family.oracle_return(tasks)[i].item() == pytest.approx(value[0], rel=1e-9)
        assert order[0] > order[1]  # the last day is a busy one, the day before it is not
    steady = CensoredInventory(levels=tuple(range(0, 180)))
    tasks = sample_tasks(steady, 50, torch.Generator().manual_seed(3))
    fractile = ((tasks.price - 1) / (tasks.price - 1 + tasks.holding)).numpy()
    best = torch.tensor(law_of(tasks).ppf(fractile[:, None])[:, 0]).long()
    assert torch.allclose(steady._planned(tasks, best.expand(14, -1)), steady.oracle_return(tasks), rtol=1e-10)


def test_the_blind_order_is_a_fractile_of_the_mixture():
    """(eq-blind-order): with every level on offer the blind level is the same fractile of demand averaged over the
    prior."""
    family = CensoredInventory(levels=tuple(range(0, 150)))
    prior = family.prior_sample(4096)
    predictive = family.demand_table(prior.mean, prior.dispersion)[:, 0].mean(0).cumsum(0)
    for price, holding in ((1.3, 0.4), (1.6, 0.2), (2.4, 0.1)):
        fractile = (price - 1) / (price - 1 + holding)
        expected = int((predictive < fractile).sum())
        found = family.blind_level(torch.tensor(price), torch.tensor(holding), torch.tensor(0))
        assert found == expected


def seen_after(family, task, sold, available, day):
    state = family.reset(task, 1, torch.zeros(1, 1, 1))
    numbers = {"day": day, "stock": available - sold, "available": available, "sold": sold}
    return family.observe(task, state._replace(**{k: torch.full((1, 1), float(v)) for k, v in numbers.items()}))


DAYS = [(9, 12), (12, 12), (7, 24), (24, 24), (13, 24)]
"""(sold, available) of five days: two of them sold out."""


def believed(family, task, particles):
    agent = GreedyBayes(family, particles)
    agent.begin(family.context(task), 1, 1)
    before = seen_after(family, task, 0, 0, 0)
    for day, (sold, available) in enumerate(DAYS, 1):
        after = seen_after(family, task, sold, available, day)
        agent.belief.update(before, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), after)
        before = after
    return agent, before


def test_posterior_counts_a_sold_out_day_as_at_least(family, tasks):
    """(eq-censored-likelihood): posterior means of mu and phi after five days, two of them sold out, against a fine
    grid of the prior with scipy's probabilities."""
    task = family.tasks(torch.tensor([5]))
    points = (np.arange(300) + 0.5) / 300
    grid = torch.tensor(np.stack(np.meshgrid(points, points, indexing="ij"), -1).reshape(-1, 2))
    mean, phi = (x.numpy() for x in family.prior.hidden(grid))
    law = nbinom(mean / (phi - 1), 1 / phi)
    log_likelihood = sum(law.logsf(y - 1) if s == y else law.logpmf(s) for s, y in DAYS)
    weight = np.exp(log_likelihood - log_likelihood.max())
    exact = [np.average(x, weights=weight) for x in (mean, phi)]
    spread = [np.sqrt(np.average((x - m) ** 2, weights=weight)) for x, m in zip((mean, phi), exact)]
    agent, _ = believed(family, task, 1 << 14)
    w, p = agent.belief.weight[0, 0], agent.belief.particles
    found = [(w * x).sum().item() for x in (p.mean, p.dispersion)]
    assert np.all(np.abs(np.array(found) - exact) < 0.01 * np.array(spread))
    naive = sum(law.logpmf(s) for s, _ in DAYS)  # sales taken for demand: clearly lower
    naive = np.average(mean, weights=np.exp(naive - naive.max()))
    assert naive < exact[0] - 0.5 * spread[0]


def test_greedy_orders_the_fractile_of_what_it_believes():
    """(eq-bayes-stock): with every level on offer, the critical fractile of the posterior predictive law."""
    family = CensoredInventory(levels=tuple(range(0, 150)))
    task = family.tasks(torch.tensor([5]))
    agent, observation = believed(family, task, 2048)
    p, w = agent.belief.particles, agent.belief.weight[0, 0]
    predictive = (w[:, None] * family.demand_table(p.mean, p.dispersion)[:, 0]).sum(0).cumsum(0)
    fractile = (task.price - 1) / (task.price - 1 + task.holding)
    assert agent.act(observation, torch.zeros(1, 1, 1))[0, 0] == int((predictive < fractile).sum())


def test_first_day_pays_and_teaches():
    """(eq-look-ahead): today's expected profit, and that of a later day after what today has shown, written out over
    particles and outcomes with scipy; a higher order never teaches less."""
    family = CensoredInventory(levels=(0, 3, 6, 12, 24), prior=DemandRanges(mean=(2.0, 20.0)))
    price, holding = torch.tensor([1.3, 2.2]), torch.tensor([0.4, 0.1])
    today, later = first_day(family, price, holding, 64)
    p = family.prior_sample(64)
    law = nbinom((p.mean / (p.dispersion - 1)).numpy()[:, None], (1 / p.dispersion).numpy()[:, None])
    units = np.arange(400)
    sales = np.stack([(law.pmf(units) * np.minimum(units, y)).sum(1) for y in family.levels], 1)  # (P, A)
    for i in range(2):
        profit = lambda mean, i=i: (
            (price[i].item() - 1 + holding[i].item()) * mean - holding[i].item() * np.array(family.levels)
        )
        assert np.allclose(today[i].numpy(), profit(sales.mean(0)))
        for k, y in enumerate(family.levels):
            total = 0.0
            for s in range(y + 1):
                chance = law.sf(y - 1)[:, 0] if s == y else law.pmf(s)[:, 0]
                total += chance.mean() * profit((chance[:, None] * sales).sum(0) / chance.sum()).max()
            assert later[i, k].item() == pytest.approx(total, rel=1e-9)
    assert (later.diff(dim=1) > -1e-12).all() and (later[:, -1] > later[:, 0]).all()


def test_moving_average_and_its_fixed_point(family):
    """(eq-moving-average) as ``MovingAverage`` computes it; once every day of the window sold out at one level, the
    next order is that level again, however large demand is."""
    task = family.tasks(torch.tensor([5]))
    agent = MovingAverage(family, window=5)
    agent.begin(family.context(task), 1, 1)
    first = seen_after(family, task, 0, 0, 0)
    for day, (sold, available) in enumerate(DAYS, 1):
        agent.act(first, torch.zeros(1, 1, 1))
        agent.observe(None, None, seen_after(family, task, sold, available, day), None)
    sales = np.array([s for s, _ in DAYS], dtype=float)
    z = norm.ppf(((task.price - 1) / (task.price - 1 + task.holding)).item())
    wished = sales.mean() + z * sales.std(ddof=1)
    level = np.log1p(np.array(family.levels))
    nearest = np.abs(np.log1p(wished) - level).argmin()
    assert agent.act(first, torch.zeros(1, 1, 1))[0, 0] == nearest
    for day in range(6, 11):
        agent.observe(None, None, seen_after(family, task, 10, 10, day), None)
    assert family.levels[int(agent.act(first, torch.zeros(1, 1, 1))[0, 0])] == 10


def test_adaptive_stock_follows_the_gradient(family, tasks):
    """(eq-adaptive-stock): a step's mean over 200,000 days of demand is (p - 1) / (p - 1 + h) - P(D < y) times the step
    size, which is zero at the critical fractile."""
    task = family.tasks(torch.tensor([5]))
    n, y = 200_000, 18
    uniform = torch.rand(1, n, 1, generator=torch.Generator().manual_seed(0))
    state = family.reset(task, n, uniform)
    action = torch.full((1, n), family.levels.index(y))
    after, reward, done = family.step(task, state, action, uniform)
    agent = AdaptiveStock(family, step=1.0)
    agent.begin(family.context(task), 1, n)
    agent.act(family.observe(task, state), uniform)
    start, first = agent.target.clone(), agent.first
    agent.observe(action, reward, family.observe(task, after), done)
    step = ((agent.target - start) / first).numpy()
    fractile = ((task.price - 1) / (task.price - 1 + task.holding)).item()
    expected = fractile - law_of(task).cdf(y - 1).item()
    assert abs(step.mean() - expected) < 5 * step.std() / n**0.5
    assert set(np.round(np.unique(step), 9)) == {round(fractile - 1, 9), round(fractile, 9)}
