"""Chapter "MAML, derived": both sides of every numbered equation, on a scalar, on quadratics, on a small network."""

import itertools
import math

import pytest
import torch
from torch.func import grad, hessian, jacrev, vmap
from torch.nn.utils import parameters_to_vector

from ecomlib.families.sinusoid import Sinusoid, least_squares_sine
from ecomlib.learners.adaptation import Inner, adapt, adapt_task, meta_gradient
from ecomlib.learners.first_order import ReptileStep
from ecomlib.learners.supervised import Examples, SupervisedMAML, mean_squared_error
from ecomlib.networks import MLP

FAMILY, NETWORK, TASKS = Sinusoid(), MLP((1, 6, 1)), 4
RATE = 0.07


def loss(parameters, data):
    return mean_squared_error(NETWORK.outputs(parameters, data[0]), data[1])


@pytest.fixture
def theta():
    """A network away from its small initial output layer, so that nothing is near zero."""
    return [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        for i, p in enumerate(NETWORK.initial(torch.Generator()))
    ]


@pytest.fixture
def data():
    """Four tasks: three data sets to adapt with, one to be judged by."""
    tasks = FAMILY.tasks(torch.arange(TASKS))
    sets = [Examples(*FAMILY.sample(tasks, 10, seed=0, episode=k)) for k in range(4)]
    return sets[:3], sets[3]


def only(data, i):
    return Examples(data.x[i], data.y[i])


def unflatten(vector, like):
    return [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in like]), like)]


def flat(tensors):
    return parameters_to_vector([t.contiguous() for t in tensors])


def of_vector(data, like):
    """The loss of one task's data as a function of all parameters in one vector."""
    return lambda vector: loss(unflatten(vector, like), data)


def central(function, at, step=1e-5):
    """Central differences of a scalar function of a vector."""
    moves = step * torch.eye(len(at))
    return torch.stack([(function(at + m) - function(at - m)) / (2 * step) for m in moves])


def meta_objective(theta, data, steps, rate=RATE, weights=None):
    """Mean over tasks of sum_k w_k L(phi_k), by ``adapt``."""
    support, query = data
    stages = adapt(loss, Inner(steps=steps, lr=rate), theta, support[:steps], TASKS)
    weights = weights or [0.0] * steps + [1.0]
    return sum(w * loss(phi, query) for w, phi in zip(weights, stages)).mean()


def path(theta, data, i, steps):
    """Task i by hand, in flat coordinates: phi_0, ..., phi_K, the Hessians at phi_0, ..., phi_{K-1}, the query loss."""
    support, query = data
    phi, hessians = [flat(theta)], []
    for k in range(steps):
        of_support = of_vector(only(support[k], i), theta)
        hessians.append(hessian(of_support)(phi[-1]))
        phi.append(phi[-1] - RATE * grad(of_support)(phi[-1]))
    return phi, hessians, of_vector(only(query, i), theta)


def through(hessians, vector, rate=RATE):
    """(I - a H_0)(I - a H_1)...(I - a H_{K-1}) v."""
    for H in reversed(hessians):
        vector = vector - rate * H @ vector
    return vector


# ------------------------------------------------------------------------------------------- the definition
def test_inner_step(theta, data):
    """All tasks at once, one task by torch.func, and the formula by plain autograd."""
    support, _ = data
    inner = Inner(steps=3, lr=RATE)
    stages = adapt(loss, inner, theta, support, TASKS)
    for i in range(TASKS):
        phi = [p.clone().requires_grad_() for p in theta]
        for k in range(3):
            gradient = torch.autograd.grad(loss(phi, only(support[k], i)), phi)
            phi = [(p - RATE * g).detach().requires_grad_() for p, g in zip(phi, gradient)]
            torch.testing.assert_close(flat([s[i] for s in stages[k + 1]]), flat(phi), rtol=1e-12, atol=1e-14)
        one = adapt_task(loss, inner, theta, [only(s, i) for s in support])
        torch.testing.assert_close(flat(one), flat(phi), rtol=1e-12, atol=1e-14)


def test_objective(theta, data):
    """The mean over tasks of the query loss after the step, task by task."""
    by_hand = torch.stack([of_query(phi[-1]) for phi, _, of_query in (path(theta, data, i, 1) for i in range(TASKS))])
    torch.testing.assert_close(meta_objective(theta, data, 1), by_hand.mean(), rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------- the gradient
def test_jacobian_of_the_step(theta, data):
    at, of_support = flat(theta), of_vector(only(data[0][0], 0), theta)
    step = lambda vector: vector - RATE * grad(of_support)(vector)
    right = torch.eye(len(at)) - RATE * hessian(of_support)(at)
    torch.testing.assert_close(jacrev(step)(at), right, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(right, right.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_meta_gradient(theta, data, steps):
    """Hessian factors = autograd = torch.func = central differences; leaving the factors out is another vector."""
    at = flat(theta)
    parts = [path(theta, data, i, steps) for i in range(TASKS)]
    factors = torch.stack([through(H, grad(of_query)(phi[-1])) for phi, H, of_query in parts]).mean(0)
    leaves = [p.clone().requires_grad_() for p in theta]
    autograd = flat(torch.autograd.grad(meta_objective(leaves, data, steps), leaves))
    inner = Inner(steps=steps, lr=RATE)
    functional = flat(meta_gradient(loss, loss, inner, theta, data[0][:steps], data[1], task_axis=0))
    difference = central(lambda v: meta_objective(unflatten(v, theta), data, steps).detach(), at)
    torch.testing.assert_close(autograd, factors, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(functional, factors, rtol=1e-10, atol=1e-12)
    assert (difference - factors).norm() < 1e-7 * factors.norm()
    without = torch.stack([grad(of_query)(phi[-1]) for phi, _, of_query in parts]).mean(0)
    assert (without - factors).norm() > 0.1 * factors.norm()
    if steps > 1:  # the order of the factors matters
        backwards = torch.stack([through(H[::-1], grad(of_query)(phi[-1])) for phi, H, of_query in parts]).mean(0)
        assert (backwards - factors).norm() > 1e-3 * factors.norm()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_first_order_error(theta, data, steps):
    """FOMAML minus MAML = mean over tasks of (I - product of factors) times the outer gradient."""
    leaves = [p.clone().requires_grad_() for p in theta]
    gradients = []
    for first_order in (True, False):
        inner = Inner(steps=steps, lr=RATE, first_order=first_order)
        after = loss(adapt(loss, inner, leaves, data[0][:steps], TASKS)[-1], data[1]).mean()
        gradients.append(flat(torch.autograd.grad(after, leaves)))
    error = []
    for i in range(TASKS):
        phi, H, of_query = path(theta, data, i, steps)
        outer = grad(of_query)(phi[-1])
        error.append(outer - through(H, outer))
    error = torch.stack(error).mean(0)
    torch.testing.assert_close(gradients[0] - gradients[1], error, rtol=1e-9, atol=1e-12)
    assert error.norm() > 0.1 * gradients[1].norm()


def test_finite_difference(theta, data):
    """The error of central differences falls as the square of the step: halved, it is a quarter."""
    at, direction = flat(theta), torch.ones(len(flat(theta)))
    objective = lambda v: meta_objective(unflatten(v, theta), data, 1)
    slope = grad(lambda t: objective(at + t * direction))(torch.zeros(()))
    third = grad(grad(grad(lambda t: objective(at + t * direction))))(torch.zeros(()))
    difference = lambda h: (objective(at + h * direction) - objective(at - h * direction)) / (2 * h)
    error = lambda h: (difference(h) - slope).item()
    assert error(1e-3) == pytest.approx(third.item() * 1e-6 / 6, rel=1e-3)
    assert error(2e-3) / error(1e-3) == pytest.approx(4, rel=1e-3)


# ------------------------------------------------------------------------------------------- by hand, closed form
def test_scalar_task():
    """The numbers of the page, as fractions of integers, by the library's own step."""
    square = lambda parameters, data: (parameters[0] - data) ** 2  # curvature 2
    theta = [torch.tensor([[1.0]], requires_grad=True)]
    support, query = torch.tensor([[[3.0]]]), torch.tensor([[[4.0]]])
    scalar = lambda parameters, data: square(parameters, data).flatten(1).sum(1)
    for steps, phi, gradient in ((1, 2.0, -2.0), (2, 2.5, -0.75)):
        stages = adapt(scalar, Inner(steps=steps, lr=0.25), theta, [support] * steps, 1)
        assert stages[-1][0].item() == phi
        assert torch.autograd.grad(scalar(stages[-1], query).sum(), theta)[0].item() == gradient
    first = adapt(scalar, Inner(lr=0.25, first_order=True), theta, [support], 1)
    assert torch.autograd.grad(scalar(first[-1], query).sum(), theta)[0].item() == -4.0


@pytest.fixture
def quadratics():
    """Curvatures A (M, d, d) and optima c (M, d) of five quadratic tasks; in two, rate 1 oversteps."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(5, 3, 3, generator=generator)
    A = factor @ factor.mT / 3 + 0.1 * torch.eye(3)
    A = A / torch.linalg.matrix_norm(A, 2)[:, None, None] * torch.tensor([0.2, 0.5, 1.0, 1.2, 1.5])[:, None, None]
    return A, torch.randn(5, 3, generator=generator)


def quadratic(parameters, data):
    A, c = data
    gap = parameters[0].squeeze(-2) - c  # parameters (M, 1, d)
    return 0.5 * torch.einsum("mi,mij,mj->m", gap, A, gap)


def after_steps(quadratics, theta, steps, rate=1.0, first_order=False):
    inner = Inner(steps=steps, lr=rate, first_order=first_order)
    return adapt(quadratic, inner, [theta], [quadratics] * steps, 5)


def power(A, steps, rate=1.0):
    return torch.linalg.matrix_power(torch.eye(3) - rate * A, steps)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_quadratic_objective(quadratics, steps):
    A, c = quadratics
    theta = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    gap = theta - c
    right = 0.5 * torch.einsum("mi,mij,mj->m", gap, A @ power(A, 2 * steps), gap)
    left = quadratic(after_steps(quadratics, theta, steps)[-1] if steps else [theta[None].expand(5, 1, 3)], quadratics)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-14)


def weighted_centre(weights, c):
    return torch.linalg.solve(weights.sum(0), (weights @ c[..., None]).sum(0))[:, 0]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_quadratic_optimum(quadratics, steps):
    """The gradient vanishes at theta*; the average-task optimum is elsewhere and worse after adaptation."""
    A, c = quadratics
    best = weighted_centre(A @ power(A, 2 * steps), c)
    F = lambda theta: quadratic(after_steps(quadratics, theta, steps)[-1], quadratics).mean()
    at = best[None].clone().requires_grad_()
    assert torch.autograd.grad(F(at), at)[0].abs().max() < 1e-14
    average = weighted_centre(A, c)
    assert F(average[None]) > F(best[None])
    same = A[:1].expand_as(A)  # where all tasks are equally curved, they coincide
    torch.testing.assert_close(weighted_centre(same @ power(same, 2 * steps), c), c.mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weighted_centre(same, c), c.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_quadratic_weights(quadratics, steps):
    """Where FOMAML's and Reptile's updates vanish."""
    A, c = quadratics
    theta = weighted_centre(A @ power(A, steps), c)[None].clone().requires_grad_()
    F = quadratic(after_steps(quadratics, theta, steps, first_order=True)[-1], quadratics).mean()
    assert torch.autograd.grad(F, theta)[0].abs().max() < 1e-14
    theta = weighted_centre(torch.eye(3) - power(A, steps), c)[None]
    moved = after_steps(quadratics, theta, steps)[-1][0]
    assert (theta - moved).mean(0).abs().max() < 1e-14


def test_full_adaptation_forgets_the_start(quadratics):
    """As K grows the product of factors vanishes, and with it the gradient with respect to the initialisation."""
    theta = torch.randn(1, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    size = []
    for steps in (1, 10, 100, 2000):
        F = quadratic(after_steps(quadratics, theta, steps)[-1], (quadratics[0], quadratics[1] + 1)).mean()
        size.append(torch.autograd.grad(F, theta)[0].norm().item())
    assert size == sorted(size, reverse=True) and size[-1] < 1e-9 * size[0]


def test_stability(quadratics):
    """Descent on a quadratic converges from everywhere if rate * curvature < 2, and runs away beyond."""
    A, c = quadratics  # the largest curvature is 1.5
    largest = torch.linalg.eigvalsh(A)[:, -1]
    for rate in (1.3, 1.4):
        phi = after_steps(quadratics, torch.zeros(1, 3), 2000, rate)[-1][0][:, 0]
        assert torch.equal((phi - c).norm(dim=1) < 1e-6, rate * largest < 2)


# ------------------------------------------------------------------------------------------- variations
def test_multi_step_loss(theta, data):
    """Each stage brings its own product of factors; w_0 brings the gradient without adaptation."""
    weights = [0.1, 0.2, 0.3, 0.4]
    leaves = [p.clone().requires_grad_() for p in theta]
    left = flat(torch.autograd.grad(meta_objective(leaves, data, 3, weights=weights), leaves))
    right = torch.zeros_like(left)
    for i in range(TASKS):
        phi, H, of_query = path(theta, data, i, 3)
        right += sum(w * through(H[:k], grad(of_query)(phi[k])) for k, w in enumerate(weights)) / TASKS
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_step_size_gradient(theta, data):
    """Meta-SGD: minus the support gradient times the outer gradient, number by number."""
    support, query = data
    inner = Inner(lr=RATE, learn_lr=True)
    sizes = [s.requires_grad_() for s in inner.step_sizes(theta)]
    phi = adapt(loss, inner, theta, support[:1], TASKS, step_sizes=sizes)[-1]
    left = flat(torch.autograd.grad(loss(phi, query).mean(), sizes))
    at, right = flat(theta), 0.0
    for i in range(TASKS):
        path_, _, of_query = path(theta, data, i, 1)
        right -= grad(of_vector(only(support[0], i), theta))(at) * grad(of_query)(path_[1]) / TASKS
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_head_only(theta, data):
    """ANIL: only the last layer moves; the others' meta-gradient still passes through the head's step."""
    inner = Inner(lr=RATE, adapted=NETWORK.head)
    leaves = [p.clone().requires_grad_() for p in theta]
    phi = adapt(loss, inner, leaves, data[0][:1], TASKS)[-1]
    assert [p.dim() for p in phi] == [2, 2, 3, 3]
    left = flat(torch.autograd.grad(loss(phi, data[1]).mean(), leaves))
    objective = lambda v: loss(adapt(loss, inner, unflatten(v, theta), data[0][:1], TASKS)[-1], data[1]).mean().detach()
    right = central(objective, flat(theta))
    assert (left - right).norm() < 1e-7 * left.norm()


def test_reptile(theta):
    """The library's outer step, against steps of plain descent, task by task."""
    learner = SupervisedMAML(NETWORK, Inner(steps=3, lr=RATE), ReptileStep(lr=0.25), tasks=TASKS)
    objective = learner.objective(FAMILY, theta, seed=0, iteration=0)
    moved, _, _ = learner.outer.update(objective, theta, None)
    ends = [path(theta, (objective.stages[:3], objective.stages[3]), i, 3)[0][-1] for i in range(TASKS)]
    right = flat(theta) + 0.25 * (torch.stack(ends).mean(0) - flat(theta))
    torch.testing.assert_close(flat(moved), right, rtol=1e-12, atol=1e-14)


def two_batches(rate, steps):
    """Expectation, over all draws of ``steps`` mini-batches out of three, of Reptile's displacement / rate, on cubic
    losses of one parameter; and the right-hand side of the expansion without its remainder."""
    theta, batches = 0.3, [(1.0, 0.4, 0.1), (0.7, -0.5, 0.2), (1.6, 0.1, 0.3)]  # a, c, b
    slope = lambda x, batch: batch[0] * (x - batch[1]) + batch[2] * x**2
    curve = lambda x, batch: batch[0] + 2 * batch[2] * x
    total = 0.0
    for drawn in itertools.product(batches, repeat=steps):
        phi = theta
        for batch in drawn:
            phi -= rate * slope(phi, batch)
        total += (theta - phi) / rate / len(batches) ** steps
    mean_slope = sum(slope(theta, b) for b in batches) / 3
    pairs = sum(curve(theta, b) * slope(theta, c) for b, c in itertools.product(batches, batches)) / 9
    return total, steps * mean_slope - rate * steps * (steps - 1) / 2 * pairs


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_reptile_expansion(steps):
    """The remainder is of second order in the step size: a tenth of the step, a hundredth of the remainder."""
    remainder = [abs(left - right) for left, right in (two_batches(rate, steps) for rate in (1e-2, 1e-3))]
    if steps == 1:
        assert max(remainder) < 1e-12
    else:
        assert remainder[1] > 0 and remainder[0] / remainder[1] == pytest.approx(100, rel=0.1)


def test_reptile_inner_product():
    """The mean over pairs of H_1 g_2 is half the gradient of the mean inner product of two mini-batch gradients."""
    generator = torch.Generator().manual_seed(0)
    A, theta = torch.randn(3, 4, 4, generator=generator), torch.randn(4, generator=generator)
    batch_loss = lambda theta, A: (A @ theta).tanh().square().sum()
    gradients = lambda theta: vmap(grad(batch_loss), (None, 0))(theta, A)
    mean_product = lambda theta: (gradients(theta) @ gradients(theta).T).mean()
    left = vmap(hessian(batch_loss), (None, 0))(theta, A).mean(0) @ gradients(theta).mean(0)
    torch.testing.assert_close(left, 0.5 * grad(mean_product)(theta), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------- sinusoids
def test_sine_is_linear():
    tasks = FAMILY.tasks(torch.arange(100))
    x, y = FAMILY.sample(tasks, 10, seed=0)
    A, b = tasks.amplitude[:, None, None], tasks.phase[:, None, None]
    torch.testing.assert_close(y, A * b.cos() * x.sin() - A * b.sin() * x.cos(), rtol=1e-12, atol=1e-12)
    grid, value = FAMILY.grid(tasks)
    torch.testing.assert_close(least_squares_sine(x, y, grid), value, rtol=1e-9, atol=1e-9)


def test_average_curve():
    """What the best predictor that does not adapt answers, and its mean squared error, within 5 standard errors."""
    tasks = FAMILY.tasks(torch.arange(100_000))
    mean_amplitude, mean_square = (0.1 + 5) / 2, (5**3 - 0.1**3) / (3 * 4.9)
    x = torch.tensor([-4.0, 0.0, 1.5])[:, None].expand(len(tasks.id), 3, 1)
    values = FAMILY.value(tasks, x)[..., 0]
    expected = -2 * mean_amplitude / math.pi * torch.tensor([-4.0, 0.0, 1.5]).cos()
    assert ((values.mean(0) - expected).abs() < 5 * values.std(0) / len(values) ** 0.5).all()
    x, y = FAMILY.sample(tasks, 1, seed=0)
    errors = ((y + 2 * mean_amplitude / math.pi * x.cos()) ** 2).flatten()
    formula = mean_square / 2 - (2 * mean_amplitude / math.pi) ** 2 * (0.5 + math.sin(10) / 20)
    assert abs(errors.mean() - formula) < 5 * errors.std() / len(errors) ** 0.5
