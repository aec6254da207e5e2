"""Chapter "More than text": both sides of every numbered equation."""

import numpy as np
import pytest
import torch

from ecomlib import noise
from ecomlib.language.behaviour import BehaviourModel, event_probabilities
from ecomlib.language.funnel import HEADS, excess, funnel_log_probabilities, targets_of
from ecomlib.language.fusion import CONTEXT, MODALITIES, Fusion, FusionConfig, Inputs
from ecomlib.language.products import read_products
from ecomlib.language.promotions import PromotedBehaviour


@pytest.fixture(scope="module")
def products(request):
    return read_products(request.config.rootpath / "data" / "complete_journey_products.parquet").iloc[::10]


def segment(family, shop=10_000):
    ids = torch.tensor([shop])
    uniforms = noise.uniform(
        0, ids, torch.zeros(1, dtype=torch.int64), 0, 0, noise.PRIOR, family.prior_size, torch.float64
    )
    return family.from_uniforms(ids, uniforms[:, 0])


def some_logits(columns, rows=40, seed=0):
    return 2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_promotion_multiplies_the_odds_of_a_click(products):
    """(eq-promotion): for every product, stage and fatigue, the odds of a click on it against no click, by the exact
    probabilities of the family's step, with and without a promotion; and the other products' odds do not change."""
    model = PromotedBehaviour(lift=0.8)
    plain, marked = BehaviourModel().family(products), model.family(products)
    tasks, k = segment(plain), 4
    for stage in range(3):
        for fatigue in range(4):
            state = torch.full((1, 50), stage), torch.full((1, 50), fatigue)
            shown = torch.randperm(len(products), generator=torch.Generator().manual_seed(stage))[: 50 * k]
            shown = shown.view(1, 50, k)
            flag = torch.zeros_like(shown)
            flag[..., 2] = 1
            old = event_probabilities(plain, tasks, *state, shown)
            new = event_probabilities(marked, tasks, *state, 2 * shown + flag)
            odds = [(1 - p[..., 0]) / (1 - (1 - p[..., 0]).sum(-1, keepdim=True)) for p in (old, new)]
            expected = odds[0] * torch.exp(0.8 * flag)
            torch.testing.assert_close(odds[1], expected, rtol=1e-12, atol=0)


def test_a_model_sees_a_promotion_by_its_week(products):
    """(eq-promotion): the log's column says which of the two items of the catalogue the shopper met."""
    model = PromotedBehaviour()
    shown = torch.arange(len(products)).view(1, 1, -1).expand(1, 17, -1)
    start = torch.arange(17, dtype=torch.float64)[None] * 7 + 3
    items = model.listed(shown, start)[0]
    assert torch.equal(items // 2, shown[0])
    np.testing.assert_array_equal((items % 2).numpy().T.astype(bool), model.promoted(len(products))[:, :17])


def test_excess_is_the_expected_loss_above_the_ceiling():
    """(eq-excess): the mean over all five events, each at its exact probability, of the loss of a prediction, less
    that of the exact probabilities."""
    exact, predicted = some_logits(5).softmax(-1).numpy(), some_logits(5, seed=1).softmax(-1).numpy()
    expected = 0.0
    for p, q in zip(exact, predicted):
        for y in range(5):
            expected += p[y] * (-np.log(q[y]) + np.log(p[y]))
    assert excess(exact, predicted) == pytest.approx(expected / len(exact), rel=1e-12)
    assert excess(exact, exact) == 0


def test_fusion_by_hand():
    """(eq-fusion): with every pattern of missing modalities, from the parts of the module."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    row = torch.arange(8)
    rows = Inputs(draw(8, CONTEXT), draw(8, 2), draw(8, 6), row, torch.rand(8, 3, 8, 8, generator=generator), row)
    model = Fusion(FusionConfig(width=5, hidden=7), rows).eval()
    for vector in model.absent.values():
        torch.nn.init.normal_(vector, generator=generator)
    b = torch.tensor([[(pattern >> m) & 1 for m in range(3)] for pattern in range(8)]).bool()
    scale = lambda x: (x - x.mean(0)) / x.std(0)
    given = {"text": rows.text, "numbers": scale(rows.numbers), "picture": rows.picture}
    sides = []
    for n in range(8):
        v = []
        for m, name in enumerate(MODALITIES):
            v.append(model.encoders[name](given[name][n : n + 1]).relu()[0] if b[n, m] else model.absent[name])
        first, last = model.trunk[0], model.head
        hidden = (first.weight @ torch.cat((scale(rows.context)[n], *v)) + first.bias).relu()
        sides.append(last.weight @ hidden + last.bias)
    torch.testing.assert_close(model(rows, b), torch.stack(sides), rtol=1e-10, atol=1e-12)


def test_funnel_sums_to_one_and_is_the_generators_form(products):
    """(eq-funnel): for any log-odds; and the generator's own probabilities have this form, with log-odds of the cart,
    the purchase and reading on that are those of the stage and of the product."""
    q = funnel_log_probabilities(some_logits(4) * 5).exp()
    torch.testing.assert_close(q.sum(-1), torch.ones(40, dtype=torch.float64), rtol=0, atol=1e-12)
    model = BehaviourModel()
    family = model.family(products)
    tasks, shown = segment(family), torch.arange(4 * 50).view(1, 50, 4)
    for stage in range(3):
        state = torch.full((1, 50), stage)
        exact = event_probabilities(family, tasks, state, torch.zeros_like(state), shown).view(-1, 5)
        click = torch.logit(1 - exact[:, 0])
        pull = torch.tensor(family.table.pull, dtype=torch.float64)[shown].flatten()
        shares = torch.tensor([[model.cart[stage], model.order[stage]]], dtype=torch.float64).expand(200, -1)
        z = torch.column_stack((click, torch.logit(shares), torch.logit(pull)))
        torch.testing.assert_close(funnel_log_probabilities(z).exp(), exact, rtol=1e-10, atol=1e-12)


def slopes(loss, z, step=1e-6):
    """Central differences of a sum of losses, one row at a time since rows do not mix."""
    columns = []
    for column in range(z.shape[1]):
        shift = torch.zeros_like(z)
        shift[:, column] = step
        columns.append((loss(z + shift) - loss(z - shift)) / (2 * step))
    return torch.stack(columns, 1)


def test_gradient_of_the_funnel():
    """(eq-funnel-gradient): closed form = autograd = central differences; no later stage has a gradient from a row
    that did not reach it."""
    z = some_logits(4).requires_grad_()
    y = torch.arange(40) % 5
    loss = lambda x: HEADS["funnel"].loss(x, y)
    (gradient,) = torch.autograd.grad(loss(z).sum(), z)
    s, one = torch.sigmoid(z.detach()), lambda condition: condition.double()
    closed = torch.stack(
        (
            s[:, 0] - one(y >= 1),
            one(y >= 1) * (s[:, 1] - one(y >= 3)),
            one(y >= 3) * (s[:, 2] - one(y == 4)),
            one((y == 1) | (y == 2)) * (s[:, 3] - one(y == 2)),
        ),
        1,
    )
    torch.testing.assert_close(gradient, closed, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slopes(loss, z.detach()), closed, rtol=0, atol=1e-8)
    assert (gradient[y == 0][:, 1:] == 0).all()


def test_entire_space_loss_and_gradient():
    """(eq-entire-space): the loss from probabilities that are multiplied out; its gradient, closed = autograd =
    differences; and at the exact probabilities its expectation has gradient zero, like the funnel's."""
    z = some_logits(3).requires_grad_()
    y = torch.arange(40) % 5
    loss = lambda x: HEADS["entire space"].loss(x, y)
    s = torch.sigmoid(z.detach())
    big_q = s.cumprod(1)
    r = torch.stack([(y >= kind).double() for kind in (1, 3, 4)], 1)
    direct = -(r * big_q.log() + (1 - r) * (1 - big_q).log()).sum(1)
    torch.testing.assert_close(loss(z.detach()), direct, rtol=1e-10, atol=1e-12)
    parts = (big_q - r) / (1 - big_q)
    closed = (1 - s) * parts.flip(1).cumsum(1).flip(1)  # sums over j >= i
    (gradient,) = torch.autograd.grad(loss(z).sum(), z)
    torch.testing.assert_close(gradient, closed, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slopes(loss, z.detach()), closed, rtol=0, atol=1e-6)
    exact = funnel_log_probabilities(some_logits(4, rows=1)).exp()
    reach = torch.tensor(targets_of(exact.numpy()))
    conditional = torch.cat((reach[:, :1], reach[:, 1:] / reach[:, :-1]), 1)
    at = torch.logit(conditional).requires_grad_()
    expected = sum(exact[0, kind] * HEADS["entire space"].loss(at, torch.tensor([kind])).sum() for kind in range(5))
    assert torch.autograd.grad(expected, at)[0].abs().max() < 1e-12


def test_variance_of_a_shared_conversion():
    """(eq-sharing): the two variances of the logarithm of an estimated purchase rate, by simulation; each within 6 %,
    which is five standard errors of the simulated variance and what the first-order formula leaves out."""
    n, p, kappa, groups, repetitions = 20_000, 0.1, 0.2, 20, 12_000
    rng = np.random.default_rng(0)
    clicks = rng.binomial(n, p, (repetitions, groups))
    bought = rng.binomial(clicks, kappa)
    own = np.log(bought[:, 0] / n)
    shared = np.log(clicks[:, 0] / n * bought.sum(1) / clicks.sum(1))
    separate = (1 - p * kappa) / (n * p * kappa)
    together = (1 - p) / (n * p) + (1 - kappa) / (groups * n * p * kappa)
    assert own.var() == pytest.approx(separate, rel=0.06)
    assert shared.var() == pytest.approx(together, rel=0.06)
    # rare clicks, and so many other products that their conversion is as good as known: what is left is kappa
    rare = 1e-6
    limit = (1 - rare) / (n * rare) / ((1 - rare * kappa) / (n * rare * kappa))
    assert limit == pytest.approx(kappa, rel=1e-5)
