"""Sinusoid regression: the distribution of Finn et al., draws that are functions of what they are for, an exact
classical method."""

import math

import pytest
import torch
from scipy.stats import kstest

from benchmarks import sinusoid
from ecomlib.families.base import sample_tasks, split
from ecomlib.families.sinusoid import Sinusoid, least_squares_sine
from ecomlib.learners.adaptation import Inner, adapt
from ecomlib.learners.supervised import Examples
from ecomlib.networks import MLP

FAMILY = Sinusoid()
METHOD = sinusoid.Method(Inner(lr=0.01), network=MLP((1, 8, 8, 1), torch.relu))


def test_hidden_parameters_and_inputs_have_the_papers_distribution():
    tasks = FAMILY.tasks(torch.arange(20_000))
    x, _ = FAMILY.sample(tasks, 1, seed=0)
    for sample, low, high in ((tasks.amplitude, 0.1, 5.0), (tasks.phase, 0.0, math.pi), (x.flatten(), -5.0, 5.0)):
        assert kstest(sample.numpy(), "uniform", args=(low, high - low)).pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack((tasks.amplitude, tasks.phase)))[0, 1]) < 5 / 20_000**0.5


def test_values_by_hand():
    tasks = FAMILY.tasks(torch.arange(3))._replace(
        amplitude=torch.tensor([1.0, 2.0, 3.0]), phase=torch.tensor([0.0, math.pi / 2, math.pi])
    )
    x = torch.tensor([0.0, math.pi / 2])[:, None].expand(3, 2, 1)
    expected = torch.tensor([[0.0, 1.0], [-2.0, 0.0], [0.0, -3.0]])[..., None]
    torch.testing.assert_close(FAMILY.value(tasks, x), expected, atol=1e-12, rtol=0)


def test_a_task_and_its_points_are_functions_of_the_id():
    many, alone = FAMILY.tasks(torch.arange(10)), FAMILY.tasks(torch.tensor([7]))
    assert torch.equal(many.amplitude[7:8], alone.amplitude) and torch.equal(many.phase[7:8], alone.phase)
    x, y = FAMILY.sample(many, 10, seed=3, episode=1)
    for got, of_all in zip(FAMILY.sample(alone, 5, seed=3, episode=1), (x, y)):
        assert torch.equal(got, of_all[7:8, :5])
    assert x.shape == y.shape == (10, 10, 1)
    for other in (FAMILY.sample(many, 10, seed=3, episode=0), FAMILY.sample(many, 10, seed=4, episode=1)):
        assert not (other[0] == x).any()


def test_splits_are_disjoint_and_the_shifted_one_has_larger_amplitudes():
    moved, tasks = split(FAMILY, "shifted", 50)
    assert moved.amplitude == pytest.approx((5.0, 9.9)) and moved.phase == FAMILY.phase
    assert (tasks.amplitude > 5).all()
    ids = [set(split(FAMILY, name, 100)[1].id.tolist()) for name in ("train", "test", "shifted")]
    assert len(set.union(*ids)) == 300


def test_the_grid_covers_the_inputs():
    tasks = FAMILY.tasks(torch.arange(2))
    x, y = FAMILY.grid(tasks, 11)
    torch.testing.assert_close(x[1, :, 0], torch.arange(-5.0, 6.0))
    torch.testing.assert_close(y, FAMILY.value(tasks, x))


@pytest.mark.parametrize("points", [2, 5, 10])
def test_least_squares_recovers_every_curve(points):
    """The oracle's error, 0, is reached by the classical method from two points on."""
    tasks = sample_tasks(FAMILY, 200, torch.Generator().manual_seed(0))
    x, y = FAMILY.sample(tasks, points, seed=0)
    grid, value = FAMILY.grid(tasks)
    error = (least_squares_sine(x, y, grid) - value).abs().amax((1, 2))
    # Two points nearly half a period apart say almost the same: the error is rounding, divided by their sine.
    separation = (x - x[:, :1]).sin().abs().amax((1, 2))
    assert (error * separation < 1e-12).all()


def test_one_point_does_not_determine_a_curve():
    tasks = FAMILY.tasks(torch.arange(50))
    x, y = FAMILY.sample(tasks, 1, seed=0)
    grid, value = FAMILY.grid(tasks)
    assert (least_squares_sine(x, y, grid) - value).abs().amax((1, 2)).median() > 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [("amplitude", (5.0, 0.1)), ("phase", (0.0,)), ("inputs", (0.0, float("inf"))), ("amplitude", "wide")],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"Sinusoid.{field} = "):
        Sinusoid(**{field: value})


def test_bad_numbers_of_points_are_named():
    tasks = FAMILY.tasks(torch.arange(2))
    with pytest.raises(ValueError, match="points = 0"):
        FAMILY.sample(tasks, 0, seed=0)
    with pytest.raises(ValueError, match="points = 1"):
        FAMILY.grid(tasks, 1)


def test_seeds_in_one_batch_learn_as_they_would_alone():
    """The long runs of benchmarks/sinusoid.py: each seed's gradient is that of ``adapt`` on its own tasks."""
    theta, _ = sinusoid.start(METHOD, seeds=3)
    losses = sinusoid.iterate(METHOD, theta, [], iteration=2)
    for seed in range(3):
        ids = torch.arange(25) + (2 * 3 + seed) * 25
        tasks = FAMILY.tasks(ids)
        support, query = (Examples(*FAMILY.sample(tasks, 10, 0, episode)) for episode in (0, 1))
        alone = [p.requires_grad_() for p in METHOD.network.initial(torch.Generator().manual_seed(seed))]
        loss = METHOD.loss(adapt(METHOD.loss, METHOD.inner, alone, [support], 25)[-1], query).mean()
        torch.testing.assert_close(losses[seed], loss.detach(), rtol=1e-12, atol=0)
        for p, g in zip(theta, torch.autograd.grad(loss, alone)):
            torch.testing.assert_close(p.grad[seed], g, rtol=1e-9, atol=1e-12)


def test_sharpness_is_the_largest_eigenvalue():
    tasks = FAMILY.tasks(torch.arange(4))
    generator = torch.Generator().manual_seed(0)
    theta = [torch.stack([p, p]) for p in METHOD.network.initial(generator)]
    theta[-2] = torch.randn(theta[-2].shape, generator=generator)
    found = sinusoid.sharpness(METHOD, theta, tasks, iterations=300)
    x, y = FAMILY.sample(tasks, 10, 1)
    for seed in range(2):
        own = [p[seed] for p in theta]
        sizes = [p.numel() for p in own]
        for i in range(4):

            def loss(vector, own=own, i=i, sizes=sizes):
                parameters = [part.view_as(p) for part, p in zip(vector.split(sizes), own)]
                return METHOD.loss(parameters, Examples(x[i], y[i]))

            H = torch.func.hessian(loss)(torch.cat([p.flatten() for p in own]))
            assert found[seed, i] == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-3)


def test_summaries_count_what_diverged():
    error = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[1.0, 2.0, 20.0, float("nan")]]])
    summary = sinusoid.summary(error)
    assert summary["median"] == [[1.0], [2.0]] and summary["diverged"] == [[0.0], [0.5]]
    assert summary["interquartile_mean"] == [[1.5], [11.0]] and summary["mean"] == [[1.5], [None]]
