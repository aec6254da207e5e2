"""A training run on held-out tasks: returns and scores after every inner step, next to classical baselines on the same
tasks with the same luck (chapter "Running experiments")."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .baselines import GreedyBayes, Thompson
from .configuration import TrainConfig
from .evaluation.adaptation import AdaptationReturns, adaptation_returns
from .families.base import TaskFamily, require, split, take
from .learners import MAML, MAMLConfig
from .learners.rl2 import RL2Config
from .machine import precision
from .policies import Policy
from .rollout import Agent, Trajectories, rollout, trial
from .run_results import Evaluation, EvaluationConfig
from .runs import LoadedRun, Run, RunError, load_run

Drift = Callable[[Tensor, int], Any]
"""(task ids, episode of the trial) -> what the tasks are in it."""
STEPS_AT_ONCE = 200_000
"""Environment steps of a round that are in memory at a time; a result does not depend on it beyond rounding."""


# ------------------------------------------------------------------------------------------------- evaluation
def evaluate_run(path: str | Path, name: str, settings: EvaluationConfig, progress: bool = True) -> Evaluation:
    """Adapt every seed's policy to the tasks of the split ``name``.

    All seeds and all baselines meet the same tasks, and on the same day of the same episode the same uniform decides.
    The split "drifting" is that of ``test`` with hidden parameters that walk between rounds (``Prior.drifted``).
    Raises ``RunError`` for a folder without a run or without any checkpoint, ``CheckpointError`` for a damaged file,
    ``ValueError`` for an unknown split.
    """
    run = Run.open(path)
    loaded, missing = load_seeds(run, settings)
    config = run.config
    data = config.data
    if settings.episodes is not None:
        data = replace(data, episodes=settings.episodes, transitions=None)
    if remembers := isinstance(config.outer, RL2Config):
        learner, steps = config.learner(), config.outer.episodes - 1
        episodes = config.outer.units if settings.episodes is None else settings.episodes
    else:
        learner, steps = replace(config, data=data).learner(), config.inner.steps
        episodes = data.episodes if data.transitions is None else math.ceil(data.transitions / config.family.horizon)
    steps = steps if settings.steps is None else settings.steps
    with precision(config.dtype):
        drifting = name == "drifting"
        family, tasks = split(config.family, "test" if drifting else name, settings.tasks, settings.on)
        drift = None
        if drifting:
            require(hasattr(family, "drifted"), "split", name, f"another one: {config.family_name} does not drift")
            drift = lambda ids, episode: family.drifted(ids, episode, settings.pace)
            if not remembers:
                learner = MAML(learner.policy, learner.inner, learner.outer, drifting_collection(learner.config, drift))
        found = []
        for one in loaded:
            meta = [p.to(settings.on) for p in one.meta]
            bar = tqdm(total=settings.tasks, desc=f"{name}, seed {one.seed}", unit="task", disable=not progress)
            with bar:
                if remembers:
                    agent, luck = learner.agent(meta), settings.luck
                    returns = agent_returns(agent, family, tasks, steps, episodes, luck, bar.update, drift)
                    found.append(AdaptationReturns(returns, torch.zeros_like(returns, dtype=torch.bool)))
                else:
                    found.append(returns_by_step(learner, meta, family, tasks, steps, settings.luck, bar.update))
        # Without inner steps no episode tells the policy of another one, so the baselines learn from their own alone.
        classical = baselines(config, stores=config.outer.pooled if remembers else steps > 0)
        array = lambda x: x.cpu().double().numpy()
        by_name = {}
        for title, agent in classical.items():
            bar = tqdm(total=settings.tasks, desc=f"{name}, {title}", unit="task", disable=not progress)
            with bar:
                returns = agent_returns(agent, family, tasks, steps, episodes, settings.luck, bar.update, drift)
                by_name[title] = array(returns)
        rounds = [drift(tasks.id, k) for k in range(steps + 1)] if drift else [tasks]
        blind, oracle = (
            torch.stack([value(now) for now in rounds]) for value in (family.blind_return, family.oracle_return)
        )
        blind, oracle = (array(x if drift else x[0]) for x in (blind, oracle))
    return Evaluation(
        Path(path),
        config,
        run.hash,
        settings,
        name,
        steps,
        episodes,
        tuple(one.seed for one in loaded),
        tuple(_provenance(run, one) for one in loaded),
        missing,
        tasks.id.cpu().numpy(),
        blind,
        oracle,
        np.stack([array(f.returns) for f in found]),
        np.stack([f.diverged.cpu().numpy() for f in found]),
        by_name,
    )


def load_seeds(run: Run, settings: EvaluationConfig) -> tuple[list[LoadedRun], tuple[int, ...]]:
    """The seeds that have a checkpoint, and the numbers of those that have none yet."""
    seeds = [s for group in run.config.groups for s in group]
    there = [g for g in run.config.groups if run.checkpoints(g).load(settings.checkpoint) is not None]
    trained = [s for group in there for s in group]
    if not trained:
        raise RunError(f"{run.path} has no checkpoint yet: nothing to evaluate")
    return [load_run(run.path, s, settings.checkpoint) for s in trained], tuple(s for s in seeds if s not in trained)


def returns_by_step(
    learner: MAML,
    meta: list[Tensor],
    family: TaskFamily,
    tasks: Any,
    steps: int,
    luck: int,
    done: Callable[[int], Any] = lambda tasks: None,
) -> AdaptationReturns:
    """``adaptation_returns`` of a few tasks at a time; ``done`` is told how many they were."""
    parts = []
    count = learner.config.episodes if learner.config.collect is None else 50
    for part in _parts(tasks, family.horizon * count):
        parts.append(adaptation_returns(learner, meta, family, part, steps, luck))
        done(len(part.id))
    return AdaptationReturns(*(torch.cat(x, -1) for x in zip(*parts)))


def agent_returns(
    agent: Agent,
    family: TaskFamily,
    tasks: Any,
    steps: int,
    episodes: int,
    luck: int,
    done: Callable[[int], Any] = lambda tasks: None,
    drift: Drift | None = None,
) -> Tensor:
    """(K + 1, M) mean returns of the rounds of a trial, of a few tasks at a time."""
    parts = []
    for part in _parts(tasks, family.horizon * episodes):
        walk = None if drift is None else lambda episode, ids=part.id: drift(ids, episode)
        played = trial(family, part, agent, steps + 1, episodes, luck, progress=False, drift=walk)
        parts.append(played.returns.mean(-1))
        done(len(part.id))
    return torch.cat(parts, -1)


def drifting_collection(config: MAMLConfig, drift: Drift) -> MAMLConfig:
    """The same collection of episodes from tasks as they are in each round."""

    def collect(
        family: TaskFamily, tasks: Any, policy: Policy, parameters: list[Tensor], seed: int | Tensor, episode: int
    ) -> Trajectories:
        now = drift(tasks.id, episode)
        if config.collect is not None:
            return config.collect(family, now, policy, parameters, seed, episode)
        return rollout(family, now, policy, parameters, config.episodes, seed, episode)

    return replace(config, collect=collect)


def _parts(tasks: Any, steps: int) -> list[Any]:
    size = max(1, STEPS_AT_ONCE // steps)
    return [take(tasks, slice(i, i + size)) for i in range(0, len(tasks.id), size)]


def baselines(config: TrainConfig, stores: bool) -> dict[str, Agent]:
    """The classical policies of a run's family. Their prior is that of training, also where the tasks have moved.

    ``stores``: the episodes of a round are pooled, as for a learner that takes its inner step on all of them.
    """
    agents = {"greedy Bayes": GreedyBayes, "Thompson": Thompson}
    try:
        return {name: agent(config.family, stores=stores) for name, agent in agents.items()}
    except (TypeError, ValueError):  # a family without a belief, or with settings that its belief does not cover
        return {}


def _provenance(run: Run, one: LoadedRun) -> dict[str, Any]:
    folder = run.checkpoints(next(group for group in run.config.groups if one.seed in group))
    entry = next(e for e in folder.entries() if e.iteration == one.iteration)
    file = (folder.path / entry.file).relative_to(run.path)
    return {"iteration": one.iteration, "file": file.as_posix(), "sha256": entry.sha256}
