"""The inner loop and the gradient through it: central differences of its own surrogate, torch.func, ``higher``."""

from functools import partial

import higher
import pytest
import torch
from torch import nn

from ecomlib.families.base import sample_tasks
from ecomlib.families.tabular import ShopMDP
from ecomlib.learners import MAML, Inner, MAMLConfig, PPOStep, ReinforceStep, TRPOStep
from ecomlib.learners.adaptation import adapt, meta_gradient
from ecomlib.learners.finite import check_finite
from ecomlib.learners.maml import Stage
from ecomlib.learners.ppo import clipped_surrogate
from ecomlib.networks import GRU, MLP, Context, Module
from ecomlib.policies import Categorical, CategoricalMLP
from ecomlib.surrogates import dice, log_likelihood, low_variance_curvature, ratio

SHOP = ShopMDP(horizon=5)
POLICIES = {
    "linear": lambda: CategoricalMLP((6, 3)),
    "MLP": lambda: CategoricalMLP((6, 7, 3)),
    "GRU": lambda: Categorical(GRU(6, 4, 3)),
    "module": lambda: Categorical(Module(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), 3)),
    "context": lambda: Categorical(Context(MLP((8, 5, 3)), 2)),
}
FUNCTIONS = (log_likelihood, ratio, dice)  # of the parameters; LVC is one at the acting parameters only


def outer_loss(learner, surrogate, phi, stage):
    return -surrogate(learner.policy, phi, stage.data, stage.advantage)


def iteration(policy, outer=None, tasks=3, seed=0, config=None, spread=0.5, **inner):
    """A learner, meta-parameters away from the start, and the data of one iteration."""
    inner = Inner(**{"lr": 0.7, **inner})
    learner = MAML(policy, inner, outer or ReinforceStep(), config or MAMLConfig(tasks=tasks, episodes=12))
    generator = torch.Generator().manual_seed(seed)
    meta = [p + spread * torch.randn(p.shape, generator=generator) for p in learner.initial(generator)]
    if inner.learn_lr:  # a step size stays a step size
        meta = [*meta[: policy.tensors], *(m.abs() for m in meta[policy.tensors :])]
    return learner, meta, learner.objective(SHOP, meta, seed, 0)


def central_difference(function, meta, direction, step=1e-5):
    """Fourth-order central difference of ``function`` along ``direction``."""
    at = lambda scale: function([m + scale * step * d for m, d in zip(meta, direction)])
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def relative_error(objective, outer, meta, seed=1):
    """Of the meta-gradient along a random direction, against the central difference of the same objective."""
    generator = torch.Generator().manual_seed(seed)
    direction = [torch.randn(m.shape, generator=generator) for m in meta]
    _, gradient = objective.gradient(meta, outer)
    along = sum((g * d).sum() for g, d in zip(gradient, direction)).item()
    size = sum((g**2).sum() for g in gradient).sqrt().item()
    return abs(along - central_difference(lambda m: objective.value(m, outer), meta, direction, 1e-3)) / size


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("surrogate", FUNCTIONS)
@pytest.mark.parametrize("name", POLICIES)
def test_gradient_is_the_central_difference_of_its_own_surrogate(name, surrogate, steps):
    """Equation (eq-maml-gradient) for every inner surrogate, 1 to 3 inner steps, data frozen."""
    learner, meta, objective = iteration(POLICIES[name](), steps=steps, surrogate=surrogate)
    assert relative_error(objective, partial(outer_loss, learner, ratio), meta) < 1e-7


def test_first_order_gradient_is_not():
    """The check above must reject what public code does by accident."""
    learner, meta, objective = iteration(POLICIES["MLP"](), first_order=True)
    assert relative_error(objective, partial(outer_loss, learner, ratio), meta) > 1e-2


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("outer", [log_likelihood, dice, partial(clipped_surrogate, clip=0.2)])
def test_every_outer_surrogate(outer, steps):
    learner, meta, objective = iteration(POLICIES["MLP"](), steps=steps)
    assert relative_error(objective, partial(outer_loss, learner, outer), meta) < 1e-7


@pytest.mark.parametrize(
    "change",
    [
        {"adapted": (2, 3)},
        {"learn_lr": True},
        {"learn_lr": True, "adapted": (2, 3), "steps": 2},
        {"lr": (0.9, 0.3), "steps": 2},
    ],
)
def test_variants_of_the_inner_loop(change):
    """ANIL, Meta-SGD, both, and a step size a step; the step sizes' gradient is checked with the rest."""
    learner, meta, objective = iteration(POLICIES["MLP"](), **change)
    assert relative_error(objective, partial(outer_loss, learner, ratio), meta) < 1e-7


@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (1.0, 0.0, 0.0)])
def test_stage_weights_and_sampling_term(weights):
    config = MAMLConfig(tasks=3, episodes=12, stage_weights=weights, sampling=True)
    learner, meta, objective = iteration(POLICIES["MLP"](), steps=2, config=config)
    assert relative_error(objective, partial(outer_loss, learner, ratio), meta) < 1e-7


def test_low_variance_curvature_is_the_ratio_where_the_policy_acted():
    found = []
    for surrogate in (ratio, low_variance_curvature):
        learner, meta, objective = iteration(POLICIES["MLP"](), steps=2, surrogate=surrogate)
        found.append(objective.gradient(meta, partial(outer_loss, learner, ratio))[1])
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------------- engines
def reference(learner, objective, meta, outer=ratio):
    """The torch.func engine on the same data: one task at a time, grad in vmap in grad."""
    stages = [Stage(s.data, s.advantage, s.score[None, :, None]) for s in objective.stages]
    loss = lambda surrogate: lambda p, s: -surrogate(learner.policy, p, s.data, s.advantage)
    return meta_gradient(loss(learner.inner.surrogate), loss(outer), learner.inner, meta, stages[:-1], stages[-1], 1)


@pytest.mark.parametrize("change", [{}, {"first_order": True}, {"steps": 3}, {"adapted": (0,)}])
@pytest.mark.parametrize("name", POLICIES)
def test_batched_engine_is_the_reference(name, change):
    learner, meta, objective = iteration(POLICIES[name](), **change)
    _, found = objective.gradient(meta, partial(outer_loss, learner, ratio))
    for a, b in zip(found, reference(learner, objective, meta)):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_change_nothing(chunk):
    config = MAMLConfig(tasks=5, episodes=12, chunk=chunk)
    learner, meta, objective = iteration(POLICIES["MLP"](), steps=2, config=config)
    value, found = objective.gradient(meta, partial(outer_loss, learner, ratio))
    objective.chunk = 5
    whole_value, whole = objective.gradient(meta, partial(outer_loss, learner, ratio))
    assert value.item() == pytest.approx(whole_value.item(), rel=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found, whole))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("surrogate", FUNCTIONS)
def test_higher_is_the_same(surrogate, steps):
    """An engine that we did not write: SGD in ``higher``, a loop over tasks, on the same episodes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    policy = Categorical(Module(module, 3))
    learner, meta, objective = iteration(policy, steps=steps, surrogate=surrogate)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), meta):
            parameter.copy_(value)
    optimiser = torch.optim.SGD(module.parameters(), lr=learner.inner.lr)
    for task in range(objective.tasks):
        stages = [objective.take(stage, slice(task, task + 1)) for stage in objective.stages]
        with higher.innerloop_ctx(module, optimiser, copy_initial_weights=False) as (adapted, inner):
            for stage in stages[:-1]:
                inner.step(learner.loss(list(adapted.parameters()), stage).sum())
            loss = outer_loss(learner, ratio, list(adapted.parameters()), stages[-1])
            (loss.sum() / objective.tasks).backward()
    _, found = objective.gradient(meta, partial(outer_loss, learner, ratio))
    for parameter, g in zip(module.parameters(), found):
        assert torch.allclose(parameter.grad, g, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------- guards
def test_a_value_that_is_not_finite_is_named():
    good, bad = torch.ones(3, 2), torch.ones(3, 2)
    bad[1, 0] = torch.nan
    check_finite("gradient", [good, good])
    with pytest.raises(FloatingPointError, match="gradient of task 1, tensor 1, is not finite"):
        check_finite("gradient", [good, bad])
    with pytest.raises(FloatingPointError, match="^meta-gradient, tensor 0"):
        check_finite("meta-gradient", [bad], tasks=False)


def test_a_diverging_task_is_named_with_its_step_in_training_and_kept_at_test():
    learner, meta, _ = iteration(POLICIES["linear"](), steps=2)
    calls = []

    def loss(parameters, data):
        calls.append(data)
        value = sum((p**2).sum((-2, -1)) for p in parameters)
        return value * torch.tensor([1.0, 1.0, torch.inf if len(calls) > 1 else 1.0])

    with pytest.raises(FloatingPointError, match="inner gradient at step 1 of task 2"):
        adapt(loss, learner.inner, meta, [None, None], tasks=3)
    calls.clear()
    phi = adapt(loss, learner.inner, meta, [None, None], tasks=3, create_graph=False, guard=False)[-1]
    assert phi[0][:2].isfinite().all() and not phi[0][2].isfinite().all()


def test_training_stops_with_iteration_task_and_tensor():
    policy = CategoricalMLP((6, 8, 8, 3), torch.relu)
    explosive = MAML(policy, Inner(steps=2, lr=1e300), TRPOStep(), MAMLConfig(3, 12))
    with pytest.raises(FloatingPointError, match="TRPO-MAML, iteration 0: .* not finite: try a smaller step size"):
        explosive.meta_train(SHOP, seed=0, iterations=2, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "Inner.steps = -1; allowed"),
        ({"steps": 0, "learn_lr": True}, "Inner.learn_lr = True; allowed"),
        ({"lr": 0.0}, "Inner.lr = 0.0; allowed"),
        ({"steps": 2, "lr": (0.1,)}, r"Inner.lr = \(0.1,\); allowed"),
        ({"surrogate": "ratio"}, "Inner.surrogate = 'ratio'; allowed"),
        ({"first_order": 1}, "Inner.first_order = 1; allowed"),
        ({"adapted": ()}, r"Inner.adapted = \(\); allowed"),
        ({"steps": 2, "lr": (0.1, 0.2), "learn_lr": True}, "Inner.learn_lr = True; allowed"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Inner(**change)


def test_support_may_be_longer_than_planned():
    """More steps at test than in training: the last step size goes on."""
    inner = Inner(steps=2, lr=(0.5, 0.25))
    assert [inner.rate(k) for k in range(4)] == [0.5, 0.25, 0.25, 0.25]
    learner = MAML(CategoricalMLP((6, 3)), inner, PPOStep(), MAMLConfig(3, 4))
    meta = learner.initial(torch.Generator().manual_seed(0))
    tasks = sample_tasks(SHOP, 3, torch.Generator().manual_seed(0))
    phi, support = learner.train_task(meta, SHOP, tasks, seed=0, steps=4)
    assert len(phi) == 5 and len(support) == 4
    own = [p.requires_grad_() for p in phi[3]]
    gradient = torch.autograd.grad(learner.loss(own, support[3]).sum(), own)
    for before, g, after in zip(phi[3], gradient, phi[4]):
        assert torch.allclose(before - 0.25 * g, after, atol=1e-14)
