"""The hand-batched meta-gradient gives the numbers of autograd through the inner steps, whatever the loss."""

from functools import partial

import pytest
import torch
from torch import Generator
from torch.func import grad, jvp, vmap

from ecomlib.learners import mlp_adjoint, mlp_pass, output_losses
from ecomlib.learners.mlp_adjoint import Adaptation, fisher_vector_product, meta_gradient
from ecomlib.learners.output_losses import Episodes, of_clipped_surrogate, of_divergence, of_surrogate
from ecomlib.learners.ppo import clipped_surrogate
from ecomlib.networks import MLP
from ecomlib.policies import Categorical, Gaussian
from ecomlib.rollout import Trajectories
from ecomlib.surrogates import dice, log_likelihood, low_variance_curvature, ratio

TASKS, STEPS, EPISODES = 5, 4, 3


def shaken(parameters, generator):
    return [p + 0.3 * torch.randn(p.shape, generator=generator) for p in parameters]


def examples(generator, outputs, classes=False):
    inputs = torch.randn(TASKS, 7, 3, generator=generator)
    shape = (TASKS, 7) if classes else (TASKS, 7, outputs)
    target = torch.randint(outputs, shape, generator=generator) if classes else torch.randn(shape, generator=generator)
    return inputs, target


def episodes(policy, parameters, generator):
    """Trajectories that some other policy collected, with ragged ends, and advantages."""
    lead = (STEPS, TASKS, EPISODES)
    observation = torch.randn(*lead, 3, generator=generator)
    noise = torch.rand(*lead, policy.noise_size, generator=generator)
    action, log_prob = policy.sample(shaken(parameters, generator), observation, noise)
    mask = (torch.rand(1, TASKS, EPISODES, generator=generator) * STEPS >= torch.arange(STEPS)[:, None, None]).double()
    reward = torch.randn(lead, generator=generator)
    return Trajectories(observation, action, log_prob, reward, mask), torch.randn(lead, generator=generator)


def by_torch_func(loss, outer, parameters, support, query, sizes, weights):
    """grad of the mean over tasks of vmap(adapt with grad): the definition. A data set's leaves are task first."""

    def of_task(parameters, support, query):
        total = 0.0
        for k in range(len(support) + 1):
            total = total + weights[k] * outer(parameters, query[k])
            if k < len(support):
                gradient = grad(loss)(parameters, support[k])
                parameters = [p - a * g for p, a, g in zip(parameters, sizes[k], gradient)]
        return total

    objective = lambda parameters, sizes_: vmap(lambda s, q: of_task(parameters, s, q))(support, query).mean()
    return grad(objective)(parameters, sizes)


def assert_equal(ours, reference, tolerance=1e-9):
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()) + 1e-300)


SUPERVISED = {
    "mse": (output_losses.squared_error, lambda o, y: ((o - y) ** 2).mean(), False),
    "cross entropy": (output_losses.cross_entropy, lambda o, y: torch.nn.functional.cross_entropy(o, y), True),
}


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
@pytest.mark.parametrize("name", SUPERVISED)
@pytest.mark.parametrize("hidden", [(), (6,), (6, 5, 4)])
def test_supervised_meta_gradient(name, activation, steps, hidden):
    generator = Generator().manual_seed(steps)
    network = MLP((3, *hidden, 2), activation)
    parameters = shaken(network.initial(generator), generator)
    output_loss, of_outputs, classes = SUPERVISED[name]
    support = [examples(generator, 2, classes) for _ in range(steps)]
    query = examples(generator, 2, classes)
    loss = lambda p, data: of_outputs(network.outputs(p, data[0]), data[1])
    sizes = [[0.1 * (k + 1)] * len(parameters) for k in range(steps)]
    reference = by_torch_func(loss, loss, parameters, support, [*support, query], sizes, [0.0] * steps + [1.0])
    for chunk in (None, 2, 1):
        ours = meta_gradient(network, output_loss, parameters, support, query, [s[0] for s in sizes], chunk=chunk)
        assert_equal(ours.gradient, reference)
        assert ours.loss.shape == (TASKS,)


POLICIES = {"softmax": Categorical(MLP((3, 6, 5, 4))), "Gaussian": Gaussian(MLP((3, 6, 5, 2)), minimum_std=0.01)}
SOFTMAX = {
    "log_likelihood": (output_losses.softmax_log_likelihood, log_likelihood),
    "ratio": (output_losses.softmax_ratio, ratio),
    "clipped": (output_losses.softmax_clipped_ratio(0.2), partial(clipped_surrogate, clip=0.2)),
}
SURROGATES = [log_likelihood, ratio, low_variance_curvature, dice]


def as_task_loss(policy, surrogate):
    """loss(parameters, one task's data) of a time-major surrogate, for torch.func."""

    def loss(parameters, data):
        *fields, advantage = (x[:, None] for x in data)  # (T, N, ...) -> (T, 1, N, ...)
        return -surrogate(policy, parameters, Trajectories(*fields), advantage)[0]

    return loss


def reinforcement(policy, steps, seed):
    generator = Generator().manual_seed(seed)
    parameters = shaken(policy.initial(generator), generator)
    data = [episodes(policy, parameters, generator) for _ in range(steps + 1)]
    reference = [tuple(x.transpose(0, 1) for x in (*trajectories, advantage)) for trajectories, advantage in data]
    return parameters, [Episodes.of(*each) for each in data], reference


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_meta_gradient(name, steps):
    policy = POLICIES["softmax"]
    output_loss, surrogate = SOFTMAX[name]
    parameters, data, task_first = reinforcement(policy, steps, seed=steps)
    sizes = [[0.3 + 0.1 * k] * len(parameters) for k in range(steps)]
    weights = [0.0] * steps + [1.0]
    inner, outer = (as_task_loss(policy, each) for each in (surrogate, SOFTMAX["clipped"][1]))
    reference = by_torch_func(inner, outer, parameters, task_first[:-1], task_first, sizes, weights)
    for chunk in (None, 2):
        ours = meta_gradient(policy.network, output_loss, parameters, data[:-1], data[-1], [s[0] for s in sizes],
                             outer=of_clipped_surrogate(policy, 0.2), chunk=chunk)  # fmt: skip
        assert_equal(ours.gradient, reference)


def test_of_surrogate_takes_what_is_written_out():
    softmax, gaussian = POLICIES["softmax"], POLICIES["Gaussian"]
    assert of_surrogate(softmax, ratio) is output_losses.softmax_ratio
    assert of_surrogate(softmax, log_likelihood) is output_losses.softmax_log_likelihood
    assert of_divergence(softmax) is output_losses.softmax_divergence
    assert of_surrogate(gaussian, ratio) is of_surrogate(gaussian, ratio)  # one compiled function, not one a call


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda f: f.__name__)
def test_any_surrogate_by_autograd_at_the_outputs(kind, surrogate):
    """All stages weighted, and step sizes of each step and parameter, one of them 0."""
    policy = POLICIES[kind]
    parameters, data, task_first = reinforcement(policy, 2, seed=7)
    sizes = [[0.05 * (k + 1) * (i != 2) + 0 * p for i, p in enumerate(parameters)] for k in range(2)]
    weights = [0.2, 0.3, 0.5]
    loss = as_task_loss(policy, surrogate)
    reference = by_torch_func(loss, loss, parameters, task_first[:-1], task_first, sizes, weights)
    ours = meta_gradient(policy.network, of_surrogate(policy, surrogate), parameters, data[:-1], data, sizes,
                         stage_weights=weights, learn_lr=True, chunk=2)  # fmt: skip
    assert_equal(ours.gradient, reference)
    by_size = grad(lambda s: torch.stack([  # the same objective as a function of the step sizes
        g.sum() for g in [objective_of_sizes(loss, parameters, task_first, s, weights)]]).sum())(sizes)  # fmt: skip
    for step, expected in zip(ours.by_step_size, by_size, strict=True):
        assert_equal(step, expected)


def objective_of_sizes(loss, parameters, data, sizes, weights):
    def of_task(data):
        phi, total = parameters, 0.0
        for k in range(len(sizes) + 1):
            total = total + weights[k] * loss(phi, data[k])
            if k < len(sizes):
                phi = [p - a * g for p, a, g in zip(phi, sizes[k], grad(loss)(phi, data[k]))]
        return total

    return vmap(of_task)(data).mean()


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("weighted_start", [False, True])
def test_fisher_vector_product_is_the_hessian_of_the_divergence_through_adaptation(kind, steps, weighted_start):
    policy = POLICIES[kind]
    parameters, data, task_first = reinforcement(policy, steps, seed=3)
    surrogate, size, weights = ratio, 0.2, [*([0.0, 0.3, 0.2][:steps]), 0.5]
    if weighted_start:
        weights[0] = 0.4
    loss = as_task_loss(policy, surrogate)

    def stages(parameters, data):
        yield parameters
        for k in range(steps):
            parameters = [p - size * g for p, g in zip(parameters, grad(loss)(parameters, data[k]))]
            yield parameters

    def divergence(new, old):
        def of_task(data):
            total = 0.0
            for w, phi, before, (observation, *_, mask, _) in zip(weights, stages(new, data), stages(old, data), data):
                named = lambda at, observation=observation: policy.distribution(at, observation[:, None])
                total = total + w * (policy.kl(named(before), named(phi)) * mask[:, None]).sum() / mask.sum()
            return total

        return vmap(of_task)(task_first).mean()

    direction = [torch.randn(p.shape, generator=Generator().manual_seed(9)) for p in parameters]
    gradient = lambda at: grad(divergence)(at, [p.detach() for p in parameters])
    value, reference = jvp(gradient, (parameters,), (direction,))
    assert max(float(g.abs().max()) for g in value) < 1e-12  # the Fisher information is the Hessian only at a minimum
    for chunk in (None, 2):
        product = fisher_vector_product(policy.network, of_surrogate(policy, surrogate), of_divergence(policy),
                                        parameters, data[:-1], data, [size] * steps, weights, chunk=chunk)  # fmt: skip
        assert_equal(product(direction), reference)


def test_first_order_is_the_mean_gradient_at_the_adapted_parameters():
    network, generator = MLP((3, 6, 2)), Generator().manual_seed(0)
    parameters = shaken(network.initial(generator), generator)
    support, query = examples(generator, 2), examples(generator, 2)
    loss = lambda p, data: ((network.outputs(p, data[0]) - data[1]) ** 2).mean()
    phi = [p - 0.1 * g for p, g in zip(parameters, vmap(grad(loss), (None, 0))(parameters, support))]
    expected = [g.mean(0) for g in vmap(grad(loss))(phi, query)]
    ours = meta_gradient(network, output_losses.squared_error, parameters, [support], query, [0.1], first_order=True)
    assert_equal(ours.gradient, expected, 1e-12)
    exact = meta_gradient(network, output_losses.squared_error, parameters, [support], query, [0.1])
    assert float((ours.gradient[0] - exact.gradient[0]).abs().max()) > 1e-3


def test_parameters_of_an_optimiser_are_left_alone():
    """Leaves that require a gradient give the same numbers, and no graph is kept."""
    policy = POLICIES["Gaussian"]
    parameters, data, _ = reinforcement(policy, 1, seed=1)
    leaves = [p.clone().requires_grad_() for p in parameters]
    losses = of_surrogate(policy, ratio), of_divergence(policy)
    plain, ours = (meta_gradient(policy.network, losses[0], p, data[:1], data[1], [0.1]) for p in (parameters, leaves))
    assert_equal(ours.gradient, plain.gradient, 1e-15)
    product = fisher_vector_product(policy.network, *losses, leaves, data[:1], data[1], [0.1])
    assert not any(g.requires_grad for g in (*ours.gradient, *product(parameters)))


def test_push_forward_and_pull_back_are_adjoint():
    """<u, J v> = <J^T u, v> with two steps and step sizes of each parameter."""
    network, generator = MLP((3, 6, 5, 2)), Generator().manual_seed(0)
    parameters = shaken(network.initial(generator), generator)
    support = [examples(generator, 2) for _ in range(2)]
    sizes = [[0.1 * torch.rand(p.shape, generator=generator) for p in parameters] for _ in support]
    adaptation = Adaptation(torch.tanh, output_losses.squared_error, parameters, support, sizes, layers=3)
    v = [torch.randn(p.shape, generator=generator) for p in parameters]
    u = [torch.randn(p.shape, generator=generator) for p in adaptation.stages[-1]]
    dot = lambda a, b: float(sum((x * y).sum() for x, y in zip(a, b)))
    pulled, _ = adaptation.pull_back([None, None, u])
    assert dot(u, adaptation.push_forward(v)[-1]) == pytest.approx(dot(pulled, v), rel=1e-12)


def test_single_precision_is_near_double():
    policy = POLICIES["softmax"]
    parameters, data, _ = reinforcement(policy, 2, seed=1)
    run = lambda parameters, data: meta_gradient(
        policy.network, output_losses.softmax_ratio, parameters, data[:-1], data[-1], [0.2, 0.2])  # fmt: skip
    single = lambda x: x.float() if x.is_floating_point() else x
    double = run(parameters, data)
    ours = run([p.float() for p in parameters], [Episodes(*map(single, each)) for each in data])
    assert ours.gradient[0].dtype == torch.float32
    assert_equal([g.double() for g in ours.gradient], double.gradient, 2e-5)


def test_tanh_by_sigmoid_is_within_single_precision():
    x = torch.linspace(-12, 12, 10_001, dtype=torch.float32)
    assert float((mlp_pass._tanh(x).double() - torch.tanh(x.double())).abs().max()) < 2.5e-7


def test_default_chunks_are_equal_parts_that_fit_the_cache():
    network = MLP((3, 64, 64, 11))
    support = [(torch.zeros(40, 20, 20, 3),)]
    sizes = [len(part[0][0]) for (part,) in mlp_adjoint._chunks(network, 40, None, support)]
    assert sum(sizes) == 40
    assert max(sizes) - min(sizes) <= max(sizes) * 0.5
    assert max(sizes) * 400 * 128 * 8 <= mlp_adjoint.CACHE


@pytest.mark.parametrize(
    "change, message",
    [
        ({"network": MLP((3, 4, 2), torch.sigmoid)}, "activation"),
        ({"step_sizes": [0.1, 0.1]}, "support"),
        ({"stage_weights": [1.0]}, "stage_weights"),
        ({"query": [None]}, "query"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_bad_settings_are_named(change, message):
    generator = Generator().manual_seed(0)
    data = examples(generator, 2)
    network = MLP((3, 4, 2))
    settings = {"network": network, "inner": output_losses.squared_error, "parameters": network.initial(generator)}
    settings |= {"support": [data], "query": data, "step_sizes": [0.1]}
    with pytest.raises(ValueError, match=message):
        meta_gradient(**(settings | change))


def test_compiled_is_equal():
    network, generator = MLP((3, 4, 2)), Generator().manual_seed(0)
    settings = (network, output_losses.squared_error, shaken(network.initial(generator), generator),
                [examples(generator, 2)], examples(generator, 2), [torch.tensor(0.2)])  # fmt: skip
    assert_equal(meta_gradient(*settings, compile=True).gradient, meta_gradient(*settings).gradient)
