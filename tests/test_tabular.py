"""The shop and its exact solvers: tables, protocol, references against brute force, errors."""

from itertools import product

import numpy as np
import pytest
import torch

from ecomlib import noise
from ecomlib.families.base import sample_tasks, split, take
from ecomlib.families.tabular import (
    ACTIONS,
    STATES,
    BayesAdaptive,
    ShopMDP,
    TabularState,
    TabularTasks,
    blind_plan,
    finite_horizon,
    policy_evaluation,
    policy_iteration,
    value_iteration,
)

SHOPS = [ShopMDP(), ShopMDP(horizon=1), ShopMDP(horizon=9, discount_cost=0.0), ShopMDP(leave=0.5, annoyance=0.3)]


def shoppers(shop, count, seed=0):
    return sample_tasks(shop, count, torch.Generator().manual_seed(seed))


def play(shop, tasks, replicas, seed=0, rule=None):
    """Rewards, states and dones, each (T, M, N), of a rule (S,) of actions, or of actions drawn by a hash."""
    replica = torch.arange(replicas)
    draw = lambda t, stream: noise.uniform(seed, tasks.id, replica, 0, t, stream, 1)
    state, steps, alive = shop.reset(tasks, replicas, draw(shop.horizon, noise.FAMILY)), [], True
    for t in range(shop.horizon):
        action = (3 * draw(t, noise.POLICY)[..., 0]).long() if rule is None else rule[state.state]
        state, reward, done = shop.step(tasks, state, action, draw(t, noise.FAMILY))
        steps.append((reward * alive, state.state, done))
        alive = alive * ~done
    return tuple(map(torch.stack, zip(*steps)))


def rule_return(shop, tasks, rule):
    policy = torch.eye(len(ACTIONS))[torch.tensor((*rule, 0, 0))]
    return (tasks.start * (policy * finite_horizon(tasks, shop.horizon, policy=policy)[0]).sum(-1)).sum(-1)


# ------------------------------------------------------------------------------------------------ the tables
@pytest.mark.parametrize("shop", [*SHOPS, ShopMDP().shifted()])
def test_rows_are_probabilities(shop):
    tasks = shoppers(shop, 500)
    assert (tasks.transition >= 0).all()
    assert torch.allclose(tasks.transition.sum(-1), torch.ones(()), atol=1e-14)
    assert torch.allclose(tasks.start.sum(-1), torch.ones(()), atol=1e-14)


def test_table_of_one_shopper_by_hand():
    """Interest 0.5, openness 0.4, thrift 0.8: the numbers of the chapter's description, worked out by hand."""
    table = ShopMDP().shopper(0.5, 0.4, 0.8).transition[0]
    browse, consider, cart, bought, left = range(5)
    wait, recommend, discount = range(3)
    annoyed = 0.08 + 0.12 * 0.6
    assert table[browse, wait, consider].item() == pytest.approx(0.25 * 0.92)
    assert table[browse, recommend, consider].item() == pytest.approx((0.25 + 0.16) * (1 - annoyed))
    assert table[consider, discount, cart].item() == pytest.approx((0.25 + 0.12) * 0.92)
    assert table[cart, discount, bought].item() == pytest.approx((0.25 + 0.4) * 0.92)
    assert table[cart, recommend, bought].item() == pytest.approx(0.25 * (1 - annoyed))
    assert table[consider, recommend, left].item() == pytest.approx(annoyed)
    assert table[cart, wait, cart].item() == pytest.approx(0.75 * 0.92)
    reward = ShopMDP().shopper(0.5, 0.4, 0.8).reward[0]
    assert reward[cart, wait, bought] == 1 and reward[cart, discount, bought].item() == pytest.approx(0.7)
    assert reward.count_nonzero() == 3


def test_what_a_merchant_can_do_and_what_she_cannot():
    """Bought and left are final; more interest, openness or thrift never hurts the oracle."""
    tasks = shoppers(ShopMDP(), 100)
    for final in (3, 4):
        assert (tasks.transition[:, final, :, final] == 1).all()
    shop = ShopMDP()
    for k in range(3):
        low, high = [0.3, 0.3, 0.3], [0.3, 0.3, 0.3]
        high[k] = 0.6
        assert shop.oracle_return(shop.shopper(*high)) >= shop.oracle_return(shop.shopper(*low))


# ------------------------------------------------------------------------------------------------ the protocol
def test_shapes_and_types():
    shop = ShopMDP()
    tasks = shoppers(shop, 7)
    state = shop.reset(tasks, 3, torch.full((7, 3, 1), 0.5))
    assert shop.observe(tasks, state).shape == (7, 3, shop.observation_size)
    assert shop.context(tasks).shape == (7, 0)
    state, reward, done = shop.step(tasks, state, torch.ones(7, 3, dtype=torch.int64), torch.full((7, 3, 1), 0.5))
    assert reward.shape == done.shape == state.state.shape == (7, 3)
    assert reward.dtype == torch.float64 and done.dtype == torch.bool
    assert shop.oracle_return(tasks).shape == shop.blind_return(tasks).shape == (7,)


def test_reset_never_changes_the_task_and_an_id_is_a_task():
    shop = ShopMDP()
    tasks = shoppers(shop, 50)
    before = [field.clone() for field in tasks]
    play(shop, tasks, 4)
    for field, kept, again in zip(tasks, before, shop.tasks(tasks.id)):
        assert torch.equal(field, kept) and torch.equal(field, again)


def test_observation_holds_no_hidden_parameter():
    """Different shoppers in the same state at the same time look the same, and the same before the first step."""
    shop = ShopMDP()
    tasks = shoppers(shop, 200)
    for place, time in product(range(5), range(shop.horizon)):
        state = TabularState(torch.full((200, 2), place), torch.full((200, 2), time))
        seen = shop.observe(tasks, state)
        assert (seen == seen[:1]).all()
        assert seen[0, 0, place] == 1 and seen[0, 0, :5].sum() == 1
    assert (tasks.transition[1:] != tasks.transition[:1]).any(-1).any(-1).any(-1).all()  # and yet they differ


@pytest.mark.parametrize("batch", [8, 4096])
def test_a_task_has_the_same_luck_in_any_batch(batch):
    shop = ShopMDP()
    _, tasks = split(shop, "test", batch)
    alone = [field[:, :1] for field in play(shop, take(tasks, slice(5, 6)), 3)]
    together = [field[:, 5:6] for field in play(shop, tasks, 3)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    assert shop.oracle_return(tasks)[5] == shop.oracle_return(take(tasks, slice(5, 6)))[0]


def test_steps_follow_the_table():
    """Frequencies of 200,000 steps from the cart against the row of the table; the session ends where it should."""
    shop = ShopMDP()
    tasks, count = shop.shopper(0.5, 0.4, 0.8), 200_000
    for action in range(3):
        start = TabularState(torch.full((1, count), 2), torch.zeros(1, count, dtype=torch.int64))
        uniforms = noise.uniform(action, tasks.id, torch.arange(count), 0, 0, noise.FAMILY, 1)
        state, reward, done = shop.step(tasks, start, torch.full((1, count), action), uniforms)
        row = tasks.transition[0, 2, action]
        share = torch.bincount(state.state[0], minlength=5) / count
        assert ((share - row).abs() <= 4.5 * (row * (1 - row) / count).sqrt()).all()
        assert torch.equal(done, state.state >= 3)
        assert torch.equal(reward, tasks.reward[0, 2, action][state.state])
    # The last step ends the session wherever the shopper is; the one before does not.
    for time, ends in ((shop.horizon - 1, True), (shop.horizon - 2, False)):
        browsing = TabularState(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), time))
        state, _, done = shop.step(tasks, browsing, torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1, 1), 0.01))
        assert state.state.item() == 0 and done.item() == ends


def test_step_compiles_without_a_graph_break():
    shop = ShopMDP(horizon=2)
    tasks = shoppers(shop, 8)
    state = shop.reset(tasks, 2, torch.full((8, 2, 1), 0.5))
    action, uniforms = torch.ones(8, 2, dtype=torch.int64), torch.linspace(0.01, 0.99, 16).view(8, 2, 1)
    compiled = torch.compile(shop.step, fullgraph=True, backend="aot_eager")(tasks, state, action, uniforms)
    plain = shop.step(tasks, state, action, uniforms)
    assert torch.equal(compiled[0].state, plain[0].state) and torch.equal(compiled[1], plain[1])


# ------------------------------------------------------------------------------------------ oracle and blind policy
@pytest.mark.parametrize("shop", SHOPS)
def test_blind_lies_between_every_stationary_rule_and_the_oracle(shop):
    tasks, prior = shoppers(shop, 300), shop.prior_sample(4096)
    oracle, blind = shop.oracle_return(tasks), shop.blind_return(tasks)
    assert (blind <= oracle + 1e-12).all()
    for rule in product(range(3), repeat=3):
        assert (rule_return(shop, tasks, rule) <= oracle + 1e-12).all()
        assert rule_return(shop, prior, rule).mean() <= shop.blind_return(prior).mean() + 1e-12


def test_blind_plan_is_the_best_of_all_plans():
    """A session of 3 steps: every table of the 6 entries that a session can meet, 729 of them, on the same shoppers."""
    shop = ShopMDP(horizon=3)
    prior = shop.prior_sample(4096)
    best = -1.0
    for first, *late in product(range(3), repeat=6):
        plan = [(first, 0, 0), (late[0], late[1], 0), (late[2], late[3], late[4])]
        value = torch.zeros_like(prior.start)
        for actions in reversed(plan):
            chosen = torch.eye(3)[torch.tensor((*actions, 0, 0))]
            value = (chosen * (prior.transition * (prior.reward + value[:, None, None])).sum(-1)).sum(-1)
        best = max(best, value[:, 0].mean().item())
    assert shop.blind_return(prior).mean().item() == pytest.approx(best, rel=1e-12)


def test_blind_plan_uses_the_time():
    """On the default shop the best plan is worth clearly more than the best rule that ignores the step."""
    shop = ShopMDP()
    prior = shop.prior_sample(1024)
    rules = [rule_return(shop, prior, rule).mean().item() for rule in product(range(3), repeat=3)]
    assert shop.blind_return(prior).mean().item() > 1.03 * max(rules)


def test_blind_return_against_simulation():
    """The plan's exact returns on 20 shoppers against 20,000 sessions of each."""
    shop = ShopMDP()
    tasks, plan, replica = shoppers(shop, 20), blind_plan(shop), torch.arange(20_000)
    state = shop.reset(tasks, 20_000, torch.full((20, 20_000, 1), 0.5))
    earned, alive = torch.zeros(20, 20_000), torch.ones(20, 20_000)
    for step in range(shop.horizon):
        uniforms = noise.uniform(0, tasks.id, replica, 0, step, noise.FAMILY, 1)
        state, reward, done = shop.step(tasks, state, plan[step][state.state], uniforms)
        earned, alive = earned + reward * alive, alive * ~done
    error = earned.std(1) / 20_000**0.5
    assert ((earned.mean(1) - shop.blind_return(tasks)).abs() < 4.5 * error).all()


def test_oracle_against_all_time_dependent_plans():
    """A session of 2 steps started in the cart or one step before: every plan (time, state) -> action, 729 of them."""
    shop = ShopMDP(horizon=2)
    tasks = shoppers(shop, 5)
    value = finite_horizon(tasks, 2)[0].amax(-1)
    best = torch.full_like(value[:, :3], -1.0)
    for plan in product(range(3), repeat=6):
        late = torch.eye(3)[torch.tensor((*plan[3:], 0, 0))]
        early = torch.eye(3)[torch.tensor((*plan[:3], 0, 0))]
        last = (late * (tasks.transition * tasks.reward).sum(-1)).sum(-1)
        first = (early * (tasks.transition * (tasks.reward + last[:, None, None])).sum(-1)).sum(-1)
        best = torch.maximum(best, first[:, :3])
    assert torch.allclose(best, value[:, :3], atol=1e-14)


def test_shifted_shoppers_are_worth_less():
    shop = ShopMDP()
    moved, tasks = split(shop, "shifted", 1000)
    assert moved.leave == 0.16 and moved != shop
    assert moved.oracle_return(tasks).mean() < shop.oracle_return(split(shop, "test", 1000)[1]).mean()


# ------------------------------------------------------------------------------------------------ solvers
def test_discounted_solvers_agree_on_a_batch():
    tasks = shoppers(ShopMDP(), 200)
    value, changes = value_iteration(tasks, 0.9, tolerance=1e-13)
    by_policies, actions, rounds = policy_iteration(tasks, 0.9)
    assert torch.allclose(value, by_policies, atol=1e-11) and rounds <= 10
    greedy = policy_evaluation(tasks, torch.eye(3)[actions], 0.9)
    assert torch.allclose(greedy, value, atol=1e-11)
    assert changes[-1] < 1e-13 <= changes[-2]


def test_policy_iteration_survives_ties():
    """All actions alike: the first policy is optimal and must not be exchanged for ever."""
    tasks = shoppers(ShopMDP(), 10)
    same = tasks._replace(
        transition=tasks.transition[:, :, :1].expand(-1, -1, 3, -1), reward=torch.zeros_like(tasks.reward)
    )
    value, actions, rounds = policy_iteration(same, 0.95)
    assert rounds == 1 and (actions == 0).all() and (value == 0).all()


def two_kinds():
    shop = ShopMDP()
    rows = zip(shop.shopper(0.5, 0.6, 0.0), shop.shopper(0.5, 0.6, 1.0))
    return shop, TabularTasks(*map(torch.cat, rows))


def test_certain_belief_is_the_oracle_and_no_belief_is_better():
    shop, tasks = two_kinds()
    solver, oracle = BayesAdaptive(tasks, shop.horizon, episodes=2), 2 * shop.oracle_return(tasks).numpy()
    for k, belief in enumerate(np.eye(2)):
        assert abs(solver.value(0, 0, belief) - oracle[k]) < 1e-10
    values = [solver.value(0, 0, np.array([1 - p, p])) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values[2] < (oracle[0] + oracle[1]) / 2 - 0.01  # not knowing costs something
    assert (np.diff(values, 2) > -1e-10).all()  # convex
    best_rule = max(rule_return(shop, tasks, rule).mean().item() for rule in product(range(3), repeat=3))
    assert values[2] >= 2 * best_rule


def test_evaluation_of_a_rule_is_exact():
    shop, tasks = two_kinds()
    solver, belief = BayesAdaptive(tasks, shop.horizon, episodes=2), np.array([0.7, 0.3])
    rule = (1, 1, 2)
    fixed = lambda step, state, b: np.eye(3)[(*rule, 0, 0)[state]]
    earned = solver.evaluate(fixed, belief)
    assert earned.shape == (2, 12)
    expected = rule_return(shop, tasks, rule).numpy()
    assert np.allclose(earned[:, :6].sum(1), expected, atol=1e-12)
    assert np.allclose(earned[:, 6:].sum(1), expected, atol=1e-12)
    optimal = lambda step, state, b: np.eye(3)[solver.action_values(step, state, b).argmax()]
    assert abs(belief @ solver.evaluate(optimal, belief).sum(1) - solver.value(0, 0, belief)) < 1e-9


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "field, value",
    [
        ("horizon", 0),
        ("horizon", 2.5),
        ("discount_cost", -0.1),
        ("discount_cost", 1.1),
        ("leave", 1.0),
        ("leave", -0.01),
        ("annoyance", 0.92),
        ("annoyance", -0.1),
    ],
)
def test_bad_configuration_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"{field} = {value}"):
        ShopMDP(**{field: value})


def test_bad_arguments_are_named():
    shop, tasks = two_kinds()
    for name in ("interest", "openness", "thrift"):
        with pytest.raises(ValueError, match=f"{name} = 1.5"):
            shop.shopper(**{**{"interest": 0.5, "openness": 0.5, "thrift": 0.5}, name: 1.5})
    for solver in (value_iteration, policy_iteration, lambda t, d: policy_evaluation(t, torch.ones(2, 5, 3) / 3, d)):
        for discount in (1.0, -0.1):
            with pytest.raises(ValueError, match=f"discount = {discount}"):
                solver(tasks, discount)
    with pytest.raises(ValueError, match="start"):
        BayesAdaptive(tasks._replace(start=torch.eye(5)[[0, 1]]), 3)
    with pytest.raises(ValueError, match="start"):
        BayesAdaptive(tasks._replace(start=torch.full((2, 5), 0.2)), 3)
    with pytest.raises(ValueError, match="reward"):
        BayesAdaptive(tasks._replace(reward=torch.rand(2, 5, 3, 5)), 3)


def test_states_and_actions_have_names():
    assert len(STATES) == ShopMDP().observation_size - 1 and len(ACTIONS) == ShopMDP().actions
