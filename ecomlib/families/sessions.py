"""Planning of a session: backward dynamic programming over time and the 12 states of a shopper, with the best slate in
each (chapter "Recommendation").

Shapes: M segments, T slates of a session, S = 12 states (stage * 4 + fatigue), I items, k places. After a shopper has
left nothing more is earned.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .constants import constant
from .slates import best_slate, expected_gain, improved

if TYPE_CHECKING:
    from .recommendation import Segments, SlateRecommendation

STAGES, FATIGUE = 3, 4
"""Stages of intent (browse, consider, ready) and levels of fatigue."""
STATES = STAGES * FATIGUE

BLIND_SAMPLE, SWEEPS, CHANGES = 256, 4, (12, 4)
"""Segments that the blind table is found for, sweeps through the session, and changes of every slate in the first sweep
and in the others. ``tests/test_recommendation.py``: a further sweep gains nothing to speak of."""


class Plan(NamedTuple):
    """What sessions are worth."""

    value: Tensor  # (M, T + 1, S), expected reward to come
    slate: Tensor  # (M, T, S, k) int64


class Outcomes(NamedTuple):
    """What the outcomes of a slate are worth when the states after it are worth something (``outcomes``).

    A click on item i at stage z is worth ``base[z] + bought[z] * margin[i] + slope[z] * pull[i]``.
    """

    no_click: Tensor  # (M, S)
    base: Tensor  # (M, stage)
    bought: Tensor  # (stage,), probability that a click ends in a purchase
    slope: Tensor  # (M, stage)


def outcomes(family: SlateRecommendation, tasks: Segments, value: Tensor) -> Outcomes:
    """Worth of no click and of a click, when the states after the slate are worth ``value`` (M, S)."""
    later = value.unflatten(-1, (STAGES, FATIGUE))
    tired = torch.cat((later[..., 1:], later[..., -1:]), -1)
    fresh = later[..., 0]  # (M, stage), after a click without an order
    keener = torch.cat((fresh[:, 1:], fresh[:, -1:]), -1) - fresh
    bought = constant(family.cart, value) * constant(family.order, value)
    base = bought * fresh[:, :1] + (1 - bought) * fresh
    return Outcomes(stays(tasks) * tired.flatten(1), base, bought, (1 - bought) * keener)


def gains(family: SlateRecommendation, tasks: Segments, value: Tensor) -> tuple[Tensor, Tensor]:
    """Worth of no click (M, S), and how much more a click on each item is worth (M, S, I); as ``outcomes``."""
    worth = outcomes(family, tasks, value)
    margin, pull = constant(family.table.margin, value), constant(family.table.pull, value)
    click = worth.base[..., None] + worth.bought[:, None] * margin + worth.slope[..., None] * pull  # (M, stage, I)
    return worth.no_click, click.repeat_interleave(FATIGUE, 1) - worth.no_click[..., None]


def stays(tasks: Segments) -> Tensor:
    """(M, S) probability of staying after a slate without a click."""
    fatigue = torch.arange(FATIGUE, device=tasks.leave.device).repeat(STAGES)
    return 1 - (tasks.leave[:, None] * (1 + fatigue)).clamp(max=1)


def weights(family: SlateRecommendation, tasks: Segments) -> Tensor:
    """(M, S, I) odds of a click on each item at a place of attention 1, against no click, in each state."""
    fatigue = torch.arange(FATIGUE, device=tasks.leave.device)
    level = constant(family.click, tasks.taste)[:, None] - family.tiredness * fatigue
    return torch.exp(family.log_weight(tasks)[:, None] + level.flatten()[:, None])


def plan(family: SlateRecommendation, tasks: Segments, table: Tensor | None = None) -> Plan:
    """Values and slates when each segment is known, equation (eq-session); or the values of showing ``table`` (T, S, k)
    to all."""
    weight, attention = weights(family, tasks), family.attention(tasks)[:, None]
    value = weight.new_zeros(len(weight), STATES)
    values, slates = [value], []
    for time in reversed(range(family.slates)):
        no_click, click = gains(family, tasks, value)
        if table is None:
            slate, gain = best_slate(weight, click, attention)
        else:
            slate = table[time].to(weight.device).expand(len(weight), -1, -1)
            gain = expected_gain(slate, weight, click, attention)
        value = no_click + gain
        values.append(value)
        slates.append(slate)
    return Plan(torch.stack(values[::-1], 1), torch.stack(slates[::-1], 1))


def occupancy(family: SlateRecommendation, tasks: Segments, table: Tensor) -> Tensor:
    """(T, M, S) probability of showing the slate of each time in each state, for a shopper who is shown ``table``."""
    weight, attention = weights(family, tasks), family.attention(tasks)[:, None]
    bought = (constant(family.cart, weight) * constant(family.order, weight))[:, None]
    pull, stay = constant(family.table.pull, weight), stays(tasks)
    here = torch.zeros_like(stay)
    here[:, 0] = 1
    result = [here]
    for slate in table[:-1]:
        shown = attention * weight.gather(-1, slate.expand(len(weight), -1, -1))
        total = 1 + shown.sum(-1)
        clicked = (here[..., None] * shown / total[..., None]).unflatten(1, (STAGES, FATIGUE))  # by place
        keener = (clicked * pull[slate].unflatten(0, (STAGES, FATIGUE))).sum((-2, -1))  # (M, stage)
        clicked = clicked.sum((-2, -1))
        missed = (here / total * stay).unflatten(1, (STAGES, FATIGUE))
        after = torch.cat((torch.zeros_like(missed[..., :1]), missed[..., :-1]), -1)
        after[..., -1] += missed[..., -1]
        rise = keener * (1 - bought[:, 0])
        rise = torch.cat((rise[:, :-1], torch.zeros_like(rise[:, -1:])), 1)  # nobody is keener than ready
        after[..., 0] += clicked * (1 - bought[:, 0]) - rise
        after[:, 1:, 0] += rise[:, :-1]
        after[:, 0, 0] += (clicked * bought[:, 0]).sum(-1)
        here = after.flatten(1)
        result.append(here)
    return torch.stack(result)


def best_table(
    family: SlateRecommendation, tasks: Segments, share: Tensor | None = None, sweeps: int = SWEEPS
) -> Tensor:
    """(T, S, k) int64: the slates with the best mean return over the segments, when all must share one table.

    ``share`` (M,) weighs the segments; None is equally. A sweep goes backwards through the session and improves every
    slate for the segments that reach it, each weighted by its probability of being there (``slates.improved``); no
    sweep lowers the mean. It starts from the slates that are best for the segments' mean choice.
    """
    weight, attention = weights(family, tasks), family.attention(tasks)
    share = torch.full_like(tasks.leave, 1 / len(tasks.leave)) if share is None else share
    known = plan(family, tasks)
    table = []
    for time in range(family.slates):
        _, click = gains(family, tasks, known.value[:, time + 1])
        mean = torch.einsum("m,msi->si", share, weight)
        worth = torch.einsum("m,msi->si", share, weight * click) / mean
        table.append(best_slate(mean, worth, (share[:, None] * attention).sum(0).expand(STATES, -1))[0])
    table = torch.stack(table)
    for sweep in range(sweeps):
        reach = occupancy(family, tasks, table)
        value = torch.zeros_like(weight[..., 0])
        for time in reversed(range(family.slates)):
            no_click, click = gains(family, tasks, value)
            by_state = weight.transpose(0, 1), click.transpose(0, 1)
            slate, _ = improved(table[time], (reach[time] * share[:, None]).T, *by_state, attention, CHANGES[sweep > 0])
            table[time] = slate
            slate = slate.expand(len(weight), -1, -1)
            value = no_click + expected_gain(slate, weight, click, attention[:, None])
    return table


@lru_cache(maxsize=16)
def blind_table(family: SlateRecommendation) -> Tensor:
    """The table behind ``blind_return``, for ``BLIND_SAMPLE`` quasi-random segments of the prior."""
    return best_table(family, family.prior_sample(BLIND_SAMPLE))
