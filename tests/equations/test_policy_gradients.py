"""Chapter "Policy gradients": both sides of every numbered equation, on MDPs small enough to list every trajectory."""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from ecomlib.exact import action_probabilities, all_trajectories, expected_return, state_values
from ecomlib.families.tabular import STATES, ShopMDP, TabularTasks, action_value
from ecomlib.policies import CategoricalMLP, per_task
from ecomlib.returns import gae, leave_one_out, reward_to_go
from ecomlib.rollout import Trajectories, rollout
from ecomlib.surrogates import log_likelihood

SHOP = ShopMDP(horizon=3)
POLICY = CategoricalMLP((SHOP.observation_size, SHOP.actions))
ENDED = len(STATES) - 2  # this state and the next are the ends of a session


@pytest.fixture
def tasks():
    """Two MDPs in which everything is possible and every step pays: the shop's arrays, filled at random."""
    generator = torch.Generator().manual_seed(0)
    states, actions = len(STATES), SHOP.actions
    transition = torch.rand(2, states, actions, states, generator=generator) + 0.05
    transition = transition / transition.sum(-1, keepdim=True)
    transition[:, ENDED:] = torch.eye(states)[ENDED:, None]
    reward = torch.randn(2, states, actions, states, generator=generator) + 1
    reward[:, ENDED:] = 0
    start = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0]).repeat(2, 1)
    return TabularTasks(torch.arange(2), transition, reward, start)


@pytest.fixture
def theta():
    return parameters(1)


def parameters(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((SHOP.observation_size, SHOP.actions), (1, SHOP.actions))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def gradient(scalar, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, parameters, retain_graph=True)])


def exact_gradient(tasks, theta, discount=1.0):
    return gradient(expected_return(SHOP, tasks, POLICY, theta, discount).sum(), theta)


def score_sum(data, probability, weight):
    """The scalar whose gradient is the expectation of sum_t weight_t grad log pi(a_t | s_t), summed over the tasks."""
    return (probability.detach() * (data.log_prob * weight.detach() * data.mask).sum(0)).sum()


def look_up(table, data):
    """Values (T, M, S) of the states (T, M, N) of the data."""
    return table.gather(-1, data.observation[..., : len(STATES)].argmax(-1))


def powers(discount):
    return discount ** torch.arange(SHOP.horizon)[:, None, None]


# ------------------------------------------------------------------------------------------------------ the model
def test_trajectory_probabilities(tasks, theta):
    """(eq-trajectory): the product of all draws, by recursion in plain Python; and sampled sessions follow it."""
    data, probability = all_trajectories(SHOP, tasks, POLICY, theta)
    probability = probability.detach()
    acts = action_probabilities(SHOP, tasks, POLICY, theta).tolist()
    assert torch.allclose(probability.sum(-1), torch.ones(2), atol=1e-12)

    def walk(task, state, time, chance, path, found):
        if time == SHOP.horizon or state >= ENDED:
            found[path] = found.get(path, 0.0) + chance
            return
        for action, following in itertools.product(range(SHOP.actions), range(len(STATES))):
            step = acts[time][task][state][action] * tasks.transition[task, state, action, following].item()
            reward = tasks.reward[task, state, action, following].item()
            walk(task, following, time + 1, chance * step, (*path, state, action, round(reward, 9)), found)

    for task in range(2):
        by_hand = {}
        for state in range(ENDED):
            walk(task, state, 0, tasks.start[task, state].item(), (), by_hand)
        assert data.reward.shape[2] == len(by_hand)
        states = data.observation[..., : len(STATES)].argmax(-1)
        for n in range(len(by_hand)):
            steps = range(int(data.mask[:, task, n].sum()))
            path = [
                (states[t, task, n].item(), data.action[t, task, n].item(), round(data.reward[t, task, n].item(), 9))
                for t in steps
            ]
            assert probability[task, n].item() == pytest.approx(by_hand[sum(path, ())], rel=1e-12)

    # Sampled sessions follow it: one number for each sequence of (state, action), the last state being unseen.
    size = 20_000
    sampled = rollout(SHOP, tasks, POLICY, theta, size, seed=0)

    def key(x):
        state = x.observation[..., : len(STATES)].argmax(-1)
        digit = (state * SHOP.actions + x.action + 1) * x.mask.long()  # 0 after the end
        return sum(20**t * digit[t] for t in range(SHOP.horizon))

    for task in range(2):
        expected = torch.zeros(20**SHOP.horizon).index_add(0, key(data)[task], probability[task]) * size
        seen = torch.bincount(key(sampled)[task], minlength=len(expected)).double()
        large = expected >= 10
        observed = torch.cat((seen[large], seen[~large].sum()[None]))
        wanted = torch.cat((expected[large], expected[~large].sum()[None]))
        assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_expected_return(tasks, theta, discount):
    """(eq-expected-return): the sum over all trajectories = backward induction = the mean of sampled sessions."""
    data, probability = all_trajectories(SHOP, tasks, POLICY, theta)
    by_enumeration = (probability * reward_to_go(data.reward, discount)[0]).sum(-1)
    by_induction = expected_return(SHOP, tasks, POLICY, theta, discount)
    assert torch.allclose(by_enumeration, by_induction, atol=1e-12)
    sampled = reward_to_go(rollout(SHOP, tasks, POLICY, theta, 20_000, seed=0).reward, discount)[0]
    error = (sampled.mean(-1) - by_induction) / (sampled.std(-1) / sampled.shape[-1] ** 0.5)
    assert error.abs().max() < 4


# ------------------------------------------------------------------------------------------------------ the theorem
def test_score_identity(theta):
    """(eq-score-identity): scores of the actions, weighted by their probabilities, add up to 0."""
    seen = torch.randn(7, SHOP.observation_size)
    log_probs = POLICY.log_probs(theta, seen)
    for state in range(len(seen)):
        scores = torch.stack([gradient(log_prob, theta) for log_prob in log_probs[state]])
        slopes = torch.stack([gradient(log_prob.exp(), theta) for log_prob in log_probs[state]])
        assert (log_probs[state].exp() @ scores).abs().max() < 1e-12
        assert slopes.sum(0).abs().max() < 1e-12
        assert scores.abs().max() > 0.1


def test_policy_gradient_theorem(tasks, theta):
    """(eq-policy-gradient): expected score x return = differentiated dynamic program = central differences."""
    data, probability = all_trajectories(SHOP, tasks, POLICY, theta)
    theorem = gradient(score_sum(data, probability, data.returns.expand_as(data.reward)), theta)
    induction = exact_gradient(tasks, theta)
    by_probability = gradient((probability * data.returns).sum(), theta)
    assert torch.allclose(theorem, induction, atol=1e-12) and torch.allclose(by_probability, induction, atol=1e-12)
    differences, step = [], 1e-5
    for k, parameter in enumerate(theta):
        for i in range(parameter.numel()):
            ends = []
            for sign in (1, -1):
                moved = [p.detach().clone() for p in theta]
                moved[k].view(-1)[i] += sign * step
                ends.append(expected_return(SHOP, tasks, POLICY, moved).sum())
            differences.append((ends[0] - ends[1]) / (2 * step))
    assert torch.allclose(torch.stack(differences), induction, atol=1e-8)
    assert induction.norm() > 0.1


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_reward_to_go(tasks, theta, discount):
    """(eq-reward-to-go): G_t by its sum, and the gradient from it; without gamma^t it is another vector."""
    data, probability = all_trajectories(SHOP, tasks, POLICY, theta)
    to_go, horizon = reward_to_go(data.reward, discount), SHOP.horizon
    for t in range(horizon):
        by_hand = sum(discount ** (k - t) * data.reward[k] for k in range(t, horizon))
        assert torch.allclose(to_go[t], by_hand, atol=1e-12)
    exact = exact_gradient(tasks, theta, discount)
    assert torch.allclose(gradient(score_sum(data, probability, powers(discount) * to_go), theta), exact, atol=1e-12)
    without = gradient(score_sum(data, probability, to_go), theta)
    assert torch.allclose(without, exact, atol=1e-12) == (discount == 1.0)


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_baseline(tasks, theta, discount):
    """(eq-baseline): any function of the history may be subtracted; one that sees the action may not."""
    data, probability = all_trajectories(SHOP, tasks, POLICY, theta)
    to_go, exact = reward_to_go(data.reward, discount), exact_gradient(tasks, theta, discount)
    table = torch.randn(SHOP.horizon, 2, len(STATES), generator=torch.Generator().manual_seed(3))
    allowed, forbidden = to_go - look_up(table, data), to_go - data.action
    assert torch.allclose(gradient(score_sum(data, probability, powers(discount) * allowed), theta), exact, atol=1e-12)
    earlier = data.reward.cumsum(0) - data.reward
    previous = torch.cat((torch.zeros_like(data.action[:1]), data.action[:-1]))
    past = torch.sin(3 * earlier) + previous
    assert past[1:].std(-1).min() > 0.1
    found = gradient(score_sum(data, probability, powers(discount) * (to_go - past)), theta)
    assert torch.allclose(found, exact, atol=1e-12)
    wrong = gradient(score_sum(data, probability, powers(discount) * forbidden), theta)
    assert (wrong - exact).norm() > 0.1


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_advantage_gradient(tasks, theta, discount):
    """(eq-advantage-gradient): the exact advantages, from the action values of the policy."""
    data, probability = all_trajectories(SHOP, tasks, POLICY, theta)
    value = state_values(SHOP, tasks, POLICY, theta, discount).detach()
    later = torch.cat((value[1:], torch.zeros_like(value[:1])))
    advantage = torch.stack([action_value(tasks, v, discount) for v in later]) - value[..., None]
    mean = (action_probabilities(SHOP, tasks, POLICY, theta) * advantage).sum(-1)
    assert mean[:, :, :ENDED].abs().max() < 1e-12
    pair = data.observation[..., : len(STATES)].argmax(-1) * SHOP.actions + data.action
    seen = advantage.flatten(2).gather(-1, pair)
    exact = exact_gradient(tasks, theta, discount)
    assert torch.allclose(gradient(score_sum(data, probability, powers(discount) * seen), theta), exact, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ estimators
@pytest.fixture
def returning():
    """A shopper who comes back to a full cart, for two steps: few enough sessions to list every tuple of them."""
    shop = ShopMDP(horizon=2)
    shopper = shop.shopper(0.4, 0.6, 0.9)
    start = torch.zeros_like(shopper.start)
    start[:, STATES.index("cart")] = 1
    return shop, shopper._replace(start=start)


def tuples(shop, tasks, theta, size):
    """Every tuple of `size` sessions as a row, (T, rows, size, ...), and its probability (rows,)."""
    data, probability = all_trajectories(shop, tasks, POLICY, theta)
    index = torch.cartesian_prod(*[torch.arange(probability.shape[1])] * size).view(-1, size)
    rows = Trajectories(*(x.detach()[:, 0][:, index] for x in data))
    return rows, probability[0].detach()[index].prod(-1)


def estimates(theta, rows, advantage):
    """(rows, parameters): the estimate from each row, by the library's surrogate."""
    copies = per_task(theta, rows.reward.shape[1])
    found = torch.autograd.grad(log_likelihood(POLICY, copies, rows, advantage).sum(), copies)
    return torch.cat([g.flatten(1) for g in found], 1)


def test_leave_one_out():
    """(eq-leave-one-out): minus the mean of the others, written out; one episode has no others."""
    value = torch.randn(4, 2, 5)
    by_hand = torch.empty_like(value)
    for n in range(5):
        others = [k for k in range(5) if k != n]
        by_hand[..., n] = value[..., n] - value[..., others].mean(-1)
    assert torch.allclose(leave_one_out(value), by_hand, atol=1e-14)
    assert torch.allclose(leave_one_out(value), 5 / 4 * (value - value.mean(-1, keepdim=True)), atol=1e-14)
    with pytest.raises(ValueError, match="episodes = 1"):
        leave_one_out(value[..., :1])


@pytest.mark.parametrize("size", [2, 3])
def test_mean_baseline_shrinks(returning, theta, size):
    """(eq-shrinkage): over all tuples of sessions, leave-one-out is unbiased and the mean of all gives (N - 1) / N."""
    shop, tasks = returning
    rows, probability = tuples(shop, tasks, theta, size)
    assert probability.sum() == pytest.approx(1, abs=1e-12)
    exact = gradient(expected_return(shop, tasks, POLICY, theta).sum(), theta)
    to_go = reward_to_go(rows.reward)
    loo = probability @ estimates(theta, rows, leave_one_out(to_go))
    mean = probability @ estimates(theta, rows, to_go - to_go.mean(-1, keepdim=True))
    assert exact.norm() > 0.01
    assert torch.allclose(loo, exact, atol=1e-13) and torch.allclose(mean, (size - 1) / size * exact, atol=1e-13)


@pytest.mark.parametrize("discount, gae_lambda", [(1.0, 0.0), (1.0, 0.6), (1.0, 1.0), (0.8, 0.6)])
def test_gae(tasks, theta, discount, gae_lambda):
    """(eq-gae): the weighted sum of errors; unbiased with the exact value or at lambda = 1, biased otherwise."""
    data, probability = all_trajectories(SHOP, tasks, POLICY, theta)
    guess = torch.randn(SHOP.horizon, 2, len(STATES), generator=torch.Generator().manual_seed(4))
    value, horizon = look_up(guess, data), SHOP.horizon
    found = gae(data.reward, value, data.mask, discount, gae_lambda)
    for t in range(horizon):
        by_hand = torch.zeros_like(found[0])
        for k in range(t, horizon):
            following = value[k + 1] * data.mask[k + 1] if k + 1 < horizon else 0.0
            error = (data.reward[k] + discount * following - value[k]) * data.mask[k]
            by_hand += (discount * gae_lambda) ** (k - t) * error
        assert torch.allclose(found[t], by_hand, atol=1e-12)

    exact = exact_gradient(tasks, theta, discount)

    def bias(table):
        advantage = gae(data.reward, look_up(table, data), data.mask, discount, gae_lambda)
        return (gradient(score_sum(data, probability, powers(discount) * advantage), theta) - exact).norm()

    assert bias(state_values(SHOP, tasks, POLICY, theta, discount).detach()) < 1e-12
    assert (bias(guess) < 1e-12) == (gae_lambda == 1.0)


def test_surrogate(tasks, theta):
    """(eq-surrogate): autograd = the scores of a linear softmax written out, x (1[a] - pi), averaged over episodes."""
    data = rollout(SHOP, tasks, POLICY, theta, 6, seed=0)
    advantage = torch.randn(data.reward.shape, requires_grad=True)
    surrogate = log_likelihood(POLICY, theta, data, advantage)
    chosen = torch.nn.functional.one_hot(data.action, SHOP.actions) - POLICY.log_probs(theta, data.observation).exp()
    weight = (data.mask * advantage).detach()
    for task in range(2):
        by_hand = torch.einsum("tn,tni,tna->ia", weight[:, task], data.observation[:, task], chosen[:, task]) / 6
        bias = torch.einsum("tn,tna->a", weight[:, task], chosen[:, task]) / 6
        found = gradient(surrogate[task], theta)
        assert torch.allclose(found, torch.cat((by_hand.flatten(), bias)), atol=1e-13)
    assert not torch.autograd.grad(surrogate.sum(), advantage, allow_unused=True)[0]


def test_mean_squared_error(returning, theta):
    """(eq-mean-squared-error): over all pairs of sessions, squared bias + variance of one session / 2."""
    shop, tasks = returning
    one, chance = tuples(shop, tasks, theta, 1)
    two, both = tuples(shop, tasks, theta, 2)
    exact = gradient(expected_return(shop, tasks, POLICY, theta).sum(), theta)
    for gae_lambda in (1.0, 0.0):  # without a value function: unbiased, and biased
        estimate = {}
        for size, rows in ((1, one), (2, two)):
            none = torch.zeros_like(rows.reward)
            estimate[size] = estimates(theta, rows, gae(rows.reward, none, rows.mask, 1.0, gae_lambda))
        mean = chance @ estimate[1]
        variance = chance @ ((estimate[1] - mean) ** 2).sum(1)
        left = both @ ((estimate[2] - exact) ** 2).sum(1)
        bias = ((mean - exact) ** 2).sum()
        assert left == pytest.approx((bias + variance / 2).item(), rel=1e-10)
        # What a batch can know of the squared length: its own, minus its own variance / N.
        first, second = estimate[1][torch.cartesian_prod(*[torch.arange(len(chance))] * 2)].unbind(1)
        within = ((first - second) ** 2).sum(1) / 2
        assert torch.allclose((first + second) / 2, estimate[2], atol=1e-14)
        length, squared = both @ ((estimate[2] ** 2).sum(1) - within / 2), (mean**2).sum()
        assert length == pytest.approx(squared.item(), rel=1e-9)
        assert both @ (estimate[2] ** 2).sum(1) > 2 * squared  # without the subtraction
        assert (bias > 1e-6) == (gae_lambda == 0.0)
