"""Sessions as sequences: targets, histories, padding, splits by time without a leak, a shop's own log, bad input."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from ecomlib.calibration.tables import TableError
from ecomlib.language.behaviour import BehaviourModel
from ecomlib.language.encoder import load_encoder
from ecomlib.language.event_log import load_events
from ecomlib.language.features import impression_features, reduced, tfidf_vectors
from ecomlib.language.products import read_products
from ecomlib.language.sessions import VERBS, SessionDataset, split_by_time

ROWS = [  # session, slate, place, product, event
    (7, 0, 0, 0, 0), (7, 0, 1, 1, 1), (7, 1, 0, 2, 0), (7, 1, 1, 3, 3), (7, 2, 0, 1, 0), (7, 2, 1, 0, 0),
    (9, 0, 0, 3, 4), (9, 0, 1, 2, 0), (9, 1, 0, 0, 0),
]  # fmt: skip
TEXTS = ["oat milk", "green tea", "dry cat food", "rye bread"]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("random")


@pytest.fixture(scope="module")
def events():
    table = pd.DataFrame(ROWS, columns=["session", "slate", "place", "product", "event"])
    return table.assign(shop=0, time=table["session"] + table["slate"] / 1440)


@pytest.fixture(scope="module")
def world():
    products, model = read_products("data/complete_journey_products.parquet"), BehaviourModel()
    return products, model, model.generate(products, range(20), 30, seed=5)


def words(encoder, ids):
    return encoder.tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------------ sequences
def test_a_sequence_reads_history_then_the_slate(encoder, events):
    data = SessionDataset(events, TEXTS, encoder)
    batch = data.collate([0, 1, 2, 3, 4])
    text = [words(encoder, row[mask > 0]) for row, mask in zip(batch.input_ids, batch.attention_mask)]
    assert text[0] == "[CLS] [SEP] oat milk [SEP] green tea [SEP]"  # nothing before the first slate
    past = f"{VERBS[0]} oat milk {VERBS[1]} green tea"
    assert text[1] == f"[CLS] {past} [SEP] dry cat food [SEP] rye bread [SEP]"
    assert text[2].startswith(f"[CLS] {past} {VERBS[0]} dry cat food {VERBS[3]} rye bread [SEP]")
    assert text[4] == f"[CLS] {VERBS[4]} rye bread {VERBS[0]} dry cat food [SEP] oat milk [SEP]"  # of its own session


def test_tokens_belong_to_their_product_and_padding_to_none(encoder, events):
    data = SessionDataset(events, TEXTS, encoder)
    batch = data.collate([0, 2, 4])
    for ids, owner, mask in zip(batch.input_ids, batch.product, batch.attention_mask):
        assert (owner[mask == 0] == -1).all() and (ids[mask == 0] == data.pad).all()
    assert words(encoder, batch.input_ids[1][batch.product[1] == 0]) == "green tea"
    assert batch.event.tolist() == [[0, 1], [0, 0], [0, -100]]  # the last slate has one product: -100, never O
    assert batch.row.tolist() == [[0, 1], [4, 5], [8, -1]]
    assert batch.targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]  # from this slate on


def test_the_order_of_rows_does_not_matter_and_row_numbers_lead_back(encoder, events):
    mixed = events.sample(frac=1, random_state=1)
    data, same = SessionDataset(mixed.reset_index(drop=True), TEXTS, encoder), SessionDataset(events, TEXTS, encoder)
    assert torch.equal(data.ids, same.ids) and torch.equal(data.event, same.event)
    batch, number = data.collate(range(len(data))), mixed["event"].to_numpy()
    inside = batch.row >= 0
    assert np.array_equal(number[batch.row[inside].numpy()], batch.event[inside].numpy())


def test_history_never_holds_what_comes_later(encoder, world):
    """Changing the events of a slate changes no sequence up to that slate."""
    products, _, log = world
    early = log.events[log.events["session"] < 40].reset_index(drop=True)
    texts = products["text"].tolist()
    before = SessionDataset(early, texts, encoder)
    changed = early.assign(event=np.where(early["slate"] >= 2, 4, early["event"]))
    after = SessionDataset(changed, texts, encoder)
    slate = early.groupby(["session", "slate"], sort=True).first().index.get_level_values("slate").to_numpy()
    for i in range(len(before)):
        same = torch.equal(before[i].input_ids, after[i].input_ids)
        assert same or slate[i] > 2
        assert slate[i] <= 2 or before[i].input_ids.shape != after[i].input_ids.shape or not same


def test_a_long_history_loses_its_oldest_and_long_texts_their_ends(encoder, events):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = SessionDataset(events, TEXTS, encoder, max_tokens=16)
    text = words(encoder, short[2].input_ids[0])
    assert short.lengths.max() <= 16 and "rye bread" in text and "oat milk [SEP]" in text
    assert f"{VERBS[0]} oat milk" not in text  # the oldest went first
    long = [*TEXTS[:2], "soup " * 10_000, TEXTS[3]]
    with pytest.warns(UserWarning) as caught:
        cut = SessionDataset(events, long, encoder, max_tokens=32)
    assert any("slates do not fit in max_tokens = 32" in str(w.message) for w in caught)
    assert cut.lengths.max() <= 32 and (cut[1].product == 1).any()  # each product keeps a part


def test_batches_cover_every_slate_once(encoder, events):
    data = SessionDataset(events, TEXTS, encoder)
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([b.row[b.row >= 0] for b in data.batches(2, generator)])
    assert sorted(rows.tolist()) == list(range(9))
    assert [len(b.event) for b in data.batches(2)] == [2, 2, 1]


def test_bad_data_sets_are_refused(encoder, events):
    with pytest.raises(ValueError, match="events = 'no rows'"):
        SessionDataset(events.iloc[:0], TEXTS, encoder)
    with pytest.raises(ValueError, match=r"events\.product = 3"):
        SessionDataset(events, TEXTS[:3], encoder)
    with pytest.raises(ValueError, match=r"texts\[2\] = ''"):
        SessionDataset(events, [*TEXTS[:2], "", TEXTS[3]], encoder)
    with pytest.raises(ValueError, match="max_tokens = 100000"):
        SessionDataset(events, TEXTS, encoder, max_tokens=100_000)


# ------------------------------------------------------------------------------------------------ no leak
def test_no_session_is_in_two_parts_and_time_only_moves_forward(world):
    products, model, log = world
    train, validation, test = parts = split_by_time(log.events, model.days[:2])
    sessions = [set(part["session"]) for part in parts]
    assert not (sessions[0] & sessions[1] or sessions[0] & sessions[2] or sessions[1] & sessions[2])
    assert train["time"].max() < 84 <= validation["time"].min() and validation["time"].max() < 98 <= test["time"].min()
    across = set(log.events["session"]) - set.union(*sessions)  # a session that runs over midnight of a cut: in none
    spans = log.events[log.events["session"].isin(across)].groupby("session")["time"].agg(["min", "max"])
    assert all(any(low < cut <= high for cut in (84, 98)) for low, high in spans.to_numpy())


def test_a_session_across_a_cut_is_in_no_part(events):
    others = [events.assign(session=number, time=float(day)) for number, day in ((1, 1), (2, 8), (3, 20))]
    parts = split_by_time(pd.concat([events, *others]), (7.0007, 10))
    assert 7 not in set().union(*(part["session"] for part in parts))
    with pytest.raises(ValueError, match="leave sessions in train; the log has times from 7 to"):
        split_by_time(events, (1, 8))
    with pytest.raises(ValueError, match="two times that increase"):
        split_by_time(events, (8, 7))


def test_unseen_products_are_absent_until_the_test(world):
    products, model, log = world
    train, validation, test = split_by_time(log.events, model.days[:2])
    late = model.unseen(products)
    assert late[test["product"]].any()
    assert not late[train["product"]].any() and not late[validation["product"]].any()
    categories = products["category"].to_numpy()
    assert not set(categories[late]) & set(categories[train["product"].unique()])


def test_vocabulary_and_components_come_from_training_products_alone(world):
    products, model, _ = world
    late = model.unseen(products)
    fit, texts = np.flatnonzero(~late), products["text"].to_numpy(object).copy()
    vectors = np.random.default_rng(0).normal(size=(len(texts), 12))
    before = tfidf_vectors(texts, fit, 8), reduced(vectors, fit, 4)
    texts[late], vectors[late] = "zebra xylophone", 1e3
    after = tfidf_vectors(texts, fit, 8), reduced(vectors, fit, 4)
    for old, new in zip(before, after):
        assert np.array_equal(old[~late], new[~late])
    assert np.allclose(after[0][late], 0)  # words that training never saw say nothing


# ------------------------------------------------------------------------------------------------ features
def test_impression_features_by_hand(events):
    vectors = np.array([[1.0, 0], [0, 1], [2, 2], [3, 1]])
    found = impression_features(events, vectors)
    assert found.shape == (9, 17)
    row = found[4]  # session 7, slate 2, place 0: product 1; acted on 1 and 3, skipped 0 and 2
    acted, skipped = (vectors[1] + vectors[3]) / 2, (vectors[0] + vectors[2]) / 2
    shown = vectors[1]
    expected = [*shown, *acted, *skipped, *(shown * acted), *(shown * skipped), 1, 0, 0, 0, 0.2, np.log(3), np.log(3)]
    assert np.allclose(row, expected)
    assert np.allclose(found[6][2:10], 0)  # nothing before a first slate, whatever the session before it did
    mixed = events.sample(frac=1, random_state=2)
    assert np.allclose(impression_features(mixed, vectors), found[mixed.index])


# ------------------------------------------------------------------------------------------------ a shop's own log
CSV = """session,time,text,event
a,2026-01-31 18:05,oat milk,view
a,2026-01-31 18:05,green tea,Product_View
a,2026-01-31 18:07,rye bread,add_to_cart
b,2026-02-01 09:00,oat milk,view
"""
NAMES = {"view": "O", "product_view": "click", "add_to_cart": "cart"}


def test_a_log_of_ones_own_is_read(tmp_path, encoder):
    path = tmp_path / "log.csv"
    path.write_text(CSV, encoding="utf-8")
    log = load_events(path, NAMES)
    assert log.products["text"].tolist() == ["oat milk", "green tea", "rye bread"]
    assert log.events["event"].tolist() == [0, 1, 3, 0] and log.events["slate"].tolist() == [0, 0, 1, 0]
    assert log.events["place"].tolist() == [0, 1, 0, 0]
    assert np.allclose(log.events["time"], [18 / 24 + 5 / 1440, 18 / 24 + 5 / 1440, 18 / 24 + 7 / 1440, 1 + 9 / 24])
    path = tmp_path / "log.parquet"
    pd.read_csv(tmp_path / "log.csv").to_parquet(path)
    pd.testing.assert_frame_equal(load_events(path, NAMES).events, log.events)
    assert len(SessionDataset(log.events, log.products["text"].tolist(), encoder)) == 3


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("add_to_cart", "wishlist", r"'event'.*wishlist.*allowed: O, click, browse, cart, purchase"),
        ("rye bread", "", r"'text'.*empty"),
        ("2026-02-01 09:00", "yesterday", r"'time'.*yesterday"),
        ("session,time", "visit,time", r"missing column 'session'"),
        ("view\n", "click\n", r"none of 4 rows is O"),
    ],
)
def test_bad_logs_name_column_and_value(tmp_path, old, new, message):
    path = tmp_path / "log.csv"
    path.write_text(CSV.replace(old, new), encoding="utf-8")
    with pytest.raises(TableError, match=message):
        load_events(path, NAMES)


def test_files_that_cannot_be_read_say_where(tmp_path):
    with pytest.raises(TableError, match="there is no such file"):
        load_events(tmp_path / "nowhere.csv")
    mixed = tmp_path / "mixed.csv"
    mixed.write_bytes(
        CSV.replace("rye bread", "crème").encode("utf-8") + "b,2026-02-01 09:00,brûlée,view\n".encode("latin-1")
    )
    with pytest.raises(TableError, match=r"column 'text', line 6: byte 0xfb is not UTF-8"):
        load_events(mixed, NAMES)
    empty = tmp_path / "empty.csv"
    empty.write_text("session,time,text,event\n")
    with pytest.raises(TableError, match="0 rows"):
        load_events(empty)
    with pytest.raises(TableError, match=r"names\['buy'\] = 'checkout'; allowed: O, click"):
        load_events(pd.read_csv(pd.io.common.StringIO(CSV)), {"buy": "checkout"})


def test_a_session_that_runs_across_a_cut_is_in_no_part():
    times = {1: (0.0, 1.0), 2: (1.5, 2.5), 3: (2.1, 2.9), 4: (3.5, 4.5), 5: (4.0, 4.2)}
    rows = [(session, time) for session, both in times.items() for time in both]
    parts = split_by_time(pd.DataFrame(rows, columns=["session", "time"]), (2.0, 4.0))
    assert [sorted(set(part["session"])) for part in parts] == [[1], [3], [5]]
