"""Chapter "Behaviour prediction with a pretrained encoder": both sides of every numbered equation."""

import numpy as np
import pandas as pd
import torch

from ecomlib.language.behaviour import BehaviourModel, event_probabilities
from ecomlib.language.encoder import load_encoder
from ecomlib.language.features import impression_features
from ecomlib.language.metrics import event_losses, event_score
from ecomlib.language.models import ClassifierConfig, EventClassifier
from ecomlib.language.products import read_products
from ecomlib.language.sessions import Batch, SessionDataset


def products():
    return read_products("data/complete_journey_products.parquet")


def test_event_probabilities_are_those_of_the_funnel():
    """(eq-events): the five products of shares against event_probabilities, at every stage, and their sum is 1."""
    family = BehaviourModel().family(products())
    tasks = family.tasks(torch.arange(6))
    shown = torch.tensor([5, 80, 700, 1500]).expand(6, 3, 4)
    stage, fatigue = torch.arange(3).expand(6, 3), torch.tensor([0, 1, 3]).expand(6, 3)
    weight = family.shown_weight(tasks, stage, fatigue, shown)
    click = weight / (1 + weight.sum(-1, keepdim=True))
    kappa, bought = torch.tensor(family.cart)[stage][..., None], torch.tensor(family.order)[stage][..., None]
    pull = torch.tensor(family.table.pull)[shown]
    shares = [
        1 - click,
        click * (1 - kappa) * (1 - pull),
        click * (1 - kappa) * pull,
        click * kappa * (1 - bought),
        click * kappa * bought,
    ]
    exact = event_probabilities(family, tasks, stage, fatigue, shown)
    assert torch.allclose(exact, torch.stack(shares, -1), rtol=1e-12, atol=0)
    assert torch.allclose(exact.sum(-1), torch.ones(6, 3, 4), rtol=0, atol=1e-12)


def test_score_is_zero_for_base_rates_and_one_for_the_generator():
    """(eq-behaviour-score): against a loop over impressions, and its two ends."""
    luck = np.random.default_rng(0)
    exact = luck.dirichlet([8, 1, 1, 1, 1], 400)
    event = np.array([luck.choice(5, p=p) for p in exact])
    base, model = exact.mean(0), luck.dirichlet([5, 1, 1, 1, 1], 400)
    loss = lambda q: -sum(np.log(q[n][y]) for n, y in enumerate(event)) / len(event)
    rates = np.tile(base, (400, 1))
    expected = (loss(rates) - loss(model)) / (loss(rates) - loss(exact))
    assert np.isclose(event_score(event, model, base, exact), expected, rtol=1e-12)
    assert np.isclose(event_losses(event, model).mean(), loss(model), rtol=1e-12)
    assert event_score(event, rates, base, exact) == 0 and event_score(event, exact, base, exact) == 1


def test_padding_as_an_event_inflates_accuracy():
    """(eq-padding): accuracy over tokens labelled O outside the slate, counted in the data set itself, against the
    formula from the accuracy on tokens of products."""
    model, table = BehaviourModel(), products()
    log = model.generate(table, range(4), 10, seed=3)
    batch = next(SessionDataset(log.events, table["text"].tolist(), load_encoder("random")).batches(10_000))
    own = batch.event.gather(1, batch.product.clamp(min=0))
    label = torch.where(batch.product >= 0, own, 0)  # the recipe: everything else is O
    answer = torch.zeros_like(label)
    inside = batch.product >= 0
    n, m = inside.sum(), (~inside).sum()
    a = (answer == label)[inside].double().mean()
    assert torch.isclose((answer == label).double().mean(), (n * a + m) / (n + m), rtol=1e-12)
    assert (answer == label).double().mean() > a + 0.01


def test_lora_adds_a_product_of_rank_r():
    """(eq-low-rank): the adapted query map on a random input against W + (s / r) B A, and B starts at 0."""
    config = ClassifierConfig(adaptation="lora", lora_rank=3, lora_scale=6.0, dropout=0.0)
    encoder = load_encoder("random")
    adapted = EventClassifier(encoder, config).encoder.base_model.model.encoder.layer[0].attention.self.query
    down, up = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    assert down.shape[0] == 3 and not up.any()
    generator = torch.Generator().manual_seed(0)
    up.data = torch.randn(up.shape, generator=generator, dtype=torch.float32)
    x = torch.randn(5, encoder.size, generator=generator, dtype=torch.float32)
    weight = adapted.base_layer.weight + 6 / 3 * up @ down
    assert torch.allclose(adapted(x), x @ weight.T + adapted.base_layer.bias, atol=1e-4)
    assert torch.linalg.matrix_rank(up.double() @ down.double()) == 3


def test_session_features_by_hand():
    """(eq-session-features): means over earlier slates of one session, and the products entry by entry."""
    rows = [(0, 0, 0, 2, 1), (0, 0, 1, 0, 0), (0, 1, 0, 1, 3), (0, 1, 1, 3, 0), (0, 2, 0, 0, 0)]
    events = pd.DataFrame(rows, columns=["session", "slate", "place", "product", "event"])
    v = np.random.default_rng(1).normal(size=(4, 3))
    plus, minus, c = (v[2] + v[1]) / 2, (v[0] + v[3]) / 2, v[0]
    expected = np.concatenate((c, plus, minus, c * plus, c * minus))
    assert np.allclose(impression_features(events, v)[4, :15], expected, atol=1e-6)


def test_weights_are_taken_out_exactly():
    """(eq-prior-correction): the minimiser of the weighted loss over a distribution, found by gradient descent, against
    weights times probabilities; dividing by the weights gives the probabilities back."""
    q, w = torch.tensor([0.89, 0.05, 0.03, 0.02, 0.01]), torch.tensor([0.2, 4.0, 7.0, 10.0, 20.0])
    z = torch.zeros(5, requires_grad=True)
    for _ in range(4000):
        loss = -(q * w * torch.log_softmax(z, 0)).sum()
        (gradient,) = torch.autograd.grad(loss, z)
        z = (z - 0.5 * gradient).detach().requires_grad_()
    tilted = torch.softmax(z.detach(), 0)
    assert torch.allclose(tilted, q * w / (q * w).sum(), atol=1e-8)
    back = (tilted / w) / (tilted / w).sum()
    assert torch.allclose(back, q, atol=1e-7)
    shifted = torch.softmax(z.detach() - w.log(), 0)  # what EventClassifier.shift does to logits
    assert torch.allclose(shifted, back, atol=1e-12)


def test_an_ensemble_beats_its_average_member():
    """(eq-ensemble): row by row, with equality where the members agree."""
    luck = np.random.default_rng(2)
    members, event = luck.dirichlet([1, 1, 1, 1, 1], (4, 300)), luck.integers(5, size=300)
    together = event_losses(event, members.mean(0))
    average = np.mean([event_losses(event, member) for member in members], 0)
    assert (together <= average + 1e-12).all() and together.mean() < average.mean() - 0.1
    same = np.repeat(members[:1], 4, 0)
    assert np.allclose(event_losses(event, same.mean(0)), event_losses(event, members[0]))


def test_the_padding_label_has_no_part_in_the_loss():
    """The label -100 changes neither logits nor loss: a slate of fewer products beside a full one, against alone."""
    encoder = load_encoder("random")
    rows = [(0, 0, 0, 0, 1), (0, 0, 1, 1, 0), (1, 0, 0, 2, 0)]
    events = pd.DataFrame(rows, columns=["session", "slate", "place", "product", "event"])
    data = SessionDataset(events, ["oat milk", "green tea with lemon and mint", "rye bread"], encoder)
    model = EventClassifier(encoder, ClassifierConfig(adaptation="frozen")).eval()
    together, alone = data.collate([0, 1]), data.collate([1])
    with torch.no_grad():
        both, one = model(together).event[1, 0], model(Batch(*alone)).event[0, 0]
    assert torch.allclose(both, one, atol=1e-4)
