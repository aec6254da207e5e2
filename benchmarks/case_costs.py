"""What a decision costs, and why a meta-learner ends where it does: parts of ``benchmarks.case_studies``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.case_methods import Protocol, Returns, Setting, scores, trained
from ecomlib.baselines import GreedyBayes
from ecomlib.configuration import TrainConfig
from ecomlib.families.base import take
from ecomlib.learners import MAML
from ecomlib.learners.adaptation import adapt
from ecomlib.noise import AGENT, uniform
from ecomlib.rollout import Agent, trial


def training_episodes(config: TrainConfig) -> float | None:
    """Episodes that one seed's training plays, each of one unit."""
    data = config.data
    if data.transitions is not None:
        return None
    return float(config.iterations * data.tasks * data.episodes * (config.inner.steps + 1))


def first(where: Setting, count: int) -> Setting:
    """The first tasks of a list."""
    tasks = take(where.tasks, slice(0, count))
    return where._replace(tasks=tasks, blind=where.blind[:, :count], oracle=where.oracle[:, :count])


# ------------------------------------------------------------------------------------------------ milliseconds
def decision_costs(
    method: Agent | MAML, where: Setting, units: int, meta: list[Tensor] | None = None
) -> dict[str, float]:
    """Processor milliseconds for 1 and 1,000 tasks (fewer where the list is shorter): of a decision for all units, and
    of what is learned from a round."""
    found = {}
    for count in (1, 1000):
        part = first(where, count)
        timed = _learner_costs(method, meta, part) if isinstance(method, MAML) else _agent_costs(method, part, units)
        found |= {f"adapting_{count}": timed[1], f"deciding_{count}": timed[0]}
    return found


class _Timed:
    """An agent whose decisions and updates are timed."""

    def __init__(self, agent: Agent):
        self.agent, self.noise_size, self.acting, self.learning = agent, agent.noise_size, [], []

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Not timed: it is done once a trial."""
        self.agent.begin(context, tasks, episodes)

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Timed."""
        return _clocked(self.acting, lambda: self.agent.act(observation, noise))

    def observe(self, *seen: Tensor) -> None:
        """Timed."""
        _clocked(self.learning, lambda: self.agent.observe(*seen))

    def end_episode(self) -> None:
        """Timed."""
        _clocked(self.learning, self.agent.end_episode)


def _clocked(times: list[float], call: Callable[[], Any]) -> Any:
    began = time.process_time()
    result = call()
    times.append(1e3 * (time.process_time() - began))
    return result


def _agent_costs(agent: Agent, where: Setting, units: int) -> tuple[float, float]:
    """Milliseconds of a decision, and of all updates of an episode: over two episodes, the first of which warms up."""
    timed = _Timed(agent)
    trial(where.family, where.tasks, timed, 2, units, 0, progress=False)
    steps = where.family.horizon
    return statistics.median(timed.acting[steps:]), sum(timed.learning[steps + 1 :])


def _learner_costs(learner: MAML, meta: list[Tensor], where: Setting) -> tuple[float, float]:
    """Milliseconds of a decision with every task's own parameters, and of an inner step."""
    family, tasks = where.family, where.tasks
    phi, support = learner.train_task(meta, family, tasks, 0, 1)
    alone, acting, learning = replace(learner.inner, steps=1, lr=learner.inner.rate(0)), [], []
    observation, ids = support[0].data.observation[0], tasks.id
    luck = uniform(0, ids, torch.arange(observation.shape[1]), 0, 0, AGENT, learner.policy.noise_size)
    step = lambda: adapt(learner.loss, alone, phi[-1], support, len(ids), shared=False, create_graph=False)
    for _ in range(5):
        with torch.no_grad():
            _clocked(acting, lambda: learner.policy.act(phi[-1], observation, luck, None))
        _clocked(learning, step)
    return statistics.median(acting[1:]), statistics.median(learning[1:])


# ------------------------------------------------------------------------------------------------ explanations
class SameData(GreedyBayes):
    """Does what it is told, ``actions`` (E - 1, T, M, N, ...), and then, learning no more, what its posterior thinks
    best: nobody who has only those data, and the prior, can expect more of the round that follows."""

    def __init__(self, family: Any, actions: Tensor, particles: int):
        super().__init__(family, particles, stores=True)
        self.actions = actions

    def begin(self, context: Tensor, tasks: int, episodes: int) -> None:
        """Back to the prior, before the first step."""
        super().begin(context, tasks, episodes)
        self.told = iter(self.actions.flatten(0, 1))
        self.left = len(self.actions)

    def choose(self, observation: Tensor, noise: Tensor) -> Tensor:
        """As told, then the best action on average."""
        return next(self.told) if self.left else super().choose(observation, noise)

    def observe(self, action: Tensor, reward: Tensor, next_observation: Tensor, done: Tensor) -> None:
        """Learn while told."""
        if self.left:
            super().observe(action, reward, next_observation, done)

    def end_episode(self) -> None:
        """One round less."""
        self.left = max(0, self.left - 1)


def explanations(
    learner: MAML, metas: list[list[Tensor]], where: Setting, units: int, protocol: Protocol
) -> list[dict[str, Any]]:
    """Last-round scores that say what holds a learner back, on 300 tasks: its own; with ten times the episodes a round
    (less noise: what is left is the policy class and the number of steps); of a Bayesian who is handed its data (what
    these data are worth); and of the same policy trained on a single task alone for long (what the class can express;
    100 tasks, one seed)."""
    part = first(where, 300)
    own = Returns(*trained(learner, metas, part, protocol), True)
    more = MAML(learner.policy, learner.inner, learner.outer, replace(learner.config, episodes=10 * units))
    found = [
        ("the learner", own),
        ("ten times the episodes a round", Returns(*trained(more, metas, part, protocol), True)),
    ]
    rows = [{"what": what} | scores(x, part)["rounds"][-1] for what, x in found]
    if (handed := _same_data(learner, metas, part, units, protocol)) is not None:
        values = np.stack([own.values[:, 0], handed], 1)  # the first round does not matter: one that is always there
        alone = part._replace(blind=part.blind[:2], oracle=part.oracle[:2])
        kept = Returns(values, np.zeros_like(values, dtype=bool), True)
        rows.append({"what": "a Bayesian with the learner's data"} | scores(kept, alone)["rounds"][-1])
    return [*rows, {"what": "the policy trained on the task alone"} | _alone(learner, metas[0], first(where, 100))]


def _same_data(learner: MAML, metas: Any, where: Setting, units: int, protocol: Protocol) -> Any:
    """(S, M) returns of the last round; None for a family without a belief."""
    found, particles = [], protocol.size(units)
    for meta in metas:
        _, support = learner.train_task(meta, where.family, where.tasks, protocol.luck, protocol.rounds - 1)
        actions = torch.stack([stage.data.action for stage in support])
        try:
            agent = SameData(where.family, actions, particles)
        except (TypeError, ValueError):
            return None
        played = trial(where.family, where.tasks, agent, protocol.rounds, units, protocol.luck, progress=False)
        found.append(played.returns[-1].mean(-1).double().numpy())
    return np.stack(found)


def _alone(learner: MAML, meta: list[Tensor], where: Setting, steps: int = 80, episodes: int = 50) -> dict[str, Any]:
    """Score after many small inner steps on many episodes: at least what the policy class can reach."""
    lr = learner.inner.rate(0)
    inner = replace(learner.inner, steps=1, lr=lr / 4 if isinstance(lr, float) else lr)
    patient = MAML(learner.policy, inner, learner.outer, replace(learner.config, episodes=episodes, stage_weights=None))
    phi, _ = patient.train_task(meta, where.family, where.tasks, 1, steps)
    data = patient.evaluate_task(phi[-1], where.family, where.tasks, 1, episode=steps)
    returns = data.returns.mean(-1).double().numpy()
    alone = where._replace(blind=where.blind[:1], oracle=where.oracle[:1])
    kept = Returns.of_agent(returns[None])
    return {"tasks of it": len(returns), "inner steps": steps, "episodes a step": episodes} | scores(kept, alone)[
        "rounds"
    ][0]
