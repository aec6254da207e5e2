"""Slates of items under multinomial-logit choice: the best one for a known shopper, exactly; the best one for several
kinds of shopper at once, by local search (chapter "Recommendation").

Shapes: I items, k places of a slate, P shoppers of a mixture; ``...`` is any batch. A shopper who sees slate S clicks
the item at place j with probability eta_j w_i / (1 + sum), the sum being of eta_j w_i over the slate, and nothing
otherwise. A click on item i is worth ``value`` more than no click. ``attention`` is eta, positive and not increasing.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
"""Dinkelbach rounds. Each but the last raises the gain, and few are needed: ``tests/test_recommendation.py`` checks on
100,000 slates that a further round changes nothing."""


def expected_gain(slate: Tensor, weight: Tensor, value: Tensor, attention: Tensor) -> Tensor:
    """(...) expected worth of showing ``slate`` (..., k), less that of no click: equation (eq-slate-gain).

    ``weight`` and ``value`` are (..., I), ``attention`` (..., k). An empty place is -1.
    """
    shown = attention * (weight.gather(-1, slate.clamp(min=0)) * (slate >= 0))
    return (shown * value.gather(-1, slate.clamp(min=0))).sum(-1) / (1 + shown.sum(-1))


def best_slate(weight: Tensor, value: Tensor, attention: Tensor, full: bool = True) -> tuple[Tensor, Tensor]:
    """The slate (..., k) of highest ``expected_gain``, exactly, and that gain (...).

    Dinkelbach's method: with g the best gain so far, the numerator less g times the denominator is a sum over places
    of eta_j w_i (v_i - g), and is largest when the k items of highest w_i (v_i - g) stand in that order (rearrangement
    inequality). The gain of that slate is the next g; the g that reproduces itself is the optimum. Rusmevichientong,
    Shen and Shmoys (2010) treat the case of equal attention. With ``full``, every place is filled; without it, an item
    that would lower the gain leaves its place empty (-1), which are the last places.
    """
    places = attention.shape[-1]
    gain = weight.new_zeros(()).expand(weight.shape[:-1])
    for _ in range(ROUNDS):
        score, slate = (weight * (value - gain[..., None])).topk(places, -1)
        if not full:
            slate = torch.where(score > 0, slate, -1)
        gain = expected_gain(slate, weight, value, attention)
    return slate, gain


def improved(
    slate: Tensor, share: Tensor, weight: Tensor, value: Tensor, attention: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Slates (B, k) for mixtures of shoppers, better than the given ones, and their mean gains (B,).

    ``share`` (B, P) weighs the shoppers, who have ``weight`` and ``value`` (B, P, I) and ``attention`` (P, k). A round
    makes the one change that raises the mean gain most: another item in a place, or two places exchanged. The best
    slate for a mixture of logit shoppers is NP-hard to find; where no round changes anything, this is a local optimum.
    """
    places = slate.shape[-1]
    first, second = torch.triu_indices(places, places, 1, device=slate.device)
    swaps = torch.arange(places, device=slate.device).repeat(len(first), 1)
    swaps = swaps.scatter(1, first[:, None], second[:, None]).scatter(1, second[:, None], first[:, None])
    swaps = torch.cat((torch.arange(places, device=slate.device)[None], swaps))  # the slate itself first
    for _ in range(rounds):
        index = slate[:, None].expand(-1, weight.shape[1], -1)
        own, worth = weight.gather(-1, index), (weight * value).gather(-1, index)  # (B, P, k)
        # Another item in place j: the sums without that place, then with the item.
        shown = attention * own
        total = 1 + shown.sum(-1, keepdim=True) - shown
        earned = (attention * worth).sum(-1, keepdim=True) - attention * worth
        change = attention[..., None] * weight[..., None, :]  # (B, P, k, I)
        gain = (earned[..., None] + change * value[..., None, :]) / (total[..., None] + change)
        gain = torch.einsum("bp,bpki->bki", share, gain).scatter(-1, slate[:, None].expand(-1, places, -1), -torch.inf)
        replaced, which = gain.flatten(1).max(-1)
        # Two places exchanged, or none.
        numerator = torch.einsum("pk,bpsk->bps", attention, worth[..., swaps])
        denominator = 1 + torch.einsum("pk,bpsk->bps", attention, own[..., swaps])
        gain = torch.einsum("bp,bps->bs", share, numerator / denominator)
        exchanged, order = gain.max(-1)
        now = gain[:, 0]
        # A slate changes only for a real gain: rounding must not send it back and forth.
        margin = 1e-9 * now.abs()
        place, item = which // weight.shape[-1], which % weight.shape[-1]
        other = slate.scatter(1, place[:, None], item[:, None])
        turned = slate.gather(1, swaps[order])
        better, by_exchange = torch.maximum(replaced, exchanged) > now + margin, exchanged > replaced
        slate = torch.where(better[:, None], torch.where(by_exchange[:, None], turned, other), slate)
    return slate, torch.maximum(now, torch.where(better, torch.maximum(replaced, exchanged), now))
