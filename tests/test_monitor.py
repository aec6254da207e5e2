"""Generated headlines, the reader's own, classifiers' rates, streams with a hidden change, and the alarm."""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ecomlib.calibration.tables import TableError
from ecomlib.language.cusum import Cusum, Source, calibrated, kl_bernoulli
from ecomlib.language.headline_text import HEADLINES, SLOTS
from ecomlib.language.monitor import (
    SENTIMENTS,
    TOPICS,
    HeadlineGenerator,
    NewsStream,
    error_rates,
    load_headlines,
    seen_share,
    split_wordings,
    vader_sentiment,
)
from ecomlib.language.templates import SLOT

TABLE = HeadlineGenerator().headlines()


# ----------------------------------------------------------------------------------------------- headlines
def test_every_topic_has_three_sentiments_of_nine_wordings():
    assert len(TOPICS) == 8 and set(HEADLINES) == {f"{t}/{s}" for t in TOPICS for s in SENTIMENTS}
    for name, (_, wordings) in HEADLINES.items():
        assert len(set(wordings)) == 9, name
        assert {slot for wording in wordings for slot in SLOT.findall(wording)} <= set(SLOTS)
    assert len(TABLE) == 8 * 3 * 9 * 4 and not TABLE["headline"].str.contains(r"[{}|]").any()
    pd.testing.assert_frame_equal(TABLE, HeadlineGenerator().headlines())
    for setting in ({"renderings": 0}, {"trimmings": 2}):
        with pytest.raises(ValueError, match="HeadlineGenerator"):
            HeadlineGenerator(**setting)


def test_no_wording_is_on_two_sides():
    train, test = split_wordings(TABLE, 3)
    assert sorted([*train, *test]) == list(range(len(TABLE)))
    key = lambda rows: set(zip(*(TABLE.iloc[rows][name] for name in ("topic", "sentiment", "wording"))))
    assert not key(train) & key(test) and len(key(train)) == 8 * 3 * 5
    assert not np.array_equal(train, split_wordings(TABLE, 4)[0])
    with pytest.raises(ValueError, match="train = 9"):
        split_wordings(TABLE, 0, train=9)


def test_vader_reads_everyday_words_and_misses_those_of_the_trade(monkeypatch):
    texts = ["Great success", "Terrible fraud", "The firm meets on Tuesday", "Losses narrow at the firm"]
    assert vader_sentiment(texts).tolist() == ["positive", "negative", "neutral", "negative"]
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match="pip install vaderSentiment"):
        vader_sentiment(texts)


# ----------------------------------------------------------------------------------------------- a reader's file
def test_a_file_of_headlines_is_read_in_the_order_of_dates(tmp_path):
    rows = {"date": ["2024-03-02", "2024-03-01T09:30+01:00"], "text": ["b", "a"], "sentiment": ["neutral", "positive"]}
    pd.DataFrame(rows).to_csv(tmp_path / "h.csv", index=False)
    table = load_headlines(tmp_path / "h.csv")
    assert list(table["text"]) == ["a", "b"] and list(table["sentiment"]) == ["positive", "neutral"]
    assert list(table["date"]) == list(pd.to_datetime(["2024-03-01", "2024-03-02"]))
    assert "sentiment" not in load_headlines(pd.DataFrame(rows).drop(columns="sentiment"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": ["a", ""]}, r"'text'.*empty.*row 2"),
        ({"date": ["2024-01-01", "soon"]}, r"'date'.*not a date.*row 2 \(date 'soon'\)"),
        ({"date": [20240101, 20240102]}, r"'date': 2 rows of int64"),
        ({"sentiment": ["neutral", "bad"]}, r"'sentiment'.*unknown label.*row 2.*'bad'.*negative or neutral"),
        ({"topic": ["x", None]}, r"'topic'.*missing.*row 2"),
        ({"text": ["a", "\ufffd"]}, r"'text'.*wrong encoding.*row 2"),
    ],
)
def test_bad_headlines_are_refused_by_column_and_row(change, message):
    with pytest.raises(TableError, match=message):
        load_headlines(pd.DataFrame({"date": ["2024-01-01", "2024-01-02"], "text": ["a", "b"]} | change))
    with pytest.raises(TableError, match="missing column 'text'"):
        load_headlines(pd.DataFrame({"date": ["2024-01-01"]}))


# ----------------------------------------------------------------------------------------------- streams
def test_a_stream_has_the_shares_it_says_before_and_after_the_change():
    stream = NewsStream(daily=5, quiet=0.2, alarming=0.6)
    rows = stream.draw(TABLE, "credit", change=4, days=8, streams=400, seed=1)
    assert rows.shape == (400, 8, 5 * len(TOPICS))
    topic, sentiment = (TABLE[name].to_numpy()[rows] for name in ("topic", "sentiment"))
    assert ((topic == "credit").sum(-1) == 5).all()
    share = lambda days, name: (sentiment[:, days] == "negative")[topic[:, days] == name].mean()
    for days, name, expected in (
        (slice(0, 4), "credit", 0.2),
        (slice(4, 8), "credit", 0.6),
        (slice(4, 8), "labour", 0.2),
    ):
        assert share(days, name) == pytest.approx(expected, abs=4 * (0.25 / 8000) ** 0.5)
    assert (sentiment == "neutral").mean() == pytest.approx((sentiment == "positive").mean(), abs=0.02)
    quiet = stream.draw(TABLE, "credit", 8, 8, 400, 1)
    assert np.array_equal(quiet[:, :4], rows[:, :4]) and not np.array_equal(quiet[:, 4:], rows[:, 4:])


def test_the_law_of_a_day_is_what_a_drawn_day_does():
    generator = np.random.default_rng(0)
    counted, negative = generator.random(len(TABLE)) < 0.6, generator.random(len(TABLE)) < 0.4
    stream = NewsStream()
    rows = stream.draw(TABLE, "mergers", 0, 1, 20_000, 2)[:, 0]
    sources = stream.day(TABLE, negative, counted, "mergers")
    assert sum(s.headlines * s.counted for s in sources) == pytest.approx(counted[rows].sum(-1).mean(), abs=0.1)
    both = (counted & negative)[rows].sum(-1)
    assert sum(s.headlines * s.negative for s in sources) == pytest.approx(both.mean(), abs=0.1)
    variance = sum(s.headlines * s.negative * (1 - s.negative) for s in sources)
    assert both.var() == pytest.approx(variance, rel=0.05)
    for wrong in ({"daily": 0}, {"quiet": 0.0}, {"alarming": 0.1}):
        with pytest.raises(ValueError, match=f"NewsStream.{next(iter(wrong))}"):
            NewsStream(**wrong)
    with pytest.raises(ValueError, match="headlines of every sentiment"):
        stream.day(TABLE[TABLE["sentiment"] != "positive"].reset_index(drop=True), [True], [True])


# ----------------------------------------------------------------------------------------------- the alarm
QUIET, AFTER = [Source(8, 0.2, 1.0)], [Source(8, 0.4, 1.0)]


def counts(share, days, streams, seed):
    return np.random.default_rng(seed).binomial(8, share, (streams, days))


def test_simulated_run_lengths_are_the_exact_ones():
    test = calibrated(0.2, 0.4, QUIET, days=40)
    days = test.alarm(counts(0.2, 1000, 2000, 0), 8) + 1
    assert days.max() < 1000  # none was cut off
    assert days.mean() == pytest.approx(test.run_length(QUIET), abs=4 * days.std() / 2000**0.5)
    days = test.alarm(counts(0.4, 200, 4000, 1), 8) + 1
    assert days.mean() == pytest.approx(test.delay(QUIET, AFTER), abs=4 * days.std() / 4000**0.5)
    # a change after 12 quiet days, among the streams without an alarm so far
    both = np.concatenate((counts(0.2, 12, 8000, 2), counts(0.4, 200, 8000, 3)), 1)
    days = test.alarm(both, 8)
    late = days[days >= 12] - 12 + 1
    assert late.mean() == pytest.approx(test.delay(QUIET, AFTER, 12), abs=4 * late.std() / len(late) ** 0.5)
    assert test.delay(QUIET, AFTER, 12) < test.delay(QUIET, AFTER)  # S has a head start
    found = test.found_within(5, QUIET, AFTER, 12)
    assert (late <= 5).mean() == pytest.approx(found, abs=4 * (found * (1 - found) / len(late)) ** 0.5)


def test_calibration_gives_the_lowest_threshold_that_keeps_the_promise():
    for days in (5, 40, 300):
        test = calibrated(0.2, 0.4, QUIET, days)
        assert test.run_length(QUIET) >= days
        if test.levels > 1:
            assert replace(test, threshold=test.threshold - 1 / test.grid).run_length(QUIET) < days
    with pytest.raises(ValueError, match="is `day` quiet"):
        calibrated(0.2, 0.4, [Source(8, 0.9, 1.0)], 1e6)


def test_headlines_that_are_not_counted_change_nothing():
    test = Cusum(0.2, 0.4, 3.0)
    with_others = [*QUIET, Source(30, 0.0, 0.0)]
    np.testing.assert_allclose(test.transition(with_others), test.transition(QUIET), atol=1e-12)
    assert test.run_length([Source(16, 0.1, 0.5)]) != pytest.approx(test.run_length(QUIET), rel=0.01)


def test_the_path_by_hand():
    test = Cusum(0.2, 0.4, 2.0, 10)  # the reference is 0.293, rounded to 0.3
    path = test.path([3, 0, 2, 4], [4, 4, 2, 4])
    np.testing.assert_allclose(path, [1.8, 0.6, 2.0, 4.8])
    assert test.alarm([3, 0, 2, 4], [4, 4, 2, 4]) == 2 and test.alarm([0, 0], [4, 4]) == 2
    with pytest.raises(ValueError, match="negatives"):
        test.path([5], [4])


def test_settings_of_the_alarm_are_checked():
    for wrong in (
        {"quiet": 0.0},
        {"alarming": 0.2},
        {"threshold": 0.03},
        {"threshold": 1e9},
        {"grid": 0},
        {"alarming": 0.2001, "grid": 1},
    ):
        with pytest.raises(ValueError, match="Cusum"):
            Cusum(**({"quiet": 0.2, "alarming": 0.4} | wrong))
    with pytest.raises(ValueError, match="Source.negative"):
        Cusum(0.2, 0.4).run_length([Source(3, 0.5, 0.4)])


def test_a_better_classifier_raises_the_alarm_sooner_and_a_random_one_never_better_than_chance():
    delays = []
    for hit, false in ((1.0, 0.0), (0.8, 0.1), (0.6, 0.2), (0.3, 0.3)):
        before, after = ([Source(8, seen_share(share, hit, false), 1.0)] for share in (0.2, 0.5))
        test = calibrated(before[0].negative, before[0].negative + 0.15, before, 200.0)
        delays.append(test.delay(before, after))
    assert delays == sorted(delays)
    assert delays[-1] == pytest.approx(test.run_length(before), rel=1e-9)  # no more than a false alarm
    assert kl_bernoulli(0.3, 0.3) == 0 and kl_bernoulli(0.5, 0.2) > kl_bernoulli(0.4, 0.2) > 0


def test_error_rates_by_hand_and_without_rows():
    called, truth = ["negative", "neutral", "negative", "positive"], ["negative", "negative", "neutral", "positive"]
    assert error_rates(called, truth) == (0.5, 0.5)
    assert error_rates(called, truth, [3, 1, 0, 1]) == (0.75, 0.0)
    with pytest.raises(ValueError, match="0 negative"):
        error_rates(called[:1], ["neutral"])
