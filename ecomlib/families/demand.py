"""Poisson demand by inverse transform: one uniform in, one count out, no data-dependent control flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .constants import constant

SMALL_MEAN = 6.0
"""Up to this mean the distribution function is summed term by term; above it, the asymptotic inverse is used."""
TERMS = 26
"""Terms of the sum: a Poisson variable of mean SMALL_MEAN exceeds 26 with probability 4e-10."""
LARGE = 8192
"""Means from which on a table of all terms takes longer to write than the sum term by term takes calls."""
CENTRE = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
          -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
        1.00167406, 2.83297682)  # fmt: skip
"""Coefficients of Giles (2012, Table 5), highest power first."""


def poisson_inverse(uniform: Tensor, mean: Tensor) -> Tensor:
    """Smallest k with P(Poisson(mean) <= k) >= uniform, any broadcastable shapes, returned in the dtype of ``mean``.

    Exact up to rounding for mean <= 6 (summation). Above, the floor of the expansion Q_N2 of Giles (2016, Algorithm
    955), which differs from the exact count by 1 for fewer than 1.1 in 1,000 uniforms (``tests/test_demand.py``
    measures it against scipy), always next to a jump of the distribution function.
    """
    small_mean = mean.clamp(max=SMALL_MEAN)
    fused = torch.compiler.is_compiling() or mean.numel() > LARGE
    small = (_counted if fused else _tabled)(uniform, small_mean, torch.exp(-small_mean))
    # Q_N2 in the standard normal quantile w; the clamp keeps the branch that is not used finite.
    lam = mean.clamp(min=SMALL_MEAN)
    root = lam.sqrt()
    w = normal_quantile(uniform)
    square = w * w
    large = (
        lam
        + root * w
        + (2 + square) / 6
        - (w / 36 + w * square / 72) / root
        + (-8 / 405 + 7 * square / 810 + square * square / 270) / lam
    )
    return torch.where(mean > SMALL_MEAN, large.floor().clamp(min=0), small)


def _counted(uniform: Tensor, mean: Tensor, none: Tensor) -> Tensor:
    """How many values of the distribution function lie below the uniform, term by term: one fused loop if compiled."""
    term = total = none
    count = (uniform > term).to(mean.dtype)
    for k in range(1, TERMS):
        term = term * (mean / k)
        total = total + term
        count = count + (uniform > total)
    return count


def _tabled(uniform: Tensor, mean: Tensor, none: Tensor) -> Tensor:
    """The same from a table of all terms, which takes a tenth of the calls."""
    k = constant(tuple(range(1, TERMS)), mean)
    total = torch.cat((none[..., None], mean[..., None] / k), -1).cumprod(-1).cumsum(-1)
    return (uniform[..., None] > total).sum(-1).to(mean.dtype)


def table_inverse(table: Tensor, uniform: Tensor) -> Tensor:
    """(M, N) int64, the first k with table[m, k] >= uniform[m, n], for distribution functions (M, K) that end with 1.

    This is ``torch.searchsorted``, which the compiler cannot fuse; if compiled, the same bisection step by step.
    """
    if not torch.compiler.is_compiling():
        return torch.searchsorted(table, uniform.contiguous())
    return _bisected(table, uniform)


def _bisected(table: Tensor, uniform: Tensor) -> Tensor:
    low, size = torch.zeros_like(uniform, dtype=torch.int64), table.shape[1]
    while size > 1:
        half = size // 2
        low = low + half * (table.gather(1, low + (half - 1)) < uniform)
        size -= half
    return low + (table.gather(1, low) < uniform)


def normal_quantile(uniform: Tensor) -> Tensor:
    """Standard normal quantiles, same shape.

    ``torch.special.ndtri``, but for compiled float32: there it would keep everything fused with it from being
    vectorised, and the single-precision approximation of Giles (2012, "Approximating the erfinv function") takes its
    place, with an error below 2e-6 (``tests/test_demand.py``).
    """
    if uniform.dtype != torch.float32 or not torch.compiler.is_compiling():
        return torch.special.ndtri(uniform)
    return _giles(uniform)


def _giles(uniform: Tensor) -> Tensor:
    w = -torch.log(4 * uniform * (1 - uniform))
    centre, tail = w - 2.5, w.sqrt() - 3
    inner, outer = torch.full_like(w, CENTRE[0]), torch.full_like(w, TAIL[0])
    for c, t in zip(CENTRE[1:], TAIL[1:]):
        inner, outer = c + inner * centre, t + outer * tail
    return math.sqrt(2) * (2 * uniform - 1) * torch.where(w < 5, inner, outer)
