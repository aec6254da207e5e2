"""The best shared table of prices, against every table there is on small shelves."""

from itertools import product

import pytest
import torch

from ecomlib.families import LogitPricing, LogUniformPrior
from ecomlib.families.pricing import blind_policy
from ecomlib.families.shelf import _occupancy, action_values, best_table

SLOW = LogUniformPrior(traffic=(4.0, 30.0))


@pytest.mark.parametrize(
    ("days", "stock", "markups"), [(2, 3, (1.1, 1.5, 2.0)), (3, 2, (1.2, 1.6)), (2, 2, (1.1, 1.4, 1.8))]
)
def test_best_table_is_the_best_of_all_tables(days, stock, markups):
    family = LogitPricing(days=days, stock=stock, markups=markups, prior=SLOW)
    rate, margin, levels = family._shelf(family.prior_sample(200))
    mean = lambda table: action_values(rate, margin, levels, table)[:, 0, -1, table[0, -1]].mean().item()
    entries = [(0, stock)] + [(day, left) for day in range(1, days) for left in range(1, stock + 1)]
    best = -1.0
    for choice in product(range(len(markups)), repeat=len(entries)):
        table = torch.zeros(days, levels, dtype=torch.int64)
        for (day, left), action in zip(entries, choice):
            table[day, left] = action
        best = max(best, mean(table))
    assert mean(best_table(rate, margin, levels)) == pytest.approx(best, rel=1e-12)


def test_best_table_beats_its_starting_point_and_every_fixed_price():
    family = LogitPricing(stock=40)
    rate, margin, levels = family._shelf(family.prior_sample(256))
    mean = lambda table: action_values(rate, margin, levels, table)[:, 0, -1, table[0, -1]].mean().item()
    revealed = action_values(rate, margin, levels).mean(0).argmax(-1)
    found = mean(best_table(rate, margin, levels))
    assert found > mean(revealed)
    assert found > max(mean(torch.full((14, levels), k)) for k in range(family.actions))


def test_occupancy_is_what_a_simulation_finds():
    """Levels on each morning under a table, against 20,000 episodes of one product, within 5 standard errors."""
    family, n = LogitPricing(days=4, stock=12, prior=SLOW), 20_000
    tasks = family.tasks(torch.tensor([5]))
    rate, _, levels = family._shelf(tasks)
    table = (torch.arange(levels) % family.actions).expand(4, -1)
    expected = _occupancy(rate, table, levels)[:, 0]
    generator = torch.Generator().manual_seed(0)
    left = torch.full((n,), 12)
    for day in range(4):
        found = torch.bincount(left, minlength=levels) / n
        error = (expected[day] * (1 - expected[day]) / n).sqrt()
        assert ((found - expected[day]).abs() <= 5 * error + 1e-9).all()
        demand = torch.poisson(rate[day, 0][table[day][left]], generator=generator).long()
        left = (left - demand).clamp(min=0)


def test_without_a_limit_the_table_is_one_price():
    family = LogitPricing()
    table = blind_policy(family)
    assert table.shape == (14, 1) and len(table.unique()) == 1
