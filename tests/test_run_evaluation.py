"""Evaluating and comparing runs: every number against a direct computation, and what an interval promises."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from ecomlib import run_evaluation
from ecomlib.baselines import GreedyBayes, Random, Thompson
from ecomlib.configuration import DataSettings, PolicySettings, default_config
from ecomlib.evaluation.jackknife import ratio_interval
from ecomlib.evaluation.statistics import normalised_score, t_interval
from ecomlib.families import LogitPricing, LogUniformPrior, PointNavigation, split
from ecomlib.learners import MetaTraining
from ecomlib.learners.adaptation import adapt
from ecomlib.rollout import rollout_transitions, trial
from ecomlib.run_comparison import compare_runs, difference, welch_interval
from ecomlib.run_evaluation import evaluate_run
from ecomlib.run_results import EvaluationConfig
from ecomlib.runs import Run, RunError

SETTINGS = EvaluationConfig(tasks=7, luck=3, device="cpu")


def make_run(path, name="pricing", algorithm="ppo-maml", seeds=2, iteration=3, groups=None, **changes):
    """A run's folder with the initial parameters of each seed as its checkpoint."""
    config = replace(default_config(name, algorithm), iterations=3, seeds=seeds, dtype="float64")
    if name == "pricing":
        config = replace(config, family=LogitPricing(days=4), data=replace(config.data, tasks=3, episodes=2))
    if config.policy.network == "mlp":
        config = replace(config, policy=replace(config.policy, hidden=(4,)))
    config = replace(config, **changes)
    run, learner = Run.create(path, config), config.learner()
    for group in config.groups if groups is None else config.groups[:groups]:
        each = [learner.initial(torch.Generator().manual_seed(s)) for s in group]
        meta = each[0] if len(group) == 1 else [torch.stack(same) for same in zip(*each)]
        run.checkpoints(group).save(MetaTraining(iteration, meta, None, []), 0.1)
    return run


def direct_returns(run, seed, name="test", tasks=7, luck=3, steps=1):
    """(K + 1, M), by the learner's own verbs."""
    learner = run.config.learner()
    family, drawn = split(run.config.family, name, tasks)
    meta = learner.initial(torch.Generator().manual_seed(seed))
    phi, support = learner.train_task(meta, family, drawn, luck, steps)
    query = learner.evaluate_task(phi[-1], family, drawn, luck, episode=steps)
    return torch.stack([d.returns.mean(-1) for d in [*(s.data for s in support), query]]).numpy()


# ------------------------------------------------------------------------------------------------- evaluate
def test_numbers_are_those_of_a_direct_computation(tmp_path):
    """Returns, scores as ratios of means over tasks, Student's interval over seeds, jackknife over tasks."""
    run = make_run(tmp_path / "run", seeds=3)
    found = evaluate_run(run.path, "test", SETTINGS, progress=False)
    family, tasks = split(run.config.family, "test", 7)
    blind, oracle = family.blind_return(tasks).numpy(), family.oracle_return(tasks).numpy()
    assert np.array_equal(found.blind, blind) and np.array_equal(found.oracle, oracle)
    direct = np.stack([direct_returns(run, seed) for seed in range(3)])
    assert np.allclose(found.returns, direct, rtol=1e-12, atol=0)
    scores = (direct - blind).sum(-1) / (oracle - blind).sum()
    assert np.allclose(found.scores(), scores, rtol=1e-10)
    rows = {(r.policy, r.step): r for r in found.rows()}
    for k in (0, 1):
        row, values = rows["ppo-maml", k], scores[:, k]
        assert row.value == pytest.approx(direct[:, k].mean()) and row.score == pytest.approx(values.mean())
        half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / np.sqrt(3)
        assert row.over_seeds[1:] == pytest.approx((values.mean() - half, values.mean() + half, 3))
        top, bottom = direct[:, k].mean(0) - blind, oracle - blind
        left_out = [np.delete(top, i).sum() / np.delete(bottom, i).sum() for i in range(7)]
        error = np.sqrt(6 / 7 * np.sum((left_out - np.mean(left_out)) ** 2))
        ends = row.score - stats.t.ppf(0.975, 6) * error, row.score + stats.t.ppf(0.975, 6) * error
        assert row.over_tasks == pytest.approx((row.score, *ends, 7))
    ratios = ((direct[:, 1] - blind) / (oracle - blind)).mean()
    assert abs(ratios - rows["ppo-maml", 1].score) > 0.01  # the mean of ratios would have been another number


def test_blind_and_oracle_score_exactly_0_and_1(tmp_path):
    run = make_run(tmp_path / "run")
    found = evaluate_run(run.path, "test", SETTINGS, progress=False)
    first, last = found.rows()[0], found.rows()[-1]
    assert (first.policy, first.score, first.value) == ("blind", 0.0, found.blind.mean())
    assert (last.policy, last.score, last.value) == ("oracle", 1.0, found.oracle.mean())
    for expected, returns in ((0.0, found.blind), (1.0, found.oracle)):
        same = replace(found, returns=np.broadcast_to(returns, found.returns.shape))
        assert (same.scores() == expected).all()


def test_classical_policies_meet_the_same_tasks_and_luck_and_pool_the_stores(tmp_path):
    run = make_run(tmp_path / "run")
    found = evaluate_run(run.path, "test", SETTINGS, progress=False)
    family, tasks = split(run.config.family, "test", 7)
    for name, agent in (("greedy Bayes", GreedyBayes), ("Thompson", Thompson)):
        direct = trial(family, tasks, agent(family, stores=True), 2, 2, seed=3, progress=False).returns.mean(-1).numpy()
        assert np.array_equal(found.baselines[name], direct)
        row = next(r for r in found.rows() if r.policy == name and r.step == 1)
        assert row.score == pytest.approx((direct[1] - found.blind).sum() / (found.oracle - found.blind).sum())
        assert row.over_seeds is None and row.seeds == 0  # no training seed, so no interval over them
    alone = trial(family, tasks, GreedyBayes(family), 2, 2, seed=3, progress=False).returns.mean(-1).numpy()
    assert not np.array_equal(found.baselines["greedy Bayes"][1], alone[1])


def test_on_shifted_tasks_the_classical_policies_keep_the_prior_of_training(tmp_path):
    run = make_run(tmp_path / "run")
    found = evaluate_run(run.path, "shifted", SETTINGS, progress=False)
    moved, tasks = split(run.config.family, "shifted", 7)
    assert moved != run.config.family and np.array_equal(found.oracle, moved.oracle_return(tasks).numpy())
    agents = {prior: GreedyBayes(family, stores=True) for prior, family in (("own", run.config.family), ("new", moved))}
    returns = {k: trial(moved, tasks, a, 2, 2, 3, progress=False).returns.mean(-1).numpy() for k, a in agents.items()}
    assert np.array_equal(found.baselines["greedy Bayes"], returns["own"])
    assert not np.array_equal(returns["own"], returns["new"])


def test_a_task_does_not_depend_on_its_company(tmp_path, monkeypatch):
    """A few tasks at a time, or fewer in all: the same numbers."""
    run = make_run(tmp_path / "run")
    found = evaluate_run(run.path, "test", SETTINGS, progress=False)
    monkeypatch.setattr(run_evaluation, "STEPS_AT_ONCE", 2 * 4 * 2)  # two tasks at a time
    apart = evaluate_run(run.path, "test", SETTINGS, progress=False)
    fewer = evaluate_run(run.path, "test", replace(SETTINGS, tasks=3), progress=False)
    assert np.allclose(found.returns, apart.returns, rtol=1e-12) and np.allclose(
        fewer.returns, found.returns[..., :3], rtol=1e-12
    )
    for name, values in found.baselines.items():
        assert np.allclose(values, apart.baselines[name], rtol=1e-12)


def test_more_steps_and_episodes_than_in_training(tmp_path):
    run = make_run(tmp_path / "run", seeds=1)
    found = evaluate_run(run.path, "test", replace(SETTINGS, steps=3, episodes=5), progress=False)
    assert found.returns.shape == (1, 4, 7) and found.baselines["Thompson"].shape == (4, 7)
    with_five = replace(run.config, data=replace(run.config.data, episodes=5))
    run.config = with_five
    assert np.allclose(found.returns[0], direct_returns(run, 0, steps=3), rtol=1e-12)
    assert found.rows()[1].over_seeds is None  # one training seed is no sample


@pytest.mark.parametrize("algorithm", ["recurrent-ppo", "ppo-maml"])
def test_without_inner_steps_nobody_sees_the_episodes_of_others(tmp_path, algorithm):
    """A recurrent policy forgets at the end of an episode; the Bayesians then know their own episode alone."""
    policy = PolicySettings(network="gru", hidden=(4,)) if algorithm == "recurrent-ppo" else PolicySettings(hidden=(4,))
    run = make_run(tmp_path / "run", algorithm=algorithm, policy=policy)
    found = evaluate_run(run.path, "test", replace(SETTINGS, steps=0), progress=False)
    family, tasks = split(run.config.family, "test", 7)
    learner = run.config.learner()
    meta = learner.initial(torch.Generator().manual_seed(1))
    direct = learner.evaluate_task(meta, family, tasks, 3, episode=0).returns.mean(-1)
    assert found.returns.shape == (2, 1, 7) and np.allclose(found.returns[1, 0], direct.numpy(), rtol=1e-12)
    alone = trial(family, tasks, GreedyBayes(family), 1, 2, seed=3, progress=False).returns.mean(-1).numpy()
    assert np.array_equal(found.baselines["greedy Bayes"], alone)


def test_learned_step_sizes_are_not_mistaken_for_parameters(tmp_path):
    run = make_run(tmp_path / "run", algorithm="meta-sgd")
    found = evaluate_run(run.path, "test", replace(SETTINGS, steps=0), progress=False)
    one = evaluate_run(run.path, "test", SETTINGS, progress=False)
    assert np.allclose(found.returns[:, 0], one.returns[:, 0], rtol=1e-12)


def test_counted_in_transitions(tmp_path):
    """Episodes that end early: the mean is over those that count."""
    data = DataSettings(3, transitions=30, advantage="linear_feature", discount=0.99)
    inner = replace(default_config("navigation", "rl-maml").inner, steps=1, lr=0.1)
    run = make_run(
        tmp_path / "run", "navigation", "rl-maml", 1, data=data, inner=inner, family=PointNavigation(10, tolerance=0.3)
    )
    found = evaluate_run(run.path, "test", SETTINGS, progress=False)
    family, tasks = split(run.config.family, "test", 7)
    learner = run.config.learner()
    meta = learner.initial(torch.Generator().manual_seed(0))
    played = rollout_transitions(family, tasks, learner.policy, meta, 30, 3, 0)
    assert len(set(played.mask[0].sum(-1).tolist())) > 1
    before = evaluate_run(run.path, "test", replace(SETTINGS, steps=0), progress=False)
    for returns in (found.returns[0, 0], before.returns[0, 0]):
        assert np.allclose(returns, (played.returns.sum(-1) / played.mask[0].sum(-1)).numpy(), rtol=1e-12)
    assert found.baselines == {} and found.episodes == 3


def test_diverged_tasks_are_counted_and_left_out(tmp_path):
    found = evaluate_run(make_run(tmp_path / "run").path, "test", SETTINGS, progress=False)
    diverged = found.diverged.copy()
    diverged[0, 1, :2] = True
    returns = np.where(diverged, np.nan, found.returns)
    row = next(r for r in replace(found, returns=returns, diverged=diverged).rows() if r.step == 1)
    assert row.diverged == 2 / 14 and row.over_tasks.n == 5
    kept = [normalised_score(found.returns[0, 1, 2:], found.blind[2:], found.oracle[2:]), found.scores()[1, 1]]
    assert row.score == pytest.approx(np.mean(kept)) and row.over_seeds == t_interval(kept)
    diverged[:, 1] = True
    nothing = replace(found, diverged=diverged)
    row = next(r for r in nothing.rows() if r.step == 1)
    assert np.isnan(row.score) and row.over_seeds is None and row.over_tasks is None and row.diverged == 1
    assert json.loads(json.dumps(nothing.description(), allow_nan=False))["rows"][2]["score"] is None


def test_an_unfinished_run_says_so(tmp_path):
    """TRPO trains its seeds one after another: here the first is at iteration 1 of 3, the others have not begun."""
    changes = {"inner": replace(default_config("pricing", "trpo-maml").inner, lr=0.1)}
    run = make_run(tmp_path / "run", algorithm="trpo-maml", seeds=3, iteration=1, groups=1, **changes)
    found = evaluate_run(run.path, "test", SETTINGS, progress=False)
    assert not found.finished and found.missing == (1, 2) and found.seeds == (0,)
    assert found.checkpoints[0]["iteration"] == 1
    assert found.description()["finished"] is False and found.description()["seeds without a checkpoint"] == [1, 2]
    with pytest.raises(RunError, match="has no checkpoint yet"):
        evaluate_run(make_run(tmp_path / "empty", groups=0).path, "test", SETTINGS, progress=False)


def test_files_describe_themselves(tmp_path):
    run = make_run(tmp_path / "run")
    found = evaluate_run(run.path, "test", SETTINGS, progress=False)
    description, arrays = found.save()
    told, stored = json.loads(description.read_text()), np.load(arrays, allow_pickle=False)
    assert told["config"] == run.hash and told["tasks"] == 7 and told["luck"] == 3 and told["finished"] is True
    for seed in ("0", "1"):
        entry = told["by seed"][seed]
        assert hashlib.sha256((run.path / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        assert entry["score"] == pytest.approx(found.scores()[int(seed)].tolist())
    assert told["environment"]["torch"] and "commit" in told["environment"]
    assert np.array_equal(stored["return"], found.returns) and np.array_equal(stored["id"], found.ids)
    again = normalised_score(stored["return"], stored["blind"], stored["oracle"])
    assert np.allclose(again, found.scores(), rtol=1e-12)
    assert not list(run.path.glob(".*.unfinished"))


@pytest.mark.parametrize(
    ("field", "value"), [("tasks", 1), ("tasks", 2.0), ("steps", -1), ("episodes", 0), ("luck", -1), ("pace", -0.1)]
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"EvaluationConfig.{field} = {value}; allowed: "):
        EvaluationConfig(**{field: value})


# ------------------------------------------------------------------------------------------ the whole trial, drift
def test_the_lifetime_is_the_ratio_of_sums_over_rounds_and_its_lead_is_paired(tmp_path):
    found = evaluate_run(make_run(tmp_path / "run", seeds=3).path, "test", replace(SETTINGS, steps=2), progress=False)
    gap = 3 * (found.oracle - found.blind)
    gain = (found.returns - found.blind).sum(1)  # (S, M)
    run, greedy, _ = found.lifetimes()
    by_seed = gain.sum(-1) / gap.sum()
    assert run.over_seeds == pytest.approx(t_interval(by_seed)) and run.score == pytest.approx(found.scores().mean())
    assert run.over_tasks == pytest.approx(ratio_interval(gain.mean(0), gap))
    assert greedy.policy == "greedy Bayes" and greedy.over_seeds is None
    earned = (found.baselines["greedy Bayes"] - found.blind).sum(0)
    assert greedy.over_tasks == pytest.approx(ratio_interval(earned, gap))
    lead = found.leads()[0]
    assert lead.over_seeds == pytest.approx(t_interval(by_seed - greedy.score))
    assert lead.over_tasks == pytest.approx(ratio_interval((gain - earned).mean(0), gap))
    assert lead.over_tasks.estimate == pytest.approx(run.score - greedy.score)
    told = found.description()
    assert told["lifetime"][0]["score"] == run.score and told["lifetime less a baseline's"][0]["difference"] < 0


def test_a_task_that_diverged_in_a_round_is_left_out_of_the_lifetime_and_of_the_lead(tmp_path):
    found = evaluate_run(make_run(tmp_path / "run").path, "test", SETTINGS, progress=False)
    diverged = found.diverged.copy()
    diverged[1, 1, 0] = True
    other = replace(found, diverged=diverged, returns=np.where(diverged, np.nan, found.returns))
    gap, gain = 2 * (found.oracle - found.blind)[1:], (found.returns - found.blind)[..., 1:].sum(1)
    assert other.lifetimes()[0].over_tasks == pytest.approx(ratio_interval(gain.mean(0), gap))
    earned = (found.baselines["Thompson"] - found.blind).sum(0)
    assert other.leads()[1].over_tasks == pytest.approx(ratio_interval((gain - earned[1:]).mean(0), gap))
    nothing = replace(other, diverged=np.ones_like(diverged))
    assert np.isnan(nothing.lifetimes()[0].score) and nothing.leads()[0].over_tasks is None
    assert json.loads(json.dumps(nothing.description(), allow_nan=False))["lifetime"][0]["score"] is None


def test_drifting_tasks_move_between_rounds_for_everybody(tmp_path):
    """Round by round what everybody earns on the tasks as they then are."""
    run = make_run(tmp_path / "run", seeds=1)
    settings = replace(SETTINGS, steps=2, pace=0.3)
    found = evaluate_run(run.path, "drifting", settings, progress=False)
    family, tasks = split(run.config.family, "test", 7)
    rounds = [family.drifted(tasks.id, k, 0.3) for k in range(3)]
    assert np.array_equal(found.oracle, np.stack([family.oracle_return(now).numpy() for now in rounds]))
    assert np.array_equal(found.blind, np.stack([family.blind_return(now).numpy() for now in rounds]))
    learner = run.config.learner()
    phi = learner.initial(torch.Generator().manual_seed(0))
    for k, now in enumerate(rounds):  # one inner step a round, on the episodes of that round
        steps, support = (
            learner.train_task(phi, family, now, 3, 1, episode=k) if k == 0 else one_step(learner, phi, family, now, k)
        )
        assert np.allclose(found.returns[0, k], support[0].data.returns.mean(-1).numpy(), rtol=1e-12)
        phi = steps[-1]
    agent = Thompson(family, stores=True)
    played = trial(family, tasks, agent, 3, 2, 3, progress=False, drift=lambda k: rounds[k]).returns.mean(-1).numpy()
    assert np.array_equal(found.baselines["Thompson"], played)
    moving = trial(family, tasks, Random(family), 3, 2, 3, progress=False, drift=lambda k: rounds[k]).reward
    for k, now in enumerate(rounds):  # who learns nothing plays a round as if the tasks had always been so
        assert torch.equal(moving[k], trial(family, now, Random(family), 3, 2, 3, progress=False).reward[k])
    still = evaluate_run(run.path, "test", settings, progress=False)
    assert np.array_equal(still.returns[0, 0], found.returns[0, 0])  # nothing has moved in the first round
    assert not np.allclose(still.returns[0, 2], found.returns[0, 2])
    standing = evaluate_run(run.path, "drifting", replace(settings, pace=0.0), progress=False)
    assert np.allclose(standing.returns, still.returns, rtol=1e-9)
    assert standing.lifetimes()[0].score == pytest.approx(still.lifetimes()[0].score)
    description, _ = found.save()
    assert json.loads(description.read_text())["pace"] == 0.3


def one_step(learner, phi, family, tasks, k):
    """One inner step from parameters of each task's own, by the reference form."""
    stage = learner.collect(family, tasks, phi, 3, k)
    alone = replace(learner.inner, steps=1, lr=learner.inner.rate(0))
    adapted = adapt(learner.loss, alone, phi, [stage], len(tasks.id), shared=False, create_graph=False)
    return [[p.detach() for p in parameters] for parameters in adapted], [stage]


def test_a_family_without_a_drift_says_so(tmp_path):
    run = make_run(tmp_path / "run", "shop", "rl-maml", 1)
    with pytest.raises(ValueError, match="split = 'drifting'; allowed: another one: shop does not drift"):
        evaluate_run(run.path, "drifting", SETTINGS, progress=False)


def test_the_cost_of_training_is_that_of_the_metrics(tmp_path):
    """Seconds of a batch are shared by its seeds; episodes are those that one seed paid for."""
    run = make_run(tmp_path / "run")
    rows = [
        {"seed": s, "iteration": i, "seconds": 0.5, "steps": 3 * 2 * 4 * 2, "score": 0.0}
        for i in (1, 2, 3, 4)
        for s in (0, 1)
    ]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cost = evaluate_run(run.path, "test", SETTINGS, progress=False).cost()
    assert cost == {
        "training seconds": 1.5,
        "training steps": 3 * 48,
        "training episodes": 36.0,
    }  # iteration 4 is later


# ------------------------------------------------------------------------------------------------- compare
def test_a_difference_is_paired_over_seeds_and_over_tasks(tmp_path):
    """The same parameters adapted with another step size: most of the luck is shared and cancels."""
    a = make_run(tmp_path / "a", seeds=3)
    b = make_run(tmp_path / "b", seeds=3, inner=replace(a.config.inner, lr=2.0))
    found = compare_runs([a.path, b.path], "test", SETTINGS, progress=False)
    first, second = (np.stack([direct_returns(run, seed)[1] for seed in range(3)]) for run in (a, b))
    blind, oracle = found.evaluations[0].blind, found.evaluations[0].oracle
    change = (second - first).sum(-1) / (oracle - blind).sum()
    (d,) = found.differences
    assert d.paired and d.over_seeds == pytest.approx(t_interval(change))
    assert d.over_tasks == pytest.approx(ratio_interval((second - first).mean(0), oracle - blind))
    assert d.over_tasks.estimate == pytest.approx(d.over_seeds.estimate)
    one, two = (e.rows()[2].over_tasks for e in found.evaluations)
    assert d.over_tasks.high - d.over_tasks.low < (one.high - one.low + two.high - two.low) / 2


def test_a_run_does_not_differ_from_itself(tmp_path):
    run = make_run(tmp_path / "run")
    (d,) = compare_runs([run.path, run.path], "shifted", SETTINGS, progress=False).differences
    assert d.over_seeds[:3] == d.over_tasks[:3] == (0.0, 0.0, 0.0)


def test_other_seeds_are_not_paired(tmp_path):
    a, b = make_run(tmp_path / "a", seeds=3), make_run(tmp_path / "b", seeds=2, first_seed=7)
    one = make_run(tmp_path / "one", seeds=1)
    found = compare_runs([a.path, b.path, one.path], "test", SETTINGS, progress=False)
    d, alone = found.differences
    x, y = found.evaluations[1].scores()[:, 1], found.evaluations[0].scores()[:, 1]
    assert not d.paired and d.over_seeds == welch_interval(x, y)
    error = np.sqrt(x.var(ddof=1) / 2 + y.var(ddof=1) / 3)
    freedom = error**4 / ((x.var(ddof=1) / 2) ** 2 / 1 + (y.var(ddof=1) / 3) ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * error
    assert d.over_seeds == pytest.approx(
        (x.mean() - y.mean(), x.mean() - y.mean() - half, x.mean() - y.mean() + half, 2)
    )
    assert alone.over_seeds is None and alone.over_tasks is not None
    assert len(json.loads(json.dumps(found.description()))["differences from the first"]) == 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"family": LogitPricing(days=5)}, "family.days = 4 .* and 5"),
        ({"family": LogitPricing(days=4, prior=LogUniformPrior(traffic=(1.0, 2.0)))}, r"family.prior.traffic = \(20"),
        ({"family": LogitPricing(days=4, markups=(1.1, 1.5))}, "family.markups = "),
    ],
)
def test_runs_on_other_markets_are_refused_naming_the_field(tmp_path, change, field):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **change)
    with pytest.raises(ValueError, match=f"^{field}"):
        compare_runs([a.path, b.path], "test", SETTINGS, progress=False)


def test_other_families_and_single_runs_are_refused(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "shop", "rl-maml")
    with pytest.raises(ValueError, match="^family_name = pricing .* and shop"):
        compare_runs([a.path, b.path], "test", SETTINGS, progress=False)
    with pytest.raises(ValueError, match="runs = 1; allowed: at least 2"):
        compare_runs([a.path], "test", SETTINGS, progress=False)
    few = evaluate_run(a.path, "test", replace(SETTINGS, tasks=3), progress=False)
    with pytest.raises(ValueError, match="tasks = "):
        difference(few, evaluate_run(a.path, "test", SETTINGS, progress=False))


def test_tasks_that_diverged_in_either_run_do_not_count_in_a_difference(tmp_path):
    a = evaluate_run(make_run(tmp_path / "a").path, "test", SETTINGS, progress=False)
    diverged = a.diverged.copy()
    diverged[1, 1, 0] = True
    b = replace(a, diverged=diverged, returns=np.where(diverged, np.inf, a.returns + 1.0))
    d = difference(a, b)
    assert d.over_tasks.n == 6
    assert d.over_tasks.estimate == pytest.approx(6 / (a.oracle - a.blind)[1:].sum())


# ------------------------------------------------------------------------------------------------- jackknife
def pool_of_products(size=20_000):
    """Gain and gap of products that differ a hundredfold in turnover, as a policy that closes about 2/3 would have."""
    family = LogitPricing()
    tasks = family.tasks(torch.arange(size))
    gap = (family.oracle_return(tasks) - family.blind_return(tasks)).numpy()
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 0.02, size) * family.oracle_return(tasks).numpy()
    return {"score": rng.beta(2, 1, size) * gap + luck, "difference": 0.1 * (rng.random(size) - 0.4) * gap + luck}, gap


@pytest.mark.parametrize("what", ["score", "difference"])
def test_the_interval_over_tasks_covers(what):
    """Of 1,000 draws of 200 products, about 95 % of the intervals hold the ratio of the whole pool; and of draws of 20
    fewer do, as the docstring warns."""
    numerators, gap = pool_of_products()
    top, rng = numerators[what], np.random.default_rng(1)
    truth = top.sum() / gap.sum()
    covered = {}
    for tasks in (20, 200):
        draws = [rng.integers(len(gap), size=tasks) for _ in range(1000)]
        found = [ratio_interval(top[i], gap[i]) for i in draws]
        covered[tasks] = np.mean([interval.low <= truth <= interval.high for interval in found])
    assert 0.92 < covered[200] < 0.975
    assert 0.87 < covered[20] < 0.975


def test_the_interval_over_tasks_is_that_of_a_mean_where_gaps_are_equal():
    values = np.random.default_rng(0).normal(size=30)
    assert ratio_interval(values, np.ones(30)) == pytest.approx(t_interval(values))


@pytest.mark.parametrize(
    ("top", "bottom", "message"),
    [
        ([1.0], [1.0], "at least 2 tasks"),
        ([1.0, 2.0], [1.0], "same tasks"),
        ([1.0, np.nan], [1.0, 1.0], "numerator must be finite"),
        ([1.0, 1.0], [1.0, -0.5], "denominator must have a positive mean"),
    ],
)
def test_the_interval_over_tasks_refuses(top, bottom, message):
    with pytest.raises(ValueError, match=message):
        ratio_interval(top, bottom)
