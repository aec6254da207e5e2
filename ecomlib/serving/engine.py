"""One trained model as a decision maker: state and request in, answer and new state out. No web, no disk, no clock, so
that an answer depends on the task's state and the model alone (chapter "Shipping a policy")."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import noise
from ..config_files import config_hash
from ..families.base import number, require, whole
from ..families.pricing import LogitPricing, Market, ShelfState
from ..learners.adaptation import adapt
from ..learners.maml import Stage
from ..learners.objective import split_meta
from ..learners.rl2 import RL2
from ..rollout import Trajectories
from ..runs import LoadedRun
from .state import Decision, Support, TaskState

LARGEST = 1e9
"""No cost and no number of units is beyond this: a slip of the keyboard is refused instead of learned from."""


class OpenDecision(ValueError):
    """A second decision was asked for before the feedback on the first, ``decision``."""

    def __init__(self, task: str, decision: Decision):
        super().__init__(f"task = {task!r} waits for the feedback on decision {decision.id!r}; allowed: that first")
        self.decision = decision


class Feedback(NamedTuple):
    """What a day's sales led to."""

    reward: float
    """Profit of the day."""
    adapted: bool
    """Whether the task got parameters of its own from it."""
    episode: int | None
    """Number of the episode that it completed, None within one."""
    episode_reward: float
    """Profit of the episode so far."""
    stage: int
    """Inner steps that the parameters had taken which posted the price."""


class Engine:
    """A run's policy behind three functions: ``begin``, ``decide``, ``feedback``.

    A task adapts as ``MAML.train_task`` does: ``support_episodes`` episodes, an inner step on them, and so on for
    ``steps`` steps; its parameters then stay. Episodes that the simulator plays side by side come one after the other
    here, and luck has the same keys, (seed, hash of the task's name, replica, round, day): a served product with the
    simulator's shoppers meets exactly the simulated trial. A recurrent policy remembers the episode so far and, as in
    training, begins each with an empty memory. ``version`` names all that decisions depend on: configuration, seed,
    iteration, parameters, inner steps (k) and support episodes of each (n).
    """

    def __init__(self, run: LoadedRun, steps: int | None = None, support_episodes: int | None = None):
        """``steps`` and ``support_episodes`` are by default those of training."""
        if not isinstance(run.family, LogitPricing):
            raise ValueError(f"family = {type(run.family).__name__}; allowed: LogitPricing, which alone can be served")
        if isinstance(run.learner, RL2):
            raise ValueError(
                f"algorithm = {run.config.algorithm}; allowed: the others, which the service can adapt and store"
            )
        self.family, self.learner, self.seed = run.family, run.learner, run.seed
        self.steps = run.learner.inner.steps if steps is None else steps
        self.support_episodes = run.learner.config.episodes if support_episodes is None else support_episodes
        require(whole(self.steps, 0), "steps", self.steps, "a whole number >= 0")
        require(whole(self.support_episodes, 1), "support_episodes", self.support_episodes, "a whole number >= 1")
        self.theta, self.step_sizes = split_meta(self.learner.inner, [p.detach() for p in run.meta])
        self.adapts = self.learner.inner.adapts(self.theta)
        self.dtype = self.theta[0].dtype
        digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in run.meta)).hexdigest()
        adapts = f"k{self.steps}n{self.support_episodes}" if self.steps else "k0"
        self.version = f"{config_hash(run.config)[:8]}-s{run.seed}-i{run.iteration}-{digest[:8]}-{adapts}"
        if self.steps:
            self._advantage_exists()

    def begin(self, task: str) -> TaskState:
        """A task that nothing is known of. Raises ``ValueError`` unless the name is 1 to 200 printable characters."""
        valid = isinstance(task, str) and 0 < len(task) <= 200 and task.isprintable()
        require(valid, "task", task, "1 to 200 printable characters")
        return TaskState(task, stock=float("inf") if self.family.stock is None else float(self.family.stock))

    def decide(self, state: TaskState, unit_cost: float) -> tuple[TaskState, Decision]:
        """Today's price. Raises ``OpenDecision`` before yesterday's feedback, ``ValueError`` for a bad cost."""
        valid = number(unit_cost, 0) and unit_cost <= LARGEST
        require(valid, "unit_cost", unit_cost, f"a number > 0, at most {LARGEST:g}")
        if state.open is not None:
            raise OpenDecision(state.task, state.open)
        day, family, policy = state.answered % self.family.days, self.family, self.learner.policy
        observation = self._observe(state, day, float(unit_cost))
        with torch.no_grad():
            luck = self._luck(state, day)
            action, log_prob, memory = policy.act(self.parameters(state), observation, luck, state.memory)
        value = action.item()
        low, high = family.markups[0], family.markups[-1]
        markup = float(family.markups[value] if family.actions else min(max(value, low), high))
        name = hashlib.sha256(f"{self.version}\n{state.answered}\n{state.task}".encode()).hexdigest()[:20]
        cost, probability = float(unit_cost), log_prob.exp().item()
        decision = Decision(name, state.answered, day, cost, value, markup, markup * cost, probability)
        if state.stage < self.steps:
            state = state._replace(support=self._extended(state.support, observation, action, log_prob))
        return state._replace(open=decision, memory=memory), decision

    def feedback(self, state: TaskState, units: int) -> tuple[TaskState, Feedback]:
        """Units sold at the open decision's price. After the last day of a support set, the task adapts. Raises
        ``ValueError`` for a bad number of units or where no decision is open."""
        if state.open is None:
            raise ValueError(f"task = {state.task!r} has no open decision")
        limit = min(state.stock, LARGEST)
        require(whole(units, 0, limit), "units", units, f"a whole number from 0 to {limit:g}")
        decision, units = state.open, int(units)
        reward, stage = decision.unit_cost * (decision.markup - 1) * units, state.stage
        sold = {"markup": decision.markup, "sold": float(units), "stock": state.stock - units}
        state = state._replace(answered=state.answered + 1, earned=state.earned + reward, open=None, **sold)
        if state.support is not None:
            paid = state.support.reward
            paid = torch.cat((paid, paid.new_tensor([reward])))
            state = state._replace(support=state.support._replace(reward=paid))
        if state.answered % self.family.days:
            return state, Feedback(reward, False, None, state.earned, stage)
        episode, earned = state.answered // self.family.days - 1, state.earned
        fresh = self.begin(state.task)
        state = state._replace(markup=0.0, sold=0.0, stock=fresh.stock, earned=0.0, memory=None)
        full = state.support is not None and len(state.support.reward) == self.family.days * self.support_episodes
        state = self._adapted(state) if full else state
        return state, Feedback(reward, full and not state.diverged, episode, earned, stage)

    def parameters(self, state: TaskState) -> list[Tensor]:
        """theta, or the task's own parameters where it has adapted."""
        parameters = list(self.theta)
        for i, own in zip(self.adapts, state.phi):
            parameters[i] = own
        return parameters

    def _observe(self, state: TaskState, day: int, cost: float) -> Tensor:
        """(1, 1, observation), built by the family from what a merchant knows."""
        one = lambda value: torch.full((1, 1), value, dtype=self.dtype)
        hidden = torch.full((1,), torch.nan, dtype=self.dtype)
        market = Market(torch.zeros(1, dtype=torch.int64), hidden, hidden, hidden, torch.full_like(hidden, cost))
        return self.family.observe(market, ShelfState(*map(one, (day, state.markup, state.sold, state.stock))))

    def _luck(self, state: TaskState, day: int) -> Tensor:
        """(1, 1, noise_size) uniforms with the keys of the simulated trial."""
        episode = state.answered // self.family.days
        first = state.stage * self.support_episodes  # of this round
        task = int.from_bytes(hashlib.sha256(state.task.encode()).digest()[:8], "big") % 2**62
        key = torch.tensor([task]), torch.tensor([episode - first])
        return noise.uniform(
            self.seed, *key, state.stage, day, noise.POLICY, self.learner.policy.noise_size, self.dtype
        )

    def _extended(self, support: Support | None, observation: Tensor, action: Tensor, log_prob: Tensor) -> Support:
        """With the day that is about to be sold; its reward follows with the feedback."""
        today = observation[0], action[0], log_prob[0]
        if support is None:
            return Support(*today, torch.zeros(0, dtype=self.dtype))
        return Support(*(torch.cat((old, new)) for old, new in zip(support, today)), support.reward)

    def _adapted(self, state: TaskState) -> TaskState:
        """One inner step on the complete support set, equation (eq-inner-step), of the learner's own surrogate."""
        days, episodes, inner = self.family.days, self.support_episodes, self.learner.inner
        # Episode after episode -> (T, 1, N).
        fields = [x.unflatten(0, (episodes, days)).transpose(0, 1)[:, None] for x in state.support]
        observation, action, log_prob, reward = fields
        data = Trajectories(observation, action, log_prob, reward, torch.ones_like(reward))
        stage = Stage(data, self.learner.config.advantage(data), torch.zeros_like(reward[0, :, 0]))
        one = replace(inner, steps=1, lr=inner.rate(state.stage))
        start = {"step_sizes": self.step_sizes, "shared": not state.phi, "create_graph": False, "guard": False}
        phi = adapt(self.learner.loss, one, self.parameters(state), [stage], 1, **start)[-1]
        own = tuple(phi[i].detach() for i in self.adapts)
        if not all(p.isfinite().all() for p in own):  # a shop cannot stop selling: keep what worked
            return state._replace(stage=state.stage + 1, support=None, diverged=True)
        return state._replace(stage=state.stage + 1, support=None, phi=own, diverged=False)

    def _advantage_exists(self) -> None:
        """Refuse at the start what would fail on the last day of the first support set."""
        shape = self.family.days, 1, self.support_episodes
        zeros = torch.zeros(shape, dtype=self.dtype)
        observation = torch.zeros(*shape, self.family.observation_size, dtype=self.dtype)
        data = Trajectories(observation, zeros, zeros, zeros, zeros)
        try:
            self.learner.config.advantage(data)
        except ValueError as error:
            raise ValueError(f"support_episodes = {self.support_episodes}: {error}") from None
