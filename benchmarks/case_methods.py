"""What ``benchmarks.case_studies`` compares: classical agents, trainings, and how a score is taken of either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ecomlib.baselines import BayesUCB, GreedyBayes, Random, Thompson, empirical_prior
from ecomlib.baselines.forgetting import ForgettingThompson
from ecomlib.configuration import TrainConfig, default_config
from ecomlib.evaluation.jackknife import ratio_interval
from ecomlib.evaluation.statistics import Interval, t_interval
from ecomlib.families.base import TaskFamily, split, take
from ecomlib.learners import MAML
from ecomlib.pictures import NAMES
from ecomlib.rollout import Agent
from ecomlib.run_evaluation import Drift, agent_returns, drifting_collection, returns_by_step

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Protocol:
    """What all parts of a case study share, for all families."""

    rounds: int = 5
    """E, rounds of a trial."""
    units: tuple[int, ...] = (1, 5, 20)
    """N, parallel units of a task: stores, campaigns, shoppers of one segment. All of them are paid for."""
    splits: tuple[str, ...] = ("test", "shifted", "drifting")
    """Lists of tasks that scores are taken on."""
    tasks: int = 1000
    """Tasks of each list."""
    tuning_tasks: int = 300
    """Training tasks on which settings are tuned and the best method of a kind is chosen."""
    luck: int = 0
    """Seed of all chance in the tests: the same for every method."""
    pace: float = 0.1
    """Of ``drifting``: how far hidden parameters walk from round to round (``Prior.drifted``)."""
    seeds: int = 5
    """Training seeds, from 0."""
    particles: int = 2048
    """Of a Bayesian agent, and of the wide sample that an empirical prior starts from twice as many."""
    many_particles: int | None = None
    """The same with more than 5 units, whose data tell more particles apart; None is as many."""
    logged_tasks: int = 300
    """Training tasks whose logs the empirical prior is estimated from."""
    logged_episodes: int = 5
    """Episodes of each in those logs, under random choices."""
    few: bool = False
    """With other units than the main ones leave out the methods that are tuned, and empirical Thompson sampling."""
    iterations: int | None = None
    """Outer steps of every training; None is each algorithm's own default."""

    def size(self, units: int) -> int:
        """Particles."""
        return self.many_particles if units > 5 and self.many_particles else self.particles


PROTOCOLS = {
    "pricing": Protocol(many_particles=8192),
    "inventory": Protocol(),
    "bidding": Protocol(tasks=300, tuning_tasks=100, few=True),
    "recommendation": Protocol(tasks=300, tuning_tasks=100, particles=512, many_particles=1024, few=True),
}
"""What differs is what a Bayesian's decision costs: a belief that sums its data up can afford more particles, one that
bids for segments or ranks slates fewer tasks."""
QUICK = Protocol(rounds=3, units=(2, 5), tasks=12, tuning_tasks=6, seeds=2, particles=32, logged_tasks=5, iterations=2)
"""Tiny sizes: does everything run?"""
SETTINGS: dict[str, dict[str, Any]] = {
    "pricing": {"policy.inputs": (0, 2, 3, 4), "inner.steps": 2, "data.stage_weights": (0.3, 0.3, 0.4)},
    "pricing rl-maml": {"outer.lr": 1e-2},
    "pricing trpo-maml": {"outer.trust.radius": 0.01, "iterations": 100},
    "pricing fomaml": {"data.stage_weights": (0.0, 0.2, 0.8)},
    "pricing reptile": {"data.stage_weights": None},
    "pricing 1": {"policy.inputs": (0, 2)},
    "pricing ppo-maml 20": {"data.stage_weights": (0.05, 0.15, 0.8)},
    "inventory": {"iterations": 300},
    "inventory rl-maml": {"outer.lr": 1e-2},
    "inventory trpo-maml": {"outer.trust.radius": 0.01, "iterations": 100},
    "inventory reptile": {"data.stage_weights": None},
    "bidding": {"iterations": 100},
    "bidding rl-maml": {"outer.lr": 1e-2},
    "bidding trpo-maml": {"outer.trust.radius": 0.01, "iterations": 60},
    "bidding reptile": {"inner.steps": 1},
    "recommendation rl-maml": {"outer.lr": 0.05},
    "recommendation trpo-maml": {"outer.trust.radius": 0.01, "iterations": 100},
    "recommendation 20": {"inner.lr": 64.0},
    "recommendation ppo-maml 20": {"outer.lr": 0.1},
}
"""Where a case study differs from the defaults of the command line, which train for the round after one inner step:
settings by family, family and algorithm, family and units, all three; tuned on training tasks."""
ALONE = {"recommendation": "same_step"}
"""Advantage of a single unit, in place of leave-one-out: a fitted baseline, or where observations are too long for one
that of the step alone."""
MAIN_UNITS = 5
"""Units of the comparisons that are made with one number of units only."""


class Setting(NamedTuple):
    """A list of tasks, and what its scores are measured by. M tasks, E rounds."""

    name: str
    family: TaskFamily  # that the tasks are of
    tasks: Any
    drift: Drift | None
    blind: Array  # (E, M)
    oracle: Array  # (E, M)

    @property
    def gap(self) -> Array:
        """(E, M) what knowing a task is worth."""
        return self.oracle - self.blind


def setting(family: TaskFamily, name: str, protocol: Protocol) -> Setting:
    """``test``, ``shifted``, ``drifting``, or for tuning ``train`` and ``drifting train``."""
    listed = {"drifting": "test", "drifting train": "train"}.get(name, name)
    count = protocol.tuning_tasks if listed == "train" else protocol.tasks
    own, tasks = split(family, listed, count)
    drift = (lambda ids, episode: own.drifted(ids, episode, protocol.pace)) if name.startswith("drifting") else None
    rounds = [tasks if drift is None else drift(tasks.id, k) for k in range(protocol.rounds)]
    ends = [torch.stack([value(now) for now in rounds]) for value in (own.blind_return, own.oracle_return)]
    blind, oracle = (x.double().numpy() for x in ends)
    return Setting(name, own, tasks, drift, blind, oracle)


# ------------------------------------------------------------------------------------------------ classical agents
Factory = Callable[[int], Agent]
"""Units -> an agent that pools what they see."""
REFERENCES = ("blind", "random", "random multipliers")
"""Agents that learn nothing."""
KNOW_THE_PRIOR = ("greedy Bayes", "Thompson", "Thompson, then greedy", "Bayes-UCB", "Thompson, forgets",
                  "MNL-Thompson")  # fmt: skip
"""Agents that are given the prior of training. The others estimate it from logs of training tasks, or need none."""


class Tunable(NamedTuple):
    """A classical method with one setting that is chosen on training tasks."""

    setting: str
    grid: tuple[float, ...]
    on: str  # the list that it is tuned on
    build: Callable[[int, Any], Agent]  # (units, value) -> agent


def classical(
    family: TaskFamily, family_name: str, protocol: Protocol
) -> tuple[dict[str, Factory], dict[str, Tunable]]:
    """Methods without a setting to tune, and with one. A method that the family cannot have is left out.

    The Bayesians' prior is that of training, on every list; the empirical ones estimate theirs from logs of training
    tasks, starting from the family's wide prior.
    """
    name, size = f"ecomlib.baselines.{family_name}", protocol.size
    module = import_module(name) if find_spec(name) else None  # importing registers the belief
    own, own_random = getattr(module, "agents", None), getattr(module, "RandomMultipliers", None)
    prior = _empirical(family, protocol, own_random)
    fixed: dict[str, Factory] = {
        "random": lambda units: Random(family),
        "greedy Bayes": lambda units: GreedyBayes(family, size(units), stores=True),
        "Thompson": lambda units: Thompson(family, size(units), stores=True),
    }
    if prior is not None:
        fixed["greedy empirical Bayes"] = lambda units: GreedyBayes(family, stores=True, prior=prior)
        fixed["empirical Thompson"] = lambda units: Thompson(family, stores=True, prior=prior)
    if own is not None:
        with suppress(ValueError):  # a variant of the family that its own methods do not cover
            fixed |= {n: lambda units, agent=agent: agent for n, agent in own(family, True).items() if n not in fixed}
    steps = family.horizon
    tunable = {
        "Thompson, then greedy": Tunable(
            "steps of Thompson sampling",
            tuple(dict.fromkeys(max(1, round(share * steps)) for share in (0.25, 0.5, 1, 2, 3))),
            "train",
            lambda units, value: Thompson(family, size(units), stores=True, until=int(value)),
        ),
        "Bayes-UCB": Tunable(
            "posterior standard deviations",
            (0.1, 0.25, 0.5, 1.0, 2.0),
            "train",
            lambda units, value: BayesUCB(family, size(units), stores=True, width=value),
        ),
        "Thompson, forgets": Tunable(
            "memory",
            (0.0, 0.01, 0.03, 0.1, 0.3, 0.6),
            "drifting train",
            lambda units, value: ForgettingThompson(family, size(units), stores=True, memory=value),
        ),
    }
    works = lambda build: _works(build, family)
    return (
        {name: f for name, f in fixed.items() if works(lambda f=f: f(2))},
        {name: t for name, t in tunable.items() if works(lambda t=t: t.build(2, t.grid[0]))},
    )


def _empirical(family: TaskFamily, protocol: Protocol, own_random: Callable[[TaskFamily], Agent] | None) -> Any:
    """The prior estimated from logs of training tasks: of random choices, where actions are real numbers the family's
    own, and without such of Thompson sampling under the wide prior. None for a family without wide prior or belief."""
    if not hasattr(family, "wide") or not _works(lambda: GreedyBayes(family, protocol.particles), family):
        return None
    _, tasks = split(family, "train", protocol.logged_tasks)
    try:
        logger: Agent = Random(family)
    except ValueError:
        logger = own_random(family) if own_random else Thompson(family.wide(), protocol.particles)
    wide = 2 * protocol.particles
    return empirical_prior(family, tasks, logger, protocol.logged_episodes, wide)


def _works(build: Callable[[], Agent], family: TaskFamily) -> bool:
    """Whether a family can have this agent: it can be made, and takes a first action."""
    try:
        agent, tasks = build(), family.tasks(torch.arange(2))
        state = family.reset(tasks, 2, torch.full((2, 2, family.noise_size), 0.5))
        agent.begin(family.context(tasks), 2, 2)
        agent.act(family.observe(tasks, state), torch.full((2, 2, agent.noise_size), 0.5))
    except (NotImplementedError, TypeError, ValueError):
        return False
    return True


def played(agent: Agent, where: Setting, units: int, protocol: Protocol) -> Array:
    """(E, M) mean returns of the rounds under an agent, of so many tasks at a time that beliefs fit in memory."""
    size = max(1, 10_000_000 // (units * protocol.size(units)))
    parts = []
    for start in range(0, len(where.tasks.id), size):
        part = take(where.tasks, slice(start, start + size))
        returns = agent_returns(agent, where.family, part, protocol.rounds - 1, units, protocol.luck, drift=where.drift)
        parts.append(returns.double().numpy())
    return np.concatenate(parts, -1)


# ------------------------------------------------------------------------------------------------ trained policies
def training(family_name: str, algorithm: str, units: int, protocol: Protocol, **changes: Any) -> TrainConfig:
    """The configuration of a training of the case study: the family's defaults with N episodes of each task and round,
    and as many tasks that an iteration plays about as many episodes. ``changes`` are fields of the configuration, or of
    its parts ("inner.steps")."""
    config = default_config(family_name, algorithm)
    data, default = config.data, config.data.episodes
    if data.transitions is None:
        tasks = min(200, max(20, data.tasks * default // units)) if units != default else data.tasks
        alone = units == 1 and data.advantage == "leave_one_out"  # there is no other episode
        advantage = ALONE.get(family_name, "linear_feature") if alone else data.advantage
        data = replace(data, tasks=tasks, episodes=units, advantage=advantage)
    config = replace(config, data=data, seeds=protocol.seeds, keep=1)
    keys = family_name, f"{family_name} {algorithm}", f"{family_name} {units}", f"{family_name} {algorithm} {units}"
    own = {name: value for key in keys for name, value in SETTINGS.get(key, {}).items()}
    # Together, because numbers of steps and of weights have to agree.
    config = changed(config, {**own, **changes})
    return config if protocol.iterations is None else replace(config, iterations=protocol.iterations)


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A configuration with other values of fields, or of fields of its parts ("inner.steps")."""
    own = {name: value for name, value in changes.items() if "." not in name}
    for part in dict.fromkeys(name.partition(".")[0] for name in changes if "." in name):
        inside = {name.partition(".")[2]: v for name, v in changes.items() if name.startswith(part + ".")}
        own[part] = changed(getattr(config, part), inside)
    return replace(config, **own)


def trained(
    learner: MAML, metas: list[list[Tensor]], where: Setting, protocol: Protocol, adapts: bool = True
) -> tuple[Array, NDArray[np.bool_]]:
    """(S, E, M) returns and which diverged: an inner step after every round, or none at all."""
    if where.drift is not None:
        collection = drifting_collection(learner.config, where.drift)
        learner = MAML(learner.policy, learner.inner, learner.outer, collection)
    found = []
    for meta in metas:
        if adapts:
            found.append(returns_by_step(learner, meta, where.family, where.tasks, protocol.rounds - 1, protocol.luck))
            continue
        policy = meta[: learner.policy.tensors] if hasattr(learner.policy, "tensors") else meta
        rounds = range(protocol.rounds)
        data = [learner.evaluate_task(policy, where.family, where.tasks, protocol.luck, k) for k in rounds]
        returns = torch.stack([d.returns.sum(-1) / d.mask[0].sum(-1) for d in data])
        found.append((returns, torch.zeros_like(returns, dtype=torch.bool)))
    returns, diverged = zip(*found)
    return torch.stack(returns).double().numpy(), torch.stack(diverged).numpy()


class TaskPool:
    """A family of which training meets few tasks only, each seed its own ``size``; their luck is new every time.

    For a batch of seeds as ``MetaLearner.draw`` lays them out: seeds are the fast axis.
    """

    def __init__(self, family: TaskFamily, size: int, seeds: int):
        self.family, self.size, self.seeds = family, size, seeds

    def tasks(self, task_id: Tensor) -> Any:
        """The task of the pool that an id points to; the id itself stays, since luck is keyed by it."""
        seed = torch.arange(len(task_id), device=task_id.device) % self.seeds
        return self.family.tasks(seed * self.size + task_id % self.size)._replace(id=task_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)


def starts(learner: MAML, seeds: int) -> list[list[Tensor]]:
    """Parameters that were never trained, those that each seed's training begins with."""
    return [learner.initial(Generator().manual_seed(seed)) for seed in range(seeds)]


def name_of(algorithm: str) -> str:
    """An algorithm as the book writes it."""
    return NAMES.get(algorithm, algorithm)


# ------------------------------------------------------------------------------------------------ scores
class Returns(NamedTuple):
    """What a method earned: (S, E, M); of what was not trained S is 1 and ``trained`` false."""

    values: Array
    diverged: NDArray[np.bool_]
    trained: bool

    @classmethod
    def of_agent(cls, values: Array) -> Returns:
        """Of (E, M)."""
        return cls(values[None], np.zeros((1, *values.shape), dtype=bool), False)


def scores(found: Returns, where: Setting) -> dict[str, Any]:
    """Score of every round and of the lifetime, with intervals; tasks that diverged with any seed are left out."""
    kept, gain, gap = _kept(found, where)
    rounds = [_cell(gain[:, k], gap[k], found.trained) for k in range(len(gap))]
    by_seed = gain.sum(-1) / gap.sum(-1) if kept.sum() > 1 else np.full(gain.shape[:2], np.nan)
    return {
        "seeds": len(gain) if found.trained else 0,
        "tasks": int(kept.sum()),
        "diverged": float(found.diverged.any(1).mean()),
        "rounds": rounds,
        "lifetime": _cell(gain.sum(1), gap.sum(0), found.trained),
        "by seed": plain(by_seed.tolist()) if found.trained else None,
    }


def difference(found: Returns, rival: Returns, where: Setting, of: str) -> dict[str, Any]:
    """Score of ``found`` less that of an untrained ``rival``, on the same tasks with the same luck."""
    _, gain, gap = _kept(found, where)
    kept = ~found.diverged.any((0, 1))
    lead = gain - (rival.values - where.blind)[..., kept]
    lead, gap = (lead[:, -1], gap[-1]) if of == "last round" else (lead.sum(1), gap.sum(0))
    cell = _cell(lead, gap, found.trained)
    return {"of": of, "difference": cell.pop("score"), **cell}


def _kept(found: Returns, where: Setting) -> tuple[NDArray[np.bool_], Array, Array]:
    kept = ~found.diverged.any((0, 1))
    return kept, (found.values - where.blind)[..., kept], where.gap[:, kept]


def _cell(gain: Array, gap: Array, several: bool) -> dict[str, Any]:
    """Of gains (S, M) and gaps (M,)."""
    if gain.shape[-1] < 2:
        return {"score": None, "seeds": None, "tasks": None}
    by_seed = gain.sum(-1) / gap.sum()
    over_seeds = t_interval(by_seed) if several and len(by_seed) > 1 else None
    return {
        "score": plain(float(by_seed.mean())),
        "seeds": ends(over_seeds),
        "tasks": ends(ratio_interval(gain.mean(0), gap)),
    }


def ends(interval: Interval | None) -> list[float] | None:
    """Low and high, for JSON."""
    return None if interval is None else plain([interval.low, interval.high])


def plain(value: Any) -> Any:
    """Numbers with five digits, null for what is not finite."""
    if isinstance(value, dict):
        return {k: plain(x) for k, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def parts(protocol: Protocol) -> Iterator[tuple[str, int]]:
    """Every list with every number of units."""
    return ((name, units) for name in protocol.splits for units in protocol.units)
