"""The benchmark of learners with a memory: it runs, what it stores can be played again, and its parts do what they
say."""

import json

import pytest
import torch

from benchmarks import memory_learners
from benchmarks.bayes_teacher import TaughtByBayes, Watched
from benchmarks.posterior_policy import IndexAgent
from ecomlib.baselines import BayesUCB, GreedyBayes, Random
from ecomlib.evaluation.memory_studies import MemoryStudies
from ecomlib.families import LogitPricing
from ecomlib.families.base import split
from ecomlib.learners.rl2 import RL2Config
from ecomlib.rollout import trial

FAMILY = LogitPricing(days=4)


@pytest.mark.parametrize("learner", ["rl2", "belief", "posterior"])
def test_a_quick_run_is_stored_and_played_again(learner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # returns of single tasks are cached below the working directory
    memory_learners.Comparison("pricing", learner, tmp_path, quick=True).make()
    content = json.loads((tmp_path / f"pricing-{learner}.json").read_text())
    assert set(content["seeds"]) == {"0", "1"} and len(content["seeds"]["0"]["curve"]) == 2
    assert {d["against"] for d in content["result"]["differences"]} == {"greedy Bayes", "Thompson"}
    assert len(MemoryStudies(tmp_path).difference("shifted")) == 2
    before = (tmp_path / f"pricing-{learner}-1.safetensors").read_bytes()
    again = memory_learners.Comparison("pricing", learner, tmp_path, quick=True)
    sample = content["result"]["actions are"] == "drawn"
    score = memory_learners.scores(again.returns("test", sample), again.study.setting("test"))["lifetime"]["score"]
    assert score == content["result"]["scores"][0]["lifetime"]["score"]
    second = again.learner.agent(memory_learners.load_parameters(again.parameters_path(1)), sample)
    alone = memory_learners.played(second, again.study.setting("test"), 1, again.protocol)
    alone = memory_learners.scores(memory_learners.Returns.of_agent(alone), again.study.setting("test"))
    by_seed = content["result"]["scores"][0]["by seed"][1]
    assert [r["score"] for r in alone["rounds"]] == pytest.approx(by_seed, rel=1e-3)
    again.make()  # nothing is missing
    assert (tmp_path / f"pricing-{learner}-1.safetensors").read_bytes() == before
    (tmp_path / f"pricing-{learner}-1.safetensors").unlink()
    memory_learners.Comparison("pricing", learner, tmp_path, quick=True).make()
    assert (tmp_path / f"pricing-{learner}-1.safetensors").read_bytes() == before


def test_a_difference_is_that_of_the_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = memory_learners.Comparison("pricing", "rl2", tmp_path, quick=True)
    made.make()
    where, result = made.study.setting("test"), made.content["result"]
    theirs = memory_learners.scores(made.rival_returns("Thompson", "test"), where)["lifetime"]["score"]
    ours = result["scores"][0]["lifetime"]["score"]
    lead = [d for d in result["differences"] if (d["rival"], d["split"], d["of"]) == ("Thompson", "test", "lifetime")]
    assert lead[0]["difference"] == pytest.approx(ours - theirs, abs=1e-3)


@pytest.mark.parametrize(("name", "learner"), [("pricing", "rl2"), ("inventory", "belief"), ("pricing", "posterior")])
def test_a_stored_learner_plays(name, learner):
    made, parameters = memory_learners.load(name, learner, 3)
    family = memory_learners.default_config(name, "ppo-maml").family
    _, tasks = split(family, "test", 20)
    earned = trial(family, tasks, made.agent(parameters), 1, 1, 0, progress=False).returns.mean()
    assert earned > 1.2 * trial(family, tasks, Random(family), 1, 1, 0, progress=False).returns.mean()


@pytest.mark.parametrize(("width", "rival"), [(0.0, GreedyBayes), (1.0, BayesUCB)])
def test_the_first_learned_optimism_is_the_bayesian_rule(width, rival):
    _, tasks = split(FAMILY, "train", 20)
    rule = torch.zeros(1, 6)
    rule[0, 0] = width
    ours = trial(FAMILY, tasks, IndexAgent(FAMILY, rule, 2, 64), 2, 1, 0, progress=False).action
    theirs = trial(FAMILY, tasks, rival(FAMILY, 64, stores=True), 2, 1, 0, progress=False).action
    torch.testing.assert_close(ours, theirs)


def test_rules_side_by_side_play_as_each_alone():
    _, tasks = split(FAMILY, "train", 10)
    rules = torch.tensor([[1.0, 0.5, 0.1, 0.2, -0.3, 0.4], [0.0, 0.0, 0.0, 0.5, 0.0, -0.5]])
    twice = FAMILY.tasks(tasks.id.repeat(2))
    both = trial(FAMILY, twice, IndexAgent(FAMILY, rules, 2, 64), 2, 1, 0, progress=False).reward
    for i, rule in enumerate(rules):
        alone = trial(FAMILY, tasks, IndexAgent(FAMILY, rule[None], 2, 64), 2, 1, 0, progress=False).reward
        torch.testing.assert_close(both[:, :, 10 * i : 10 * i + 10], alone)


def test_a_taught_memory_learns_the_bayesians_decisions():
    """After the learner's own history, not the expert's: the expert sees every action the learner takes."""
    config = RL2Config(episodes=2, hidden=16, tasks=16, replicas=8, pretrain=30, anneal=30, lr=1e-2)
    learner = TaughtByBayes(FAMILY, config, "greedy Bayes")
    state = learner.meta_train(FAMILY, 0, 30, progress=False)
    first, last = state.history[0]["surprise"], state.history[-1]["surprise"]
    assert last < 0.75 * first
    agent, expert = learner.agent(state.meta), GreedyBayes(FAMILY, 64, stores=True)
    _, tasks = split(FAMILY, "test", 20)
    watched = Watched(agent, expert)
    played = trial(FAMILY, tasks, watched, 2, 1, 0, progress=False).action.flatten(0, 1)
    assert len(watched.labels) == len(played) == 8
    counts = torch.nn.functional.one_hot(played, FAMILY.actions).sum(0)
    torch.testing.assert_close((expert.belief.exposure > 0), counts > 0)


def test_ppo_has_a_step_size_of_its_own():
    config = RL2Config(episodes=2, hidden=4, tasks=2, replicas=2, minibatches=1, epochs=1, pretrain=1, lr=1e-2)
    learner = TaughtByBayes(FAMILY, config, "greedy Bayes", ppo_lr=1e-9)
    state = learner.meta_train(FAMILY, 0, 2, progress=False)
    imitated = learner.meta_train(FAMILY, 0, 1, progress=False)
    moved = max((a - b).abs().max() for a, b in zip(state.meta, imitated.meta))
    assert 0 < moved < 1e-7
