"""TRPO: conjugate gradient, Fisher-vector products, the step against closed forms, and a line search that restores."""

import math
import re

import pytest
import torch

from ecomlib.exact import all_trajectories, expected_return
from ecomlib.families.base import split, take
from ecomlib.families.tabular import STATES, ShopMDP
from ecomlib.learners.trpo import (
    TRPO,
    TRPOConfig,
    conjugate_gradient,
    fisher_vector_product,
    mean_kl,
    trust_region_step,
)
from ecomlib.policies import CategoricalMLP, GaussianMLP, per_task
from ecomlib.rollout import rollout

SHOP = ShopMDP()
POLICY = CategoricalMLP((SHOP.observation_size, SHOP.actions))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tasks():
    return split(SHOP, "test", 4)[1]


def flat(tensors, tasks=0):
    return torch.cat([t.reshape(*t.shape[:tasks], -1) for t in tensors], -1)


def positive_definite(generator, *shape):
    root = torch.randn(*shape, shape[-1], generator=generator)
    return root @ root.mT + 0.1 * torch.eye(shape[-1])


# ----------------------------------------------------------------------------------------- conjugate gradient
@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_conjugate_gradient_solves(generator, shape):
    matrix, b = positive_definite(generator, *shape), torch.randn(*shape, generator=generator)
    found = conjugate_gradient(lambda x: (matrix @ x[..., None])[..., 0], b, iterations=30)
    assert torch.allclose(found, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-10)


def test_conjugate_gradient_needs_one_iteration_per_distinct_eigenvalue(generator):
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    matrix = basis @ torch.diag(torch.tensor([1.0, 1, 4, 4, 9, 9])) @ basis.T
    b, products = torch.randn(6, generator=generator), []

    def matvec(x):
        products.append(1)
        return matrix @ x

    exact = torch.linalg.solve(matrix, b)
    assert torch.allclose(conjugate_gradient(matvec, b, iterations=50), exact, atol=1e-12) and len(products) <= 4
    assert (conjugate_gradient(matvec, b, iterations=2) - exact).norm() > 1e-3 * exact.norm()


def test_systems_do_not_mix(generator):
    """One solved at once, one without a right side, one that is not positive definite, one that takes its time."""
    matrix = torch.stack((torch.eye(5), torch.eye(5), -torch.eye(5), positive_definite(generator, 5)))
    b = torch.randn(4, 5, generator=generator)
    b[1] = 0
    found = conjugate_gradient(lambda x: (matrix @ x[..., None])[..., 0], b, iterations=30)
    assert torch.allclose(found[0], b[0]) and not found[1].any() and not found[2].any()
    assert torch.allclose(found[3], torch.linalg.solve(matrix[3], b[3]), rtol=1e-8)


# --------------------------------------------------------------------------------------- Fisher-vector products
def explicit_fisher(policy, parameters, data):
    """Mean over the visited steps of E_a[score score^T], each score by its own backward pass."""
    total, visited = 0.0, 0
    for t, n in data.mask[:, 0].nonzero().tolist():
        observation = data.observation[t, 0, n].expand(1, 1, -1)
        for action in range(SHOP.actions):
            log_prob = policy.log_prob(parameters, observation, torch.tensor([[action]]))
            score = flat(torch.autograd.grad(log_prob.sum(), parameters))
            total = total + log_prob.exp().item() * torch.outer(score, score)
        visited += 1
    return total / visited


@pytest.mark.parametrize("sizes", [(6, 3), (6, 4, 3)])
def test_fisher_vector_product_is_the_fisher_matrix(generator, tasks, sizes):
    policy, task = CategoricalMLP(sizes), take(tasks, [2])
    parameters = [torch.randn(p.shape, generator=generator).requires_grad_() for p in policy.initial(generator)]
    data = rollout(SHOP, task, policy, parameters, 5, seed=0)
    old = tuple(d.detach() for d in policy.distribution(parameters, data.observation))
    product = fisher_vector_product(mean_kl(policy, old, parameters, data), parameters)
    fisher = explicit_fisher(policy, parameters, data)
    for _ in range(3):
        vector = [torch.randn(p.shape, generator=generator) for p in parameters]
        found = flat(product(vector))
        assert torch.allclose(found, fisher @ flat(vector), rtol=1e-10, atol=1e-12)

        def slope(step, vector=vector):
            """Gradient of the KL divergence at parameters + step * vector: its difference quotient is F v."""
            moved = [(p + step * v).detach().requires_grad_() for p, v in zip(parameters, vector, strict=True)]
            return flat(torch.autograd.grad(mean_kl(policy, old, moved, data).sum(), moved))

        assert torch.allclose(found, (slope(1e-5) - slope(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


def test_products_of_tasks_do_not_mix(generator, tasks):
    parameters = [torch.randn(4, *p.shape, generator=generator).requires_grad_() for p in POLICY.initial(generator)]
    data = rollout(SHOP, tasks, POLICY, parameters, 5, seed=0)
    vector = [torch.randn(p.shape, generator=generator) for p in parameters]
    old = tuple(d.detach() for d in POLICY.distribution(parameters, data.observation))
    together = fisher_vector_product(mean_kl(POLICY, old, parameters, data), parameters)(vector)
    for task in range(4):
        own = [p[task : task + 1].detach().requires_grad_() for p in parameters]
        fisher = explicit_fisher(POLICY, own, type(data)(*(x[:, task : task + 1] for x in data)))
        found = flat([v[task] for v in together])
        assert torch.allclose(found, fisher @ flat([v[task] for v in vector]), rtol=1e-10, atol=1e-12)


def test_gaussian_fisher_is_the_closed_form(generator):
    """Of (mean, log std) it is diag(1 / std^2, 2)."""
    policy = GaussianMLP((1, 1), initial_mean=0.4, initial_std=0.3)
    parameters = [p.requires_grad_() for p in policy.initial(generator)]
    observation = torch.zeros(1, 1, 1)
    old = tuple(d.detach() for d in policy.distribution(parameters, observation))
    kl = policy.kl(old, policy.distribution(parameters, observation))
    product = fisher_vector_product(kl, parameters)([torch.ones_like(p) for p in parameters])
    assert torch.allclose(flat(product), torch.tensor([0.0, 1 / 0.3**2, 2.0]), atol=1e-10)


# --------------------------------------------------------------------------------------------------- the step
REWARD = torch.tensor([[0.2, 1.0, 0.5], [0.3, 0.1, 0.0]], dtype=torch.float64)  # two bandits with three arms


def bandit(logits, config, objective=None):
    """One exact trust-region step of softmax bandits; ``logits`` (A,) is one, (M, A) are several."""
    logits = logits.clone().requires_grad_()
    reward = REWARD[0] if logits.dim() == 1 else REWARD
    objective = objective or (lambda p: (torch.softmax(p, -1) * reward).sum(-1))
    old = torch.log_softmax(logits, -1).detach()
    kl = lambda p: (old.exp() * (old - torch.log_softmax(p, -1))).sum(-1)
    gradient = torch.autograd.grad(objective(logits).sum(), logits)
    product = fisher_vector_product(kl(logits), [logits])
    new, report = trust_region_step([logits], gradient, product, lambda p: (objective(p[0]), kl(p[0])), config)
    return logits.detach(), new[0], report


@pytest.mark.parametrize("logits", [[0.5, -0.3, 0.1], [[0.5, -0.3, 0.1], [0.0, 0.4, 1.0]]])
def test_first_step_is_the_natural_gradient_in_closed_form(logits):
    """F^-1 grad J of a softmax bandit is the reward itself, less a constant; its length puts the quadratic at delta."""
    config, logits = TRPOConfig(radius=1e-4, damping=0.0), torch.tensor(logits)
    old, new, report = bandit(logits, config)
    reward = REWARD[0] if logits.dim() == 1 else REWARD
    natural = reward - reward.mean(-1, keepdim=True)
    probability = torch.softmax(logits, -1)
    mean = (probability * natural).sum(-1, keepdim=True)
    quadratic = (probability * (natural - mean) ** 2).sum(-1, keepdim=True)  # x^T F x
    full = (2 * config.radius / quadratic).sqrt() * natural
    expected = old + config.backtrack_ratio ** report.backtracks[..., None] * full
    assert report.accepted.all() and report.accepted.shape == logits.shape[:-1]
    assert torch.allclose(new, expected, atol=1e-10)
    assert (report.backtracks <= 1).all()  # at most one, where the KL is a hair above its quadratic
    assert (report.kl <= config.radius).all() and (report.kl > 0.6 * config.radius).all()
    first_order = (probability * (natural - mean) * (new - old)).sum(-1)
    assert torch.allclose(report.improvement, first_order, rtol=0.05)


def test_an_objective_that_falls_leaves_the_old_parameters():
    """A gradient that lies: the objective falls wherever the step goes."""
    start = torch.tensor([0.5, -0.3, 0.1])
    logits = start.clone().requires_grad_()
    asked = []

    def evaluate(parameters):
        asked.append(parameters[0])
        return -float((parameters[0] - start).norm()), 0.0

    new, report = trust_region_step(
        [logits], [torch.ones(3)], lambda v: v, evaluate, TRPOConfig(backtracks=4, backtrack_ratio=0.5)
    )
    assert torch.equal(new[0], start) and not report.accepted
    assert report.kl == 0 and report.improvement == 0 and report.backtracks == 4
    lengths = [(p - start).norm() for p in asked]
    assert len(asked) == 6 and lengths[0] == 0
    assert torch.allclose(torch.stack(lengths[2:]) / torch.stack(lengths[1:-1]), torch.full((4,), 0.5))
    assert lengths[1] == pytest.approx(math.sqrt(2 * 0.01 / (1 + 1e-5)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_each_task_is_searched_on_its_own(bad):
    """Four tasks: fine at once; fine after shortening; KL always too large; objective never a comparable number."""

    def evaluate(parameters):
        moved = (parameters[0] - 1).norm(dim=-1)
        objective = torch.stack((moved[0], moved[1], moved[2], torch.where(moved[3] > 0, bad, 0.0)))
        kl = torch.stack((moved[0] ** 2 / 2, moved[1] ** 2, torch.tensor(1.0), torch.tensor(bad)))
        return objective, torch.where(moved > 0, kl, 0.0)

    config = TRPOConfig(damping=0.0, backtrack_ratio=0.5)
    new, report = trust_region_step([torch.ones(4, 2)], [torch.ones(4, 2)], lambda v: v, evaluate, config)
    assert report.accepted.tolist() == [True, True, False, False]
    assert report.backtracks.tolist()[1:] == [1, 15, 15] and report.backtracks[0] <= 1
    assert torch.equal(new[0][2:], torch.ones(2, 2)) and (new[0][:2] > 1).all()
    assert (report.kl <= config.radius).all() and (report.improvement[:2] > 0).all()


def test_no_gradient_no_step():
    new, report = trust_region_step(
        [torch.ones(3)], [torch.zeros(3)], lambda v: v, lambda p: (float(p[0].sum()), 0.0), TRPOConfig()
    )
    assert torch.equal(new[0], torch.ones(3)) and not report.accepted


def test_a_gradient_or_a_product_that_is_not_finite_is_named():
    evaluate = lambda p: (p[0].sum(-1), p[0].sum(-1) * 0)
    ones, bad = torch.ones(3, 2), torch.tensor([[1.0, 1.0], [1.0, 1.0], [math.nan, 1.0]])
    with pytest.raises(FloatingPointError, match="^gradient of task 2, tensor 0"):
        trust_region_step([ones], [bad], lambda v: v, evaluate, TRPOConfig())
    with pytest.raises(FloatingPointError, match="^natural gradient of task 2, tensor 0"):
        trust_region_step([ones], [ones], lambda v: [v[0] * bad], evaluate, TRPOConfig())
    with pytest.raises(FloatingPointError, match="^gradient, tensor 0"):
        trust_region_step([ones[0]], [bad[2]], lambda v: v, evaluate, TRPOConfig())


# ------------------------------------------------------------------------------------------------ the learner
def test_step_keeps_every_task_within_its_radius(generator, tasks):
    learner = TRPO(POLICY, TRPOConfig(radius=0.02), episodes=20)
    parameters = per_task(POLICY.initial(generator), 4)
    data = rollout(SHOP, tasks, POLICY, parameters, 20, seed=0)
    new, report = learner.step(parameters, data)
    kl = mean_kl(POLICY, POLICY.distribution(parameters, data.observation), new, data)
    assert report.accepted.all() and torch.allclose(kl, report.kl, atol=1e-14)
    assert (kl <= 0.02).all() and (kl > 0.008).all()
    visited = data.mask.sum((0, 2))
    by_hand = POLICY.kl(POLICY.distribution(parameters, data.observation), POLICY.distribution(new, data.observation))
    assert torch.allclose(kl, (by_hand * data.mask).sum((0, 2)) / visited)


def test_a_small_step_on_every_trajectory_gains_what_the_gradient_says(generator, tasks):
    """With all trajectories for data the natural direction solves F x = grad J, F and J exact."""
    task, parameters = take(tasks, [1]), [p.requires_grad_() for p in POLICY.initial(generator)]
    data, chance = all_trajectories(SHOP, task, POLICY, parameters)
    gradient = torch.autograd.grad(expected_return(SHOP, task, POLICY, parameters).sum(), parameters)
    old = tuple(d.detach() for d in POLICY.distribution(parameters, data.observation))
    chance = chance.detach()

    def divergence(p):
        kl = POLICY.kl(old, POLICY.distribution(p, data.observation))
        return (kl * data.mask * chance).sum() / (data.mask * chance).sum()

    evaluate = lambda p: (expected_return(SHOP, task, POLICY, p).item(), divergence(p).item())
    product = fisher_vector_product(divergence(parameters), parameters)
    config = TRPOConfig(radius=1e-6, cg_iterations=25, damping=1e-8)
    new, report = trust_region_step(parameters, gradient, product, evaluate, config)
    size = sum(p.numel() for p in parameters)
    columns = [product(_shaped(row, parameters)) for row in torch.eye(size)]
    fisher = torch.stack([flat(column) for column in columns])
    g = flat(gradient)
    best = math.sqrt(2 * config.radius * (g @ torch.linalg.pinv(fisher, rtol=1e-10) @ g))
    shortened = config.backtrack_ratio ** report.backtracks.item()
    assert report.accepted and report.improvement.item() == pytest.approx(shortened * best, rel=0.01)
    assert flat(new).shape == g.shape


def _shaped(vector, parameters):
    parts = vector.split([p.numel() for p in parameters])
    return [part.reshape(p.shape) for part, p in zip(parts, parameters, strict=True)]


def train(tasks, seed=0, iterations=10, episodes=8, **settings):
    return TRPO(POLICY, TRPOConfig(**settings), iterations, episodes).train(SHOP, tasks, seed, progress=False)


def test_learns(tasks):
    curve = train(tasks, iterations=60, episodes=24, radius=0.05)
    start = POLICY.initial(torch.Generator().manual_seed(0))
    before, after = (expected_return(SHOP, tasks, POLICY, p) for p in (start, curve.parameters))
    assert (after > before).all() and (after - before).mean() > 0.03
    assert (after < SHOP.oracle_return(tasks)).all()
    assert curve.returns.shape == (60, 4) and curve.episodes.tolist() == list(range(0, 60 * 24, 24))


def test_a_task_learns_the_same_alone_and_in_a_batch(tasks):
    together = train(tasks)
    for task in (0, 3):
        alone = train(take(tasks, [task]))
        assert torch.equal(alone.returns[:, 0], together.returns[:, task])
        for one, all_tasks in zip(alone.parameters, together.parameters, strict=True):
            assert torch.allclose(one[0], all_tasks[task], atol=1e-7)


def test_the_unit_of_money_does_not_matter(tasks):
    pounds, pence = train(tasks), train(tasks._replace(reward=100 * tasks.reward))
    for p, q in zip(pounds.parameters, pence.parameters, strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    curve = train(split(SHOP, "test", 4)[1])
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in curve.parameters)


def test_a_value_that_is_not_finite_is_named(tasks):
    reward = tasks.reward.clone()
    reward[3, STATES.index("browse")] = math.nan
    with pytest.raises(FloatingPointError, match="iteration 0: gradient of task 3, tensor 0"):
        train(tasks._replace(reward=reward))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("radius", 0.0),
        ("radius", math.inf),
        ("damping", -1e-9),
        ("damping", math.nan),
        ("cg_iterations", 0),
        ("cg_iterations", 2.0),
        ("backtracks", -1),
        ("backtrack_ratio", 1.0),
        ("backtrack_ratio", 0),
        ("backtrack_ratio", "x"),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=rf"^TRPOConfig\.{field} = {re.escape(repr(value))}; allowed: \S"):
        TRPOConfig(**{field: value})


@pytest.mark.parametrize(("name", "value"), [("iterations", 0), ("episodes", 1), ("episodes", 8.0)])
def test_bad_counts_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} = {value}; allowed"):
        TRPO(POLICY, **{name: value})
