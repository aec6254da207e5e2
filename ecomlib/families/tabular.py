"""Task families small enough to be solved exactly: chapters "MDP formulation" and "Policy gradients".

Arrays: ``transition`` (M, S, A, S) holds P(s' | s, a), ``reward`` (M, S, A, S) holds r(s, a, s'), ``start`` (M, S).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from .. import noise as noise_
from .base import check, number, require, whole


class TabularTasks(NamedTuple):
    """M finite MDPs with S states and A actions. All but ``id`` and ``start`` are hidden from the merchant."""

    id: Tensor  # (M,)
    transition: Tensor  # (M, S, A, S)
    reward: Tensor  # (M, S, A, S)
    start: Tensor  # (M, S)


class TabularState(NamedTuple):
    """Where N episodes of M tasks stand. Both fields are (M, N)."""

    state: Tensor  # int64
    time: Tensor  # int64


# ----------------------------------------------------------------------------------------------- exact solvers
def action_value(tasks: TabularTasks, value: Tensor, discount: float) -> Tensor:
    """(M, S, A) expected reward plus discounted value (M, S) of where it leads: the bracket of equation
    (eq-bellman-optimality)."""
    return (tasks.transition * (tasks.reward + discount * value[:, None, None, :])).sum(-1)


def policy_evaluation(tasks: TabularTasks, policy: Tensor, discount: float) -> Tensor:
    """(M, S) value of a stationary policy (M, S, A) by one linear solve, equation (eq-bellman-matrix). Needs discount
    < 1."""
    _check_discount(discount)
    transition = torch.einsum("msa,msat->mst", policy, tasks.transition)
    reward = torch.einsum("msa,msat,msat->ms", policy, tasks.transition, tasks.reward)
    eye = torch.eye(transition.shape[-1], dtype=transition.dtype, device=transition.device)
    return torch.linalg.solve(eye - discount * transition, reward[..., None])[..., 0]


def value_iteration(tasks: TabularTasks, discount: float, tolerance: float = 1e-12) -> tuple[Tensor, list[float]]:
    """Apply the Bellman optimality operator until two sweeps differ by less than ``tolerance`` in the largest entry.

    Returns the optimal values (M, S) and the largest change of each sweep, which shrinks at least by the factor
    ``discount`` (equation (eq-contraction)).
    """
    _check_discount(discount)
    require(number(tolerance, 0), "tolerance", tolerance, "a finite number > 0")
    value, changes = torch.zeros_like(tasks.start), [float("inf")]
    while changes[-1] >= tolerance:
        new = action_value(tasks, value, discount).amax(-1)
        changes.append((new - value).abs().max().item())
        value = new
    return value, changes[1:]


def policy_iteration(tasks: TabularTasks, discount: float) -> tuple[Tensor, Tensor, int]:
    """Evaluate exactly, act greedily, repeat until no action changes. Returns values (M, S), actions (M, S), rounds."""
    actions = torch.zeros(tasks.start.shape, dtype=torch.int64, device=tasks.start.device)
    for rounds in range(1, 1000):
        policy = torch.nn.functional.one_hot(actions, tasks.transition.shape[2]).to(tasks.reward.dtype)
        value = policy_evaluation(tasks, policy, discount)
        q = action_value(tasks, value, discount)
        # Keep the old action unless another is better by more than rounding: ties would otherwise flip for ever.
        better = q.amax(-1) > q.gather(-1, actions[..., None])[..., 0] + 1e-12
        if not better.any():
            return value, actions, rounds
        actions = torch.where(better, q.argmax(-1), actions)
    raise RuntimeError("policy iteration did not settle in 1,000 rounds: check that transition rows sum to 1")


def finite_horizon(tasks: TabularTasks, horizon: int, discount: float = 1.0, policy: Tensor | None = None) -> Tensor:
    """(T, M, S, A) action values with ``horizon`` - t steps to go, by backward induction, equation
    (eq-backward-induction).

    Afterwards the best action is taken, or ``policy``'s, (M, S, A) or (S, A) probabilities, if given.
    """
    value, result = torch.zeros_like(tasks.start), []
    for _ in range(horizon):
        q = action_value(tasks, value, discount)
        value = q.amax(-1) if policy is None else (policy * q).sum(-1)
        result.append(q)
    return torch.stack(result[::-1])


def belief_update(tasks: TabularTasks, belief: Tensor, state: int, action: int, following: int) -> Tensor:
    """(..., M) probability of each candidate task after a step was seen, equation (eq-belief-update)."""
    weight = belief * tasks.transition[:, state, action, following]
    return weight / weight.sum(-1, keepdim=True)


class BayesAdaptive:
    """The problem of a merchant who knows M candidate ``tasks``, not which is true: its state is (step, state, belief).

    ``episodes`` sessions of ``horizon`` steps, all starting in one state, follow each other; the belief (M,) carries
    over. Exact, by recursion over the beliefs that can be reached, equation (eq-bayes-adaptive): for a few tasks.
    """

    def __init__(self, tasks: TabularTasks, horizon: int, episodes: int = 1):
        starts = tasks.start.argmax(-1).tolist()
        if len(set(starts)) > 1 or (tasks.start.amax(-1) < 1).any():
            raise ValueError(f"start = {tasks.start.tolist()}: every task must start in the same single state")
        if (tasks.reward != tasks.reward[:1]).any():
            raise ValueError(
                "reward differs between the tasks: it would be evidence, and only transitions count as such"
            )
        self.start, self.horizon, self.steps = starts[0], horizon, horizon * episodes
        self.transition = tasks.transition.numpy()
        self.gain = (tasks.transition * tasks.reward).sum(-1).numpy()  # (M, S, A)
        self.solved: dict[tuple, float] = {}

    def outcomes(self, step: int, state: int, action: int, belief: np.ndarray) -> Iterator[tuple]:
        """(probability under each task (M,), next state, next belief (M,)) of everything that can be seen next."""
        for following, likelihood in enumerate(self.transition[:, state, action].T):
            if (total := belief @ likelihood) > 0:
                ended = (step + 1) % self.horizon == 0
                yield likelihood, self.start if ended else following, belief * likelihood / total

    def action_values(self, step: int, state: int, belief: np.ndarray) -> np.ndarray:
        """(A,) expected reward to come of each action, if the Bayes-optimal ones follow."""
        values = belief @ self.gain[:, state]
        for action in range(len(values)):
            for likelihood, following, updated in self.outcomes(step, state, action, belief):
                values[action] += belief @ likelihood * self.value(step + 1, following, updated)
        return values

    def value(self, step: int, state: int, belief: np.ndarray) -> float:
        """Expected reward to come of the Bayes-optimal policy."""
        key = (step, state, *np.round(belief, 12))
        if step < self.steps and key not in self.solved:
            self.solved[key] = self.action_values(step, state, belief).max()
        return self.solved.get(key, 0.0)

    def evaluate(self, rule: Callable[[int, int, np.ndarray], np.ndarray], belief: np.ndarray) -> np.ndarray:
        """(M, steps) exact mean reward of a step under each task, when ``rule(step, state, belief)`` (A,) acts."""
        result = np.zeros((len(belief), self.steps))
        reached = {(self.start, *belief): np.ones(len(belief))}  # probability of being here, under each task
        for step in range(self.steps):
            after = defaultdict(lambda: np.zeros(len(belief)))
            for (state, *now), reach in reached.items():
                for action, chosen in enumerate(rule(step, state, np.array(now))):
                    result[:, step] += reach * chosen * self.gain[:, state, action]
                    for likelihood, following, updated in self.outcomes(step, state, action, np.array(now)):
                        after[(following, *np.round(updated, 12))] += reach * chosen * likelihood
            reached = {key: reach for key, reach in after.items() if reach.any()}
        return result


def _check_discount(discount: float) -> None:
    if not 0 <= discount < 1:
        raise ValueError(f"discount = {discount}: must lie in [0, 1) when the horizon is infinite")


# ----------------------------------------------------------------------------------------------- the shop
STATES = ("browse", "consider", "cart", "bought", "left")
ACTIONS = ("wait", "recommend", "discount")


@dataclass(frozen=True)
class ShopMDP:
    """One shopping session: browse -> consider -> cart -> bought, or left. The merchant waits, recommends or discounts.

    Three hidden numbers make a shopper: interest (moves forward by itself), openness (recommendations help) and thrift
    (a discount helps). A purchase pays 1, after a discount on that step 1 - ``discount_cost``; a recommendation that
    does not fit annoys. Small enough to solve, enumerate and draw. Chapter "MDP formulation", table of transitions.
    """

    horizon: int = 6
    """Steps in a session."""
    discount_cost: float = 0.3
    """Share of the margin that a discount gives away."""
    leave: float = 0.08
    """Probability of leaving at a step without a recommendation."""
    annoyance: float = 0.12
    """Added to the probability of leaving by a recommendation, times (1 - openness)."""

    def __post_init__(self):
        check(self, "horizon", lambda x: whole(x, 1), "a whole number >= 1")
        check(self, "discount_cost", lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]")
        check(self, "leave", lambda x: number(x) and 0 <= x < 1, "a number in [0, 1)")
        check(self, "annoyance", lambda x: number(x) and 0 <= x < 1 - self.leave, "a number in [0, 1 - leave)")

    noise_size = 1
    observation_size = len(STATES) + 1
    actions = len(ACTIONS)

    def tasks(self, task_id: Tensor) -> TabularTasks:
        """The shoppers named by ``task_id`` (M,)."""
        replica = torch.zeros(1, dtype=torch.int64, device=task_id.device)
        return self._build(task_id, noise_.uniform(0, task_id, replica, 0, 0, noise_.PRIOR, 3)[:, 0])

    def prior_sample(self, size: int) -> TabularTasks:
        """A fixed quasi-random (Sobol) sample of the prior."""
        points = SobolEngine(3, scramble=True, seed=0).draw(size, dtype=torch.float64)
        return self._build(torch.arange(size), points.to(torch.get_default_dtype()))

    def shopper(self, interest: float, openness: float, thrift: float) -> TabularTasks:
        """One shopper (M = 1) with these hidden numbers, each in [0, 1]."""
        for name, value in (("interest", interest), ("openness", openness), ("thrift", thrift)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}: must lie in [0, 1]")
        hidden = torch.tensor([[interest, openness, thrift]], dtype=torch.get_default_dtype())
        return self._build(torch.zeros(1, dtype=torch.int64), hidden)

    def _build(self, task_id: Tensor, hidden: Tensor) -> TabularTasks:
        """Transition and reward tables from (interest, openness, thrift) (M, 3)."""
        interest, openness, thrift = hidden.unbind(-1)
        tasks, states, actions = len(hidden), len(STATES), len(ACTIONS)
        transition = hidden.new_zeros(tasks, states, actions, states)
        reward = torch.zeros_like(transition)
        browse, consider, cart, bought, left = range(states)
        wait, recommend, discount = range(actions)
        unaided = 0.1 + 0.3 * interest
        forward = torch.stack((unaided, unaided + 0.4 * openness, unaided + 0.15 * thrift), -1)
        close = torch.stack((unaided, unaided, unaided + 0.5 * thrift), -1)
        leave = torch.full_like(forward, self.leave)
        leave[:, recommend] += self.annoyance * (1 - openness)
        for state, probability in ((browse, forward), (consider, forward), (cart, close)):
            transition[:, state, :, state + 1] = probability * (1 - leave)
            transition[:, state, :, left] = leave
            transition[:, state, :, state] = 1 - transition[:, state].sum(-1)
        for absorbing in (bought, left):
            transition[:, absorbing, :, absorbing] = 1
        reward[:, cart, :, bought] = 1.0
        reward[:, cart, discount, bought] = 1 - self.discount_cost
        start = hidden.new_zeros(tasks, states)
        start[:, browse] = 1
        return TabularTasks(task_id, transition, reward, start)

    def shifted(self) -> ShopMDP:
        """Shoppers who leave more easily: both chances double, unless that more than halves the chance to stay."""
        leave = min(2 * self.leave, (1 + self.leave) / 2)
        annoyance = min(2 * self.annoyance, (1 + self.leave + self.annoyance) / 2 - leave)
        return replace(self, leave=leave, annoyance=annoyance)

    # ------------------------------------------------------------------------------------------- the protocol
    def context(self, tasks: TabularTasks) -> Tensor:
        """(M, 0): nothing is known of a shopper beforehand."""
        return tasks.start[:, :0]

    def reset(self, tasks: TabularTasks, episodes: int, noise: Tensor) -> TabularState:
        """Every session starts where ``start`` says, by inverse transform."""
        state = noise_.inverse_transform(tasks.start[:, None].expand(-1, episodes, -1), noise[..., 0])
        return TabularState(state, torch.zeros_like(state))

    def observe(self, tasks: TabularTasks, state: TabularState) -> Tensor:
        """(M, N, 6): one-hot state, then time / horizon."""
        one_hot = torch.nn.functional.one_hot(state.state, len(STATES)).to(tasks.start.dtype)
        return torch.cat((one_hot, (state.time / self.horizon).to(one_hot.dtype)[..., None]), -1)

    def step(
        self, tasks: TabularTasks, state: TabularState, action: Tensor, noise: Tensor
    ) -> tuple[TabularState, Tensor, Tensor]:
        """One step of the session. ``action`` (M, N) int64 indexes ``ACTIONS``."""
        task = torch.arange(len(tasks.id), device=action.device)[:, None].expand_as(action)
        following = noise_.inverse_transform(tasks.transition[task, state.state, action], noise[..., 0])
        reward = tasks.reward[task, state.state, action, following]
        time = state.time + 1
        done = (time >= self.horizon) | (following >= STATES.index("bought"))
        return TabularState(following, time), reward, done

    def oracle_return(self, tasks: TabularTasks) -> Tensor:
        """(M,) exact, by backward induction over the session."""
        return (tasks.start * finite_horizon(tasks, self.horizon)[0].amax(-1)).sum(-1)

    def blind_return(self, tasks: TabularTasks) -> Tensor:
        """(M,) exact expected return of ``blind_plan``, the table (step, state) -> action that is best for the
        prior."""
        return _plan_return(tasks, blind_plan(self).to(tasks.start.device))


def _plan_return(tasks: TabularTasks, plan: Tensor) -> Tensor:
    """(M,) expected return of a plan (T, S) of actions."""
    value = torch.zeros_like(tasks.start)
    for actions in plan.flip(0):
        chosen = actions.expand(len(value), -1)[..., None]
        value = action_value(tasks, value, 1.0).gather(-1, chosen)[..., 0]
    return (tasks.start * value).sum(-1)


@lru_cache(maxsize=32)
def blind_plan(family: ShopMDP) -> Tensor:
    """(T, S) int64: the action of each step and state that is best on average over 4,096 quasi-random shoppers.

    Coordinate ascent from the best of the 27 rules that ignore the time: no change of a single entry improves the
    result.
    """
    prior = family.prior_sample(4096)
    mean = lambda plan: _plan_return(prior, plan).mean().item()
    rules = [torch.tensor((*rule, 0, 0)).repeat(family.horizon, 1) for rule in product(range(len(ACTIONS)), repeat=3)]
    plan, improved = max(rules, key=mean), True
    best = mean(plan)
    while improved:
        improved = False
        for step, state, action in product(reversed(range(family.horizon)), range(3), range(len(ACTIONS))):
            changed = plan.clone()
            changed[step, state] = action
            if (value := mean(changed)) > best + 1e-12:
                plan, best, improved = changed, value, True
    return plan
