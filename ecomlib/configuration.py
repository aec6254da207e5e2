"""What a training run depends on, as one frozen dataclass: the command line's flags, ``config.toml`` and the library
are three ways to write the same thing (chapter "Running experiments")."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Generic, Literal, TypeVar

import tyro
from torch import Tensor

from .baselines import belief
from .baselines.oracle import oracle_decisions
from .families import (
    CensoredInventory,
    LogitPricing,
    PointNavigation,
    SegmentBidding,
    ShopMDP,
    SlateRecommendation,
)
from .families.base import TaskFamily, check, number, whole
from .learners import MAML, Inner, MAMLConfig, PPOStep, ReinforceStep, ReptileStep, TRPOStep
from .learners.belief import BeliefConfig, BeliefLearner
from .learners.credit import segment_credit
from .learners.rl2 import RL2, RL2Config
from .policies import Policy
from .policy_settings import PolicySettings, check_name
from .returns import (
    Advantage,
    leave_one_out_advantage,
    linear_feature_advantage,
    per_transition,
    same_step_advantage,
    standardise,
)
from .rollout import Trajectories, rollout_transitions
from .surrogates import dice, log_likelihood, low_variance_curvature, ratio

FAMILIES = {
    "pricing": LogitPricing,
    "inventory": CensoredInventory,
    "bidding": SegmentBidding,
    "recommendation": SlateRecommendation,
    "navigation": PointNavigation,
    "shop": ShopMDP,
}
"""Name on the command line -> task family."""
OUTER = {
    "ppo-maml": PPOStep,
    "rl-maml": ReinforceStep,
    "trpo-maml": TRPOStep,
    "reptile": ReptileStep,
    "fomaml": PPOStep,
    "anil": PPOStep,
    "meta-sgd": PPOStep,
    "recurrent-ppo": PPOStep,
    "rl2": RL2Config,
    "belief": BeliefConfig,
}
"""Name of an algorithm -> its outer step. Those before the last two are PPO-MAML without second derivatives, with only
the last layer adapting, with a step size learned for every parameter; and PPO on a policy that remembers an episode and
takes no inner step. The last remember a trial of several episodes, as it was or as a learned belief."""
SURROGATES = {
    "log_likelihood": log_likelihood,
    "ratio": ratio,
    "low_variance_curvature": low_variance_curvature,
    "dice": dice,
}


@dataclass(frozen=True)
class InnerSettings:
    """How a task is adapted to: ``learners.Inner`` by names."""

    steps: int = 1
    """Inner steps, each on support episodes of its own; 0 trains one policy for all tasks."""
    lr: float | tuple[float, ...] = 0.1
    """alpha, one for all steps or one a step; where it is learned, the first guess."""
    surrogate: Literal["log_likelihood", "ratio", "low_variance_curvature", "dice", "segment_credit"] = "ratio"
    """Whose gradient is ascended (chapter "Meta-reinforcement learning"; segment_credit, for campaigns: chapter
    "Advertising")."""
    own_unit: bool = False
    """Divide each task's advantages by their standard deviation, so that one step size serves large and small tasks."""
    first_order: bool = False
    """Leave out second derivatives."""
    adapts: Literal["all", "head"] = "all"
    """What adapts: all parameters, or those of the last layer."""
    learn_lr: bool = False
    """Meta-SGD: a step size for every parameter, learned."""

    def __post_init__(self):
        check_name(self, "surrogate", (*SURROGATES, "segment_credit"))
        check_name(self, "adapts", ("all", "head"))
        check(self, "own_unit", lambda x: isinstance(x, bool), "True or False")
        checked = self.build(None)
        for name in ("steps", "lr", "first_order", "learn_lr"):  # a tuple where a list came in
            object.__setattr__(self, name, getattr(checked, name))

    def build(self, policy: Policy | None, family: TaskFamily | None = None) -> Inner:
        """The library's own settings, which check these values."""
        if self.surrogate == "segment_credit" and family is not None:
            surrogate = segment_credit(family)
        else:
            surrogate = SURROGATES.get(self.surrogate, ratio)
        head = policy.head if policy is not None and self.adapts == "head" else None
        return Inner(
            self.steps,
            self.lr,
            _in_own_unit(surrogate) if self.own_unit else surrogate,
            self.first_order,
            head,
            self.learn_lr,
        )


@cache
def _in_own_unit(surrogate):
    """The same surrogate of advantages with mean 0 and standard deviation 1 within each task."""

    def in_own_unit(policy: Policy, parameters: list[Tensor], data: Trajectories, advantage: Tensor) -> Tensor:
        own = per_transition(standardise(advantage, data.mask), data.mask)
        return surrogate(policy, parameters, data, own)

    return in_own_unit


@dataclass(frozen=True)
class DataSettings:
    """What an iteration consists of: ``learners.MAMLConfig`` by names."""

    tasks: int = 20
    """Tasks of an iteration (of all processes together)."""
    episodes: int = 20
    """Episodes of each task and stage; the merchant pays for every one."""
    transitions: int | None = None
    """Count a stage in steps instead: whole episodes until a task has so many."""
    stage_weights: tuple[float, ...] | None = None
    """How much the return after 0, ..., K inner steps counts; None counts the last one alone."""
    advantage: Literal["leave_one_out", "linear_feature", "same_step"] = "leave_one_out"
    """leave_one_out: reward to go less the other episodes'. linear_feature: GAE on a fitted baseline. same_step: reward
    less the task's mean, for families whose actions do not reach later steps."""
    discount: float = 1.0
    """gamma."""
    gae_lambda: float = 1.0
    """lambda of GAE; linear_feature only."""
    chunk: int | None = None
    """Tasks differentiated at a time: bounds memory; None is all."""

    def __post_init__(self):
        check_name(self, "advantage", ("leave_one_out", "linear_feature", "same_step"))
        check(self, "tasks", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "episodes", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "transitions", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")
        check(self, "discount", lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")
        check(self, "gae_lambda", lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")
        checked = MAMLConfig(self.tasks, self.episodes, self.stage_weights, chunk=self.chunk)
        for name in ("stage_weights", "chunk"):  # a tuple where a list came in
            object.__setattr__(self, name, getattr(checked, name))
        several = self.advantage != "leave_one_out" or self.transitions is not None or self.episodes >= 2
        check(self, "episodes", lambda x: several, "a whole number >= 2 with leave_one_out, or another advantage")

    def build(self, recurrent: bool, surrogate: str) -> MAMLConfig:
        """The library's own settings."""
        advantages: dict[str, Advantage] = {
            "leave_one_out": leave_one_out_advantage(self.discount),
            "linear_feature": linear_feature_advantage(self.discount, self.gae_lambda),
            "same_step": same_step_advantage(),
        }
        collect = None if self.transitions is None else _counted_in_transitions(self.transitions)
        compact = self.transitions is not None and not recurrent and surrogate != "dice"
        return MAMLConfig(
            self.tasks,
            self.episodes,
            self.stage_weights,
            advantages[self.advantage],
            collect,
            False,
            self.chunk,
            compact,
        )


def _counted_in_transitions(transitions: int):
    return lambda family, tasks, policy, parameters, seed, episode: rollout_transitions(
        family, tasks, policy, parameters, transitions, seed, episode
    )


FamilyT = TypeVar("FamilyT")
OuterT = TypeVar("OuterT")


@dataclass(frozen=True)
class TrainConfig(Generic[FamilyT, OuterT]):
    """A training run: the same configuration and the same library give the same numbers."""

    family: FamilyT
    """The task family."""
    outer: OuterT
    """The outer step."""
    family_name: tyro.conf.Suppress[Literal["pricing", "inventory", "bidding", "recommendation", "navigation", "shop"]]
    """Chooses the task family."""
    algorithm: Literal[
        "ppo-maml", "rl-maml", "trpo-maml", "reptile", "fomaml", "anil", "meta-sgd", "recurrent-ppo", "rl2", "belief"
    ]
    """Chooses the outer step and defaults; every default can be changed."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    """The policy."""
    inner: InnerSettings = field(default_factory=InnerSettings)
    """How it adapts to a task."""
    data: DataSettings = field(default_factory=DataSettings)
    """What an iteration plays."""
    iterations: int = 200
    """Outer steps; the last one's parameters are the result."""
    seeds: int = 1
    """Training seeds; intervals need at least 2, and say little below 5."""
    first_seed: int = 0
    """The seeds are first_seed, first_seed + 1, ..."""
    seeds_at_once: int | None = None
    """Seeds trained in one batch: the same numbers to rounding. None is all, or 1 where the outer step takes no batch
    (TRPO, RL2, belief)."""
    checkpoint_every: int = 20
    """Iterations between checkpoints: what a crash can cost."""
    keep: int = 3
    """Checkpoints kept, besides the best one."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of everything."""

    def __post_init__(self):
        check_name(self, "family_name", tuple(FAMILIES))
        check_name(self, "algorithm", tuple(OUTER))
        check_name(self, "dtype", ("float32", "float64"))
        parts = {"family": FAMILIES[self.family_name], "outer": OUTER[self.algorithm], "policy": PolicySettings,
                 "inner": InnerSettings, "data": DataSettings}  # fmt: skip
        for name, kind in parts.items():
            check(self, name, lambda x, kind=kind: isinstance(x, kind), f"a {kind.__name__}")
        for name, most in (("iterations", 10**9), ("seeds", 10**4), ("checkpoint_every", 10**9), ("keep", 10**4)):
            check(self, name, lambda x, most=most: whole(x, 1, most), f"a whole number from 1 to {most}")
        check(self, "first_seed", lambda x: whole(x, 0, 2**31), "a whole number from 0 to 2147483648")
        batch = lambda x: x is None or (whole(x, 1) and (x == 1 or self.outer_batches))
        check(self, "seeds_at_once", batch, "None or a whole number >= 1; 1 with trpo-maml, rl2 and belief")
        if isinstance(self.outer, RL2Config):
            for name, default in _RL2.items():
                for f in fields(default):
                    only = getattr(default, f.name)
                    why = f"{only} with {self.algorithm}, whose own settings are all under outer"
                    check(getattr(self, name), f.name, lambda x, only=only: x == only, why)
            teaches = belief.dispatch(type(self.family)) is not belief.dispatch(object)
            check(self.outer, "pretrain", lambda x: x == 0 or teaches, "0 for a family without Bayesian baselines")
        if isinstance(self.outer, ReptileStep):
            check(self.inner, "steps", lambda x: x >= 1, "a whole number >= 1 with reptile")
            check(self.inner, "learn_lr", lambda x: not x, "False with reptile, which learns no step sizes")
        self.learner()  # what one part asks of another

    @property
    def outer_batches(self) -> bool:
        """Whether the outer step takes several seeds at once."""
        return not isinstance(self.outer, TRPOStep | RL2Config)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The seeds, as they are trained: each group in one batch."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        size = self.seeds_at_once or (self.seeds if self.outer_batches else 1)
        return [tuple(seeds[i : i + size]) for i in range(0, self.seeds, size)]

    @property
    def steps_of_iteration(self) -> int:
        """Steps in the environment that an iteration plays, of one seed."""
        horizon, data = self.family.horizon, self.data
        if isinstance(self.outer, RL2Config):
            return self.outer.tasks * self.outer.replicas * self.outer.units * self.outer.episodes * horizon
        return data.tasks * (data.transitions or data.episodes * horizon) * (self.inner.steps + 1)

    def learner(self) -> MAML | RL2:
        """The meta-learner that this configuration describes."""
        if isinstance(self.outer, RL2Config):
            kind = BeliefLearner if isinstance(self.outer, BeliefConfig) else RL2
            return kind(self.family, replace(self.outer, anneal=self.outer.anneal or self.iterations), oracle_decisions)
        policy = self.policy.build(self.family)
        data = self.data.build(self.policy.network == "gru", self.inner.surrogate)
        return MAML(policy, self.inner.build(policy, self.family), self.outer, data)


_RL2 = {"policy": PolicySettings(), "inner": InnerSettings(steps=0), "data": DataSettings()}
"""The parts of a configuration that learners with a memory have no use for."""


# ------------------------------------------------------------------------------------------------- defaults
@dataclass(frozen=True)
class Defaults:
    """What trains well on a family: found on training tasks, the book's own settings where it has runs."""

    policy: PolicySettings = field(default_factory=PolicySettings)
    inner: InnerSettings = field(default_factory=InnerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    ppo: PPOStep = field(default_factory=lambda: PPOStep(lr=3e-3, epochs=3))
    trpo: TRPOStep = field(default_factory=TRPOStep)
    recurrent: tuple[DataSettings, PPOStep] | None = None
    """For a policy that remembers an episode; None is as above."""
    rl2: RL2Config = field(default_factory=RL2Config)
    """For a policy that remembers a trial."""


_LONG_OBSERVATIONS = RL2Config(memory="sum", hidden=32, tasks=16, epochs=2, lr=6e-3)
"""For families with a row for each segment or item: few trials of an iteration, and no loop over their steps."""
DEFAULTS = {
    # The policy sees the calendar alone, so that it must learn a product from its sales, by adapting.
    "pricing": Defaults(
        PolicySettings(hidden=(32,), inputs=(0, 2)),
        InnerSettings(lr=4.0, own_unit=True),
        DataSettings(tasks=40, episodes=5, advantage="same_step"),
        # What a price teaches pays off on later days: reward to go, other stores as baseline.
        recurrent=(DataSettings(tasks=64, episodes=8), PPOStep(lr=1e-2, epochs=4)),
        rl2=RL2Config(hidden=32, minibatches=8, entropy=0.015),
    ),
    "inventory": Defaults(
        PolicySettings(hidden=(32,)),
        InnerSettings(lr=3.0, own_unit=True),
        DataSettings(tasks=40, episodes=5, stage_weights=(1.0, 4.0), advantage="same_step"),
        PPOStep(lr=2e-2, epochs=3),
    ),
    # One network for all segments reacts within the day; what differs from segment to segment is adapted.
    "bidding": Defaults(
        PolicySettings(network="segments", hidden=(16,), initial_std=0.3),
        InnerSettings(lr=0.3, surrogate="segment_credit", adapts="head"),
        DataSettings(tasks=40, episodes=5, stage_weights=(1.0, 1.0)),
        PPOStep(lr=1e-2, epochs=3),
        rl2=_LONG_OBSERVATIONS,
    ),
    # A score that is linear in what is known of an item: taste features, margin and appeal. Its weights are learned.
    "recommendation": Defaults(
        PolicySettings(hidden=(), inputs=tuple(range(7))),
        InnerSettings(lr=16.0, own_unit=True),
        DataSettings(tasks=40, episodes=5, advantage="same_step"),
        PPOStep(lr=0.05, epochs=3),
        rl2=_LONG_OBSERVATIONS,
    ),
    "navigation": Defaults(
        PolicySettings(hidden=(100, 100), activation="relu", minimum_std=0.4),
        InnerSettings(steps=2, lr=(0.5, 0.25), surrogate="log_likelihood"),
        DataSettings(20, transitions=2000, stage_weights=(0.2, 0.4, 0.4), advantage="linear_feature", discount=0.99),
        PPOStep(lr=2e-3, log_std_lr=0.006),
        TRPOStep(replace(TRPOStep().trust, radius=0.015), transitions=250),
    ),
    "shop": Defaults(),
}
"""Of every family."""


def default_config(family: str, algorithm: str) -> TrainConfig:
    """Settings that a command without flags trains with."""
    of = DEFAULTS[family]
    if algorithm in ("rl2", "belief"):
        shared = {f.name: getattr(of.rl2, f.name) for f in fields(of.rl2)}
        outer = of.rl2 if algorithm == "rl2" else BeliefConfig(**shared)
        return TrainConfig(FAMILIES[family](), outer, family, algorithm, **_RL2)
    policy, inner, data, outer = of.policy, of.inner, of.data, OUTER[algorithm]()
    if isinstance(outer, PPOStep):
        outer = of.ppo
    if isinstance(outer, TRPOStep):
        outer = of.trpo
    if algorithm == "recurrent-ppo":
        policy = PolicySettings(network="gru", hidden=(64,), minimum_std=policy.minimum_std)
        inner = replace(inner, steps=0, lr=0.1)
        data, outer = of.recurrent or (replace(data, stage_weights=None), outer)
    change = {
        "fomaml": {"first_order": True},
        "anil": {"adapts": "head"},
        "meta-sgd": {"learn_lr": True, "lr": inner.lr if isinstance(inner.lr, float) else 0.1},
        "reptile": {"steps": max(2, inner.steps)},
    }
    inner = replace(inner, **change.get(algorithm, {}))
    if algorithm == "reptile":
        data = replace(data, stage_weights=None)
    return TrainConfig(FAMILIES[family](), outer, family, algorithm, policy, inner, data)
