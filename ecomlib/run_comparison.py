"""Runs against each other on the same tasks with the same luck (chapter "Running experiments")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .environment import environment
from .evaluation.jackknife import ratio_interval
from .evaluation.statistics import Interval, paired_difference
from .families.base import require
from .run_evaluation import evaluate_run
from .run_results import Evaluation, EvaluationConfig
from .runs import Run


class Difference(NamedTuple):
    """Score of a run less that of the first one, both after their last inner step."""

    over_seeds: Interval | None
    """Had both been trained with other seeds: paired where the seeds are the same, else Welch's; None where a run has
    one seed."""
    paired: bool
    over_tasks: Interval | None
    """Had these trained policies met other tasks of the distribution: always paired. None where not two tasks are left
    that diverged in neither run."""


class Comparison(NamedTuple):
    """Evaluations of at least two runs on one split."""

    evaluations: tuple[Evaluation, ...]

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Each run after the first, less the first."""
        return tuple(difference(self.evaluations[0], other) for other in self.evaluations[1:])

    def description(self) -> dict[str, Any]:
        """As JSON."""
        ends = lambda x: None if x is None else x._asdict()
        first = self.evaluations[0]
        return {
            "format": "ecomlib comparison",
            "version": 1,
            "family": first.config.family_name,
            "split": first.split,
            "tasks": len(first.ids),
            "luck": first.settings.luck,
            "runs": [
                {
                    "run": str(e.run),
                    "algorithm": e.config.algorithm,
                    "config": e.hash,
                    "finished": e.finished,
                    "inner steps": e.steps,
                    "support episodes of a task": e.steps * e.episodes,
                    "by seed": {
                        str(seed): {"score": float(score) if np.isfinite(score) else None, **checkpoint}
                        for seed, score, checkpoint in zip(e.seeds, e.scores()[:, -1], e.checkpoints)
                    },
                    "over tasks": ends(score_over_tasks(e)),
                }
                for e in self.evaluations
            ],
            "differences from the first": [
                {"over seeds": ends(d.over_seeds), "seeds are paired": d.paired, "over tasks": ends(d.over_tasks)}
                for d in self.differences
            ],
            "environment": environment(first.settings.on),
        }


def compare_runs(
    paths: Sequence[str | Path], name: str, settings: EvaluationConfig, progress: bool = True
) -> Comparison:
    """Evaluate at least two runs on the split ``name``; each takes as many inner steps as in training.

    Raises ``ValueError`` naming the field of the task family in which two runs differ, and as ``evaluate_run``.
    """
    require(len(paths) >= 2, "runs", len(paths), "at least 2")
    first = Run.open(paths[0]).config
    for path in paths[1:]:
        other = Run.open(path).config
        for field in ("family_name", "family"):
            _require_same(getattr(first, field), getattr(other, field), field, paths[0], path)
    return Comparison(tuple(evaluate_run(path, name, settings, progress) for path in paths))


def difference(a: Evaluation, b: Evaluation) -> Difference:
    """Score of ``b`` less that of ``a``; both must hold the same tasks."""
    require(np.array_equal(a.ids, b.ids), "tasks", "others in b than in a", "the same ones")
    one, two = a.scores()[:, -1], b.scores()[:, -1]
    paired = a.seeds == b.seeds
    finite = np.isfinite(one).all() and np.isfinite(two).all()
    over_seeds = None
    if min(len(one), len(two)) > 1 and finite:
        over_seeds = paired_difference(two, one) if paired else welch_interval(two, one)
    kept = ~(a.diverged[:, -1].any(0) | b.diverged[:, -1].any(0))
    blind, oracle = (x[-1] for x in a.ends)
    gap = oracle - blind
    gain = b.returns[:, -1].mean(0) - a.returns[:, -1].mean(0)
    over_tasks = ratio_interval(gain[kept], gap[kept]) if kept.sum() > 1 else None
    return Difference(over_seeds, paired, over_tasks)


def score_over_tasks(found: Evaluation) -> Interval | None:
    """Score after the last inner step, with its interval over tasks."""
    return next(r.over_tasks for r in found.rows() if r.policy == found.name and r.step == found.steps)


def welch_interval(a: NDArray[np.float64], b: NDArray[np.float64], level: float = 0.95) -> Interval:
    """Welch's interval for the difference of two means, from samples that are not paired; ``n`` is the smaller size."""
    found = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    return Interval(float(a.mean() - b.mean()), float(found.low), float(found.high), min(len(a), len(b)))


def _require_same(one: Any, two: Any, name: str, first: str | Path, other: str | Path) -> None:
    if is_dataclass(one) and type(one) is type(two):
        for f in fields(one):
            _require_same(getattr(one, f.name), getattr(two, f.name), f"{name}.{f.name}", first, other)
    elif one != two:
        raise ValueError(
            f"{name} = {one} in {first} and {two} in {other}: runs are compared on the same tasks, so they must have "
            "the same task family"
        )
