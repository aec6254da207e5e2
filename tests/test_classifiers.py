"""Event classifiers: what each adaptation trains, training that repeats and resumes, class weights taken out, controls;
baselines without a leak; metrics against scikit-learn and by hand."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss

from ecomlib.checkpoints import CheckpointError
from ecomlib.language import encoder as encoder_module
from ecomlib.language import metrics
from ecomlib.language.baselines import earlier, fit_linear, place_rates, vector_features, word_features
from ecomlib.language.behaviour import BehaviourModel
from ecomlib.language.encoder import Encoder, load_encoder
from ecomlib.language.models import (
    ADAPTATIONS,
    ClassifierConfig,
    EventClassifier,
    Predictions,
    ensemble,
    further_pretrained,
    predict,
)
from ecomlib.language.products import read_products
from ecomlib.language.sessions import SessionDataset, split_by_time
from ecomlib.language.training import (
    FILE,
    TrainingConfig,
    fit,
    mean_log_loss,
    place_event_rates,
    reworded,
    shuffled_labels,
)

TEXTS = ["cat food", "oat milk", "rye bread", "tea"]


@pytest.fixture(scope="module")
def encoder():
    """A BERT of two tiny layers that reads bytes."""
    from transformers import BertConfig, BertModel

    tokenizer = encoder_module._byte_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel._from_config(BertConfig(vocab_size=len(tokenizer), **sizes), dtype=torch.float32)
    return Encoder("tiny", tokenizer, model.eval(), "tiny")


def log_where(event_of, sessions=60, seed=0):
    """Sessions of two slates of two products; ``event_of`` (product) -> event."""
    luck, rows = np.random.default_rng(seed), []
    for session in range(sessions):
        for slate in range(2):
            for place, product in enumerate(luck.choice(4, 2, replace=False)):
                rows.append((session, slate, place, product, event_of(product, luck)))
    return pd.DataFrame(rows, columns=["session", "slate", "place", "product", "event"])


@pytest.fixture(scope="module")
def data(encoder):
    cats = lambda product, luck: int(product == 0) * 3
    return SessionDataset(log_where(cats), TEXTS, encoder), SessionDataset(log_where(cats, 20, 1), TEXTS, encoder)


FAST = TrainingConfig(epochs=3, batch=16, lr=1e-3, head_lr=5e-3, patience=3)


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ adaptation
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_an_adaptation_changes_what_it_says_and_nothing_else(encoder, data, adaptation):
    original = {name: p.clone() for name, p in encoder.model.named_parameters()}
    config = ClassifierConfig(adaptation=adaptation, top_layers=1, lora_rank=2, hidden=8)
    model = EventClassifier(encoder, config, places=2)
    before = state(model)
    fit(model, *data, replace(FAST, epochs=1))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    inside = {name for name in moved if name.startswith("encoder.")}
    assert {"event.1.weight", "session.1.weight", "place"} <= moved
    assert moved <= set(model.trained())
    if adaptation == "frozen":
        assert not inside
    elif adaptation == "top":
        assert inside and all(".layer.1." in name for name in inside)
    elif adaptation == "lora":
        assert inside and all("lora_" in name and ("query" in name or "value" in name) for name in inside)
    else:
        assert "encoder.embeddings.word_embeddings.weight" in inside and any(".layer.0." in n for n in inside)
    assert all(torch.equal(p, original[name]) for name, p in encoder.model.named_parameters())  # a copy was trained


def test_a_rule_in_the_texts_is_learned_and_shuffled_labels_are_not(encoder, data):
    """Cat food always ends in the cart: the loss falls far below that of the base rates. With labels dealt anew the
    same training ends at the base rates of a log that it has not seen."""
    train, validation = data
    model = EventClassifier(encoder, ClassifierConfig(hidden=16), places=2)
    rates = np.array([0.75, 0, 0, 0.25, 0]) + 1e-9
    base = -(rates * np.log(rates)).sum()
    history = fit(model, train, validation, replace(FAST, epochs=6))
    assert history.validation[history.best] < 0.25 * base
    cats = lambda product, luck: int(product == 0) * 3
    control = SessionDataset(log_where(cats), TEXTS, encoder), SessionDataset(log_where(cats, 20, 1), TEXTS, encoder)
    shuffled_labels(control[0], 0)
    shuffled_labels(control[1], 5)
    assert not torch.equal(control[0].event, train.event)
    assert torch.equal(control[0].event.flatten().sort().values, train.event.flatten().sort().values)
    model = EventClassifier(encoder, ClassifierConfig(hidden=16), places=2)
    fit(model, *control, replace(FAST, epochs=6))
    assert mean_log_loss(model, validation) > 0.9 * base


def test_training_starts_from_the_rates_by_place(encoder, data):
    model = EventClassifier(encoder, ClassifierConfig(), places=2)
    rates = place_event_rates(data[0], 2)
    assert np.allclose(rates.sum(1), 1) and abs(rates[0, 3] - (data[0].event[:, 0] == 3).double().mean().item()) < 0.03
    with torch.no_grad():
        model.event[-1].weight.zero_()
    model.start_from(rates)
    found = predict(model, data[1]).event
    assert np.allclose(found[0], rates[0], atol=1e-6) and np.allclose(found[1], rates[1], atol=1e-6)


def test_settings_and_slates_that_do_not_fit_are_refused(encoder, data):
    for settings, message in (
        ({"adaptation": "some"}, "adaptation = 'some'; allowed: one of frozen"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"hidden": 10**9}, "hidden = 1000000000"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassifierConfig(**settings)
    with pytest.raises(ValueError, match="warm_up = 1"):
        TrainingConfig(warm_up=1)
    with pytest.raises(ValueError, match=r"top_layers = 5; allowed: 1\.\.2"):
        EventClassifier(encoder, ClassifierConfig(adaptation="top", top_layers=5))
    with pytest.raises(ValueError, match="places of a slate = 2; allowed: at most 1"):
        predict(EventClassifier(encoder, places=1), data[1])
    with pytest.raises(ValueError, match="encoder = None"):
        fit(EventClassifier(encoder, places=2), *data, TrainingConfig(word_dropout=0.1))


# ------------------------------------------------------------------------------------------------ training
def test_training_repeats_and_goes_on_from_a_checkpoint(encoder, data, tmp_path):
    """Stopped after one of three epochs and resumed in a new process's place: the same history and weights, bit for
    bit. Another seed gives others."""
    config = ClassifierConfig(adaptation="top", top_layers=1, hidden=8)
    make = lambda: EventClassifier(encoder, config, places=2)
    whole, again, other, part = make(), make(), make(), make()
    history = fit(whole, *data, FAST)
    assert fit(again, *data, FAST)._replace(seconds=[]) == history._replace(seconds=[])
    assert fit(other, *data, replace(FAST, seed=1)).train != history.train

    class Stop(Exception):
        pass

    calls = []

    def stop_in_second_epoch(batch_size, generator, original=SessionDataset.batches):
        calls.append(0)
        if len(calls) == 2:
            raise Stop
        return original(data[0], batch_size, generator)

    train = SessionDataset.__new__(SessionDataset)
    train.__dict__ = dict(data[0].__dict__)
    train.batches = stop_in_second_epoch
    with pytest.raises(Stop):
        fit(part, train, data[1], FAST, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    resumed = make()
    found = fit(resumed, *data, FAST, folder=tmp_path)
    assert found._replace(seconds=[]) == history._replace(seconds=[]) and len(found.seconds) == 3
    assert all(torch.equal(a, b) for a, b in zip(state(whole).values(), state(resumed).values()))
    finished = make()
    assert fit(finished, *data, FAST, folder=tmp_path) == found  # nothing is left to do
    with pytest.raises(CheckpointError, match="belongs to another training"):
        fit(make(), *data, replace(FAST, lr=2e-3), folder=tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged: delete it to start"):
        fit(make(), *data, FAST, folder=tmp_path)


def test_early_stopping_keeps_the_best_weights(encoder, data):
    """Training labels contradict validation labels: every epoch is worse, so training stops and goes back."""
    train, validation = data
    wrong = SessionDataset(log_where(lambda product, luck: int(product == 1) * 3), TEXTS, encoder)
    model = EventClassifier(encoder, ClassifierConfig(hidden=16), places=2)
    history = fit(model, wrong, validation, replace(FAST, epochs=9, patience=2, lr=2e-3))
    assert len(history.validation) < 9 and len(history.validation) - 1 - history.best == 2
    assert np.isclose(mean_log_loss(model, validation), min(history.validation), atol=1e-6)


def test_weights_of_classes_are_taken_out_of_predictions(encoder, data):
    model = EventClassifier(encoder, ClassifierConfig(hidden=8, adaptation="frozen"), places=2)
    rare = lambda product, luck: 3 * int(luck.random() < 0.1)  # nothing to learn but the rate
    train, test = (SessionDataset(log_where(rare, 200, seed), TEXTS, encoder) for seed in (0, 1))
    fit(model, train, test, replace(FAST, balanced=True, epochs=1, head_lr=1e-3))
    rate = (train.event == 3).double().mean().item()
    assert abs(predict(model, test).event[:, 3].mean() - rate) < 0.05
    assert predict(model, test, corrected=False).event[:, 3].mean() > 0.25
    assert np.allclose(predict(model, test).event.sum(1), 1)


def test_augmentation_hides_words_of_products_only(encoder, data):
    from ecomlib.language.training import _hider

    hide = _hider(encoder, data[0], TrainingConfig(word_dropout=0.5))
    batch = data[0].collate(range(60))
    hidden = hide(batch, torch.Generator().manual_seed(0))
    changed = hidden.input_ids != batch.input_ids
    assert (hidden.input_ids[changed] == encoder.tokenizer.mask_token_id).all()
    assert not changed[batch.attention_mask == 0].any() and not changed[:, 0].any()
    share = changed[batch.product >= 0].double().mean()
    assert 0.45 < share < 0.55
    assert torch.equal(hide(batch, torch.Generator().manual_seed(0)).input_ids, hidden.input_ids)


def test_reworded_texts_are_shop_talk():
    texts = ["frozen pizza, 12 ounce, store brand"] * 200
    found = reworded(texts, 0, share=0.5, swap=0.0)
    assert {"frzn pizza, 12 oz, store brand", texts[0]} <= set(found) and len(set(found)) == 4
    assert reworded(texts, 0) == reworded(texts, 0) != reworded(texts, 1)
    swapped = reworded(texts, 0, share=0.0, swap=1.0)
    assert all(sorted(t.split()) == sorted(texts[0].split()) and t != texts[0] for t in swapped)
    with pytest.raises(ValueError, match="share = 2"):
        reworded(texts, 0, share=2)


def test_further_pretraining_changes_a_copy(encoder):
    before = encoder.embed(TEXTS)
    found = further_pretrained(encoder, TEXTS * 4, epochs=1, batch=8, lr=1e-3)
    assert np.array_equal(encoder.embed(TEXTS), before) and np.abs(found.embed(TEXTS) - before).max() > 1e-3
    again = further_pretrained(encoder, TEXTS * 4, epochs=1, batch=8, lr=1e-3)
    assert np.array_equal(again.embed(TEXTS), found.embed(TEXTS)) and found.digest != encoder.digest


def test_an_ensemble_is_the_mean_probability():
    one, two = (Predictions(np.full((2, 5), x), np.full((1, 3), x)) for x in (0.1, 0.3))
    assert np.allclose(ensemble([one, two]).event, 0.2) and np.allclose(ensemble([one, two]).session, 0.2)
    with pytest.raises(ValueError, match="members = "):
        ensemble([])


# ------------------------------------------------------------------------------------------------ baselines
@pytest.fixture(scope="module")
def world():
    products, model = read_products("data/complete_journey_products.parquet"), BehaviourModel()
    log = model.generate(products, [0], 500, seed=0)
    splits = split_by_time(log.events.assign(row=np.arange(len(log.events))), model.days[:2])
    return products, model.unseen(products), splits, log.probability[splits.test["row"]]


def test_earlier_is_earlier(world):
    events = world[2].test
    acted, skipped = earlier(events)
    row, column = (acted + skipped).nonzero()
    same = events["session"].to_numpy()
    slate = events["slate"].to_numpy()
    assert (same[row] == same[column]).all() and (slate[column] < slate[row]).all()
    assert (acted + skipped).nnz == sum((same == s)[slate < t].sum() for s, t in zip(same, slate))
    assert (events["event"].to_numpy()[acted.nonzero()[1]] > 0).all()


def test_baselines_beat_the_base_rates_and_shuffled_labels_do_not(world):
    """A model of one shop's log: words on seen products score well above rates by place, and nothing of it is left when
    the events of the training and validation parts are dealt anew."""
    products, late, splits, exact = world
    base = np.bincount(splits.train["event"], minlength=5) / len(splits.train)
    seen = ~late[splits.test["product"]]
    truth = splits.test["event"].to_numpy()
    score = lambda q: metrics.event_score(truth[seen], q[seen], base, exact[seen])
    features = word_features(products["text"], np.flatnonzero(~late))
    place = score(place_rates(splits.train)(splits.test))
    words = fit_linear(features, splits.train, splits.validation, (0.3, 3.0))
    assert score(words.probabilities(splits.test)) > place + 0.1
    luck = np.random.default_rng(0)
    dealt = [part.assign(event=luck.permutation(part["event"])) for part in splits[:2]]
    control = fit_linear(features, *dealt, (0.003, 0.3))
    assert abs(score(control.probabilities(splits.test))) < 0.05
    assert set(features.vocabulary) <= set(
        word_features(products["text"][~late].tolist(), range((~late).sum())).vocabulary
    )  # no word of a late product is in the vocabulary for its own sake


def test_a_linear_model_keeps_the_best_penalty_and_knows_absent_events(world):
    products, _, splits, _ = world
    vectors = np.random.default_rng(0).normal(size=(len(products), 3))
    few = splits.train[splits.train["event"] < 4]
    found = fit_linear(vector_features(vectors), few, splits.validation, (1e-3, 1e-1))
    chances = found.probabilities(splits.test)
    assert found.strength == min(found.losses, key=found.losses.get) and found.parameters == 4 * (22 + 1)
    assert np.allclose(chances.sum(1), 1) and (chances[:, 4] > 0).all() and chances[:, 4].max() < 1e-5


# ------------------------------------------------------------------------------------------------ metrics
@pytest.fixture
def predictions():
    luck = np.random.default_rng(3)
    exact = luck.dirichlet([9, 1, 0.6, 0.5, 0.4], 3000)
    event = np.array([luck.choice(5, p=p) for p in exact])
    blurred = 0.5 * exact + 0.5 * exact.mean(0)
    return event, blurred, exact, np.repeat(np.arange(600), 5)


def test_summary_agrees_with_scikit_learn(predictions):
    event, blurred, exact, _ = predictions
    base, half = np.bincount(event, minlength=5) / len(event), np.arange(len(event)) < 1000
    found = metrics.summary(event, blurred, base, exact, {"half": half})["half"]
    assert np.isclose(found["log-loss"], log_loss(event[half], blurred[half], labels=range(5)))
    assert np.isclose(found["PR-AUC"], average_precision_score(event[half] > 0, 1 - blurred[half, 0]))
    assert 0 < found["score"] < 1 and found["rows"] == 1000
    assert found["macro-F1"] > found["macro-F1 likeliest"]
    json.dumps(found)


def test_intervals_by_session_are_those_of_the_ratio(predictions):
    event, blurred, exact, session = predictions
    base = exact.mean(0)
    i = metrics.score_interval(event, blurred, base, exact, session, resamples=499)
    assert i.low < i.estimate < i.high and i.n == 600
    assert np.isclose(i.estimate, metrics.event_score(event, blurred, base, exact))
    alike = metrics.score_interval(event, exact, base, exact, session)
    assert alike.low == alike.high == 1
    double = lambda x: np.concatenate((x, x))  # a session seen twice is no new evidence
    twice = metrics.score_interval(*map(double, (event, blurred)), base, double(exact), double(session), resamples=499)
    assert np.isclose(twice.high - twice.low, i.high - i.low)


def test_exact_probabilities_are_calibrated_and_tilted_ones_are_not(predictions):
    event, _, exact, _ = predictions
    off = lambda q: np.abs(np.subtract(*metrics.calibration(event, q).to_numpy().T)).max()
    tilted = exact * [1, 8, 8, 8, 8]
    assert off(exact) < 0.08 < 0.3 < off(tilted / tilted.sum(1, keepdims=True))


def test_reports_and_errors(predictions):
    event, blurred, _, _ = predictions
    report = metrics.event_report(event, metrics.decided(blurred))
    assert list(report.index[:5]) == list(metrics.EVENTS) and report.loc["O", "recall"] > 0.95
    with pytest.raises(ValueError, match=r"event\[0\] = 7; allowed: 0\.\.4"):
        metrics.event_losses([7], [[1, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"probability\[1\] = .*sum 1"):
        metrics.event_losses([0, 0], [[1, 0, 0, 0, 0], [0.5, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"probabilities \(rows, 5\) needed"):
        metrics.event_losses([0, 1], [[1, 0, 0, 0, 0]])


def test_the_random_encoder_of_the_package_serves_classifiers():
    model = EventClassifier(load_encoder("random"), ClassifierConfig(adaptation="lora"), places=2)
    assert 50_000 < sum(p.numel() for name, p in model.trained().items() if "lora_" in name) < 100_000
