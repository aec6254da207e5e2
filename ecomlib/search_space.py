"""What a search may change, and what a trial is worth (chapter "Running experiments")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Generator, Tensor

from .configuration import TrainConfig
from .evaluation.statistics import normalised_score
from .families.base import sample_tasks
from .learners import MAML, MetaTraining, PPOStep, TRPOStep
from .learners.rl2 import RL2, RL2Config
from .machine import precision
from .run_evaluation import agent_returns, returns_by_step


def space(base: TrainConfig) -> dict[str, BaseDistribution]:
    """What is searched, around the settings ``base``: a name is the setting's place in the configuration."""
    inner, outer, paid = base.inner, base.outer, base.data.tasks * base.data.episodes
    found: dict[str, BaseDistribution] = {}
    if isinstance(outer, RL2Config):
        return {
            "outer.lr": _around(outer.lr, 10),
            "outer.entropy": _around(max(outer.entropy, 1e-3), 10),
            "outer.epochs": IntDistribution(1, max(6, outer.epochs)),
            "outer.gae_lambda": CategoricalDistribution(sorted({0.9, 0.97, 1.0, outer.gae_lambda})),
            "outer.hidden": CategoricalDistribution(sorted({16, 32, 64, 128, outer.hidden})),
        }
    if inner.steps:
        found["inner.lr"] = _around(own_value(base, "inner.lr"), 30)
    if isinstance(outer, TRPOStep):
        found["outer.trust.radius"] = _around(outer.trust.radius, 10)
    else:
        found["outer.lr"] = _around(outer.lr, 10)
    if isinstance(outer, PPOStep):
        found["outer.epochs"] = IntDistribution(1, max(10, outer.epochs))
        found["outer.clip"] = _around(outer.clip, 4, highest=0.9)
    if base.policy.hidden:  # all layers have one width
        found["policy.hidden"] = CategoricalDistribution(sorted({16, 32, 64, 128, base.policy.hidden[0]}))
    if base.data.transitions is None:  # more tasks or more episodes: the merchant pays for the same number
        divisors = {n for n in range(2, 51) if paid % n == 0} | {base.data.episodes}
        found["data.episodes"] = CategoricalDistribution(sorted(divisors))
    return found


def _around(value: float, factor: float, highest: float = float("inf")) -> FloatDistribution:
    return FloatDistribution(value / factor, max(value, min(value * factor, highest)), log=True)


def own_value(base: TrainConfig, name: str) -> Any:
    """The value that ``base`` itself has; of several step sizes or layers, the first."""
    value = attrgetter(name)(base)
    return value[0] if isinstance(value, tuple) else value


def chosen(base: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """``base`` with these ``values`` of its ``space``. Several step sizes keep their proportions, all hidden layers
    have one width, and tasks x episodes stays."""
    inner, outer, policy, data = base.inner, base.outer, base.policy, base.data
    for name, value in values.items():
        if name == "inner.lr":
            factor = value / own_value(base, name)
            inner = replace(inner, lr=tuple(x * factor for x in inner.lr) if isinstance(inner.lr, tuple) else value)
        elif name == "outer.trust.radius":
            outer = replace(outer, trust=replace(outer.trust, radius=value))
        elif name == "policy.hidden":
            policy = replace(policy, hidden=(value,) * len(policy.hidden))
        elif name == "data.episodes":
            data = replace(data, episodes=value, tasks=data.tasks * data.episodes // value)
        else:
            outer = replace(outer, **{name.removeprefix("outer."): value})
    return replace(base, inner=inner, outer=outer, policy=policy, data=data)


# ------------------------------------------------------------------------------------------------- a trial
Report = Callable[[int, float], None]
"""(iteration, mean score over seeds) on the way; may raise ``optuna.TrialPruned``."""


def scores_of(
    config: TrainConfig,
    base: TrainConfig,
    lists: Sequence[tuple[int, int]],
    device: str,
    milestones: Sequence[int],
    report: Report | None = None,
    tick: Callable[[], Any] = lambda: None,
) -> list[list[float]]:
    """Train ``config`` and score every seed, after adaptation, on fixed lists of tasks from the prior.

    A list is (seed of the generator that draws it, number of tasks); ``report`` hears of the first one at every
    milestone. Adaptation is that of ``base`` in what it costs: as many support episodes, whatever was trained with.
    Returns the scores after training, one row a list and one column a seed. Raises ``FloatingPointError`` where
    training, or the adaptation to any task of a list, diverges.
    """
    learner = config.learner()
    judge = replace(config, data=base.data).learner()
    states: dict[tuple[int, ...], MetaTraining] = {}
    with precision(config.dtype):
        for milestone in milestones:
            metas = []
            for group in config.groups:
                seed = group[0] if len(group) == 1 else group
                states[group] = learner.meta_train(
                    config.family, seed, milestone, states.get(group), device, False, lambda state: tick()
                )
                meta = states[group].meta
                metas += [meta] if len(group) == 1 else [[p[i] for p in meta] for i in range(len(group))]
            last = milestone == milestones[-1]
            scores = [
                [_score(judge, config, meta, *tasks, device) for meta in metas]
                for tasks in lists[: None if last else 1]
            ]
            if report is not None:
                report(milestone, sum(scores[0]) / len(scores[0]))
    return scores


def _score(judge: MAML | RL2, config: TrainConfig, meta: list[Tensor], seed: int, tasks: int, device: str) -> float:
    drawn = sample_tasks(config.family, tasks, Generator().manual_seed(seed), device)
    blind, oracle = config.family.blind_return(drawn), config.family.oracle_return(drawn)
    if isinstance(judge, RL2):  # the whole trial counts
        c, luck = judge.config, seed % 2**31
        returns = agent_returns(judge.agent(meta), config.family, drawn, c.episodes - 1, c.units, luck)
        return normalised_score(returns.mean(0), blind, oracle)
    found = returns_by_step(judge, meta, config.family, drawn, config.inner.steps, seed % 2**31)
    if found.diverged[-1].any():
        raise FloatingPointError(f"adaptation diverged on {found.diverged_share[-1]:.1%} of {tasks} tasks")
    return normalised_score(found.returns[-1], blind, oracle)
