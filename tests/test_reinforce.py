"""REINFORCE: the step it takes, that it learns, that its tasks do not mix, and what it says when something is wrong."""

import pytest
import torch

from ecomlib.evaluation.statistics import normalised_score
from ecomlib.exact import expected_return
from ecomlib.families.base import split, take
from ecomlib.families.tabular import STATES, ShopMDP
from ecomlib.learners import Reinforce, ReinforceConfig
from ecomlib.policies import CategoricalMLP
from ecomlib.rollout import rollout

SHOP = ShopMDP()
POLICY = CategoricalMLP((SHOP.observation_size, SHOP.actions))


@pytest.fixture
def tasks():
    return split(SHOP, "test", 5)[1]


def train(tasks, seed=0, **settings):
    settings = {"iterations": 15, "episodes": 8, "learning_rate": 0.05} | settings
    return Reinforce(POLICY, ReinforceConfig(**settings)).train(SHOP, tasks, seed, progress=False)


def test_learns_towards_the_oracle():
    """Thousands of sessions with each shopper: from below blind to well past it, and no further than the oracle."""
    _, tasks = split(SHOP, "test", 20)
    curve = train(tasks, iterations=150, episodes=24)
    blind, oracle = SHOP.blind_return(tasks), SHOP.oracle_return(tasks)
    start = POLICY.initial(torch.Generator().manual_seed(0))
    before, after = (expected_return(SHOP, tasks, POLICY, p) for p in (start, curve.parameters))
    assert normalised_score(before, blind, oracle) < 0 < 0.3 < normalised_score(after, blind, oracle) < 1
    assert (after < oracle).all()
    assert curve.returns[-20:].mean() - curve.returns[:20].mean() > 0.03


def test_first_step_by_hand(tasks):
    """Adam's first step is the step size times the sign of the gradient; the gradient, by scores written out."""
    curve = train(tasks, iterations=1, episodes=6, learning_rate=0.01, discount=0.9)
    start = POLICY.initial(torch.Generator().manual_seed(0))
    data = rollout(SHOP, tasks, POLICY, start, 6, seed=0, episode=0)
    assert torch.equal(curve.returns[0], data.reward.sum(0).mean(-1))
    for task in range(5):
        weight, bias = torch.zeros_like(start[0]), torch.zeros_like(start[1])
        for n in range(6):
            for t in range(SHOP.horizon):
                if not data.mask[t, task, n]:
                    continue
                to_go = sum(0.9 ** (k - t) * data.reward[k, task] for k in range(t, SHOP.horizon))
                advantage = to_go[n] - (to_go.sum() - to_go[n]) / 5
                x = data.observation[t, task, n]
                score = torch.eye(3)[data.action[t, task, n]] - torch.softmax(x @ start[0] + start[1][0], -1)
                weight += torch.outer(x, score) * advantage / 6
                bias += score * advantage / 6
        for found, first, gradient in zip(curve.parameters, start, (weight, bias), strict=True):
            assert torch.allclose(found[task], first + 0.01 * gradient / (gradient.abs() + 1e-8), atol=1e-9)


def test_a_task_learns_the_same_alone_and_in_a_batch(tasks):
    together = train(tasks)
    for task in (0, 3):
        alone = train(take(tasks, [task]))
        assert torch.equal(alone.returns[:, 0], together.returns[:, task])
        for one, all_tasks in zip(alone.parameters, together.parameters, strict=True):
            assert torch.allclose(one[0], all_tasks[task], atol=1e-9)
    assert (together.parameters[0][0] - together.parameters[0][3]).abs().max() > 0.1


def test_the_unit_of_money_does_not_matter(tasks):
    pounds, pence = train(tasks), train(tasks._replace(reward=100 * tasks.reward))
    for p, q in zip(pounds.parameters, pence.parameters, strict=True):
        assert torch.allclose(p, q, atol=1e-4)
    assert torch.allclose(100 * pounds.returns, pence.returns)


def test_the_curve_counts_what_was_paid_for(tasks):
    curve = train(tasks, iterations=4, episodes=7)
    assert curve.returns.shape == (4, 5) and curve.episodes.tolist() == [0, 7, 14, 21]
    assert [p.shape for p in curve.parameters] == [(5, SHOP.observation_size, 3), (5, 1, 3)]
    assert not any(p.requires_grad for p in curve.parameters)


def test_seeds_differ_and_repeat(tasks):
    assert torch.equal(train(tasks).returns, train(tasks).returns)
    assert not torch.equal(train(tasks).returns, train(tasks, seed=1).returns)


def test_single_precision(tasks):
    torch.set_default_dtype(torch.float32)
    curve = train(split(SHOP, "test", 5)[1])
    assert curve.returns.dtype == torch.float32 and all(p.dtype == torch.float32 for p in curve.parameters)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named(tasks, bad):
    reward = tasks.reward.clone()
    reward[3, STATES.index("browse")] = bad
    with pytest.raises(FloatingPointError, match="iteration 0: gradient of task 3, tensor 0, is not finite"):
        train(tasks._replace(reward=reward))


@pytest.mark.parametrize(
    "field, value",
    [("iterations", 0), ("episodes", 1), ("learning_rate", 0.0), ("discount", 1.1), ("discount", -0.1)],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"ReinforceConfig.{field} = {value}"):
        ReinforceConfig(**{field: value})
