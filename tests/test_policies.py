"""Policies as pure functions: normalised, sampled with the right frequencies, shared or one per task."""

import math
from itertools import permutations

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
    kl_divergence,
)

from ecomlib.networks import MLP
from ecomlib.policies import CategoricalMLP, GaussianMLP, PlackettLuce, SquashedGaussian, inverse_transform, per_task


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def grid(size):
    """Evenly spaced uniforms (1, size, 1): what they give is the exact share of each outcome, up to 1 / size."""
    return ((torch.arange(size) + 0.5) / size)[None, :, None]


def test_log_probs_are_normalised_and_chosen(generator):
    policy = CategoricalMLP((4, 8, 3))
    parameters = [torch.randn(p.shape, generator=generator) for p in policy.initial(generator)]
    observation = torch.randn(5, 2, 6, 4, generator=generator)  # (T, M, N, observation)
    log_probs = policy.log_probs(parameters, observation)
    assert log_probs.shape == (5, 2, 6, 3)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(5, 2, 6), atol=1e-14)
    action = torch.randint(3, (5, 2, 6), generator=generator)
    expected = Categorical(logits=policy.outputs(parameters, observation)).log_prob(action)
    assert torch.allclose(policy.log_prob(parameters, observation, action), expected, atol=1e-14)


def test_network_is_tanh_layers(generator):
    policy = CategoricalMLP((4, 8, 5, 3))
    w1, b1, w2, b2, w3, b3 = (torch.randn(p.shape, generator=generator) for p in policy.initial(generator))
    x = torch.randn(2, 6, 4, generator=generator)
    by_hand = torch.tanh(torch.tanh(x @ w1 + b1) @ w2 + b2) @ w3 + b3
    assert torch.allclose(policy.outputs([w1, b1, w2, b2, w3, b3], x), by_hand, atol=1e-14)


def test_inverse_transform_has_the_right_frequencies():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    size = 10_000
    index = inverse_transform(probabilities.expand(1, size, 4), grid(size)[..., 0])
    counts = torch.bincount(index.flatten(), minlength=4)
    assert (counts - size * probabilities).abs().max() <= 1 and counts[1] == 0
    # Rounding may leave the last cumulative probability below 1: the last index, not one past it.
    assert inverse_transform(torch.tensor([0.5, 0.5 - 1e-9]), torch.tensor(1 - 1e-12)) == 1


def test_categorical_samples(generator):
    policy = CategoricalMLP((2, 3))
    parameters = [torch.randn(2, 3, generator=generator), torch.randn(1, 3, generator=generator)]
    size = 20_000
    observation, noise = torch.randn(1, 1, 2).expand(1, size, 2), torch.rand(1, size, 1, generator=generator)
    action, log_prob = policy.sample(parameters, observation, noise)
    assert torch.equal(log_prob, policy.log_prob(parameters, observation, action))
    wanted = policy.log_probs(parameters, observation)[0, 0].exp() * size
    assert chisquare(torch.bincount(action[0], minlength=3), wanted).pvalue > 1e-3


def test_gaussian_density_and_samples(generator):
    policy = GaussianMLP((3, 8, 1), initial_mean=1.5, initial_std=0.3)
    parameters = policy.initial(generator)
    first = policy.outputs(parameters[:-1], torch.zeros(1, 1, 3))
    assert first.item() == pytest.approx(1.5) and parameters[-1].exp().item() == pytest.approx(0.3)
    parameters = [p + 0.3 * torch.randn(p.shape, generator=generator) for p in parameters]
    observation = torch.randn(5, 2, 6, 3, generator=generator)
    normal = Normal(policy.outputs(parameters[:-1], observation)[..., 0], parameters[-1].exp().item())
    action = torch.randn(5, 2, 6, generator=generator)
    found = policy.log_prob(parameters, observation, action)
    assert torch.allclose(found, normal.log_prob(action), atol=1e-12)

    size = 4000
    seen = observation[0, :1, :1].expand(1, size, 3)
    action, log_prob = policy.sample(parameters, seen, grid(size))
    assert torch.allclose(log_prob, policy.log_prob(parameters, seen, action), atol=1e-12)
    mean, std = normal.mean[0, 0, 0].item(), parameters[-1].exp().item()
    assert kstest((action[0] - mean).numpy() / std, "norm").statistic < 2 / size


@pytest.mark.parametrize("policy", [CategoricalMLP((4, 8, 3)), GaussianMLP((4, 8, 1))])
def test_shared_parameters_equal_copies_per_task(policy, generator):
    """(in, out) for all tasks = (task, in, out) with equal rows; with unequal rows, each task its own."""
    shared = policy.initial(generator)
    observation, noise = torch.randn(2, 6, 4, generator=generator), torch.rand(2, 6, 1, generator=generator)
    copies = per_task(shared, 2)
    assert all(c.is_leaf and c.requires_grad and c.shape == (2, *p.shape) for c, p in zip(copies, shared, strict=True))
    action, log_prob = policy.sample(shared, observation, noise)
    action_, log_prob_ = policy.sample(copies, observation, noise)
    assert torch.equal(action, action_) and torch.allclose(log_prob, log_prob_, atol=1e-14)

    other = [p + 1 for p in policy.initial(generator)]
    mixed = [torch.stack((p, q)) for p, q in zip(shared, other, strict=True)]
    found = policy.log_prob(mixed, observation, action)
    for task, own in enumerate((shared, other)):
        alone = policy.log_prob(own, observation[task : task + 1], action[task : task + 1])
        assert torch.allclose(found[task : task + 1], alone, atol=1e-12)


def test_copies_have_gradients_of_their_own(generator):
    policy = CategoricalMLP((4, 3))
    shared = [p.requires_grad_() for p in policy.initial(generator)]
    observation, action = torch.randn(2, 6, 4, generator=generator), torch.zeros(2, 6, dtype=torch.int64)
    copies = per_task(shared, 2)
    stacked = torch.autograd.grad(policy.log_prob(copies, observation, action).sum(), copies)
    for task in range(2):
        alone = policy.log_prob(shared, observation[task : task + 1], action[task : task + 1]).sum()
        for all_tasks, one in zip(stacked, torch.autograd.grad(alone, shared), strict=True):
            assert torch.allclose(all_tasks[task], one, atol=1e-12)


def test_first_policy_is_nearly_uniform(generator):
    policy = CategoricalMLP((4, 32, 5))
    parameters = policy.initial(generator)
    log_probs = policy.log_probs(parameters, torch.randn(1, 50, 4, generator=generator))
    assert (log_probs + math.log(5)).abs().max() < 0.1
    assert parameters[0].std().item() == pytest.approx(4**-0.5, rel=0.2)
    again = policy.initial(torch.Generator().manual_seed(0))
    assert all(torch.equal(p, q) for p, q in zip(parameters, again, strict=True))


@pytest.mark.parametrize(
    "make", [lambda: CategoricalMLP((3,)), lambda: CategoricalMLP((3, 0)), lambda: GaussianMLP((3,))]
)
def test_bad_sizes_are_named(make):
    with pytest.raises(ValueError, match="sizes"):
        make()


def test_bad_spread_is_named():
    with pytest.raises(ValueError, match="initial_std = 0"):
        GaussianMLP((3, 1), initial_std=0.0)


# ------------------------------------------------------------------------------------------- vectors and slates
def test_vector_action_has_the_sum_of_its_log_densities(generator):
    policy = GaussianMLP((3, 8, 2), initial_std=0.4)
    parameters = [p + 0.3 * torch.randn(p.shape, generator=generator) for p in policy.initial(generator)]
    observation = torch.randn(5, 2, 6, 3, generator=generator)
    normal = Normal(policy.outputs(parameters, observation), parameters[-1].exp())
    action = torch.randn(5, 2, 6, 2, generator=generator)
    found = policy.log_prob(parameters, observation, action)
    assert torch.allclose(found, normal.log_prob(action).sum(-1), atol=1e-12)
    drawn, log_prob = policy.sample(parameters, observation[0], torch.rand(2, 6, 2, generator=generator))
    assert drawn.shape == (2, 6, 2)
    assert torch.allclose(log_prob, policy.log_prob(parameters, observation[0], drawn), atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
def test_squashed_density_is_that_of_the_transformed_normal(outputs, generator):
    policy = SquashedGaussian(MLP((3, 8, outputs)), low=-1.0, high=3.0, initial_std=0.7)
    parameters = [p + 0.3 * torch.randn(p.shape, generator=generator) for p in policy.initial(generator)]
    observation = torch.randn(2, 6, 3, generator=generator)
    noise = torch.rand(2, 6, outputs, generator=generator)
    action, log_prob = policy.sample(parameters, observation, noise)
    assert (action > -1).all() and (action < 3).all()
    normal = Normal(policy.outputs(parameters, observation), parameters[-1].exp())
    transforms = [TanhTransform(), AffineTransform(1.0, 2.0)]
    reference = Independent(TransformedDistribution(normal, transforms), 1)
    full = action[..., None] if outputs == 1 else action
    assert torch.allclose(log_prob, reference.log_prob(full), atol=1e-9)
    edge = policy.log_prob(parameters, observation, torch.full_like(action, 3.0))
    assert edge.isfinite().all()


def test_kl_is_that_of_torch(generator):
    observation = torch.randn(5, 2, 6, 3, generator=generator)
    policy = GaussianMLP((3, 8, 2))
    old, new = ([torch.randn(p.shape, generator=generator) for p in policy.initial(generator)] for _ in range(2))
    normal = lambda p: Independent(Normal(policy.outputs(p, observation), p[-1].exp()), 1)
    found = policy.kl(policy.distribution(old, observation), policy.distribution(new, observation))
    assert torch.allclose(found, kl_divergence(normal(old), normal(new)), atol=1e-10)

    policy = CategoricalMLP((3, 8, 4))
    old, new = ([torch.randn(p.shape, generator=generator) for p in policy.initial(generator)] for _ in range(2))
    choice = lambda p: Categorical(logits=policy.outputs(p, observation))
    found = policy.kl(policy.distribution(old, observation), policy.distribution(new, observation))
    assert torch.allclose(found, kl_divergence(choice(old), choice(new)), atol=1e-12)


def all_slates(policy, parameters, observation):
    """Every slate (S, slate) for one observation, and its log-probability (S,)."""
    slates = torch.tensor(list(permutations(range(policy.items), policy.slate)))
    return slates, policy.log_prob(parameters, observation.expand(1, len(slates), -1), slates[None])[0]


@pytest.mark.parametrize("network", [MLP((2, 8, 1)), MLP((8, 8, 4))], ids=["item by item", "all items at once"])
def test_slates_are_plackett_luce(generator, network):
    policy = PlackettLuce(network, items=4, slate=2)
    parameters = [torch.randn(p.shape, generator=generator) for p in policy.initial(generator)]
    observation = torch.randn(1, 1, 8, generator=generator)
    slates, log_prob = all_slates(policy, parameters, observation)
    score = policy.outputs(parameters, observation)[0, 0]
    for slate, found in zip(slates, log_prob):
        chance, left = 0.0, list(range(4))
        for item in slate.tolist():
            chance += score[item] - torch.logsumexp(score[left], 0)
            left.remove(item)
        assert found == pytest.approx(chance.item(), abs=1e-12)
    assert log_prob.exp().sum() == pytest.approx(1.0, abs=1e-12)

    size = 20_000
    noise = torch.rand(1, size, policy.noise_size, generator=generator)
    drawn, drawn_log_prob = policy.sample(parameters, observation.expand(1, size, -1), noise)
    again = policy.log_prob(parameters, observation.expand(1, size, -1), drawn)
    assert torch.allclose(drawn_log_prob, again, atol=1e-12)
    key = lambda slate: slate[..., 0] * 4 + slate[..., 1]
    counts = torch.bincount(key(drawn[0]), minlength=16)[key(slates)]
    assert chisquare(counts, log_prob.exp() * size).pvalue > 1e-3


def test_kl_of_slates_is_exact_on_average(generator):
    policy = PlackettLuce(MLP((2, 8, 1)), items=4, slate=3)
    old, new = ([torch.randn(p.shape, generator=generator) for p in policy.initial(generator)] for _ in range(2))
    observation = torch.randn(1, 1, 8, generator=generator)
    slates, log_old = all_slates(policy, old, observation)
    _, log_new = all_slates(policy, new, observation)
    exact = (log_old.exp() * (log_old - log_new)).sum()
    every = observation.expand(1, len(slates), -1)
    named = [policy.distribution(p, every, slates[None]) for p in (old, new)]
    assert torch.allclose((log_old.exp() * policy.kl(*named)[0]).sum(), exact, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SquashedGaussian(MLP((3, 1)), low=1.0, high=1.0), "SquashedGaussian.high = 1.0"),
        (lambda: PlackettLuce(MLP((3, 1)), items=4, slate=5), "PlackettLuce.slate = 5"),
        (lambda: PlackettLuce(MLP((3, 2)), items=4, slate=2), "output_size = 2"),
        (lambda: GaussianMLP((3, 1), minimum_std=-1.0), "GaussianMLP.minimum_std = -1.0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_floor_of_the_standard_deviation(generator):
    policy = GaussianMLP((3, 1), initial_std=0.5, minimum_std=0.2)
    parameters = policy.initial(generator)
    parameters[-1] = torch.full_like(parameters[-1], -5.0).requires_grad_()
    _, log_std = policy.distribution(parameters, torch.zeros(1, 1, 3))
    assert log_std.exp().item() == pytest.approx(0.2)
