"""Equations of chapter "Language applications": both sides, evaluated."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from ecomlib.language.cusum import Cusum, Source, kl_bernoulli, reference
from ecomlib.language.monitor import error_rates, seen_share
from ecomlib.language.service import HandOver, cost_per_question, nearest_mean
from ecomlib.language.text_episodes import ProjectedHead, class_means, prototype_scores
from ecomlib.learners.adaptation import Inner
from ecomlib.learners.supervised import Examples, SupervisedMAML, cross_entropy_loss
from ecomlib.networks import MLP


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_tfidf():
    """Equation (eq-tfidf): counted by hand, against scikit-learn's numbers as the library calls it."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["where is my parcel", "my parcel is late late late", "how do i pay", "pay by card"]
    model = TfidfVectorizer(sublinear_tf=True, norm=None)
    found = model.fit_transform(texts).toarray()
    words = [Counter(word for word in text.split() if len(word) > 1) for text in texts]
    for row, count in enumerate(words):
        for word, column in model.vocabulary_.items():
            df = sum(word in other for other in words)
            weight = (1 + math.log(count[word])) * (1 + math.log((1 + len(texts)) / (1 + df))) if count[word] else 0.0
            assert found[row, column] == pytest.approx(weight, abs=1e-12)


def test_prototype():
    """Equation (eq-prototype): the scores order classes as distances to the class means do."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, 5, generator=generator), torch.tensor([0, 1, 2, 2, 1, 0]).expand(2, 6)
    query = torch.randn(2, 4, 5, generator=generator)
    for task in range(2):
        for q in range(4):
            for c in range(3):
                mean = x[task][y[task] == c].mean(0)
                score = prototype_scores(x, y, query, 3)[task, q, c].item()
                assert score == pytest.approx(-((query[task, q] - mean) ** 2).sum().item(), rel=1e-10)
    named = nearest_mean(query[0], x[0], ["a", "b", "c", "c", "b", "a"], "abc")
    np.testing.assert_allclose(named, prototype_scores(x, y, query, 3)[0], rtol=1e-9)


@pytest.mark.parametrize("shots", [1, 3])
def test_one_step_prototype(shots):
    """Equation (eq-one-step-prototype): one step of cross-entropy on a zero head, by the learner that the chapter
    trains, against means of the examples. On vectors of equal length of the means it decides as the nearest mean."""
    ways, size, lr = 4, 6, 0.7
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(ways).repeat_interleave(shots).expand(3, ways * shots)
    x, query = torch.randn(3, ways * shots, size, generator=generator), torch.randn(3, 5, size, generator=generator)
    for network in (MLP((size, ways)), ProjectedHead(size, ways)):
        inner = Inner(lr=lr, adapted=network.head)
        learner = SupervisedMAML(network, inner, None, cross_entropy_loss, shots * ways, ways)
        start = [torch.zeros_like(p) for p in network.initial(generator)]
        if isinstance(network, ProjectedHead):
            start = network.initial(generator)
        phi = learner.train_task(start, Examples(x, y))[-1]
        means = class_means(x, y, ways)
        expected = lr / ways * (means - means.mean(1, keepdim=True))
        torch.testing.assert_close(phi[-2].mT, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(phi[-1], torch.zeros(3, 1, ways), rtol=0, atol=1e-12)
        scores = network.outputs(phi, query)
        means = torch.nn.functional.normalize(means, dim=-1)
        nearest = torch.cdist(query, means).argmin(-1)
        assert torch.equal((query @ means.mT).argmax(-1), nearest)
        assert scores.shape == (3, 5, ways)


def test_chow():
    """Equation (eq-chow): of all rules on a discrete law of chances, listed, none costs less than the threshold."""
    chances, weights, cost = np.array([0.1, 0.5, 0.75, 0.79, 0.81, 0.97]), np.array([1, 2, 1, 3, 2, 1]) / 10, 5.0
    expected = lambda rule: (weights * np.where(rule, cost * (1 - chances), 1.0)).sum()
    best = min(expected(np.array(rule)) for rule in itertools.product((False, True), repeat=len(chances)))
    assert expected(chances >= 1 - 1 / cost) == pytest.approx(best, abs=1e-15)
    assert expected(chances >= 0.5) > best + 0.1
    # the same costs by the function that the chapter calls, and the same threshold in its rule
    right = np.repeat([True, False, True, False], 5)
    assert cost_per_question(right, right, cost) == pytest.approx(0.5)
    assert cost_per_question(np.ones(20, bool), right, cost) == pytest.approx(2.5)
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(400, 3))
    rule = HandOver(scores, generator.random(400) < 1 / (1 + np.exp(-scores.max(1))), cost)
    assert np.array_equal(rule.answers(scores), rule.chance(scores) >= 1 - 1 / cost)


def test_seen_share():
    """Equation (eq-seen-share): by counting, and the rise that is left of a rise."""
    generator = np.random.default_rng(0)
    truth = np.where(generator.random(500) < 0.3, "negative", "positive")
    called = np.where(generator.random(500) < 0.4, "negative", "neutral")
    hit, false = error_rates(called, truth)
    share = (truth == "negative").mean()
    assert seen_share(share, hit, false) == pytest.approx((called == "negative").mean(), abs=1e-12)
    rise = seen_share(0.5, hit, false) - seen_share(0.2, hit, false)
    assert rise == pytest.approx((hit - false) * 0.3, abs=1e-12)


def test_cusum():
    """Equation (eq-cusum): the recursion is the log-likelihood ratio, maximised over the day of the change by trying
    every day."""
    p0, p1, generator = 0.2, 0.45, np.random.default_rng(2)
    headlines = generator.integers(0, 7, 30)
    negatives = generator.binomial(headlines, 0.3)
    ratio = lambda x, n: x * math.log(p1 / p0) + (n - x) * math.log((1 - p1) / (1 - p0))
    recursion = 0.0
    unit = math.log(p1 / p0) + math.log((1 - p0) / (1 - p1))
    path = Cusum(p0, p1, 5.0, 1000).path(negatives, headlines)
    for day in range(30):
        recursion = max(0.0, recursion + ratio(negatives[day], headlines[day]))
        sums = [sum(map(ratio, negatives[s : day + 1], headlines[s : day + 1])) for s in range(day + 2)]
        assert recursion == pytest.approx(max(sums), abs=1e-12)  # s = day + 1: no change so far
        # in units of a negative headline; the reference is rounded by at most half a thousandth a headline
        assert path[day] == pytest.approx(recursion / unit, abs=0.0005 * headlines.sum())


def test_cusum_reference():
    """Equation (eq-cusum-reference): a headline's log-likelihood ratio is the unit times (x - reference)."""
    for p0, p1 in ((0.1, 0.3), (0.2, 0.45), (0.5, 0.9)):
        unit = math.log(p1 * (1 - p0) / (p0 * (1 - p1)))
        for x, ratio in ((1, math.log(p1 / p0)), (0, math.log((1 - p1) / (1 - p0)))):
            assert unit * (x - reference(p0, p1)) == pytest.approx(ratio, rel=1e-12)
        assert p0 < reference(p0, p1) < p1


def test_run_length():
    """Equation (eq-run-length): the chance of no alarm in the first days by listing every course of headlines, against
    powers of the matrix; their sum over days against the linear system."""
    test, day = Cusum(0.2, 0.6, 1.5, 4), (Source(1, 0.3, 0.9), Source(1, 0.1, 0.5))
    outcomes = []  # of a day: (chance, negatives, headlines)
    kinds = [((1 - s.counted, 0, 0), (s.counted - s.negative, 0, 1), (s.negative, 1, 1)) for s in day]
    for one, two in itertools.product(*kinds):
        outcomes.append((one[0] * two[0], one[1] + two[1], one[2] + two[2]))
    matrix, state = test.transition(day), np.eye(test.levels)[0]
    for days in range(1, 5):
        state = state @ matrix
        survived = 0.0
        for course in itertools.product(outcomes, repeat=days):
            chance, negatives, headlines = zip(*course)
            survived += math.prod(chance) * bool((test.path(negatives, headlines) < test.threshold - 1e-9).all())
        assert state.sum() == pytest.approx(survived, abs=1e-12)
    total, state = 0.0, np.eye(test.levels)[0]
    for _ in range(5000):
        total += state.sum()
        state = state @ matrix
    assert test.run_length(day) == pytest.approx(total, rel=1e-9)
    assert test.delay(day, day) == pytest.approx(total, rel=1e-9)


def test_cusum_bound():
    """Equation (eq-cusum-bound): the exact mean time between false alarms is at least e to the threshold in units of
    the log-likelihood ratio, for the reference that the test uses."""
    for quiet, alarming, threshold in ((0.2, 0.4, 3.0), (0.15, 0.5, 5.0), (0.3, 0.4, 8.0)):
        test = Cusum(quiet, alarming, threshold, 40)
        kappa = test._step / test.grid
        # the rounded reference is exact for another share after the change: find it
        low, high = quiet + 1e-9, 1 - 1e-9
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if reference(quiet, middle) < kappa else (low, middle)
        unit = math.log(low * (1 - quiet) / (quiet * (1 - low)))
        assert test.run_length([Source(1, quiet, 1.0)]) >= math.exp(unit * threshold)


def test_cusum_delay():
    """Equation (eq-cusum-delay): what a longer time between false alarms costs in delay, exact against 1 / KL."""
    for quiet, alarming in ((0.2, 0.4), (0.15, 0.5)):
        slow, fast = (Cusum(quiet, alarming, threshold, 100) for threshold in (14.0, 8.0))
        before, after = [Source(1, quiet, 1.0)], [Source(1, alarming, 1.0)]
        cost = (slow.delay(before, after) - fast.delay(before, after)) / math.log(
            slow.run_length(before) / fast.run_length(before)
        )
        assert cost == pytest.approx(1 / kl_bernoulli(alarming, quiet), rel=0.01)
