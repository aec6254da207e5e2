"""Chapter "Running experiments": both sides of every numbered equation."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from notebooks import ROOT
from scipy import integrate, optimize, stats
from torch import Generator

from ecomlib.checkpoints import pack, unpack
from ecomlib.configuration import DataSettings, PolicySettings, default_config
from ecomlib.evaluation.statistics import paired_difference, t_interval
from ecomlib.families import LogitPricing
from ecomlib.learners import MAML, Inner, MAMLConfig, PPOStep, sharding
from ecomlib.learners.sharding import Shards
from ecomlib.policies import CategoricalMLP
from ecomlib.training import precision


def small():
    """A learner for seconds, in float64."""
    data, policy = DataSettings(4, 3, advantage="same_step"), PolicySettings(hidden=(8,), inputs=(0, 2))
    changes = {"data": data, "policy": policy, "family": LogitPricing(days=5), "dtype": "float64"}
    return replace(default_config("pricing", "ppo-maml"), **changes)


# ------------------------------------------------------------------------------------------------ survival
def test_iteration_map():
    """Equation (eq-iteration-map): from a state that went through bytes, the rest is the same to the last bit."""
    config = small()
    with precision(config.dtype):
        learner = config.learner()
        whole = learner.meta_train(config.family, 3, 6, progress=False)
        half = learner.meta_train(config.family, 3, 3, progress=False)
        half = unpack(pack(half, "hash", (3,)), "half", "hash", (3,))
        rest = config.learner().meta_train(config.family, 3, 6, start=half, progress=False)
        other = learner.meta_train(config.family, 4, 6, start=half, progress=False)
        forgetful = learner.meta_train(config.family, 3, 6, start=half._replace(memory=None), progress=False)
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.meta, b.meta, strict=True))
    assert same(whole, rest)
    assert not same(whole, other) and not same(whole, forgetful)  # the seed and Adam's memory are part of the state


def attempts(work, cost, between, restart, repetitions, generator):
    """Times until ``work`` and a checkpoint went through without a failure; failures come at random."""
    total = np.zeros(repetitions)
    running = np.arange(repetitions)
    while len(running):
        failure = generator.exponential(between, len(running))
        through = failure >= work + cost
        total[running[through]] += work + cost
        total[running[~through]] += failure[~through] + restart
        running = running[~through]
    return total


@pytest.mark.parametrize("work, cost, between, restart", [(1.0, 0.1, 2.0, 0.0), (0.3, 0.05, 1.0, 0.2), (3, 0.5, 2, 1)])
def test_checkpoint_time(work, cost, between, restart):
    """Equation (eq-checkpoint-time), by simulating failures."""
    times = attempts(work, cost, between, restart, 400_000, np.random.default_rng(0))
    exact = (between + restart) * math.expm1((work + cost) / between)
    assert abs(times.mean() - exact) < 4 * times.std() / math.sqrt(len(times))
    assert abs(times.mean() - (exact - restart)) > 4 * times.std() / math.sqrt(len(times)) or restart == 0


def overhead(work, cost, between):
    """Time per unit of work that is kept, less 1."""
    return between * math.expm1((work + cost) / between) / work - 1


def test_checkpoint_loss():
    """Equation (eq-checkpoint-loss): what the two terms leave out vanishes faster than they do."""
    off = []
    for cost in (1e-2, 1e-4, 1e-6):  # with failures every unit of time, at Young's interval
        work = math.sqrt(2 * cost)
        off.append(abs(overhead(work, cost, 1.0) / (cost / work + work / 2) - 1))
    assert off[0] < 0.2 and off[1] < 0.02 and off[2] < 0.002


def test_young():
    """Equation (eq-young): where the exact overhead is least, and where its two terms are."""
    for cost, tolerance in ((1e-2, 0.1), (1e-4, 0.01), (1e-6, 0.001)):
        least = optimize.minimize_scalar(
            lambda x, cost=cost: overhead(math.exp(x), cost, 1.0), bounds=(-12, 0), method="bounded",
            options={"xatol": 1e-10},
        )  # fmt: skip
        young = math.sqrt(2 * cost)
        assert abs(young / math.exp(least.x) - 1) < tolerance
        assert overhead(young, cost, 1.0) < 1.002 * least.fun
        for other in (0.5, 2):
            assert overhead(other * young, cost, 1.0) > 1.15 * least.fun
    two = optimize.minimize_scalar(lambda w: 3.0 / w + w / (2 * 50.0), bracket=(1, 10, 100))
    assert two.x == pytest.approx(math.sqrt(2 * 3.0 * 50.0), rel=1e-6)
    assert two.fun == pytest.approx(math.sqrt(2 * 3.0 / 50.0), rel=1e-9)


# ------------------------------------------------------------------------------------------------ statistics
def test_interval_width():
    """Equation (eq-interval-width): the library's interval."""
    generator = np.random.default_rng(0)
    for n in (2, 3, 5, 20):
        values = generator.normal(3, 2, n)
        found = t_interval(values)
        half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
        assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-12)
        assert found.estimate == pytest.approx(values.mean(), rel=1e-12)
    assert [round(stats.t.ppf(0.975, n - 1), 1) for n in (2, 5, 20)] == [12.7, 2.8, 2.1]  # as the chapter says


def test_paired_variance():
    """Equation (eq-paired-variance): by listing all outcomes of two seeds, and on the stored runs."""
    generator = np.random.default_rng(1)
    chance = generator.random((3, 4))
    chance /= chance.sum()  # joint distribution of the scores of one seed
    a, b = generator.normal(size=3), generator.normal(size=4)
    moment = lambda f: sum(chance[i, j] * f(a[i], b[j]) for i in range(3) for j in range(4))
    mean_a, mean_b = moment(lambda x, y: x), moment(lambda x, y: y)
    sd_a = math.sqrt(moment(lambda x, y: (x - mean_a) ** 2))
    sd_b = math.sqrt(moment(lambda x, y: (y - mean_b) ** 2))
    correlation = moment(lambda x, y: (x - mean_a) * (y - mean_b)) / (sd_a * sd_b)
    exact = 0.0
    for i, j, k, l in np.ndindex(3, 4, 3, 4):  # two seeds, independent of each other
        difference = (a[i] + a[k]) / 2 - (b[j] + b[l]) / 2
        exact += chance[i, j] * chance[k, l] * (difference - (mean_a - mean_b)) ** 2
    assert exact == pytest.approx((sd_a**2 + sd_b**2 - 2 * correlation * sd_a * sd_b) / 2, rel=1e-12)

    one, two = generator.normal(size=(2, 6))
    two = two + 3 * one
    width = lambda x: (x.high - x.low) / 2 / stats.t.ppf(0.975, 5)
    covariance = np.cov(one, two)
    variance = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / 6
    assert width(paired_difference(two, one)) ** 2 == pytest.approx(variance, rel=1e-10)


def expected_maximum(n):
    """Of n independent standard normal numbers."""
    inside = lambda x: x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1)
    return integrate.quad(inside, -12, 12, epsabs=1e-12, limit=200)[0]


def test_winner():
    """Equation (eq-winner): exact values, and a simulation."""
    assert expected_maximum(1) == pytest.approx(0, abs=1e-10)
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-9)
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-9)
    assert [round(expected_maximum(n), 1) for n in (5, 50, 1000)] == [1.2, 2.2, 3.2]  # as the chapter says
    generator = np.random.default_rng(2)
    for n in (5, 50):
        best = 0.7 + 0.2 * generator.normal(size=(200_000, n)).max(1)
        expected = 0.7 + 0.2 * expected_maximum(n)
        assert abs(best.mean() - expected) < 4 * best.std() / math.sqrt(len(best))


def test_winner_truth():
    """Equation (eq-winner-truth): settings that differ, scores with noise."""
    generator = np.random.default_rng(3)
    spread, noise, mean = 0.3, 0.2, 0.5
    truth = mean + spread * generator.normal(size=(100_000, 20))
    score = truth + noise * generator.normal(size=truth.shape)
    winner = score.argmax(1)
    rows = np.arange(len(truth))
    won, real = score[rows, winner], truth[rows, winner]
    share = spread**2 / (spread**2 + noise**2)
    off = real - (mean + share * (won - mean))
    assert abs(off.mean()) < 4 * off.std() / math.sqrt(len(off))
    assert abs(np.cov(off, won)[0, 1]) < 4 * off.std() * won.std() / math.sqrt(
        len(off)
    )  # at every score, not on average
    assert (won - real).mean() > 0.1


# ------------------------------------------------------------------------------------------------ scaling out
def test_gradient_bytes(monkeypatch):
    """Equation (eq-gradient-bytes): what the library hands to all-reduce."""
    monkeypatch.setattr(sharding.distributed, "all_reduce", lambda flat: flat.mul_(2))  # both processes had the same
    for dtype, size, steps, epochs, seeds in (
        ("float32", 4, 1, 1, 0),
        ("float64", 8, 2, 3, 0),
        ("float32", 4, 2, 3, (0, 1)),
    ):
        with precision(dtype):
            policy = CategoricalMLP((LogitPricing.observation_size, 5, 11))
            learner = MAML(policy, Inner(steps), PPOStep(epochs=epochs), MAMLConfig(4, 3))
            parameters = sum(p.numel() for p in learner.initial(Generator().manual_seed(0)))
            learner.shards = Shards(0, 2)
            learner.meta_train(LogitPricing(days=3), seeds, 2, progress=False)
        several = len(seeds) if seeds else 1
        assert learner.shards.all_reduces == 2 * epochs
        assert learner.shards.bytes_moved == 2 * epochs * size * (several * (parameters + steps + 2) + 1)


class Ring:
    """Processes in a circle that send chunks of a buffer to the next one; every message is counted and timed."""

    def __init__(self, buffers, latency, bandwidth):
        self.parts = [np.array_split(np.array(b, float), len(buffers)) for b in buffers]
        self.latency, self.bandwidth = latency, bandwidth
        self.time, self.sent = 0.0, np.zeros(len(buffers))

    def all_reduce(self):
        size = len(self.parts)
        for k in range(size - 1):  # sums travel on and grow
            self.round(lambda p, k=k: (p - k) % size, add=True)
        for k in range(size - 1):  # p now has the whole sum of chunk p + 1
            self.round(lambda p, k=k: (p + 1 - k) % size, add=False)
        return [np.concatenate(own) for own in self.parts]

    def round(self, chunk_of, add):
        """Everybody sends one chunk, at the same time."""
        size = len(self.parts)
        data = [(p, chunk_of(p), self.parts[p][chunk_of(p)].copy()) for p in range(size)]
        for p, chunk, sent in data:
            to = self.parts[(p + 1) % size]
            to[chunk] = to[chunk] + sent if add else sent
            self.sent[p] += sent.nbytes
        self.time += max(self.latency + sent.nbytes / self.bandwidth for _, _, sent in data)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_ring(processes):
    """Equation (eq-ring): the messages of a ring, one by one; and they do add up."""
    generator = np.random.default_rng(4)
    buffers = generator.normal(size=(processes, 8 * 3 * 5))
    ring = Ring(buffers, latency=2e-4, bandwidth=1e6)
    for found in ring.all_reduce():
        np.testing.assert_allclose(found, buffers.sum(0), rtol=1e-12)
    assert ring.time == pytest.approx(ring_time(processes, buffers[0].nbytes, 2e-4, 1e6), rel=1e-12)
    assert np.allclose(ring.sent, 2 * (processes - 1) / processes * buffers[0].nbytes)


def ring_time(processes, size, latency, bandwidth):
    return 2 * (processes - 1) * (latency + size / (processes * bandwidth))


def iteration_time(processes, serial, task, tasks, reduces, size, latency, bandwidth):
    ring = ring_time(processes, size, latency, bandwidth)
    return serial + tasks / processes * task + reduces * ring


def test_iteration_time():
    """Equation (eq-iteration-time): processes that work side by side and wait for each other at every all-reduce."""
    serial, task, tasks, reduces = 3e-3, 1e-3, 24, 3
    for processes in (1, 2, 4, 8):
        buffers = np.ones((processes, 8 * 3 * 5))
        clock = np.zeros(processes)
        for _ in range(reduces):  # tasks in equal parts between the gradients
            clock += serial / reduces
            for _ in range(tasks // (processes * reduces)):
                clock += task
            ring = Ring(buffers, 2e-4, 1e6)
            ring.all_reduce()
            clock[:] = clock.max() + ring.time
        expected = iteration_time(processes, serial, task, tasks, reduces, buffers[0].nbytes, 2e-4, 1e6)
        assert clock == pytest.approx(expected, rel=1e-12)


def test_prediction_of_the_benchmark():
    """The stored prediction is this equation with the stored constants."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    reduces = stored["all_reduces_per_iteration"]
    size = stored["bytes_per_iteration"] / reduces
    for row in stored["rows"]:
        expected = iteration_time(2, stored["serial_s"], stored["task_s"], row["tasks"], reduces, size,
                                  stored["latency_s"], stored["bandwidth_bytes_per_s"])  # fmt: skip
        assert row["predicted_s"] == pytest.approx(expected, rel=3e-3)  # stored with four digits


def test_amdahl():
    """Equation (eq-amdahl): approached with a network that costs nothing, and never passed."""
    serial, task, tasks = 3e-3, 1e-3, 40
    bound = 1 + tasks * task / serial
    one = iteration_time(1, serial, task, tasks, 3, 1e4, 1e-5, 1e9)
    for latency, bandwidth in ((1e-5, 1e9), (0.0, math.inf)):
        speed_up = [one / iteration_time(p, serial, task, tasks, 3, 1e4, latency, bandwidth) for p in (1, 8, 64, 10**9)]
        assert all(s < bound for s in speed_up)
    assert speed_up[-1] == pytest.approx(bound, rel=1e-6)


def test_best_processes():
    """Equation (eq-best-processes): where the time of an iteration is least."""
    serial, task, tasks, reduces, size, latency, bandwidth = 3e-3, 1e-3, 160, 5, 2e4, 1e-4, 1e8
    time = lambda p: iteration_time(p, serial, task, tasks, reduces, size, latency, bandwidth)
    least = optimize.minimize_scalar(time, bounds=(1, 1000), method="bounded", options={"xatol": 1e-8})
    best = math.sqrt((tasks * task - 2 * reduces * size / bandwidth) / (2 * reduces * latency))
    assert best == pytest.approx(least.x, rel=1e-5)
    assert 2 < best < 100
