"""Adaptation curves: the support earns the return before each step, diverged tasks are counted and left out."""

import pytest
import torch

from ecomlib.evaluation.adaptation import AdaptationReturns, adaptation_returns
from ecomlib.families.base import sample_tasks
from ecomlib.families.tabular import ShopMDP
from ecomlib.learners import MAML, Inner, MAMLConfig, TRPOStep
from ecomlib.policies import CategoricalMLP

SHOP = ShopMDP()


def test_rows_are_the_returns_of_fresh_episodes_of_each_stage():
    maml = MAML(CategoricalMLP((6, 5, 3)), Inner(lr=0.7), TRPOStep(), MAMLConfig(4, 10))
    meta = maml.initial(torch.Generator().manual_seed(0))
    tasks = sample_tasks(SHOP, 5, torch.Generator().manual_seed(0))
    found = adaptation_returns(maml, meta, SHOP, tasks, steps=2, seed=7)
    phi, support = maml.train_task(meta, SHOP, tasks, seed=7, steps=2)
    query = maml.evaluate_task(phi[2], SHOP, tasks, seed=7, episode=2)
    for k, data in enumerate([support[0].data, support[1].data, query]):
        assert torch.equal(found.returns[k], data.returns.mean(-1))
    assert not found.diverged.any() and torch.equal(found.diverged_share, torch.zeros(3))
    assert torch.allclose(found.mean, found.returns.mean(-1))


def test_no_step_is_the_return_of_theta():
    maml = MAML(CategoricalMLP((6, 5, 3)), Inner(lr=0.7), TRPOStep(), MAMLConfig(4, 10))
    meta = maml.initial(torch.Generator().manual_seed(0))
    tasks = sample_tasks(SHOP, 5, torch.Generator().manual_seed(0))
    found = adaptation_returns(maml, meta, SHOP, tasks, steps=0, seed=7)
    assert torch.allclose(
        found.returns, maml.evaluate_task(meta, SHOP, tasks, seed=7, episode=0).returns.mean(-1)[None]
    )
    assert found.diverged.shape == (1, 5) and not found.diverged.any()


def test_diverged_tasks_are_counted_and_left_out():
    """A softmax of parameters that are not finite still picks actions: the parameters tell, not the return."""
    policy = CategoricalMLP((6, 8, 8, 3), torch.relu)
    maml = MAML(policy, Inner(lr=1e300), TRPOStep(), MAMLConfig(4, 10))
    tasks = sample_tasks(SHOP, 5, torch.Generator().manual_seed(0))
    found = adaptation_returns(maml, maml.initial(torch.Generator().manual_seed(0)), SHOP, tasks, steps=3, seed=7)
    assert found.diverged[-1].any() and not found.diverged[0].any() and found.returns.isfinite().all()
    by_hand = AdaptationReturns(torch.tensor([[1.0, 2.0, torch.nan]]), torch.tensor([[False, False, True]]))
    assert by_hand.mean.item() == 1.5 and by_hand.diverged_share.item() == pytest.approx(1 / 3)
