"""The counter-based uniforms: the right hash, uniform, independent, and the same in every batch and precision."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from ecomlib import noise

WORD = 2**64 - 1
ONE = torch.zeros(1, dtype=torch.int64)


def mix(x):
    """The splitmix64 finaliser on Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def reference(seed, stream, episode, time, task, replica, index):
    key = 0
    for word in (seed, stream, episode, time, task, replica, index):
        key = mix((key + 0x9E3779B97F4A7C15 + word) & WORD)
    return ((key >> 12) + 0.5) / 2**52


def draw(seed=0, task=0, replica=0, episode=0, time=0, stream=0, size=1, dtype=torch.float64):
    as_ids = lambda x: torch.as_tensor(x, dtype=torch.int64).reshape(-1)
    return noise.uniform(seed, as_ids(task), as_ids(replica), episode, time, stream, size, dtype)


def test_reference_is_splitmix64():
    """The first outputs of splitmix64 seeded with 1234567, as published with its reference code (Vigna)."""
    states = [(1234567 + (k + 1) * 0x9E3779B97F4A7C15) & WORD for k in range(3)]
    assert [mix(s) for s in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [w % 2**64 for w in noise.mix(words).tolist()] == [mix(s) for s in states]


def test_values_are_those_of_the_hash():
    ids = [0, 1, 2**62 - 1]
    found = draw(seed=7, task=ids, replica=[0, 5], episode=3, time=11, stream=2, size=4)
    assert found.shape == (3, 2, 4) and found.dtype == torch.float64
    for m, n, k in itertools.product(range(3), range(2), range(4)):
        assert found[m, n, k].item() == reference(7, 2, 3, 11, ids[m], [0, 5][n], k)
    assert draw(seed=1).item() == pytest.approx(reference(1, 0, 0, 0, 0, 0, 0), abs=0)


@pytest.mark.parametrize("tensors", list(itertools.product((False, True), repeat=3)))
def test_numbers_and_tensors_of_one_are_the_same_words(tensors):
    """Numbers are mixed outside torch as far as the first tensor."""
    for words in ((7, 3, 11), (2**62 - 1, 0, 2**40), (-5, -1, 2)):
        given = [torch.tensor(word) if tensor else word for word, tensor in zip(words, tensors)]
        found = draw(seed=given[0], task=9, replica=4, episode=given[1], time=given[2], stream=2, size=3)
        assert [x.item() for x in found.flatten()] == [reference(words[0], 2, *words[1:], 9, 4, k) for k in range(3)]


def test_every_word_of_the_key_matters():
    """No two of (seed, stream, episode, time, task, replica, index) share a draw; (seed 0, stream 1) is not (1, 0)."""
    draws = [
        draw(seed=s, stream=k, episode=e, time=t, task=range(3), replica=range(3), size=3).flatten()
        for s, k, e, t in itertools.product(range(4), repeat=4)
    ]
    everything = torch.cat(draws)
    assert len(everything.unique()) == len(everything) == 4**4 * 3**3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_on_the_open_interval(dtype):
    u = draw(task=range(200), replica=range(100), size=10, dtype=dtype)
    assert u.dtype == dtype and u.min() > 0 and u.max() < 1
    counts = torch.histc(u.double(), 64, 0, 1)
    assert chisquare(counts).pvalue > 1e-3
    assert kstest(u.double().flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("dtype, bits", [(torch.float32, 23), (torch.float64, 52)])
def test_the_extreme_words_stay_inside(monkeypatch, dtype, bits):
    """All bits 0 or all bits 1: the smallest and the largest draw there can be."""
    for word, value in ((0, 0.5 * 2.0**-bits), (-1, 1 - 0.5 * 2.0**-bits)):
        monkeypatch.setattr(noise, "_absorb", lambda key, value, word=word: torch.full((1, 1, 1), word))
        u = noise.uniform(0, ONE, ONE, 0, 0, 0, 1, dtype)
        assert 0 < u.item() < 1 and u.item() == value


NEIGHBOURS = {
    "time": lambda size: (draw(time=3, task=range(size)), draw(time=4, task=range(size))),
    "episode": lambda size: (draw(episode=3, task=range(size)), draw(episode=4, task=range(size))),
    "stream": lambda size: (draw(stream=0, task=range(size)), draw(stream=1, task=range(size))),
    "seed": lambda size: (draw(seed=0, task=range(size)), draw(seed=1, task=range(size))),
    "task": lambda size: (draw(task=range(size)), draw(task=range(1, size + 1))),
    "replica": lambda size: (draw(replica=range(size)), draw(replica=range(1, size + 1))),
    "index": lambda size: draw(task=range(size), size=2).split(1, -1),
    "seed and stream": lambda size: (draw(seed=1, task=range(size)), draw(stream=1, task=range(size))),
}


@pytest.mark.parametrize("what", NEIGHBOURS)
def test_neighbours_are_independent(what):
    """The pair of neighbouring draws fills the square evenly, and they do not correlate."""
    size = 50_000
    x, y = (u.flatten().numpy() for u in NEIGHBOURS[what](size))
    counts, _, _ = np.histogram2d(x, y, bins=10, range=[[0, 1], [0, 1]])
    assert chisquare(counts.ravel()).pvalue > 1e-3
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / size**0.5


def test_a_task_has_the_same_luck_in_every_batch():
    ids = torch.randint(2**62, (4096,), generator=torch.Generator().manual_seed(0))
    large = draw(seed=5, task=ids, replica=range(3), time=2, size=2)
    assert torch.equal(draw(seed=5, task=ids[100:108], replica=range(3), time=2, size=2), large[100:108])
    assert torch.equal(draw(seed=5, task=ids[:8], replica=[2], time=2, size=2), large[:8, 2:])
    assert torch.equal(draw(seed=5, task=ids[:8], replica=[2], time=2, size=1), large[:8, 2:, :1])


def test_both_precisions_see_the_same_luck():
    double = draw(task=range(1000), size=5)
    single = draw(task=range(1000), size=5, dtype=torch.float32)
    assert torch.equal(single.double(), ((double * 2**23).floor() + 0.5) / 2**23)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float16"):
        draw(dtype=torch.float16)


def test_compiles_as_one_graph():
    """As a rollout would use it: episode and time as tensors. Generated code gives the same bits as eager."""

    def draws(ids, replica, episode, time):
        return noise.uniform(3, ids, replica, episode, time, noise.POLICY, 2, torch.float64)

    arguments = (torch.arange(64) * 2**40, torch.arange(8), torch.tensor(2), torch.tensor(5))
    compiled = torch.compile(draws, fullgraph=True)
    assert torch.equal(compiled(*arguments), draws(*arguments))
    assert torch.equal(draws(*arguments), noise.uniform(3, *arguments[:2], 2, 5, noise.POLICY, 2, torch.float64))
