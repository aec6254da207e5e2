"""Returns after 0, 1, ..., K inner steps on held-out tasks: the adaptation curve of Finn, Abbeel and Levine (2017)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..families.base import TaskFamily, require, whole
from ..learners.maml import MAML
from ..rollout import Trajectories


class AdaptationReturns(NamedTuple):
    """What adaptation is worth to each task. Chapter "Meta-reinforcement learning"."""

    returns: Tensor
    """(K + 1, M) mean return of the episodes collected after k steps; those of k < K are the support of step k + 1."""
    diverged: Tensor
    """(K + 1, M) bool: some parameter of the task is not finite, so its return means nothing."""

    @property
    def mean(self) -> Tensor:
        """(K + 1,) mean over the tasks that have not diverged: to be stated with ``diverged_share``."""
        kept = torch.where(self.diverged, torch.zeros_like(self.returns), self.returns)
        return kept.sum(-1) / (~self.diverged).sum(-1)

    @property
    def diverged_share(self) -> Tensor:
        """(K + 1,) share of the tasks that have diverged."""
        return self.diverged.to(self.returns.dtype).mean(-1)


def adaptation_returns(
    learner: MAML, meta: list[Tensor], family: TaskFamily, tasks: Any, steps: int, seed: int, episode: int = 0
) -> AdaptationReturns:
    """Adapt to M held-out tasks by ``steps`` inner steps, which may be more than in training, and count all returns.

    The return after k steps is that of the episodes collected with phi_k, which no step up to then has seen.
    ``episode`` numbers the first round of episodes.
    """
    require(whole(steps, 0), "steps", steps, "a whole number >= 0")
    phi, support = learner.train_task(meta, family, tasks, seed, steps, episode)
    data = [stage.data for stage in support]
    data.append(learner.evaluate_task(phi[-1], family, tasks, seed, episode + steps))
    adapts = learner.inner.adapts(phi[0])
    diverged = torch.stack([torch.stack([~p[i].isfinite().flatten(1).all(1) for i in adapts]).any(0) for p in phi])
    return AdaptationReturns(torch.stack([_mean_return(d) for d in data]), diverged)


def _mean_return(data: Trajectories) -> Tensor:
    """(M,) over the episodes that count: where episodes are counted in transitions, some of a task's are spare."""
    return data.returns.sum(-1) / data.mask[0].sum(-1)
