"""Both sides of every numbered equation of chapter "Shipping a policy"."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Generator
from torch.utils.flop_counter import FlopCounterMode

from ecomlib.configuration import default_config
from ecomlib.families import LogitPricing
from ecomlib.policies import CategoricalMLP
from ecomlib.rollout import Trajectories
from ecomlib.runs import LoadedRun
from ecomlib.serving import Engine, drift_test
from ecomlib.surrogates import log_likelihood, ratio

SHELF = LogitPricing(days=4)


def engine(algorithm, episodes=2, **policy):
    config = default_config("pricing", algorithm)
    data = replace(config.data, episodes=episodes, advantage="same_step")
    config = replace(config, family=SHELF, data=data, policy=replace(config.policy, **policy))
    learner = config.learner()
    return Engine(LoadedRun(config, SHELF, learner, learner.initial(Generator().manual_seed(0)), 0, 1))


def operations(function):
    with FlopCounterMode(display=False) as counter:
        found = function()
    return counter.get_total_flops(), found


@pytest.mark.parametrize("hidden", [(32,), (5, 7), (64, 64)])
@pytest.mark.parametrize("inputs", [(0, 2), None])
def test_operations_of_a_gradient_learner(hidden, inputs):
    """C_decide and C_adapt against a count of what torch multiplies, before and after the step."""
    served = engine("meta-sgd", hidden=hidden, inputs=inputs)
    sizes = (SHELF.observation_size if inputs is None else len(inputs), *hidden, SHELF.actions)
    decide = 2 * sum(a * b for a, b in zip(sizes, sizes[1:]))
    days = SHELF.days * served.support_episodes
    adapt = days * (3 * decide - 2 * sizes[0] * sizes[1])
    state = served.begin("sku")
    for day in range(days + 1):
        count, (state, _) = operations(lambda s=state: served.decide(s, 1.0))
        assert count == decide
        count, (state, feedback) = operations(lambda s=state, d=day: served.feedback(s, 3 + d % 5))
        assert count == (adapt if day == days - 1 else 0) and feedback.adapted == (day == days - 1)


@pytest.mark.parametrize("hidden", [3, 64])
def test_operations_of_a_memory(hidden):
    served = engine("recurrent-ppo", hidden=(hidden,))
    expected = 2 * (3 * SHELF.observation_size * hidden + 3 * hidden**2 + hidden * SHELF.actions)
    count, (state, _) = operations(lambda: served.decide(served.begin("sku"), 1.0))
    assert count == expected
    assert operations(lambda: served.feedback(state, 3))[0] == 0


def kept(state):
    tensors = [*state.phi, *(state.support or ()), *([] if state.memory is None else [state.memory])]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype, width", [(torch.float32, 4), (torch.float64, 8)])
def test_bytes_of_a_task(dtype, width):
    """S during the support set, after the inner step, and of a memory, against the tensors of a state."""
    torch.set_default_dtype(dtype)
    served = engine("meta-sgd", hidden=(5,))
    days, state = SHELF.days * served.support_episodes, served.begin("sku")
    for day in range(1, days):
        state, _ = served.feedback(served.decide(state, 1.0)[0], day)
        assert kept(state) == day * (width * (SHELF.observation_size + 2) + 8)
    state, _ = served.feedback(served.decide(state, 1.0)[0], 3)
    numbers = sum(p.numel() for p in served.theta)
    assert kept(state) == width * numbers
    recurrent = engine("recurrent-ppo", hidden=(7,))
    assert kept(recurrent.decide(recurrent.begin("sku"), 1.0)[0]) == width * 7


def test_missing_weight():
    """Exact sums over the actions: with the weight the expectation is the policy gradient; without, it is not."""
    generator = Generator().manual_seed(0)
    policy = CategoricalMLP((3, 4, 5))
    theta = [(p + torch.randn(p.shape, generator=generator)).requires_grad_() for p in policy.initial(generator)]
    state = torch.randn(3, generator=generator).expand(1, 1, 5, 3)
    action = torch.arange(5).expand(1, 1, 5)
    advantage = torch.randn(5, generator=generator).expand(1, 1, 5)
    other = torch.softmax(torch.randn(5, generator=generator), 0).expand(1, 1, 5)
    own = policy.log_prob(theta, state, action).detach()

    def expected(chance, surrogate, log_prob):
        # The mean over five episodes, one an action, each times five and its probability.
        data = Trajectories(state, action, log_prob, advantage, torch.ones_like(advantage))
        value = surrogate(policy, theta, data, 5 * chance * advantage).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, theta)])

    truth = expected(own.exp(), log_likelihood, own)
    weighted = expected(other, ratio, other.log())  # ratio to the probability that was written down
    unweighted = expected(other, ratio, own)  # ratio 1: as if theta had acted
    torch.testing.assert_close(weighted, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(unweighted, expected(other, log_likelihood, own), rtol=1e-10, atol=1e-12)
    assert (unweighted - truth).norm() > 0.1 * truth.norm()


def test_signed_rank():
    """Mean and variance by listing all signs; the p-value of the library by the same list."""
    rng = np.random.default_rng(0)
    x, y = rng.poisson(30.0, 9) * 1.3, rng.poisson(20.0, 9) * 1.3
    d = (y - x) / (x + y)
    rank = stats.rankdata(abs(d))
    assert len(set(rank)) == 9
    all_signs = np.array(list(product((-1, 1), repeat=9))) @ rank
    assert all_signs.mean() == 0
    assert all_signs.var() == 9 * 10 * 19 / 6
    W = (np.sign(d) * rank).sum()
    found = drift_test(x, y)
    assert found.p_value == pytest.approx((abs(all_signs) >= abs(W)).mean(), rel=1e-12)
    assert found.change == pytest.approx(np.median(d))
    assert found.p_value < 0.2  # not by being 1
