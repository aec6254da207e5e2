"""Bayes under censoring, the moving average that spirals down, and the rule that needs no model."""

import pytest
import torch
from scipy.stats import nbinom, norm

from ecomlib import noise
from ecomlib.baselines.bayes import BayesUCB, GreedyBayes, Thompson, belief, empirical_prior
from ecomlib.baselines.inventory import AdaptiveStock, BlindStock, DemandBelief, MovingAverage, agents
from ecomlib.evaluation import normalised_score
from ecomlib.families import sample_tasks, split, take
from ecomlib.families.inventory import CensoredInventory, DemandRanges
from ecomlib.rollout import trial

SLOW = DemandRanges(mean=(2.0, 6.0), dispersion=(1.1, 2.0))


@pytest.fixture
def family():
    return CensoredInventory()


def tasks_of(family, count, seed=0):
    return sample_tasks(family, count, torch.Generator().manual_seed(seed))


def lifetime(family, tasks, agent, episodes=5, units=1, seed=0):
    done = trial(family, tasks, agent, episodes, units, seed, progress=False)
    returns = done.returns.mean((0, 2))
    return normalised_score(returns, family.blind_return(tasks), family.oracle_return(tasks))


def days(family, tasks, agent, count, units=1):
    """The agent after ``count`` days of its own orders, the next observation, and what it saw: (before, action,
    after)."""
    replica, seen = torch.arange(units), []
    agent.begin(family.context(tasks), len(tasks.id), units)
    state = family.reset(tasks, units, torch.full((len(tasks.id), units, family.noise_size), 0.5))
    for day in range(count):
        draw = lambda stream, size, day=day: noise.uniform(3, tasks.id, replica, 0, day, stream, size)
        before = family.observe(tasks, state)
        action = agent.act(before, draw(noise.AGENT, agent.noise_size))
        state, reward, done = family.step(tasks, state, action, draw(noise.FAMILY, family.noise_size))
        after = family.observe(tasks, state)
        agent.observe(action, reward, after, done)
        seen.append((before, action, after))
    return family.observe(tasks, state), seen


# ------------------------------------------------------------------------------------------------ belief
@pytest.mark.parametrize("family", [CensoredInventory(), CensoredInventory(weekday=(0.5, 1.5)),
                                    CensoredInventory(lead_time=1, levels=(0, 3, 6, 12, 20), prior=SLOW)])  # fmt: skip
def test_belief_weighs_what_was_seen(family):
    """After six days: scipy's probability of every day's sales, or of at least what was there when it sold out."""
    tasks = tasks_of(family, 10)
    agent = Thompson(family, 64)
    _, seen = days(family, tasks, agent, 6, units=2)
    p = agent.belief.particles
    expected, sold_out = torch.zeros(10, 2, 64), 0
    for day, (_, _, after) in enumerate(seen):
        s = family.seen(after)
        shape = family.weekday[day % len(family.weekday)] * p.mean / (p.dispersion - 1)
        law = nbinom(shape.numpy(), (1 / p.dispersion).numpy())
        sold, available = s.sold.numpy()[..., None], s.available.numpy()[..., None]
        censored = sold >= available
        expected += torch.tensor(law.logsf(available - 1) * censored + law.logpmf(sold) * ~censored)
        sold_out += censored.sum()
    assert 0 < sold_out < 120  # both kinds of day were there
    assert torch.allclose(agent.belief.weight, torch.softmax(expected, -1), atol=1e-9)


def test_stores_pool_their_evidence(family):
    """Three stores of one product: the product of the likelihoods of all, the same belief and order for each."""
    tasks = tasks_of(family, 6)
    pooled, own = GreedyBayes(family, 64, stores=True), GreedyBayes(family, 64)
    observation, seen = days(family, tasks, pooled, 4, units=3)
    own.begin(family.context(tasks), 6, 3)
    for before, action, after in seen:
        own.belief.update(before, action, action, after)
    together = torch.softmax(own.belief.log_posterior.sum(1), -1)
    assert torch.allclose(pooled.belief.weight[:, 0], together, atol=1e-12)
    orders = pooled.act(observation, observation[..., :1])
    assert (orders == orders[:, :1]).all()


def test_moments_are_those_of_the_particles(family):
    """Mean and deviation of every level's expected profit, written out over the particles; greedy takes the largest
    mean and the optimist the largest mean + width x deviation."""
    tasks = tasks_of(family, 8)
    agent = BayesUCB(family, 64, width=0.7)
    observation, _ = days(family, tasks, agent, 3)
    mean, deviation = agent.belief.moments(observation)
    p, w = agent.belief.particles, agent.belief.weight[:, 0]
    level, units = torch.tensor(family.levels, dtype=torch.float64), torch.arange(family.demand_size)
    law = family.demand_table(p.mean, p.dispersion)[:, 0]
    sold = (law[:, None] * torch.minimum(units, level[:, None])).sum(-1)  # (P, A)
    profit = (tasks.price - 1)[:, None, None] * sold - tasks.holding[:, None, None] * (level - sold)  # (M, P, A)
    expected = (w[..., None] * profit).sum(1)
    assert torch.allclose(mean[:, 0], expected, atol=1e-9)
    variance = (w[..., None] * (profit - expected[:, None]) ** 2).sum(1)
    assert torch.allclose(deviation[:, 0] ** 2, variance, atol=1e-7)
    assert torch.equal(agent.belief.best_on_average(observation)[:, 0], expected.argmax(-1))
    assert torch.equal(agent.choose(observation, None)[:, 0], (expected + 0.7 * variance.sqrt()).argmax(-1))


def test_the_best_level_of_a_particle_is_the_oracles(family):
    tasks = tasks_of(family, 5)
    found = belief(family, 40)
    found.begin(family.context(tasks), 5, 1)
    observation = family.observe(tasks, family.reset(tasks, 1, torch.zeros(5, 1, 1)))
    for k in range(0, 40, 7):
        action = found.best_for(torch.full((5, 1), k), observation)
        known = take(found.particles, torch.full((5,), k))._replace(price=tasks.price, holding=tasks.holding)
        earned = family._planned(known, action.T.expand(14, -1))
        assert torch.allclose(earned, family.oracle_return(known), rtol=5e-3)


def test_eight_times_as_many_particles_change_little(family):
    _, tasks = split(family, "train", 60)
    few, many = (lifetime(family, tasks, GreedyBayes(family, size, stores=True), units=5) for size in (2048, 16384))
    assert abs(few - many) < 0.01


def test_sales_taken_for_demand_mislead_a_belief():
    """The same greedy rule on a belief that ignores censoring orders less and earns less."""

    class Naive(DemandBelief):
        def log_likelihood(self, before, action, reward, after):
            seen = self.family.seen(after)
            return self.log_seen[seen.sold.long()]  # log P(D = sold), also where nothing was left

    family = CensoredInventory(prior=DemandRanges(gross_margin=(0.2, 0.35), holding=(0.25, 0.5)))
    _, tasks = split(family, "train", 200)
    right, wrong = GreedyBayes(family, 512), GreedyBayes(family, 512)
    wrong.belief = Naive(family, 512)
    orders = [trial(family, tasks, agent, 5, 1, 0, progress=False).action[-1] for agent in (right, wrong)]
    level = torch.tensor(family.levels, dtype=torch.float64)
    assert level[orders[1]].mean() < 0.9 * level[orders[0]].mean()
    assert lifetime(family, tasks, wrong) < lifetime(family, tasks, right) - 0.1


def test_greedy_bayes_is_close_to_the_oracle(family):
    """What is claimed of the Bayesian base stock: most of the gap within two episodes of one store, more with five."""
    _, tasks = split(family, "test", 300)
    returns = trial(family, tasks, GreedyBayes(family, 512), 3, 1, 0, progress=False).returns.mean(-1)
    second = normalised_score(returns[1], family.blind_return(tasks), family.oracle_return(tasks))
    assert second > 0.93
    assert lifetime(family, tasks, GreedyBayes(family, 512, stores=True), units=5) > 0.93


@pytest.mark.parametrize("family", [CensoredInventory(weekday=(0.7, 0.8, 0.8, 0.9, 1.1, 1.5, 1.2)),
                                    CensoredInventory(lead_time=1, levels=tuple(range(0, 25, 2)), prior=SLOW)],
                         ids=["season", "lead 1"])  # fmt: skip
def test_bayes_with_season_and_with_a_lead_time(family):
    """Well above blind. With a lead time the belief's levels are constant ones, which the oracle's are not."""
    _, tasks = split(family, "train", 200)
    wanted = 0.5 if family.lead_time else 0.85
    assert lifetime(family, tasks, GreedyBayes(family, 512, stores=True), units=3) > wanted


def test_empirical_prior_comes_close_to_the_true_one(family):
    """Estimated from 100 products under the blind policy, starting from a prior twice as wide."""
    _, logged = split(family, "train", 100)
    prior = empirical_prior(family, logged, BlindStock(family), 3, particles=1024)
    _, tasks = split(family, "test", 200)
    known = lifetime(family, tasks, GreedyBayes(family, 1024))
    assert lifetime(family, tasks, GreedyBayes(family, prior=prior)) > known - 0.1
    log_mean = (prior.weight * prior.particles.mean.log()).sum()
    assert abs(log_mean - logged.mean.log().mean()) < 0.15


def test_a_hidden_regime_is_refused():
    with pytest.raises(ValueError, match="regimes = .*no filter"):
        GreedyBayes(CensoredInventory(regimes=(0.5, 1.5)))


# ------------------------------------------------------------------------------------------------ rules without a model
def test_moving_average_by_hand(family):
    """After five days: mean plus z standard deviations of what was sold, to the nearest level."""
    tasks = tasks_of(family, 30)
    agent = MovingAverage(family)
    observation, seen = days(family, tasks, agent, 5)
    sales = torch.stack([family.seen(after).sold[:, 0] for _, _, after in seen])
    z = torch.tensor(norm.ppf(((tasks.price - 1) / (tasks.price - 1 + tasks.holding)).numpy()))
    wished = (sales.mean(0) + z * sales.std(0)).clamp(min=0)
    level = torch.tensor(family.levels, dtype=torch.float64)
    nearest = (wished.log1p()[:, None] - level.log1p()).abs().argmin(1)
    assert torch.equal(agent.act(observation, observation[..., :1])[:, 0], nearest)
    _, early = days(family, tasks, MovingAverage(family), 3)
    blind = family.blind_level(tasks.price, tasks.holding, torch.zeros(30))
    assert all(torch.equal(action[:, 0], blind) for _, action, _ in early)


def test_the_moving_average_spirals_down():
    """With a thin margin its orders fall until they sell out every day, at about half the best level. The rule of Huh
    and Rusmevichientong sells out as often as the critical fractile says."""
    family = CensoredInventory(days=70, levels=tuple(range(0, 60)))
    one = torch.ones(200)
    tasks = family.product(torch.arange(200), 20 * one, 2 * one, 1.2 * one, 0.3 * one)
    found = {}
    for name, agent in agents(family).items():
        done = trial(family, tasks, agent, 2, 1, 0, progress=False)
        found[name] = done.action.flatten(0, 1)[:, :, 0].double().mean(1)  # level = index
    best = nbinom.ppf(0.2 / 0.5, 20, 0.5)
    spiral = found["moving average"]
    assert spiral[5] > spiral[20] > spiral[50] and spiral[-1] < 0.6 * best
    assert abs(found["adaptive stock"][-30:].mean() - best) < 1.5


def test_adaptive_stock_by_hand(family):
    """Steps of the first target x fractile / sqrt(day): down after a day with units left, up after one without."""
    tasks = tasks_of(family, 40)
    agent = AdaptiveStock(family, step=0.5)
    observation, seen = days(family, tasks, agent, 4)
    level = torch.tensor(family.levels, dtype=torch.float64)
    target = first = level[family.blind_level(tasks.price, tasks.holding, torch.zeros(40))]
    fractile = (tasks.price - 1) / (tasks.price - 1 + tasks.holding)
    for day, (_, _, after) in enumerate(seen, 1):
        s = family.seen(after)
        up = torch.where((s.sold == s.available)[:, 0], fractile, fractile - 1)
        target = (target + 0.5 * first * up / day**0.5).clamp(min=0)
    assert torch.allclose(agent.target[:, 0], target)
    nearest = (target.log1p()[:, None] - level.log1p()).abs().argmin(1)
    assert torch.equal(agent.act(observation, observation[..., :1])[:, 0], nearest)


def test_the_order_of_the_rules(family):
    """On training products: the spreadsheet is better than nothing, the adaptive rule better, Bayes best."""
    _, tasks = split(family, "train", 300)
    score = {name: lifetime(family, tasks, agent, units=5) for name, agent in agents(family, stores=True).items()}
    score["bayes"] = lifetime(family, tasks, GreedyBayes(family, 512, stores=True), units=5)
    score["blind"] = lifetime(family, tasks, BlindStock(family), units=5)
    assert abs(score["blind"]) < 0.05
    assert 0.2 < score["moving average"] < score["adaptive stock"] - 0.2 < score["bayes"] - 0.2


def test_a_task_does_not_depend_on_its_batch(family):
    tasks = tasks_of(family, 40)
    part = take(tasks, slice(10, 15))
    for agent in (*agents(family).values(), GreedyBayes(family, 64), Thompson(family, 64)):
        large, small = (trial(family, x, agent, 2, 2, 0, progress=False) for x in (tasks, part))
        assert torch.equal(large.action[:, :, 10:15], small.action)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda f: MovingAverage(f, window=1), "window = 1"),
        (lambda f: MovingAverage(f, start=30), "start = 30"),
        (lambda f: AdaptiveStock(f, step=0), "step = 0"),
        (lambda f: AdaptiveStock(f, stores=1), "stores = 1"),
        (lambda f: AdaptiveStock(CensoredInventory(lead_time=1)), "lead_time = 1"),
    ],
)
def test_rules_refuse_bad_settings(family, build, message):
    with pytest.raises(ValueError, match=message):
        build(family)
