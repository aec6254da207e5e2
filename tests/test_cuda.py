"""The same numbers on a GPU: families, rollouts and meta-gradients under the same uniforms, to 1e-9 in float64. And no
wait for the GPU within an iteration.

Every test also runs with the CPU in the GPU's place, so that its own code is exercised on machines without one.
"""

import pytest
import torch

from ecomlib import noise
from ecomlib.families.base import sample_tasks
from ecomlib.families.navigation import PointNavigation
from ecomlib.families.pricing import LogitPricing
from ecomlib.families.tabular import ShopMDP
from ecomlib.learners import MAML, Inner, MAMLConfig, PPOStep, ReinforceStep, TRPOStep
from ecomlib.learners.finite import deferred
from ecomlib.policies import CategoricalMLP, GaussianMLP
from ecomlib.rollout import rollout
from ecomlib.surrogates import dice, log_likelihood, ratio

GPU = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
)
FAMILIES = {
    "shop": (ShopMDP, lambda: CategoricalMLP((6, 5, 3))),
    "pricing": (lambda: LogitPricing(days=5), lambda: CategoricalMLP((LogitPricing().observation_size, 5, 11))),
    "finite shelf": (
        lambda: LogitPricing(days=5, stock=6),
        lambda: CategoricalMLP((LogitPricing(stock=6).observation_size, 5, 11)),
    ),
    "navigation": (PointNavigation, lambda: GaussianMLP((2, 5, 2))),
}
DEVICES = pytest.mark.parametrize("device", ["cpu", GPU])


def same(a, b):
    """Equal to 1e-9 relative, whatever the device."""
    return torch.allclose(a.cpu().double(), b.cpu().double(), rtol=1e-9, atol=1e-12)


def both(device, M=6):
    for name, (family, policy) in FAMILIES.items():
        family, policy = family(), policy()
        here, there = (sample_tasks(family, M, torch.Generator().manual_seed(0), d) for d in ("cpu", device))
        generator = torch.Generator().manual_seed(1)
        theta = [p + 0.3 * torch.randn(p.shape, generator=generator) for p in policy.initial(generator)]
        yield name, family, policy, here, there, theta


@DEVICES
def test_uniforms(device):
    ids, replica = torch.arange(5), torch.arange(7)
    here = noise.uniform(1, ids, replica, 2, 3, noise.FAMILY, 4)
    there = noise.uniform(1, ids.to(device), replica.to(device), 2, 3, noise.FAMILY, 4)
    assert there.device.type == device and torch.equal(here, there.cpu())


@DEVICES
def test_families_and_rollouts(device):
    for name, family, policy, here, there, theta in both(device):
        for a, b in zip(here, there):
            assert same(a, b), name
        wanted = rollout(family, here, policy, theta, 8, seed=3)
        found = rollout(family, there, policy, [p.to(device) for p in theta], 8, seed=3)
        for field, a, b in zip(wanted._fields, wanted, found):
            assert b.device.type == device and same(a, b), (name, field)
        assert same(family.oracle_return(here), family.oracle_return(there)), name
        assert same(family.blind_return(here), family.blind_return(there)), name


@DEVICES
@pytest.mark.parametrize("surrogate", [log_likelihood, ratio, dice])
def test_meta_gradient(device, surrogate):
    for name, family, policy, _, _, theta in both(device):
        learner = MAML(policy, Inner(steps=2, lr=0.05, surrogate=surrogate), ReinforceStep(), MAMLConfig(4, 8))
        found = []
        for where in ("cpu", device):
            meta = [p.to(where) for p in theta]
            objective = learner.objective(family, meta, seed=0, iteration=0)
            outer = lambda phi, stage, p=policy: -ratio(p, phi, stage.data, stage.advantage)
            found.append(objective.gradient(meta, outer)[1])
        for a, b in zip(*found):
            assert b.device.type == device and same(a, b), name


@DEVICES
@pytest.mark.parametrize("outer", [ReinforceStep(), PPOStep(epochs=2), TRPOStep()])
def test_meta_training(device, outer):
    learner = MAML(CategoricalMLP((6, 5, 3)), Inner(lr=0.5), outer, MAMLConfig(4, 8))
    here, there = (
        learner.meta_train(ShopMDP(), seed=0, iterations=2, device=d, progress=False).meta for d in ("cpu", device)
    )
    for a, b in zip(here, there):
        assert b.device.type == device
        assert torch.allclose(a, b.cpu(), rtol=1e-6, atol=1e-9)


@pytest.fixture
def no_waiting():
    """A switch after which every wait for the GPU is an error, until the test ends."""
    yield lambda device: device == "cuda" and torch.cuda.set_sync_debug_mode("error")
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@DEVICES
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("seed", [0, (0, 1, 2)])
def test_an_iteration_never_waits_for_the_gpu(device, seed, by_hand, no_waiting):
    """A whole iteration of PPO-MAML, but for the reading of what it logs, the one wait that there is."""
    config = MAMLConfig(4, 8, by_hand=by_hand)
    family = LogitPricing(days=5)
    learner = MAML(CategoricalMLP((family.observation_size, 5, 11)), Inner(steps=2), PPOStep(epochs=2), config)
    state = learner.meta_train(family, seed, 1, device=device, progress=False)
    with deferred(None if seed == 0 else seed) as checks:
        no_waiting(device)
        objective = learner.objective(family, state.meta, seed, 1)
        meta, _, log = learner.outer.update(objective, state.meta, state.memory)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        log = checks.read(log)
    going_on = learner.meta_train(family, seed, 2, start=state, device=device, progress=False)
    assert log == going_on.history[-1]
    assert all(torch.equal(a, b) for a, b in zip(meta, going_on.meta))


@DEVICES
def test_seeds_in_one_batch(device):
    learner = MAML(CategoricalMLP((6, 5, 3)), Inner(lr=0.5), PPOStep(epochs=2), MAMLConfig(4, 8))
    batch = learner.meta_train(ShopMDP(), (0, 5), 2, device=device, progress=False)
    for index, seed in enumerate((0, 5)):
        alone = learner.meta_train(ShopMDP(), seed, 2, progress=False)
        for a, b in zip(alone.meta, batch.meta):
            assert b.device.type == device and torch.allclose(a, b[index].cpu(), rtol=1e-6, atol=1e-9)
