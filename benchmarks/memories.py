"""Which memory, and learning from logs: recurrence, sums and attention trained online by RL^2, and offline from the
trials that a simple agent left, with the same processor seconds.

    python -m benchmarks.memories                                # 15 processor minutes
    python -m benchmarks.memories --problems bandit --again      # one problem, anew
    python -m benchmarks.memories --quick --json FILE            # tiny sizes: does it run?

Two problems: a price every day for 5 rounds of 14 days (``LogitPricing``, one store), and 10 visitors for 5 banners
(``BernoulliBandit``), whose optimum is known. Scores are those of the whole trial, from expected rewards of what was
done: pricing's between the blind policy and the oracle, the bandit's as a share of the exact optimum. The log holds
trials of products that no other experiment meets, 8 of each, by an epsilon-greedy agent that knows no prior; one run
imitates Thompson sampling with the true prior instead. Results: benchmarks/results/memories.json, shown in chapter
"Memory and belief".
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from ecomlib.baselines import EpsilonGreedy, Thompson
from ecomlib.baselines.bandits import BanditGreedy, BanditThompson, OptimalBandit
from ecomlib.baselines.oracle import oracle_decisions
from ecomlib.evaluation.statistics import normalised_score
from ecomlib.exact_bandits import bayes_optimal
from ecomlib.families import LogitPricing, split
from ecomlib.families.bandits import BernoulliBandit
from ecomlib.learners.offline import Offline, OfflineConfig, TrialLog, record_trials
from ecomlib.learners.rl2 import RL2, RL2Config, Teacher
from ecomlib.rollout import Agent, trial

RESULT = Path("benchmarks/results/memories.json")
MEMORIES = ("gru", "sum", "attention")
TARGETS = {"distillation": "log", "weighted": "advantage", "pretraining": "oracle"}
REPLICAS = 8
"""Trials of a task, in a log as in an iteration of RL^2."""
BANDIT = BernoulliBandit(5, 10)
FIRST_LOGGED = 2**62
"""Ids of logged tasks: above all that are ever drawn."""


@dataclass(frozen=True)
class Problem:
    """A family, its trial, and who left the logs."""

    family: Any
    episodes: int
    seconds: float
    """Processor seconds of a training."""
    test: int
    """Test tasks."""
    logger: Agent
    thompson: Agent
    teacher: Teacher
    by_action: bool = False
    logged: int = 512
    """Tasks of a log."""

    def score(self, agent: Agent) -> float:
        """Of the whole trial, on the fixed test tasks with the same luck for all agents."""
        family, tasks = split(self.family, "test", self.test)
        action = trial(family, tasks, agent, self.episodes, 1, seed=11, progress=False).action
        returns = family.mean_reward(tasks, action).sum((0, 1))[:, 0]
        if isinstance(family, BernoulliBandit):
            # Less what the optimal agent earned on the same tasks, which takes out most of the luck.
            return 1 + (returns - _optimal(self.test)).mean().item() / bayes_optimal(family).value
        blind, oracle = (self.episodes * x for x in (family.blind_return(tasks), family.oracle_return(tasks)))
        return normalised_score(returns, blind, oracle)

    def log(self, agent: Agent, teacher: Teacher | None = None) -> TrialLog:
        """What ``agent`` left."""
        ids = FIRST_LOGGED + torch.arange(self.logged)
        return record_trials(self.family, ids, agent, self.episodes, 1, REPLICAS, 12, teacher)


@lru_cache(maxsize=2)
def _optimal(test: int) -> Tensor:
    """(test,) what the optimal agent earns on the bandit's test tasks."""
    family, tasks = split(BANDIT, "test", test)
    action = trial(family, tasks, OptimalBandit(family), 1, 1, seed=11, progress=False).action
    return family.mean_reward(tasks, action).sum((0, 1))[:, 0]


def problems() -> dict[str, Problem]:
    """The two."""
    pricing, bandit = LogitPricing(), BANDIT
    best = lambda _, tasks: lambda seen, task: tasks.chance[task].argmax(-1)[:, None].expand(seen.shape[:2])
    return {
        "pricing": Problem(
            pricing, 5, 20.0, 1000, EpsilonGreedy(pricing, 0.1), Thompson(pricing, 512), oracle_decisions
        ),
        "bandit": Problem(bandit, 1, 12.0, 20_000, BanditGreedy(bandit, 0.1), BanditThompson(bandit), best, True),
    }


def runs(problem: Problem) -> dict[str, tuple[str, Callable[[int | None], Any], Callable[[], Any]]]:
    """Name -> (kind, learner for so many iterations, what it is trained on)."""
    shared = {"episodes": problem.episodes, "by_action": problem.by_action, "replicas": REPLICAS}
    logs: dict[str, TrialLog] = {}

    def log(name: str, *arguments: Any) -> TrialLog:
        if name not in logs:
            logs[name] = problem.log(*arguments)
        return logs[name]

    simple = lambda: log("simple", problem.logger, problem.teacher)
    thompson = lambda: log("thompson", problem.thompson)

    def online(memory: str) -> Callable[[int | None], RL2]:
        return lambda anneal: RL2(problem.family, RL2Config(memory=memory, anneal=anneal, **shared))

    def offline(target: str, memory: str, source: Callable[[], TrialLog]) -> Callable[[int | None], Offline]:
        config = OfflineConfig(target=target, memory=memory, temperature=0.5, **shared)
        return lambda anneal: Offline(problem.family, source(), replace(config, anneal=anneal))

    found = {f"online, {memory}": ("online", online(memory), lambda: problem.family) for memory in MEMORIES}
    found["distillation of Thompson, gru"] = ("offline", offline("log", "gru", thompson), thompson)
    for memory, titles in (("gru", TARGETS), ("attention", ("distillation", "pretraining"))):
        for title in titles:
            found[f"{title}, {memory}"] = ("offline", offline(TARGETS[title], memory, simple), simple)
    return found


def trained(build: Callable[[int | None], Any], source: Any, seed: int, seconds: float) -> tuple[Any, Any, dict]:
    """(learner, parameters, record) after so many processor seconds, the step size falling to its end in them."""
    learner = build(None)
    learner.meta_train(source, seed, 1, progress=False)
    began = time.process_time()
    learner.meta_train(source, seed, 3, progress=False)
    iterations = max(2, int(seconds * 3 / (time.process_time() - began)))
    learner = build(iterations)
    began = time.process_time()
    state = learner.meta_train(source, seed, iterations, progress=False)
    record = {"seed": seed, "iterations": iterations, "seconds": time.process_time() - began}
    return learner, state.meta, record


def main() -> None:
    """What the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=("pricing", "bandit"), default=("pricing", "bandit"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--again", action="store_true", help="also what the file holds")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.problems:
        print(f"{name}: logs and baselines", flush=True)
        problem = problems()[name]
        if arguments.quick:
            problem = replace(problem, seconds=1.0, test=50, logged=32)
        stored = lambda: json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        part = {} if arguments.again else stored().get(name, {})
        part["environment"] = measure.environment("memories", "cpu", problem=name) | measure.conditions()
        part |= {"seconds": problem.seconds, "test tasks": problem.test, "logged trials": problem.logged * REPLICAS}
        part.setdefault("runs", {})
        if "agents" not in part:
            part["agents"] = {"logger": problem.score(problem.logger), "Thompson": problem.score(problem.thompson)}
        todo = runs(problem)
        for seed, title in product(arguments.seeds[:1] if arguments.quick else arguments.seeds, todo):
            kind, build, source = todo[title]
            entries = part["runs"].setdefault(title, {"kind": kind, "seeds": []})["seeds"]
            if any(entry["seed"] == seed for entry in entries):
                continue
            learner, meta, record = trained(build, source(), seed, problem.seconds)
            for key, sample in (("score", True), ("score of most likely actions", False)):
                record[key] = problem.score(learner.agent(meta, sample))
            record["parameters"] = sum(p.numel() for p in meta)
            entries.append(record)
            print(name, title, record, flush=True)
            measure.write(arguments.json, stored() | {name: part})


if __name__ == "__main__":
    main()
