"""Random decision processes: prior, protocol, exact references; the agents that plan in a posterior of them."""

import numpy as np
import pytest
import torch
from scipy import stats

from ecomlib import noise
from ecomlib.baselines import Random
from ecomlib.baselines.tabular import PSRL, ConjugatePrior, ExplorationBonus, MDPPosterior, PosteriorMean
from ecomlib.families import sample_tasks, split, take
from ecomlib.families.random_mdps import RandomMDP
from ecomlib.families.tabular import TabularState, finite_horizon
from ecomlib.rollout import trial

SMALL = RandomMDP(states=3, actions=2, horizon=4)


@pytest.fixture(scope="module")
def family():
    return RandomMDP()


def some(family, count, seed=0):
    return sample_tasks(family, count, torch.Generator().manual_seed(seed))


class Seeing:
    """An agent that also keeps what it was shown."""

    def __init__(self, agent):
        self.agent, self.noise_size, self.steps = agent, agent.noise_size, []
        self.begin, self.end_episode = agent.begin, agent.end_episode

    def act(self, observation, noise):
        self.before = observation
        return self.agent.act(observation, noise)

    def observe(self, action, reward, next_observation, done):
        self.steps.append((self.before, action, reward, next_observation, done))
        self.agent.observe(action, reward, next_observation, done)


class Plan:
    """Plays a table (M, T, S) of actions of known worlds."""

    noise_size = 1

    def __init__(self, family, plan):
        self.family, self.plan = family, plan
        self.begin = self.observe = lambda *_: None
        self.end_episode = lambda: None

    def act(self, observation, noise):
        at = self.family.seen(observation)
        return self.plan[torch.arange(len(self.plan))[:, None], at.time, at.state]


# ------------------------------------------------------------------------------------------------ prior and protocol
def test_the_prior_is_that_of_the_published_experiment(family):
    """Means ~ Normal(1, 1) and rows ~ Dirichlet(1, ..., 1): every entry is Beta(1, 9); Kolmogorov and Smirnov."""
    tasks = some(family, 400)
    assert tasks.transition.shape == tasks.reward.shape == (400, 10, 5, 10)
    assert torch.allclose(tasks.transition.sum(-1), torch.ones(()), atol=1e-12)
    mean = tasks.reward[..., 0].flatten().numpy()
    assert stats.kstest(mean, stats.norm(1, 1).cdf).pvalue > 1e-3
    for entry in (0, 7):
        assert stats.kstest(tasks.transition[..., entry].flatten().numpy(), stats.beta(1, 9).cdf).pvalue > 1e-3
    product = (tasks.transition[..., 0] * tasks.transition[..., 1]).mean()
    assert product == pytest.approx(1 / 110, rel=0.03)  # E[p_0 p_1] of Dirichlet(1 x 10): 1 / (10 x 11)
    assert (tasks.reward == tasks.reward[..., :1]).all()


def test_a_task_is_a_function_of_its_id_and_reset_leaves_it(family):
    tasks = some(family, 20)
    again = family.tasks(tasks.id.flip(0))
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(tasks, again))
    trial(family, tasks, Random(family), 1, 2, 0, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(tasks, family.tasks(tasks.id)))
    assert family.prior_sample(64).reward[..., 0].mean() == pytest.approx(1.0, abs=0.05)


def test_steps_follow_the_tables():
    """Frequencies and rewards of 100,000 steps; the last step shows the start again."""
    tasks, count = some(SMALL, 1), 100_000
    luck = noise.uniform(0, tasks.id, torch.arange(count), 0, 0, noise.FAMILY, 2)
    here = TabularState(torch.full((1, count), 2), torch.zeros(1, count, dtype=torch.int64))
    after, reward, done = SMALL.step(tasks, here, torch.ones(1, count, dtype=torch.int64), luck)
    frequency = torch.bincount(after.state[0], minlength=3) / count
    assert torch.allclose(frequency, tasks.transition[0, 2, 1], atol=5 / count**0.5)
    noise_ = (reward[0] - tasks.reward[0, 2, 1, 0]).numpy()
    assert stats.kstest(noise_[:20_000], stats.norm(0, 1).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(after.state[0].numpy(), noise_)[0, 1]) < 5 / count**0.5
    assert not done.any() and (after.time == 1).all()
    late = here._replace(time=torch.full((1, count), 3))
    after, _, done = SMALL.step(tasks, late, torch.ones(1, count, dtype=torch.int64), luck)
    assert done.all() and (after.state == 0).all()


def test_observation_hides_the_task_and_seen_inverts_it(family):
    tasks = some(family, 30)
    state = TabularState(torch.arange(10).repeat(30, 1), torch.arange(10).repeat(30, 1))
    seen = family.observe(tasks, state)
    assert seen.shape == (30, 10, family.observation_size) and (seen == seen[:1]).all()
    assert all(torch.equal(a, b) for a, b in zip(family.seen(seen), state))
    assert family.context(tasks).shape == (30, 0)


def test_a_task_has_the_same_luck_in_any_batch(family):
    _, tasks = split(family, "test", 60)
    alone = trial(family, take(tasks, slice(5, 6)), Random(family), 2, 3, 0, progress=False)
    together = trial(family, tasks, Random(family), 2, 3, 0, progress=False)
    assert all(torch.equal(a, b[:, :, 5:6]) for a, b in zip(alone, together))


@pytest.mark.parametrize(
    "field, value",
    [("states", 0), ("states", 10**6), ("actions", 1), ("actions", 500), ("horizon", 0), ("noise", 0.0)],
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"RandomMDP.{field} = "):
        RandomMDP(**{field: value})


# ------------------------------------------------------------------------------------------------ references
def test_oracle_is_what_the_best_plan_earns():
    """Simulated returns of the plan by backward induction, within 5 standard errors, and no other plan of 50 beats
    it."""
    tasks = some(SMALL, 6)
    values = finite_horizon(tasks, 4)
    best = values.argmax(-1).transpose(0, 1)
    returns = trial(SMALL, tasks, Plan(SMALL, best), 1, 20_000, 0, progress=False).returns[0]
    error = returns.std(-1) / 20_000**0.5
    assert ((returns.mean(-1) - SMALL.oracle_return(tasks)).abs() < 5 * error).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        plan = torch.randint(2, (6, 4, 3), generator=generator)
        value = torch.zeros(6, 3)
        for step in reversed(range(4)):
            q = tasks.reward[..., 0] + (tasks.transition * value[:, None, None]).sum(-1)
            value = q.gather(-1, plan[:, step][..., None])[..., 0]
        assert (value[:, 0] <= SMALL.oracle_return(tasks) + 1e-12).all()


def test_blind_return_is_what_chance_earns():
    tasks = some(SMALL, 5)
    returns = trial(SMALL, tasks, Random(SMALL), 1, 20_000, 0, progress=False).returns[0]
    error = returns.std(-1) / 20_000**0.5
    assert ((returns.mean(-1) - SMALL.blind_return(tasks)).abs() < 5 * error).all()
    assert (SMALL.blind_return(tasks) <= SMALL.oracle_return(tasks)).all()


def test_shifted_rewards_are_lower(family):
    moved, tasks = split(family, "shifted", 400)
    assert tasks.reward.mean() == pytest.approx(0.0, abs=0.02)
    assert moved.blind_return(tasks).mean() == pytest.approx(0.0, abs=0.5)


# ------------------------------------------------------------------------------------------------ the posterior
def played(family, tasks, agent, episodes, replicas):
    agent = Seeing(agent)
    done = trial(family, tasks, agent, episodes, replicas, 3, progress=False)
    return agent, done


def test_posterior_counts_what_was_seen():
    """Its tables against loops over the steps; the last move of an episode does not count."""
    agent, _ = played(SMALL, some(SMALL, 3), PosteriorMean(SMALL, epsilon=0.5), 5, 2)
    posterior = agent.agent.posterior
    visits, rewards = np.zeros((3, 2, 3, 2)), np.zeros((3, 2, 3, 2))
    moves = np.zeros((3, 2, 3, 2, 3))
    for before, action, reward, after, done in agent.steps:
        for m in range(3):
            for n in range(2):
                s, a = before[m, n, :3].argmax().item(), action[m, n].item()
                visits[m, n, s, a] += 1
                rewards[m, n, s, a] += reward[m, n].item()
                if not done[m, n]:
                    moves[m, n, s, a, after[m, n, :3].argmax().item()] += 1
    assert np.array_equal(posterior.visits, visits) and np.array_equal(posterior.moves, moves)
    assert np.allclose(posterior.rewards, rewards) and moves.sum() == 0.75 * visits.sum()


def test_draws_have_the_posterior_distribution():
    """30,000 draws of one posterior: rewards Normal with its moments, entries of a row Beta(1 + n, S + total - 1 -
    n)."""
    posterior = MDPPosterior(SMALL, ConjugatePrior(0.5, 2.0), 1, 30_000, torch.device("cpu"))
    at = lambda state, time: TabularState(torch.full((1, 30_000), state), torch.full((1, 30_000), time))
    action, reward = torch.ones(1, 30_000, dtype=torch.int64), torch.full((1, 30_000), 1.7)
    for following in (0, 0, 2, 0):
        posterior.update(at(2, 0), action, reward, at(following, 1))
    posterior.update(at(2, 3), action, reward, at(0, 4))  # its last move does not count
    key = (noise.uniform(0, torch.zeros(1).long(), torch.arange(30_000), 0, 0, 0, 1)[..., 0] * 2**52).long()
    drawn = posterior.draw(key, 0)
    mean, deviation = (x[0, 0, 2, 1].item() for x in posterior.reward_moments())
    assert stats.kstest(drawn.reward[:, 2, 1, 0].numpy(), stats.norm(mean, deviation).cdf).pvalue > 1e-3
    assert stats.kstest(drawn.reward[:, 0, 0, 0].numpy(), stats.norm(0.5, 2.0).cdf).pvalue > 1e-3
    for following, count in enumerate((3, 0, 1)):
        entry = stats.beta(1 + count, 3 + 4 - 1 - count)
        assert stats.kstest(drawn.transition[:, 2, 1, following].numpy(), entry.cdf).pvalue > 1e-3
    assert stats.kstest(drawn.transition[:, 0, 0, 0].numpy(), stats.beta(1, 2).cdf).pvalue > 1e-3
    other = posterior.draw(key, 1)
    assert abs(np.corrcoef(drawn.reward[:, 2, 1, 0], other.reward[:, 2, 1, 0])[0, 1]) < 5 / 30_000**0.5
    assert torch.equal(posterior.draw(key, 0).transition, drawn.transition)


# ------------------------------------------------------------------------------------------------ the agents
def test_with_endless_data_all_agents_plan_as_the_oracle():
    """40,000 visits of every action that paid and led as the tables say: the values are the oracle's."""
    tasks, many = some(SMALL, 1), 40_000
    for agent in (PSRL(SMALL), PSRL(SMALL, draws=3), PosteriorMean(SMALL), ExplorationBonus(SMALL, bonus=2.0)):
        agent.begin(SMALL.context(tasks), 1, 1)
        posterior = agent.posterior
        posterior.visits += many
        posterior.rewards += many * tasks.reward[:, None, ..., 0]
        counts = (many * tasks.transition[:, None]).round()
        posterior.moves += counts
        moves = torch.arange(counts.numel()).repeat_interleave(counts.flatten().long())
        posterior.history.extend(moves.view(-1, 1, 1))
        values = agent.plan(torch.zeros(1, 1, dtype=torch.int64))
        assert torch.allclose(values, finite_horizon(tasks, 4), atol=0.06)
        assert not torch.allclose(values, finite_horizon(some(SMALL, 1, seed=5), 4), atol=0.3)


def test_posterior_sampling_comes_to_the_oracle():
    """In small worlds over 25 % of the way from chance to the oracle is lost in the first 3 episodes, under 5 % in the
    last 50 of 200."""
    tasks = some(SMALL, 40)
    returns = trial(SMALL, tasks, PSRL(SMALL), 200, 1, 0, progress=False).returns[..., 0]
    gap = (SMALL.oracle_return(tasks) - SMALL.blind_return(tasks)).mean()
    lost = (SMALL.oracle_return(tasks) - returns).mean(1) / gap
    assert lost[:3].mean() > 0.25
    assert lost[-50:].mean() < 0.05


def test_optimism_is_the_envelope_of_draws():
    tasks = some(SMALL, 5)
    agent, _ = played(SMALL, tasks, PSRL(SMALL, draws=3), 2, 2)
    key = torch.arange(10).view(5, 2)
    three = agent.agent.plan(key)
    single = torch.stack([finite_horizon(agent.agent.posterior.draw(key, i), 4) for i in range(3)])
    assert torch.equal(three, single.amax(0)) and (single != three).any()


def test_ties_are_broken_at_random():
    """Before anything is seen all actions are alike: each is taken as often, also by one episode in one state."""
    tasks = some(SMALL, 1)
    agent = PosteriorMean(SMALL)
    agent.begin(SMALL.context(tasks), 1, 4000)
    observation = SMALL.observe(tasks, SMALL.reset(tasks, 4000, torch.zeros(1, 4000, 2)))
    draw = lambda t: noise.uniform(0, tasks.id, torch.arange(4000), 0, t, noise.AGENT, 3)
    first, second = agent.act(observation, draw(0)), agent.act(observation, draw(1))
    assert first.double().mean() == pytest.approx(0.5, abs=0.04)
    assert (first == second).double().mean() == pytest.approx(0.5, abs=0.04)


def test_epsilon_is_the_share_of_random_actions():
    tasks = some(SMALL, 1)
    agent = PosteriorMean(SMALL, epsilon=0.3)
    agent.begin(SMALL.context(tasks), 1, 20_000)
    agent.posterior.visits += 1
    agent.posterior.rewards[..., 0] += 9.0  # action 0 is the better one everywhere
    observation = SMALL.observe(tasks, SMALL.reset(tasks, 20_000, torch.zeros(1, 20_000, 2)))
    action = agent.act(observation, noise.uniform(0, tasks.id, torch.arange(20_000), 0, 0, noise.AGENT, 3))
    assert action.double().mean() == pytest.approx(0.15, abs=0.013)


def test_published_returns_of_ten_episodes(family):
    """Posterior sampling and greedy plans with the priors of the published comparison's program, 138.1 and 134.8 in
    its table (1,000 tasks each, standard error about 0.8); chance 100.1. Both means carry noise: 3 standard errors."""
    _, tasks = split(family, "test", 1000)
    for agent, published in (
        (PSRL(family, ConjugatePrior(mean=0.0)), 138.1),
        (PosteriorMean(family, ConjugatePrior(0.0, 100.0, 1e-4)), 134.8),
        (Random(family), 100.1),
    ):
        returns = trial(family, tasks, agent, 10, 1, 0, progress=False).returns.sum(0)[:, 0]
        error = (2 / 1000) ** 0.5 * returns.std()
        assert abs(returns.mean() - published) < 3 * error


def test_no_agent_exceeds_the_oracle_and_all_beat_chance(family):
    _, tasks = split(family, "test", 300)
    oracle, blind = family.oracle_return(tasks).mean(), family.blind_return(tasks).mean()
    for agent in (PSRL(family), PosteriorMean(family), ExplorationBonus(family, bonus=0.5)):
        mean = trial(family, tasks, agent, 6, 1, 0, progress=False).returns.mean((1, 2))
        assert (mean < oracle).all() and mean[1:].mean() > blind + 1


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda f: PSRL(f, draws=0), "PSRL.draws = 0"),
        (lambda f: PSRL(f, ConjugatePrior(concentration=0.5)), "concentration = 0.5"),
        (lambda f: PosteriorMean(f, epsilon=1.5), "PosteriorMean.epsilon = 1.5"),
        (lambda f: ExplorationBonus(f, bonus=-1.0), "ExplorationBonus.bonus = -1.0"),
        (lambda f: ConjugatePrior(deviation=0.0), "ConjugatePrior.deviation = 0.0"),
    ],
)
def test_agents_check_their_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build(SMALL)
