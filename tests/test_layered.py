"""LayeredMDP: its tables, the protocol, and how many courses an episode can take."""

import pytest
import torch

from ecomlib.exact import all_trajectories, expected_return
from ecomlib.families import split
from ecomlib.families.layered import LayeredMDP
from ecomlib.policies import CategoricalMLP
from ecomlib.rollout import rollout

WORLDS = [LayeredMDP(horizon=1, actions=3), LayeredMDP(), LayeredMDP(horizon=3, width=3, actions=2)]


def uniform(world):
    policy = CategoricalMLP((world.observation_size, world.actions))
    return policy, [torch.zeros(world.observation_size, world.actions), torch.zeros(1, world.actions)]


@pytest.mark.parametrize("world", WORLDS)
def test_tables_are_layered_probabilities(world):
    """Every step leads from its block of states to the next block, the last step to the end, where nothing is paid."""
    _, tasks = split(world, "test", 50)
    assert torch.allclose(tasks.transition.sum(-1), torch.ones(()), atol=1e-14)
    layer = torch.tensor([0, *(1 + k // world.width for k in range(world.observation_size - 1))])
    layer[-1] = world.horizon
    reached = tasks.transition > 0
    step = layer[None, :] - layer[:, None]  # (S, S')
    assert (reached.any(2) == (step == 1)[None])[:, :-1].all() and reached[:, -1, :, -1].all()
    assert (tasks.reward[:, -1] == 0).all() and tasks.reward.amin() >= 0 and tasks.reward.amax() <= 1
    assert (tasks.start[:, 0] == 1).all()


@pytest.mark.parametrize("world", WORLDS)
def test_courses_of_an_episode(world):
    """As many as the docstring says; their mean return is that of sampled episodes."""
    _, tasks = split(world, "test", 3)
    policy, theta = uniform(world)
    data, chance = all_trajectories(world, tasks, policy, theta)
    assert chance.shape[1] == world.actions * (world.width * world.actions) ** (world.horizon - 1)
    assert torch.allclose(chance.sum(-1), torch.ones(()), atol=1e-12)
    sampled = rollout(world, tasks, policy, theta, 20_000, seed=0)
    assert sampled.mask.min() == 1  # nobody ends early
    error = (sampled.returns.mean(-1) - (chance * data.returns).sum(-1)) / (sampled.returns.std(-1) / 20_000**0.5)
    assert error.abs().max() < 4


def test_blind_uniform_oracle_are_in_order():
    """On average always action 0 earns what uniform actions earn, since the prior treats all actions alike."""
    world = LayeredMDP(horizon=3)
    _, tasks = split(world, "test", 4000)
    policy, theta = uniform(world)
    blind, oracle = world.blind_return(tasks), world.oracle_return(tasks)
    even = expected_return(world, tasks, policy, theta)
    assert ((even - blind).mean() / ((even - blind).std() / 4000**0.5)).abs() < 4
    assert (blind <= oracle + 1e-12).all() and oracle.mean() > blind.mean() + 0.3


@pytest.mark.parametrize("field, value", [("horizon", 0), ("width", 1.5), ("actions", 1)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"LayeredMDP.{field} = {value}; allowed"):
        LayeredMDP(**{field: value})
