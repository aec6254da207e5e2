"""Tasks shared out over two real processes (gloo): the numbers of one process, and how much is sent."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from ecomlib.families.navigation import PointNavigation
from ecomlib.families.pricing import LogitPricing
from ecomlib.families.sinusoid import Sinusoid
from ecomlib.learners import (
    MAML,
    GradientStep,
    Inner,
    MAMLConfig,
    PPOStep,
    ReinforceStep,
    ReptileStep,
    SupervisedMAML,
    TRPOStep,
)
from ecomlib.learners.sharding import ALONE, Shards
from ecomlib.networks import GRU, MLP
from ecomlib.policies import Categorical, CategoricalMLP, GaussianMLP

RANKS, ITERATIONS = 2, 3
PRICING, NAVIGATION = LogitPricing(days=4), PointNavigation(horizon=6, tolerance=0.1)
SEEDS = (3, 0, 11)
SOFTMAX = CategoricalMLP((LogitPricing.observation_size, 5, 11))


def pricing(outer, policy=SOFTMAX, inner=None, **config):
    return lambda: (PRICING, MAML(policy, inner or Inner(lr=0.05), outer, MAMLConfig(4, 6, **config)))


CASES = {
    "RL": (pricing(ReinforceStep()), 3),
    "RL, seeds": (pricing(ReinforceStep()), SEEDS),
    "PPO": (pricing(PPOStep(epochs=3)), 3),
    "PPO, seeds": (pricing(PPOStep(epochs=3), inner=Inner(steps=2, lr=0.05)), SEEDS),
    "PPO by autograd": (pricing(PPOStep(epochs=3), by_hand=False, chunk=1), SEEDS),
    "TRPO": (pricing(TRPOStep()), 3),
    "TRPO by autograd": (pricing(TRPOStep(), by_hand=False), 3),
    "Reptile": (pricing(ReptileStep(), inner=Inner(steps=2, lr=0.05)), 3),
    "Reptile, seeds": (pricing(ReptileStep(adam=True), inner=Inner(steps=2, lr=0.05)), SEEDS),
    "Meta-SGD, seeds": (pricing(ReinforceStep(), inner=Inner(learn_lr=True, lr=0.05)), SEEDS),
    "E-MAML, seeds": (pricing(ReinforceStep(), sampling=True), SEEDS),
    "GRU, no inner step": (pricing(PPOStep(epochs=2), Categorical(GRU(6, 3, 11)), Inner(steps=0)), 3),
    "steps alone": (
        lambda: (NAVIGATION, MAML(GaussianMLP((2, 5, 2)), Inner(lr=0.05), PPOStep(), MAMLConfig(4, 6, compact=True))),
        3,
    ),
    "supervised": (
        lambda: (Sinusoid(), SupervisedMAML(MLP((1, 4, 1)), Inner(lr=0.01), GradientStep(), tasks=4, by_hand=True)),
        SEEDS,
    ),
}


def poisoned():
    """Infinite advantages of this process's last task, on the second process alone."""

    def advantage(data):
        result = torch.zeros_like(data.reward)
        if distributed.get_rank() == 1:
            result[0, -1] = torch.inf
        return result

    maml = MAML(SOFTMAX, Inner(lr=0.05), ReinforceStep(), MAMLConfig(4, 6, advantage=advantage))
    maml.shards = Shards(distributed.get_rank(), RANKS)
    try:
        maml.meta_train(PRICING, 0, 1, progress=False)
    except FloatingPointError as error:
        return str(error)


def process(rank: int, folder: Path) -> None:
    """What one of the processes does: train every case, and save results and counts."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found = {}
    for name, (make, seed) in CASES.items():
        family, maml = make()
        maml.shards = Shards(rank, RANKS)
        state = maml.meta_train(family, seed, ITERATIONS, progress=False)
        found[name] = (state.meta, state.history, maml.shards.all_reduces, maml.shards.bytes_moved)
    found["poisoned"] = poisoned()
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process saved."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__]
    running = [subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE) for rank in range(RANKS)]
    deadline = time.monotonic() + 240
    for child in running:
        try:
            _, errors = child.communicate(timeout=max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            [other.kill() for other in running]
            raise
        assert child.returncode == 0, errors.decode()[-2000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_numbers_of_one(ranks, name):
    make, seed = CASES[name]
    family, maml = make()
    alone = maml.meta_train(family, seed, ITERATIONS, progress=False)
    for found in ranks:
        meta, history, _, _ = found[name]
        # Conjugate gradient magnifies rounding.
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(meta, alone.meta, strict=True))
        for row, wanted in zip(history, alone.history, strict=True):
            assert list(row) == list(wanted)
            assert all(row[k] == pytest.approx(wanted[k], rel=1e-6, abs=1e-9) for k in row)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][name][0], ranks[1][name][0]))


@pytest.mark.parametrize(
    ("name", "each"), [("RL", 1), ("RL, seeds", 1), ("PPO", 3), ("PPO, seeds", 3), ("Reptile", 1), ("supervised", 1)]
)
def test_one_all_reduce_for_each_outer_gradient(ranks, name, each):
    """An epoch of PPO, or a step of the others, sends the gradient once, with the numbers to log in the same buffer."""
    make, seed = CASES[name]
    family, maml = make()
    state = maml.meta_train(family, seed, 1, progress=False)
    numbers = sum(p.numel() for p in state.meta)
    logged = maml.inner.steps + 1 if isinstance(maml, MAML) else 0  # returns
    logged += name != "Reptile"  # the loss
    numbers += logged * (1 if seed == 3 else len(SEEDS))
    for found in ranks:
        _, _, all_reduces, moved = found[name]
        assert all_reduces == each * ITERATIONS
        assert moved == (numbers + 1) * 8 * each * ITERATIONS  # one number more: whether all was finite


def test_a_task_that_diverges_stops_every_process(ranks):
    assert "inner gradient at step 0 of task 3, tensor 0, is not finite" in ranks[1]["poisoned"]
    assert "a value of another process, which names it" in ranks[0]["poisoned"]


def test_parts_are_equal_or_refused():
    parts = [Shards(rank, 3).part(6) for rank in range(3)]
    assert [list(range(6))[part] for part in parts] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="tasks = 7 with 3 ranks; allowed: a number of tasks that the number of ranks"):
        Shards(0, 3).part(7)
    for arguments, message in (((0, 0), "Shards.size = 0"), ((2, 2), "Shards.rank = 2"), ((-1, 2), "Shards.rank = -1")):
        with pytest.raises(ValueError, match=message):
            Shards(*arguments)


def test_one_process_sends_nothing():
    tensors = [torch.randn(2, 3), torch.randn(4)]
    found = ALONE.average(tensors)
    assert all(a is b for a, b in zip(found, tensors)) and ALONE.all_reduces == ALONE.bytes_moved == 0
    assert ALONE.part(7) == slice(0, 7)


def test_thinning_needs_all_tasks_in_one_process():
    _, maml = pricing(TRPOStep(transitions=5))()
    meta = maml.initial(torch.Generator().manual_seed(0))
    objective = maml.objective(PRICING, meta, 0, 0)
    objective.shards = Shards(0, 2)
    with pytest.raises(ValueError, match="TRPOStep.transitions = 5; allowed: None with several processes"):
        from ecomlib.learners.outer import adapted_fisher_vector_product

        adapted_fisher_vector_product(objective, meta, 5)


if __name__ == "__main__":
    process(int(sys.argv[1]), Path(sys.argv[2]))
