"""Chapter "Memory and belief", learning from logs: both sides of every numbered equation."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import beta

from ecomlib.baselines import Random
from ecomlib.families.bandits import BernoulliBandit
from ecomlib.learners.offline import Offline, OfflineConfig, record_trials
from ecomlib.learners.rl2 import trial_advantages


def test_weighted_imitation_is_the_sum_over_the_log():
    """(eq-distillation): the loss against loops over trials and steps; with one target or weight it is plain."""
    family = BernoulliBandit(2, 4)
    log = record_trials(family, torch.arange(6), Random(family), 1, 1, 3, 0)
    settings = {"episodes": 1, "memory": "gru", "hidden": 8, "tasks": 6, "replicas": 3, "temperature": 0.7}
    learner = Offline(family, log, OfflineConfig(**settings, most_weight=3.0))
    meta = learner.initial(torch.Generator().manual_seed(0))
    batch = learner.objective(log, meta, 0, 0)
    output, value = learner.policy.network.outputs_and_values(meta, batch.inputs)
    advantage, target = trial_advantages(batch.log.reward, value, 3, True, 0.97, 1.0)
    weights, total = [], 0.0
    for trial_ in range(18):
        for step in range(4):
            weights.append(min(3.0, np.exp(advantage[step, trial_, 0].item() / 0.7)))
    for number, (trial_, step) in enumerate((m, t) for m in range(18) for t in range(4)):
        log_probs = torch.log_softmax(output[step, trial_, 0], -1)
        chosen = batch.log.action[step, trial_, 0].item()
        total -= weights[number] / sum(weights) * log_probs[chosen].item()
    missed = ((value - target) ** 2).mean().item()
    assert learner.loss(meta, batch)[0].item() == pytest.approx(total + 0.5 * missed, rel=1e-10)
    assert max(weights) == 3.0


def test_decision_pretraining_is_posterior_sampling():
    """(eq-pretraining): trained on labels of the best arm, the policy takes an arm as often as the posterior holds it
    to be the best: two arms, six pulls, against the exact probability that one Beta variable exceeds another."""
    family = BernoulliBandit(2, 6)
    best = lambda family, tasks: lambda seen, task: tasks.chance[task].argmax(-1)[:, None].expand(seen.shape[:2])
    log = record_trials(family, torch.arange(8000), Random(family), 1, 1, 1, 0, best)
    settings = {"episodes": 1, "memory": "sum", "hidden": 32, "by_action": True, "tasks": 500, "replicas": 1}
    learner = Offline(family, log, OfflineConfig(**settings, target="oracle", lr=1e-2, anneal=150))
    state = learner.meta_train(log, 0, 150, progress=False)
    fresh = record_trials(family, torch.arange(10**6, 10**6 + 400), Random(family), 1, 1, 1, 1)
    chosen = learner.policy.log_probs(state.meta, learner.memory_inputs(fresh)).exp()[..., 0, 0]  # (L, M), arm 0

    def exact(s, f):
        first, second = beta(1 + s[0], 1 + f[0]), beta(1 + s[1], 1 + f[1])
        return quad(lambda p: first.pdf(p) * second.cdf(p), 0, 1)[0]

    known, missed = {}, []
    for m in range(400):
        s, f = [0, 0], [0, 0]
        for step in range(6):
            key = (*s, *f)
            if key not in known:
                known[key] = exact(s, f)
            missed.append(abs(chosen[step, m].item() - known[key]))
            arm, reward = fresh.action[step, m, 0].item(), fresh.reward[step, m, 0].item()
            s[arm], f[arm] = s[arm] + int(reward), f[arm] + 1 - int(reward)
    assert np.mean(missed) < 0.025
    assert np.std(list(known.values())) > 0.2
