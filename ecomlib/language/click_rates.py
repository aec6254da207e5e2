"""Click rates: features of impressions, models, and logs of campaigns as tasks (chapter "Click-rate prediction with
MAML").

A model gives the log-odds of a click. It is trained by the binary cross-entropy of counts, so that a row may be one
impression or all impressions with the same features: the loss is the same. Meta-learners are those of
``ecomlib.learners.SupervisedMAML`` with ``ClickLoss`` in the place of their loss.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus

from ..calibration.tables import TableError, refuse
from ..families.base import check, number, require, whole

MOST_FEATURES = 10**6
"""Bound of the length of a feature vector."""


# ----------------------------------------------------------------------------------------------- the loss
def click_loss(output: Tensor, y: Tensor) -> Tensor:
    """(...) mean binary cross-entropy of an impression, in nats: equation (eq-click-loss).

    ======  ==================  ==========================================================================
    Symbol  Shape               Description
    ======  ==================  ==========================================================================
    output  (..., points, 1)    log-odds of a click
    y       (..., points, 2)    impressions and clicks of each point; a point without impressions is ignored
    ======  ==================  ==========================================================================

    One impression with its label is the point (1, label).
    """
    shown, clicks = y.unbind(-1)
    logit = output[..., 0]
    return (shown * softplus(logit) - clicks * logit).sum(-1) / shown.sum(-1)


@dataclass(frozen=True)
class ClickLoss:
    """``click_loss`` in units of its curvature at the base rate, r (1 - r), less for fewer impressions.

    The curvature of the cross-entropy is about as small as the click rate, so that usual step sizes do nothing. In
    these units a step size is of order 1: for an intercept alone the best one is the weight of shrinkage, equation
    (eq-click-shrinkage). That weight grows with the number of impressions n, which a step on their mean does not know;
    a sum divided by n + ``prior_impressions`` does, equation (eq-click-prior-impressions).
    """

    base_rate: float = 0.01
    """r, about the rate of all campaigns together."""
    prior_impressions: float = 0.0
    """Impressions to whose number n is compared; 0 is the mean."""

    def __post_init__(self):
        check(self, "base_rate", lambda x: number(x, 0, 1), "a number between 0 and 1, both excluded")
        valid = lambda x: x == 0 or number(x, 0, 1e12)
        check(self, "prior_impressions", valid, "a number >= 0 and < 1e12")

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """As ``click_loss``, in these units."""
        shown = y[..., 0].sum(-1)
        share = shown / (shown + self.prior_impressions)
        return share * click_loss(output, y) / (self.base_rate * (1 - self.base_rate))


# ----------------------------------------------------------------------------------------------- models
class FactorisationMachine:
    """Log-odds b + w x + the pairwise products of features, weighted by products of their vectors (Rendle 2010).

    With ``rank`` 0 it is logistic regression. A ``networks.Network``: vectors (features, rank) unless the rank is 0,
    weights (features, 1), bias (1, 1), each shared or one per task. The head, what ANIL adapts, is weights and bias.
    """

    output_size = 1

    def __init__(self, features: int, rank: int = 4, base_rate: float = 0.01):
        require(whole(features, 1, MOST_FEATURES), "FactorisationMachine.features", features, f"1 to {MOST_FEATURES:,}")
        require(whole(rank, 0, 1000), "FactorisationMachine.rank", rank, "0 to 1000")
        require(number(base_rate, 0, 1), "FactorisationMachine.base_rate", base_rate, "between 0 and 1, both excluded")
        self.features, self.rank, self.base_rate = features, rank, base_rate
        self.tensors = 3 if rank else 2
        self.head = (self.tensors - 2, self.tensors - 1)

    def initial(self, generator: Generator) -> list[Tensor]:
        """Vectors ~ Normal(0, 0.1^2) (from 0 they could not move), weights 0, bias the log-odds of the base rate."""
        device = generator.device
        bias = torch.full((1, 1), math.log(self.base_rate / (1 - self.base_rate)), device=device)
        linear = [torch.zeros(self.features, 1, device=device), bias]
        if not self.rank:
            return linear
        return [0.1 * torch.randn(self.features, self.rank, generator=generator, device=device), *linear]

    def outputs(self, parameters: list[Tensor], observation: Tensor) -> Tensor:
        """(..., points, features) -> (..., points, 1) log-odds of a click."""
        *vectors, weight, bias = parameters
        linear = observation @ weight + bias
        return linear + pairwise(vectors[0], observation) if vectors else linear

    def operations(self) -> int:
        """Multiplications and additions of one prediction, equation (eq-click-fm): order features times rank."""
        return 2 * self.features + self.rank * (4 * self.features + 3)


def pairwise(vectors: Tensor, x: Tensor) -> Tensor:
    """(..., points, 1) sum over i < j of <v_i, v_j> x_i x_j for ``x`` (..., points, features) and vectors (...,
    features, rank), equation (eq-click-fm): features times rank operations, where the double sum takes the square of
    features."""
    together = (x @ vectors) ** 2
    alone = (x * x) @ (vectors * vectors)
    return 0.5 * (together - alone).sum(-1, keepdim=True)


# ----------------------------------------------------------------------------------------------- features
@dataclass(frozen=True)
class FeatureMap:
    """Columns of a table of impressions -> a feature vector of fixed length."""

    one_hot: tuple[tuple[str, int, int], ...]
    """(column, first value, number of values), coded one feature a value; larger values count as the last."""
    hashed: tuple[tuple[str, ...], ...] = ()
    """Groups of columns whose joint value is hashed into a bucket: what a new campaign brings and nobody listed. Two
    values may share a bucket (Weinberger et al. 2009)."""
    buckets: int = 32
    """Features that all hashed groups share."""
    numbers: tuple[str, ...] = ()
    """Columns taken as they are."""

    def __post_init__(self):
        valid = lambda x: (
            isinstance(x, tuple)
            and all(len(c) == 3 and isinstance(c[0], str) and whole(c[1], 0) and whole(c[2], 1, 10_000) for c in x)
        )
        check(self, "one_hot", valid, "(column, first value >= 0, 1 to 10,000 values) for each column")
        groups = lambda x: isinstance(x, tuple) and all(isinstance(g, tuple) and len(g) > 0 for g in x)
        check(self, "hashed", groups, "groups of columns, each a tuple with at least one")
        check(self, "buckets", lambda x: whole(x, 1, 10**5), "a whole number from 1 to 100,000")
        check(self, "numbers", lambda x: isinstance(x, tuple), "a tuple of columns")
        require(0 < self.size <= MOST_FEATURES, "FeatureMap", self.size, f"1 to {MOST_FEATURES:,} features in all")

    @property
    def size(self) -> int:
        """Length of a feature vector."""
        return sum(count for _, _, count in self.one_hot) + self.buckets * bool(self.hashed) + len(self.numbers)

    @property
    def names(self) -> list[str]:
        """What each feature stands for."""
        values = [f"{name} {first + k}" for name, first, count in self.one_hot for k in range(count)]
        hashed = [f"bucket {k}" for k in range(self.buckets)] if self.hashed else []
        return [*values, *hashed, *self.numbers]

    def __call__(self, table: pd.DataFrame) -> Tensor:
        """(rows, features) of a table. Raises ``TableError`` naming column, row and value that cannot be coded."""
        needed = [name for name, _, _ in self.one_hot] + [c for group in self.hashed for c in group] + [*self.numbers]
        if missing := [name for name in dict.fromkeys(needed) if name not in table.columns]:
            raise TableError(f"missing columns {', '.join(missing)}; found: {', '.join(map(str, table.columns))}")
        rows = np.arange(len(table))
        x = np.zeros((len(table), self.size))
        at = 0
        for name, first, count in self.one_hot:
            value = pd.to_numeric(table[name], errors="coerce").astype("float64")
            bad = ~(value >= first) | (value != np.floor(value))
            refuse(table.reset_index(drop=True), (name,), name, bad, "cannot be coded", f"whole numbers >= {first}")
            x[rows, at + np.minimum(value.to_numpy() - first, count - 1).astype(np.int64)] = 1.0
            at += count
        for group in self.hashed:
            code, values = pd.MultiIndex.from_frame(table[list(group)]).factorize()
            words = ["|".join(map(str, value)) for value in values]
            bucket = np.array([zlib.crc32(f"{group}={word}".encode()) % self.buckets for word in words], dtype=np.int64)
            x[rows, at + bucket[code]] += 1.0
        at += self.buckets * bool(self.hashed)
        for name in self.numbers:
            value = pd.to_numeric(table[name], errors="coerce").astype("float64")
            refuse(table.reset_index(drop=True), (name,), name, ~np.isfinite(value), "not finite", "finite numbers")
            x[:, at] = value
            at += 1
        return torch.as_tensor(x, dtype=torch.get_default_dtype())


OPEN_BANDIT = FeatureMap(
    one_hot=(
        ("position", 1, 3),
        ("user_0", 0, 3),
        ("user_1", 0, 5),
        ("user_2", 0, 9),
        ("user_3", 0, 10),
    ),
    hashed=(("campaign", "item"), ("item_1",), ("item_2",), ("item_3",)),
    numbers=("item_0",),
)
"""Features of ``data/open_bandit_impressions.parquet``: position and codes of the user mean the same in all campaigns;
items are hashed, since a new campaign brings new ones. ``history`` is left out: it knows the future."""


# ----------------------------------------------------------------------------------------------- campaigns as tasks
class Window(NamedTuple):
    """A stretch of a campaign's log. Every field is (M,)."""

    id: Tensor
    log: Tensor  # number of the log
    start: Tensor  # its first impression, counted from the log's first


class CampaignLogs:
    """Past campaigns as tasks: an ``ExampleSource`` of stretches of their logs, in the order of time.

    The support is what a stretch begins with, the query what follows it, never before. Impressions with equal features
    are one point (``cell``) with counts where that is shorter, which changes no loss.
    """

    def __init__(self, features: Tensor, cell: Tensor, click: Tensor, lengths: Sequence[int], support: int, query: int):
        """``features`` (cells, features); ``cell`` and ``click`` (impressions,) of all logs one after the other, whose
        lengths are ``lengths``. A stretch is ``support`` and then ``query`` impressions."""
        for name, value in (("support", support), ("query", query)):
            require(whole(value, 1), f"CampaignLogs.{name}", value, "a whole number >= 1")
        lengths = tuple(lengths)
        require(
            len(cell) == len(click) == sum(lengths), "CampaignLogs.lengths", sum(lengths), f"{len(cell)} impressions"
        )
        require(
            len(lengths) > 0 and min(lengths) >= support + query,
            "CampaignLogs.lengths",
            min(lengths, default=0),
            f"at least support + query = {support + query} impressions in every log",
        )
        self.features, self.cell, self.click = features, cell, click.to(features.dtype)
        self.lengths = torch.tensor(lengths)
        self.first = self.lengths.cumsum(0) - self.lengths
        self.support, self.query = support, query

    def tasks(self, task_id: Tensor) -> Window:
        """A stretch for every id (M,): of which log, and where it starts."""
        log = task_id % len(self.lengths)
        places = self.lengths[log] - (self.support + self.query) + 1
        return Window(task_id, log, (task_id // len(self.lengths)) % places)

    def sample(self, tasks: Window, points: int, seed: int | Tensor = 0, episode: int = 0) -> tuple[Tensor, Tensor]:
        """Features (M, points or cells, features) and counts (M, points or cells, 2).

        Episode 0 is the support, any other the query; nothing is random but the stretch, so ``seed`` is not read.
        Raises ``ValueError`` for more points than the stretch has.
        """
        most = self.query if episode else self.support
        require(whole(points, 1, most), "points", points, f"1 to {most}")
        start = self.first[tasks.log] + tasks.start + (self.support if episode else 0)
        rows = start[:, None] + torch.arange(points)
        return gather(self.features, self.cell[rows], self.click[rows])


def gather(features: Tensor, cell: Tensor, click: Tensor) -> tuple[Tensor, Tensor]:
    """Impressions of M tasks as points: features (cells, features), ``cell`` and ``click`` (M, impressions) -> features
    (M, points, features), counts (M, points, 2). Points are cells where there are fewer of them than impressions."""
    if cell.shape[1] < len(features):
        return features[cell], torch.stack((torch.ones_like(click), click), -1)
    return features.expand(len(cell), -1, -1), count_cells(len(features), cell, click)


def count_cells(cells: int, cell: Tensor, click: Tensor) -> Tensor:
    """(M, cells, 2) impressions and clicks of each cell, from ``cell`` and ``click`` (M, impressions)."""
    counts = click.new_zeros(len(cell), cells, 2)
    counts[..., 0].scatter_add_(1, cell, torch.ones_like(click))
    counts[..., 1].scatter_add_(1, cell, click)
    return counts
