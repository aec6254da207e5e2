"""Credit where it is due: an inner surrogate for campaigns, which rewards the bids of a segment with what that segment
earned, and counts money at what the budget makes it worth (chapter "Advertising")."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families.bidding import SegmentBidding
from ..policies import Policy
from ..rollout import Trajectories
from ..surrogates import Surrogate


def segment_credit(family: SegmentBidding, floor: float = 1.0) -> Surrogate:
    """The surrogate of equation (eq-segment-credit), in place of an advantage (the argument is not used).

    The reward of a tick judges all K bids at once, and a bid also by the money that later ticks will lack. Both make
    its gradient noise at a few days of data. What the advertiser sees says more. Of segment k in tick t: value x new
    conversions less lambda x money spent, less the same segment's mean over all ticks and episodes (times the tick's
    share of requests), divided by lambda x that mean spend plus ``floor`` times its mean over segments. So a step is
    about a relative change of bids, whatever the size of the campaign. lambda, what a unit of the budget is worth, is
    estimated from the same episodes as the ratio at which a common change of all bids gains nothing, kept within 0.3
    and 1 of value per money. The last tick, after which nothing is seen, does not count.

    For Gaussian policies with one action for each segment. Conversions that are reported late (``family.delay``) are
    credited to the tick of the report.
    """
    if not isinstance(family, SegmentBidding):
        raise ValueError(f"segment_credit needs SegmentBidding; got {type(family).__name__}")

    def surrogate(policy: Policy, parameters: list[Tensor], data: Trajectories, advantage: Tensor) -> Tensor:
        mean, log_std = policy.distribution(parameters, data.observation, data.action)
        credit = segment_credits(family, data, data.action - mean.detach(), floor)
        log_prob = -0.5 * ((data.action - mean) / log_std.exp()).square() - log_std
        return ((log_prob - log_prob.detach()).exp() * credit).sum((0, -1)).mean(-1)

    return surrogate


def segment_credits(family: SegmentBidding, data: Trajectories, deviation: Tensor, floor: float) -> Tensor:
    """(T, M, N, K) credits of ``segment_credit`` for actions that differ from the policy's mean by ``deviation``."""
    seen = family.seen(data.observation)
    worth = seen.value[:-1, ..., None] * seen.conversions.diff(dim=0)
    spend = seen.spend.diff(dim=0)
    share = family.offered(seen.tick[:-1])[..., None]
    share = share / share.mean(0)

    def centred(x: Tensor) -> Tensor:
        return x - share * x.mean((0, 2), keepdim=True)

    def along_common(x: Tensor) -> Tensor:
        return (centred(x) * deviation[:-1]).sum((0, 2, 3), keepdim=True)

    total = spend.sum((0, 2, 3), keepdim=True).clamp(min=torch.finfo(spend.dtype).tiny)
    per_money = worth.sum((0, 2, 3), keepdim=True) / total
    slope = along_common(worth) / along_common(spend).clamp(min=1e-3 * total)
    price = torch.minimum(torch.maximum(slope, 0.3 * per_money), per_money)
    paid = price * spend.mean((0, 2), keepdim=True)
    unit = paid + floor * paid.mean(-1, keepdim=True)
    credit = centred(worth - price * spend) / unit.clamp(min=torch.finfo(unit.dtype).tiny) / len(worth)
    return torch.cat((credit, torch.zeros_like(credit[:1])))
