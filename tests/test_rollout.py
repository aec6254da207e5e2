"""Rollouts and trials: masks, returns, whose luck it is, and what an agent is told."""

import pytest
import torch

from ecomlib.families.base import split, take
from ecomlib.families.pricing import LogitPricing
from ecomlib.families.tabular import STATES, ShopMDP
from ecomlib.policies import CategoricalMLP
from ecomlib.rollout import rollout, trial

SHOP = ShopMDP()
POLICY = CategoricalMLP((SHOP.observation_size, SHOP.actions))
UNIFORM = [torch.zeros(n, SHOP.actions, dtype=torch.float64) for n in (SHOP.observation_size, 1)]


@pytest.fixture
def tasks():
    return split(SHOP, "test", 6)[1]


class Scripted:
    """Plays the action that `choose(episode, step)` says, and keeps what it was told."""

    noise_size = 1

    def __init__(self, choose):
        self.choose = choose

    def begin(self, context, tasks, episodes):
        self.shape, self.calls, self.told = (tasks, episodes), ["begin"], []
        self.episode = self.step = 0

    def act(self, observation, noise):
        assert noise.shape == (*self.shape, 1) and observation.shape[:2] == self.shape
        self.calls.append("act")
        return torch.full(self.shape, self.choose(self.episode, self.step))

    def observe(self, action, reward, next_observation, done):
        self.calls.append("observe")
        self.told.append((reward, next_observation, done))
        self.step += 1

    def end_episode(self):
        self.calls.append("end_episode")
        self.episode, self.step = self.episode + 1, 0


def states(observation):
    return observation[..., : len(STATES)].argmax(-1)


def test_shapes_masks_and_rewards(tasks):
    """A session is masked from the step after it was bought or left; every reward is the one in the task's table."""
    data = rollout(SHOP, tasks, POLICY, UNIFORM, 50, seed=0)
    assert data.observation.shape == (6, 6, 50, SHOP.observation_size)
    assert all(x.shape == (6, 6, 50) for x in (data.action, data.log_prob, data.reward, data.mask))
    state = states(data.observation)
    over = state >= STATES.index("bought")
    assert torch.equal(data.mask, (~over).to(data.mask.dtype)) and over.any() and not over.all()
    assert not data.reward[over].any()
    task = torch.arange(6)[:, None].expand(6, 50)
    for t in range(5):
        wanted = tasks.reward[task, state[t], data.action[t], state[t + 1]]
        assert torch.equal(data.reward[t], wanted * data.mask[t])
    assert torch.equal(data.log_prob, POLICY.log_prob(UNIFORM, data.observation, data.action))
    assert torch.equal(data.returns, data.reward.sum(0)) and data.returns.any()


def test_nothing_is_earned_after_the_end(tasks):
    """Even where a task's table pays for staying in a finished session."""
    reward = tasks.reward.clone()
    reward[:, STATES.index("bought") :] = 5.0
    paying = tasks._replace(reward=reward)
    data, free = (rollout(SHOP, x, POLICY, UNIFORM, 50, seed=0) for x in (paying, tasks))
    assert torch.equal(data.reward, free.reward) and (data.mask == 0).any()
    found, free = (trial(SHOP, x, Scripted(lambda e, t: 1), 2, 50, seed=0, progress=False) for x in (paying, tasks))
    assert torch.equal(found.reward, free.reward)


def test_rollout_has_no_gradient(tasks):
    leaves = [p.clone().requires_grad_() for p in UNIFORM]
    data = rollout(SHOP, tasks, POLICY, leaves, 4, seed=0)
    assert not any(x.requires_grad for x in data)


def test_luck_is_named_by_seed_episode_and_task(tasks):
    data = rollout(SHOP, tasks, POLICY, UNIFORM, 20, seed=3, episode=2)
    again = rollout(SHOP, tasks, POLICY, UNIFORM, 20, seed=3, episode=2)
    assert all(torch.equal(x, y) for x, y in zip(data, again, strict=True))
    for other in ({"seed": 4, "episode": 2}, {"seed": 3, "episode": 1}):
        assert not torch.equal(data.reward, rollout(SHOP, tasks, POLICY, UNIFORM, 20, **other).reward)
    alone = rollout(SHOP, take(tasks, [4]), POLICY, UNIFORM, 5, seed=3, episode=2)
    assert all(torch.equal(x[:, 4:5, :5], y) for x, y in zip(data, alone, strict=True))


def test_replicas_are_independent(tasks):
    """1,000 replicas of one session: all different luck, no correlation of one replica with the next."""
    data = rollout(SHOP, take(tasks, [0]), POLICY, UNIFORM, 1000, seed=0)
    paths = torch.cat((states(data.observation), data.action))[:, 0].T
    assert len(paths.unique(dim=0)) > 300
    first = data.action[0, 0].float()
    assert abs(torch.corrcoef(torch.stack((first[:-1], first[1:])))[0, 1]) < 4 / 999**0.5


def test_two_agents_meet_the_same_luck():
    """They differ only in the second of three episodes, so the first and the third are equal to the last cent."""
    family = LogitPricing()
    _, markets = split(family, "test", 5)
    same = trial(family, markets, Scripted(lambda e, t: 4), 3, 8, seed=0, progress=False)
    other = trial(family, markets, Scripted(lambda e, t: 6 if e == 1 else 4), 3, 8, seed=0, progress=False)
    assert torch.equal(same.reward[::2], other.reward[::2]) and not torch.equal(same.reward[1], other.reward[1])
    assert torch.equal(other.action[1], torch.full_like(other.action[1], 6))


def test_trial_and_rollout_meet_the_same_luck(tasks):
    """A policy that always recommends, and an agent that does, earn the same in each episode of a trial."""
    certain = [UNIFORM[0], torch.tensor([[-1e9, 0.0, -1e9]])]
    found = trial(SHOP, tasks, Scripted(lambda e, t: 1), 3, 10, seed=5, progress=False)
    assert found.reward.shape == found.action.shape == (3, SHOP.horizon, 6, 10)
    assert found.returns.shape == (3, 6, 10) and torch.equal(found.returns, found.reward.sum(1))
    for episode in range(3):
        assert torch.equal(found.reward[episode], rollout(SHOP, tasks, POLICY, certain, 10, 5, episode).reward)


def test_a_trial_of_fewer_tasks_or_replicas_is_a_part_of_the_larger(tasks):
    agent = Scripted(lambda e, t: t % 3)
    large = trial(SHOP, tasks, agent, 2, 12, seed=1, progress=False)
    small = trial(SHOP, take(tasks, [2, 5]), agent, 2, 3, seed=1, progress=False)
    assert torch.equal(large.reward[:, :, [2, 5], :3], small.reward)


def test_an_agent_is_called_in_order_and_told_no_reward_after_the_end(tasks):
    agent = Scripted(lambda e, t: 1)
    trial(SHOP, tasks, agent, 2, 30, seed=0, progress=False)
    one = ["act", "observe"] * SHOP.horizon + ["end_episode"]
    assert agent.calls == ["begin", *one, *one]
    ended = torch.zeros(6, 30, dtype=torch.bool)
    for reward, seen, done in agent.told[: SHOP.horizon]:
        assert not reward[ended].any()
        ended |= done
        assert (states(seen) >= STATES.index("bought"))[ended & (seen[..., -1] < 1)].all()
    assert ended.all()


def test_numbers_below_one_are_refused(tasks):
    with pytest.raises(ValueError, match="episodes = 0"):
        rollout(SHOP, tasks, POLICY, UNIFORM, 0, seed=0)
    agent = Scripted(lambda e, t: 1)
    with pytest.raises(ValueError, match="episodes_per_trial = 0"):
        trial(SHOP, tasks, agent, 0, 1, seed=0, progress=False)
    with pytest.raises(ValueError, match="replicas = 0"):
        trial(SHOP, tasks, agent, 1, 0, seed=0, progress=False)
