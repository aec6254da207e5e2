"""Other people's learners train on every family as they come: PPO of Stable-Baselines3 on single environments, and a
script in the manner of CleanRL on the batch. Each must end far above the random policy, on episodes that it did not
train on."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics
from torch import nn

from ecomlib.gym import FAMILIES

pytestmark = pytest.mark.extended

TASK = 3
STANDARD_ERRORS = 5
"""By how many the mean return must exceed the random policy's."""
SHARE = {"Bidding": 0.7, "Inventory": 0.8, "Navigation": 0.8, "Pricing": 0.8, "Recommendation": 0.3}
"""Of the way from the random policy to the best one, the least that a learner must have gone."""


@pytest.fixture(autouse=True)
def single_precision(double_precision):
    torch.set_default_dtype(torch.float32)


def returns(name, act, episodes=400, **settings):
    """(episodes,) returns of the task under ``act``(observations) -> actions, on luck that no training met."""
    envs = gymnasium.make_vec(f"ecomlib/{name}-v0", episodes, task=TASK, autoreset_mode="Disabled", **settings)
    envs.action_space.seed(0)
    observation, _ = envs.reset(seed=10**6)
    total, alive = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while alive.any():
        action = envs.action_space.sample() if act is None else act(observation)
        observation, reward, terminated, truncated, _ = envs.step(action)
        total += reward * alive
        over = terminated | truncated
        alive &= ~over
        if over.any() and alive.any():
            observation, _ = envs.reset(options={"reset_mask": over})
    return total


def assert_learnt(name, act):
    """Far better than random, and not better than the best policy, which knows the task."""
    random, learnt = returns(name, None), returns(name, act)
    error = np.hypot(random.std(), learnt.std()) / np.sqrt(len(learnt))
    _, info = gymnasium.make(f"ecomlib/{name}-v0", task=TASK, oracle=True).reset()
    score = (learnt.mean() - random.mean()) / (info["oracle_return"] - random.mean())
    print(
        f"{name}: random {random.mean():.4g}, learnt {learnt.mean():.4g} +- {error:.2g}, share of the gap {score:.2f}"
    )
    assert learnt.mean() > random.mean() + STANDARD_ERRORS * error
    assert learnt.mean() < info["oracle_return"] + STANDARD_ERRORS * error
    return score


# ------------------------------------------------------------------------------------------ Stable-Baselines3
STEPS = {"Bidding": 30_000, "Inventory": 12_000, "Navigation": 30_000, "Pricing": 12_000, "Recommendation": 40_000}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_stable_baselines_accepts_the_environment(name):
    from stable_baselines3.common.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized.*")  # of the bids' space, [-5, 5]
        check_env(gymnasium.make(f"ecomlib/{name}-v0"))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_stable_baselines_ppo_learns(name):
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = make_vec_env(lambda: gymnasium.make(f"ecomlib/{name}-v0", task=TASK), n_envs=8, seed=0)
    envs = VecNormalize(envs, norm_obs=False)  # rewards of unit scale, as its zoo does it
    model = PPO("MlpPolicy", envs, n_steps=128, learning_rate=1e-3, seed=0, device="cpu")
    act = lambda observation: model.predict(observation, deterministic=True)[0]
    model.learn(STEPS[name])
    assert assert_learnt(name, act) > SHARE[name]


# ------------------------------------------------------------------------------------------ in the manner of CleanRL
class Agent(nn.Module):
    """``cleanrl/ppo.py``: separate networks for value and policy; independent choices in each dimension."""

    def __init__(self, envs):
        super().__init__()
        self.space = envs.single_action_space
        size = envs.single_observation_space.shape[0]
        choices = {Discrete: lambda s: [s.n], MultiDiscrete: lambda s: s.nvec.tolist(), Box: lambda s: [s.shape[0]]}
        self.sizes = [int(n) for n in choices[type(self.space)](self.space)]
        net = lambda out, gain: nn.Sequential(
            self.layer(size, 64), nn.Tanh(), self.layer(64, 64), nn.Tanh(), self.layer(64, out, gain)
        )
        self.critic, self.actor = net(1, 1.0), net(sum(self.sizes), 0.01)
        self.log_std = nn.Parameter(torch.zeros(sum(self.sizes)))

    @staticmethod
    def layer(fan_in, fan_out, gain=2**0.5):
        layer = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
        return layer

    def distributions(self, observation):
        output = self.actor(observation)
        if isinstance(self.space, Box):
            return [torch.distributions.Normal(output, self.log_std.exp())]
        return [torch.distributions.Categorical(logits=part) for part in output.split(self.sizes, -1)]

    def evaluate(self, observation, action=None):
        """Action, its log-probability, the entropy and the value."""
        found = self.distributions(observation)
        real = isinstance(self.space, Box)
        if action is None:
            action = found[0].sample() if real else torch.stack([d.sample() for d in found], -1)
        parts = [action] if real else action.unbind(-1)
        log_prob = sum(d.log_prob(part) for d, part in zip(found, parts))
        entropy = sum(d.entropy() for d in found)
        total = (lambda x: x.sum(-1)) if real else (lambda x: x)
        return action, total(log_prob), total(entropy), self.critic(observation)[:, 0]

    def sent(self, action):
        """What the environments take."""
        action = action.numpy()
        if isinstance(self.space, Box):
            return np.clip(action, self.space.low, self.space.high)
        return action[:, 0] if isinstance(self.space, Discrete) else action

    @torch.no_grad()
    def act(self, observation):
        """The most likely action."""
        found = self.distributions(torch.as_tensor(observation))
        best = found[0].mean if isinstance(self.space, Box) else torch.stack([d.probs.argmax(-1) for d in found], -1)
        return self.sent(best)


def train(envs, agent, iterations, steps, discount=0.99, gae_lambda=0.95, epochs=4, minibatches=4):
    """PPO as in ``cleanrl/ppo.py``. A truncated episode's last value is bootstrapped from its final observation."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-5)
    observation, ended = envs.reset(seed=1)[0], []
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - iteration / iterations)
        seen = {name: [] for name in ("observation", "action", "log_prob", "value", "reward", "done")}
        for _ in range(steps):
            with torch.no_grad():
                action, log_prob, _, value = agent.evaluate(torch.as_tensor(observation))
            following, reward, terminated, truncated, info = envs.step(agent.sent(action))
            if truncated.any():
                last = torch.as_tensor(np.stack(info["final_obs"][truncated]))
                with torch.no_grad():
                    reward[truncated] += discount * agent.critic(last)[:, 0].numpy()
            if "episode" in info:
                ended += info["episode"]["r"][info["_episode"]].tolist()
            row = observation, action, log_prob, value, reward, terminated | truncated
            for name, item in zip(seen, row):
                seen[name].append(torch.as_tensor(item).float() if name != "action" else action)
            observation = following
        data = {name: torch.stack(items) for name, items in seen.items()}
        advantage, rows = torch.zeros_like(data["value"]), []
        with torch.no_grad():
            value, advantage = agent.critic(torch.as_tensor(observation))[:, 0], 0.0
        for t in reversed(range(steps)):
            alive = 1 - data["done"][t]
            advantage = data["reward"][t] + discount * alive * (value + gae_lambda * advantage) - data["value"][t]
            value = data["value"][t]
            rows.append(advantage)
        data["advantage"] = torch.stack(rows[::-1])
        data["target"] = data["advantage"] + data["value"]
        flat = {name: item.flatten(0, 1) for name, item in data.items()}
        for _ in range(epochs):
            for index in torch.randperm(len(flat["value"])).chunk(minibatches):
                part = {name: item[index] for name, item in flat.items()}
                _, log_prob, entropy, value = agent.evaluate(part["observation"], part["action"])
                ratio, gain = (log_prob - part["log_prob"]).exp(), part["advantage"]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                clipped = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
                loss = 0.5 * 0.5 * (value - part["target"]).square().mean() - clipped - 0.01 * entropy.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    return np.array(ended)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_cleanrl_script_learns_on_the_batch(name):
    torch.manual_seed(0)
    envs = gymnasium.make_vec(f"ecomlib/{name}-v0", num_envs=128, task=TASK, autoreset_mode="SameStep")
    envs = NormalizeReward(RecordEpisodeStatistics(envs))
    agent = Agent(envs)
    ended = train(envs, agent, iterations=25, steps=50)
    assert assert_learnt(name, agent.act) > SHARE[name]
    tenth = len(ended) // 10
    assert ended[-tenth:].mean() > ended[:tenth].mean()  # as the curve of its own episodes says
