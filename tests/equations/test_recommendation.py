"""Chapter "Recommendation": both sides of every numbered equation."""

from itertools import permutations

import numpy as np
import pytest
import torch

from ecomlib import noise
from ecomlib.baselines import GreedyBayes, Random
from ecomlib.baselines.recommendation import RecommendationBelief
from ecomlib.families import SlateRecommendation, sample_tasks, sessions, take
from ecomlib.families.slates import best_slate, expected_gain
from ecomlib.networks import MLP
from ecomlib.policies import PlackettLuce
from ecomlib.rollout import trial


@pytest.fixture
def family():
    return SlateRecommendation()


@pytest.fixture
def tasks(family):
    return sample_tasks(family, 20, torch.Generator().manual_seed(11))


def test_click_probability_is_the_share_of_shoppers_who_prefer_the_item(family, tasks):
    """(eq-click), (eq-attention): shoppers who look at place j with odds eta_j and take the largest of utilities with
    Gumbel noise, one of them that of clicking nothing; by simulation, and against a step of the family."""
    one, slate, n = take(tasks, [0]), [3, 7, 11, 2], 400_000
    z, f = 1, 2
    features, appeal = np.array(family.table.features), np.array(family.table.appeal)
    attention = np.array(family.places) ** one.bias.item()
    utility = family.click[z] - family.tiredness * f + appeal + features @ one.taste[0].numpy()
    utility = np.append(utility[slate] + np.log(attention), 0.0)
    rng = np.random.default_rng(0)
    chosen = (utility + rng.gumbel(size=(n, 5))).argmax(1)
    odds = attention * np.exp(utility[:4] - np.log(attention))
    p = odds / (1 + odds.sum())
    state = family.reset(one, n, torch.zeros(1))
    state = state._replace(stage=torch.full((1, n), z), fatigue=torch.full((1, n), f))
    luck = noise.uniform(0, one.id, torch.arange(n), 0, 0, noise.FAMILY, family.noise_size)
    place = family.step(one, state, torch.tensor(slate).expand(1, n, -1), luck)[0].place[0].numpy()
    for j in range(4):
        error = 5 * np.sqrt(p[j] * (1 - p[j]) / n)
        assert abs((chosen == j).mean() - p[j]) < error and abs((place == j).mean() - p[j]) < error
    assert torch.allclose(family.attention(one)[0], torch.tensor(attention))


def test_booked_margin_is_the_expected_margin_of_a_click(family, tasks):
    """(eq-booked): mean margin of purchases per click on an item, by simulation, against rho_z times its margin."""
    one, n, z = take(tasks, [1]), 400_000, 2
    shop = SlateRecommendation(reward="purchase")
    slate = torch.tensor([3, 7, 11, 2])
    state = shop.reset(one, n, torch.zeros(1))._replace(stage=torch.full((1, n), z))
    luck = noise.uniform(0, one.id, torch.arange(n), 0, 0, noise.FAMILY, 5)
    after, paid, _ = shop.step(one, state, slate.expand(1, n, -1), luck)
    clicked = after.place[0] == 0
    margin, rho = shop.table.margin[3], shop.cart[z] * shop.order[z]
    error = 5 * margin * np.sqrt(rho * (1 - rho) / clicked.sum().item())
    assert abs(paid[0][clicked].mean() - rho * margin) < error
    _, booked, _ = family.step(one, state, slate.expand(1, n, -1), luck)
    assert torch.allclose(booked[0][clicked], torch.tensor(rho * margin))


def random_slates(count, items=6, places=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.exp(torch.randn(count, items, generator=generator))
    value = torch.randn(count, items, generator=generator)
    attention = torch.rand(count, places, generator=generator).sort(-1, descending=True).values
    return weight, value, attention


def test_slate_gain_is_the_mean_over_outcomes():
    """(eq-slate-gain): the sum over outcomes of probability times worth."""
    weight, value, attention = (x.numpy() for x in random_slates(50))
    slate = np.array([4, 0, 2])
    for w, v, eta in zip(weight, value, attention):
        total = 1 + sum(eta[j] * w[slate[j]] for j in range(3))
        mean = sum(eta[j] * w[slate[j]] / total * v[slate[j]] for j in range(3)) + 1 / total * 0.0
        tensors = (torch.tensor(x)[None] for x in (slate, w, v, eta))
        assert expected_gain(*tensors).item() == pytest.approx(mean, rel=1e-12)


def test_dinkelbach_root_is_the_best_gain():
    """(eq-dinkelbach): F is decreasing, 0 at the best gain over all slates, and its maximiser is found by sorting."""
    weight, value, attention = random_slates(40)
    every = torch.tensor(list(permutations(range(6), 3)))
    wide = lambda x: x[:, None].expand(-1, len(every), -1)
    gains = expected_gain(every.expand(40, -1, -1), wide(weight), wide(value), wide(attention))
    best = gains.amax(1)

    def excess(g):  # the maximum in F by enumeration, and by sorting
        score = weight * (value - g[:, None])
        by_hand = (wide(attention) * wide(score).gather(-1, every.expand(40, -1, -1))).sum(-1).amax(1)
        by_sorting = (attention * score.topk(3, -1).values).sum(-1)
        assert torch.allclose(by_hand, by_sorting, rtol=1e-12)
        return by_sorting - g

    assert torch.allclose(excess(best), torch.zeros(40), atol=1e-12)
    assert (excess(best - 0.1) > 0).all() and (excess(best + 0.1) < 0).all()
    assert torch.allclose(best_slate(weight, value, attention)[1], best, rtol=1e-12)


def test_session_values_satisfy_the_recursion(family, tasks):
    """(eq-session): V of the plan against the maximum, written out for one state with random slates and with the plan's
    own, of the next day's V."""
    plan, one = sessions.plan(family, tasks), 4
    table, generator = family.table, torch.Generator().manual_seed(0)
    for time, z, f in ((0, 0, 0), (5, 1, 3), (12, 2, 1), (19, 2, 2)):
        later = plan.value[one, time + 1].view(3, 4)
        rho = family.cart[z] * family.order[z]
        leave = min(1.0, tasks.leave[one].item() * (1 + f))
        nothing = (1 - leave) * later[z, min(f + 1, 3)]

        def worth(slate, time=time, z=z, f=f, later=later, rho=rho, nothing=nothing):
            state = torch.tensor([[z]]), torch.tensor([[f]])
            odds = family.shown_weight(take(tasks, [one]), *state, slate[None, None])[0, 0]
            total = nothing
            for j, i in enumerate(slate.tolist()):
                keener = table.pull[i] * later[min(z + 1, 2), 0] + (1 - table.pull[i]) * later[z, 0]
                click = rho * (table.margin[i] + later[0, 0]) + (1 - rho) * keener
                total = total + odds[j] * click
            return (total / (1 + odds.sum())).item()

        state = z * 4 + f
        value = plan.value[one, time, state].item()
        assert worth(plan.slate[one, time, state]) == pytest.approx(value, rel=1e-12)
        for _ in range(200):
            assert worth(torch.rand(20, generator=generator).topk(4).indices) <= value * (1 + 1e-12)


def test_posterior_of_a_segment_is_the_product_of_its_slates(family, tasks):
    """(eq-slate-posterior): the weights after one session of two shoppers against the product of the family's own
    probabilities of what happened, particle by particle."""

    class Recorded(Random):
        history = ()

        def act(self, observation, noise):
            self.before = observation
            return super().act(observation, noise)

        def observe(self, action, reward, next_observation, done):
            self.history += ((self.before, action, next_observation),)

    one, recorded = take(tasks, [2]), Recorded(family)
    trial(family, one, recorded, 1, 2, 0, progress=False)
    belief = RecommendationBelief(family, 32, stores=True)
    belief.begin(family.context(one), 1, 2)
    product = torch.ones(32)
    for before, action, after in recorded.history:
        belief.update(before, action, torch.zeros(1, 2), after)
        now, then = family.seen(before), family.seen(after)
        for n in range(2):
            if now.left[0, n]:
                continue
            particle = belief.particles
            stage, fatigue, slate = (
                x[:, n : n + 1].expand(32, 1, *x.shape[2:]) for x in (now.stage, now.fatigue, action)
            )
            odds = family.shown_weight(particle, stage, fatigue, slate)[:, 0]
            nothing = 1 / (1 + odds.sum(-1))
            if then.item[0, n] >= 0:
                product = product * (odds * nothing[:, None])[:, action[0, n].tolist().index(then.item[0, n].item())]
            else:
                leave = (particle.leave * (1 + now.fatigue[0, n])).clamp(max=1)
                product = product * nothing * (leave if then.left[0, n] else 1 - leave)
    assert torch.allclose(belief.weight[0, 0], product / product.sum(), rtol=1e-8)
    assert isinstance(GreedyBayes(family, 32).belief, RecommendationBelief)


def plackett_luce(items=5, slate=3):
    return PlackettLuce(MLP((2, 1)), items, slate)


def test_plackett_luce_probabilities_of_all_slates_sum_to_one():
    """(eq-plackett-luce): by enumeration, and against the frequency of drawn slates."""
    policy = plackett_luce()
    parameters = policy.initial(torch.Generator().manual_seed(0))
    parameters[0] = 2 * parameters[0]
    observation = torch.randn(1, 1, 10, generator=torch.Generator().manual_seed(1))
    score = policy.outputs(parameters, observation)[0, 0].numpy()
    probability = {}
    for slate in permutations(range(5), 3):
        left, p = set(range(5)), 1.0
        for i in slate:
            p *= np.exp(score[i]) / sum(np.exp(score[k]) for k in left)
            left.remove(i)
        probability[slate] = p
        log_prob = policy.log_prob(parameters, observation, torch.tensor([[slate]]))
        assert log_prob.item() == pytest.approx(np.log(p), rel=1e-10)
    assert sum(probability.values()) == pytest.approx(1.0, rel=1e-12)
    n = 100_000
    luck = noise.uniform(0, torch.zeros(1, dtype=torch.int64), torch.arange(n), 0, 0, noise.POLICY, 5)
    drawn, _ = policy.sample(parameters, observation.expand(1, n, -1), luck)
    slate, p = max(probability.items(), key=lambda item: item[1])
    share = (drawn[0] == torch.tensor(slate)).all(-1).double().mean().item()
    assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / n)


def test_plackett_luce_gradient_has_a_term_for_every_place():
    """(eq-plackett-gradient): autograd against the sum over places of (item - softmax of what is left)."""
    policy = plackett_luce()
    score = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    slate = torch.tensor([[[3, 0, 4]]])
    (gradient,) = torch.autograd.grad(policy._log_prob(policy._named(score, [], slate), slate).sum(), score)
    total, left = torch.zeros(5), torch.ones(5, dtype=torch.bool)
    for i in slate[0, 0]:
        total += torch.eye(5)[i] - torch.softmax(score[0, 0].detach().masked_fill(~left, -torch.inf), -1)
        left[i] = False
    assert torch.allclose(gradient[0, 0], total, rtol=1e-10, atol=1e-12)
