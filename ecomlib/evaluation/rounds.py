"""What a trial was worth: as a whole, learning included, and after adaptation. Two numbers, to be kept apart."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecomlib.evaluation.statistics import _array, normalised_score
from ecomlib.families.base import require, whole


class TrialScores(NamedTuple):
    """Scores of the parts of a trial, each a ratio of means over its rounds and over tasks, shape ``(...)``."""

    lifetime: float | NDArray[np.float64]
    """All rounds: what the merchant earned, what it cost to learn included."""
    post_adaptation: float | NDArray[np.float64]
    """The rounds after the support rounds only: what it cost to learn is left out."""
    zero_shot: float | NDArray[np.float64]
    """The first round, before any feedback from an earlier one."""
    few_shot: float | NDArray[np.float64]
    """The first round after the support rounds."""
    asymptotic: float | NDArray[np.float64]
    """The last rounds: what the learner has become."""


def trial_scores(
    returns: ArrayLike, blind: ArrayLike, oracle: ArrayLike, support: int = 1, last: int = 1
) -> TrialScores:
    """Score the parts of a trial by name. Chapter "Evaluating adaptive policies", equation (eq-trial-parts).

    ======= =================== ==========================================================================
    Symbol  Shape               Description
    ======= =================== ==========================================================================
    returns (E, ..., task)      return of every round; ``...`` may be training seeds
    blind   (task,), (E, task)  return of the best policy that never uses feedback; (E, task) where it drifts
    oracle  (task,), (E, task)  return of the policy that knows the hidden parameters
    support whole number        rounds that gather the data to adapt to, at least 1 and fewer than E
    last    whole number        rounds that count as the end of the trial, at least 1 and at most E - support
    ======= =================== ==========================================================================

    Raises:
        ValueError: ``support`` or ``last`` out of range, blind or oracle of another shape, or as
            ``normalised_score``.
    """
    value = _array(returns)
    require(value.ndim >= 2, "returns", value.shape, "a shape (E, ..., task)")
    rounds, tasks = value.shape[0], value.shape[-1]
    require(whole(support, 1, rounds - 1), "support", support, f"a whole number from 1 to E - 1 = {rounds - 1}")
    most = rounds - support
    require(whole(last, 1, most), "last", last, f"a whole number from 1 to E - support = {most}")
    ends = []
    for name, given in (("blind", blind), ("oracle", oracle)):
        end = _array(given)
        require(end.shape in ((tasks,), (rounds, tasks)), name, end.shape, f"({tasks},) or ({rounds}, {tasks})")
        ends.append(np.broadcast_to(end, (rounds, tasks)))

    def score(part: slice) -> float | NDArray[np.float64]:
        return normalised_score(value[part].mean(0), ends[0][part].mean(0), ends[1][part].mean(0))

    return TrialScores(
        score(slice(None)),
        score(slice(support, None)),
        score(slice(0, 1)),
        score(slice(support, support + 1)),
        score(slice(rounds - last, None)),
    )
