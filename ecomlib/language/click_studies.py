"""Campaigns held out from a log of several: what may be learned from, adapted to and judged by, in the order of time
(chapter "Click-rate prediction with MAML")."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..families.base import require, whole
from ..learners import MetaTraining, SupervisedMAML
from ..learners.supervised import Examples
from .click_rates import CampaignLogs, click_loss


class Trial(NamedTuple):
    """One log to adapt to and be judged by."""

    name: str
    """policy/campaign."""
    support: Examples
    """The first impressions of the log, with a task axis of 1."""
    query: Examples
    """Later ones."""
    hour: np.ndarray
    """(query,) hour of each."""


class HeldOut(NamedTuple):
    """One campaign held out. No row of ``train`` or ``validation`` is of that campaign, or as late as a test query."""

    train: CampaignLogs
    """Stretches of the other campaigns' logs until the hour ``tuned``."""
    past: np.ndarray
    """Rows of the table in ``train``."""
    validation: list[Trial]
    """The other campaigns' logs: support from before ``tuned``, query between ``tuned`` and ``judged``."""
    test: list[Trial]
    """The held-out campaign's logs: support from before ``judged``, query after it."""


def hold_out(
    table: pd.DataFrame, x: Tensor, campaign: str, support: int, query: int, tuned: int = 72, judged: int = 96
) -> HeldOut:
    """Split a table with columns policy, campaign, hour and click, each log in the order of time, whose rows have the
    features ``x`` (rows, features). Every log is one task; its support are its first ``support`` impressions.

    Raises:
        ValueError: no such campaign, hours out of order, or a log too short for its support and query.
    """
    names = table["policy"].astype(str) + "/" + table["campaign"].astype(str)
    held = (table["campaign"] == campaign).to_numpy()
    require(
        held.any() and not held.all(), "campaign", campaign, f"one of {sorted(set(table['campaign']))}, not the only"
    )
    require(whole(tuned, 1) and whole(judged, tuned + 1), "tuned, judged", (tuned, judged), "0 < tuned < judged")
    hour = table["hour"].to_numpy()
    label = torch.as_tensor(table["click"].to_numpy(dtype=np.float64), dtype=x.dtype)
    counts = torch.stack((torch.ones_like(label), label), -1)

    def trial(name: str, until: int, after: int, before: int) -> Trial:
        rows = np.flatnonzero(names == name)
        require((np.diff(hour[rows].astype(int)) >= 0).all(), "hour", name, "rows of each log in the order of time")
        first = rows[hour[rows] < until][:support]
        later = rows[(hour[rows] >= after) & (hour[rows] < before)]
        require(len(first) == support, "support", support, f"at most {len(first)}, the impressions of {name} by then")
        require(len(later) > 0, "hour", name, "impressions in the hours to be judged by")
        pick = lambda rows: Examples(x[rows][None], counts[rows][None])
        return Trial(name, pick(first), pick(later), hour[later])

    others = list(dict.fromkeys(names[~held]))
    past = np.concatenate([np.flatnonzero((names == name) & (hour < tuned)) for name in others])
    lengths = [int(((names == name) & (hour < tuned)).sum()) for name in others]
    rows = torch.as_tensor(past)
    train = CampaignLogs(x[rows], torch.arange(len(rows)), label[rows], lengths, support, query)
    validation = [trial(name, tuned, tuned, judged) for name in others]
    end = int(hour.max()) + 1
    return HeldOut(train, past, validation, [trial(n, judged, judged, end) for n in dict.fromkeys(names[held])])


def adapted_rates(learner: SupervisedMAML, meta: list[Tensor], support: Examples, x: Tensor, steps: int | None = None):
    """(M, points) click rates of ``x`` (M, points, features) after adapting to the support; after ``steps`` inner steps
    where given, 0 for the start."""
    phi = learner.train_task(meta, support, steps)[-1]
    with torch.no_grad():
        return torch.sigmoid(learner.network.outputs(phi, x)[..., 0])


def validation_loss(learner: SupervisedMAML, meta: list[Tensor], trials: list[Trial]) -> float:
    """Mean log-loss of an impression of the trials' queries after adapting to their supports; without adapting for a
    learner that is judged by its start (``stage_weights``)."""
    steps = 0 if learner.stage_weights[0] else None
    total = count = 0.0
    for trial in trials:
        phi = learner.train_task(meta, trial.support, steps)[-1]
        with torch.no_grad():
            loss = click_loss(learner.network.outputs(phi, trial.query.x), trial.query.y)
        total, count = total + float(loss.sum()) * trial.query.y.shape[1], count + trial.query.y.shape[1]
    return total / count


class Stopped(NamedTuple):
    """Meta-training that was stopped in time."""

    meta: list[Tensor]
    iteration: int
    losses: list[tuple[int, float]]
    """(iteration, validation loss)."""


def train_until_best(learner: SupervisedMAML, held: HeldOut, seed: int, iterations: int, every: int = 5) -> Stopped:
    """Meta-train on the past, keep the meta-parameters with the least loss on the validation, the start included."""
    require(whole(every, 1), "every", every, "a whole number >= 1")
    best: list = []
    losses: list[tuple[int, float]] = []

    def look(state: MetaTraining) -> None:
        if state.iteration % every == 0:
            loss = validation_loss(learner, state.meta, held.validation)
            if not losses or loss < min(value for _, value in losses):
                best[:] = [state.meta, state.iteration]
            losses.append((state.iteration, loss))

    look(MetaTraining(0, learner.initial(torch.Generator().manual_seed(seed)), None, []))
    learner.meta_train(held.train, seed, iterations, progress=False, callback=look)
    return Stopped(best[0], best[1], losses)
