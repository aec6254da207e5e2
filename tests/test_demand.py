"""Poisson demand by inverse transform, against scipy's exact quantiles."""

import numpy as np
import pytest
import torch
from scipy.stats import poisson

from ecomlib.families.demand import SMALL_MEAN, _bisected, _counted, _giles, _tabled, poisson_inverse, table_inverse

UNIFORM = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


@pytest.mark.parametrize("mean", [1e-3, 0.5, 2.0, 5.0, SMALL_MEAN])
def test_exact_where_the_distribution_function_is_summed(mean):
    counts = poisson_inverse(UNIFORM, torch.full_like(UNIFORM, mean))
    assert np.array_equal(counts.numpy(), poisson.ppf(UNIFORM.numpy(), mean))


@pytest.mark.parametrize("mean", [6.01, 8.0, 20.0, 100.0, 420.0])
def test_asymptotic_branch_misses_by_one_and_rarely(mean):
    """The docstring's promise: off by one for fewer than 1.1 uniforms in 1,000, mean wrong by less than 2e-4."""
    counts = poisson_inverse(UNIFORM, torch.full_like(UNIFORM, mean)).numpy()
    error = counts - poisson.ppf(UNIFORM.numpy(), mean)
    assert np.abs(error).max() <= 1
    assert (error != 0).mean() < 1.1e-3
    assert abs(error.mean()) < 2e-4


def test_zero_demand_and_extreme_uniforms():
    extremes = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert (poisson_inverse(extremes, torch.zeros(2, dtype=torch.float64)) == 0).all()
    for mean in (0.01, 5.0, 7.0, 300.0):
        counts = poisson_inverse(extremes, torch.full_like(extremes, mean))
        assert counts.isfinite().all() and (counts >= 0).all()


def test_single_and_double_precision_agree():
    uniform, mean = UNIFORM[::50], torch.linspace(0.1, 300, 4000, dtype=torch.float64)
    single = poisson_inverse(uniform.float(), mean.float()).double()
    difference = (single - poisson_inverse(uniform, mean)).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() < 2e-3


def test_the_loop_and_the_table_are_the_same_sum():
    """Bit for bit in double precision: what is compiled draws what is not."""
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    mean = SMALL_MEAN * torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(_counted(uniform, mean, torch.exp(-mean)), _tabled(uniform, mean, torch.exp(-mean)))


def test_normal_quantiles_of_compiled_single_precision():
    uniform = ((torch.arange(2**23, dtype=torch.float64) + 0.5) * 2.0**-23)[:: 2**4]  # what noise can be
    ends = torch.tensor([0.5, 2**23 - 0.5], dtype=torch.float64) * 2.0**-23
    uniform = torch.cat((uniform, ends))
    error = _giles(uniform.float()).double() - torch.special.ndtri(uniform)
    assert error.abs().max() < 2e-6


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 199])
def test_the_bisection_is_searchsorted(size):
    generator = torch.Generator().manual_seed(size)
    table = torch.rand(50, size, generator=generator).sort(-1).values
    table[:, -1] = 1
    uniform = torch.cat((torch.rand(50, 40, generator=generator), table[:, :1], table[:, size // 2, None]), 1)
    found = table_inverse(table, uniform)
    assert torch.equal(_bisected(table, uniform), found)
    assert ((table[:, None] < uniform[..., None]).sum(-1) == found).all()
