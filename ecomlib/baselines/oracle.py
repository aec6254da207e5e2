"""What to do if the task were known: the decisions behind ``oracle_return``, as far as a family's belief can make
them."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from torch import Tensor

from ..families import SegmentBidding
from .bayes import Belief, ParticlePrior, belief
from .bidding import SegmentBelief


class OracleDecisions:
    """The best decision of each of M known tasks, as a function of what is seen.

    For training in a simulator, where hidden parameters are known: they may teach a policy that does not see them
    (decision pretraining, chapter "Memory and belief").
    """

    def __init__(self, family: Any, tasks: Any):
        context = family.context(tasks)
        self.tasks = tasks
        self.belief: Belief = belief(family, prior=ParticlePrior(tasks, context.new_full((len(tasks.id),), 1.0)))
        self.belief.begin(context, 1, 1)

    def __call__(self, observation: Tensor, task: Tensor) -> Tensor:
        """Actions (B, N, ...) for observations (B, N, observation) of the tasks numbered ``task`` (B,) int64."""
        return self.belief.best_for(task[:, None].expand(observation.shape[:2]), observation)


class OracleBids(OracleDecisions):
    """As ``OracleDecisions``; here a particle is a single segment."""

    belief: SegmentBelief

    def __init__(self, family: SegmentBidding, tasks: Any):
        self.belief, self.tasks = belief(family), tasks

    def __call__(self, observation: Tensor, task: Tensor) -> Tensor:
        """As ``OracleDecisions``: bids (B, N, K)."""
        known = (x[task][:, None] for x in (self.tasks.rate, self.tasks.price, self.tasks.spread))
        return self.belief._bid(observation, *known)


@singledispatch
def oracle_decisions(family: Any, tasks: Any) -> OracleDecisions:
    """The ``OracleDecisions`` of a family's tasks. ``TypeError`` for a family without a belief."""
    return OracleDecisions(family, tasks)


@oracle_decisions.register
def _(family: SegmentBidding, tasks: Any) -> OracleBids:
    return OracleBids(family, tasks)
