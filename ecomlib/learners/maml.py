"""MAML for reinforcement learning (Finn, Abbeel and Levine 2017) with three outer steps: RL-MAML (REINFORCE), PPO-MAML
and TRPO-MAML. Chapter "Meta-reinforcement learning".

An iteration of ``meta_train``: for k = 0, ..., K collect fresh episodes D_k of every task with phi_k, and adapt phi_k
to phi_(k+1) on them; then improve theta by one outer step on all of it. Outer steps are in ``outer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ..families.base import TaskFamily, check, number, whole
from ..networks import MLP
from ..policies import Categorical, CategoricalMLP, Gaussian, GaussianMLP, Policy
from ..returns import Advantage, leave_one_out_advantage
from ..rollout import Trajectories, rollout
from ..surrogates import Surrogate, dice, sampling_term
from . import mlp_adjoint
from .adaptation import Inner, adapt
from .meta import MetaLearner, OuterStep, Seeds
from .objective import MetaObjective, for_tasks, split_meta
from .output_losses import Episodes, OutputLoss, of_divergence, of_surrogate
from .sharding import ALONE, Shards

Collect = Callable[[TaskFamily, Any, Policy, list[Tensor], int | Tensor, int], Trajectories]
"""(family, tasks, policy, parameters, seed, episode) -> fresh episodes: whatever a merchant would pay for. The seed is
one of all tasks or, where several seeds train together, one of each, (M,)."""


class Stage(NamedTuple):
    """Episodes collected by phi_k, as a learner uses them."""

    data: Trajectories
    advantage: Tensor  # (T, M, N)
    score: Tensor  # (M,), return after adaptation less that of the other tasks; used by the sampling term only


@dataclass(frozen=True)
class MAMLConfig:
    """What an iteration of meta-training consists of."""

    tasks: int = 20
    """Tasks of an iteration."""
    episodes: int = 20
    """Episodes of each task and stage; every one is paid for by the merchant."""
    stage_weights: tuple[float, ...] | None = None
    """How much the return of phi_0, ..., phi_K counts; None counts the last one alone."""
    advantage: Advantage = leave_one_out_advantage()
    """Trajectories -> advantages, of support and query."""
    collect: Collect | None = None
    """How episodes are collected; None is ``episodes`` whole episodes of every task."""
    sampling: bool = False
    """E-MAML: also follow the gradient through the chance of the support episodes (``surrogates.sampling_term``)."""
    chunk: int | None = None
    """Tasks differentiated at a time: memory grows with this number; None is all."""
    compact: bool = False
    """Differentiate the steps before an episode's end alone, as episodes of one step. The same numbers, faster where
    episodes end early; not for ``dice`` and recurrent policies, which need whole episodes."""
    by_hand: bool = True
    """Differentiate tanh MLPs by the formulas of ``mlp_adjoint`` instead of autograd: the same numbers, faster. Where
    it does not apply (other networks, the sampling term) or does not pay (ReLU), autograd is used."""

    def __post_init__(self):
        check(self, "tasks", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "episodes", lambda x: whole(x, 1), "a whole number >= 1")
        weights = lambda x: isinstance(x, tuple) and all(number(w) and w >= 0 for w in x) and any(x)
        check(self, "stage_weights", lambda x: x is None or weights(x), "None, or numbers >= 0, not all 0")
        check(self, "advantage", callable, "a function of Trajectories")
        check(self, "collect", lambda x: x is None or callable(x), "None or a function")
        check(
            self,
            "sampling",
            lambda x: isinstance(x, bool) and not (x and self.tasks < 2),
            "True (with tasks >= 2) or False",
        )
        check(self, "chunk", lambda x: x is None or whole(x, 1), "None or a whole number >= 1")
        for field in ("compact", "by_hand"):
            check(self, field, lambda x: isinstance(x, bool), "True or False")


class MAML(MetaLearner):
    """A policy that adapts by policy gradients, and the initial parameters that make it adapt well.

    >>> learner = MAML(CategoricalMLP((6, 3)), Inner(lr=0.5), PPOStep())
    >>> trained = learner.meta_train(ShopMDP(), seed=0, iterations=50)
    >>> phi, support = learner.train_task(trained.meta, family, tasks, seed=1)
    >>> learner.evaluate_task(phi[-1], family, tasks, seed=1).returns
    """

    def __init__(self, policy: Policy, inner: Inner, outer: OuterStep, config: MAMLConfig | None = None):
        self.policy, self.inner, self.outer, self.config = policy, inner, outer, config or MAMLConfig()
        weights = self.config.stage_weights or (0.0,) * inner.steps + (1.0,)
        if len(weights) != inner.steps + 1:
            raise ValueError(
                f"MAMLConfig.stage_weights = {weights!r}; allowed: inner.steps + 1 = {inner.steps + 1} numbers"
            )
        whole_episodes = inner.surrogate is dice or hasattr(policy.network, "step")
        if self.config.compact and whole_episodes:
            raise ValueError("MAMLConfig.compact = True; allowed: False with dice or a recurrent policy")
        self.stage_weights = weights
        self.name = f"{outer.name}-MAML" if inner.steps else outer.name

    def initial(self, generator: Generator) -> list[Tensor]:
        """The policy's initial parameters, then step sizes where they are learned."""
        theta = self.policy.initial(generator)
        return theta + (self.inner.step_sizes(theta) if self.inner.learn_lr else [])

    def tasks_of(self, iteration: int) -> int:
        """Tasks of an iteration."""
        return self.config.tasks

    def loss(self, parameters: list[Tensor], stage: Stage) -> Tensor:
        """(M,) inner loss: the surrogate's negative."""
        return -self.inner.surrogate(self.policy, parameters, stage.data, stage.advantage)

    def collect(
        self, family: TaskFamily, tasks: Any, parameters: list[Tensor], seed: int | Tensor, episode: int
    ) -> Stage:
        """Fresh episodes under ``parameters``, shared or one set per task, and their advantages."""
        parameters = [p.detach() for p in parameters]
        if self.config.collect is not None:
            data = self.config.collect(family, tasks, self.policy, parameters, seed, episode)
        else:
            data = rollout(family, tasks, self.policy, parameters, self.config.episodes, seed, episode)
        return Stage(data, self.config.advantage(data), torch.zeros_like(data.reward[0, :, 0]))

    def train_task(
        self,
        meta: list[Tensor],
        family: TaskFamily,
        tasks: Any,
        seed: int,
        steps: int | None = None,
        episode: int = 0,
        guard: bool = False,
    ) -> tuple[list[list[Tensor]], list[Stage]]:
        """Adapt to M tasks: collect, step, collect with the result, step, ...

        Returns [phi_0, ..., phi_K] and the K support sets. ``episode`` numbers the first round of episodes, so that
        further calls meet fresh luck. A task that diverges is left to (its parameters are then not finite: count it
        when evaluating), unless ``guard``.
        """
        steps = self.inner.steps if steps is None else steps
        phi, support = self._adapt(meta, True, family, tasks, seed, steps, episode, guard)
        adapts = self.inner.adapts(phi[0])
        phi[0] = [p.expand(len(tasks.id), *p.shape) if i in adapts else p for i, p in enumerate(phi[0])]
        return phi, support

    def _adapt(
        self,
        meta: list[Tensor],
        shared: bool,
        family: TaskFamily,
        tasks: Any,
        seed: int | Tensor,
        steps: int,
        episode: int,
        guard: bool,
    ) -> tuple[list[list[Tensor]], list[Stage]]:
        """[theta, phi_1, ..., phi_K] and the support sets, from meta-parameters shared by all tasks or one set each."""
        theta, step_sizes = split_meta(self.inner, [p.detach() for p in meta])
        phi, support = [theta], []
        for step in range(steps):
            support.append(self.collect(family, tasks, phi[-1], seed, episode + step))
            alone = replace(self.inner, steps=1, lr=self.inner.rate(step))
            start = {"step_sizes": step_sizes, "shared": shared and step == 0, "create_graph": False, "guard": guard}
            stages = adapt(self.loss, alone, phi[-1], support[-1:], len(tasks.id), **start)
            phi.append([p.detach() for p in stages[-1]])
        return phi, support

    def evaluate_task(
        self, parameters: list[Tensor], family: TaskFamily, tasks: Any, seed: int, episode: int = 1_000
    ) -> Trajectories:
        """Fresh episodes of every task under its own adapted parameters: the query. ``episode`` must not be one of the
        support's."""
        return self.collect(family, tasks, parameters, seed, episode).data

    def objective(self, source: TaskFamily, meta: list[Tensor], seed: Seeds, iteration: int) -> MetaObjective:
        """Draw tasks, collect D_0, ..., D_K with phi_0, ..., phi_K, and hand them to the outer step."""
        ids, luck = self.draw(self.config.tasks, seed, iteration, meta[0].device)
        tasks, seeds = source.tasks(ids), len(seed) if isinstance(luck, Tensor) else None
        first, steps = iteration * (self.inner.steps + 1), self.inner.steps
        own = meta if seeds is None else for_tasks(meta, len(ids) // seeds)
        phi, stages = self._adapt(own, seeds is None, source, tasks, luck, steps, first, guard=True)
        stages = [*stages, self.collect(source, tasks, phi[-1], luck, first + steps)]
        if self.config.sampling:
            stages = _scored(stages, self.stage_weights, seeds, self.shards)
        return PolicyObjective(self, stages, seeds)


class PolicyObjective(MetaObjective):
    """The meta-objective of a policy, with what a trust region asks of it."""

    def __init__(self, learner: MAML, stages: Sequence[Stage], seeds: int | None = None):
        self.policy = learner.policy
        super().__init__(
            learner.inner,
            learner.loss,
            [compact(stage) for stage in stages] if learner.config.compact else stages,
            learner.stage_weights,
            stages[0].data.reward.shape[1] // (seeds or 1),
            _take_tasks,
            learner.config.chunk,
            self._sampling_loss if learner.config.sampling else None,
            seeds,
            learner.shards,
        )
        self.numbers = self.averages = [self.mean(_episode_mean(stage.data)) for stage in stages]
        network = learner.policy.network
        known = isinstance(network, MLP) and network.activation is torch.tanh
        # These very classes: one that inherits from them may mean something else by its outputs.
        kind = type(learner.policy) in (Categorical, CategoricalMLP, Gaussian, GaussianMLP)
        self.by_hand = learner.config.by_hand and known and kind and self.extra is None

    def policy_gradient(
        self, meta: list[Tensor], surrogate: Surrogate, at_outputs: OutputLoss
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean over tasks of the weighted ``surrogate`` of the adapted policies, and its gradient, to be ascended.
        ``at_outputs`` is the surrogate's negative as ``mlp_adjoint`` wants it."""
        if self.by_hand:
            episodes = [Episodes.of(stage.data, stage.advantage) for stage in self.stages]
            inner = of_surrogate(self.policy, self.inner.surrogate)
            pairs = list(zip(episodes, episodes))  # D_k is the support of step k + 1 and the query of phi_k
            value, gradient = self.gradient_by_hand(meta, self.policy.network, inner, at_outputs, pairs)
        else:
            outer = lambda phi, stage: -surrogate(self.policy, phi, stage.data, stage.advantage)
            value, gradient = self.gradient(meta, outer)
        return -value, [-g for g in gradient]

    def fisher_vector_product(
        self, meta: list[Tensor], stages: Sequence[Stage]
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """v -> J^T F J v by hand, for the weighted divergence on ``stages`` (see ``outer``)."""
        theta, sizes = self.theta_and_sizes(meta)
        episodes = [Episodes.of(stage.data, stage.advantage) for stage in stages]
        return mlp_adjoint.fisher_vector_product(
            self.policy.network,
            of_surrogate(self.policy, self.inner.surrogate),
            of_divergence(self.policy),
            theta,
            episodes[:-1],
            episodes,
            sizes,
            stage_weights=[w / sum(self.weights) for w in self.weights],
            first_order=self.inner.first_order,
        )

    def _sampling_loss(self, phi: Sequence[list[Tensor]], stages: Sequence[Stage]) -> Tensor:
        """(M,) E-MAML's term for every support set, each under the parameters that collected it, negated."""
        terms = [sampling_term(self.policy, p, stage.data, stage.score) for p, stage in zip(phi, stages[:-1])]
        return -torch.stack(terms).sum(0)

    def returns(self) -> dict[str, Tensor]:
        """Mean over tasks of the mean return of each stage's episodes; with several processes, known with the first
        gradient."""
        return {f"return after {k} steps": mean for k, mean in enumerate(self.averages)}


def compact(stage: Stage) -> Stage:
    """The steps before an episode's end as episodes of one step, (1, M, S), S the most that any task has: sums over
    single steps are the same, and are rescaled so that their means over episodes are."""
    data, advantage, score = stage
    mask = data.mask.transpose(0, 1).flatten(1)  # (M, T N)
    index = mask.argsort(dim=-1, descending=True, stable=True)[:, : int(mask.sum(-1).max().item())]
    task = torch.arange(len(mask), device=mask.device)[:, None]
    pick = lambda x: x.transpose(0, 1).flatten(1, 2)[task, index][None]
    scale = index.shape[1] / data.mask.shape[-1]
    return Stage(Trajectories(*map(pick, data)), pick(advantage) * scale, score)


def _take_tasks(stage: Stage, part: slice) -> Stage:
    return Stage(Trajectories(*(x[:, part] for x in stage.data)), stage.advantage[:, part], stage.score[part])


def _scored(
    stages: Sequence[Stage], weights: Sequence[float], seeds: int | None = None, shards: Shards = ALONE
) -> list[Stage]:
    """Each support set scored by the weighted returns of all stages after it, less their mean over the *other* tasks
    (of its seed), which does not depend on this task's support."""
    returns = torch.stack([_episode_mean(stage.data) for stage in stages], 1)  # (M, K + 1)
    returns = returns.unflatten(0, (-1, seeds or 1))
    tasks = len(returns) * shards.size
    others = (shards.average([returns.mean(0)])[0] * tasks - returns) / (tasks - 1)
    weighted = [w * gain for w, gain in zip(weights, (returns - others).flatten(0, 1).unbind(-1))]
    after = [sum(weighted[k + 1 :], torch.zeros_like(stage.score)) for k, stage in enumerate(stages)]
    return [stage._replace(score=score) for stage, score in zip(stages, after)]


def _episode_mean(data: Trajectories) -> Tensor:
    """(M,) mean return of the episodes that count."""
    return data.returns.sum(-1) / data.mask[0].sum(-1)
