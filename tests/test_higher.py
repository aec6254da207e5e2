"""`higher` 0.2.1 as a second engine: equal to ours with SGD, and every trap that chapter "MAML, derived" warns of.

A trap that an update of `higher` or torch removes makes its test fail: then the warning in the chapter goes too.
"""

import warnings

import higher
import pytest
import torch
from torch.func import vmap

from ecomlib.learners.adaptation import Inner, adapt
from ecomlib.networks import Module

RATE = 0.05
SGD = (torch.optim.SGD, {"lr": RATE})


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def mse(model, data):
    return ((model(data[0]) - data[1]) ** 2).mean()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(10, 3, generator=generator), torch.randn(10, 1, generator=generator)


def run(data, optimiser, steps, **context):
    """Gradients of the initial parameters after ``steps`` inner steps, and the adapted parameters."""
    model, (kind, settings) = network(), optimiser
    with higher.innerloop_ctx(model, kind(model.parameters(), **settings), **context) as (fast, inner):
        for _ in range(steps):
            inner.step(mse(fast, data))
        mse(fast, data).backward()
    return [p.grad for p in model.parameters()], [p.detach().clone() for p in fast.parameters()]


def torch_run(data, optimiser, steps):
    """What torch's own optimiser does: the adapted parameters."""
    model, (kind, settings) = network(), optimiser
    descent = kind(model.parameters(), **settings)
    for _ in range(steps):
        descent.zero_grad()
        mse(model, data).backward()
        descent.step()
    return [p.detach() for p in model.parameters()]


def largest_difference(left, right):
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_with_sgd_higher_equals_ours(data, steps):
    gradient, adapted = run(data, SGD, steps, copy_initial_weights=False)
    module = Module(network(), 1)
    theta = [p.requires_grad_() for p in module.initial(torch.Generator())]
    loss = lambda parameters, data: ((module.outputs(parameters, data[0]) - data[1]) ** 2).mean((-2, -1))
    batch = (data[0][None], data[1][None])
    phi = adapt(loss, Inner(steps=steps, lr=RATE), theta, [batch] * steps, 1)[-1]
    ours = torch.autograd.grad(loss(phi, batch).sum(), theta)
    size = max(g.abs().max().item() for g in ours)
    assert largest_difference(adapted, [p[0] for p in phi]) < 1e-14
    assert largest_difference(gradient, ours) < 1e-12 * size


def test_by_default_the_initial_parameters_get_no_gradient(data):
    assert all(g is None for g in run(data, SGD, 1)[0])
    assert all(g is not None for g in run(data, SGD, 1, copy_initial_weights=False)[0])


def test_without_tracking_there_is_no_first_order_gradient_but_none(data):
    assert all(g is None for g in run(data, SGD, 1, copy_initial_weights=False, track_higher_grads=False)[0])


def test_maximize_is_ignored(data):
    up = (torch.optim.SGD, {"lr": RATE, "maximize": True})
    down, ascent = run(data, SGD, 2)[1], run(data, up, 2)[1]
    assert largest_difference(ascent, down) == 0
    assert largest_difference(torch_run(data, up, 2), down) > 0.01


def test_adam_adds_epsilon_in_another_place(data):
    """torch adds it to the root of the bias-corrected second moment, higher before the correction: as if it were
    larger in the first steps. It shows where gradients are as small as epsilon."""
    adam = lambda epsilon: (torch.optim.Adam, {"lr": 0.01, "eps": epsilon})
    assert 1e-8 < largest_difference(run(data, adam(1e-8), 1)[1], torch_run(data, adam(1e-8), 1)) < 1e-4
    corrected = 1e-8 / (1 - 0.999) ** 0.5  # the epsilon of torch that gives higher's first step
    assert largest_difference(run(data, adam(1e-8), 1)[1], torch_run(data, adam(corrected), 1)) < 1e-14
    without = largest_difference(run(data, adam(0.0), 5)[1], torch_run(data, adam(0.0), 5))
    assert without < 1e-12  # epsilon is all the difference


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam"])
def test_unsupported_optimisers_say_so(data, name):
    with pytest.raises(ValueError, match="not supported by higher"):
        run(data, (getattr(torch.optim, name), {"lr": 0.01}), 1)


@pytest.mark.parametrize(("name", "message"), [("RMSprop", "gradient correctness"), ("Rprop", "zero second order")])
def test_optimisers_with_doubtful_second_derivatives_warn(data, name, message):
    with pytest.warns(UserWarning, match=message):
        run(data, (getattr(torch.optim, name), {"lr": 0.01}), 1)


def test_a_compiled_module_ends_in_a_recursion():
    model = torch.compile(network())
    with pytest.raises(RecursionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=RATE)):
            pass


def test_tasks_cannot_be_batched_by_vmap(data):
    model = network()

    def after_a_step(x, y):
        optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
        with higher.innerloop_ctx(model, optimiser, copy_initial_weights=False) as (fast, inner):
            inner.step(mse(fast, (x, y)))
            return mse(fast, (x, y))

    with pytest.raises(RuntimeError, match="does not require grad"):
        vmap(after_a_step)(*(d.expand(2, *d.shape) for d in data))
