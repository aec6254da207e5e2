"""LogitPricing: oracles against grids, brute force and scipy; the protocol; conservation and limits."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import poisson

from ecomlib import noise
from ecomlib.families import GaussianPrior, LogitPricing, LogUniformPrior, sample_tasks, split, take
from ecomlib.families.pricing import ShelfState, blind_policy, elasticity, purchase_probability


@pytest.fixture(scope="module")
def family():
    return LogitPricing()


def tasks_of(family, count, seed=0):
    return sample_tasks(family, count, torch.Generator().manual_seed(seed))


def play(family, tasks, actions, seed=0, episodes=1):
    """Post ``actions`` (T,) or a constant; returns rewards (T, M, N) and states."""
    replica, rewards = torch.arange(episodes), []

    def draw(time):
        return noise.uniform(seed, tasks.id, replica, 0, time, noise.FAMILY, family.noise_size)

    state, states = family.reset(tasks, episodes, draw(family.horizon)), []
    for day in range(family.days):
        action = torch.full((len(tasks.id), episodes), int(actions[day] if np.ndim(actions) else actions))
        state, reward, done = family.step(tasks, state, action, draw(day))
        rewards.append(reward)
        states.append(state)
    return torch.stack(rewards), states, done


# ------------------------------------------------------------------------------------------------ oracle
def test_continuous_oracle_equals_fine_grid_over_1000_tasks(family):
    """Unclipped Lambert W v. a fine grid around the optimum of each task, 1e-6 relative in profit."""
    tasks = tasks_of(family, 1000)
    best = family.oracle_markup(tasks)[:, None]
    grid = best * torch.linspace(0.5, 2.0, 30_001)
    profit = (grid - 1) * purchase_probability(tasks, grid)
    at_best = ((best - 1) * purchase_probability(tasks, best))[:, 0]
    assert ((profit.amax(1) - at_best) / at_best).abs().max() < 1e-6
    assert (profit.amax(1) <= at_best * (1 + 1e-12)).all()


def test_clipped_oracle_equals_grid_inside_the_bounds(family):
    narrow = LogitPricing(continuous=True, markups=(1.05, 1.4))
    tasks = tasks_of(narrow, 300)
    grid = torch.linspace(1.05, 1.4, 20_001).expand(300, -1)
    daily = tasks.cost[:, None] * tasks.traffic[:, None] * (grid - 1) * purchase_probability(tasks, grid)
    exact, fine = narrow.oracle_return(tasks), daily.amax(1) * sum(narrow.weekday) * 2
    assert ((narrow.oracle_markup(tasks) > 1.4).double().mean()) > 0.3  # the bound really binds
    assert ((exact - fine) / exact).abs().max() < 1e-6


def test_grid_oracle_is_the_best_posted_price_and_below_the_continuous_one(family):
    tasks = tasks_of(family, 500)
    by_hand = torch.stack(
        [
            14 * tasks.traffic * tasks.cost * (m - 1) * torch.sigmoid(tasks.utility - tasks.sensitivity * m)
            for m in family.markups
        ]
    )
    assert torch.allclose(family.oracle_return(tasks), by_hand.amax(0), rtol=1e-12)
    assert (family.oracle_return(tasks) <= LogitPricing(continuous=True).oracle_return(tasks) * (1 + 1e-12)).all()


def brute_force(family, task):
    """Best expected profit over every deterministic table (day, units left) -> price, by enumeration with scipy."""
    levels = range(1, family.stock + 1)
    decisions = [(0, family.stock)] + [(day, left) for day in range(1, family.days) for left in levels]
    a, u, traffic, cost = (float(x) for x in (task.sensitivity, task.utility, task.traffic, task.cost))
    best = -np.inf
    for choice in product(family.markups, repeat=len(decisions)):
        table = dict(zip(decisions, choice))

        def value(day, left, table=table):
            if day == family.days or left == 0:
                return 0.0
            m = table[day, left]
            rate = traffic * family.weekday[day % 7] / (1 + np.exp(-(u - a * m)))
            total = 0.0
            for sold in range(left):
                total += poisson.pmf(sold, rate) * (cost * (m - 1) * sold + value(day + 1, left - sold))
            return total + poisson.sf(left - 1, rate) * cost * (m - 1) * left

        best = max(best, value(0, family.stock))
    return best


def test_finite_stock_oracle_equals_brute_force():
    family = LogitPricing(days=2, stock=3, markups=(1.1, 1.5, 2.0))
    tasks = tasks_of(LogitPricing(prior=LogUniformPrior(traffic=(5.0, 40.0))), 6)
    exact = family.oracle_return(tasks)
    for i in range(6):
        task = take(tasks, slice(i, i + 1))
        assert exact[i].item() == pytest.approx(brute_force(family, task), rel=1e-10)


def test_plentiful_stock_is_no_limit(family):
    tasks = tasks_of(LogitPricing(prior=LogUniformPrior(traffic=(5.0, 10.0))), 20)
    roomy = LogitPricing(stock=160)
    assert torch.allclose(roomy.oracle_return(tasks), family.oracle_return(tasks), rtol=1e-9)


def test_oracle_return_is_what_the_best_price_earns(family):
    """Monte-Carlo: mean of 20,000 simulated episodes at the oracle's price, within 5 standard errors."""
    for shelf in (family, LogitPricing(days=5, stock=20)):
        tasks = tasks_of(shelf, 4, seed=3)
        values = shelf.action_values(tasks)
        replica = torch.arange(20_000)
        state = shelf.reset(tasks, len(replica), torch.zeros(4, len(replica), 1))
        total = torch.zeros(4, len(replica))
        for day in range(shelf.days):
            level = torch.zeros_like(state.day).long() if shelf.stock is None else state.stock.long()
            action = values[:, day].argmax(-1).gather(1, level)
            uniforms = noise.uniform(0, tasks.id, replica, 0, day, noise.FAMILY, 1)
            state, reward, _ = shelf.step(tasks, state, action, uniforms)
            total += reward
        error = total.std(1) / len(replica) ** 0.5
        # A shelf that always sells out has no variance: allow for rounding.
        assert ((total.mean(1) - shelf.oracle_return(tasks)).abs() < 5 * error + 1e-9 * total.mean(1)).all()


# ------------------------------------------------------------------------------------------------ blind policy
@pytest.mark.parametrize("shelf", [LogitPricing(), LogitPricing(continuous=True), LogitPricing(stock=40)])
def test_blind_is_below_the_oracle_for_every_task(shelf):
    tasks = tasks_of(shelf, 500)
    assert (shelf.blind_return(tasks) <= shelf.oracle_return(tasks) * (1 + 1e-12)).all()
    assert shelf.blind_return(tasks).mean() < 0.96 * shelf.oracle_return(tasks).mean()


def test_blind_price_is_the_best_fixed_price_of_fresh_tasks(family):
    """The search over the prior found the price that is best on 20,000 products it never saw."""
    tasks = tasks_of(family, 20_000, seed=9)
    grid = torch.tensor(family.markups).expand(len(tasks.id), -1)
    profit = tasks.traffic[:, None] * tasks.cost[:, None] * (grid - 1) * purchase_probability(tasks, grid)
    assert profit.mean(0).argmax() == blind_policy(family)[0, 0]


# ---------------------------------------------------------------------------------------- chance and the protocol
def test_a_task_is_a_function_of_its_id(family):
    tasks = tasks_of(family, 50)
    again = family.tasks(tasks.id.flip(0))
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(tasks, again))


def test_split_lists_are_fixed_and_nested(family):
    _, few = split(family, "test", 10)
    _, many = split(family, "test", 1000)
    assert torch.equal(few.id, many.id[:10])
    assert not set(many.id.tolist()) & set(split(family, "train", 1000)[1].id.tolist())
    moved, shifted = split(family, "shifted", 1000)
    assert shifted.sensitivity.mean() > 1.3 * many.sensitivity.mean()
    assert moved.prior != family.prior
    with pytest.raises(ValueError, match="split = 'dev'.*train, test, shifted"):
        split(family, "dev", 3)


@pytest.mark.parametrize("shelf", [LogitPricing(), LogitPricing(stock=60)])
def test_outcome_of_a_task_does_not_depend_on_its_batch(shelf):
    tasks = tasks_of(shelf, 4096)
    large, _, _ = play(shelf, tasks, 4)
    small, _, _ = play(shelf, take(tasks, slice(100, 108)), 4)
    assert torch.equal(large[:, 100:108], small)
    one, _, _ = play(shelf, take(tasks, slice(100, 101)), 4, episodes=3)
    assert torch.equal(one[..., :1], small[:, :1])


def test_observation_holds_no_hidden_parameter(family):
    """Two products with the same cost look the same until a sale differs."""
    tasks = tasks_of(family, 2)
    tasks = tasks._replace(cost=torch.ones(2))
    state = family.reset(tasks, 3, torch.zeros(2, 3, 1))
    first, second = family.observe(tasks, state)
    assert torch.equal(first, second)
    assert first.shape == (3, family.observation_size)


def test_observation_of_the_default_family_by_hand(family):
    """Day 3 of 14, a Thursday, after 30 units at markup 1.63: the scales are part of what a trained policy expects."""
    tasks = tasks_of(family, 1)._replace(cost=torch.tensor([1.25]))
    state = ShelfState(*(torch.full((1, 1), x) for x in (3.0, 1.63, 30.0, float("inf"))))
    assert torch.allclose(family.observe(tasks, state)[0, 0], torch.tensor([3 / 14, 1.25, 0.9, 1.63, 0.3, 1.0]))
    assert family.markups[0] == 1.05 and family.markups[-1] == 2.5


def test_seen_inverts_observe():
    shelf = LogitPricing(stock=50)
    tasks = tasks_of(shelf, 5)
    _, states, _ = play(shelf, tasks, 6, episodes=4)
    for state in states[:-1]:
        seen = shelf.seen(shelf.observe(tasks, state))
        for name in ("day", "markup", "sold", "stock"):
            assert torch.allclose(getattr(seen, name), getattr(state, name)), name
        assert torch.equal(seen.weekday[0, 0], torch.tensor(shelf.weekday[int(state.day[0, 0]) % 7]))


def test_stock_is_conserved_and_reset_keeps_the_task():
    shelf = LogitPricing(stock=30)
    tasks = tasks_of(shelf, 200)
    before = [field.clone() for field in tasks]
    rewards, states, done = play(shelf, tasks, 0, episodes=2)
    sold = torch.stack([s.sold for s in states]).sum(0)
    assert torch.equal(sold + states[-1].stock, torch.full_like(sold, 30.0))
    assert (torch.stack([s.stock for s in states]) >= 0).all() and (sold == 30).any() and done.all()
    assert all(torch.equal(a, b) for a, b in zip(before, tasks))
    margin = tasks.cost[:, None] * (shelf.markups[0] - 1)
    assert torch.allclose(rewards.sum(0), margin * sold)


def test_limits_no_shopper_and_no_stock():
    tasks = tasks_of(LogitPricing(), 3)._replace(traffic=torch.zeros(3))
    for shelf in (LogitPricing(), LogitPricing(stock=5)):
        rewards, _, _ = play(shelf, tasks, 3)
        assert (rewards == 0).all() and (shelf.oracle_return(tasks) == 0).all()
    shelf, tasks = LogitPricing(stock=5), tasks_of(LogitPricing(), 3)
    empty = ShelfState(*(torch.zeros(3, 1) for _ in range(4)))
    _, reward, _ = shelf.step(tasks, empty, torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1, 1), 0.999))
    assert (reward == 0).all()


@pytest.mark.parametrize("shelf", [LogitPricing(), LogitPricing(stock=60), LogitPricing(continuous=True)])
def test_step_compiles_without_a_graph_break(shelf):
    tasks = tasks_of(shelf, 16)
    state = shelf.reset(tasks, 4, torch.zeros(16, 4, 1))
    action = torch.full((16, 4), 1.4) if shelf.continuous else torch.full((16, 4), 3)
    uniforms = noise.uniform(0, tasks.id, torch.arange(4), 0, 0, noise.FAMILY, 1)
    compiled = torch.compile(shelf.step, fullgraph=True)(tasks, state, action, uniforms)
    for a, b in zip(compiled[0], shelf.step(tasks, state, action, uniforms)[0]):
        assert torch.allclose(a, b)


def test_mean_reward_is_the_mean_of_the_rewards(family):
    """Of 20,000 episodes at one price, day by day, within 5 standard errors; exact for the whole episode's return."""
    tasks = tasks_of(family, 3)
    rewards, _, _ = play(family, tasks, 4, episodes=20_000)
    mean = family.mean_reward(tasks, torch.full((14, 3, 1), 4))
    error = rewards.std(-1) / 20_000**0.5
    assert ((rewards.mean(-1) - mean[..., 0]).abs() < 5 * error).all()
    assert torch.allclose(mean.sum(0)[:, 0], family.action_values(tasks, torch.full((14, 1), 4))[:, 0, 0, 4])
    with pytest.raises(ValueError, match="stock = 5"):
        LogitPricing(stock=5).mean_reward(tasks, torch.full((14, 3, 1), 4))


def test_continuous_prices_are_clipped_to_the_ends_of_the_list():
    shelf = LogitPricing(continuous=True)
    assert shelf.actions == 0
    assert shelf.markup(torch.tensor([0.3, 1.7, 9.0])).tolist() == [1.05, 1.7, 2.5]


def test_smallest_settings_work():
    for shelf in (LogitPricing(days=1, weekday=(1.0,), stock=1), LogitPricing(markups=(0.5, 1.5), mean_traffic=0.1)):
        rewards, _, done = play(shelf, tasks_of(shelf, 2), 1)
        assert done.all() and rewards.shape == (shelf.days, 2, 1)


def test_runs_in_single_precision():
    torch.set_default_dtype(torch.float32)
    shelf = LogitPricing()
    tasks = tasks_of(shelf, 100)
    rewards, _, _ = play(shelf, tasks, 4)
    assert rewards.dtype == torch.float32 and tasks.sensitivity.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    exact, _, _ = play(shelf, tasks_of(shelf, 100), 4)
    assert torch.allclose(rewards.double().sum(), exact.sum(), rtol=1e-3)


def test_elasticity_is_the_log_derivative_of_demand(family):
    tasks = tasks_of(family, 100)
    m = torch.full((100, 1), 1.5, requires_grad=True)
    log_demand = purchase_probability(tasks, m).log().sum()
    (slope,) = torch.autograd.grad(log_demand, m)
    assert torch.allclose(slope * 1.5, elasticity(tasks, m), rtol=1e-10)


# ------------------------------------------------------------------------------------------------ priors and bad input
def test_log_uniform_prior_is_uniform_in_logarithms_and_independent(family):
    """Of 16,384 products: the ends of every range, the moments of a uniform variable, no correlation."""
    tasks = family.prior_sample(1 << 14)
    share = purchase_probability(tasks, family.oracle_markup(tasks)[:, None])[:, 0]
    ranges = {(1, 6): tasks.sensitivity, (0.02, 0.3): share, (20, 300): tasks.traffic, (0.5, 1.7): tasks.cost}
    scaled = torch.stack([(x.log() - np.log(low)) / np.log(high / low) for (low, high), x in ranges.items()])
    assert (scaled.amin(1).abs() < 1e-3).all() and ((scaled.amax(1) - 1).abs() < 1e-3).all()
    assert torch.allclose(torch.cov(scaled) * 12, torch.eye(4), atol=0.03)
    assert tasks.cost.mean().item() == pytest.approx(1.0, abs=0.03)


def test_gaussian_prior_has_the_stated_moments():
    factor = ((0.5, 0.0, 0.0), (0.3, 0.4, 0.0), (-0.2, 0.1, 0.6))
    prior = GaussianPrior((0.4, -4.0, 5.0), factor, reference_markup=1.4)
    tasks = LogitPricing(prior=prior).prior_sample(1 << 14)
    share = torch.logit(purchase_probability(tasks, torch.full((len(tasks.id), 1), 1.4)))[:, 0]
    sample = torch.stack((tasks.sensitivity.log(), share, tasks.traffic.log()))
    root = torch.tensor(factor)
    assert torch.allclose(sample.mean(1), torch.tensor(prior.mean), atol=2e-3)
    assert torch.allclose(torch.cov(sample), root @ root.T, atol=4e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogitPricing(days=0), "LogitPricing.days = 0"),
        (lambda: LogitPricing(markups=(1.2, 1.1)), "LogitPricing.markups = .*increasing"),
        (lambda: LogitPricing(markups=(-1.0, 1.1)), "positive"),
        (lambda: LogitPricing(weekday=(1.0, 2.0)), "LogitPricing.weekday = .*mean 1"),
        (lambda: LogitPricing(stock=0), "LogitPricing.stock = 0"),
        (lambda: LogitPricing(stock=5, continuous=True), "price grid"),
        (lambda: LogUniformPrior(share=(0.1, 1.0)), "LogUniformPrior.share = "),
        (lambda: LogUniformPrior(traffic=(30.0, 20.0)), "LogUniformPrior.traffic = .*low <= high"),
        (lambda: GaussianPrior((0, 0, float("nan")), ((1, 0, 0), (0, 1, 0), (0, 0, 1))), "GaussianPrior.mean"),
        (lambda: GaussianPrior((0, 0, 0), ((1, 1, 0), (0, 1, 0), (0, 0, 1))), "GaussianPrior.factor"),
        (lambda: LogitPricing(continuous=True).action_values(None), "continuous=False"),
    ],
)
def test_bad_settings_name_field_value_and_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()
