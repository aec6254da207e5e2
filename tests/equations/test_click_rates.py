"""Chapter "Click-rate prediction with MAML": both sides of every numbered equation."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm
from torch.func import grad, hessian

from ecomlib.language import click_metrics
from ecomlib.language.campaigns import CampaignFamily, Campaigns
from ecomlib.language.click_rates import ClickLoss, FactorisationMachine, click_loss, pairwise
from ecomlib.language.click_shrinkage import posterior
from ecomlib.learners import Inner
from ecomlib.learners.adaptation import adapt

FAMILY = CampaignFamily(users=3, categories=4, places=2)
R = 0.01


@pytest.fixture
def data():
    """Features (6 points, 4), impressions and clicks (6, 2)."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    shown = torch.tensor([40.0, 10.0, 0.0, 25.0, 300.0, 1.0])
    clicks = torch.tensor([3.0, 0.0, 0.0, 5.0, 2.0, 1.0])
    return x, torch.stack((shown, clicks), -1)


@pytest.fixture
def theta():
    network = FactorisationMachine(4, 0)
    return [torch.randn_like(p) for p in network.initial(torch.Generator().manual_seed(1))]


def linear(parameters, x):
    return FactorisationMachine(4, 0).outputs(parameters, x)


def test_click_rate(data):
    """The logistic function of the sum over features and pairs."""
    x, _ = data
    machine = FactorisationMachine(4, 3)
    vectors, weight, bias = [torch.randn_like(p) for p in machine.initial(torch.Generator().manual_seed(2))]
    for j in range(6):
        z = bias.item() + sum(weight[i, 0].item() * x[j, i].item() for i in range(4))
        z += sum(
            (vectors[i] @ vectors[k]).item() * x[j, i].item() * x[j, k].item() for i, k in combinations(range(4), 2)
        )
        rate = torch.sigmoid(machine.outputs([vectors, weight, bias], x))[j].item()
        assert rate == pytest.approx(1 / (1 + math.exp(-z)), rel=1e-12)


def test_loss(data, theta):
    """By cells, and by impressions one at a time."""
    x, y = data
    rate = torch.sigmoid(linear(theta, x))[:, 0]
    by_impression = []
    for j, (shown, clicks) in enumerate(y.tolist()):
        by_impression += [-math.log(rate[j])] * int(clicks) + [-math.log(1 - rate[j])] * int(shown - clicks)
    assert click_loss(linear(theta, x), y).item() == pytest.approx(np.mean(by_impression), rel=1e-12)


def test_gradient(data, theta):
    """Gradient and Hessian by the formula and by autograd, of weights and bias together."""
    x, y = data
    ones = torch.cat((x, torch.ones(6, 1)), 1)
    flat = torch.cat([p.flatten() for p in theta])
    loss = lambda w: click_loss((ones @ w)[:, None], y)
    shown, clicks = y.unbind(-1)
    rate = torch.sigmoid(ones @ flat)
    torch.testing.assert_close(grad(loss)(flat), (shown * rate - clicks) @ ones / shown.sum())
    curvature = ones.T @ torch.diag(shown * rate * (1 - rate)) @ ones / shown.sum()
    torch.testing.assert_close(hessian(loss)(flat), curvature)
    assert torch.linalg.eigvalsh(curvature)[0] >= -1e-12, "the loss is convex"


@pytest.mark.parametrize("r", [0.003, 0.02, 0.4])
def test_calibrated(r):
    """Expected loss = entropy + divergence; least at the true rate, whatever that is."""
    expected = lambda p: -(r * math.log(p) + (1 - r) * math.log(1 - p))
    for p in (0.001, 0.05, 0.7):
        divergence = r * math.log(r / p) + (1 - r) * math.log((1 - r) / (1 - p))
        assert expected(p) == pytest.approx(click_metrics.entropy(r) + divergence, rel=1e-12)
        assert divergence > 0
    best = minimize_scalar(expected, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-12}).x
    assert best == pytest.approx(r, rel=1e-5)
    tasks = FAMILY.tasks(torch.arange(3))
    mine = -(tasks.rate * np.log(0.02) + (1 - tasks.rate) * np.log(0.98)).mean(1)
    torch.testing.assert_close(FAMILY.expected_loss(tasks, torch.tensor(0.02)), mine)


def test_balance():
    """At the minimum, predicted clicks are the clicks that came, in all and for every value of a one-hot feature."""
    x = FAMILY.features
    counts = FAMILY.counts(FAMILY.tasks(torch.tensor([4])), 20_000, seed=0)
    zeros = torch.zeros(x.shape[1])
    vague = posterior(x, torch.tensor(-4.6).expand(len(x)), counts, zeros, torch.full_like(zeros, 1e4), steps=200)
    rate = torch.sigmoid(-4.6 + x @ vague.mode[0])
    shown, clicks = counts[0].unbind(-1)
    torch.testing.assert_close((shown * rate) @ x, clicks @ x, rtol=1e-5, atol=1e-5)
    assert (clicks @ x > 0).all()


def test_factorisation_identity():
    """The double sum over pairs, and the form that is linear in the number of features."""
    generator = torch.Generator().manual_seed(0)
    vectors, x = (torch.randn(shape, generator=generator) for shape in ((9, 3), (9,)))
    double = sum((vectors[i] @ vectors[j]) * x[i] * x[j] for i, j in combinations(range(9), 2))
    by_factor = 0.5 * sum(((vectors[:, f] * x).sum() ** 2 - (vectors[:, f] ** 2 * x**2).sum()) for f in range(3))
    torch.testing.assert_close(by_factor, double)
    torch.testing.assert_close(pairwise(vectors, x[None])[0, 0], double)


def quadratic_step(theta, own, h, alpha, steps):
    """The library's inner loop on the quadratic loss with curvature h around ``own``."""
    loss = lambda parameters, data: 0.5 * h * (parameters[0][:, 0] - own) ** 2
    phi = adapt(loss, Inner(steps=steps, lr=alpha), [torch.tensor([theta])], [None] * steps, 1, create_graph=False)
    return phi[-1][0].item()


def test_steps():
    """K steps go the share 1 - (1 - alpha h)^K of the way to the campaign's own optimum, whatever n."""
    theta, own, h = -4.6, -3.9, R * (1 - R)
    for steps, alpha in ((1, 30.0), (5, 30.0), (3, 150.0)):
        share = 1 - (1 - alpha * h) ** steps
        assert quadratic_step(theta, own, h, alpha, steps) == pytest.approx(theta + share * (own - theta), rel=1e-12)
    small = 1 - (1 - 0.01 * h) ** 5
    assert small < 1e-3, "five steps of 0.01 go nowhere"


def test_shrinkage():
    """The mode of quadratic likelihood times normal prior; and Newton's mode of the real one, for many clicks."""
    mean, own, h, s = -4.6, -3.9, R * (1 - R), 0.5
    for n in (100, 1000, 10_000):
        minus_log = lambda b, n=n: 0.5 * n * h * (b - own) ** 2 + 0.5 * (b - mean) ** 2 / s**2
        best = minimize_scalar(minus_log, bracket=(-5, -3)).x
        assert best == pytest.approx(mean + n * h / (n * h + 1 / s**2) * (own - mean), rel=1e-6)
    # clicks themselves: n = 10^6 at a rate near r, a narrow prior
    n, rate, s = 1e6, 0.0101, 0.01
    one = torch.ones(1, 1)
    found = posterior(one, torch.zeros(1), torch.tensor([[[n, n * rate]]]), torch.tensor([math.log(R / (1 - R))]),
                      torch.tensor([s])).mode.item()  # fmt: skip
    start, own = math.log(R / (1 - R)), math.log(rate / (1 - rate))
    weight = n * R * (1 - R) / (n * R * (1 - R) + 1 / s**2)
    assert (found - start) / (own - start) == pytest.approx(weight, rel=0.01)


def test_prior_impressions():
    """One step of size 1 on ``ClickLoss`` with kappa = 1 / (h s^2) is the shrinkage step of every n: the same number as
    one step down the log-posterior, scaled by its curvature."""
    s, start = 0.5, math.log(R / (1 - R))
    h = R * (1 - R)
    kappa = 1 / (h * s**2)
    network = FactorisationMachine(1, 0, R)
    loss = ClickLoss(R, prior_impressions=kappa)
    score = lambda parameters, y: loss(network.outputs(parameters, torch.zeros(1, 1, 1)), y)
    for n, clicks in ((100.0, 3.0), (1000.0, 5.0), (20_000.0, 300.0)):
        y = torch.tensor([[[n, clicks]]])
        theta = network.initial(torch.Generator())
        bias = adapt(score, Inner(lr=1.0, adapted=(1,)), theta, [y], 1, create_graph=False)[-1][1].item()
        weight = n * h / (n * h + 1 / s**2)
        assert weight == pytest.approx(n / (n + kappa))
        assert bias - start == pytest.approx(weight * (clicks / n - R) / h, rel=1e-9)


def test_meta_gradient():
    """One inner step of logistic regression: Hessian factor times query gradient, and autograd through the step."""
    tasks = FAMILY.tasks(torch.arange(4))
    network = FactorisationMachine(FAMILY.features.shape[1], 0)
    support, query = (FAMILY.counts(tasks, 4000, 0, e) for e in (0, 1))
    x = torch.cat((FAMILY.features, torch.ones(FAMILY.cells, 1)), 1)
    flat = 0.3 * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(3)) - torch.eye(x.shape[1])[-1] * 4
    alpha = 20.0
    by_formula = torch.zeros_like(flat)
    for i in range(4):
        (n, clicks), (n_query, clicks_query) = support[i].unbind(-1), query[i].unbind(-1)
        rate = torch.sigmoid(x @ flat)
        phi = flat - alpha * (n * rate - clicks) @ x / n.sum()
        factor = torch.eye(len(flat)) - alpha * x.T @ torch.diag(n * rate * (1 - rate)) @ x / n.sum()
        by_formula += factor @ ((n_query * torch.sigmoid(x @ phi) - clicks_query) @ x / n_query.sum()) / 4
    score = lambda parameters, y: click_loss(network.outputs(parameters, FAMILY.features.expand(4, -1, -1)), y)
    leaves = [flat[:-1, None].clone().requires_grad_(), flat[-1:, None].clone().requires_grad_()]
    phi = adapt(score, Inner(lr=alpha), leaves, [support], 4)[-1]
    found = torch.autograd.grad(score(phi, query).mean(), leaves)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found]), by_formula)


def test_blind_rate():
    """The mean over campaigns by numerical integration, one cell at a time."""
    sd = math.hypot(FAMILY.level_sd, FAMILY.category_sd)
    blind = FAMILY.blind_rate()
    for cell in (0, 7, 23):
        rate = lambda z, cell=cell: 1 / (1 + math.exp(-FAMILY.shared[cell].item() - sd * z)) * norm.pdf(z)
        assert blind[cell].item() == pytest.approx(quad(rate, -9, 9)[0], rel=1e-8)


def test_normalised_entropy():
    label = np.array([1] * 3 + [0] * 97)
    rate = np.linspace(0.01, 0.2, 100)
    loss = -np.mean(label * np.log(rate) + (1 - label) * np.log(1 - rate))
    base = -(0.03 * math.log(0.03) + 0.97 * math.log(0.97))
    assert click_metrics.normalised_entropy(label, rate) == pytest.approx(loss / base, rel=1e-12)
    assert click_metrics.normalised_entropy(label, np.full(100, 0.03)) == pytest.approx(1.0)


def test_downsampling():
    """Thinning what was not clicked to a share w turns the rate r into q; the formula turns q back into r."""
    for r, w in ((0.005, 0.1), (0.3, 0.02)):
        q = r / (r + (1 - r) * w)
        assert q / (q + (1 - q) / w) == pytest.approx(r, rel=1e-12)
    generator = np.random.default_rng(0)
    label = generator.random(400_000) < 0.02
    kept = label | (generator.random(400_000) < 0.1)
    q = label[kept].mean()
    assert q / (q + (1 - q) / 0.1) == pytest.approx(label.mean(), rel=0.01)


def test_score_of_a_prediction():
    """0 for blind, 1 for the true rates, from the exact expected loss."""
    tasks = FAMILY.tasks(torch.arange(50))
    blind, oracle = FAMILY.expected_loss(tasks, FAMILY.blind_rate()).mean(), FAMILY.oracle_loss(tasks).mean()
    halfway = brentq(lambda t: FAMILY.expected_loss(tasks, FAMILY.blind_rate() ** (1 - t) * tasks.rate**t).mean().item()
                     - (blind + oracle).item() / 2, 0, 1)  # fmt: skip
    mixed = FAMILY.blind_rate() ** (1 - halfway) * tasks.rate**halfway
    value = lambda rate: ((blind - FAMILY.expected_loss(tasks, rate).mean()) / (blind - oracle)).item()
    assert value(FAMILY.blind_rate()) == 0.0 and value(tasks.rate) == 1.0 and value(mixed) == pytest.approx(0.5)
    clicks = FAMILY.impressions(Campaigns(*(x[:1] for x in tasks)), 400_000, 0)
    losses = click_metrics.row_losses(clicks[1][0], FAMILY.blind_rate()[clicks[0][0]])
    exact = FAMILY.expected_loss(Campaigns(*(x[:1] for x in tasks)), FAMILY.blind_rate()).item()
    assert losses.mean() == pytest.approx(exact, abs=4 * losses.std() / math.sqrt(400_000))
