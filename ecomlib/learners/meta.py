"""What supervised and reinforcement meta-learners share: an outer step that improves the meta-objective of an iteration
(``objective.py``), and the loop (chapters "MAML, derived" and "Meta-reinforcement learning")."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from ..families.base import SPLIT_SEEDS, check, number, require, whole
from .adaptation import Inner
from .finite import check_finite, deferred, open_checks
from .objective import MetaObjective
from .sharding import ALONE, Shards

Seeds = int | Sequence[int]
"""The seed of a run, or those of a batch of runs."""


# ----------------------------------------------------------------------------------------------- outer steps
class OuterStep(Protocol):
    """How the meta-parameters move, given a ``MetaObjective``. Its settings are its only state."""

    name: str
    """What stands before "-MAML" in the name of the learner."""
    batches_seeds: bool
    """Whether meta-parameters may have a seed axis: no decision is taken for several seeds together."""

    def update(self, objective: Any, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict[str, Tensor]]:
        """New meta-parameters, what to remember until the next call (first None), and numbers worth logging, each ()
        or, with a seed axis, (S,)."""


Memory = dict[str, list[Tensor]]
"""What Adam remembers: ``step`` (), ``exp_avg`` and ``exp_avg_sq``, shapes as the parameters. One tensor for each
meta-parameter; with a seed axis, (S, ...)."""


def adam_step(
    meta: list[Tensor],
    gradient: list[Tensor],
    lr: float | Sequence[float],
    memory: Memory | None,
    seeds: int | None = None,
) -> tuple[list[Tensor], Memory]:
    """One step of ``torch.optim.Adam`` down ``gradient``, as a function: its state goes in and comes out. ``lr`` is one
    step size, or one for each parameter. Adam treats every number by itself, so that runs with a seed axis in front,
    (S, ...), do not touch each other."""
    leaves = [p.detach().clone().requires_grad_() for p in meta]
    rates = [lr] * len(meta) if isinstance(lr, float | int) else lr
    optimiser = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(leaves, rates, strict=True)])
    for i, (leaf, g) in enumerate(zip(leaves, gradient)):
        leaf.grad = g
        if memory is not None:
            own = {name: values[i].clone() for name, values in memory.items()}
            step = own["step"].to("cpu")  # where torch keeps it
            own["step"] = step if seeds is None else step[0]  # seeds go in step
            optimiser.state[leaf] = own
    optimiser.step()
    memory = {name: [optimiser.state[leaf][name] for leaf in leaves] for name in ("step", "exp_avg", "exp_avg_sq")}
    if seeds is not None:
        memory["step"] = [step.repeat(seeds) for step in memory["step"]]
    return [p.detach() for p in leaves], memory


@dataclass(frozen=True)
class GradientStep:
    """One Adam step down the meta-gradient of an iteration's data: supervised MAML."""

    lr: float = 1e-3
    """beta, the outer step size."""
    name = "supervised"
    batches_seeds = True

    def __post_init__(self):
        check(self, "lr", lambda x: number(x, 0), "a finite number > 0")

    def update(self, objective: MetaObjective, meta: list[Tensor], memory: Any) -> tuple[list[Tensor], Any, dict]:
        """As ``OuterStep.update``."""
        value, gradient = objective.gradient(meta, objective.loss)
        meta, memory = adam_step(meta, gradient, self.lr, memory, objective.seeds)
        return meta, memory, {"loss": value}


# ----------------------------------------------------------------------------------------------- the loop
class MetaTraining(NamedTuple):
    """Where meta-training stands: everything needed to go on, and what it logged so far."""

    iteration: int
    """Iterations done."""
    meta: list[Tensor]
    """Meta-parameters; with a seed axis in front where several seeds train together."""
    memory: Any
    """What the outer step remembers (Adam's moments)."""
    history: list[dict[str, float | list[float]]]
    """Numbers logged by each iteration, or a list of the seeds' numbers."""


class MetaLearner:
    """Learns parameters from which a few steps lead to good ones. The verbs:

    - ``train_task``: adapt to tasks from their support data; gives phi_0, ..., phi_K;
    - ``evaluate_task``: how adapted parameters do on query data that adaptation has not seen;
    - ``meta_train``: many tasks, one outer step each iteration.
    """

    name: str
    inner: Inner
    outer: OuterStep
    shards: Shards = ALONE
    """Which part of an iteration's tasks this process has (``sharding.py``); set it before training."""

    @property
    def batches_seeds(self) -> bool:
        """Whether ``meta_train`` takes a sequence of seeds."""
        return self.outer.batches_seeds

    def initial(self, generator: Generator) -> list[Tensor]:
        """Meta-parameters to start from: theta, then step sizes where they are learned."""
        raise NotImplementedError

    def objective(self, source: Any, meta: list[Tensor], seed: Seeds, iteration: int) -> MetaObjective:
        """Draw the tasks and the data of an iteration."""
        raise NotImplementedError

    def tasks_of(self, iteration: int) -> int:
        """Tasks that an iteration draws, those of all processes together."""
        raise NotImplementedError

    def draw(self, tasks: int, seed: Seeds, iteration: int, device: torch.device) -> tuple[Tensor, int | Tensor]:
        """Ids of this process's M tasks of an iteration, (M,), and their seed. Several seeds draw their own tasks each:
        (M S,), in the order of ``objective``, and the seed of each, (M S,)."""
        alone = whole(seed, -math.inf)
        seeds = [seed] if alone else list(seed)
        own = lambda s: torch.randint(2**62, (tasks,), generator=iteration_generator(s, iteration))
        part = self.shards.part(tasks)
        ids = to_device(torch.stack([own(s) for s in seeds], 1)[part].flatten(), device)
        if (checks := open_checks()) is not None:
            checks.first_task = part.start
        return ids, seeds[0] if alone else to_device(torch.tensor(seeds).repeat(part.stop - part.start), device)

    def meta_train(
        self,
        source: Any,
        seed: Seeds,
        iterations: int,
        start: MetaTraining | None = None,
        device: str = "cpu",
        progress: bool = True,
        callback: Callable[[MetaTraining], None] | None = None,
    ) -> MetaTraining:
        """``iterations`` outer steps on fresh tasks of ``source``, a family.

        Continues ``start`` if given, with the same numbers as an uninterrupted run: an iteration depends only on
        (seed, its number, meta-parameters, memory). ``callback`` sees every state, to save or to plot it. Raises
        ``FloatingPointError`` naming iteration, task, step and tensor at the first value that is not finite.

        A sequence of S seeds trains S runs in one batch, each with the numbers (up to rounding) that it has alone:
        meta-parameters and memory get a leading axis (S, ...), and values of the history are lists. It pays where a run
        alone leaves the machine waiting: small tasks, or a GPU (``benchmarks/seed_batch.py``). A value that is not
        finite ends the batch, and the seed is named. Raises ``ValueError`` where the outer step cannot
        (``batches_seeds``).

        With ``shards`` of several processes all of them call this, and get the same result.
        """
        require(whole(iterations, 1), "iterations", iterations, "a whole number >= 1")
        seeds = None if whole(seed, -math.inf) else self._seeds(seed)
        seed = index(seed) if seeds is None else seeds
        if start is None:
            each = [self.initial(Generator().manual_seed(s)) for s in ([seed] if seeds is None else seeds)]
            meta = each[0] if seeds is None else [torch.stack(same) for same in zip(*each)]
            start = MetaTraining(0, [p.to(device) for p in meta], None, [])
        same = seeds is None or all(len(p) == len(seeds) for p in start.meta)
        require(same, "seed", seed, f"the seeds that `start` was trained with, {len(start.meta[0])} of them")
        state = start._replace(history=list(start.history))
        remaining, silent = range(state.iteration, iterations), not progress or self.shards.rank > 0
        for iteration in tqdm(remaining, desc=self.name, unit="iteration", disable=silent):
            try:
                with deferred(seeds) as checks:
                    objective = self.objective(source, state.meta, seed, iteration)
                    meta, memory, log = self.outer.update(objective, state.meta, state.memory)
                    check_finite("meta-parameter", meta, tasks=False)
                    log = checks.read(log)
            except FloatingPointError as error:
                raise FloatingPointError(f"{self.name}, iteration {iteration}: {error}") from None
            state.history.append(log)
            state = MetaTraining(iteration + 1, meta, memory, state.history)
            if callback is not None:
                callback(state)
        return state

    def _seeds(self, seed: Sequence[int]) -> tuple[int, ...]:
        several = (
            isinstance(seed, Sequence)
            and not isinstance(seed, str)
            and len(seed) > 0
            and all(whole(s, -math.inf) for s in seed)
        )
        require(several, "seed", seed, "a whole number, or a sequence of them")
        together = f"one whole number with {type(self.outer).__name__}: train its seeds one by one"
        require(self.batches_seeds, "seed", seed, together)
        return tuple(map(index, seed))


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on ``device``; from page-locked memory to a GPU, so that the host goes on at once."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def iteration_generator(seed: int, iteration: int) -> Generator:
    """The generator that draws the tasks of one iteration: no state to carry from one to the next.

    Its seed is never one of those that draw the lists of ``families.split``, so training does not meet the test.
    """
    number = (seed * 1_000_003 + iteration) % 2**32  # torch's generator on the CPU reads no more of a seed
    return Generator().manual_seed(number + 2**31 if number in SPLIT_SEEDS.values() else number)
