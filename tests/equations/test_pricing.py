"""Chapter "Dynamic pricing": both sides of every numbered equation."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import poisson

from ecomlib import noise
from ecomlib.baselines import BayesUCB, GreedyBayes, PricingBelief, Random, Thompson, empirical_prior
from ecomlib.baselines.pricing import ControlledVariance
from ecomlib.families import LogitPricing, LogUniformPrior, sample_tasks, shelf, take
from ecomlib.families.competitor_pricing import CompetitorPricing
from ecomlib.families.mnl_pricing import Category, MNLPricing, choice_probability
from ecomlib.families.pricing import Market, ShelfState, elasticity, purchase_probability
from ecomlib.families.reference_pricing import ReferencePricing
from ecomlib.rollout import trial


@pytest.fixture
def family():
    return LogitPricing()


@pytest.fixture
def tasks(family):
    return sample_tasks(family, 200, torch.Generator().manual_seed(11))


def one_market(sensitivity=3.0, utility=2.0, traffic=120.0, cost=1.3):
    return Market(torch.tensor([7]), *(torch.tensor([x]) for x in (sensitivity, utility, traffic, cost)))


def test_purchase_probability_is_the_share_of_buyers():
    """(eq-purchase): shoppers whose utility u - a m plus a logistic taste exceeds that of leaving, by simulation."""
    a, u, m = 3.0, 2.0, 1.2
    taste = np.random.default_rng(0).logistic(size=1_000_000)
    buyers = (u - a * m + taste > 0).mean()
    q = purchase_probability(one_market(a, u), torch.tensor([[m]])).item()
    assert q == pytest.approx(1 / (1 + np.exp(a * m - u)), rel=1e-12)
    assert abs(buyers - q) < 5 * np.sqrt(q * (1 - q) / 1e6)


def test_demand_is_poisson_with_thinned_traffic(family):
    """(eq-demand): each of Poisson(lambda w) shoppers buys with probability q; against a step of the family."""
    market, n = one_market(), 200_000
    rng = np.random.default_rng(1)
    shoppers = rng.poisson(120.0 * family.weekday[0], n)
    q = purchase_probability(market, torch.tensor([[family.markups[3]]])).item()
    thinned = rng.binomial(shoppers, q)
    state = family.reset(market, n, torch.zeros(1, n, 1))
    uniforms = noise.uniform(0, market.id, torch.arange(n), 0, 0, noise.FAMILY, 1)
    after, reward, _ = family.step(market, state, torch.full((1, n), 3), uniforms)
    sold = after.sold[0].numpy().astype(int)
    assert torch.allclose(reward[0], 1.3 * (family.markups[3] - 1) * after.sold[0])
    counts = np.arange(60)
    expected = poisson.pmf(counts, 120.0 * family.weekday[0] * q)
    for sample in (thinned, sold):
        frequency = np.bincount(sample, minlength=60)[:60] / n
        assert np.all(np.abs(frequency - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-5)


def test_first_order_condition_holds_at_the_best_markup(family, tasks):
    """(eq-first-order): m* - 1 = 1 / (a (1 - q(m*)))."""
    best = family.oracle_markup(tasks)
    q = purchase_probability(tasks, best[:, None])[:, 0]
    assert torch.allclose(best - 1, 1 / (tasks.sensitivity * (1 - q)), rtol=1e-10)


def test_lambert_markup_equals_numerical_maximum(family, tasks):
    """(eq-lambert) against scipy's bounded scalar search, task by task."""
    best = family.oracle_markup(tasks)
    for i in range(50):
        a, u = tasks.sensitivity[i].item(), tasks.utility[i].item()
        found = minimize_scalar(
            lambda m, a, u: -(m - 1) / (1 + np.exp(a * m - u)), bounds=(1, 6), args=(a, u), options={"xatol": 1e-10}
        )
        assert best[i].item() == pytest.approx(found.x, abs=1e-6)


def test_elasticity_and_the_markup_rule(family, tasks):
    """(eq-elasticity): m q' / q by finite differences, and (m* - 1) / m* = 1 / |elasticity|."""
    m, h = torch.full((200, 1), 1.6), 1e-6
    up, down = (purchase_probability(tasks, m + s).log() for s in (h, -h))
    assert torch.allclose(m * (up - down) / (2 * h), elasticity(tasks, m), rtol=1e-7)
    best = family.oracle_markup(tasks)[:, None]
    assert torch.allclose((best - 1) / best, 1 / elasticity(tasks, best).abs(), rtol=1e-10)


def test_particle_posterior_equals_numerical_integration():
    """(eq-posterior): posterior means of log a, u, log lambda after four days against a fine product grid of the
    prior."""
    family = LogitPricing(prior=LogUniformPrior(traffic=(20.0, 60.0)))
    days, actions, sold = 4, [4, 1, 7, 4], [5, 14, 2, 3]
    points = (np.arange(120) + 0.5) / 120
    grid = torch.tensor(np.stack(np.meshgrid(points, points, points, indexing="ij"), -1).reshape(-1, 3))
    a, u, traffic = (x.numpy() for x in family.prior.hidden(grid))
    log_likelihood = np.zeros(len(a))
    for day in range(days):
        mean = traffic * family.weekday[day] / (1 + np.exp(a * family.markups[actions[day]] - u))
        log_likelihood += poisson.logpmf(sold[day], mean)
    weight = np.exp(log_likelihood - log_likelihood.max())
    exact = [np.average(x, weights=weight) for x in (np.log(a), u, np.log(traffic))]

    posterior = PricingBelief(family, 1 << 15)
    market = one_market()
    posterior.begin(family.context(market), 1, 1)

    def seen(day, markup, units):
        state = ShelfState(*(torch.full((1, 1), float(x)) for x in (day, markup, units, np.inf)))
        return family.observe(market, state)

    before = seen(0, 0.0, 0)
    for day in range(days):
        after = seen(day + 1, family.markups[actions[day]], sold[day])
        posterior.update(before, torch.tensor([[actions[day]]]), torch.zeros(1, 1), after)
        before = after
    w, p = posterior.weight[0, 0], posterior.particles
    found = [(w * x).sum().item() for x in (p.sensitivity.log(), p.utility, p.traffic.log())]
    spread = [np.sqrt(np.average((x - m) ** 2, weights=weight)) for x, m in zip((np.log(a), u, np.log(traffic)), exact)]
    assert np.all(np.abs(np.array(found) - exact) < 0.03 * np.array(spread))


def believing(agent, family, tasks):
    """The agent after five days at prices of its own, and the observation of day 6."""
    agent.begin(family.context(tasks), len(tasks.id), 1)
    state = family.reset(tasks, 1, torch.zeros(len(tasks.id), 1, 1))
    for day in range(5):
        before = family.observe(tasks, state)
        action = agent.act(before, noise.uniform(3, tasks.id, torch.arange(1), 0, day, noise.AGENT, 1))
        uniforms = noise.uniform(3, tasks.id, torch.arange(1), 0, day, noise.FAMILY, 1)
        state, reward, done = family.step(tasks, state, action, uniforms)
        agent.observe(action, reward, family.observe(tasks, state), done)
    return family.observe(tasks, state)


def test_greedy_posts_the_price_of_highest_posterior_mean_profit(family, tasks):
    """(eq-greedy), with the expectation written out over the particles."""
    agent = GreedyBayes(family, 512)
    observation = believing(agent, family, take(tasks, slice(0, 20)))
    action = agent.act(observation, torch.full((20, 1, 1), 0.5))[:, 0]
    p, w = agent.belief.particles, agent.belief.weight[:, 0]
    profit = torch.stack(
        [(w * p.traffic * (m - 1) * torch.sigmoid(p.utility - p.sensitivity * m)).sum(1) for m in family.markups]
    )
    assert torch.equal(action, profit.argmax(0))


def test_thompson_posts_a_price_as_often_as_it_is_believed_best(family, tasks):
    """(eq-thompson): frequencies over 4,000 uniforms against the posterior mass of the particles each price is best
    for."""
    agent = Thompson(family, 512)
    observation = believing(agent, family, take(tasks, slice(0, 1)))
    p, w = agent.belief.particles, agent.belief.weight[0, 0]
    m = torch.tensor(family.markups)
    best = ((m - 1) * torch.sigmoid(p.utility[:, None] - p.sensitivity[:, None] * m)).argmax(1)
    believed = torch.zeros(family.actions).index_add_(0, best, w)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    posted = torch.cat([agent.choose(observation, x.view(1, 1, 1)).flatten() for x in uniforms])
    frequency = torch.bincount(posted, minlength=family.actions) / 4000
    assert (believed > 0.05).sum() >= 2  # the belief is not settled, so the test can fail
    assert (frequency - believed).abs().sum() < 0.05


def test_stock_recursion_equals_brute_force():
    """(eq-stock): one more backward step written out with scipy's Poisson law, for every day, stock and price."""
    family = LogitPricing(days=3, stock=6)
    market = one_market(traffic=25.0)
    values = family.action_values(market)[0].numpy()
    following = np.zeros(7)
    for day in (2, 1, 0):
        for left in range(7):
            for k, m in enumerate(family.markups):
                rate = 25.0 * family.weekday[day] / (1 + np.exp(3.0 * m - 2.0))
                demand = np.arange(200)
                sold = np.minimum(demand, left)
                payoff = 1.3 * (m - 1) * sold + following[left - sold]
                assert values[day, left, k] == pytest.approx(
                    (poisson.pmf(demand, rate) * payoff).sum(), rel=1e-9, abs=1e-12
                )
        following = values[day].max(1)


def test_optimism_adds_deviations_to_the_mean(family, tasks):
    """(eq-ucb), with mean and deviation of a day's profit written out over the particles."""
    for width in (0.0, 0.7):
        agent = BayesUCB(family, 512, width=width)
        observation = believing(agent, family, take(tasks, slice(0, 20)))
        action = agent.act(observation, torch.full((20, 1, 1), 0.5))[:, 0]
        p, w = agent.belief.particles, agent.belief.weight[:, :1]
        m = torch.tensor(family.markups)
        profit = p.traffic[:, None] * (m - 1) * torch.sigmoid(p.utility[:, None] - p.sensitivity[:, None] * m)
        mean = (w @ profit)[:, 0]
        deviation = ((w @ profit**2)[:, 0] - mean**2).clamp(min=0).sqrt()
        best = (mean + width * deviation).argmax(-1)
        assert torch.equal(action, best)
        assert (best != mean.argmax(-1)).any() == (width > 0)


def test_controlled_variance_stays_away_from_the_average(family, tasks):
    """(eq-cvp): day by day, with the average of posted markups computed from the actions."""
    agent = ControlledVariance(family, 0.3, 256)
    actions = trial(family, take(tasks, slice(0, 30)), agent, 2, 1, seed=0, progress=False).action.flatten(0, 1)[..., 0]
    markup = torch.tensor(family.markups)[actions]
    for t in range(1, 28):
        assert ((markup[t] - markup[:t].mean(0)).abs() >= 0.3 * t**-0.25 - 1e-9).all()


def test_prior_from_logs_raises_the_likelihood_of_the_logs(family):
    """(eq-prior-from-logs): the step by hand on a small table; it never lowers the likelihood of all logs together, and
    a prior that it no longer moves is the library's."""
    generator = torch.Generator().manual_seed(0)
    likelihood = torch.rand(30, 8, generator=generator) ** 4
    p, before = torch.full((8,), 1 / 8), -np.inf
    for _ in range(50):
        total = (likelihood @ p).log().sum().item()
        assert total >= before - 1e-12
        before = total
        p = (likelihood * p / (likelihood @ p)[:, None]).mean(0)
    wide = family.wide()
    logged = sample_tasks(family, 40, torch.Generator().manual_seed(5))
    belief = PricingBelief(wide, 64)
    recorder = Thompson(wide, 64)
    recorder.belief, recorder.choose = belief, lambda observation, noise: (11 * noise[..., 0]).long()
    trial(family, logged, recorder, 2, 1, seed=0, progress=False)
    evidence = belief.log_posterior[:, 0]
    evidence = (evidence - evidence.amax(-1, keepdim=True)).exp()
    p = torch.full((64,), 1 / 64)
    for _ in range(20):
        p = (evidence * p / (evidence @ p)[:, None]).mean(0)
    found = empirical_prior(family, logged, Random(family), 2, particles=64, iterations=20, wide_share=0.0)
    by_hand = p[p > 1e-3 / 64]
    assert torch.allclose(found.weight, by_hand / by_hand.sum(), rtol=1e-6)


def test_mnl_shares_are_those_of_the_best_of_noisy_utilities():
    """(eq-mnl): shoppers who take the largest of v_j - a x_j plus a Gumbel taste, nothing included, by simulation."""
    v, a, x = np.array([1.0, 0.3, -0.5]), 2.0, np.array([0.4, 0.2, 0.5])
    utility = np.append(v - a * x, 0.0) + np.random.default_rng(0).gumbel(size=(1_000_000, 4))
    share = np.bincount(utility.argmax(1), minlength=4)[:3] / 1e6
    one = lambda value: torch.tensor([value])
    category = Category(torch.tensor([1]), one(a), torch.tensor(v)[None], one(100.0), one(1.0))
    q = choice_probability(category, torch.tensor(x)[None, None])[0, 0].numpy()
    assert np.all(np.abs(share - q) < 5 * np.sqrt(q * (1 - q) / 1e6))


def test_common_margin_solves_the_first_order_conditions():
    """(eq-common-margin): against a numerical search over the vector of margins, started elsewhere."""
    shop = MNLPricing(products=3, continuous=True)
    categories = sample_tasks(shop, 10, torch.Generator().manual_seed(3))
    best = shop.oracle_margin(categories)
    for i in range(10):
        a, v = categories.sensitivity[i].item(), categories.surplus[i].numpy()

        def loss(x, a=a, v=v):
            weight = np.exp(v - a * x)
            return -(x * weight).sum() / (1 + weight.sum())

        found = minimize(
            loss, np.array([0.2, 0.6, 1.0]) / a, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15}
        )
        assert np.allclose(found.x, best[i].item(), atol=2e-4) and loss(best[i].item()) <= found.fun + 1e-15


def test_reference_moves_as_the_average_of_posted_prices():
    """(eq-reference): a step of the family against the formula, on either side of the reference."""
    shop = ReferencePricing()
    product = sample_tasks(shop, 1, torch.Generator().manual_seed(2))
    a, u, g, loss = (x.item() for x in (product.sensitivity, product.utility, product.gain, product.loss))
    n, reference = 200_000, 1.6
    for k in (1, 8):
        m = shop.markups[k]
        state = shop.reset(product, n, torch.zeros(1, n, 1))._replace(reference=torch.full((1, n), reference))
        luck = noise.uniform(0, product.id, torch.arange(n), 0, 0, noise.FAMILY, 1)
        after, _, _ = shop.step(product, state, torch.full((1, n), k), luck)
        q = 1 / (1 + np.exp(-(u - a * m + g * max(reference - m, 0) - loss * max(m - reference, 0))))
        mean = product.traffic.item() * shop.weekday[0] * q
        assert after.sold.mean().item() == pytest.approx(mean, abs=5 * np.sqrt(mean / n))
        assert torch.allclose(after.reference, torch.tensor(shop.memory * reference + (1 - shop.memory) * m))


def test_reference_plan_is_one_backward_step_after_another():
    """(eq-reference-plan): every entry of the table, with the value between two references interpolated by NumPy."""
    shop = ReferencePricing(days=4, resolution=3)
    product = sample_tasks(shop, 1, torch.Generator().manual_seed(6))
    points = np.array(shop.references)
    profit = shop.daily_profit(product, torch.tensor(points))
    values, following = shop.action_values(profit)[:, 0].numpy(), np.zeros(len(points))
    for day in (3, 2, 1, 0):
        for i, r in enumerate(points):
            for k, m in enumerate(shop.markups):
                tomorrow = np.interp(shop.memory * r + (1 - shop.memory) * m, points, following)
                today = shop.weekday[day] * profit[0, i, k].item()
                assert values[day, i, k] == pytest.approx(today + tomorrow, rel=1e-9)
        following = values[day].max(1)


def test_best_reply_to_a_competitor():
    """(eq-competitor): the profit table against the formula, and the oracle's return against its long-run mean."""
    shop = CompetitorPricing()
    product = sample_tasks(shop, 1, torch.Generator().manual_seed(1))
    a, u, b = (x.item() for x in (product.sensitivity, product.utility, product.rival))
    scale = (product.traffic * product.cost).item()
    own, theirs = np.array(shop.markups), np.array(shop.competitor_markups)
    weight = np.exp(u - a * own)
    q = weight / (1 + weight + np.exp(b - a * theirs)[:, None])
    assert np.allclose(shop.daily_profit(product)[0].numpy(), scale * (own - 1) * q, rtol=1e-10)
    best = (scale * (own - 1) * q).max(1) @ np.array(shop.competitor_share)
    assert shop.oracle_return(product).item() == pytest.approx(14 * best, rel=1e-10)


def test_fine_days_reach_the_closed_form_for_a_shelf():
    """(eq-shelf-limit): 20 units, demand 12 exp(-m) a season, for days ever finer; Richardson's extrapolation of the
    recursion (eq-stock) agrees to 1 in 1,000."""
    units, scale = 20, 12.0
    total = np.cumsum([(scale / np.e) ** i / np.prod(np.arange(1.0, i + 1)) for i in range(units + 1)])
    price = torch.linspace(0.5, 6.0, 1101)

    def recursion(days):
        rate = (scale / days * (-price).exp()).expand(days, 1, -1)
        return shelf.action_values(rate, price[None], units + 1)[0, 0].amax(-1).numpy()

    coarse, fine = recursion(60), recursion(120)
    assert (fine[1:] > coarse[1:]).all() and (fine <= np.log(total) + 1e-12).all()
    assert np.allclose((2 * fine - coarse)[1:], np.log(total)[1:], rtol=1e-3)
