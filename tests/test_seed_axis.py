"""Several seeds in one batch: the numbers of runs one by one, resuming, a seed that diverges; and no inner step."""

import numpy as np
import pytest
import torch
from torch import nn

from ecomlib import noise
from ecomlib.families.base import sample_tasks
from ecomlib.families.navigation import PointNavigation
from ecomlib.families.pricing import LogitPricing
from ecomlib.families.sinusoid import Sinusoid
from ecomlib.families.tabular import ShopMDP
from ecomlib.learners import (
    MAML,
    GradientStep,
    Inner,
    MAMLConfig,
    PPOStep,
    ReinforceStep,
    ReptileStep,
    SupervisedMAML,
    TRPOStep,
)
from ecomlib.learners.meta import iteration_generator
from ecomlib.networks import GRU, MLP, Module
from ecomlib.policies import Categorical, CategoricalMLP, GaussianMLP
from ecomlib.returns import linear_feature_advantage
from ecomlib.rollout import rollout_transitions
from ecomlib.surrogates import dice, log_likelihood, ratio

SEEDS = (3, 0, 11)
PRICING, NAVIGATION, SHOP = LogitPricing(days=4), PointNavigation(horizon=8, tolerance=0.1), ShopMDP(horizon=5)
SOFTMAX = lambda: CategoricalMLP((LogitPricing.observation_size, 5, 11))
RECURRENT = lambda: Categorical(GRU(LogitPricing.observation_size, 4, 11))


def in_transitions(family, tasks, policy, parameters, seed, episode):
    return rollout_transitions(family, tasks, policy, parameters, 20, seed, episode)


CASES = {
    "RL": (PRICING, SOFTMAX, ReinforceStep(), {"steps": 2}, {}),
    "PPO": (PRICING, SOFTMAX, PPOStep(epochs=3), {"steps": 2, "surrogate": ratio}, {}),
    "Reptile": (PRICING, SOFTMAX, ReptileStep(), {"steps": 2}, {}),
    "Reptile with Adam": (PRICING, SOFTMAX, ReptileStep(adam=True), {"steps": 2, "adapted": (2, 3)}, {}),
    "Meta-SGD": (PRICING, SOFTMAX, PPOStep(epochs=2), {"learn_lr": True, "steps": 2}, {}),
    "Meta-SGD of a part": (PRICING, SOFTMAX, ReinforceStep(), {"learn_lr": True, "adapted": (2, 3)}, {"chunk": 3}),
    "first order": (PRICING, SOFTMAX, ReinforceStep(), {"first_order": True, "steps": 3}, {}),
    "ANIL": (PRICING, SOFTMAX, ReinforceStep(), {"adapted": (2, 3)}, {}),
    "autograd": (PRICING, SOFTMAX, PPOStep(epochs=2), {"steps": 2}, {"by_hand": False}),
    "autograd, Meta-SGD": (PRICING, SOFTMAX, PPOStep(epochs=2), {"learn_lr": True}, {"by_hand": False, "chunk": 3}),
    "autograd, ANIL": (PRICING, SOFTMAX, ReinforceStep(), {"adapted": (2, 3)}, {"by_hand": False}),
    "chunks": (PRICING, SOFTMAX, ReinforceStep(), {"steps": 2}, {"chunk": 3}),
    "all stages": (PRICING, SOFTMAX, PPOStep(epochs=2), {"steps": 2}, {"stage_weights": (0.2, 0.3, 0.5)}),
    "E-MAML": (PRICING, SOFTMAX, ReinforceStep(), {"steps": 2}, {"sampling": True}),
    "DiCE": (PRICING, SOFTMAX, ReinforceStep(), {"surrogate": dice}, {}),
    "GRU": (PRICING, RECURRENT, PPOStep(epochs=2), {"steps": 2}, {}),
    "GRU, no inner step": (PRICING, RECURRENT, PPOStep(epochs=2), {"steps": 0}, {}),
    "no inner step": (PRICING, SOFTMAX, PPOStep(epochs=2), {"steps": 0}, {}),
    "baseline": (PRICING, SOFTMAX, ReinforceStep(), {}, {"advantage": linear_feature_advantage()}),
    "Gaussian": (NAVIGATION, lambda: GaussianMLP((2, 5, 2)), PPOStep(epochs=2, log_std_lr=0.02), {"steps": 2}, {}),
    "transitions": (
        NAVIGATION,
        lambda: GaussianMLP((2, 5, 2)),
        PPOStep(epochs=2),
        {"steps": 2},
        {"collect": in_transitions, "compact": True, "advantage": linear_feature_advantage()},
    ),
}


def learner(name):
    family, policy, outer, inner, config = CASES[name]
    return family, MAML(
        policy(), Inner(**{"lr": 0.05, **inner}), outer, MAMLConfig(**{"tasks": 5, "episodes": 6, **config})
    )


def of_seed(state, index):
    """What a batch knows of one seed, as a run of that seed alone would hold it."""
    memory = None if state.memory is None else {k: [x[index] for x in v] for k, v in state.memory.items()}
    history = [{name: values[index] for name, values in row.items()} for row in state.history]
    return state._replace(meta=[p[index] for p in state.meta], memory=memory, history=history)


def close(a, b, tolerance=1e-9):
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_seeds_has_the_numbers_of_runs_one_by_one(name):
    family, maml = learner(name)
    batch = maml.meta_train(family, SEEDS, 4, progress=False)
    assert all(p.shape[0] == len(SEEDS) for p in batch.meta)
    for index, seed in enumerate(SEEDS):
        alone = maml.meta_train(family, seed, 4, progress=False)
        found = of_seed(batch, index)
        start = maml.initial(torch.Generator().manual_seed(seed))
        assert not close(start, alone.meta, 1e-5)  # something was learned
        assert close(found.meta, alone.meta)
        assert (found.memory is None) == (alone.memory is None)
        for key in alone.memory or {}:
            assert close(found.memory[key], alone.memory[key])
        for row, wanted in zip(found.history, alone.history, strict=True):
            assert row == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("outer", [GradientStep(), ReptileStep()])
def test_supervised_seeds(outer, by_hand):
    maml = SupervisedMAML(MLP((1, 4, 1)), Inner(steps=2, lr=0.01), outer, tasks=4, by_hand=by_hand)
    batch = maml.meta_train(Sinusoid(), SEEDS, 3, progress=False)
    for index, seed in enumerate(SEEDS):
        alone = maml.meta_train(Sinusoid(), seed, 3, progress=False)
        assert close([p[index] for p in batch.meta], alone.meta)


def test_tasks_and_luck_of_a_seed_are_its_own():
    """Task m of seed s is the m-th of ``iteration_generator(s, i)``, and meets the shoppers it meets alone."""
    family, maml = learner("PPO")
    ids, luck = maml.draw(5, SEEDS, 7, "cpu")
    for index, seed in enumerate(SEEDS):
        assert torch.equal(ids[index :: len(SEEDS)], sample_tasks(SHOP, 5, iteration_generator(seed, 7)).id)
        assert (luck[index :: len(SEEDS)] == seed).all()
    together = noise.uniform(luck, ids, torch.arange(4), 2, 3, noise.FAMILY, 2)
    for row, (task, seed) in enumerate(zip(ids, luck.tolist())):
        assert torch.equal(together[row], noise.uniform(seed, task[None], torch.arange(4), 2, 3, noise.FAMILY, 2)[0])
    stages = maml.objective(family, [torch.stack([p] * 3) for p in maml.initial(torch.Generator())], SEEDS, 7).stages
    alone = maml.objective(family, maml.initial(torch.Generator()), SEEDS[1], 7).stages
    assert torch.equal(stages[0].data.action[:, 1 :: len(SEEDS)], alone[0].data.action)


@pytest.mark.parametrize("name", ["PPO", "RL", "Reptile with Adam", "Meta-SGD"])
def test_a_resumed_batch_is_an_uninterrupted_one_bit_for_bit(name):
    family, maml = learner(name)
    through = maml.meta_train(family, SEEDS, 4, progress=False)
    half = maml.meta_train(family, SEEDS, 2, progress=False)
    kept = [x.clone() for values in half.memory.values() for x in values]
    for _ in range(2):  # a state may be started from twice: going on does not change it
        resumed = maml.meta_train(family, SEEDS, 4, start=half, progress=False)
        assert resumed.history == through.history
        assert all(torch.equal(a, b) for a, b in zip(resumed.meta, through.meta))
        for key in through.memory:
            assert all(torch.equal(a, b) for a, b in zip(resumed.memory[key], through.memory[key]))
    assert all(torch.equal(a, b) for a, b in zip(kept, (x for values in half.memory.values() for x in values)))


def test_the_memory_of_adam_is_lists_of_tensors():
    family, maml = learner("PPO")
    for seed, lead in ((3, ()), (SEEDS, (3,))):
        state = maml.meta_train(family, seed, 2, progress=False)
        assert list(state.memory) == ["step", "exp_avg", "exp_avg_sq"]
        assert all(step.shape == lead and (step == 6).all() for step in state.memory["step"])
        for p, mean, square in zip(state.meta, state.memory["exp_avg"], state.memory["exp_avg_sq"], strict=True):
            assert p.shape == mean.shape == square.shape


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_seed_that_diverges_is_named_with_its_task(by_hand):
    family, policy, outer, _, _ = CASES["RL"]
    maml = MAML(policy(), Inner(lr=0.05), outer, MAMLConfig(5, 6, by_hand=by_hand))
    start = maml.meta_train(family, SEEDS, 1, progress=False)
    start.meta[0][1, 0, 0] = torch.nan
    with pytest.raises(
        FloatingPointError, match="RL-MAML, iteration 1: inner gradient at step 0 of task 0, seed 0, tensor 0"
    ):
        maml.meta_train(family, SEEDS, 3, start=start, progress=False)

    def poisoned(data):
        advantage = torch.zeros_like(data.reward)
        advantage[0, 2 * len(SEEDS) + 2] = torch.inf  # task 2 of the third seed
        return advantage

    maml = MAML(policy(), Inner(lr=0.05), outer, MAMLConfig(5, 6, by_hand=by_hand, advantage=poisoned))
    with pytest.raises(
        FloatingPointError, match="inner gradient at step 0 of task 2, seed 11, tensor 0, is not finite"
    ):
        maml.meta_train(family, SEEDS, 1, progress=False)


def test_a_meta_parameter_that_is_not_finite_names_its_seed():
    family, maml = learner("no inner step")

    class Broken:
        name, batches_seeds = "Broken", True

        def update(self, objective, meta, memory):
            meta = [p.clone() for p in meta]
            meta[3][2, 0, 1] = torch.inf
            return meta, None, {}

    maml.outer = Broken()
    with pytest.raises(FloatingPointError, match="iteration 0: meta-parameter of seed 11, tensor 3, is not finite"):
        maml.meta_train(family, SEEDS, 1, progress=False)


def test_a_seed_may_be_numpys():
    family, maml = learner("RL")
    for seed, same in ((np.int64(3), 3), ([np.int64(3), 0], (3, 0))):
        found, wanted = (maml.meta_train(family, s, 1, progress=False).meta for s in (seed, same))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_what_cannot_batch_seeds_says_so():
    maml = MAML(SOFTMAX(), Inner(), TRPOStep(), MAMLConfig(3, 4))
    assert not maml.batches_seeds and learner("PPO")[1].batches_seeds
    with pytest.raises(ValueError, match=r"seed = \(0, 1\); allowed: one whole number with TRPOStep"):
        maml.meta_train(PRICING, (0, 1), 1, progress=False)
    compiled = SupervisedMAML(Module(nn.Linear(1, 1), 1), Inner(), compile=True)
    assert not compiled.batches_seeds
    for seed in ((), (1, 2.5), "1", np.arange(2)):
        with pytest.raises(ValueError, match="seed = .*; allowed: a whole number, or a sequence of them"):
            learner("PPO")[1].meta_train(PRICING, seed, 1, progress=False)
    family, maml = learner("PPO")
    start = maml.meta_train(family, (0, 1), 1, progress=False)
    with pytest.raises(ValueError, match="seed = .*; allowed: the seeds that `start` was trained with, 2 of them"):
        maml.meta_train(family, SEEDS, 2, start=start, progress=False)


# ------------------------------------------------------------------------------------------- no inner step
@pytest.mark.parametrize("policy", [SOFTMAX, RECURRENT])
@pytest.mark.parametrize("outer", [ReinforceStep(), PPOStep(epochs=2), TRPOStep()])
def test_without_inner_steps_theta_itself_is_trained(policy, outer):
    """The gradient is that of the surrogate at theta, mean over tasks: plain policy gradients on all tasks."""
    maml = MAML(policy(), Inner(steps=0), outer, MAMLConfig(4, 6))
    assert maml.stage_weights == (1.0,)
    generator = torch.Generator().manual_seed(0)
    meta = [p + 0.3 * torch.randn(p.shape, generator=generator) for p in maml.initial(generator)]
    objective = maml.objective(PRICING, meta, 0, 2)
    (stage,) = objective.stages
    leaves = [p.clone().requires_grad_() for p in meta]
    value = log_likelihood(maml.policy, leaves, stage.data, stage.advantage).mean()
    wanted = torch.autograd.grad(value, leaves)
    _, found = objective.gradient(meta, maml.loss)
    assert close([-g for g in found], wanted, 1e-12)
    new, _, log = outer.update(objective, meta, None)
    assert not close(new, meta, 1e-6) and list(log)[0] == "return after 0 steps"
    assert maml.meta_train(PRICING, 0, 2, progress=False).iteration == 2


def test_without_inner_steps_a_task_is_left_as_it_is():
    maml = MAML(SOFTMAX(), Inner(steps=0), PPOStep(), MAMLConfig(4, 6))
    meta = maml.initial(torch.Generator().manual_seed(0))
    tasks = sample_tasks(PRICING, 3, torch.Generator().manual_seed(0))
    phi, support = maml.train_task(meta, PRICING, tasks, seed=0)
    assert support == [] and len(phi) == 1
    assert all(torch.equal(p, m.expand(3, *m.shape)) for p, m in zip(phi[0], meta))
    assert maml.evaluate_task(phi[-1], PRICING, tasks, seed=0).returns.shape == (3, 6)
    with pytest.raises(ValueError, match="Inner.steps = 0; allowed: a whole number >= 1 with ReptileStep"):
        MAML(SOFTMAX(), Inner(steps=0), ReptileStep(), MAMLConfig(4, 6)).meta_train(PRICING, 0, 1, progress=False)
