"""Both sides of every equation of the chapter "Few-shot across categories and shops"."""

import numpy as np
import pandas as pd
import torch
from torch import Generator

from ecomlib.evaluation.statistics import normalised_score
from ecomlib.language.adapters import Corrected
from ecomlib.language.behaviour import BehaviourModel, event_probabilities
from ecomlib.language.few_shot import PADDING, Reference, event_loss, score
from ecomlib.language.ideal import ideal_probabilities, prior_particles
from ecomlib.language.shop_shrinkage import learned_prior, own_weights, ridge_prior, shrunk_log_odds

MODEL = BehaviourModel(unseen_departments=("b",), unseen_share=0.0)
PRODUCTS = pd.DataFrame({
    "department": ["a"] * 8 + ["b"] * 8, "category": [f"c{i // 2}" for i in range(16)],
    "tier": ["low", "middle", "high", "middle"] * 4, "text": [f"product {i}" for i in range(16)],
})  # fmt: skip


def data(shops=3, rows=25, features=2, seed=0):
    generator = Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    z, offset = draw(shops, rows, features), draw(shops, rows)
    y = (torch.rand(shops, rows, generator=generator) < 0.4).long()
    y[-1, -5:] = PADDING
    return z, y, offset


def test_score():
    generator = Generator().manual_seed(0)
    exact, gap, loss = (torch.rand(7, generator=generator, dtype=torch.float64) for _ in range(3))
    ends = Reference(exact + gap, exact)
    by_hand = sum(b - x for b, x in zip(ends.base, loss)) / sum(b - x for b, x in zip(ends.base, ends.exact))
    assert abs(score(loss, ends) - by_hand) < 1e-12
    assert abs(score(loss, ends) - normalised_score(-loss, -ends.base, -ends.exact)) < 1e-12
    mean_of_ratios = ((ends.base - loss) / gap).mean()
    assert abs(score(loss, ends) - mean_of_ratios) > 0.02


def test_loss():
    """Log-loss of the class that came, averaged over the impressions that there are."""
    z, y, offset = data()
    odds = offset
    rate = torch.sigmoid(odds)
    for shop in range(3):
        real = [(r, c) for r, c in zip(rate[shop], y[shop]) if c != PADDING]
        by_hand = -sum(torch.log(r) if c else torch.log(1 - r) for r, c in real) / len(real)
        assert abs(event_loss(torch.stack((0 * odds, odds), -1), y)[shop] - by_hand) < 1e-12


def test_own_weights():
    """The mode maximises log-likelihood plus log-prior: nothing near or far is better, and the gradient vanishes."""
    z, y, offset = data()
    prior = torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=torch.float64)
    found = own_weights(z, y, offset, prior, 20).mode

    def objective(w, shop):
        real = y[shop] != PADDING
        odds = (offset[shop] + z[shop] @ w)[real]
        log_likelihood = torch.where(y[shop][real] == 1, odds.sigmoid().log(), (-odds).sigmoid().log()).sum()
        return log_likelihood - 0.5 * w @ torch.linalg.solve(prior, w)

    grid = torch.cartesian_prod(*[torch.linspace(-2, 2, 41, dtype=torch.float64)] * 2)
    for shop in range(3):
        assert torch.func.grad(objective)(found[shop], shop).abs().max() < 1e-9
        assert objective(found[shop], shop) >= max(objective(w, shop) for w in grid)


def test_learned_prior():
    """One round of EM is the mean of mode mode' + covariance; rounds raise the likelihood of the logs."""
    z, y, offset = data(shops=6, rows=60)
    start = ridge_prior(2, 0.5, z)
    one = own_weights(z, y, offset, start, 20)
    by_hand = sum(torch.outer(m, m) + c for m, c in zip(one.mode, one.covariance)) / 6
    assert torch.allclose(learned_prior(z, y, offset, start, rounds=1, steps=20), by_hand, atol=1e-12)

    grid = torch.cartesian_prod(*[torch.linspace(-4, 4, 81, dtype=torch.float64)] * 2)

    def evidence(prior):
        density = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), prior)
        odds = offset[..., None] + z @ grid.T
        each = torch.where((y == 1)[..., None], odds.sigmoid().log(), (-odds).sigmoid().log())
        return torch.logsumexp((each * (y != PADDING)[..., None]).sum(1) + density.log_prob(grid), 1).sum()

    later = learned_prior(z, y, offset, start, rounds=10, steps=20)
    assert evidence(later) > evidence(by_hand) > evidence(start)


def test_predictive():
    """The corrected log-odds against the integral over the posterior, by a fine sum."""
    z, y, offset = data()
    found = own_weights(z, y, offset, ridge_prior(2, 1.0, z), 20)
    mean = offset + (z @ found.mode[..., None])[..., 0]
    sd = ((z @ found.covariance) * z).sum(-1).sqrt()
    points = torch.linspace(-6, 6, 601, dtype=torch.float64)
    weight = torch.softmax(-0.5 * points**2, 0)
    integral = (torch.sigmoid(mean[..., None] + sd[..., None] * points) * weight).sum(-1)
    approximate = torch.sigmoid(shrunk_log_odds(found, z, offset))
    assert (approximate - integral).abs().max() < 0.01
    assert (torch.sigmoid(mean) - integral).abs().max() > 2 * (approximate - integral).abs().max()


def test_taste_prior():
    """Where products' features are linear in z, shops' weights have covariance G Cov(u) G', of rank d at most; the
    moments of the tastes are those of the mixture of types."""
    family = MODEL.family(PRODUCTS)
    features = torch.tensor(family.table.features, dtype=torch.float64)  # z indicates the product
    taste, *_ = family.prior.hidden(torch.rand(200_000, 9, generator=Generator().manual_seed(0), dtype=torch.float64))
    weights = taste @ features.T
    centres = torch.tensor(family.prior.centres(6), dtype=torch.float64)
    spread = (centres - centres.mean(0)).T @ (centres - centres.mean(0)) / len(centres)
    cov = spread + family.prior.deviation**2 * torch.eye(6, dtype=torch.float64)
    expected = features @ cov @ features.T
    assert (torch.cov(weights.T) - expected).abs().max() < 0.03 * expected.diagonal().max()
    assert torch.linalg.matrix_rank(expected, rtol=1e-9) <= 6 < len(expected)


def test_lora():
    generator = Generator().manual_seed(0)
    layer = torch.nn.Linear(5, 4).double()
    x, down = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 7, 5), (5, 2)))
    up = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    wrapped = Corrected(layer, 6.0 / 2)
    wrapped.pair = down, up
    moved = layer.weight.T + 6.0 / 2 * down @ up
    assert torch.allclose(wrapped(x), x @ moved + layer.bias, atol=1e-12)
    assert torch.linalg.matrix_rank(moved - layer.weight.T) == 2


def test_taste_posterior():
    """Prediction of a second slate: the particles' probabilities, weighted by how likely each made the first."""
    family = MODEL.family(PRODUCTS)
    shop = prior_particles(family, 60, seed=3)
    rows = {
        "session": [0] * 8,
        "slate": [0] * 4 + [1] * 4,
        "place": [0, 1, 2, 3] * 2,
        "product": [3, 9, 1, 14, 5, 2, 8, 0],
    }
    for first in ([0, 0, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0]):
        events = pd.DataFrame({**rows, "event": [*first, 0, 0, 0, 0]})
        found = ideal_probabilities(family, events, shop)[4:]
        tasks = family.from_uniforms(torch.arange(60), torch.full((60, 9), 0.5, dtype=torch.float64))
        tasks = tasks._replace(taste=shop.taste, bias=shop.bias)
        slate = lambda numbers: torch.tensor(numbers).expand(60, 1, 4)
        zero = torch.zeros(60, 1, dtype=torch.int64)
        p = event_probabilities(family, tasks, zero, zero, slate(rows["product"][:4]))[:, 0]
        place = int(np.argmax(first))
        none = 1 - (1 - p[..., 0]).sum(1)  # of the slate
        likelihood = p[:, place, first[place]] if max(first) else none
        stage = zero + (max(first) == 2)  # reading on makes keener
        fatigue = zero + (max(first) == 0)
        later = event_probabilities(family, tasks, stage, fatigue, slate(rows["product"][4:]))[:, 0]
        weight = likelihood / likelihood.sum()
        assert np.allclose(found, (weight[:, None, None] * later).sum(0).numpy(), atol=1e-10)
