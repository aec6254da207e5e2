"""Meta-learners: whose episodes score what, outer steps against closed forms, resuming, supervised tasks."""

import math

import pytest
import torch
from torch import nn

from ecomlib.families.base import sample_tasks, split
from ecomlib.families.navigation import PointNavigation
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
    TRPOConfig,
    TRPOStep,
)
from ecomlib.learners.adaptation import meta_gradient
from ecomlib.learners.maml import Stage
from ecomlib.learners.meta import adam_step, iteration_generator
from ecomlib.learners.outer import adapted_fisher_vector_product, thin
from ecomlib.learners.output_losses import of_surrogate
from ecomlib.learners.supervised import Examples, cross_entropy_loss, mean_squared_error
from ecomlib.networks import GRU, MLP, Module
from ecomlib.policies import Categorical, CategoricalMLP, GaussianMLP
from ecomlib.returns import linear_feature_advantage, per_transition, standardise
from ecomlib.rollout import Trajectories, rollout
from ecomlib.surrogates import dice, log_likelihood, ratio

SHOP = ShopMDP()


def learner(outer=None, policy=None, config=None, **inner):
    inner = Inner(**{"lr": 0.7, **inner})
    return MAML(policy or CategoricalMLP((6, 5, 3)), inner, outer or TRPOStep(), config or MAMLConfig(4, 10))


def start(learner, spread=0.5):
    generator = torch.Generator().manual_seed(0)
    return [p + spread * torch.randn(p.shape, generator=generator) for p in learner.initial(generator)]


# ------------------------------------------------------------------------------------------- whose episodes
def test_each_stage_was_collected_by_its_own_parameters_with_fresh_luck():
    """D_k is drawn from phi_k and scores phi_k: neither the unadapted policy's episodes nor the support again."""
    maml = learner(steps=2)
    meta = start(maml)
    objective = maml.objective(SHOP, meta, seed=3, iteration=5)
    phi = objective.adapted(meta, objective.stages, 4, create_graph=False)
    for parameters, stage in zip(phi, objective.stages, strict=True):
        data = stage.data
        found = maml.policy.log_prob(parameters, data.observation, data.action)
        assert torch.allclose(found * data.mask, data.log_prob * data.mask, atol=1e-12)
    moved = [(a - b).abs().max() for a, b in zip(phi[0], phi[1])]
    assert max(moved) > 1e-3
    # The same parameters on the three rounds' luck: no two rounds repeat an episode.
    tasks = sample_tasks(SHOP, 4, torch.Generator().manual_seed(0))
    rounds = [rollout(SHOP, tasks, maml.policy, meta, 10, seed=3, episode=15 + k).action for k in range(3)]
    assert not any(torch.equal(rounds[a], rounds[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    again = maml.objective(SHOP, meta, seed=3, iteration=6)
    assert not torch.equal(again.stages[0].data.action, objective.stages[0].data.action)


def test_no_round_of_episodes_is_numbered_twice():
    """Two stages with one number would meet the same shoppers: the query would be the support's luck again."""
    numbers = []

    def collect(family, tasks, policy, parameters, seed, episode):
        numbers.append(episode)
        return rollout(family, tasks, policy, parameters, 4, seed, episode)

    maml = learner(steps=2, config=MAMLConfig(3, 4, collect=collect))
    for iteration in range(3):
        maml.objective(SHOP, start(maml), seed=0, iteration=iteration)
    assert len(numbers) == 9 and len(set(numbers)) == 9


def test_train_and_evaluate_do_not_share_luck_by_default():
    maml = learner()
    tasks = sample_tasks(SHOP, 4, torch.Generator().manual_seed(0))
    phi, support = maml.train_task(start(maml), SHOP, tasks, seed=0)
    query = maml.evaluate_task(phi[0], SHOP, tasks, seed=0)
    assert query.action.shape == support[0].data.action.shape
    assert not torch.equal(query.action, support[0].data.action)


def test_sampling_scores_are_later_returns_against_the_other_tasks():
    maml = learner(steps=2, config=MAMLConfig(3, 10, sampling=True, stage_weights=(0.0, 0.25, 0.75)))
    stages = maml.objective(SHOP, start(maml), 0, 0).stages
    returns = [stage.data.returns.mean(-1) for stage in stages]
    for task in range(3):
        others = [i for i in range(3) if i != task]
        gain = [r[task] - r[others].mean() for r in returns]
        assert stages[1].score[task] == pytest.approx((0.75 * gain[2]).item(), abs=1e-12)
        assert stages[0].score[task] == pytest.approx((0.25 * gain[1] + 0.75 * gain[2]).item(), abs=1e-12)


def test_recurrent_policy_acts_as_it_is_scored():
    """Step by step with a memory, or the whole episode at once: the same probabilities."""
    policy = Categorical(GRU(6, 5, 3))
    parameters = [torch.randn(p.shape) for p in policy.initial(torch.Generator().manual_seed(0))]
    tasks = sample_tasks(SHOP, 4, torch.Generator().manual_seed(0))
    data = rollout(SHOP, tasks, policy, parameters, 5, seed=0)
    assert torch.allclose(policy.log_prob(parameters, data.observation, data.action), data.log_prob, atol=1e-12)


# ------------------------------------------------------------------------------------------- outer steps
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("weights", [None, (0.2, 0.3, 0.5), (0.5, 1.0, 1.5)])
@pytest.mark.parametrize("change", [{}, {"adapted": (2, 3)}, {"learn_lr": True}])
def test_fisher_vector_product_is_the_hessian_of_the_divergence(weights, change, by_hand):
    """Equation (eq-adapted-fisher): J^T F J is the second derivative of the adapted policies' KL divergence, a mean
    over stages by their weights, whatever these add up to."""
    config = MAMLConfig(4, 10, stage_weights=weights, chunk=3, by_hand=by_hand)
    maml = learner(steps=2, config=config, **change)
    meta = start(maml)
    meta = [m.abs() if i >= 4 else m for i, m in enumerate(meta)]
    objective = maml.objective(SHOP, meta, 0, 0)
    weights = [w / sum(objective.weights) for w in objective.weights]

    def divergence(meta, old):
        total, adapted = 0.0, []
        for c, (stages, tasks) in enumerate(objective.chunks()):
            phi = objective.adapted(meta, stages, tasks, create_graph=True)
            adapted.append(phi)
            for k, (w, p, stage) in enumerate(zip(weights, phi, stages)):
                before = old[c][k] if old else p
                named = [maml.policy.distribution(q, stage.data.observation) for q in (before, p)]
                kl = (maml.policy.kl(*named) * stage.data.mask).sum((0, 2)) / stage.data.mask.sum((0, 2))
                total = total + w * kl.sum() / objective.tasks
        return total, adapted

    _, old = divergence([m.detach().requires_grad_() for m in meta], None)
    old = [[[q.detach() for q in p] for p in phi] for phi in old]
    leaves = [m.detach().requires_grad_() for m in meta]
    generator = torch.Generator().manual_seed(1)
    vector = [torch.randn(m.shape, generator=generator) for m in meta]
    slope = torch.autograd.grad(divergence(leaves, old)[0], leaves, create_graph=True)
    wanted = torch.autograd.grad(sum((g * v).sum() for g, v in zip(slope, vector)), leaves)
    found = adapted_fisher_vector_product(objective, meta)(vector)
    assert max(w.abs().max() for w in wanted) > 1e-3
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_thinning_keeps_every_step_when_asked_for_all_and_its_mean_otherwise():
    maml = learner()
    tasks = sample_tasks(SHOP, 1, torch.Generator().manual_seed(0))
    parameters = start(maml)
    data = rollout(SHOP, tasks, maml.policy, parameters, 30, seed=0)
    stage = Stage(data, torch.randn(data.reward.shape), torch.zeros(1))
    live = int(data.mask.sum())
    all_of_it = thin(stage, live)
    surrogate = lambda s: ratio(maml.policy, parameters, s.data, s.advantage)
    assert all_of_it.data.reward.shape == (1, 1, live)
    assert torch.allclose(surrogate(all_of_it), surrogate(stage), atol=1e-12)
    assert torch.equal(all_of_it.data.mask, torch.ones(1, 1, live))
    third, whole = thin(stage, live // 3).advantage.flatten(), all_of_it.advantage.flatten()
    index = ((third[:, None] - whole).abs() < 1e-9).nonzero()[:, 1]
    assert len(index.unique()) == live // 3


def test_thinning_draws_from_every_episode():
    """20 steps of 10 episodes: every fifth of the 200 would be one of 2 episodes. And of 40 live steps, never a dead
    one."""
    mask = torch.ones(20, 1, 10)
    number = torch.arange(10.0).expand(20, 1, 10)
    data = Trajectories(number[..., None], number, number, number, mask)
    drawn = thin(Stage(data, number, torch.zeros(1)), 40)
    assert drawn.data.action.shape == (1, 1, 40) and len(drawn.data.action.unique()) == 10
    short = data._replace(mask=mask * (torch.arange(20)[:, None, None] < 4))
    drawn = thin(Stage(short, number, torch.zeros(1)), 60)
    assert drawn.data.mask.sum() == 40
    total = (drawn.advantage * drawn.data.mask).sum() / 60
    assert total.item() == pytest.approx((number * short.mask).sum().item() / 10)


def test_trust_region_step_respects_the_radius_and_improves():
    maml = learner(TRPOStep(TRPOConfig(radius=0.003)), steps=1)
    meta = start(maml)
    objective = maml.objective(SHOP, meta, 0, 0)
    new, _, log = maml.outer.update(objective, meta, None)
    assert log["accepted"] == 1.0 and 0 < log["kl"] <= 0.003 and log["improvement"] > 0
    outer = lambda phi, stage: -ratio(maml.policy, phi, stage.data, stage.advantage)
    gained = objective.value(meta, outer) - objective.value(new, outer)
    assert gained.item() == pytest.approx(log["improvement"].item(), rel=1e-9)


def test_thinning_refuses_what_it_would_break():
    for change in ({"surrogate": dice}, {"policy": Categorical(GRU(6, 5, 3))}):
        maml = learner(TRPOStep(transitions=20), **change)
        with pytest.raises(ValueError, match="TRPOStep.transitions = 20; allowed: None"):
            maml.meta_train(SHOP, 0, 1, progress=False)


def test_ppo_step_is_adam_on_the_clipped_surrogate():
    """One epoch from the data's own theta is one Adam step up the ratio's meta-gradient: lr times its sign."""
    maml = learner(PPOStep(lr=0.01, epochs=1))
    meta = start(maml)
    objective = maml.objective(SHOP, meta, 0, 0)
    new, _, _ = maml.outer.update(objective, meta, None)
    outer = lambda phi, stage: -ratio(maml.policy, phi, stage.data, stage.advantage)
    _, gradient = objective.gradient(meta, outer)
    for before, after, g in zip(meta, new, gradient):
        expected = -0.01 * g / (g.abs() + 1e-8)
        assert torch.allclose(after - before, expected, atol=1e-12)


def test_the_radius_is_of_the_mean_divergence_whatever_the_weights_add_up_to():
    """Doubling all stage weights doubles the objective and moves theta to the same place."""
    found = []
    for scale in (1, 2):
        weights = tuple(scale * w for w in (0.2, 0.3, 0.5))
        maml = learner(TRPOStep(), steps=2, config=MAMLConfig(4, 10, stage_weights=weights))
        found.append(maml.outer.update(maml.objective(SHOP, start(maml), 0, 0), start(maml), None)[2])
    assert found[0]["kl"].item() == pytest.approx(found[1]["kl"].item(), rel=1e-3)
    assert 2 * found[0]["improvement"].item() == pytest.approx(found[1]["improvement"].item(), rel=1e-3)


def test_adam_remembers_between_iterations():
    """The function is torch's Adam, its moments carried along, with a step size for each parameter."""
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(3, generator=generator) for _ in range(2)] for _ in range(4)]
    meta, memory = [torch.zeros(3), torch.ones(3)], None
    theirs = [p.clone().requires_grad_() for p in meta]
    optimiser = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in zip(theirs, (0.1, 0.02))])
    for gradient in gradients:
        meta, memory = adam_step(meta, gradient, [0.1, 0.02], memory)
        for p, g in zip(theirs, gradient):
            p.grad = g.clone()
        optimiser.step()
    for a, b in zip(meta, theirs):
        assert torch.allclose(a, b, rtol=1e-12)


def test_outer_steps_have_the_published_names():
    names = [learner(outer).name for outer in (ReinforceStep(), PPOStep(), TRPOStep())]
    assert names == ["RL-MAML", "PPO-MAML", "TRPO-MAML"]


@pytest.mark.parametrize("outer", [ReinforceStep(), PPOStep(epochs=2), TRPOStep()])
def test_resumed_training_is_uninterrupted_training(outer):
    maml = learner(outer)
    through = maml.meta_train(SHOP, seed=0, iterations=4, progress=False)
    half = maml.meta_train(SHOP, seed=0, iterations=2, progress=False)
    resumed = maml.meta_train(SHOP, seed=0, iterations=4, start=half, progress=False)
    assert len(half.history) == 2 and resumed.iteration == 4
    assert resumed.history == through.history
    assert all(torch.equal(a, b) for a, b in zip(resumed.meta, through.meta))


def test_training_improves_adaptation():
    """On held-out shoppers, adapted policies earn more after meta-training than from the random start."""
    maml = learner(TRPOStep(TRPOConfig(radius=0.03)), lr=2.0, config=MAMLConfig(20, 20))
    trained = maml.meta_train(SHOP, seed=0, iterations=50, progress=False)
    tasks = sample_tasks(SHOP, 200, torch.Generator().manual_seed(1))
    earned = []
    for meta in (maml.initial(torch.Generator().manual_seed(0)), trained.meta):
        phi, _ = maml.train_task(meta, SHOP, tasks, seed=1)
        earned.append(maml.evaluate_task(phi[-1], SHOP, tasks, seed=1).returns.mean(-1))
    gain = earned[1] - earned[0]
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAMLConfig(tasks=0), "MAMLConfig.tasks = 0; allowed"),
        (lambda: MAMLConfig(episodes=1.5), "MAMLConfig.episodes = 1.5; allowed"),
        (lambda: MAMLConfig(stage_weights=(0, 0)), "MAMLConfig.stage_weights"),
        (lambda: MAMLConfig(tasks=1, sampling=True), "MAMLConfig.sampling = True; allowed"),
        (lambda: MAMLConfig(chunk=0), "MAMLConfig.chunk = 0; allowed"),
        (lambda: MAMLConfig(by_hand=1), "MAMLConfig.by_hand = 1; allowed"),
        (lambda: MAMLConfig(advantage=3), "MAMLConfig.advantage = 3; allowed"),
        (lambda: learner(config=MAMLConfig(stage_weights=(1.0,))), "MAMLConfig.stage_weights = .*; allowed"),
        (lambda: PPOStep(lr=0), "PPOStep.lr = 0; allowed"),
        (lambda: PPOStep(epochs=0), "PPOStep.epochs = 0; allowed"),
        (lambda: PPOStep(clip=1.0), "PPOStep.clip = 1.0; allowed"),
        (lambda: ReinforceStep(log_std_lr=-1), "ReinforceStep.log_std_lr = -1; allowed"),
        (lambda: TRPOStep(trust=0.1), "TRPOStep.trust = 0.1; allowed"),
        (lambda: TRPOStep(transitions=0), "TRPOStep.transitions = 0; allowed"),
        (lambda: ReptileStep(lr=0), "ReptileStep.lr = 0; allowed"),
        (lambda: GradientStep(lr=-1), "GradientStep.lr = -1; allowed"),
        (lambda: learner().meta_train(SHOP, 0, 0), "iterations = 0; allowed"),
        (lambda: SupervisedMAML(MLP((1, 1)), Inner(), shots=0), "SupervisedMAML.shots = 0; allowed"),
        (lambda: SupervisedMAML(MLP((1, 1)), Inner(), stage_weights=(1.0,)), "SupervisedMAML.stage_weights"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------- advantages
def test_standardised_and_per_transition_advantages():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6)[:, None, None] < torch.tensor([[3, 6, 4], [1, 2, 6]])).double()  # (T, M, N)
    advantage = torch.randn(6, 2, 3, generator=generator) * torch.tensor([1.0, 100.0])[:, None]
    found = standardise(advantage, mask)
    for task in range(2):
        live = found[:, task][mask[:, task] > 0]
        assert live.mean() == pytest.approx(0, abs=1e-12) and live.std(correction=0) == pytest.approx(1, abs=1e-6)
    assert (found[mask == 0] == 0).all()
    scaled = per_transition(found, mask)
    value = torch.randn(6, 2, 3, generator=generator)
    for task in range(2):
        over_steps = (value * found * mask)[:, task].sum() / mask[:, task].sum()
        assert (value * scaled * mask)[:, task].sum(0).mean() == pytest.approx(over_steps.item(), abs=1e-12)


def test_linear_feature_advantage_is_rllabs():
    """Against the recipe step by step in NumPy-like loops: features, ridge, GAE, standardise, mean over steps."""
    maml = learner()
    tasks = sample_tasks(SHOP, 2, torch.Generator().manual_seed(0))
    data = rollout(SHOP, tasks, maml.policy, start(maml), 12, seed=0)
    found = linear_feature_advantage()(data)
    exact = linear_feature_advantage(standardised=False, transitions=False)(data)
    assert torch.allclose(found, per_transition(standardise(exact, data.mask), data.mask), atol=1e-12)
    single = Trajectories(*(x.float() if x.is_floating_point() else x for x in data))
    assert linear_feature_advantage()(single).dtype == torch.float32
    assert torch.allclose(linear_feature_advantage()(single).double(), found, atol=1e-3)


# ------------------------------------------------------------------------------------------- supervised
class Lines:
    """Regression tasks y = slope x, one feature."""

    def tasks(self, task_id):
        return (task_id % 1000).double() / 500 - 1

    def sample(self, tasks, points, seed, episode=0):
        generator = torch.Generator().manual_seed(seed * 1000 + episode)
        x = torch.randn(len(tasks), points, 1, generator=generator)
        return x, tasks[:, None, None] * x


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("weights", [None, (0.0, 0.5, 0.5)])
@pytest.mark.parametrize("module", [False, True])
def test_supervised_gradient_is_the_reference(first_order, weights, module):
    network = Module(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), 1) if module else MLP((1, 4, 1))
    inner = Inner(steps=2, lr=0.3, first_order=first_order)
    maml = SupervisedMAML(network, inner, tasks=5, stage_weights=weights, chunk=2)
    meta = [torch.randn(p.shape) for p in maml.initial(torch.Generator().manual_seed(0))]
    objective = maml.objective(Lines(), meta, 0, 0)
    _, found = objective.gradient(meta, maml.loss)
    support, query = objective.stages[:-1], objective.stages[-1]
    loss = lambda p, data: mean_squared_error(network.outputs(p, data[0]), data[1])
    parts = []
    for steps, weight in ((1, 0.5), (2, 0.5)) if weights else ((2, 1.0),):
        parts.append([weight * g for g in meta_gradient(loss, loss, inner, meta, support[:steps], query, 0)])
    for g, *wanted in zip(found, *parts):
        assert torch.allclose(g, sum(wanted), rtol=1e-12, atol=1e-14)


def test_supervised_maml_learns_to_fit_lines():
    maml = SupervisedMAML(MLP((1, 1)), Inner(lr=0.3), GradientStep(lr=0.05), shots=5, tasks=20)
    trained = maml.meta_train(Lines(), seed=0, iterations=200, progress=False)
    tasks = Lines().tasks(torch.arange(0, 1000, 25))
    support, query = (Examples(*Lines().sample(tasks, 5, seed=9, episode=e)) for e in (0, 1))
    phi = maml.train_task(trained.meta, support, steps=3)
    losses = [maml.evaluate_task(p, query).mean().item() for p in phi]
    assert losses[0] > losses[1] > losses[2] > losses[3]
    # The slopes are symmetric about 0, so the best start is close to 0, with the loss of the mean task.
    assert trained.meta[0].abs().item() < 0.2


def test_classification_uses_the_same_code():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 8, 2, generator=generator), torch.randint(4, (3, 8), generator=generator)
    maml = SupervisedMAML(MLP((2, 4)), Inner(lr=0.5, steps=2), loss=cross_entropy_loss)
    meta = [torch.randn(p.shape, generator=generator) for p in maml.initial(generator)]
    phi = maml.train_task(meta, Examples(x, y))
    by_hand = torch.stack([nn.functional.cross_entropy(x[i] @ phi[-1][0][i] + phi[-1][1][i], y[i]) for i in range(3)])
    assert torch.allclose(maml.evaluate_task(phi[-1], Examples(x, y)), by_hand, atol=1e-12)
    assert (maml.evaluate_task(phi[-1], Examples(x, y)) < maml.evaluate_task(phi[0], Examples(x, y))).all()
    loss = lambda p, data: cross_entropy_loss(data[0] @ p[0] + p[1], data[1])
    alone = [p[0] for p in phi[0]]
    assert torch.allclose(loss(alone, Examples(x[0], y[0])), maml.evaluate_task(phi[0], Examples(x, y))[0])


def test_reptile_moves_to_the_mean_of_the_adapted():
    maml = SupervisedMAML(MLP((1, 1)), Inner(lr=0.3, steps=3), ReptileStep(lr=0.25), tasks=5, chunk=2)
    meta = [torch.randn(p.shape) for p in maml.initial(torch.Generator().manual_seed(0))]
    objective = maml.objective(Lines(), meta, 0, 0)
    phi = maml.train_task(meta, objective.stages[0])[-1]
    new, _, log = maml.outer.update(objective, meta, None)
    for before, after, p in zip(meta, new, phi):
        assert torch.allclose(after, before + 0.25 * (p.mean(0) - before), atol=1e-14)
    distance = sum(((p.mean(0) - m) ** 2).sum() for p, m in zip(phi, meta)).sqrt().item()
    assert log["distance"].item() == pytest.approx(distance, rel=1e-12)
    with pytest.raises(ValueError, match="learn_lr"):
        SupervisedMAML(MLP((1, 1)), Inner(learn_lr=True), ReptileStep()).meta_train(Lines(), 0, 1, progress=False)


def test_meta_sgd_finds_the_newton_step():
    """The step size that solves a line in one step is 1 / (2 mean x^2), about a half: what is left is the scatter of
    the mean of x^2, a relative variance of 2 / shots."""
    maml = SupervisedMAML(MLP((1, 1)), Inner(lr=0.05, learn_lr=True), GradientStep(lr=0.02), shots=50, tasks=20)
    trained = maml.meta_train(Lines(), seed=0, iterations=300, progress=False)
    slope_rate = trained.meta[2].item()
    assert slope_rate == pytest.approx(0.5, abs=0.05)
    recent = sum(log["loss"] for log in trained.history[-50:]) / 50
    assert recent == pytest.approx(2 / 50 / 3, rel=0.3)  # slopes are uniform on [-1, 1], of variance 1 / 3


def test_log_likelihood_is_the_default_inner_surrogate():
    assert Inner().surrogate is log_likelihood


# ------------------------------------------------------------------------------------------- derivatives by hand
@pytest.mark.parametrize("surrogate", [log_likelihood, ratio, dice])
@pytest.mark.parametrize("outer", [ReinforceStep(), PPOStep(epochs=2)])
def test_by_hand_and_autograd_take_the_same_outer_step(surrogate, outer):
    policy = CategoricalMLP((6, 5, 4, 3))
    results = []
    for by_hand in (True, False):
        config = MAMLConfig(4, 10, stage_weights=(0.2, 0.3, 0.5), by_hand=by_hand, chunk=3)
        maml = learner(outer, policy, config, steps=2, lr=(0.7, 0.3), surrogate=surrogate)
        objective = maml.objective(SHOP, start(maml), 0, 0)
        assert objective.by_hand is by_hand
        results.append(outer.update(objective, start(maml), None))
    (new, _, log), (wanted, _, wanted_log) = results
    for a, b in zip(new, wanted):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    for name, value in log.items():
        assert value.item() == pytest.approx(wanted_log[name].item(), rel=1e-9)


@pytest.mark.parametrize("surrogate", [log_likelihood, ratio, dice])
def test_by_hand_and_autograd_agree_on_gradient_and_curvature(surrogate):
    """Of TRPO-MAML; its step itself passes through conjugate gradient, which magnifies rounding."""
    policy, found = CategoricalMLP((6, 5, 4, 3)), []
    for by_hand in (True, False):
        config = MAMLConfig(4, 10, stage_weights=(0.2, 0.3, 0.5), by_hand=by_hand, chunk=3)
        maml = learner(TRPOStep(), policy, config, steps=2, lr=(0.7, 0.3), surrogate=surrogate)
        objective = maml.objective(SHOP, start(maml), 0, 0)
        _, gradient = objective.policy_gradient(start(maml), ratio, of_surrogate(policy, ratio))
        found.append((gradient, adapted_fisher_vector_product(objective, start(maml))(gradient)))
    for a, b in zip(*([*g, *p] for g, p in found)):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "change",
    [{}, {"first_order": True}, {"adapted": (2, 3)}, {"learn_lr": True}, {"learn_lr": True, "adapted": (0, 4)}],
)
@pytest.mark.parametrize("compacted", [True, False])
def test_by_hand_and_autograd_agree_for_gaussian_policies(change, compacted):
    policy = GaussianMLP((2, 5, 2), minimum_std=0.1)
    found = []
    for by_hand in (True, False):
        config = MAMLConfig(3, 4, stage_weights=(0.2, 0.3, 0.5), by_hand=by_hand, compact=compacted)
        maml = learner(TRPOStep(), policy, config, steps=2, lr=0.01, **change)
        meta = start(maml, spread=0.1)
        objective = maml.objective(PointNavigation(horizon=12, tolerance=0.2), meta, 0, 0)
        _, gradient = objective.policy_gradient(meta, ratio, of_surrogate(policy, ratio))
        product = adapted_fisher_vector_product(objective, meta, transitions=20)
        found.append((gradient, product(gradient)))
    for a, b in zip(*([*g, *p] for g, p in found)):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_by_hand_only_where_it_applies():
    class Upside(CategoricalMLP):
        """Looks like a softmax policy and is another."""

        def log_probs(self, parameters, observation):
            return torch.log_softmax(-self.outputs(parameters, observation), -1)

    for policy, config in (
        (Upside((6, 5, 3)), MAMLConfig(4, 10)),
        (Categorical(GRU(6, 5, 3)), MAMLConfig(4, 10)),
        (CategoricalMLP((6, 5, 3)), MAMLConfig(4, 10, sampling=True)),
        (CategoricalMLP((6, 5, 3), torch.relu), MAMLConfig(4, 10)),
    ):
        maml = learner(policy=policy, config=config)
        assert not maml.objective(SHOP, start(maml), 0, 0).by_hand


@pytest.mark.parametrize("loss", [mean_squared_error, cross_entropy_loss])
@pytest.mark.parametrize("change", [{}, {"first_order": True}, {"adapted": (2, 3)}, {"learn_lr": True}])
def test_supervised_by_hand_is_autograd(loss, change):
    class Source(Lines):
        def sample(self, tasks, points, seed, episode=0):
            x, y = super().sample(tasks, points, seed, episode)
            return (x, y) if loss is mean_squared_error else (x, (y[..., 0] > 0).long() + (x[..., 0] > 1).long())

    found = []
    for by_hand in (True, False):
        network = MLP((1, 4, 1 if loss is mean_squared_error else 3), torch.relu)
        inner, weights = Inner(**{"steps": 2, "lr": 0.3, **change}), (0.2, 0.3, 0.5)
        maml = SupervisedMAML(network, inner, loss=loss, tasks=5, stage_weights=weights, by_hand=by_hand, chunk=2)
        meta = [p + 0.3 for p in maml.initial(torch.Generator().manual_seed(0))]
        value, gradient = maml.objective(Source(), meta, 0, 0).gradient(meta, maml.loss)
        found.append([value, *gradient])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-14)


def test_compiled_engine_is_the_reference():
    """torch.compile of torch.func's grad in vmap in grad, for any module; fused kernels round differently."""
    torch.manual_seed(0)
    network = Module(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), 1)
    found = []
    for compiled in (True, False):
        maml = SupervisedMAML(network, Inner(lr=0.3), tasks=5, compile=compiled)
        meta = maml.initial(torch.Generator().manual_seed(0))
        value, gradient = maml.objective(Lines(), meta, 0, 0).gradient(meta, maml.loss)
        found.append([value, *gradient])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_engines_refuse_what_they_cannot_do():
    module = Module(nn.Linear(1, 1), 1)
    with pytest.raises(ValueError, match="SupervisedMAML.by_hand = True; allowed: False"):
        SupervisedMAML(module, Inner(), by_hand=True)
    with pytest.raises(ValueError, match="SupervisedMAML.compile = True; allowed"):
        SupervisedMAML(module, Inner(), compile=True, stage_weights=(0.5, 0.5))


@pytest.mark.parametrize("seed", [0, 1])
def test_training_never_meets_the_fixed_lists(seed):
    """The list of 1,000 test tasks is drawn by a generator of its own, and so are the others."""
    fixed = torch.cat([split(ShopMDP(), name, 1000)[1].id for name in ("train", "test", "shifted")])
    drawn = torch.cat([sample_tasks(ShopMDP(), 20, iteration_generator(seed, i)).id for i in range(50)])
    assert len(drawn.unique()) == len(drawn)
    assert not torch.isin(drawn, fixed).any()
