"""Equations of chapter "Bandits against the optimum", both sides: against integrals, enumerations and played games."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import beta as beta_law

from ecomlib.baselines.bandits import BanditGreedy, BanditThompson, OptimalBandit
from ecomlib.exact_bandits import GittinsIndex, arm_at_prices, bayes_optimal, optimality_gaps, posterior_reward
from ecomlib.families.bandits import BernoulliBandit
from ecomlib.families.base import sample_tasks
from ecomlib.rollout import trial

PRIORS = [(1.0, 1.0), (2.0, 0.5), (1.0, 3.0)]


@pytest.mark.parametrize(("a", "b"), PRIORS)
def test_beta_mean(a, b):
    """Equation (eq-beta-mean): probability of a success after s and f, as a ratio of integrals over the chance."""
    for s, f in ((0, 0), (3, 1), (0, 6)):
        density = lambda p, s=s, f=f: p**s * (1 - p) ** f * beta_law(a, b).pdf(p)
        ratio = quad(lambda p, density=density: p * density(p), 0, 1)[0] / quad(density, 0, 1)[0]
        assert (a + s) / (a + b + s + f) == pytest.approx(ratio, abs=1e-6)


def value_by_histories(pulls, arms, prior, history=()):
    """Best mean reward to come after a history of (arm, reward): no counts are shared between histories."""
    if len(history) == pulls:
        return 0.0
    best = 0.0
    for arm in range(arms):
        seen = [r for i, r in history if i == arm]
        chance = (prior[0] + sum(seen)) / (sum(prior) + len(seen))
        ahead = [value_by_histories(pulls, arms, prior, (*history, (arm, r))) for r in (0, 1)]
        best = max(best, chance * (1 + ahead[1]) + (1 - chance) * ahead[0])
    return best


@pytest.mark.parametrize("prior", PRIORS)
def test_bandit_bellman(prior):
    """Equation (eq-bandit-bellman): the recursion over multisets of counts, and the recursion over whole histories."""
    for pulls, arms in ((4, 2), (3, 3), (4, 3)):
        expected = value_by_histories(pulls, arms, prior)
        optimum = bayes_optimal(BernoulliBandit(arms, pulls, prior))
        assert optimum.value == pytest.approx(expected, abs=1e-12)
        for state, value in optimum.values.items():  # both sides at every state
            assert value == pytest.approx(max(optimum.action_values(state).values()))


def stopping_rules(left):
    """Every rule for stopping after at least one pull: which histories of rewards are played on."""
    inner = [h for length in range(1, left) for h in product((0, 1), repeat=length)]
    for keep in product((False, True), repeat=len(inner)):
        yield dict(zip(inner, keep))


def rate(rule, left, s, f, prior):
    """Mean reward and mean number of pulls of one arm under a rule."""
    reward = pulls = 0.0
    going = [((), 1.0)]
    while going:
        history, chance = going.pop()
        won = sum(history)
        p = (prior[0] + s + won) / (sum(prior) + s + f + len(history))
        reward, pulls = reward + chance * p, pulls + chance
        if len(history) + 1 < left:
            for r in (0, 1):
                after = (*history, r)
                if rule[after]:
                    going.append((after, chance * (p if r else 1 - p)))
    return reward, pulls


@pytest.mark.parametrize("prior", PRIORS)
def test_gittins(prior):
    """Equation (eq-gittins): the largest ratio of reward to pulls over all stopping rules, listed."""
    table = GittinsIndex(6, prior, grid=2049).table
    for left, s, f in ((1, 1, 2), (2, 0, 0), (3, 0, 0), (3, 1, 1), (4, 0, 1)):
        best = max(np.divide(*rate(rule, left, s, f, prior)) for rule in stopping_rules(left))
        assert table[left, s, f] == pytest.approx(best, abs=2e-5)


@pytest.mark.parametrize("prior", PRIORS)
def test_retirement(prior):
    """Equation (eq-retirement): the recursion, and the best of all stopping rules (or none) at that price; it reaches
    0 at the index."""

    @cache
    def option(price, left, s, f):
        if left == 0:
            return 0.0
        p = (prior[0] + s) / (sum(prior) + s + f)
        playing = p - price + p * option(price, left - 1, s + 1, f) + (1 - p) * option(price, left - 1, s, f + 1)
        return max(0.0, playing)

    for price in (0.2, 0.5, 0.7):
        for left, s, f in ((2, 0, 0), (4, 0, 0), (3, 2, 1)):
            gains = [
                reward - price * pulls for reward, pulls in (rate(r, left, s, f, prior) for r in stopping_rules(left))
            ]
            assert option(price, left, s, f) == pytest.approx(max(0.0, *gains), abs=1e-12)
    index = GittinsIndex(6, prior, grid=2049).table[5, 1, 0]
    assert option(index - 1e-4, 5, 1, 0) > 0 and option(index + 1e-4, 5, 1, 0) == 0


@pytest.mark.parametrize("prior", PRIORS)
def test_bandit_relaxation(prior):
    """Equation (eq-bandit-relaxation): for random prices, and by enumeration what an arm is worth at them."""

    def arm(price, now, s, f):
        if now == len(price):
            return 0.0
        p = (prior[0] + s) / (sum(prior) + s + f)
        pull = p - price[now] + p * arm(price, now + 1, s + 1, f) + (1 - p) * arm(price, now + 1, s, f + 1)
        return max(pull, arm(price, now + 1, s, f))

    rng = np.random.default_rng(0)
    for arms, pulls in ((2, 4), (3, 5), (1, 3)):
        value = bayes_optimal(BernoulliBandit(arms, pulls, prior)).value
        for _ in range(20):
            price = rng.uniform(0, 1, pulls)
            worth, pulled = arm_at_prices(price, prior)
            assert worth == pytest.approx(arm(price, 0, 0, 0), abs=1e-12)
            assert value <= price.sum() + arms * worth + 1e-12
            step = 1e-6  # how often it is pulled is minus the slope
            up = [arm_at_prices(price + step * (np.arange(pulls) == t), prior)[0] for t in range(pulls)]
            assert np.allclose((worth - np.array(up)) / step, pulled, atol=1e-4)


def played_exactly(pulls, arms, prior, choose):
    """(mean reward, mean sum of gaps) of a rule from counts to arms, any of which it pulls, over all outcomes with
    their probabilities."""
    optimum = bayes_optimal(BernoulliBandit(arms, pulls, prior))
    reward = gap = 0.0
    going = [(tuple((0, 0) for _ in range(arms)), 1.0)]
    for _ in range(pulls):
        after = []
        for counts, chance in going:
            values = optimum.action_values(tuple(sorted(c for c in counts if c != (0, 0))))
            chosen = choose(counts)
            for i in chosen:
                s, f = counts[i]
                p, here = (prior[0] + s) / (sum(prior) + s + f), chance / len(chosen)
                reward += here * p
                gap += here * (max(values.values()) - values[s, f])
                for new, share in (((s + 1, f), p), ((s, f + 1), 1 - p)):
                    after.append(((*counts[:i], new, *counts[i + 1 :]), here * share))
        going = after
    return reward, gap


def greedy(prior):
    """The arms of highest posterior mean."""

    def choose(counts):
        mean = [(prior[0] + s) / (sum(prior) + s + f) for s, f in counts]
        return [i for i, m in enumerate(mean) if m > max(mean) - 1e-9]

    return choose


@pytest.mark.parametrize("prior", PRIORS)
def test_bandit_gap(prior):
    """Equation (eq-bandit-gap), by enumeration for greedy and for a fixed arm."""
    value = bayes_optimal(BernoulliBandit(3, 5, prior)).value
    gaps = []
    for choose in (greedy(prior), lambda counts: [0]):
        reward, gap = played_exactly(5, 3, prior, choose)
        assert value - reward == pytest.approx(gap, abs=1e-12)
        gaps.append(gap)
    assert gaps[1] > gaps[0] >= 0 and gaps[1] > 1e-3


def test_bandit_gap_of_what_was_played():
    """The same from simulated histories: exact for Greedy (whose mean was enumerated), and in agreement with the mean
    reward for Thompson; the optimum has none."""
    family, exact = BernoulliBandit(3, 5), bayes_optimal(BernoulliBandit(3, 5)).value
    tasks = sample_tasks(family, 40_000, torch.Generator().manual_seed(0))
    enumerated = played_exactly(5, 3, (1, 1), greedy((1, 1)))[0]
    for agent, known in ((BanditGreedy(family), enumerated), (BanditThompson(family), None)):
        done = trial(family, tasks, agent, 1, 1, 0, progress=False)
        gap = optimality_gaps(family, done.action[0], done.reward[0]).sum(0)[:, 0]
        mean, error = gap.mean().item(), gap.std().item() / 200
        assert (gap >= -1e-12).all()
        if known:
            assert abs(exact - mean - known) < 4 * error
        reward = posterior_reward(family, done.action[0], done.reward[0]).sum(0)[:, 0]
        assert abs(exact - mean - reward.mean().item()) < 4 * (error + reward.std().item() / 200)
        true = family.mean_reward(tasks, done.action).sum((0, 1))[:, 0]
        assert abs((true - reward).mean().item()) < 4 * (true - reward).std().item() / 200
    best = trial(family, tasks, OptimalBandit(family), 1, 1, 0, progress=False)
    assert optimality_gaps(family, best.action[0], best.reward[0]).abs().max() < 1e-9


def test_bandit_regret():
    """Equation (eq-bandit-regret): the mean of the largest of k uniform chances by integration, and the two parts of a
    simulated agent's regret."""
    for arms in (2, 5, 10):
        largest = quad(lambda p, arms=arms: p * arms * p ** (arms - 1), 0, 1)[0]
        assert arms / (arms + 1) == pytest.approx(largest)
    family, exact = BernoulliBandit(4, 6), bayes_optimal(BernoulliBandit(4, 6)).value
    tasks = sample_tasks(family, 40_000, torch.Generator().manual_seed(1))
    done = trial(family, tasks, BanditThompson(family), 1, 1, 0, progress=False)
    regret = family.oracle_return(tasks) - family.mean_reward(tasks, done.action).sum((0, 1))[:, 0]
    gap = optimality_gaps(family, done.action[0], done.reward[0]).sum(0)[:, 0]
    off = regret - gap
    assert abs(off.mean().item() - (6 * 4 / 5 - exact)) < 4 * off.std().item() / 200
