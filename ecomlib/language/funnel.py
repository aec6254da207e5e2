"""Click, cart and purchase from one model: heads, their losses, and scores against exact probabilities (chapter "More
than text").

Events are numbers in ``behaviour.EVENTS``; targets are ``sessions.TARGETS``: an event of at least this kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, logsigmoid

from ..families.base import require
from .sessions import REACHED, TARGETS


class Head(NamedTuple):
    """What a model's last numbers mean."""

    size: int
    """Numbers that the head needs."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Maps numbers (n, size) and events (n,) to losses (n,)."""
    reached: Callable[[Tensor], Tensor]
    """Maps numbers (n, size) to probabilities (n, targets) that each target is reached."""
    events: Callable[[Tensor], Tensor] | None
    """Maps numbers (n, size) to log-probabilities (n, 5) of the events; None where the head knows none."""


def reached(event: Tensor) -> Tensor:
    """(n, 3) float, 1 where an event (n,) is at least a click, a cart, a purchase."""
    return (event[:, None] >= torch.tensor(REACHED, device=event.device)).to(torch.get_default_dtype())


def funnel_log_probabilities(logits: Tensor) -> Tensor:
    """(n, 5) log-probabilities of the events from log-odds (n, 4): equation (eq-funnel).

    The columns are the log-odds of a click; of the cart after a click; of a purchase after the cart; and of reading on
    after a click that does not end in the cart. The five probabilities sum to 1 whatever the log-odds are.
    """
    click, cart, purchase, browse = logsigmoid(logits).unbind(-1)
    no_click, no_cart, no_purchase, no_browse = logsigmoid(-logits).unbind(-1)
    return torch.stack(
        (no_click, click + no_cart + no_browse, click + no_cart + browse, click + cart + no_purchase,
         click + cart + purchase), -1
    )  # fmt: skip


def _reached_from_events(log_probability: Tensor) -> Tensor:
    return torch.stack([log_probability[:, first:].logsumexp(-1).exp() for first in REACHED], -1)


def _picked(log_probability: Tensor, event: Tensor) -> Tensor:
    return -log_probability.gather(1, event[:, None])[:, 0]


def _log_chain(logits: Tensor) -> Tensor:
    return logsigmoid(logits[:, :3]).cumsum(-1)


def entire_space_loss(logits: Tensor, event: Tensor) -> Tensor:
    """(n,) sum over the targets of a binary cross-entropy on *all* rows, with the probability of a target the product
    of the conditional ones before it: equation (eq-entire-space), after Ma et al. (2018). ``logits`` is (n, 3)."""
    target, log_q = reached(event).to(logits.dtype), _log_chain(logits)
    return -(target * log_q + (1 - target) * _log1mexp(log_q)).sum(-1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation at either end."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    small = x > -0.6931
    near, far = torch.where(small, x, -1.0), torch.where(small, -1.0, x)  # else the branch not taken has gradient nan
    return torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def nested(targets: tuple[int, ...]) -> Head:
    """Targets, by number, each with a log-odds of its own on all rows: nothing keeps a purchase rarer than a click."""
    columns = list(targets)

    def loss(logits: Tensor, event: Tensor) -> Tensor:
        target = reached(event)[:, columns].to(logits.dtype)
        return binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)

    return Head(len(columns), loss, torch.sigmoid, None)


HEADS = {
    "funnel": Head(
        4,
        lambda z, event: _picked(funnel_log_probabilities(z), event),
        lambda z: _log_chain(z).exp(),
        funnel_log_probabilities,
    ),
    "softmax": Head(
        5,
        lambda z, event: _picked(log_softmax(z, -1), event),
        lambda z: _reached_from_events(log_softmax(z, -1)),
        lambda z: log_softmax(z, -1),
    ),
    "entire space": Head(3, entire_space_loss, lambda z: _log_chain(z).exp(), None),
    "nested": nested((0, 1, 2)),
    **{name: nested((number,)) for number, name in enumerate(TARGETS)},
}
"""Heads by name; "click", "cart" and "purchase" have one target only."""


# ------------------------------------------------------------------------------- scores against exact probabilities
def targets_of(probability: ArrayLike) -> NDArray[np.float64]:
    """(n, 3) probabilities that the targets are reached, from those of the events (n, 5)."""
    probability = np.asarray(probability, np.float64)
    return np.stack([probability[:, first:].sum(1) for first in REACHED], 1)


def excess(exact: ArrayLike, predicted: ArrayLike) -> float:
    """Mean Kullback-Leibler divergence of ``predicted`` from ``exact``, both (n, outcomes), in nats: by how much the
    expected log-loss exceeds that of the exact probabilities, equation (eq-excess). No label enters, so no luck does.

    Columns may also be (n,) probabilities of one outcome of two. Raises ValueError where shapes differ or a predicted
    probability is not in (0, 1].
    """
    p, q = np.asarray(exact, np.float64), np.asarray(predicted, np.float64)
    require(p.shape == q.shape, "predicted", q.shape, f"the shape of exact, {p.shape}")
    if p.ndim == 1:
        p, q = np.stack((1 - p, p), 1), np.stack((1 - q, q), 1)
    require(bool(((q > 0) & (q <= 1)).all()), "predicted", (q.min(), q.max()), "probabilities > 0 and <= 1")
    return float((p * (np.log(np.where(p > 0, p, 1)) - np.log(q))).sum(1).mean())


def exact_score(exact: ArrayLike, predicted: ArrayLike, base: ArrayLike) -> float:
    """1 minus excess over that of ``base``, the event shares of the training log (outcomes,) or one share: 0 is a model
    that says the same of everything, 1 the generator itself, which nothing exceeds."""
    exact = np.asarray(exact, np.float64)
    return 1 - excess(exact, predicted) / excess(exact, np.broadcast_to(base, exact.shape))


def calibration(exact: ArrayLike, predicted: ArrayLike, bins: int = 10) -> tuple[NDArray, NDArray]:
    """(bins,) mean predicted and mean exact probability in groups of equal size by predicted probability (n,)."""
    exact, predicted = np.asarray(exact, np.float64), np.asarray(predicted, np.float64)
    groups = np.array_split(np.argsort(predicted, kind="stable"), bins)
    return tuple(np.array([values[group].mean() for group in groups]) for values in (predicted, exact))
