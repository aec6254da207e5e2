"""Scores of adaptive agents by episode of the trial, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Generator

from ecomlib.evaluation.statistics import Interval, normalised_score, paired_difference, t_interval
from ecomlib.families.base import TaskFamily, sample_tasks
from ecomlib.rollout import Agent, trial


class AdaptationCurves(NamedTuple):
    """Scores of several agents on the same tasks with the same luck: 0 is the blind policy, 1 the oracle."""

    by_episode: dict[str, NDArray[np.float64]]
    """Agent -> (seeds, E), score of each episode of the trial."""
    lifetime: dict[str, NDArray[np.float64]]
    """Agent -> (seeds,), score of the return of the whole trial: what the merchant earned while learning."""

    def table(self, level: float = 0.95, interval: Callable[..., Interval] = t_interval) -> pd.DataFrame:
        """Long table with columns agent, episode (1..E), score, low, high, n (seeds)."""
        rows = []
        for agent, scores in self.by_episode.items():
            for episode, values in enumerate(scores.T, 1):
                estimate = interval(values, level)
                rows.append((agent, episode, estimate.estimate, estimate.low, estimate.high, len(values)))
        return pd.DataFrame(rows, columns=["agent", "episode", "score", "low", "high", "n"])

    def lifetime_table(self, level: float = 0.95, interval: Callable[..., Interval] = t_interval) -> pd.DataFrame:
        """One row an agent: lifetime score, low, high, n."""
        rows = {agent: (*interval(values, level)[:3], len(values)) for agent, values in self.lifetime.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["score", "low", "high", "n"]).rename_axis("agent")

    def difference(self, a: str, b: str, level: float = 0.95) -> Interval:
        """Lifetime score of agent ``a`` minus that of ``b``, paired by seed: same tasks, same shoppers."""
        for name in (a, b):
            if name not in self.lifetime:
                raise KeyError(f"no agent {name!r}; there are {', '.join(self.lifetime)}")
        return paired_difference(self.lifetime[a], self.lifetime[b], level)


def adaptation_curves(
    family: TaskFamily,
    agents: Mapping[str, Agent],
    episodes_per_trial: int,
    tasks: int,
    seeds: Sequence[int],
    replicas: int = 1,
    expected: bool = False,
    progress: bool = True,
    device: str = "cpu",
) -> AdaptationCurves:
    """Run every agent through the same trials and score them.

    A seed is a fresh draw of ``tasks`` products from the family's prior *and* of their shoppers, so an interval over
    seeds covers both. Within a seed all agents meet the same tasks with the same uniforms. The score of a seed is a
    ratio of means over tasks (chapter "Introduction"). ``replicas`` independent copies of every trial are averaged
    first.
    """
    if len(set(seeds)) < 2:
        raise ValueError(f"seeds = {list(seeds)}: an interval needs at least 2 different seeds")
    by_episode = {name: [] for name in agents}
    lifetime = {name: [] for name in agents}
    for seed in seeds:
        drawn = sample_tasks(family, tasks, Generator().manual_seed(seed), device)
        blind, oracle = family.blind_return(drawn).cpu(), family.oracle_return(drawn).cpu()
        for name, agent in agents.items():
            done = trial(family, drawn, agent, episodes_per_trial, replicas, seed, progress)
            reward = family.mean_reward(drawn, done.action) if expected else done.reward
            returns = reward.sum(1).mean(-1).cpu()
            by_episode[name].append([normalised_score(episode, blind, oracle) for episode in returns])
            lifetime[name].append(normalised_score(returns.mean(0), blind, oracle))
    return AdaptationCurves(
        {name: np.array(values) for name, values in by_episode.items()},
        {name: np.array(values) for name, values in lifetime.items()},
    )
