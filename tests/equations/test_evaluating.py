"""Chapter "Evaluating adaptive policies": both sides of every numbered equation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ecomlib.evaluation import (
    direct_method,
    doubly_robust,
    effective_size,
    inverse_propensity,
    logged,
    performance_profile,
    probability_of_improvement,
    replay,
    self_normalised,
    trial_scores,
    trial_weights,
    weight_variance,
)

# A shop with two kinds of shoppers and three items.
KINDS = np.array([0.6, 0.4])
RATES = np.array([[0.2, 0.5, 0.1], [0.4, 0.1, 0.3]])
LOGGING = np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
TARGET = np.array([[0.1, 0.8, 0.1], [0.7, 0.1, 0.2]])
VALUE = float((KINDS[:, None] * TARGET * RATES).sum())


def all_logs(rows, logging=LOGGING):
    """Every log of so many decisions, with its probability: (probability, context, action, reward)."""
    cells = list(itertools.product(range(2), range(3), (0.0, 1.0)))
    chance = {(x, a, r): KINDS[x] * logging[x, a] * (RATES[x, a] if r else 1 - RATES[x, a]) for x, a, r in cells}
    for chosen in itertools.product(cells, repeat=rows):
        x, a, r = (np.array(column) for column in zip(*chosen))
        yield np.prod([chance[c] for c in chosen]), x, a, r


def test_parts_of_a_trial():
    """(eq-trial-parts): the sums over rounds, and the lifetime as the weighted mean of support and post-adaptation."""
    rng = np.random.default_rng(0)
    returns, blind = rng.random((5, 30)), rng.random((5, 30))
    oracle = blind + rng.random((5, 30))
    parts = trial_scores(returns, blind, oracle, support=2)
    gained, room = (returns - blind).mean(1), (oracle - blind).mean(1)
    assert parts.lifetime == pytest.approx(gained.sum() / room.sum(), rel=1e-12)
    assert parts.post_adaptation == pytest.approx(gained[2:].sum() / room[2:].sum(), rel=1e-12)
    weight = room[:2].sum() / room.sum()
    support = gained[:2].sum() / room[:2].sum()
    assert parts.lifetime == pytest.approx(weight * support + (1 - weight) * parts.post_adaptation, rel=1e-12)


def test_variance_parts():
    """(eq-variance-parts): the variance of the mean of crossed effects, by simulation of 20,000 experiments."""
    rng, repetitions, (s, m, n) = np.random.default_rng(1), 20_000, (3, 7, 2)
    deviation = 0.5, 1.5, 0.8, 2.0
    seed, task, pair, luck = (
        d * rng.standard_normal((repetitions, *shape))
        for d, shape in zip(deviation, ((s, 1, 1), (1, m, 1), (s, m, 1), (s, m, n)))
    )
    means = (seed + task + pair + luck).mean((1, 2, 3))
    a, b, c, e = (d**2 for d in deviation)
    expected = a / s + b / m + c / (s * m) + e / (s * m * n)
    assert means.var() == pytest.approx(expected, rel=5 * np.sqrt(2 / repetitions))
    assert abs(means.var() / (expected - a / s) - 1) > 0.1  # leaving out the seeds would be seen


def test_profile():
    """(eq-profile): the count, and that the area under it from 0 to 1 is the mean of scores in [0, 1]."""
    scores, levels = np.random.default_rng(2).random((3, 8)), np.linspace(0, 1, 101)
    by_hand = [np.mean([x > y for row in scores for x in row]) for y in levels]
    profile = performance_profile(scores, levels, resamples=39)
    assert profile.share == pytest.approx(by_hand, abs=1e-12)
    fine = performance_profile(scores, (np.arange(20_000) + 0.5) / 20_000, resamples=39, resample="seeds")
    assert fine.share.mean() == pytest.approx(scores.mean(), abs=1e-4)


def test_improvement():
    """(eq-improvement): the double sum, and the Mann-Whitney statistic averaged over tasks, with ties."""
    rng = np.random.default_rng(3)
    x, y = rng.integers(6, size=(4, 9)) / 5.0, rng.integers(6, size=(3, 9)) / 5.0
    total = sum((x[s, i] > y[z, i]) + 0.5 * (x[s, i] == y[z, i]) for i in range(9) for s in range(4) for z in range(3))
    ours = probability_of_improvement(x, y, resamples=39).estimate
    assert ours == pytest.approx(total / (9 * 4 * 3), rel=1e-12)
    ranks = [stats.mannwhitneyu(x[:, i], y[:, i]).statistic / 12 for i in range(9)]
    assert ours == pytest.approx(np.mean(ranks), rel=1e-12)


def test_inverse_propensity():
    """(eq-ips): by hand on a log; its mean over every log of two decisions is the value of the target policy."""
    mean = 0.0
    for chance, x, a, r in all_logs(2):
        ours = inverse_propensity(logged(a, r, LOGGING[x, a], TARGET[x])).estimate
        assert ours == pytest.approx(np.mean([TARGET[i, j] / LOGGING[i, j] * k for i, j, k in zip(x, a, r)]))
        mean += chance * ours
    assert mean == pytest.approx(VALUE, rel=1e-12)


def test_effective_size():
    """(eq-effective-size): for rewards independent of the weights, a weighted mean has the variance of a plain one of
    that many rows."""
    rng, repetitions = np.random.default_rng(4), 20_000
    weight = rng.exponential(size=50)
    reward = rng.standard_normal((repetitions, 50))
    weighted = (weight * reward).sum(1) / weight.sum()
    assert effective_size(weight) == pytest.approx(weight.sum() ** 2 / (weight**2).sum(), rel=1e-12)
    assert weighted.var() == pytest.approx(1 / effective_size(weight), rel=5 * np.sqrt(2 / repetitions))


def test_self_normalised():
    """(eq-snips): the ratio; its error is w (r - V) / n to first order, so the variance of many estimates is that of
    the linearised one, and its bias vanishes as 1/n."""
    rng, n, repetitions = np.random.default_rng(5), 1500, 2000
    errors = []
    for _ in range(repetitions):
        x = rng.choice(2, n, p=KINDS)
        a = (rng.random(n)[:, None] > LOGGING[x].cumsum(1)).sum(1)
        r = (rng.random(n) < RATES[x, a]).astype(float)
        w = TARGET[x, a] / LOGGING[x, a]
        found = self_normalised(logged(a, r, LOGGING[x, a], TARGET[x])).estimate
        assert found == pytest.approx((w * r).sum() / w.sum(), rel=1e-12)
        errors.append(found - VALUE)
    chance = KINDS[:, None] * LOGGING
    weight = TARGET / LOGGING
    second = chance * weight**2 * (RATES * (1 - VALUE) ** 2 + (1 - RATES) * VALUE**2)
    assert np.var(errors) == pytest.approx(second.sum() / n, rel=0.15)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(repetitions)


def test_direct_method():
    """(eq-direct): by hand on every log of two decisions; the mean is the value that the model believes in."""
    model, mean = RATES + np.array([[0.1, -0.2, 0.3], [0.0, 0.2, 0.1]]), 0.0
    for chance, x, a, r in all_logs(2):
        ours = direct_method(logged(a, r, LOGGING[x, a], TARGET[x]), model[x]).estimate
        assert ours == pytest.approx(np.mean([TARGET[i] @ model[i] for i in x]), rel=1e-12)
        mean += chance * ours
    believed = float((KINDS[:, None] * TARGET * model).sum())
    assert mean == pytest.approx(believed, rel=1e-12) and abs(believed - VALUE) > 0.05


def test_doubly_robust():
    """(eq-doubly-robust): right over every log of two decisions if the propensities or the model are, and wrong by the
    product of the two errors if neither is."""
    wrong_model = RATES + np.array([[0.1, -0.2, 0.3], [0.0, 0.2, 0.1]])
    wrong_chance = np.full((2, 3), 1 / 3)
    mean = {}
    for who, (propensity, model) in {
        "propensities": (LOGGING, wrong_model),
        "model": (wrong_chance, RATES),
        "neither": (wrong_chance, wrong_model),
    }.items():
        mean[who] = sum(
            chance * doubly_robust(logged(a, r, propensity[x, a], TARGET[x]), model[x]).estimate
            for chance, x, a, r in all_logs(2)
        )
    assert (mean["propensities"], mean["model"]) == pytest.approx((VALUE, VALUE), rel=1e-12)
    product = (KINDS[:, None] * TARGET * (1 - LOGGING / wrong_chance) * (wrong_model - RATES)).sum()
    assert mean["neither"] - VALUE == pytest.approx(product, rel=1e-9) and abs(product) > 0.02


def test_replay():
    """(eq-replay): the probability of every history of three decisions of a learner that also draws its actions."""

    class Learner:
        def __init__(self):
            self.score, self.history = np.zeros(2), []

        def chances(self):
            return np.exp(self.score) / np.exp(self.score).sum()

        def choose(self, context, generator):
            return int(generator.random() < self.chances()[1])

        def learn(self, context, action, reward):
            self.score[action] += reward - 0.4
            self.history.append((action, reward))

    rates, exact = np.array([0.2, 0.7]), {}
    for path in itertools.product(itertools.product(range(2), (0.0, 1.0)), repeat=3):
        learner, chance = Learner(), 1.0
        for action, reward in path:
            chance *= learner.chances()[action] * (rates[action] if reward else 1 - rates[action])
            learner.learn(None, action, reward)
        exact[path] = chance
    assert sum(exact.values()) == pytest.approx(1, rel=1e-12)
    rng, found = np.random.default_rng(6), dict.fromkeys(exact, 0)
    for k in range(4000):
        action = rng.integers(2, size=50)
        learner = Learner()
        done = replay(learner, action, (rng.random(50) < rates[action]).astype(float), seed=k, most=3)
        assert len(done.row) == 3
        found[tuple(learner.history)] += 1
    test = stats.chisquare(list(found.values()), 4000 * np.array(list(exact.values())))
    assert test.pvalue > 1e-3


def test_trial_weight():
    """(eq-trial-weight): two learners, each with its own memory of the trial; all paths of four steps listed."""
    rates, steps = np.array([0.3, 0.6]), 4

    def chances(history, speed):
        score = np.zeros(2)
        for action, reward in history:
            score[action] += speed * (reward - 0.4)
        return np.exp(score) / np.exp(score).sum()

    logging, target, mean, ours = [], [], 0.0, []
    paths = list(itertools.product(itertools.product(range(2), (0.0, 1.0)), repeat=steps))
    ratio, reward = np.zeros((steps, len(paths))), np.zeros((steps, len(paths)))
    for k, path in enumerate(paths):
        happens = np.prod([rates[a] if r else 1 - rates[a] for a, r in path])
        log = [chances(path[:t], 0.5)[a] for t, (a, _) in enumerate(path)]
        wanted = [chances(path[:t], 3.0)[a] for t, (a, _) in enumerate(path)]
        ratio[:, k], reward[:, k] = np.log(np.array(wanted) / log), [r for _, r in path]
        logging.append(happens * np.prod(log))
        target.append(happens * np.prod(wanted))
    assert (sum(logging), sum(target)) == pytest.approx((1, 1), rel=1e-12)
    mean = np.array(target) @ reward.sum(0)
    for per_step in (True, False):
        found = trial_weights(ratio, reward, per_step)
        ours = (found.weight * reward).sum(0) if per_step else found.weight[-1] * reward.sum(0)
        assert found.returns.estimate == pytest.approx(ours.mean(), rel=1e-12)
        assert np.array(logging) @ ours == pytest.approx(mean, rel=1e-12)


def test_weight_variance():
    """(eq-weight-variance): the variance over all paths of five independent steps, and the effective share of many
    sampled trials."""
    behaviour, target = np.array([0.5, 0.2, 0.3]), np.array([0.3, 0.3, 0.4])
    chi = float(behaviour @ (target / behaviour) ** 2 - 1)
    paths = np.array(list(itertools.product(range(3), repeat=5))).T
    chance, weight = behaviour[paths].prod(0), (target / behaviour)[paths].prod(0)
    assert chance @ weight == pytest.approx(1, rel=1e-12)
    assert chance @ weight**2 - 1 == pytest.approx(weight_variance(chi, 5), rel=1e-12)
    assert weight_variance(chi, 5) == pytest.approx((1 + chi) ** 5 - 1, rel=1e-12)
    action = np.random.default_rng(7).choice(3, p=behaviour, size=(5, 100_000))
    found = trial_weights(np.log(target / behaviour)[action], np.zeros((5, 100_000)))
    assert found.effective / 100_000 == pytest.approx((1 + chi) ** -np.arange(1.0, 6), rel=0.03)
