"""SlateRecommendation: sessions of slates for a segment of shoppers with a hidden taste (chapter "Recommendation")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import sessions
from .base import Prior, check, numbers, whole
from .constants import constant
from .sessions import FATIGUE, STAGES
from .shoppers import Catalogue, HashedCatalogue, SegmentPrior

__all__ = ["Catalogue", "HashedCatalogue", "Seen", "Segments", "SegmentPrior", "SessionState", "SlateRecommendation"]


class Segments(NamedTuple):
    """M segments of shoppers. All but ``id`` is hidden from the merchant."""

    id: Tensor  # (M,)
    taste: Tensor  # (M, d), u: log-odds of a click gained per unit of a feature
    bias: Tensor  # (M,), position bias: attention to place j is places[j]^bias
    leave: Tensor  # (M,), probability of leaving after the first slate without a click


class SessionState(NamedTuple):
    """Where N sessions of M segments stand. Every field is (M, N), ``slate`` (M, N, k)."""

    time: Tensor  # slates shown so far
    stage: Tensor  # int64, intent: 0 browse, 1 consider, 2 ready
    fatigue: Tensor  # int64, slates in a row without a click, 0..3
    left: Tensor  # bool, the shopper is gone
    slate: Tensor  # int64, what was shown last
    place: Tensor  # int64, the place that was clicked; k if none
    cart: Tensor  # bool, the clicked item was put in the cart
    order: Tensor  # bool, and bought


class Seen(NamedTuple):
    """An observation, decoded. Every field is (M, N)."""

    time: Tensor  # int64
    stage: Tensor  # int64
    fatigue: Tensor  # int64
    left: Tensor  # bool
    item: Tensor  # int64, the item clicked on the last slate; -1 if none
    cart: Tensor  # bool
    order: Tensor  # bool


@dataclass(frozen=True)
class SlateRecommendation(Prior):
    """A shopper sees slates of k items in order, clicks at most one item of each, may put it in the cart and may buy.

    The choice is multinomial logit with a position bias, equations (eq-click) and (eq-attention) of chapter
    "Recommendation". A click may make the shopper more serious; slates without a click tire, and a tired shopper
    leaves. The merchant sees the stage of intent (shops read it off filters, searches and time on a page) and the
    fatigue (slates in a row without a click). Hidden are the segment's taste, its position bias and how soon it leaves.
    The catalogue is the same for all segments and is known, and so are the shares of clicks that end in the cart and of
    carts that are bought.
    """

    slates: int = 20
    """Most slates in a session."""
    slate: int = 4
    """k, places of a slate."""
    catalogue: Catalogue | HashedCatalogue = field(default_factory=HashedCatalogue)
    """The items."""
    prior: SegmentPrior = field(default_factory=SegmentPrior)
    """Distribution of the hidden parameters."""
    click: tuple[float, float, float] = (-3.0, -2.7, -2.4)
    """Log-odds, against no click, of a click on an item with appeal 0 at the first place, for each stage."""
    tiredness: float = 0.2
    """Log-odds lost with every level of fatigue."""
    places: tuple[float, ...] = (1.0, 0.28, 0.17, 0.09)
    """Attention to each place at position bias 1."""
    cart: tuple[float, float, float] = (0.065, 0.085, 0.105)
    """Share of clicks that put the item in the cart, for each stage."""
    order: tuple[float, float, float] = (0.25, 0.28, 0.31)
    """Share of carts that are bought, for each stage."""
    reward: Literal["click", "cart", "purchase"] = "click"
    """When the margin of an item is booked: at its purchase; or, at the cart or the click, as the margin expected from
    there. The expected reward of a step is the same, its variance is smaller the earlier it is booked."""

    def __post_init__(self):
        kinds = (Catalogue, HashedCatalogue)
        check(self, "slates", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "catalogue", lambda x: isinstance(x, kinds), "a Catalogue or a HashedCatalogue")
        table = self.catalogue.table()
        items = len(table.margin)
        check(self, "slate", lambda x: whole(x, 1, items), f"a whole number in 1..items = {items}")
        check(self, "prior", lambda x: isinstance(x, SegmentPrior), "a SegmentPrior")
        check(self, "click", lambda x: numbers(x, STAGES), "3 finite numbers")
        check(self, "tiredness", lambda x: numbers((x,)) and x >= 0, "a finite number >= 0")
        falling = lambda x: numbers(x) and x[-1] > 0 and all(a >= b for a, b in zip(x, x[1:]))
        check(self, "places", falling, "positive numbers that do not increase")
        check(self, "places", lambda x: len(x) >= self.slate, f"at least slate = {self.slate} numbers")
        for name in ("cart", "order"):
            check(self, name, lambda x: numbers(x, STAGES) and min(x) >= 0 and max(x) <= 1, "3 probabilities")
        check(self, "reward", lambda x: x in ("click", "cart", "purchase"), "'click', 'cart' or 'purchase'")
        object.__setattr__(self, "table", table)

    # -------------------------------------------------------------------------------------------- the protocol
    noise_size = 5
    actions = 0

    @property
    def horizon(self) -> int:
        """Most slates in a session."""
        return self.slates

    @property
    def items(self) -> int:
        """Items of the catalogue; an action is ``slate`` of them, (M, N, slate) int64."""
        return len(self.table.margin)

    @property
    def features(self) -> int:
        """Features of an item."""
        return len(self.table.features[0])

    @property
    def row(self) -> tuple[str, ...]:
        """What the observation says of an item and of the session, in order: the names of a row's numbers."""
        item = tuple(f"feature {i + 1}" for i in range(self.features)) + ("margin", "appeal", "pull")
        session = ("consider", "ready", "fatigue", "time", "left")
        return (*item, *session, "place", "clicked", "cart", "order")

    @property
    def constant(self) -> tuple[int, ...]:
        """Numbers of the row's entries that are the same at every step: those of the item."""
        return tuple(range(self.features + 3))

    @property
    def observation_size(self) -> int:
        """``items`` rows, flattened."""
        return self.items * len(self.row)

    @property
    def prior_size(self) -> int:
        """Uniforms that make a segment."""
        return self.features + 3

    @property
    def hidden_size(self) -> int:
        """All of them are of hidden parameters."""
        return self.prior_size

    def from_uniforms(self, task_id: Tensor, uniforms: Tensor) -> Segments:
        """Segments of ``uniforms`` (M, features + 3), as ``SegmentPrior.hidden`` takes them."""
        return Segments(task_id, *self.prior.hidden(uniforms))

    def shifted(self) -> SlateRecommendation:
        """The same shop, visited by types of shopper that training never saw."""
        return replace(self, prior=self.prior.shifted())

    def wide(self) -> SlateRecommendation:
        """The same shop under a vague prior: the particles that empirical Bayes puts its weights on."""
        return replace(self, prior=self.prior.wide(self.features))

    def context(self, tasks: Segments) -> Tensor:
        """(M, 0): nothing is known of a segment beforehand."""
        return tasks.taste[:, :0]

    def reset(self, tasks: Segments, episodes: int, noise: Tensor) -> SessionState:
        """A new shopper who browses, fresh; no chance is involved."""
        zero = torch.zeros(len(tasks.id), episodes, dtype=torch.int64, device=tasks.id.device)
        no = torch.zeros_like(zero, dtype=torch.bool)
        shown = torch.arange(self.slate, device=zero.device).expand(*zero.shape, -1)
        return SessionState(zero, zero, zero, no, shown, zero + self.slate, no, no)

    def observe(self, tasks: Segments, state: SessionState) -> Tensor:
        """(M, N, items * row): for every item its features, margin, appeal and pull, then the session's stage (two
        indicators), fatigue / 3, time / slates and whether the shopper left, then the item's part in the last slate:
        its place (1 first, 1/k last, 0 not shown), and whether it was clicked, put in the cart, bought."""
        dtype = tasks.taste.dtype
        shape = (*state.time.shape, self.items)
        items = self._items(tasks.taste)
        fatigue, time = state.fatigue / (FATIGUE - 1), state.time / self.slates
        session = (state.stage == 1, state.stage == 2, fatigue, time, state.left)
        session = torch.stack([x.to(dtype) for x in session], -1)[..., None, :]
        shown = (self.slate - torch.arange(self.slate, device=state.time.device)) / self.slate
        shown = shown.to(dtype) * (state.time > 0)[..., None]
        place = torch.zeros(shape, dtype=dtype, device=state.time.device).scatter(-1, state.slate, shown)
        item = state.slate.gather(-1, state.place.clamp(max=self.slate - 1)[..., None])
        clicked = torch.zeros_like(place).scatter(-1, item, (state.place < self.slate)[..., None].to(dtype))
        cart, order = clicked * state.cart[..., None], clicked * state.order[..., None]
        rows = torch.cat(
            (
                items.expand(*shape, -1),
                session.expand(*shape, -1),
                torch.stack((place, clicked, cart, order), -1),
            ),
            -1,
        )
        return rows.flatten(-2)

    def seen(self, observation: Tensor) -> Seen:
        """The session's state and what the last slate led to: the inverse of ``observe``."""
        rows = observation.unflatten(-1, (self.items, -1))
        consider, ready, fatigue, time, left = rows[..., 0, self.features + 3 : self.features + 8].unbind(-1)
        clicked = rows[..., -3]
        item = torch.where(clicked.sum(-1) > 0, clicked.argmax(-1), -1)
        return Seen(
            (time * self.slates).round().long(),
            (consider + 2 * ready).round().long(),
            (fatigue * (FATIGUE - 1)).round().long(),
            left > 0.5,
            item,
            rows[..., -2].sum(-1) > 0.5,
            rows[..., -1].sum(-1) > 0.5,
        )

    def step(
        self, tasks: Segments, state: SessionState, action: Tensor, noise: Tensor
    ) -> tuple[SessionState, Tensor, Tensor]:
        """Show the slate ``action`` (M, N, k), items in order without repetition."""
        here = ~state.left
        weight = self.shown_weight(tasks, state.stage, state.fatigue, action)
        # The outcomes are laid end to end, no click last: one uniform falls in one of them.
        reach = noise[..., :1] * (1 + weight.sum(-1, keepdim=True))
        place = (weight.cumsum(-1) <= reach).sum(-1)
        place = torch.where(here, place, self.slate)
        clicked = place < self.slate
        item = action.gather(-1, place.clamp(max=self.slate - 1)[..., None])[..., 0]
        cart_share, order_share = (constant(x, weight)[state.stage] for x in (self.cart, self.order))
        cart = clicked & (noise[..., 1] < cart_share)
        order = cart & (noise[..., 2] < order_share)
        keener = clicked & (noise[..., 3] < constant(self.table.pull, weight)[item])
        stage = torch.where(order, 0, (state.stage + keener).clamp(max=STAGES - 1))
        fatigue = torch.where(clicked, 0, (state.fatigue + here).clamp(max=FATIGUE - 1))
        bored = ~clicked & (noise[..., 4] < tasks.leave[:, None] * (1 + state.fatigue))
        booked = {"click": clicked * cart_share * order_share, "cart": cart * order_share, "purchase": order}
        reward = constant(self.table.margin, weight)[item] * booked[self.reward]
        time = state.time + 1
        left = state.left | bored
        after = SessionState(time, stage, fatigue, left, action, place, cart, order)
        return after, reward, left | (time >= self.slates)

    # ------------------------------------------------------------------------------------------- choice model
    def _items(self, like: Tensor) -> Tensor:
        """(items, features + 3): features, margin, appeal and pull."""
        table = self.table
        columns = (*zip(*table.features), table.margin, table.appeal, table.pull)
        return constant(tuple(zip(*columns)), like)

    def log_weight(self, tasks: Segments) -> Tensor:
        """(M, items) log-odds of a click on each item beyond those of its stage: appeal + x'u."""
        return tasks.taste @ constant(self.table.features, tasks.taste).T + constant(self.table.appeal, tasks.taste)

    def attention(self, tasks: Segments) -> Tensor:
        """(M, k) attention to each place, equation (eq-attention)."""
        return constant(self.places[: self.slate], tasks.bias) ** tasks.bias[:, None]

    def shown_weight(self, tasks: Segments, stage: Tensor, fatigue: Tensor, action: Tensor) -> Tensor:
        """(M, N, k) odds against no click of a click on each place of ``action`` (M, N, k), equation (eq-click)."""
        index = torch.arange(len(action), device=action.device)[:, None, None]
        level = constant(self.click, tasks.taste)[stage] - self.tiredness * fatigue
        return torch.exp(self.log_weight(tasks)[index, action] + level[..., None]) * self.attention(tasks)[:, None]

    # ------------------------------------------------------------------------------------- oracle and blind policy
    def oracle_return(self, tasks: Segments) -> Tensor:
        """(M,) expected return of a session when the segment is known: exact, by equation (eq-session)."""
        return sessions.plan(self, tasks).value[:, 0, 0]

    def blind_return(self, tasks: Segments) -> Tensor:
        """(M,) expected return of the blind policy: the table (time, stage, fatigue) -> slate that earns most on
        average over the prior, up to a local optimum (``families.sessions.best_table``).

        Stage and fatigue are physical state and they tell of clicks, so such a table adapts a little without meaning
        to. The search takes about a second; its result is kept while Python runs.
        """
        return sessions.plan(self, tasks, sessions.blind_table(self)).value[:, 0, 0]

    def blind_action(self, observation: Tensor) -> Tensor:
        """(M, N, k) what the blind policy shows."""
        seen = self.seen(observation)
        table = sessions.blind_table(self).to(observation.device)
        return table[seen.time.clamp(max=self.slates - 1), seen.stage * FATIGUE + seen.fatigue]
