"""What the evaluation of a run found: scores with intervals, as a table, as JSON and as arrays (chapter "Running
experiments")."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .configuration import TrainConfig
from .environment import environment
from .evaluation.jackknife import ratio_interval
from .evaluation.statistics import Interval, normalised_score, t_interval
from .families.base import check, number, whole
from .files import write_atomically, write_json
from .runs import Run


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation depends on, besides the run and the split."""

    tasks: int = 500
    """Tasks: the first so many of the split's fixed list."""
    steps: int | None = None
    """Inner steps; None is as many as in training."""
    episodes: int | None = None
    """Episodes of each task and round, all paid for; None is as in training."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint. The best is that of the best training score: where seeds are few, a lucky peak."""
    luck: int = 0
    """Seed of all chance in the evaluation: the same for all policies."""
    pace: float = 0.1
    """Of the split drifting: how far a hidden parameter walks from one round to the next, as a standard deviation in
    quantiles of the prior."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self):
        check(self, "tasks", lambda x: whole(x, 2), "a whole number >= 2")
        check(self, "steps", lambda x: x is None or whole(x, 0), "None or a whole number >= 0")
        check(self, "episodes", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")
        check(self, "luck", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2147483648")
        check(self, "pace", lambda x: number(x) and x >= 0, "a finite number >= 0")
        missing = self.device == "cuda" and not torch.cuda.is_available()
        check(self, "device", lambda x: not missing, "auto or cpu: this machine has no GPU that torch can use")

    @property
    def on(self) -> str:
        """The device of torch."""
        return "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"


class Row(NamedTuple):
    """A policy in a round of episodes."""

    policy: str
    step: int
    """Inner steps before the round; for a baseline, rounds before it."""
    value: float
    """Mean return of an episode, over seeds and tasks."""
    score: float
    """0 is the best policy that never adapts, 1 the oracle; the mean over seeds of ratios of means over tasks."""
    over_seeds: Interval | None
    """Of the score, for other training seeds on these tasks; None with fewer than 2."""
    over_tasks: Interval | None
    """Of the score, for other tasks of the distribution with these trained policies; None for blind and oracle."""
    seeds: int
    diverged: float
    """Share of tasks whose adapted parameters are not finite. They are left out of this row."""


class Lifetime(NamedTuple):
    """A policy over all rounds of the trial together: what was earned while learning."""

    policy: str
    score: float
    """Ratio of means over tasks of the sums over rounds, mean over seeds."""
    over_seeds: Interval | None
    """As in ``Row``."""
    over_tasks: Interval | None
    """As in ``Row``."""


class LeadOverBaseline(NamedTuple):
    """Lifetime score of the run less that of a baseline on the same tasks with the same luck."""

    baseline: str
    over_seeds: Interval | None
    """Had the run been trained with other seeds; None with fewer than 2."""
    over_tasks: Interval | None
    """On other tasks of the distribution; None where fewer than two tasks did not diverge."""


@dataclass(frozen=True)
class Evaluation:
    """A run's returns on a split. Everything is float64; S seeds, K inner steps, M tasks."""

    run: Path
    config: TrainConfig
    hash: str
    settings: EvaluationConfig
    split: str
    steps: int
    episodes: int
    """Of a round; a family that counts transitions plays at least so many."""
    seeds: tuple[int, ...]
    checkpoints: tuple[dict[str, Any], ...]
    """Of each seed: iteration, file, SHA-256."""
    missing: tuple[int, ...]
    """Seeds of the run that have no checkpoint yet."""
    ids: NDArray[np.int64]
    blind: NDArray[np.float64]
    """(M,) expected return of the best policy that never adapts; (K + 1, M) where tasks drift."""
    oracle: NDArray[np.float64]
    """(M,) expected return of the policy that knows the task; (K + 1, M) where tasks drift."""
    returns: NDArray[np.float64]
    """(S, K + 1, M) mean return of the round after k inner steps."""
    diverged: NDArray[np.bool_]
    """(S, K + 1, M)."""
    baselines: dict[str, NDArray[np.float64]]
    """Classical policies, (K + 1, M): mean return of the round after k rounds. They learn within a round, too."""

    @property
    def finished(self) -> bool:
        """Whether every seed was trained to the end."""
        return not self.missing and all(c["iteration"] == self.config.iterations for c in self.checkpoints)

    @property
    def name(self) -> str:
        """The algorithm, as on the command line."""
        return self.config.algorithm

    def scores(self) -> NDArray[np.float64]:
        """(S, K + 1); nan where all tasks diverged."""
        shape = self.returns.shape[:2]
        return np.array([self._score(*index) for index in np.ndindex(shape)]).reshape(shape)

    def _score(self, seed: int, step: int) -> float:
        kept = ~self.diverged[seed, step]
        if not kept.any():
            return math.nan
        blind, oracle = self.ends
        return normalised_score(self.returns[seed, step, kept], blind[step, kept], oracle[step, kept])

    @property
    def ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Blind and oracle returns in every round, each (K + 1, M)."""
        shape = self.returns.shape[1:]
        return np.broadcast_to(self.blind, shape), np.broadcast_to(self.oracle, shape)

    def _whole_trial(self) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
        """(M,) tasks that never diverged with any seed; of those, sums over rounds of (S, M) gain and (M,) gap."""
        kept = ~self.diverged.any((0, 1))
        blind, oracle = self.ends
        return kept, (self.returns - blind)[..., kept].sum(1), (oracle - blind)[:, kept].sum(0)

    def lifetimes(self) -> list[Lifetime]:
        """The run's score over all rounds, then the baselines'. Of the run, tasks that diverged in any round are left
        out of it."""
        kept, gain, gap = self._whole_trial()
        found = [Lifetime(self.name, math.nan, None, None)]
        if kept.sum() > 1:
            by_seed = gain.sum(-1) / gap.sum()
            over_seeds = t_interval(by_seed) if len(by_seed) > 1 else None
            over_tasks = ratio_interval(gain.mean(0), gap)
            found = [Lifetime(self.name, float(by_seed.mean()), over_seeds, over_tasks)]
        blind, oracle = self.ends
        for name, values in self.baselines.items():
            over_tasks = ratio_interval((values - blind).sum(0), (oracle - blind).sum(0))
            found.append(Lifetime(name, over_tasks.estimate, None, over_tasks))
        return found

    def leads(self) -> list[LeadOverBaseline]:
        """The run's lifetime score less each baseline's, paired by task and luck."""
        kept, gain, gap = self._whole_trial()
        found = []
        for name, values in self.baselines.items():
            over_seeds = over_tasks = None
            if kept.sum() > 1:
                lead = gain - (values - self.ends[0])[:, kept].sum(0)
                by_seed = lead.sum(-1) / gap.sum()
                over_seeds = t_interval(by_seed) if len(by_seed) > 1 else None
                over_tasks = ratio_interval(lead.mean(0), gap)
            found.append(LeadOverBaseline(name, over_seeds, over_tasks))
        return found

    def cost(self) -> dict[str, float]:
        """What training took, up to the checkpoint's iteration: wall seconds of all seeds together, and the steps and
        episodes that one seed played (episodes are not known where a family counts transitions)."""
        done = {seed: c["iteration"] for seed, c in zip(self.seeds, self.checkpoints)}
        rows = [r for r in Run.open(self.run).metrics() if r["iteration"] <= done.get(r["seed"], 0)]
        batch = {seed: len(group) for group in self.config.groups for seed in group}
        steps = sum(r["steps"] for r in rows) / len(done)
        data = self.config.data
        return {
            "training seconds": sum(r["seconds"] / batch[r["seed"]] for r in rows),
            "training steps": steps,
            "training episodes": None if data.transitions else steps / self.config.family.horizon,
        }

    def rows(self) -> list[Row]:
        """Blind, the run after 0, ..., K steps, the baselines in the same rounds, oracle."""
        (blind, oracle), scores = self.ends, self.scores()
        gap = oracle - blind
        rows = [Row("blind", 0, self.blind.mean(), 0.0, None, None, 0, 0.0)]
        for k in range(self.steps + 1):
            kept = ~self.diverged[:, k].any(0)
            returns = np.where(kept, self.returns[:, k], 0.0).sum(-1) / max(1, kept.sum())
            several = len(self.seeds) > 1 and np.isfinite(scores[:, k]).all()
            over_tasks = None
            if kept.sum() > 1:
                over_tasks = ratio_interval((self.returns[:, k].mean(0) - blind[k])[kept], gap[k, kept])
            rows.append(
                Row(
                    self.name,
                    k,
                    float(returns.mean()) if kept.any() else math.nan,
                    float(scores[:, k].mean()),
                    t_interval(scores[:, k]) if several else None,
                    over_tasks,
                    len(self.seeds),
                    float(self.diverged[:, k].mean()),
                )
            )
        for name, values in self.baselines.items():
            for k, value in enumerate(values):
                over_tasks = ratio_interval(value - blind[k], gap[k])
                rows.append(Row(name, k, value.mean(), over_tasks.estimate, None, over_tasks, 0, 0.0))
        return [*rows, Row("oracle", 0, self.oracle.mean(), 1.0, None, None, 0, 0.0)]

    def description(self) -> dict[str, Any]:
        """Everything but the returns of single tasks, as JSON."""
        scores = self.scores()
        plain = lambda x: None if x is None or not math.isfinite(x) else float(x)
        ends = lambda x: None if x is None else {"low": plain(x.low), "high": plain(x.high), "n": x.n}
        by_seed = {
            str(seed): checkpoint
            | {
                "score": [plain(x) for x in scores[i]],
                "return": [
                    plain(np.mean(r[~d])) if not d.all() else None for r, d in zip(self.returns[i], self.diverged[i])
                ],
                "diverged": self.diverged[i].mean(-1).tolist(),
            }
            for i, (seed, checkpoint) in enumerate(zip(self.seeds, self.checkpoints))
        }
        return {
            "format": "ecomlib evaluation",
            "version": 1,
            "family": self.config.family_name,
            "algorithm": self.config.algorithm,
            "config": self.hash,
            "split": self.split,
            "tasks": len(self.ids),
            "inner steps": self.steps,
            "episodes of a round": self.episodes,
            "luck": self.settings.luck,
            **({"pace": self.settings.pace} if self.split == "drifting" else {}),
            "checkpoint": self.settings.checkpoint,
            "finished": self.finished,
            "seeds without a checkpoint": list(self.missing),
            "score": "0: best policy that never adapts, 1: oracle; ratio of means over tasks, mean over seeds",
            "over seeds": "95 % Student's t over training seeds, these tasks",
            "over tasks": "95 % jackknife over tasks, these trained policies",
            "rows": [
                {
                    "policy": r.policy,
                    "step": r.step,
                    "return": plain(r.value),
                    "score": plain(r.score),
                    "over seeds": ends(r.over_seeds),
                    "over tasks": ends(r.over_tasks),
                    "seeds": r.seeds,
                    "diverged": r.diverged,
                }
                for r in self.rows()
            ],
            "lifetime": [
                {
                    "policy": x.policy,
                    "score": plain(x.score),
                    "over seeds": ends(x.over_seeds),
                    "over tasks": ends(x.over_tasks),
                }
                for x in self.lifetimes()
            ],
            "lifetime less a baseline's": [
                {
                    "baseline": x.baseline,
                    "difference": None if x.over_tasks is None else x.over_tasks.estimate,
                    "over seeds": ends(x.over_seeds),
                    "over tasks": ends(x.over_tasks),
                }
                for x in self.leads()
            ],
            "cost": self.cost(),
            "by seed": by_seed,
            "environment": environment(self.settings.on),
        }

    def save(self) -> list[Path]:
        """Write ``evaluation-SPLIT.json`` and, with the returns of every task, ``evaluation-SPLIT.npz`` (arrays only,
        to be read with ``allow_pickle=False``) into the run's folder."""
        arrays = {"id": self.ids, "blind": self.blind, "oracle": self.oracle}
        arrays |= {"seed": np.array(self.seeds), "return": self.returns, "diverged": self.diverged}
        arrays |= {f"return of {name}": values for name, values in self.baselines.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        stem = self.run / f"evaluation-{self.split}"
        write_atomically(stem.with_suffix(".npz"), buffer.getvalue())
        write_json(stem.with_suffix(".json"), self.description())
        return [stem.with_suffix(".json"), stem.with_suffix(".npz")]
