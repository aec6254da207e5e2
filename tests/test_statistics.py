"""Scores and intervals against SciPy, exact enumeration and published numbers."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from ecomlib.evaluation import statistics as S

# Student (1908), The probable error of a mean, Biometrika 6: hours of sleep gained by ten patients under two
# drugs; the data set `sleep` of R. By hand: the ten gains of drug 2 over drug 1 have mean 1.58 and squared
# deviations that add up to 13.616, so the standard error is sqrt(13.616 / 90) = 0.388959, and with Student's
# 2.262157 (9 degrees of freedom, from a table) the ends are 1.58 -+ 0.879886. R prints 0.7001142 and 2.4598858.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
SEEDS = [0.62, 0.71, 0.55, 0.93, 0.66]  # five scores with one lucky run, made up
METHODS = [S.t_interval, S.studentised_bootstrap_interval, S.percentile_bootstrap_interval]


# ---------------------------------------- score
def test_score_is_a_ratio_of_means():
    # Task 1: the gap is 10 and 5 of it is closed. Task 2: the gap is 0.1 and -0.2 of it is closed.
    # Ratio of means (5 - 0.02) / (10 + 0.1); the mean of ratios would be (0.5 - 0.2) / 2 = 0.15.
    score = S.normalised_score([15.0, 0.98], blind=[10.0, 1.0], oracle=[20.0, 1.1])
    assert isinstance(score, float)
    assert score == pytest.approx(4.98 / 10.1, rel=1e-12)


def test_score_is_zero_for_blind_and_one_for_oracle_and_takes_tensors():
    blind, oracle = torch.tensor([1.0, 4.0, 2.0]), torch.tensor([2.0, 9.0, 2.0], requires_grad=True)
    assert S.normalised_score(blind, blind, oracle) == 0.0
    assert S.normalised_score(oracle, blind, oracle) == 1.0
    # The unit of money and a cost paid by everybody do not matter.
    assert S.normalised_score(7 * (blind + 1) + 3, 7 * blind + 3, 7 * oracle + 3) == pytest.approx(0.5)


def test_score_keeps_leading_axes():
    rng = np.random.default_rng(0)
    blind, oracle, value = rng.random(6), 1 + rng.random(6), rng.random((4, 3, 6))
    score = S.normalised_score(value, blind, oracle)
    assert score.shape == (4, 3)
    assert score[2, 1] == pytest.approx(S.normalised_score(value[2, 1], blind, oracle), rel=1e-12)


@pytest.mark.parametrize(
    "value, blind, oracle, message",
    [
        ([1.0], [1.0], [1.0], "oracle - blind must have a positive mean"),
        ([1.0, 1.0], [1.0, 3.0], [2.0, 1.0], "oracle - blind must have a positive mean"),
        ([1.0, float("nan")], [0.0, 0.0], [1.0, 1.0], "value must be finite, but element 1 is nan"),
        ([1.0, 1.0], [0.0, 0.0], [1.0, float("inf")], "oracle must be finite, but element 1 is inf"),
        ([1.0, 1.0], [0.0], [1.0, 1.0], "same tasks.*'blind': 1"),
        ([], [], [], "value must hold at least one task"),
        (1.0, [0.0], [1.0], "value must hold at least one task"),
    ],
)
def test_score_refuses(value, blind, oracle, message):
    with pytest.raises(ValueError, match=message):
        S.normalised_score(value, blind, oracle)


# ---------------------------------------- interquartile mean
@pytest.mark.parametrize("n", range(1, 14))
def test_interquartile_mean_equals_scipy(n):
    values = np.random.default_rng(n).standard_normal(n)
    assert S.interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25), rel=1e-12)


def test_interquartile_mean_ignores_one_wild_run():
    # Of 0, 1, 2, 3, 1000 the ends are dropped: (1 + 2 + 3) / 3 = 2.
    assert S.interquartile_mean([3.0, 1000.0, 0.0, 2.0, 1.0]) == 2.0


# ---------------------------------------- intervals
def test_t_interval_of_the_sleep_data():
    gain = S.paired_difference(DRUG_2, DRUG_1)
    assert gain.estimate == pytest.approx(1.58, abs=1e-12)
    assert (gain.low, gain.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    assert gain.n == 10


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("values", [SEEDS, DRUG_1, [2.0, 3.0]])
def test_t_interval_equals_scipy(values, level):
    low, high = stats.t.interval(level, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert S.t_interval(values, level) == pytest.approx((np.mean(values), low, high, len(values)), rel=1e-12)


def test_percentile_interval_equals_scipy():
    ours = S.percentile_bootstrap_interval(DRUG_1, resamples=99_999)
    theirs = stats.bootstrap(
        (DRUG_1,), np.mean, n_resamples=99_999, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # Two Monte Carlo quantiles. The means spread by 0.54, their density at the 2.5 % point is 0.058 / 0.54, so
    # either quantile has a standard error of sqrt(0.025 * 0.975 / 99,999) / 0.107 = 0.0046.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_the_fewest_resamples_give_the_extremes():
    """39 values cut the line into 40 parts of 2.5 %: a 95 % interval ends at the smallest and the largest."""
    means = np.random.default_rng(7).choice(SEEDS, size=(39, 5)).mean(1)
    ours = S.percentile_bootstrap_interval(SEEDS, resamples=39, seed=7)
    assert (ours.low, ours.high) == pytest.approx((means.min(), means.max()), rel=1e-12)


def test_studentised_interval_equals_the_enumerated_bootstrap():
    """With five values all 5^5 resamples can be listed, so the exact quantiles of t* are known."""
    sample = np.array(SEEDS)
    mean, error = sample.mean(), sample.std(ddof=1) / np.sqrt(5)
    drawn = sample[np.array(list(itertools.product(range(5), repeat=5)))]
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = np.ptp(drawn, axis=1) == 0
        t = np.where(flat, np.inf * np.sign(drawn[:, 0] - mean), (drawn.mean(1) - mean) * 5**0.5 / drawn.std(1, ddof=1))
    t = np.sort(t)
    lower, upper = t[int(np.ceil(0.05 * len(t))) - 1], t[int(np.ceil(0.95 * len(t))) - 1]
    ours = S.studentised_bootstrap_interval(SEEDS, level=0.9, resamples=99_999)
    assert (ours.low, ours.high) == pytest.approx((mean - upper * error, mean - lower * error), abs=1e-9)
    # The lucky run makes the values right-skewed: the interval reaches further up than down, as no symmetric
    # one does.
    assert ours.high - ours.estimate > ours.estimate - ours.low


@pytest.mark.parametrize("method", METHODS)
def test_intervals_move_with_shift_and_scale(method):
    """Scores or percent, money in euro or yen: the interval is the same interval."""
    base, moved = method(SEEDS), method(-3.0 + 100.0 * np.array(SEEDS))
    assert moved[:3] == pytest.approx([-3.0 + 100.0 * end for end in base[:3]], rel=1e-9)
    assert base.low < base.estimate < base.high
    assert base.estimate == pytest.approx(np.mean(SEEDS), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_intervals_of_identical_values_have_no_width(method):
    assert method([0.3] * 5) == pytest.approx((0.3, 0.3, 0.3, 5), abs=1e-15)


@pytest.mark.parametrize("method", METHODS[1:])
def test_bootstrap_intervals_repeat_with_their_seed(method):
    assert method(DRUG_1, seed=3) == method(DRUG_1, seed=3)
    assert method(DRUG_1, seed=3) != method(DRUG_1, seed=4)


def test_pairing_pays_when_luck_is_shared():
    rng = np.random.default_rng(0)
    luck = rng.standard_normal(8)
    a, b = luck + 0.1 + 0.01 * rng.standard_normal(8), luck
    paired = S.paired_difference(a, b)
    assert paired == S.t_interval(a - b)
    assert 0.08 < paired.low < paired.high < 0.12
    assert S.t_interval(a).low < S.t_interval(b).high  # taken one by one, the two agents cannot be told apart
    assert S.paired_difference(a, b, interval=S.studentised_bootstrap_interval) == S.studentised_bootstrap_interval(
        a - b
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0], "values must hold at least [24] values, got 1"),
        ([], "values must hold at least [24] values, got 0"),
        ([1.0, 2.0, 3.0, float("nan"), 4.0], "values must be finite, but element 3 is nan"),
        ([1.0, 2.0, 3.0, 4.0, float("-inf")], "values must be finite, but element 4 is -inf"),
        ([[1.0, 2.0], [3.0, 4.0]], r"values must have one axis, got shape \(2, 2\)"),
    ],
)
def test_intervals_refuse_values(method, values, message):
    with pytest.raises(ValueError, match=message):
        method(values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, float("nan")])
def test_intervals_refuse_levels(method, level):
    with pytest.raises(ValueError, match=f"level must lie between 0 and 1, both excluded, got {level}"):
        method(SEEDS, level)


def test_bootstrap_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="at least 4 values, got 3"):
        S.studentised_bootstrap_interval([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="too many ties"):
        S.studentised_bootstrap_interval([1.0, 1.0, 1.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="resamples must be at least 39 at level 0.95, got 38"):
        S.percentile_bootstrap_interval(SEEDS, resamples=38)
    with pytest.raises(ValueError, match="a and b must be paired one to one, got 5 and 10 values"):
        S.paired_difference(SEEDS, DRUG_1)
    with pytest.raises(ValueError, match="b must be finite, but element 0 is nan"):
        S.paired_difference([1.0, 2.0], [float("nan"), 1.0])


# ---------------------------------------- coverage
def test_coverage_of_five_normal_values():
    """Student's interval keeps its promise, the studentised bootstrap nearly, the percentile bootstrap does
    not."""
    t, studentised, percentile = (
        S.interval_coverage(method, n=5, repetitions=4000) for method in ("t", "studentised", "percentile")
    )
    assert t.low < 0.95 < t.high  # exact for normal values, so the truth lies in the measurement's own interval
    assert studentised.low < 0.95 < studentised.high
    # A good approximation of the percentile interval uses normal quantiles and the spread with divisor n:
    # P(|T_4| < 1.96 sqrt(4 / 5)) with T_4 Student's, which is 0.846.
    expected = 1 - 2 * stats.t.sf(1.96 * np.sqrt(4 / 5), 4)
    assert percentile.estimate == pytest.approx(expected, abs=0.02)
    assert percentile.high < 0.87


def test_coverage_of_skewed_values():
    """For skewed values no interval of five keeps its promise; the studentised bootstrap comes closest."""
    for population in ("exponential", "lognormal"):
        t, studentised, percentile = (
            S.interval_coverage(method, n=5, distribution=population) for method in ("t", "studentised", "percentile")
        )
        assert percentile.high < t.low
        assert t.high < studentised.low
        assert studentised.high < 0.95
    # It is the skewness that hurts, and it fades as the sample grows.
    assert S.interval_coverage("t", n=200, distribution="exponential").low > 0.92


def test_populations_have_the_stated_means():
    for population in S.POPULATIONS.values():
        values = population.draw(np.random.default_rng(0), (400_000,))
        assert abs(values.mean() - population.mean) < 5 * values.std() / np.sqrt(values.size)


def test_coverage_reports_a_wilson_interval_and_takes_a_population():
    point = S.Population(lambda generator, shape: np.full(shape, 2.0), 2.0)
    assert S.interval_coverage("t", n=5, distribution=point, repetitions=300)[0::3] == (1.0, 300)
    # Wilson at 100 of 100: low = n / (n + z^2) with z = 1.959964.
    assert S.interval_coverage("t", distribution=point, repetitions=100).low == pytest.approx(
        100 / 103.841459, rel=1e-6
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "bayes"}, "method must be one of .*, got 'bayes'"),
        ({"method": "studentised", "n": 3}, "n must be at least 4 for method 'studentised', got 3"),
        ({"method": "t", "distribution": "cauchy"}, "distribution must be .*, got 'cauchy'"),
        ({"method": "t", "repetitions": 10}, "repetitions must be at least 100, got 10"),
    ],
)
def test_coverage_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        S.interval_coverage(**arguments)
