"""The point navigator against the published environment, its oracle and blind policy, and batches of transitions."""

import argparse
import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch.quasirandom import SobolEngine

from benchmarks import navigation
from ecomlib.families.base import sample_tasks, split, take
from ecomlib.families.navigation import Goals, PointNavigation
from ecomlib.learners import MAML, Inner, MAMLConfig, PPOStep, TRPOStep
from ecomlib.networks import GRU, MLP
from ecomlib.policies import Gaussian, per_task
from ecomlib.returns import linear_feature_advantage
from ecomlib.rollout import rollout, rollout_transitions
from ecomlib.surrogates import dice, ratio

FAMILY = PointNavigation()
POLICY = Gaussian(MLP((2, 16, 2), torch.relu), initial_std=0.7)


class ScalarPoint:
    """One point and one goal in plain Python, from the description of the published environment and its wrapper."""

    def __init__(self, goal):
        self.goal, self.at = goal, (0.0, 0.0)

    def step(self, action):
        low, high = -0.1, 0.1  # the box of actions; the wrapper maps [-1, 1] onto it and clips
        scaled = [min(max(low + (a + 1.0) * 0.5 * (high - low), low), high) for a in action]
        self.at = (self.at[0] + scaled[0], self.at[1] + scaled[1])
        dx, dy = self.at[0] - self.goal[0], self.at[1] - self.goal[1]
        return self.at, -math.hypot(dx, dy), abs(dx) < 0.01 and abs(dy) < 0.01


class Scripted:
    """Plays actions (T, M, N, 2), whatever it sees."""

    noise_size = 0

    def __init__(self, actions):
        self.actions = actions

    def act(self, parameters, observation, noise, memory):
        time = memory or 0
        return self.actions[time], torch.zeros(self.actions.shape[1:3]), time + 1


def towards_goal(tasks, noise=0.0, episodes=3):
    """(T, M, N, 2) actions that go straight to the goal from the start, plus noise: some arrive, some pass by."""
    steps = tasks.goal[:, None] / FAMILY.stride / 6 + torch.zeros(FAMILY.horizon, 1, episodes, 1)
    return steps + noise * torch.randn(steps.shape, generator=torch.Generator().manual_seed(1))


def goals(*pairs):
    return Goals(torch.arange(len(pairs)), torch.tensor(pairs))


# ------------------------------------------------------------------------------------------------ the environment
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_equals_the_published_environment(noise):
    """Positions, rewards and ends of 20 goals, under actions that stay inside the box and actions that are clipped."""
    tasks = take(FAMILY.test_goals(), slice(0, 20))
    actions = towards_goal(tasks, noise)
    data = rollout(FAMILY, tasks, Scripted(actions), [], 3, seed=0)
    for m, n in product(range(20), range(3)):
        point, alive = ScalarPoint(tasks.goal[m].tolist()), True
        for t in range(FAMILY.horizon):
            assert data.mask[t, m, n] == alive
            if not alive:
                assert data.reward[t, m, n] == 0
                continue
            assert data.observation[t, m, n].tolist() == pytest.approx(point.at, abs=1e-12)
            _, reward, done = point.step(actions[t, m, n].tolist())
            assert data.reward[t, m, n].item() == pytest.approx(reward, abs=1e-12)
            alive = not done
    if noise == 0:
        assert (data.mask.sum(0) <= 7).all()  # straight lines arrive
    if noise == 3:
        assert (actions.abs() > 1).any(-1).float().mean() > 0.5


def test_published_goals():
    """The first and last pairs that NumPy's generator gave in 2017 for seed 1."""
    tasks = FAMILY.test_goals()
    assert tasks.goal.shape == (40, 2) and tasks.goal.dtype == torch.float64
    assert tasks.goal[0].tolist() == pytest.approx([-0.0829779953, 0.2203244934], abs=1e-9)
    assert tasks.goal[1].tolist() == pytest.approx([-0.4998856252, -0.1976674274], abs=1e-9)
    assert (tasks.id < 0).all() and len(tasks.id.unique()) == 40
    assert tasks.goal.abs().max() <= 0.5
    # The return of a policy that stays at the start on these goals: the 2017 curves begin at -40.4.
    assert FAMILY.blind_return(tasks).mean().item() == pytest.approx(-40.08, abs=0.01)


def test_goals_fill_the_square_and_the_shifted_ring():
    tasks = sample_tasks(FAMILY, 5000, torch.Generator().manual_seed(0))
    for axis in range(2):
        assert kstest(tasks.goal[:, axis].numpy(), "uniform", (-0.5, 1)).pvalue > 1e-3
    angle = torch.atan2(tasks.goal[:, 0], tasks.goal[:, 1])
    assert abs(torch.corrcoef(tasks.goal.T)[0, 1]) < 4 / 5000**0.5 and (angle > 0).double().mean() == pytest.approx(
        0.5, abs=0.03
    )
    moved, tasks = split(FAMILY, "shifted", 5000)
    largest = tasks.goal.abs().amax(-1)
    assert moved == PointNavigation(inner=0.5, outer=0.75) and largest.min() > 0.5 and largest.max() < 0.75
    assert kstest(largest.numpy() ** 2, "uniform", (0.25, 0.3125)).pvalue > 1e-3  # area within a half-width
    for axis in range(2):
        assert (tasks.goal[:, axis] > 0).double().mean() == pytest.approx(0.5, abs=0.03)
    assert (tasks.goal[:, 0].abs() > tasks.goal[:, 1].abs()).double().mean() == pytest.approx(0.5, abs=0.03)


def test_shapes_and_what_is_seen():
    tasks = sample_tasks(FAMILY, 7, torch.Generator().manual_seed(0))
    state = FAMILY.reset(tasks, 3, torch.zeros(7, 3, 0))
    assert not state.position.any() and FAMILY.context(tasks).shape == (7, 0)
    action = torch.ones(7, 3, 2)
    state, reward, done = FAMILY.step(tasks, state, action, torch.zeros(7, 3, 0))
    seen = FAMILY.observe(tasks, state)
    assert seen.shape == (7, 3, 2) and (seen == 0.1).all()  # the same for all goals
    assert reward.shape == done.shape == (7, 3) and done.dtype == torch.bool and len(reward[:, 0].unique()) == 7
    late = state._replace(time=torch.full_like(state.time, FAMILY.horizon - 1))
    assert FAMILY.step(tasks, late, action, torch.zeros(7, 3, 0))[2].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_task_is_the_same_in_any_batch(dtype):
    torch.set_default_dtype(dtype)
    _, tasks = split(FAMILY, "test", 400)
    assert tasks.goal.dtype == dtype
    assert torch.equal(FAMILY.tasks(tasks.id[7:9]).goal, tasks.goal[7:9])
    alone = take(tasks, slice(7, 8))
    for function in (FAMILY.oracle_return, FAMILY.blind_return):
        assert function(tasks).dtype == dtype and torch.equal(function(tasks)[7:8], function(alone))
    actions = towards_goal(tasks, 0.3).to(dtype)
    together = rollout(FAMILY, tasks, Scripted(actions), [], 3, seed=0)
    single = rollout(FAMILY, alone, Scripted(actions[:, 7:8]), [], 3, seed=0)
    assert together.reward.dtype == dtype
    assert torch.equal(together.reward[:, 7:8], single.reward) and torch.equal(together.mask[:, 7:8], single.mask)


def test_both_precisions_have_the_same_goals():
    wide = split(FAMILY, "test", 100)[1].goal
    torch.set_default_dtype(torch.float32)
    assert torch.allclose(split(FAMILY, "test", 100)[1].goal.double(), wide, atol=1e-6)


def test_step_compiles_without_a_graph_break():
    tasks = take(FAMILY.test_goals(), slice(0, 4))
    state = FAMILY.reset(tasks, 2, torch.zeros(4, 2, 0))
    action = torch.linspace(-2, 2, 16).view(4, 2, 2)
    compiled = torch.compile(FAMILY.step, fullgraph=True, backend="aot_eager")
    found, plain = (step(tasks, state, action, torch.zeros(4, 2, 0)) for step in (compiled, FAMILY.step))
    assert torch.equal(found[0].position, plain[0].position) and torch.equal(found[1], plain[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *product(["horizon"], [0, 2.5, True, math.nan, "x"]),
        *product(["inner"], [-0.1, math.inf, True]),
        *product(["outer"], [0.0, math.nan, "x"]),
        *product(["stride", "tolerance"], [0.0, -1.0, math.inf, None]),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^PointNavigation\.{field} = .*; allowed: \S"):
        PointNavigation(**{field: value})


# ------------------------------------------------------------------------------------------ oracle and blind policy
@pytest.mark.parametrize("goal", [(0.3, 0.1), (-0.25, 0.4), (0.0, 0.0), (0.05, -0.5), (0.5, 0.5)])
@pytest.mark.parametrize("horizon", [3, 8])
def test_oracle_equals_dynamic_programming(goal, horizon):
    """On the grid of half strides, with every combination of half and whole moves: 1,681 positions, 25 actions.

    The goals lie on the grid, and there the best moves are whole or half ones, so the two optima are the same number.
    """
    family, grid = PointNavigation(horizon=horizon), np.arange(-20, 21)
    moves = list(product(range(-2, 3), repeat=2))
    value = np.zeros((41, 41))
    for _ in range(horizon):
        best = np.full((41, 41), -np.inf)
        for dx, dy in moves:
            x, y = np.clip(grid + dx, -20, 20), np.clip(grid + dy, -20, 20)
            away_x, away_y = 0.05 * x[:, None] - goal[0], 0.05 * y[None] - goal[1]
            over = (np.abs(away_x) < 0.01) & (np.abs(away_y) < 0.01)
            best = np.maximum(best, -np.hypot(away_x, away_y) + ~over * value[np.ix_(x + 20, y + 20)])
        value = best
    assert family.oracle_return(goals(goal)).item() == pytest.approx(value[20, 20], abs=1e-12)


def test_oracle_is_earned_by_going_straight():
    """And by no other of 200 policies; at an end inside the box the last reward is paid, none after it."""
    tasks = FAMILY.test_goals()
    away, actions = tasks.goal.clone(), []
    for _ in range(FAMILY.horizon):
        actions.append((away / FAMILY.stride).clamp(-1, 1))
        away = away - FAMILY.stride * actions[-1]
    best = torch.stack(actions)[:, :, None]
    earned = rollout(FAMILY, tasks, Scripted(best), [], 1, seed=0).returns[:, 0]
    assert torch.allclose(earned, FAMILY.oracle_return(tasks), atol=1e-12)
    others = best + 0.2 * torch.randn(FAMILY.horizon, 40, 200, 2, generator=torch.Generator().manual_seed(0))
    assert (rollout(FAMILY, tasks, Scripted(others), [], 200, seed=0).returns < earned[:, None]).all()
    near, wide = goals((0.305, 0.0)), goals((0.315, 0.0))
    assert FAMILY.oracle_return(near).item() == pytest.approx(-(0.205 + 0.105 + 0.005))
    assert FAMILY.oracle_return(wide).item() == pytest.approx(-(0.215 + 0.115 + 0.015))


def test_blind_stays():
    tasks = Goals(torch.arange(3), torch.tensor([[0.3, 0.4], [0.005, -0.009], [0.005, 0.011]]))
    still = rollout(FAMILY, tasks, Scripted(torch.zeros(FAMILY.horizon, 3, 1, 2)), [], 1, seed=0)
    assert torch.allclose(FAMILY.blind_return(tasks), still.returns[:, 0], atol=1e-12)
    assert still.mask.sum(0)[:, 0].tolist() == [100, 1, 100]


def prior(size):
    return Goals(torch.arange(size), SobolEngine(2, scramble=True, seed=0).draw(size, dtype=torch.float64) - 0.5)


def test_no_plan_gains_much_on_staying():
    """The bound of ``blind_return``: at step t, a plan has passed over at most t - 1 boxes. Whatever its position,
    removing the farthest goals from the mean distance, as many as fill those boxes, leaves at least 96 %."""
    goal, box = prior(2**14).goal, (2 * FAMILY.tolerance) ** 2
    ahead = torch.arange(FAMILY.horizon) * box * len(goal)
    least = torch.full((FAMILY.horizon,), torch.inf)
    for x, y in product(torch.linspace(0, 0.3, 16).tolist(), repeat=2):  # by symmetry, one quarter of the square
        distance = (goal - torch.tensor([x, y])).square().sum(-1).sqrt().sort().values.cumsum(0) / len(goal)
        least = torch.minimum(least, distance[(len(goal) - 1 - ahead.ceil()).long()])
    staying = FAMILY.blind_return(prior(2**14)).mean()
    assert -least.sum() <= 0.96 * staying


def test_plans_found_by_search_gain_less_than_a_thousandth():
    """Spirals that sweep the neighbourhood of the start, lines, and random walks, on fresh goals."""
    tasks = prior(512)
    time = torch.arange(1, FAMILY.horizon + 1)
    plans = []
    for width, turn in product((0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3), (0.3, 0.6, 1.0, 2.0)):
        radius, angle = width * (time / FAMILY.horizon).sqrt(), turn * time.sqrt() * 2
        plans.append(torch.stack((radius * angle.cos(), radius * angle.sin()), -1))
    walk = torch.randn(40, FAMILY.horizon, 2, generator=torch.Generator().manual_seed(0)).cumsum(1)
    plans += [scale * path / 100 for scale, path in zip((0.1, 0.3, 1.0, 2.0) * 10, walk)]
    moves = torch.diff(torch.stack(plans, 1), dim=0, prepend=torch.zeros(1, len(plans), 2)) / FAMILY.stride
    actions = moves[:, None].expand(-1, len(tasks.id), -1, -1)
    earned = rollout(FAMILY, tasks, Scripted(actions), [], len(plans), seed=0).returns.mean(0)
    assert earned.max() <= 0.999 * FAMILY.blind_return(tasks).mean()


# ----------------------------------------------------------------------------------- whole episodes up to a budget
@pytest.fixture
def tasks():
    # The first is out of reach, so that it has its transitions before the others do.
    return goals((30.0, 30.0), (0.1, 0.05), (0.02, 0.0), (-0.05, 0.1), (0.5, -0.5))


def drifting(tasks):
    """Parameters of one policy per task that walks roughly to its goal, so that episodes end at different times."""
    parameters = per_task(POLICY.initial(torch.Generator().manual_seed(0)), len(tasks.id))
    parameters = [p.detach().clone() for p in parameters]
    # A ReLU pair makes the identity on each coordinate: mean = 5 (goal - position).
    parameters[0][:], parameters[2][:] = 0.0, 0.0
    for axis, sign in product(range(2), (1, -1)):
        unit = 2 * axis + (sign < 0)
        parameters[0][:, axis, unit], parameters[2][:, unit, axis] = sign, -5.0 * sign
    parameters[3][:] = 5.0 * tasks.goal[:, None]
    return parameters


@pytest.mark.parametrize("shared", [False, True])
def test_whole_episodes_until_the_budget_is_reached(tasks, shared):
    """Those of ``rollout`` with the same replica numbers, in their order, up to the one that reaches the budget."""
    budget = 430
    parameters = drifting(tasks)
    parameters = [p[1] for p in parameters] if shared else parameters
    data = rollout_transitions(FAMILY, tasks, POLICY, parameters, budget, seed=3, episode=2)
    full = rollout(FAMILY, tasks, POLICY, parameters, data.mask.shape[2], seed=3, episode=2)
    counts = data.mask[0]
    length = data.mask.sum(0)
    for m in range(5):
        used = int(counts[m].sum())
        assert torch.equal(counts[m], (torch.arange(len(counts[m])) < used).to(counts))
        assert length[m].sum() >= budget > length[m, : used - 1].sum()
        assert torch.equal(length[m, :used], full.mask.sum(0)[m, :used])
    assert data.mask.shape[2] == counts.sum(1).max() and (shared or len(counts.sum(1).unique()) > 1)
    kept = data.mask.bool()
    for field in ("observation", "action", "log_prob", "reward"):
        found, wanted = getattr(data, field)[kept], getattr(full, field)[kept]
        assert torch.allclose(found, wanted, atol=1e-12) and found.abs().sum() > 0
    assert not data.reward[~kept].any()
    assert length.max() <= FAMILY.horizon and (length[counts.bool()].min() < 50)


def test_a_task_has_the_same_episodes_whatever_else_is_in_the_batch(tasks):
    data = rollout_transitions(FAMILY, tasks, POLICY, drifting(tasks), 300, seed=0)
    alone = take(tasks, slice(2, 3))
    single = rollout_transitions(FAMILY, alone, POLICY, drifting(alone), 300, seed=0)
    used = single.mask.shape[2]
    assert torch.equal(data.mask[:, 2:3, :used], single.mask) and not data.mask[:, 2, used:].any()
    assert torch.allclose(data.reward[:, 2:3, :used], single.reward, atol=1e-12)


@pytest.mark.parametrize(("budget", "episodes"), [(1, 1), (100, 1), (101, 2), (1000, 10)])
def test_full_episodes_need_no_spare_ones(budget, episodes):
    """A goal out of reach: every episode lasts 100 steps."""
    far = goals((30.0, 30.0), (-30.0, 0.0))
    data = rollout_transitions(FAMILY, far, POLICY, POLICY.initial(torch.Generator().manual_seed(0)), budget, seed=0)
    assert data.mask.shape == (100, 2, episodes) and data.mask.all()


def test_a_recurrent_policy_keeps_its_memory(tasks):
    """Memory moves with the episode it belongs to."""
    family = PointNavigation(tolerance=0.05)
    policy = Gaussian(GRU(2, 8, 2), initial_std=0.7)
    generator = torch.Generator().manual_seed(0)
    parameters = [p + 0.5 * torch.randn(p.shape, generator=generator) for p in policy.initial(generator)]
    parameters[-1] = torch.zeros(1, 2)
    near = goals((0.05, 0.05))
    data = rollout_transitions(family, near, policy, parameters, 2000, seed=0)
    full = rollout(family, near, policy, parameters, data.mask.shape[2], seed=0)
    kept = data.mask.bool()
    assert (data.mask.sum(0)[data.mask[0] > 0] < 60).any()
    assert torch.allclose(data.log_prob[kept], full.log_prob[kept], atol=1e-12)
    assert torch.allclose(data.observation[kept], full.observation[kept], atol=1e-12)


@pytest.mark.parametrize("budget", [0, -1, 2.5, math.nan, True, None])
def test_a_budget_must_be_whole(tasks, budget):
    with pytest.raises(ValueError, match="^transitions = .*a whole number >= 1"):
        rollout_transitions(FAMILY, tasks, POLICY, drifting(tasks), budget, seed=0)


# ------------------------------------------------------------------------------------------- meta-learning on it
def navigator(outer, compact, budget=400):
    config = MAMLConfig(
        tasks=3,
        stage_weights=(0.2, 0.4, 0.4),
        advantage=linear_feature_advantage(0.99),
        collect=lambda f, t, p, own, seed, episode: rollout_transitions(f, t, p, own, budget, seed, episode),
        compact=compact,
    )
    return MAML(POLICY, Inner(steps=2, lr=(0.5, 0.25)), outer, config)


@pytest.mark.parametrize("outer", [PPOStep(), TRPOStep()])
def test_steps_alone_give_the_numbers_of_whole_episodes(outer):
    """``MAMLConfig.compact`` changes shapes and speed, no gradient and no step."""
    near = PointNavigation(outer=0.1, tolerance=0.05)  # episodes of very different lengths
    padded, compacted = (navigator(outer, compact) for compact in (False, True))
    meta = padded.initial(torch.Generator().manual_seed(0))
    objectives = [learner.objective(near, meta, seed=0, iteration=0) for learner in (padded, compacted)]
    sizes = [objective.stages[1].data.mask.numel() for objective in objectives]
    assert (
        sizes[1] < 0.8 * sizes[0] and objectives[1].stages[1].data.mask.sum() == objectives[0].stages[1].data.mask.sum()
    )
    (value, gradient), (value_, gradient_) = (
        objective.gradient(meta, lambda phi, stage: -ratio(POLICY, phi, stage.data, stage.advantage))
        for objective in objectives
    )
    assert torch.allclose(value, value_, rtol=0, atol=1e-10)
    assert all(torch.allclose(g, h, rtol=1e-9, atol=1e-11) for g, h in zip(gradient, gradient_))
    (new, _, log), (new_, _, log_) = (outer.update(objective, meta, None) for objective in objectives)
    assert all(torch.allclose(log[name].double(), log_[name].double(), rtol=0, atol=1e-8) for name in log_)
    assert all(torch.allclose(p, q, atol=1e-8) for p, q in zip(new, new_)) and not torch.equal(new[0], meta[0])


def test_steps_alone_are_refused_where_whole_episodes_matter():
    for policy, inner in ((POLICY, Inner(surrogate=dice)), (Gaussian(GRU(2, 4, 2)), Inner())):
        with pytest.raises(ValueError, match="compact = True"):
            MAML(policy, inner, PPOStep(), MAMLConfig(compact=True))


TINY = navigation.Protocol(
    iterations=12, tasks=3, transitions=150, hidden=(8,), fisher_transitions=40, test_transitions=200
)


@pytest.mark.parametrize("method", ["trpo", "ppo", "pretrain"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, method, monkeypatch):
    whole = navigation.train(method, 5, TINY, tmp_path / "whole.pt", "cpu")
    first = replace(TINY, iterations=10)
    spent = navigation.train(method, 5, first, tmp_path / "parts.pt", "cpu")["seconds"]
    batches = []
    counted = lambda *arguments: batches.append(0) or rollout_transitions(*arguments)
    monkeypatch.setattr(navigation, "rollout_transitions", counted)
    parts = navigation.train(method, 5, TINY, tmp_path / "parts.pt", "cpu")
    assert len(batches) == 2 * (2 if method == "pretrain" else 3)  # two iterations are left, of so many stages
    assert parts["seconds"] > 0.9 * spent
    assert all(torch.equal(p, q) for p, q in zip(whole["meta"], parts["meta"]))
    assert [line["iteration"] for line in whole["curve"]] == [0, 10, 11]
    assert whole["curve"][-1] == parts["curve"][-1]
    with pytest.raises(ValueError, match="holds another run"):
        navigation.train(method, 6, TINY, tmp_path / "parts.pt", "cpu")


def test_result_holds_each_goal_and_the_summary_each_seed(tmp_path):
    lines = []
    for seed in (0, 1):
        options = {"method": "random", "seed": seed, "checkpoint": tmp_path / "x.pt", "device": "cpu", "onednn": False}
        found = navigation.result(argparse.Namespace(**options), TINY)
        per_goal = torch.tensor(found["return_by_step_and_goal"])
        assert per_goal.shape == (5, 40)
        assert per_goal.mean(1).tolist() == pytest.approx(found["mean_return"], abs=1e-3)
        assert found["oracle_return"] > max(found["mean_return"]) and found["share_diverged"] == [0.0] * 5
        assert found["ratios"]["return_2_over_published"] == pytest.approx(found["mean_return"][2] / -3.33)
        (tmp_path / f"navigation_random_{seed}.json").write_text(json.dumps(found))
        lines.append(found["mean_return"])
    table = navigation.summary(tmp_path).splitlines()
    middle = next(line for line in table if line.startswith("random, mean of 2"))
    assert f"{(lines[0][0] + lines[1][0]) / 2:.2f}" in middle
    assert sum(line.startswith("random, seed") for line in table) == 2 and any("-3.33" in line for line in table)
