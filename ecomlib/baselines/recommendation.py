"""Bayes for recommendation: what a particle makes of a slate and its click, and which slate is best for a belief
(chapter "Recommendation"). The recommenders that shops use are in ``recommenders.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families import sessions
from ..families.constants import constant
from ..families.recommendation import Seen, SlateRecommendation
from ..families.slates import best_slate
from ..rollout import Agent
from .bayes import Belief, Random, belief
from .recommenders import Blind, Content, ItemBased, LinUCB, MNLThompson, Popularity, logs

IMPROVEMENTS = 3
"""Rounds of ``best_on_average`` after the first slate."""


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
        chance = particles.leave[:, None] * torch.arange(1, sessions.FATIGUE + 1, device=context.device)
        tiny = torch.finfo(chance.dtype).tiny
        self.log_leave = chance.clamp(max=1).log().T  # (fatigue, P)
        self.log_stay = (1 - chance).clamp(min=tiny).log().T

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
        before, after = self.family.seen(before), self.family.seen(after)
        total = 1 + self._shown(action, self.level(before)[..., None]) @ self.by_place
        hit = (action == after.item[..., None]) & (after.item >= 0)[..., None]
        clicked = hit.any(-1)[..., None]
        place = hit.to(torch.int64).argmax(-1)
        item = after.item.clamp(min=0)
        log_odds = self.by_place[place * self.family.items + item].log()
        # The level of stage and fatigue is the same for all particles.
        left = torch.where(after.left[..., None], self.log_leave[before.fatigue], self.log_stay[before.fatigue])
        return torch.where(before.left[..., None], 0.0, torch.where(clicked, log_odds, left) - total.log())

    def best_for(self, particle: Tensor, observation: Tensor) -> Tensor:
        """The slate of ``particle``'s own plan (M, N, k)."""
        seen = self.family.seen(observation)
        return self.plan.slate[particle, seen.time, seen.stage * sessions.FATIGUE + seen.fatigue]

    def best_on_average(self, observation: Tensor) -> Tensor:
        """The slate (M, N, k) of highest posterior mean gain that a few rounds find.

        Each particle plans as if it were known to be true from the next slate on. The mean of their gains is a sum of
        ratios; with every ratio's denominator and value held at the last slate it is a sum over items, whose largest
        terms are the next slate. Of the slates met, the best is shown. It need not be the best of all
        (``tests/test_recommendation_baselines.py`` bounds what is lost).
        """
        seen = self.family.seen(observation)
        time, level = seen.time[0, 0], self.level(seen)[..., None]
        worth = sessions.outcomes(self.family, self.particles, self.plan.value[:, time + 1])
        state = seen.stage * sessions.FATIGUE + seen.fatigue
        base = worth.base.T[seen.stage] - worth.no_click.T[state]  # (M, N, P)
        slope, bought = worth.slope.T[seen.stage], worth.bought[seen.stage][..., None]
        margin, pull = (constant(x, level) for x in (self.family.table.margin, self.family.table.pull))
        weight = self.weight.expand(*seen.time.shape, -1)

        def largest(share: Tensor, gain: Tensor | float) -> Tensor:
            score = (share * (base - gain)) @ self.odds + pull * ((share * slope) @ self.odds)
            return (score + bought * margin * (share @ self.odds)).topk(self.family.slate, -1).indices

        slate = best = largest(weight, 0.0)
        highest = torch.full_like(level, -torch.inf)
        for round_ in range(IMPROVEMENTS + 1):
            clicks = self._shown(slate, level) @ self.by_place
            worths = self._shown(slate, level * (bought * margin[slate])) @ self.by_place
            worths = worths + slope * (self._shown(slate, level * pull[slate]) @ self.by_place) + base * clicks
            gain = worths / (1 + clicks)
            mean = (weight * gain).sum(-1, keepdim=True)
            best = torch.where(mean > highest, slate, best)
            highest = torch.maximum(mean, highest)
            if round_ < IMPROVEMENTS:
                slate = largest(weight / (1 + clicks), gain)
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
