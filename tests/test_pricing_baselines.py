"""Pricing's own baselines: experiments pooled over stores, controlled variance, and every agent under a limit on price
changes."""

import pytest
import torch

from ecomlib.baselines import BayesUCB, EpsilonGreedy, GreedyBayes, Random, Thompson
from ecomlib.baselines.pricing import ControlledVariance, agents
from ecomlib.families import LogitPricing, split, take
from ecomlib.rollout import trial


@pytest.fixture
def shelf():
    return LogitPricing()


@pytest.fixture
def tasks(shelf):
    return split(shelf, "test", 200)[1]


class Recorder:
    """Another agent, with what it saw before each decision and what it was told."""

    def __init__(self, agent):
        self.agent, self.noise_size, self.log = agent, agent.noise_size, []
        self.begin, self.end_episode = agent.begin, agent.end_episode

    def act(self, observation, noise):
        action = self.agent.act(observation, noise)
        self.log.append((action, getattr(self.agent, "total", None), getattr(self.agent, "days", None)))
        return action

    def observe(self, action, reward, next_observation, done):
        self.agent.observe(action, reward, next_observation, done)


@pytest.mark.parametrize("stores", [False, True])
def test_controlled_variance_keeps_its_distance_from_the_average(shelf, tasks, stores):
    """Every price but the first is at least c t^(-1/4) from the mean of all earlier ones, computed here by hand."""
    agent = ControlledVariance(shelf, 0.35, 128, stores)
    done = trial(shelf, tasks, agent, 2, 3, seed=0, progress=False)
    markup = torch.tensor(shelf.markups)[done.action.flatten(0, 1)]  # (days, M, N)
    pool = (lambda x: x.mean(-1, keepdim=True)) if stores else (lambda x: x)
    for day in range(1, 28):
        average = pool(markup[:day].mean(0))
        count = day * (3 if stores else 1)
        assert ((markup[day] - average).abs() >= 0.35 * count**-0.25 - 1e-9).all()
    assert (markup[1:] != markup[:-1]).any()


def test_controlled_variance_posts_the_best_price_outside_the_interval(shelf, tasks):
    """By hand after a few days, for the most likely particle; with distance 0, its best price."""
    for distance in (0.0, 0.3):
        agent = ControlledVariance(shelf, distance, 256)
        trial(shelf, tasks, agent, 1, 1, seed=1, progress=False)
        observation = torch.zeros(200, 1, 6)
        mode = agent.belief.weight[:, 0].argmax(-1)
        p, markup = agent.belief.particles, torch.tensor(shelf.markups)
        profit = (markup - 1) * torch.sigmoid(p.utility[mode, None] - p.sensitivity[mode, None] * markup)
        outside = (markup - agent.total / agent.days).abs() >= distance * 14**-0.25
        best = torch.where(outside, profit, -1.0).argmax(-1)
        assert torch.equal(agent.act(observation, torch.zeros(200, 1, 1))[:, 0], best)
        assert (profit.argmax(-1) != best).any() == (distance > 0)


def test_forced_variation_pays_in_the_end(shelf):
    """In the fifth episode of products sold in one store, distance 0.1 is ahead of plain certainty equivalence, paired
    by product, by more than twice the standard error; both are ahead of the blind price."""
    _, tasks = split(shelf, "test", 600)
    blind = shelf.blind_return(tasks)

    def last_episode(distance):
        agent = ControlledVariance(shelf, distance, 1024)
        done = trial(shelf, tasks, agent, 5, 3, seed=0, progress=False)
        return shelf.mean_reward(tasks, done.action)[-1].sum(0).mean(-1)

    varied, plain = last_episode(0.1), last_episode(0.0)
    gain = varied - plain
    assert gain.mean() > 2 * gain.std() / 600**0.5
    assert blind.mean() < plain.mean() < varied.mean() < shelf.oracle_return(tasks).mean()


def test_epsilon_greedy_of_a_chain_tries_every_price_once_together(shelf, tasks):
    """Eleven stores try on average most prices on the first day; each price's average is over all stores."""
    recorder = Recorder(EpsilonGreedy(shelf, 0.0, stores=True))
    done = trial(shelf, tasks, recorder, 1, 11, seed=0, progress=False)
    tried = torch.zeros(200, 11).scatter(1, done.action[0, 0], 1.0)
    assert tried.sum(1).mean() > 6
    action, reward = (
        done.action[0],
        done.reward[0] / torch.tensor([shelf.weekday[t % 7] for t in range(14)])[:, None, None],
    )
    for price in (0, 4, 10):
        chosen = (action == price).double()
        assert torch.allclose(recorder.agent.total[:, 0, price], (reward * chosen).sum((0, 2)))
        assert torch.equal(recorder.agent.count[:, 0, price], chosen.sum((0, 2)))
    assert (recorder.agent.count > 0).all()
    assert torch.equal(done.action[0, -1], done.action[0, -1, :, :1].expand(-1, 11))  # without luck, one choice for all


def test_own_baselines_of_a_family_and_their_names(shelf, tasks):
    """Pooled over five stores both beat the blind price over the lifetime, and neither the oracle."""
    blind, oracle = shelf.blind_return(tasks).mean(), shelf.oracle_return(tasks).mean()
    for name, agent in agents(shelf, True).items():
        earned = trial(shelf, tasks, agent, 5, 5, seed=0, progress=False).returns.mean()
        assert name in ("epsilon-greedy", "controlled variance") and blind < earned < oracle


@pytest.mark.parametrize("stores", [False, True])
def test_under_a_limit_agents_learn_from_what_was_posted(tasks, stores):
    """What an agent knows after an episode is what the same belief learns from the prices that hung on the shelf."""
    limited, free = LogitPricing(changes_per_week=1), LogitPricing()
    agent = Thompson(limited, 128, stores)
    done = trial(limited, tasks, agent, 1, 4, seed=3, progress=False)
    posted = limited._carried_out(limited.markup(done.action))[0]
    assert (posted != limited.markup(done.action)[0]).any()
    index = (posted[..., None] - torch.tensor(free.markups)).abs().argmin(-1)  # (days, M, N)

    class Repeat(Thompson):
        def choose(self, observation, noise):
            return index[int(free.seen(observation).day[0, 0])]

    repeated = Repeat(free, 128, stores)
    again = trial(free, tasks, repeated, 1, 4, seed=3, progress=False)
    assert torch.equal(done.reward, again.reward)
    assert torch.allclose(agent.belief.weight, repeated.belief.weight, rtol=1e-9, atol=1e-12)
    experiment = EpsilonGreedy(limited, 0.1, stores)
    trial(limited, tasks, experiment, 1, 4, seed=3, progress=False)
    assert experiment.count.sum() == 14 * 4 * 200


def test_every_agent_keeps_to_the_limit(tasks):
    """Two changes of the posted price in a fortnight at most, whatever an agent asks for."""
    limited, few = LogitPricing(changes_per_week=1), take(tasks, slice(0, 40))
    build = (GreedyBayes, Thompson, BayesUCB)
    contenders = [kind(limited, 64) for kind in build] + list(agents(limited, False).values()) + [Random(limited)]
    for agent in contenders:
        action = trial(limited, few, agent, 2, 2, seed=0, progress=False).action
        posted = limited._carried_out(limited.markup(action))
        changes = (posted[:, 1:] != posted[:, :-1]).sum(1)
        assert changes.max() <= 2 and (changes > 0).any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ControlledVariance(LogitPricing(), -0.1), r"ControlledVariance.distance = -0.1; .*\[0, 0.725\]"),
        (lambda: ControlledVariance(LogitPricing(), 0.8), "ControlledVariance.distance = 0.8"),
        (lambda: ControlledVariance(LogitPricing(stock=5)), "no stock limit"),
        (lambda: EpsilonGreedy(LogitPricing(), 1.5), "epsilon = 1.5"),
    ],
)
def test_bad_settings_name_field_value_and_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()
