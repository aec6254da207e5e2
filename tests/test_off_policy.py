"""Off-policy estimators: against `obp` on the Open Bandit sample, and against the truth where it is known."""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ecomlib.calibration import open_bandit
from ecomlib.evaluation import off_policy as O
from ecomlib.evaluation.row_ratios import ratio_estimate
from ecomlib.evaluation.statistics import t_interval
from ecomlib.evaluation.trial_logs import replay, trial_weights, weight_variance

DATA = Path(__file__).parents[1] / "data"

# Computed once by obp 0.4.1 (NumPy 2.4.6, scikit-learn 1.9.1) from data/open_bandit_decisions.parquet: (campaign,
# policy of the log) -> InverseProbabilityWeighting, SelfNormalizedInverseProbabilityWeighting, DirectMethod,
# DoublyRobust, each .estimate_policy_value(reward=click, action=item, position=position - 1, pscore=propensity,
# action_dist=..., estimated_rewards_by_reg_model=...). The policy judged by the log of "random" shows items as often
# as the log of "bts" did in each position; that judged by "bts" shows all alike. The model is cross_fitted_rates.
OBP = {
    ("all", "random"): (0.005035366932711512, 0.0052530721964214695, 0.0043127913109512195, 0.0051631710325828195),
    ("all", "bts"): (0.0023596395168460037, 0.002333713893161806, 0.0041933650825727925, 0.0024334637493555193),
    ("men", "random"): (0.005656266700835461, 0.005739864701951365, 0.005536092286610831, 0.005791529592241328),
    ("men", "bts"): (0.003008626327256482, 0.0031894231622774027, 0.0060555354483972455, 0.0033341068223050442),
    ("women", "random"): (0.0058056917829497874, 0.005833036087191038, 0.005466898157519112, 0.005882366985763825),
    ("women", "bts"): (0.00743757754192316, 0.0023730461434477677, 0.004370415704002628, 0.00024233398980028788),
}


@pytest.fixture(scope="module")
def decisions():
    return pd.read_parquet(DATA / "open_bandit_decisions.parquet")


def of_log(decisions, campaign, policy):
    """The log, with the other policy as target."""
    log, other = (
        decisions[(decisions["policy"] == p) & (decisions["campaign"] == campaign)]
        for p in (policy, "bts" if policy == "random" else "random")
    )
    items = int(decisions[decisions["campaign"] == campaign]["item"].max()) + 1
    if policy == "bts":
        target = np.full((3, items), 1 / items)
    else:
        target = pd.crosstab(other["position"], other["item"], normalize="index")
        target = target.reindex(columns=range(items), fill_value=0.0).to_numpy()
    made = O.logged(log["item"], log["click"], log["propensity"], target[log["position"] - 1])
    return made, O.cross_fitted_rates(log["item"], log["click"], items)


# ---------------------------------------- the Open Bandit sample
@pytest.mark.parametrize("campaign, policy", OBP)
def test_estimators_equal_those_of_obp(decisions, campaign, policy):
    log, model = of_log(decisions, campaign, policy)
    ours = (
        O.inverse_propensity(log).estimate,
        O.self_normalised(log).estimate,
        O.direct_method(log, model).estimate,
        O.doubly_robust(log, model).estimate,
    )
    assert ours == pytest.approx(OBP[campaign, policy], rel=1e-9)


def test_table_of_decisions_is_what_the_logs_hold(decisions):
    if importlib.util.find_spec("obp") is None:
        pytest.skip(f"the logs are not installed: pip install --no-deps {open_bandit.PACKAGE}")
    pd.testing.assert_frame_equal(open_bandit.decisions(), decisions)


def test_table_of_decisions_agrees_with_the_table_of_clicks_and_its_card(decisions):
    keys = ["policy", "campaign", "item", "position"]
    cells = decisions.groupby(keys, observed=True).agg(
        impressions=("click", "size"), clicks=("click", "sum"), propensity=("propensity", "mean")
    )
    clicks = pd.read_csv(DATA / "open_bandit_clicks.csv").set_index(keys)
    together = (
        cells.reset_index().astype({"policy": str, "campaign": str}).set_index(keys).join(clicks.add_suffix("_csv"))
    )
    assert len(together) == len(clicks) == len(cells)
    for column in ("impressions", "clicks"):
        assert (together[column] == together[f"{column}_csv"]).all()
    assert together["propensity"].to_numpy() == pytest.approx(together["propensity_csv"].to_numpy(), abs=1e-6)
    card = (DATA / "open_bandit.md").read_text(encoding="utf-8")
    assert f"`open_bandit_decisions.parquet`: {len(decisions):,} rows" in card
    assert decisions["propensity"].min() == 1e-6 and "from 0.000001" in card
    heaviest = of_log(decisions, "women", "bts")[0].weight.max()
    assert f"weight of {heaviest:,.0f}" in card
    assert (DATA / "open_bandit_decisions.parquet").stat().st_size < 300_000


# ---------------------------------------- a shop whose values are known
RATES = np.array([[0.10, 0.05, 0.02, 0.08], [0.02, 0.12, 0.06, 0.01], [0.05, 0.05, 0.15, 0.03]])
SHARES = np.array([0.5, 0.3, 0.2])  # of the contexts
LOGGING = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]])
TARGET = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]])
TRUTH = float((SHARES[:, None] * TARGET * RATES).sum())


def draw(rng, n, rates=RATES, logging=LOGGING, target=TARGET, shares=SHARES):
    context = rng.choice(len(shares), n, p=shares)
    action = (rng.random(n)[:, None] > logging[context].cumsum(1)).sum(1)
    reward = (rng.random(n) < rates[context, action]).astype(float)
    return context, O.logged(action, reward, logging[context, action], target[context])


def test_expectations_by_enumeration():
    """One decision, all contexts, actions and clicks listed with their probabilities: the mean of each estimator."""
    model = RATES + np.array([0.3, -0.02, 0.1, 0.0])  # wrong
    ips = direct = robust = weight = 0.0
    for x, a, r in itertools.product(range(3), range(4), (0.0, 1.0)):
        chance = SHARES[x] * LOGGING[x, a] * (RATES[x, a] if r else 1 - RATES[x, a])
        log = O.logged([a, a], [r, r], [LOGGING[x, a]] * 2, TARGET[[x, x]])
        ips += chance * O.inverse_propensity(log).estimate
        direct += chance * O.direct_method(log, model[[x, x]]).estimate
        robust += chance * O.doubly_robust(log, model[[x, x]]).estimate
        weight += chance * O.diagnose(log).mean_weight.estimate
    assert (ips, robust, weight) == pytest.approx((TRUTH, TRUTH, 1.0), rel=1e-12)
    assert direct == pytest.approx(float((SHARES[:, None] * TARGET * model).sum()), rel=1e-12)
    # With wrong propensities and a right model, doubly robust is right and inverse propensity is not.
    wrong, ips, robust = np.full((3, 4), 0.25), 0.0, 0.0
    for x, a, r in itertools.product(range(3), range(4), (0.0, 1.0)):
        chance = SHARES[x] * LOGGING[x, a] * (RATES[x, a] if r else 1 - RATES[x, a])
        log = O.logged([a, a], [r, r], [wrong[x, a]] * 2, TARGET[[x, x]])
        ips += chance * O.inverse_propensity(log).estimate
        robust += chance * O.doubly_robust(log, RATES[[x, x]]).estimate
    assert robust == pytest.approx(TRUTH, rel=1e-12) and abs(ips - TRUTH) > 0.05 * TRUTH


@pytest.mark.parametrize("interval", ["normal", "studentised"])
def test_coverage_against_the_truth(interval):
    """Several hundred logs: how often each interval holds the exact value. The direct method with a wrong model shows
    what an interval without the model's error is worth."""
    rng = np.random.default_rng(5)
    repetitions, n = (400, 4000) if interval == "normal" else (200, 1000)
    covered = {"ips": 0, "snips": 0, "dr": 0, "direct, wrong model": 0}
    model = np.full((3, 4), 0.12)
    for k in range(repetitions):
        context, log = draw(rng, n)
        extra = {} if interval == "normal" else {"resamples": 199, "seed": k}
        found = {
            "ips": O.inverse_propensity(log, interval=interval, **extra),
            "snips": O.self_normalised(log, interval=interval, **extra),
            "dr": O.doubly_robust(log, model[context], interval=interval, **extra),
            "direct, wrong model": O.direct_method(log, model[context], interval=interval, **extra),
        }
        for name, e in found.items():
            covered[name] += int(e.low <= TRUTH <= e.high)
    for name in ("ips", "snips", "dr"):
        ends = stats.binomtest(covered[name], repetitions).proportion_ci(0.999)
        assert ends.low < 0.95 < ends.high, (name, covered[name] / repetitions)
    assert covered["direct, wrong model"] == 0


def test_normal_intervals_are_too_short_where_clicks_are_rare():
    """Some sixty expected clicks become few effective ones: at the size of real logs the promise is broken."""
    rng, repetitions = np.random.default_rng(6), 300
    rates = RATES / 20
    target = np.array([[0.01, 0.01, 0.01, 0.97]] * 3)
    logging = np.array([[0.5, 0.29, 0.2, 0.01]] * 3)
    truth = float((SHARES[:, None] * target * rates).sum())
    held = 0
    for _ in range(repetitions):
        _, log = draw(rng, 5000, rates, logging, target)
        found = O.inverse_propensity(log)
        held += int(found.low <= truth <= found.high)
    assert stats.binomtest(held, repetitions).proportion_ci(0.999).high < 0.9


def test_weights_of_one_give_the_mean_and_its_interval():
    """The target is the logging policy: every estimator is the click rate, with Student's interval."""
    rng = np.random.default_rng(7)
    context = rng.choice(3, 500, p=SHARES)
    action = (rng.random(500)[:, None] > LOGGING[context].cumsum(1)).sum(1)
    reward = rng.random(500)
    log = O.logged(action, reward, LOGGING[context, action], LOGGING[context])
    for found in (O.inverse_propensity(log), O.self_normalised(log), O.doubly_robust(log, np.zeros(4))):
        assert found[:4] == pytest.approx(t_interval(reward), rel=1e-12)
        assert found.effective == pytest.approx(500)


def test_self_normalised_ignores_a_constant_and_stays_in_range():
    _, log = draw(np.random.default_rng(8), 300)
    moved = log._replace(reward=log.reward + 10)
    assert O.self_normalised(moved).estimate == pytest.approx(O.self_normalised(log).estimate + 10, rel=1e-12)
    assert abs(O.inverse_propensity(moved).estimate - O.inverse_propensity(log).estimate - 10) > 0.01
    ones = log._replace(reward=np.ones(300))
    assert O.self_normalised(ones)[:3] == pytest.approx((1, 1, 1), abs=1e-12)


def test_clipping_bounds_weights_and_lowers_the_estimate():
    _, log = draw(np.random.default_rng(9), 2000)
    clipped = O.inverse_propensity(log, clip=1.5)
    assert clipped.estimate == pytest.approx((np.minimum(log.weight, 1.5) * log.reward).mean(), rel=1e-12)
    assert clipped.estimate < O.inverse_propensity(log).estimate
    assert clipped.high - clipped.low < O.inverse_propensity(log).high - O.inverse_propensity(log).low
    assert O.inverse_propensity(log, clip=log.weight.max()) == O.inverse_propensity(log)
    assert O.self_normalised(log, clip=1.5).effective > O.self_normalised(log).effective
    taken = np.zeros(4)
    assert O.doubly_robust(log, taken, clip=1.5).estimate == pytest.approx(clipped.estimate, rel=1e-12)


def test_diagnosis_finds_wrong_propensities_and_missing_support():
    rng = np.random.default_rng(10)
    _, log = draw(rng, 5000)
    right = O.diagnose(log)
    assert right.mean_weight.low < 1 < right.mean_weight.high and right.unseen == 0
    assert right.largest == pytest.approx(log.weight.max() / log.weight.sum())
    assert O.diagnose(log._replace(propensity=np.sqrt(log.propensity))).mean_weight.high < 0.9
    blocked = np.array([[0.5, 0.5, 0.0, 0.0]] * 3)
    _, log = draw(rng, 5000, logging=blocked)
    missing = O.diagnose(log)
    never = float(TARGET[:, 2:].sum(1) @ SHARES)
    assert missing.unseen == pytest.approx(never, abs=0.02) and missing.mean_weight.high < 1 - 0.8 * never
    # What the log cannot say is lost without a word: no click on the last two items is counted.
    assert O.inverse_propensity(log).high < TRUTH


def test_linearised_ratio_equals_the_delta_method_and_bootstraps_agree():
    rng = np.random.default_rng(11)
    top, bottom = rng.random(400), 1 + rng.random(400)
    ratio = top.mean() / bottom.mean()
    gradient = np.array([1 / bottom.mean(), -ratio / bottom.mean()])
    error = np.sqrt(gradient @ np.cov(top, bottom) @ gradient / 400)
    half = stats.t.ppf(0.975, 399) * error
    found = ratio_estimate(top, bottom, 0.95, "normal")
    assert found == pytest.approx((ratio, ratio - half, ratio + half, 400), rel=1e-9)
    for interval in ("studentised", "percentile"):
        boot = ratio_estimate(top, bottom, 0.95, interval, resamples=4999, seed=1)
        assert (boot.low, boot.high) == pytest.approx((found.low, found.high), abs=0.12 * half)
        assert boot == ratio_estimate(top, bottom, 0.95, interval, resamples=4999, seed=1)
    flat = ratio_estimate(np.full(50, 0.3), np.ones(50), 0.95, "studentised")
    assert flat[:3] == pytest.approx((0.3, 0.3, 0.3))


def test_cross_fitted_rates_never_see_their_own_row():
    action, reward = np.array([0, 0, 1, 1, 0, 1]), np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    model = O.cross_fitted_rates(action, reward, actions=3, folds=2, strength=2.0)
    # Row 0 is of fold 0 (rows 0, 2, 4). The others, 1, 3, 5: action 0 once (0), action 1 twice (1, 1), mean 2/3.
    assert model[0] == pytest.approx([(0 + 4 / 3) / 3, (2 + 4 / 3) / 4, 2 / 3])
    changed = reward.copy()
    changed[[0, 2, 4]] = 1 - changed[[0, 2, 4]]
    assert O.cross_fitted_rates(action, changed, 3, 2, 2.0)[0] == pytest.approx(model[0])
    assert not np.allclose(O.cross_fitted_rates(action, changed, 3, 2, 2.0)[1], model[1])
    assert np.isfinite(O.cross_fitted_rates(action, reward, actions=3, folds=2, strength=0.0)).all()


# ---------------------------------------- replay
class Greedy:
    """Shows each arm once, then the one with the best mean; keeps its history."""

    def __init__(self, arms):
        self.total, self.count, self.history = np.zeros(arms), np.zeros(arms), []

    def choose(self, context, generator):
        return int(np.argmax(np.where(self.count == 0, np.inf, self.total / np.maximum(self.count, 1))))

    def learn(self, context, action, reward):
        self.total[action] += reward
        self.count[action] += 1
        self.history.append((action, reward))


class Hesitant(Greedy):
    """Greedy with a coin: every other time any arm."""

    def chances(self):
        return 0.5 * np.eye(len(self.total))[super().choose(None, None)] + 0.5 / len(self.total)

    def choose(self, context, generator):
        return int(generator.choice(len(self.total), p=self.chances()))


def test_replay_has_the_law_of_the_policys_own_history():
    """Exact distribution of the first three (action, reward) of a learner that also draws its actions, by enumeration,
    against replays of logs, of equal and of unequal propensities."""
    rates, exact = np.array([0.3, 0.6]), {}
    for path in itertools.product(itertools.product(range(2), (0.0, 1.0)), repeat=3):
        policy, chance = Hesitant(2), 1.0
        for a, r in path:
            chance *= policy.chances()[a] * (rates[a] if r else 1 - rates[a])
            policy.learn(None, a, r)
        exact[path] = chance
    assert sum(exact.values()) == pytest.approx(1)
    rng, repetitions = np.random.default_rng(12), 4000
    for logging in ([0.5, 0.5], [0.8, 0.2]):
        found = dict.fromkeys(exact, 0)
        for k in range(repetitions):
            action = (rng.random(80) < logging[1]).astype(int)
            reward = (rng.random(80) < rates[action]).astype(float)
            policy = Hesitant(2)
            done = replay(policy, action, reward, propensity=np.array(logging)[action], seed=k, most=3)
            if len(done.row) == 3:
                found[tuple(policy.history)] += 1
        counts = np.array(list(found.values()))
        assert counts.sum() > 0.99 * repetitions
        test = stats.chisquare(counts, counts.sum() * np.array(list(exact.values())))
        assert test.pvalue > 1e-3, (logging, test)


def test_replay_accepts_one_in_k_and_reports_its_rows():
    rng = np.random.default_rng(13)
    action, reward = rng.integers(5, size=4000), rng.random(4000)
    policy = Greedy(5)
    done = replay(policy, action, reward)
    assert done.rows == 4000 and abs(len(done.row) - 800) < 5 * np.sqrt(4000 * 0.2 * 0.8)
    assert (action[done.row] == [a for a, _ in policy.history]).all() and (np.diff(done.row) > 0).all()
    assert done.mean == pytest.approx(reward[done.row].mean())
    short = replay(Greedy(5), action, reward, most=7)
    assert len(short.row) == 7 and short.rows == short.row[-1] + 1
    assert (short.row == done.row[:7]).all()
    assert math.isnan(replay(Greedy(6), np.ones(3), np.ones(3)).mean)


def test_replay_shows_the_context():
    class Matching:
        def choose(self, context, generator):
            return int(context)

        def learn(self, context, action, reward):
            assert context == action

    rng = np.random.default_rng(14)
    context, action = rng.integers(3, size=300), rng.integers(3, size=300)
    done = replay(Matching(), action, np.ones(300), context=context)
    assert (done.row == np.flatnonzero(context == action)).all()


# ---------------------------------------- whole trials
def test_trial_weights_are_unbiased_and_explode_as_computed():
    """Two actions a step, 6 steps, all 64 paths listed: the mean weight is 1, the estimate exact, the variance that of
    the closed form."""
    behaviour, target, rewards, steps = np.array([0.7, 0.3]), np.array([0.4, 0.6]), np.array([1.0, 3.0]), 6
    paths = np.array(list(itertools.product((0, 1), repeat=steps))).T  # (T, 64)
    chance = behaviour[paths].prod(0)
    ratio = np.log(target[paths]) - np.log(behaviour[paths])
    for per_step in (True, False):
        found = trial_weights(ratio, rewards[paths], per_step)
        returns = (found.weight * rewards[paths]).sum(0) if per_step else found.weight[-1] * rewards[paths].sum(0)
        assert chance @ returns == pytest.approx(steps * target @ rewards, rel=1e-12)
        assert found.returns.estimate == pytest.approx(returns.mean(), rel=1e-12)
    chi = float((target**2 / behaviour).sum() - 1)
    for t in range(steps):
        assert chance @ found.weight[t] == pytest.approx(1, rel=1e-12)
        variance = chance @ found.weight[t] ** 2 - 1
        assert variance == pytest.approx(weight_variance(chi, t + 1), rel=1e-12)
    assert found.effective == pytest.approx(O.effective_size(found.weight))


def test_effective_size_of_sampled_trials_falls_with_the_horizon():
    rng = np.random.default_rng(15)
    behaviour, target = np.array([0.5, 0.5]), np.array([0.3, 0.7])
    action = rng.integers(2, size=(12, 50_000))
    found = trial_weights(np.log(target[action] / behaviour[action]), np.zeros(action.shape))
    chi = float((target**2 / behaviour).sum() - 1)
    expected = 50_000 / (1 + chi) ** np.arange(1, 13)
    assert found.effective[:8] == pytest.approx(expected[:8], rel=0.05)
    assert (np.diff(found.effective) < 0).all()


def test_effective_size():
    assert O.effective_size([2.0, 2.0, 2.0]) == pytest.approx(3)
    assert O.effective_size([0.0, 5.0, 0.0]) == pytest.approx(1)
    assert O.effective_size([0.0, 0.0]) == 0
    assert O.effective_size(np.array([[1.0, 1.0], [3.0, 0.0]])) == pytest.approx([2, 1])


# ---------------------------------------- refusals
GOOD = {"action": [0, 1], "reward": [0.0, 1.0], "propensity": [0.5, 0.5], "target": [[0.5, 0.5], [0.2, 0.8]]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"action": [0]}, r"action = \(1,\); allowed: a shape \(n,\) with n >= 2"),
        ({"action": [0, 2]}, "action of row 1 is 2; allowed: whole numbers from 0 to 1"),
        ({"action": [0.5, 1]}, "action of row 0 is 0.5"),
        ({"reward": [0.0, 1.0, 1.0]}, r"reward = \(3,\); allowed: \(2,\), the shape of action"),
        ({"reward": [0.0, np.nan]}, "reward must be finite, but element 1 is nan"),
        ({"propensity": [0.5, 0.0]}, "propensity of row 1 is 0; allowed: above 0 and at most 1"),
        ({"propensity": [0.5, 1.5]}, "propensity of row 1 is 1.5"),
        ({"target": [[0.5, 0.5], [0.2, 0.7]]}, "target of row 1 is 0.9; allowed: rows that sum to 1"),
        ({"target": [[0.5, 0.5], [-0.2, 1.2]]}, "target of row 1 is -0.2; allowed: no negative probability"),
        ({"target": np.full((3, 2), 0.5)}, r"target = \(3, 2\)"),
    ],
)
def test_logs_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        O.logged(**(GOOD | change))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda log: O.inverse_propensity(log, clip=0), "clip = 0; allowed: a number above 0, or math.inf"),
        (lambda log: O.inverse_propensity(log, level=95), "level must lie between 0 and 1"),
        (lambda log: O.inverse_propensity(log, interval="bca"), "interval = 'bca'; allowed: one of normal"),
        (lambda log: O.inverse_propensity(log, interval="studentised", resamples=5), "resamples must be at least 39"),
        (lambda log: O.direct_method(log, [1.0, 2.0, 3.0]), r"model = \(3,\); allowed: \(2, 2\) or \(2,\)"),
        (lambda log: O.doubly_robust(log, [1.0, np.inf]), "model must be finite"),
        (lambda log: O.self_normalised(log._replace(target=np.array([[0, 1.0], [1.0, 0]]))), "weights all 0"),
        (
            lambda log: O.cross_fitted_rates([0, 1], [0, 1], 2, folds=1),
            "folds = 1; allowed: a whole number from 2 to 2",
        ),
        (lambda log: O.cross_fitted_rates([0, 1], [0, 1], 1, folds=2), "action of row 1 is 1"),
        (lambda log: O.cross_fitted_rates([0, 1], [0, 1], 2, 2, strength=-1), "strength = -1"),
        (lambda log: replay(Greedy(2), [0, 1], [0.0]), "reward = "),
        (lambda log: replay(Greedy(2), [0, 1], [0.0, 1.0], propensity=[0.5, 0.0]), "propensity = 0.0"),
        (lambda log: replay(Greedy(2), [0, 1], [0.0, 1.0], context=[1]), "context = 1; allowed: 2 rows"),
        (lambda log: replay(Greedy(2), [0, 1], [0.0, 1.0], most=0), "most = 0"),
        (lambda log: trial_weights(np.zeros(3), np.zeros(3)), "log_ratio = "),
        (lambda log: trial_weights(np.zeros((2, 3)), np.zeros((3, 2))), "reward = "),
        (lambda log: trial_weights(np.full((2, 3), np.inf), np.zeros((2, 3))), "log_ratio = inf"),
        (lambda log: trial_weights(np.full((2, 3), np.nan), np.zeros((2, 3))), "log_ratio = nan"),
        (lambda log: weight_variance(-0.1, 3), "chi_square = -0.1"),
        (lambda log: weight_variance(0.1, 0), "steps = 0"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(O.logged(**GOOD))
