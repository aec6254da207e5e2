"""The Bayesian agents of all families: what their settings mean, and a prior estimated from logs."""

import pytest
import torch
from scipy.stats import kstest, norm

from ecomlib.baselines import BayesUCB, GreedyBayes, ParticlePrior, Random, Thompson, belief, empirical_prior
from ecomlib.configuration import FAMILIES
from ecomlib.families import LogitPricing, PointNavigation, split
from ecomlib.families.base import Prior
from ecomlib.families.pricing import purchase_probability
from ecomlib.rollout import trial

SHELF = LogitPricing()


@pytest.fixture
def products():
    return split(SHELF, "test", 60)[1]


def actions(agent, products, episodes=2):
    return trial(SHELF, products, agent, episodes, 2, seed=0, progress=False).action


def test_settings_lead_to_the_agents_they_name(products):
    """Without exploration both are greedy; Thompson sampling that stops on day 9 is Thompson's before and, with the
    same belief, greedy after."""
    greedy = actions(GreedyBayes(SHELF, 256), products)
    assert torch.equal(actions(BayesUCB(SHELF, 256, width=0.0), products), greedy)
    assert torch.equal(actions(Thompson(SHELF, 256, until=0), products), greedy)
    assert not torch.equal(actions(BayesUCB(SHELF, 256, width=1.0), products), greedy)
    thompson, stops = (actions(Thompson(SHELF, 256, until=n), products) for n in (None, 9))
    assert torch.equal(thompson[0, :9], stops[0, :9]) and not torch.equal(thompson[0, 9:], stops[0, 9:])
    fixed = (stops[1, 1:] == stops[1, :-1]).float().mean()  # a greedy seller rarely changes its mind
    assert fixed > 0.9 > (thompson[1, 1:] == thompson[1, :-1]).float().mean()


def test_moments_are_those_of_the_weights(products):
    """Posterior mean and standard deviation of every price's profit, written out."""
    agent = GreedyBayes(SHELF, 64)
    actions(agent, products, 1)
    mean, deviation = agent.belief.moments(agent.observation)
    weight, values = agent.belief.weight, agent.belief.values[:, 13, 0]
    expected = (weight[..., None] * values).sum(2)
    spread = (weight[..., None] * (values - expected[..., None, :]) ** 2).sum(2).sqrt()
    assert torch.allclose(mean, expected) and torch.allclose(deviation, spread, atol=1e-6)
    assert (spread.amax(-1) > 0.1).any()


def test_a_prior_of_one_market_is_certainty(products):
    """All weight on the truth: every agent posts the oracle's price at once."""
    one = type(products)(*(x[:1].repeat(2) for x in products))
    prior = ParticlePrior(one, torch.tensor([0.5, 0.5]))
    first = type(products)(*(x[:1] for x in products))
    for agent in (GreedyBayes(SHELF, prior=prior), Thompson(SHELF, prior=prior), BayesUCB(SHELF, prior=prior)):
        returns = SHELF.mean_reward(first, actions(agent, first)).sum(1)
        assert torch.allclose(returns, SHELF.oracle_return(first).expand_as(returns))


def test_the_estimated_prior_is_nearer_to_the_truth_than_the_wide_one():
    """From 300 products' logs, mean and spread of what sales can tell: log sensitivity, and log of units a day at a
    middle price. (Traffic and share by themselves are hardly told apart.) Hidden parameters are never read."""
    _, seen = split(SHELF, "train", 300)
    prior = empirical_prior(SHELF, seen, Random(SHELF), 2, particles=1024, iterations=60)
    assert prior.weight.sum() == pytest.approx(1.0) and (prior.weight > 0).all()
    equal = torch.full((4096,), 1 / 4096)

    def moments(market, weight, quantity):
        values = quantity(market)
        mean = (weight * values).sum()
        return mean, (weight * (values - mean) ** 2).sum().sqrt()

    middle = lambda market: torch.full_like(market.traffic, SHELF.markups[5])[:, None]
    units = lambda market: (market.traffic * purchase_probability(market, middle(market))[:, 0]).log()
    for quantity in (lambda market: market.sensitivity.log(), units):
        (mean, spread), (true, width), (_, vague) = (
            moments(market, weight, quantity)
            for market, weight in (
                (prior.particles, prior.weight),
                (SHELF.prior_sample(4096), equal),
                (SHELF.wide().prior_sample(4096), equal),
            )
        )
        assert abs(mean - true) < 0.2 * width and abs(spread - width) < 0.35 * (vague - width)


def test_random_is_uniform_and_refuses_what_it_cannot_do(products):
    chosen = actions(Random(SHELF), products, 5)
    counts = torch.bincount(chosen.flatten(), minlength=SHELF.actions)
    assert (counts / chosen.numel() - 1 / SHELF.actions).abs().max() < 4 * (0.1 / chosen.numel()) ** 0.5
    with pytest.raises(ValueError, match="PointNavigation has real ones"):
        Random(PointNavigation())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Thompson(SHELF, until=-1), "Thompson.until = -1"),
        (lambda: BayesUCB(SHELF, width=-1.0), "BayesUCB.width = -1.0"),
        (lambda: GreedyBayes(SHELF, stores=1), "stores = 1; allowed: True or False"),
        (lambda: empirical_prior(SHELF, split(SHELF, "train", 2)[1], Random(SHELF), 0), "episodes = 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_families_without_bayes_say_so():
    with pytest.raises(TypeError, match="PointNavigation has no Bayesian baselines"):
        belief(PointNavigation())


@pytest.mark.parametrize("name", ["pricing", "inventory", "bidding", "recommendation"])
def test_what_was_seen_fades_to_a_power_of_its_likelihood(name):
    """Also where a belief keeps sums instead of weights: after a fade to p, log posterior odds against the prior are p
    times what they were; and what is seen later counts in full."""
    family = FAMILIES[name]()
    _, tasks = split(family, "test", 3)
    agent = GreedyBayes(family, 16, stores=True)
    trial(family, tasks, agent, 1, 2, seed=0, progress=False)
    learned = lambda: (agent.belief.log_posterior - agent.belief.log_prior).diff(dim=-1)
    before = learned()
    assert before.abs().max() > 0.5
    agent.belief.fade(1.0)
    assert torch.allclose(learned(), before)
    agent.belief.fade(0.25)
    assert torch.allclose(learned(), 0.25 * before)
    assert torch.allclose(agent.belief.weight, torch.softmax(agent.belief.log_posterior, -1))
    agent.belief.fade(0.0)
    assert torch.allclose(learned(), torch.zeros_like(before))


# --------------------------------------------------------------------------------------------------------- drift
class Uniforms(Prior):
    """The uniforms themselves."""

    prior_size, hidden_size = 3, 2

    def from_uniforms(self, task_id, uniforms):
        return uniforms


def test_a_drifting_task_keeps_the_prior_and_what_is_seen():
    family, ids = Uniforms(), torch.arange(4000) * 977
    start = family.tasks(ids)
    walk = [family.drifted(ids, episode, 0.1) for episode in range(5)]
    assert torch.allclose(walk[0], start, atol=1e-7) and all(torch.equal(x[:, 2], start[:, 2]) for x in walk)
    for column in range(2):
        assert kstest(walk[4][:, column].numpy(), "uniform").pvalue > 1e-3
    middle = (start[:, 0] - 0.5).abs() < 0.05  # far from the ends nothing is reflected
    step = (walk[1] - walk[0])[middle, 0] / 0.1
    assert kstest(step.numpy(), norm.cdf).pvalue > 1e-3
    moved = [(x - start)[middle, 0].std() for x in walk]
    assert moved[4] / moved[1] == pytest.approx(2.0, rel=0.15)  # four steps of a random walk
    assert torch.equal(family.drifted(ids[5:9], 3, 0.1), walk[3][5:9])
