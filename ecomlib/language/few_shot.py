"""Few-shot behaviour prediction: a task is a shop, or a department of a shop, and its examples are sessions (chapter
"Few-shot across categories and shops").

What a product's text says is a vector, computed once (``Encoder.embed``, ``features.reduced``), so that an example is a
row of numbers and the learners of ``ecomlib.learners`` take these tasks as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from .. import noise
from ..families.base import require, whole
from ..learners.adaptation import Inner
from ..learners.first_order import ReptileStep
from ..learners.meta import GradientStep
from ..learners.supervised import Examples, SupervisedMAML
from ..networks import Network
from .behaviour import BehaviourModel
from .features import impression_features

PADDING = -100
"""The class of a row that holds no impression: losses leave it out."""
SESSION_ORDER = 111
"""Stream of ``noise`` that puts a task's sessions in order."""


class SessionTasks(NamedTuple):
    """T tasks of S sessions of at most R impressions, F features each: an ``ExampleSource`` whose points are sessions.

    A shopper who leaves early leaves rows of padding. Support and query of an iteration never share a session.
    """

    x: Tensor  # (T, S, R, F)
    y: Tensor  # (T, S, R) int64: 1 where the product was clicked or more, else 0; PADDING where there is no impression
    exact: Tensor  # (T, S, R), the generator's own probability of y = 1
    row: Tensor  # (T, S, R) int64, row of the log; -1 for padding

    def tasks(self, task_id: Tensor) -> Tensor:
        """Ids stand for tasks of the list, those beyond its end start again: (M,)."""
        return task_id

    def sample(self, tasks: Tensor, points: int, seed: int | Tensor, episode: int = 0) -> tuple[Tensor, Tensor]:
        """(M, points R, F) and (M, points R) of ``points`` sessions of every task.

        Hashed from seed and task, half of a task's sessions are for episode 0, the support, and half for all others.
        Raises ValueError where the half is too small.
        """
        sessions = self.x.shape[1]
        half = sessions // 2
        require(whole(points, 1, half), "points", points, f"a whole number in 1..{half}, half the sessions of a task")
        every = torch.arange(sessions, device=tasks.device)
        draw = lambda episode, of: noise.uniform(seed, tasks, of, episode, 0, SESSION_ORDER, 1)[..., 0].argsort(-1)
        order = draw(0, every)
        if episode > 0:
            order = order[:, half:].gather(1, draw(episode, every[half:]))
        return self.take(tasks % len(self.x), order[:, :points])

    def take(self, index: Tensor, sessions: Tensor) -> tuple[Tensor, Tensor]:
        """Sessions (M, points) of the tasks ``index`` (M,), end to end."""
        index = index[:, None]
        return self.x[index, sessions].flatten(1, 2), self.y[index, sessions].flatten(1, 2)

    def first(self, sessions: int) -> Examples:
        """The first ``sessions`` sessions of every task: supports that grow as a shop collects them."""
        return Examples(self.x[:, :sessions].flatten(1, 2), self.y[:, :sessions].flatten(1, 2))

    def after(self, sessions: int) -> SessionTasks:
        """All sessions but the first ``sessions``: the query, the same for every size of support."""
        return SessionTasks(*(field[:, sessions:] for field in self))

    def rows(self) -> Examples:
        """All sessions of every task, end to end."""
        return self.first(self.x.shape[1])

    def to(self, device: str | torch.device) -> SessionTasks:
        """The same on another device."""
        return SessionTasks(*(field.to(device) for field in self))


def session_tasks(
    model: BehaviourModel,
    products: pd.DataFrame,
    shops: Sequence[int],
    sessions: int,
    features: Callable[[pd.DataFrame], NDArray[np.floating]],
    assortments: Sequence[NDArray[np.int64]],
    seed: int = 0,
) -> tuple[SessionTasks, pd.DataFrame]:
    """Generated tasks, and their log: every shop with every assortment (rows of ``products``) is one, shops first.

    ``features`` makes a row of each of the log's impressions: numbers, ``lambda events: impression_features(events,
    vectors)`` for any vectors of the products, or tokens (``adapters.token_rows``). One assortment of all that is sold
    makes a task of a shop; the products of one department each make a task of a shop's department. A shop has the same
    taste in all its departments.
    """
    require(len(assortments) > 0, "assortments", assortments, "at least one list of products")
    logs, probability = [], []
    for number, rows in enumerate(assortments):
        log = model.generate(products, shops, sessions, seed + number, rows)
        place = {shop: i for i, shop in enumerate(shops)}
        task = number * len(shops) + log.events["shop"].map(place)
        session = task * sessions + log.events["session"] % sessions
        logs.append(log.events.assign(task=task, session=session))
        probability.append(1 - log.probability[:, 0])
    events, exact = pd.concat(logs, ignore_index=True), np.concatenate(probability)
    values = np.asarray(features(events))
    number = torch.get_default_dtype()
    kind = torch.int64 if np.issubdtype(values.dtype, np.integer) else number
    within = (events["slate"] * model.slate + events["place"]).to_numpy()
    at = tuple(torch.tensor(index) for index in (events["session"].to_numpy(), within))
    size = (len(shops) * len(assortments) * sessions, model.slates * model.slate)

    def filled(column: NDArray, empty: float, dtype: torch.dtype) -> Tensor:
        table = torch.full((*size, *column.shape[1:]), empty, dtype=dtype)
        table[at] = torch.tensor(column).to(dtype)
        return table.unflatten(0, (-1, sessions))

    acted = (events["event"].to_numpy() > 0).astype(np.int64)
    x, p = filled(values, 0, kind), filled(exact, 0.5, number)
    return SessionTasks(
        x, filled(acted, PADDING, torch.int64), p, filled(np.arange(len(events)), -1, torch.int64)
    ), events


def event_loss(output: Tensor, y: Tensor) -> Tensor:
    """(M,) cross-entropy of scores (M, rows, classes), averaged over the rows whose class is not PADDING."""
    each = cross_entropy(output.movedim(-1, -2), y, reduction="none", ignore_index=PADDING)
    return each.sum(-1) / (y != PADDING).sum(-1).clamp(min=1)


def few_shot_learner(network: Network, name: str, inner: Inner, **settings) -> SupervisedMAML:
    """A learner of session tasks, by name, all on the loss ``event_loss``.

    ==========  ======================================================================================
    Name        What is trained
    ==========  ======================================================================================
    pooled      the loss of all tasks together, without an inner loop: ordinary training
    MAML        the loss after ``inner``'s steps, with second derivatives
    FOMAML      the same without them
    ANIL        as MAML, but the inner loop adapts the network's head alone
    Reptile     the way to the adapted parameters; settings ``lr`` (its share) as the others' Adam step
    ==========  ======================================================================================

    ``settings`` are those of ``SupervisedMAML``, and ``lr`` the outer step size.
    """
    changes = {
        "pooled": {"steps": 0, "lr": inner.rate(0)},
        "MAML": {},
        "FOMAML": {"first_order": True},
        "ANIL": {"adapted": network.head},
        "Reptile": {"first_order": True},
    }
    require(name in changes, "name", name, f"one of {', '.join(changes)}")
    lr = settings.pop("lr", 1e-3)
    outer = ReptileStep(lr=lr, adam=True) if name == "Reptile" else GradientStep(lr=lr)
    return SupervisedMAML(network, replace(inner, **changes[name]), outer, event_loss, **settings)


def fine_tuned(
    network: Network,
    start: list[Tensor],
    support: Examples,
    query: Tensor,
    lr: float,
    steps: int,
    adapted: tuple[int, ...] | None = None,
    last: bool = False,
) -> list[Tensor]:
    """Log-odds of a click, (M, rows), for query rows (M, rows, F) after 0, 1, ..., ``steps`` gradient steps of every
    task on its support, or after the last alone. Plain descent from ``start``, whoever made it: what a meta-learner's
    own adaptation is."""
    learner = SupervisedMAML(network, Inner(steps=max(steps, 1), lr=lr, adapted=adapted), loss=event_loss)
    stages = learner.train_task(start, support, steps)
    with torch.no_grad():
        return [log_odds(network.outputs(phi, query)) for phi in stages[-1 if last else 0 :]]


def log_odds(output: Tensor) -> Tensor:
    """(...) log-odds of the second of two classes."""
    return output[..., 1] - output[..., 0]


def losses(odds: Tensor, y: Tensor) -> Tensor:
    """(M,) mean log-loss of log-odds (M, rows) at labels (M, rows), padding left out."""
    return event_loss(torch.stack((torch.zeros_like(odds), odds), -1), y)


class Reference(NamedTuple):
    """Both ends of the score on a list of tasks, (T,) each."""

    base: Tensor  # loss of one rate for all impressions, that of the training log
    exact: Tensor  # loss of the generator's own probabilities


def reference(tasks: SessionTasks, rate: float | Tensor) -> Reference:
    """Losses of the constant ``rate`` and of the generator on all rows of ``tasks``."""
    y = tasks.y.flatten(1)
    logit = torch.special.logit
    constant = logit(torch.as_tensor(rate, dtype=tasks.exact.dtype))
    return Reference(losses(constant.expand(y.shape), y), losses(logit(tasks.exact.flatten(1)), y))


def score(loss: Tensor, ends: Reference) -> Tensor:
    """(...) share of the way from the base rate to the generator, equation (eq-few-shot-score): a ratio of means over
    tasks, from losses (..., T)."""
    return (ends.base - loss).mean(-1) / (ends.base - ends.exact).mean(-1)


def click_rate(tasks: SessionTasks) -> Tensor:
    """() share of all impressions that were acted on."""
    real = tasks.y != PADDING
    return (tasks.y * real).sum() / real.sum()


def compact_features(events: pd.DataFrame, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """(rows, d + 7) of ``impression_features``: the vector of the product shown, its place, and what went before in the
    session as counts. The first d + 4 say what is shown and where; few sessions cannot teach more."""
    found, d = impression_features(events, vectors), vectors.shape[1]
    return np.column_stack((found[:, :d], found[:, 5 * d :]))


def initial(network: Network, seed: int) -> list[Tensor]:
    """Parameters that know nothing."""
    return network.initial(Generator().manual_seed(seed))
