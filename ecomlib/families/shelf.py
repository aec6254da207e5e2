"""A shelf that is not filled again: expected profit and best prices when Poisson demand is cut at what is left.

Shapes: T days, M products, A prices, L levels. A level is a number of units left, 0..stock; without a stock limit
there is one level and demand is never cut. Demand of product i on day t at price k is Poisson with mean ``rate[t, i,
k]``, and a unit sold at price k earns ``margin[i, k]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def action_values(rate: Tensor, margin: Tensor, levels: int, policy: Tensor | None = None) -> Tensor:
    """(M, T, L, A) expected profit to come of each price, by backward induction, equation (eq-stock).

    Afterwards the best prices follow, or those of ``policy`` (T, L) int64 if given. This is the recursion of Gallego
    and van Ryzin (1994) in discrete time; time and memory grow as M * A * L + M * L^2 a day.
    """
    value, result = margin.new_zeros(len(margin), levels), []
    for day in reversed(range(len(rate))):
        q = _day_values(rate[day], margin, value)
        chosen = q.argmax(-1) if policy is None else policy[day].expand(q.shape[:2])
        value = q.gather(-1, chosen[..., None])[..., 0]
        result.append(q)
    return torch.stack(result[::-1], 1)


def best_table(rate: Tensor, margin: Tensor, levels: int, rounds: int = 100) -> Tensor:
    """(T, L) int64: the table of prices with the best mean profit over the M products, when all must share one table.

    A round goes backwards through the days and gives every level the price that is best for the products which reach
    it, each weighted by its probability of being there; no round lowers the mean. It stops when a round adds less than
    one part in 100,000, so no single day of the table can then be improved by more (a local optimum;
    ``tests/test_shelf.py`` compares it with all tables on small shelves). It starts from the prices that are best if
    the product were revealed tomorrow.
    """
    table = action_values(rate, margin, levels).mean(0).argmax(-1)
    mean = -float("inf")
    for _ in range(rounds):
        reach = _occupancy(rate, table, levels)
        value = margin.new_zeros(len(margin), levels)
        for day in reversed(range(len(rate))):
            q = _day_values(rate[day], margin, value)
            total = (reach[day][..., None] * q).sum(0)
            kept = total.gather(-1, table[day][:, None])[:, 0]
            # A price changes only for a real gain: rounding must not send it back and forth.
            better = total.amax(-1) > kept + 8 * torch.finfo(total.dtype).eps * total.abs().amax()
            table[day] = torch.where(better, total.argmax(-1), table[day])
            value = q.gather(-1, table[day].expand(q.shape[:2])[..., None])[..., 0]
        before, mean = mean, value[:, -1].mean().item()
        if mean - before <= 1e-5 * abs(mean):
            break
    return table


def _day_values(rate: Tensor, margin: Tensor, value: Tensor) -> Tensor:
    """(M, L, A): profit of one day at each price plus the value (M, L) of what is left in the evening."""
    if value.shape[1] == 1:
        return (margin * rate + value)[:, None]
    levels = torch.arange(value.shape[1], device=rate.device)
    density, tail = _demand(rate, value.shape[1])
    sold = pad(tail.cumsum(-1), (1, 0))  # E min(D, I) = sum over j <= I of P(D >= j)
    left = levels[None] - levels[:-1, None]
    shifted = torch.where(left > 0, value[:, left.clamp(min=0)], 0.0)  # (M, d, I): V(I - d) where d < I
    sold_out = pad(tail, (1, 0), value=1.0) * value[:, :1, None]
    return (margin[..., None] * sold + density @ shifted + sold_out).mT


def _demand(rate: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """P(D = 0), ..., P(D = S - 1) and P(D >= 1), ..., P(D >= S) for S = levels - 1, each (..., S)."""
    units = torch.arange(levels - 1, device=rate.device, dtype=rate.dtype)
    density = torch.exp(torch.xlogy(units, rate[..., None]) - rate[..., None] - torch.lgamma(units + 1))
    return density, (1 - density.cumsum(-1)).clamp(min=0)


def _occupancy(rate: Tensor, table: Tensor, levels: int) -> Tensor:
    """(T, M, L) probability of each level on the morning of each day, starting from a full shelf."""
    here = rate.new_zeros(rate.shape[1], levels)
    here[:, -1] = 1
    result, index = [here], torch.arange(levels, device=rate.device)
    left = index[:, None] - index  # (I, I'), units sold on the way from I to I'
    for day in range(len(rate) - 1):
        if levels > 1:
            density, tail = (part[:, table[day]] for part in _demand(rate[day], levels))  # (M, I, S)
            sold = left.clamp(0, levels - 2).expand(len(here), -1, -1)
            move = torch.where(left >= 0, density.gather(-1, sold), 0.0)
            move[..., 0] = pad(tail, (1, 0), value=1.0).diagonal(dim1=-2, dim2=-1)  # from I to 0: P(D >= I)
            here = (here[:, None] @ move)[:, 0]
        result.append(here)
    return torch.stack(result)
