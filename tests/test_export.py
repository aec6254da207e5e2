"""Exported policies: what the file computes is what the library computes, and what it is adapted to is checked."""

import hashlib
import json
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from ecomlib import noise
from ecomlib.calibration import SalesTableError
from ecomlib.calibration.days import read_days, support_episodes
from ecomlib.cli.export import main
from ecomlib.config_files import config_hash
from ecomlib.configuration import PolicySettings, default_config
from ecomlib.export import TOLERANCE, adapted_parameters, export_policy
from ecomlib.families import LogitPricing
from ecomlib.families.base import sample_tasks
from ecomlib.learners import MetaTraining
from ecomlib.learners.objective import split_meta
from ecomlib.rollout import Trajectories, rollout
from ecomlib.runs import LoadedRun, Run

SHELF = LogitPricing()


def loaded(algorithm="meta-sgd", family="pricing", seed=0, **changes):
    """An untrained run, its last layer enlarged so that actions are far from equally likely."""
    config = default_config(family, algorithm)
    config = replace(config, dtype="float64", **changes)
    learner = config.learner()
    meta = learner.initial(Generator().manual_seed(seed))
    head = learner.policy.head
    meta = [p + 0.5 * torch.randn(p.shape, generator=Generator().manual_seed(9)) if i in head else p
            for i, p in enumerate(meta)]  # fmt: skip
    return LoadedRun(config, config.family, learner, meta, seed, 7)


def days(count=7, price=True, seed=3, family=SHELF):
    """A table of ``count`` days of one product at random prices of the grid."""
    rng = np.random.default_rng(seed)
    markup = rng.choice(family.markups, count)
    table = {"day": np.arange(1, count + 1), "units": rng.poisson(30, count), "unit_cost": np.full(count, 1.3)}
    return pd.DataFrame(table | ({"price": markup * 1.3} if price else {"markup": markup}))


def onnx(path, **inputs):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {name: np.asarray(value, np.float32) for name, value in inputs.items()})


# ------------------------------------------------------------------------------------------------- what files compute
@pytest.mark.parametrize("format, ending", [("onnx", ".onnx"), ("torch", ".pt2")])
@pytest.mark.parametrize("data", [None, 7, 28])
def test_an_exported_policy_computes_what_the_library_does(tmp_path, format, ending, data):
    run = loaded()
    table = None if data is None else days(data)
    described = json.loads(export_policy(run, tmp_path / f"p{ending}", format, table).read_text())
    theta = split_meta(run.learner.inner, run.meta)[0]
    if data is not None:
        theta, episodes = adapted_parameters(run.learner, run.meta, SHELF, read_days(table, SHELF))
        assert described["adapted"]["episodes"] == episodes == -(-data // SHELF.days)
    for rows in (1, 5, 200):
        observation = torch.rand(rows, SHELF.observation_size) * 3
        expected = run.learner.policy.log_probs(theta, observation[None])[0].exp()
        if format == "onnx":
            (found,) = onnx(tmp_path / "p.onnx", observation=observation)
        else:
            found = torch.export.load(tmp_path / "p.pt2").module()(observation.float()).numpy()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
        assert expected.std(-1).min() > 1e-3  # else uniform probabilities would pass


def test_adaptation_changes_what_is_exported(tmp_path):
    run = loaded()
    observation = torch.rand(50, SHELF.observation_size)
    export_policy(run, tmp_path / "theta.onnx")
    export_policy(run, tmp_path / "phi.onnx", task_data=days())
    (before,), (after,) = (onnx(tmp_path / f"{name}.onnx", observation=observation) for name in ("theta", "phi"))
    assert abs(before - after).max() > 0.01


@pytest.mark.parametrize("format, ending", [("onnx", ".onnx"), ("torch", ".pt2")])
def test_a_recurrent_policy_carries_its_memory_through_an_episode(tmp_path, format, ending):
    run = loaded("recurrent-ppo")
    export_policy(run, tmp_path / f"p{ending}", format)
    data = rollout(SHELF, sample_tasks(SHELF, 1, Generator().manual_seed(1)), run.learner.policy, run.meta, 6, 0)
    expected = run.learner.policy.log_probs(run.meta, data.observation).exp()[:, 0]
    memory = np.zeros((6, run.config.policy.hidden[0]), np.float32)
    program = None if format == "onnx" else torch.export.load(tmp_path / "p.pt2").module()
    for day, observation in enumerate(data.observation[:, 0].float()):
        if format == "onnx":
            probability, memory = onnx(tmp_path / "p.onnx", observation=observation, memory=memory)
        else:
            probability, memory = program(observation, torch.as_tensor(memory))
        np.testing.assert_allclose(probability, expected[day], atol=TOLERANCE, rtol=0)
    forgotten = run.learner.policy.log_probs(run.meta, data.observation[-1:]).exp()[0, 0]
    assert abs(forgotten - expected[-1]).max() > 1e-3  # the memory matters


@pytest.mark.parametrize("format, ending", [("onnx", ".onnx"), ("torch", ".pt2")])
def test_a_gaussian_policy_gives_mean_and_standard_deviation(tmp_path, format, ending):
    run = loaded("ppo-maml", "navigation")
    export_policy(run, tmp_path / f"p{ending}", format)
    observation = torch.rand(9, run.family.observation_size)
    mean, log_std = run.learner.policy.distribution(run.meta, observation[None])
    if format == "onnx":
        found = onnx(tmp_path / "p.onnx", observation=observation)
    else:
        found = torch.export.load(tmp_path / "p.pt2").module()(observation.float())
    np.testing.assert_allclose(found[0], mean[0], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(found[1], log_std.exp().expand_as(mean[0]), atol=TOLERANCE, rtol=0)


def test_a_gaussian_policy_that_narrowed_below_its_minimum_is_exported_at_the_minimum(tmp_path):
    run = loaded("ppo-maml", "navigation")
    run.meta[-1].fill_(-5.0)
    export_policy(run, tmp_path / "p.onnx")
    _, deviation = onnx(tmp_path / "p.onnx", observation=torch.zeros(1, run.family.observation_size))
    np.testing.assert_allclose(deviation, run.config.policy.minimum_std, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- the description
def test_the_description_says_what_goes_in_and_where_it_comes_from(tmp_path):
    run = loaded()
    path = export_policy(run, tmp_path / "policy.onnx", task_data=days())
    found = json.loads(path.read_text())
    assert path.name == "policy.json"
    assert found["sha256"] == hashlib.sha256((tmp_path / found["model"]).read_bytes()).hexdigest()
    assert [(port["name"], port["shape"]) for port in found["inputs"]] == [("observation", ["batch", 6])]
    assert [(port["name"], port["shape"]) for port in found["outputs"]] == [("probability", ["batch", 11])]
    assert set(found["scaling"]) == set(found["inputs"][0]["entries"])
    assert found["markups"] == list(SHELF.markups)
    assert found["run"] == {"config_sha256": config_hash(run.config), "seed": 0, "iteration": 7}
    assert found["adapted"] | {"days": 7, "episodes": 1, "inner_steps": 1} == found["adapted"]
    assert 0 <= found["largest_difference"] <= TOLERANCE
    assert json.loads(export_policy(run, tmp_path / "policy.onnx").read_text())["adapted"] is None


def test_a_description_is_enough_to_price_a_product(tmp_path):
    """Scale a day's observation by the words of the description alone: the same numbers as the family's."""
    run = loaded()
    scaling = json.loads(export_policy(run, tmp_path / "policy.onnx").read_text())["scaling"]
    table = days(3, price=False)
    data = support_episodes(read_days(table, SHELF), SHELF, run.learner.policy, run.meta[: run.learner.policy.tensors])
    said = {"day": 2 / 14, "cost": 1.3, "weekday": 0.85, "markup": table["markup"][1], "sold": table["units"][1] / 100}
    assert [said.get(name, 1.0) for name in scaling] == pytest.approx(data.observation[2, 0, 0].tolist())


# ------------------------------------------------------------------------------------------------- adaptation
def test_the_policys_own_days_adapt_as_in_the_learner():
    """A table of the episodes that theta itself collected, prices in money: the same phi as ``train_task``."""
    run = loaded(data=replace(default_config("pricing", "meta-sgd").data, episodes=2))
    tasks = sample_tasks(SHELF, 1, Generator().manual_seed(4))
    phi, support = run.learner.train_task(run.meta, SHELF, tasks, seed=5)
    data, cost = support[0].data, tasks.cost.item()
    markup = SHELF.markup(data.action)[:, 0]
    units = data.reward[:, 0] / (cost * (markup - 1))
    table = pd.DataFrame({
        "day": np.arange(1, 29), "price": (cost * markup).T.flatten(), "unit_cost": cost,
        "units": units.round().T.flatten(),
    })  # fmt: skip
    shuffled = table.sample(frac=1, random_state=0)
    found, episodes = adapted_parameters(run.learner, run.meta, SHELF, read_days(shuffled, SHELF))
    assert episodes == 2
    for ours, theirs, before in zip(found, phi[-1], phi[0], strict=True):
        torch.testing.assert_close(ours, theirs[0], rtol=1e-9, atol=1e-11)
        assert (ours - before[0]).abs().max() > 1e-6


def test_support_episodes_are_those_of_a_rollout():
    run = loaded()
    theta = run.meta[: run.learner.policy.tensors]
    tasks = SHELF.tasks(torch.tensor([12]))
    data = rollout(SHELF, tasks, run.learner.policy, theta, 3, 0)
    units = (data.reward / (tasks.cost * (SHELF.markup(data.action) - 1))).round()
    flat = lambda x: x[:, 0].T.flatten().numpy()
    table = pd.DataFrame({"day": np.arange(1, 43), "markup": flat(SHELF.markup(data.action)), "units": flat(units)})
    found = support_episodes(
        read_days(table.assign(unit_cost=tasks.cost.item()), SHELF), SHELF, run.learner.policy, theta
    )
    for name, ours, theirs in zip(Trajectories._fields, found, data, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_probabilities_that_were_written_down_are_used():
    """With them, the days of a uniform pricing give the weighted gradient; without, all weights are 1."""
    run = loaded()
    theta, table = run.meta[: run.learner.policy.tensors], days(7)
    data = support_episodes(read_days(table, SHELF), SHELF, run.learner.policy, theta)
    known = support_episodes(read_days(table.assign(probability=1 / 11), SHELF), SHELF, run.learner.policy, theta)
    expected = run.learner.policy.log_prob(theta, data.observation, data.action)
    torch.testing.assert_close(data.log_prob, expected)
    torch.testing.assert_close(known.log_prob, torch.full_like(expected, -np.log(11)))
    unweighted, weighted = (
        adapted_parameters(run.learner, run.meta, SHELF, read_days(t, SHELF))[0]
        for t in (table, table.assign(probability=1 / 11))
    )
    assert max((a - b).abs().max() for a, b in zip(unweighted, weighted)) > 1e-3


def test_a_limited_stock_is_counted_down_by_the_table():
    family = replace(SHELF, stock=60)
    run = loaded()
    table = days(20, price=False, family=family).assign(units=[5, 7, 0, *[1] * 17])
    data = support_episodes(read_days(table, family), family, run.learner.policy, run.meta[:4])
    assert (data.observation[:4, 0, 0, -1] * 60).tolist() == pytest.approx([60, 55, 48, 48])
    assert data.observation[0, 0, 1, -1] == 1  # full again
    with pytest.raises(SalesTableError, match="units.*70 sold.*allowed: 60"):
        read_days(days(14, family=family).assign(units=5), family)


def test_absent_days_do_not_count():
    """Twenty days are an episode and six days of the next: the gradient is that of the rows that are there."""
    run = loaded()
    table = read_days(days(20), SHELF)
    data = support_episodes(table, SHELF, run.learner.policy, run.meta[: run.learner.policy.tensors])
    assert data.mask.sum((0, 1)).tolist() == [14, 6] and data.reward.shape == (14, 1, 2)
    found, _ = adapted_parameters(run.learner, run.meta, SHELF, table)
    phi, _ = split_meta(run.learner.inner, [p.clone().requires_grad_() for p in run.meta])
    # The same surrogate over 20 rows, written without padding: mean reward and deviation are of 20 rows.
    rows = data.mask.bool()
    reward = data.reward[rows]
    own = (reward - reward.mean()) * 2 / 20
    own = own / (((own - own.mean()) ** 2).mean().sqrt() + 1e-8) / 20
    log_prob = run.learner.policy.log_prob(phi, data.observation, data.action)[rows]
    sizes = split_meta(run.learner.inner, run.meta)[1]
    for p, g, size, ours in zip(phi, torch.autograd.grad((log_prob * own).sum(), phi), sizes, found, strict=True):
        torch.testing.assert_close(p + size * g, ours, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------- tables
def test_a_week_that_starts_on_a_wednesday():
    table = days(5)
    table["day"] = [(date(2024, 1, 31) + timedelta(n)).isoformat() for n in range(5)]  # a Wednesday
    assert read_days(table, SHELF)["day"].tolist() == [2, 3, 4, 5, 6]
    run = loaded()
    data = support_episodes(read_days(table, SHELF), SHELF, run.learner.policy, run.meta[: run.learner.policy.tensors])
    assert data.reward.shape == (5, 1, 1) and data.mask.min() == 1
    assert SHELF.seen(data.observation).weekday[:, 0, 0].tolist() == pytest.approx([0.85, 0.9, 1.05, 1.25, 1.2])


def test_prices_between_those_of_the_grid_are_those_nearest():
    table = days(11).assign(price=1.3 * (np.array(SHELF.markups) + 0.07))
    assert read_days(table, SHELF)["action"].tolist() == list(range(11))
    continuous = replace(SHELF, continuous=True)
    table = days(3).assign(price=1.3 * np.array([1.1, 1.777, 2.5]))
    assert read_days(table, continuous)["markup"].tolist() == pytest.approx([1.1, 1.777, 2.5])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"price": [1.3 * 1.05] * 6 + [1.3 * 0.97]}, r"'price': 1 of 7 rows.*row 7 \(price 1.261.*half a step of"),
        ({"price": [1.3 * 2.6] + [2.0] * 6}, "column 'price': 1 of 7 rows.*row 1.*half a step"),
        ({"price": [2.0] * 6 + [-1.0]}, "column 'price': 1 of 7.*allowed: numbers > 0, at most 1e"),
        ({"units": [1, 2, 3.5, 4, 5, 6, 7]}, "column 'units': 1 of 7.*row 3.*3.5.*whole numbers from 0"),
        ({"units": [-1] * 7}, "column 'units': 7 of 7.*-1.*whole numbers from 0"),
        ({"units": ["a", *"123456"]}, "column 'units': 1 of 7.*row 1.*'a'.*allowed: finite numbers"),
        ({"units": [np.inf] * 7}, "column 'units': 7 of 7"),
        ({"unit_cost": [1e10] * 7}, "column 'unit_cost': 7 of 7"),
        ({"unit_cost": [0.0] * 7}, "column 'unit_cost': 7 of 7.*allowed: numbers > 0, at most 1e"),
        ({"day": [1, 2, 3, 5, 6, 7, 8]}, "column 'day': 1 of 7.*row 4 .*day 5.*none left out"),
        ({"day": [1, 2, 3, 3, 4, 5, 6]}, "column 'day': 1 of 7.*row 4 .*one row a day"),
        ({"day": [0, 1, 2, 3, 4, 5, 6]}, "column 'day': 1 of 7.*row 1 .*day 0.*from 1"),
        ({"day": [*"abcdefg"]}, "column 'day': 7 of 7"),
        ({"day": [1e300] * 7}, "column 'day'"),
        ({"probability": [0.5] * 6 + [0.0]}, "column 'probability': 1 of 7.*row 7.*allowed: numbers in"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_column_row_value_and_what_is_allowed(change, message):
    with pytest.raises(SalesTableError, match=message):
        read_days(days().assign(**change), SHELF)


def test_a_table_of_something_else_is_refused(tmp_path):
    with pytest.raises(SalesTableError, match="missing columns 'unit_cost', 'price'.*found: day, units"):
        read_days(days()[["day", "units"]], SHELF)
    with pytest.raises(SalesTableError, match="empty"):
        read_days(days()[:0], SHELF)
    with pytest.raises(SalesTableError, match="no such file"):
        read_days(tmp_path / "week1.csv", SHELF)
    table = days()
    before = table.copy()
    read_days(table, SHELF)
    pd.testing.assert_frame_equal(table, before)


def values():
    numbers = st.integers(-3, 20) | st.floats() | st.sampled_from([1.365, 2.2, 1e300])
    return numbers | st.none() | st.booleans() | st.text(max_size=5) | st.dates() | st.sampled_from(["2024-01-31", "3"])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_table_is_read_or_refused(data):
    """Whatever is in the columns: a table that keeps what is promised, or ``SalesTableError``."""
    names = data.draw(st.lists(st.sampled_from([*days().columns, "markup", "probability", "x"]), unique=True))
    rows = data.draw(st.integers(0, 4))
    column = lambda: data.draw(st.lists(values(), min_size=rows, max_size=rows))
    table = days(rows).assign(**{name: column() for name in names})
    try:
        read = read_days(table, SHELF)
    except SalesTableError:
        return
    assert len(read) == rows > 0 and read["markup"].isin(SHELF.markups).all() and (read["units"] >= 0).all()
    assert (read["day"].between(0, SHELF.days - 1)).all() and np.isfinite(read["reward"]).all()
    theta = loaded().meta[:4]
    found = support_episodes(read, SHELF, loaded().learner.policy, theta)
    assert found.mask.sum() == rows and all(x.isfinite().all() for x in found)


# ------------------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    run = loaded()
    with pytest.raises(ValueError, match="--out.*ends with .onnx"):
        export_policy(run, tmp_path / "p.pt2")
    with pytest.raises(ValueError, match="--format = 'tensorrt'; allowed: onnx, torch"):
        export_policy(run, tmp_path / "p.onnx", "tensorrt")
    with pytest.raises(ValueError, match="--task-data.*recurrent policy"):
        export_policy(loaded("recurrent-ppo"), tmp_path / "p.onnx", task_data=days())
    with pytest.raises(ValueError, match="--task-data.*PointNavigation.*allowed.*LogitPricing"):
        export_policy(loaded("ppo-maml", "navigation"), tmp_path / "p.onnx", task_data=days())
    lonely = loaded(data=replace(run.config.data, advantage="leave_one_out", episodes=2))
    with pytest.raises(ValueError, match="--task-data.*at least 2 episodes"):
        export_policy(lonely, tmp_path / "p.onnx", task_data=days(7))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_put_in_place(tmp_path, monkeypatch):
    from ecomlib import export

    monkeypatch.setattr(export, "_run_onnx", lambda path, inputs: [np.zeros((64, 11), np.float32)])
    with pytest.raises(RuntimeError, match="differs by .* from the library's: nothing was written"):
        export_policy(loaded(), tmp_path / "p.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_a_runs_checkpoint(tmp_path, capsys):
    config = replace(default_config("pricing", "meta-sgd"), policy=PolicySettings(hidden=(8,), inputs=(0, 2)))
    run, learner = Run.create(tmp_path / "run", config), config.learner()
    torch.set_default_dtype(torch.float32)
    run.checkpoints((0,)).save(MetaTraining(3, learner.initial(Generator().manual_seed(0)), None, []))
    days().to_csv(tmp_path / "week1.csv", index=False)
    assert main([str(tmp_path / "run"), "--task-data", str(tmp_path / "week1.csv")]) == 0
    assert "iteration 3" in capsys.readouterr().out
    described = json.loads((tmp_path / "run" / "policy.json").read_text())
    assert described["adapted"]["table"] == "week1.csv" and described["run"]["iteration"] == 3
    luck = noise.uniform(0, torch.tensor([1]), torch.tensor([0]), 0, 0, noise.POLICY, 6)[0]
    (probability,) = onnx(tmp_path / "run" / "policy.onnx", observation=luck)
    assert probability.sum() == pytest.approx(1, abs=1e-6)
