"""Few-shot classification tasks over vectors of texts, for ``SupervisedMAML`` and for the methods that need no
training (chapter "Language applications")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .. import noise as noise_
from ..families.base import require, whole
from ..networks import MLP

Pools = Sequence[Sequence[Sequence[int]]]
"""Rows of the vectors: ``pools[group][kind]``; every group has as many kinds."""


class TextTasksDrawn(NamedTuple):
    """M tasks."""

    id: Tensor  # (M,)
    group: Tensor  # (M,) which group the kinds are of
    kinds: Tensor  # (M, ways) which kinds are told apart; place = class


class TextTasks:
    """N-way k-shot tasks: tell ``ways`` kinds of text apart from k examples of each.

    Support rows (episode 0) and query rows (any other) come from different pools, so that a query may be in wordings
    that no support has: hand equal supports to all inner steps (``same_support``, the default).
    """

    def __init__(self, vectors: Tensor, support: Pools, query: Pools, ways: int, draw: bool = True):
        """``vectors`` (rows, size). With ``draw`` the kinds of a task are drawn and put in random order (intents), else
        they are the first ``ways`` kinds in their own order (sentiments of a topic)."""
        require(vectors.dim() == 2, "vectors", tuple(vectors.shape), "a tensor (rows, size)")
        require(len(support) == len(query) > 0, "query", len(query), f"as many groups as support, {len(support)}")
        kinds = {len(kinds) for kinds in (*support, *query)}
        require(len(kinds) == 1, "kinds", sorted(kinds), "the same number in every group and pool")
        require(whole(ways, 2, min(kinds)), "ways", ways, f"a whole number in 2..{min(kinds)}")
        self.vectors, self.ways, self.draw = vectors, ways, draw
        self.support, self.query = (_padded(pools, len(vectors)).to(vectors.device) for pools in (support, query))

    def tasks(self, task_id: Tensor) -> TextTasksDrawn:
        """The tasks named by ``task_id`` (M,): a function of the id alone."""
        groups, kinds = self.support.shape[:2]
        one = torch.zeros(1, dtype=torch.int64, device=task_id.device)
        uniforms = noise_.uniform(0, task_id, one, 0, 0, noise_.PRIOR, 1 + kinds)[:, 0]
        drawn = uniforms[:, 1:].argsort(-1) if self.draw else torch.arange(kinds).expand(len(task_id), kinds)
        return TextTasksDrawn(task_id, (uniforms[:, 0] * groups).long(), drawn[:, : self.ways].to(task_id.device))

    def sample(self, tasks: TextTasksDrawn, points: int, seed: int | Tensor, episode: int = 0) -> tuple[Tensor, Tensor]:
        """Vectors (M, points, size) and classes (M, points): ``points`` / ways of each class, none twice.

        Raises ValueError where ``points`` is no multiple of the ways, or a pool has fewer rows.
        """
        require(whole(points, 1) and points % self.ways == 0, "points", points, f"a multiple of ways = {self.ways}")
        pool = (self.support if episode == 0 else self.query)[tasks.group[:, None], tasks.kinds]  # (M, ways, size)
        each, least = points // self.ways, int((pool >= 0).sum(-1).min())
        require(each <= least, "points", points, f"at most {least} of each class: so many rows has a pool")
        kinds = torch.arange(self.ways, device=tasks.id.device)
        luck = noise_.uniform(seed, tasks.id, kinds, episode, 0, noise_.FAMILY, pool.shape[-1], torch.float64)
        place = torch.where(pool >= 0, luck, 2.0).argsort(-1)[..., :each]
        rows = pool.gather(-1, place).flatten(1)
        return self.vectors[rows], kinds.repeat_interleave(each).expand(len(rows), points)


def _padded(pools: Pools, rows: int) -> Tensor:
    """(groups, kinds, size) rows, -1 where a pool has no more."""
    size = max(len(kind) for group in pools for kind in group)
    table = torch.full((len(pools), len(pools[0]), size), -1)
    for g, group in enumerate(pools):
        for k, kind in enumerate(group):
            require(len(kind) > 0, f"pools[{g}][{k}]", len(kind), "at least one row")
            table[g, k, : len(kind)] = torch.as_tensor(list(kind))
    require(int(table.max()) < rows, "pools", int(table.max()), f"rows below {rows}")
    return table


# ----------------------------------------------------------------------------------------------- with training
class ProjectedHead(MLP):
    """A linear map of the vectors and a linear head on it, which start as the identity and as zero.

    One inner step of the head (``Inner(adapted=network.head)``, ANIL) from that start is the nearest-mean rule:
    equation (eq-one-step-prototype). So meta-training begins at a good classical method.
    """

    def __init__(self, size: int, ways: int):
        require(whole(size, 1, 10_000), "size", size, "a whole number in 1..10,000")
        super().__init__((size, size, ways), lambda hidden: hidden)

    def initial(self, generator: Generator) -> list[Tensor]:
        """Identity and zeros; nothing is drawn."""
        size, _, ways = self.sizes
        zeros = lambda *shape: torch.zeros(*shape, device=generator.device)
        return [torch.eye(size, device=generator.device), zeros(1, size), zeros(size, ways), zeros(1, ways)]


# ----------------------------------------------------------------------------------------------- without training
def class_means(x: Tensor, y: Tensor, ways: int) -> Tensor:
    """(M, ways, size) mean vector of each class from support (M, points, size) and classes (M, points)."""
    member = torch.nn.functional.one_hot(y, ways).to(x.dtype)
    return member.mT @ x / member.sum(1)[..., None]


def prototype_scores(x: Tensor, y: Tensor, query: Tensor, ways: int) -> Tensor:
    """(M, queries, ways) minus the squared distance to each class's mean, equation (eq-prototype) (Snell, Swersky and
    Zemel 2017)."""
    return -(torch.cdist(query, class_means(x, y, ways)) ** 2)


def neighbour_scores(x: Tensor, y: Tensor, query: Tensor, ways: int) -> Tensor:
    """(M, queries, ways) inner product with the nearest support vector of each class."""
    similarity = query @ x.mT
    other = y[:, None, :, None] != torch.arange(ways, device=y.device)
    return similarity[..., None].masked_fill(other, -torch.inf).amax(2)


def ridge_scores(x: Tensor, y: Tensor, query: Tensor, ways: int, penalty: float = 1.0) -> Tensor:
    """(M, queries, ways) of ridge regression on centred classes, solved in the space of the few examples."""
    target = torch.nn.functional.one_hot(y, ways).to(x.dtype) - 1 / ways
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return query @ x.mT @ torch.linalg.solve(x @ x.mT + penalty * identity, target)


def accuracy(scores: Tensor, y: Tensor) -> Tensor:
    """(M,) share of queries whose highest score is that of their class."""
    return (scores.argmax(-1) == y).to(torch.get_default_dtype()).mean(-1)
