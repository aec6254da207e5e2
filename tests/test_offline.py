"""Learning from logs: what is fed to the memory, what the loss is, and what its three targets lead to."""

import pytest
import torch

from ecomlib.baselines import Random
from ecomlib.baselines.bandits import BanditGreedy
from ecomlib.families import LogitPricing
from ecomlib.families.bandits import BernoulliBandit
from ecomlib.learners.offline import Offline, OfflineConfig, TrialLog, record_trials
from ecomlib.learners.rl2 import RL2, RL2Config
from ecomlib.rollout import trial

BANDIT = BernoulliBandit(3, 6)


def best_arms(family, tasks):
    """A teacher: the best arm, which only the simulator knows."""
    return lambda seen, task: tasks.chance[task].argmax(-1)[:, None].expand(seen.shape[:2])


def logged(agent, tasks=40, replicas=4, teacher=best_arms, family=BANDIT, units=1, episodes=1):
    return record_trials(family, torch.arange(tasks), agent, episodes, units, replicas, 5, teacher)


def config(**settings):
    return OfflineConfig(**({"episodes": 1, "memory": "sum", "hidden": 16, "replicas": 4, "tasks": 10} | settings))


def test_a_log_is_what_the_agent_met():
    log = logged(BanditGreedy(BANDIT))
    assert log.action.shape == log.reward.shape == log.label.shape == (6, 160, 1) and log.after.shape == (6, 160, 1, 2)
    assert torch.equal(log.after[:-1], log.observation[1:])
    tasks = BANDIT.tasks(torch.arange(40).repeat_interleave(4))
    luck = 5 + torch.arange(4).repeat(40)
    again = trial(BANDIT, tasks, BanditGreedy(BANDIT), 1, 1, luck, progress=False)
    assert torch.equal(again.reward[0], log.reward) and torch.equal(again.action[0], log.action)
    assert torch.equal(log.label[0, ::4, 0], tasks.chance[::4].argmax(-1))
    assert (log.reward[:, 0::4] != log.reward[:, 1::4]).any()  # trials of a task have a luck of their own each


@pytest.mark.parametrize("family, units, pooled", [(LogitPricing(days=3), 1, True), (LogitPricing(days=3), 4, True)])
@pytest.mark.parametrize("memory", ["gru", "sum", "attention"])
def test_a_memory_is_fed_what_it_would_have_been_fed(family, units, pooled, memory):
    """Inputs made from a log are those that the policy itself recorded when it played it."""
    online = RL2(family, RL2Config(episodes=2, units=units, memory=memory, hidden=8))
    agent = online.agent(online.initial(torch.Generator().manual_seed(0)), record=True)
    log = record_trials(family, torch.arange(5), agent, 2, units, 2, seed=3)
    learner = Offline(family, log, OfflineConfig(episodes=2, memory=memory, hidden=8, replicas=2, pooled=pooled))
    assert learner.inputs.unit == log.reward.abs().mean() + 1e-9
    learner.inputs.unit = online.inputs.unit
    assert torch.equal(learner.memory_inputs(log), agent.recorded.inputs)


def test_without_weights_the_loss_is_the_surprise():
    log = logged(Random(BANDIT))
    parts = {}
    for target in ("log", "oracle"):
        learner = Offline(BANDIT, log, config(target=target))
        meta = learner.initial(torch.Generator().manual_seed(1))
        batch = learner.objective(log, meta, 0, 0)
        policy = learner.policy
        log_prob = policy.log_prob(meta, batch.inputs, batch.log.action if target == "log" else batch.log.label)
        parts[target] = learner.loss(meta, batch)[0]
        assert torch.allclose(parts[target], -log_prob.mean())
    assert parts["log"] != parts["oracle"]


def test_weights_prefer_what_turned_out_better():
    """Endless temperature is plain imitation of the log; a low one weighs the trials of a task that earned more."""
    log = logged(Random(BANDIT))
    gradients = {}
    for temperature in (1e9, 0.5):
        learner = Offline(BANDIT, log, config(temperature=temperature))
        meta = [p.requires_grad_() for p in learner.initial(torch.Generator().manual_seed(1))]
        batch = learner.objective(log, meta, 0, 0)
        loss, numbers = learner.loss(meta, batch)
        gradients[temperature] = torch.autograd.grad(loss, meta)[-2]
        share = numbers["share of the weights"]
        assert share == pytest.approx(1.0) if temperature > 1 else share < 0.8
    plain = Offline(BANDIT, log, config(target="log"))
    wanted = torch.autograd.grad(plain.loss(meta, batch)[0], meta, allow_unused=True)[-2]
    assert torch.allclose(gradients[1e9], wanted, atol=1e-8) and not torch.allclose(gradients[0.5], wanted, atol=1e-4)


def test_an_iteration_takes_whole_tasks_of_the_log():
    log = logged(Random(BANDIT))
    learner = Offline(BANDIT, log, config())
    marked = log._replace(reward=torch.arange(160.0)[None, :, None].expand(6, 160, 1))
    found = learner.objective(marked, learner.initial(torch.Generator()), 0, 3).log.reward[0, :, 0].view(10, 4)
    assert (found[:, 0] % 4 == 0).all() and (found - found[:, :1] == torch.arange(4)).all()
    assert len(found[:, 0].unique()) == 10
    other = learner.objective(marked, learner.initial(torch.Generator()), 0, 4).log.reward[0, :, 0].view(10, 4)
    assert not torch.equal(found, other)


def test_it_imitates_an_agent_that_learns():
    """The logged agent repeats an arm that paid and takes the next one after a failure: the copy does so in trials
    that it never saw."""

    class StayOrShift:
        noise_size = 1

        def begin(self, context, tasks, episodes):
            self.arm = torch.zeros(tasks, episodes, dtype=torch.int64)

        def act(self, observation, noise):
            return self.arm

        def observe(self, action, reward, next_observation, done):
            self.arm = torch.where(reward > 0, action, (action + 1) % 3)

        end_episode = staticmethod(lambda: None)

    log = logged(StayOrShift(), tasks=200)
    learner = Offline(BANDIT, log, config(target="log", memory="gru", tasks=50, lr=1e-2))
    state = learner.meta_train(log, 0, 250, progress=False)
    tasks = BANDIT.tasks(torch.arange(1000, 1200))
    for sample, least in ((False, 0.99), (True, 0.95)):
        played = trial(BANDIT, tasks, learner.agent(state.meta, sample), 1, 1, 9, progress=False)
        action, reward = played.action[0], played.reward[0]
        rule = torch.where(reward[:-1] > 0, action[:-1], (action[:-1] + 1) % 3)
        assert (action[1:] == rule).double().mean() > least


def test_weighted_imitation_of_chance_learns_to_choose():
    """From logs of random arms: imitation earns what chance does; weighted imitation more, clearly so by its most
    likely actions."""
    log, earned = logged(Random(BANDIT), tasks=300, replicas=8), {}
    tasks = BANDIT.tasks(torch.arange(10**6, 10**6 + 3000))
    for target in ("log", "advantage"):
        settings = config(target=target, by_action=True, replicas=8, tasks=64, lr=1e-2, temperature=0.25, gae_lambda=0)
        learner = Offline(BANDIT, log, settings)
        state = learner.meta_train(log, 0, 80, progress=False)
        for sample in (True, False):
            played = trial(BANDIT, tasks, learner.agent(state.meta, sample), 1, 1, 9, progress=False)
            earned[target, sample] = played.returns.mean()
    assert earned["log", True] == pytest.approx(3.0, abs=0.1)
    assert earned["advantage", True] > earned["log", True] + 0.05 and earned["advantage", False] > 3.4


def test_iterations_go_on_as_if_never_stopped():
    log = logged(Random(BANDIT))
    learner = Offline(BANDIT, log, config(anneal=6))
    whole = learner.meta_train(log, 2, 6, progress=False)
    half = learner.meta_train(log, 2, 3, progress=False)
    again = learner.meta_train(log, 2, 6, start=half, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.meta, again.meta)) and whole.history == again.history


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target": "best"}, "OfflineConfig.target = 'best'"),
        ({"temperature": 0.0}, "OfflineConfig.temperature = 0.0"),
        ({"replicas": 1}, "OfflineConfig.replicas = 1"),
        ({"memory": "lstm"}, "OfflineConfig.memory = 'lstm'"),
        ({"hidden": 10**9}, "OfflineConfig.hidden"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_logs_are_checked():
    log = logged(Random(BANDIT), teacher=None)
    learner = Offline(BANDIT, log, config(target="oracle"))
    meta = learner.initial(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="source.label = None"):
        learner.objective(log, meta, 0, 0)
    short = TrialLog(*(None if x is None else x[:4] for x in log))
    with pytest.raises(ValueError, match=r"source.action.shape = \(4, 160, 1\)"):
        learner.objective(short, meta, 0, 0)
    with pytest.raises(ValueError, match="units = 0"):
        record_trials(BANDIT, torch.arange(3), Random(BANDIT), 1, 0, 1, 0)
