"""The search: what it may change, going on after a stop or a kill, and numbers that it does not choose by."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import product

import numpy as np
import optuna
import pytest
import torch
from filelock import FileLock
from optuna.trial import TrialState

from ecomlib import search as search_module
from ecomlib import search_space
from ecomlib.config_files import read_config, write_config
from ecomlib.configuration import FAMILIES, OUTER, default_config
from ecomlib.evaluation import AdaptationReturns, adaptation_returns, normalised_score
from ecomlib.families import LogitPricing, ShopMDP, sample_tasks, split
from ecomlib.learners.meta import iteration_generator
from ecomlib.runs import load_run
from ecomlib.search import CONFIRMATION, FRESH_SEED, VALIDATION, Search, SearchConfig, SearchError, SearchInterrupted
from ecomlib.search_space import chosen, own_value, scores_of, space
from ecomlib.training import train

CONFIG = SearchConfig(trials=3, iterations=2, seeds=2, validation_tasks=5, reports=2, confirm=2, confirmation_tasks=6)


def tiny(algorithm="ppo-maml", **changes):
    base = default_config("pricing", algorithm)
    base = replace(base, family=LogitPricing(days=3), data=replace(base.data, tasks=4, episodes=2), dtype="float64")
    return replace(base, policy=replace(base.policy, hidden=(4,)), **changes)


def run(path, config=CONFIG, base=None):
    return Search(path, base or tiny(), config).run(progress=False)


def told(found):
    """(values, score) of every finished trial."""
    return [(t.params, t.value) for t in found.trials]


@pytest.fixture
def formula(monkeypatch):
    """In place of training: a score that is a formula of the settings, best at inner.lr 8."""

    def scores(config, base, lists, device, milestones, report=None, tick=None):
        value = 1 - abs(np.log(config.inner.lr / 8)) + 0.001 * config.first_seed
        for milestone in milestones:
            if report is not None:
                report(milestone, value * milestone / milestones[-1])
        return [[value + 0.1 * (seed == CONFIRMATION)] * config.seeds for seed, _ in lists]

    monkeypatch.setattr(search_module, "scores_of", scores)
    return scores


# ------------------------------------------------------------------------------------------------- the space
@pytest.mark.parametrize(("family", "algorithm"), list(product(FAMILIES, OUTER)))
def test_the_settings_at_the_start_are_in_the_space_and_every_draw_can_be_trained(family, algorithm):
    """And an iteration of a draw costs the merchant as many episodes as one of the start."""
    base, found = default_config(family, algorithm), None
    own = {name: own_value(base, name) for name in space(base)}
    for name, distribution in space(base).items():
        assert distribution._contains(distribution.to_internal_repr(own[name])), name
    assert chosen(base, own) == base
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        found = chosen(base, study.ask(fixed_distributions=space(base)).params)
        assert found.data.tasks * found.data.episodes == base.data.tasks * base.data.episodes
        assert (found.family, found.inner.steps, found.iterations) == (base.family, base.inner.steps, base.iterations)
        found.learner()
    assert found != base


def test_several_step_sizes_keep_their_proportions():
    base = default_config("navigation", "rl-maml")
    assert base.inner.lr == (0.5, 0.25)
    assert chosen(base, {"inner.lr": 1.0}).inner.lr == (1.0, 0.5)


# ------------------------------------------------------------------------------------------------- scores
def test_a_score_is_that_of_a_direct_computation():
    """Training in pieces, with a look at each milestone, changes nothing; adaptation costs what the start's does."""
    base = tiny(iterations=4, seeds=2)
    config = chosen(base, {"data.episodes": 4, "policy.hidden": 16})
    looks = []
    lists = [(VALIDATION, 6), (CONFIRMATION, 3)]
    found = scores_of(config, base, lists, "cpu", [1, 3, 4], lambda *look: looks.append(look))
    learner, judge = config.learner(), replace(config, data=base.data).learner()
    assert learner.config.episodes == 4 and learner.config.tasks == 2 and judge.config.episodes == 2
    trained = learner.meta_train(base.family, (0, 1), 4, progress=False)
    for row, (list_seed, size) in zip(found, lists):
        tasks = sample_tasks(base.family, size, torch.Generator().manual_seed(list_seed))
        blind, oracle = base.family.blind_return(tasks), base.family.oracle_return(tasks)
        for seed in (0, 1):
            meta = [p[seed] for p in trained.meta]
            returns = adaptation_returns(judge, meta, base.family, tasks, 1, list_seed % 2**31).returns
            assert row[seed] == pytest.approx(normalised_score(returns[-1], blind, oracle), rel=1e-12)
    assert [look[0] for look in looks] == [1, 3, 4] and looks[-1][1] == pytest.approx(np.mean(found[0]))


def test_validation_confirmation_and_test_tasks_are_not_those_of_training():
    family = ShopMDP()
    lists = [sample_tasks(family, 500, torch.Generator().manual_seed(s)).id for s in (VALIDATION, CONFIRMATION)]
    lists += [split(family, name, 500)[1].id for name in ("train", "test", "shifted")]
    lists += [
        sample_tasks(family, 20, iteration_generator(seed, iteration)).id
        for seed in (0, 1, FRESH_SEED)
        for iteration in (*range(10), 10**6)
    ]
    drawn = torch.cat(lists)  # the ids themselves: generators may read less of a seed than is written
    assert len(drawn.unique()) == len(drawn)


def test_best_toml_trains_to_the_confirmed_scores(tmp_path):
    """With seeds that no trial had, on tasks that did not choose it."""
    found = run(tmp_path / "search")
    config = read_config(tmp_path / "search" / "best.toml")
    assert config == found.config and (config.first_seed, config.seeds) == (FRESH_SEED, 2)
    assert config == replace(chosen(config, found.best.params), first_seed=FRESH_SEED)
    train(config, tmp_path / "run", progress=False)
    judge = replace(config, data=tiny().data).learner()
    tasks = sample_tasks(config.family, 6, torch.Generator().manual_seed(CONFIRMATION))
    blind, oracle = config.family.blind_return(tasks), config.family.oracle_return(tasks)
    for i, seed in enumerate((FRESH_SEED, FRESH_SEED + 1)):
        meta = load_run(tmp_path / "run", seed).meta
        returns = adaptation_returns(judge, meta, config.family, tasks, 1, CONFIRMATION % 2**31).returns
        score = normalised_score(returns[-1], blind, oracle)
        assert found.confirmed["best"][1][i] == pytest.approx(score, rel=1e-9)
    stored = json.loads((tmp_path / "search" / "result.json").read_text())
    assert stored["best"]["score"] == found.best.value == pytest.approx(np.mean(found.best.user_attrs["scores"]))
    assert stored["confirmed with fresh seeds"] == found.confirmed


# ------------------------------------------------------------------------------------------------- going on
def test_a_search_that_went_on_equals_one_that_did_not_stop(tmp_path, formula):
    config = replace(CONFIG, trials=14, iterations=10, confirm=0)
    whole = run(tmp_path / "whole", config)
    run(tmp_path / "parts", replace(config, trials=4))
    assert told(run(tmp_path / "parts", config)) == told(whole)
    assert len(whole.trials) == 14 and whole.trials[0].params["inner.lr"] == tiny().inner.lr  # the start comes first
    assert told(run(tmp_path / "parts", config)) == told(whole)  # nothing is left to do
    assert len({t.params["inner.lr"] for t in whole.trials}) == 14  # and every trial has luck of its own
    other = run(tmp_path / "other", replace(config, search_seed=1, trials=3))
    assert told(other)[1:] != told(whole)[1:3]


def test_trials_below_the_median_are_pruned_and_importance_finds_the_setting_that_counts(tmp_path, formula):
    config = replace(CONFIG, trials=10, iterations=10, reports=5, confirm=0)
    assert run(tmp_path / "search", config).importance == {}  # of ten trials nobody can tell
    found = run(tmp_path / "search", replace(config, trials=45))
    states = [t.state for t in found.trials]
    assert found.best.value > 0.8 > found.trials[0].value  # it finds what is to be found
    assert states.count(TrialState.PRUNED) > 3
    pruned = [t.last_step for t in found.trials if t.state == TrialState.PRUNED]
    assert all(4 <= step < 10 for step in pruned)  # not in the first two fifths, and not when the work is done
    assert max(found.importance, key=found.importance.get) == "inner.lr"
    assert found.best.state == TrialState.COMPLETE


def test_the_winner_is_judged_by_other_seeds_than_chose_it(tmp_path, formula):
    """The formula adds 0.001 times the first seed and 0.1 on other tasks, so every number tells where it is from."""
    found = run(tmp_path / "search", replace(CONFIG, trials=5))
    for name, value in (("best", found.best.value), ("start", found.trials[0].value)):
        fresh = value + 0.001 * FRESH_SEED
        assert np.array(found.confirmed[name]) == pytest.approx(np.array([[fresh] * 2, [fresh + 0.1] * 2]))
        assert found.intervals[name].estimate == pytest.approx(fresh + 0.1)
        assert found.intervals[f"{name}, validation tasks"].estimate == pytest.approx(fresh)
    assert found.intervals["best - start"].estimate == pytest.approx(found.best.value - found.trials[0].value)


def test_ctrl_c_keeps_the_finished_trials_and_tries_the_open_one_again(tmp_path, formula, monkeypatch):
    count = iter(range(100))

    def interrupted(*arguments):
        if next(count) == 2:
            raise KeyboardInterrupt
        return formula(*arguments)

    monkeypatch.setattr(search_module, "scores_of", interrupted)
    command = f"python -m ecomlib search pricing --search {tmp_path / 'search'}"
    with pytest.raises(SearchInterrupted, match=f"Go on with: {command}$"):
        run(tmp_path / "search", replace(CONFIG, trials=4))
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'search' / 'study.db'}")
    states = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    assert [t.state for t in study.trials] == states
    found = run(tmp_path / "search", replace(CONFIG, trials=4))
    assert len(found.trials) == 4 and found.trials[2].params == study.trials[2].params


def test_a_trial_that_keeps_killing_its_process_is_given_up(tmp_path, formula):
    """What kill -9 leaves behind is a trial that runs for ever: it is tried twice more."""
    search = Search(tmp_path / "search", tiny(), replace(CONFIG, trials=1))
    killed = []
    for _ in range(4):
        study = search._study()
        waiting = study.get_trials(states=(TrialState.WAITING,))
        killed.append(study.ask(fixed_distributions=space(search.base)).params)
        assert bool(waiting) == (len(killed) < 4)
    assert killed[0] == killed[1] == killed[2] != killed[3]
    found = search.run(progress=False)
    assert [t.state for t in found.trials] == [TrialState.COMPLETE] and found.trials[0].params == killed[3]
    assert not search.study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))


def running_trials(database):
    """How many there are, without touching the database; 0 before there is one."""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return connection.execute("select count(*) from trials where state = 'RUNNING'").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_kill_9_loses_one_trial(tmp_path):
    """A real process, killed in the middle of a trial: the folder is free again and the search ends."""
    write_config(tiny(), tmp_path / "config.toml")
    command = [sys.executable, "-m", "ecomlib", "search", "pricing", "--config", "config.toml", "--search", "s"]
    command += ["--trials", "2", "--iterations", "100000", "--validation-tasks", "5", "--confirm", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    try:
        while not running_trials(tmp_path / "s" / "study.db"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        with pytest.raises(SearchError, match="in use by another process"):
            run(tmp_path / "s", SearchConfig(2, 100000, validation_tasks=5, confirm=0), tiny())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    search = Search(tmp_path / "s", tiny(), SearchConfig(2, 100000, validation_tasks=5, confirm=0))
    study = search._study()
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    with FileLock(tmp_path / "s" / ".lock", timeout=0):
        pass


def test_divergence_counts_as_a_result_and_the_search_goes_on(tmp_path, formula, monkeypatch):
    def diverges(config, *arguments):
        if config.inner.lr == tiny().inner.lr:
            raise FloatingPointError("inner gradient at step 0")
        return formula(config, *arguments)

    monkeypatch.setattr(search_module, "scores_of", diverges)
    found = run(tmp_path / "search", replace(CONFIG, trials=4, confirm=0))
    assert found.trials[0].state == TrialState.PRUNED and found.trials[0].user_attrs["diverged"].startswith("inner")
    assert len(found.trials) == 4 and found.best is not None and found.confirmed == {}
    stored = json.loads((tmp_path / "search" / "result.json").read_text())
    assert stored["trials"]["diverged"] == 1


def test_adaptation_that_diverges_on_a_validation_task_is_divergence(monkeypatch):
    diverged = torch.tensor([[False] * 5, [True] + [False] * 4])
    monkeypatch.setattr(search_space, "returns_by_step", lambda *_: AdaptationReturns(torch.zeros(2, 5), diverged))
    with pytest.raises(FloatingPointError, match="diverged on 20.0% of 5 tasks"):
        scores_of(tiny(iterations=1), tiny(), [(VALIDATION, 5)], "cpu", [1])


# ------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("config", "base", "message"),
    [
        (replace(CONFIG, iterations=3), tiny(), "iterations = 3 contradicts .*search.toml, where it is 2"),
        (replace(CONFIG, seeds=1), tiny(), "seeds = 1 contradicts"),
        (replace(CONFIG, validation_tasks=6), tiny(), "validation_tasks = 6 contradicts"),
        (replace(CONFIG, search_seed=6), tiny(), "search_seed = 6 contradicts"),
        (CONFIG, tiny("fomaml"), "algorithm = fomaml contradicts .*base.toml, where it is ppo-maml"),
        (CONFIG, tiny(family=LogitPricing(days=2)), "family.days = 2 contradicts"),
        (CONFIG, default_config("shop", "ppo-maml"), "family_name = shop contradicts"),
    ],
)
def test_another_search_in_the_folder_is_refused_by_name(tmp_path, formula, config, base, message):
    run(tmp_path / "search")
    before = {p.name: p.read_bytes() for p in (tmp_path / "search").iterdir()}
    with pytest.raises(SearchError, match=message):
        Search(tmp_path / "search", base, config)
    assert {p.name: p.read_bytes() for p in (tmp_path / "search").iterdir()} == before


def test_more_trials_and_another_confirmation_are_no_contradiction(tmp_path, formula):
    run(tmp_path / "search")
    found = run(tmp_path / "search", replace(CONFIG, trials=5, confirm=3))
    assert len(found.trials) == 5 and len(found.confirmed["best"][0]) == 3


def test_none_in_place_of_a_default_is_kept(tmp_path, formula):
    """Navigation's default weighs every stage; here the return after the last step alone counts."""
    base = default_config("navigation", "ppo-maml")
    base = replace(base, data=replace(base.data, stage_weights=None), inner=replace(base.inner, lr=4.0))
    found = run(tmp_path / "search", base=base)
    assert read_config(tmp_path / "search" / "base.toml").data.stage_weights is None
    assert read_config(tmp_path / "search" / "best.toml") == found.config
    assert run(tmp_path / "search", base=base).config == found.config  # goes on instead of finding a contradiction


def test_folders_that_are_no_search_are_refused(tmp_path, formula):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(SearchError, match="exists and is no search"):
        Search(tmp_path / "other", tiny(), CONFIG)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["letter.txt"]
    run(tmp_path / "search")
    (tmp_path / "search" / "study.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(SearchError, match="study.db cannot be used"):
        run(tmp_path / "search", replace(CONFIG, trials=5))


@pytest.mark.parametrize(("field", "value"), [("trials", 0), ("iterations", 1.5), ("seeds", 1001), ("confirm", 1)])
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"SearchConfig.{field} = {value}; allowed: "):
        SearchConfig(**{field: value})
