"""Equations of chapter "MDP formulation", both sides: against simulation, enumeration or brute force."""

from itertools import product

import numpy as np
import pytest
import torch

from ecomlib.families.base import sample_tasks
from ecomlib.families.tabular import (
    BayesAdaptive,
    ShopMDP,
    TabularTasks,
    belief_update,
    finite_horizon,
    policy_evaluation,
    policy_iteration,
    value_iteration,
)
from ecomlib.policies import CategoricalMLP
from ecomlib.returns import reward_to_go
from ecomlib.rollout import rollout


def random_tasks(tasks, states, actions, seed, same_reward=False):
    """Dense random processes: every transition possible, rewards of both signs."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
    transition = rand(tasks, states, actions, states) ** 2 + 1e-3
    reward = 2 * rand(1 if same_reward else tasks, states, actions, states) - 1
    return TabularTasks(
        torch.arange(tasks),
        transition / transition.sum(-1, keepdim=True),
        reward.expand_as(transition).contiguous(),
        torch.eye(states, dtype=torch.float64)[:1].expand(tasks, -1).contiguous(),
    )


def arrays(tasks, task=0):
    return tasks.transition[task].numpy(), tasks.reward[task].numpy()


def random_policy(tasks, states, actions, seed):
    probability = torch.rand(tasks, states, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return probability / probability.sum(-1, keepdim=True)


def test_return_is_recursive():
    """(eq-return): the discounted sum, term by term, and the recursion."""
    rewards, discount = np.random.default_rng(0).normal(size=12), 0.9
    sums = [sum(discount ** (k - t) * rewards[k] for k in range(t, 12)) for t in range(12)]
    assert np.allclose(reward_to_go(torch.tensor(rewards), discount).numpy(), sums, rtol=1e-13)
    assert np.allclose(sums[:-1], rewards[:-1] + discount * np.array(sums[1:]), rtol=1e-13)


def test_bellman_expectation_against_simulated_sessions():
    """(eq-bellman-expectation): the right side by loops; the left by 20,000 simulated sessions."""
    discount, states, actions = 0.8, 4, 3
    tasks, policy = random_tasks(1, states, actions, 1), random_policy(1, states, actions, 2)
    value = policy_evaluation(tasks, policy, discount)[0].numpy()
    transition, reward = arrays(tasks)
    pi = policy[0].numpy()
    for s in range(states):
        right = sum(
            pi[s, a] * transition[s, a, t] * (reward[s, a, t] + discount * value[t])
            for a in range(actions)
            for t in range(states)
        )
        assert abs(right - value[s]) < 1e-12
    generator, sessions, steps = np.random.default_rng(3), 20_000, 100  # 0.8^100 is below 1e-9
    for first in range(states):
        state, total = np.full(sessions, first), np.zeros(sessions)
        for t in range(steps):
            action = (generator.random(sessions)[:, None] > pi[state].cumsum(1)).sum(1).clip(max=actions - 1)
            following = (generator.random(sessions)[:, None] > transition[state, action].cumsum(1)).sum(1)
            following = following.clip(max=states - 1)
            total += discount**t * reward[state, action, following]
            state = following
        assert abs(total.mean() - value[first]) < 4.5 * total.std() / np.sqrt(sessions)


def test_matrix_form_against_summed_rewards():
    """(eq-bellman-matrix): one solve equals the sum over k of discount^k (P^pi)^k r^pi, for every task of a batch."""
    discount, tasks, policy = 0.9, random_tasks(3, 5, 2, 4), random_policy(3, 5, 2, 5)
    solved = policy_evaluation(tasks, policy, discount).numpy()
    for task in range(3):
        transition, reward = arrays(tasks, task)
        pi = policy[task].numpy()
        under = np.array([[pi[s] @ transition[s, :, t] for t in range(5)] for s in range(5)])
        mean = np.array([sum(pi[s, a] * transition[s, a] @ reward[s, a] for a in range(2)) for s in range(5)])
        total, term = np.zeros(5), mean
        for _ in range(400):
            total, term = total + term, discount * under @ term
        assert np.allclose(solved[task], total, atol=1e-12)


def test_optimality_against_all_deterministic_policies():
    """(eq-bellman-optimality): V* solves it, and no deterministic policy is better anywhere; both algorithms agree."""
    discount, states, actions = 0.9, 4, 3
    tasks = random_tasks(2, states, actions, 6)
    value, _ = value_iteration(tasks, discount)
    by_policies, chosen, _ = policy_iteration(tasks, discount)
    assert torch.allclose(value, by_policies, atol=1e-10)
    every = [
        policy_evaluation(tasks, torch.eye(actions)[torch.tensor(rule)].expand(2, -1, -1), discount)
        for rule in product(range(actions), repeat=states)
    ]
    assert len(every) == actions**states
    assert torch.allclose(value, torch.stack(every).amax(0), atol=1e-10)
    for task in range(2):
        transition, reward = arrays(tasks, task)
        for s in range(states):
            brackets = [
                sum(transition[s, a, t] * (reward[s, a, t] + discount * value[task, t].item()) for t in range(states))
                for a in range(actions)
            ]
            assert abs(max(brackets) - value[task, s].item()) < 1e-10
            assert int(np.argmax(brackets)) == chosen[task, s].item()


def test_contraction_on_random_tables():
    """(eq-contraction): for 2,000 pairs of tables; with equality when they differ by a constant."""
    discount, states, actions = 0.85, 4, 3
    transition, reward = arrays(random_tasks(1, states, actions, 7))
    sweep = lambda v: (transition * (reward + discount * v)).sum(-1).max(-1)  # B V
    generator, closest = np.random.default_rng(8), 0.0
    for _ in range(2000):
        v, u = generator.normal(size=(2, states))
        ratio = np.abs(sweep(v) - sweep(u)).max() / np.abs(v - u).max()
        assert ratio <= discount + 1e-12
        closest = max(closest, ratio)
    assert closest > 0.5  # the bound is not idle
    assert np.allclose(sweep(v + 3.0) - sweep(v), 3.0 * discount, rtol=1e-12)
    # The library's changes from sweep to sweep shrink at least as fast.
    _, changes = value_iteration(random_tasks(1, states, actions, 7), discount)
    assert all(after <= discount * before + 1e-14 for before, after in zip(changes, changes[1:]))


def test_backward_induction_against_all_policies_and_trajectories():
    """(eq-backward-induction): best of all 64 time-dependent policies, each by enumerating its trajectories."""
    states, actions, horizon = 2, 2, 3
    tasks = random_tasks(1, states, actions, 9)
    transition, reward = arrays(tasks)

    def expected_return(policy, first):
        total = 0.0
        for path in product(range(states), repeat=horizon):
            probability, earned, state = 1.0, 0.0, first
            for t, following in enumerate(path):
                action = policy[t * states + state]
                probability *= transition[state, action, following]
                earned += reward[state, action, following]
                state = following
            total += probability * earned
        return total

    policies = list(product(range(actions), repeat=states * horizon))
    solved = finite_horizon(tasks, horizon)[0, 0].amax(-1)
    for first in range(states):
        assert abs(max(expected_return(policy, first) for policy in policies) - solved[first].item()) < 1e-12
    # A given policy is evaluated, not improved.
    rule = random_policy(1, states, actions, 10)
    given = (rule * finite_horizon(tasks, horizon, policy=rule)[0]).sum(-1)
    assert (given < solved).all()


def test_task_objective_against_simulated_shoppers():
    """(eq-task-objective): 20,000 fresh shoppers, one session each, against exact returns of other shoppers."""
    shop, policy = ShopMDP(), CategoricalMLP((6, 3))
    preference = torch.zeros(6, 3)
    preference[:3] = torch.tensor([[0.0, 1.0, 0.5], [0.3, 0.8, 0.0], [0.0, -0.5, 1.0]])
    fresh = sample_tasks(shop, 20_000, torch.Generator().manual_seed(11))
    earned = rollout(shop, fresh, policy, [preference, torch.zeros(1, 3)], 1, seed=12).returns[:, 0]
    probability = torch.softmax(torch.cat((preference[:3], torch.zeros(2, 3))), -1)
    others = shop.prior_sample(4096)  # quasi-random: its own error is far below the simulation's
    value = (probability * finite_horizon(others, shop.horizon, policy=probability)[0]).sum(-1)
    exact = (others.start * value).sum(-1).mean()
    assert abs(earned.mean() - exact) < 4.5 * earned.std() / len(earned) ** 0.5


def test_blind_never_beats_oracle():
    """(eq-blind-oracle): over all 27 rules; strict with different shoppers, equal when all are the same shopper."""
    shop = ShopMDP()

    def both_sides(tasks):
        returns = []
        for rule in product(range(3), repeat=3):
            policy = torch.eye(3)[torch.tensor((*rule, 0, 0))]
            value = (policy * finite_horizon(tasks, shop.horizon, policy=policy)[0]).sum(-1)
            returns.append((tasks.start * value).sum(-1))
        returns = torch.stack(returns)  # (27, M)
        return returns.mean(1).max().item(), returns.amax(0).mean().item()

    left, right = both_sides(sample_tasks(shop, 500, torch.Generator().manual_seed(13)))
    assert left < right - 0.01
    same = shop.shopper(0.4, 0.3, 0.8)
    left, right = both_sides(TabularTasks(*(field.repeat_interleave(5, 0) for field in same)))
    assert abs(left - right) < 1e-14


def test_belief_update_against_counted_shoppers():
    """(eq-belief-update): 200,000 shoppers of three kinds; among those who did the same, count the kinds."""
    tasks, prior = random_tasks(3, 4, 2, 14), np.array([0.5, 0.3, 0.2])
    state, action = 1, 0
    generator, shoppers = np.random.default_rng(15), 200_000
    kind = generator.choice(3, size=shoppers, p=prior)
    chances = tasks.transition[:, state, action].numpy()
    following = (generator.random(shoppers)[:, None] > chances[kind].cumsum(1)).sum(1).clip(max=3)
    for seen in range(4):
        updated = belief_update(tasks, torch.tensor(prior), state, action, seen).numpy()
        counted = np.bincount(kind[following == seen], minlength=3) / (following == seen).sum()
        error = np.sqrt(updated * (1 - updated) / (following == seen).sum())
        assert (np.abs(updated - counted) < 4.5 * error).all()
    # Step by step or all at once: the same posterior, in any order.
    steps = [(0, 1, 2), (2, 0, 3), (3, 1, 0), (0, 0, 0)]
    likelihood = np.prod([tasks.transition[:, s, a, t].numpy() for s, a, t in steps], 0)
    for order in (steps, steps[::-1]):
        belief = torch.tensor(prior)
        for step in order:
            belief = belief_update(tasks, belief, *step)
        assert np.allclose(belief.numpy(), prior * likelihood / (prior @ likelihood), rtol=1e-12)


def plans(horizon, states, actions):
    """Every deterministic plan that may depend on the whole history: (action, one plan for each next state)."""
    if horizon == 0:
        return [()]
    return [
        (action, later)
        for action in range(actions)
        for later in product(plans(horizon - 1, states, actions), repeat=states)
    ]


def plan_return(plan, transition, reward, state, start, ends, step=0):
    """Expected return of a plan in a known task, by its tree; ``ends`` says after which steps a session ends."""
    if not plan:
        return 0.0
    action, later = plan
    total = 0.0
    for following, probability in enumerate(transition[state, action]):
        after = start if ends(step) else following
        to_come = plan_return(later[following], transition, reward, after, start, ends, step + 1)
        total += probability * (reward[state, action, following] + to_come)
    return total


@pytest.mark.parametrize("horizon, episodes", [(3, 1), (1, 3)])
def test_bayes_adaptive_against_all_history_policies(horizon, episodes):
    """(eq-bayes-adaptive): the best of all 128 history-dependent plans. No belief is computed on that side."""
    states, actions = 2, 2
    tasks, prior = random_tasks(3, states, actions, 16, same_reward=True), np.array([0.5, 0.3, 0.2])
    ends = lambda step: (step + 1) % horizon == 0
    every = plans(3, states, actions)
    assert len(every) == 128
    returns = np.array([[plan_return(plan, *arrays(tasks, k), 0, 0, ends) for k in range(3)] for plan in every])
    solver = BayesAdaptive(tasks, horizon, episodes)
    assert abs((returns @ prior).max() - solver.value(0, 0, prior)) < 1e-12
    optimal = lambda step, state, belief: np.eye(actions)[solver.action_values(step, state, belief).argmax()]
    per_task = solver.evaluate(optimal, prior).sum(1)
    assert np.allclose(per_task, returns[(returns @ prior).argmax()], atol=1e-9)
