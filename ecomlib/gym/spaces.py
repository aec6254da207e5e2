"""Gymnasium spaces of a family, and actions from a space's form into the family's."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from torch import Tensor

from ..families import LogitPricing
from ..families.base import TaskFamily
from ..families.bidding import SegmentBidding


def observation_space(family: TaskFamily) -> Box:
    """Box (observation_size,) float32, without bounds: no family bounds what may be sold, spent or clicked."""
    return Box(-np.inf, np.inf, (family.observation_size,), np.float32)


def action_space(family: TaskFamily) -> Space:
    """What may be sent to ``step``.

    ===================  =====================================================================================
    Family's actions     Space
    ===================  =====================================================================================
    numbered             Discrete(actions)
    slates               MultiDiscrete([items] * slate); a repeated item is replaced (``distinct``)
    real numbers         Box (action_size,) float32: [-1, 1], or bids' [-limit, limit]
    ===================  =====================================================================================

    Learners try real actions around 0, about 1 apart. That suits displacements and logarithms of bid multipliers, which
    keep their units; a markup does not, so [-1, 1] is stretched to the range of ``markups``.
    """
    if getattr(family, "slate", 0):
        return MultiDiscrete([family.items] * family.slate)
    if family.actions:
        return Discrete(family.actions)
    limit = family.limit if isinstance(family, SegmentBidding) else 1.0
    return Box(-limit, limit, (getattr(family, "action_size", 1),), np.float32)


def family_actions(family: TaskFamily, space: Space, actions: np.ndarray) -> Tensor:
    """(R, 1, ...) for ``step`` of the family, from R actions of ``space`` (R, ...).

    Raises ``ValueError`` if the shape, the type or a value is none of the space's.
    """
    actions = np.asarray(actions)
    if actions.shape[1:] != space.shape:
        raise ValueError(f"an action has shape {actions.shape[1:]}; expected {space.shape}, one of {space}")
    if isinstance(space, Box):
        outside = ~((actions >= space.low) & (actions <= space.high))  # also of NaN
    elif np.issubdtype(actions.dtype, np.integer):
        outside = (actions < 0) | (actions >= (space.n if isinstance(space, Discrete) else space.nvec))
    else:
        raise ValueError(f"an action has type {actions.dtype}; expected whole numbers, one of {space}")
    if outside.any():
        raise ValueError(f"action {actions[outside][0]} is out of range; expected one of {space}")
    if not isinstance(space, Box):
        actions = distinct(actions, family.items) if isinstance(space, MultiDiscrete) else actions
        return torch.as_tensor(actions, dtype=torch.int64)[:, None]
    real = torch.as_tensor(actions, dtype=torch.get_default_dtype())[:, None]
    if isinstance(family, LogitPricing):
        low, high = family.markups[0], family.markups[-1]
        return (low + high) / 2 + (high - low) / 2 * real[..., 0]
    return real


def distinct(slates: np.ndarray, items: int) -> np.ndarray:
    """The slates (R, slate) without repeats: an item that stands further up already gives way to the next item in
    catalogue order, item 0 after the last, that is nowhere on the slate.

    A learner whose positions choose independently, as of a MultiDiscrete space, repeats items until it has learnt not
    to; refusing those slates would leave it nothing to learn from.
    """
    slates, held = slates.copy(), np.zeros((len(slates), items), dtype=bool)
    np.put_along_axis(held, slates, True, 1)
    for position in range(1, slates.shape[1]):
        row = np.flatnonzero((slates[:, :position] == slates[:, position : position + 1]).any(1))
        after = (slates[row, position, None] + 1 + np.arange(items)) % items
        first = np.argmin(np.take_along_axis(held[row], after, 1), 1)
        slates[row, position] = after[np.arange(len(row)), first]
        held[row, slates[row, position]] = True
    return slates
