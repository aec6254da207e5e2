"""Bayes for recommendation: what a particle makes of a slate and its click, and which slate is best for a belief
(chapter "Recommendation"). The recommenders that shops use are in ``recommenders.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..families import sessions
from ..families.constants import constant
from ..families.recommendation import Seen, SlateRecommendation
from ..families.slates import best_slate
from ..rollout import Agent
from .bayes import Belief, Random, belief
from .recommenders import Blind, Content, ItemBased, LinUCB, MNLThompson, Popularity, logs

IMPROVEMENTS, REPRESENTATIVES = 3, 64
"""Of ``best_on_average``: rounds after the first slate, and particles that stand for the posterior."""


class RecommendationBelief(Belief):
    """Posterior over a segment's taste, position bias and leaving.

    The likelihood of a slate is the logit probability of its click, or of none, equation (eq-click); after a slate
    without a click also that of leaving or staying. Carts and purchases tell nothing more: given the click, their
    chances are the same for all segments.
    """

    default_particles = 512

    def prepare(self, context: Tensor) -> None:
        """Odds of a click for every particle, item and place, and every particle's own plan of a session."""
        family, particles = self.family, self.particles
        self.odds = family.log_weight(particles).exp()  # (P, I), at attention 1 and log-odds 0 of the stage
        attention = family.attention(particles)  # (P, k)
        by_place = attention.T[:, None] * self.odds.T  # (k, I, P)
        self.by_place = by_place.flatten(0, 1)  # a row for every item in every place
        self.plan = sessions.plan(family, particles)
        # Every 8th point of a Sobol sequence lies in the same eighth of every dimension.
        self.shuffled = torch.randperm(self.size, generator=Generator().manual_seed(0)).to(context.device)
        chance = particles.leave[:, None] * torch.arange(1, sessions.FATIGUE + 1, device=context.device)
        # Where all leave, a stay is next to impossible; its finite logarithm keeps 0 times it at 0.
        self.log_leave = chance.clamp(max=1).log().T  # (fatigue, P)
        self.log_stay = (1 - chance).clamp(min=torch.finfo(chance.dtype).tiny).log().T

    def level(self, seen: Seen) -> Tensor:
        """(M, N) odds of a click due to stage and fatigue."""
        return torch.exp(constant(self.family.click, self.odds)[seen.stage] - self.family.tiredness * seen.fatigue)

    def _shown(self, slate: Tensor, value: Tensor) -> Tensor:
        """(M, N, k * I): ``value`` (M, N, k) where an item is in a place, 0 elsewhere; rows that ``by_place`` takes."""
        items, places = self.family.items, self.family.slate
        index = slate + items * torch.arange(places, device=slate.device)
        empty = torch.zeros(*slate.shape[:-1], places * items, dtype=value.dtype, device=slate.device)
        return empty.scatter(-1, index, value.expand(slate.shape))

    def log_likelihood(self, before: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> Tensor:
        """As ``Belief.log_likelihood``; nothing is learned after the shopper left."""
        return self._evidence(before, action, after, lambda x: x)

    def update(self, before: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> None:
        """As ``Belief.update``; shoppers are summed before particles are looked at, where that is the same."""
        pooled = (lambda x: x.sum(1, keepdim=True)) if self.stores else (lambda x: x)
        self.log_weight = self.log_weight + self._evidence(before, action, after, pooled)

    def _evidence(self, before: Tensor, action: Tensor, after: Tensor, pooled: Callable[[Tensor], Tensor]) -> Tensor:
        before, after = self.family.seen(before), self.family.seen(after)
        here = (~before.left).to(self.odds.dtype)
        level = self.level(before) * here  # an absent shopper clicks nothing, for sure
        nothing = torch.log1p(self._shown(action, level[..., None]) @ self.by_place)
        hit = (action == after.item[..., None]) * (here * (after.item >= 0))[..., None]
        missed = torch.nn.functional.one_hot(before.fatigue, sessions.FATIGUE) * (here * (after.item < 0))[..., None]
        left = missed * after.left[..., None]
        # The level of stage and fatigue is the same for all particles.
        evidence = pooled(self._shown(action, hit)) @ self.by_place.log() - pooled(nothing)
        return evidence + pooled(left) @ self.log_leave + pooled(missed - left) @ self.log_stay

    def best_for(self, particle: Tensor, observation: Tensor) -> Tensor:
        """The slate of ``particle``'s own plan (M, N, k)."""
        seen = self.family.seen(observation)
        return self.plan.slate[particle, seen.time, seen.stage * sessions.FATIGUE + seen.fatigue]

    def representatives(self) -> tuple[Tensor, Tensor]:
        """Particles (M, N or 1, K) that stand for the posterior, and their weights: all if there are few, else a
        systematic sample, each as probable as the others."""
        weight = self.weight
        if self.size <= REPRESENTATIVES:
            return torch.arange(self.size, device=weight.device).expand(weight.shape), weight
        grid = (torch.arange(REPRESENTATIVES, device=weight.device, dtype=weight.dtype) + 0.5) / REPRESENTATIVES
        cumulative = weight[..., self.shuffled].cumsum(-1)
        index = torch.searchsorted(cumulative, grid.expand(*weight.shape[:-1], -1).contiguous())
        index = self.shuffled[index.clamp(max=self.size - 1)]
        return index, torch.full_like(index, 1, dtype=weight.dtype) / REPRESENTATIVES

    def best_on_average(self, observation: Tensor) -> Tensor:
        """The slate (M, N, k) of highest posterior mean gain that a few rounds find, for ``representatives``.

        Each particle plans as if it were known to be true from the next slate on. The mean of their gains is a sum of
        ratios; with every ratio's denominator and value held at the last slate it is a sum over items, whose largest
        terms are the next slate. Of the slates met, the best is shown. It need not be the best of all
        (``tests/test_recommendation_baselines.py`` bounds what is lost).
        """
        seen = self.family.seen(observation)
        shape, places = seen.time.shape, self.family.slate
        level = self.level(seen)[..., None]
        worth = sessions.outcomes(self.family, self.particles, self.plan.value[:, seen.time[0, 0] + 1])
        index, weight = self.representatives()
        odds, attention = self.odds[index], self.family.attention(self.particles)[index]  # (M, N or 1, K, I), (..., k)
        of_state = lambda x, state: (
            x[index]
            .expand(*shape, -1, -1)
            .gather(-1, state[..., None, None].expand(*shape, index.shape[-1], 1))[..., 0]
        )
        state = seen.stage * sessions.FATIGUE + seen.fatigue
        base = of_state(worth.base, seen.stage) - of_state(worth.no_click, state)  # (M, N, K)
        slope, bought = of_state(worth.slope, seen.stage), worth.bought[seen.stage][..., None]
        margin, pull = (constant(x, level) for x in (self.family.table.margin, self.family.table.pull))
        weight = weight.expand(*shape, -1)

        def summed(share: Tensor) -> Tensor:
            """(M, N, I) sum over particles of their share times their odds."""
            return share @ odds[:, 0] if odds.shape[1] == 1 else (share[..., None, :] @ odds)[..., 0, :]

        def largest(share: Tensor, gain: Tensor | float) -> Tensor:
            score = summed(share * (base - gain)) + pull * summed(share * slope)
            return (score + bought * margin * summed(share)).topk(places, -1).indices

        slate = best = largest(weight, 0.0)
        highest = torch.full_like(level, -torch.inf)
        for round_ in range(IMPROVEMENTS + 1):
            shown = slate[..., None, :].expand(*shape, index.shape[-1], -1)
            shown = odds.expand(*shape, -1, -1).gather(-1, shown) * attention * level[..., None]  # (M, N, K, k)
            total, extra = 1 + shown.sum(-1), (bought * margin[slate])[..., None, :]
            worths = (shown * (extra + slope[..., None] * pull[slate][..., None, :] + base[..., None])).sum(-1)
            gain = worths / total
            mean = (weight * gain).sum(-1, keepdim=True)
            best = torch.where(mean > highest, slate, best)
            highest = torch.maximum(mean, highest)
            if round_ < IMPROVEMENTS:
                slate = largest(weight / total, gain)
        return best

    def optimistic(self, observation: Tensor, width: float) -> Tensor:
        """The best slate if every item's odds were their posterior mean plus ``width`` standard deviations: the idea of
        Agrawal et al. (2019), with a posterior in place of confidence bounds."""
        seen = self.family.seen(observation)
        weight = self.weight
        mean = weight @ self.odds
        deviation = (weight @ self.odds**2 - mean**2).clamp(min=0).sqrt()
        worth = sessions.outcomes(self.family, self.particles, self.plan.value[:, seen.time[0, 0] + 1])
        state = seen.stage * sessions.FATIGUE + seen.fatigue
        average = lambda x, index: (weight @ x).expand(*index.shape, -1).gather(-1, index[..., None])
        base = average(worth.base, seen.stage) - average(worth.no_click, state)
        margin, pull = (constant(x, mean) for x in (self.family.table.margin, self.family.table.pull))
        value = base + worth.bought[seen.stage][..., None] * margin + average(worth.slope, seen.stage) * pull
        attention = (weight @ self.family.attention(self.particles)).expand(*state.shape, -1)
        return best_slate((mean + width * deviation) * self.level(seen)[..., None], value, attention)[0]


belief.register(SlateRecommendation, RecommendationBelief)


def agents(family: SlateRecommendation, stores: bool) -> dict[str, Agent]:
    """The domain's own baselines, by the names that the book shows. What they know of shoppers in general comes from
    logs of training segments (``recommenders.logs``)."""
    past = logs(family)
    return {
        "random": Random(family),
        "popularity": Popularity(family, past),
        "item-based CF": ItemBased(family, past, stores),
        "content": Content(family, past, stores),
        "LinUCB": LinUCB(family, past, stores),
        "MNL-Thompson": MNLThompson(family, stores),
        "blind": Blind(family),
    }
