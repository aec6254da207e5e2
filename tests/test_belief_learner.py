"""The learner that reads a learned belief: its networks, its two objectives, and what it learns where the exact
posterior is known."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Generator, Tensor

from ecomlib.families import CensoredInventory, LogitPricing, SegmentBidding, SlateRecommendation
from ecomlib.families.bandits import BernoulliBandit
from ecomlib.latents import Decoder, Latent, StepRows, mean_of_square, signed_root
from ecomlib.learners.belief import BeliefConfig, BeliefLearner
from ecomlib.rollout import trial
from ecomlib.trials import TrialInput

PRICING = LogitPricing(days=3)
BANDIT = BernoulliBandit(3, 6)
TINY = {
    "warmup": 0,
    "episodes": 2,
    "tasks": 3,
    "replicas": 2,
    "hidden": 8,
    "decoder_hidden": 8,
    "latent": 2,
    "steps": 3,
}


def learner(family=PRICING, **settings):
    return BeliefLearner(family, BeliefConfig(**(TINY | settings)))


def start(own, seed=0):
    return own.initial(Generator().manual_seed(seed))


def lived(own, meta, tasks=4):
    return own.play(own.inputs.family, meta, torch.arange(tasks), 7, own.config.replicas)


# ------------------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize(
    "family, settings, rows",
    [
        (PRICING, {}, 1),
        (PRICING, {"units": 3}, 1),
        (PRICING, {"units": 3, "pooled": False}, 1),
        (LogitPricing(days=3, continuous=True), {}, 1),
        (BANDIT, {"by_action": True, "units": 2}, 3),
        (CensoredInventory(), {}, 1),
        (SegmentBidding(), {}, None),
        (SlateRecommendation(), {"steps": 1, "beliefs": 1}, None),
    ],
)
@pytest.mark.parametrize("memory", ["gru", "sum"])
def test_shapes_and_one_iteration(family, settings, rows, memory):
    own = learner(family, memory=memory, **settings)
    state = own.meta_train(family, 0, 1, progress=False)
    assert len(state.meta) == own.belief_tensors + own.reading.policy.tensors
    recorded, reward = lived(own, state.meta)
    c = own.config
    shape = (c.episodes * family.horizon, 4 * c.replicas, c.units)
    assert recorded.after.shape == recorded.observation.shape == (*shape, family.observation_size)
    belief = own.belief(state.meta, recorded.inputs)
    units = 1 if c.pooled else c.units
    assert belief.mean.shape == belief.log_variance.shape == (*shape[:2], units, own.inputs.rows, 2)
    assert rows is None or own.inputs.rows == rows
    step = own.decoder.steps.step(recorded.observation, recorded.action, recorded.after, reward)
    likelihood, divergence = own.elbo(state.meta, recorded.inputs, step, Generator().manual_seed(0))
    assert likelihood.shape == divergence.shape == (c.beliefs, 4 * c.replicas, units)
    assert torch.isfinite(likelihood).all() and (divergence >= 0).all()
    z = belief.sample(torch.zeros(1))
    expected = own.expected(state.meta, recorded.observation, recorded.action, z)
    assert expected.shape == (*shape, own.decoder.steps.rows, own.decoder.steps.led_size)


@pytest.mark.parametrize("memory", ["gru", "sum"])
@pytest.mark.parametrize("family, settings", [(PRICING, {"units": 2}), (BANDIT, {"by_action": True})])
def test_step_by_step_and_all_at_once_agree(family, settings, memory):
    """What was decided while the trial was played is what training computes of the recorded inputs."""
    own = learner(family, memory=memory, **settings)
    meta = [p + 0.1 * torch.randn(p.shape, generator=Generator().manual_seed(i)) for i, p in enumerate(start(own))]
    recorded, _ = lived(own, meta)
    parameters = meta[own.decoder.tensors :]
    output, value = own.network.outputs_and_values(parameters, recorded.inputs)
    log_prob = torch.log_softmax(output, -1).gather(-1, recorded.action[..., None])[..., 0]
    torch.testing.assert_close(log_prob, recorded.log_prob, rtol=1e-4, atol=1e-5)
    joined = own.network.join(recorded.inputs, own.belief(meta, recorded.inputs))
    reading = own.network.reader.outputs_and_values(meta[own.belief_tensors :], joined)
    assert torch.equal(reading[0], output) and torch.equal(reading[1], value)


def test_the_policy_sees_the_past_through_the_belief_alone():
    own = learner()
    meta = start(own)
    recorded, _ = lived(own, meta)
    other = recorded.inputs.clone()
    other[:-1] = other[:-1].flip(1)  # another past, the same present
    same = [x[-1] for x in (recorded.inputs, other)]
    assert torch.equal(*same)
    belief = [Latent(*(x[-1] for x in own.belief(meta, inputs))) for inputs in (recorded.inputs, other)]
    assert not torch.equal(belief[0].mean, belief[1].mean)
    joined = [own.network.join(seen, belief[0]) for seen in same]
    assert torch.equal(*(own.network.reader.outputs_and_values(meta[own.belief_tensors :], x)[0] for x in joined))


def test_no_gradient_of_the_policy_reaches_the_encoder():
    own = learner()
    meta = [p.requires_grad_() for p in start(own)]
    recorded, _ = lived(own, meta)
    parameters = meta[own.decoder.tensors :]
    output, value = own.network.outputs_and_values(parameters, recorded.inputs)
    gradient = torch.autograd.grad(output.square().sum() + value.sum(), meta, allow_unused=True)
    assert all(g is None for g in gradient[: own.belief_tensors])
    assert all(g is not None for g in gradient[own.belief_tensors :])


def test_the_elbo_reaches_encoder_and_decoder():
    own = learner()
    meta = [p.requires_grad_() for p in start(own)]
    recorded, reward = lived(own, meta)
    step = own.decoder.steps.step(recorded.observation, recorded.action, recorded.after, reward)
    terms = own.elbo(meta, recorded.inputs, step, Generator().manual_seed(0))
    gradient = torch.autograd.grad(terms[0].sum() - terms[1].sum(), meta, allow_unused=True)
    unused = [i for i, g in enumerate(gradient) if g is None]
    value = own.belief_tensors - 4  # the encoder guesses no return
    assert unused == [value, value + 1, *range(own.belief_tensors, len(meta))]


# ------------------------------------------------------------------------------------------------ the ELBO
def by_hand(own, meta, recorded, reward, moment, noise, steps):
    """Log-likelihood of ``steps`` by loops, for the belief at ``moment`` of every trial."""
    parameters = meta[: own.decoder.tensors]
    belief = own.belief(meta, recorded.inputs)
    z = belief.mean[moment] + (belief.log_variance[moment] / 2).exp() * noise
    total = torch.zeros(z.shape[:2])
    log_density = lambda x, mean, std: torch.distributions.Normal(mean, std).log_prob(x).sum(-1)
    for t in steps:
        code = torch.nn.functional.one_hot(recorded.action[t], own.inputs.family.actions).to(z)
        given = torch.cat((signed_root(recorded.observation[t]), code), -1)
        led, gain = signed_root(recorded.after[t]), signed_root(reward[t] / own.inputs.unit)
        p = parameters
        x = torch.tanh(torch.tanh(given @ p[0] + z[:, :, 0] @ p[1] + p[2]) @ p[3] + p[4]) @ p[5] + p[6]
        mean, raw = x.chunk(2, -1)
        std = own.config.least_std + torch.log1p((raw - 1).exp())
        total = total + log_density(led, mean, std)
        x = torch.tanh(torch.tanh(given @ p[7] + z[:, :, 0] @ p[8] + led @ p[9] + p[10]) @ p[11]) @ p[12] + p[13]
        mean, raw = x.chunk(2, -1)
        total = total + log_density(gain[..., None], mean, own.config.least_std + torch.log1p((raw - 1).exp()))
    return total


@pytest.mark.parametrize("decode", ["past", "all"])
def test_the_elbo_is_its_definition(decode):
    """Mean of the sampled estimate against a loop over the steps that a belief has to explain; and the divergence
    against torch's."""
    own = learner(decode=decode, steps=2, beliefs=1)
    meta = start(own)
    recorded, reward = lived(own, meta)
    step = own.decoder.steps.step(recorded.observation, recorded.action, recorded.after, reward)
    draws, trials = 4000, recorded.inputs.shape[1]
    # With the spread of z almost 0 only moments and steps are random.
    meta[own.belief_tensors - 1] = torch.tensor([0.3, -0.2, -40.0, -40.0])
    many = replace(own.config, beliefs=draws)
    own.config = many
    likelihood, _ = own.elbo(meta, recorded.inputs, step, Generator().manual_seed(1))
    length = len(reward)
    spans = [range(t) if decode == "past" else range(length) for t in range(length)]
    none = torch.zeros(trials, 1, 1, 2)
    exact = sum(by_hand(own, meta, recorded, reward, t, none, spans[t]) for t in range(length))
    exact, error = exact[:, 0] / length, likelihood[..., 0].std(0) / math.sqrt(draws)
    assert ((likelihood[..., 0].mean(0) - exact).abs() < 4 * error).all() and (error < 0.1 * exact.abs()).all()


def test_the_divergence_is_that_of_two_normals():
    generator = Generator().manual_seed(0)
    latent = Latent(*(torch.randn(5, 2, 3, 4, generator=generator) for _ in range(2)))
    own = torch.distributions.Normal(latent.mean, (latent.log_variance / 2).exp())
    exact = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0)).sum((-2, -1))
    torch.testing.assert_close(latent.divergence(), exact)


def test_the_mean_of_a_square_from_moments_of_its_root():
    mean, std = torch.tensor([2.0, 0.5, -1.0, 0.0]), torch.tensor([0.1, 1.0, 2.0, 1.0])
    y = mean + std * torch.special.ndtri((torch.arange(200000) + 0.5) / 200000)[:, None]
    torch.testing.assert_close(mean_of_square(mean, std), (y * y.abs()).mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(signed_root(y * y.abs()), y)


def test_each_row_of_a_bandit_is_decoded_with_its_own_variable():
    steps = StepRows(TrialInput(BANDIT, 1, by_action=True))
    z, action = torch.arange(24.0).view(2, 2, 3, 2), torch.tensor([[0, 2], [1, 1]])
    own = torch.stack([z[i, j, action[i, j]] for i in (0, 1) for j in (0, 1)])
    assert torch.equal(steps.own(z, action).flatten(0, 2), own)
    decoder = Decoder(steps, 2, 8, 0.03)
    assert decoder.initial(Generator())[0].shape == (2, 8)


# ------------------------------------------------------------------------------- a world whose posterior is known
class Draws(NamedTuple):
    id: Tensor
    mean: Tensor


class NormalDraws:
    """A number is drawn around the task's hidden mean, mean ~ Normal(0, 1), number ~ Normal(mean, 1). What is seen and
    paid is its signed square, whose root is the number again. Actions change nothing."""

    horizon, noise_size, observation_size, actions = 6, 1, 2, 2

    def tasks(self, task_id):
        return Draws(task_id, torch.randn(len(task_id), generator=Generator().manual_seed(int(task_id.sum() % 2**31))))

    def context(self, tasks):
        return tasks.mean[:, None][:, :0]

    def reset(self, tasks, episodes, noise):
        return torch.zeros(len(tasks.mean), episodes, 2)

    def observe(self, tasks, state):
        return state

    def step(self, tasks, state, action, noise):
        number = tasks.mean[:, None] + torch.special.ndtri(noise[..., 0])
        square = number * number.abs()
        time = state[..., 0] + 1 / self.horizon
        return torch.stack((time, square), -1), square, time > 1 - 1e-6

    def blind_return(self, tasks):
        return torch.full_like(tasks.mean, self.horizon)


def test_a_learned_belief_is_the_exact_posterior_of_a_linear_gaussian_world():
    """After t numbers with sum s the posterior of the mean is Normal(s / (1 + t), 1 / (1 + t)): equation
    (eq-latent-elbo) at its optimum."""
    family = NormalDraws()
    settings = {
        "episodes": 1,
        "tasks": 128,
        "replicas": 2,
        "hidden": 16,
        "decoder_hidden": 16,
        "latent": 1,
        "epochs": 1,
    }
    learning = {"warmup": 150, "anneal": 150, "belief_lr": 2e-2, "least_std": 0.3, "beliefs": 4}
    own = BeliefLearner(family, BeliefConfig(**settings, **learning))
    state = own.meta_train(family, 0, 150, progress=False)  # of the belief alone
    recorded, reward = own.play(family, state.meta, torch.arange(1000, 1400), 3, 1)
    belief = own.belief(state.meta, recorded.inputs)
    z = belief.sample(torch.randn(200, *belief.mean.shape, generator=Generator().manual_seed(0)))
    parameters = state.meta[: own.decoder.tensors]
    given = own.decoder.steps.given(recorded.observation, recorded.action)
    number = own.decoder.leads_to(parameters, given, z)[0][..., 0, 1][..., 0]  # (samples, L, M), mean of the next
    seen = torch.cat((torch.zeros_like(reward[:1]), signed_root(reward)[:-1].cumsum(0)))[..., 0]
    count = 1 + torch.arange(6.0)[:, None]
    exact, spread = seen / count, count**-0.5
    off = (number.mean(0) - exact).square().mean(1).sqrt()
    assert (off < 0.2).all(), off  # the spread of the exact means over tasks is 0 to 0.9
    ratio = (number.std(0) / spread).mean(1)
    assert ((ratio > 0.8) & (ratio < 1.2)).all(), ratio


# ------------------------------------------------------------------------------------------------ the whole learner
def test_training_improves_a_policy():
    """On bandits of three arms and six pulls, from drawing at random towards the Bayes-optimal value."""
    settings = {"episodes": 1, "by_action": True, "memory": "sum", "tasks": 32, "hidden": 16, "latent": 2}
    learning = {"decoder_hidden": 16, "anneal": 20, "warmup": 5, "entropy": 0.01, "lr": 2e-2, "minibatches": 2}
    own = BeliefLearner(BANDIT, BeliefConfig(**settings, **learning))
    state = own.meta_train(BANDIT, 0, 20, progress=False)
    tasks = BANDIT.tasks(torch.arange(2000) + 10**6)
    play = lambda meta: trial(BANDIT, tasks, own.agent(meta), 1, 1, 1, progress=False).returns.mean()
    before, after = play(start(own)), play(state.meta)
    assert before < 3.1 and after > 3.4, (before, after)


def test_a_seed_fixes_a_run_and_a_run_can_be_continued():
    own = learner()
    whole = own.meta_train(PRICING, 1, 3, progress=False)
    again = own.meta_train(PRICING, 1, 3, own.meta_train(PRICING, 1, 1, progress=False), progress=False)
    assert all(torch.equal(p, q) for p, q in zip(whole.meta, again.meta)) and whole.history == again.history
    other = own.meta_train(PRICING, 2, 3, progress=False)
    assert not all(torch.equal(p, q) for p, q in zip(whole.meta, other.meta))


def test_a_teacher_is_imitated():
    def best_arms(family, tasks):
        return lambda seen, task: tasks.chance[task].argmax(-1)[:, None].expand(seen.shape[:2])

    config = BeliefConfig(**TINY | {"episodes": 1, "by_action": True, "pretrain": 2})
    state = BeliefLearner(BANDIT, config, best_arms).meta_train(BANDIT, 0, 3, progress=False)
    assert ["surprise" in log for log in state.history] == [True, True, False]
    with pytest.raises(ValueError, match="pretrain"):
        BeliefLearner(BANDIT, config)


@pytest.mark.parametrize(
    "name, value",
    [
        ("latent", 0),
        ("latent", 10**9),
        ("decode", "future"),
        ("beliefs", 0),
        ("steps", 10**9),
        ("reconstruction", -1.0),
        ("divergence", math.nan),
        ("belief_lr", 0.0),
        ("least_std", 0.0),
        ("decoder_hidden", 10**9),
        ("tasks", 0),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"BeliefConfig.{name}"):
        BeliefConfig(**{name: value})
