"""Chapter "Meta-reinforcement learning": what every estimator of the meta-gradient estimates, by listing every batch of
support and query episodes of a bandit and of a two-step problem with a neural policy."""

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import poisson
from torch import Tensor

from ecomlib.baselines import Thompson
from ecomlib.exact import all_trajectories, expected_return, state_values
from ecomlib.exact_meta import Outcomes, all_batches, all_outcomes, moments, objective_expected, objective_sampled
from ecomlib.families import LogitPricing, split, take
from ecomlib.families.layered import LayeredMDP
from ecomlib.families.pricing import purchase_probability
from ecomlib.families.tabular import TabularTasks
from ecomlib.learners import MAML, MAMLConfig, ReinforceStep, TRPOStep
from ecomlib.learners.adaptation import Inner, adapt
from ecomlib.learners.maml import PolicyObjective, Stage
from ecomlib.learners.outer import adapted_fisher_vector_product
from ecomlib.policies import CategoricalMLP, per_task
from ecomlib.returns import leave_one_out, reward_to_go
from ecomlib.rollout import Trajectories, rollout, trial
from ecomlib.surrogates import dice, log_likelihood, low_variance_curvature, ratio, sampling_term

ALPHA = 2.0


class Problem(NamedTuple):
    family: LayeredMDP
    tasks: TabularTasks
    policy: CategoricalMLP
    theta: list[Tensor]


def problem(name: str) -> Problem:
    """A softmax bandit with 3 arms, or 2 steps of 2 actions and a policy with a hidden layer."""
    bandit = name == "bandit"
    family = LayeredMDP(horizon=1, actions=3) if bandit else LayeredMDP(horizon=2, width=2, actions=2)
    size = family.observation_size
    policy = CategoricalMLP((size, 3) if bandit else (size, 3, 2))
    generator = torch.Generator().manual_seed(1)
    theta = [0.7 * torch.randn(p.shape, generator=generator) for p in policy.initial(generator)]
    return Problem(family, family.tasks(torch.tensor([3])), policy, theta)


@pytest.fixture(params=["bandit", "two steps"])
def case(request):
    return problem(request.param)


@pytest.fixture
def two_steps():
    return problem("two steps")


def leaves(case: Problem) -> list[Tensor]:
    return [p.clone().requires_grad_() for p in case.theta]


def flat(gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def gradient(scalar, parameters, **options) -> Tensor:
    return flat(torch.autograd.grad(scalar, parameters, **options))


def distance(a: Tensor, b: Tensor) -> float:
    """Of ``a`` from ``b``, in lengths of ``b``."""
    return ((a - b).norm() / b.norm()).item()


# Baselines of the support that are functions of the data alone, as objective II supposes: a constant, the others' mean.
def constant(case: Problem):
    value = expected_return(case.family, case.tasks, case.policy, case.theta)
    return lambda data: (reward_to_go(data.reward) - value) * data.mask


def others_mean(case: Problem):
    return lambda data: leave_one_out(reward_to_go(data.reward)) * data.mask


def state_value(case: Problem):
    """Minus the exact value of the state at theta. Given the history it is a constant."""
    value = state_values(case.family, case.tasks, case.policy, case.theta)[:, 0]  # (T, S)

    def advantage(data):
        return reward_to_go(data.reward) - torch.einsum("tmns,ts->tmn", data.observation, value)

    return advantage


def step_of(case: Problem, advantage, surrogate=log_likelihood, **inner):
    """One inner step on all rows, by the library's ``adapt``, as ``exact_meta`` wants it."""
    loss = lambda parameters, data: -surrogate(case.policy, parameters, data, advantage(data))
    settings = Inner(lr=ALPHA, surrogate=surrogate, **inner)
    return lambda step, phi, data: adapt(loss, settings, phi, [data], len(phi[0]), shared=False)[-1]


def outcomes(case: Problem, advantage, episodes: int, steps: int = 1, query_episodes: int = 1) -> Outcomes:
    update = step_of(case, advantage)
    return all_outcomes(
        case.family, case.tasks, case.policy, case.theta, update, episodes, steps, query_episodes=query_episodes
    )


def sampled_gradient(case: Problem, advantage, episodes: int, steps: int = 1) -> Tensor:
    """Exact gradient of objective II."""
    theta, update = leaves(case), step_of(case, advantage)
    return gradient(objective_sampled(case.family, case.tasks, case.policy, theta, update, episodes, steps), theta)


def expected_gradient(case: Problem, steps: int = 1) -> Tensor:
    """Exact gradient of objective I."""
    theta = leaves(case)
    return gradient(objective_expected(case.family, case.tasks, case.policy, theta, ALPHA, steps), theta)


def estimates(
    case: Problem, data: Outcomes, advantage, surrogate=log_likelihood, first_order=False, sampling=False
) -> Tensor:
    """(R, P) the meta-gradient that a learner would compute in each row: adapt on the support, score the query."""
    theta, update = per_task(case.theta, len(data.probability)), step_of(case, advantage, surrogate)
    if first_order:
        update = step_of(case, advantage, surrogate, first_order=True)
    expected = expected_return(case.family, case.tasks, case.policy, case.theta)
    stages = [theta]
    for step, support in enumerate(data.support):
        stages.append(update(step, stages[-1], support))
    score = reward_to_go(data.query.reward) - expected  # any constant will do
    objective = log_likelihood(case.policy, stages[-1], data.query, score)
    if sampling:
        returns = data.query.returns.mean(-1) - expected
        for phi, support in zip(stages, data.support):
            objective = objective + sampling_term(case.policy, phi, support, returns)
    return torch.cat([g.flatten(1) for g in torch.autograd.grad(objective.sum(), theta)], 1)


ESTIMATORS = {
    "FOMAML": {"first_order": True},
    "log_likelihood": {},
    "ratio": {"surrogate": ratio},
    "low_variance_curvature": {"surrogate": low_variance_curvature},
    "dice": {"surrogate": dice},
    "E-MAML": {"sampling": True},
}


def mean_of(case: Problem, data: Outcomes, advantage, name: str) -> Tensor:
    return moments(estimates(case, data, advantage, **ESTIMATORS[name]), data)[0]


# ------------------------------------------------------------------------------------------------- the enumeration
def test_batches_are_the_products_of_episodes(case):
    """Any function of a batch that ignores the order has the same mean over the list as over all ordered products."""
    single, chance = all_trajectories(case.family, case.tasks, case.policy, case.theta)
    batch, probability = all_batches(case.family, case.tasks, case.policy, case.theta, 3)
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    ordered = torch.tensor(list(product(range(chance.shape[1]), repeat=3)))
    returns = single.returns[0][ordered]
    function = lambda x: x.prod(-1).exp() + x.amax(-1)
    assert len(probability) < len(ordered)
    assert (probability @ function(batch.returns)).item() == pytest.approx(
        (chance[0][ordered].prod(-1) @ function(returns)).item(), rel=1e-12
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_moments_of_more_query_episodes(case, steps):
    """The variance with two query episodes, derived from the list with one, is that of the list with two."""
    advantage = constant(case)
    found = []
    for listed in (1, 2):
        data = outcomes(case, advantage, 1, steps, query_episodes=listed)
        assert data.probability.sum().item() == pytest.approx(1, abs=1e-12)
        rows = estimates(case, data, advantage, sampling=True)
        found.append(moments(rows, data, query_episodes=2 // listed))
        mean = data.probability @ rows
        assert torch.allclose(found[-1][0], mean, atol=1e-13)
        if listed == 2:
            assert found[-1][1].item() == pytest.approx((data.probability @ (rows - mean).square().sum(-1)).item())
    assert torch.allclose(found[0][0], found[1][0], atol=1e-12)
    assert found[0][1].item() == pytest.approx(found[1][1].item(), rel=1e-10)


# ------------------------------------------------------------------------------------------------- the objectives
@pytest.mark.parametrize("steps", [1, 2])
def test_objective_expected(case, steps):
    """(eq-objective-expected): the return at parameters moved K times along central differences of J."""
    J = lambda parameters: expected_return(case.family, case.tasks, case.policy, parameters).item()
    phi, h = [p.clone() for p in case.theta], 1e-5
    for _ in range(steps):
        slopes = []
        for i, p in enumerate(phi):
            slope = torch.zeros_like(p)
            for j in product(*map(range, p.shape)):
                moved = [[q.clone() for q in phi] for _ in range(2)]
                moved[0][i][j] += h
                moved[1][i][j] -= h
                slope[j] = (J(moved[0]) - J(moved[1])) / (2 * h)
            slopes.append(slope)
        phi = [p + ALPHA * s for p, s in zip(phi, slopes)]
    exact = objective_expected(case.family, case.tasks, case.policy, leaves(case), ALPHA, steps).item()
    assert exact == pytest.approx(J(phi), abs=1e-8)
    assert exact > J(case.theta) + 1e-3  # and adapting helps


@pytest.mark.parametrize("steps", [1, 2])
def test_objective_sampled(case, steps):
    """(eq-objective-sampled): the mean over listed support batches = the mean over 20,000 sampled ones."""
    advantage, episodes, copies = others_mean(case), 2, 20_000
    update = step_of(case, advantage)
    exact = objective_sampled(case.family, case.tasks, case.policy, leaves(case), update, episodes, steps).item()
    copied = take(case.tasks, torch.zeros(copies, dtype=torch.int64))._replace(id=torch.arange(copies))
    phi = per_task(case.theta, copies)
    for step in range(steps):
        support = rollout(case.family, copied, case.policy, phi, episodes, seed=0, episode=step)
        phi = [p.detach().requires_grad_() for p in update(step, phi, support)]
    sampled = expected_return(case.family, copied, case.policy, phi).detach()
    assert abs(sampled.mean().item() - exact) < 4 * sampled.std().item() / copies**0.5
    assert abs(exact - expected_return(case.family, case.tasks, case.policy, case.theta).item()) > 1e-3


# ------------------------------------------------------------------------------------------------- objective I
def hessian_parts(case: Problem) -> list[Tensor]:
    """The three expectations of (eq-policy-hessian), each (P, P), one trajectory at a time."""
    theta = leaves(case)
    data, probability = all_trajectories(case.family, case.tasks, case.policy, theta)
    value = state_values(case.family, case.tasks, case.policy, theta).detach()[:, 0]
    seen = torch.einsum("tmns,ts->tmn", data.observation, value)
    advantage = (reward_to_go(data.reward) - seen).detach()
    size = sum(p.numel() for p in theta)
    parts = [torch.zeros(size, size) for _ in range(3)]
    for n, chance in enumerate(probability[0].tolist()):
        before = torch.zeros(size)
        for t in range(case.family.horizon):
            log_prob = case.policy.log_prob(theta, data.observation[t, :1, n], data.action[t, :1, n]).sum()
            score = gradient(log_prob, theta, create_graph=True)
            curvature = torch.stack(
                [flat(torch.autograd.grad(s, theta, retain_graph=True, materialize_grads=True)) for s in score]
            )
            score, weight = score.detach(), chance * advantage[t, 0, n]
            parts[0] += weight * curvature
            parts[1] += weight * torch.outer(score, score)
            parts[2] += weight * (torch.outer(score, before) + torch.outer(before, score))
            before = before + score
    return parts


def second_derivative(case: Problem, scalar) -> Tensor:
    shapes = [p.shape for p in case.theta]
    unflat = lambda v: [x.view(s) for x, s in zip(v.split([s.numel() for s in shapes]), shapes)]
    return torch.func.hessian(lambda v: scalar(unflat(v)))(flat(case.theta))


def everything(case: Problem, advantage):
    """All episodes of the task as one batch, and advantages weighted so that a mean over it is the expectation."""
    data, probability = all_trajectories(case.family, case.tasks, case.policy, case.theta)
    return data, advantage(data) * probability * probability.shape[-1]


def test_policy_hessian(case):
    """(eq-policy-hessian): the three parts add up to the second derivative of J; the parts themselves matter."""
    exact = second_derivative(case, lambda p: expected_return(case.family, case.tasks, case.policy, p).sum())
    parts = hessian_parts(case)
    assert distance(sum(parts), exact) < 1e-10
    assert parts[1].norm() > 0.1 * exact.norm()
    assert (parts[2].norm() > 0.1 * exact.norm()) == (case.family.horizon > 1)


def test_surrogates(case):
    """(eq-surrogates): one and the same first derivative, the policy gradient, and of the second derivative the first,
    the first two, or all three parts of (eq-policy-hessian)."""
    advantage, parts = state_value(case), hessian_parts(case)
    data, weighted = everything(case, advantage)
    theta = leaves(case)
    exact = gradient(expected_return(case.family, case.tasks, case.policy, theta).sum(), theta)
    kept = {log_likelihood: 1, ratio: 2, low_variance_curvature: 2, dice: 3}
    for surrogate, count in kept.items():
        scalar = lambda p: surrogate(case.policy, p, data, weighted).sum()  # noqa: B023
        assert distance(gradient(scalar(theta), theta), exact) < 1e-12
        wanted = sum(parts[:count])
        assert (second_derivative(case, scalar) - wanted).norm() < 1e-12 * sum(parts).norm()


@pytest.mark.parametrize("steps", [1, 2])
def test_gradient_expected(case, steps):
    """(eq-gradient-expected): autograd through the exact inner steps = the product of (1 + alpha Hessian) factors."""
    J = lambda p: expected_return(case.family, case.tasks, case.policy, p).sum()
    phi, factors = case.theta, []
    for _ in range(steps):
        at = case._replace(theta=phi)
        factors.append(second_derivative(at, J))
        phi_leaves = leaves(at)
        slope = torch.autograd.grad(J(phi_leaves), phi_leaves)
        phi = [p + ALPHA * s for p, s in zip(phi, slope)]
    end = leaves(case._replace(theta=phi))
    result = gradient(J(end), end)
    for hessian in reversed(factors):
        result = result + ALPHA * hessian @ result
    assert distance(result, expected_gradient(case, steps)) < 1e-10


def limit_of(case: Problem, surrogate, first_order=False) -> Tensor:
    """What an estimator tends to as N grows: one inner step on all episodes, each with its probability."""
    data, weighted = everything(case, state_value(case))
    theta = leaves(case)
    loss = lambda parameters, _: -surrogate(case.policy, parameters, data, weighted)
    phi = adapt(loss, Inner(lr=ALPHA, first_order=first_order), theta, [data], 1)[-1]
    return gradient(expected_return(case.family, case.tasks, case.policy, phi).sum(), theta)


LIMITS = {
    "bandit": {"FOMAML": 0.1103, "log_likelihood": 0.1103, "ratio": 0.0, "dice": 0.0},
    "two steps": {"FOMAML": 0.4785, "log_likelihood": 0.3479, "ratio": 0.08602, "dice": 0.0},
}
"""Distance from the exact gradient of objective I that remains with endless support, in lengths of that gradient."""


@pytest.mark.parametrize("name", ["bandit", "two steps"])
def test_biases_that_no_amount_of_support_removes(name):
    """Pinned: log_likelihood and FOMAML always, ratio beyond horizon 1; and none for dice."""
    case = problem(name)
    exact = expected_gradient(case)
    for estimator, bias in LIMITS[name].items():
        limit = limit_of(case, **({"surrogate": log_likelihood} | ESTIMATORS[estimator]))
        assert distance(limit, exact) == pytest.approx(bias, abs=1e-12, rel=1e-3)


BIASES = {
    ("bandit", 1): {
        "FOMAML": (0.1319, 0.09965),
        "log_likelihood": (0.1319, 0.09965),
        "ratio": (0.05045, 0.03198),
        "low_variance_curvature": (0.05045, 0.03198),
        "dice": (0.05045, 0.03198),
        "E-MAML": (0.03541, 0.0),
    },
    ("bandit", 2): {
        "FOMAML": (0.2174, 0.1607),
        "log_likelihood": (0.2174, 0.1607),
        "ratio": (0.08082, 0.04185),
        "low_variance_curvature": (0.08082, 0.04185),
        "dice": (0.08082, 0.04185),
        "E-MAML": (0.06711, 0.0),
    },
    ("two steps", 1): {
        "FOMAML": (0.6255, 0.1831),
        "log_likelihood": (0.472, 0.05322),
        "ratio": (0.4963, 0.06684),
        "low_variance_curvature": (0.4963, 0.06684),
        "dice": (0.5067, 0.0829),
        "E-MAML": (0.4213, 0.0),
    },
    ("two steps", 2): {
        "FOMAML": (0.9512, 0.3579),
        "log_likelihood": (0.6007, 0.1122),
        "ratio": (0.6425, 0.1242),
        "low_variance_curvature": (0.6425, 0.1242),
        "dice": (0.6782, 0.1404),
        "E-MAML": (0.5244, 0.0),
    },
}
"""(problem, inner steps) -> estimator -> distances of its mean from the exact gradients of objectives I and II, at two
support episodes a step, each scored against the other."""


@pytest.mark.parametrize("name, steps", list(BIASES))
def test_biases_at_two_episodes(name, steps):
    """Pinned, for one and two inner steps: nobody but E-MAML estimates the gradient of II, nobody that of I."""
    case = problem(name)
    advantage = others_mean(case)
    exact = expected_gradient(case, steps), sampled_gradient(case, advantage, 2, steps)
    data = outcomes(case, advantage, 2, steps)
    for estimator in ESTIMATORS:
        mean = mean_of(case, data, advantage, estimator)
        wanted = BIASES[name, steps][estimator]
        assert [distance(mean, g) for g in exact] == pytest.approx(wanted, rel=1e-3, abs=1e-12)


def test_the_error_of_dice_falls_as_one_over_the_episodes(case):
    """Doubling the support halves the distance between its mean and the gradient of objective I; log_likelihood's
    distance stays, and so, beyond horizon 1, does ratio's."""
    advantage, exact = state_value(case), expected_gradient(case)
    counts = [4, 8, 16, 32] if case.family.horizon == 1 else [2, 4, 8]
    error = {name: [] for name in ("dice", "ratio", "log_likelihood")}
    for episodes in counts:
        data = outcomes(case, advantage, episodes)
        for name, errors in error.items():
            errors.append(distance(mean_of(case, data, advantage, name), exact))
    halved = [b / a for a, b in zip(error["dice"], error["dice"][1:])]
    assert all(0.45 < ratio < 0.6 for ratio in halved), halved
    assert error["log_likelihood"][-1] > 0.9 * error["log_likelihood"][0]
    if case.family.horizon == 1:
        assert error["ratio"] == pytest.approx(error["dice"], rel=1e-10)
    else:
        assert error["ratio"][-1] > error["dice"][-1]


def test_ratio_and_low_variance_curvature_are_one_where_they_are_used(case):
    """At the parameters that acted all derivatives agree, so every row of the estimates does."""
    advantage = constant(case)
    data = outcomes(case, advantage, 2, 2)
    rows = [estimates(case, data, advantage, **ESTIMATORS[name]) for name in ("ratio", "low_variance_curvature")]
    assert torch.allclose(*rows, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------- objective II
def check_exact(case: Problem, rows, episodes: int, steps: int, advantage, tolerance: float = 1e-12) -> None:
    """Raise AssertionError unless the mean of an estimator is the gradient of objective II."""
    data = outcomes(case, advantage, episodes, steps)
    mean = moments(rows(case, data, advantage), data)[0]
    exact = sampled_gradient(case, advantage, episodes, steps)
    assert distance(mean, exact) < tolerance, f"off by {distance(mean, exact):.2e} of the gradient"


def emaml(case: Problem, data: Outcomes, advantage) -> Tensor:
    return estimates(case, data, advantage, sampling=True)


@pytest.mark.parametrize("baseline, episodes", [(constant, 1), (constant, 3), (others_mean, 2), (others_mean, 3)])
def test_gradient_sampled(case, baseline, episodes):
    """(eq-gradient-sampled): the mean of the E-MAML estimate is the gradient of objective II, for one inner step."""
    check_exact(case, emaml, episodes, 1, baseline(case))


@pytest.mark.parametrize("baseline, episodes", [(constant, 1), (constant, 2), (others_mean, 2)])
def test_gradient_sampled_steps(case, baseline, episodes):
    """(eq-gradient-sampled-steps): the same for two inner steps, the second of which depends on the first."""
    check_exact(case, emaml, episodes, 2, baseline(case))


def test_gradient_sampled_three_steps():
    """... and for three, on the bandit."""
    case = problem("bandit")
    check_exact(case, emaml, 1, 3, constant(case))


def test_sampling_baseline(case):
    """(eq-sampling-baseline): what is subtracted from the return changes nothing if it does not depend on the support;
    the mean over all N episodes in which the scored one takes part shrinks a score-function gradient by (N - 1) / N."""
    for episodes in (2, 3, 4):
        batch, chance = all_batches(case.family, case.tasks, case.policy, leaves(case), episodes)
        batch, chance = Trajectories(*(x.detach() for x in batch)), chance.detach()
        theta = leaves(case)
        exact = gradient(expected_return(case.family, case.tasks, case.policy, theta).sum(), theta)

        def mean_with(advantage, batch=batch, chance=chance, theta=theta):
            return gradient((chance * log_likelihood(case.policy, theta, batch, advantage)).sum(), theta)

        to_go = reward_to_go(batch.reward)
        assert distance(mean_with(leave_one_out(to_go)), exact) < 1e-12
        assert distance(mean_with(to_go - 7.0), exact) < 1e-11
        all_of_them = mean_with(to_go - to_go.mean(-1, keepdim=True))
        assert distance(all_of_them, exact * (episodes - 1) / episodes) < 1e-12


def test_a_single_episode_less_its_own_mean_teaches_nothing(case):
    """The mean over all episodes as baseline, at one episode: the inner gradient is zero, whatever happened."""
    data = outcomes(case, constant(case), 1)
    theta = per_task(case.theta, len(data.probability))
    to_go = reward_to_go(data.support[0].reward)
    objective = log_likelihood(case.policy, theta, data.support[0], to_go - to_go.mean(-1, keepdim=True))
    assert all((g == 0).all() for g in torch.autograd.grad(objective.sum(), theta))


# ------------------------------------------------------------------------------------------------- the library
def stages_of(case: Problem, data: Outcomes, advantage) -> list[Stage]:
    """The rows as tasks of the library's learner. What a row counts is in its query advantage and score, in which the
    objective is linear, so that the learner's mean over tasks is the expectation."""
    weight = data.probability * len(data.probability)
    expected = expected_return(case.family, case.tasks, case.policy, case.theta).detach()
    score = weight * (data.query.returns.mean(-1) - expected)
    query = weight[:, None] * (reward_to_go(data.query.reward) - expected)
    return [*(Stage(support, advantage(support), score) for support in data.support), Stage(data.query, query, score)]


def library_mean(case: Problem, advantage, episodes: int, steps: int, **changes) -> Tensor:
    """Expectation of what ``MAML`` with the sampling term climbs."""
    stages = stages_of(case, outcomes(case, advantage, episodes, steps), advantage)
    inner = Inner(steps=steps, lr=ALPHA, first_order=changes.get("first_order", False))
    config = MAMLConfig(sampling=changes.get("sampling", True))
    objective = PolicyObjective(MAML(case.policy, inner, ReinforceStep(), config), stages)
    outer = lambda phi, stage: -log_likelihood(case.policy, phi, stage.data, stage.advantage)
    return -flat(objective.gradient(case.theta, outer)[1])


def check_library(case: Problem, episodes: int, steps: int, tolerance: float = 1e-12, **changes) -> None:
    """Raise AssertionError unless the library's learner climbs, on average, the gradient of objective II."""
    advantage = others_mean(case)
    mean = library_mean(case, advantage, episodes, steps, **changes)
    off = distance(mean, sampled_gradient(case, advantage, episodes, steps))
    assert off < tolerance, f"off by {off:.2e} of the gradient"


@pytest.mark.parametrize("steps", [1, 2])
def test_the_librarys_learner_climbs_objective_two(case, steps):
    """``MAML`` with ``sampling`` on all batches of two episodes: the gradient of II, for one and two inner steps."""
    check_library(case, 2, steps)


# What is changed in the library, and must be noticed. A mutation gets pytest's monkeypatch and returns settings.
def detach_the_inner_gradient(monkeypatch):
    return {"first_order": True}


def drop_the_sampling_term(monkeypatch):
    return {"sampling": False}


def average_the_sampling_term(monkeypatch):
    mutant = lambda *a: sampling_term(*a) / a[2].reward.shape[-1]
    monkeypatch.setattr("ecomlib.learners.maml.sampling_term", mutant)
    return {}


def sum_in_the_inner_loss(monkeypatch):
    original = MAML.loss
    mutant = lambda self, parameters, stage: original(self, parameters, stage) * stage.data.reward.shape[-1]
    monkeypatch.setattr(MAML, "loss", mutant)
    return {}


def reuse_support_as_query(monkeypatch):
    original = PolicyObjective.weighted

    def mutant(self, outer, phi, stages):
        reused = stages[-2]._replace(advantage=stages[-2].advantage * stages[-1].score[:, None])
        return original(self, outer, phi, [*stages[:-1], reused])

    monkeypatch.setattr(PolicyObjective, "weighted", mutant)
    return {}


def forget_that_later_data_depend_on_earlier_steps(monkeypatch):
    mutant = lambda policy, phi, data, score: sampling_term(policy, [p.detach() for p in phi], data, score)
    original = PolicyObjective._sampling_loss

    def loss(self, phi, stages):
        first = original(self, phi[:1], [*stages[:1], stages[-1]])
        monkeypatch.setattr("ecomlib.learners.maml.sampling_term", mutant)
        later = original(self, phi[1:], stages[1:])
        monkeypatch.setattr("ecomlib.learners.maml.sampling_term", sampling_term)
        return first + later

    monkeypatch.setattr(PolicyObjective, "_sampling_loss", loss)
    return {}


@pytest.mark.parametrize(
    "mutation, steps",
    [
        (detach_the_inner_gradient, 1),
        (detach_the_inner_gradient, 2),
        (drop_the_sampling_term, 1),
        (drop_the_sampling_term, 2),
        (average_the_sampling_term, 1),
        (sum_in_the_inner_loss, 1),
        (reuse_support_as_query, 1),
        (reuse_support_as_query, 2),
        (forget_that_later_data_depend_on_earlier_steps, 2),
    ],
)
def test_the_check_rejects(two_steps, mutation, steps, monkeypatch):
    """Each of the classical mistakes moves the mean by more than a hundredth of the gradient."""
    check_library(two_steps, 2, steps)
    with pytest.raises(AssertionError, match="off by"):
        check_library(two_steps, 2, steps, tolerance=0.01, **mutation(monkeypatch))


def test_query_of_the_unadapted_policy_is_rejected(two_steps):
    """As if the query had been played before the adaptation: the same episodes, with the chances they had then."""
    advantage = others_mean(two_steps)
    data = outcomes(two_steps, advantage, 2)
    check_exact(two_steps, emaml, 2, 1, advantage)
    log_prob = two_steps.policy.log_prob(two_steps.theta, data.query.observation, data.query.action)
    before = data._replace(probability=data.probability * (log_prob - data.query.log_prob).sum((0, 2)).exp())
    assert before.probability.sum().item() == pytest.approx(1, abs=1e-12)
    mean = moments(emaml(two_steps, before, advantage), before)[0]
    assert distance(mean, sampled_gradient(two_steps, advantage, 2)) > 0.1


# ------------------------------------------------------------------------------------------------- trust regions
def test_adapted_fisher(two_steps):
    """(eq-adapted-fisher): the second derivative of the adapted policies' divergence = (d phi)' F (d phi) = what the
    library multiplies with."""
    case = two_steps
    learner = MAML(
        case.policy,
        Inner(lr=ALPHA),
        TRPOStep(),
        MAMLConfig(tasks=2, episodes=3, advantage=lambda data: leave_one_out(reward_to_go(data.reward))),
    )
    objective = learner.objective(case.family, case.theta, seed=0, iteration=0)
    support, query = objective.stages
    shapes = [p.shape for p in case.theta]
    unflat = lambda v: [x.view(s) for x, s in zip(v.split([s.numel() for s in shapes]), shapes)]

    def adapted(v):
        step = lambda p: log_likelihood(case.policy, p, support.data, support.advantage)
        phi = [p.expand(2, *p.shape) for p in unflat(v)]
        slope = torch.func.grad(lambda p: step(p).sum())(phi)
        return [p + ALPHA * g for p, g in zip(phi, slope)]

    start = flat(case.theta)
    old = case.policy.distribution([p.detach() for p in adapted(start)], query.data.observation)
    kl = lambda phi: case.policy.kl(old, case.policy.distribution(phi, query.data.observation)).sum(0).mean()
    left = torch.func.hessian(lambda v: kl(adapted(v)))(start) / case.family.horizon
    rows = lambda v: torch.cat([p.flatten(1) for p in adapted(v)], 1).flatten()
    jacobian = torch.func.jacrev(rows)(start)
    split_rows = lambda w: [
        x.reshape(2, *s) for x, s in zip(w.view(2, -1).split([s.numel() for s in shapes], 1), shapes)
    ]
    fisher = torch.func.hessian(lambda w: kl(split_rows(w)))(rows(start)) / case.family.horizon
    right = jacobian.T @ fisher @ jacobian
    assert distance(left, right) < 1e-10
    product = adapted_fisher_vector_product(objective, case.theta)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        vector = torch.randn(len(start), generator=generator)
        assert distance(flat(product(unflat(vector))), right @ vector) < 1e-9


# ------------------------------------------------------------------------------------------------- the inner step
@pytest.mark.parametrize("episodes", [2, 5])
def test_inner_signal(case, episodes):
    """(eq-inner-signal): with a baseline of its own each episode counts alike: the squared error of the mean of N
    gradients is the N-th part of one's, so signal over noise grows as N."""
    advantage = state_value(case)
    ratios = []
    for count in (1, episodes):
        batch, chance = all_batches(case.family, case.tasks, case.policy, case.theta, count)
        theta = per_task(case.theta, len(chance))
        objective = log_likelihood(case.policy, theta, batch, advantage(batch))
        rows = torch.cat([g.flatten(1) for g in torch.autograd.grad(objective.sum(), theta)], 1)
        mean = chance @ rows
        ratios.append((mean.square().sum() / (chance @ (rows - mean).square().sum(-1))).item())
    assert ratios[1] / ratios[0] == pytest.approx(episodes, rel=1e-9)


def test_stores_posterior():
    """(eq-stores-posterior): prior times the Poisson probability of every day of every store, by scipy, is the pooled
    posterior of the library."""
    shelf = LogitPricing(days=3)
    _, tasks = split(shelf, "test", 2)
    agent = Thompson(shelf, 32, stores=True)
    sold = trial(shelf, tasks, agent, 1, 4, seed=0, progress=False)
    particles = agent.belief.particles
    markup = torch.tensor(shelf.markups)
    likelihood = np.ones((2, 32))
    for day, (action, reward) in enumerate(zip(sold.action[0], sold.reward[0])):
        units = (reward / (tasks.cost[:, None] * (markup[action] - 1))).round()
        for store in range(4):
            share = purchase_probability(particles, markup[action[:, store]].expand(32, -1)).T  # (M, P)
            likelihood *= poisson.pmf(units[:, store, None], (particles.traffic * share * shelf.weekday[day]))
    posterior = likelihood / likelihood.sum(-1, keepdims=True)
    assert np.allclose(agent.belief.weight[:, 0].numpy(), posterior, rtol=1e-7, atol=1e-12)
