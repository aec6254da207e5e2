"""Fusion of modalities and funnel heads: what a part may depend on, what training does, and what is refused."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import log_loss
from torch.utils.flop_counter import FlopCounterMode

from ecomlib.language.funnel import HEADS, calibration, exact_score, excess, reached, targets_of
from ecomlib.language.fusion import CONTEXT, MODALITIES, Fusion, FusionConfig, Inputs, inputs, session_context
from ecomlib.language.fusion_training import event_probabilities, logits, target_probabilities, train_fusion

SMALL = FusionConfig(width=8, hidden=16, channels=6, epochs=6, batch=128, dropout=0.0)


def made(rows, seed=0):
    """A log in which a click needs all of it: words, price and a mark on the picture; and its exact probabilities."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    text = torch.nn.functional.normalize(draw(40, 12), dim=1)
    picture = torch.rand(80, 3, 8, 8, generator=generator) * 0.5
    picture[40:, 0, 2:5, 2:5] = 1.0
    text_row = torch.randint(40, (rows,), generator=generator)
    marked = torch.randint(2, (rows,), generator=generator)
    numbers = draw(rows, 1)
    found = Inputs(draw(rows, CONTEXT), numbers, text, text_row, picture, text_row + 40 * marked)
    click = torch.sigmoid(-1 + 4 * text[text_row, 0] + numbers[:, 0] + 1.5 * marked)
    exact = torch.stack((1 - click, *(click * share for share in (0.4, 0.2, 0.3, 0.1))), 1)
    event = torch.multinomial(exact, 1, generator=generator)[:, 0]
    return found, event.numpy(), exact.numpy()


@pytest.fixture(scope="module")
def world():
    return made(4000)


@pytest.fixture(scope="module")
def trained(world):
    """A model that saw rows without some modalities, and one that never did."""
    found, event, _ = world
    later, later_event, _ = made(1000)
    long = replace(SMALL, lr=0.01, epochs=15)
    return {
        share: train_fusion(replace(long, modality_dropout=share), found, event, later, later_event)
        for share in (0.0, 0.3)
    }


# ------------------------------------------------------------------------------------------------ inputs
def test_context_against_a_loop_over_sessions():
    """Counts and fatigue of one row at a time, over a log of random events in shuffled order."""
    generator = np.random.default_rng(0)
    rows = [
        (session, slate, place, event)
        for session in range(30)
        for slate in range(generator.integers(1, 7))
        for place, event in enumerate(np.where(generator.random(4) < 0.2, generator.integers(1, 5, 4), 0))
    ]
    events = pd.DataFrame(rows, columns=["session", "slate", "place", "event"]).sample(frac=1, random_state=0)
    found = session_context(events)
    assert found.shape == (len(events), CONTEXT)
    for row, got in zip(events.itertuples(), found):
        earlier = events[(events["session"] == row.session) & (events["slate"] < row.slate)]
        fatigue = 0
        for _, slate in earlier.sort_values("slate").groupby("slate"):
            fatigue = 0 if (slate["event"] > 0).any() else min(fatigue + 1, 3)
        counts = [np.log1p((earlier["event"] == kind).sum()) for kind in range(1, 5)]
        expected = [*(row.place == place for place in range(4)), row.slate / 10, fatigue / 3, *counts]
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_inputs_say_where_a_picture_and_a_text_are_found():
    """The picture of a row is that of its product, under a sticker if promoted; the feed's column can be left out."""
    events = pd.DataFrame({"session": [0, 0], "slate": [0, 0], "place": [0, 1], "event": [0, 1], "product": [2, 1]})
    events = events.assign(promoted=[True, False], recorded=[False, False])
    pictures = np.arange(2 * 3)[:, None, None, None] * np.ones((1, 3, 8, 8))
    found = inputs(events, np.eye(3), [1.0, 2.0, 4.0], pictures.reshape(2, 3, 3, 8, 8))
    assert found.picture[found.picture_row, 0, 0, 0].tolist() == [5, 1]
    assert found.text[found.text_row].argmax(1).tolist() == [2, 1]
    np.testing.assert_allclose(found.numbers, [[np.log(4), 0], [np.log(2), 0]], rtol=1e-6)
    without = inputs(events, np.eye(3), [1.0, 2.0, 4.0], pictures.reshape(2, 3, 3, 8, 8), recorded=False)
    assert without.numbers.shape == (2, 1)
    with pytest.raises(ValueError, match="price"):
        inputs(events, np.eye(3), [1.0, 0.0, 4.0], pictures.reshape(2, 3, 3, 8, 8))
    with pytest.raises(ValueError, match="pictures"):
        inputs(events, np.eye(3), [1.0, 2.0, 4.0], pictures)


# ------------------------------------------------------------------------------------------------ the model
@pytest.mark.parametrize("name", MODALITIES)
def test_a_missing_modality_is_not_looked_at(world, name):
    """Predictions without it are the same whatever it holds, and with it they are not."""
    found = world[0].rows(torch.arange(50))
    model = Fusion(SMALL, found).eval()
    other = found._replace(**{name: torch.randn_like(getattr(found, name))})
    assert not torch.equal(logits(model, found), logits(model, other))
    assert torch.equal(logits(model, found, [name]), logits(model, other, [name]))


def test_modalities_of_the_configuration_are_all_that_is_built(world):
    for chosen in ((), ("picture",), ("text", "numbers")):
        model = Fusion(replace(SMALL, modalities=chosen), world[0])
        assert set(model.cost()) == {*chosen, "trunk", "head"}
        assert model(world[0]).shape == (4000, 4)


def test_cost_equals_torchs_count(world):
    """Multiply-adds of one impression, against torch's counter of operations (two for each)."""
    model, one = Fusion(FusionConfig(), world[0]).eval(), world[0].rows(torch.arange(1))
    with FlopCounterMode(display=False) as counter:
        model(one)
    cost = model.cost(8, 8)
    assert 2 * sum(products for _, products in cost.values()) == counter.get_total_flops()
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("absent"))
    assert sum(count for count, _ in cost.values()) == parameters


# ------------------------------------------------------------------------------------------------ training
def test_every_modality_adds_to_what_is_known(world, trained):
    """The exact score falls with each modality left out, and no model gets above the generator. Over all ways to miss
    something at test time, the model that has seen rows without a modality does better than the one that has not."""
    found, event, exact = world
    base = np.bincount(event, minlength=5) / len(event)
    score = lambda model, without=(): exact_score(exact, event_probabilities(model, found, without), base)
    robust, plain = trained[0.3].model, trained[0.0].model
    assert 0.7 < score(plain) < 1
    for name in MODALITIES:
        assert score(robust, [name]) < score(robust) - 0.05
    missing = [without for count in (1, 2, 3) for without in combinations(MODALITIES, count)]
    mean = lambda model: np.mean([score(model, without) for without in missing])
    assert mean(robust) > mean(plain) + 0.02


def test_training_is_reproducible_and_leaves_the_global_generator_alone(world):
    found, event, _ = world
    rows, some = found.rows(torch.arange(600)), event[:600]
    config = replace(SMALL, epochs=2, dropout=0.2, modality_dropout=0.2)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    first = train_fusion(config, rows, some, rows, some)
    assert torch.equal(torch.rand(1), before)
    again = train_fusion(config, rows, some, rows, some)
    other = train_fusion(replace(config, seed=1), rows, some, rows, some)
    assert first.train == again.train and first.validation == again.validation
    assert first.train != other.train


def test_early_stopping_keeps_the_best_weights(world):
    """Events without a pattern: training stops early, and the weights kept are those of the best pass."""
    found, _, _ = world
    rows, event = found.rows(torch.arange(300)), np.random.default_rng(0).integers(0, 5, 300)
    later, later_event = found.rows(torch.arange(300, 900)), np.random.default_rng(1).integers(0, 5, 600)
    run = train_fusion(replace(SMALL, epochs=40, lr=0.03, patience=2), rows, event, later, later_event)
    assert len(run.train) == run.best + 3 < 40
    probability = event_probabilities(run.model, later)
    assert log_loss(later_event, probability, labels=range(5)) == pytest.approx(min(run.validation), rel=1e-5)


# ------------------------------------------------------------------------------------------------ heads
@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_the_shares_of_its_targets(world, name):
    """Minimising a head's loss over constants gives the shares in the log of the targets that it has."""
    _, event, _ = world
    head, events = HEADS[name], torch.as_tensor(event)
    numbers = torch.zeros(head.size, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([numbers], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = head.loss(numbers.expand(len(events), -1), events).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    share = reached(events).double().mean(0)
    own = {"click": [0], "cart": [1], "purchase": [2]}.get(name, [0, 1, 2])
    torch.testing.assert_close(head.reached(numbers.detach()[None])[0], share[own], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients_stay_finite_at_extreme_numbers(name):
    head = HEADS[name]
    for size in (40.0, -40.0, 1e-9):
        numbers = torch.full((5, head.size), size, requires_grad=True)
        head.loss(numbers, torch.arange(5)).sum().backward()
        assert numbers.grad.isfinite().all()


def test_reached_probabilities_never_increase_along_a_funnel(world):
    numbers = 3 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    for name in ("funnel", "softmax", "entire space"):
        p = HEADS[name].reached(numbers[:, : HEADS[name].size])
        assert (p[:, :-1] >= p[:, 1:]).all()
    p = HEADS["nested"].reached(numbers[:, :3])
    assert (p[:, 2] > p[:, 0]).any()  # nothing forbids it here


# ------------------------------------------------------------------------------------------------ scores
def test_scores_of_the_generator_and_of_the_base_rate(world):
    _, event, exact = world
    base = exact.mean(0)
    assert exact_score(exact, exact, base) == 1
    assert exact_score(exact, np.broadcast_to(base, exact.shape), base) == 0
    assert exact_score(targets_of(exact)[:, 2], np.full(len(exact), base[4]), base[4]) == 0
    assert excess(exact, 0.9 * exact + 0.02) > 0
    with pytest.raises(ValueError, match="predicted"):
        excess(exact, exact[:, :4])
    with pytest.raises(ValueError, match="predicted"):
        excess(exact, np.where(exact < 0.05, 0, exact))


def test_calibration_of_what_is_exact_is_the_diagonal(world):
    _, _, exact = world
    predicted, truth = calibration(exact[:, 1], exact[:, 1], 7)
    np.testing.assert_array_equal(predicted, truth)
    assert len(truth) == 7 and (np.diff(truth) >= 0).all()
    predicted, truth = calibration(exact[:, 1], exact[:, 1] ** 2)
    assert (truth > predicted).all()


# ------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    "change",
    [
        {"modalities": ("text", "sound")},
        {"modalities": ("text", "text")},
        {"head": "sigmoid"},
        {"width": 0},
        {"hidden": 10**9},
        {"channels": 0},
        {"dropout": 1.0},
        {"modality_dropout": -0.1},
        {"lr": 0.0},
        {"epochs": 0},
        {"seed": -1},
    ],
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        FusionConfig(**change)


def test_broken_rows_are_named(world):
    found, event, _ = world
    rows, some = found.rows(torch.arange(20)), event[:20]
    with pytest.raises(ValueError, match="event"):
        train_fusion(SMALL, rows, some[:10], rows, some)
    with pytest.raises(ValueError, match="0..4"):
        train_fusion(SMALL, rows, some + 5, rows, some)
    broken = rows._replace(numbers=rows.numbers.clone())
    broken.numbers[7] = float("nan")
    with pytest.raises(ValueError, match="row 7"):
        train_fusion(SMALL, broken, some, rows, some)
    model = Fusion(replace(SMALL, modalities=("text",), head="nested"), rows)
    with pytest.raises(ValueError, match="without"):
        logits(model, rows, ["picture"])
    with pytest.raises(ValueError, match="head"):
        event_probabilities(model, rows)
    assert target_probabilities(model, rows).shape == (20, 3)
