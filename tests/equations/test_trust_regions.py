"""Chapter "Trust regions": both sides of every numbered equation, on MDPs small enough to list every trajectory."""

import math

import pytest
import torch

from ecomlib.exact import action_probabilities, all_trajectories, expected_return, state_values
from ecomlib.families.base import split
from ecomlib.families.tabular import STATES, ShopMDP, TabularTasks, action_value, policy_evaluation
from ecomlib.learners import TRPOConfig
from ecomlib.learners.ppo import clipped_surrogate
from ecomlib.learners.trpo import conjugate_gradient, fisher_vector_product, trust_region_step
from ecomlib.policies import CategoricalMLP
from ecomlib.rollout import Trajectories

SHOP = ShopMDP(horizon=4)
POLICY = CategoricalMLP((SHOP.observation_size, SHOP.actions))
ENDED = len(STATES) - 2  # this state and the next are the ends of a session
CHOICES = 3  # actions of the bandits below


def random_mdps(seed):
    """Two MDPs in which everything is possible and every step pays: the shop's arrays, filled at random."""
    generator = torch.Generator().manual_seed(seed)
    states, actions = len(STATES), SHOP.actions
    transition = torch.rand(2, states, actions, states, generator=generator) ** 3 + 0.01
    transition = transition / transition.sum(-1, keepdim=True)
    transition[:, ENDED:] = torch.eye(states)[ENDED:, None]
    reward = torch.randn(2, states, actions, states, generator=generator) + 1
    reward[:, ENDED:] = 0
    start = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0]).repeat(2, 1)
    return TabularTasks(torch.arange(2), transition, reward, start)


def parameters(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((SHOP.observation_size, SHOP.actions), (1, SHOP.actions))
    return [(scale * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]


def moved(theta, seed, scale):
    return [(p + q).detach().requires_grad_() for p, q in zip(theta, parameters(seed, scale), strict=True)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def advantages(tasks, theta, discount):
    """(T, M, S, A), A_t(s, a) of the policy."""
    values = state_values(SHOP, tasks, POLICY, theta, discount).detach()
    later = torch.cat((values[1:], torch.zeros_like(values[:1])))
    return torch.stack([action_value(tasks, v, discount) for v in later]) - values[..., None]


def visits(tasks, theta):
    """(T, M, S), d_t(s) = P(s_t = s)."""
    found = [tasks.start]
    for acts in action_probabilities(SHOP, tasks, POLICY, theta)[:-1]:
        found.append(torch.einsum("ms,msa,msat->mt", found[-1], acts, tasks.transition))
    return torch.stack(found)


def powers(discount):
    return discount ** torch.arange(SHOP.horizon)[:, None]


def surrogate_objective(tasks, old, new, discount):
    """(M,) L_pi(pi'): the old policy's states, the new policy's actions. Differentiable in ``new``."""
    acts = action_probabilities(SHOP, tasks, POLICY, new)
    mean = (acts * advantages(tasks, old, discount)).sum(-1)
    gain = (powers(discount) * (visits(tasks, old).detach() * mean).sum(-1)).sum(0)
    return expected_return(SHOP, tasks, POLICY, old, discount).detach() + gain


# ------------------------------------------------------------------------------------ from one policy to another
@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_performance_difference(discount):
    """(eq-performance-difference): by all trajectories of the new policy, advantages of the old."""
    tasks, old, new = random_mdps(0), parameters(1), parameters(2, 2.0)
    data, chance = all_trajectories(SHOP, tasks, POLICY, new)
    state = data.observation[..., : len(STATES)].argmax(-1)
    time, row = torch.arange(SHOP.horizon)[:, None, None], torch.arange(2)[:, None]
    seen = advantages(tasks, old, discount)[time, row, state, data.action] * data.mask
    right = (chance * (powers(discount)[..., None] * seen).sum(0)).sum(-1)
    before, after = (expected_return(SHOP, tasks, POLICY, p, discount) for p in (old, new))
    assert torch.allclose(after - before, right, atol=1e-12) and (after - before).abs().max() > 0.05


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_surrogate_objective(discount):
    """(eq-surrogate-objective): states of the old and actions of the new policy = ratios on trajectories of the old."""
    tasks, old, new = random_mdps(0), parameters(1), parameters(2)
    data, chance = all_trajectories(SHOP, tasks, POLICY, old)
    state = data.observation[..., : len(STATES)].argmax(-1)
    time, row = torch.arange(SHOP.horizon)[:, None, None], torch.arange(2)[:, None]
    seen = advantages(tasks, old, discount)[time, row, state, data.action] * data.mask
    ratio = (POLICY.log_prob(new, data.observation, data.action) - data.log_prob).exp()
    gain = (chance * (powers(discount)[..., None] * ratio * seen).sum(0)).sum(-1)
    before = expected_return(SHOP, tasks, POLICY, old, discount)
    found = surrogate_objective(tasks, old, new, discount)
    assert torch.allclose(found, before + gain, atol=1e-12)
    assert (found - expected_return(SHOP, tasks, POLICY, new, discount)).abs().min() > 1e-3  # and it is not J


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_first_order_agreement(discount):
    """(eq-surrogate-first-order): value and gradient agree at the old policy; the value's error is of second order."""
    tasks, theta = random_mdps(0), parameters(1)
    left = surrogate_objective(tasks, theta, theta, discount)
    right = expected_return(SHOP, tasks, POLICY, theta, discount)
    assert torch.allclose(left, right, atol=1e-12)
    slopes = [flat(torch.autograd.grad(x.sum(), theta)) for x in (left, right)]
    assert torch.allclose(*slopes, atol=1e-12) and slopes[0].norm() > 0.1

    def error(step):
        new = [p + step * q for p, q in zip(theta, parameters(3), strict=True)]
        return surrogate_objective(tasks, theta, new, discount) - expected_return(SHOP, tasks, POLICY, new, discount)

    assert torch.allclose(error(1e-3) / error(5e-4), torch.tensor(4.0), rtol=0.02)


def total_variation(p, q):
    return 0.5 * (p - q).abs().sum(-1)


def divergence(p, q):
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_state_drift(scale):
    """(eq-state-drift): the states seen drift apart by at most the largest difference of the policies, each step."""
    tightest = math.inf
    for seed in range(40):
        tasks, old = random_mdps(seed), parameters(seed)
        new = moved(old, seed + 100, scale)
        acts = [action_probabilities(SHOP, tasks, POLICY, p).detach() for p in (old, new)]
        worst = total_variation(*acts).amax((0, 2))  # (M,)
        drift = total_variation(visits(tasks, old), visits(tasks, new)).detach()  # (T, M)
        room = torch.arange(SHOP.horizon)[:, None] * worst - drift
        assert (room >= -1e-12).all()
        tightest = min(tightest, (room[1:] / (worst * torch.arange(1, SHOP.horizon)[:, None])).min().item())
    assert tightest < 0.8  # not so wide that it could not fail


@pytest.mark.parametrize("discount", [1.0, 0.8])
@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_lower_bound(discount, scale):
    """(eq-lower-bound), both inequalities and their proof's first step, over many MDPs and pairs of policies."""
    weight = (torch.arange(SHOP.horizon) * powers(discount)[:, 0]).sum()
    closest = 0.0
    for seed in range(40):
        tasks, old = random_mdps(seed), parameters(seed)
        new = moved(old, seed + 100, scale)
        acts = [action_probabilities(SHOP, tasks, POLICY, p).detach() for p in (old, new)]
        advantage = advantages(tasks, old, discount)
        largest = advantage.abs().amax((0, 2, 3))
        apart, kl = total_variation(*acts).amax((0, 2)), divergence(*acts).amax((0, 2))
        mean = (acts[1] * advantage).sum(-1)
        assert (mean.abs() <= 2 * total_variation(*acts) * largest[:, None] + 1e-12).all()
        J = expected_return(SHOP, tasks, POLICY, new, discount).detach()
        gap = (J - surrogate_objective(tasks, old, new, discount).detach()).abs()
        by_variation, by_kl = 4 * largest * apart**2 * weight, 2 * largest * kl * weight
        assert (gap <= by_variation).all() and (by_variation <= by_kl + 1e-12).all()
        closest = max(closest, (gap / by_variation).max().item())
    assert closest > 0.015  # with a constant seventy times smaller this test would fail


def test_schulmans_constant():
    """Infinite horizon, equation (eq-lower-bound) as its horizon grows: the constant of Schulman et al. (2015)."""
    discount, states = 0.9, len(STATES)
    _, shoppers = split(ShopMDP(), "test", 20)
    closest = 0.0
    for seed, scale in ((0, 0.05), (1, 0.5), (2, 3.0)):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(20, states, SHOP.actions, generator=generator)
        new = torch.softmax(logits + scale * torch.randn(logits.shape, generator=generator), -1)
        old = torch.softmax(logits, -1)
        value = policy_evaluation(shoppers, old, discount)
        advantage = action_value(shoppers, value, discount) - value[..., None]
        moves = torch.einsum("msa,msat->mst", old, shoppers.transition)
        system = torch.eye(states) - discount * moves
        visited = torch.linalg.solve(system.mT, shoppers.start[..., None])[..., 0]  # sum_t discount^t d_t
        L = (shoppers.start * value).sum(-1) + (visited * (new * advantage).sum(-1)).sum(-1)
        J = (shoppers.start * policy_evaluation(shoppers, new, discount)).sum(-1)
        constant = 4 * advantage.abs().amax((1, 2)) * discount / (1 - discount) ** 2
        bound = constant * total_variation(old, new).amax(-1) ** 2
        assert ((J - L).abs() <= bound).all()
        assert (L - constant * divergence(old, new).amax(-1) <= J).all()
        closest = max(closest, ((J - L).abs() / bound).max().item())
    assert closest > 0.003


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_pinsker(scale):
    """(eq-pinsker), with equality in the limit of two nearby fair coins."""
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits, -1)
    q = torch.softmax(logits + scale * torch.randn(500, 4, generator=torch.Generator().manual_seed(1)), -1)
    assert (total_variation(p, q) ** 2 <= divergence(p, q) / 2 + 1e-15).all()
    coin, other = torch.tensor([0.5, 0.5]), torch.tensor([0.5 + 1e-4, 0.5 - 1e-4])
    assert total_variation(coin, other).item() ** 2 == pytest.approx(divergence(coin, other).item() / 2, rel=1e-6)


# ----------------------------------------------------------------------------------------- Fisher, natural gradient
def kl_of_bandit(logits):
    old = torch.log_softmax(logits, -1).detach()
    return lambda new: (old.exp() * (old - torch.log_softmax(new, -1))).sum()


def closed_fisher(logits):
    p = torch.softmax(logits, -1)
    return torch.diag(p) - torch.outer(p, p)


def test_fisher():
    """(eq-fisher): Hessian of the divergence = mean outer product of the score = diag(pi) - pi pi^T; and the error of
    the quadratic is of third order."""
    z = torch.tensor([0.4, -1.0, 0.3, 0.0])
    hessian = torch.autograd.functional.hessian(kl_of_bandit(z), z)
    scores = torch.eye(4) - torch.softmax(z, -1)  # row a: grad log pi(a)
    outer = torch.einsum("a,ai,aj->ij", torch.softmax(z, -1), scores, scores)
    assert torch.allclose(hessian, outer, atol=1e-12) and torch.allclose(outer, closed_fisher(z), atol=1e-12)
    slope = torch.autograd.functional.jacobian(kl_of_bandit(z), z)
    assert slope.abs().max() < 1e-12
    x = torch.tensor([1.0, 0.5, -0.2, 0.0])
    error = lambda step: kl_of_bandit(z)(z + step * x) - step**2 * x @ outer @ x / 2
    assert (error(1e-2) / error(5e-3)).item() == pytest.approx(8, rel=0.02)


def test_fisher_vector_product():
    """(eq-fisher-vector-product), against the matrix."""
    z = torch.tensor([0.4, -1.0, 0.3, 0.0], requires_grad=True)
    product = fisher_vector_product(kl_of_bandit(z)(z), [z])
    for v in torch.eye(4):
        assert torch.allclose(product([v])[0], closed_fisher(z.detach()) @ v, atol=1e-12)


def random_problem(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator)
    return root @ root.T + 0.2 * torch.eye(size), torch.randn(size, generator=generator), generator


def test_trust_region_step():
    """(eq-trpo-step): on the boundary, and no other point of the ellipsoid gains more; the library goes there."""
    for seed in range(5):
        F, g, generator = random_problem(seed)
        delta = 0.02
        natural = torch.linalg.solve(F, g)
        step = (2 * delta / (g @ natural)).sqrt() * natural
        assert (step @ F @ step / 2).item() == pytest.approx(delta)
        assert (g @ step).item() == pytest.approx(math.sqrt(2 * delta * (g @ natural).item()))
        others = torch.randn(10_000, 5, generator=generator)
        others = others * (2 * delta / torch.einsum("ni,ij,nj->n", others, F, others)).sqrt()[:, None]
        assert (others @ g).max() <= g @ step and (others @ g).max() > 0.8 * (g @ step)
        evaluate = lambda p, F=F, g=g: (g @ p[0], p[0] @ F @ p[0] / 2 * (1 - 1e-9))
        config = TRPOConfig(radius=delta, damping=0.0, cg_iterations=20)
        new, report = trust_region_step([torch.zeros(5)], [g], lambda v, F=F: [F @ v[0]], evaluate, config)
        assert report.backtracks == 0 and torch.allclose(new[0], step, rtol=1e-6)
        assert torch.allclose(conjugate_gradient(lambda v, F=F: F @ v, g, 20), natural, rtol=1e-6)


def test_invariance():
    """(eq-invariance): theta = theta(eta), nonlinear; the natural direction maps onto itself, the gradient does not."""
    theta_of = lambda eta: torch.stack((eta[0] ** 3 + eta[1], 10 * eta[1] - eta[2], torch.exp(eta[2])))
    reward, eta = torch.tensor([0.2, 1.0, 0.5, 0.3]), torch.tensor([0.7, -0.2, 0.4])
    logits = lambda theta: torch.cat((theta, torch.zeros(1)))  # four actions, three parameters: F has full rank
    J = lambda theta: torch.softmax(logits(theta), -1) @ reward
    theta = theta_of(eta)
    B = torch.autograd.functional.jacobian(theta_of, eta)
    old = torch.log_softmax(logits(theta), -1)
    kl = lambda theta: (old.exp() * (old - torch.log_softmax(logits(theta), -1))).sum()
    slope, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    F, F_eta = hessian(kl, theta), hessian(lambda e: kl(theta_of(e)), eta)
    g, g_eta = slope(J, theta), slope(lambda e: J(theta_of(e)), eta)
    assert torch.allclose(F_eta, B.T @ F @ B, atol=1e-10) and torch.allclose(g_eta, B.T @ g, atol=1e-12)
    assert torch.allclose(B @ torch.linalg.solve(F_eta, g_eta), torch.linalg.solve(F, g), atol=1e-9)
    assert torch.nn.functional.cosine_similarity(B @ g_eta, g, dim=0) < 0.9


def test_softmax_natural_gradient():
    """(eq-softmax-natural): F A = grad J of a softmax bandit, so that the natural gradient is the advantage."""
    z, reward = torch.tensor([0.4, -1.0, 0.3]), torch.tensor([0.2, 1.0, 0.5])
    p = torch.softmax(z, -1)
    advantage = reward - p @ reward
    gradient = torch.autograd.functional.jacobian(lambda z: torch.softmax(z, -1) @ reward, z)
    assert torch.allclose(closed_fisher(z) @ advantage, gradient, atol=1e-12)
    assert torch.allclose(gradient, p * advantage, atol=1e-12)
    multiplied = p * (0.7 * advantage).exp()
    assert torch.allclose(torch.softmax(z + 0.7 * advantage, -1), multiplied / multiplied.sum(), atol=1e-12)


# -------------------------------------------------------------------------------------------------------- clipping
def one_step(logits, action, ratio, advantage, clip=0.2):
    """Value and gradient, with respect to the logits, of one step's term of the clipped surrogate."""
    policy, parameters = CategoricalMLP((1, CHOICES)), [torch.zeros(1, CHOICES), logits[None].requires_grad_()]
    observation, action = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), action)
    now, ones = policy.log_prob(parameters, observation, action), torch.ones(1, 1, 1)
    data = Trajectories(observation, action, now.detach() - math.log(ratio), ones, ones)
    value = clipped_surrogate(policy, parameters, data, advantage * ones, clip).sum()
    return value.item(), torch.autograd.grad(value, parameters[1])[0][0]


@pytest.mark.parametrize("advantage", [1.5, -0.7])
@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.9, 1.0, 1.1, 1.21, 4.0])
def test_clipped_surrogate(ratio, advantage):
    """(eq-clipped-surrogate), value; (eq-clip-gradient): advantage x ratio x score, or nothing at all."""
    logits = torch.tensor([0.2, -0.5, 0.1])
    value, gradient = one_step(logits, 1, ratio, advantage)
    assert value == pytest.approx(min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
    stopped = ratio > 1.2 if advantage > 0 else ratio < 0.8
    score = torch.eye(CHOICES)[1] - torch.softmax(logits.detach(), -1)
    expected = torch.zeros(CHOICES) if stopped else advantage * ratio * score
    assert torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("rare", [0.02, 0.1, 0.001])
def test_a_clip_does_not_bound_the_ratios(rare):
    """(eq-clip-escape): gradient ascent, in tiny exact steps, stops when the common action's ratio is 1 - clip. By then
    the rare ones' ratios are far past 1 + clip."""
    clip, old = 0.2, torch.tensor([rare, rare, 1 - 2 * rare])
    advantage = torch.tensor([1 - 2 * rare, 1 - 2 * rare, -2 * rare])  # mean zero under the old policy
    assert abs(old @ advantage) < 1e-12
    z = old.log().requires_grad_()
    for _ in range(400_000 if rare < 0.01 else 40_000):
        ratio = torch.softmax(z, -1) / old
        objective = (old * torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)).sum()
        gradient = torch.autograd.grad(objective, z)[0]
        if not gradient.any():
            break
        with torch.no_grad():
            z += (0.01 / gradient.abs().max()) * gradient
    ratio = (torch.softmax(z, -1) / old).detach()
    assert not gradient.any()
    assert ratio[2].item() == pytest.approx(1 - clip, abs=0.01)
    assert ratio[0].item() == pytest.approx(1 + clip * (1 - 2 * rare) / (2 * rare), rel=0.05)
