"""Several products, reference prices, a competitor, a limit on changes: oracles against brute force and dynamic
programming, the protocol, conservation and limits."""

from itertools import product

import numpy as np
import pytest
import torch

from ecomlib import noise
from ecomlib.families import GaussianPrior, LogitPricing, LogUniformPrior, sample_tasks, take
from ecomlib.families.competitor_pricing import CompetitorPricing, share_of
from ecomlib.families.mnl_pricing import MNLPricing, choice_probability
from ecomlib.families.pricing import purchase_probability
from ecomlib.families.reference_pricing import ReferencePricing, remembering
from ecomlib.families.shelf import action_values

SHOPS = {
    "limited": LogitPricing(changes_per_week=1),
    "several": MNLPricing(),
    "continuous": MNLPricing(continuous=True),
    "reference": ReferencePricing(),
    "competitor": CompetitorPricing(),
}
EVERY = pytest.mark.parametrize("shop", SHOPS.values(), ids=SHOPS)


def tasks_of(family, count, seed=0):
    return sample_tasks(family, count, torch.Generator().manual_seed(seed))


def play(family, tasks, choose, episodes=1, seed=0):
    """``choose(observation, day)`` every day; returns rewards (T, M, N), states and whether it is done."""
    replica, rewards = torch.arange(episodes), []
    draw = lambda day: noise.uniform(seed, tasks.id, replica, 0, day, noise.FAMILY, family.noise_size)
    state, states = family.reset(tasks, episodes, draw(family.horizon)), []
    for day in range(family.horizon):
        state, reward, done = family.step(tasks, state, choose(family.observe(tasks, state), day), draw(day))
        rewards.append(reward)
        states.append(state)
    return torch.stack(rewards), states, done


def always(family, tasks, action, episodes=1):
    if family.actions == 0:
        return lambda observation, day: torch.full((len(tasks.id), episodes, family.action_size), float(action))
    return lambda observation, day: torch.full((len(tasks.id), episodes), action)


# --------------------------------------------------------------------------------------- what all of them have
@EVERY
def test_blind_is_below_the_oracle_for_every_task(shop):
    tasks = tasks_of(shop, 500)
    blind, oracle = shop.blind_return(tasks), shop.oracle_return(tasks)
    assert (blind <= oracle * (1 + 1e-12)).all() and 0.5 * oracle.mean() < blind.mean() < 0.96 * oracle.mean()


@EVERY
def test_blind_action_earns_the_blind_return(shop):
    """Monte-Carlo over 3,000 products, 4 episodes each, within 5 standard errors."""
    tasks = tasks_of(shop, 3000)
    rewards, _, done = play(shop, tasks, lambda observation, day: shop.blind_action(observation), episodes=4)
    difference = rewards.sum(0).mean(1) - shop.blind_return(tasks)
    assert done.all() and difference.mean().abs() < 5 * difference.std() / 3000**0.5
    assert difference.std() < 0.5 * shop.blind_return(tasks).std()  # so that the bound above is a narrow one


@EVERY
def test_outcome_of_a_task_does_not_depend_on_its_batch(shop):
    tasks = tasks_of(shop, 600)
    few = take(tasks, slice(100, 108))
    large, _, _ = play(shop, tasks, always(shop, tasks, 1))
    small, _, _ = play(shop, few, always(shop, few, 1))
    assert torch.equal(large[:, 100:108], small)
    assert torch.allclose(shop.oracle_return(tasks)[100:108], shop.oracle_return(few), rtol=1e-12)


@EVERY
def test_observation_holds_no_hidden_parameter(shop):
    """Two products of the same cost look the same until a sale differs."""
    tasks = tasks_of(shop, 2)._replace(cost=torch.ones(2))
    state = shop.reset(tasks, 3, torch.full((2, 3, shop.noise_size), 0.4))
    first, second = shop.observe(tasks, state)
    assert torch.equal(first, second) and first.shape == (3, shop.observation_size)
    assert torch.equal(shop.context(tasks), torch.ones(2, 1))


@EVERY
def test_nobody_comes(shop):
    tasks = tasks_of(shop, 3)._replace(traffic=torch.zeros(3))
    rewards, _, _ = play(shop, tasks, always(shop, tasks, 1))
    assert (rewards == 0).all() and (shop.oracle_return(tasks) == 0).all() and (shop.blind_return(tasks) == 0).all()


@EVERY
def test_step_compiles_without_a_graph_break(shop):
    tasks = tasks_of(shop, 8)
    luck = noise.uniform(0, tasks.id, torch.arange(4), 0, 0, noise.FAMILY, shop.noise_size)
    state = shop.reset(tasks, 4, luck)
    action = always(shop, tasks, 1, 4)(None, 0)
    compiled = torch.compile(shop.step, fullgraph=True, backend="eager")(tasks, state, action, luck)
    for a, b in zip(compiled[0], shop.step(tasks, state, action, luck)[0]):
        assert torch.allclose(a, b)


@EVERY
def test_single_precision_agrees(shop):
    torch.set_default_dtype(torch.float32)
    tasks = tasks_of(shop, 100)
    single, _, _ = play(shop, tasks, always(shop, tasks, 1))
    returns = shop.blind_return(tasks), shop.oracle_return(tasks)
    assert single.dtype == torch.float32 and all(r.dtype == torch.float32 for r in returns)
    torch.set_default_dtype(torch.float64)
    tasks = tasks_of(shop, 100)
    double, _, _ = play(shop, tasks, always(shop, tasks, 1))
    assert torch.allclose(single.double().sum(), double.sum(), rtol=2e-3)
    for low, high in zip(returns, (shop.blind_return(tasks), shop.oracle_return(tasks))):
        assert torch.allclose(low.double(), high, rtol=1e-4)


@EVERY
def test_wide_and_shifted_priors_and_drift(shop):
    wide, moved = shop.wide(), shop.shifted()
    spread = lambda f: f.prior_sample(512).sensitivity.log().std()
    assert spread(wide) > 1.6 * spread(shop) and type(moved) is type(shop) and moved.prior != shop.prior
    tasks = tasks_of(shop, 200)
    later = shop.drifted(tasks.id, 3, 0.1)
    assert torch.equal(later.cost, tasks.cost) and not torch.allclose(later.sensitivity, tasks.sensitivity, rtol=0.05)
    assert later.sensitivity.log().mean() == pytest.approx(tasks.sensitivity.log().mean().item(), abs=0.15)


def test_wide_ranges_hold_the_prior_and_the_shifted_one_and_are_twice_as_wide():
    for prior in (LogUniformPrior(), LogUniformPrior(share=(0.3, 0.6), traffic=(50.0, 50.0))):
        wide, moved = prior.wide(), prior.shifted()
        for name in ("sensitivity", "share", "traffic"):
            low, high = getattr(wide, name)
            own, other = getattr(prior, name), getattr(moved, name)
            assert low <= min(own[0], other[0]) and high >= max(own[1], other[1])
            assert np.log(high / low) >= 2 * np.log(own[1] / own[0]) - 1e-12
    gaussian = GaussianPrior((0.4, -4.0, 5.0), ((0.5, 0.0, 0.0), (0.3, 0.4, 0.0), (-0.2, 0.1, 0.6)))
    factor, wide = torch.tensor(gaussian.factor), torch.tensor(gaussian.wide().factor)
    assert torch.allclose(wide @ wide.T, 4 * factor @ factor.T)


# ---------------------------------------------------------------------------------------- a limit on price changes
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_limit_on_changes_costs_the_oracle_nothing(limit):
    """Dynamic programming over (day, yesterday's price, changes left), for which no price has to stay the same."""
    week = (0.6, 1.0, 1.4)
    shop = LogitPricing(days=6, markups=(1.1, 1.4, 1.9, 2.4), weekday=week, changes_per_week=limit)
    tasks = tasks_of(shop, 50)
    chance = purchase_probability(tasks, torch.tensor(shop.markups).expand(50, -1))
    profit = (tasks.traffic * tasks.cost)[:, None] * (torch.tensor(shop.markups) - 1) * chance  # (M, A)
    value = torch.zeros(50, 4, limit + 1)  # tomorrow morning's, by price and changes left
    for day in reversed(range(6)):
        if day % 3 == 2:  # tomorrow is a Monday
            value = value[..., limit:].expand(-1, -1, limit + 1)
        stay = week[day % 3] * profit[..., None] + value
        if day == 0:
            break
        move = stay.amax(1, keepdim=True)
        value = torch.cat((stay[..., :1], torch.maximum(stay[..., 1:], move[..., :-1])), -1)
    assert torch.allclose(stay[..., limit].amax(1), shop.oracle_return(tasks), rtol=1e-12)


def test_a_change_beyond_the_limit_is_not_carried_out():
    """By hand: the first price is free, a change on Wednesday uses the week's only one, Monday brings a new one."""
    shop = LogitPricing(changes_per_week=1)
    tasks = tasks_of(shop, 40)
    wanted = torch.tensor([3, 3, 5, 2, 5, 7, 7, 8, 8, 1, 1, 8, 8, 0])
    posted = [3, 3, 5, 5, 5, 5, 5, 8, 8, 8, 8, 8, 8, 8]
    left = [1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    seen = []

    def choose(observation, day):
        seen.append(observation)
        return wanted[day].expand(40, 3)

    rewards, states, _ = play(shop, tasks, choose, episodes=3)
    assert [s.markup[0, 0].item() for s in states] == [shop.markups[k] for k in posted]
    assert [s.changes[0, 0].item() for s in states] == left
    assert [o[0, 0, 6].item() for o in seen[1:]] == left[:-1]
    assert [shop.posted(o)[0, 0].item() for o in seen[1:]] == posted[:-1]
    unlimited, free = LogitPricing(), torch.tensor(posted)
    assert torch.equal(rewards, play(unlimited, tasks, lambda o, day: free[day].expand(40, 3), episodes=3)[0])
    every = lambda numbers: numbers[:, None, None].expand(-1, 40, 1)
    assert torch.equal(shop.mean_reward(tasks, every(wanted)), unlimited.mean_reward(tasks, every(free)))


def test_a_generous_limit_is_no_limit():
    shop, tasks = LogitPricing(changes_per_week=7), tasks_of(LogitPricing(), 30)
    wanted = lambda o, day: (torch.arange(30)[:, None] * 5 + day * 3) % 11
    assert torch.equal(play(shop, tasks, wanted)[0], play(LogitPricing(), tasks, wanted)[0])


# ---------------------------------------------------------------------------------------------- several products
def test_common_margin_is_not_improved_by_2000_perturbations():
    shop = MNLPricing(products=4, continuous=True, margins=(1e-3, 50.0))
    tasks = tasks_of(shop, 20)
    best = shop.oracle_margin(tasks)[:, None, None].expand(-1, 1, 4)
    step = torch.rand(20, 2000, 1, generator=torch.Generator().manual_seed(0)) ** 3
    noise_ = torch.randn(20, 2000, 4, generator=torch.Generator().manual_seed(1))
    at_best = shop.mean_profit(tasks, best)
    assert (shop.mean_profit(tasks, best * (step * noise_).exp()) <= at_best * (1 + 1e-12)).all()
    days = sum(shop.weekday) * 2
    assert torch.allclose(shop.oracle_return(tasks), days * at_best[:, 0], rtol=1e-12)


def test_common_margin_equals_the_best_pair_of_a_grid():
    """All pairs of 301 margins for two products, as unlike as the prior makes them; and where the range binds."""
    for margins in ((0.02, 8.0), (0.05, 0.3)):
        shop = MNLPricing(products=2, continuous=True, margins=margins, spread=2.0)
        tasks = tasks_of(shop, 30)
        axis = torch.linspace(*margins, 301)
        pairs = torch.cartesian_prod(axis, axis).expand(30, -1, 2)
        found = shop.mean_profit(tasks, pairs).amax(1) * sum(shop.weekday) * 2
        exact = shop.oracle_return(tasks)
        assert (found <= exact * (1 + 1e-12)).all() and torch.allclose(found, exact, rtol=3e-3)
    assert (shop.oracle_margin(tasks) > 0.3).any()


def test_a_category_sells_what_one_product_sells_under_a_common_margin():
    shop = MNLPricing()
    tasks = tasks_of(shop, 100)
    one = shop.as_one(tasks)
    own = LogitPricing().from_uniforms(tasks.id, shop._uniforms(tasks.id, 0)[:, [0, 1, 2, -1]])
    assert all(torch.allclose(a, b) for a, b in zip(one, own))
    margin = torch.linspace(0.1, 1.4, 9).expand(100, -1)
    total = choice_probability(tasks, margin[..., None].expand(-1, -1, 3)).sum(-1)
    assert torch.allclose(total, purchase_probability(one, 1 + margin), rtol=1e-12)


def test_blind_margins_are_common():
    """No vector of margins near the blind one has a better mean over 20,000 fresh categories."""
    shop = MNLPricing(continuous=True)
    tasks = tasks_of(shop, 20_000, seed=4)
    best = shop.blind_action(torch.zeros(1, 1, shop.observation_size)).exp()
    mean = lambda margin: shop.mean_profit(tasks, margin.expand(20_000, 1, 3)).mean()
    generator = torch.Generator().manual_seed(0)
    for size in (0.05, 0.2, 0.5):
        for _ in range(20):
            step = torch.randn(1, 1, 3, generator=generator)
            assert mean(best * (size * (step - step.mean())).exp()) < mean(best)


def test_choices_are_shares_of_all_shoppers():
    """Probabilities by hand, the outside option included; sales of 40,000 episodes at unequal margins."""
    shop = MNLPricing(continuous=True, days=1)
    tasks = tasks_of(shop, 3)
    margin = torch.tensor([0.2, 0.5, 0.9])
    attraction = (tasks.surplus - tasks.sensitivity[:, None] * margin).exp()
    share = attraction / (1 + attraction.sum(-1, keepdim=True))
    assert torch.allclose(choice_probability(tasks, margin.expand(3, 1, 3))[:, 0], share)
    rewards, states, _ = play(shop, tasks, lambda o, day: margin.log().expand(3, 40_000, 3), episodes=40_000)
    mean = tasks.traffic[:, None] * shop.weekday[0] * share
    assert ((states[0].sold.mean(1) - mean).abs() < 5 * (mean / 40_000).sqrt()).all()
    assert torch.allclose(rewards[0], tasks.cost[:, None] * (margin * states[0].sold).sum(-1))
    correlation = torch.corrcoef(states[0].sold[0].T) - torch.eye(3)
    assert correlation.abs().max() < 5 / 40_000**0.5


# --------------------------------------------------------------------------------------------- reference prices
def test_plan_equals_the_best_of_all_price_lists():
    """Five days, three prices: all 243 lists, each followed exactly."""
    shop = ReferencePricing(days=5, markups=(1.2, 1.6, 2.2))
    tasks = tasks_of(shop, 100)
    lists = torch.tensor(list(product(range(3), repeat=5))).T  # (days, 243)
    earned = torch.stack([shop.planned_return(tasks, plan[:, None]) for plan in lists.T], 1)
    exact, found = earned.amax(1), shop.oracle_return(tasks)
    assert (found <= exact * (1 + 1e-12)).all() and torch.allclose(found, exact, rtol=1e-3)
    assert (found == exact).double().mean() > 0.9
    # Blind: the list with the best mean over the products that the search saw.
    prior = shop.prior_sample(4096)
    means = torch.stack([shop.planned_return(prior, plan[:, None]).mean() for plan in lists.T])
    assert shop.blind_return(prior).mean() == pytest.approx(means.max().item(), rel=1e-9)


def test_refining_the_references_bounds_the_error():
    """What plans on coarse references lose against those on fine ones falls with the resolution, to below 1e-3 for
    every product and 1e-4 on average at the default."""
    tasks = tasks_of(ReferencePricing(), 300)
    best = ReferencePricing(resolution=64).oracle_return(tasks)
    loss = {r: 1 - ReferencePricing(resolution=r).oracle_return(tasks) / best for r in (1, 4, 16)}
    assert loss[1].mean() > loss[4].mean() > loss[16].mean()
    assert loss[ReferencePricing().resolution].amax() < 1e-3 and loss[ReferencePricing().resolution].mean() < 1e-4


def test_without_memory_the_reference_is_yesterdays_price():
    """rho = 0: exact, against dynamic programming over the last price, for every last price and day."""
    shop = ReferencePricing(memory=0.0, first_reference=ReferencePricing().markups[4], resolution=2)
    tasks = tasks_of(shop, 60)
    own, actions = torch.tensor(shop.markups), shop.actions
    last, now = (x.flatten().expand(60, -1) for x in torch.meshgrid(own, own, indexing="ij"))
    profit = (tasks.traffic * tasks.cost)[:, None] * (now - 1) * remembering(tasks, now, last)
    profit = profit.view(60, actions, actions)  # (M, last price, price)
    value = torch.zeros(60, actions)
    for day in reversed(range(shop.days)):
        value = (shop.weekday[day % 7] * profit + value[:, None]).amax(-1)
    assert torch.allclose(shop.oracle_return(tasks), value[:, 4], rtol=1e-12)


def test_gains_that_weigh_more_reward_a_moving_price():
    """Where gains weigh more than losses no fixed price comes near the plan; where losses do, one does."""

    def over_fixed(**weights):
        shop = ReferencePricing(**weights)
        tasks = tasks_of(shop, 200)
        fixed = [shop.planned_return(tasks, torch.full((14, 1), k)) for k in range(11)]
        return (shop.oracle_return(tasks).mean() / torch.stack(fixed).amax(0).mean()).item() - 1

    assert over_fixed() > 0.05
    assert 0 <= over_fixed(gain=(0.0, 0.1), loss=(0.1, 0.6)) < 0.01
    assert over_fixed(gain=(0.0, 0.0), loss=(0.0, 0.0)) == pytest.approx(0.0, abs=1e-12)


def test_shoppers_without_a_reference_are_those_of_logit_pricing():
    shop, plain = ReferencePricing(gain=(0.0, 0.0), loss=(0.0, 0.0)), LogitPricing()
    tasks = tasks_of(shop, 100)
    market = plain.from_uniforms(tasks.id, shop._uniforms(tasks.id, 0)[:, [0, 1, 2, 5]])
    assert torch.allclose(shop.oracle_return(tasks), plain.oracle_return(market))
    assert torch.equal(play(shop, tasks, always(shop, tasks, 4))[0], play(plain, market, always(plain, market, 4))[0])


def test_what_is_seen_of_the_reference_is_the_average_of_posted_prices():
    shop = ReferencePricing()
    tasks = tasks_of(shop, 4)
    posted = [3, 9, 0, 5] * 4
    _, states, _ = play(shop, tasks, lambda o, day: torch.full((4, 1), posted[day]))
    reference = shop.first_reference
    for day, state in enumerate(states):
        reference = shop.memory * reference + (1 - shop.memory) * shop.markups[posted[day]]
        assert shop.observe(tasks, state)[0, 0, 5].item() == pytest.approx(reference)


# --------------------------------------------------------------------------------------------------- competitor
def test_competitor_is_an_autoregressive_chain():
    """Rouwenhorst's chain has the correlation and the spread of the AR(1) exactly, and its long-run shares."""
    for states, memory in ((2, 0.3), (7, 0.8), (9, -0.4)):
        shop = CompetitorPricing(competitor_states=states, competitor_memory=memory)
        moves, share = np.array(shop.competitor_moves), np.array(shop.competitor_share)
        point = np.log(shop.competitor_markups) - np.log(shop.competitor_mean)
        assert np.allclose(moves.sum(1), 1) and np.allclose(share @ moves, share) and (moves >= 0).all()
        assert np.allclose(moves @ point, memory * point, atol=1e-12)
        assert (share * point**2).sum() == pytest.approx(shop.competitor_spread**2)


def test_competitor_moves_by_its_chain():
    shop = CompetitorPricing()
    tasks = tasks_of(shop, 2000)
    _, states, _ = play(shop, tasks, always(shop, tasks, 3, 5), episodes=5)
    place = torch.stack([s.competitor for s in states])  # (T, M, N)
    before, after = place[:-1].flatten(), place[1:].flatten()
    count = torch.zeros(7, 7).index_put_((before, after), torch.ones(len(before)), accumulate=True)
    expected = torch.tensor(shop.competitor_moves) * count.sum(1, keepdim=True)
    assert ((count - expected).abs() < 5 * expected.sqrt() + 5).all()
    days = torch.bincount(place.flatten(), minlength=7) / place.numel()
    assert torch.allclose(days, torch.tensor(shop.competitor_share), atol=0.02)


def test_best_reply_to_todays_competitor_is_optimal():
    """Dynamic programming over (day, competitor's price), which may look ahead, gains nothing."""
    shop = CompetitorPricing()
    tasks = tasks_of(shop, 200)
    profit, moves = shop.daily_profit(tasks), torch.tensor(shop.competitor_moves)
    value = torch.zeros(200, 7)
    for day in reversed(range(shop.days)):
        value = (shop.weekday[day % 7] * profit + (value @ moves.T)[..., None]).amax(-1)
    expected = value @ torch.tensor(shop.competitor_share)
    assert torch.allclose(shop.oracle_return(tasks), expected, rtol=1e-12)
    assert (profit.argmax(-1).amax(-1) > profit.argmax(-1).amin(-1)).double().mean() > 0.5  # the reply really moves


def test_a_competitor_without_customers_is_none():
    shop, plain = CompetitorPricing(), LogitPricing()
    tasks = tasks_of(shop, 100)
    alone = tasks._replace(rival=torch.full((100,), -60.0))
    market = LogitPricing(prior=shop.prior).from_uniforms(tasks.id, shop._uniforms(tasks.id, 0)[:, [0, 1, 2, 4]])
    alone = alone._replace(utility=market.utility)
    assert torch.allclose(shop.oracle_return(alone), plain.oracle_return(market))
    at_median = share_of(tasks, torch.full((100, 1), 1.7), torch.full((100, 1), shop.competitor_mean))
    assert torch.allclose(at_median, purchase_probability(market, torch.full((100, 1), 1.7)))
    alone = alone._replace(utility=tasks.utility)
    assert (shop.oracle_return(tasks) < shop.oracle_return(alone)).all()
    m, k = torch.tensor([[1.3]]), torch.tensor([[1.7]])
    task = take(tasks, slice(0, 1))
    weight = [
        float(x) for x in ((task.utility - task.sensitivity * 1.3).exp(), (task.rival - task.sensitivity * 1.7).exp())
    ]
    assert share_of(task, m, k).item() == pytest.approx(weight[0] / (1 + sum(weight)))


# ------------------------------------------------------------------------------------------------- finite stock
def test_fine_days_approach_the_closed_form_of_gallego_and_van_ryzin():
    """Demand a exp(-p) at price p, n units, time 1, a = 12: J*(n) = log sum_{i <= n} (a / e)^i / i! (Gallego and van
    Ryzin 1994). The recursion on days of length h falls short by O(h): the gap halves with the step. (With
    one unit left a price that is kept for a day loses less, O(h^2).)"""
    units, scale = 8, 12.0
    exact = np.log(np.cumsum([(scale / np.e) ** i / np.prod(np.arange(1, i + 1)) for i in range(units + 1)]))
    price = torch.linspace(0.5, 6.0, 1101)
    gaps = []
    for days in (25, 50, 100):
        rate = (scale / days * (-price).exp()).expand(days, 1, -1)
        gaps.append(exact - action_values(rate, price[None], units + 1)[0, 0].amax(-1).numpy())
    assert (gaps[-1][1:] > 0).all() and np.abs(gaps[-1] / exact.clip(1e-9))[1:].max() < 0.02
    for coarse, fine in zip(gaps, gaps[1:]):
        assert np.allclose(fine[2:] / coarse[2:], 0.5, atol=0.03) and fine[1] < 0.5 * coarse[1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogitPricing(changes_per_week=-1), "LogitPricing.changes_per_week = -1"),
        (lambda: LogitPricing(changes_per_week=1, stock=5), "LogitPricing.stock = 5; allowed: None with a limit"),
        (lambda: MNLPricing(products=0), "MNLPricing.products = 0"),
        (lambda: MNLPricing(margins=(0.0, 1.0)), "MNLPricing.margins = .*positive"),
        (lambda: MNLPricing(days=0), "days = 0"),
        (lambda: ReferencePricing(memory=1.0), "ReferencePricing.memory = 1.0"),
        (lambda: ReferencePricing(first_reference=9.0), "ReferencePricing.first_reference = 9.0"),
        (lambda: ReferencePricing(gain=(2.0, 1.0)), "ReferencePricing.gain"),
        (lambda: CompetitorPricing(competitor_memory=1.0), "CompetitorPricing.competitor_memory = 1.0"),
        (lambda: CompetitorPricing(competitor_states=1), "CompetitorPricing.competitor_states = 1"),
    ],
)
def test_bad_settings_name_field_value_and_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()
