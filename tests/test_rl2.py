"""A policy with a memory: its networks, what it is fed, its advantages, and that it learns and survives."""

from dataclasses import replace

import pytest
import torch
from torch import Generator

from ecomlib.baselines.oracle import oracle_decisions
from ecomlib.checkpoints import CheckpointError
from ecomlib.configuration import FAMILIES, default_config
from ecomlib.exact_bandits import bayes_optimal
from ecomlib.families import LogitPricing, ShopMDP
from ecomlib.families.bandits import BernoulliBandit
from ecomlib.families.base import split
from ecomlib.learners import RL2, RL2Config
from ecomlib.learners.rl2 import clip_by_norm, trial_advantages
from ecomlib.memories import KINDS, memory_network
from ecomlib.rollout import trial
from ecomlib.run_evaluation import evaluate_run
from ecomlib.run_results import EvaluationConfig
from ecomlib.runs import load_run
from ecomlib.training import train
from ecomlib.trials import MemoryAgent, Step, TrialInput, logarithm


def config(**changes) -> RL2Config:
    return RL2Config(**({"episodes": 2, "tasks": 3, "replicas": 2, "hidden": 8, "minibatches": 2} | changes))


def seeded(value: int) -> Generator:
    return Generator().manual_seed(value)


# ------------------------------------------------------------------------------------------------- memories
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, pooled", [(1, False), (1, True), (3, False), (3, True)])
def test_all_steps_at_once_are_the_steps_one_by_one(kind, rows, pooled):
    network = memory_network(kind, size=5, rows=rows, outputs=2, hidden=8, pooled=pooled)
    parameters = [p + 0.1 * torch.randn(p.shape, generator=seeded(1)) for p in network.initial(seeded(0))]
    assert len(parameters) == network.tensors and parameters[network.head[0]].shape[-1] == 2
    inputs = torch.randn(6, 4, 2, rows * 5, generator=seeded(2))
    memory, outputs = network.begin(inputs[0]), []
    for now in inputs:
        output, memory = network.step(parameters, now, memory)
        outputs.append(output)
    together, values = network.outputs_and_values(parameters, inputs)
    assert together.shape == (6, 4, 2, rows * 2) and values.shape == (6, 4, 2)
    torch.testing.assert_close(torch.stack(outputs), together, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_past_counts(kind):
    network = memory_network(kind, size=5, rows=1, outputs=2, hidden=8)
    parameters = network.initial(seeded(0))
    inputs = torch.randn(6, 4, 1, 5, generator=seeded(2))
    changed = inputs.clone()
    changed[3] += 1
    before, after = network.outputs(parameters, inputs), network.outputs(parameters, changed)
    torch.testing.assert_close(before[:3], after[:3], rtol=0, atol=0)
    assert all((before[t] - after[t]).abs().max() > 1e-6 for t in (3, 4, 5))


def test_rows_are_alike_and_units_share_what_they_met():
    network = memory_network("gru", size=2, rows=4, outputs=1, hidden=8, pooled=True)
    parameters = network.initial(seeded(0))
    inputs = torch.randn(5, 3, 2, 4, 2, generator=seeded(1))
    order = torch.tensor([2, 0, 3, 1])
    outputs = network.outputs(parameters, inputs.flatten(-2))
    shuffled = network.outputs(parameters, inputs[..., order, :].flatten(-2))
    torch.testing.assert_close(shuffled, outputs[..., order], rtol=0, atol=1e-12)
    other = inputs.clone()
    other[0, :, 1] += 1  # what the second unit met tells the first
    assert (network.outputs(parameters, other.flatten(-2))[-1, :, 0] - outputs[-1, :, 0]).abs().max() > 1e-6


def test_a_sum_forgets_the_order_and_a_gru_does_not():
    inputs = torch.randn(6, 4, 1, 5, generator=seeded(2))
    inputs = torch.cat((inputs, inputs[-1:]))  # what is seen now stays the same
    turned = torch.cat((inputs[:-1].flip(0), inputs[-1:]))
    last = {}
    for kind in ("sum", "gru"):
        network = memory_network(kind, size=5, rows=1, outputs=2, hidden=8)
        parameters = network.initial(seeded(0))
        last[kind] = (network.outputs(parameters, inputs) - network.outputs(parameters, turned))[-1].abs().max()
    assert last["sum"] < 1e-12 and last["gru"] > 1e-6


# ------------------------------------------------------------------------------------------------- what it is fed
@pytest.mark.parametrize(
    "family", [FAMILIES[name]() for name in FAMILIES] + [BernoulliBandit(3, 4)], ids=lambda f: type(f).__name__
)
def test_inputs_have_the_size_they_say_and_begin_without_a_past(family):
    learner = RL2(family, config())
    tasks = family.tasks(torch.arange(2))
    agent = learner.agent(learner.initial(seeded(0)), record=True)
    trial(family, tasks, agent, 2, 2, 0, progress=False)
    inputs = agent.recorded.inputs
    assert inputs.shape == (2 * family.horizon, 2, 2, learner.inputs.rows * learner.inputs.size)
    assert (
        inputs.isfinite().all() and learner.policy.network.output_size == learner.inputs.rows * learner.inputs.outputs
    )


def test_what_one_step_of_pricing_is_fed():
    family = LogitPricing()
    inputs = TrialInput(family, 5)
    now, after = torch.rand(1, 1, 6, generator=seeded(0)), torch.rand(1, 1, 6, generator=seeded(1))
    earned = torch.tensor([[30.0]])
    seen = inputs(now, Step(torch.tensor([[4]]), earned, after), 15)[0, 0]
    expected = [logarithm(earned / inputs.unit)[0], torch.tensor([0.0]), torch.tensor([15 / 70])]
    chosen = torch.nn.functional.one_hot(torch.tensor(4), 11).to(now)
    expected += [now[0, 0], logarithm(now[0, 0]), after[0, 0], logarithm(after[0, 0]), chosen]
    expected += [chosen * earned / inputs.unit, chosen * logarithm(earned / inputs.unit)]
    torch.testing.assert_close(seen, torch.cat([x.flatten() for x in expected]))
    first = inputs(now, None, 0)[0, 0]
    assert first[1] == 1 and (first[-33:] == 0).all()  # an episode begins, and no action has been taken


def test_a_hidden_parameter_is_never_fed():
    """Two markets that show the same give the same inputs."""
    family = LogitPricing()
    tasks = family.tasks(torch.arange(2))
    agents = []
    for one in (tasks, tasks._replace(traffic=tasks.traffic * 2)):
        learner = RL2(family, config())
        agent = learner.agent(learner.initial(seeded(0)), record=True)
        agent.begin(family.context(one), 2, 1)
        state = family.reset(one, 1, torch.full((2, 1, 1), 0.5))
        agent.act(family.observe(one, state), torch.full((2, 1, 1), 0.5))
        agents.append(agent.recorded.inputs)
    assert torch.equal(*agents)


def test_actions_without_numbers_cannot_be_rows():
    with pytest.raises(ValueError, match="by_action = True; allowed: False where actions are not numbered"):
        RL2(FAMILIES["bidding"](), config(by_action=True))


# ------------------------------------------------------------------------------------------------- advantages
def test_advantages_by_hand():
    """Two steps, two tasks of two trials, one unit, no guess of values: reward to go less the other trial's, each
    task in its own unit."""
    reward = torch.tensor([[[1.0], [3.0], [10.0], [50.0]], [[2.0], [2.0], [30.0], [10.0]]])
    advantage, target = trial_advantages(reward, torch.zeros(2, 4, 1), 2, True, 1.0, 1.0)
    centred = torch.tensor([[-2.0, 2, -40, 40], [0, 0, 20, -20]])
    spread = torch.tensor([2**0.5, 2**0.5, 1000**0.5, 1000**0.5])  # root mean square of the task's
    to_go = torch.stack((centred.sum(0), centred[1])) / spread
    torch.testing.assert_close(target[..., 0], to_go / 2**0.5)
    torch.testing.assert_close(advantage[..., 0], (to_go - to_go.mean()) / (to_go.std() + 1e-8))
    one_unit, _ = trial_advantages(reward, torch.zeros(2, 4, 1), 2, True, 1.0, 0.0)
    to_go = torch.stack((centred.sum(0), centred[1]))
    torch.testing.assert_close(one_unit[..., 0], (to_go - to_go.mean()) / to_go.std())


def test_a_unit_answers_for_its_own_reward_now_and_for_all_later():
    reward = torch.zeros(2, 2, 3)
    reward[0, 0] = torch.tensor([3.0, 0, 0])  # the first step of the first trial's first unit
    advantage, _ = trial_advantages(reward, torch.zeros(2, 2, 3), 2, True, 1.0, 1.0)
    assert advantage[0, 0, 0] > advantage[0, 0, 1] == advantage[0, 0, 2]
    reward = torch.zeros(2, 2, 3)
    reward[1, 0] = torch.tensor([3.0, 0, 0])  # the second step: all units' first steps may have led to it
    advantage, _ = trial_advantages(reward, torch.zeros(2, 2, 3), 2, True, 1.0, 1.0)
    assert advantage[0, 0, 0] == advantage[0, 0, 1] > advantage[0, 1, 0]
    alone, _ = trial_advantages(reward, torch.zeros(2, 2, 3), 2, False, 1.0, 1.0)
    assert alone[0, 0, 0] > alone[0, 0, 1]


def test_a_gradient_is_shortened_not_turned():
    gradient = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert [g.tolist() for g in clip_by_norm(gradient, 10.0)] == [[3.0, 0.0], [[4.0]]]
    torch.testing.assert_close(clip_by_norm(gradient, 1.0), [torch.tensor([0.6, 0.0]), torch.tensor([[0.8]])])


# ------------------------------------------------------------------------------------------------- learning
def test_it_learns_a_bandit_and_knows_what_it_did():
    """Above every rule that does not adapt, and not above the best one that does."""
    family = BernoulliBandit(2, 5)
    learner = RL2(family, RL2Config(episodes=1, tasks=64, replicas=8, hidden=16, lr=1e-2, by_action=True, anneal=25))
    state = learner.meta_train(family, 0, 25, progress=False)
    _, tasks = split(family, "test", 4000)
    reward = trial(family, tasks, learner.agent(state.meta), 1, 1, 0, progress=False).returns.mean((0, 2))
    error = reward.std() / len(reward) ** 0.5
    best = bayes_optimal(family).value
    assert reward.mean() > family.blind_return(tasks).mean() + 5 * error  # about 2.5
    assert reward.mean() < best + 3 * error


@pytest.mark.parametrize("name", ["pricing", "bidding", "recommendation"])
def test_a_teacher_makes_its_own_decisions_more_likely(name):
    family = FAMILIES[name]()
    learner = RL2(family, config(pretrain=6, episodes=1, tasks=8, lr=1e-2), oracle_decisions)
    state = learner.meta_train(family, 0, 6, progress=False)
    surprise = [row["surprise"] for row in state.history]
    assert surprise[-1] < surprise[0] - 0.02
    with pytest.raises(ValueError, match="pretrain = 3; allowed: 0 without teacher"):
        RL2(family, config(pretrain=3))


def test_the_most_likely_action_takes_no_chance():
    family = LogitPricing()
    learner = RL2(family, config(sample=False))
    parameters = learner.initial(seeded(0))
    tasks = family.tasks(torch.arange(3))
    begin = family.reset(tasks, 2, torch.full((3, 2, 1), 0.5))
    actions = []
    for noise in (0.1, 0.9):
        agent = learner.agent(parameters)
        agent.begin(family.context(tasks), 3, 2)
        actions.append(agent.act(family.observe(tasks, begin), torch.full((3, 2, 1), noise)))
    assert torch.equal(*actions)
    sampled = learner.agent(parameters, sample=True)
    assert isinstance(sampled, MemoryAgent) and sampled.sample


def test_the_same_seed_gives_the_same_parameters_and_goes_on_where_it_was():
    family = ShopMDP()
    learner = RL2(family, config(anneal=4))
    whole = learner.meta_train(family, 3, 4, progress=False)
    half = learner.meta_train(family, 3, 2, progress=False)
    resumed = learner.meta_train(family, 3, 4, start=half, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.meta, resumed.meta))
    other = learner.meta_train(family, 4, 4, progress=False)
    assert not torch.equal(whole.meta[0], other.meta[0])


def test_a_run_on_the_command_line_survives_and_is_evaluated(tmp_path):
    start = default_config("shop", "rl2")
    small = replace(start, outer=config(units=2), iterations=4, checkpoint_every=2, seeds=2)
    run = train(small, tmp_path / "run", progress=False)
    row = run.metrics()[-1]
    assert row["steps"] == 3 * 2 * 2 * 2 * 6 and row["blind return"] < row["oracle return"]
    found = evaluate_run(run.path, "test", EvaluationConfig(tasks=5), progress=False)
    assert found.returns.shape == (2, 2, 5) and found.episodes == 2
    loaded = load_run(run.path, seed=1)
    assert isinstance(loaded.learner, RL2)
    train(replace(small, iterations=2), tmp_path / "half", progress=False)
    checkpoint = next((tmp_path / "half" / "checkpoints" / "seed-0").glob("*.safetensors"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        load_run(tmp_path / "half", seed=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memory": "lstm"}, "RL2Config.memory = 'lstm'; allowed: one of gru, sum, attention"),
        ({"replicas": 1}, "RL2Config.replicas = 1; allowed: a whole number from 2 to 100000"),
        ({"hidden": 10**9}, "RL2Config.hidden = 1000000000; allowed: a whole number from 1 to 4096"),
        ({"clip": 1.0}, "RL2Config.clip = 1.0; allowed: a number in"),
        ({"minibatches": 7}, "RL2Config.minibatches = 7; allowed: a whole number from 1 to tasks . replicas = 6"),
    ],
)
def test_settings_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_a_gru_remembers_as_torchs_does():
    network = memory_network("gru", size=5, rows=1, outputs=2, hidden=8)
    own = [torch.randn(p.shape, generator=seeded(0)) for p in network._memory_initial(seeded(0))]
    met, memory = torch.randn(3, 8, generator=seeded(1)), torch.randn(3, 8, generator=seeded(2))
    found, _ = network._fold(own, met, memory)
    weight, bias, recurrent, recurrent_bias = own
    expected = torch.gru_cell(met, memory, weight.T, recurrent.T, bias, recurrent_bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
