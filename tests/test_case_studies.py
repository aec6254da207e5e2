"""The experiments of part "Cases": scores and differences against direct sums, agents against their definitions, and a
tiny study from the beginning to its pictures."""

import json
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks import case_studies  # noqa: E402
from benchmarks.case_costs import SameData, explanations, first, training_episodes  # noqa: E402
from benchmarks.case_methods import (  # noqa: E402
    Protocol,
    Returns,
    TaskPool,
    classical,
    difference,
    played,
    scores,
    setting,
    trained,
    training,
)
from ecomlib import plotting  # noqa: E402
from ecomlib.baselines import GreedyBayes, Random, Thompson, empirical_prior  # noqa: E402
from ecomlib.baselines.forgetting import ForgettingThompson  # noqa: E402
from ecomlib.case_pictures import plot_differences, plot_lifetime, plot_rounds  # noqa: E402
from ecomlib.cli import train as train_command_line  # noqa: E402
from ecomlib.configuration import default_config  # noqa: E402
from ecomlib.evaluation.case_studies import load_case  # noqa: E402
from ecomlib.evaluation.jackknife import ratio_interval  # noqa: E402
from ecomlib.evaluation.statistics import t_interval  # noqa: E402
from ecomlib.families import LogitPricing, PointNavigation, split  # noqa: E402
from ecomlib.learners.meta import iteration_generator  # noqa: E402
from ecomlib.rollout import trial  # noqa: E402

SHELF = LogitPricing()
TINY = Protocol(
    rounds=3,
    units=(2,),
    tasks=6,
    tuning_tasks=4,
    seeds=2,
    particles=16,
    logged_tasks=4,
    logged_episodes=1,
    iterations=1,
)


@pytest.fixture(autouse=True)
def single_precision():
    """That of the experiments."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------------- scores
def invented(seeds=3, rounds=2, tasks=8):
    rng = np.random.default_rng(0)
    where = setting(SHELF, "test", replace(TINY, rounds=rounds, tasks=tasks))
    values = where.blind + rng.normal(0.6, 0.3, (seeds, rounds, tasks)) * where.gap
    return where, Returns(values, np.zeros(values.shape, dtype=bool), True)


def test_scores_are_ratios_of_sums_over_tasks_and_of_the_lifetime_over_rounds():
    where, found = invented()
    told = scores(found, where)
    gain = found.values - where.blind
    for k in range(2):
        by_seed = gain[:, k].sum(-1) / where.gap[k].sum()
        cell, over_seeds = told["rounds"][k], t_interval(by_seed)
        assert cell["score"] == pytest.approx(by_seed.mean(), rel=1e-4)
        assert cell["seeds"] == pytest.approx([over_seeds.low, over_seeds.high], rel=1e-4)
        over_tasks = ratio_interval(gain[:, k].mean(0), where.gap[k])
        assert cell["tasks"] == pytest.approx([over_tasks.low, over_tasks.high], rel=1e-4)
        assert [row[k] for row in told["by seed"]] == pytest.approx(by_seed.tolist(), rel=1e-4)
    life = gain.sum((1, 2)) / where.gap.sum()
    assert told["lifetime"]["score"] == pytest.approx(life.mean(), rel=1e-4)
    assert told["seeds"] == 3 and told["tasks"] == 8 and told["diverged"] == 0
    untrained = scores(Returns.of_agent(found.values[0]), where)
    assert untrained["lifetime"]["seeds"] is None and untrained["by seed"] is None and untrained["seeds"] == 0


def test_a_difference_is_paired_and_leaves_out_what_diverged():
    where, found = invented()
    rival = Returns.of_agent(where.blind + 0.5 * where.gap)
    diverged = found.diverged.copy()
    diverged[1, 1, 0] = True
    broken = found._replace(values=np.where(diverged, np.nan, found.values), diverged=diverged)
    for mine, kept in ((found, slice(0, None)), (broken, slice(1, None))):
        for of, rounds in (("lifetime", slice(0, 2)), ("last round", slice(1, 2))):
            lead = (found.values - rival.values)[:, rounds, kept].sum(1)
            gap = where.gap[rounds, kept].sum(0)
            told, over_seeds = difference(mine, rival, where, of), t_interval(lead.sum(-1) / gap.sum())
            assert told["of"] == of and told["difference"] == pytest.approx(lead.mean(0).sum() / gap.sum(), rel=1e-4)
            assert told["seeds"] == pytest.approx([over_seeds.low, over_seeds.high], rel=1e-4)
            over_tasks = ratio_interval(lead.mean(0), gap)
            assert told["tasks"] == pytest.approx([over_tasks.low, over_tasks.high], rel=1e-4)
    assert scores(broken, where)["tasks"] == 7 and scores(broken, where)["diverged"] == pytest.approx(1 / 24)


def test_lists_of_tasks_drift_where_they_are_said_to():
    still, drifts = (setting(SHELF, name, TINY) for name in ("test", "drifting"))
    assert torch.equal(still.tasks.id, drifts.tasks.id) and (still.oracle == still.oracle[0]).all()
    assert np.array_equal(still.oracle[0], drifts.oracle[0]) and not np.allclose(drifts.oracle[0], drifts.oracle[2])
    tuning = setting(SHELF, "drifting train", TINY)
    assert torch.equal(tuning.tasks.id, split(SHELF, "train", 4)[1].id) and tuning.drift is not None
    agent = Thompson(SHELF, 16, stores=True)
    direct = trial(
        SHELF, drifts.tasks, agent, 3, 2, 0, progress=False, drift=lambda k: drifts.drift(drifts.tasks.id, k)
    )
    assert np.allclose(played(agent, drifts, 2, TINY), direct.returns.mean(-1).numpy())


# ------------------------------------------------------------------------------------------------- agents
def test_an_agent_that_remembers_everything_is_thompson_and_one_that_remembers_nothing_begins_anew():
    tasks = split(SHELF, "test", 9)[1]
    play = lambda agent: trial(SHELF, tasks, agent, 3, 2, 5, progress=False).action
    plain, always, never = (
        play(Thompson(SHELF, 64)),
        *(play(ForgettingThompson(SHELF, 64, memory=m)) for m in (1.0, 0.0)),
    )
    assert torch.equal(plain, always)
    assert torch.equal(never[0], plain[0]) and not torch.equal(never[2], plain[2])
    agent = ForgettingThompson(SHELF, 64, stores=True, memory=0.25)
    one, other = agent.belief, Thompson(SHELF, 64, stores=True)
    trial(SHELF, tasks, agent, 1, 2, 5, progress=False)
    trial(SHELF, tasks, other, 1, 2, 5, progress=False)
    kept = torch.log_softmax(0.25 * other.belief.log_posterior, -1)  # of an even prior, to a quarter of the evidence
    assert torch.allclose(torch.log_softmax(one.log_posterior, -1), kept, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"memory = 1.5; allowed: a number in \[0, 1\]"):
        ForgettingThompson(SHELF, 64, memory=1.5)


def test_a_prior_from_logs_keeps_a_share_of_the_wide_one():
    tasks = split(SHELF, "train", 5)[1]
    estimate = lambda share: empirical_prior(SHELF, tasks, Random(SHELF), 2, particles=64, wide_share=share)
    none, some = estimate(0.0), estimate(0.2)
    assert len(none.weight) < 64 == len(some.weight)
    assert some.weight.min() >= 0.2 / 64 * 0.999 and some.weight.sum() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="wide_share = 1.0"):
        estimate(1.0)


def test_the_bayesian_with_given_data_learns_from_them_and_from_nothing_else():
    tasks = split(SHELF, "test", 7)[1]
    told = trial(SHELF, tasks, Random(SHELF), 3, 2, 0, progress=False)
    agent = SameData(SHELF, told.action[:2], 64)
    got = trial(SHELF, tasks, agent, 3, 2, 0, progress=False)
    assert torch.equal(got.action[:2], told.action[:2]) and torch.equal(got.reward[:2], told.reward[:2])
    taught = GreedyBayes(SHELF, 64, stores=True)
    taught.begin(SHELF.context(tasks), 7, 2)

    class Follower(GreedyBayes):
        """Learns what it is told to do."""

        def choose(self, observation, noise):
            return next(self.told)

    taught = Follower(SHELF, 64, stores=True)
    taught.told = iter(told.action[:2].flatten(0, 1))
    trial(SHELF, tasks, taught, 2, 2, 0, progress=False)
    assert torch.allclose(agent.belief.weight, taught.belief.weight)
    assert (
        len(got.action[2].unique(dim=0)) == 1
    )  # one price for all days, as no stock limit and no news call for another


def test_a_pool_gives_each_seed_its_own_few_tasks_and_new_luck_every_time():
    ids = torch.randint(2**62, (40, 3), generator=iteration_generator(0, 0)).flatten()
    pool = TaskPool(SHELF, 5, 3).tasks(ids)
    assert torch.equal(pool.id, ids)
    of_seed = pool.sensitivity.unflatten(0, (40, 3))
    kinds = [set(of_seed[:, s].tolist()) for s in range(3)]
    assert [len(k) for k in kinds] == [5, 5, 5] and len(set.union(*kinds)) == 15
    expected = SHELF.tasks(torch.arange(15)).sensitivity
    assert set.union(*kinds) == set(expected.tolist())


# ------------------------------------------------------------------------------------------------- trainings
@pytest.mark.parametrize("units", [1, 5, 20])
def test_a_training_plays_as_many_episodes_with_any_number_of_units(units):
    config = training("pricing", "ppo-maml", units, Protocol())
    default = default_config("pricing", "ppo-maml")
    assert config.data.episodes == units and config.seeds == 5 and config.iterations == default.iterations
    assert config.data.tasks == min(200, max(20, 200 // units))
    rounds = 3  # of pricing: before, between and after two inner steps
    assert training_episodes(config) == config.iterations * config.data.tasks * units * rounds


def test_the_command_that_a_run_names_trains_its_configuration(monkeypatch, tmp_path):
    caught = []
    monkeypatch.setattr(
        train_command_line, "train", lambda settings, path, *_: caught.append((settings, path)) or FakeRun()
    )
    changes = {"inner.steps": 2, "data.stage_weights": (1.0, 1.0, 1.0), "policy.inputs": None}
    config = training("pricing", "ppo-maml", 2, TINY, **changes)
    words = case_studies.train_command(config, "all")
    assert train_command_line.main(words[1:]) == 0
    assert caught[0][0] == config and str(caught[0][1]).endswith("runs/pricing/all")


class FakeRun:
    """What the command line prints of."""

    path = "nowhere"


def test_policies_that_never_adapt_play_the_same_in_every_round():
    where, config = setting(SHELF, "test", TINY), training("pricing", "ppo-maml", 2, TINY)
    learner = config.learner()
    meta = learner.initial(torch.Generator().manual_seed(3))
    returns, diverged = trained(learner, [meta], where, TINY, adapts=False)
    direct = [learner.evaluate_task(meta, SHELF, where.tasks, 0, k).returns.mean(-1).numpy() for k in range(3)]
    assert np.allclose(returns[0], direct) and not diverged.any()
    adapted, _ = trained(learner, [meta], where, TINY)
    assert np.allclose(adapted[0, 0], direct[0]) and not np.allclose(adapted[0, 1], direct[1])


def test_more_data_help_and_a_task_alone_is_learned():
    where, protocol = setting(SHELF, "test", replace(TINY, tasks=30)), replace(TINY, particles=128)
    learner = training("pricing", "ppo-maml", 2, TINY).learner()
    metas = [learner.initial(torch.Generator().manual_seed(s)) for s in range(2)]
    found = {row["what"]: row["score"] for row in explanations(learner, metas, first(where, 20), 2, protocol)}
    assert list(found) == [
        "the learner",
        "ten times the episodes a round",
        "a Bayesian with the learner's data",
        "the policy trained on the task alone",
    ]
    assert found["ten times the episodes a round"] > found["the learner"]
    assert found["the policy trained on the task alone"] > 0.8


# ------------------------------------------------------------------------------------------------- a tiny study
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole study."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("case")
    study = case_studies.Study("pricing", TINY, folder / "pricing.json", folder / "runs", folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case_studies, "explanations", lambda *_: [{"what": "the learner", "score": 0.5}])
        patch.setattr(case_studies, "POOLS", (3,))
        for part in case_studies.PARTS:
            study.make(part, again=False)
    torch.set_default_dtype(before)
    return study, folder


def test_a_study_is_read_back_as_tables(tiny):
    study, folder = tiny
    case = load_case(folder / "pricing.json")
    assert case.family == "pricing" and case.protocol["rounds"] == 3
    methods = case.methods("test", 2)
    assert methods["Thompson"] == "classical" and methods["PPO-MAML"] == "meta" and methods["random"] == "reference"
    assert {"PPO-MAML, all rounds", "TRPO-MAML", "RL-MAML", "FOMAML", "Reptile"} <= set(methods)
    assert {m for m, k in methods.items() if k == "no meta"} == {
        "from scratch",
        "pre-trained, fine-tuned",
        "average policy",
        "average policy, sees all",
    }
    rounds = case.by_round("drifting", 2, methods=["Reptile", "Thompson, forgets"])
    assert rounds.method.tolist() == ["Reptile"] * 3 + ["Thompson, forgets"] * 3
    assert rounds["round"].tolist() == [1, 2, 3] * 2 and rounds.over.tolist() == ["seeds"] * 3 + ["tasks"] * 3
    assert (rounds.low <= rounds.score).all() and (rounds.score <= rounds.high).all()
    lifetime = case.lifetime("shifted", 2)
    assert lifetime.score.is_monotonic_decreasing and set(lifetime.method) == set(methods)
    thompson = lifetime.set_index("method").score["Thompson"]
    where = study.setting("shifted")
    again = scores(Returns.of_agent(played(Thompson(SHELF, 16, stores=True), where, 2, TINY)), where)
    assert thompson == again["lifetime"]["score"]
    lead = case.difference("test", 2).set_index("method")
    rival = case.best_classical(2)
    assert (lead.against == rival).all()
    life = case.lifetime("test", 2).set_index("method").score
    assert lead.difference["Reptile"] == pytest.approx(life["Reptile"] - life[rival], abs=2e-4)
    assert (lead.high - lead.low >= lead.tasks_high - lead.tasks_low - 1e-9).all()
    drifting = case.difference("drifting", 2, of="last round")
    assert (drifting.against == case.best_classical(2, "drifting")).all()
    outsider = case.best_classical(2, rival="without the prior")
    assert outsider in ("greedy empirical Bayes", "empirical Thompson", "epsilon-greedy", "controlled variance")
    assert (case.difference("test", 2, rival="without the prior").against == outsider).all()
    on_training = case.parts["runs"]["training scores"]
    assert case.best_meta(2, "last round") == max(on_training, key=lambda r: r["last round"])["method"]
    assert goal_of(case)["last round"]["method"] == case.best_meta(2, "last round")
    assert case.sensitivity("test", 2).training_tasks.tolist() == [np.inf, 3.0]
    tuned = case.tuned()
    assert tuned.groupby(["method", "units"]).chosen.sum().eq(1).all()
    best = tuned.loc[tuned.groupby("method").score.idxmax()]
    assert best.chosen.all()
    cost = case.cost().set_index("method")
    assert cost.training_episodes["PPO-MAML"] == 1 * 100 * 2 * 3 and cost.training_seconds["Thompson"] == 0
    assert (cost[["adapting_1", "deciding_1000"]] > 0).all().all()
    goal = case.goal()
    assert goal["reached"] in (True, False) and goal["explanations"][0]["score"] == 0.5
    assert case.provenance("runs")["processor seconds"] > 0


def goal_of(case):
    return case.parts["goal"]


def test_what_is_not_there_is_named(tiny):
    case = load_case(tiny[1] / "pricing.json")
    with pytest.raises(KeyError, match="no Oracle on test with 2 units; there are random, greedy Bayes"):
        case.by_round("test", 2, methods=["Oracle"])
    with pytest.raises(KeyError, match="no part 'nothing' of pricing; there are baselines"):
        case.provenance("nothing")
    other = tiny[1] / "other.json"
    other.write_text(json.dumps({"format": "something"}))
    with pytest.raises(ValueError, match="no ecomlib case study"):
        load_case(other)


def test_a_part_is_made_once_and_a_run_of_other_settings_is_not_reused(tiny, capsys):
    study, folder = tiny
    before = (folder / "pricing.json").read_text()
    case_studies.Study("pricing", TINY, study.path, study.runs, study.cache).make("runs", again=False)
    assert "already" in capsys.readouterr().out and (folder / "pricing.json").read_text() == before
    with pytest.raises(SystemExit, match="another protocol"):
        case_studies.Study("pricing", replace(TINY, luck=1), study.path, study.runs, study.cache)
    with pytest.raises(SystemExit, match="other settings"):
        study.train(training("pricing", "ppo-maml", 2, TINY, **{"outer.lr": 0.1}), "ppo-maml-2")


def test_runs_are_folders_that_the_command_line_reads(tiny):
    study, folder = tiny
    run = folder / "runs" / "pricing" / "ppo-maml-all-rounds-2"
    assert not (run / "tensorboard").exists() and not (run / "metrics.jsonl").exists()
    said = json.loads((run / "environment.json").read_text())["starts"][0]["command"]
    assert said.startswith("python -m ecomlib train pricing --algorithm ppo-maml") and "--inner.steps 2" in said
    assert json.loads((run / "cost.json").read_text())["processor seconds of a seed"] > 0


def test_pictures(tiny):
    case = load_case(tiny[1] / "pricing.json")
    plotting.use_style()
    fig, axes = plt.subplots(1, 3, figsize=(15, 5))
    plot_rounds(axes[0], case, ["Thompson", "greedy Bayes", "PPO-MAML", "from scratch"], units=2)
    plot_lifetime(axes[1], case, units=2)
    plot_differences(axes[2], case, units=2)
    fig.draw_without_rendering()
    names = [t.get_text() for t in axes[1].get_yticklabels()]
    order = case.lifetime("test", 2)
    assert names[::-1] == order[order.kind != "reference"].method.tolist()
    assert axes[2].get_xlabel() == f"lifetime score less that of {case.best_classical(2)}"
    with pytest.raises(ValueError, match="more than 4 of kind 'meta'"):
        plot_rounds(axes[0], case, ["PPO-MAML", "RL-MAML", "TRPO-MAML", "FOMAML", "Reptile"], units=2)
    plt.close(fig)


def test_what_a_family_cannot_have_is_left_out():
    fixed, tunable = classical(SHELF, "pricing", TINY)
    assert {"random", "greedy Bayes", "empirical Thompson"} <= set(fixed) and "Bayes-UCB" in tunable
    assert classical(PointNavigation(), "navigation", TINY) == ({}, {})  # real actions, no belief, no wide prior


def test_results_of_memory_learners_as_tables(tmp_path):
    from ecomlib.evaluation.memory_studies import MEMORY_FORMAT, MemoryStudies

    cell = lambda x: {"score": x, "seeds": [x - 0.1, x + 0.1], "tasks": [x - 0.2, x + 0.2]}
    about = {"method": "RL2", "split": "test"}
    lead = {"rival": "best", "against": "Thompson", "of": "lifetime", "difference": 0.5, "seeds": None, "tasks": [0, 1]}
    result = {
        "scores": [about | {"lifetime": cell(0.7), "rounds": [cell(0.4), cell(1.0)]}],
        "differences": [about | lead, about | lead | {"of": "last round", "difference": 0.6}],
    }
    content = {"format": MEMORY_FORMAT, "family": "pricing", "learner": "rl2", "result": result}
    content["seeds"] = {"0": {"processor seconds": 1.0}, "1": {"processor seconds": 3.0}}
    (tmp_path / "pricing-rl2.json").write_text(json.dumps(content))
    unfinished = {k: v for k, v in content.items() if k != "result"} | {"family": "inventory"}
    (tmp_path / "inventory-rl2.json").write_text(json.dumps(unfinished))
    found = MemoryStudies(tmp_path)
    row = found.lifetime().iloc[0]
    assert (row.family, row.learner, row.score, row.low, row.tasks_high) == (
        "pricing",
        "rl2",
        0.7,
        0.7 - 0.1,
        0.7 + 0.2,
    )
    assert found.by_round()["round"].tolist() == [1, 2] and found.by_round().score.tolist() == [0.4, 1.0]
    row = found.difference().iloc[0]
    assert (row.rival, row.against, row.difference, row.low, row.over) == ("best", "Thompson", 0.5, 0, "tasks")
    assert found.difference(of="last round").difference.tolist() == [0.6]
    assert found.training_seconds().to_dict() == {("pricing", "rl2"): 2.0} and found.lifetime("shifted").empty
    (tmp_path / "other.json").write_text('{"format": "something"}')
    with pytest.raises(ValueError, match="other.json is no ecomlib memory learners: its format is 'something'"):
        MemoryStudies(tmp_path)
