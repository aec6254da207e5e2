"""Recommenders as shops use them: popularity, item-based collaborative filtering, similar items, LinUCB, and Thompson
sampling for logit choice (chapter "Recommendation").

What they know of shoppers in general is in the logs of earlier segments (``logs``), never in hidden parameters. A click
is worth more on an item with a higher margin: all of them multiply what they predict of clicks by the margin.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import noise as noise_
from ..families.base import check, number, require, split
from ..families.constants import constant
from ..families.recommendation import Seen, SlateRecommendation
from ..families.slates import best_slate

LOGGED_SEGMENTS, LOGGED_SESSIONS = 500, 20
"""Training segments, and sessions of each, in the logs."""


class Logs(NamedTuple):
    """Counts of earlier segments, who were shown slates at random."""

    shown: Tensor  # (M, I), how often an item was in a slate
    clicks: Tensor  # (M, I)


@lru_cache(maxsize=8)
def logs(family: SlateRecommendation, segments: int = LOGGED_SEGMENTS, sessions: int = LOGGED_SESSIONS) -> Logs:
    """Sessions of the first segments of the training list under random slates."""
    _, tasks = split(family, "train", segments)
    replica = torch.arange(sessions)
    shown = torch.zeros(segments, family.items)
    clicks = torch.zeros_like(shown)
    state = family.reset(tasks, sessions, shown)
    for time in range(family.slates):
        draw = lambda stream, size, time=time: noise_.uniform(0, tasks.id, replica, 0, time, stream, size)
        action = draw(noise_.AGENT, family.items).topk(family.slate, -1).indices
        here = (~state.left).to(shown.dtype)
        shown.scatter_add_(1, action.flatten(1), here[..., None].expand(action.shape).flatten(1))
        state, _, _ = family.step(tasks, state, action, draw(noise_.FAMILY, family.noise_size))
        place = state.place[..., None]
        item = action.gather(-1, place.clamp(max=family.slate - 1))[..., 0]
        clicks.scatter_add_(1, item, (place[..., 0] < family.slate).to(shown.dtype))
    return Logs(shown, clicks)


class _Recommender:
    """Shared: an agent that remembers the last observation, and forgets at the start of a trial."""

    noise_size = 1

    def __init__(self, family: SlateRecommendation, stores: bool = False):
        require(isinstance(stores, bool), "stores", stores, "True or False")
        self.family, self.stores = family, stores

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Forget everything."""
        self.shape = tasks, 1 if self.stores else episodes
        self.margin = constant(self.family.table.margin, context, torch.get_default_dtype())
        self.forget(context.device)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Slates (M, N, k): the items of highest ``score``, the best first."""
        self.seen = self.family.seen(observation)
        score = self.score(self.seen, noise).expand(*observation.shape[:2], -1)
        return score.topk(self.family.slate, -1).indices

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Learn from the slate and its click, while the shopper was there."""
        after = self.family.seen(next_observation)
        here = ~self.seen.left
        hit = (action == after.item[..., None]) & (here & (after.item >= 0))[..., None]
        self.learn(action, hit, here)

    def end_episode(self) -> None:
        """Nothing to do: what was learned carries over to the next round of the same segment."""

    def pooled(self, x: Tensor) -> Tensor:
        """Sum over the parallel shoppers of a segment, if their evidence is pooled."""
        return x.sum(1, keepdim=True) if self.stores else x

    def forget(self, device: torch.device) -> None:
        """Back to what is known of shoppers in general."""

    def score(self, seen: Seen, noise: Tensor) -> Tensor:
        """(M, N, I), or what expands to it."""
        raise NotImplementedError

    def learn(self, action: Tensor, hit: Tensor, here: Tensor) -> None:
        """``hit`` (M, N, k) marks the clicked place of ``action`` (M, N, k), ``here`` (M, N) the shoppers present."""


class Popularity(_Recommender):
    """Shows everyone the items that earned most per showing in the logs."""

    def __init__(self, family: SlateRecommendation, past: Logs):
        super().__init__(family)
        self.rate = past.clicks.sum(0) / past.shown.sum(0)

    def score(self, seen: Seen, noise: Tensor) -> Tensor:
        """(I,), click rate in the logs times margin."""
        return self.rate.to(self.margin) * self.margin


class _FromClicks(_Recommender):
    """Shared by the recommenders that look at which items the segment clicked.

    The score of an item is exp(``weight`` * nearness) times its popularity rate and its margin. Its nearness is the
    mean similarity to the clicked items, where a click counts as one less what popularity predicts of the showing, and
    a showing without a click as minus that: without such centring, whatever was shown first would be shown for ever.
    """

    def __init__(self, family: SlateRecommendation, past: Logs, stores: bool, weight: float, prior: float):
        super().__init__(family, stores)
        self.rate, self.weight, self.prior = past.clicks.sum(0) / past.shown.sum(0), weight, prior
        check(self, "weight", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "prior", lambda x: number(x, 0), "a finite number > 0")

    def similarity(self) -> Tensor:
        """(I, I) similarity of the items."""
        raise NotImplementedError

    def forget(self, device: torch.device) -> None:
        """No click yet."""
        self.clicks = torch.zeros(*self.shape, self.family.items, device=device, dtype=self.margin.dtype)
        self.expected = torch.zeros_like(self.clicks)
        self.near, self.rate = self.similarity().to(self.margin), self.rate.to(self.margin)

    def score(self, seen: Seen, noise: Tensor) -> Tensor:
        """(M, N or 1, I)."""
        total = self.prior + self.expected.sum(-1, keepdim=True)
        nearness = (self.clicks - self.expected) @ self.near / total
        return self.rate * torch.exp(self.weight * nearness) * self.margin

    def learn(self, action: Tensor, hit: Tensor, here: Tensor) -> None:
        """Count the clicks, and those that popularity predicts."""
        empty = torch.zeros(*action.shape[:2], self.family.items, dtype=self.rate.dtype, device=action.device)
        add = lambda x: self.pooled(empty.scatter(-1, action, x.to(empty.dtype)))
        self.clicks = self.clicks + add(hit)
        self.expected = self.expected + add(self.rate[action] * here[..., None])


class ItemBased(_FromClicks):
    """Item-based collaborative filtering (Sarwar et al. 2001): an item gains by the clicks on items that the same
    segments clicked in the logs. Similarity is the cosine of two items' click rates over the logged segments, less each
    item's mean."""

    def __init__(
        self, family: SlateRecommendation, past: Logs, stores: bool = False, weight: float = 5.0, prior: float = 5.0
    ):
        super().__init__(family, past, stores, weight, prior)
        self.past = past

    def similarity(self) -> Tensor:
        """Of click rates."""
        rate = self.past.clicks / self.past.shown.clamp(min=1)
        rate = rate - rate.mean(0)
        rate = rate / rate.norm(dim=0).clamp(min=1e-12)
        return rate.T @ rate


class Content(_FromClicks):
    """Similar items: an item gains by clicks on items with similar features (their cosine)."""

    def __init__(
        self, family: SlateRecommendation, past: Logs, stores: bool = False, weight: float = 3.0, prior: float = 5.0
    ):
        super().__init__(family, past, stores, weight, prior)

    def similarity(self) -> Tensor:
        """Of features."""
        features = constant(self.family.table.features, self.margin)
        features = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return features @ features.T


class LinUCB(_Recommender):
    """LinUCB (Li et al. 2010): ridge regression of clicks on (1, features, appeal), its prediction plus ``width``
    standard errors, times the margin. It starts from the regression on the logs, counted as ``prior`` showings."""

    def __init__(
        self,
        family: SlateRecommendation,
        past: Logs,
        stores: bool = False,
        width: float = 0.1,
        prior: float = 30.0,
    ):
        super().__init__(family, stores)
        self.width, self.prior, self.past = width, prior, past
        check(self, "width", lambda x: number(x) and x >= 0, "a finite number >= 0")
        check(self, "prior", lambda x: number(x, 0), "a finite number > 0")

    def forget(self, device: torch.device) -> None:
        """The regression on the logs."""
        table = self.family.table
        self.inputs = torch.cat(
            (torch.ones_like(self.margin)[:, None], constant(table.features, self.margin),
             constant(table.appeal, self.margin)[:, None]), -1
        )  # fmt: skip
        shown, clicks = (x.sum(0).to(self.margin) for x in self.past)
        gram = (self.inputs.T * (shown / shown.sum())) @ self.inputs
        eye = torch.eye(len(gram), dtype=gram.dtype, device=device)
        gram = gram + 1e-3 * eye
        self.gram = (self.prior * gram).expand(*self.shape, -1, -1)
        self.target = (self.prior * self.inputs.T @ (clicks / shown.sum())).expand(*self.shape, -1)

    def score(self, seen: Seen, noise: Tensor) -> Tensor:
        """(M, N or 1, I)."""
        inverse = torch.linalg.inv(self.gram)
        mean = torch.einsum("mnij,mnj->mni", inverse, self.target) @ self.inputs.T
        variance = torch.einsum("ki,mnij,kj->mnk", self.inputs, inverse, self.inputs)
        return (mean + self.width * variance.clamp(min=0).sqrt()).clamp(min=0) * self.margin

    def learn(self, action: Tensor, hit: Tensor, here: Tensor) -> None:
        """Add the shown items to the regression."""
        shown = self.inputs[action] * here[..., None, None]
        self.gram = self.gram + self.pooled(torch.einsum("mnki,mnkj->mnij", shown, shown))
        self.target = self.target + self.pooled(torch.einsum("mnki,mnk->mni", shown, hit.to(shown.dtype)))


class MNLThompson(_Recommender):
    """Thompson sampling for logit choice with a normal posterior of the taste: a taste is drawn before every slate, and
    the slate that earns most for it at once is shown, exactly.

    Oh and Iyengar (2019) analyse such sampling. The posterior here is a running Laplace approximation: every slate adds
    the curvature of its log-likelihood at the present mean, and moves the mean by a Newton step. The prior is the
    normal distribution with the moments of the family's; position bias is held at its prior mean.
    """

    def __init__(self, family: SlateRecommendation, stores: bool = False, scale: float = 0.3):
        super().__init__(family, stores)
        self.scale, self.noise_size = scale, family.features
        check(self, "scale", lambda x: number(x) and x >= 0, "a finite number >= 0")

    def forget(self, device: torch.device) -> None:
        """The prior's moments."""
        sample = self.family.prior_sample(2048, device)
        self.features = constant(self.family.table.features, self.margin)
        self.attention = self.family.attention(sample).mean(0)
        self.mean = sample.taste.mean(0).expand(*self.shape, -1)
        self.precision = torch.linalg.inv(torch.cov(sample.taste.T)).expand(*self.shape, -1, -1)
        self.appeal = constant(self.family.table.appeal, self.margin)
        bought = constant(self.family.cart, self.margin) * constant(self.family.order, self.margin)
        self.value = bought[:, None] * self.margin  # (stage, I), expected margin of a click

    def _level(self, seen: Seen) -> Tensor:
        return constant(self.family.click, self.margin)[seen.stage] - self.family.tiredness * seen.fatigue

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The best slate (M, N, k) at once for a taste drawn from the posterior."""
        self.seen = self.family.seen(observation)
        factor = torch.linalg.cholesky(self.precision)
        normal = torch.special.ndtri(noise)[..., None]
        deviation = torch.linalg.solve_triangular(factor.mT.expand(*noise.shape[:2], -1, -1), normal, upper=True)
        taste = self.mean + self.scale * deviation[..., 0]
        weight = torch.exp(taste @ self.features.T + self.appeal + self._level(self.seen)[..., None])
        return best_slate(weight, self.value[self.seen.stage], self.attention.expand(*noise.shape[:2], -1))[0]

    def learn(self, action: Tensor, hit: Tensor, here: Tensor) -> None:
        """One Newton step on the log-likelihood of the slate."""
        shown = self.features[action]  # (M, N, k, d)
        log_odds = torch.einsum("mnkd,mnd->mnk", shown, self.mean.expand(*action.shape[:2], -1))
        log_odds = log_odds + self.appeal[action] + self._level(self.seen)[..., None]
        odds = self.attention * log_odds.exp()
        chance = odds / (1 + odds.sum(-1, keepdim=True)) * here[..., None]
        gradient = torch.einsum("mnk,mnkd->mnd", hit.to(chance.dtype) - chance, shown)
        average = torch.einsum("mnk,mnkd->mnd", chance, shown)
        curvature = (
            torch.einsum("mnk,mnki,mnkj->mnij", chance, shown, shown) - average[..., :, None] * average[..., None, :]
        )
        self.precision = self.precision + self.pooled(curvature)
        step = torch.linalg.solve(self.precision, self.pooled(gradient)[..., None])[..., 0]
        self.mean = self.mean + step


class Blind:
    """The blind policy as an agent: the best table (time, stage, fatigue) -> slate for the prior."""

    noise_size = 1

    def __init__(self, family: SlateRecommendation):
        self.family = family

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Nothing to forget."""

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Slates (M, N, k) from the table."""
        return self.family.blind_action(observation)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Nothing to learn."""

    def end_episode(self) -> None:
        """Nothing to do."""


__all__ = ["Blind", "Content", "ItemBased", "LinUCB", "Logs", "MNLThompson", "Popularity", "logs"]
