"""Chapter "Bandits against the optimum", random decision processes: both sides of every numbered equation."""

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from ecomlib.baselines.tabular import ConjugatePrior, ExplorationBonus, MDPPosterior, PosteriorMean
from ecomlib.families import sample_tasks
from ecomlib.families.random_mdps import RandomMDP
from ecomlib.families.tabular import TabularState, finite_horizon
from ecomlib.rollout import trial

SMALL = RandomMDP(states=3, actions=2, horizon=4, noise=0.7)


def seen(family, prior, moves, rewards):
    """The posterior after action 1 in state 2 led to ``moves`` and paid ``rewards``, none of them on a last step."""
    posterior = MDPPosterior(family, prior, 1, 1, torch.device("cpu"))
    at = lambda state, time: TabularState(torch.full((1, 1), state), torch.full((1, 1), time))
    for following, reward in zip(moves, rewards):
        posterior.update(at(2, 0), torch.ones(1, 1).long(), torch.full((1, 1), reward), at(following, 1))
    return posterior


def test_reward_posterior_is_bayes_rule():
    """(eq-mdp-reward): mean and deviation by numerical integration of prior times likelihood."""
    prior, rewards = ConjugatePrior(0.5, 1.3), (1.9, -0.4, 2.2)
    posterior = seen(SMALL, prior, (0, 0, 1), rewards)
    density = lambda m: norm.pdf(m, 0.5, 1.3) * torch.tensor([norm.pdf(r, m, 0.7) for r in rewards]).prod().item()
    moment = lambda k: quad(lambda m: m**k * density(m), -8, 8, epsabs=1e-13)[0]
    mean, deviation = (x[0, 0, 2, 1].item() for x in posterior.reward_moments())
    assert mean == pytest.approx(moment(1) / moment(0), rel=1e-8)
    assert deviation**2 == pytest.approx(moment(2) / moment(0) - mean**2, rel=1e-7)
    assert posterior.reward_moments()[0][0, 0, 0, 0] == 0.5  # what was not tried is as before


def test_transition_posterior_is_bayes_rule():
    """(eq-mdp-transition): the posterior mean against that of 400,000 draws of the prior, weighted by the likelihood
    of the moves."""
    posterior = seen(SMALL, ConjugatePrior(), (0, 0, 2, 0), (0.0,) * 4)
    found = posterior.mean().transition[0, 2, 1]
    rows = -torch.rand(400_000, 3, generator=torch.Generator().manual_seed(0)).log()
    rows = rows / rows.sum(-1, keepdim=True)
    weight = rows[:, 0] ** 3 * rows[:, 2]
    expected = (weight[:, None] * rows).sum(0) / weight.sum()
    spread = (weight[:, None] * (rows - expected)).square().sum(0).sqrt() / weight.sum()
    assert ((found - expected).abs() < 5 * spread).all()
    assert torch.allclose(found, torch.tensor([4.0, 1.0, 2.0]) / 7)


def test_every_blind_policy_earns_the_same():
    """(eq-mdp-blind): exact returns of a random policy of time and state, averaged over 4,000 tasks, within 5 standard
    errors of horizon times mean; a policy that knows the rewards earns more."""
    tasks = sample_tasks(SMALL, 4000, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        policy = torch.rand(4, 3, 2, generator=generator) ** 4
        policy = policy / policy.sum(-1, keepdim=True)
        value = torch.zeros(4000, 3)
        for step in reversed(range(4)):
            q = tasks.reward[..., 0] + (tasks.transition * value[:, None, None]).sum(-1)
            value = (policy[step] * q).sum(-1)
        returns = value[:, 0]
        assert abs(returns.mean() - 4 * SMALL.reward_mean) < 5 * returns.std() / 4000**0.5
    assert finite_horizon(tasks, 4)[0, :, 0].amax(-1).mean() > 4.5


def test_a_bonus_is_an_optimistic_prior():
    """(eq-mdp-bonus): where prior and noise have the same deviation, plans with a bonus are those of a prior whose mean
    is higher by as much, step for step."""
    family = RandomMDP(states=3, actions=2, horizon=4)
    tasks = sample_tasks(family, 30, torch.Generator().manual_seed(3))
    for bonus in (0.5, 2.0):
        with_bonus = ExplorationBonus(family, ConjugatePrior(1.0), bonus)
        optimist = PosteriorMean(family, ConjugatePrior(1.0 + bonus))
        played = [trial(family, tasks, agent, 5, 2, 0, progress=False) for agent in (with_bonus, optimist)]
        key = torch.zeros(30, 2).long()
        assert torch.allclose(with_bonus.plan(key), optimist.plan(key), atol=1e-12)
        assert torch.equal(played[0].action, played[1].action)
    cautious = PosteriorMean(family)
    assert not torch.equal(trial(family, tasks, cautious, 5, 2, 0, progress=False).action, played[0].action)
