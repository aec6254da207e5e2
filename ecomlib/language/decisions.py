"""What a shop does with a prediction: rankers and Bayesian agents that read product texts, under the agents' protocol
of ``rollout.trial`` (chapter "From prediction to decision")."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..baselines.recommenders import MNLThompson
from ..families import sessions
from ..families.base import number, require
from ..families.constants import constant
from ..families.recommendation import Catalogue, Seen, Segments, SessionState, SlateRecommendation
from ..families.sessions import FATIGUE, STAGES
from ..rollout import Agent
from .features import PLACES, impression_features

Intent = Literal["seen", "predicted", "ignored"]
"""What an agent is told of the shopper's stage: the truth; the most probable stage given the session's clicks, carts
and purchases (``StageFilter``); nothing, so that it takes everybody for a browser."""


# ------------------------------------------------------------------------------------------------ predicted intent
class StageFilter:
    """Probability of each stage of intent, from what a session showed: equation (eq-stage-filter).

    ``pull`` (items,) is the probability that a click on the item makes the shopper keener, as estimated from the items'
    texts; ``family`` gives the shares of clicks that end in the cart and of carts that are bought. Clicks are evidence
    through what they lead to, not through how many there are: their number depends on the taste, too.
    """

    def __init__(self, family: SlateRecommendation, pull: NDArray[np.floating]):
        require(len(pull) == family.items, "pull", len(pull), f"a probability for each of {family.items} items")
        self.family = family
        self.pull = torch.as_tensor(np.clip(pull, 0, 1), dtype=torch.get_default_dtype())

    def begin(self, tasks: int, episodes: int, device: torch.device) -> None:
        """Everybody browses."""
        self.pull = self.pull.to(device)
        self.chance = torch.zeros(tasks, episodes, STAGES, dtype=self.pull.dtype, device=device)
        self.chance[..., 0] = 1

    def update(self, after: Seen) -> None:
        """Bayes' rule for what the last slate led to, then the step that a click may bring."""
        cart, order = (constant(x, self.chance) for x in (self.family.cart, self.family.order))
        clicked, carted, bought = (x[..., None] for x in (after.item >= 0, after.cart, after.order))
        evidence = torch.where(carted, cart * torch.where(bought, order, 1 - order), 1 - cart)
        chance = self.chance * torch.where(clicked, evidence, 1.0)
        # Shares of 0 may rule out what happened: then nothing is learned.
        total = chance.sum(-1, keepdim=True)
        chance = torch.where(total > 0, chance / total.clamp(min=1e-300), self.chance)
        keener = torch.cat((torch.zeros_like(chance[..., :1]), chance[..., :-1]), -1)
        keener[..., -1] += chance[..., -1]
        pull = self.pull[after.item.clamp(min=0)][..., None] * clicked
        chance = (1 - pull) * chance + pull * keener
        browses = torch.zeros_like(chance)
        browses[..., 0] = 1
        fresh = bought | (after.time == 0)[..., None]
        self.chance = torch.where(fresh, browses, chance)


class View:
    """An agent that decides for the shop as the shop believes it to be.

    The inner agent works on ``believed``, a family with the same items, margins and slates but with features, appeal
    and pull that the shop has estimated, in any number; what happened in ``family`` is told to it in that family's
    terms. So neither the true features nor, unless ``intent`` is "seen", the stage of intent reaches it. Time, fatigue,
    leaving, clicks, carts and purchases do.
    """

    def __init__(
        self,
        family: SlateRecommendation,
        believed: SlateRecommendation,
        agent: Agent,
        intent: Intent = "seen",
        pull: NDArray[np.floating] | None = None,
    ):
        sizes = lambda x: (x.items, x.slate, x.slates)
        require(sizes(family) == sizes(believed), "believed", sizes(believed), f"items, slate, slates {sizes(family)}")
        allowed = ("seen", "predicted", "ignored")
        require(intent in allowed, "intent", intent, f"one of {', '.join(allowed)}")
        self.family, self.believed, self.agent, self.intent = family, believed, agent, intent
        self.noise_size = agent.noise_size
        self.filter = StageFilter(family, np.array(believed.table.pull) if pull is None else pull)

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """The inner agent forgets; nothing has been shown."""
        self.agent.begin(context, tasks, episodes)
        self.filter.begin(tasks, episodes, context.device)
        self.stage = torch.zeros(tasks, episodes, dtype=torch.int64, device=context.device)
        self.shown = torch.arange(self.family.slate, device=context.device).expand(tasks, episodes, -1)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """The inner agent's slates (M, N, k)."""
        return self.agent.act(self._told(observation), noise)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Tell the inner agent what happened, in its terms."""
        self.shown = action
        self.filter.update(self.family.seen(next_observation))
        self.agent.observe(action, reward, self._told(next_observation), done)

    def end_episode(self) -> None:
        """Another shopper."""
        self.agent.end_episode()
        self.filter.begin(*self.stage.shape, self.stage.device)

    def _told(self, observation: Tensor) -> Tensor:
        seen = self.family.seen(observation)
        if self.intent == "seen":
            self.stage = seen.stage
        elif self.intent == "predicted":
            self.stage = self.filter.chance.argmax(-1)
        place = (self.shown == seen.item[..., None]).long().argmax(-1)
        place = torch.where(seen.item >= 0, place, self.family.slate)
        state = SessionState(seen.time, self.stage, seen.fatigue, seen.left, self.shown, place, seen.cart, seen.order)
        like = torch.zeros(len(observation), dtype=observation.dtype, device=observation.device)
        nobody = Segments(like, like[:, None], like, like)  # an observation reads no hidden parameter
        return self.believed.observe(nobody, state)


class KnownTaste:
    """The oracle as an agent, for M given segments: its slates for what it is told of the stage. Inside a ``View`` that
    hides the stage it shows what knowing the stage is worth."""

    noise_size = 1

    def __init__(self, family: SlateRecommendation, tasks: Segments):
        self.family, self.slate = family, sessions.plan(family, tasks).slate

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Nothing to forget."""

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Slates (M, N, k) of each segment's own plan."""
        seen = self.family.seen(observation)
        task = torch.arange(len(observation), device=observation.device)[:, None]
        return self.slate[task, seen.time.clamp(max=self.family.slates - 1), seen.stage * FATIGUE + seen.fatigue]

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Nothing to learn."""

    def end_episode(self) -> None:
        """Nothing to do."""


def own_effects(believed: SlateRecommendation, deviation: float, keep: bool = True) -> SlateRecommendation:
    """``believed`` with one more feature for each item: what its text does not say of it, which only clicks tell.

    The effect of an item is normal with standard ``deviation`` in log-odds: equation (eq-own-effects). Without ``keep``
    the other features go, and every item is learned from its own clicks alone.
    """
    require(number(deviation, 0), "deviation", deviation, "a finite number > 0")
    require(believed.prior.types == 1 and believed.prior.centre == 0, "believed.prior", believed.prior, "one cloud")
    own = deviation / believed.prior.deviation * np.eye(believed.items)
    rows = np.hstack((np.array(believed.table.features), own)) if keep else own
    table = believed.table
    catalogue = Catalogue(table.margin, tuple(rows.flatten().tolist()), table.appeal, table.pull)
    return replace(believed, catalogue=catalogue)


def by_clicks(believed: SlateRecommendation, stores: bool = True, scale: float = 0.0) -> MNLThompson:
    """The Bayesian logit recommender of chapter "Recommendation" for any number of features: it draws tastes with
    ``scale`` times the posterior's spread; 0 takes the mean."""
    return MNLThompson(believed, stores, scale)


# ------------------------------------------------------------------------------------------- predicted click, ranked
class ClickHead(NamedTuple):
    """Logistic regression of an event on ``impression_features`` of vectors of length d."""

    weight: NDArray[np.float64]
    """(5 d + 7,), in the units of the features."""
    intercept: float


def fit_click_head(events: pd.DataFrame, vectors: NDArray[np.floating], strength: float = 0.01) -> ClickHead:
    """Fit it to a log. ``strength`` is scikit-learn's C: smaller shrinks more. Raises ValueError without an event."""
    from sklearn.linear_model import LogisticRegression

    acted = events["event"].to_numpy() > 0
    require(acted.any() and not acted.all(), "events", "only one outcome", "impressions with and without an event")
    rows = impression_features(events, vectors).astype(np.float64)
    mean, scale = rows.mean(0), rows.std(0)
    scale[scale == 0] = 1
    model = LogisticRegression(C=strength, max_iter=300).fit((rows - mean) / scale, acted)
    weight = model.coef_[0] / scale
    return ClickHead(weight, float(model.intercept_[0] - mean @ weight))


class TextRanker:
    """Shows the items of highest predicted click probability times margin, and ranks anew after every slate.

    The prediction is ``head``'s for the items' ``vectors`` (items, d) and the session so far; it was trained on other
    shops. This is the documents' recommender: text in, probability out, sort. With ``margins=False`` it sorts by the
    probability alone.
    """

    noise_size = 1

    def __init__(
        self, family: SlateRecommendation, head: ClickHead, vectors: NDArray[np.floating], margins: bool = True
    ):
        d = vectors.shape[1]
        require(len(vectors) == family.items, "vectors", len(vectors), f"a row for each of the {family.items} items")
        require(len(head.weight) == 5 * d + PLACES + 3, "head", len(head.weight), f"weights for vectors of length {d}")
        self.family, self.margins = family, margins
        as_tensor = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.get_default_dtype())
        self.vectors, self.intercept = as_tensor(vectors), head.intercept
        self.parts = as_tensor(head.weight).split((d, d, d, d, d, PLACES, 1, 2))

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """No session yet."""
        self.vectors = self.vectors.to(context.device)
        self.parts = tuple(part.to(context.device) for part in self.parts)
        self.shape = tasks, episodes, self.vectors.shape[1]
        self.margin = constant(self.family.table.margin, self.vectors)
        self.end_episode()

    def probability(self, time: Tensor) -> Tensor:
        """(M, N, items) predicted probability of an event at the first place, given the session so far."""
        product, plus, minus, product_plus, product_minus, place, slate, counts = self.parts
        liked, other = (total / count.clamp(min=1) for total, count in zip(self.total, self.count))
        own = (product + product_plus * liked + product_minus * other) @ self.vectors.T
        common = liked @ plus + other @ minus + place[0] + slate * time / 10
        common = common + torch.log1p(torch.cat(self.count, -1)) @ counts
        return torch.sigmoid(own + common[..., None] + self.intercept)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Slates (M, N, k): the items of highest score, the best first."""
        self.seen = self.family.seen(observation)
        score = self.probability(self.seen.time)
        return (score * self.margin if self.margins else score).topk(self.family.slate, -1).indices

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Add the slate to the session's history, if the shopper saw it."""
        here = (~self.seen.left)[..., None].to(self.vectors.dtype)
        hit = (action == self.family.seen(next_observation).item[..., None]).to(
            self.vectors.dtype
        )  # an absent one clicks nothing
        shown = self.vectors[action]
        for which, mask in enumerate((hit, here - hit)):
            self.total[which] = self.total[which] + (shown * mask[..., None]).sum(-2)
            self.count[which] = self.count[which] + mask.sum(-1, keepdim=True)

    def end_episode(self) -> None:
        """Another shopper, of whom nothing is known: the history is that of a session."""
        empty = torch.zeros(self.shape, dtype=self.vectors.dtype, device=self.vectors.device)
        self.total, self.count = [empty, empty], [empty[..., :1], empty[..., :1]]
