"""Counter-based uniforms: the only source of randomness inside a family, a rollout or a trial.

A draw is a hash of *what it is for* (seed, task id, replica, episode, time, stream), never of what was drawn before it.
So a task's outcome does not depend on which tasks share its batch, on sharding, device or algorithm; two policies meet
the same shoppers; and nothing here breaks ``torch.compile(fullgraph=True)``, as a ``torch.Generator`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAMILY, POLICY, AGENT, PRIOR = range(4)
"""Streams: the family's own chance, the policy's choice of action, an adaptive agent's chance, the draw of a task."""


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` as the signed integer that torch stores."""
    return value - 2**64 if value >= 2**63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
"""Constants of the splitmix64 finaliser (Steele, Lea and Flood 2014)."""

_BITS = {torch.float32: 23, torch.float64: 52}
# One bit less than the significand holds, so that the half that keeps draws off 0 and 1 is not rounded away.


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's ``>>`` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser: a bijection of 64-bit words in which each input bit flips about half of the output
    bits."""
    x = (x ^ _shift_right(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def _mix_number(x: int) -> int:
    """``mix`` of a Python number, modulo 2^64."""
    x %= 2**64
    x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) % 2**64
    x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) % 2**64
    return x ^ (x >> 31)


def _absorb(key: Tensor, value: Tensor | int) -> Tensor:
    # One finaliser a word: with plain sums, the draws at time t + 1 would be a shifted copy of those at time t.
    return mix(key + GOLDEN + value)


def uniform(
    seed: int | Tensor,
    task_id: Tensor,
    replica: Tensor,
    episode: int | Tensor,
    time: int | Tensor,
    stream: int,
    size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Uniforms in the open interval (0, 1), one row per task and replica.

    ==========  ==========  =====================================================
    Argument    Shape       Meaning
    ==========  ==========  =====================================================
    seed        scalar      names the whole experiment; or (M,), that of each task
    task_id     (M,) int64  ``tasks.id``
    replica     (N,) int64  which independent copy of the trial
    episode     scalar      which episode of the trial
    time        scalar      which step of the episode
    stream      int         FAMILY, POLICY, AGENT or PRIOR
    size        int         how many draws a row needs
    ==========  ==========  =====================================================

    Returns a tensor (M, N, size). float32 draws are the leading 23 bits, float64 draws the leading 52, of the same
    word, so both precisions see the same luck.
    """
    dtype = dtype or torch.get_default_dtype()
    if dtype not in _BITS:
        raise ValueError(f"dtype = {dtype}: uniforms are float32 or float64")
    # The seed is a word like the others: started from it, (seed 0, stream 1) would be (seed 1, stream 0).
    key, words = 0, [seed, stream, episode, time]
    if not torch.compiler.is_compiling():  # numbers are mixed as numbers, at a tenth of what tensors of one would take
        while words and isinstance(words[0], int):
            key = _mix_number(key + GOLDEN + words.pop(0))
    key = torch.full((), _signed(key), dtype=torch.int64, device=task_id.device)
    for word in words:
        key = _absorb(key, word)
    key = _absorb(_absorb(key, task_id)[:, None], replica)[..., None]
    word = _absorb(key, torch.arange(size, device=task_id.device))
    bits = _BITS[dtype]
    return (_shift_right(word, 64 - bits).to(dtype) + 0.5) * 2.0**-bits


def inverse_transform(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Index drawn from ``probabilities`` (..., K) with one uniform (...): the first whose cumulative probability
    exceeds it."""
    below = probabilities.cumsum(-1) <= uniform[..., None]
    return below.sum(-1).clamp(max=probabilities.shape[-1] - 1)
