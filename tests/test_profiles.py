"""Performance profiles, probability of improvement, parts of a trial: against `rliable`, closed forms, simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ecomlib.evaluation import interquartile_mean
from ecomlib.evaluation.profiles import RESAMPLE, performance_profile, probability_of_improvement
from ecomlib.evaluation.rounds import trial_scores

# Made up: four seeds of one method and three of another on six tasks, with two ties on the last.
X = np.array(
    [
        [0.62, 0.31, 0.95, 0.10, 0.77, 0.48],
        [0.71, 0.28, 0.88, -0.05, 0.81, 0.48],
        [0.55, 0.35, 1.02, 0.22, 0.69, 0.50],
        [0.93, 0.30, 0.91, 0.14, 0.75, 0.41],
    ]
)
Y = np.array(
    [[0.60, 0.33, 0.80, 0.15, 0.70, 0.48], [0.66, 0.29, 0.85, 0.02, 0.72, 0.44], [0.58, 0.31, 0.90, 0.10, 0.71, 0.47]]
)
THRESHOLDS = [0.0, 0.25, 0.5, 0.75, 1.0]

# Computed once by rliable 1.2.0 (NumPy 2.4.6, SciPy 1.17.1; arch 8.0.0 with `random_state` passed on as `seed`), after
# np.random.seed(0):
#   metrics.probability_of_improvement(X, Y); metrics.aggregate_iqm(X)
#   library.create_performance_profile({"x": X}, THRESHOLDS, reps=50000)
#   library.get_interval_estimates({"xy": [X, Y]}, lambda a, b: np.array([metrics.probability_of_improvement(a, b)]),
#                                  reps=20000)
RLIABLE_IMPROVEMENT, RLIABLE_IMPROVEMENT_ENDS = 0.6666666666666666, (0.5, 0.82638889)
RLIABLE_IQM = 0.5516666666666667
RLIABLE_PROFILE = [0.9583333333333334, 0.8333333333333334, 0.5, 0.2916666666666667, 0.041666666666666664]
RLIABLE_PROFILE_ENDS = [
    [0.875, 0.8333333333333334, 0.5, 0.20833333333333334, 0.0],
    [1.0, 0.8333333333333334, 0.5, 0.4166666666666667, 0.125],
]


def test_estimates_equal_those_of_rliable():
    assert probability_of_improvement(X, Y).estimate == pytest.approx(RLIABLE_IMPROVEMENT, rel=1e-12)
    assert performance_profile(X, THRESHOLDS).share == pytest.approx(RLIABLE_PROFILE, rel=1e-12)
    assert interquartile_mean(X.ravel()) == pytest.approx(RLIABLE_IQM, rel=1e-12)


def test_stratified_intervals_equal_those_of_rliable():
    """The statistics take few values, so that two bootstraps with other random numbers have the same quantiles."""
    improvement = probability_of_improvement(X, Y, resamples=19_999, resample="stratified")
    assert (improvement.low, improvement.high) == pytest.approx(RLIABLE_IMPROVEMENT_ENDS, abs=1e-8)
    profile = performance_profile(X, THRESHOLDS, resamples=19_999, resample="stratified")
    assert np.stack((profile.low, profile.high)) == pytest.approx(np.array(RLIABLE_PROFILE_ENDS), abs=1e-12)


def test_improvement_is_the_mann_whitney_statistic():
    by_task = [stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in zip(X.T, Y.T)]
    assert probability_of_improvement(X, Y).estimate == pytest.approx(np.mean(by_task), rel=1e-12)
    assert probability_of_improvement(Y, X).estimate == pytest.approx(1 - np.mean(by_task), rel=1e-12)
    assert probability_of_improvement(X, X)[:3] == pytest.approx((0.5,) * 3, abs=0.25)
    assert probability_of_improvement(X, X, paired=True)[:3] == (0.5, 0.5, 0.5)  # nothing but ties


def test_closed_form_for_normal_scores():
    """a - b is normal, so P(a > b) = Phi(d / sqrt(2)); a profile is a normal survival function."""
    rng, d = np.random.default_rng(0), 0.4
    a, b = rng.standard_normal((20, 400)) + d, rng.standard_normal((20, 400))
    found = probability_of_improvement(a, b)
    assert found.estimate == pytest.approx(stats.norm.cdf(d / np.sqrt(2)), abs=0.015)  # 4 standard errors
    assert found.low < stats.norm.cdf(d / np.sqrt(2)) < found.high
    profile = performance_profile(a, [-1.0, 0.0, 1.0])
    assert profile.share == pytest.approx(stats.norm.sf([-1.4, -0.4, 0.6]), abs=0.022)


def test_profile_is_the_survival_function_and_its_area_the_mean():
    """Scores in [0, 1]: the mean is the area under the profile."""
    scores = np.random.default_rng(1).random((3, 50))
    at = np.linspace(0, 1, 20_001)
    profile = performance_profile(scores, at[::2000], resamples=39)
    assert profile.share == pytest.approx([(scores > t).mean() for t in at[::2000]])
    assert (profile.low <= profile.share).all() and (profile.share <= profile.high).all()
    shares = (scores.ravel() > at[:, None]).mean(1)
    assert np.trapezoid(shares, at) == pytest.approx(scores.mean(), abs=1e-4)


@pytest.mark.parametrize("resample, draws", [("seeds", 2), ("tasks", 3), ("both", 5)])
def test_resampling_equals_the_enumerated_bootstrap(resample, draws):
    """Two seeds and three tasks: all resamples are listed, and the ends are their exact quantiles."""
    scores = np.array([[0.1, 0.6, 0.7], [0.4, 0.2, 0.9]])
    rows = itertools.product(range(2), repeat=2) if resample != "tasks" else [(0, 1)]
    columns = list(itertools.product(range(3), repeat=3)) if resample != "seeds" else [(0, 1, 2)]
    exact = np.sort([(scores[np.ix_(r, c)] > 0.5).mean() for r in rows for c in columns])
    low, high = exact[int(np.ceil(0.1 * len(exact))) - 1], exact[int(np.ceil(0.9 * len(exact))) - 1]
    found = performance_profile(scores, [0.5], level=0.8, resamples=39_999, resample=resample)
    assert (found.low[0], found.high[0]) == pytest.approx((low, high), abs=1e-12)


def test_only_crossed_resampling_covers_where_one_policy_plays_all_tasks():
    """Seeds and tasks both drawn anew: the measured share of bands that hold the true share of scores above 0.5."""
    rng, repetitions, seeds, tasks = np.random.default_rng(0), 150, 10, 50
    truth = stats.norm.sf(0.5 / np.sqrt(1 + 0.3**2 + 0.5**2))
    covered = dict.fromkeys(RESAMPLE, 0)
    for k in range(repetitions):
        task, seed = rng.standard_normal((1, tasks)), 0.3 * rng.standard_normal((seeds, 1))
        scores = task + seed + 0.5 * rng.standard_normal((seeds, tasks))
        for resample in RESAMPLE:
            band = performance_profile(scores, [0.5], resamples=199, resample=resample, seed=k)
            covered[resample] += int(band.low[0] <= truth <= band.high[0])
    low = {r: stats.binomtest(c, repetitions).proportion_ci(0.99).low for r, c in covered.items()}
    high = {r: stats.binomtest(c, repetitions).proportion_ci(0.99).high for r, c in covered.items()}
    assert low["both"] < 0.95 < high["both"]
    assert high["stratified"] < 0.6 and high["seeds"] < 0.85


def test_pairing_looks_at_the_same_seed_and_narrows_the_interval():
    rng = np.random.default_rng(2)
    luck = rng.standard_normal((5, 40))
    a, b = luck + 0.1, luck  # always better by a little
    assert probability_of_improvement(a, b, paired=True)[:3] == (1.0, 1.0, 1.0)
    apart = probability_of_improvement(a, b)
    assert apart.high < 0.75 and apart.n == 40
    # Better on most tasks, worse in the mean.
    a = np.where(np.arange(40) < 36, luck + 0.1, luck - 2.0)
    assert probability_of_improvement(a, b, paired=True).low > 0.5 and (a - b).mean() < 0


def test_one_seed_may_be_given_without_an_axis():
    found = performance_profile(X[0], THRESHOLDS)
    assert found.share == pytest.approx((X[0] > np.array(THRESHOLDS)[:, None]).mean(1))
    assert probability_of_improvement(X[0], Y[0]) == probability_of_improvement(X[:1], Y[:1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: performance_profile(np.zeros((2, 3, 4)), [0.0]), r"scores = \(2, 3, 4\); allowed: a shape"),
        (lambda: performance_profile([], [0.0]), "scores = "),
        (lambda: performance_profile([0.1, np.nan], [0.0]), "scores must be finite, but element 1 is nan"),
        (lambda: performance_profile(X, [np.inf]), "thresholds must be finite"),
        (lambda: performance_profile(X, 0.5), "thresholds = "),
        (lambda: performance_profile(X, [0.5], resample="rows"), "resample = 'rows'; allowed: one of seeds, tasks"),
        (lambda: performance_profile(X, [0.5], resamples=38), "resamples must be at least 39"),
        (lambda: performance_profile(X, [0.5], level=95), "level must lie between 0 and 1"),
        (lambda: probability_of_improvement(X, Y[:, :5]), r"b = \(3, 5\); allowed: the 6 tasks of a"),
        (lambda: probability_of_improvement(X, Y, paired=True), r"b = \(3, 6\); allowed: the shape of a"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------- parts of a trial
def test_parts_of_a_trial_by_hand():
    """Two tasks with gaps 10 and 30; a first round below blind, then rising. Ratios of sums over rounds and tasks."""
    blind, oracle = np.array([0.0, 0.0]), np.array([10.0, 30.0])
    returns = np.array([[-5.0, -5.0], [4.0, 16.0], [6.0, 22.0], [8.0, 28.0]])
    parts = trial_scores(returns, blind, oracle, support=1, last=2)
    assert parts.lifetime == pytest.approx(74 / 160)
    assert parts.post_adaptation == pytest.approx(84 / 120)
    assert parts.zero_shot == pytest.approx(-10 / 40)
    assert parts.few_shot == pytest.approx(20 / 40)
    assert parts.asymptotic == pytest.approx((28 + 36) / 80)
    later = trial_scores(returns, blind, oracle, support=2)
    assert later.few_shot == pytest.approx(28 / 40) and later.post_adaptation == pytest.approx(64 / 80)
    assert later.asymptotic == pytest.approx(36 / 40) and later.lifetime == parts.lifetime


def test_parts_keep_seeds_and_follow_drift():
    rng = np.random.default_rng(3)
    returns, blind = rng.random((4, 3, 6)), rng.random((4, 6))
    oracle = blind + 1 + rng.random((4, 6))
    parts = trial_scores(returns, blind, oracle)
    assert parts.lifetime.shape == (3,)
    gained = (returns - blind[:, None]).sum((0, 2)) / (oracle - blind).sum()
    assert parts.lifetime == pytest.approx(gained, rel=1e-12)
    assert parts.zero_shot == pytest.approx((returns[0] - blind[0]).sum(-1) / (oracle[0] - blind[0]).sum(), rel=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"support": 0}, "support = 0; allowed: a whole number from 1 to E - 1 = 3"),
        ({"support": 4}, "support = 4"),
        ({"support": 2, "last": 3}, "last = 3; allowed: a whole number from 1 to E - support = 2"),
        ({"blind": np.zeros(5)}, r"blind = \(5,\); allowed: \(6,\) or \(4, 6\)"),
        ({"returns": np.zeros(6)}, "returns = "),
        ({"oracle": np.zeros(6)}, "oracle - blind must have a positive mean"),
    ],
)
def test_parts_refuse(arguments, message):
    given = {"returns": np.zeros((4, 6)), "blind": np.zeros(6), "oracle": np.ones(6)} | arguments
    with pytest.raises(ValueError, match=message):
        trial_scores(**given)
