"""The service: a served product lives through the simulated trial; states are exact, stores alike, errors clear."""

import hashlib
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from ecomlib import noise
from ecomlib.cli.serve import ServeOptions
from ecomlib.configuration import default_config
from ecomlib.families import LogitPricing
from ecomlib.families.demand import poisson_inverse
from ecomlib.families.pricing import purchase_probability
from ecomlib.rollout import rollout
from ecomlib.runs import LoadedRun
from ecomlib.serving import (
    AlreadyAnswered,
    Conflict,
    Engine,
    MemoryStore,
    OpenDecision,
    Record,
    Service,
    SQLiteStore,
    TaskState,
    UnknownDecision,
    UnknownTask,
    drift_test,
)
from ecomlib.serving.app import create_app
from ecomlib.serving.state import pack, unpack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Starlette would like the next version of httpx
    from fastapi.testclient import TestClient

SHELF = LogitPricing(days=5)


def loaded(algorithm="meta-sgd", family=SHELF, episodes=2, seed=0, iteration=7, advantage="same_step", **inner):
    """An untrained run, its last layer enlarged so that prices differ; small, in double precision."""
    config = default_config("pricing", algorithm)
    inner = replace(config.inner, **inner)
    data = replace(config.data, episodes=episodes, advantage=advantage)
    config = replace(config, family=family, inner=inner, data=data, dtype="float64")
    learner = config.learner()
    meta = learner.initial(Generator().manual_seed(seed))
    head = learner.policy.head
    spread = lambda p: torch.randn(p.shape, generator=Generator().manual_seed(9))
    meta = [p + 0.5 * spread(p) if i in head else p for i, p in enumerate(meta)]
    return LoadedRun(config, family, learner, meta, seed, iteration)


def product(task, family=SHELF):
    """The simulated product whose id is the hash of the name."""
    return family.tasks(torch.tensor([int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big") % 2**62]))


class Shop:
    """Shoppers of the simulator, with the luck that a rollout gives them: (seed, product, replica, round, day)."""

    def __init__(self, family=SHELF, episodes=2, steps=1, seed=0):
        self.family, self.episodes, self.steps, self.seed = family, episodes, steps, seed

    def units(self, task, decision):
        """Sold at the decision's price."""
        number, market = decision["number"], product(task, self.family)
        episode, day = divmod(number, self.family.days)
        rounds = min(episode // self.episodes, self.steps)
        replica = torch.tensor([episode - rounds * self.episodes])
        luck = noise.uniform(self.seed, market.id, replica, rounds, day, noise.FAMILY, 1)[0, 0, 0]
        weekday = self.family.weekday[day % 7]
        mean = market.traffic * weekday * purchase_probability(market, torch.tensor([[decision["markup"]]]))[0]
        return int(poisson_inverse(luck, mean).item())

    def sell(self, service, task, days):
        """Days of a product: decisions and feedback as the service answers them."""
        cost, answers = product(task, self.family).cost.item(), []
        for _ in range(days):
            decision = service.decide(task, cost)
            answers += [decision, service.feedback(decision["decision"], self.units(task, decision))]
        return answers


# ------------------------------------------------------------------------------------------------- engine
@pytest.mark.parametrize(
    "algorithm, steps, episodes, settings",
    [
        ("meta-sgd", 1, 1, {}),
        ("meta-sgd", 2, 2, {}),
        ("ppo-maml", 2, 3, {"lr": (2.0, 8.0), "advantage": "leave_one_out"}),
        ("anil", 1, 2, {"surrogate": "log_likelihood"}),
    ],
)
def test_a_served_product_lives_through_the_simulated_trial(algorithm, steps, episodes, settings):
    """Prices, profits and parameters are those of ``train_task`` and of episodes after it."""
    run = loaded(algorithm, episodes=episodes, steps=steps, **settings)
    service, shop = Service([Engine(run)], MemoryStore()), Shop(episodes=episodes, steps=steps)
    answers = shop.sell(service, "sku-1", SHELF.days * episodes * (steps + 1))
    tasks = product("sku-1")
    phi, support = run.learner.train_task(run.meta, SHELF, tasks, run.seed)
    query = run.learner.evaluate_task(phi[-1], SHELF, tasks, run.seed, episode=steps)
    data = [stage.data for stage in support] + [query]
    flat = lambda name: torch.cat([getattr(d, name)[:, 0].T.flatten() for d in data])
    served = lambda kind, name: torch.tensor([a[name] for a in answers[kind::2]], dtype=torch.float64)
    assert served(0, "action").tolist() == flat("action").tolist()
    torch.testing.assert_close(served(0, "probability"), flat("log_prob").exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(served(1, "reward"), flat("reward"), rtol=1e-12, atol=0)
    engine = service.engines[service.model]
    state = unpack(service.store.get(service.model, "sku-1")[1])
    for ours, theirs in zip(engine.parameters(state), phi[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert state.stage == steps
    changed = [a["adapted"] for a in answers[1::2]]
    assert [i + 1 for i, x in enumerate(changed) if x] == [SHELF.days * episodes * (k + 1) for k in range(steps)]
    assert max((p - q[0]).abs().max() for p, q in zip(engine.theta, phi[-1])) > 1e-3


def test_a_recurrent_policy_remembers_the_episode_and_keeps_no_days():
    run = loaded("recurrent-ppo", episodes=1)
    service = Service([Engine(run)], MemoryStore())
    answers = Shop(episodes=1, steps=0).sell(service, "sku-1", 2 * SHELF.days + 2)
    data = rollout(SHELF, product("sku-1"), run.learner.policy, run.meta, 3, run.seed)
    expected = data.action[:, 0].T.flatten()[: len(answers) // 2]
    assert [a["action"] for a in answers[::2]] == expected.tolist()
    probability = torch.tensor([a["probability"] for a in answers[::2]], dtype=torch.float64)
    torch.testing.assert_close(probability, data.log_prob[:, 0].T.flatten()[: len(expected)].exp(), rtol=1e-9, atol=0)
    state = unpack(service.store.get(service.model, "sku-1")[1])
    assert state.memory.shape == (1, 1, 64) and state.support is None and state.phi == ()


def test_a_limited_stock_is_what_the_simulator_has_left():
    family = replace(SHELF, stock=30)
    run = loaded(family=family, episodes=1)
    tasks = product("sku-2", family)
    data = rollout(family, tasks, run.learner.policy, run.meta[:4], 1, run.seed)
    engine = Engine(run)
    state = engine.begin("sku-2")
    for day in range(family.days):
        state, decision = engine.decide(state, tasks.cost.item())
        assert decision.action == data.action[day, 0, 0]
        left = state.stock
        with pytest.raises(ValueError, match=f"units = {int(left) + 1}; allowed: a whole number from 0 to {left:g}"):
            engine.feedback(state, int(left) + 1)
        paid = data.reward[day, 0, 0] / (tasks.cost.item() * (decision.markup - 1))
        state, _ = engine.feedback(state, round(paid.item()))
    assert state.stock == 30  # a new episode has a full shelf


def test_an_inner_step_that_diverges_leaves_the_shop_selling():
    run = loaded(episodes=1)
    run = run._replace(meta=[p if i < 4 else p * torch.inf for i, p in enumerate(run.meta)])
    service = Service([Engine(run)], MemoryStore())
    answers = Shop(episodes=1).sell(service, "sku-1", SHELF.days + 1)
    assert not any(a["adapted"] for a in answers[1::2])
    assert service.task("sku-1")["diverged"] and 0 < answers[-2]["probability"] <= 1


def test_earlier_adaptation_than_in_training_is_a_setting():
    run = loaded(episodes=2)
    service = Service([Engine(run, support_episodes=1)], MemoryStore())
    answers = Shop(episodes=1).sell(service, "sku-1", SHELF.days)
    assert answers[-1]["adapted"]
    never = Service([Engine(run, steps=0)], MemoryStore())
    assert not any(a["adapted"] for a in Shop(steps=0).sell(never, "sku-1", 2 * SHELF.days)[1::2])


def test_what_cannot_be_served_is_refused_at_the_start():
    config = default_config("navigation", "ppo-maml")
    learner = config.learner()
    with pytest.raises(ValueError, match="PointNavigation; allowed: LogitPricing"):
        Engine(LoadedRun(config, config.family, learner, learner.initial(Generator().manual_seed(0)), 0, 1))
    run = loaded()
    lonely = replace(run.config, data=replace(run.config.data, advantage="leave_one_out", episodes=2))
    with pytest.raises(ValueError, match="support_episodes = 1: .*at least 2 episodes"):
        Engine(run._replace(config=lonely, learner=lonely.learner()), support_episodes=1)
    with pytest.raises(ValueError, match="steps = -1; allowed"):
        Engine(run, steps=-1)


def test_versions_name_what_the_numbers_depend_on():
    run = loaded()
    other = [run.meta[0] + 1e-9, *run.meta[1:]]
    runs = [run, loaded(seed=1), loaded(iteration=8), loaded(episodes=3), run._replace(meta=other)]
    versions = {Engine(r).version for r in runs} | {Engine(run, support_episodes=1).version, Engine(run, 2).version}
    assert len(versions) == 7
    assert Engine(loaded()).version == Engine(run).version


@pytest.mark.parametrize("change", [{"runs": ()}, {"port": 0}, {"port": 70_000}, {"steps": -1}, {"level": 1.0}])
def test_options_are_checked(change):
    field = next(iter(change))
    with pytest.raises(ValueError, match=f"ServeOptions.{field} = .*; allowed"):
        ServeOptions(**{"runs": (Path("run"),)} | change)


# ------------------------------------------------------------------------------------------------- state
def test_a_state_is_the_same_after_its_bytes():
    engine, shop = Engine(loaded()), Shop()
    state = engine.begin('sku "1" äöü')
    for _ in range(SHELF.days * 3 + 2):  # through an inner step, and every kind of field
        again = unpack(pack(state))
        for name, before, after in zip(TaskState._fields, state, again, strict=True):
            if name in ("phi", "support") and before:
                assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))
            else:
                assert before == after, name
        state, decision = engine.decide(again, 1.3)
        state, _ = engine.feedback(unpack(pack(state)), shop.units("sku", decision._asdict()))


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_damaged_bytes_are_refused(cut):
    engine = Engine(loaded())
    state, _ = engine.decide(engine.begin("sku"), 1.0)
    with pytest.raises(RuntimeError, match="no state of a served task"):
        unpack(pack(state)[:cut])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_changed_bytes_are_refused_or_read(data):
    """Nothing but ``RuntimeError`` comes out of bytes that something has written over, and nothing is executed."""
    packed = bytearray(pack(Engine(loaded()).begin("sku")._replace(answered=3)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(packed) - 1))
        packed[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        packed = packed or bytearray(1)
    try:
        assert isinstance(unpack(bytes(packed)), TaskState)
    except RuntimeError as error:
        assert "no state of a served task" in str(error)


# ------------------------------------------------------------------------------------------------- stores
@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    """Both implementations go through the same tests; another can be added here."""
    made = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "serve.sqlite")
    yield made
    made.close()


def line(kind="decision", key="a", model="m"):
    return Record(kind, key, model, "sku", "{}")


def test_a_store_gives_back_what_was_put(store):
    assert store.get("m", "sku") is None
    store.put("m", "sku", 0, b"\x00one", [line()])
    store.put("m", "sku", 1, b"two", [line(key="b"), line("feedback", "a")])
    store.put("other", "sku", 0, b"three", [line(key="c", model="other")])
    assert store.get("m", "sku") == (2, b"two") and store.get("other", "sku") == (1, b"three")
    assert store.records("decision", "m") == [line(), line(key="b")]
    assert store.record("feedback", "a") == line("feedback", "a")
    assert store.record("decision", "z") is None and store.records("episode", "m") == []


@pytest.mark.parametrize("version, records", [(0, []), (2, []), (1, ["a"]), (1, ["new", "a"]), (1, ["new", "new"])])
def test_a_store_changes_all_or_nothing(store, version, records):
    store.put("m", "sku", 0, b"one", [line()])
    with pytest.raises(Conflict):
        store.put("m", "sku", version, b"two", [line(key=key) for key in records])
    assert store.get("m", "sku") == (1, b"one") and store.records("decision", "m") == [line()]
    store.put("m", "sku", 1, b"two")  # and is still usable
    with pytest.raises(Conflict):
        store.put("m", "unseen", 1, b"two")


def test_one_of_many_writers_wins(store):
    store.put("m", "sku", 0, b"")
    barrier, wins = threading.Barrier(8), []

    def write(number):
        barrier.wait()
        try:
            store.put("m", "sku", 1, bytes([number]), [line(key=str(number))])
            wins.append(number)
        except Conflict:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(wins) == 1 and store.get("m", "sku") == (2, bytes(wins))
    assert [r.key for r in store.records("decision", "m")] == [str(wins[0])]


def test_activations_are_noted_in_order(store):
    for model in ("a", "b", None, "a"):
        store.activate(model)
    assert store.activations() == ["a", "b", None, "a"]


def test_activations_and_rollbacks_are_a_stack(store):
    a, b = Engine(loaded()), Engine(loaded(seed=1))
    service = Service([a, b], store)
    service.activate(a.version)
    service.activate(a.version)  # it answers already
    assert service.activations == [a.version, b.version, a.version]
    assert [service.rollback(), service.rollback()] == [b.version, a.version]
    store.activate(None)  # two rollbacks at once: the first model stays
    assert service.model == a.version


def test_sqlite_is_shared_by_processes_and_outlives_them(tmp_path):
    path = tmp_path / "serve.sqlite"
    one, two = SQLiteStore(path), SQLiteStore(path)
    one.put("m", "sku", 0, b"one")
    two.put("m", "sku", 1, b"two")
    with pytest.raises(Conflict):
        one.put("m", "sku", 1, b"three")
    one.activate("m")
    one.close()
    two.close()
    again = SQLiteStore(path)
    assert again.get("m", "sku") == (2, b"two") and again.activations() == ["m"]
    for pragma, expected in (("synchronous", 2), ("journal_mode", "wal")):
        assert again._database.execute(f"PRAGMA {pragma}").fetchone()[0] == expected


def test_a_file_that_is_no_store_is_left_alone(tmp_path):
    import sqlite3

    text = tmp_path / "notes.txt"
    text.write_text("not a database " * 100)
    foreign = tmp_path / "shop.sqlite"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE tasks (name TEXT)")
    for path in (text, foreign):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"{path.name} is no store"):
            SQLiteStore(path)
        assert path.read_bytes() == before
    with pytest.raises(OSError, match="nowhere"):
        SQLiteStore(tmp_path / "nowhere" / "serve.sqlite")


# ------------------------------------------------------------------------------------------------- service
def test_a_restart_changes_nothing(tmp_path):
    run, days = loaded(), SHELF.days * 3
    expected = Shop().sell(Service([Engine(run)], MemoryStore()), "sku-1", days)
    found = []
    for _ in range(days):
        store = SQLiteStore(tmp_path / "serve.sqlite")
        found += Shop().sell(Service([Engine(run)], store), "sku-1", 1)
        store.close()
    assert found == expected


def test_tasks_do_not_touch_each_other(store):
    run = loaded()
    alone = {task: Shop().sell(Service([Engine(run)], MemoryStore()), task, 12) for task in ("a", "b")}
    service, together = Service([Engine(run)], store), {"a": [], "b": []}
    for _ in range(12):
        for task in together:
            together[task] += Shop().sell(service, task, 1)
    assert together == alone and alone["a"] != alone["b"]


def test_feedback_is_recorded_once(store):
    service = Service([Engine(loaded())], store)
    decision = service.decide("sku", 1.3)
    with pytest.raises(OpenDecision, match=f"'sku'.*{decision['decision']}.*allowed: that first"):
        service.decide("sku", 1.3)
    assert service.task("sku")["open"] == decision
    answer = service.feedback(decision["decision"], 12)
    before = store.get(service.model, "sku")
    assert service.feedback(decision["decision"], 12) == answer
    with pytest.raises(AlreadyAnswered, match="units = 13.*allowed: 12"):
        service.feedback(decision["decision"], 13)
    assert store.get(service.model, "sku") == before and service.task("sku")["day"] == 1
    with pytest.raises(UnknownDecision, match="'nonsense'"):
        service.feedback("nonsense", 1)
    with pytest.raises(UnknownTask, match="'other'"):
        service.task("other")


@pytest.mark.parametrize("units", [-1, 2.0, True, None, "3", float("nan"), 10**30])
def test_bad_units_are_refused_and_change_nothing(units):
    service = Service([Engine(loaded())], MemoryStore())
    decision = service.decide("sku", 1.3)
    with pytest.raises(ValueError, match="units = .*; allowed: a whole number from 0"):
        service.feedback(decision["decision"], units)
    assert service.task("sku")["open"] == decision


@pytest.mark.parametrize("cost", [0, -1.0, float("nan"), float("inf"), True, "1", None, 1e12])
def test_a_bad_cost_is_refused(cost):
    service = Service([Engine(loaded())], MemoryStore())
    with pytest.raises(ValueError, match="unit_cost = .*; allowed: a number > 0"):
        service.decide("sku", cost)
    for name in ("", "x" * 201, 3, "a\nb", "a\0b", "\ud800"):
        with pytest.raises(ValueError, match="task = "):
            service.decide(name, 1.0)
    assert service.store.records("decision", service.model) == []


def test_many_clients_of_one_task_do_not_corrupt_it(store):
    """Eight threads race for one product: every day is decided once and fed back once, and the product lives through
    the same days as with one client."""
    run, days = loaded(), SHELF.days * 2 + 3
    service, shop = Service([Engine(run)], store), Shop()
    cost, barrier = product("sku-1").cost.item(), threading.Barrier(8)

    def client(_):
        barrier.wait()
        while True:
            try:
                decision = service.decide("sku-1", cost)
            except OpenDecision as error:
                decision = {"decision": error.decision.id, **error.decision._asdict()}
            if decision["number"] >= days:
                return
            service.feedback(decision["decision"], shop.units("sku-1", decision))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))
    expected = shop.sell(Service([Engine(run)], MemoryStore()), "sku-1", days)
    bodies = lambda kind: [json.loads(r.body) for r in store.records(kind, service.model)]
    assert bodies("decision")[:days] == expected[::2] and bodies("feedback") == expected[1::2]


# ------------------------------------------------------------------------------------------------- models
def test_a_new_model_answers_and_a_rollback_brings_the_old_one_back(store):
    old, new = loaded(), loaded(seed=1)
    first = Service([Engine(old)], store)
    Shop().sell(first, "sku", 3)
    service = Service([Engine(old), Engine(new)], store)
    assert service.model == Engine(new).version and first.model == service.model
    with pytest.raises(UnknownTask):
        service.task("sku")  # the new model begins with the product from the start
    pending = service.decide("sku", 1.3)
    assert pending["number"] == 0
    assert service.rollback() == Engine(old).version
    following = Shop().sell(service, "sku", 2)
    expected = Shop().sell(Service([Engine(old)], MemoryStore()), "sku", 5)
    assert following == expected[6:]  # as if the new one had never been there
    late = service.feedback(pending["decision"], 5)  # goes to the model that decided
    assert late["units"] == 5 and service.task("sku")["day"] == 0
    with pytest.raises(ValueError, match="is the first; there is none to go back to"):
        service.rollback()
    # A restart keeps the rollback; the new model can be let back in.
    assert Service([Engine(old), Engine(new)], store).model == Engine(old).version
    assert service.activate(Engine(new).version) == Engine(new).version and service.task("sku")["day"] == 1
    with pytest.raises(ValueError, match="model = 'x'; allowed"):
        service.activate("x")


def test_a_model_that_is_not_loaded_cannot_answer(store):
    old, new = loaded(), loaded(seed=1)
    Service([Engine(old), Engine(new)], store)
    with pytest.raises(ValueError, match=f"model {Engine(new).version} is not among those loaded"):
        Service([Engine(old)], store)
    alone = Service([Engine(new)], store)
    with pytest.raises(ValueError, match="not loaded: start the service with its run"):
        alone.rollback()


# ------------------------------------------------------------------------------------------------- drift
def test_false_alarms_are_as_rare_as_promised():
    """Under no drift, at the edges of the binomial's central 99.9 %; products differ a hundredfold."""
    rng, level, looks = np.random.default_rng(0), 0.05, 4000
    scale = np.exp(rng.uniform(0, 5, (looks, 1, 40)))
    profit = rng.poisson(scale, (looks, 2, 40)) * rng.uniform(0.1, 2, (looks, 1, 40))
    alarms = sum(drift_test(*pair, level).alarm for pair in profit)
    spread = 3.29 * np.sqrt(looks * level * (1 - level))
    assert looks * level - spread < alarms < looks * level + spread


def test_a_drift_that_pooled_profits_hide_is_seen():
    from scipy import stats

    rng = np.random.default_rng(1)
    scale = np.exp(rng.uniform(1, 6, (200, 40)))
    before, after = rng.poisson(scale), rng.poisson(0.7 * scale)
    found = [drift_test(a, b) for a, b in zip(before, after)]
    assert np.mean([d.alarm for d in found]) > 0.95
    assert np.mean([d.change for d in found]) == pytest.approx(-0.3 / 1.7, abs=0.02)
    assert np.mean([stats.ks_2samp(a, b).pvalue <= 0.01 for a, b in zip(before, after)]) < 0.1


def test_drift_of_equal_and_of_impossible_profits():
    assert drift_test([3, 0, 5], [3, 0, 5]) == (3, 0.0, 1.0, False)
    for reference, recent, message in (
        ([1.0], [1.0, 2.0], "recent = "),
        ([], [], "recent = "),
        ([1.0], [-1.0], "recent = -1.0; allowed: finite"),
        ([np.nan], [1.0], "reference = nan"),
    ):
        with pytest.raises(ValueError, match=message):
            drift_test(reference, recent)
    with pytest.raises(ValueError, match="level = 2"):
        drift_test([1.0], [1.0], 2)


def test_health_compares_adapted_episodes_of_the_same_tasks(store):
    service, shop = Service([Engine(loaded(episodes=1))], store, level=0.02), Shop(episodes=1)
    tasks = [f"sku-{i}" for i in range(10)]
    for task in tasks:
        shop.sell(service, task, SHELF.days * 2)
    assert service.health()["drift"] is None  # one adapted episode each
    for task in tasks:
        for _ in range(SHELF.days):
            decision = service.decide(task, product(task).cost.item())
            service.feedback(decision["decision"], shop.units(task, decision) // 3)
    found = service.health()["drift"]
    rewards = {task: [] for task in tasks}
    for record in store.records("episode", service.model):
        rewards[record.task].append(json.loads(record.body)["reward"])
    expected = drift_test([r[1] for r in rewards.values()], [r[2] for r in rewards.values()], 0.02)
    assert found == expected._asdict() | {"level": 0.02} and found["alarm"] and found["change"] < -0.3


# ------------------------------------------------------------------------------------------------- HTTP
def test_the_service_over_http(tmp_path):
    run = loaded()
    app = create_app(Service([Engine(run)], SQLiteStore(tmp_path / "serve.sqlite")))
    expected = Shop().sell(Service([Engine(run)], MemoryStore()), "shop/sku-1", 12)
    with TestClient(app) as client:
        for decision, feedback in zip(expected[::2], expected[1::2]):
            answer = client.post("/decide", json={"task": "shop/sku-1", "unit_cost": decision["unit_cost"]})
            assert (answer.status_code, answer.json()) == (200, decision)
            body = {"decision": decision["decision"], "units": feedback["units"]}
            for _ in range(2):
                answer = client.post("/feedback", json=body)
                assert (answer.status_code, answer.json()) == (200, feedback)
        assert client.get("/tasks/shop/sku-1").json()["day"] == 12 % SHELF.days
        assert client.get("/health").json()["model"] == Engine(run).version
        assert set(client.get("/openapi.json").json()["paths"]) >= {"/decide", "/feedback", "/health", "/rollback"}


@pytest.mark.parametrize(
    "path, body, status, words",
    [
        ("/decide", {"task": "sku"}, 422, ["unit_cost", "required"]),
        ("/decide", {"task": "sku", "unit_cost": "1"}, 422, ["unit_cost", "'1'"]),
        ("/decide", {"task": "sku", "unit_cost": -2}, 422, ["unit_cost = -2", "allowed: a number > 0"]),
        ("/decide", {"task": "", "unit_cost": 1}, 422, ["task = ''", "1 to 200"]),
        ("/decide", {"task": "sku", "unit_cost": 1, "price": 2}, 422, ["price"]),
        ("/decide", {"task": "\ud800", "unit_cost": 1}, 422, ["task = ", "printable"]),
        ("/feedback", {"decision": "\ud800", "units": 1}, 404, ["decision = ", "allowed"]),
        ("/decide", {"task": "open", "unit_cost": 1.0}, 409, ["'open'", "allowed"]),
        ("/decide", b"{", 422, ["JSON"]),
        ("/decide", b'{"task": "sku", "unit_cost": NaN}', 422, ["unit_cost = nan", "allowed"]),
        ("/feedback", {"decision": "none", "units": 1}, 404, ["decision = 'none'", "allowed"]),
        ("/feedback", {"decision": "OPEN", "units": -1}, 422, ["units = -1", "allowed: a whole number from 0"]),
        ("/feedback", {"decision": "OPEN", "units": 1.5}, 422, ["units", "1.5"]),
        ("/feedback", {"decision": "DONE", "units": 4}, 409, ["units = 4", "allowed: 3"]),
        ("/activate", {"model": "x"}, 422, ["model = 'x'", "allowed"]),
        ("/rollback", {}, 422, ["first"]),
        ("/nowhere", {}, 404, ["/nowhere"]),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(path, body, status, words):
    service = Service([Engine(loaded())], MemoryStore())
    opened, done = service.decide("open", 1.0), service.decide("done", 1.0)
    service.feedback(done["decision"], 3)
    with TestClient(create_app(service)) as client:
        if isinstance(body, dict):
            named = {"OPEN": opened["decision"], "DONE": done["decision"]}
            body = json.dumps({k: named.get(v, v) for k, v in body.items()}).encode()
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert all(word in answer.json()["error"] for word in words), answer.json()
    if path == "/decide" and status == 409:
        assert answer.json()["open"]["id"] == opened["decision"]


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    store = SQLiteStore(tmp_path / "serve.sqlite")
    with TestClient(create_app(Service([Engine(loaded())], store))) as client:
        first = client.post("/decide", json={"task": "sku", "unit_cost": 1.0}).json()
        pages = store._database.execute("PRAGMA page_count").fetchone()[0]
        store._database.execute(f"PRAGMA max_page_count={pages}")
        number, status = 0, 200
        while status == 200:
            number += 1
            answer = client.post("/decide", json={"task": f"sku-{number}", "unit_cost": 1.0})
            status = answer.status_code
        assert status == 503 and "full" in answer.json()["error"]
        assert client.get(f"/tasks/sku-{number}").status_code == 404  # all of it or nothing
        assert client.get("/tasks/sku").json()["open"] == first
        store._database.execute("PRAGMA max_page_count=1000000")
        assert client.post("/decide", json={"task": f"sku-{number}", "unit_cost": 1.0}).status_code == 200


def test_rollback_over_http():
    old, new = Engine(loaded()), Engine(loaded(seed=1))
    with TestClient(create_app(Service([old, new], MemoryStore()))) as client:
        assert client.post("/rollback").json() == {"model": old.version}
        assert client.post("/decide", json={"task": "sku", "unit_cost": 1.0}).json()["model"] == old.version
        assert client.post("/activate", json={"model": new.version}).json() == {"model": new.version}
