"""Chapter "Memory and belief": both sides of every numbered equation."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Generator

from ecomlib.baselines.bayes import belief
from ecomlib.families import LogitPricing
from ecomlib.latents import Latent
from ecomlib.learners.rl2 import trial_advantages

CHANCES = torch.tensor([[0.2, 0.7], [0.6, 0.4], [0.9, 0.1]], dtype=torch.float64)  # two arms of three tasks
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PULLS = 2


def table(generator):
    """A policy: a probability of the second arm for every history, a dictionary of logits."""
    histories = [h for n in range(PULLS) for h in itertools.product((0, 1), (0, 1), repeat=n)]
    return dict(zip(histories, torch.randn(len(histories), generator=generator, dtype=torch.float64)))


def trials(logits, chance):
    """Every trial of one task: (history (a, r, a, r, ...), probability)."""
    for history in itertools.product((0, 1), repeat=2 * PULLS):
        probability = torch.tensor(1.0, dtype=torch.float64)
        for t in range(PULLS):
            arm, reward = history[2 * t : 2 * t + 2]
            second = torch.sigmoid(logits[history[: 2 * t]])
            probability = probability * (second if arm else 1 - second)
            probability = probability * (chance[arm] if reward else 1 - chance[arm])
        yield history, probability


def trial_return(history):
    return sum(history[1::2])


def objective(logits):
    """Equation (eq-trial-return), by listing all trials of all tasks."""
    each = [sum(p * trial_return(h) for h, p in trials(logits, chance)) for chance in CHANCES]
    return sum(w * value for w, value in zip(WEIGHTS, each))


def test_trial_objective_is_the_value_in_the_bayes_adaptive_process():
    """(eq-memory-objective): sampling a task and playing it, against a process without tasks whose rewards come from
    the belief."""
    logits = table(Generator().manual_seed(0))

    def value(history, weight):
        if len(history) == 2 * PULLS:
            return 0.0
        second, total = torch.sigmoid(logits[history]), 0.0
        for arm in (0, 1):
            for reward in (0, 1):
                likelihood = CHANCES[:, arm] if reward else 1 - CHANCES[:, arm]
                predictive = (weight * likelihood).sum()
                after = weight * likelihood / predictive
                chosen = second if arm else 1 - second
                total = total + chosen * predictive * (reward + value((*history, arm, reward), after))
        return total

    assert value((), WEIGHTS).item() == pytest.approx(objective(logits).item(), rel=1e-12)


def estimate(logits, histories, own_baseline=False):
    """Equation (eq-memory-gradient) from R trials of one task; the baseline is the mean of the others' rewards."""
    total = 0.0
    for r, history in enumerate(histories):
        for t in range(PULLS):
            second = torch.sigmoid(logits[history[: 2 * t]])
            log_prob = (second if history[2 * t] else 1 - second).log()
            to_go = sum(history[2 * t + 1 :: 2])
            others = [sum(h[2 * t + 1 :: 2]) for q, h in enumerate(histories) if own_baseline or q != r]
            total = total + log_prob * (to_go - sum(others) / len(others))
    return total / len(histories)


def mean_estimate(logits, own_baseline=False):
    """Its mean over all pairs of trials of all tasks."""
    leaves, total = list(logits.values()), 0.0
    for weight, chance in zip(WEIGHTS, CHANCES):
        listed = [(h, p.detach()) for h, p in trials(logits, chance)]
        for (h, p), (g, q) in itertools.product(listed, repeat=2):
            total = total + weight * p * q * estimate(logits, (h, g), own_baseline)
    return torch.cat([g[None] for g in torch.autograd.grad(total, leaves)])


def test_gradient_with_the_baseline_of_the_same_task():
    """(eq-memory-gradient): the mean of the estimate over all pairs of trials is the gradient of the objective; with a
    baseline that contains the trial itself it is half of it."""
    logits = {h: x.requires_grad_() for h, x in table(Generator().manual_seed(1)).items()}
    exact = torch.cat([g[None] for g in torch.autograd.grad(objective(logits), list(logits.values()))])
    torch.testing.assert_close(mean_estimate(logits), exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean_estimate(logits, own_baseline=True), exact / 2, rtol=1e-10, atol=1e-12)


def test_the_library_centres_by_the_other_trials_of_the_task():
    """Rewards to go less those of the other replicas, up to the unit that the library divides by: (eq-memory-gradient)
    in ``trial_advantages``."""
    reward = torch.rand(4, 6, 1, generator=Generator().manual_seed(0), dtype=torch.float64)
    advantage, _ = trial_advantages(reward, torch.zeros(4, 6, 1, dtype=torch.float64), 3, True, 1.0, 0.0)
    to_go = reward.flip(0).cumsum(0).flip(0).unflatten(1, (2, 3))
    others = (to_go.sum(2, keepdim=True) - to_go) / 2
    centred = (to_go - others).flatten(1, 2)
    expected = (centred - centred.mean()) / (centred.std() + 1e-8)
    torch.testing.assert_close(advantage, expected, rtol=1e-6, atol=1e-8)


def test_posterior_is_a_function_of_sums():
    """(eq-posterior-sum): Bayes' rule day by day, in any order, against the two sums by price that pricing keeps."""
    family = LogitPricing()
    tasks, generator = family.tasks(torch.arange(5)), Generator().manual_seed(0)
    days = []
    state = family.reset(tasks, 1, torch.zeros(5, 1, 1))
    for _ in range(10):
        action = torch.randint(11, (5, 1), generator=generator)
        before = family.observe(tasks, state)
        state, reward, _ = family.step(tasks, state, action, torch.rand(5, 1, 1, generator=generator))
        days.append((before, action, reward, family.observe(tasks, state)))
    posteriors = []
    for order in (days, days[::-1]):
        exact = belief(family, 200)
        exact.begin(family.context(tasks), 5, 1)
        log_weight = torch.zeros(5, 1, 200)
        for day in order:
            exact.update(*day)
            mean = family.seen(day[0]).weekday[..., None] * exact.rate[day[1]]
            log_weight = log_weight + torch.distributions.Poisson(mean).log_prob(family.seen(day[3]).sold[..., None])
        by_day = torch.softmax(log_weight, -1)
        torch.testing.assert_close(exact.weight, by_day, rtol=1e-3, atol=1e-5)
        posteriors.append(exact.weight)
    torch.testing.assert_close(*posteriors, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------- a hidden number seen through noise
NOISE = 0.6  # variance of what is seen around the hidden number z ~ Normal(0, 1)


def posterior(seen):
    variance = 1 / (1 + len(seen) / NOISE)
    return variance * sum(seen) / NOISE, variance


def log_likelihood(z, seen):
    return sum(norm.logpdf(x, z, math.sqrt(NOISE)) for x in seen)


def elbo(mean, variance, seen):
    """Its two terms, the first by numerical integration."""
    density = lambda z: norm.pdf(z, mean, math.sqrt(variance))
    spread = 12 * math.sqrt(variance)
    expected = quad(lambda z: density(z) * log_likelihood(z, seen), mean - spread, mean + spread)[0]
    return expected - kl(mean, variance)


def kl(mean, variance):
    """From the standard normal, by the library."""
    shape = (1, 1, 1)
    latent = Latent(torch.full(shape, mean), torch.full(shape, math.log(variance)))
    return latent.divergence().item()


def test_evidence_is_the_elbo_and_what_is_missing_to_the_posterior():
    """(eq-latent-elbo): log evidence by integration = ELBO + KL(q || posterior), for any q; so the posterior is the
    best q."""
    seen = [0.8, -0.3, 1.4]
    evidence = math.log(quad(lambda z: norm.pdf(z) * math.exp(log_likelihood(z, seen)), -8, 8)[0])
    exact_mean, exact_variance = posterior(seen)
    for mean, variance in ((0.0, 1.0), (0.5, 0.3), (exact_mean, exact_variance)):
        missing = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, math.sqrt(variance)),
            torch.distributions.Normal(exact_mean, math.sqrt(exact_variance)),
        ).item()
        assert elbo(mean, variance, seen) + missing == pytest.approx(evidence, abs=1e-4)


def test_latent_divergence():
    """(eq-latent-kl): the closed form against numerical integration."""
    for mean, variance in ((0.7, 0.4), (-1.5, 2.0)):
        own = norm(mean, math.sqrt(variance))
        exact = quad(lambda z, own=own: own.pdf(z) * (own.logpdf(z) - norm.logpdf(z)), -15, 15)[0]
        assert kl(mean, variance) == pytest.approx(exact, abs=1e-5)
        assert 0.5 * (mean**2 + variance - 1 - math.log(variance)) == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("known, length", [(0, 5), (2, 5), (5, 5), (3, 40)])
def test_explaining_the_future_gives_the_spread_of_the_end(known, length):
    """(eq-latent-all): the best belief after t of L observations when all L have to be explained, by gradient ascent on
    the expected objective, against its closed form. Its mean is the posterior's, its variance that of the end."""
    generator = np.random.default_rng(0)
    seen = list(generator.normal(0.5, 1.0, known))
    centre, variance = posterior(seen)
    # The future is predicted by the posterior: what is to come is drawn around a number drawn from it.
    z = centre + math.sqrt(variance) * norm.ppf((np.arange(2000) + 0.5) / 2000)
    mean = torch.zeros((), dtype=torch.float64, requires_grad=True)
    log_variance = torch.zeros((), dtype=torch.float64, requires_grad=True)
    past = torch.tensor(seen, dtype=torch.float64)
    future = torch.tensor(z)  # means of what is to come; its noise adds a constant
    optimiser = torch.optim.LBFGS([mean, log_variance], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        missed = ((past - mean) ** 2).sum() + known * log_variance.exp()
        missed = missed + (length - known) * (((future - mean) ** 2).mean() + log_variance.exp())
        value = missed / (2 * NOISE) + 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
        value.backward()
        return value

    optimiser.step(loss)
    assert mean.item() == pytest.approx(centre, abs=1e-5)
    assert log_variance.exp().item() == pytest.approx(1 / (1 + length / NOISE), rel=1e-4)
    if known < length:
        assert log_variance.exp().item() < variance


@pytest.mark.parametrize("weight", [0.3, 1.0, 4.0])
def test_weight_of_the_divergence_tempers_the_posterior(weight):
    """Exercise: with the divergence weighed w the best variance is w / (w + t / noise)."""
    count, log_variance = 4, torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_variance], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = count * log_variance.exp() / (2 * NOISE) + weight * 0.5 * (log_variance.exp() - log_variance)
        value.backward()
        return value

    optimiser.step(loss)
    assert log_variance.exp().item() == pytest.approx(weight / (weight + count / NOISE), rel=1e-4)
