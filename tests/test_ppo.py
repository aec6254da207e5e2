"""PPO: the clipped surrogate and where its gradient is zero, Adam by task, the early stop, and that it learns."""

import math
import re

import pytest
import torch

from ecomlib.exact import expected_return
from ecomlib.families.base import split, take
from ecomlib.families.tabular import STATES, ShopMDP
from ecomlib.learners.ppo import PPO, PerTaskAdam, PPOConfig, clipped_surrogate
from ecomlib.learners.trpo import mean_kl
from ecomlib.policies import CategoricalMLP, per_task
from ecomlib.returns import leave_one_out_advantage
from ecomlib.rollout import Trajectories, rollout
from ecomlib.surrogates import log_likelihood, ratio

SHOP = ShopMDP()
POLICY = CategoricalMLP((SHOP.observation_size, SHOP.actions))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tasks():
    return split(SHOP, "test", 4)[1]


@pytest.fixture
def batch(tasks, generator):
    parameters = per_task(POLICY.initial(generator), 4)
    return parameters, rollout(SHOP, tasks, POLICY, parameters, 6, seed=0)


# ------------------------------------------------------------------------------------------- clipped surrogate
def test_surrogate_by_hand(batch, generator):
    parameters, data = batch
    moved = [p + 0.5 * torch.randn(p.shape, generator=generator) for p in parameters]
    advantage = torch.randn(data.reward.shape, generator=generator)
    found = clipped_surrogate(POLICY, moved, data, advantage, 0.2)
    log_prob = POLICY.log_prob(moved, data.observation, data.action).detach()
    for task in range(4):
        total = 0.0
        for t, n in data.mask[:, task].nonzero().tolist():
            r = math.exp(log_prob[t, task, n] - data.log_prob[t, task, n])
            a = advantage[t, task, n].item()
            total += min(r * a, min(max(r, 0.8), 1.2) * a)
        assert found[task].item() == pytest.approx(total / 6, rel=1e-12)


def test_at_the_acting_parameters_it_is_the_policy_gradient(batch, generator):
    parameters, data = batch
    advantage = torch.randn(data.reward.shape, generator=generator)
    clipped = torch.autograd.grad(clipped_surrogate(POLICY, parameters, data, advantage, 0.2).sum(), parameters)
    for surrogate in (log_likelihood, ratio):
        plain = torch.autograd.grad(surrogate(POLICY, parameters, data, advantage).sum(), parameters)
        for found, expected in zip(clipped, plain, strict=True):
            assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("ratio_", "side"), [(0.5, "below"), (0.79, "below"), (0.81, "in"), (1.19, "in"), (1.21, "above"), (3.0, "above")]
)
def test_the_gradient_is_zero_exactly_where_it_should_be(ratio_, side, sign):
    """Beyond the clip on the side the advantage favours: zero. On the other side, and inside: advantage times ratio."""
    policy = CategoricalMLP((1, 2))
    logit = torch.tensor(0.3)
    parameters = [torch.zeros(1, 2), torch.stack((logit, torch.tensor(0.0)))[None].requires_grad_()]
    observation, action = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64)
    now = policy.log_prob(parameters, observation, action)
    ones = torch.ones(1, 1, 1)
    data = Trajectories(observation, action, now.detach() - math.log(ratio_), ones, ones)
    objective = clipped_surrogate(policy, parameters, data, sign * ones, 0.2)
    gradient = torch.autograd.grad(objective.sum(), parameters[1])[0]
    score = torch.autograd.grad(policy.log_prob(parameters, observation, action).sum(), parameters[1])[0]
    stopped = (side == "above" and sign > 0) or (side == "below" and sign < 0)
    expected = torch.zeros_like(score) if stopped else sign * ratio_ * score
    assert torch.allclose(gradient, expected, atol=1e-14)
    assert (gradient == 0).all() == stopped


def test_what_happens_after_an_episode_does_not_count(batch, generator):
    parameters, data = batch
    assert (data.mask == 0).any()
    advantage = torch.randn(data.reward.shape, generator=generator)
    other = torch.where(data.mask > 0, advantage, 1e3)
    moved = [p + 0.5 for p in parameters]
    first, second = (clipped_surrogate(POLICY, moved, data, a, 0.2) for a in (advantage, other))
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------- Adam
def test_adam_is_torchs(generator):
    start = [torch.randn(3, 2, 2, generator=generator), torch.randn(3, 1, 2, generator=generator)]
    theirs = [p.clone().requires_grad_() for p in start]
    optimiser, ours, adam = torch.optim.Adam(theirs, lr=0.05), start, PerTaskAdam(start)
    for _ in range(20):
        gradient = [torch.randn(p.shape, generator=generator) for p in start]
        for p, g in zip(theirs, gradient, strict=True):
            p.grad = -g
        optimiser.step()
        ours = adam.ascend(ours, gradient, 0.05, torch.ones(3, dtype=torch.bool))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, atol=1e-12)


def test_adam_leaves_a_stopped_task_as_if_the_step_had_not_been(generator):
    start = [torch.randn(2, 3, 1, generator=generator)]
    gradients = [[torch.randn(2, 3, 1, generator=generator)] for _ in range(6)]
    adam, parameters = PerTaskAdam(start), start
    for i, gradient in enumerate(gradients):
        going = torch.tensor([True, i % 2 == 0])
        before = parameters[0][1].clone()
        parameters = adam.ascend(parameters, gradient, 0.1, going)
        assert torch.equal(parameters[0][1], before) == (i % 2 == 1)
    alone_adam, alone = PerTaskAdam([start[0][1:]]), [start[0][1:]]
    for gradient in gradients[::2]:
        alone = alone_adam.ascend(alone, [gradient[0][1:]], 0.1, torch.ones(1, dtype=torch.bool))
    assert torch.equal(alone[0][0], parameters[0][1])


# ------------------------------------------------------------------------------------------------ the learner
def test_the_first_epoch_is_reinforces_step(batch):
    """At the acting parameters nothing is clipped: Adam's first step is the step size times the gradient's sign."""
    parameters, data = batch
    new, report = PPO(POLICY, PPOConfig(epochs=1, learning_rate=0.02)).update(parameters, data)
    advantage = leave_one_out_advantage()(data)
    gradient = torch.autograd.grad(log_likelihood(POLICY, parameters, data, advantage).sum(), parameters)
    for p, q, g in zip(new, parameters, gradient, strict=True):
        assert torch.allclose(p, q + 0.02 * g / (g.abs() + 1e-8), atol=1e-9)
    assert report.epochs.tolist() == [1] * 4


def test_the_report_says_what_was_done(batch):
    parameters, data = batch
    new, report = PPO(POLICY, PPOConfig(epochs=10, learning_rate=0.1)).update(parameters, data)
    kl = mean_kl(POLICY, POLICY.distribution(parameters, data.observation), new, data)
    assert torch.allclose(report.kl, kl) and (report.kl > 0).all()
    r = (POLICY.log_prob(new, data.observation, data.action) - data.log_prob).exp()
    outside = ((r < 0.8) | (r > 1.2)) & (data.mask > 0)
    assert torch.allclose(report.clipped, outside.sum((0, 2)) / data.mask.sum((0, 2))) and (report.clipped > 0).any()


def test_a_target_stops_each_task_when_its_kl_passes_it(batch):
    parameters, data = batch
    free = PPO(POLICY, PPOConfig(epochs=30, learning_rate=0.05))
    paths = []  # KL after 1, 2, ... epochs without a target
    for epochs in range(1, 31):
        paths.append(PPO(POLICY, PPOConfig(epochs=epochs, learning_rate=0.05)).update(parameters, data)[1].kl)
    paths = torch.stack(paths)
    target = 0.05
    new, report = PPO(POLICY, PPOConfig(epochs=30, learning_rate=0.05, target_kl=target)).update(parameters, data)
    for task in range(4):
        passed = (paths[:, task] > target).nonzero()
        assert report.epochs[task] == (passed[0].item() + 1 if len(passed) else 30)
        assert report.kl[task] == pytest.approx(paths[report.epochs[task] - 1, task].item())
    assert len(set(report.epochs.tolist())) > 1 and (report.epochs < 30).any()
    assert (free.update(parameters, data)[1].epochs == 30).all()


def train(tasks, seed=0, iterations=10, episodes=8, advantage=None, **settings):
    return PPO(POLICY, PPOConfig(**settings), iterations, episodes, advantage).train(SHOP, tasks, seed, progress=False)


def test_learns(tasks):
    curve = train(tasks, iterations=60, episodes=24, learning_rate=0.05)
    start = POLICY.initial(torch.Generator().manual_seed(0))
    before, after = (expected_return(SHOP, tasks, POLICY, p) for p in (start, curve.parameters))
    assert (after > before).all() and (after - before).mean() > 0.03
    assert (after < SHOP.oracle_return(tasks)).all()
    assert curve.returns.shape == (60, 4) and curve.episodes.tolist() == list(range(0, 60 * 24, 24))
    assert not any(p.requires_grad for p in curve.parameters)


@pytest.mark.parametrize("target_kl", [None, 0.01])
@pytest.mark.parametrize("standardised", [False, True])
def test_a_task_learns_the_same_alone_and_in_a_batch(tasks, target_kl, standardised):
    settings = {"target_kl": target_kl, "learning_rate": 0.05}
    settings["advantage"] = leave_one_out_advantage(standardised=standardised)
    together = train(tasks, **settings)
    for task in (0, 3):
        alone = train(take(tasks, [task]), **settings)
        assert torch.equal(alone.returns[:, 0], together.returns[:, task])
        for one, all_tasks in zip(alone.parameters, together.parameters, strict=True):
            assert torch.allclose(one[0], all_tasks[task], atol=1e-9)


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    curve = train(split(SHOP, "test", 4)[1])
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in curve.parameters)


def test_a_gradient_that_is_not_finite_is_named(tasks):
    reward = tasks.reward.clone()
    reward[3, STATES.index("browse")] = math.nan
    with pytest.raises(FloatingPointError, match="iteration 0: gradient at epoch 0 of task 3, tensor 0"):
        train(tasks._replace(reward=reward))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip", 0.0),
        ("clip", 1.0),
        ("epochs", 0),
        ("epochs", 3.0),
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("target_kl", 0.0),
        ("target_kl", "x"),
        ("target_kl", True),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"^PPOConfig\.{field} = {re.escape(repr(value))}; allowed: \S"):
        PPOConfig(**{field: value})


@pytest.mark.parametrize(("name", "value"), [("iterations", 0), ("episodes", 1), ("episodes", 8.0)])
def test_bad_counts_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} = {value}; allowed"):
        PPO(POLICY, **{name: value})
