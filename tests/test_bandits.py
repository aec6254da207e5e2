"""Bandits: the family, the exact optimum against enumerations of its own, the index against one arm and a known
alternative, and what every agent earns."""

import json
from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from scipy.special import betaln
from scipy.stats import beta as beta_law

from benchmarks import bandits as bandit_benchmark
from ecomlib.baselines.bandits import (
    UCB1,
    BanditGreedy,
    BanditThompson,
    GittinsBandit,
    IndexAgent,
    OptimalBandit,
    Random,
    agents,
    posterior_quantiles,
)
from ecomlib.evaluation.statistics import normalised_score
from ecomlib.exact_bandits import (
    BayesOptimal,
    GittinsIndex,
    bayes_optimal,
    gittins_index,
    histories,
    optimality_gaps,
    posterior_reward,
    relaxation_bound,
)
from ecomlib.families.bandits import BernoulliBandit
from ecomlib.families.base import sample_tasks, split
from ecomlib.rollout import trial


def tasks_of(family, count, seed=0):
    return sample_tasks(family, count, torch.Generator().manual_seed(seed))


def earned(family, agent, tasks, seed=0, replicas=1):
    """Expected reward (M,) of the pulls that the agent made, mean over replicas."""
    done = trial(family, tasks, agent, 1, replicas, seed, progress=False)
    return family.mean_reward(tasks, done.action).sum((0, 1)).mean(-1)


def mean_and_error(values):
    return values.mean().item(), values.std().item() / len(values) ** 0.5


# ------------------------------------------------------------------------------------------------ the family
@pytest.mark.parametrize("prior", [(1, 1), (1, 3), (2.5, 1), (2.0, 6.5)])
def test_chances_have_the_priors_distribution(prior):
    """Kolmogorov-Smirnov distance from SciPy's Beta law over 20,000 chances: 1.63 / sqrt(n) is exceeded in 1 % of
    samples of the right law."""
    family = BernoulliBandit(arms=4, prior=prior)
    chance = tasks_of(family, 5000).chance.flatten().sort().values.numpy()
    distance = np.abs(beta_law(*prior).cdf(chance) - np.arange(0.5, 20_000) / 20_000).max()
    assert distance < 1.63 / 20_000**0.5
    assert family.prior_mean == pytest.approx(beta_law(*prior).mean())


def test_a_task_depends_on_its_id_alone():
    family = BernoulliBandit(arms=3)
    ids = torch.tensor([7, 9, 7])
    tasks = family.tasks(ids)
    assert torch.equal(tasks.chance[0], tasks.chance[2]) and not torch.equal(tasks.chance[0], tasks.chance[1])
    assert torch.equal(tasks.chance, family.tasks(ids[:1]).chance.expand(3, -1)) is False
    assert torch.equal(tasks.chance[:1], family.tasks(ids[:1]).chance)


def test_steps_rewards_and_what_is_seen():
    family = BernoulliBandit(arms=2, pulls=3)
    tasks = tasks_of(family, 4)._replace(chance=torch.tensor([[0.0, 1.0]]).expand(4, -1))
    state = family.reset(tasks, 2, torch.zeros(4, 2, 1))
    assert torch.equal(family.observe(tasks, state), torch.zeros(4, 2, 2))
    for pull, arm in enumerate((1, 0, 1)):
        action = torch.full((4, 2), arm)
        state, reward, done = family.step(tasks, state, action, torch.full((4, 2, 1), 0.5))
        assert (reward == arm).all() and done.all() == (pull == 2) and done.any() == (pull == 2)
        seen = family.observe(tasks, state)
        assert torch.allclose(seen[..., 0], torch.tensor((pull + 1) / 3)) and (seen[..., 1] == arm).all()
    assert (family.mean_reward(tasks, torch.tensor([[[0, 1]] * 4])) == torch.tensor([0.0, 1.0])).all()


def test_oracle_and_blind_return_are_those_of_played_policies():
    family = BernoulliBandit(arms=3, pulls=20)
    tasks = tasks_of(family, 40)

    class Best(Random):
        def act(self, observation, noise):
            return tasks.chance.argmax(-1)[:, None].expand(observation.shape[:2])

    for agent, expected in ((Best(family), family.oracle_return(tasks)), (Random(family), family.blind_return(tasks))):
        done = trial(family, tasks, agent, 1, 400, 0, progress=False)
        error = done.returns[0].std(-1) / 400**0.5
        assert ((done.returns[0].mean(-1) - expected).abs() < 4.5 * error + 1e-9).all()
    prior = family.prior_sample(4096)
    assert family.blind_return(prior).mean().item() == pytest.approx(20 * 0.5, abs=0.01)
    assert family.oracle_return(prior).mean().item() == pytest.approx(20 * 3 / 4, abs=0.02)  # E max of 3 uniforms


def test_shifted_arms_pay_less():
    family, tasks = split(BernoulliBandit(), "shifted", 4000)
    assert family == BernoulliBandit(prior=(1, 3))
    assert tasks.chance.mean().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("field", "bad"),
    [(f, v) for f in ("arms", "pulls") for v in (0, 2.0, True, None, 10_001, "3")]
    + [("prior", v) for v in (1.0, (1.0,), (0.0, 1.0), (1, 1e7), (1, float("nan")), None)],
)
def test_a_bad_setting_is_named(field, bad):
    with pytest.raises(ValueError, match=rf"^BernoulliBandit\.{field} = .*; allowed: \S"):
        BernoulliBandit(**{field: bad})


# ------------------------------------------------------------------------------------------------ the optimum
def probability(history, prior):
    """Of this sequence of (arm, reward), whatever chose the arms: a product of Beta integrals."""
    a, b = prior
    total = 0.0
    for arm in {arm for arm, _ in history}:
        rewards = [reward for other, reward in history if other == arm]
        total += betaln(a + sum(rewards), b + len(rewards) - sum(rewards)) - betaln(a, b)
    return np.exp(total)


def best_of_all_policies(pulls, arms, prior):
    """Every deterministic policy, history by history: a tree with an arm at each node. No Bayes' rule, no recursion
    over values."""
    nodes = [rewards for length in range(pulls) for rewards in product((0, 1), repeat=length)]
    best = 0.0
    for choice in product(range(arms), repeat=len(nodes) - 1):
        tree = dict(zip(nodes, (0, *choice)))  # the first arm is as good as any
        value = 0.0
        for rewards in product((0, 1), repeat=pulls):
            history = [(tree[rewards[:t]], rewards[t]) for t in range(pulls)]
            value += probability(history, prior) * sum(rewards)
        best = max(best, value)
    return best


@pytest.mark.parametrize(
    ("pulls", "arms", "prior"), [(2, 2, (1, 1)), (2, 3, (2, 1)), (3, 2, (1, 1)), (3, 2, (0.5, 2)), (3, 3, (1, 1))]
)
def test_the_optimum_is_the_best_of_all_policies(pulls, arms, prior):
    family = BernoulliBandit(arms, pulls, prior)
    assert BayesOptimal(family).value == pytest.approx(best_of_all_policies(pulls, arms, prior), abs=1e-12)


def forward_arrays(pulls, prior):
    """Two arms, written differently: arrays over (s1, f1, s2, f2) for all counts, no symmetry, no dictionaries."""
    a, b = prior
    axes = np.ogrid[tuple(slice(pulls + 1) for _ in range(4))]
    total = sum(axes)
    value = np.zeros((pulls + 2,) * 4)
    for now in reversed(range(pulls)):
        arms = []
        for arm in (0, 1):
            s, f = axes[2 * arm], axes[2 * arm + 1]
            chance = (a + s) / (a + b + s + f)
            shift = lambda axis: tuple(slice(1, None) if i == axis else slice(None, -1) for i in range(4))
            arms.append(chance * (1 + value[shift(2 * arm)]) + (1 - chance) * value[shift(2 * arm + 1)])
        here = np.where(total == now, np.maximum(*arms), 0.0)
        value[:-1, :-1, :-1, :-1] += here
    return value[0, 0, 0, 0]


@pytest.mark.parametrize(("pulls", "prior"), [(4, (1, 1)), (10, (1, 1)), (9, (2, 3.5))])
def test_the_optimum_of_two_arms_equals_a_program_over_plain_arrays(pulls, prior):
    assert BayesOptimal(BernoulliBandit(2, pulls, prior)).value == pytest.approx(forward_arrays(pulls, prior), 1e-12)


def test_the_optimum_in_closed_form():
    """One arm, one pull, and two pulls of many arms: stay after a success, leave after a failure."""
    for a, b in ((1, 1), (3, 2)):
        mean = a / (a + b)
        assert bayes_optimal(BernoulliBandit(1, 10, (a, b))).value == pytest.approx(10 * mean)
        assert bayes_optimal(BernoulliBandit(7, 1, (a, b))).value == pytest.approx(mean)
        stay = (a + 1) / (a + b + 1)
        two = mean + mean * stay + (1 - mean) * mean
        assert bayes_optimal(BernoulliBandit(4, 2, (a, b))).value == pytest.approx(two)


def test_the_optimum_of_the_published_settings():
    """Computed before, by another program: 6.6600, 6.7140, 6.7140."""
    values = [bayes_optimal(BernoulliBandit(arms, 10)).value for arms in (5, 10, 50)]
    assert [round(v, 4) for v in values] == [6.66, 6.714, 6.714]


def test_every_state_is_there_once():
    """Their number is the coefficient of a generating function: pairs (s, f) of m pulls come in m + 1 kinds."""
    count = [1] + [0] * 8
    for m in range(1, 9):
        for _ in range(m + 1):
            for total in range(m, 9):
                count[total] += count[total - m]
    states = list(BayesOptimal(BernoulliBandit(9, 9)).values)
    assert len(set(states)) == len(states)
    assert [sum(sum(map(sum, s)) == t for s in states) for t in range(9)] == count


def test_large_problems_are_refused_by_name():
    with pytest.raises(ValueError, match="pulls = 21; allowed: at most 20"):
        BayesOptimal(BernoulliBandit(3, 21))
    with pytest.raises(ValueError, match="pulls = 201; allowed"):
        GittinsIndex(201)
    with pytest.raises(ValueError, match="iterations = 0"):
        relaxation_bound(BernoulliBandit(), 0)


# ------------------------------------------------------------------------------------------------ the index
def one_armed(pulls, known, s, f, prior):
    """Pull an unknown arm or one that pays ``known``: (best value, is the unknown arm best now?), by plain
    recursion in which the known arm may be left again."""
    if pulls == 0:
        return 0.0, False
    p = (prior[0] + s) / (sum(prior) + s + f)
    unknown = p * (1 + one_armed(pulls - 1, known, s + 1, f, prior)[0])
    unknown += (1 - p) * one_armed(pulls - 1, known, s, f + 1, prior)[0]
    safe = known + one_armed(pulls - 1, known, s, f, prior)[0]
    return max(unknown, safe), unknown >= safe


@pytest.mark.parametrize("prior", [(1, 1), (2, 0.5)])
def test_the_index_is_the_known_chance_at_which_an_arm_is_worth_trying(prior):
    table = GittinsIndex(6, prior, grid=1025).table
    for left, s, f in ((1, 2, 1), (2, 0, 0), (3, 1, 2), (5, 0, 1), (6, 0, 0)):
        index = table[left, s, f]
        assert one_armed(left, index - 1e-4, s, f, prior)[1]
        assert not one_armed(left, index + 1e-4, s, f, prior)[1]


def test_the_index_in_closed_form_and_its_shape():
    """One pull: the mean. Two pulls: (p + p p') / (1 + p), p' the chance after a success. More pulls left, or one more
    success, never lower it."""
    found = GittinsIndex(12)
    s, f = np.indices((12, 12))
    used = s + f <= 11
    mean = (1 + s) / (2 + s + f)
    assert np.allclose(found.table[1][used], mean[used], atol=1e-12)
    two = mean * (1 + (2 + s) / (3 + s + f)) / (1 + mean)
    used = s + f <= 10
    assert np.allclose(found.table[2][used], two[used], atol=1e-4)
    for left in range(2, 13):
        used = s + f <= 12 - left
        assert (found.table[left] >= found.table[left - 1] - 1e-4)[used].all()
        assert (np.diff(found.table[left], axis=0) >= -1e-4)[used[1:]].all()
        assert np.isnan(found.table[left][~used]).all()


def test_a_finer_grid_of_prices_changes_the_index_by_less_than_stated():
    assert np.nanmax(np.abs(GittinsIndex(12).table - GittinsIndex(12, grid=4096).table)) < 1e-4


def test_the_index_is_optimal_with_one_known_arm_but_not_in_general():
    """With several unknown arms and a horizon it loses next to nothing, but something: the optimum's simulated lead
    over the index is within its interval of zero, its exact value above what any index earns on the same tasks."""
    family = BernoulliBandit(5, 10)
    tasks = tasks_of(family, 20_000)
    lead, error = mean_and_error(
        earned(family, OptimalBandit(family), tasks) - earned(family, GittinsBandit(family), tasks)
    )
    assert abs(lead) < 4 * error and error < 0.002


# ------------------------------------------------------------------------------------------------ the bound
@pytest.mark.parametrize(("arms", "pulls"), [(1, 5), (2, 8), (5, 10), (10, 10)])
def test_no_prices_bound_below_the_optimum(arms, pulls):
    family = BernoulliBandit(arms, pulls)
    bound, price = relaxation_bound(family, 100)
    value = bayes_optimal(family).value
    assert value - 1e-9 <= bound <= 1.07 * value and len(price) == pulls


# ------------------------------------------------------------------------------------------------ the agents
def test_the_optimal_agent_earns_the_optimum_and_no_other_more():
    """20,000 tasks, 2 replicas: the optimum's simulated mean is its exact value, every other agent's is not above it,
    and those that are known to be worse are worse."""
    family = BernoulliBandit(5, 10)
    tasks = tasks_of(family, 20_000, seed=3)
    exact = bayes_optimal(family).value
    optimal = earned(family, OptimalBandit(family), tasks, replicas=2)
    mean, error = mean_and_error(optimal)
    assert abs(mean - exact) < 3.5 * error
    for name, agent in (agents(family) | {"UCB1": UCB1(family, 0.3, prior=True)}).items():
        lead, error = mean_and_error(earned(family, agent, tasks, replicas=2) - optimal)
        assert lead <= 3.5 * error
        assert (lead < -0.02) == (name not in ("optimal", "Gittins")), (name, lead)


@pytest.mark.parametrize("make", [BanditGreedy, BanditThompson, GittinsBandit, OptimalBandit, UCB1, Random])
def test_no_arm_is_favoured_for_its_number(make):
    """First pulls are spread evenly, and the expected reward of a task does not depend on how its arms are numbered."""
    family = BernoulliBandit(4, 6)
    tasks = tasks_of(family, 4000)
    first = trial(family, tasks, make(family), 1, 1, 0, progress=False).action[0, 0]
    assert (first.flatten().bincount(minlength=4).double() / 4000 - 0.25).abs().max() < 0.03
    flipped = tasks._replace(chance=tasks.chance.flip(-1))
    lead, error = mean_and_error(earned(family, make(family), tasks) - earned(family, make(family), flipped, seed=1))
    assert abs(lead) < 4 * error


def test_counts_are_those_of_the_pulls():
    family = BernoulliBandit(3, 12)
    tasks = tasks_of(family, 50)
    agent = GittinsBandit(family)
    done = trial(family, tasks, agent, 1, 4, 0, progress=False)
    pulled = torch.nn.functional.one_hot(done.action[0], 3)  # (T, M, N, arms)
    assert torch.equal(agent.success, (pulled * done.reward[0][..., None]).sum(0))
    assert torch.equal(agent.success + agent.failure, pulled.sum(0).to(agent.success))


def test_thompson_draws_from_the_posterior():
    """Interpolated quantiles against SciPy's, and the share of first pulls of two arms with known counts."""
    family = BernoulliBandit(2, 100)
    agent = BanditThompson(family)
    agent.begin(torch.zeros(1, 0), 1, 5000)
    agent.success[..., 0], agent.failure[..., 0] = 3.0, 5.0
    agent.success[..., 1], agent.failure[..., 1] = 0.0, 60.0
    luck = torch.rand(1, 5000, 2, generator=torch.Generator().manual_seed(0)).double().clamp(1e-6, 1 - 1e-6)
    draws = agent.index(luck)[0].numpy()
    for arm, law in enumerate((beta_law(4, 6), beta_law(1, 61))):
        assert np.abs(draws[:, arm] - law.ppf(luck[0, :, arm].numpy())).max() < 2e-4
    assert posterior_quantiles(100, (1, 1)).shape[:2] == (101, 101)


def test_optimism_never_draws_below_the_mean():
    family = BernoulliBandit(3, 20)
    agent = BanditThompson(family, optimistic=True)
    trial(family, tasks_of(family, 100), agent, 1, 1, 0, progress=False)
    luck = torch.rand(100, 1, 3, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    assert (agent.index(luck) >= agent.mean).all() and (agent.index(luck) > agent.mean).any()


def test_ucb1_tries_every_arm_and_then_follows_its_formula():
    family = BernoulliBandit(4, 9)
    tasks = tasks_of(family, 200)
    done = trial(family, tasks, UCB1(family, 0.7), 1, 1, 0, progress=False)
    assert torch.equal(done.action[0, :4].sort(0).values, torch.arange(4)[:, None, None].expand(4, 200, 1))
    agent = UCB1(family, 0.7)
    agent.begin(torch.zeros(1, 0), 1, 1)
    agent.success, agent.failure = torch.tensor([[[1.0, 0, 2, 0]]]), torch.tensor([[[1.0, 1, 1, 0]]])
    agent.pulled = 6
    index = agent.index(torch.zeros(1, 1, 4))[0, 0]
    assert index[2].item() == pytest.approx(2 / 3 + 0.7 * (2 * np.log(7) / 3) ** 0.5)
    assert index.argmax() == 3


def test_epsilon_explores_as_often_as_it_says():
    family = BernoulliBandit(10, 1)
    agent = BanditGreedy(family, 0.3)
    agent.begin(torch.zeros(1, 0), 1, 20_000)
    agent.success[..., 0] = 5.0
    noise = torch.rand(1, 20_000, 20, generator=torch.Generator().manual_seed(0))
    other = (agent.act(torch.zeros(1, 20_000, 2), noise) != 0).double().mean().item()
    assert other == pytest.approx(0.3 * 0.9, abs=0.015)


def test_scores_lie_between_blind_and_oracle():
    family = BernoulliBandit(5, 10)
    _, tasks = split(family, "test", 5000)
    score = normalised_score(
        earned(family, OptimalBandit(family), tasks), family.blind_return(tasks), family.oracle_return(tasks)
    )
    assert 0.4 < score < 0.6  # the Bayes-optimal policy, too, has to find out


@pytest.mark.parametrize("name", ["greedy", "Thompson", "optimistic Thompson", "Gittins", "optimal"])
def test_several_episodes_are_one_long_one(name):
    """A trial of 3 episodes of 4 pulls pulls the arms that one of 12 does; an agent that planned for less says so."""
    short, long = BernoulliBandit(3, 4), BernoulliBandit(3, 12)
    tasks = tasks_of(short, 50)
    luck = torch.rand(12, 50, 1, 6, generator=torch.Generator().manual_seed(0))

    def pulls(agent):
        agent.begin(torch.zeros(50, 0), 50, 1)
        found = []
        for now in luck:
            found.append(agent.act(torch.zeros(50, 1, 2), now))
            agent.observe(found[-1], tasks.chance.gather(1, found[-1]).round(), None, None)
        return torch.stack(found)

    assert torch.equal(pulls(agents(short, 3)[name]), pulls(agents(long)[name]))
    with pytest.raises(ValueError, match="pull 5 of a trial of 4: give the agent"):
        trial(short, tasks, agents(short)[name], 2, 1, 0, progress=False)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda f: BanditGreedy(f, 1.5), "BanditGreedy.epsilon"),
        (lambda f: BanditThompson(f, optimistic=1), "BanditThompson.optimistic"),
        (lambda f: UCB1(f, -1.0), "UCB1.width"),
        (lambda f: UCB1(f, prior="x"), "UCB1.prior"),
        (lambda f: BanditThompson(BernoulliBandit(2, 500)), "pulls = 500"),
    ],
)
def test_agents_refuse_bad_settings_by_name(build, name):
    with pytest.raises(ValueError, match=name):
        build(BernoulliBandit())


def test_an_index_must_be_given():
    agent = IndexAgent(BernoulliBandit())
    agent.begin(torch.zeros(1, 0), 1, 1)
    with pytest.raises(NotImplementedError):
        agent.act(torch.zeros(1, 1, 2), torch.zeros(1, 1, 10))


def test_the_number_of_sequences_is_what_enumeration_uses():
    """The probabilities of all reward sequences of a fixed policy sum to one."""
    total = sum(probability([(0, r) for r in rewards], (1, 1)) for rewards in product((0, 1), repeat=5))
    assert total == pytest.approx(1.0)
    assert probability([(0, 1), (0, 0)], (1, 1)) == pytest.approx(1 / (3 * comb(2, 1)))
    assert gittins_index(5) is gittins_index(5)


# ------------------------------------------------------------------------------------------------ what was played
def test_histories_are_the_counts_before_each_pull():
    family = BernoulliBandit(3, 7)
    agent, seen = BanditThompson(family), []
    act = agent.act

    def recorded(observation, noise):
        seen.append((agent.success, agent.failure))
        return act(observation, noise)

    agent.act = recorded
    done = trial(family, tasks_of(family, 20), agent, 1, 2, 0, progress=False)
    success, failure = histories(family, done.action[0], done.reward[0])
    assert torch.equal(success, torch.stack([s for s, _ in seen]))
    assert torch.equal(failure, torch.stack([f for _, f in seen]))


def test_a_gap_is_what_the_optimum_says_and_nothing_for_its_own_pulls():
    """By hand for two pulls: leaving an arm after a success costs 2/3 - 1/2, staying after a failure 1/2 - 1/3; the
    first pull costs nothing. What a rule that is exactly optimal gives away is 0 in every history."""
    family = BernoulliBandit(2, 2)
    action = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 0, 1]]])
    reward = torch.tensor([[[1.0, 1, 0, 0]], [[0.0, 1, 1, 0]]])
    expected = torch.tensor([[[0.0] * 4], [[0, 1 / 6, 1 / 6, 0]]])
    assert torch.allclose(optimality_gaps(family, action, reward), expected.to(reward), atol=1e-12)
    assert torch.allclose(
        posterior_reward(family, action, reward)[1, 0], torch.tensor([2 / 3, 1 / 2, 1 / 3, 1 / 2]).to(reward)
    )


def test_no_agent_has_a_negative_gap():
    family = BernoulliBandit(6, 8, (1, 3))
    for agent in agents(family).values():
        done = trial(family, tasks_of(family, 500), agent, 1, 1, 0, progress=False)
        gaps = optimality_gaps(family, done.action[0], done.reward[0])
        lost = gaps.sum(0).mean().item() / bayes_optimal(family).value
        assert (gaps >= 0).all()
        if isinstance(agent, OptimalBandit):
            assert lost < 1e-9
        elif isinstance(agent, GittinsBandit):
            assert lost < 2e-4
        else:
            assert lost > 4e-4


# ------------------------------------------------------------------------------------------------ the benchmark
def test_how_an_arm_is_left_is_counted():
    """Two episodes by hand. The first: arm 0 wins, fails (left for 1), arm 1 fails (stays), fails. The second: arm 2
    fails (left for 0), arm 0 fails (left for 1), arm 1 wins."""
    action = torch.tensor([[0, 2], [0, 0], [1, 1], [1, 1]])[..., None]
    reward = torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 0]])[..., None]
    found = bandit_benchmark.leaving(action, reward)
    assert found["after a failure"] == [1.0, 1.0, 0.0] and found["after a success"] == [0.0, 0.0, 0.0]
    assert found["first arm"] == {"0,1": [1, 1], "1,1": [1, 1]}


def test_stored_results_agree_with_the_exact_solution():
    """In every file: the optimum is that of the dynamic programme, no loss is negative, and the mean reward lies where
    optimum and loss say."""
    files = sorted(bandit_benchmark.RESULTS.glob("*.json"))
    assert len(files) == len(bandit_benchmark.PLANS)
    for file in files:
        stored = json.loads(file.read_text(encoding="utf-8"))
        parts = {name: part["result"] for name, part in stored["parts"].items()}
        everyone = list(parts["baselines"]["methods"].values())
        everyone += [found for entry in parts["rl2"].values() for found in entry["seeds"].values()]
        most = min(parts["baselines"]["bound"], parts["baselines"]["oracle"])
        assert all(found["reward"][0] - found["reward"][1] < most for found in everyone)
        assert all(abs(f["reward"][0] - f["expected"][0]) < 1.5 * f["reward"][1] for f in everyone)
        if stored["pulls"] == 10:
            value = bayes_optimal(BernoulliBandit(stored["arms"], 10)).value
            assert parts["baselines"]["optimum"] == pytest.approx(value, rel=1e-5)
            for found in everyone:
                assert found["fraction"][0] <= 1 + 1e-6
                slack = found["expected"][1] + found["value"][1]
                assert abs(found["expected"][0] - found["value"][0]) < 2 * slack + 1e-6
